//! What needs root, in a process of its own for each request: three verbs and two questions, nothing that a caller could
//! widen.
//!
//! systemd starts it for a connection to `/run/izar/gpu.sock` (`izar-gpu@.service`); the connection is standard input.
//! One line comes in, one goes out:
//!
//! ```text
//! reset GPU-<uuid>      nvidia-smi --gpu-reset -i GPU-<uuid>
//! release GPU-<uuid>    ends the processes that compute on the GPU, which a reset needs
//! reboot                systemctl reboot, but where a controller works: whoever ordered it has counted agents alone
//! may-reboot            whether that would be refused
//! idle                  whether nobody does any of this; waits until it is so
//! ```
//! `ok`, `ok ended=N`, `refused: why` (nothing was done) or `failed: why`. Who calls is what the kernel says: root, or the
//! main process of the agent's unit, so that no worker may; which programs run stands in the unit. The agent itself has no
//! capability, and decides when to ask; this never does.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Pid, User};

/// Bytes of a request; the longest has 49.
const REQUEST_BYTES: u64 = 128;

/// How long a caller may take over its line.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// Bytes that are read away after the answer, and how long the caller may take to close.
const REST_BYTES: u64 = 64 << 10;
const PART_LIMIT: Duration = Duration::from_secs(1);

/// How long a program may run; a reset takes seconds. Within the unit's `RuntimeMaxSec=`.
const PROGRAM_LIMIT: Duration = Duration::from_secs(90);

/// How long processes may take to end when asked, before they are killed.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What else a restart of the server would take down.
const CONTROLLER: &str = "izar-controller.service";

/// Between two looks at something that ends.
const LOOK: Duration = Duration::from_millis(50);

/// Set by the unit, never by a caller.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The user who may ask, besides root.
    #[arg(long)]
    user: String,
    /// Of that user, only the main process of this unit may.
    #[arg(long)]
    unit: Option<String>,
    #[arg(long, default_value = "/usr/bin/nvidia-smi")]
    nvidia_smi: PathBuf,
    #[arg(long, default_value = "/usr/bin/systemctl")]
    systemctl: PathBuf,
    /// The folder that is locked while anything is done.
    #[arg(long, default_value = "/run/izar")]
    folder: PathBuf,
}

/// A GPU as the driver names it: `GPU-` and a UUID in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Gpu(String);

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Request {
    Reset(Gpu),
    Release(Gpu),
    Reboot,
    MayReboot,
    Idle,
}

/// Serves the request on standard input.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    izar_common::logging::init(None);
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("take standard input")?;
    let mut caller = UnixStream::from(stdin);
    let admitted = asked(&mut caller, arguments).and_then(|request| admit(request, &arguments.systemctl));
    let said = match admitted {
        Ok(request) => {
            log::info!(request:?; "a remediation is asked for");
            match carry_out(&request, arguments) {
                Ok(done) => {
                    log::warn!(request:?, done; "a remediation is done");
                    done
                }
                Err(error) => {
                    log::error!(request:?, reason = format!("{error:#}"); "a remediation failed");
                    format!("failed: {}", on_one_line(&format!("{error:#}")))
                }
            }
        }
        Err(error) => {
            log::warn!(reason = format!("{error:#}"); "a remediation is refused");
            format!("refused: {}", on_one_line(&format!("{error:#}")))
        }
    };
    // A caller that is gone does not undo what was done.
    let _ = writeln!(caller, "{said}");
    part(caller);
    Ok(())
}

/// Closes the connection after the caller has its answer: bytes of it that nobody read would make the kernel tell it of a
/// broken connection.
fn part(caller: UnixStream) {
    let _ = caller.shutdown(Shutdown::Write);
    let _ = caller.set_read_timeout(Some(PART_LIMIT));
    let _ = std::io::copy(&mut caller.take(REST_BYTES), &mut std::io::sink());
}

