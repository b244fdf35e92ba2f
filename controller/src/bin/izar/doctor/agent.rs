//! What an agent needs of its server: its own certificate, room for models, controllers that it reaches, the GPUs that it
//! shall have, and root's hand where it may mend them. The agent's program says what its configuration says.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use izar_common::checked::{Checked, Gpu};
use izar_common::config::credential_name;
use izar_common::health::gpu::Mode;
use izar_common::tls;
use tokio::net::{TcpStream, UdpSocket};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Finding, credential, machine};
use crate::programs;

/// How long the agent's program may take: it asks the GPU library, which hangs on a sick GPU.
const ASKED_LIMIT: Duration = Duration::from_secs(20);
/// So much of what it says when it refuses: a mistake in the file is a line or two.
const SAID_LINES: usize = 4;
/// How long a controller may take to answer a packet, asked so many times: packets are lost.
const ANSWER_LIMIT: Duration = Duration::from_millis(700);
const TRIES: usize = 3;
/// What a QUIC packet of no known version looks like: a long header, the version, two ids of 8 bytes, and as many bytes
/// as a first packet has. Whoever speaks QUIC answers with the versions that it knows (RFC 9000, section 6).
const PACKET_BYTES: usize = 1200;
const LONG_HEADER: u8 = 0xc0;
const NO_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];
const ID_BYTES: u8 = 8;

/// Everything that an agent needs here.
pub async fn examine(config: &Path) -> Vec<Finding> {
    const CHECK: &str = "agent configuration";
    let checked = match asked(config).await {
        Ok(checked) => checked,
        Err(error) => {
            let mend = "correct the line, or install izar-agent beside izar; izar-agent --check-config says the same";
            return vec![Finding::failure(CHECK, format!("{error:#}"), mend)];
        }
    };
    let mut findings = vec![Finding::ok(CHECK, format!("{} is sound", config.display()))];
    findings.push(certificate(&checked));
    findings
        .extend(credential_name(&checked.key).map(|name| credential::given("agent key", "izar-agent.service", name)));
    findings.push(machine::space(
        &checked.data_dir,
        "make room, or move data_dir to a larger disk; an agent whose disk is full fetches no models",
    ));
    findings.extend(controllers(&checked.controllers).await);
    findings.extend(machine::gpus(Path::new("/dev")));
    findings.extend(count(&checked.gpu));
    findings.extend(hand(&checked.gpu));
    findings
}

async fn asked(config: &Path) -> anyhow::Result<Checked> {
    let mut agent = Command::new(programs::beside("izar-agent")?);
    agent.args(["--check-config", "--json", "--config"]).arg(config).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(ASKED_LIMIT, agent.output());
    let output = output.await.with_context(|| {
        format!(
            "izar-agent did not answer within {} s: the GPU library hangs (nvidia-smi, dmesg)",
            ASKED_LIMIT.as_secs()
        )
    })?;
    let output = output.context("run izar-agent")?;
    // A library that crashes says more than anybody reads.
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.trim().lines().take(SAID_LINES).collect();
    ensure!(output.status.success(), "{}", said.join("\n"));
    serde_json::from_slice(&output.stdout).context("izar-agent is of another version than izar")
}

/// A key that is a credential is the agent's alone; what is public of the certificate is judged all the same.
fn certificate(checked: &Checked) -> Finding {
    const CHECK: &str = "agent certificate";
    let dates = machine::dates(CHECK, [&checked.ca, &checked.cert]);
    if dates.is_failure() {
        return dates;
    }
    let fail = |found: String| Finding::failure(CHECK, found, machine::CERTIFICATE_MEND);
    if credential_name(&checked.key).is_none() {
        return checked.unusable.clone().map_or(dates, fail);
    }
    let files = tls::Files { ca: checked.ca.clone(), cert: checked.cert.clone(), key: checked.key.clone() };
    match tls::without_key(&files) {
        Ok(identity) if identity.to_string() == checked.identity => dates,
        Ok(identity) => fail(format!("it is {identity}, but this is {}", checked.identity)),
        Err(error) => fail(format!("{error:#}")),
    }
}

/// Whether each controller answers on its QUIC port, and takes the TCP connection that tells of a death at once.
async fn controllers(addresses: &[SocketAddr]) -> Vec<Finding> {
    let mut asked = JoinSet::new();
    for (place, address) in addresses.iter().copied().enumerate() {
        asked.spawn(async move {
            let (quic, wire) = tokio::join!(answers(address), timeout(ANSWER_LIMIT, TcpStream::connect(address)));
            (place, address, quic, matches!(wire, Ok(Ok(_))))
        });
    }
    let mut answers = asked.join_all().await;
    answers.sort_unstable();
    let any = answers.iter().any(|(_, _, quic, _)| *quic);
    answers.iter().map(|(_, address, quic, wire)| reached(*address, *quic, *wire, any)).collect()
}

