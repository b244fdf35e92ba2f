//! One worker process: started, spoken with over a Unix socket pair, ended.
//!
//! The child's end of the pair is its standard input: inheriting it needs no unsafe code. When this agent dies, the
//! kernel closes the other end, and the worker ends itself.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use izar_common::health::Load;
use izar_common::id::{NumericsId, WorkerId};
use izar_common::manifest::{Kind, Manifest};
use izar_common::prefix::Sketch;
use izar_common::vitals::Vital;
use izar_common::wire::agent::EngineOptions;
use izar_common::wire::worker::{FromWorker, ToWorker};
use izar_common::wire::{Reader, Writer};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};

use super::jobs::Jobs;
use super::pulse::Pulse;

/// How long a model may take to load. Hundreds of gigabytes from a slow disk take a quarter of an hour.
const LOAD_LIMIT: Duration = Duration::from_secs(30 * 60);

/// How long a worker may take to end after its socket was closed, before it is killed.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Time between looks at a worker: what a stopped one costs its jobs is two of them. One without jobs can wait.
const WATCH: Duration = Duration::from_millis(200);
const WATCH_IDLE: Duration = Duration::from_secs(1);

/// A running worker process.
pub struct Process {
    child: Child,
    /// It computes steps; the echo model only waits, as long as it was told to.
    steps: bool,
    rx: Reader<OwnedReadHalf>,
    tx: Writer<OwnedWriteHalf>,
}

