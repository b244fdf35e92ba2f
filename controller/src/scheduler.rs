//! Which worker gets a job: the least loaded ready one that has the right model revision, or the reason why none.
//!
//! Pure: the fleet, the configuration, the time and the tie-breaker come in as arguments. It sees what agents last
//! said and what this controller has asked since; other controllers' newest jobs it learns of with the next report.

use std::cmp::Ordering;
use std::fmt;

use izar_common::health::{WorkerReport, WorkerState};
use izar_common::id::{DeploymentId, Hash, NodeId, NumericsId, WorkerId};

use crate::fleet::{AgentView, Fleet};
use crate::state::{Config, Deployment};

/// Jobs on a worker at most, in batches: one runs, the others wait. More would wait longer than a client does, so
/// the gateway refuses them at once (429) and the client may ask another site.
pub const BATCHES_PER_WORKER: u64 = 8;

/// Jobs of this controller on an agent at most. Each has a QUIC stream, of which a connection allows 1024; the rest
/// is room for streams that have ended but are not yet acknowledged.
pub const JOBS_PER_AGENT: u32 = 960;

/// An agent reports at least once a second. One that is silent for longer than this may be dead before its
/// connection times out, so others are preferred.
pub const LATE_MS: u64 = 1_500;

/// What is asked of the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub deployment: &'a DeploymentId,
    /// The revision that the prompt was tokenized for.
    pub revision: Hash,
    /// What computed the beginning of the answer: a worker of another id goes on as well, but not with the very same
    /// tokens, and is taken only if there is no other.
    pub numerics: Option<NumericsId>,
    /// Workers that have just failed this job: taken only if there is no other of those numerics.
    pub avoid: &'a [WorkerId],
    pub now_ms: u64,
    /// Counts the asks, so that equally loaded workers take turns.
    pub rotation: u64,
}

/// Where a job goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub agent: NodeId,
    pub worker: WorkerId,
    /// What computes there.
    pub numerics: Option<NumericsId>,
}

/// Why a job goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    #[error("there is no deployment {0}")]
    NoDeployment(DeploymentId),
    #[error("no replica of {deployment} is ready ({states})")]
    NoReplicaReady { deployment: DeploymentId, states: States },
    #[error("all {replicas} ready replicas of {deployment} are full")]
    AllFull { deployment: DeploymentId, replicas: u32 },
}

/// How many replicas are in which state that is not ready for the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct States {
    /// Wanted, but no agent has been found for it yet.
    pub unplaced: u32,
    /// Its agent has no session with this controller.
    pub unreachable: u32,
    /// Assigned, and not yet in a report of its agent.
    pub unreported: u32,
    pub fetching: u32,
    pub loading: u32,
    pub backoff: u32,
    /// Ready with another revision of the model.
    pub other_revision: u32,
}

impl fmt::Display for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.unplaced, "without an agent"),
            (self.unreachable, "unreachable"),
            (self.unreported, "starting"),
            (self.fetching, "fetching the model"),
            (self.loading, "loading the model"),
            (self.backoff, "failed and waiting to be started again"),
            (self.other_revision, "with another revision"),
        ];
        let mut separator = "";
        for (count, words) in parts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "{separator}{count} {words}")?;
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("none is wanted") } else { Ok(()) }
    }
}

/// Chooses the worker for a job.
pub fn place(fleet: &Fleet, config: &Config, ask: &Ask<'_>) -> Result<Place, NoPlace> {
    if !config.deployments.contains_key(ask.deployment) {
        return Err(NoPlace::NoDeployment(ask.deployment.clone()));
    }
    let mut best: Option<Rank> = None;
    let (mut ties, mut full) = (0, 0);
    for (agent, view, worker) in candidates(fleet, config, ask) {
        let Some(rank) = rank(config, agent, view, worker, ask) else {
            full += 1;
            continue;
        };
        match best.map_or(Ordering::Less, |best| rank.cmp(&best)) {
            Ordering::Less => (best, ties) = (Some(rank), 1),
            Ordering::Equal => ties += 1,
            Ordering::Greater => {}
        }
    }
    let Some(best) = best else {
        return Err(match full {
            0 => not_ready(fleet, config, ask),
            replicas => NoPlace::AllFull { deployment: ask.deployment.clone(), replicas },
        });
    };
    let mut equals = candidates(fleet, config, ask)
        .filter(|(agent, view, worker)| rank(config, agent, view, worker, ask).is_some_and(|rank| rank == best));
    let (agent, _, worker) =
        equals.nth((ask.rotation % ties) as usize).expect("the second look finds what the first one counted");
    Ok(Place { agent: agent.clone(), worker: worker.worker.clone(), numerics: worker.numerics })
}

