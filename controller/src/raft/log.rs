//! The Raft log: entries and hard state in redb, the newest entries in memory too.
//!
//! Two halves share one database. `Disk` writes: entries and hard state of a ready in one transaction, with an fsync.
//! `Log` is what the raft crate reads: it sees an entry as soon as it is appended, before it is on disk; what is on
//! disk is the business of `persisted`.
//!
//! **No snapshots.** The log is dropped only below what *every* voter has on disk (less a reserve), so there is always
//! an entry to continue a voter with. This holds until members can be added; then snapshots must come with it. A voter
//! that lost its disk is given the group's memory and begins its log there (`rejoin`). Should it lead before a member
//! that is further behind has caught up, that one waits until another leads.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use izar_common::wire::peer::RaftEntry;
use izar_common::wire::{self, Wire};
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{fatal, message};

mod life;

pub use life::{begin, read};

const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const HARD_STATE: &str = "hard_state";
const TRUNCATED: &str = "truncated";
const INCARNATION: &str = "incarnation";

/// Bytes of entries that stay in memory once they are on disk, so that followers and the applier rarely read it.
const CACHE_BYTES: usize = 16 << 20;
/// redb's own cache; the log is read from disk only for a follower that lags far.
const DATABASE_CACHE_BYTES: usize = 16 << 20;

/// An entry on disk.
#[derive(Serialize, Deserialize)]
struct StoredEntry(RaftEntry);
impl Wire for StoredEntry {
    const TYPE: u16 = 67;
    const LIMIT: usize = 16 << 20;
}

/// `eraftpb::HardState` on disk.
#[derive(Serialize, Deserialize)]
struct StoredHardState {
    term: u64,
    vote: u64,
    commit: u64,
}
impl Wire for StoredHardState {
    const TYPE: u16 = 68;
    const LIMIT: usize = 64;
}

/// The place of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    pub index: u64,
    pub term: u64,
}
impl Wire for Position {
    const TYPE: u16 = 69;
    const LIMIT: usize = 64;
}

/// How often the node has started on this directory.
#[derive(Serialize, Deserialize)]
struct StoredIncarnation(u64);
impl Wire for StoredIncarnation {
    const TYPE: u16 = 70;
    const LIMIT: usize = 32;
}

/// The log as it was found at start.
#[derive(Debug)]
pub struct Opened {
    pub disk: Disk,
    pub hard_state: HardState,
    /// The entry before the first one that is there.
    pub truncated: Position,
    pub last: Position,
    /// The number of this start.
    pub incarnation: u64,
}

/// The half that writes.
#[derive(Debug)]
pub struct Disk {
    database: Arc<Database>,
    /// Index of the last entry on disk.
    last: u64,
}

impl Disk {
    /// Opens the log, or creates it, and counts the start.
    pub fn open(path: &Path) -> anyhow::Result<Opened> {
        let open = || -> anyhow::Result<Opened> {
            let database = Database::builder().set_cache_size(DATABASE_CACHE_BYTES).create(path)?;
            let transaction = database.begin_write()?;
            let opened = {
                let entries = transaction.open_table(ENTRIES)?;
                let mut meta = transaction.open_table(META)?;
                let hard_state = match meta.get(HARD_STATE)? {
                    Some(bytes) => {
                        let StoredHardState { term, vote, commit } = whole(bytes.value())?;
                        HardState { term, vote, commit, ..HardState::default() }
                    }
                    None => HardState::default(),
                };
                let truncated = meta.get(TRUNCATED)?.map(|b| whole(b.value())).transpose()?.unwrap_or_default();
                let last = match entries.last()? {
                    Some((_, bytes)) => {
                        let StoredEntry(entry) = whole(bytes.value())?;
                        Position { index: entry.index, term: entry.term }
                    }
                    None => truncated,
                };
                let before = meta.get(INCARNATION)?.map(|b| whole(b.value())).transpose()?;
                let incarnation = before.map_or(1, |StoredIncarnation(before)| before + 1);
                meta.insert(INCARNATION, &*wire::to_bytes(&StoredIncarnation(incarnation)))?;
                (hard_state, truncated, last, incarnation)
            };
            transaction.commit()?;
            let (hard_state, truncated, last, incarnation) = opened;
            let disk = Disk { database: Arc::new(database), last: last.index };
            Ok(Opened { disk, hard_state, truncated, last, incarnation })
        };
        open().with_context(|| format!("open the raft log {}", path.display()))
    }

