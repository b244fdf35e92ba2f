//! What is remembered against GPUs: cordons, which outlive their agent until its server is restarted, quarantine, which
//! only an operator ends, and how often a GPU fell off the bus.
//!
//! Part of the replicated state, so it has no clock: times come with the command. An agent is told of its GPUs' holds
//! with every assignment.

use izar_common::health::gpu::{Hold, Remedy, reason};
use izar_common::id::{GpuId, NodeId};
use serde::{Deserialize, Serialize};

use super::command::Refusal;
use super::rows::Row;
use super::{State, Step, What, audit, full};

/// GPUs that something is remembered of: more than any site has, for those that were replaced stay.
pub const GPU_LIMIT: usize = 4_096;

/// A GPU that falls off the bus twice within so long is quarantined.
pub const FALLS_WITHIN_MS: u64 = 7 * 24 * 60 * 60 * 1_000;

/// Falls nearer to each other than this, that two agents tell of, are one: they see the same GPU, each with its own time.
const ONE_FALL_MS: u64 = 60_000;

/// Falls remembered of a GPU: the newest; two are enough to judge.
const FALLS: usize = 4;

/// What is remembered of one GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRecord {
    pub gpu: GpuId,
    /// Whose server it is in.
    pub agent: NodeId,
    pub hold: Option<Hold>,
    /// Index of the entry that made it so: an agent that works on an older assignment does not know of it.
    pub index: u64,
    /// When it fell off the bus, as its agent said, oldest first.
    pub falls_ms: Vec<u64>,
    /// When it was ordered last to be mended, oldest first.
    pub ordered_ms: Vec<u64>,
}

impl State {
    /// Remembers a hold, and perhaps a fall. A cordon never weakens quarantine.
    pub(super) fn hold_gpu(
        &mut self,
        step: &mut Step,
        agent: &NodeId,
        hold: &Hold,
        fell_ms: Option<u64>,
    ) -> Result<(), Refusal> {
        let id = &hold.gpu;
        if !self.gpus.contains_key(id) {
            full(self.gpus.len(), GPU_LIMIT, "GPUs that something is remembered of")?;
        }
        let before = self.gpus.get(id);
        let mut record = before.cloned().unwrap_or_else(|| GpuRecord {
            gpu: id.clone(),
            agent: agent.clone(),
            hold: None,
            index: 0,
            falls_ms: Vec::new(),
            ordered_ms: Vec::new(),
        });
        let another = record.agent != *agent;
        record.agent = agent.clone();
        let mut hold = Hold { reason: reason(hold.reason.clone()), ..hold.clone() };
        // An agent that starts while a GPU is off the bus finds it so, and may say when before it hears of the hold.
        let same = |held: &Hold| held.boot == hold.boot && held.remedy == Remedy::Restart;
        let fell_ms = fell_ms.filter(|_| another || !record.hold.as_ref().is_some_and(same));
        if let Some(fell_ms) = fell_ms.filter(|fell_ms| !record.falls_ms.contains(fell_ms)) {
            let apart_ms = if another { ONE_FALL_MS } else { 0 };
            let again = |other: &u64| (apart_ms..FALLS_WITHIN_MS).contains(&fell_ms.abs_diff(*other));
            if record.falls_ms.iter().any(again) {
                hold.quarantined = true;
                hold.reason = reason(format!("it fell off the bus twice within 7 days; {}", hold.reason));
            }
            record.falls_ms.push(fell_ms);
            record.falls_ms.sort_unstable();
            let old = record.falls_ms.len().saturating_sub(FALLS);
            record.falls_ms.drain(..old);
        }
        match &record.hold {
            Some(held) if held.quarantined => {}
            _ => record.hold = Some(hold),
        }
        if before != Some(&record) {
            // What an agent is told has changed only if the hold has.
            if before.is_none_or(|before| (&before.hold, &before.agent) != (&record.hold, &record.agent)) {
                record.index = step.index;
            }
            let (gpu, agent) = (record.gpu.clone(), record.agent.clone());
            if let Some(hold) = &record.hold {
                let (quarantined, reason) = (hold.quarantined, hold.reason.clone());
                self.audit(step, audit::Event::GpuHeld { gpu, agent, quarantined, reason });
            }
            self.set_gpu(step, record);
        }
        Ok(())
    }

    /// Lifts a hold. Without an operator's word only a cordon can be lifted.
    pub(super) fn release_gpu(
        &mut self,
        step: &mut Step,
        id: &GpuId,
        why: &str,
        operator: bool,
    ) -> Result<(), Refusal> {
        let record = self.gpus.get(id).filter(|record| record.hold.is_some()).cloned();
        let mut record = record.ok_or_else(|| Refusal::NotHeld(id.clone()))?;
        if !operator && record.hold.as_ref().is_some_and(|hold| hold.quarantined) {
            return Err(Refusal::Quarantined(id.clone()));
        }
        (record.hold, record.index) = (None, step.index);
        let (gpu, agent) = (id.clone(), record.agent.clone());
        self.audit(step, audit::Event::GpuReleased { gpu, agent, reason: reason(why.to_owned()), operator });
        self.set_gpu(step, record);
        Ok(())
    }

