//! The state on disk: its rows in redb, audit records in append-only segments. The only I/O of the state.
//!
//! The Raft log can replay whatever is missing here, so changes are gathered and made durable together: first the
//! segment is written and fsynced, then one redb transaction names the rows, the index of the last entry in them, the
//! voters, and the segment's length. What a segment holds beyond that length was never named; boot cuts it off, and
//! the replay writes the same bytes again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use izar_common::id::SiteId;
use izar_common::wire::{self, Wire};
use redb::{Database, ReadableDatabase, TableDefinition};
use serde::{Deserialize, Serialize};

use super::State;

mod begin;
mod cut;

pub use begin::{audit_segment, begin};
pub use cut::{Cut, Reader, Segment};

const ROWS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("rows");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const HEAD: &str = "head";

/// Length at which an audit segment is sealed and the next one begun.
const SEGMENT_BYTES: u64 = 64 << 20;
/// redb's own cache; rows are written here and read only at start, the state itself is in memory.
const DATABASE_CACHE_BYTES: usize = 16 << 20;

/// What the rows on disk are the state of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// Index of the last entry that was applied.
    applied: u64,
    /// Raft's numbers of the voters, as of that entry.
    voters: Vec<u64>,
    /// Number of the audit segment that is written, from 1, and how much of it is valid.
    segment: u64,
    segment_bytes: u64,
}
impl Wire for Head {
    const TYPE: u16 = 66;
    const LIMIT: usize = 4 << 10;
}

/// What entries up to `applied` change on disk.
#[derive(Debug, Default)]
pub struct Write {
    pub applied: u64,
    /// Rows by key; `None` is deleted.
    pub rows: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// Frames of audit records.
    pub audit: Vec<u8>,
}

/// The store as it was found.
#[derive(Debug)]
pub struct Opened {
    pub store: Store,
    pub state: State,
    pub voters: Vec<u64>,
}

/// The state's files. One thread has them.
#[derive(Debug)]
pub struct Store {
    database: Arc<Database>,
    audit: PathBuf,
    segment: File,
    head: Head,
    pending: Pending,
}

/// What is not yet durable.
#[derive(Debug, Default)]
struct Pending {
    rows: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    audit: Vec<u8>,
    bytes: usize,
    applied: Option<u64>,
}

impl Store {
    /// Opens or creates the store and loads the whole state. `voters` are those of a new group.
    pub fn open(path: &Path, audit: &Path, site: &SiteId, voters: &[u64]) -> anyhow::Result<Opened> {
        let open = || -> anyhow::Result<(Database, Head, State)> {
            let database = Database::builder().set_cache_size(DATABASE_CACHE_BYTES).create(path)?;
            let head = match read_head(&database)? {
                Some(head) => head,
                None => create(&database, site, voters)?,
            };
            let state = read_state(&database, site, &head)?;
            Ok((database, head, state))
        };
        let (database, head, state) = open().with_context(|| format!("open the state {}", path.display()))?;
        let segment =
            open_segments(audit, &head).with_context(|| format!("open the audit segments in {}", audit.display()))?;
        let voters = head.voters.clone();
        let database = Arc::new(database);
        let store = Self { database, audit: audit.to_owned(), segment, head, pending: Pending::default() };
        Ok(Opened { store, state, voters })
    }

    /// A handle for those who read what is durable, beside this one.
    pub fn reader(&self) -> Reader {
        Reader::new(self.database.clone(), self.audit.clone())
    }

    /// Takes changes; they are durable after the next `flush`.
    pub fn put(&mut self, write: Write) {
        let pending = &mut self.pending;
        pending.applied = Some(write.applied);
        pending.bytes += write.audit.len();
        pending.audit.extend_from_slice(&write.audit);
        for (key, value) in write.rows {
            pending.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            pending.rows.insert(key, value);
        }
    }

    /// Bytes that `flush` would write, about.
    pub fn pending_bytes(&self) -> usize {
        self.pending.bytes
    }

    /// Index that the state on disk will have after `flush`, if it has less now.
    pub fn pending_applied(&self) -> Option<u64> {
        self.pending.applied
    }

