//! What runs where: desired deployments and the agents at hand -> a plan. Run by the leader alone; the plan is a
//! command, so that assignments derive from replicated state.
//!
//! Pure. Rules: a worker goes to an agent that its deployment's constraints allow and that has room, first to one that
//! has none of this deployment, then to the one with the fewest workers, then by name. What is right stays. What is not
//! (another revision or other options, a draining agent or one whose GPUs are mended, an unsound GPU, a second replica where
//! another agent has none) is replaced before it goes: a new worker first, and only when it is ready the old one retires,
//! which means that it ends what it has begun. So a deployment never has fewer ready workers than it had or wants, unless
//! nobody has room for both. An agent that stays away loses its workers if another can take them. Planning again on the
//! result changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use izar_common::health::WorkerState;
use izar_common::id::{DeploymentId, NodeId, WorkerId};
use izar_common::manifest::Kind;
use izar_common::wire::agent::Device;

use crate::fleet::{AgentView, Fleet};
use crate::gpus;
use crate::state::{Config, Deployment, Placement, Plan, REPLICA_LIMIT, Standing};

/// How long an agent may be away before others get its workers. Longer than a restart of the server's daemon, for
/// moving a model costs its loading time.
pub const LOST_MS: u64 = 60_000;

/// How long a new leader waits before it counts anybody as lost: its own sessions may just be coming up.
pub const NEW_LEADER_MS: u64 = 10_000;

/// Workers on one agent at most. An assignment travels whole and must fit a frame; a server has fewer accelerators.
pub const WORKERS_PER_AGENT: usize = 64;

/// How long a worker stays after it began to retire, idle or not: every controller learns of it meanwhile.
pub const RETIRE_MS: u64 = 1_000;

/// How long it may take over what it has begun. A worker that others can stand in for need not take so long: its jobs
/// go on elsewhere, and a draining agent has a time of its own.
pub const RETIRE_LIMIT_MS: u64 = 900_000;

/// Share of an agent's memory that its workers may have, in percent: the rest is the system's and the agent's own.
const MEMORY_SHARE: u64 = 90;

/// The times that a plan depends on, Unix milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub now_ms: u64,
    /// Since when this controller leads.
    pub leader_since_ms: u64,
}

/// Returns the plan that should replace the current one, or `None` if that one is right.
pub fn plan(config: &Config, fleet: &Fleet, times: Times) -> Option<Plan> {
    let mut draft = Draft { config, fleet, times, workers: config.plan.workers.clone() };
    draft.retire_undeployed();
    draft.remove_retired();
    for deployment in config.deployments.values() {
        draft.leave_lost(deployment);
        draft.retire_surplus(deployment);
        draft.place_missing(deployment);
        draft.spread(deployment);
        draft.renew(deployment);
    }
    let workers = draft.workers;
    if workers == config.plan.workers { None } else { Some(Plan { version: config.plan.version + 1, workers }) }
}

/// Says why a deployment has fewer workers than it wants; `None` if it has as many.
pub fn unmet(config: &Config, fleet: &Fleet, deployment: &Deployment) -> Option<String> {
    let times = Times { now_ms: 0, leader_since_ms: 0 };
    let draft = Draft { config, fleet, times, workers: config.plan.workers.clone() };
    let missing = (deployment.replicas as usize).saturating_sub(draft.right(deployment).len());
    if missing == 0 || draft.best(deployment).is_some() {
        return None;
    }
    let mut reasons: Vec<String> = Vec::new();
    for agent in draft.here() {
        if let Err(misfit) = draft.fits(agent, deployment) {
            reasons.push(format!("{agent}: {misfit}"));
        }
    }
    if reasons.is_empty() {
        reasons.push("no agent is connected".into());
    }
    Some(format!("{missing} without a place: {}", reasons.join("; ")))
}

/// Whether every worker that serves on an agent would find room elsewhere, all of them together, if that agent took none:
/// then it can be emptied, and its deployments never have fewer workers that serve.
pub fn can_be_emptied(config: &Config, fleet: &Fleet, agent: &NodeId) -> bool {
    let mut without = config.clone();
    without.standings.insert(agent.clone(), Standing::Draining { within_ms: 0 });
    let (times, workers) = (Times { now_ms: 0, leader_since_ms: 0 }, config.plan.workers.clone());
    let mut draft = Draft { config: &without, fleet, times, workers };
    let serves =
        |(id, place): &(&WorkerId, &Placement)| place.agent == *agent && place.retiring_ms.is_none() && draft.ready(id);
    let serving: Vec<(WorkerId, DeploymentId)> =
        draft.workers.iter().filter(serves).map(|(id, place)| (id.clone(), place.deployment.clone())).collect();
    serving.into_iter().all(|(id, deployment)| {
        // What nobody wants any more needs no other place.
        let Some(deployment) = without.deployments.get(&deployment) else { return true };
        let Some(place) = draft.best(deployment) else { return false };
        draft.put(id, deployment, place);
        true
    })
}

