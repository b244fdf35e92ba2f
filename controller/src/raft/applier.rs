//! The thread that applies committed entries: the only writer of the state.
//!
//! The state is in memory and the log on a quorum of disks, so those who wait are answered as soon as an entry is
//! applied; `keeper` makes the changes durable behind it, with the index they belong to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use anyhow::{Context, ensure};
use izar_common::clock::Clock;
use izar_common::vitals::Vital;
use izar_common::wire;
use raft::eraftpb::{Entry, EntryType};
use tokio::sync::watch;

use super::fatal;
use super::inbox::Inbox;
use super::keeper::Lot;
use super::proposer::Unsettled;
use crate::state::audit::Record;
use crate::state::command::{Batch, Origin};
use crate::state::rows::Row;
use crate::state::store::Write;
use crate::state::{Applied, Change, Config, Shared, State, What, audit};

/// Lots of committed entries that may wait for the applier, 4 MiB each at most. When they do, the raft loop waits: a
/// node whose state is that far behind is of no use as a leader.
pub const QUEUE: usize = 64;
/// Entries that are applied under one lock; readers of the state wait that long, a few milliseconds at most.
const LOCKED: usize = 16;

/// What the applier works with.
#[derive(Debug)]
pub struct Applier {
    pub state: Shared,
    pub config: watch::Sender<Arc<Config>>,
    pub applied: watch::Sender<u64>,
    pub unsettled: Arc<Unsettled>,
    pub origin: Origin,
    pub clock: Arc<Clock>,
    pub inbox: Arc<Inbox>,
}

impl Applier {
    /// Applies until the raft loop lets go of the queue.
    pub fn run(&self, committed: &Receiver<Vec<Entry>>, keeper: &SyncSender<Lot>) {
        let vital = Vital::new("raft-apply");
        while let Ok(entries) = committed.recv() {
            vital.work();
            for entries in entries.chunks(LOCKED) {
                let lot = self.apply(entries).unwrap_or_else(|error| fatal("apply an entry", &error));
                let applied = lot.write.applied;
                self.applied.send_replace(applied);
                self.inbox.applied(applied);
                if keeper.send(lot).is_err() {
                    return;
                }
            }
            vital.rest();
        }
    }

    /// Applies entries, at least one, and answers those who wait for them; returns what must become durable.
    fn apply(&self, entries: &[Entry]) -> anyhow::Result<Lot> {
        let batches = entries.iter().map(batch_of).collect::<anyhow::Result<Vec<_>>>()?;
        let mut results = Vec::with_capacity(batches.len());
        let (rows, compacted, config) = self.state.write(|state| {
            let config_before = state.config_index();
            for (entry, batch) in entries.iter().zip(&batches) {
                match batch {
                    Some(batch) => results.push((batch, state.apply(entry.index, batch))),
                    None => state.pass(entry.index),
                }
            }
            let config = (state.config_index() != config_before).then(|| state.config_snapshot());
            (touched(state, &results), state.compacted(), config)
        });
        if let Some(config) = config {
            self.config.send_replace(Arc::new(config));
        }
        let applied = entries.last().expect("at least one").index;
        let mut write = Write { applied, rows, audit: Vec::new() };
        for (batch, result) in results {
            self.clock.see(batch.at);
            self.finish(batch, result, &mut write.audit);
        }
        Ok(Lot { write, compacted })
    }

    fn finish(&self, batch: &Batch, result: Applied, audit: &mut Vec<u8>) {
        if batch.origin == self.origin && !result.ignored {
            self.unsettled.settle(batch.seq, result.replies);
        }
        encode_audit(result.changes, audit);
    }
}

/// Appends the audit records among changes, as frames.
pub fn encode_audit(changes: Vec<Change>, out: &mut Vec<u8>) {
    for change in changes {
        if let What::Audited(what) = change.what {
            audit::encode(&Record { site: change.site, seq: change.seq, at: change.at, what }, out);
        }
    }
}

/// Returns the batch of an entry; a new leader's entry has none.
///
/// An entry that does not decode was made by a newer version, or is damaged: going on would part this node's state
/// from the others'.
pub fn batch_of(entry: &Entry) -> anyhow::Result<Option<Batch>> {
    ensure!(
        entry.entry_type == EntryType::EntryNormal,
        "entry {} changes the membership, which this version cannot",
        entry.index
    );
    if entry.data.is_empty() {
        return Ok(None);
    }
    let (batch, length) =
        wire::decode::<Batch>(&entry.data).with_context(|| format!("entry {} does not decode", entry.index))?;
    ensure!(length == entry.data.len(), "entry {} has bytes too many", entry.index);
    Ok(Some(batch))
}

/// The rows that were touched, as they are now, each once.
fn touched(state: &State, results: &[(&Batch, Applied)]) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    let rows: BTreeSet<&Row> = results.iter().flat_map(|(_, applied)| &applied.touched).collect();
    rows.into_iter().map(|row| (row.key(), state.row(row))).collect()
}
