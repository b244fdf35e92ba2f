//! The health of this server's GPUs: read, judged, told, and heeded by the workers.
//!
//! Calls of the driver's library may hang for ever on a sick GPU, so they are made on threads of their own that nobody
//! waits for (`nvml`); one reads every second, one waits for Xids, one follows the kernel's log (`kernel`). What they bring
//! is judged by pure functions: `verdict` makes findings of readings and Xids by the tables `limits` and `xid`, `life`
//! states of findings, `judge` keeps all of it, `fitness` says what it means for a worker. A server without the library
//! is one without GPUs. Nothing here resets a GPU or restarts a server; `mend` is how the threads let go of the library
//! for whoever does.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use izar_common::clock::wall_ms;
use izar_common::events;
use izar_common::health::Generation;
use izar_common::health::gpu::{Health, Hold, Mode, State};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub mod counters;
pub mod fitness;
pub mod judge;
pub mod kernel;
pub mod life;
pub mod limits;
mod mend;
mod nvml;
pub mod verdict;
pub mod xid;

pub use fitness::{Fit, Fitness};
use judge::{Identity, Judge, Terms, Told};

/// How long the library waits for an event before it is asked again.
const EVENT_WAIT_MS: u32 = 1_000;

/// How often it is looked whether a call hangs.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often it is noted how far the kernel's log was followed.
const MARK_EVERY: Duration = Duration::from_secs(10);

/// Wait before the kernel's log, or events that ended, are tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Which start of the server this is, as the kernel names it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where systemd listens for root's hand.
pub const HELPER: &str = "/run/izar/gpu.sock";

/// Which workers a GPU's health speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guards {
    /// Those that compute on it.
    #[default]
    Own,
    /// Every worker of the server: where one sick card is a reason to leave the whole of it alone.
    All,
}

/// What the agent's file says of GPUs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The driver's library. Default: the system's `libnvidia-ml.so.1`; without one the server has no GPUs.
    pub nvml: Option<PathBuf>,
    /// GPUs that the server must have; with fewer it gets no work. Default: as many as it has. At most 64.
    pub expected: Option<u32>,
    /// `observe`: health is told and nothing follows. `advise` (default): what is not sound gets no work. `act`: besides, it
    /// is reset, or the server restarted, when the leader orders it.
    pub mode: Mode,
    /// The socket of root's hand for a GPU (`izar-gpu.socket`). Default: [`HELPER`].
    pub helper: Option<PathBuf>,
    /// Who asks a GPU that comes back for answers that are known, called as `PROGRAM probe --device cuda:0`. Default: this
    /// program.
    pub probe: Option<PathBuf>,
    /// `own` (default): a GPU's health speaks for the workers on it. `all`: for every worker of the server.
    pub guards: Guards,
    /// What degrades a GPU and how long it is watched, where it is not as usual.
    pub limits: limits::Limits,
    /// Where the kernel's messages are read. Default: the journal, through `journalctl`; `/dev/kmsg` where there is none.
    pub kernel_log: Option<PathBuf>,
}

