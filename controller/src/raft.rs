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
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::raft::eraftpb::Entry;
use anyhow::{Context, ensure};
use izar_common::clock::Clock;
use izar_common::id::{ClusterId, NodeId, SiteId};
use izar_common::quic::{self, Endpoint};
use izar_common::wire;
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::{Proposal, RaftBatch};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod applier;
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
mod writer;

use crate::state::command::{Batch, Command, Origin, Refusal, Reply};
use crate::state::store::Store;
use crate::state::{self, Config};
use applier::Applier;
use inbox::Inbox;
use net::Net;
use node::{Effects, Lead, Node, Times};
use proposer::{Proposer, Unsettled, Waiting};
use reads::{Answer, Reads};
use writer::{Job, LoggedCommit};

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
    origin: Origin,
    clock: Arc<Clock>,
}

impl Raft {
    /// Opens the data directory and joins the group. Must be called within a tokio runtime.
    pub fn start(options: Options, endpoint: Arc<Endpoint>, clock: Arc<Clock>) -> anyhow::Result<(Self, Driver)> {
        let found = open(&options)?;
        Ok(run(&options, found, &endpoint, clock))
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

/// What lay in the data directory.
struct Found {
    me: u64,
    log: log::Opened,
    state: state::store::Opened,
}

fn open(options: &Options) -> anyhow::Result<Found> {
    marker::claim(options)?;
    let me = options.members.iter().find(|member| member.node == options.node);
    let me = me.with_context(|| format!("{} is not among the members", options.node))?.id;
    let (log_path, state_path) = (options.data_dir.join(LOG_FILE), options.data_dir.join(STATE_FILE));
    let ready = marker::is_ready(options)?;
    for path in [&log_path, &state_path] {
        ensure!(
            !ready || path.exists(),
            "{} is missing: a member that lost its memory must not come back under its old id",
            path.display()
        );
    }
    let mut ids: Vec<u64> = options.members.iter().map(|member| member.id).collect();
    ids.sort_unstable();
    let state = Store::open(&state_path, &options.data_dir.join(AUDIT_DIR), &options.site, &ids)?;
    ensure!(
        state.voters == ids,
        "the group has the members {:?}, the configuration {ids:?}; this version cannot change them",
        state.voters
    );
    let log = log::Disk::open(&log_path)?;
    let (applied, commit) = (state.state.applied(), log.hard_state.commit);
    ensure!(
        log.truncated.index <= applied && applied <= commit && commit <= log.last.index,
        "log and state in {} do not fit together: the log holds {}..={}, committed are {commit}, applied are {applied}",
        options.data_dir.display(),
        log.truncated.index + 1,
        log.last.index
    );
    if !ready {
        marker::sync_dir(&options.data_dir)?;
        marker::set_ready(options)?;
    }
    Ok(Found { me, log, state })
}

fn run(options: &Options, found: Found, endpoint: &Arc<Endpoint>, clock: Arc<Clock>) -> (Raft, Driver) {
    let Found { me, log: log_found, state: state::store::Opened { store, state, voters } } = found;
    clock.see(state.latest());
    let origin = Origin { node: options.node.clone(), incarnation: log_found.incarnation };
    ::log::info!(
        node:% = options.node, incarnation = origin.incarnation, applied = state.applied(), last = log_found.last.index;
        "raft starts"
    );
    let (inbox, net) = (Arc::new(Inbox::default()), Arc::new(Net::new(&options.members, me)));
    let (logged, unsettled) = (Arc::new(LoggedCommit::default()), Arc::new(Unsettled::default()));
    logged.set(log_found.hard_state.commit);
    let (config_tx, config) = watch::channel(Arc::new(state.config_snapshot()));
    let (applied_tx, applied) = watch::channel(state.applied());
    let (leadership_tx, leadership) = watch::channel(Leadership::default());
    let (answers_tx, answers) = watch::channel(Answer::default());
    let (compactable_tx, compactable) = watch::channel(0);

    let times = Times { election_ticks: options.election_ticks, heartbeat_ticks: options.heartbeat_ticks };
    let (applied_index, log) = (state.applied(), log::Log::new(&log_found, voters));
    let shared = state::Shared::new(state);
    let (jobs, jobs_rx) = writer::queue();
    let (committed, committed_rx) = std::sync::mpsc::sync_channel(applier::QUEUE);
    let (lots, lots_rx) = keeper::queue();
    let applier = Applier {
        state: shared.clone(),
        config: config_tx,
        applied: applied_tx,
        unsettled: unsettled.clone(),
        origin: origin.clone(),
        clock: clock.clone(),
        inbox: inbox.clone(),
    };
    let shell = Loop {
        me,
        tick: options.tick,
        members: options.members.clone(),
        inbox: inbox.clone(),
        net: net.clone(),
        jobs,
        committed,
        leadership: leadership_tx,
        answers: answers_tx,
        compactable: compactable_tx,
    };
    let threads = vec![
        thread("raft", move || {
            let node = Node::new(me, log, applied_index, times);
            shell.run(node.unwrap_or_else(|error| fatal("start raft", &error)));
        }),
        thread("raft-log", {
            let (inbox, net, logged) = (inbox.clone(), net.clone(), logged.clone());
            move || writer::run(log_found.disk, &jobs_rx, &inbox, &net, &logged)
        }),
        thread("raft-apply", move || applier.run(&committed_rx, &lots)),
        thread("state-keep", {
            let inbox = inbox.clone();
            move || keeper::run(store, &lots_rx, &inbox, &logged)
        }),
    ];

    let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
    let (commands, commands_rx) = mpsc::channel(proposer::QUEUE);
    let (readers, readers_rx) = mpsc::channel(reads::QUEUE);
    let proposer = Proposer {
        origin: origin.clone(),
        clock: clock.clone(),
        commands: commands_rx,
        unsettled,
        leadership: leadership.clone(),
        inbox: inbox.clone(),
        net: net.clone(),
        end: end.clone(),
    };
    tasks.spawn(proposer.run());
    let first = origin.incarnation << 32;
    let reads =
        Reads { asker: me, first, readers: readers_rx, answers, applied, inbox: inbox.clone(), end: end.clone() };
    tasks.spawn(reads.run());
    for dialer in net.dialers(endpoint, &inbox) {
        let end = end.clone();
        tasks.spawn(async move { end.run_until_cancelled(dialer).await.unwrap_or_default() });
    }
    tasks.spawn(compact(compactable, commands.clone(), end.clone()));
    let raft = Raft { commands, readers, config, leadership, state: shared, origin, clock };
    (raft, Driver { me, inbox, net, tasks, end, threads: Mutex::new(threads) })
}

/// Starts a thread whose panic ends the process.
fn thread(name: &'static str, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    let guarded = move || {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            fatal(name, &anyhow::anyhow!("the thread panicked"));
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(guarded).expect("the system has room for a thread")
}

/// Proposes that the log be dropped where every voter has it. If it fails, the next occasion comes.
async fn compact(mut compactable: watch::Receiver<u64>, commands: mpsc::Sender<Waiting>, end: CancellationToken) {
    let propose = async {
        while compactable.changed().await.is_ok() {
            let through = *compactable.borrow_and_update();
            if let Err(error) = proposer::propose(&commands, Command::CompactLog { through }).await {
                ::log::debug!(error:%; "the log was not compacted");
            }
        }
    };
    end.run_until_cancelled(propose).await;
}

/// The raft loop's thread: carries inputs to the node and its effects to those who act.
struct Loop {
    me: u64,
    tick: Duration,
    members: Vec<Member>,
    inbox: Arc<Inbox>,
    net: Arc<Net>,
    jobs: SyncSender<Job>,
    committed: SyncSender<Vec<Entry>>,
    leadership: watch::Sender<Leadership>,
    answers: watch::Sender<Answer>,
    compactable: watch::Sender<u64>,
}

impl Loop {
    fn run(self, mut node: Node) {
        let mut last = Instant::now();
        loop {
            let wait = node.ticks_to_wait();
            let inputs = self.inbox.take(last + self.tick * wait as u32);
            let stop = inputs.shutdown;
            let passed = last.elapsed().as_nanos() / self.tick.as_nanos();
            let ticks = passed.min(wait as u128) as u32;
            // After a pause ticks are not made up for: it is enough to be slow once.
            last = if passed > u128::from(ticks) { Instant::now() } else { last + self.tick * ticks };
            let effects = node.step(inputs, ticks as usize);
            self.act(effects);
            if stop {
                if let Some(job) = node.last_job() {
                    self.submit(job);
                }
                return;
            }
        }
    }

    fn act(&self, effects: Effects) {
        self.net.send(effects.messages, &self.inbox);
        for job in effects.jobs {
            self.submit(job);
        }
        if !effects.committed.is_empty() {
            self.committed.send(effects.committed).expect("the applier ends after this loop");
        }
        if let Some(answer) = reads::newest(self.me, &effects.reads) {
            self.answers.send_replace(answer);
        }
        if let Some(lead) = effects.lead {
            self.tell(lead);
        }
        if let Some(through) = effects.compactable {
            self.compactable.send_replace(through);
        }
    }

    fn submit(&self, job: Job) {
        self.jobs.send(job).expect("the writer ends after this loop");
    }

    fn tell(&self, lead: Lead) {
        let member = self.members.iter().find(|member| member.id == lead.leader);
        let leader = member.map(|member| member.node.clone());
        ::log::info!(leader = leader.as_ref().map_or("none", |node| node.as_str()), term = lead.term; "the leader changed");
        self.leadership.send_replace(Leadership { leader, term: lead.term, here: lead.here });
    }
}

/// What runs behind the handle. Whoever accepts connections gives it the streams that are Raft's.
#[derive(Debug)]
pub struct Driver {
    me: u64,
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
                Open::RaftUrgent | Open::RaftBulk => self.read_messages(id, open, &mut stream).await,
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

    async fn read_messages(&self, peer: u64, open: Open, stream: &mut quic::Receiver) -> anyhow::Result<()> {
        while let Some(RaftBatch(messages)) = stream.next().await? {
            let checked = messages.into_iter().map(|message| message::from_wire(message, peer, self.me));
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