fn reached(address: SocketAddr, quic: bool, wire: bool, any: bool) -> Finding {
    const CHECK: &str = "controller reached";
    let port = address.port();
    match (quic, wire) {
        (true, true) => Finding::ok(CHECK, format!("{address} answers over UDP and TCP")),
        (true, false) => {
            let mend = format!("let TCP pass to port {port}: without it, a dead agent is noticed by its silence alone");
            Finding::warning(CHECK, format!("{address} answers over UDP, but takes no TCP connection"), mend)
        }
        (false, _) => {
            let found = format!("{address} does not answer over UDP");
            let mend = format!("see whether that controller runs, and whether a firewall keeps UDP from port {port}");
            let judged = if any { Finding::warning } else { Finding::failure };
            judged(CHECK, found, mend)
        }
    }
}

/// Whether somebody who speaks QUIC answers there. Needs no certificate, and begins no connection.
async fn answers(address: SocketAddr) -> bool {
    for _ in 0..TRIES {
        if let Ok(Ok(true)) = timeout(ANSWER_LIMIT, ask(address)).await {
            return true;
        }
    }
    false
}

async fn ask(address: SocketAddr) -> std::io::Result<bool> {
    let own: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let mut packet = vec![LONG_HEADER];
    packet.extend(NO_VERSION);
    for byte in *b"dc" {
        packet.push(ID_BYTES);
        packet.extend([byte; ID_BYTES as usize]);
    }
    packet.resize(PACKET_BYTES, 0);
    let socket = UdpSocket::bind(own).await?;
    socket.connect(address).await?;
    socket.send(&packet).await?;
    let mut answer = [0; PACKET_BYTES];
    let length = socket.recv(&mut answer).await?;
    // Version 0: these are the versions that I know.
    Ok(length > 5 && answer[0] & 0x80 != 0 && answer[1..5] == [0; 4])
}

/// The GPUs that there should be against those that there are.
fn count(gpu: &Gpu) -> Option<Finding> {
    const CHECK: &str = "gpu count";
    let mend = "see nvidia-smi and dmesg for a GPU that is lost; or correct gpu.expected; docs/gpus.md";
    match (gpu.expected, gpu.found, &gpu.reason) {
        (_, _, Some(reason)) => {
            Some(Finding::failure(CHECK, format!("the GPU library does not count: {reason}"), mend))
        }
        (Some(expected), Some(found), None) if found < expected => {
            let found = format!("{found} GPUs are found, {expected} are expected: this agent gets no work");
            Some(Finding::failure(CHECK, found, mend))
        }
        (_, Some(found), None) if found > 0 => Some(Finding::ok(CHECK, format!("{found} GPUs are found"))),
        _ => None,
    }
}

/// Who may act needs root's hand, which listens on a socket of systemd's.
fn hand(gpu: &Gpu) -> Option<Finding> {
    const CHECK: &str = "gpu remediation";
    if gpu.mode != Mode::Act {
        return None;
    }
    let path = gpu.helper.display();
    let listens = std::fs::metadata(&gpu.helper).is_ok_and(|meta| meta.file_type().is_socket());
    if listens {
        return Some(Finding::ok(CHECK, format!("{path} is there")));
    }
    let mend = "agent_remediation: true in the inventory and playbooks/site.yml, or systemctl enable --now izar-gpu.socket; \
                or gpu.mode = \"advise\"";
    Some(Finding::failure(CHECK, format!("gpu.mode is act, but {path} is no socket: no GPU can be mended"), mend))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn gpu(mode: Mode, expected: Option<u32>, found: Option<u32>) -> Gpu {
        let reason = found.is_none().then(|| "driver not loaded".to_owned());
        Gpu { mode, expected, helper: "/nowhere/gpu.sock".into(), found, reason }
    }

    #[test]
    fn fewer_gpus_than_expected_and_a_library_that_does_not_count_are_failures() {
        let judged = |expected, found| count(&gpu(Mode::Advise, expected, found)).map(|finding| finding.verdict);
        assert_eq!(judged(Some(8), Some(7)), Some(Verdict::Failure));
        assert_eq!(judged(Some(8), None), Some(Verdict::Failure));
        assert_eq!([judged(Some(8), Some(8)), judged(None, Some(2))], [Some(Verdict::Ok); 2]);
        assert_eq!(judged(None, Some(0)), None);
    }

    #[test]
    fn whoever_may_act_needs_a_hand_and_nobody_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let mut act = gpu(Mode::Act, None, Some(1));
        let found = hand(&act).unwrap();
        assert!(found.verdict == Verdict::Failure && found.mend.unwrap().contains("agent_remediation"));
        act.helper = dir.path().join("gpu.sock");
        std::fs::write(&act.helper, "").unwrap();
        assert_eq!(hand(&act).unwrap().verdict, Verdict::Failure, "a file is no socket");
        std::fs::remove_file(&act.helper).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&act.helper).unwrap();
        assert_eq!(hand(&act).unwrap().verdict, Verdict::Ok);
        assert_eq!(hand(&gpu(Mode::Advise, None, Some(1))), None);
    }

    #[test]
    fn a_controller_that_is_silent_is_a_warning_while_another_answers() {
        let judged = |quic, wire, any| reached("127.0.0.1:1".parse().unwrap(), quic, wire, any).verdict;
        assert_eq!(judged(true, true, true), Verdict::Ok);
        assert_eq!([judged(true, false, true), judged(false, true, true)], [Verdict::Warning; 2]);
        assert_eq!(judged(false, false, false), Verdict::Failure);
    }
}
