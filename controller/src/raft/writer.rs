//! The thread that makes the log durable: many readies, one transaction, one fsync.
//!
//! What a follower acknowledges and what a candidate asks leave this node here, after the fsync, never before. The
//! order is: disk, then the raft loop learns of it, then messages go: an answer to such a message can therefore never
//! reach the loop before the news that it waits for.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use izar_common::vitals::Vital;
use raft::eraftpb::{Entry, HardState, Message};

use super::inbox::Inbox;
use super::log::{Disk, Position};
use super::net::Net;
use super::{fatal, message};

/// Readies that may wait for the disk. Leaders stop taking proposals at 64 MiB that are not committed, so this many
/// wait only behind a disk that hangs; then the raft loop waits too, and another node is elected.
pub const QUEUE: usize = 4096;
/// Bytes that are written in one transaction; more would only make the first of them wait.
const GROUP_BYTES: usize = 8 << 20;

/// What one ready asks of the disk.
#[derive(Debug, Default)]
pub struct Job {
    /// The ready's number; 0 for none.
    pub number: u64,
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    pub truncated: Option<Position>,
    /// To be sent once this and all before it is durable.
    pub messages: Vec<Message>,
}

/// The commit index that the log on disk knows, for those who must not run ahead of it.
#[derive(Debug, Default)]
pub struct LoggedCommit {
    commit: Mutex<u64>,
    moved: Condvar,
}

impl LoggedCommit {
    pub fn set(&self, commit: u64) {
        *self.commit.lock().expect("no panic while the commit is held") = commit;
        self.moved.notify_all();
    }
    /// Waits until the log knows `index` to be committed; returns whether it does in time.
    pub fn wait(&self, index: u64, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut commit = self.commit.lock().expect("no panic while the commit is held");
        while *commit < index {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            commit = self.moved.wait_timeout(commit, left).expect("no panic while the commit is held").0;
        }
        true
    }
}

/// Makes the queue of the writer.
pub fn queue() -> (SyncSender<Job>, Receiver<Job>) {
    sync_channel(QUEUE)
}

/// Writes until the raft loop lets go of the queue.
pub fn run(mut disk: Disk, jobs: &Receiver<Job>, inbox: &Inbox, net: &Net, logged: &Arc<LoggedCommit>) {
    let vital = Vital::new("raft-log");
    while let Ok(first) = jobs.recv() {
        vital.work();
        let mut group = first;
        let mut bytes = weight(&group);
        while bytes < GROUP_BYTES {
            let Ok(next) = jobs.try_recv() else { break };
            bytes += weight(&next);
            join(&mut group, next);
        }
        let Job { number, entries, hard_state, truncated, messages } = group;
        let anything = !entries.is_empty() || hard_state.is_some() || truncated.is_some();
        if anything && let Err(error) = disk.write(&entries, hard_state.as_ref(), truncated) {
            fatal("write the raft log", &error.into());
        }
        if let Some(hard_state) = hard_state {
            logged.set(hard_state.commit);
        }
        inbox.persisted(number);
        net.send(messages, inbox);
        vital.rest();
    }
}

fn weight(job: &Job) -> usize {
    job.entries.iter().map(message::entry_size).sum()
}

fn join(group: &mut Job, next: Job) {
    group.number = group.number.max(next.number);
    group.entries.extend(next.entries);
    group.hard_state = next.hard_state.or(group.hard_state.take());
    group.truncated = next.truncated.or(group.truncated);
    group.messages.extend(next.messages);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: u64, index: u64, commit: u64) -> Job {
        let mut entry = Entry::default();
        (entry.index, entry.term) = (index, 1);
        let hard_state = Some(HardState { commit, ..HardState::default() });
        Job { number, entries: vec![entry], hard_state, ..Job::default() }
    }

    #[test]
    fn readies_that_wait_are_written_together_and_the_newest_number_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let opened = Disk::open(&path).unwrap();
        let (sender, jobs) = queue();
        for job in [job(1, 1, 0), job(2, 2, 1), Job { number: 3, ..Job::default() }] {
            sender.send(job).unwrap();
        }
        drop(sender);
        let (inbox, logged) = (Inbox::default(), Arc::new(LoggedCommit::default()));
        run(opened.disk, &jobs, &inbox, &Net::default(), &logged);
        assert_eq!(inbox.take(Instant::now()).persisted, 3);
        assert!(logged.wait(1, Duration::ZERO) && !logged.wait(2, Duration::ZERO));
        let opened = Disk::open(&path).unwrap();
        assert_eq!((opened.last.index, opened.hard_state.commit), (2, 1));
    }
}