/// A worker's number within its deployment.
fn number(deployment: &DeploymentId, worker: &WorkerId) -> Option<u32> {
    worker.as_str().strip_prefix(deployment.as_str())?.strip_prefix('.')?.parse().ok()
}

/// The id of a deployment's n-th worker; `None` if the name gets too long for one (such a deployment is refused: see
/// [`can_be_named`]).
fn worker_id(deployment: &DeploymentId, number: u32) -> Option<WorkerId> {
    WorkerId::new(&format!("{deployment}.{number}")).ok()
}

/// Whether every worker that a deployment may ever have gets an id: while they are renewed, it has twice as many.
pub fn can_be_named(deployment: &DeploymentId) -> bool {
    worker_id(deployment, 2 * REPLICA_LIMIT - 1).is_some()
}

/// Why a worker cannot go to an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Misfit {
    Standing(Standing),
    /// Its GPUs are being mended.
    Remedy,
    Label {
        key: String,
        value: String,
    },
    Gpus {
        free: u32,
        needed: u32,
    },
    Memory {
        free: u64,
        needed: u64,
    },
    Occupied,
    Full,
    /// Its GPUs, or the one that it would compute on, are not sound.
    Unsound(String),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        match self {
            Misfit::Standing(Standing::Cordoned) => f.write_str("is cordoned"),
            Misfit::Standing(Standing::Draining { .. }) => f.write_str("is being drained"),
            Misfit::Remedy => f.write_str("has its GPUs mended"),
            Misfit::Label { key, value } => write!(f, "has no label {key}={value}"),
            Misfit::Gpus { free, needed } => write!(f, "has {free} free GPUs of {needed} needed"),
            Misfit::Memory { free, needed } => {
                write!(f, "has {} MiB of free memory of {} MiB needed", mib(*free), mib(*needed))
            }
            Misfit::Unsound(why) => write!(f, "is not sound ({why})"),
            Misfit::Occupied => f.write_str("has one already"),
            Misfit::Full => write!(f, "has {WORKERS_PER_AGENT} workers already"),
        }
    }
}

/// A plan in the making.
struct Draft<'a> {
    config: &'a Config,
    fleet: &'a Fleet,
    times: Times,
    workers: BTreeMap<WorkerId, Placement>,
}

impl<'a> Draft<'a> {
    /// What nobody wants any more ends what it has begun.
    fn retire_undeployed(&mut self) {
        for placement in self.workers.values_mut() {
            if !self.config.deployments.contains_key(&placement.deployment) {
                placement.retiring_ms.get_or_insert(self.times.now_ms);
            }
        }
    }

    /// Lets go of workers that have ended what they had begun, or have taken too long over it.
    fn remove_retired(&mut self) {
        let (config, fleet, times) = (self.config, self.fleet, self.times);
        let others = self.workers.clone();
        self.workers.retain(|id, placement| {
            let Some(since_ms) = placement.retiring_ms else { return true };
            let Some(view) = fleet.agents.get(&placement.agent).filter(|view| view.connected) else {
                return !is_lost(fleet, times, &placement.agent);
            };
            // Does another one give the same answers? Then jobs may move there, and soon, if an operator drains.
            let ready = |(other, place): (&WorkerId, &Placement)| {
                place.retiring_ms.is_none()
                    && place.deployment == placement.deployment
                    && (place.revision, &place.engine) == (placement.revision, &placement.engine)
                    && fleet.agents.get(&place.agent).is_some_and(|view| is_ready(view, other))
            };
            let limit_ms = match config.standing(&placement.agent) {
                Some(Standing::Draining { within_ms }) if others.iter().any(ready) => within_ms,
                _ => RETIRE_LIMIT_MS,
            };
            let age_ms = times.now_ms.saturating_sub(since_ms);
            age_ms < RETIRE_MS || (age_ms < limit_ms.max(RETIRE_MS) && !is_idle(view, id))
        });
    }

    /// A deployment's workers that do not retire.
    fn own(&self, deployment: &Deployment) -> impl Iterator<Item = (&WorkerId, &Placement)> {
        let id = deployment.id.clone();
        self.workers.iter().filter(move |(_, place)| place.deployment == id && place.retiring_ms.is_none())
    }