/// How many GPUs the library counts; 0 where there is none. May hang for ever on a sick one.
pub fn count(settings: &Settings) -> Result<u32, String> {
    match nvml::open(settings.nvml.as_deref()) {
        Ok(nvml) => nvml.device_count().map_err(|error| format!("count the GPUs: {error}")),
        Err(nvml::Error::Absent(_)) => Ok(0),
        Err(nvml::Error::Broken(reason)) => Err(reason),
    }
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Gpus {
    inner: Arc<Inner>,
}

struct Inner {
    judge: Mutex<Judge>,
    guards: Guards,
    begun: Instant,
    health: watch::Sender<Arc<Health>>,
    /// The child that follows the kernel's log, while it runs.
    follower: Mutex<Option<Child>>,
    mark: kernel::Mark,
    doors: mend::Doors,
    /// Wakes the reader: something happened, and what exactly (rows remapped, the driver's recovery action, memory errors) a
    /// reading shows.
    bell: Bell,
    stop: CancellationToken,
}

impl Gpus {
    /// Begins to read, on threads of its own. `data_dir` keeps how far the kernel's log was followed.
    pub fn start(settings: Settings, data_dir: &Path) -> Self {
        let boot = std::fs::read_to_string(BOOT_ID).map(|id| id.trim().to_owned()).unwrap_or_default();
        let terms = Terms {
            mode: settings.mode,
            guards: settings.guards,
            expected: settings.expected,
            boot: boot.clone(),
            limits: settings.limits.clone(),
        };
        let judge = Judge::new(terms);
        let health = watch::Sender::new(Arc::new(judge.health(0)));
        let (begun, follower, stop) = (Instant::now(), Mutex::default(), CancellationToken::new());
        let (judge, guards) = (Mutex::new(judge), settings.guards);
        let (doors, bell) = (mend::Doors::default(), Bell::default());
        let mark = kernel::Mark::at(data_dir, boot);
        let inner = Arc::new(Inner { judge, guards, begun, health, follower, mark, doors, bell, stop });
        let reader = inner.clone();
        thread::Builder::new()
            .name("gpu-reader".into())
            .spawn(move || read(&reader, settings))
            .expect("a thread starts");
        tokio::spawn(look(inner.clone()));
        Self { inner }
    }

    /// The health of now.
    pub fn health(&self) -> Arc<Health> {
        self.inner.health.borrow().clone()
    }

    /// Changes whenever the health does.
    pub fn changes(&self) -> watch::Receiver<Arc<Health>> {
        self.inner.health.subscribe()
    }

    /// What the health of now means for workers.
    pub fn fitness(&self) -> Fitness {
        Fitness::new(self.health(), self.inner.guards)
    }

    /// Takes what controllers remember, before the assignment that says so is worked on.
    pub fn hold(&self, generation: Generation, holds: &[Hold]) {
        self.inner.judge(|judge, now, wall| judge.hold(generation, holds, now, wall));
    }

    /// Lets the threads end, when they next look; one that hangs in the library does not, and ends with the process.
    pub fn stop(&self) {
        self.inner.stop.cancel();
        self.inner.bell.ring();
        self.inner.unfollow();
    }
}

/// Wakes whoever waits, or will wait next.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().expect("no panic while the bell is held") = true;
        self.heard.notify_all();
    }

    /// Waits until it rings, so long at most.
    fn wait(&self, time: Duration) {
        let rung = self.rung.lock().expect("no panic while the bell is held");
        let waited = self.heard.wait_timeout_while(rung, time, |rung| !*rung);
        *waited.expect("no panic while the bell is held").0 = false;
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Judge> {
        self.judge.lock().expect("no panic while the judge is held")
    }

    /// Notes that the kernel's log is followed up to now, if it is.
    fn mark(&self) {
        let followed = self.follower.lock().expect("no panic while the child is held").is_some();
        if followed && let Err(error) = self.mark.set(wall_ms() / 1_000) {
            log::debug!(error:%; "how far the kernel's log was followed cannot be noted");
        }
    }

    /// Ends the child that follows the kernel's log.
    fn unfollow(&self) {
        let follower = self.follower.lock().expect("no panic while the child is held").take();
        if let Some(mut child) = follower {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn now_ms(&self) -> u64 {
        // Counted from one, so that no time of the judge's is before its beginning.
        1 + self.begun.elapsed().as_millis() as u64
    }

    /// Tells the judge something, logs what it says, and publishes the health if it is another one.
    fn judge(&self, tell: impl FnOnce(&mut Judge, u64, u64) -> Vec<Told>) {
        let mut judge = self.lock();
        let now = self.now_ms();
        let told = tell(&mut judge, now, wall_ms());
        let health = judge.health(now);
        if health.fault != self.health.borrow().fault {
            match health.fault.as_str() {
                "" => log::info!(gpus = health.gpus.len(); "the server's GPUs are in order"),
                fault => log::warn!(message_id = events::GPU_SERVER_FAULT, fault; "the server's GPUs are not in order"),
            }
        }
        self.health.send_if_modified(|current| {
            let other = **current != health;
            if other {
                *current = Arc::new(health);
            }
            other
        });
        drop(judge);
        for Told { gpu, index, moved, reason } in told {
            match moved {
                Some((from, to @ (State::Healthy | State::Probation | State::Resetting | State::Rebooting))) => {
                    log::info!(gpu:%, index, from:%, to:%, reason; "a GPU's state changed");
                }
                Some((from, to @ (State::Degraded | State::Unknown))) => {
                    log::warn!(gpu:%, index, from:%, to:%, reason; "a GPU's state changed for the worse")
                }
                Some((from, to)) => {
                    log::warn!(message_id = events::GPU_STOPPED, gpu:%, index, from:%, to:%, reason; "a GPU's state changed for the worse")
                }
                None => log::warn!(gpu:%, index, reason; "a GPU's driver told of something"),
            }
        }
    }
}

/// Looks again and again whether a call of the library hangs.
async fn look(inner: Arc<Inner>) {
    while inner.stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_some() {
        inner.judge(|_, _, _| Vec::new());
    }
}

/// Waits, or returns false because it is the end.
fn pause(inner: &Inner, time: Duration) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until && !inner.stop.is_cancelled() {
        thread::sleep(LOOK_EVERY.min(until - Instant::now()));
    }
    !inner.stop.is_cancelled()
}

/// The reader's thread: opens the library, starts the others, and reads until the end, or until it shall let go.
fn read(inner: &Arc<Inner>, settings: Settings) {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let (mut begun, mut marked) = (false, Instant::now());
    while !inner.stop.is_cancelled() {
        let Some(inside) = inner.doors.enter() else {
            pause(inner, LOOK_EVERY);
            continue;
        };
        asks(inner);
        match nvml::open(settings.nvml.as_deref()) {
            Ok(nvml) => {
                let driver = nvml::driver(&nvml);
                inner.judge(|judge, _, _| {
                    judge.opened(driver);
                    Vec::new()
                });
                let mut library = nvml::Library::new(nvml, settings.nvml.as_deref());
                while !inner.doors.are_closed() {
                    read_once(inner, &mut library, visible.as_deref());
                    // What they bring is about GPUs that were seen.
                    if !std::mem::replace(&mut begun, true) {
                        start_others(inner, &settings);
                    }
                    if marked.elapsed() >= MARK_EVERY {
                        inner.mark();
                        marked = Instant::now();
                    }
                    thread::sleep(Duration::from_millis(limits::READ_AGAIN_MS));
                    inner.bell.wait(Duration::from_millis(limits::READ_EVERY_MS - limits::READ_AGAIN_MS));
                    if inner.stop.is_cancelled() {
                        return;
                    }
                }
            }
            Err(error) => {
                drop(inside);
                // One that has worked is not absent: its driver is being loaded anew, or was removed below us.
                let absent = matches!(error, nvml::Error::Absent(_)) && !begun;
                inner.judge(|judge, now, _| {
                    judge.answered(now);
                    if absent {
                        judge.absent()
                    } else {
                        judge.broken(error.to_string())
                    }
                    Vec::new()
                });
                // A driver may still be on its way while the server starts, or be installed later.
                if !pause(inner, AGAIN) {
                    return;
                }
            }
        }
    }
}

/// Notes that a call of the library begins.
fn asks(inner: &Inner) {
    inner.judge(|judge, now, _| {
        judge.asks(now);
        Vec::new()
    });
}

/// Starts the threads that wait for Xids.
fn start_others(inner: &Arc<Inner>, settings: &Settings) {
    let (others, path) = (inner.clone(), settings.nvml.clone());
    thread::Builder::new().name("gpu-events".into()).spawn(move || events(&others, path)).expect("a thread starts");
    let (others, path) = (inner.clone(), settings.kernel_log.clone());
    thread::Builder::new().name("gpu-kernel".into()).spawn(move || follow(&others, path)).expect("a thread starts");
}

/// Reads every GPU once.
fn read_once(inner: &Inner, library: &mut nvml::Library, visible: Option<&str>) {
    asks(inner);
    let readings = library.read(is_ours);
    inner.judge(|judge, now, wall| {
        judge.answered(now);
        // What was read before it was to let go is not read since.
        if inner.doors.are_closed() {
            return Vec::new();
        }
        match readings {
            Ok(readings) => {
                let named = readings.into_iter().map(|(who, reading)| {
                    let cuda = fitness::cuda_number(visible, who.index, who.id.as_str());
                    (Identity { id: who.id, index: who.index, cuda, name: who.name, bus: who.bus }, reading)
                });
                judge.read(named.collect(), now, wall)
            }
            Err(error) => {
                judge.broken(error);
                Vec::new()
            }
        }
    });
}

/// Whether a process that computes on a GPU is this agent's, or one that this process knows nothing of: in another
/// container numbers mean nothing.
fn is_ours(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    // Where /proc shows only a user's own processes, whoever may not be signalled is another user's. Nothing is sent.
    let denied = || {
        let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0).map(Pid::from_raw);
        pid.is_some_and(|pid| kill(pid, None) == Err(Errno::EPERM))
    };
    belongs(pid, stat.as_deref(), denied, std::process::id())
}

