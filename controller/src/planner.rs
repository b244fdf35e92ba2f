//! What runs where: desired deployments and the agents at hand -> a plan. Run by the leader alone; the plan is a
//! command, so that assignments derive from replicated state.
//!
//! Pure. Rules: what is placed stays where it is; what is missing goes to an agent that has none of this deployment
//! yet, then to the one with the fewest workers, then by name; surplus goes from the highest number down; an agent
//! that stays away loses its workers if another can take them. Planning again on the result changes nothing.

use std::collections::BTreeMap;

use izar_common::health::WorkerState;
use izar_common::id::{DeploymentId, NodeId, WorkerId};

use crate::fleet::{AgentView, Fleet};
use crate::state::{Config, Deployment, Placement, Plan, REPLICA_LIMIT};

/// How long an agent may be away before others get its workers. Longer than a restart of the server's daemon, for
/// moving a model costs its loading time.
pub const LOST_MS: u64 = 60_000;

/// How long a new leader waits before it counts anybody as lost: its own sessions may just be coming up.
pub const NEW_LEADER_MS: u64 = 10_000;

/// Workers on one agent at most. An assignment travels whole and must fit a frame; a server has fewer accelerators.
pub const WORKERS_PER_AGENT: usize = 64;

/// The times that a plan depends on, Unix milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub now_ms: u64,
    /// Since when this controller leads.
    pub leader_since_ms: u64,
}

/// Returns the plan that should replace the current one, or `None` if that one is right.
pub fn plan(config: &Config, fleet: &Fleet, times: Times) -> Option<Plan> {
    let mut workers = kept(config);
    let here: Vec<&NodeId> = fleet.agents.iter().filter(|(_, view)| view.connected).map(|(id, _)| id).collect();
    for deployment in config.deployments.values() {
        leave_lost(&mut workers, deployment, fleet, &here, times);
        place_missing(&mut workers, deployment, &here);
        spread(&mut workers, deployment, fleet, &here);
    }
    if workers == config.plan.workers { None } else { Some(Plan { version: config.plan.version + 1, workers }) }
}

type Workers = BTreeMap<WorkerId, Placement>;

/// A worker's number within its deployment.
fn number(deployment: &DeploymentId, worker: &WorkerId) -> Option<u32> {
    worker.as_str().strip_prefix(deployment.as_str())?.strip_prefix('.')?.parse().ok()
}

/// The id of a deployment's n-th worker; `None` if the name gets too long for one (such a deployment is refused: see
/// [`can_be_named`]).
fn worker_id(deployment: &DeploymentId, number: u32) -> Option<WorkerId> {
    WorkerId::new(&format!("{deployment}.{number}")).ok()
}

/// Whether every worker that a deployment may ever have gets an id.
pub fn can_be_named(deployment: &DeploymentId) -> bool {
    worker_id(deployment, REPLICA_LIMIT - 1).is_some()
}

/// What stays of the current plan: of each deployment the lowest numbers, as many as are wanted.
fn kept(config: &Config) -> Workers {
    let mut kept = Workers::new();
    for deployment in config.deployments.values() {
        let mut own: Vec<_> = config
            .plan
            .workers
            .iter()
            .filter(|(_, placement)| placement.deployment == deployment.id)
            .filter_map(|(id, placement)| Some((number(&deployment.id, id)?, id, placement)))
            .collect();
        own.sort_by_key(|(number, ..)| *number);
        own.truncate(deployment.replicas as usize);
        kept.extend(own.into_iter().map(|(_, id, placement)| (id.clone(), placement.clone())));
    }
    kept
}

fn is_lost(agent: &NodeId, fleet: &Fleet, times: Times) -> bool {
    let view = fleet.agents.get(agent);
    let seen_ms = view.map_or(fleet.since_ms, |view| view.last_report_ms.max(fleet.since_ms));
    !view.is_some_and(|view| view.connected)
        && times.now_ms.saturating_sub(seen_ms) >= LOST_MS
        && times.now_ms.saturating_sub(times.leader_since_ms) >= NEW_LEADER_MS
}

/// Moves a deployment's workers away from lost agents, as far as others have room.
fn leave_lost(workers: &mut Workers, deployment: &Deployment, fleet: &Fleet, here: &[&NodeId], times: Times) {
    let lost: Vec<WorkerId> = workers
        .iter()
        .filter(|(_, placement)| placement.deployment == deployment.id && is_lost(&placement.agent, fleet, times))
        .map(|(id, _)| id.clone())
        .collect();
    for id in lost {
        if let Some(agent) = best(workers, &deployment.id, here) {
            workers.insert(id, Placement { deployment: deployment.id.clone(), agent });
        }
    }
}