    /// Those of them that are what is wanted, where it may be, by number.
    fn right(&self, deployment: &Deployment) -> Vec<WorkerId> {
        let right = |(id, place): &(&WorkerId, &Placement)| {
            is_twin(place, deployment)
                && !self.fenced(place, id)
                && !matches!(self.config.standing(&place.agent), Some(Standing::Draining { .. }))
                && self.allows(&place.agent, deployment).is_ok()
        };
        let mut right: Vec<_> = self.own(deployment).filter(right).map(|(id, _)| id.clone()).collect();
        right.sort_by_key(|id| number(&deployment.id, id));
        right
    }

    /// Whether a worker's agent says that its GPU is not sound: others take its place, if any has room. One that has
    /// died of its GPU is as one that waits on it; one that is fetching or loading may be about to be well.
    fn fenced(&self, place: &Placement, id: &WorkerId) -> bool {
        let view = self.fleet.agents.get(&place.agent).filter(|view| view.connected);
        let reported = view.and_then(|view| view.workers().iter().find(|worker| worker.worker == *id));
        reported.is_some_and(|worker| match worker.state {
            WorkerState::Fenced => true,
            WorkerState::Backoff => worker.share == 0,
            WorkerState::Fetching | WorkerState::Loading | WorkerState::Ready => false,
        })
    }

    fn ready(&self, id: &WorkerId) -> bool {
        let view = self.workers.get(id).and_then(|place| self.fleet.agents.get(&place.agent));
        view.is_some_and(|view| is_ready(view, id))
    }

    /// Moves a deployment's workers away from lost agents, as far as others have room.
    fn leave_lost(&mut self, deployment: &Deployment) {
        let lost = |(_, place): &(&WorkerId, &Placement)| is_lost(self.fleet, self.times, &place.agent);
        let lost: Vec<WorkerId> = self.own(deployment).filter(lost).map(|(id, _)| id.clone()).collect();
        for id in lost {
            if let Some(agent) = self.best(deployment) {
                self.put(id, deployment, agent);
            }
        }
    }

    /// Retires what is more than is wanted: first what is not ready, then what shares an agent, then the highest numbers.
    fn retire_surplus(&mut self, deployment: &Deployment) {
        loop {
            let right = self.right(deployment);
            let shares = |id: &WorkerId| {
                let agent = &self.workers[id].agent;
                right.iter().filter(|other| self.workers[*other].agent == *agent).count() > 1
            };
            // One that came for the sake of another agent is waited for: then one of those that share goes.
            let stand_in = || right.iter().any(|id| shares(id) && self.ready(id));
            let awaited = |id: &WorkerId| !self.ready(id) && !shares(id) && stand_in();
            let surplus = right.len().saturating_sub(deployment.replicas as usize);
            if surplus == 0 || (surplus == 1 && right.iter().any(awaited)) {
                return;
            }
            let rank = |(number, id): &(usize, &WorkerId)| (self.ready(id), !shares(id), std::cmp::Reverse(*number));
            let Some(id) = right.iter().enumerate().min_by_key(rank).map(|(_, id)| id.clone()) else { return };
            self.retire(&id);
        }
    }

    /// Gives the lowest free numbers to replicas that have no worker yet. While old ones still serve, new ones come in
    /// small steps, so that a change takes little more room than a deployment has anyway.
    fn place_missing(&mut self, deployment: &Deployment) {
        let right = self.right(deployment);
        let mut missing = (deployment.replicas as usize).saturating_sub(right.len());
        let old = self.own(deployment).filter(|(id, _)| !right.contains(id)).filter(|(id, _)| self.ready(id)).count();
        if old > 0 {
            let coming = right.iter().filter(|id| !self.ready(id)).count();
            let step = (deployment.replicas as usize / 4).max(1);
            // What has gone for good is replaced at once; only what is renewed waits.
            let gone = (deployment.replicas as usize).saturating_sub(right.len() + old);
            missing = missing.min(step.saturating_sub(coming).max(gone));
        }
        for _ in 0..missing {
            let Some(agent) = self.best(deployment) else { return };
            let Some(id) = self.free_id(deployment) else { return };
            self.put(id, deployment, agent);
        }
    }

