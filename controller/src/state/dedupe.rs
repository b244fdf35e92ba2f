//! Which batches of which controller took effect: a batch that comes twice takes effect once.
//!
//! A controller numbers its batches from 1 in each incarnation, sends a batch again until it sees it applied, and says
//! with each batch below which number it will never send again. So a few numbers above that floor are all there is to
//! remember.

use std::collections::{BTreeMap, BTreeSet};

use izar_common::id::NodeId;
use serde::{Deserialize, Serialize};

use super::command::Batch;

/// Batches above the floor that are remembered. An origin has a handful unsettled at once; of one that has more (a
/// mistake of ours), the oldest are given up rather than the memory of every member.
const APPLIED_LIMIT: usize = 4096;

/// Starts of a controller of which nothing was decided; each closes its orphans, so there are hardly any.
const UNSEEN_STARTS: u64 = 1_024;

/// What is known of the newest incarnation of one controller.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Seen {
    pub incarnation: u64,
    pub floor: u64,
    /// Numbers at or above the floor that were applied.
    pub applied: BTreeSet<u64>,
}

/// All controllers that ever proposed.
#[derive(Debug, Default)]
pub(super) struct Origins(BTreeMap<NodeId, Seen>);

impl Origins {
    /// Notes a batch; returns whether it is to take effect.
    pub fn admit(&mut self, batch: &Batch) -> bool {
        let seen = self.0.entry(batch.origin.node.clone()).or_default();
        if batch.origin.incarnation < seen.incarnation {
            return false;
        }
        if batch.origin.incarnation > seen.incarnation {
            *seen = Seen { incarnation: batch.origin.incarnation, ..Seen::default() };
        }
        if batch.floor > seen.floor {
            seen.floor = batch.floor;
            seen.applied = seen.applied.split_off(&batch.floor);
        }
        let admitted = batch.seq >= seen.floor && seen.applied.insert(batch.seq);
        if seen.applied.len() > APPLIED_LIMIT {
            let oldest = seen.applied.pop_first().expect("more than one");
            seen.floor = oldest + 1;
        }
        admitted
    }
    /// The highest incarnation of any controller.
    pub fn newest(&self) -> u64 {
        self.0.values().map(|seen| seen.incarnation).max().unwrap_or(0)
    }
    /// Refuses from now on whatever an incarnation below this one proposed.
    pub fn outlive(&mut self, incarnation: u64) {
        for seen in self.0.values_mut() {
            *seen = Seen { incarnation, ..Seen::default() };
        }
    }
    /// Refuses from now on whatever a controller proposed in any start that it can have had.
    pub fn readmit(&mut self, node: &NodeId) {
        let seen = self.0.entry(node.clone()).or_default();
        *seen = Seen { incarnation: seen.incarnation + UNSEEN_STARTS, ..Seen::default() };
    }
    pub fn get(&self, node: &NodeId) -> Option<&Seen> {
        self.0.get(node)
    }
    pub fn iter(&self) -> impl Iterator<Item = (&NodeId, &Seen)> {
        self.0.iter()
    }
    pub fn restore(&mut self, node: NodeId, seen: Seen) {
        self.0.insert(node, seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::Origin;
    use izar_common::clock::Hlc;

    fn batch(incarnation: u64, seq: u64, floor: u64) -> Batch {
        let origin = Origin { node: "c1".parse().unwrap(), incarnation };
        Batch { origin, seq, floor, at: Hlc::default(), commands: Vec::new() }
    }

    #[test]
    fn a_batch_takes_effect_once_in_any_order() {
        let mut origins = Origins::default();
        let taken =
            [(2, 1), (1, 1), (2, 1), (3, 3), (1, 3), (2, 3), (3, 3)].map(|(s, f)| origins.admit(&batch(1, s, f)));
        assert_eq!(taken, [true, true, false, true, false, false, false]);
        assert_eq!(origins.get(&"c1".parse::<NodeId>().unwrap()).unwrap().applied, BTreeSet::from([3]));
    }

    #[test]
    fn an_old_incarnation_is_ignored_and_a_new_one_begins_afresh() {
        let mut origins = Origins::default();
        assert!(origins.admit(&batch(1, 7, 7)));
        assert!(origins.admit(&batch(2, 1, 1)));
        assert!(!origins.admit(&batch(1, 8, 7)));
    }

    #[test]
    fn a_member_that_is_readmitted_is_heard_and_its_earlier_processes_are_not() {
        let mut origins = Origins::default();
        let node: NodeId = "c1".parse().unwrap();
        for known in [None, Some(7)] {
            if let Some(incarnation) = known {
                assert!(origins.admit(&batch(incarnation + UNSEEN_STARTS, 1, 1)));
            }
            origins.readmit(&node);
            let starts = origins.get(&node).unwrap().incarnation;
            assert!(!origins.admit(&batch(starts - 1, 9, 1)), "a start that nothing was heard of");
            assert!(origins.admit(&batch(starts + 1, 1, 1)));
        }
    }
}
