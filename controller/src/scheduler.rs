//! Which worker gets a job: the ready one with the right model revision that has the least to do for it, or the reason
//! why none.
//!
//! What a worker has to do is told in prompt tokens: those of the job that its cache does not hold, and what its other
//! jobs cost beside them. Among workers that are about equal, two are drawn and the less loaded one is taken (Mitzenmacher
//! 2001): controllers that look at the same reports do not all send to the same worker.
//!
//! Pure: the fleet, the configuration, the time and the number that draws come in as arguments. It sees what agents last
//! said and what this controller has asked since; other controllers' newest jobs it learns of with the next report.

use std::fmt;

use izar_common::chat::Class;
use izar_common::health::{WorkerReport, WorkerState};
use izar_common::id::{DeploymentId, Hash, NodeId, NumericsId, WorkerId};
use izar_common::prefix::{BLOCK, Name};
use serde::{Deserialize, Serialize};

use crate::fleet::{AgentView, Fleet};
use crate::prefixes::Prefixes;
use crate::state::{Config, Deployment};

/// Jobs on a worker at most, in batches: one runs, the others wait. More would wait longer than a client does, so
/// the gateway refuses them at once (429) and the client may ask another site.
pub const BATCHES_PER_WORKER: u64 = 8;

/// Jobs of this controller on an agent at most. Each has a QUIC stream, of which a connection allows 4096; the rest
/// is room for streams that have ended but are not yet acknowledged, and for urgent jobs.
pub const JOBS_PER_AGENT: u32 = 4_000;

/// What urgent jobs get beyond these limits: a batch on a worker, and so many on an agent. Workers compute them first, so
/// it does not matter how many others wait there.
pub const URGENT_BATCHES: u64 = 1;
pub const URGENT_PER_AGENT: u32 = 32;

/// An agent reports at least once a second. One that is silent for longer than this may be dead before its
/// connection times out, so others are preferred.
pub const LATE_MS: u64 = 1_500;

/// Three reports that are missing: what GPUs of an agent are like is not known any more.
pub const SILENT_MS: u64 = 3_000;

/// First blocks of a prompt that are looked for in caches: 8,192 tokens. Naming one takes under a microsecond; a prompt
/// that is longer has shown by then whose it is.
pub const PREFIX_BLOCKS: usize = 512;

/// What a full batch on a worker counts, in prompt tokens that it would compute in the same time.
///
/// On the machine of docs/performance.md an answer of 128 tokens takes 4.2 s longer in a batch of 32 than alone, the time
/// of 7,600 prompt tokens. Half of that: a prompt that is computed twice slows down everybody there, which what one job
/// waits does not show. So a shared beginning of 1,000 tokens weighs as much as eight jobs more in a batch of 32.
pub const FULL_BATCH_TOKENS: u64 = 4_096;

/// Workers whose cost is within so many tokens of the best are equals: one job in a batch of 32, which is as much as
/// reports are behind.
pub const SLACK_TOKENS: u64 = 128;

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
    pub class: Class,
    /// Tokens that are known already: the prompt, and what was delivered of the answer.
    pub tokens: u32,
    /// Names of their first full blocks, [`PREFIX_BLOCKS`] at most.
    pub names: &'a [Name],
    pub now_ms: u64,
    /// Another number for each ask: it draws between equals.
    pub rotation: u64,
}

impl<'a> Ask<'a> {
    /// Asks for a place for any job of a deployment.
    pub fn any(deployment: &'a DeploymentId, revision: Hash, now_ms: u64) -> Self {
        let (class, numerics) = (Class::default(), None);
        Self { deployment, revision, numerics, avoid: &[], class, tokens: 0, names: &[], now_ms, rotation: 0 }
    }
}

/// Where a job goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub agent: NodeId,
    pub worker: WorkerId,
    /// What computes there.
    pub numerics: Option<NumericsId>,
    pub why: Why,
}

/// Why a job was placed where it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// Tokens that were known already: the prompt, and what had come of the answer.
    pub tokens: u32,
    pub chosen: Offer,
    /// The best of the others, if there was one that could have taken it.
    pub other: Option<Offer>,
    /// Workers that could have taken it.
    pub offers: u32,
}

