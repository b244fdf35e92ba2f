//! Sessions with every controller of the site: reports up, assignments down, and the streams of jobs.
//!
//! A session that is lost is dialled again with growing waits. Controllers are equals here: each gets the same
//! reports, and of all assignments the newest counts, whoever sent it.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use izar_common::disk;
use izar_common::health::{Machine, Report};
use izar_common::id::{Role, WorkerId};
use izar_common::prefix::Sketch;
use izar_common::quic::{Connection, Endpoint, Profile, Receiver, Sender};
use izar_common::tls::Certificates;
use izar_common::vitals::Vital;
use izar_common::wire;
use izar_common::wire::agent::{Down, Up};
use izar_common::wire::handshake::Open;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backoff::Backoff;
use crate::gpu::Gpus;
use crate::worker::Workers;
use crate::worker::files::Sources;
use kept::Kept;

mod job;
mod kept;

/// Waits between attempts to reach a controller.
const DIAL_FIRST: Duration = Duration::from_millis(100);
const DIAL_MOST: Duration = Duration::from_secs(2);

/// A report goes out at least this often, so that a controller knows that the agent is well.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// And this often while it has jobs: a controller counts a few missing ones as its death.
const REPORT_BUSY: Duration = Duration::from_millis(250);

/// And at most this often, however fast the load changes: 20 a second.
const REPORT_GAP: Duration = Duration::from_millis(50);

/// Waits between attempts to hold a tripwire.
const TRIPWIRE_FIRST: Duration = Duration::from_secs(1);
const TRIPWIRE_MOST: Duration = Duration::from_secs(30);

/// Where NVIDIA's driver has a folder for each card.
const GPUS: &str = "/proc/driver/nvidia/gpus";

/// What a report says of the server and the process; it does not change while they run.
#[derive(Debug, Clone)]
pub struct Facts {
    pub pid: u32,
    pub version: String,
    pub cores: u32,
    pub memory_bytes: u64,
    pub gpus: u32,
    pub labels: BTreeMap<String, String>,
}

impl Facts {
    pub fn of_this_machine(labels: BTreeMap<String, String>) -> Self {
        Self {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            memory_bytes: std::fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| total_memory(&text))
                .unwrap_or(0),
            gpus: std::fs::read_dir(GPUS).map_or(0, |gpus| gpus.count() as u32),
            labels,
        }
    }
}

/// Finds the machine's memory in the text of `/proc/meminfo`.
fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What is looked at again and again, for [`Machine`].
#[derive(Debug, Clone)]
pub struct Watched {
    pub certificates: Arc<Certificates>,
    pub disk: Arc<disk::Seen>,
}

impl Watched {
    fn machine(&self) -> Machine {
        let expiries = self.certificates.expiries();
        let certificate_expires = expiries.iter().map(|(_, expires)| *expires).min().unwrap_or(i64::MAX);
        let (disk_free_bytes, disk_bytes) = self.disk.bytes();
        Machine { certificate_expires, disk_free_bytes, disk_bytes }
    }
}

/// The tasks that keep the sessions.
pub struct Link {
    stop: CancellationToken,
    tasks: TaskTracker,
    jobs: TaskTracker,
    sessions: watch::Receiver<usize>,
}

struct Parts {
    endpoint: Arc<Endpoint>,
    workers: Workers,
    sources: Sources,
    facts: Facts,
    watched: Watched,
    gpus: Gpus,
    kept: Kept,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Streams of jobs.
    jobs: TaskTracker,
    /// How many controllers are heard.
    sessions: watch::Sender<usize>,
}

