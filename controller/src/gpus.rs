//! What the leader has remembered of GPUs, and lets go of: agents' reports and the configuration -> commands. Pure.
//!
//! An agent judges its GPUs itself and acts at once; what it finds is lost when it stops. So the leader notes every
//! cordon, quarantine and fall, and lifts a cordon when its agent, knowing of it, says that the GPU is back. It never
//! lifts quarantine. A GPU that two agents of one server see is one agent's as far as this is concerned: the first that
//! told of it, as long as it does.

use izar_common::health::gpu::{Hold, Mode, Remedy, State, View};
use izar_common::health::{Generation, Report};
use izar_common::id::{GpuId, NodeId};

use crate::fleet::Fleet;
use crate::state::Config;
use crate::state::command::Command;
use crate::state::gpus::GpuRecord;

pub mod metrics;
pub mod remedies;

/// Commands at one look at most; what is left is seen at the next.
const NOTES: usize = 256;

/// Returns the commands that make what is remembered right.
pub fn notes(config: &Config, fleet: &Fleet) -> Vec<Command> {
    let mut commands = Vec::new();
    for (agent, view) in fleet.agents.iter().filter(|(_, view)| view.connected) {
        let Some(report) = view.report.as_ref().filter(|report| report.health.mode != Mode::Observe) else { continue };
        for gpu in &report.health.gpus {
            let record = config.gpus.get(&gpu.id);
            if !record.is_some_and(|record| record.agent != *agent && sees(fleet, &record.agent, &gpu.id)) {
                commands.extend(note(config, agent, report, gpu, record));
            }
        }
    }
    commands.truncate(NOTES);
    commands
}

/// Whether an agent is there and speaks for a GPU.
fn sees(fleet: &Fleet, agent: &NodeId, gpu: &GpuId) -> bool {
    let view = fleet.agents.get(agent).filter(|view| view.connected);
    let health = view.and_then(|view| view.report.as_ref()).map(|report| &report.health);
    health.is_some_and(|health| health.mode != Mode::Observe && health.gpus.iter().any(|other| other.id == *gpu))
}

fn note(config: &Config, agent: &NodeId, report: &Report, gpu: &View, record: Option<&GpuRecord>) -> Option<Command> {
    let held = record.and_then(|record| record.hold.as_ref());
    let knows = report.generation
        >= Generation { incarnation: config.incarnation, applied: record.map_or(0, |record| record.index) };
    let hold = |quarantined| Hold {
        gpu: gpu.id.clone(),
        quarantined,
        reason: gpu.reason.clone(),
        remedy: gpu.remedy,
        standing: gpu.standing,
        boot: report.health.boot.clone(),
    };
    // What speaks against a cordoned GPU besides; what is remembered gets worse, never better.
    let besides = |held: &Hold| match gpu.state {
        State::Cordoned if !held.quarantined => {
            let (remedy, standing) = (held.remedy.max(gpu.remedy), held.standing && gpu.standing);
            Hold { remedy, standing, ..held.clone() }
        }
        _ => held.clone(),
    };
    // While it is held for a fall in the same start of its server, another is the same one: it was not back since.
    let fallen = |held: &Hold| held.boot == report.health.boot && held.remedy == Remedy::Restart;
    let known = |fell_ms: &u64| record.is_some_and(|record| record.falls_ms.contains(fell_ms));
    let fell_ms = gpu.fell_ms.filter(|fell_ms| !known(fell_ms) && !held.is_some_and(fallen));
    match (gpu.state, held) {
        // A card that was put into another server takes what is held against it along.
        (_, Some(held)) if record.is_some_and(|record| record.agent != *agent) => {
            Some(Command::HoldGpu { agent: agent.clone(), hold: held.clone(), fell_ms })
        }
        (State::Quarantined, Some(held)) if held.quarantined => None,
        // One that has just been released is quarantined here only until its agent hears of it.
        (State::Quarantined | State::Cordoned, None) if record.is_some() && !knows => None,
        (State::Quarantined, _) => Some(Command::HoldGpu { agent: agent.clone(), hold: hold(true), fell_ms }),
        (State::Cordoned, None) => Some(Command::HoldGpu { agent: agent.clone(), hold: hold(false), fell_ms }),
        (_, Some(held)) if gpu.state.share() == 0 && (fell_ms.is_some() || besides(held) != *held) => {
            Some(Command::HoldGpu { agent: agent.clone(), hold: besides(held), fell_ms })
        }
        (State::Probation | State::Healthy | State::Degraded, Some(held)) if !held.quarantined && knows => {
            Some(Command::ReleaseGpu { gpu: gpu.id.clone(), reason: gpu.reason.clone(), operator: false })
        }
        _ => None,
    }
}