/// The same, from what `/proc` says of the process, and whether it is there and may not be signalled.
fn belongs(pid: u32, stat: Option<&str>, denied: impl FnOnce() -> bool, agent: u32) -> bool {
    let Some(stat) = stat else { return !denied() };
    // `pid (name) state parent …`; the name may hold anything, a parenthesis too.
    let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
    pid == agent || parent == Some(agent)
}

/// The thread that waits for Xids. It has the library to itself: the reader's may hang.
fn events(inner: &Inner, path: Option<PathBuf>) {
    let (mut told, mut silent) = (false, BTreeSet::new());
    while !inner.stop.is_cancelled() {
        let Some(inside) = inner.doors.enter() else {
            pause(inner, LOOK_EVERY);
            continue;
        };
        let ended = nvml::open(path.as_deref()).map_err(|error| error.to_string()).and_then(|nvml| {
            let events = nvml::Events::of(&nvml)?;
            for (index, reason) in events.silent.iter().filter(|(index, _)| silent.insert(*index)) {
                log::warn!(index, reason; "a GPU tells of no events; its readings and the kernel's log have to do");
            }
            while !inner.stop.is_cancelled() && !inner.doors.are_closed() {
                match events.wait(EVENT_WAIT_MS)? {
                    nvml::Happened::Xid { id, code } => {
                        inner.judge(|judge, now, wall| judge.xid(&id, code, now, wall));
                        inner.bell.ring();
                    }
                    nvml::Happened::Lost => {
                        inner.bell.ring();
                        // Every wait would return at once.
                        pause(inner, Duration::from_millis(EVENT_WAIT_MS.into()));
                    }
                    nvml::Happened::Look => inner.bell.ring(),
                    nvml::Happened::Nothing => {}
                }
            }
            Ok(())
        });
        drop(inside);
        if inner.doors.are_closed() {
            continue;
        }
        if let Err(reason) = ended
            && !std::mem::replace(&mut told, true)
        {
            log::info!(reason; "the GPU library tells of no events; the kernel's log has to do");
        }
        if !pause(inner, AGAIN) {
            return;
        }
    }
}

