//! What waits for the raft loop: the one place where other threads and tasks put things for it.
//!
//! Nobody who puts something here ever waits for the loop (so the loop, the log writer and the applier cannot block
//! each other in a circle): progress is kept as the newest number, messages and proposals have bounded queues.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use raft::eraftpb::Message;
use tokio::sync::Notify;

use super::message;

/// Votes and heartbeats that may wait; peers send a few in a tick. The oldest gives way.
const URGENT_LIMIT: usize = 256;
/// Bytes of other messages that may wait; then reading from peers pauses, and QUIC holds them back.
const BULK_BYTES: usize = 32 << 20;
/// Proposals that may wait. Each controller has a handful unsettled, so this is met only when the loop hangs; a
/// proposal that finds no place is dropped, and its origin sends it again.
const PROPOSALS: usize = 256;

/// What the loop takes out at once.
#[derive(Debug, Default)]
pub struct Inputs {
    /// The log writer has everything up to this ready on disk.
    pub persisted: u64,
    /// The applier has applied entries up to here.
    pub applied: u64,
    /// The log up to here may be dropped.
    pub compact: u64,
    pub urgent: VecDeque<Message>,
    pub bulk: VecDeque<Message>,
    pub proposals: VecDeque<Bytes>,
    /// The newest question for a read index; it answers older ones too.
    pub read: Option<Vec<u8>>,
    /// Peers to whom something was not delivered.
    pub unreachable: BTreeSet<u64>,
    /// The state wants to become durable, and needs its commit index in the log first.
    pub log_commit: bool,
    /// If this node leads, another one shall.
    pub hand_over: bool,
    pub shutdown: bool,
    /// Something was put since the last take.
    pub(super) filled: bool,
    pub(super) bulk_bytes: usize,
}

/// The inbox; shared by reference.
#[derive(Debug, Default)]
pub struct Inbox {
    inputs: Mutex<Inputs>,
    filled: Condvar,
    space: Notify,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Inputs> {
        self.inputs.lock().expect("no panic while the inbox is held")
    }
    fn put(&self, change: impl FnOnce(&mut Inputs)) {
        let mut inputs = self.lock();
        change(&mut inputs);
        inputs.filled = true;
        self.filled.notify_one();
    }

    pub fn persisted(&self, number: u64) {
        self.put(|inputs| inputs.persisted = inputs.persisted.max(number));
    }
    pub fn applied(&self, index: u64) {
        self.put(|inputs| inputs.applied = inputs.applied.max(index));
    }
    pub fn compact(&self, index: u64) {
        self.put(|inputs| inputs.compact = inputs.compact.max(index));
    }
    pub fn read(&self, context: Vec<u8>) {
        self.put(|inputs| inputs.read = Some(context));
    }
    pub fn unreachable(&self, peer: u64) {
        self.put(|inputs| {
            inputs.unreachable.insert(peer);
        });
    }
    pub fn log_commit(&self) {
        self.put(|inputs| inputs.log_commit = true);
    }
    pub fn hand_over(&self) {
        self.put(|inputs| inputs.hand_over = true);
    }
    pub fn shutdown(&self) {
        self.put(|inputs| inputs.shutdown = true);
        self.space.notify_waiters();
    }

    /// Puts votes and heartbeats; of too many the oldest go.
    pub fn urgent(&self, messages: impl IntoIterator<Item = Message>) {
        self.put(|inputs| {
            inputs.urgent.extend(messages);
            let excess = inputs.urgent.len().saturating_sub(URGENT_LIMIT);
            inputs.urgent.drain(..excess);
        });
    }

    /// Puts other messages, after waiting for a place. Cancellation drops them, which Raft tolerates.
    pub async fn bulk(&self, messages: Vec<Message>) {
        loop {
            let space = self.space.notified();
            tokio::pin!(space);
            space.as_mut().enable();
            {
                let inputs = self.lock();
                if inputs.shutdown {
                    return;
                }
                if inputs.bulk_bytes < BULK_BYTES {
                    break;
                }
            }
            space.await;
        }
        self.put(|inputs| {
            inputs.bulk_bytes += messages.iter().map(message::size).sum::<usize>();
            inputs.bulk.extend(messages);
        });
    }

    /// Puts an encoded batch; returns whether there was a place.
    pub fn propose(&self, batch: Bytes) -> bool {
        let mut inputs = self.lock();
        let room = inputs.proposals.len() < PROPOSALS;
        if room {
            inputs.proposals.push_back(batch);
            inputs.filled = true;
            self.filled.notify_one();
        }
        room
    }

    /// Takes out what there is; waits until `deadline` if that is nothing.
    pub fn take(&self, deadline: Instant) -> Inputs {
        let mut inputs = self.lock();
        while !inputs.filled {
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            inputs = self.filled.wait_timeout(inputs, deadline - now).expect("no panic while the inbox is held").0;
        }
        let was_full = inputs.bulk_bytes >= BULK_BYTES;
        let next = Inputs {
            persisted: inputs.persisted,
            applied: inputs.applied,
            compact: inputs.compact,
            shutdown: inputs.shutdown,
            ..Inputs::default()
        };
        let taken = std::mem::replace(&mut *inputs, next);
        drop(inputs);
        if was_full {
            self.space.notify_waiters();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn progress_is_kept_as_the_newest_number() {
        let inbox = Inbox::default();
        inbox.persisted(3);
        inbox.persisted(2);
        inbox.applied(5);
        let taken = inbox.take(soon());
        assert_eq!((taken.persisted, taken.applied), (3, 5));
        let nothing = inbox.take(Instant::now());
        assert_eq!((nothing.persisted, nothing.applied, nothing.filled), (3, 5, false));
    }

    #[test]
    fn full_queues_give_way_or_refuse() {
        let inbox = Inbox::default();
        inbox.urgent((0..URGENT_LIMIT as u64 + 2).map(|term| Message { term, ..Message::default() }));
        let proposed = (0..PROPOSALS + 1).filter(|_| inbox.propose(Bytes::new())).count();
        assert_eq!(proposed, PROPOSALS);
        let taken = inbox.take(soon());
        assert_eq!((taken.urgent.len(), taken.urgent[0].term), (URGENT_LIMIT, 2));
        assert!(inbox.propose(Bytes::new()));
    }

    #[tokio::test]
    async fn a_full_inbox_holds_bulk_messages_back_until_they_are_taken() {
        let inbox = std::sync::Arc::new(Inbox::default());
        let mut entry = raft::eraftpb::Entry::default();
        entry.data = vec![0; BULK_BYTES].into();
        let mut big = Message::default();
        big.entries = vec![entry].into();
        inbox.bulk(vec![big]).await;
        let waiting = tokio::spawn({
            let inbox = inbox.clone();
            async move { inbox.bulk(vec![Message::default()]).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert_eq!(inbox.take(soon()).bulk.len(), 1);
        waiting.await.unwrap();
        assert_eq!(inbox.take(soon()).bulk.len(), 1);
    }
}