/// Gives the lowest free numbers to replicas that have no worker yet.
fn place_missing(workers: &mut Workers, deployment: &Deployment, here: &[&NodeId]) {
    let mut missing = deployment.replicas as usize - count(workers, |p| p.deployment == deployment.id);
    let mut free = 0;
    while missing > 0 {
        let Some(id) = worker_id(&deployment.id, free) else { return };
        free += 1;
        if workers.contains_key(&id) {
            continue;
        }
        let Some(agent) = best(workers, &deployment.id, here) else { return };
        workers.insert(id, Placement { deployment: deployment.id.clone(), agent });
        missing -= 1;
    }
}

/// Moves replicas off agents that have two, to agents that have none: those that came up before the second agent did
/// would otherwise share their fate for ever. One that serves moves only while it is idle and all others are ready, so
/// they move one after the other.
fn spread(workers: &mut Workers, deployment: &Deployment, fleet: &Fleet, here: &[&NodeId]) {
    while let Some((id, agent)) = next_move(workers, deployment, fleet, here) {
        workers.insert(id, Placement { deployment: deployment.id.clone(), agent });
    }
}

fn next_move(
    workers: &Workers,
    deployment: &Deployment,
    fleet: &Fleet,
    here: &[&NodeId],
) -> Option<(WorkerId, NodeId)> {
    let on = |agent: &NodeId| count(workers, |p| p.deployment == deployment.id && p.agent == *agent);
    let to = best(workers, &deployment.id, here).filter(|agent| on(agent) == 0)?;
    let own = || workers.iter().filter(|(_, placement)| placement.deployment == deployment.id);
    let serves = |id: &WorkerId, p: &Placement| fleet.agents.get(&p.agent).is_some_and(|view| is_ready(view, id));
    let may_move = |id: &WorkerId, placement: &Placement| {
        let idle = fleet.agents.get(&placement.agent).is_some_and(|view| is_idle(view, id));
        !serves(id, placement) || idle && own().all(|(id, placement)| serves(id, placement))
    };
    let doubled = own().filter(|(id, placement)| on(&placement.agent) > 1 && may_move(id, placement));
    let (id, _) = doubled.max_by_key(|(id, _)| number(&deployment.id, id))?;
    Some((id.clone(), to))
}

fn is_ready(view: &AgentView, id: &WorkerId) -> bool {
    let reported = view.workers().iter().find(|worker| worker.worker == *id);
    view.connected && reported.is_some_and(|worker| worker.state == WorkerState::Ready)
}

fn is_idle(view: &AgentView, id: &WorkerId) -> bool {
    let reported = view.workers().iter().find(|worker| worker.worker == *id);
    !view.in_flight.contains_key(id) && reported.is_none_or(|worker| worker.load.jobs() == 0)
}

/// The agent that should get the next worker of a deployment; `None` if all are full.
fn best(workers: &Workers, deployment: &DeploymentId, here: &[&NodeId]) -> Option<NodeId> {
    let rank = |agent: &NodeId| {
        let total = count(workers, |p| p.agent == *agent);
        (count(workers, |p| p.agent == *agent && p.deployment == *deployment), total)
    };
    let room = here.iter().filter(|agent| count(workers, |p| p.agent == ***agent) < WORKERS_PER_AGENT);
    // The first of equals wins, and agents come by name.
    room.min_by_key(|agent| rank(agent)).map(|agent| (*agent).clone())
}

