//! Who has a session here, and the jobs that are sent over it. Knows nothing of Raft.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use izar_common::chat::Job;
use izar_common::clock::wall_ms;
use izar_common::health::gpu::Health;
use izar_common::health::{Machine, Report, WorkerReport};
use izar_common::id::{DeploymentId, Hash, NodeId, TurnId, WorkerId};
use izar_common::manifest::Kind;
use izar_common::prefix::{BLOCK, Name, Namer, Sketch};
use izar_common::quic::{self, Connection};
use izar_common::wire::agent::{Recall, Recalled, Resume, Resumed, Submit};
use izar_common::wire::handshake::Open;
use tokio::sync::{Notify, watch};

use super::job::{Counted, JobStream};
use crate::fleet::Fleet;
use crate::paces::Paces;
use crate::prefixes::Prefixes;
use crate::queue::Room;
use crate::room;
use crate::scheduler::{self, Ask, NoPlace, PREFIX_BLOCKS, Place};
use crate::state::{Config, Deployment, Placement};

/// How long agents are asked whether they keep an answer: a client waits, and it can be computed again.
const ATTACH_LIMIT: Duration = Duration::from_millis(500);

/// Tokens of prompt and delivered answer that one job may carry: what the frame's limit allows. Contexts are far
/// shorter, and the gateway refuses longer prompts before.
pub const JOB_TOKENS: usize = 1_000_000;

/// Sessions and the fleet, under one lock that is never held over an await.
pub struct Roster {
    config: watch::Receiver<Arc<Config>>,
    soft: Mutex<Soft>,
    asks: AtomicU64,
    /// Told when there may be room for a job: one has ended, or an agent has reported.
    pub freed: Notify,
    /// Told when an agent comes or goes, or a worker of it does.
    pub moved: Notify,
}

struct Soft {
    fleet: Fleet,
    prefixes: Prefixes,
    paces: Paces,
    sessions: HashMap<NodeId, Connection>,
}

impl Roster {
    pub fn new(config: watch::Receiver<Arc<Config>>) -> Self {
        let (fleet, prefixes) = (Fleet::new(wall_ms()), Prefixes::default());
        let soft = Soft { fleet, prefixes, paces: Paces::default(), sessions: HashMap::new() };
        Self { config, soft: Mutex::new(soft), asks: AtomicU64::new(0), freed: Notify::new(), moved: Notify::new() }
    }

