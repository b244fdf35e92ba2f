//! What a daemon needs of its machine: a synchronised clock, a disk with room that is quick to fsync, certificates and
//! secrets that are good, free ports, enough open files, devices that open.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use izar_common::clock::wall_ms;
use izar_common::config::credential_name;
use izar_common::seal::{MasterKey, Pepper};
use izar_common::tls::{self, dates};
use izar_controller::config::Config;

use super::{Daemon, Finding, credential};
use crate::show;

/// Room that must be left on the data directory's disk: the log, a few audit segments, and time to react.
const SPACE_FAILURE: u64 = 1 << 30;
const SPACE_WARNING: u64 = 10 << 30;
/// An fsync stands before every first token; elections begin after 200 ms without a heartbeat.
const FSYNC_WARNING: Duration = Duration::from_millis(10);
const FSYNC_FAILURE: Duration = Duration::from_millis(100);
/// How many are timed.
const FSYNCS: usize = 20;
/// A certificate with less than this left should be renewed now.
pub const DAYS_WARNING: i64 = 30;
/// What to do about a certificate.
pub const CERTIFICATE_MEND: &str = "issue it anew (izar pki issue, or your own CA). With a new key, as izar pki issue makes one, where keys \
                    are credentials: encrypt the key anew and restart, one node at a time (playbooks/rotate_certs.yml \
                    does it); a reload is enough where the key is a file, or unchanged";
/// What to do about a controller's disk.
const DISK_MEND: &str = "make room, or move data_dir to a larger disk; a controller whose disk is full ends itself";
/// A controller with fewer runs out under load: each client, peer and file is one.
const OPEN_FILES: u64 = 65_536;

/// Whose credentials a controller's are.
const UNIT: &str = "izar-controller.service";

/// Everything that a controller needs here.
pub fn controller(config: &Config, daemon: Daemon) -> Vec<Finding> {
    let mut findings = vec![secret("master key", &config.secrets.master_key, |path| MasterKey::load(path).map(drop))];
    findings.push(secret("pepper", &config.secrets.pepper, |path| Pepper::load(path).map(drop)));
    findings.push(node_certificate(config));
    findings.push(api_certificate(config));
    for (check, key) in [("node key", &config.tls.key), ("api key", &config.api.key)] {
        findings.extend(credential_name(key).map(|name| credential::given(check, UNIT, name)));
    }
    findings.push(space(&config.data_dir, DISK_MEND));
    findings.push(fsync(&config.data_dir));
    match daemon {
        Daemon::Runs(pid) => findings.push(open_files(pid)),
        Daemon::Stopped => findings.extend(ports(config)),
        Daemon::Unseen => {}
    }
    findings
}

fn secret(check: &str, path: &Path, load: impl Fn(&Path) -> Result<(), izar_common::seal::Error>) -> Finding {
    if let Some(name) = credential_name(path) {
        return credential::given(check, UNIT, name);
    }
    match load(path) {
        Ok(()) => Finding::ok(check, "readable, and by nobody else"),
        Err(error) => {
            let mend = "it is the same file on every controller; name the right one, and let its owner alone read it";
            Finding::failure(check, format!("{:#}", anyhow::Error::from(error)), mend)
        }
    }
}

fn node_certificate(config: &Config) -> Finding {
    const CHECK: &str = "node certificate";
    let dates = dates(CHECK, [&config.tls.ca, &config.tls.cert]);
    if dates.is_failure() {
        return dates;
    }
    let read = match credential_name(&config.tls.key) {
        Some(_) => tls::without_key(&config.tls),
        None => tls::NodeTls::load(&config.tls).map(|node| node.identity().clone()),
    };
    let who = match read {
        Ok(who) => who,
        Err(error) => return Finding::failure(CHECK, format!("{error:#}"), CERTIFICATE_MEND),
    };
    if (&who.cluster, &who.site, &who.node) != (&config.cluster, &config.site, &config.node) {
        return Finding::failure(CHECK, format!("it is {who}, but this is {}", config.node), CERTIFICATE_MEND);
    }
    dates
}

/// The worst of what the dates of certificates say; of two that are alike, what the last says.
pub fn dates(check: &str, files: [&PathBuf; 2]) -> Finding {
    let dates = files.map(|path| lasts(check, path, CERTIFICATE_MEND));
    dates.into_iter().max_by_key(|finding| finding.verdict).expect("two")
}

