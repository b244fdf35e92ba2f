//! A store that begins with a state from elsewhere: the files of a restored member.
//!
//! The audit segments are already where they belong; the rows and the head that names them are one transaction. Never
//! touches a store that is there.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, ensure};
use redb::Database;

use super::{Head, fill, segment_path};
use crate::state::State;

/// Writes `state` as a new store at `path`, whose audit trail is the segments in `audit` up to number `segment`.
pub fn begin(path: &Path, audit: &Path, state: &State, voters: &[u64], segment: u64) -> anyhow::Result<()> {
    ensure!(!path.exists(), "{} exists", path.display());
    let last = segment_path(audit, segment);
    let write = || -> anyhow::Result<()> {
        let segment_bytes = File::open(&last).with_context(|| format!("open {}", last.display()))?.metadata()?.len();
        let head = Head { applied: state.applied(), voters: voters.to_vec(), segment, segment_bytes };
        fill(&Database::create(path)?, state, &head)
    };
    write().with_context(|| format!("write the state {}", path.display()))
}

/// Where the audit segment of a number lies.
pub fn audit_segment(audit: &Path, number: u64) -> std::path::PathBuf {
    segment_path(audit, number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::store::Store;
    use crate::state::tests::two_turns;

    #[test]
    fn a_store_that_begins_with_a_state_opens_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, audit) = (dir.path().join("state.redb"), dir.path().join("audit"));
        let mut state = State::new("east".parse().unwrap());
        two_turns(&mut state);
        std::fs::create_dir(&audit).unwrap();
        for number in 1..=2 {
            std::fs::write(audit_segment(&audit, number), vec![number as u8; 9]).unwrap();
        }
        begin(&path, &audit, &state, &[1, 2, 3], 2).unwrap();
        assert!(begin(&path, &audit, &state, &[1], 2).is_err(), "never over another");
        let opened = Store::open(&path, &audit, &"east".parse().unwrap(), &[]).unwrap();
        assert_eq!((opened.state.digest(), opened.voters), (state.digest(), vec![1, 2, 3]));
        let cut = opened.store.reader().cut().unwrap();
        assert_eq!(cut.segments.iter().map(|segment| segment.bytes).collect::<Vec<_>>(), [9, 9]);
    }
}
