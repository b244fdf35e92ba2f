//! The API that users call: from sockets to turns and back.
//!
//! `listener` bounds what strangers may cost; `front` gives every request its id; `openai` speaks a dialect; `chat` is
//! the straight line of a request, around the pure core in `turn`. The gateway keeps nothing that must survive: what
//! is recorded lies in the replicated state, what runs is `running`.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use axum::routing::get;
use izar_common::clock::wall_ms;
use izar_common::health::WorkerReport;
use izar_common::id::TurnId;
use izar_common::seal::{MasterKey, Pepper};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::Agents;
use crate::catalog::Catalog;
use crate::metrics::{Kind, Metrics};
use crate::raft::{Leadership, Raft};
use crate::state::Config;
use front::Front;
use listener::{Acceptor, Listener};
use memory::Memory;
use permits::Permits;
use provisional::Provisional;
use queues::Queues;
use ready::{Leaderless, Readiness};

pub mod auth;
mod capsule;
pub mod chat;
mod cursor;
pub mod error;
mod exit;
mod front;
mod intake;
pub mod limits;
mod listener;
mod memory;
mod models;
mod once;
pub mod openai;
mod outlet;
mod permits;
pub mod provisional;
pub mod queues;
mod ready;
pub mod running;
pub mod trace;
pub mod turn;
mod urgency;

pub use limits::Limits;
pub use listener::NotLoopback;
pub use running::Running;

/// Time for turns that were broken off at a stop to tell their clients and to be recorded.
const LAST_WORDS: Duration = Duration::from_millis(1500);

/// How long a controller that has just started looks for a leader and for replicas before it takes requests all the same:
/// agents dial again within a second, and report at once. And how often it looks.
const SETTLE: Duration = Duration::from_secs(3);
const SETTLE_LOOK: Duration = Duration::from_millis(20);

/// A handle to the gateway. Cheap to clone.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

/// What every request needs.
pub struct Inner {
    raft: Raft,
    config: watch::Receiver<Arc<Config>>,
    leadership: watch::Receiver<Leadership>,
    agents: Agents,
    catalog: Catalog,
    pepper: Arc<Pepper>,
    /// Seals requests that agents keep.
    capsules: MasterKey,
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    /// Requests of each key.
    permits: Permits,
    leaderless: Leaderless,
    /// What requests hold in memory.
    memory: Arc<Memory>,
    /// Turns of all keys.
    places: Arc<Semaphore>,
    /// Long prompts that are tokenized at once: one for each processor.
    encoders: Semaphore,
    /// Turns that wait for workers.
    queues: Queues,
    list: running::List,
    /// Turns, and what lingers after an answer.
    tasks: TaskTracker,
    /// Turns that wait for a quorum to be recorded.
    provisional: Provisional,
    /// Clients shall move on to another controller.
    draining: watch::Sender<bool>,
    /// Breaks running turns off.
    kill: CancellationToken,
}

impl Deref for Gateway {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Gateway {
    pub fn new(
        raft: Raft,
        agents: Agents,
        catalog: Catalog,
        pepper: Arc<Pepper>,
        provisional: Provisional,
        limits: Limits,
    ) -> Self {
        let metrics = Arc::new(Metrics::default());
        measure(&metrics, &raft, &agents);
        let memory = Memory::new(limits.memory_bytes);
        let measured = memory.clone();
        let help = "Bytes that requests hold: bodies, turns, answers that wait for their clients.";
        metrics.number("izar_requests_memory_bytes", help, Kind::Gauge, move || measured.used() as f64);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let queues = Queues::new(agents.clone(), metrics.clone(), limits.replica_wait());
        Self(Arc::new(Inner {
            config: raft.config(),
            leadership: raft.leadership(),
            raft,
            agents,
            catalog,
            capsules: pepper.capsule_key(),
            pepper,
            metrics,
            permits: Permits::default(),
            leaderless: Leaderless::default(),
            memory: memory.clone(),
            places: Arc::new(Semaphore::new(limits.turns.min(Semaphore::MAX_PERMITS))),
            encoders: Semaphore::new(cores),
            limits: Arc::new(limits),
            queues,
            list: running::List::default(),
            tasks: TaskTracker::new(),
            provisional,
            draining: watch::Sender::new(false),
            kill: CancellationToken::new(),
        }))
    }

