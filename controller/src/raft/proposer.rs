//! Group commit: the commands of this controller, gathered into numbered batches and sent to whoever leads.
//!
//! A command that comes when few batches are unsettled goes at once; those that come while the limit is reached share
//! the next batch. So nobody who waits for an answer waits on purpose, and load makes batches larger, not more numerous.
//! Only the end of a turn, for which no client waits, may ride along with what comes next for a moment. A batch is sent
//! again, the same bytes, when the leader changes or nothing is heard of it; the state lets it take effect once. It is
//! settled when this node applies it, and only that answers those who wait.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use izar_common::clock::Clock;
use izar_common::wire;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::inbox::Inbox;
use super::net::Net;
use super::{Leadership, Unavailable};
use crate::state::command::{Batch, Command, Origin, Reply};

/// Commands that may wait for a batch: several seconds of full load. Beyond that a proposal is refused at once.
pub const QUEUE: usize = 16_384;
/// Commands in a batch.
const BATCH_COMMANDS: usize = 1024;
/// Bytes of commands in a batch, unless a single one is larger.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of a single command, well within what an entry may have.
pub const COMMAND_BYTES: usize = 4 << 20;
/// Batches on their way at once: enough to keep disk and network busy, few enough that batches grow under load.
const UNSETTLED: usize = 4;
/// How long the ends of turns wait for company when they are alone: each saved batch saves an fsync on every member.
const RIDE: Duration = Duration::from_millis(10);
/// A batch of which nothing was heard for this long is sent again.
const RESEND: Duration = Duration::from_millis(500);
/// How long a caller waits, and a batch is sent again and again.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A command that waits for its reply.
#[derive(Debug)]
pub struct Waiting {
    pub command: Command,
    pub reply: oneshot::Sender<Reply>,
}

/// Batches that were sent and not yet applied here.
#[derive(Debug, Default)]
pub struct Unsettled {
    batches: Mutex<BTreeMap<u64, Sent>>,
    settled: Notify,
}

#[derive(Debug)]
struct Sent {
    frame: Bytes,
    replies: Vec<oneshot::Sender<Reply>>,
    first: Instant,
    last: Instant,
}

impl Unsettled {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Sent>> {
        self.batches.lock().expect("no panic while the batches are held")
    }
    /// Answers those who wait for a batch. Called by the applier.
    pub fn settle(&self, seq: u64, replies: Vec<Reply>) {
        let Some(sent) = self.lock().remove(&seq) else { return };
        for (waiting, reply) in sent.replies.into_iter().zip(replies) {
            // Who does not wait any more does not want to know.
            let _ = waiting.send(reply);
        }
        self.settled.notify_one();
    }
}

/// The task behind `Raft::propose`.
#[derive(Debug)]
pub struct Proposer {
    pub origin: Origin,
    pub clock: Arc<Clock>,
    pub commands: mpsc::Receiver<Waiting>,
    pub unsettled: Arc<Unsettled>,
    pub leadership: watch::Receiver<Leadership>,
    pub inbox: Arc<Inbox>,
    pub net: Arc<Net>,
    pub end: CancellationToken,
}

impl Proposer {
    /// Runs until the end; those who wait then get no reply.
    pub async fn run(mut self) {
        let mut next_seq = 1;
        let mut backlog = VecDeque::new();
        let mut arrived = Vec::new();
        // Until when the backlog may wait for company; `None` if it may not, or is empty.
        let mut ride: Option<Instant> = None;
        loop {
            if ride.is_some_and(|until| until <= Instant::now()) {
                ride = None;
            }
            while !backlog.is_empty() && ride.is_none() && self.unsettled.lock().len() < UNSETTLED {
                self.send_next(&mut backlog, &mut next_seq);
            }
            let wake = self.next_wake();
            tokio::select! {
                biased;
                () = self.end.cancelled() => break,
                changed = self.leadership.changed() => match changed {
                    Ok(()) => self.resend(|_| true),
                    Err(_) => break,
                },
                () = self.unsettled.settled.notified() => {}
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.remind(),
                count = self.commands.recv_many(&mut arrived, BATCH_COMMANDS), if backlog.is_empty() || ride.is_some() => {
                    if count == 0 {
                        break;
                    }
                    let alone = arrived.iter().all(|waiting| waiting.command.may_ride());
                    let full = backlog.len() + arrived.len() >= BATCH_COMMANDS;
                    ride = (alone && !full).then(|| ride.unwrap_or_else(|| Instant::now() + RIDE));
                    backlog.extend(arrived.drain(..));
                }
                () = tokio::time::sleep_until(ride.unwrap_or_else(Instant::now)), if ride.is_some() => ride = None,
            }
        }
        self.unsettled.lock().clear();
    }