/// Why an agent shall get no worker of a kind that computes on a card, if it shall not.
pub fn stops(report: &Report, cuda: Option<u16>) -> Option<String> {
    if let Some(fault) = report.health.blocked() {
        return Some(fault.to_owned());
    }
    let gpu = report.health.cuda(cuda?)?;
    let stopped = report.health.mode != Mode::Observe && gpu.state.share() == 0;
    stopped.then(|| format!("GPU {} is {}: {}", gpu.index, gpu.state, gpu.reason))
}

/// GPUs of an agent that workers may be given.
pub fn usable(report: &Report) -> u32 {
    let stopped = report.health.gpus.iter().filter(|gpu| gpu.state.share() == 0).count() as u32;
    if report.health.mode == Mode::Observe { report.gpus } else { report.gpus.saturating_sub(stopped) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{config, empty_report, gpu};

    const KNOWN: u64 = 7;

    /// What an agent on an assignment of index `applied` says of a GPU, and what is held against it by which agent.
    fn check(
        state: State,
        applied: u64,
        fell_ms: Option<u64>,
        held: Option<(&str, Option<bool>)>,
        mode: Mode,
    ) -> Option<String> {
        let mut config = config("", "");
        if let Some((agent, quarantined)) = held {
            let hold = quarantined.map(|quarantined| Hold {
                gpu: "gpu-1".parse().unwrap(),
                quarantined,
                reason: "old".into(),
                remedy: Remedy::Reset,
                standing: false,
                boot: "b".into(),
            });
            let (gpu, agent) = ("gpu-1".parse().unwrap(), agent.parse().unwrap());
            let record = GpuRecord { gpu, agent, hold, index: KNOWN, falls_ms: vec![5], ordered_ms: vec![] };
            config.gpus.insert("gpu-1".parse().unwrap(), record);
        }
        let (mut fleet, mut report) = (Fleet::new(0), empty_report());
        report.generation = Generation { incarnation: config.incarnation, applied };
        report.health.mode = mode;
        report.health.gpus = vec![gpu("gpu-1", state)];
        report.health.gpus[0].fell_ms = fell_ms;
        let agent: NodeId = "a1".parse().unwrap();
        fleet.connect(&agent, 1);
        fleet.report(&agent, report, 1);
        let words = |command: &Command| match command {
            Command::HoldGpu { hold, fell_ms, .. } => {
                let what = if hold.quarantined { "quarantine" } else { "cordon" };
                format!("{what} {}{}", hold.reason, if fell_ms.is_some() { " fell" } else { "" })
            }
            Command::ReleaseGpu { operator: false, .. } => "release".to_owned(),
            other => panic!("{other:?}"),
        };
        notes(&config, &fleet).first().map(words)
    }

    fn said(state: State, applied: u64, held: Option<Option<bool>>) -> Option<String> {
        check(state, applied, None, held.map(|held| ("a1", held)), Mode::Advise)
    }

    #[test]
    fn what_an_agent_finds_is_remembered_once() {
        for (state, cordoned) in [(State::Cordoned, "cordon Xid 95"), (State::Quarantined, "quarantine Xid 95")] {
            assert_eq!(said(state, 0, None).as_deref(), Some(cordoned));
        }
        assert_eq!(said(State::Cordoned, KNOWN, Some(Some(false))), None);
        assert_eq!(said(State::Quarantined, KNOWN, Some(Some(true))), None);
        assert_eq!(said(State::Quarantined, KNOWN, Some(Some(false))).as_deref(), Some("quarantine Xid 95"));
        for state in [State::Unknown, State::Healthy, State::Degraded, State::Probation] {
            assert_eq!(said(state, KNOWN, None), None, "{state}");
        }
        assert_eq!(check(State::Cordoned, KNOWN, None, None, Mode::Observe), None);
    }

    #[test]
    fn a_cordon_is_lifted_when_an_agent_that_knows_of_it_is_well_and_quarantine_never() {
        assert_eq!(said(State::Probation, KNOWN, Some(Some(false))).as_deref(), Some("release"));
        assert_eq!(said(State::Healthy, KNOWN - 1, Some(Some(false))), None, "it has just begun and was not told yet");
        assert_eq!(said(State::Unknown, KNOWN, Some(Some(false))), None);
        for state in State::ALL {
            assert_eq!(said(state, KNOWN, Some(Some(true))), None, "{state}");
        }
    }

    #[test]
    fn what_was_just_released_is_not_held_again_before_its_agent_has_heard_of_it() {
        assert_eq!(said(State::Quarantined, KNOWN - 1, Some(None)), None);
        assert_eq!(said(State::Quarantined, KNOWN, Some(None)).as_deref(), Some("quarantine Xid 95"));
    }

    #[test]
    fn a_fall_that_is_not_known_is_remembered() {
        let fell = |at, held| check(State::Cordoned, KNOWN, Some(at), Some(("a1", held)), Mode::Advise);
        assert_eq!(fell(9, Some(false)).as_deref(), Some("cordon old fell"));
        assert_eq!(fell(5, Some(false)), None);
        assert_eq!(fell(5, None).as_deref(), Some("cordon Xid 95"));
    }

    #[test]
    fn a_card_takes_what_is_held_against_it_into_another_server() {
        let moved = check(State::Healthy, 0, None, Some(("a2", Some(true))), Mode::Advise);
        assert_eq!(moved.as_deref(), Some("quarantine old"));
    }

    #[test]
    fn what_a_cordoned_card_needs_is_remembered_and_only_gets_worse() {
        use Remedy::{Reset, Restart};
        let check = |held: (Remedy, bool), seen: (Remedy, bool), state, expected: Option<(Remedy, bool)>| {
            let mut config = config("", "");
            let (id, agent): (GpuId, NodeId) = ("gpu-1".parse().unwrap(), "a1".parse().unwrap());
            let (reason, boot, (remedy, standing)) = ("old".to_owned(), "b".to_owned(), held);
            let hold = Some(Hold { gpu: id.clone(), quarantined: false, reason, remedy, standing, boot });
            let record = GpuRecord {
                gpu: id.clone(),
                agent: agent.clone(),
                hold,
                index: KNOWN,
                falls_ms: vec![],
                ordered_ms: vec![],
            };
            config.gpus.insert(id, record);
            let (mut fleet, mut report) = (Fleet::new(0), empty_report());
            report.health.gpus = vec![gpu("gpu-1", state)];
            (report.health.gpus[0].remedy, report.health.gpus[0].standing) = seen;
            fleet.connect(&agent, 1);
            fleet.report(&agent, report, 1);
            let said = notes(&config, &fleet).first().map(|command| match command {
                Command::HoldGpu { hold, .. } => (hold.remedy, hold.standing),
                other => panic!("{other:?}"),
            });
            assert_eq!(said, expected, "{held:?} {seen:?} {state}");
        };
        check((Reset, false), (Reset, false), State::Cordoned, None);
        check((Reset, true), (Restart, false), State::Cordoned, Some((Restart, false)));
        check((Reset, true), (Reset, false), State::Cordoned, Some((Reset, false)));
        check((Restart, false), (Reset, true), State::Cordoned, None);
        check((Reset, true), (Remedy::None, false), State::Unknown, None);
    }

    #[test]
    fn two_agents_that_see_one_card_do_not_fight_over_it() {
        let said = |first: Option<Mode>, connected: bool| {
            let mut config = config("", "");
            let (id, owner): (GpuId, NodeId) = ("gpu-1".parse().unwrap(), "a1".parse().unwrap());
            let (boot, reason) = ("b".to_owned(), "old".to_owned());
            let (remedy, standing) = (Remedy::Reset, false);
            let hold = Some(Hold { gpu: id.clone(), quarantined: false, reason, remedy, standing, boot });
            let record =
                GpuRecord { gpu: id.clone(), agent: owner, hold, index: KNOWN, falls_ms: vec![5], ordered_ms: vec![] };
            config.gpus.insert(id, record);
            let mut fleet = Fleet::new(0);
            for (name, mode) in [("a1", first), ("a2", Some(Mode::Advise))] {
                let agent: NodeId = name.parse().unwrap();
                let mut report = empty_report();
                report.health.mode = mode.unwrap_or_default();
                report.health.gpus = mode.map(|_| gpu("gpu-1", State::Cordoned)).into_iter().collect();
                fleet.connect(&agent, 1);
                fleet.report(&agent, report, 1);
            }
            if !connected {
                fleet.disconnect(&"a1".parse().unwrap());
            }
            let takes = |command: &Command| match command {
                Command::HoldGpu { agent, .. } => agent.to_string(),
                other => panic!("{other:?}"),
            };
            notes(&config, &fleet).iter().map(takes).collect::<Vec<_>>()
        };
        assert!(said(Some(Mode::Advise), true).is_empty(), "the one that is recorded speaks for it");
        assert_eq!(said(Some(Mode::Advise), false), ["a2"], "it is away");
        assert_eq!(said(None, true), ["a2"], "it does not see it any more");
        assert_eq!(said(Some(Mode::Observe), true), ["a2"], "its word does not count");
    }
}