    pub(super) fn set_gpu(&mut self, step: &mut Step, record: GpuRecord) {
        step.touch(Row::Gpu(record.gpu.clone()));
        self.config(step, What::GpuNoted(record.clone()));
        self.gpus.insert(record.gpu.clone(), record);
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::{Batch, Command, Origin, Reply};
    use super::*;
    use izar_common::clock::Hlc;

    const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

    struct Site(State, u64);

    impl Site {
        fn new() -> Self {
            Self(State::new("east".parse().unwrap()), 0)
        }
        fn order(&mut self, command: Command) -> Reply {
            self.1 += 1;
            let origin = Origin { node: "c1".parse().unwrap(), incarnation: 1 };
            let batch = Batch { origin, seq: self.1, floor: 0, at: Hlc::from_ms(1), commands: vec![command] };
            self.0.apply(self.1, &batch).replies.remove(0)
        }
        fn hold(&mut self, quarantined: bool, fell_ms: Option<u64>) {
            self.hold_by("a1", quarantined, fell_ms);
        }
        fn hold_by(&mut self, agent: &str, quarantined: bool, fell_ms: Option<u64>) {
            self.hold_since("b", agent, quarantined, fell_ms);
        }
        fn hold_since(&mut self, boot: &str, agent: &str, quarantined: bool, fell_ms: Option<u64>) {
            let (reason, boot, remedy) = ("Xid 79".into(), boot.into(), Remedy::Restart);
            let hold = Hold { gpu: gpu(), quarantined, reason, remedy, standing: false, boot };
            assert_eq!(self.order(Command::HoldGpu { agent: agent.parse().unwrap(), hold, fell_ms }), Reply::Done);
        }
        fn release(&mut self, operator: bool) -> Reply {
            self.order(Command::ReleaseGpu { gpu: gpu(), reason: "replaced".into(), operator })
        }
        fn quarantined(&self) -> Option<bool> {
            self.0.gpus.get("gpu-7").and_then(|record| Some(record.hold.as_ref()?.quarantined))
        }
    }

    fn gpu() -> GpuId {
        "gpu-7".parse().unwrap()
    }

    #[test]
    fn a_second_fall_within_seven_days_is_quarantine() {
        for (days, expected) in [(6, true), (8, false)] {
            let mut site = Site::new();
            site.hold(false, Some(30 * DAY_MS));
            site.hold(false, Some(30 * DAY_MS));
            assert_eq!(site.quarantined(), Some(false), "the same fall is told again");
            assert_eq!(site.release(false), Reply::Done);
            site.hold(false, Some((30 + days) * DAY_MS));
            assert_eq!(site.quarantined(), Some(expected), "{days} days");
        }
    }

    #[test]
    fn a_fall_that_two_agents_tell_of_is_one() {
        let mut site = Site::new();
        site.hold_by("a1", false, Some(DAY_MS));
        site.hold_by("a2", false, Some(DAY_MS + ONE_FALL_MS - 1));
        site.hold_by("a2", false, Some(DAY_MS + ONE_FALL_MS - 1));
        site.hold_by("a1", false, Some(DAY_MS));
        assert_eq!(site.quarantined(), Some(false));
        site.hold_since("another boot", "a1", false, Some(DAY_MS + 2 * ONE_FALL_MS));
        assert_eq!(site.quarantined(), Some(true), "the second");
    }

    #[test]
    fn an_agent_that_starts_while_a_gpu_is_off_the_bus_tells_of_no_second_fall() {
        let mut site = Site::new();
        site.hold(false, Some(DAY_MS));
        site.hold(false, Some(DAY_MS + 3_600_000));
        assert_eq!(site.quarantined(), Some(false), "it has not been back since");
        assert_eq!(site.release(false), Reply::Done);
        site.hold(false, Some(DAY_MS + 7_200_000));
        assert_eq!(site.quarantined(), Some(true), "now it had");
    }

    #[test]
    fn only_an_operator_ends_quarantine_and_a_cordon_does_not_weaken_it() {
        let mut site = Site::new();
        assert_eq!(site.release(true), Reply::Refused(Refusal::NotHeld(gpu())));
        site.hold(true, None);
        site.hold(false, None);
        assert_eq!(site.quarantined(), Some(true));
        assert_eq!(site.release(false), Reply::Refused(Refusal::Quarantined(gpu())));
        assert_eq!(site.release(true), Reply::Done);
        assert_eq!(site.quarantined(), None);
        site.hold(false, None);
        assert_eq!(site.release(false), Reply::Done);
    }

    #[test]
    fn what_changes_nothing_is_no_change() {
        let mut site = Site::new();
        site.hold(false, Some(5));
        let before = site.0.gpus[&gpu()].clone();
        site.hold(false, Some(5));
        assert_eq!(site.0.gpus[&gpu()], before);
        assert_eq!(before.index, 1);
    }

    #[test]
    fn what_is_remembered_outlives_a_restart() {
        let mut site = Site::new();
        site.hold(true, Some(5));
        let rows: Vec<Vec<u8>> = site.0.all_rows().iter().map(|row| site.0.row(row).unwrap()).collect();
        let read = State::from_rows("east".parse().unwrap(), site.0.applied(), rows).unwrap();
        assert_eq!((read.digest(), read.gpus.len()), (site.0.digest(), 1));
    }
}
