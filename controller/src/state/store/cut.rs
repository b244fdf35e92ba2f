//! The durable state at one moment, read beside the one that writes it.
//!
//! redb's read transactions are consistent: the rows, the index they are the state of and the valid length of the audit
//! trail are from one commit, whatever is written meanwhile. A segment's bytes up to that length never change.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use izar_common::wire;
use redb::{Database, ReadableDatabase};

use super::{HEAD, Head, META, ROWS, segment_path};

/// A handle to what is durable. Cheap to clone; any thread may have one.
#[derive(Debug, Clone)]
pub struct Reader {
    database: Arc<Database>,
    audit: PathBuf,
}

/// All rows and the audit trail as of one index.
#[derive(Debug)]
pub struct Cut {
    pub applied: u64,
    /// Values of the rows, in the order of their keys.
    pub rows: Vec<Vec<u8>>,
    /// The audit trail in order.
    pub segments: Vec<Segment>,
}

/// The valid part of an audit segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub number: u64,
    pub path: PathBuf,
    pub bytes: u64,
}

impl Reader {
    pub(super) fn new(database: Arc<Database>, audit: PathBuf) -> Self {
        Self { database, audit }
    }

    /// Reads everything that the newest commit holds. Blocks on the disk.
    pub fn cut(&self) -> anyhow::Result<Cut> {
        let read = || -> anyhow::Result<(Head, Vec<Vec<u8>>)> {
            let transaction = self.database.begin_read()?;
            let bytes = transaction.open_table(META)?.get(HEAD)?.context("the state does not say how far it is")?;
            let head = wire::decode::<Head>(bytes.value())?.0;
            let rows = transaction.open_table(ROWS)?;
            let rows = rows.range::<&[u8]>(..)?.map(|row| row.map(|(_, value)| value.value().to_vec()));
            Ok((head, rows.collect::<Result<_, _>>()?))
        };
        let (head, rows) = read().context("read the state")?;
        let mut segments = Vec::new();
        for number in 1..=head.segment {
            let path = segment_path(&self.audit, number);
            let bytes = match number == head.segment {
                true => head.segment_bytes,
                false => path.metadata().with_context(|| format!("look at {}", path.display()))?.len(),
            };
            segments.push(Segment { number, path, bytes });
        }
        Ok(Cut { applied: head.applied, rows, segments })
    }
}

#[cfg(test)]
mod tests {
    use crate::state::State;
    use crate::state::store::{Opened, Store};
    use crate::state::tests::{opened, two_turns};

    #[test]
    fn a_cut_is_of_one_commit_whatever_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let (path, audit) = (dir.path().join("state.redb"), dir.path().join("audit"));
        let Opened { mut store, mut state, .. } = Store::open(&path, &audit, &"east".parse().unwrap(), &[1]).unwrap();
        for write in two_turns(&mut state) {
            store.put(write);
        }
        store.flush().unwrap();
        let (reader, digest) = (store.reader(), state.digest());
        let cut = reader.cut().unwrap();
        store.put(opened(&mut state, 99));
        store.flush().unwrap();
        let read = State::from_rows("east".parse().unwrap(), cut.applied, &cut.rows).unwrap();
        assert_eq!(read.digest(), digest);
        let [segment] = &cut.segments[..] else { panic!("{:?}", cut.segments) };
        assert!(segment.bytes > 0 && segment.bytes < segment.path.metadata().unwrap().len());
        assert_eq!(reader.cut().unwrap().applied, cut.applied + 1);
    }
}
