//! What the leader has remembered of GPUs, and lets go of: agents' reports and the configuration -> commands. Pure.
//!
//! An agent judges its GPUs itself and acts at once; what it finds is lost when it stops. So the leader notes every
//! cordon, quarantine and fall, and lifts a cordon when its agent, knowing of it, says that the GPU is back. It never
//! lifts quarantine.

use izar_common::health::gpu::{Hold, Mode, State, View};
use izar_common::health::{Generation, Report};
use izar_common::id::NodeId;

use crate::fleet::Fleet;
use crate::state::Config;
use crate::state::command::Command;
use crate::state::gpus::GpuRecord;

pub mod metrics;

/// Commands at one look at most; what is left is seen at the next.
const NOTES: usize = 256;

/// Returns the commands that make what is remembered right.
pub fn notes(config: &Config, fleet: &Fleet) -> Vec<Command> {
    let mut commands = Vec::new();
    for (agent, view) in fleet.agents.iter().filter(|(_, view)| view.connected) {
        let Some(report) = view.report.as_ref().filter(|report| report.health.mode != Mode::Observe) else { continue };
        for gpu in &report.health.gpus {
            commands.extend(note(config, agent, report, gpu, config.gpus.get(&gpu.id)));
        }
    }
    commands.truncate(NOTES);
    commands
}

fn note(config: &Config, agent: &NodeId, report: &Report, gpu: &View, record: Option<&GpuRecord>) -> Option<Command> {
    let held = record.and_then(|record| record.hold.as_ref());
    let knows = report.generation
        >= Generation { incarnation: config.incarnation, applied: record.map_or(0, |record| record.index) };
    let hold = |quarantined| Hold {
        gpu: gpu.id.clone(),
        quarantined,
        reason: gpu.reason.clone(),
        boot: report.health.boot.clone(),
    };
    let fell_ms = gpu.fell_ms.filter(|fell_ms| !record.is_some_and(|record| record.falls_ms.contains(fell_ms)));
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
        (_, Some(held)) if fell_ms.is_some() && gpu.state.share() == 0 => {
            Some(Command::HoldGpu { agent: agent.clone(), hold: held.clone(), fell_ms })
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
