//! GPUs through the admin socket: how each is, what is remembered against it, and the operator's word that lets one work
//! again.
//!
//! How they are is what their agents last said here; what is remembered is replicated. Field names stay; new ones may come.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State as Extract;
use izar_common::health::Generation;
use izar_common::health::gpu::{Mode, REASON, State, View};
use izar_common::id::{GpuId, NodeId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::error::Error;
use super::{Shared, orders};
use crate::agents::Agents;
use crate::fleet::Fleet;
use crate::state::command::Command;
use crate::state::remedies::Remedy;
use crate::state::{Config, GpuRecord};

/// How long a release waits for an agent to have heard of the hold, and how often it looks: agents report every second.
const TOLD_LIMIT: Duration = Duration::from_secs(3);
const TOLD_LOOK: Duration = Duration::from_millis(50);

/// `GET /v1/gpus`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gpus {
    /// By agent, then by number.
    pub gpus: Vec<Gpu>,
    /// Agents that have GPUs, or should.
    pub agents: Vec<Server>,
    /// What is remembered, of GPUs that are away as well.
    pub remembered: Vec<GpuRecord>,
    /// What agents are ordered to do to them, and have not ended.
    pub remedies: Vec<Remedy>,
}

/// One GPU, as its agent says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gpu {
    pub agent: NodeId,
    #[serde(flatten)]
    pub view: View,
    /// It stays as it is until it is mended, or released.
    pub held: bool,
}

/// A server with GPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Server {
    pub agent: NodeId,
    pub connected: bool,
    pub last_report_ms: u64,
    pub mode: Mode,
    /// Why it gets no work at all; empty if it does.
    pub fault: String,
    pub driver: String,
}

/// `POST /v1/gpus/release`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    agent: NodeId,
    /// Its number on that agent, or its identity.
    gpu: String,
    reason: String,
}

/// What was released, and from what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Released {
    pub agent: NodeId,
    pub gpu: GpuId,
    pub quarantined: bool,
    pub was: String,
}

/// Shows every GPU. Pure.
pub fn show(config: &Config, fleet: &Fleet) -> Gpus {
    let (mut gpus, mut agents) = (Vec::new(), Vec::new());
    for (agent, view) in &fleet.agents {
        let Some(health) = view.report.as_ref().map(|report| &report.health) else { continue };
        if health.gpus.is_empty() && health.fault.is_empty() {
            continue;
        }
        agents.push(Server {
            agent: agent.clone(),
            connected: view.connected,
            last_report_ms: view.last_report_ms,
            mode: health.mode,
            fault: health.fault.clone(),
            driver: health.driver.clone(),
        });
        gpus.extend(health.gpus.iter().map(|gpu| {
            let held = config.gpus.get(&gpu.id).is_some_and(|record| record.hold.is_some());
            Gpu { agent: agent.clone(), view: gpu.clone(), held }
        }));
    }
    let remembered = config.gpus.values().cloned().collect();
    Gpus { gpus, agents, remembered, remedies: config.remedies.values().cloned().collect() }
}

/// How many GPUs are in each state, for who looks at the whole.
pub fn count(gpus: &[Gpu]) -> BTreeMap<State, usize> {
    let mut states = BTreeMap::new();
    for gpu in gpus {
        *states.entry(gpu.view.state).or_default() += 1;
    }
    states
}

/// Finds the GPU that an operator means: a number of an agent's, or an identity or its beginning. Pure.
fn find(config: &Config, fleet: &Fleet, agent: &NodeId, gpu: &str) -> Result<GpuId, Error> {
    let reported = fleet.agents.get(agent).and_then(|view| view.report.as_ref());
    let seen = reported.into_iter().flat_map(|report| report.health.gpus.iter().map(|gpu| (Some(gpu.index), &gpu.id)));
    let remembered = config.gpus.values().filter(|record| record.agent == *agent).map(|record| (None, &record.gpu));
    let wanted = gpu.to_ascii_lowercase();
    let means = |(index, id): &(Option<u32>, &GpuId)| match wanted.parse::<u32>() {
        Ok(number) => *index == Some(number),
        Err(_) => !wanted.is_empty() && id.as_str().starts_with(&wanted),
    };
    let mut found: Vec<&GpuId> = seen.chain(remembered).filter(means).map(|(_, id)| id).collect();
    found.sort_unstable();
    found.dedup();
    match found[..] {
        [id] => Ok(id.clone()),
        [] => Err(Error::NotFound(format!("agent {agent} has no GPU {gpu}; see: izar gpus"))),
        _ => Err(Error::Invalid(format!("gpu: `{gpu}` is the beginning of {} GPUs of agent {agent}", found.len()))),
    }
}