/// Reads the request of a caller who may ask.
fn asked(caller: &mut UnixStream, arguments: &Arguments) -> anyhow::Result<Request> {
    let who = getsockopt(caller, sockopt::PeerCredentials).context("ask the kernel who calls")?;
    let user = &arguments.user;
    let allowed = User::from_name(user).with_context(|| format!("look up the user {user}"))?;
    let allowed = allowed.with_context(|| format!("there is no user {user}"))?;
    ensure!(who.uid() == 0 || who.uid() == allowed.uid.as_raw(), "user {} may not ask", who.uid());
    if let Some(unit) = arguments.unit.as_deref().filter(|_| who.uid() != 0) {
        let main = output(&arguments.systemctl, &["show", "--property=MainPID", "--value", unit])?;
        ensure!(main.trim() == who.pid().to_string(), "process {} may not ask, only the main one of {unit}", who.pid());
    }
    caller.set_read_timeout(Some(REQUEST_LIMIT)).context("limit the wait for the request")?;
    let mut line = Vec::new();
    let mut limited = Read::take(&mut *caller, REQUEST_BYTES);
    let mut byte = [0];
    while limited.read(&mut byte).context("read the request")? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    parse(std::str::from_utf8(&line).unwrap_or_default())
}

fn parse(line: &str) -> anyhow::Result<Request> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["reset", gpu] => Ok(Request::Reset(gpu_of(gpu)?)),
        ["release", gpu] => Ok(Request::Release(gpu_of(gpu)?)),
        ["reboot"] => Ok(Request::Reboot),
        ["may-reboot"] => Ok(Request::MayReboot),
        ["idle"] => Ok(Request::Idle),
        _ => bail!("not a request: use reset GPU-<uuid>, release GPU-<uuid>, reboot, may-reboot or idle"),
    }
}

fn gpu_of(text: &str) -> anyhow::Result<Gpu> {
    let hex = |part: &str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let groups = text.strip_prefix("GPU-").map(|uuid| uuid.split('-').collect::<Vec<_>>()).unwrap_or_default();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    ensure!(lengths == [8, 4, 4, 4, 12] && groups.iter().all(|group| hex(group)), "not the UUID of a GPU");
    Ok(Gpu(text.to_owned()))
}

/// Refuses a restart of a server on which a controller works: it may be the one that its majority needs.
fn admit(request: Request, systemctl: &Path) -> anyhow::Result<Request> {
    if matches!(request, Request::Reboot | Request::MayReboot) {
        let state = output(systemctl, &["show", "--property=ActiveState", "--value", CONTROLLER])?;
        may_end(state.trim())?;
    }
    Ok(request)
}

/// Whether nothing is lost with a unit in this state.
fn may_end(state: &str) -> anyhow::Result<()> {
    ensure!(
        matches!(state, "inactive" | "failed"),
        "a controller works on this server ({CONTROLLER} is `{state}`): an operator must drain and restart it"
    );
    Ok(())
}

fn carry_out(request: &Request, arguments: &Arguments) -> anyhow::Result<String> {
    match request {
        Request::Reset(gpu) => {
            let _alone = alone(&arguments.folder)?;
            output(&arguments.nvidia_smi, &["--gpu-reset", "-i", &gpu.0])?;
            Ok("ok".into())
        }
        Request::Release(gpu) => {
            let _alone = alone(&arguments.folder)?;
            let query = ["-i", &gpu.0, "--query-compute-apps=pid", "--format=csv,noheader"];
            let ended = end(&pids(&output(&arguments.nvidia_smi, &query)?)?)?;
            Ok(format!("ok ended={ended}"))
        }
        Request::Reboot => {
            let _alone = alone(&arguments.folder)?;
            output(&arguments.systemctl, &["reboot"])?;
            Ok("ok".into())
        }
        Request::MayReboot => Ok("ok".into()),
        Request::Idle => alone(&arguments.folder).map(|_| "ok".into()),
    }
}

/// Waits until no other of these processes is at a GPU, and keeps them away until it is dropped, or this process ends.
fn alone(folder: &Path) -> anyhow::Result<Flock<File>> {
    let mut file = File::open(folder).with_context(|| format!("open {}", folder.display()))?;
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EWOULDBLOCK)) if begun.elapsed() < PROGRAM_LIMIT => file = same,
            Err((_, error)) => bail!("another one is at a GPU ({}: {error})", folder.display()),
        }
        std::thread::sleep(LOOK);
    }
}

/// Runs a program to its end; what it printed, or what it said when it failed.
fn output(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let name = program.display();
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let begun = Instant::now();
    // A list of processes fits a pipe many times; a program that fills it is stopped by the limit.
    while child.try_wait().with_context(|| format!("wait for {name}"))?.is_none() {
        if begun.elapsed() > PROGRAM_LIMIT {
            // The error would mean that it has just ended.
            let _ = child.kill();
            bail!("{name} did not end within {} s", PROGRAM_LIMIT.as_secs());
        }
        std::thread::sleep(LOOK);
    }
    let output = child.wait_with_output().with_context(|| format!("read what {name} said"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name}: {}: {} {}", output.status, said.trim(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(said)
}

/// Reads the process ids that nvidia-smi prints, one a line.
fn pids(listed: &str) -> anyhow::Result<Vec<Pid>> {
    let lines = listed.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('['));
    let one = |line: &str| {
        let pid: i32 = line.parse().with_context(|| format!("nvidia-smi named the process `{line}`"))?;
        // 0 and below mean groups of processes to the kernel, and 1 is the system.
        ensure!(
            pid > 1 && pid != std::process::id() as i32,
            "nvidia-smi named the process {pid}, which is never ended"
        );
        Ok(Pid::from_raw(pid))
    };
    lines.map(one).collect()
}