/// The revision of a deployment that new requests are for: the wanted one, or while none of its workers is ready, one
/// that still serves.
pub fn revision(fleet: &Fleet, config: &Config, deployment: &Deployment) -> Hash {
    let own = config.plan.workers.iter().filter(|(_, place)| place.deployment == deployment.id);
    let serving = own.filter(|(id, place)| {
        let view = fleet.agents.get(&place.agent).filter(|view| view.connected);
        let mut workers = view.into_iter().flat_map(|view| view.workers());
        place.retiring_ms.is_none()
            && workers.any(|w| w.worker == **id && w.state == WorkerState::Ready && w.revision == place.revision)
    });
    let mut revisions = serving.map(|(_, place)| place.revision);
    let any = revisions.next().unwrap_or(deployment.revision);
    if any == deployment.revision || revisions.any(|other| other == deployment.revision) {
        return deployment.revision;
    }
    any
}

/// Ready workers with the right revision that the plan still wants where they are. Those that retire only go on with
/// what others have begun, and only where the numerics are the same.
fn candidates<'a>(
    fleet: &'a Fleet,
    config: &'a Config,
    ask: &'a Ask<'a>,
) -> impl Iterator<Item = (&'a NodeId, &'a AgentView, &'a WorkerReport)> {
    let connected = fleet.agents.iter().filter(|(_, view)| view.connected);
    connected.flat_map(move |(agent, view)| {
        let fits = move |worker: &&WorkerReport| {
            worker.state == WorkerState::Ready
                && worker.deployment == *ask.deployment
                && worker.revision == ask.revision
                && config.plan.workers.get(&worker.worker).is_some_and(|placement| {
                    let stays =
                        placement.retiring_ms.is_none() || (ask.numerics.is_some() && ask.numerics == worker.numerics);
                    placement.agent == *agent && stays
                })
        };
        view.workers().iter().filter(fits).map(move |worker| (agent, view, worker))
    })
}

/// How good a worker is; the smallest is best.
#[derive(Debug, Clone, Copy)]
struct Rank {
    /// It would go on with other tokens than those that were begun.
    inexact: bool,
    /// It failed this job before, its agent is late or shall get no new work, or it retires.
    doubtful: bool,
    jobs: u64,
    max_batch: u64,
}

impl Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        // jobs / max_batch, compared without division.
        let load = (self.jobs * other.max_batch).cmp(&(other.jobs * self.max_batch));
        (self.inexact, self.doubtful).cmp(&(other.inexact, other.doubtful)).then(load)
    }
}
impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

/// Ranks a worker, or `None` if it is full.
fn rank(config: &Config, agent: &NodeId, view: &AgentView, worker: &WorkerReport, ask: &Ask<'_>) -> Option<Rank> {
    let reported = u64::from(worker.load.jobs());
    let ours = u64::from(view.in_flight.get(&worker.worker).copied().unwrap_or(0));
    // The report counts ours as well, only later: the larger number is the nearer one.
    let (jobs, max_batch) = (reported.max(ours), u64::from(worker.max_batch.max(1)));
    if jobs >= BATCHES_PER_WORKER * max_batch || view.jobs() >= JOBS_PER_AGENT {
        return None;
    }
    let late = ask.now_ms.saturating_sub(view.last_report_ms) > LATE_MS;
    let inexact = ask.numerics.is_some() && ask.numerics != worker.numerics;
    let leaving = config.standings.contains_key(agent)
        || config.plan.workers.get(&worker.worker).is_some_and(|placement| placement.retiring_ms.is_some());
    let doubtful = late || leaving || ask.avoid.contains(&worker.worker);
    Some(Rank { inexact, doubtful, jobs, max_batch })
}