    /// Makes the next batch of what waits and sends it.
    fn send_next(&self, backlog: &mut VecDeque<Waiting>, next_seq: &mut u64) {
        let (mut commands, mut replies, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some(Waiting { command, reply }) = backlog.pop_front() {
            if reply.is_closed() {
                continue;
            }
            let weight = command.weight();
            if !commands.is_empty() && (bytes + weight > BATCH_BYTES || commands.len() == BATCH_COMMANDS) {
                backlog.push_front(Waiting { command, reply });
                break;
            }
            bytes += weight;
            commands.push(command);
            replies.push(reply);
        }
        if commands.is_empty() {
            return;
        }
        let seq = *next_seq;
        *next_seq += 1;
        let mut unsettled = self.unsettled.lock();
        let floor = unsettled.keys().next().copied().unwrap_or(seq);
        let batch = Batch { origin: self.origin.clone(), seq, floor, at: self.clock.now(), commands };
        let frame = wire::to_bytes(&batch).freeze();
        let now = Instant::now();
        unsettled.insert(seq, Sent { frame: frame.clone(), replies, first: now, last: now });
        drop(unsettled);
        self.send(frame);
    }

    fn send(&self, frame: Bytes) {
        let leadership = self.leadership.borrow();
        if leadership.here {
            self.inbox.propose(frame);
        } else if let Some(leader) = &leadership.leader {
            self.net.propose(leader, frame);
        }
    }

    /// Sends again what was last sent when `due` says so.
    fn resend(&self, due: impl Fn(Instant) -> bool) {
        let now = Instant::now();
        let mut frames = Vec::new();
        for sent in self.unsettled.lock().values_mut().filter(|sent| due(sent.last)) {
            sent.last = now;
            frames.push(sent.frame.clone());
        }
        for frame in frames {
            self.send(frame);
        }
    }

    /// Gives up what has been tried for too long and reminds the leader of the rest. What is given up may still take
    /// effect, if a leader has it already.
    fn remind(&self) {
        let now = Instant::now();
        self.unsettled.lock().retain(|_, sent| now - sent.first < PATIENCE);
        self.resend(|last| now - last >= RESEND);
    }

    /// When something must be sent again or given up.
    fn next_wake(&self) -> Option<Instant> {
        self.unsettled.lock().values().map(|sent| (sent.last + RESEND).min(sent.first + PATIENCE)).min()
    }
}

/// Hands a command to the proposer and waits for what comes of it.
pub async fn propose(commands: &mpsc::Sender<Waiting>, command: Command) -> Result<Reply, Unavailable> {
    let unavailable = |reason: &str| Unavailable { reason: reason.to_owned() };
    let (reply, replied) = oneshot::channel();
    commands.try_send(Waiting { command, reply }).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => unavailable("too many proposals wait"),
        mpsc::error::TrySendError::Closed(_) => unavailable("this controller stops"),
    })?;
    match tokio::time::timeout(PATIENCE, replied).await {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(_)) => Err(unavailable("the proposal was given up; it may still take effect")),
        Err(_) => Err(unavailable("no quorum decided in time; the proposal may still take effect")),
    }
}
