//! From a data directory to a running member: what is checked, which threads and tasks there are, who talks to whom.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use izar_common::clock::Clock;
use izar_common::quic::Endpoint;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::applier::{self, Applier};
use super::drive::Loop;
use super::inbox::Inbox;
use super::net::Net;
use super::node::{Node, Times};
use super::proposer::{self, Proposer, Unsettled, Waiting};
use super::reads::{self, Answer, Reads};
use super::writer::{self, LoggedCommit};
use super::{AUDIT_DIR, Driver, Durable, LOG_FILE, Leadership, Options, Raft, STATE_FILE, fatal, keeper, log, marker};
use crate::state::command::{Command, Origin};
use crate::state::store::{Reader, Store};
use crate::state::{self, Config};

/// What lay in the data directory.
pub struct Found {
    me: u64,
    log: log::Opened,
    state: state::store::Opened,
}

/// Checks and opens what lies in the data directory, or begins it.
pub fn open(options: &Options) -> anyhow::Result<Found> {
    marker::claim(options)?;
    let me = options.members.iter().find(|member| member.node == options.node);
    let me = me.with_context(|| format!("{} is not among the members", options.node))?.id;
    let (log_path, state_path) = (options.data_dir.join(LOG_FILE), options.data_dir.join(STATE_FILE));
    let ready = marker::is_ready(options)?;
    for path in [&log_path, &state_path] {
        ensure!(
            !ready || path.exists(),
            "{} is missing: move the directory away, and this member is given the group's memory",
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

/// What threads and tasks have in common.
struct Common {
    me: u64,
    origin: Origin,
    clock: Arc<Clock>,
    inbox: Arc<Inbox>,
    net: Arc<Net>,
    unsettled: Arc<Unsettled>,
    state: state::Shared,
}

/// What the threads tell.
struct Told {
    config: watch::Receiver<Arc<Config>>,
    leadership: watch::Receiver<Leadership>,
    applied: watch::Receiver<u64>,
    answers: watch::Receiver<Answer>,
    compactable: watch::Receiver<u64>,
    durable: watch::Receiver<u64>,
}

/// Starts the threads and tasks of a member.
pub fn run(options: &Options, found: Found, endpoint: &Arc<Endpoint>, clock: Arc<Clock>) -> (Raft, Driver) {
    let Found { me, log, state: state::store::Opened { store, state, voters } } = found;
    clock.see(state.latest());
    let origin = Origin { node: options.node.clone(), incarnation: log.incarnation };
    let reader = store.reader();
    ::log::info!(
        node:% = options.node, incarnation = origin.incarnation, applied = state.applied(), last = log.last.index;
        "raft starts"
    );
    let common = Common {
        me,
        origin,
        clock,
        inbox: Arc::default(),
        net: Arc::new(Net::new(&options.members, me)),
        unsettled: Arc::default(),
        state: state::Shared::new(state),
    };
    let (threads, told) = start_threads(options, &common, log, voters, store);
    start_tasks(common, told, reader, endpoint, threads)
}

fn start_threads(
    options: &Options,
    common: &Common,
    found: log::Opened,
    voters: Vec<u64>,
    store: Store,
) -> (Vec<JoinHandle<()>>, Told) {
    let (applied_index, snapshot) = common.state.read(|state| (state.applied(), state.config_snapshot()));
    let (config_tx, config) = watch::channel(Arc::new(snapshot));
    let (applied_tx, applied) = watch::channel(applied_index);
    // Whoever asks before the first tick must not take a member that has begun for one that has not.
    let begun = Leadership { term: found.hard_state.term, ..Leadership::default() };
    let (leadership_tx, leadership) = watch::channel(begun);
    let (answers_tx, answers) = watch::channel(Answer::default());
    let (compactable_tx, compactable) = watch::channel(0);
    let (durable_tx, durable) = watch::channel(applied_index);
    let (jobs, jobs_rx) = writer::queue();
    let (committed, committed_rx) = std::sync::mpsc::sync_channel(applier::QUEUE);
    let (lots, lots_rx) = keeper::queue();
    let logged = Arc::new(LoggedCommit::default());
    logged.set(found.hard_state.commit);

    let (me, inbox, net) = (common.me, common.inbox.clone(), common.net.clone());
    let times = Times { election_ticks: options.election_ticks, heartbeat_ticks: options.heartbeat_ticks };
    let log = log::Log::new(&found, voters);
    let drive = Loop {
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
    let applier = Applier {
        state: common.state.clone(),
        config: config_tx,
        applied: applied_tx,
        unsettled: common.unsettled.clone(),
        origin: common.origin.clone(),
        clock: common.clock.clone(),
        inbox: inbox.clone(),
    };
    let (keeper_inbox, keeper_logged) = (inbox.clone(), logged.clone());
    let threads = vec![
        thread("raft", move || {
            let node = Node::new(me, log, applied_index, times);
            drive.run(node.unwrap_or_else(|error| fatal("start raft", &error)));
        }),
        thread("raft-log", move || writer::run(found.disk, &jobs_rx, &inbox, &net, &logged)),
        thread("raft-apply", move || applier.run(&committed_rx, &lots)),
        thread("state-keep", move || keeper::run(store, &lots_rx, &keeper_inbox, &keeper_logged, &durable_tx)),
    ];
    (threads, Told { config, leadership, applied, answers, compactable, durable })
}

fn start_tasks(
    common: Common,
    told: Told,
    store: Reader,
    endpoint: &Arc<Endpoint>,
    threads: Vec<JoinHandle<()>>,
) -> (Raft, Driver) {
    let Common { me, origin, clock, inbox, net, unsettled, state } = common;
    let Told { config, leadership, applied, answers, compactable, durable } = told;
    // No election leads out of a life.
    let life = super::rebuild::life_of(leadership.borrow().term);
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
    let reads = Reads {
        asker: me,
        first: origin.incarnation << 32,
        readers: readers_rx,
        answers,
        applied,
        inbox: inbox.clone(),
        end: end.clone(),
    };
    tasks.spawn(reads.run());
    for dialer in net.dialers(endpoint, &inbox) {
        let end = end.clone();
        tasks.spawn(async move { end.run_until_cancelled(dialer).await.unwrap_or_default() });
    }
    tasks.spawn(compact(compactable, commands.clone(), end.clone()));
    let (net_too, inbox_too) = (net.clone(), inbox.clone());
    let durable = Durable { store, reached: durable };
    let raft =
        Raft { commands, readers, config, leadership, state, durable, origin, clock, net: net_too, inbox: inbox_too };
    (raft, Driver { me, life, inbox, net, tasks, end, threads: Mutex::new(threads) })
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
