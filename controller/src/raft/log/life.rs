//! The log at the borders of a cluster's life: read whole from a member that has ended, and begun for one that goes on
//! from a state without the log it came from.

use std::path::Path;

use anyhow::{Context, ensure};
use raft::eraftpb::{Entry, HardState};
use redb::{Database, ReadableDatabase, ReadableTable};

use super::{
    ENTRIES, HARD_STATE, INCARNATION, META, Position, StoredEntry, StoredHardState, StoredIncarnation, TRUNCATED, whole,
};
use crate::raft::message;
use izar_common::wire;

/// What a log holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    pub hard_state: HardState,
    pub truncated: Position,
    /// All entries, without a gap.
    pub entries: Vec<Entry>,
}

impl Kept {
    /// The place of the last entry.
    pub fn last(&self) -> Position {
        self.entries.last().map_or(self.truncated, |entry| Position { index: entry.index, term: entry.term })
    }
}

/// Reads a log whose process has ended. Changes nothing in it.
pub fn read(path: &Path) -> anyhow::Result<Kept> {
    let read = || -> anyhow::Result<Kept> {
        ensure!(path.exists(), "it is not there");
        // It must outlive what is read from it.
        let database = Database::open(path)?;
        let transaction = database.begin_read()?;
        let meta = transaction.open_table(META)?;
        let hard_state = match meta.get(HARD_STATE)? {
            Some(bytes) => {
                let StoredHardState { term, vote, commit } = whole(bytes.value())?;
                HardState { term, vote, commit, ..HardState::default() }
            }
            None => HardState::default(),
        };
        let truncated: Position = meta.get(TRUNCATED)?.map(|b| whole(b.value())).transpose()?.unwrap_or_default();
        let mut entries: Vec<Entry> = Vec::new();
        for row in transaction.open_table(ENTRIES)?.iter()? {
            let StoredEntry(entry) = whole(row?.1.value())?;
            let entry = message::entry_from_wire(entry).context("an entry of an unknown kind")?;
            let expected = truncated.index + 1 + entries.len() as u64;
            ensure!(entry.index == expected, "entry {} stands where {expected} should", entry.index);
            entries.push(entry);
        }
        Ok(Kept { hard_state, truncated, entries })
    };
    read().with_context(|| format!("read the raft log {}", path.display()))
}

/// Writes a new log that holds no entry and goes on after `base`, whose node has started `starts` times, and votes in
/// the term of `base` for nobody but `vote` any more (0: it has not voted).
pub fn begin(path: &Path, base: Position, vote: u64, starts: u64) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        ensure!(!path.exists(), "it exists");
        let database = Database::create(path)?;
        let transaction = database.begin_write()?;
        {
            transaction.open_table(ENTRIES)?;
            let mut meta = transaction.open_table(META)?;
            let hard_state = StoredHardState { term: base.term, vote, commit: base.index };
            meta.insert(HARD_STATE, &*wire::to_bytes(&hard_state))?;
            meta.insert(TRUNCATED, &*wire::to_bytes(&base))?;
            meta.insert(INCARNATION, &*wire::to_bytes(&StoredIncarnation(starts)))?;
        }
        Ok(transaction.commit()?)
    };
    write().with_context(|| format!("write the raft log {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::{Disk, Log};
    use super::*;
    use raft::Storage;

    #[test]
    fn a_log_that_begins_goes_on_after_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let base = Position { index: 7, term: 2 << 32 };
        begin(&path, base, 3, 1 << 20).unwrap();
        assert!(begin(&path, base, 0, 1).is_err(), "never over another");
        let kept = read(&path).unwrap();
        assert_eq!((kept.last(), kept.hard_state.commit, kept.entries.len()), (base, 7, 0));
        assert_eq!((kept.hard_state.term, kept.hard_state.vote), (2 << 32, 3));
        let mut opened = Disk::open(&path).unwrap();
        assert_eq!((opened.last, opened.truncated, opened.incarnation), (base, base, (1 << 20) + 1));
        let log = Log::new(&opened, vec![1]);
        assert_eq!((log.first_index(), log.last_index(), log.term(7)), (Ok(8), Ok(7), Ok(2 << 32)));
        let mut entry = Entry::default();
        (entry.index, entry.term) = (8, 2 << 32);
        opened.disk.write(&[entry.clone()], None, None).unwrap();
        drop((opened, log));
        assert_eq!(read(&path).unwrap().entries, [entry]);
    }

    #[test]
    fn a_log_that_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("it is not there"));
        assert!(!path.exists());
    }
}