    /// Replicas that came up before the second agent did would share one agent's fate for ever: one that does not serve
    /// moves at once; of those that serve, when all do, one gets a companion on an agent that has none, and then retires.
    fn spread(&mut self, deployment: &Deployment) {
        loop {
            let right = self.right(deployment);
            let on = |agent: &NodeId| right.iter().filter(|id| self.workers[*id].agent == *agent).count();
            let doubled: Vec<&WorkerId> = right.iter().filter(|id| on(&self.workers[*id].agent) > 1).collect();
            let Some(to) = self.best(deployment).filter(|agent| on(agent) == 0) else { return };
            if let Some(id) = doubled.iter().rev().find(|id| !self.ready(id)) {
                let id = (*id).clone();
                self.put(id, deployment, to);
                continue;
            }
            let settled = right.len() == deployment.replicas as usize && right.iter().all(|id| self.ready(id));
            if !doubled.is_empty() && settled {
                let Some(id) = self.free_id(deployment) else { return };
                // It is one too many until it is ready; then the highest number of the doubled ones is surplus.
                self.put(id, deployment, to);
            }
            return;
        }
    }

    /// Retires old workers as new ones get ready, so that as many are ready as are wanted.
    fn renew(&mut self, deployment: &Deployment) {
        let right = self.right(deployment);
        let wanted = deployment.replicas as usize;
        let own: Vec<WorkerId> = self.own(deployment).map(|(id, _)| id.clone()).collect();
        let mut old: Vec<&WorkerId> = own.iter().filter(|id| !right.contains(id)).collect();
        old.sort_by_key(|id| self.ready(id));
        let mut ready = own.iter().filter(|id| self.ready(id)).count();
        let replaced = right.len() >= wanted;
        for id in old {
            let serves = self.ready(id);
            let stands_in_the_way = !replaced && self.stands_in_the_way(deployment, id, &right);
            if (!serves && replaced) || (serves && ready > wanted) || stands_in_the_way {
                self.retire(id);
                ready -= usize::from(serves);
                if stands_in_the_way {
                    return;
                }
            }
        }
    }

    /// Whether a worker of an older kind takes the room that its successor needs, and nothing else is on its way: then
    /// it must go first.
    fn stands_in_the_way(&self, deployment: &Deployment, id: &WorkerId, right: &[WorkerId]) -> bool {
        let place = &self.workers[id];
        let outdated = place.revision != deployment.revision || place.engine != deployment.engine;
        let retiring = self.workers.values().any(|p| p.deployment == deployment.id && p.retiring_ms.is_some());
        if !outdated || retiring || self.best(deployment).is_some() || right.iter().any(|id| !self.ready(id)) {
            return false;
        }
        let mut without = Draft { workers: self.workers.clone(), ..*self };
        without.workers.remove(id);
        without.fits(&place.agent, deployment).is_ok()
    }

    fn put(&mut self, id: WorkerId, deployment: &Deployment, agent: NodeId) {
        let Deployment { id: of, revision, engine, .. } = deployment.clone();
        self.workers.insert(id, Placement { deployment: of, agent, revision, engine, retiring_ms: None });
    }

    fn retire(&mut self, id: &WorkerId) {
        if let Some(place) = self.workers.get_mut(id) {
            place.retiring_ms.get_or_insert(self.times.now_ms);
        }
    }

    fn free_id(&self, deployment: &Deployment) -> Option<WorkerId> {
        let mut ids = (0..2 * REPLICA_LIMIT).map_while(|number| worker_id(&deployment.id, number));
        // One that an agent still speaks of is not free yet: its word would be taken for its successor's.
        let reported: BTreeSet<&WorkerId> =
            self.fleet.agents.values().flat_map(|view| view.workers()).map(|worker| &worker.worker).collect();
        ids.find(|id| !self.workers.contains_key(id) && !reported.contains(id))
    }