impl Process {
    /// Starts `exe worker`, in a process group of its own so that a terminal's Ctrl-C reaches only the agent, which
    /// then ends it in order.
    pub fn spawn(exe: &Path, name: &WorkerId, log_level: Option<&str>) -> std::io::Result<Self> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(exe);
        command.arg("worker").arg("--name").arg(name.as_str()).process_group(0).kill_on_drop(true);
        // CUDA counts cards by their speed otherwise, and `cuda:0` would not be the card that NVML calls 0.
        command.env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
        if let Some(level) = log_level {
            command.arg("--log-level").arg(level);
        }
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::inherit());
        let child = command.spawn()?;
        // The command still holds the child's end; while anybody here did, its death would not be seen.
        drop(command);
        let (rx, tx) = UnixStream::from_std(ours)?.into_split();
        Ok(Self { child, steps: false, rx: Reader::new(rx), tx: Writer::new(tx) })
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Makes the worker load its model; says why if it cannot.
    pub async fn load(
        &mut self,
        manifest: &Manifest,
        files: Vec<PathBuf>,
        text: Option<PathBuf>,
        engine: EngineOptions,
        cpus: Vec<u32>,
    ) -> Result<NumericsId, String> {
        self.steps = !matches!(manifest.kind, Kind::Echo { .. });
        let load = ToWorker::Load { manifest: manifest.clone(), files, text, engine, cpus };
        if let Err(error) = self.tx.send(&load).await {
            return Err(format!("the worker died before it could load: {error}"));
        }
        let answered = tokio::select! {
            answered = tokio::time::timeout(LOAD_LIMIT, self.rx.next::<FromWorker>()) => answered,
            reason = until_stopped(self.child.id(), || WATCH_IDLE) => return Err(reason),
        };
        match answered {
            Ok(Ok(Some(FromWorker::Ready { numerics }))) => Ok(numerics),
            Ok(Ok(Some(FromWorker::Unloadable { reason }))) => Err(format!("the model cannot be loaded: {reason}")),
            Ok(Ok(Some(FromWorker::Step { .. } | FromWorker::Sketch(_)))) => {
                Err("the worker answered before it was ready".into())
            }
            Ok(Ok(None)) => Err("the worker died while loading".into()),
            Ok(Err(error)) => Err(format!("the worker died while loading: {error}")),
            Err(_) => Err(format!("the model was not loaded within {} s", LOAD_LIMIT.as_secs())),
        }
    }

    /// Carries jobs and events until the worker is lost; says why. `tell` hears the load after each step, `hold` what the
    /// cache holds.
    pub async fn carry(&mut self, jobs: &Jobs, tell: impl Fn(Load), hold: impl Fn(Sketch)) -> String {
        let (pid, steps) = (self.child.id(), self.steps);
        let (rx, tx) = (&mut self.rx, &mut self.tx);
        let frames = AtomicU64::new(0);
        let reading = async {
            loop {
                match rx.next::<FromWorker>().await {
                    Ok(Some(FromWorker::Step { events, load })) => {
                        frames.fetch_add(1, Relaxed);
                        jobs.deliver(events);
                        tell(load);
                    }
                    // No sign of a step: a worker whose step hangs says it as well.
                    Ok(Some(FromWorker::Sketch(sketch))) => hold(sketch),
                    Ok(Some(FromWorker::Unloadable { reason })) => return reason,
                    Ok(Some(FromWorker::Ready { .. })) => return "the worker got ready twice".to_owned(),
                    Ok(None) => return "the worker died".to_owned(),
                    Err(error) => return format!("the worker died: {error}"),
                }
            }
        };
        let writing = async {
            loop {
                for frame in jobs.outgoing().await {
                    tx.put(&frame);
                }
                if let Err(error) = tx.flush().await {
                    return format!("the worker died: {error}");
                }
            }
        };
        tokio::select! {
            reason = reading => reason,
            reason = writing => reason,
            reason = until_stopped(pid, || gap(jobs)) => reason,
            reason = until_hung(jobs, &frames), if steps => reason,
        }
    }

    /// Closes the socket, waits, kills if need be; returns how the process ended, in words.
    pub async fn end(self) -> String {
        let Self { mut child, rx, tx, .. } = self;
        drop((rx, tx));
        let ended = match tokio::time::timeout(END_LIMIT, child.wait()).await {
            Ok(ended) => ended,
            Err(_) => {
                // The error would mean that it has just ended, which `wait` tells.
                let _ = child.start_kill();
                child.wait().await
            }
        };
        ended.map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

/// Time until the next look at a worker.
fn gap(jobs: &Jobs) -> Duration {
    if jobs.busy() { WATCH } else { WATCH_IDLE }
}

/// Watches the frames that tell a worker's steps until there are none for too long; says so.
async fn until_hung(jobs: &Jobs, frames: &AtomicU64) -> String {
    let (mut pulse, mut seen) = (Pulse::new(Instant::now()), 0);
    loop {
        tokio::time::sleep(gap(jobs)).await;
        let now = frames.load(Relaxed);
        if let Some(silence) = pulse.look(Instant::now(), jobs.busy(), now != seen) {
            return format!("the worker hangs: no step for {} ms", silence.as_millis());
        }
        seen = now;
    }
}

/// Watches a process until it is stopped by a signal; says so.
async fn until_stopped(pid: Option<u32>, gap: impl Fn() -> Duration) -> String {
    let vital = Vital::new("watch of a worker");
    let mut looks = 0;
    // Two looks, since whoever looks at a process may stop it for a moment.
    while looks < 2 {
        vital.promise(WATCH_IDLE);
        tokio::time::sleep(gap()).await;
        looks = if pid.is_some_and(is_stopped) { looks + 1 } else { 0 };
    }
    "the worker was stopped by a signal".to_owned()
}

/// Whether a process was stopped by a signal, which no load can look like.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the program's name, which is in parentheses and may hold any.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use izar_common::id::Hash;
    use izar_common::manifest::File;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    #[tokio::test]
    async fn a_worker_that_is_stopped_while_it_loads_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let exe = dir.path().join("worker");
        // It never answers.
        std::fs::write(&exe, "#!/bin/sh\nexec sleep 600\n").unwrap();
        std::fs::set_permissions(&exe, Permissions::from_mode(0o700)).unwrap();
        let mut process = Process::spawn(&exe, &WorkerId::new("w.0").unwrap(), None).unwrap();
        let pid = process.pid().unwrap();
        kill(Pid::from_raw(pid as i32), Signal::SIGSTOP).unwrap();
        let text = File { name: "text.json".into(), hash: Hash([0; 32]), bytes: 0 };
        let manifest = Manifest {
            name: "m".into(),
            kind: Kind::Gguf,
            files: Vec::new(),
            text,
            context: 1,
            vocabulary: 1,
            architecture: "llama".into(),
        };
        let loaded = process.load(&manifest, Vec::new(), None, EngineOptions::default(), Vec::new()).await;
        assert_eq!(loaded.unwrap_err(), "the worker was stopped by a signal");
        process.end().await;
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it is not left behind");
    }
}
