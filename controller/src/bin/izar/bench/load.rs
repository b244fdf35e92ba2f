//! Runs the load: threads of their own, each with its share of the connections and its own counts, so that none waits
//! for another.
//!
//! Closed loop: every connection asks again when it is answered. Open loop: a thread that only keeps time puts due
//! requests into the queues of the others, and a request that finds no free connection waits there; its time from the
//! schedule shows that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::client::{Client, Failure, Sample, Targets};
use super::cpu::{self, Used, Watched};
use super::schedule::{Arrivals, Schedule};
use super::stats::Stats;

/// Due requests that wait for a connection of one thread. Beyond it the server is so far behind that waiting longer
/// says nothing more; they are counted as `overload`.
const QUEUE_LIMIT: usize = 100_000;

/// Pause of a connection whose server cannot be reached, so that failing is no busy loop.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// Between the last connection's readiness and the first request.
const LEAD: Duration = Duration::from_millis(10);

/// The name of the generator's threads.
const THREAD: &str = "bench-load";

#[derive(Debug, Clone, Copy)]
pub enum Loop {
    Closed,
    Open { rate: f64, arrivals: Arrivals, seed: u64 },
}

#[derive(Debug, Clone, Copy)]
pub enum Until {
    Requests(u64),
    Elapsed(Duration),
}

/// What to do.
pub struct Load {
    pub targets: Arc<Targets>,
    /// So many endpoints are used in turn by the connections; the others when one of these dies.
    pub spread: usize,
    pub connections: usize,
    pub threads: usize,
    pub how: Loop,
    pub until: Until,
    pub warmup: Duration,
    pub timeout: Duration,
    /// Keep the request ids of whole answers.
    pub keep_ids: bool,
}

/// What was seen.
#[derive(Debug)]
pub struct Measured {
    pub stats: Stats,
    /// Length of the window in which it was measured.
    pub seconds: f64,
    pub cpu: Vec<Used>,
    /// CPU seconds of the generator itself, a canned server not counted.
    pub generator_cpu_s: f64,
}

/// When is measured. The same for all threads.
#[derive(Debug, Clone, Copy)]
struct Window {
    start: Instant,
    warm: Instant,
    end: Option<Instant>,
}

/// What a generator thread shares with the others.
struct Shared {
    load: Load,
    window: watch::Receiver<Option<Window>>,
    /// Measured requests that may still begin, when they are counted.
    tickets: AtomicU64,
}

/// Due requests of one thread in the open loop; `None` tells a connection to end.
struct Queue {
    due: Mutex<VecDeque<Option<Instant>>>,
    /// As many permits as there are entries.
    filled: Semaphore,
}

impl Queue {
    fn new() -> Self {
        Self { due: Mutex::default(), filled: Semaphore::new(0) }
    }
    /// False if it is full.
    fn push(&self, due: Option<Instant>) -> bool {
        let mut queue = self.due.lock().expect("no panic while the queue is held");
        if due.is_some() && queue.len() >= QUEUE_LIMIT {
            return false;
        }
        queue.push_back(due);
        drop(queue);
        self.filled.add_permits(1);
        true
    }
    async fn pop(&self) -> Option<Instant> {
        self.filled.acquire().await.ok()?.forget();
        self.due.lock().expect("no panic while the queue is held").pop_front()?
    }
}

/// Runs the load to its end.
pub fn run(load: Load, watched: &[Watched]) -> anyhow::Result<Measured> {
    let (announce, window) = watch::channel(None);
    let tickets = match load.until {
        Until::Requests(count) => count,
        Until::Elapsed(_) => u64::MAX,
    };
    let shared = Arc::new(Shared { load, window, tickets: AtomicU64::new(tickets) });
    let queues: Vec<Arc<Queue>> = (0..shared.load.threads).map(|_| Arc::new(Queue::new())).collect();
    // Each thread says once that it is ready.
    let (ready, readiness) = mpsc::sync_channel(shared.load.threads);
    let threads: Vec<JoinHandle<Stats>> = queues
        .iter()
        .enumerate()
        .map(|(index, queue)| {
            let (shared, queue, ready) = (shared.clone(), queue.clone(), ready.clone());
            let body = move || generator(index, &shared, &queue, &ready);
            std::thread::Builder::new().name(THREAD.to_owned()).spawn(body).context("start a thread")
        })
        .collect::<anyhow::Result<_>>()?;
    drop(ready);
    for _ in &threads {
        readiness.recv().context("a generator thread ended early")??;
    }
    let window = shared.load.window_from(Instant::now() + LEAD);
    announce.send_replace(Some(window));
    let clock = start_clock(&shared, &queues, window)?;
    let mut measured = watch_cpu(window, watched, threads)?;
    if let Some(clock) = clock {
        let overload = clock.join().map_err(|_| anyhow::anyhow!("the clock thread panicked"))?;
        if overload > 0 {
            measured.stats.errors.insert("overload".to_owned(), overload);
        }
    }
    measured.stats.compare(&shared.load.targets);
    Ok(measured)
}

impl Load {
    fn window_from(&self, start: Instant) -> Window {
        let warm = start + self.warmup;
        let end = match self.until {
            Until::Requests(_) => None,
            Until::Elapsed(time) => Some(warm + time),
        };
        Window { start, warm, end }
    }
}