    /// What runs here now, oldest first.
    pub fn running(&self) -> Vec<Running> {
        self.list.snapshot()
    }

    /// What happened to a request here, if it runs or was among the last to end.
    pub fn explain(&self, turn: TurnId) -> Option<trace::Trace> {
        self.list.explain(turn)
    }

    /// All metrics of this controller, for other parts to add theirs.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Whether this controller can generate, and what it lacks.
    pub fn readiness(&self) -> Readiness {
        let (config, fleet, leadership) = (self.config(), self.agents.fleet(), self.leadership.borrow().clone());
        let readiness = ready::readiness(&config, &fleet, &leadership, ready::has_text(&self.catalog), wall_ms());
        match *self.draining.borrow() {
            true => readiness.draining(),
            false => readiness.without_record(&config, self.provisional.admits()),
        }
    }

    /// Tells clients to move on, or that they may stay: `/readyz`, and the end of each connection after its next answer.
    /// Whoever asks all the same is served.
    pub fn drain(&self, draining: bool) {
        let changed = self.draining.send_if_modified(|now| std::mem::replace(now, draining) != draining);
        if changed {
            log::info!(draining; "the drain changed");
        }
    }

    /// Follows whether clients shall move on.
    pub fn draining(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// Waits until this controller can answer, for `SETTLE` at most: agents and their workers are there in a moment.
    async fn settle(&self) {
        let settled = async {
            while !ready::has_settled(&self.config(), &self.readiness(), &self.leadership.borrow().clone()) {
                tokio::time::sleep(SETTLE_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(SETTLE, settled).await;
    }

    /// Serves until `shutdown`, from the moment when it can answer on: who comes before that waits in the sockets' queues,
    /// rather than be refused for what will be here in a moment. Then lets clients move on (`limits.drain_ms`) and running requests end
    /// (`limits.shutdown_ms` for both), breaks off what still runs, and returns when all of it is told and recorded, or at
    /// the latest `LAST_WORDS` later.
    ///
    /// A plain listener on an address that others can reach is refused: logged, and not served.
    pub async fn serve(
        self,
        https: Option<(TcpListener, Arc<ServerConfig>)>,
        plain: Option<TcpListener>,
        shutdown: CancellationToken,
    ) {
        shutdown.run_until_cancelled(self.settle()).await;
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let acceptor = Acceptor::new(self.front(), self.draining(), stop.clone(), abort.clone());
        let accepting = TaskTracker::new();
        if let Some((socket, config)) = https {
            accepting.spawn(acceptor.clone().accept(Listener::https(socket, config)));
        }
        match plain.map(Listener::plain) {
            None => {}
            Some(Ok(Ok(listener))) => drop(accepting.spawn(acceptor.clone().accept(listener))),
            Some(Ok(Err(refused))) => log::error!(refused:%; "the plaintext listener is refused"),
            Some(Err(error)) => log::error!(error:%; "the plaintext listener has no address"),
        }
        let (queues, end) = (self.queues.clone(), abort.clone());
        let verdicts = tokio::spawn(async move { end.run_until_cancelled(queues.run()).await });
        shutdown.cancelled().await;
        let limit = Instant::now() + self.limits.shutdown();
        self.drain(true);
        let _ = tokio::time::timeout(self.limits.drain(), acceptor.ended()).await;
        stop.cancel();
        accepting.close();
        accepting.wait().await;
        let ended = || async {
            acceptor.ended().await;
            self.tasks.close();
            self.tasks.wait().await;
        };
        if tokio::time::timeout_at(limit, ended()).await.is_err() {
            log::warn!(running = self.list.snapshot().len(); "requests still ran at the end of the drain");
            self.kill.cancel();
            let _ = tokio::time::timeout(LAST_WORDS, ended()).await;
        }
        abort.cancel();
        let _ = verdicts.await;
    }

    fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }

    fn refuse(&self, error: &error::Error, rest: Body) -> Response<Body> {
        front::refuse(&self.metrics, &self.tasks, error, rest)
    }

    fn front(&self) -> Front {
        Front {
            router: self.router(),
            limits: self.limits.clone(),
            metrics: self.metrics.clone(),
            tasks: self.tasks.clone(),
        }
    }

    fn router(&self) -> Router {
        let router = Router::new()
            .route("/healthz", get(health))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .merge(openai::routes())
            .with_state(self.clone());
        complete(router)
    }
}

/// Adds what a router answers where it has no route.
fn complete(router: Router) -> Router {
    router
        .fallback(|method: Method, uri: Uri| async move { front::unknown_route(&method, uri.path()) })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move { front::wrong_method(&method, uri.path()) })
}

/// Adds what Raft and the agents know.
fn measure(metrics: &Metrics, raft: &Raft, agents: &Agents) {
    let leadership = raft.leadership();
    metrics.number("izar_raft_leader", "1 while this controller leads.", Kind::Gauge, move || {
        f64::from(u8::from(leadership.borrow().here))
    });
    let leadership = raft.leadership();
    metrics.number("izar_raft_term", "The current term.", Kind::Gauge, move || leadership.borrow().term as f64);
    let state = raft.state().clone();
    metrics.number("izar_raft_applied_index", "Index of the last applied entry.", Kind::Gauge, move || {
        state.applied() as f64
    });
    let state = raft.state().clone();
    metrics.number("izar_open_turns", "Turns of the whole site that are open.", Kind::Gauge, move || {
        state.read(|state| state.open_turns()) as f64
    });
    let state = raft.state().clone();
    let help = "When the newest backup that was kept was taken, in Unix seconds; 0: there is none.";
    metrics.number("izar_backup_last_success_timestamp_seconds", help, Kind::Gauge, move || {
        state.read(|state| state.last_backup().map_or(0.0, |backup| backup.taken_ms as f64 / 1000.0))
    });
    let counted = agents.clone();
    let help = "Agents whose jobs were moved because they seemed dead.";
    metrics.number("izar_agents_given_up_total", help, Kind::Counter, move || counted.given_up() as f64);
    crate::gpus::metrics::measure(metrics, agents);
    let slow = agents.clone();
    let help = "1 for a worker that gives far fewer tokens than its peers.";
    metrics.numbers("izar_worker_slow", help, Kind::Gauge, move |samples| {
        for worker in slow.fleet().agents.values().flat_map(|view| view.slow.keys()) {
            samples(&[("worker", worker.as_str())], 1.0);
        }
    });
    type OfWorker = fn(&WorkerReport) -> u32;
    let of_workers: [(&str, &str, OfWorker); 4] = [
        ("izar_worker_running", "Sequences in a worker's batch.", |worker| worker.load.running),
        ("izar_worker_waiting", "Jobs that wait for a place in a worker's batch.", |worker| worker.load.waiting),
        ("izar_cache_blocks_used", "Blocks of a worker's cache that sequences use.", |worker| worker.load.blocks_used),
        ("izar_cache_blocks", "Blocks that a worker's cache has.", |worker| worker.load.blocks),
    ];
    for (name, help, number) in of_workers {
        let agents = agents.clone();
        metrics.numbers(name, help, Kind::Gauge, move |samples| {
            let fleet = agents.fleet();
            for worker in fleet.agents.values().filter(|view| view.connected).flat_map(|view| view.workers()) {
                let labels = [("deployment", worker.deployment.as_str()), ("worker", worker.worker.as_str())];
                samples(&labels, f64::from(number(worker)));
            }
        });
    }
    let agents = agents.clone();
    metrics.numbers("izar_workers", "Workers that connected agents report, by state.", Kind::Gauge, move |samples| {
        let mut counts = std::collections::BTreeMap::new();
        let fleet = agents.fleet();
        for view in fleet.agents.values().filter(|view| view.connected) {
            for worker in view.workers() {
                let state = format!("{:?}", worker.state).to_lowercase();
                *counts.entry((worker.deployment.to_string(), state)).or_insert(0u32) += 1;
            }
        }
        for ((deployment, state), count) in &counts {
            samples(&[("deployment", deployment), ("state", state)], f64::from(*count));
        }
    });
}

async fn health() -> &'static str {
    "ok\n"
}

async fn readyz(State(gateway): State<Gateway>) -> Response<Body> {
    let readiness = gateway.readiness();
    let body = serde_json::to_vec(&readiness).expect("strings are JSON");
    let mut response = typed("application/json", body);
    if !readiness.ready && !readiness.available {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

async fn metrics(State(gateway): State<Gateway>) -> Response<Body> {
    typed("text/plain; version=0.0.4; charset=utf-8", gateway.metrics.render().into_bytes())
}

fn typed(kind: &'static str, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests;