fn count(workers: &Workers, fits: impl Fn(&Placement) -> bool) -> usize {
    workers.values().filter(|placement| fits(placement)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{config, fleet};

    const NOW: u64 = 1_000_000;

    fn words(plan: &Plan) -> String {
        plan.workers.iter().map(|(id, p)| format!("{id}@{}", p.agent)).collect::<Vec<_>>().join(" ")
    }

    fn plan_at(wanted: &str, current: &str, fleet: &Fleet, times: Times) -> String {
        let mut config = config(wanted, current);
        let Some(next) = plan(&config, fleet, times) else { return "same".into() };
        assert_eq!(next.version, config.plan.version + 1);
        let text = words(&next);
        config.plan = next;
        if let Some(again) = plan(&config, fleet, times) {
            panic!("{wanted} | {current}: {text} is not stable, then came {}", words(&again));
        }
        text
    }

    /// `agents`: names, `-name` for one that has been away for long, `~name` for one that just left.
    fn agents(names: &str) -> Fleet {
        let mut fleet = Fleet::new(0);
        for name in names.split_whitespace() {
            let id: NodeId = name.trim_start_matches(['-', '~']).parse().unwrap();
            let seen = if name.starts_with('-') { NOW - LOST_MS } else { NOW - 1 };
            fleet.connect(&id, seen);
            if name.starts_with(['-', '~']) {
                fleet.disconnect(&id);
            }
        }
        fleet
    }

    fn check(wanted: &str, current: &str, names: &str, expected: &str) {
        let times = Times { now_ms: NOW, leader_since_ms: 0 };
        assert_eq!(plan_at(wanted, current, &agents(names), times), expected, "{wanted} | {current} | {names}");
    }

    #[test]
    fn missing_replicas_go_to_distinct_agents_with_the_fewest_workers() {
        check("m 1", "", "a1 a2", "m.0@a1");
        check("m 2", "", "a1 a2", "m.0@a1 m.1@a2");
        check("m 3", "", "a1 a2", "m.0@a1 m.1@a2 m.2@a1");
        check("m 1, n 1", "m.0@a1", "a1 a2", "m.0@a1 n.0@a2");
        check("m 2", "", "", "same");
        check("m 2", "", "~a1", "same");
        check("m 2", "m.1@a1", "a1 a2", "m.0@a2 m.1@a1");
    }

    #[test]
    fn a_name_must_leave_room_for_the_numbers_of_its_workers() {
        let fits = |length: usize| can_be_named(&DeploymentId::new(&"m".repeat(length)).unwrap());
        assert_eq!((fits(59), fits(60)), (true, false));
    }

    #[test]
    fn what_is_right_stays() {
        check("m 2", "m.0@a1 m.1@a2", "a1 a2", "same");
        check("m 2", "m.0@a1 m.1@a2", "a1 a2 a0 a3", "same");
        check("m 2", "m.0@a1 m.1@a2", "a1 ~a2 a3", "same");
        check("m 2", "m.0@a1 m.1@a1", "a1", "same");
    }

    #[test]
    fn surplus_goes_from_the_highest_number_also_beyond_nine() {
        check("m 1", "m.0@a1 m.1@a2", "a1 a2", "m.0@a1");
        let eleven: Vec<_> = (0..11).map(|i| format!("m.{i}@a1")).collect();
        check("m 10", &eleven.join(" "), "a1", &eleven[..10].join(" "));
        check("", "m.0@a1", "a1", "");
        check("m 0", "m.0@a1", "a1", "");
    }

    #[test]
    fn a_lost_agent_loses_its_workers_only_if_another_can_take_them() {
        check("m 2", "m.0@a1 m.1@a2", "a1 -a2 a3", "m.0@a1 m.1@a3");
        check("m 2", "m.0@a1 m.1@a2", "a1 -a2", "m.0@a1 m.1@a1");
        check("m 2", "m.0@a1 m.1@a2", "-a1 -a2", "same");
        check("m 1", "m.0@never", "a1", "m.0@a1");
    }

    #[test]
    fn nobody_is_lost_while_the_leader_or_the_controller_is_new() {
        let times = Times { now_ms: NOW, leader_since_ms: NOW - NEW_LEADER_MS + 1 };
        assert_eq!(plan_at("m 1", "m.0@a2", &agents("a1 -a2"), times), "same");
        let mut fleet = agents("a1 -a2");
        fleet.since_ms = NOW - LOST_MS + 1;
        let times = Times { now_ms: NOW, leader_since_ms: 0 };
        assert_eq!(plan_at("m 1", "m.0@a2", &fleet, times), "same");
        assert_eq!(plan_at("m 1", "m.0@never", &fleet, times), "same");
    }

    #[test]
    fn doubled_replicas_spread_at_once_while_they_do_not_serve() {
        check("m 2", "m.0@a1 m.1@a1", "a1 a2", "m.0@a1 m.1@a2");
        check("m 3", "m.0@a1 m.1@a1 m.2@a1", "a1 a2 a3", "m.0@a1 m.1@a3 m.2@a2");
        check("m 3", "m.0@a1 m.1@a1 m.2@a2", "a1 a2", "same");
    }

    #[test]
    fn doubled_replicas_that_serve_move_one_by_one_and_only_when_idle() {
        let check = |m0: &str, m1: &str, m2: &str, expected: &str| {
            let said = format!("a1 m.0 {m0}\na1 m.1 {m1}\na1 m.2 {m2}\na2 n.0 ready 0 0 0\na3 n.0 ready 0 0 0");
            let times = Times { now_ms: NOW, leader_since_ms: 0 };
            assert_eq!(plan_at("m 3", "m.0@a1 m.1@a1 m.2@a1", &fleet(&said, NOW), times), expected, "{said}");
        };
        let (idle, busy, asked) = ("ready 0 0 0", "ready 1 0 0", "ready 0 0 1");
        check(idle, idle, idle, "m.0@a1 m.1@a1 m.2@a2");
        check(idle, idle, busy, "m.0@a1 m.1@a2 m.2@a1");
        check(busy, asked, busy, "same");
        check(idle, "backoff 0 0 0", busy, "m.0@a1 m.1@a2 m.2@a1");
    }

    #[test]
    fn an_agent_has_a_limit_of_workers() {
        let text = plan_at("m 100", "", &agents("a1"), Times { now_ms: NOW, leader_since_ms: 0 });
        assert_eq!(text.split(' ').count(), WORKERS_PER_AGENT);
    }
}