fn api_certificate(config: &Config) -> Finding {
    const CHECK: &str = "api certificate";
    if credential_name(&config.api.key).is_some() {
        return lasts(CHECK, &config.api.cert, CERTIFICATE_MEND);
    }
    match tls::https_server(&config.api.cert, &config.api.key) {
        Ok(_) => lasts(CHECK, &config.api.cert, CERTIFICATE_MEND),
        Err(error) => Finding::failure(CHECK, format!("{error:#}"), CERTIFICATE_MEND),
    }
}

fn lasts(check: &str, path: &Path, mend: &str) -> Finding {
    let validities = match dates::validities(path) {
        Ok(validities) => validities,
        Err(error) => return Finding::failure(check, format!("{error:#}"), mend),
    };
    let (from, until) =
        validities.iter().fold((i64::MIN, i64::MAX), |(from, until), v| (from.max(v.from_ms), until.min(v.until_ms)));
    validity(check, path, mend, from, until, wall_ms() as i64)
}

fn validity(check: &str, path: &Path, mend: &str, from_ms: i64, until_ms: i64, now_ms: i64) -> Finding {
    let days = (until_ms - now_ms) / 86_400_000;
    let found = format!("{} is good until {}", path.display(), show::time(until_ms.max(0) as u64));
    match () {
        () if now_ms < from_ms => Finding::failure(
            check,
            format!("{} begins only at {}", path.display(), show::time(from_ms.max(0) as u64)),
            "look at this machine's clock, then at the certificate",
        ),
        () if now_ms >= until_ms => {
            let found = format!("{} has expired (on {})", path.display(), dates::day(until_ms / 1000));
            Finding::failure(check, found, mend)
        }
        () if days < DAYS_WARNING => Finding::warning(check, format!("{found}, {days} days"), mend),
        () => Finding::ok(check, format!("{found}, {days} days")),
    }
}

pub fn space(dir: &Path, mend: &str) -> Finding {
    const CHECK: &str = "disk space";
    let Some(dir) = dir.ancestors().find(|dir| dir.is_dir()) else {
        return Finding::failure(CHECK, format!("{} is nowhere", dir.display()), mend);
    };
    match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let found = format!("{} has {} free", dir.display(), show::bytes(free));
            match free {
                0..SPACE_FAILURE => Finding::failure(CHECK, found, mend),
                SPACE_FAILURE..SPACE_WARNING => Finding::warning(CHECK, found, mend),
                _ => Finding::ok(CHECK, found),
            }
        }
        Err(error) => Finding::failure(CHECK, format!("{}: {error}", dir.display()), mend),
    }
}

/// Times fsyncs where the log lies.
fn fsync(dir: &Path) -> Finding {
    const CHECK: &str = "disk latency";
    if !dir.is_dir() {
        return Finding::ok(CHECK, format!("{} is not there yet", dir.display()));
    }
    let time = || -> std::io::Result<Vec<Duration>> {
        let mut file = tempfile::tempfile_in(dir)?;
        (0..FSYNCS).map(|_| one_fsync(&mut file)).collect()
    };
    match time() {
        Ok(times) => latency(times),
        Err(error) => {
            let mend = "run it as the daemon's user or as root";
            Finding::failure(CHECK, format!("cannot write to {}: {error}", dir.display()), mend)
        }
    }
}

fn one_fsync(file: &mut File) -> std::io::Result<Duration> {
    file.write_all(&[0; 4096])?;
    let begin = Instant::now();
    file.sync_data()?;
    Ok(begin.elapsed())
}

fn latency(mut times: Vec<Duration>) -> Finding {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    let found = format!("an fsync takes {:.1} ms, the slowest of {FSYNCS} {:.1} ms", ms(median), ms(worst));
    let mend = "every request waits for one: use an SSD with power-loss protection, and let nothing else write there";
    match median {
        _ if median >= FSYNC_FAILURE => Finding::failure("disk latency", found, mend),
        _ if median >= FSYNC_WARNING => Finding::warning("disk latency", found, mend),
        _ => Finding::ok("disk latency", found),
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A controller that is down must find its ports free.
fn ports(config: &Config) -> Vec<Finding> {
    let udp = ("quic.listen", "udp", config.quic.listen, UdpSocket::bind(config.quic.listen).map(drop));
    let tcp = ("api.listen", "tcp", config.api.listen, TcpListener::bind(config.api.listen).map(drop));
    let finding = |(key, kind, address, bound): (_, &str, std::net::SocketAddr, std::io::Result<()>)| match bound {
        Ok(()) => Finding::ok(key, format!("{address} ({kind}) is free")),
        Err(error) => {
            let port = address.port();
            let mend = format!("see who has it with ss -lnp 'sport = :{port}', or choose another address");
            Finding::failure(key, format!("{address} ({kind}): {error}"), mend)
        }
    };
    [udp, tcp].map(finding).into()
}

fn open_files(pid: u32) -> Finding {
    const CHECK: &str = "open files";
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    match soft_limit(&limits) {
        Some(limit) if limit < OPEN_FILES => {
            let mend = format!("set LimitNOFILE={OPEN_FILES} in the unit, or ulimit -n");
            Finding::warning(CHECK, format!("the controller may have {limit}"), mend)
        }
        Some(limit) => Finding::ok(CHECK, format!("the controller may have {limit}")),
        None => Finding::warning(CHECK, format!("/proc/{pid}/limits does not say"), "run it as root"),
    }
}

/// The soft limit of open files in the text of `/proc/<pid>/limits`.
fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let word = line.split_whitespace().next()?;
    if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() }
}

