//! Raft: the handle to propose, to read and to follow, and the driver behind it.
//!
//! ```text
//! propose ─ proposer ─┬─ inbox ─ raft loop ─ writer (log, fsync) ─ inbox …
//!                     └─ net (to the leader)     └─ applier (state) ─ keeper (state on disk)
//! ```
//! The raft loop, the log writer, the applier and the keeper are threads of their own, so that a busy executor never
//! causes an election; what talks to peers is tasks. An I/O error of log or state, or a panic in one of the threads,
//! ends the process: going on would acknowledge what is not there. The state changes in the applier and nowhere else.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use izar_common::clock::Clock;
use izar_common::id::{ClusterId, NodeId, SiteId};
use izar_common::quic::{self, Endpoint};
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::{Proposal, RaftBatch};
use izar_common::{events, wire};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod applier;
mod drive;
mod inbox;
mod keeper;
mod log;
mod logger;
mod marker;
mod message;
mod net;
mod node;
mod proposer;
mod reads;
pub mod rebuild;
mod start;
mod writer;

pub use marker::{Memory, memory};

use crate::state::command::{Batch, Command, Origin, Refusal, Reply};
use crate::state::store::Reader;
use crate::state::{self, Config};
use inbox::Inbox;
use net::Net;
use proposer::Waiting;

/// Raft's log in the data directory.
const LOG_FILE: &str = "raft.redb";
/// The state in the data directory.
const STATE_FILE: &str = "state.redb";
/// The folder of audit segments in the data directory.
const AUDIT_DIR: &str = "audit";

/// What a member is told at start.
#[derive(Debug, Clone)]
pub struct Options {
    pub data_dir: PathBuf,
    pub cluster: ClusterId,
    pub site: SiteId,
    pub node: NodeId,
    /// All voters of the site, this node among them.
    pub members: Vec<Member>,
    pub tick: Duration,
    pub election_ticks: usize,
    pub heartbeat_ticks: usize,
}

/// A voter.
#[derive(Debug, Clone)]
pub struct Member {
    /// Raft's number for it, from 1; never reused.
    pub id: u64,
    pub node: NodeId,
    pub address: SocketAddr,
}

/// Who leads, as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leadership {
    pub leader: Option<NodeId>,
    pub term: u64,
    /// This node leads.
    pub here: bool,
}

/// Nothing could be decided now; it may be asked again. A proposal may still take effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unavailable {
    pub reason: String,
}

/// A handle to the replicated state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Raft {
    commands: mpsc::Sender<Waiting>,
    readers: mpsc::Sender<oneshot::Sender<()>>,
    config: watch::Receiver<Arc<Config>>,
    leadership: watch::Receiver<Leadership>,
    state: state::Shared,
    durable: Durable,
    origin: Origin,
    clock: Arc<Clock>,
    net: Arc<net::Net>,
    inbox: Arc<Inbox>,
}

/// What of the state is on disk, for those who copy it.
#[derive(Debug, Clone)]
struct Durable {
    store: Reader,
    /// The index that it has reached.
    reached: watch::Receiver<u64>,
}

/// How long the disk may be behind the state until a copy is given up. It is a tenth of a second behind.
const DURABLE_WITHIN: Duration = Duration::from_secs(30);

/// How long an election may take that nobody waits for; a leader that lost its followers gives up after this.
const ELECTED: Duration = Duration::from_millis(500);
/// How long another member may take to lead in this one's place; it takes milliseconds.
pub const HAND_OVER: Duration = Duration::from_secs(2);
/// A follower that was asked to lead and does not: another may. Far above what an election without waiting takes.
const HAND_OVER_AGAIN: Duration = Duration::from_millis(100);

impl Raft {
    /// Opens the data directory and joins the group. Must be called within a tokio runtime.
    pub fn start(options: Options, endpoint: Arc<Endpoint>, clock: Arc<Clock>) -> anyhow::Result<(Self, Driver)> {
        let found = start::open(&options)?;
        Ok(start::run(&options, found, &endpoint, clock))
    }

    /// Proposes a command; returns its reply once this node has applied it.
    ///
    /// `Unavailable` does not say that nothing happened: a leader may have the command and decide it later, once.
    /// Cancelling is the same: the command may take effect.
    pub async fn propose(&self, command: Command) -> Result<Reply, Unavailable> {
        if command.weight() > proposer::COMMAND_BYTES {
            let limit = proposer::COMMAND_BYTES as u64;
            return Ok(Reply::Refused(Refusal::Full { what: "bytes of a command".into(), limit }));
        }
        proposer::propose(&self.commands, command).await
    }

    /// Returns once the state here is at least as new as it was anywhere when this was called.
    pub async fn read_index(&self) -> Result<(), Unavailable> {
        reads::read_index(&self.readers).await
    }

    /// Waits until all that was acknowledged anywhere before this was called is on this node's disk; returns what reads
    /// it there.
    pub async fn durable(&self) -> Result<Reader, Unavailable> {
        self.read_index().await?;
        let applied = self.state.applied();
        let mut reached = self.durable.reached.clone();
        let caught_up = tokio::time::timeout(DURABLE_WITHIN, reached.wait_for(|reached| *reached >= applied)).await;
        match caught_up {
            Ok(Ok(_)) => Ok(self.durable.store.clone()),
            Ok(Err(_)) => Err(Unavailable { reason: "this controller stops".into() }),
            Err(_) => Err(Unavailable { reason: "this controller's disk is far behind".into() }),
        }
    }

