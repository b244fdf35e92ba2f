//! Sessions with agents: assignments down, reports up, a stream for each job.
//!
//! Every controller has a session with every agent of its site, so each can place jobs; the leader alone plans. What
//! is known of agents is soft: a controller that restarts learns it again with the first reports.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use izar_common::blob::Store;
use izar_common::chat::Job;
use izar_common::health::gpu::{Action, Outcome};
use izar_common::id::{DeploymentId, Hash, NodeId, SiteId, TurnId, WorkerId};
use izar_common::quic::Connection;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fleet::Fleet;
use crate::queue::Room;
use crate::raft::Raft;
use crate::state::remedies::Remedy;
use crate::state::{Config, Deployment};

mod assignment;
#[cfg(test)]
pub(crate) mod fixture;
mod job;
mod lead;
mod roster;
mod session;
#[cfg(test)]
mod tests;
mod tripwire;

pub use crate::scheduler::NoPlace;
pub use job::{AgentLost, JobStream};
use roster::Roster;
use tripwire::Tripwires;

/// The handle: give it connections, ask it for workers.
#[derive(Clone)]
pub struct Agents {
    inner: Arc<Inner>,
}

struct Inner {
    raft: Raft,
    store: Store,
    site: SiteId,
    roster: Arc<Roster>,
    tripwires: Arc<Tripwires>,
    /// Agents whose sessions were ended because they seemed dead.
    given_up: AtomicU64,
    /// Remedies of GPUs that this controller saw end while it led.
    remedies: Mutex<BTreeMap<(Action, Outcome), u64>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Inner {
    fn count_remedy(&self, action: Action, outcome: Outcome) {
        let mut counts = self.remedies.lock().expect("no panic while the counts are held");
        *counts.entry((action, outcome)).or_default() += 1;
    }
}

impl Agents {
    /// Starts planning (while this controller leads). `store` has the model files that agents fetch; agents of
    /// another site than `site` are refused.
    pub fn start(raft: Raft, store: Store, site: SiteId) -> Self {
        let roster = Arc::new(Roster::new(raft.config()));
        let tripwires = Arc::new(Tripwires::default());
        let inner = Inner {
            raft,
            store,
            site,
            roster,
            tripwires,
            given_up: AtomicU64::new(0),
            remedies: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let agents = Self { inner: Arc::new(inner) };
        let inner = agents.inner.clone();
        agents.inner.tasks.spawn(async move {
            tokio::select! {
                () = lead::run(&inner) => {}
                () = inner.stop.cancelled() => {}
            }
        });
        agents
    }

    /// Takes the tripwires of agents on a listener, which should have the port that they reach this controller at.
    pub fn serve_tripwires(&self, listener: TcpListener) {
        let inner = &self.inner;
        let serving = inner.tripwires.clone().serve(listener, inner.stop.clone(), inner.tasks.clone());
        inner.tasks.spawn(serving);
    }

    /// Serves one accepted connection of an agent until it ends. A second connection of the same agent replaces the
    /// first.
    pub async fn serve(&self, connection: Connection) {
        session::serve(self, connection).await;
    }

    /// Sends a job to the worker that has the least to do for it, or says why none can.
    ///
    /// Dropping the future or the stream cancels the job.
    pub async fn submit(&self, job: Job) -> Result<JobStream, NoPlace> {
        self.inner.roster.submit(job, &[]).await
    }

    /// Like `submit`, for a job that some workers have just failed: they get it only if there is no other.
    pub async fn submit_avoiding(&self, job: Job, avoid: &[WorkerId]) -> Result<JobStream, NoPlace> {
        self.inner.roster.submit(job, avoid).await
    }

    /// How many jobs the workers of a deployment have room for.
    pub fn room(&self, deployment: &DeploymentId, revision: Hash) -> Room {
        self.inner.roster.room(deployment, revision)
    }

    /// Resolves when there may be more room than before. For one waiter.
    pub async fn freed(&self) {
        self.inner.roster.freed.notified().await;
    }

    /// Reads the answer of a job that another controller began, if an agent keeps it.
    pub async fn attach(&self, turn: TurnId, choice: u32) -> Option<JobStream> {
        self.inner.roster.attach(turn, choice).await
    }

    /// The sealed request of a turn that another controller began, if an agent keeps it.
    pub async fn recall(&self, turn: TurnId) -> Option<Vec<u8>> {
        self.inner.roster.recall(turn).await
    }

    /// How many agents seemed dead so far; each that was not is a false alarm.
    pub fn given_up(&self) -> u64 {
        self.inner.given_up.load(Relaxed)
    }

    /// Remedies of GPUs that have ended while this controller led.
    pub fn remedies(&self) -> BTreeMap<(Action, Outcome), u64> {
        self.inner.remedies.lock().expect("no panic while the counts are held").clone()
    }

    /// Orders to agents that have not ended.
    pub fn open_remedies(&self) -> Vec<Remedy> {
        self.inner.raft.config().borrow().remedies.values().cloned().collect()
    }

    /// The revision of a deployment that new requests are for.
    pub fn revision(&self, config: &Config, deployment: &Deployment) -> Hash {
        self.inner.roster.revision(config, deployment)
    }

    /// A copy of what agents last said.
    pub fn fleet(&self) -> Fleet {
        self.inner.roster.fleet()
    }

    /// Forgets an agent that is away; returns whether it was one.
    pub fn forget(&self, agent: &NodeId) -> bool {
        self.inner.roster.forget(agent)
    }

    /// Closes every session and waits until all tasks have ended.
    pub async fn stop(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}