impl Link {
    /// Keeps a session with each controller from now on.
    pub fn start(
        endpoint: Arc<Endpoint>,
        controllers: &[SocketAddr],
        workers: Workers,
        sources: Sources,
        facts: Facts,
        watched: Watched,
        gpus: Gpus,
    ) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let kept = Kept::default();
        let (stopped, all) = (stop.clone(), tasks.clone());
        let (jobs, (sessions_tx, sessions)) = (TaskTracker::new(), watch::channel(0));
        let parts = Arc::new(Parts {
            endpoint,
            workers,
            sources,
            facts,
            watched,
            gpus,
            kept,
            stop: stopped,
            tasks: all,
            jobs: jobs.clone(),
            sessions: sessions_tx,
        });
        for controller in controllers {
            tasks.spawn(keep(parts.clone(), *controller));
        }
        Self { stop, tasks, jobs, sessions }
    }

    /// Follows how many controllers are heard.
    pub fn sessions(&self) -> watch::Receiver<usize> {
        self.sessions.clone()
    }

    /// Waits until no job runs and the controllers have all of every answer.
    pub async fn drained(&self) {
        self.jobs.close();
        self.jobs.wait().await;
    }

    /// Closes every session, telling the controllers, and waits for the tasks.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.drained().await;
    }
}

/// Dials one controller, again and again.
async fn keep(parts: Arc<Parts>, controller: SocketAddr) {
    let mut backoff = Backoff::new(DIAL_FIRST, DIAL_MOST);
    let mut told = false;
    loop {
        let dialled = parts.endpoint.connect(controller, Role::Controller, None, Profile::Requests);
        match parts.stop.run_until_cancelled(dialled).await {
            None => return,
            Some(Ok(connection)) => {
                (told, _) = (false, backoff.reset());
                let node = connection.peer().node.clone();
                log::info!(controller:% = node, address:% = controller; "session opened");
                parts.sources.add(controller, connection.clone());
                parts.sessions.send_modify(|sessions| *sessions += 1);
                let ended = session(&parts, &connection).await;
                parts.sessions.send_modify(|sessions| *sessions -= 1);
                parts.sources.remove(controller);
                let reason = ended.err().map_or("closed".to_owned(), |error| error.to_string());
                log::info!(controller:% = node, reason; "session ended");
            }
            // Told once in an outage: one controller less is what the others are for.
            Some(Err(error)) if !told => {
                told = true;
                log::info!(address:% = controller, error:%; "controller cannot be reached, trying on");
            }
            Some(Err(_)) => {}
        }
        let wait = tokio::time::sleep(backoff.jittered(rand::random()));
        if parts.stop.run_until_cancelled(wait).await.is_none() {
            return;
        }
    }
}

/// Runs a session until it is lost, or the agent stops.
async fn session(parts: &Arc<Parts>, connection: &Connection) -> anyhow::Result<()> {
    let (tx, rx) = connection.open_bi(Open::Session).await?;
    let ended = tokio::select! {
        ended = send_reports(parts, tx) => ended.map_err(Into::into),
        ended = take_orders(parts, connection, rx) => ended.inspect_err(|error| connection.refuse_frame(error)).map_err(Into::into),
        ended = take_jobs(parts, connection) => ended,
        () = parts.stop.cancelled() => {
            connection.close("the agent stops");
            return Ok(());
        }
    };
    connection.close("the session ended");
    ended
}

/// Sends a report on every change and every second, four times a second with jobs, never more than 20 times; and what
/// workers hold for later prompts, and what the machine has left, when that has changed.
async fn send_reports(parts: &Parts, mut tx: Sender) -> std::io::Result<()> {
    let mut changes = parts.workers.changes();
    let mut held: HashMap<WorkerId, Arc<Sketch>> = HashMap::new();
    let mut told = None;
    let vital = Vital::new("link");
    loop {
        vital.work();
        changes.mark_unchanged();
        let sent = Instant::now();
        // First, so that the report names every worker that is spoken of.
        let sketches = parts.workers.sketches();
        let report = report(parts);
        // A controller that is slow to read is no fault of this loop's.
        vital.rest();
        tx.send(&Up::Report(Box::new(report))).await?;
        for (worker, sketch) in &sketches {
            if held.get(worker).is_none_or(|sent| !Arc::ptr_eq(sent, sketch)) {
                tx.send(&Up::Sketch { worker: worker.clone(), sketch: (**sketch).clone() }).await?;
            }
        }
        held = sketches.into_iter().collect();
        let machine = parts.watched.machine();
        if told.replace(machine) != Some(machine) {
            tx.send(&Up::Machine(machine)).await?;
        }
        vital.promise(REPORT_GAP + REPORT_EVERY);
        sleep_until(sent + REPORT_GAP).await;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            () = sleep_until(sent + if parts.workers.busy() { REPORT_BUSY } else { REPORT_EVERY }) => {}
        }
    }
}