/// Waits for the threads, looking at CPU times at both ends of the window.
fn watch_cpu(window: Window, watched: &[Watched], threads: Vec<JoinHandle<Stats>>) -> anyhow::Result<Measured> {
    let look = || -> Vec<Option<f64>> { watched.iter().map(|w| cpu::of_process(w.pid)).collect() };
    let own = || cpu::of_process(std::process::id()).unwrap_or(0.0) - cpu::of_own_threads(super::ceiling::THREAD);
    sleep_until(window.warm);
    let (before, own_before) = (look(), own());
    let mut after = None;
    if let Some(end) = window.end {
        sleep_until(end);
        after = Some((look(), own()));
    }
    let mut stats = Stats::default();
    for thread in threads {
        stats.add(&thread.join().map_err(|_| anyhow::anyhow!("a generator thread panicked"))?);
    }
    let ended = window.end.unwrap_or_else(Instant::now);
    let (after, own_after) = after.unwrap_or_else(|| (look(), own()));
    Ok(Measured {
        stats,
        seconds: (ended - window.warm).as_secs_f64(),
        cpu: cpu::difference(watched, &before, &after),
        generator_cpu_s: own_after - own_before,
    })
}

fn sleep_until(at: Instant) {
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}

/// Starts the thread that keeps the open loop's time; it returns how many requests found their queue full.
fn start_clock(shared: &Arc<Shared>, queues: &[Arc<Queue>], window: Window) -> anyhow::Result<Option<JoinHandle<u64>>> {
    let Loop::Open { rate, arrivals, seed } = shared.load.how else { return Ok(None) };
    let (queues, connections) = (queues.to_vec(), shared.load.connections);
    let mut left = match shared.load.until {
        Until::Requests(count) => count,
        Until::Elapsed(_) => u64::MAX,
    };
    let body = move || {
        let mut overload = 0;
        for (i, offset) in Schedule::new(arrivals, rate, seed).enumerate() {
            let due = window.start + offset;
            if left == 0 || window.end.is_some_and(|end| due >= end) {
                break;
            }
            sleep_until(due);
            if !queues[i % queues.len()].push(Some(due)) {
                overload += 1;
            }
            if due >= window.warm {
                left -= 1;
            }
        }
        for queue in &queues {
            // As many as any of them has connections.
            (0..connections).for_each(|_| {
                queue.push(None);
            });
        }
        overload
    };
    let clock = std::thread::Builder::new().name("bench-clock".to_owned()).spawn(body);
    Ok(Some(clock.context("start a thread")?))
}

/// One thread: connects its share, says so, and runs it.
fn generator(
    index: usize,
    shared: &Arc<Shared>,
    queue: &Arc<Queue>,
    ready: &mpsc::SyncSender<anyhow::Result<()>>,
) -> Stats {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error.into()));
            return Stats::default();
        }
    };
    runtime.block_on(async {
        let clients = match connect(index, shared).await {
            Ok(clients) => clients,
            Err(error) => {
                let _ = ready.send(Err(error));
                return Stats::default();
            }
        };
        let answered = shared.load.keep_ids.then(Vec::new);
        let stats = Arc::new(Mutex::new(Stats { answered, ..Stats::default() }));
        let mut connections = JoinSet::new();
        for client in clients {
            connections.spawn(connection(client, shared.clone(), queue.clone(), stats.clone()));
        }
        let _ = ready.send(Ok(()));
        while connections.join_next().await.is_some() {}
        let stats = stats.lock().expect("all connections have ended");
        stats.clone()
    })
}

/// The connections of one thread: number `index`, `index + threads`, and so on.
async fn connect(index: usize, shared: &Shared) -> anyhow::Result<Vec<Client>> {
    let load = &shared.load;
    let mut clients = Vec::new();
    for number in (index..load.connections).step_by(load.threads) {
        let mut client = Client::new(load.targets.clone(), number % load.spread);
        client.connect().await?;
        clients.push(client);
    }
    Ok(clients)
}

/// One connection, from the first request to the last.
async fn connection(mut client: Client, shared: Arc<Shared>, queue: Arc<Queue>, stats: Arc<Mutex<Stats>>) {
    let mut window = shared.window.clone();
    let Ok(window) = window.wait_for(Option::is_some).await.map(|w| *w) else { return };
    let Some(window) = window else { return };
    tokio::time::sleep_until(window.start.into()).await;
    let open = matches!(shared.load.how, Loop::Open { .. });
    let mut sample = Sample::default();
    loop {
        let scheduled = if open {
            match queue.pop().await {
                Some(due) => Some(due),
                None => break,
            }
        } else {
            None
        };
        let sent = Instant::now();
        let begun = scheduled.unwrap_or(sent);
        let mut measured = begun >= window.warm;
        if !open && (window.end.is_some_and(|end| sent >= end) || (measured && !shared.take_ticket())) {
            break;
        }
        let result = tokio::time::timeout(shared.load.timeout, client.exchange(&mut sample)).await;
        let ended = Instant::now();
        let result = result.unwrap_or(Err(Failure::Timeout));
        // In the open loop what was scheduled counts, and what failed in either, however late it ended: leaving it out
        // would flatter the server.
        measured &= open || result.is_err() || window.end.is_none_or(|end| ended <= end);
        if result.is_ok() && sample.whole && sample.pauses.is_empty() {
            shared.load.targets.hear(&sample);
        }
        if measured {
            let mut stats = stats.lock().expect("no panic while the counts are held");
            match result {
                Ok(()) => stats.answer(&sample, sent, ended, scheduled),
                Err(failure) => stats.failure(failure),
            }
        }
        if result.is_err() {
            tokio::time::sleep(FAILURE_PAUSE).await;
        }
    }
    stats.lock().expect("no panic while the counts are held").reconnects += client.reconnects;
}

impl Shared {
    fn take_ticket(&self) -> bool {
        self.tickets.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}