    /// Writes entries (in order; an index that comes again replaces it and all that followed), the hard state and the
    /// new beginning of the log in one transaction. When it returns, all of it is durable.
    pub fn write(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
        truncated: Option<Position>,
    ) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(ENTRIES)?;
            for entry in entries {
                if entry.index <= self.last {
                    table.retain_in(entry.index.., |_, _| false)?;
                }
                table.insert(entry.index, &*wire::to_bytes(&StoredEntry(message::entry_to_wire(entry))))?;
                self.last = entry.index;
            }
            let mut meta = transaction.open_table(META)?;
            if let Some(hs) = hard_state {
                let stored = StoredHardState { term: hs.term, vote: hs.vote, commit: hs.commit };
                meta.insert(HARD_STATE, &*wire::to_bytes(&stored))?;
            }
            if let Some(position) = truncated {
                table.retain_in(..=position.index, |_, _| false)?;
                meta.insert(TRUNCATED, &*wire::to_bytes(&position))?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// Decodes a value that must be one frame and nothing more.
fn whole<M: Wire>(bytes: &[u8]) -> anyhow::Result<M> {
    let (value, length) = wire::decode(bytes)?;
    ensure!(length == bytes.len(), "a value has {} bytes too many", bytes.len() - length);
    Ok(value)
}

/// The half that the raft crate reads. The raft loop alone has it.
#[derive(Debug)]
pub struct Log {
    database: Arc<Database>,
    initial: RaftState,
    truncated: Position,
    /// The newest entries without a gap up to the last one; those before are on disk.
    cache: VecDeque<Entry>,
    cache_bytes: usize,
    last: Position,
}

impl Log {
    /// Makes the readers' half of an opened log. `voters` come from the state's store.
    pub fn new(opened: &Opened, voters: Vec<u64>) -> Self {
        let conf_state = ConfState { voters, ..ConfState::default() };
        let mut log = Self {
            database: opened.disk.database.clone(),
            initial: RaftState::new(opened.hard_state.clone(), conf_state),
            truncated: opened.truncated,
            cache: VecDeque::new(),
            cache_bytes: 0,
            last: opened.last,
        };
        log.warm();
        log
    }

    /// Reads the end of the log into memory.
    fn warm(&mut self) {
        let mut low = self.last.index + 1;
        let mut bytes = 0;
        // Whole steps of entries are read, from the back, until they fill the cache.
        const STEP: u64 = 1024;
        let mut steps = Vec::new();
        while low > self.truncated.index + 1 && bytes < CACHE_BYTES {
            let from = low.saturating_sub(STEP).max(self.truncated.index + 1);
            let entries = self.read_disk(from, low, u64::MAX);
            bytes += entries.iter().map(message::entry_size).sum::<usize>();
            steps.push(entries);
            low = from;
        }
        self.cache = steps.into_iter().rev().flatten().collect();
        self.cache_bytes = bytes;
    }

    fn cache_first(&self) -> u64 {
        self.last.index + 1 - self.cache.len() as u64
    }

    /// Appends entries; an index that comes again replaces it and all that followed.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            first.index > self.truncated.index && first.index <= self.last.index + 1,
            "entry {} does not continue the log {}..={}",
            first.index,
            self.truncated.index + 1,
            self.last.index
        );
        let keep = first.index.saturating_sub(self.cache_first()) as usize;
        for replaced in self.cache.drain(keep.min(self.cache.len())..) {
            self.cache_bytes -= message::entry_size(&replaced);
        }
        for entry in entries {
            self.cache_bytes += message::entry_size(entry);
            self.last = Position { index: entry.index, term: entry.term };
            self.cache.push_back(entry.clone());
        }
    }

    /// Lets go of what need not be in memory: `persisted` and all before it are on disk.
    pub fn evict(&mut self, persisted: u64) {
        while self.cache_bytes > CACHE_BYTES && self.cache.front().is_some_and(|e| e.index <= persisted) {
            let entry = self.cache.pop_front().expect("there is a front");
            self.cache_bytes -= message::entry_size(&entry);
        }
    }

    /// Forgets entries up to `index`; returns the new beginning to be written, if it changes.
    pub fn compact(&mut self, index: u64) -> Option<Position> {
        if index <= self.truncated.index || index > self.last.index {
            return None;
        }
        let term = self.term(index).expect("the index is within the log");
        while self.cache.front().is_some_and(|entry| entry.index <= index) {
            let entry = self.cache.pop_front().expect("there is a front");
            self.cache_bytes -= message::entry_size(&entry);
        }
        self.truncated = Position { index, term };
        Some(self.truncated)
    }

    /// Index of the first entry that is there.
    pub fn first(&self) -> u64 {
        self.truncated.index + 1
    }

