//! What agents last said of themselves, and what this controller has asked of them since. Soft state: never in the
//! log, and losing it costs latency only.
//!
//! Pure: times come in as arguments. A report is an opinion; the plan in the replicated state is the truth.

use std::collections::{BTreeMap, HashMap};

use izar_common::health::{Machine, Report, WorkerReport};
use izar_common::id::{NodeId, WorkerId};
use serde::Serialize;

/// Agents remembered at once. Certificates bound them already; this bounds what many short-lived names can cost.
pub const MAX_AGENTS: usize = 1024;

/// Every agent that this controller has heard of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Fleet {
    /// When this controller began to listen, Unix milliseconds: nobody was unseen before that.
    pub since_ms: u64,
    pub agents: BTreeMap<NodeId, AgentView>,
}

/// One agent as this controller sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct AgentView {
    pub connected: bool,
    /// When it last reported or connected, Unix milliseconds.
    pub last_report_ms: u64,
    /// The newest report; kept when the connection is lost, so that an operator sees what was there.
    pub report: Option<Report>,
    /// What it said of its machine last.
    pub machine: Option<Machine>,
    /// Jobs of this controller that have not ended, by worker. A worker without any has no entry.
    pub in_flight: HashMap<WorkerId, u32>,
    /// Its workers that give far fewer tokens than their peers, and why this controller thinks so.
    #[serde(skip)]
    pub slow: BTreeMap<WorkerId, String>,
    /// Jobs that workers had in the last two reports beyond this controller's own: other controllers'.
    #[serde(skip)]
    pub others: HashMap<WorkerId, [u32; 2]>,
}

impl AgentView {
    /// What the agent last said of its workers.
    pub fn workers(&self) -> &[WorkerReport] {
        self.report.as_ref().map_or(&[], |report| &report.workers)
    }
    /// Jobs of other controllers on a worker. The smaller of two numbers: jobs of ours that ended while a report was on
    /// its way look like others', but hardly twice.
    pub fn others(&self, worker: &WorkerId) -> u32 {
        self.others.get(worker).map_or(0, |[last, before]| *last.min(before))
    }
    /// Jobs of this controller on this agent.
    pub fn jobs(&self) -> u32 {
        self.in_flight.values().sum()
    }
}

impl Fleet {
    pub fn new(now_ms: u64) -> Self {
        Self { since_ms: now_ms, agents: BTreeMap::new() }
    }

    /// Notes that an agent has a session. When the fleet is full, the agent that has been away the longest is
    /// forgotten for it; returns false if none is away.
    pub fn connect(&mut self, agent: &NodeId, now_ms: u64) -> bool {
        if !self.agents.contains_key(agent) && self.agents.len() >= MAX_AGENTS {
            let away = self.agents.iter().filter(|(_, view)| !view.connected);
            let Some(oldest) = away.min_by_key(|(_, view)| view.last_report_ms).map(|(id, _)| id.clone()) else {
                return false;
            };
            self.agents.remove(&oldest);
        }
        let view = self.agents.entry(agent.clone()).or_default();
        view.connected = true;
        view.last_report_ms = now_ms;
        // A new session may be a new process: what the old one said of its workers is no longer believed.
        view.report = None;
        view.others.clear();
        true
    }

    pub fn disconnect(&mut self, agent: &NodeId) {
        if let Some(view) = self.agents.get_mut(agent) {
            view.connected = false;
        }
    }

    /// Forgets an agent that is away; returns whether it was one.
    pub fn forget(&mut self, agent: &NodeId) -> bool {
        let away = self.agents.get(agent).is_some_and(|view| !view.connected);
        away && self.agents.remove(agent).is_some()
    }

    /// Takes a report; the newest replaces all older ones. One from an agent without a session is dropped.
    pub fn report(&mut self, agent: &NodeId, report: Report, now_ms: u64) {
        if let Some(view) = self.agents.get_mut(agent).filter(|view| view.connected) {
            view.last_report_ms = now_ms;
            let excess = |worker: &WorkerReport| {
                let ours = view.in_flight.get(&worker.worker).copied().unwrap_or(0);
                let before = view.others.get(&worker.worker).map_or(0, |[last, _]| *last);
                (worker.worker.clone(), [worker.load.jobs().saturating_sub(ours), before])
            };
            view.others = report.workers.iter().map(excess).collect();
            view.report = Some(report);
        }
    }

    /// Counts a job that goes to a worker.
    pub fn begin(&mut self, agent: &NodeId, worker: &WorkerId) {
        if let Some(view) = self.agents.get_mut(agent) {
            *view.in_flight.entry(worker.clone()).or_default() += 1;
        }
    }

    /// Counts a job that has ended, however it did.
    pub fn end(&mut self, agent: &NodeId, worker: &WorkerId) {
        let Some(view) = self.agents.get_mut(agent) else { return };
        if let Some(count) = view.in_flight.get_mut(worker) {
            *count -= 1;
            if *count == 0 {
                view.in_flight.remove(worker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeId {
        NodeId::new(text).unwrap()
    }

    #[test]
    fn jobs_are_counted_until_they_end() {
        let (mut fleet, agent, worker) = (Fleet::new(0), name("a1"), WorkerId::new("m.0").unwrap());
        fleet.begin(&agent, &worker);
        assert!(fleet.agents.is_empty(), "an unknown agent has no jobs");
        assert!(fleet.connect(&agent, 1));
        fleet.begin(&agent, &worker);
        fleet.begin(&agent, &worker);
        assert_eq!(fleet.agents[&agent].jobs(), 2);
        fleet.end(&agent, &worker);
        fleet.end(&agent, &worker);
        fleet.end(&agent, &worker);
        assert!(fleet.agents[&agent].in_flight.is_empty());
    }

    #[test]
    fn a_full_fleet_forgets_who_was_away_longest_and_refuses_when_all_are_here() {
        let mut fleet = Fleet::new(0);
        for i in 0..MAX_AGENTS {
            assert!(fleet.connect(&name(&format!("a{i}")), i as u64));
        }
        assert!(!fleet.connect(&name("late"), 5000));
        fleet.disconnect(&name("a7"));
        fleet.disconnect(&name("a3"));
        assert!(fleet.connect(&name("late"), 5000));
        assert!(!fleet.agents.contains_key("a3") && fleet.agents.contains_key("a7"));
        assert_eq!(fleet.agents.len(), MAX_AGENTS);
    }
}