    /// Lets another member lead, if this one does, and waits until it does. Returns who leads; nobody after `limit`, in a
    /// group of one, or without a quorum.
    pub async fn hand_over(&self, limit: Duration) -> Option<NodeId> {
        let mut leadership = self.leadership();
        let handing_over = async {
            while leadership.borrow_and_update().here && !self.net.is_alone() {
                self.inbox.hand_over();
                let _ = tokio::time::timeout(HAND_OVER_AGAIN, leadership.wait_for(|now| !now.here)).await;
                // Whoever is elected is known only when it says its first word.
                let _ = tokio::time::timeout(ELECTED, leadership.wait_for(|now| now.leader.is_some())).await;
            }
        };
        let _ = tokio::time::timeout(limit, handing_over).await;
        let lead = self.leadership.borrow().clone();
        lead.leader.filter(|_| !lead.here)
    }

    /// Follows the configuration. It is behind `state` by less than an entry's application.
    pub fn config(&self) -> watch::Receiver<Arc<Config>> {
        self.config.clone()
    }
    /// Follows who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }
    /// The state for readers: turns, digest.
    pub fn state(&self) -> &state::Shared {
        &self.state
    }
    /// The other members that this one cannot reach, and for how long.
    pub fn away(&self) -> Vec<(NodeId, Duration)> {
        self.net.away()
    }
    /// Whether a node is another member of the group.
    pub fn is_peer(&self, node: &NodeId) -> bool {
        self.net.id_of(node).is_some()
    }
    /// This process, as the state knows it.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }
    pub fn clock(&self) -> &Clock {
        &self.clock
    }
}

/// Takes the data directory for this node; refuses one of another cluster, site or node, or of a newer version, and
/// leaves it untouched. `Raft::start` does it too; this is for those who write there before.
pub fn claim_data_dir(options: &Options) -> anyhow::Result<()> {
    marker::claim(options)
}

/// Ends the process, because its storage cannot be trusted any more or one of its threads is gone.
fn fatal(what: &str, error: &anyhow::Error) -> ! {
    ::log::error!(what, error = format!("{error:#}"); "storage or state failed, the process ends");
    ::log::logger().flush();
    std::process::abort()
}

/// What runs behind the handle. Whoever accepts connections gives it the streams that are Raft's.
#[derive(Debug)]
pub struct Driver {
    me: u64,
    /// Which life this member's terms are of.
    life: u64,
    inbox: Arc<Inbox>,
    net: Arc<Net>,
    tasks: TaskTracker,
    end: CancellationToken,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Driver {
    /// Reads a peer's Raft stream until it ends or this node stops. Streams of other kinds are not for this.
    ///
    /// Returns the frame's error if the peer broke a rule of the wire: a reason to close its connection.
    pub async fn on_stream(&self, peer: NodeId, open: Open, mut stream: quic::Receiver) -> Option<wire::Error> {
        let Some(id) = self.net.id_of(&peer) else {
            ::log::warn!(peer:%; "a controller that is no member opened a raft stream");
            return None;
        };
        let read = async {
            match open {
                Open::RaftUrgent | Open::RaftBulk => self.read_messages(&peer, id, open, &mut stream).await,
                Open::Propose => self.read_proposals(&peer, &mut stream).await,
                _ => anyhow::bail!("not a raft stream: {open:?}"),
            }
        };
        let ended = self.end.run_until_cancelled(read).await;
        quic::stop(&mut stream);
        let Some(Err(error)) = ended else { return None };
        match error.downcast::<wire::Error>() {
            Ok(error) if error.is_lost() => None,
            Ok(error) => Some(error),
            Err(error) => {
                ::log::warn!(peer:%, reason = format!("{error:#}"); "a raft stream was refused");
                None
            }
        }
    }

    async fn read_messages(
        &self,
        peer: &NodeId,
        id: u64,
        open: Open,
        stream: &mut quic::Receiver,
    ) -> anyhow::Result<()> {
        let mut told = false;
        while let Some(RaftBatch(mut messages)) = stream.next().await? {
            if let Some(other) = message::strike_other_lives(&mut messages, self.life)
                && !std::mem::replace(&mut told, true)
            {
                let (life, its) = (self.life.max(1), other.max(1));
                ::log::error!(message_id = events::OTHER_LIFE, peer:%, life, its; "a peer is of another life of this cluster and is not heard");
            }
            let checked = messages.into_iter().map(|message| message::from_wire(message, id, self.me));
            let messages = checked.collect::<Result<Vec<_>, _>>()?;
            match open {
                Open::RaftUrgent => self.inbox.urgent(messages),
                _ => self.inbox.bulk(messages).await,
            }
        }
        Ok(())
    }

    /// A proposal is decoded before it may enter the log: what is in there, every member must be able to apply.
    async fn read_proposals(&self, peer: &NodeId, stream: &mut quic::Receiver) -> anyhow::Result<()> {
        while let Some(Proposal(bytes)) = stream.next().await? {
            let decoded = wire::decode::<Batch>(&bytes);
            let (batch, length) = decoded.map_err(|error| anyhow::anyhow!("a proposal does not decode: {error}"))?;
            ensure!(length == bytes.len(), "a proposal has bytes too many");
            ensure!(batch.origin.node == *peer, "a proposal in the name of {}", batch.origin.node);
            if !self.inbox.propose(bytes.into()) {
                ::log::debug!(peer:%; "no place for a proposal");
            }
        }
        Ok(())
    }

    /// Stops: those who wait get `Unavailable`, log and state become durable, the threads end.
    pub async fn shutdown(&self) {
        self.end.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.inbox.shutdown();
        let threads = std::mem::take(&mut *self.threads.lock().expect("no panic while the threads are held"));
        let join = move || threads.into_iter().for_each(|thread| drop(thread.join()));
        tokio::task::spawn_blocking(join).await.expect("joining does not panic");
    }
}

#[cfg(test)]
mod tests;
