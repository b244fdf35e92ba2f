//! A new life of the cluster: what becomes of a state that goes on without the log it came from.
//!
//! It follows from the state alone, so that every member that is restored from one file begins with the same rows. The
//! new incarnation lets agents follow the new life; what controllers of the old one still propose is refused; turns
//! that were open are closed, for nobody is computing them, and so are orders for GPUs. Nothing else changes: what was erased is not there to come
//! back. Pure.

use izar_common::clock::Hlc;
use izar_common::health::gpu;

use super::audit::{Event, Record};
use super::turns::Outcome;
use super::{Applied, State, Step, What};

/// Starts of a controller within one life: far more than there can be.
const STARTS: u64 = 1 << 20;
/// Entries of one life: 10,000 a second for three years. A life begins above every index of those before: a member left
/// over from one answers for what it once committed, up to that index, whatever the entry is (`raft/rebuild`). So the
/// number of the life counts, not the backup alone: one backup can begin several.
const ENTRIES: u64 = 1 << 40;
/// The highest number of a life, so that indices, starts and terms stay far from their ends.
pub const LAST_LIFE: u64 = 1 << 23;

/// What the new life begins with, beside the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebirth {
    /// The index that the state now has; it is in no log.
    pub applied: u64,
    /// Every controller's starts are counted on from here, so that none has a number that an old life had.
    pub starts: u64,
    /// Turns that were closed as abandoned.
    pub abandoned: usize,
    /// Records for the audit trail, in order.
    pub audit: Vec<Record>,
}