    fn soft(&self) -> MutexGuard<'_, Soft> {
        self.soft.lock().expect("no panic while the fleet is held")
    }

    /// A copy of what is known now.
    pub fn fleet(&self) -> Fleet {
        let soft = self.soft();
        let mut fleet = soft.fleet.clone();
        let now_ms = wall_ms();
        for view in fleet.agents.values_mut() {
            let why = |worker: &WorkerReport| Some((worker.worker.clone(), soft.paces.slow(&worker.worker, now_ms)?));
            view.slow = view.workers().iter().filter_map(why).map(|(id, why)| (id, why.to_owned())).collect();
        }
        fleet
    }

    /// Takes how fast a worker gives one job's tokens. Returns why the job should go on elsewhere, if it should: the worker
    /// is far slower than its peers, and one that is not could go on with it at once.
    pub(super) fn pace(&self, job: &Counted, tokens: u32, took: Duration) -> Option<String> {
        let Counted { agent, worker, numerics, .. } = job;
        let config = self.config.borrow().clone();
        let place = config.plan.workers.get(worker)?;
        let peer = |(id, other): &(&WorkerId, &Placement)| {
            *id != worker
                && (&other.deployment, other.revision, &other.engine)
                    == (&place.deployment, place.revision, &place.engine)
        };
        let peers = config.plan.workers.iter().filter(peer).map(|(id, _)| id);
        let now_ms = wall_ms();
        let mut guard = self.soft();
        let soft = &mut *guard;
        let view = soft.fleet.agents.get(agent)?;
        let jobs = view.in_flight.get(worker).copied().unwrap_or(0) + view.others(worker);
        soft.paces.note(worker, tokens, took, jobs, now_ms);
        if let Some(reason) = soft.paces.compare(worker, peers, now_ms) {
            log::warn!(agent:%, worker:%, reason; "a worker is far slower than its peers and gets no jobs for a while");
        }
        let reason = soft.paces.slow(worker, now_ms).filter(|_| !job.stays)?.to_owned();
        let ask = Ask { numerics: *numerics, ..Ask::any(&place.deployment, place.revision, now_ms) };
        let slow = |other: &WorkerId| soft.paces.slow(other, now_ms).is_some();
        room::elsewhere(&soft.fleet, &config, &ask, slow).then_some(reason)
    }

    /// Takes an agent in; its older session, if any, is closed. Returns false if the fleet is full.
    pub fn join(&self, agent: &NodeId, connection: &Connection) -> bool {
        let mut soft = self.soft();
        if !soft.fleet.connect(agent, wall_ms()) {
            return false;
        }
        soft.prefixes.forget(agent);
        if let Some(old) = soft.sessions.insert(agent.clone(), connection.clone()) {
            old.close("replaced by a newer session of the same agent");
        }
        drop(soft);
        self.moved.notify_one();
        true
    }

    /// Lets an agent go, unless a newer session has replaced this one.
    pub fn leave(&self, agent: &NodeId, connection: &Connection) -> bool {
        let mut soft = self.soft();
        let current = soft.sessions.get(agent).map(Connection::stable_id);
        if current != Some(connection.stable_id()) {
            return false;
        }
        soft.sessions.remove(agent);
        soft.fleet.disconnect(agent);
        soft.prefixes.forget(agent);
        drop(soft);
        self.moved.notify_one();
        true
    }

    /// Forgets an agent that is away; returns whether it was one.
    pub fn forget(&self, agent: &NodeId) -> bool {
        self.soft().fleet.forget(agent)
    }

    /// Takes a report of a session, unless a newer session has replaced it.
    pub fn report(&self, agent: &NodeId, connection: &Connection, report: Report) {
        let mut soft = self.soft();
        if soft.sessions.get(agent).map(Connection::stable_id) != Some(connection.stable_id()) {
            return;
        }
        let states = |workers: &[WorkerReport]| workers.iter().map(|w| (w.worker.clone(), w.state)).collect::<Vec<_>>();
        let gpus = |health: &Health| health.gpus.iter().map(|gpu| (gpu.id.clone(), gpu.state)).collect::<Vec<_>>();
        let look = |report: &Report| {
            let health = &report.health;
            (states(&report.workers), gpus(health), health.fault.clone(), health.ended.clone())
        };
        let before = soft.fleet.agents.get(agent).and_then(|view| view.report.as_ref().map(look));
        let moved = before.is_none_or(|before| before != look(&report));
        soft.prefixes.report(agent, &report);
        soft.fleet.report(agent, report, wall_ms());
        drop(soft);
        self.freed.notify_one();
        if moved {
            self.moved.notify_one();
        }
    }

    /// The revision of a deployment that new requests are for.
    pub fn revision(&self, config: &Config, deployment: &Deployment) -> Hash {
        scheduler::revision(&self.soft().fleet, config, deployment)
    }

    /// Takes what a worker holds for later prompts, unless a newer session has replaced this one.
    pub fn sketch(&self, agent: &NodeId, connection: &Connection, worker: &WorkerId, sketch: Sketch) {
        let mut soft = self.soft();
        if soft.sessions.get(agent).map(Connection::stable_id) == Some(connection.stable_id()) {
            soft.prefixes.sketch(agent, worker, sketch);
        }
    }

    /// Takes what an agent says of its machine, unless a newer session has replaced this one.
    pub fn machine(&self, agent: &NodeId, connection: &Connection, machine: Machine) {
        let mut soft = self.soft();
        if soft.sessions.get(agent).map(Connection::stable_id) == Some(connection.stable_id())
            && let Some(view) = soft.fleet.agents.get_mut(agent)
        {
            view.machine = Some(machine);
        }
    }

    /// Jobs of this controller on an agent.
    pub fn jobs(&self, agent: &NodeId) -> u32 {
        self.soft().fleet.agents.get(agent).map_or(0, |view| view.jobs())
    }

    pub(super) fn end(&self, agent: &NodeId, worker: &WorkerId) {
        self.soft().fleet.end(agent, worker);
        self.freed.notify_one();
    }

    /// How many jobs the workers of a deployment have room for.
    pub fn room(&self, deployment: &DeploymentId, revision: Hash) -> Room {
        let config = self.config.borrow().clone();
        let ask = Ask::any(deployment, revision, wall_ms());
        room::room(&self.soft().fleet, &config, &ask)
    }

    /// Chooses a worker and counts the job for it.
    fn place(self: &Arc<Self>, job: &Job, avoid: &[WorkerId]) -> Result<(Counted, Connection), NoPlace> {
        let config = self.config.borrow().clone();
        let names = names(job, &config);
        let (now_ms, mut soft) = (wall_ms(), self.soft());
        let avoid = [avoid, &soft.paces.all_slow(now_ms)].concat();
        let ask = Ask {
            deployment: &job.deployment,
            revision: job.revision,
            numerics: job.numerics,
            avoid: &avoid,
            class: job.class,
            tokens: u32::try_from(job.prompt.len() + job.delivered.len()).unwrap_or(u32::MAX),
            names: &names,
            now_ms,
            rotation: self.asks.fetch_add(1, Ordering::Relaxed),
        };
        let place = scheduler::place(&soft.fleet, &soft.prefixes, &config, &ask)?;
        let connection = soft.sessions.get(&place.agent).expect("a connected agent has a session").clone();
        soft.fleet.begin(&place.agent, &place.worker);
        soft.prefixes.sent(&place.worker, &names, ask.now_ms);
        let Place { agent, worker, numerics, why } = place;
        // Who was moved once, or had to take a slow worker, would go round in circles.
        let stays = job.attempt > 0 || soft.paces.slow(&worker, now_ms).is_some();
        let (roster, why, sent) = (self.clone(), Some(why), Instant::now());
        Ok((Counted { roster, agent, worker, numerics, why, sent, stays }, connection))
    }

    /// Finds the agent that keeps the answer of a job which another controller began, and reads it from its beginning.
    pub async fn attach(self: &Arc<Self>, turn: TurnId, choice: u32) -> Option<JobStream> {
        self.ask_all(|agent, connection| self.ask(agent, connection, turn, choice)).await
    }

    /// Finds the capsule of a turn which another controller began.
    pub async fn recall(&self, turn: TurnId) -> Option<Vec<u8>> {
        let recall = |_, connection: Connection| async move {
            let asking = async {
                let (mut tx, mut rx) = connection.open_bi(Open::Recall).await.ok()?;
                tx.send(&Recall { turn }).await.ok()?;
                quic::finish(&mut tx);
                rx.expect::<Recalled>().await.ok()?.capsule
            };
            tokio::time::timeout(ATTACH_LIMIT, asking).await.ok()?
        };
        self.ask_all(recall).await
    }

    /// Asks all agents at once, for the first answer.
    async fn ask_all<T, F: Future<Output = Option<T>>>(&self, ask: impl Fn(NodeId, Connection) -> F) -> Option<T> {
        let sessions: Vec<(NodeId, Connection)> =
            self.soft().sessions.iter().map(|(agent, connection)| (agent.clone(), connection.clone())).collect();
        let mut asked: FuturesUnordered<_> =
            sessions.into_iter().map(|(agent, connection)| ask(agent, connection)).collect();
        while let Some(found) = asked.next().await {
            if found.is_some() {
                return found;
            }
        }
        None
    }

    async fn ask(
        self: &Arc<Self>,
        agent: NodeId,
        connection: Connection,
        turn: TurnId,
        choice: u32,
    ) -> Option<JobStream> {
        let asking = async {
            let (mut tx, mut rx) = connection.open_bi(Open::Resume).await.ok()?;
            tx.send(&Resume { turn, choice }).await.ok()?;
            quic::finish(&mut tx);
            match rx.expect::<Resumed>().await.ok()? {
                Resumed::Found { worker, numerics } => Some((worker, numerics, tx, rx)),
                Resumed::Missing => None,
            }
        };
        let (worker, numerics, tx, rx) = tokio::time::timeout(ATTACH_LIMIT, asking).await.ok()??;
        self.soft().fleet.begin(&agent, &worker);
        // It was placed by another controller, maybe because there was no other place.
        let stays = self.soft().paces.slow(&worker, wall_ms()).is_some();
        let (roster, why, sent) = (self.clone(), None, Instant::now());
        Some(JobStream::running(Counted { roster, agent, worker, numerics, why, sent, stays }, tx, rx))
    }

    /// Sends a job to the best worker; `avoid` names workers that have just failed it.
    ///
    /// Dropping the future cancels the job.
    pub async fn submit(self: &Arc<Self>, job: Job, avoid: &[WorkerId]) -> Result<JobStream, NoPlace> {
        let (counted, connection) = self.place(&job, avoid)?;
        let tokens = job.prompt.len() + job.delivered.len();
        if tokens > JOB_TOKENS {
            let reason = format!("the job has {tokens} tokens, the limit is {JOB_TOKENS}");
            return Ok(JobStream::refused(counted, reason));
        }
        let (tx, rx) = match connection.open_bi(Open::Job).await {
            Ok(streams) => streams,
            Err(error) => {
                let reason = format!("cannot reach agent {}: {error}", counted.agent);
                return Ok(JobStream::unreached(counted, reason));
            }
        };
        let submit = Submit { worker: counted.worker.clone(), job };
        let mut stream = JobStream::running(counted, tx, rx);
        if let Some((tx, _)) = stream.streams() {
            // A failed write means a lost connection or a refusal, which reading tells as well, with its reason.
            if tx.send(&submit).await.is_ok() {
                quic::finish(tx);
            }
        }
        Ok(stream)
    }
}

/// Names what a worker may have of a job in its cache: the beginning of all that is known, in full blocks. The echo model
/// keeps nothing.
fn names(job: &Job, config: &Config) -> Vec<Name> {
    let kind = config.models.get(&job.revision).map(|model| &model.manifest.kind);
    if matches!(kind, None | Some(Kind::Echo { .. })) {
        return Vec::new();
    }
    let known = job.prompt.iter().chain(&job.delivered).copied().take(PREFIX_BLOCKS * BLOCK);
    Namer::new(job.cache_salt).names(&known.collect::<Vec<_>>(), PREFIX_BLOCKS)
}