/// What speaks for and against a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub worker: WorkerId,
    /// Known tokens that its cache holds.
    pub cached_tokens: u32,
    /// Jobs that it has, and how many run at once.
    pub jobs: u32,
    pub max_batch: u32,
    /// What the job costs there, in prompt tokens.
    pub cost: u64,
    /// It would go on with other tokens than those that were begun.
    pub inexact: bool,
    /// It failed this job before, its agent is late or shall get no new work, or it retires.
    pub doubtful: bool,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, best of {}", self.chosen.words(self.tokens), self.offers)?;
        self.other.as_ref().map_or(Ok(()), |other| write!(f, "; then {}", other.words(self.tokens)))
    }
}

impl Offer {
    /// Exactness comes first, then what is sure to work.
    fn tier(&self) -> (bool, bool) {
        (self.inexact, self.doubtful)
    }
    /// Jobs per place, compared without division.
    fn less_loaded(&self, other: &Self) -> bool {
        u64::from(self.jobs) * u64::from(other.max_batch) < u64::from(other.jobs) * u64::from(self.max_batch)
    }
    fn words(&self, tokens: u32) -> String {
        let Self { worker, cached_tokens, jobs, max_batch, .. } = self;
        let inexact = if self.inexact { ", with other numerics" } else { "" };
        let doubtful = if self.doubtful { ", late, leaving or after a failure" } else { "" };
        format!(
            "{worker} ({cached_tokens} of {tokens} tokens cached, {jobs} jobs for {max_batch} places{inexact}{doubtful})"
        )
    }
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
    /// Its GPU or its server is not sound.
    pub fenced: u32,
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
            (self.fenced, "on a GPU or server that is not sound"),
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
pub fn place(fleet: &Fleet, prefixes: &Prefixes, config: &Config, ask: &Ask<'_>) -> Result<Place, NoPlace> {
    if !config.deployments.contains_key(ask.deployment) {
        return Err(NoPlace::NoDeployment(ask.deployment.clone()));
    }
    let (mut offers, mut full) = (Vec::new(), 0);
    for (agent, view, worker) in candidates(fleet, config, ask) {
        match offer(config, prefixes, agent, view, worker, ask) {
            Some(offer) => offers.push((offer, agent, worker.numerics)),
            None => full += 1,
        }
    }
    let Some(best) = offers.iter().map(|(offer, ..)| (offer.tier(), offer.cost)).min() else {
        return Err(match full {
            0 => not_ready(fleet, config, ask),
            replicas => NoPlace::AllFull { deployment: ask.deployment.clone(), replicas },
        });
    };
    let (tier, most) = (best.0, best.1 + SLACK_TOKENS);
    let equals: Vec<usize> =
        (0..offers.len()).filter(|i| offers[*i].0.tier() == tier && offers[*i].0.cost <= most).collect();
    let (first, second) = draw_two(ask.rotation, equals.len());
    let (first, second) = (equals[first], equals[second]);
    let chosen = if offers[second].0.less_loaded(&offers[first].0) { second } else { first };
    let count = offers.len() as u32;
    let (chosen, agent, numerics) = offers.swap_remove(chosen);
    let other = offers.into_iter().map(|(offer, ..)| offer).min_by_key(|offer| (offer.tier(), offer.cost));
    let (agent, worker) = (agent.clone(), chosen.worker.clone());
    Ok(Place { agent, worker, numerics, why: Why { tokens: ask.tokens, chosen, other, offers: count } })
}

/// Draws two of so many, different ones if there are.
fn draw_two(rotation: u64, count: usize) -> (usize, usize) {
    // SplitMix64's last steps: numbers that follow each other give draws that do not.
    let mut x = rotation.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    let first = (x >> 32) as usize % count;
    let step = 1 + (x as u32) as usize % (count - 1).max(1);
    (first, (first + step) % count)
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
/// what others have begun, where the numerics are the same; and they serve who waited while another revision came.
pub fn candidates<'a>(
    fleet: &'a Fleet,
    config: &'a Config,
    ask: &'a Ask<'a>,
) -> impl Iterator<Item = (&'a NodeId, &'a AgentView, &'a WorkerReport)> {
    let wanted = config.deployments.get(ask.deployment).map(|deployment| deployment.revision);
    let connected = fleet.agents.iter().filter(|(_, view)| view.connected && !silent(view, ask.now_ms));
    connected.flat_map(move |(agent, view)| {
        let fits = move |worker: &&WorkerReport| {
            worker.state == WorkerState::Ready
                && worker.deployment == *ask.deployment
                && worker.revision == ask.revision
                && config.plan.workers.get(&worker.worker).is_some_and(|placement| {
                    let begun_here = ask.numerics.is_some() && ask.numerics == worker.numerics;
                    let waited = wanted.is_some_and(|wanted| wanted != ask.revision);
                    placement.agent == *agent && (placement.retiring_ms.is_none() || begun_here || waited)
                })
        };
        view.workers().iter().filter(fits).map(move |worker| (agent, view, worker))
    })
}

/// Whether an agent with GPUs has missed so many reports that they count as cordoned: nobody knows how they are.
fn silent(view: &AgentView, now_ms: u64) -> bool {
    let gpus = view.report.as_ref().is_some_and(|report| !report.health.gpus.is_empty());
    gpus && now_ms.saturating_sub(view.last_report_ms) > SILENT_MS
}

/// Says what a job costs on a worker, or `None` if it is full.
fn offer(
    config: &Config,
    prefixes: &Prefixes,
    agent: &NodeId,
    view: &AgentView,
    worker: &WorkerReport,
    ask: &Ask<'_>,
) -> Option<Offer> {
    let ours = view.in_flight.get(&worker.worker).copied().unwrap_or(0);
    // The report counts ours as well, only later: the larger number is the nearer one.
    let (jobs, max_batch) = (worker.load.jobs().max(ours), worker.places());
    let (batches, per_agent) = match ask.class {
        Class::Urgent => (BATCHES_PER_WORKER + URGENT_BATCHES, JOBS_PER_AGENT + URGENT_PER_AGENT),
        Class::Interactive | Class::Batch => (BATCHES_PER_WORKER, JOBS_PER_AGENT),
    };
    if u64::from(jobs) >= batches * u64::from(max_batch) || view.jobs() >= per_agent {
        return None;
    }
    let blocks = prefixes.held(agent, &worker.worker, ask.names, ask.now_ms);
    // The last token is always computed: the next one is drawn from what it gives.
    let cached_tokens = ((blocks * BLOCK) as u32).min(ask.tokens.saturating_sub(1));
    let load = u64::from(jobs) * FULL_BATCH_TOKENS / u64::from(max_batch);
    let late = ask.now_ms.saturating_sub(view.last_report_ms) > LATE_MS;
    let leaving = config.standing(agent).is_some()
        || config.plan.workers.get(&worker.worker).is_some_and(|placement| placement.retiring_ms.is_some());
    Some(Offer {
        worker: worker.worker.clone(),
        cached_tokens,
        jobs,
        max_batch,
        cost: u64::from(ask.tokens - cached_tokens) + load,
        inexact: ask.numerics.is_some() && ask.numerics != worker.numerics,
        doubtful: late || leaving || ask.avoid.contains(&worker.worker),
    })
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
            (Some(_), Some(WorkerState::Fenced)) => states.fenced += 1,
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

    /// A prompt of 125 blocks.
    const TOKENS: u32 = 2_000;

    fn names() -> Vec<Name> {
        (0..TOKENS / 16).map(|block| std::array::from_fn(|i| (block as usize * 31 + i * 7) as u8)).collect()
    }

    /// `held`: `worker:blocks` words, how many of the prompt's first blocks each holds.
    fn prefixes(fleet: &Fleet, held: &str) -> Prefixes {
        let mut prefixes = Prefixes::default();
        fleet.agents.iter().for_each(|(agent, view)| prefixes.report(agent, view.report.as_ref().unwrap()));
        for word in held.split_whitespace() {
            let (worker, blocks) = word.split_once(':').unwrap();
            prefixes.sent(&worker.parse().unwrap(), &names()[..blocks.parse().unwrap()], NOW);
        }
        prefixes
    }

    /// `wanted`: `deployment replicas` words; `plan`: `worker@agent`; `said`: `agent worker state running waiting
    /// in_flight`, one a line; `held`: see [`prefixes`].
    fn placed(
        wanted: &str,
        plan: &str,
        said: &str,
        held: &str,
        change: impl Fn(&mut Ask<'_>),
    ) -> Result<Place, NoPlace> {
        let (config, mut fleet) = (config(wanted, plan), fleet(said, NOW));
        if let Some(view) = fleet.agents.get_mut("late") {
            view.last_report_ms = NOW - LATE_MS - 1;
        }
        let (deployment, names) = ("m".parse().unwrap(), names());
        let mut ask = Ask { tokens: TOKENS, names: &names, ..Ask::any(&deployment, Hash([1; 32]), NOW) };
        ask.numerics = Some(NumericsId(1));
        change(&mut ask);
        place(&fleet, &prefixes(&fleet, held), &config, &ask)
    }

    /// Returns the place as `worker@agent`, or the reason.
    fn ask(wanted: &str, plan: &str, said: &str, avoid: &[&str], rotation: u64) -> String {
        let avoid: Vec<WorkerId> = avoid.iter().map(|worker| worker.parse().unwrap()).collect();
        let deployment = "m".parse().unwrap();
        let (config, mut fleet) = (config(wanted, plan), fleet(said, NOW));
        if let Some(view) = fleet.agents.get_mut("late") {
            view.last_report_ms = NOW - LATE_MS - 1;
        }
        let ask =
            Ask { numerics: Some(NumericsId(1)), avoid: &avoid, rotation, ..Ask::any(&deployment, Hash([1; 32]), NOW) };
        match place(&fleet, &Prefixes::default(), &config, &ask) {
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

    /// The first worker's GPU leaves it so much.
    fn with_share(said: &str, share: u8, late_ms: u64) -> Result<String, NoPlace> {
        let (config, mut fleet) = (config("m 2", "m.0@a1 m.1@a2"), fleet(said, NOW));
        let view = fleet.agents.get_mut("a1").unwrap();
        view.last_report_ms = NOW - late_ms;
        let report = view.report.as_mut().unwrap();
        report.workers[0].share = share;
        report.health.gpus = vec![crate::agents::fixture::gpu("gpu-1", izar_common::health::gpu::State::Healthy)];
        let deployment = "m".parse().unwrap();
        let ask = Ask::any(&deployment, Hash([1; 32]), NOW);
        place(&fleet, &Prefixes::default(), &config, &ask).map(|place| place.worker.to_string())
    }

    #[test]
    fn a_gpu_that_is_not_well_gets_less() {
        let said = "a1 m.0 ready 1 0 0\na2 m.1 ready 2 0 0";
        assert_eq!(with_share(said, 100, 0).unwrap(), "m.0");
        assert_eq!(with_share(said, 25, 0).unwrap(), "m.1", "one job in one place is more than two in four");
        // Eight batches of one place each.
        assert!(with_share("a1 m.0 ready 1 7 0\na2 m.1 loading 0 0 0", 25, 0).is_err());
        assert!(with_share("a1 m.0 ready 1 6 0\na2 m.1 loading 0 0 0", 25, 0).is_ok());
    }

    #[test]
    fn gpus_of_which_nothing_is_heard_get_nothing() {
        let said = "a1 m.0 ready 0 0 0\na2 m.1 loading 0 0 0";
        assert!(with_share(said, 100, SILENT_MS).is_ok());
        assert!(with_share(said, 100, SILENT_MS + 1).is_err());
    }

    #[test]
    fn equals_share_the_jobs() {
        let said = "a1 m.0 ready 1 0 0\na1 m.1 ready 1 0 0\na2 m.2 ready 1 0 0";
        let place = |i| ask("m 3", "m.0@a1 m.1@a1 m.2@a2", said, &[], i);
        let places: Vec<String> = (0..300).map(place).collect();
        for worker in ["m.0@a1", "m.1@a1", "m.2@a2"] {
            let share = places.iter().filter(|place| *place == worker).count();
            assert!((70..130).contains(&share), "{worker} got {share} of 300");
        }
        assert!((0..100).all(|i| place(i) == places[i as usize]), "the number alone draws");
    }

    #[test]
    fn two_different_ones_are_drawn_where_there_are_two() {
        for count in 1..7 {
            let mut seen = vec![0; count];
            for rotation in 0..1000 {
                let (first, second) = draw_two(rotation, count);
                assert!(first != second || count == 1);
                [first, second].into_iter().for_each(|drawn| seen[drawn] += 1);
            }
            assert!(seen.iter().all(|n| *n > 1000 / count), "{seen:?}");
        }
    }

    /// `wanted` is two replicas on two agents; `held`: see [`prefixes`].
    fn check_held(said: &str, held: &str, expected: &str) {
        let place = placed("m 2", "m.0@a1 m.1@a2", said, held, |_| ()).unwrap();
        assert_eq!(place.worker.as_str(), expected, "{said} {held}: {}", place.why);
    }

    #[test]
    fn a_cached_beginning_outweighs_some_load_and_not_more() {
        let idle = "a1 m.0 ready 0 0 0\na2 m.1 ready 0 0 0";
        check_held(idle, "m.0:60", "m.0");
        check_held(idle, "m.1:60", "m.1");
        check_held(idle, "m.0:20 m.1:60", "m.1");
        // A job in a batch of four counts 1,024 tokens.
        check_held("a1 m.0 ready 1 0 0\na2 m.1 ready 0 0 0", "m.0:125", "m.0");
        check_held("a1 m.0 ready 3 0 0\na2 m.1 ready 0 0 0", "m.0:125", "m.1");
        check_held("a1 m.0 ready 3 0 0\na2 m.1 ready 2 0 0", "m.0:125", "m.0");
    }

    #[test]
    fn what_is_within_the_slack_goes_to_the_less_loaded_one() {
        // With two jobs more it costs 2,048 more, and computes 1,999 tokens less: as good as equal, whoever is drawn first.
        let said = "a1 m.0 ready 2 0 0\na2 m.1 ready 0 0 0";
        let chosen = |i| placed("m 2", "m.0@a1 m.1@a2", said, "m.0:125", |ask| ask.rotation = i).unwrap().worker;
        assert!((0..20).all(|i| chosen(i).as_str() == "m.1"), "two of two are drawn");
    }

    #[test]
    fn exactness_and_doubt_come_before_what_is_cached() {
        let said = "a1 m.0 ready 0 0 0 other\na2 m.1 ready 3 0 0";
        check_held(said, "m.0:62", "m.1");
        let place = placed("m 2", "m.0@late m.1@a2", "late m.0 ready 0 0 0\na2 m.1 ready 3 0 0", "m.0:62", |_| ());
        assert_eq!(place.unwrap().worker.as_str(), "m.1");
    }

    #[test]
    fn a_place_says_why() {
        let said = "a1 m.0 ready 1 0 0\na2 m.1 ready 3 1 0";
        let place = placed("m 2", "m.0@a1 m.1@a2", said, "m.0:10", |_| ()).unwrap();
        assert_eq!((place.why.chosen.cached_tokens, place.why.chosen.cost), (160, 1840 + 1024));
        assert_eq!(
            place.why.to_string(),
            "m.0 (160 of 2000 tokens cached, 1 jobs for 4 places), best of 2; \
             then m.1 (0 of 2000 tokens cached, 4 jobs for 4 places)"
        );
        let alone = placed("m 1", "m.0@a1", "a1 m.0 ready 0 0 0 other", "m.0:62", |ask| ask.tokens = 992).unwrap();
        assert_eq!((alone.why.chosen.cached_tokens, &alone.why.other), (991, &None), "the last token is computed");
        assert!(alone.why.to_string().contains("with other numerics"));
    }

    #[test]
    fn an_urgent_job_finds_room_where_others_do_not() {
        let full = format!("a1 m.0 ready 4 28 0\na1 n.0 ready 0 0 {JOBS_PER_AGENT}");
        for said in ["a1 m.0 ready 4 28 0", full.as_str()] {
            let place = |class| placed("m 1", "m.0@a1", said, "", |ask| ask.class = class);
            assert!(place(Class::Urgent).is_ok(), "{said}");
            assert!(matches!(place(Class::Interactive), Err(NoPlace::AllFull { .. })), "{said}");
        }
        let full = placed("m 1", "m.0@a1", "a1 m.0 ready 4 32 0", "", |ask| ask.class = Class::Urgent);
        assert!(matches!(full, Err(NoPlace::AllFull { .. })), "even that is bounded");
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
        // Who waited for a revision that is wanted no longer.
        let (config, deployment) = (config("m 1", "m.0@a1-9! m.1@a2"), "m".parse().unwrap());
        let fleet = fleet("a1 m.0 ready 0 0 0 x\na2 m.1 ready 0 0 0", NOW);
        let place = |revision| {
            let ask = Ask::any(&deployment, Hash([revision; 32]), NOW);
            place(&fleet, &Prefixes::default(), &config, &ask).unwrap().worker.to_string()
        };
        assert_eq!((place(9).as_str(), place(1).as_str()), ("m.0", "m.1"));
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
            let ask = Ask::any(&deployment, revision, NOW);
            super::place(&fleet(said, NOW), &Prefixes::default(), &config, &ask).unwrap().worker.to_string()
        };
        assert_eq!(place("a1 m.0 ready 0 0 0\na2 m.1 ready 9 0 0"), "m.1");
        assert_eq!(place("a1 m.0 ready 0 0 0\na2 m.1 loading 0 0 0"), "m.0");
    }

    #[test]
    fn a_worker_that_the_plan_has_moved_away_gets_nothing() {
        assert_eq!(ask("m 1", "m.0@a2", "a1 m.0 ready 0 0 0\na2 m.0 ready 5 0 0", &[], 0), "m.0@a2");
    }
}