pub async fn list(Extract(control): Shared) -> Json<Gpus> {
    let config = control.parts.raft.config().borrow().clone();
    Json(show(&config, &control.parts.agents.fleet()))
}

pub async fn release(Extract(control): Shared, body: Body) -> Result<Json<Released>, Error> {
    let Release { agent, gpu, reason } = orders::read(body).await?;
    let reason = reason.trim().to_owned();
    if reason.is_empty() || reason.len() > REASON {
        return Err(Error::Invalid(format!("reason: it has {} bytes; 1 to {REASON} are needed", reason.len())));
    }
    let config = control.current().await?;
    let gpu = find(&config, &control.parts.agents.fleet(), &agent, &gpu)?;
    let record = config.gpus.get(&gpu).filter(|record| record.hold.is_some());
    if let Some(record) = record {
        let known = Generation { incarnation: config.incarnation, applied: record.index };
        told(&control.parts.agents, &agent, known).await;
    }
    let hold = record.and_then(|record| record.hold.clone());
    control.order(Command::ReleaseGpu { gpu: gpu.clone(), reason: reason.clone(), operator: true }).await?;
    log::warn!(gpu:%, agent:%, reason; "an operator released a GPU");
    let (quarantined, was) = hold.map_or((false, String::new()), |hold| (hold.quarantined, hold.reason));
    Ok(Json(Released { agent, gpu, quarantined, was }))
}

/// Waits until an agent that is there has heard of a hold: it takes the hold's absence for the release only if it knew of
/// it. One that is away, or does not come round to it, hears of none when it begins anew.
async fn told(agents: &Agents, agent: &NodeId, known: Generation) {
    let limit = Instant::now() + TOLD_LIMIT;
    let unaware = || {
        let fleet = agents.fleet();
        let view = fleet.agents.get(agent).filter(|view| view.connected);
        view.and_then(|view| view.report.as_ref()).is_some_and(|report| report.generation < known)
    };
    while unaware() && Instant::now() < limit {
        tokio::time::sleep(TOLD_LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{empty_report, gpu};

    fn fleet() -> Fleet {
        let mut fleet = Fleet::new(0);
        for (agent, ids) in [("a1", &["gpu-aa1", "gpu-aa2"][..]), ("a2", &[])] {
            let agent: NodeId = agent.parse().unwrap();
            fleet.connect(&agent, 1);
            let mut report = empty_report();
            report.health.gpus = ids.iter().map(|id| gpu(id, State::Cordoned)).collect();
            report.health.gpus.iter_mut().zip(0..).for_each(|(gpu, index)| gpu.index = index);
            fleet.report(&agent, report, 1);
        }
        fleet
    }

    #[test]
    fn a_gpu_is_found_by_number_identity_or_its_beginning() {
        let found = |agent: &str, gpu: &str| find(&Config::default(), &fleet(), &agent.parse().unwrap(), gpu);
        for (word, expected) in [("1", "gpu-aa2"), ("gpu-aa1", "gpu-aa1"), ("GPU-AA2", "gpu-aa2")] {
            assert_eq!(found("a1", word).unwrap().as_str(), expected);
        }
        for (agent, word, expected) in [
            ("a1", "7", "agent a1 has no GPU 7"),
            ("a2", "0", "agent a2 has no GPU 0"),
            ("a1", "gpu-aa", "is the beginning of 2 GPUs"),
            ("a1", "", "has no GPU"),
        ] {
            let error = found(agent, word).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn servers_without_gpus_are_not_shown_and_those_that_should_have_some_are() {
        let mut fleet = fleet();
        let names = |fleet: &Fleet| show(&Config::default(), fleet).agents.len();
        assert_eq!(names(&fleet), 1);
        fleet.agents.get_mut("a2").unwrap().report.as_mut().unwrap().health.fault = "0 GPUs of 2".into();
        assert_eq!(names(&fleet), 2);
        assert_eq!(count(&show(&Config::default(), &fleet).gpus)[&State::Cordoned], 2);
    }
}