/// Says in which states the replicas are, when none can take the job.
fn not_ready(fleet: &Fleet, config: &Config, ask: &Ask<'_>) -> NoPlace {
    let mut states = States::default();
    let wanted = config.deployments.get(ask.deployment).map_or(0, |deployment| deployment.replicas);
    let placed = config.plan.workers.iter().filter(|(_, placement)| placement.deployment == *ask.deployment);
    let placed = placed.filter(|(_, placement)| placement.retiring_ms.is_none());
    let mut count = 0;
    for (id, placement) in placed {
        count += 1;
        let view = fleet.agents.get(&placement.agent).filter(|view| view.connected);
        let worker = view.and_then(|view| view.workers().iter().find(|worker| worker.worker == *id));
        match (view, worker.map(|worker| worker.state)) {
            (None, _) => states.unreachable += 1,
            (Some(_), None) => states.unreported += 1,
            (Some(_), Some(WorkerState::Fetching)) => states.fetching += 1,
            (Some(_), Some(WorkerState::Loading)) => states.loading += 1,
            (Some(_), Some(WorkerState::Backoff)) => states.backoff += 1,
            (Some(_), Some(WorkerState::Ready)) => states.other_revision += 1,
        }
    }
    states.unplaced = wanted.saturating_sub(count);
    NoPlace::NoReplicaReady { deployment: ask.deployment.clone(), states }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{config, fleet};

    const NOW: u64 = 100_000;

    /// `wanted`: `deployment replicas` words; `plan`: `worker@agent`; `said`: `agent worker state running waiting
    /// in_flight`, one a line. Returns the place as `worker@agent`, or the reason.
    fn ask(wanted: &str, plan: &str, said: &str, avoid: &[&str], rotation: u64) -> String {
        let (config, mut fleet) = (config(wanted, plan), fleet(said, NOW));
        if let Some(view) = fleet.agents.get_mut("late") {
            view.last_report_ms = NOW - LATE_MS - 1;
        }
        let avoid: Vec<WorkerId> = avoid.iter().map(|worker| worker.parse().unwrap()).collect();
        let deployment = "m".parse().unwrap();
        let ask = Ask {
            deployment: &deployment,
            revision: Hash([1; 32]),
            numerics: Some(NumericsId(1)),
            avoid: &avoid,
            now_ms: NOW,
            rotation,
        };
        match place(&fleet, &config, &ask) {
            Ok(place) => format!("{}@{}", place.worker, place.agent),
            Err(reason) => reason.to_string(),
        }
    }

    fn check(said: &str, expected: &str) {
        assert_eq!(ask("m 2", "m.0@a1 m.1@a2", said, &[], 0), expected, "{said}");
    }

    #[test]
    fn the_least_loaded_ready_worker_is_chosen() {
        check("a1 m.0 ready 3 0 0\na2 m.1 ready 2 0 0", "m.1@a2");
        check("a1 m.0 ready 1 0 0\na2 m.1 ready 0 2 0", "m.0@a1");
        check("a1 m.0 ready 1 0 3\na2 m.1 ready 2 0 2", "m.1@a2");
        check("a1 m.0 loading 0 0 0\na2 m.1 ready 9 0 0", "m.1@a2");
        check("a1 m.0 ready 0 0 0 x\na2 m.1 ready 9 0 0", "m.1@a2");
    }

    #[test]
    fn the_reason_says_in_which_states_the_replicas_are() {
        let both = "no replica of m is ready (1 loading the model, 1 failed and waiting to be started again)";
        check("a1 m.0 loading 0 0 0\na2 m.1 backoff 0 0 0", both);
        check("a1 m.0 fetching 0 0 0", "no replica of m is ready (1 unreachable, 1 fetching the model)");
        check(
            "a1 m.0 ready 0 0 0 x\na2 n.0 ready 0 0 0",
            "no replica of m is ready (1 starting, 1 with another revision)",
        );
        assert_eq!(ask("m 2", "", "a1 m.0 ready 0 0 0", &[], 0), "no replica of m is ready (2 without an agent)");
        assert_eq!(ask("n 2", "n.0@a1", "a1 n.0 ready 0 0 0", &[], 0), "there is no deployment m");
    }

    #[test]
    fn a_full_worker_is_passed_over_and_all_full_is_said() {
        check("a1 m.0 ready 4 28 0\na2 m.1 ready 4 27 0", "m.1@a2");
        check("a1 m.0 ready 4 28 0\na2 m.1 ready 0 0 32", "all 2 ready replicas of m are full");
        check("a1 m.0 ready 4 28 0\na2 m.1 loading 0 0 0", "all 1 ready replicas of m are full");
    }

    #[test]
    fn an_agent_with_as_many_jobs_as_streams_gets_no_more() {
        assert_eq!(
            ask("m 1", "m.0@a1", &format!("a1 m.0 ready 0 0 0\na1 n.0 ready 0 0 {JOBS_PER_AGENT}"), &[], 0),
            "all 1 ready replicas of m are full"
        );
    }

    #[test]
    fn equals_take_turns() {
        let said = "a1 m.0 ready 1 0 0\na1 m.1 ready 1 0 0\na2 m.2 ready 1 0 0";
        let places: Vec<_> = (0..4).map(|i| ask("m 3", "m.0@a1 m.1@a1 m.2@a2", said, &[], i)).collect();
        assert_eq!(places, ["m.0@a1", "m.1@a1", "m.2@a2", "m.0@a1"]);
    }

    #[test]
    fn a_worker_that_failed_the_job_or_whose_agent_is_late_comes_last() {
        let said = "a1 m.0 ready 0 0 0\na2 m.1 ready 9 0 0";
        assert_eq!(ask("m 2", "m.0@a1 m.1@a2", said, &["m.0"], 0), "m.1@a2");
        assert_eq!(ask("m 1", "m.0@a1", said, &["m.0"], 0), "m.0@a1");
        assert_eq!(ask("m 2", "m.0@late m.1@a2", "late m.0 ready 0 0 0\na2 m.1 ready 9 0 0", &[], 0), "m.1@a2");
    }

    #[test]
    fn a_worker_that_goes_on_with_the_same_tokens_comes_first() {
        let said = "a1 m.0 ready 9 0 0\na2 m.1 ready 0 0 0 other";
        assert_eq!(ask("m 2", "m.0@a1 m.1@a2", said, &["m.0"], 0), "m.0@a1");
        assert_eq!(ask("m 1", "m.1@a2", "a2 m.1 ready 0 0 0 other", &[], 0), "m.1@a2");
    }

    #[test]
    fn a_worker_that_retires_only_goes_on_with_what_it_alone_can() {
        let said = "a1 m.0 ready 0 0 0\na2 m.1 ready 9 0 0";
        assert_eq!(ask("m 1", "m.0@a1! m.1@a2", said, &[], 0), "m.1@a2");
        assert_eq!(ask("m 1", "m.0@a1!", said, &[], 0), "m.0@a1", "it has the numerics of the beginning");
        let other = "a1 m.0 ready 0 0 0 other";
        assert_eq!(ask("m 1", "m.0@a1!", other, &[], 0), "no replica of m is ready (1 without an agent)");
    }

    #[test]
    fn new_requests_are_for_the_wanted_revision_once_a_worker_of_it_is_ready() {
        let revision = |plan: &str, said: &str| {
            let config = config("m 1", plan);
            super::revision(&fleet(said, NOW), &config, &config.deployments["m"]).0[0]
        };
        let old = "a1 m.0 ready 0 0 0 x\na2 m.1";
        assert_eq!(revision("m.0@a1-9 m.1@a2", &format!("{old} loading 0 0 0")), 9);
        assert_eq!(revision("m.0@a1-9 m.1@a2", &format!("{old} ready 0 0 0")), 1);
        assert_eq!(revision("m.1@a2", &format!("{old} loading 0 0 0")), 1);
    }

    #[test]
    fn a_cordoned_agent_gets_a_job_only_if_no_other_can_take_it() {
        let mut config = config("m 2", "m.0@a1 m.1@a2");
        config.standings.insert("a1".parse().unwrap(), crate::state::Standing::Cordoned);
        let place = |said: &str| {
            let (deployment, revision) = ("m".parse().unwrap(), Hash([1; 32]));
            let ask = Ask { deployment: &deployment, revision, numerics: None, avoid: &[], now_ms: NOW, rotation: 0 };
            super::place(&fleet(said, NOW), &config, &ask).unwrap().worker.to_string()
        };
        assert_eq!(place("a1 m.0 ready 0 0 0\na2 m.1 ready 9 0 0"), "m.1");
        assert_eq!(place("a1 m.0 ready 0 0 0\na2 m.1 loading 0 0 0"), "m.0");
    }

    #[test]
    fn a_worker_that_the_plan_has_moved_away_gets_nothing() {
        assert_eq!(ask("m 1", "m.0@a2", "a1 m.0 ready 0 0 0\na2 m.0 ready 5 0 0", &[], 0), "m.0@a2");
    }
}