    /// Agents that a worker can go to: what they have is known.
    fn here(&self) -> impl Iterator<Item = &'a NodeId> {
        let known = |(_, view): &(&NodeId, &AgentView)| view.connected && view.report.is_some();
        self.fleet.agents.iter().filter(known).map(|(id, _)| id)
    }

    /// The agent that should get the next worker of a deployment; `None` if none has room.
    fn best(&self, deployment: &Deployment) -> Option<NodeId> {
        let rank = |agent: &NodeId| {
            let here = || self.workers.values().filter(|place| place.agent == *agent);
            (here().filter(|place| is_twin(place, deployment)).count(), here().count())
        };
        // The first of equals wins, and agents come by name.
        let fitting = self.here().filter(|agent| self.fits(agent, deployment).is_ok());
        fitting.min_by_key(|agent| rank(agent)).cloned()
    }

    /// Whether an agent is one that a deployment's workers may be on.
    fn allows(&self, agent: &NodeId, deployment: &Deployment) -> Result<(), Misfit> {
        // Of an agent that is away nobody knows that it is not.
        let Some(report) = self.fleet.agents.get(agent).and_then(|view| view.report.as_ref()) else { return Ok(()) };
        match deployment.constraints.labels.iter().find(|(key, value)| report.labels.get(*key) != Some(value)) {
            Some((key, value)) => Err(Misfit::Label { key: key.clone(), value: value.clone() }),
            None => Ok(()),
        }
    }

    /// Whether one more worker of a deployment can go to an agent.
    fn fits(&self, agent: &NodeId, deployment: &Deployment) -> Result<(), Misfit> {
        if self.config.remedy_of(agent).is_some() {
            return Err(Misfit::Remedy);
        }
        if let Some(standing) = self.config.standings.get(agent) {
            return Err(Misfit::Standing(*standing));
        }
        self.allows(agent, deployment)?;
        let report = self.fleet.agents.get(agent).and_then(|view| view.report.as_ref());
        let cuda = if let Device::Cuda(number) = deployment.engine.device { Some(number) } else { None };
        if let Some(why) = report.and_then(|report| gpus::stops(report, cuda)) {
            return Err(Misfit::Unsound(why));
        }
        let here = || self.workers.values().filter(|place| place.agent == *agent);
        if here().count() >= WORKERS_PER_AGENT {
            return Err(Misfit::Full);
        }
        if deployment.constraints.apart && here().any(|place| is_twin(place, deployment)) {
            return Err(Misfit::Occupied);
        }
        let (memory, gpus) = report.map_or((0, 0), |report| (report.memory_bytes, gpus::usable(report)));
        let taken: Vec<(u64, u32)> = here().map(|place| self.needs(place)).collect();
        let candidate = Placement {
            deployment: deployment.id.clone(),
            agent: agent.clone(),
            revision: deployment.revision,
            engine: deployment.engine.clone(),
            retiring_ms: None,
        };
        let (needed_bytes, needed_gpus) = self.needs(&candidate);
        let free_gpus = gpus.saturating_sub(taken.iter().map(|(_, gpus)| gpus).sum());
        if needed_gpus > free_gpus {
            return Err(Misfit::Gpus { free: free_gpus, needed: needed_gpus });
        }
        let free_bytes = (memory / 100 * MEMORY_SHARE).saturating_sub(taken.iter().map(|(bytes, _)| bytes).sum());
        if needed_bytes > free_bytes {
            return Err(Misfit::Memory { free: free_bytes, needed: needed_bytes });
        }
        Ok(())
    }

    /// Memory, in bytes, and GPUs that a worker takes on its agent.
    fn needs(&self, place: &Placement) -> (u64, u32) {
        let constraints = self.config.deployments.get(&place.deployment).map(|deployment| &deployment.constraints);
        let (stated, gpus) = constraints.map_or((0, 0), |constraints| (constraints.memory_bytes, constraints.gpus));
        let estimated = || match self.config.models.get(&place.revision).map(|model| &model.manifest) {
            Some(manifest) if place.engine.device == Device::Cpu && !matches!(manifest.kind, Kind::Echo { .. }) => {
                manifest.files.iter().map(|file| file.bytes).sum::<u64>() + place.engine.cache_budget()
            }
            _ => 0,
        };
        (if stated > 0 { stated } else { estimated() }, gpus)
    }
}

/// Whether a worker is what a deployment wants, and stays.
pub fn is_twin(place: &Placement, deployment: &Deployment) -> bool {
    place.deployment == deployment.id
        && place.retiring_ms.is_none()
        && (place.revision, &place.engine) == (deployment.revision, &deployment.engine)
}

fn is_lost(fleet: &Fleet, times: Times, agent: &NodeId) -> bool {
    let view = fleet.agents.get(agent);
    let seen_ms = view.map_or(fleet.since_ms, |view| view.last_report_ms.max(fleet.since_ms));
    !view.is_some_and(|view| view.connected)
        && times.now_ms.saturating_sub(seen_ms) >= LOST_MS
        && times.now_ms.saturating_sub(times.leader_since_ms) >= NEW_LEADER_MS
}

fn is_ready(view: &AgentView, id: &WorkerId) -> bool {
    let reported = view.workers().iter().find(|worker| worker.worker == *id);
    view.connected && reported.is_some_and(|worker| worker.state == WorkerState::Ready)
}

fn is_idle(view: &AgentView, id: &WorkerId) -> bool {
    let reported = view.workers().iter().find(|worker| worker.worker == *id);
    !view.in_flight.contains_key(id) && reported.is_none_or(|worker| worker.load.jobs() == 0)
}

#[cfg(test)]
mod tests;