impl State {
    /// Begins the life of number `incarnation`, which must be higher than the state's own, and `LAST_LIFE` at most.
    pub fn begin_life(&mut self, incarnation: u64) -> Rebirth {
        assert!(incarnation > self.head.incarnation, "a new life has a new number");
        assert!(incarnation <= LAST_LIFE, "the number of a life has a limit");
        let before = self.applied;
        self.applied = (incarnation - 1).max(before / ENTRIES + 1) * ENTRIES;
        let mut step = Step { at: Hlc(self.head.latest.0 + 1), index: self.applied, applied: Applied::default() };
        let open = self.turns.open_turns();
        for turn in &open {
            self.close_turn(&mut step, *turn, Outcome::Abandoned).expect("the turn is open");
        }
        // Whoever was at it knows nothing of this life.
        for id in self.remedies.keys().copied().collect::<Vec<_>>() {
            self.end_remedy(&mut step, id, gpu::Outcome::Unknown, "a new life of the cluster began")
                .expect("it is open");
        }
        self.audit(&mut step, Event::ClusterRebuilt { incarnation, applied: before });
        let starts = (incarnation - 1).max(self.origins.newest() / STARTS + 1) * STARTS;
        self.origins.outlive(starts);
        self.head.incarnation = incarnation;
        self.head.latest = step.at;
        self.head.config_index = step.index;
        self.head.compacted = step.index;
        let audit = step.applied.changes.into_iter().filter_map(|change| match change.what {
            What::Audited(what) => Some(Record { site: change.site, seq: change.seq, at: change.at, what }),
            _ => None,
        });
        Rebirth { applied: self.applied, starts, abandoned: open.len(), audit: audit.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{Batch, Command, Origin, Reply};
    use crate::state::remedies::Target;
    use crate::state::tests::{opened, two_turns};
    use izar_common::id::{GpuId, NodeId, TurnId};

    /// A state with closed turns and an open one.
    fn lived() -> State {
        let mut state = State::new("east".parse().unwrap());
        two_turns(&mut state);
        opened(&mut state, 99);
        state
    }

    #[test]
    fn every_member_begins_a_new_life_alike() {
        let (mut one, mut other) = (lived(), lived());
        let (incarnation, applied, audit) = (one.incarnation(), one.applied(), one.audit_seq());
        let rebirth = one.begin_life(incarnation + 1);
        assert_eq!(other.begin_life(incarnation + 1), rebirth);
        assert_eq!(one.digest(), other.digest());
        assert_eq!((one.incarnation(), one.applied()), (incarnation + 1, ENTRIES));
        assert_eq!(one.config_snapshot().incarnation, incarnation + 1);
        assert_eq!((rebirth.applied, one.compacted()), (ENTRIES, ENTRIES));
        assert_eq!(one.begin_life(incarnation + 2).applied, 2 * ENTRIES);
        let mut one = lived();
        one.begin_life(incarnation + 1);
        let seqs: Vec<u64> = rebirth.audit.iter().map(|record| record.seq).collect();
        assert_eq!(seqs, (audit + 1..=one.audit_seq()).collect::<Vec<_>>(), "the trail has no gap");
        let last = &rebirth.audit.last().unwrap().what;
        assert_eq!(*last, Event::ClusterRebuilt { incarnation: incarnation + 1, applied });
    }

    #[test]
    fn lives_that_begin_from_one_state_share_no_index_and_no_start() {
        let lives = [2, 3, LAST_LIFE].map(|incarnation| lived().begin_life(incarnation));
        for (one, next) in lives.iter().zip(&lives[1..]) {
            assert!(one.applied + ENTRIES <= next.applied && one.starts + STARTS <= next.starts, "{one:?} {next:?}");
        }
        assert_eq!((lives[0].applied, lives[0].starts), (ENTRIES, STARTS), "as the first version had it");
    }

    #[test]
    fn open_turns_are_closed_as_abandoned_and_closed_ones_stay() {
        let mut state = lived();
        let (open, all) = (state.open_turns(), state.turns().count());
        assert!(open > 0 && all > open);
        let rebirth = state.begin_life(2);
        assert_eq!((rebirth.abandoned, state.open_turns(), state.turns().count()), (open, 0, all));
        let (_, outcome) = state.turn(&TurnId(99)).unwrap().closed.clone().unwrap();
        assert_eq!(outcome, Outcome::Abandoned);
    }

    #[test]
    fn orders_for_gpus_end_with_their_life_and_holds_stay() {
        let mut state = lived();
        let (agent, id): (NodeId, GpuId) = ("a1".parse().unwrap(), "gpu-1".parse().unwrap());
        let origin = Origin { node: "c1".parse().unwrap(), incarnation: state.origins.newest() + 1 };
        let (reason, boot, remedy) = ("Xid 95".into(), "b".into(), gpu::Remedy::Reset);
        let hold = gpu::Hold { gpu: id.clone(), quarantined: false, reason, remedy, standing: false, boot };
        let gpus = vec![Target { gpu: id.clone(), index: state.applied() + 1 }];
        let orders = [
            Command::HoldGpu { agent: agent.clone(), hold, fell_ms: None },
            Command::OrderRemedy { agent, action: gpu::Action::Reset, gpus },
        ];
        for (seq, command) in orders.into_iter().enumerate() {
            let (origin, seq) = (origin.clone(), seq as u64 + 1);
            let batch = Batch { origin, seq, floor: 1, at: Hlc::default(), commands: vec![command] };
            assert_eq!(state.apply(state.applied() + 1, &batch).replies, [Reply::Done]);
        }
        assert_eq!(state.config_snapshot().remedies.len(), 1);
        state.begin_life(2);
        let config = state.config_snapshot();
        assert!(config.remedies.is_empty() && config.gpus[&id].hold.is_some(), "{config:?}");
    }

    #[test]
    fn what_the_old_life_still_proposes_is_refused_and_the_new_one_is_heard() {
        let mut state = lived();
        let seen = state.origins.newest();
        let rebirth = state.begin_life(2);
        let node = state.origins.iter().next().unwrap().0.clone();
        let mut proposed = |incarnation| {
            let origin = Origin { node: node.clone(), incarnation };
            let batch = Batch { origin, seq: 1, floor: 1, at: Hlc::default(), commands: Vec::new() };
            state.apply(state.applied() + 1, &batch).ignored
        };
        assert!(proposed(seen) && proposed(seen + 1000), "also of starts that the backup did not see");
        assert!(!proposed(rebirth.starts + 1));
    }
}