fn report(parts: &Parts) -> Report {
    let Facts { pid, version, cores, memory_bytes, gpus, labels } = parts.facts.clone();
    let generation = parts.workers.generation();
    let health = (*parts.gpus.health()).clone();
    let gpus = gpus.max(health.gpus.len() as u32);
    let workers = parts.workers.report();
    Report { generation, pid, version, cores, memory_bytes, gpus, labels, workers, health }
}

async fn take_orders(parts: &Parts, connection: &Connection, mut rx: Receiver) -> Result<(), wire::Error> {
    let mut tripwire = JoinSet::new();
    while let Some(order) = rx.next().await? {
        match order {
            Down::Assignment(assignment) => {
                // First what is held against GPUs: the report that names this generation must know of it.
                parts.gpus.hold(assignment.generation, &assignment.holds);
                parts.workers.offer(assignment);
            }
            Down::Tripwire(words) => {
                tripwire.abort_all();
                tripwire.spawn(hold_tripwire(parts.workers.clone(), connection.remote_addr(), words));
            }
        }
    }
    Ok(())
}

/// Holds a TCP connection to a controller, which the kernel ends the moment this process does. While it cannot be had
/// (a firewall, a relay), this agent's death is told by its silence, a second later.
async fn hold_tripwire(workers: Workers, controller: SocketAddr, words: [u8; 16]) {
    let mut backoff = Backoff::new(TRIPWIRE_FIRST, TRIPWIRE_MOST);
    loop {
        if let Ok(Ok(mut stream)) = tokio::time::timeout(TRIPWIRE_MOST, TcpStream::connect(controller)).await
            && stream.write_all(&words).await.is_ok()
        {
            // Nothing comes; the end means that the connection fell without this process.
            let _ = stream.read(&mut [0]).await;
            workers.poke();
        }
        tokio::time::sleep(backoff.jittered(rand::random())).await;
    }
}

/// Takes streams of jobs; each is served by a task of its own, of which a connection's limit of streams allows 4096.
async fn take_jobs(parts: &Arc<Parts>, connection: &Connection) -> anyhow::Result<()> {
    loop {
        let (open, mut tx, mut rx) = connection.accept_bi().await?;
        match open {
            Open::Job => {
                let served = job::serve(parts.workers.clone(), parts.kept.clone(), connection.clone(), tx, rx);
                let stop = parts.stop.clone();
                parts.jobs.spawn(async move { stop.run_until_cancelled(served).await });
            }
            Open::Resume => {
                parts.tasks.spawn(job::resume(parts.kept.clone(), connection.clone(), tx, rx));
            }
            Open::Recall => {
                parts.tasks.spawn(job::recall(parts.kept.clone(), connection.clone(), tx, rx));
            }
            _ => {
                log::warn!(open:?; "refused a stream that a controller has no use for");
                izar_common::quic::reset(&mut tx);
                izar_common::quic::stop(&mut rx);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_read_from_the_kernels_text() {
        assert_eq!(total_memory("MemTotal:       16303448 kB\nMemFree: 1 kB\n"), Some(16_303_448 * 1024));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
        assert_eq!(total_memory("MemTotal: much\n"), None);
    }
}