/// Ends processes: asks, waits, kills. Returns how many there were.
fn end(pids: &[Pid]) -> anyhow::Result<usize> {
    let lives = |pid: &Pid| kill(*pid, None) != Err(Errno::ESRCH);
    for (signal, limit) in [(Signal::SIGTERM, END_LIMIT), (Signal::SIGKILL, END_LIMIT)] {
        for pid in pids.iter().filter(|pid| lives(pid)) {
            match kill(*pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => bail!("end the process {pid}: {error}"),
            }
        }
        let begun = Instant::now();
        while pids.iter().any(lives) && begun.elapsed() < limit {
            std::thread::sleep(LOOK);
        }
    }
    let left: Vec<String> = pids.iter().filter(|pid| lives(pid)).map(Pid::to_string).collect();
    ensure!(left.is_empty(), "the processes {} do not end", left.join(", "));
    Ok(pids.len())
}

/// What a program said, as part of an answer that has one line.
fn on_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: &str = "GPU-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff";

    #[test]
    fn three_verbs_and_two_questions_are_known() {
        assert_eq!(parse(&format!("reset {GPU}")).unwrap(), Request::Reset(Gpu(GPU.into())));
        assert_eq!(parse(&format!("release {GPU}")).unwrap(), Request::Release(Gpu(GPU.into())));
        assert_eq!(parse("reboot").unwrap(), Request::Reboot);
        assert_eq!(parse("may-reboot").unwrap(), Request::MayReboot);
        assert_eq!(parse("idle").unwrap(), Request::Idle);
    }

    #[test]
    fn everything_else_is_refused() {
        let long = format!("reset {GPU}0");
        for line in [
            "",
            "reboot now",
            "reboot ",
            "RESET",
            "reset",
            "reset 0",
            "reset GPU-",
            "reset --all",
            "reset GPU-5f2a1c3e-0b1d-4c5e-9f80-AABBCCDDEEFF",
            "reset GPU-5f2a1c3e-0b1d-4c5e-9f80-aabbccddee;1",
            "reset MIG-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff",
            "poweroff",
            &long,
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse(&format!("reset {GPU} {GPU}")).is_err());
    }

    #[test]
    fn a_server_on_which_a_controller_works_is_not_restarted() {
        for state in ["inactive", "failed"] {
            may_end(state).unwrap();
        }
        for state in ["active", "activating", "deactivating", "reloading", ""] {
            let why = may_end(state).unwrap_err().to_string();
            assert!(why.starts_with("a controller works on this server"), "{why}");
        }
        // One that says something else, and one that fails.
        for systemctl in ["/bin/echo", "/bin/false"] {
            admit(Request::Reboot, Path::new(systemctl)).unwrap_err();
            admit(Request::MayReboot, Path::new(systemctl)).unwrap_err();
            admit(Request::Reset(Gpu(GPU.into())), Path::new(systemctl)).unwrap();
        }
    }

    #[test]
    fn one_is_at_a_gpu_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = alone(dir.path()).unwrap();
        let folder = dir.path().to_owned();
        let second = std::thread::spawn(move || alone(&folder).map(drop));
        let other = File::open(dir.path()).unwrap();
        assert!(Flock::lock(other, FlockArg::LockExclusiveNonblock).is_err(), "it is taken");
        drop(first);
        second.join().unwrap().unwrap();
        assert!(alone(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }

    #[test]
    fn the_system_and_groups_of_processes_are_never_ended() {
        assert_eq!(pids("4711\n 4712 \n\n").unwrap(), [Pid::from_raw(4711), Pid::from_raw(4712)]);
        assert_eq!(pids("[Not Supported]\n").unwrap(), []);
        for listed in ["1", "0", "-1", "pid", &std::process::id().to_string()] {
            assert!(pids(listed).is_err(), "{listed}");
        }
    }
}
