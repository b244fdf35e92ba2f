//! The newest backup that was kept, as every member remembers it: how far back would one have to go?
//!
//! One controller makes a backup and a tool beside it keeps it; neither would know of it after a restart, nor would the
//! others. Part of the replicated state, so it has no clock: times come with the command. A restored state has the one
//! before the backup that it came from.

use izar_common::id::NodeId;
use serde::{Deserialize, Serialize};

use super::rows::Row;
use super::{State, Step, audit};

/// Longest place that is remembered: a path has at most so many bytes.
pub const PLACE_BYTES: usize = 4 << 10;

/// A backup that was kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBackup {
    /// The controller that made it.
    pub node: NodeId,
    pub taken_ms: u64,
    /// Index of the last entry that is in it.
    pub applied: u64,
    /// Where it is, as its keeper said.
    pub kept_as: String,
}

impl State {
    /// Remembers a backup; of two the one that has more in it, which may be noted earlier. Not by the time: a clock that
    /// ran ahead would hide all that are taken until it is as late.
    pub(super) fn note_backup(&mut self, step: &mut Step, backup: &LastBackup) {
        // What is said to come from the future would hide that none is taken any more.
        let backup = LastBackup { taken_ms: backup.taken_ms.min(step.at.ms()), ..backup.clone() };
        self.audit(step, audit::Event::BackupKept { backup: backup.clone() });
        if self.last_backup.as_ref().is_none_or(|known| known.applied <= backup.applied) {
            self.last_backup = Some(backup);
            step.touch(Row::LastBackup);
        }
    }

    pub fn last_backup(&self) -> Option<&LastBackup> {
        self.last_backup.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::Command;
    use crate::state::tests::{apply, state};

    #[test]
    fn the_newest_backup_is_remembered_and_none_from_the_future() {
        let mut state = state();
        let mut noted = |taken_ms, applied| {
            let node = "c1".parse().unwrap();
            let backup = LastBackup { node, taken_ms, applied, kept_as: "/srv/x".into() };
            let at_ms = apply(&mut state, vec![Command::NoteBackup(backup)]).changes[0].at.ms();
            (state.last_backup().unwrap().taken_ms, at_ms)
        };
        assert_eq!(noted(0, 1).0, 0);
        let (taken, now) = noted(u64::MAX, 3);
        assert_eq!(taken, now);
        assert_eq!(noted(0, 2).0, taken, "one that was taken earlier and noted later");
        assert_eq!(noted(5, 4).0, 5, "the clock that ran ahead is mended");
    }
}