/// The thread that follows the kernel's log. It ends with the process: a read cannot be called off.
fn follow(inner: &Inner, path: Option<PathBuf>) {
    let (mut told, mut since) = (false, inner.mark.since());
    loop {
        let opened = kernel::Tail::open(path.as_deref(), since);
        let reason = match opened {
            Ok((mut tail, child)) => {
                *inner.follower.lock().expect("no panic while the child is held") = child;
                while let Some(line) = tail.next_xid() {
                    inner.judge(|judge, now, wall| match judge.in_slot(&line.bus) {
                        Some(id) => judge.xid(&id, line.code, now, wall),
                        None => Vec::new(),
                    });
                    inner.bell.ring();
                }
                inner.unfollow();
                // What comes until it is opened again is read then.
                since = kernel::Since::Time(wall_ms() / 1_000 - 1);
                "it ended".to_owned()
            }
            Err(error) => error.to_string(),
        };
        if !std::mem::replace(&mut told, true) {
            log::info!(reason; "the kernel's log cannot be followed; the GPU library has to do");
        }
        if !pause(inner, AGAIN) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bell_that_rang_before_anybody_waited_is_heard_once() {
        let bell = Bell::default();
        bell.ring();
        // An hour, if it were not heard.
        bell.wait(Duration::from_secs(3_600));
        assert!(!*bell.rung.lock().unwrap());
        bell.wait(Duration::from_millis(1));
    }

    #[test]
    fn a_process_is_ours_if_it_is_the_agents_child_or_nobody_knows_of_it() {
        let check = |stat: Option<&str>, denied: bool| belongs(9, stat, || denied, 7);
        assert!(check(Some("9 (izar-agent) S 7 9 9"), false));
        assert!(check(Some("9 (a) b) S 7 9 9"), false), "a name may hold a parenthesis");
        assert!(!check(Some("9 (python) S 8 9 9"), false));
        assert!(!check(None, true), "it is another user's that /proc does not show");
        assert!(check(None, false), "there is none of that number");
        assert!(belongs(7, Some("7 (izar-agent) S 1 7 7"), || false, 7));
        assert!(is_ours(std::process::id()));
    }
}