    /// Makes everything durable that was put.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        let Pending { rows, audit, applied, .. } = std::mem::take(&mut self.pending);
        let Some(applied) = applied else { return Ok(()) };
        self.append(&audit).context("write the audit segment")?;
        self.head.applied = applied;
        let commit = || -> anyhow::Result<()> {
            let mut transaction = self.database.begin_write()?;
            // A killed process must be back fast however large the state is.
            transaction.set_quick_repair(true);
            {
                let mut table = transaction.open_table(ROWS)?;
                for (key, value) in &rows {
                    match value {
                        Some(value) => drop(table.insert(&**key, &**value)?),
                        None => drop(table.remove(&**key)?),
                    }
                }
                transaction.open_table(META)?.insert(HEAD, &*wire::to_bytes(&self.head))?;
            }
            Ok(transaction.commit()?)
        };
        commit().context("write the state")
    }

    fn append(&mut self, audit: &[u8]) -> std::io::Result<()> {
        if audit.is_empty() {
            return Ok(());
        }
        if self.head.segment_bytes > 0 && self.head.segment_bytes + audit.len() as u64 > SEGMENT_BYTES {
            self.head.segment += 1;
            self.head.segment_bytes = 0;
            self.segment = create_segment(&self.audit, self.head.segment)?;
        }
        self.segment.write_all(audit)?;
        self.segment.sync_data()?;
        self.head.segment_bytes += audit.len() as u64;
        Ok(())
    }
}

fn read_head(database: &Database) -> anyhow::Result<Option<Head>> {
    let table = match database.begin_read()?.open_table(META) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let bytes = table.get(HEAD)?.context("the state does not say how far it is")?;
    Ok(Some(wire::decode::<Head>(bytes.value())?.0))
}

/// Writes a whole state into an empty database.
fn fill(database: &Database, state: &State, head: &Head) -> anyhow::Result<()> {
    let transaction = database.begin_write()?;
    {
        let mut rows = transaction.open_table(ROWS)?;
        for row in state.all_rows() {
            let value = state.row(&row).expect("the row was just named");
            rows.insert(&*row.key(), &*value)?;
        }
        transaction.open_table(META)?.insert(HEAD, &*wire::to_bytes(head))?;
    }
    Ok(transaction.commit()?)
}

/// Writes a new state.
fn create(database: &Database, site: &SiteId, voters: &[u64]) -> anyhow::Result<Head> {
    let head = Head { applied: 0, voters: voters.to_vec(), segment: 1, segment_bytes: 0 };
    let state = State::new(site.clone());
    fill(database, &state, &head)?;
    Ok(head)
}

fn read_state(database: &Database, site: &SiteId, head: &Head) -> anyhow::Result<State> {
    let table = database.begin_read()?.open_table(ROWS)?;
    let rows = table.range::<&[u8]>(..)?.map(|row| row.map(|(_, value)| value.value().to_vec()));
    let rows = rows.collect::<Result<Vec<_>, _>>()?;
    Ok(State::from_rows(site.clone(), head.applied, rows)?)
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:012}.audit"))
}

fn create_segment(dir: &Path, number: u64) -> std::io::Result<File> {
    let file = OpenOptions::new().create_new(true).append(true).open(segment_path(dir, number))?;
    File::open(dir)?.sync_all()?;
    Ok(file)
}

