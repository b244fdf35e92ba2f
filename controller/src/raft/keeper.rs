//! The thread that makes the state durable, a little behind the applier.
//!
//! Before the state on disk says that an entry was applied, the log on disk must know that it is committed; and only
//! what the state on disk has may be dropped from the log. So at every boot: applied ≤ commit ≤ last entry.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use izar_common::vitals::Vital;
use tokio::sync::watch;

use super::fatal;
use super::inbox::Inbox;
use super::writer::LoggedCommit;
use crate::state::store::{Store, Write};

/// Lots that may wait for the disk; then the applier waits, and behind it the raft loop.
const QUEUE: usize = 256;
/// Changes become durable after this time. The log replays what a crash loses, so this bounds the replay only.
const DURABLE_AFTER: Duration = Duration::from_millis(100);
/// Changes become durable when there are this many bytes of them.
const DURABLE_BYTES: usize = 4 << 20;
/// How long the log may take to know a commit index before a human is told and it is asked again.
const LOG_PATIENCE: Duration = Duration::from_secs(5);

/// Changes of some entries.
#[derive(Debug)]
pub struct Lot {
    pub write: Write,
    /// Every voter has the log up to here on disk.
    pub compacted: u64,
}

/// Makes the keeper's queue.
pub fn queue() -> (SyncSender<Lot>, Receiver<Lot>) {
    sync_channel(QUEUE)
}

/// Keeps until the applier lets go of the queue; then everything is durable. Tells `durable` how far it is.
pub fn run(mut store: Store, lots: &Receiver<Lot>, inbox: &Inbox, logged: &LoggedCommit, durable: &watch::Sender<u64>) {
    let vital = Vital::new("state-keep");
    let mut compacted = 0;
    while let Ok(lot) = lots.recv() {
        vital.work();
        let deadline = Instant::now() + DURABLE_AFTER;
        let mut more = true;
        let mut take = |store: &mut Store, lot: Lot| {
            compacted = lot.compacted;
            store.put(lot.write);
        };
        take(&mut store, lot);
        while more && store.pending_bytes() < DURABLE_BYTES {
            match lots.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(lot) => take(&mut store, lot),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => more = false,
            }
        }
        let applied = store.pending_applied().expect("something was put");
        wait_for_log(applied, inbox, logged);
        if let Err(error) = store.flush() {
            fatal("make the state durable", &error);
        }
        durable.send_replace(applied);
        inbox.compact(compacted.min(applied));
        vital.rest();
    }
}

fn wait_for_log(applied: u64, inbox: &Inbox, logged: &LoggedCommit) {
    while !logged.wait(applied, Duration::ZERO) {
        inbox.log_commit();
        if !logged.wait(applied, LOG_PATIENCE) {
            log::warn!(applied; "the log is slow to note what is committed");
        }
    }
}