/// Whether something keeps this machine's clock right.
pub fn clock() -> Finding {
    let asked = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output();
    let said = asked.ok().filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    synchronised(said.as_deref())
}

fn synchronised(said: Option<&str>) -> Finding {
    const MEND: &str = "install chrony or systemd-timesyncd and give it a time server that all nodes can reach";
    match said {
        Some("yes") => Finding::ok("clock", "synchronised by NTP"),
        Some(_) => Finding::warning("clock", "not synchronised", MEND),
        None => Finding::warning("clock", "timedatectl does not say whether it is synchronised", MEND),
    }
}

/// Whether the NVIDIA devices open.
pub fn gpus(dev: &Path) -> Vec<Finding> {
    const CHECK: &str = "gpu";
    let numbered = |name: &str| {
        name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let names =
        std::fs::read_dir(dev).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| numbered(name)).collect();
    if names.is_empty() {
        return vec![Finding::ok(CHECK, "no NVIDIA device: this agent computes on the processor")];
    }
    names.sort();
    names.push("nvidiactl".into());
    let finding = |name: String| {
        let path = dev.join(name);
        match File::options().read(true).write(true).open(&path) {
            Ok(_) => Finding::ok(CHECK, format!("{} opens", path.display())),
            Err(error) => {
                let mend =
                    "see nvidia-smi and dmesg; the agent's user needs the device's group, and the unit DeviceAllow=";
                Finding::failure(CHECK, format!("{}: {error}", path.display()), mend)
            }
        }
    };
    names.into_iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_credential_is_the_daemons_alone_and_not_read() {
        let load = |_: &Path| -> Result<(), izar_common::seal::Error> { panic!("nothing is read") };
        let found = secret("pepper", Path::new("credential:pepper"), load);
        assert!(found.found.contains("the credential pepper"), "{found:?}");
    }

    #[test]
    fn a_certificate_is_judged_by_the_days_it_has_left() {
        let day = 86_400_000;
        let judged = |from, until| validity("c", Path::new("/c.pem"), "renew", from, until, 1000 * day).verdict;
        assert_eq!(judged(0, 1100 * day), Verdict::Ok);
        assert_eq!(judged(0, 1029 * day), Verdict::Warning);
        assert_eq!(judged(0, 1000 * day), Verdict::Failure);
        assert_eq!(judged(1001 * day, 1100 * day), Verdict::Failure);
    }

    #[test]
    fn a_slow_disk_is_a_warning_and_a_hopeless_one_a_failure() {
        let judged = |ms| latency(vec![Duration::from_millis(ms); FSYNCS]).verdict;
        assert_eq!([1, 10, 100].map(judged), [Verdict::Ok, Verdict::Warning, Verdict::Failure]);
    }

    #[test]
    fn limits_and_clocks_are_read() {
        let text =
            "Limit  Soft  Hard  Units\nMax open files            1024                 524288               files\n";
        assert_eq!(
            (soft_limit(text), soft_limit("Max open files unlimited x"), soft_limit("")),
            (Some(1024), Some(u64::MAX), None)
        );
        assert_eq!(["yes", "no"].map(|said| synchronised(Some(said)).verdict), [Verdict::Ok, Verdict::Warning]);
    }

    #[test]
    fn devices_that_do_not_open_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(gpus(dir.path())[0].verdict, Verdict::Ok);
        std::fs::write(dir.path().join("nvidia0"), "").unwrap();
        std::fs::write(dir.path().join("nvidia-uvm"), "").unwrap();
        let found = gpus(dir.path());
        assert_eq!(found.iter().map(|f| f.verdict).collect::<Vec<_>>(), [Verdict::Ok, Verdict::Failure]);
        assert!(found[1].found.contains("nvidiactl"), "{found:?}");
    }
}