/// Brings the segments to what `head` names: later ones are removed, the current one is cut.
fn open_segments(dir: &Path, head: &Head) -> anyhow::Result<File> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
        if number.is_some_and(|number| number > head.segment) {
            fs::remove_file(&path)?;
        }
    }
    let path = segment_path(dir, head.segment);
    let mut segment = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(segment) => segment,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && head.segment_bytes == 0 => {
            return Ok(create_segment(dir, head.segment)?);
        }
        Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
    };
    let length = segment.metadata()?.len();
    if length < head.segment_bytes {
        bail!(
            "{} has {length} bytes, but {} were made durable: the disk lost some",
            path.display(),
            head.segment_bytes
        );
    }
    if length > head.segment_bytes {
        segment.set_len(head.segment_bytes)?;
        segment.sync_all()?;
    }
    let end = segment.seek(SeekFrom::End(0))?;
    ensure!(end == head.segment_bytes, "{} changed while it was opened", path.display());
    Ok(segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::audit;
    use crate::state::tests::{opened, two_turns};

    struct Place(tempfile::TempDir);

    impl Place {
        fn open(&self) -> anyhow::Result<Opened> {
            let site = "east".parse().unwrap();
            Store::open(&self.0.path().join("state.redb"), &self.audit(), &site, &[1, 2, 3])
        }
        fn audit(&self) -> PathBuf {
            self.0.path().join("audit")
        }
        fn segment(&self) -> Vec<u8> {
            fs::read(segment_path(&self.audit(), 1)).unwrap()
        }
    }

    fn place() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    #[test]
    fn a_new_store_holds_the_state_that_every_site_begins_with() {
        let place = place();
        let first = place.open().unwrap();
        assert_eq!(first.voters, [1, 2, 3]);
        assert_eq!(first.state.digest(), State::new("east".parse().unwrap()).digest());
        drop(first);
        let other = Store::open(&place.0.path().join("state.redb"), &place.audit(), &"west".parse().unwrap(), &[1]);
        assert!(other.is_err(), "rows of another site are refused");
    }

    #[test]
    fn what_was_flushed_is_there_after_a_crash_and_the_rest_is_replayed() {
        let place = place();
        let Opened { mut store, mut state, .. } = place.open().unwrap();
        for write in two_turns(&mut state) {
            store.put(write);
        }
        store.flush().unwrap();
        let durable = state.digest();
        // These changes reach the segment, but no transaction names them.
        let later = opened(&mut state, 99);
        let audit = later.audit.clone();
        store.put(later);
        store.append(&audit).unwrap();
        let full = place.segment();
        drop(store);

        let Opened { mut store, state: reopened, .. } = place.open().unwrap();
        assert_eq!(reopened.digest(), durable);
        assert_eq!(place.segment().len(), full.len() - audit.len(), "boot cuts off what no transaction names");
        let mut reopened = reopened;
        store.put(opened(&mut reopened, 99));
        store.flush().unwrap();
        assert_eq!(place.segment(), full, "the replay writes the same bytes");
        drop(store);
        let again = place.open().unwrap();
        assert_eq!(again.state.digest(), state.digest());
        let records = audit::decode(&place.segment()).unwrap();
        assert_eq!(records.iter().map(|r| r.seq).collect::<Vec<_>>(), (1..=records.len() as u64).collect::<Vec<_>>());
    }

    #[test]
    fn a_segment_that_lost_bytes_is_refused() {
        let place = place();
        let Opened { mut store, mut state, .. } = place.open().unwrap();
        for write in two_turns(&mut state) {
            store.put(write);
        }
        store.flush().unwrap();
        drop(store);
        let path = segment_path(&place.audit(), 1);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(format!("{:#}", place.open().unwrap_err()).contains("the disk lost some"));
        fs::remove_file(&path).unwrap();
        assert!(place.open().is_err());
    }

    #[test]
    fn a_full_segment_is_sealed_and_a_later_one_that_no_transaction_names_is_removed() {
        let place = place();
        let Opened { mut store, .. } = place.open().unwrap();
        store.put(Write { applied: 1, audit: vec![0; SEGMENT_BYTES as usize - 1], ..Write::default() });
        store.flush().unwrap();
        store.put(Write { applied: 2, audit: vec![1; 2], ..Write::default() });
        store.flush().unwrap();
        assert_eq!(fs::read(segment_path(&place.audit(), 2)).unwrap(), [1, 1]);
        fs::write(segment_path(&place.audit(), 3), b"crashed").unwrap();
        drop(store);
        place.open().unwrap();
        assert!(!segment_path(&place.audit(), 3).exists());
        assert!(segment_path(&place.audit(), 1).exists());
    }
}