    /// Reads `[low, high)` from disk, at least one entry, up to `max_bytes`. All of it must be there.
    fn read_disk(&self, low: u64, high: u64, max_bytes: u64) -> Vec<Entry> {
        let read = || -> anyhow::Result<Vec<Entry>> {
            let table = self.database.begin_read()?.open_table(ENTRIES)?;
            let mut entries = Vec::new();
            let mut bytes = 0;
            for row in table.range(low..high)? {
                let StoredEntry(entry) = whole(row?.1.value())?;
                let entry = message::entry_from_wire(entry).context("an entry of an unknown kind")?;
                let expected = low + entries.len() as u64;
                ensure!(entry.index == expected, "entry {} stands where {expected} should", entry.index);
                bytes += message::entry_size(&entry) as u64;
                if bytes > max_bytes && !entries.is_empty() {
                    return Ok(entries);
                }
                entries.push(entry);
            }
            ensure!(low + entries.len() as u64 == high, "entries {low}..{high} are not all there");
            Ok(entries)
        };
        read().unwrap_or_else(|error| fatal("read the raft log", &error))
    }
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.initial.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        assert!(high <= self.last.index + 1, "entries up to {high} are asked for, the last is {}", self.last.index);
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        let cache_first = self.cache_first();
        let mut entries = Vec::new();
        if low < cache_first {
            let end = high.min(cache_first);
            entries = self.read_disk(low, end, max_bytes);
            if low + (entries.len() as u64) < end {
                return Ok(entries);
            }
        }
        let mut bytes = entries.iter().map(message::entry_size).sum::<usize>() as u64;
        let from = (low.max(cache_first) - cache_first) as usize;
        let to = (high.max(cache_first) - cache_first) as usize;
        for entry in self.cache.range(from.min(to)..to) {
            bytes += message::entry_size(entry) as u64;
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.truncated.index {
            return Ok(self.truncated.term);
        }
        if index < self.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if index > self.last.index {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        match index.checked_sub(self.cache_first()) {
            Some(place) => Ok(self.cache[place as usize].term),
            None => Ok(self.read_disk(index, index + 1, u64::MAX)[0].term),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last.index)
    }

    fn snapshot(&self, _request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64, bytes: usize) -> Entry {
        let mut entry = Entry::default();
        entry.index = index;
        entry.term = term;
        entry.data = vec![index as u8; bytes].into();
        entry
    }

    fn all(log: &Log) -> Vec<(u64, u64)> {
        let context = GetEntriesContext::empty(false);
        let entries = log.entries(log.first(), log.last.index + 1, None, context).unwrap();
        entries.iter().map(|e| (e.index, e.term)).collect()
    }

    #[test]
    fn what_was_written_is_read_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let mut opened = Disk::open(&path).unwrap();
        assert_eq!((opened.last, opened.incarnation), (Position::default(), 1));
        let hard_state = HardState { term: 2, vote: 3, commit: 1, ..HardState::default() };
        opened.disk.write(&[entry(1, 1, 8), entry(2, 1, 8), entry(3, 1, 8)], Some(&hard_state), None).unwrap();
        // A new leader replaces what was not committed.
        opened.disk.write(&[entry(2, 2, 8)], None, None).unwrap();
        drop(opened);
        let opened = Disk::open(&path).unwrap();
        assert_eq!((opened.last, opened.incarnation), (Position { index: 2, term: 2 }, 2));
        assert_eq!(opened.hard_state, hard_state);
        let log = Log::new(&opened, vec![1, 2, 3]);
        assert_eq!(all(&log), [(1, 1), (2, 2)]);
        assert_eq!(log.initial_state().unwrap().conf_state.voters, [1, 2, 3]);
    }

    #[test]
    fn compaction_keeps_the_term_before_the_first_entry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let mut opened = Disk::open(&path).unwrap();
        let entries = [entry(1, 1, 8), entry(2, 1, 8), entry(3, 2, 8), entry(4, 2, 8)];
        let mut log = Log::new(&opened, vec![1]);
        log.append(&entries);
        let position = log.compact(3).unwrap();
        assert_eq!(position, Position { index: 3, term: 2 });
        assert_eq!((log.compact(3), log.compact(9)), (None, None));
        opened.disk.write(&entries, None, Some(position)).unwrap();
        drop((log, opened));
        let log = Log::new(&Disk::open(&path).unwrap(), vec![1]);
        assert_eq!(all(&log), [(4, 2)]);
        assert_eq!(log.term(3).unwrap(), 2);
        assert_eq!(log.term(2), Err(raft::Error::Store(StorageError::Compacted)));
        assert_eq!(log.term(5), Err(raft::Error::Store(StorageError::Unavailable)));
    }

    #[test]
    fn entries_come_from_disk_and_memory_as_one_sequence() {
        let dir = tempfile::tempdir().unwrap();
        let mut opened = Disk::open(&dir.path().join("raft.redb")).unwrap();
        let mut log = Log::new(&opened, vec![1]);
        let big = CACHE_BYTES / 4;
        let entries: Vec<_> = (1..=8).map(|index| entry(index, 1, big)).collect();
        log.append(&entries);
        log.evict(0);
        assert_eq!(log.cache.len(), 8, "what is not on disk stays in memory");
        opened.disk.write(&entries[..6], None, None).unwrap();
        log.evict(6);
        assert!(log.cache_first() > 4 && log.cache_first() <= 7);
        assert_eq!(all(&log).len(), 8);
        assert_eq!(log.term(1).unwrap(), 1);
        let two = 2 * (big as u64 + 64);
        let from = |low| log.entries(low, 9, two, GetEntriesContext::empty(false)).unwrap().len();
        assert_eq!((1..=8).map(from).collect::<Vec<_>>(), [2, 2, 2, 2, 2, 2, 2, 1]);
        log.append(&[entry(3, 2, 8)]);
        assert_eq!(all(&log), [(1, 1), (2, 1), (3, 2)]);
    }
}
