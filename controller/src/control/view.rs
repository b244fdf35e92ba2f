//! What the admin socket shows: the JSON shapes that `izar` and scripts read, and how they come from the state and the
//! fleet. Pure.
//!
//! Field names stay; new ones may come. Times are Unix milliseconds.

use std::collections::BTreeMap;

use izar_common::chat::{Finish, Usage};
use izar_common::health::{Generation, Machine, WorkerReport, WorkerState};
use izar_common::id::{DeploymentId, Hash, KeyId, NodeId, NumericsId, ProjectId, TurnId, WorkerId};
use izar_common::manifest::{Kind, Manifest};
use izar_common::wire::agent::{Activations, CacheType, Device, Kernels, Quant};
use serde::{Deserialize, Serialize};

use crate::fleet::{AgentView, Fleet};
use crate::gateway::Running;
use crate::gateway::trace::Trace;
use crate::planner;
use crate::raft::Leadership;
use crate::state::last_backup::LastBackup;
use crate::state::remedies::Remedy;
use crate::state::turns::{Outcome, Turn};
use crate::state::{Config, Constraints, Deployment, Key, KeyStatus, Model, Placement, Project, Standing, Tenant};

/// `GET /v1/status`. Answered without a quorum, too: then `leader` is null.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub node: NodeId,
    pub version: String,
    /// `leader`, `follower`, or `alone` while no leader is known.
    pub role: String,
    pub leader: Option<NodeId>,
    pub term: u64,
    /// The last entry that this node applied.
    pub applied: u64,
    /// The number of the cluster's life: 1, and a higher one after every restore.
    #[serde(default)]
    pub incarnation: u64,
    pub members: Vec<Member>,
    pub api: Api,
    pub agents: Vec<AgentSummary>,
    pub deployments: Vec<DeploymentSummary>,
    /// Requests that run on this controller.
    pub running: usize,
    /// Clients are told to move on to another controller.
    #[serde(default)]
    pub draining: bool,
    /// Members that this node cannot reach.
    #[serde(default)]
    pub away: Vec<Away>,
    /// The latest time that a controller has put on a record.
    #[serde(default)]
    pub latest_ms: u64,
    /// The newest backup that was kept anywhere, as far as this node knows.
    #[serde(default)]
    pub last_backup: Option<LastBackup>,
    /// What was turned away since the start: peers by their certificate, role or schema (`peers`), callers of this
    /// socket (`admin`).
    pub refused: BTreeMap<String, u64>,
}

/// `GET /v1/peers`: the other controllers, asked just now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Peers {
    pub peers: Vec<Peer>,
}

/// Another controller. `None`: it did not answer, or does not know the question.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Peer {
    pub node: NodeId,
    pub version: Option<String>,
    /// How far its clock is ahead of the asked controller's; negative: behind.
    pub ahead_ms: Option<i64>,
}

/// `POST /v1/drain` and `POST /v1/undrain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Drain {
    pub node: NodeId,
    pub draining: bool,
    pub leader: Option<NodeId>,
    /// Requests that run on this controller.
    pub running: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Member {
    pub node: NodeId,
    pub address: String,
}

/// A member that cannot be reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Away {
    pub node: NodeId,
    pub for_ms: u64,
}

/// Where this controller serves the API.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Api {
    pub endpoint: String,
    pub plaintext_endpoint: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentSummary {
    pub agent: NodeId,
    pub connected: bool,
    pub workers: usize,
    pub ready: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeploymentSummary {
    pub name: DeploymentId,
    pub revision: Hash,
    pub wanted: u32,
    pub ready: u32,
}

/// A key, without its secret.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyView {
    pub id: KeyId,
    pub project: ProjectId,
    pub status: KeyStatus,
    pub max_concurrent: u32,
    pub created_ms: u64,
    pub note: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Keys {
    pub keys: Vec<KeyView>,
}

/// The answer to `POST /v1/keys`: the only time that the key itself is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatedKey {
    pub key: String,
    #[serde(flatten)]
    pub view: KeyView,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelView {
    pub revision: Hash,
    pub name: String,
    pub kind: Kind,
    pub architecture: String,
    pub context: u32,
    pub vocabulary: u32,
    /// All its files together.
    pub bytes: u64,
    pub registered_ms: u64,
    /// Whether all its files lie on this controller.
    pub here: bool,
    /// The deployments that serve it.
    pub deployments: Vec<DeploymentId>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Models {
    pub models: Vec<ModelView>,
}

/// A deployment: what is wanted, and what is reached replica by replica.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeploymentView {
    pub name: DeploymentId,
    pub revision: Hash,
    /// The name of the model.
    pub model: String,
    /// Replicas wanted.
    pub wanted: u32,
    /// Replicas that serve now what is wanted: this revision, computed in this way.
    pub ready: u32,
    pub max_batch: u32,
    /// 0: what the model was made for.
    pub max_context: u32,
    pub quant: Quant,
    pub kernels: Kernels,
    pub device: Device,
    pub activations: Activations,
    pub cache_type: CacheType,
    /// Memory of each replica for keys and values; the default is put in.
    pub cache_bytes: u64,
    pub constraints: Constraints,
    /// Other names that mean it.
    pub aliases: Vec<DeploymentId>,
    /// Replicas that have no place yet.
    pub unplaced: u32,
    /// Why they have none; empty while a place is on its way.
    pub unmet: String,
    pub workers: Vec<ReplicaView>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Deployments {
    pub deployments: Vec<DeploymentView>,
}

/// A replica of a deployment: planned, reported, or both.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplicaView {
    pub worker: WorkerId,
    pub agent: NodeId,
    pub state: ReplicaState,
    pub pid: Option<u32>,
    pub restarts: u32,
    /// The revision that it runs.
    pub revision: Hash,
    /// It serves until what is wanted now is ready in its place.
    pub outdated: bool,
    /// It only ends what it has begun.
    pub retiring: bool,
    /// What computes it, once it is ready: replicas with one id give the same answers to the bit.
    pub numerics: Option<NumericsId>,
    /// Why it is not ready, in words; may be empty.
    pub detail: String,
}

/// What is known of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// Planned on an agent that is connected and has not spoken of it.
    Assigned,
    /// Planned on an agent that is not connected.
    AgentAway,
    Fetching,
    Loading,
    Ready,
    Backoff,
    /// Ready, and its GPU or its server is not sound.
    Fenced,
}

impl From<WorkerState> for ReplicaState {
    fn from(state: WorkerState) -> Self {
        match state {
            WorkerState::Fetching => Self::Fetching,
            WorkerState::Loading => Self::Loading,
            WorkerState::Ready => Self::Ready,
            WorkerState::Backoff => Self::Backoff,
            WorkerState::Fenced => Self::Fenced,
        }
    }
}

impl std::fmt::Display for ReplicaState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Assigned => "assigned",
            Self::AgentAway => "agent away",
            Self::Fetching => "fetching",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Backoff => "back-off",
            Self::Fenced => "fenced",
        })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentDetail {
    pub agent: NodeId,
    pub connected: bool,
    /// When it last reported or connected.
    pub last_report_ms: u64,
    pub pid: Option<u32>,
    pub version: Option<String>,
    pub cores: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub gpus: Option<u32>,
    pub labels: BTreeMap<String, String>,
    /// When its certificates expire, and the room on its disk.
    pub machine: Option<Machine>,
    /// What an operator has said of it: `cordoned` or `draining`.
    pub standing: Option<Standing>,
    /// The order that it has about its GPUs: it is emptied for it.
    pub remedy: Option<Remedy>,
    /// Workers that the plan has on it.
    pub planned: usize,
    /// The assignment that it works on.
    pub generation: Option<Generation>,
    /// Jobs of this controller on it.
    pub jobs: u32,
    pub workers: Vec<WorkerReport>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Agents {
    pub agents: Vec<AgentDetail>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tenants {
    pub tenants: Vec<Tenant>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Projects {
    pub projects: Vec<Project>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Requests {
    /// Oldest first.
    pub requests: Vec<Running>,
}

/// `GET /v1/requests/{id}`: a request's record, and what each controller knows of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explained {
    pub turn: TurnId,
    /// Its record, unless it was refused or is forgotten.
    pub record: Option<TurnView>,
    /// Oldest first.
    pub stories: Vec<Story>,
    /// Controllers that could not be asked.
    pub unreachable: Vec<NodeId>,
}

/// What happened to a request on one controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Story {
    pub node: NodeId,
    #[serde(flatten)]
    pub trace: Trace,
}

/// A turn, flat.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TurnView {
    pub turn: TurnId,
    pub project: ProjectId,
    pub key: KeyId,
    pub deployment: DeploymentId,
    pub revision: Hash,
    pub stream: bool,
    /// The controller that took it.
    pub node: NodeId,
    pub opened_ms: u64,
    pub closed_ms: Option<u64>,
    /// `running`, `finished`, `cancelled`, `failed` or `abandoned`.
    pub outcome: String,
    pub finish: Option<Finish>,
    pub reason: Option<String>,
    /// Counted at the opening, so it is there while the turn runs.
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    pub completion_tokens: u32,
    /// Part of the answer was computed by other numerics than its beginning.
    pub inexact: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Turns {
    /// Newest first.
    pub turns: Vec<TurnView>,
}

impl From<&Key> for KeyView {
    fn from(key: &Key) -> Self {
        Self {
            id: key.id.clone(),
            project: key.project.clone(),
            status: key.status,
            max_concurrent: key.max_concurrent,
            created_ms: key.created.ms(),
            note: key.note.clone(),
        }
    }
}

impl From<&Turn> for TurnView {
    fn from(turn: &Turn) -> Self {
        let opening = &turn.opening;
        let (outcome, finish, reason, usage) = match turn.closed.as_ref().map(|(_, outcome)| outcome) {
            None => ("running", None, None, Usage::default()),
            Some(Outcome::Finished { finish, usage, .. }) => ("finished", Some(*finish), None, *usage),
            Some(Outcome::Cancelled { usage }) => ("cancelled", None, None, *usage),
            Some(Outcome::Failed { reason, usage }) => ("failed", None, Some(reason.clone()), *usage),
            Some(Outcome::Abandoned) => ("abandoned", None, None, Usage::default()),
        };
        let inexact = matches!(turn.closed, Some((_, Outcome::Finished { inexact: true, .. })));
        Self {
            turn: opening.turn,
            project: opening.project.clone(),
            key: opening.key.clone(),
            deployment: opening.deployment.clone(),
            revision: opening.revision,
            stream: opening.stream,
            node: opening.origin.node.clone(),
            opened_ms: turn.opened.ms(),
            closed_ms: turn.closed.as_ref().map(|(at, _)| at.ms()),
            outcome: outcome.to_owned(),
            finish,
            reason,
            prompt_tokens: opening.prompt_tokens,
            max_tokens: opening.max_tokens,
            completion_tokens: usage.completion_tokens,
            inexact,
        }
    }
}

/// Shows a model; `here` says whether a file lies on this controller.
pub fn model(model: &Model, config: &Config, here: impl Fn(&Hash) -> bool) -> ModelView {
    let manifest: &Manifest = &model.manifest;
    let serving = config.deployments.values().filter(|d| d.revision == model.revision);
    ModelView {
        revision: model.revision,
        name: manifest.name.clone(),
        kind: manifest.kind.clone(),
        architecture: manifest.architecture.clone(),
        context: manifest.context,
        vocabulary: manifest.vocabulary,
        bytes: manifest.all_files().map(|f| f.bytes).sum(),
        registered_ms: model.registered.ms(),
        here: manifest.all_files().all(|f| here(&f.hash)),
        deployments: serving.map(|d| d.id.clone()).collect(),
    }
}

/// Compares what a deployment wants with what the plan gives it and what agents say.
pub fn deployment(wanted: &Deployment, config: &Config, fleet: &Fleet) -> DeploymentView {
    let workers: Vec<ReplicaView> = config
        .plan
        .workers
        .iter()
        .filter(|(_, place)| place.deployment == wanted.id)
        .map(|(worker, place)| replica(worker, place, wanted, fleet.agents.get(&place.agent)))
        .collect();
    let serves = |w: &&ReplicaView| !w.outdated && !w.retiring;
    let ready = workers.iter().filter(serves).filter(|w| w.state == ReplicaState::Ready).count() as u32;
    let placed = workers.iter().filter(serves).count() as u32;
    let aliases = config.aliases.iter().filter(|(_, to)| **to == wanted.id).map(|(alias, _)| alias.clone()).collect();
    let model = config.models.get(&wanted.revision).map_or_else(String::new, |m| m.manifest.name.clone());
    DeploymentView {
        name: wanted.id.clone(),
        revision: wanted.revision,
        model,
        wanted: wanted.replicas,
        ready,
        max_batch: wanted.engine.max_batch,
        max_context: wanted.engine.max_context,
        quant: wanted.engine.quant,
        kernels: wanted.engine.kernels,
        device: wanted.engine.device,
        activations: wanted.engine.activations,
        cache_type: wanted.engine.cache,
        cache_bytes: wanted.engine.cache_budget(),
        constraints: wanted.constraints.clone(),
        aliases,
        unplaced: wanted.replicas.saturating_sub(placed),
        unmet: planner::unmet(config, fleet, wanted).unwrap_or_default(),
        workers,
    }
}

fn replica(worker: &WorkerId, place: &Placement, wanted: &Deployment, view: Option<&AgentView>) -> ReplicaView {
    let connected = view.is_some_and(|v| v.connected);
    let report = view.and_then(|v| v.workers().iter().find(|r| r.worker == *worker)).filter(|_| connected);
    let (state, detail) = match report {
        None if connected => (ReplicaState::Assigned, String::new()),
        None => (ReplicaState::AgentAway, String::new()),
        Some(report) if report.revision != place.revision => {
            (ReplicaState::Assigned, format!("still runs revision {}", report.revision))
        }
        Some(report) => (report.state.into(), report.detail.clone()),
    };
    ReplicaView {
        worker: worker.clone(),
        agent: place.agent.clone(),
        state,
        revision: place.revision,
        outdated: place.retiring_ms.is_none() && !planner::is_twin(place, wanted),
        retiring: place.retiring_ms.is_some(),
        pid: report.and_then(|r| r.pid),
        restarts: report.map_or(0, |r| r.restarts),
        numerics: report.and_then(|r| r.numerics),
        detail,
    }
}

/// Shows an agent whole.
pub fn agent(id: &NodeId, view: &AgentView, config: &Config) -> AgentDetail {
    let report = view.report.as_ref();
    AgentDetail {
        agent: id.clone(),
        connected: view.connected,
        last_report_ms: view.last_report_ms,
        pid: report.map(|r| r.pid),
        version: report.map(|r| r.version.clone()),
        cores: report.map(|r| r.cores),
        memory_bytes: report.map(|r| r.memory_bytes),
        gpus: report.map(|r| r.gpus),
        labels: report.map(|r| r.labels.clone()).unwrap_or_default(),
        machine: view.machine,
        standing: config.standings.get(id).copied(),
        remedy: config.remedy_of(id).cloned(),
        planned: config.plan.workers.values().filter(|place| place.agent == *id).count(),
        generation: report.map(|r| r.generation),
        jobs: view.jobs(),
        workers: view.workers().iter().map(|worker| told(view, worker)).collect(),
    }
}

/// A worker as its agent says, with what this controller has noticed of it.
fn told(view: &AgentView, worker: &WorkerReport) -> WorkerReport {
    let mut worker = worker.clone();
    if let Some(reason) = view.slow.get(&worker.worker).filter(|_| worker.detail.is_empty()) {
        worker.detail = format!("slow: {reason}");
    }
    worker
}

/// Shows an agent in a line. Of an agent that is away nothing is known to be ready.
pub fn agent_summary(id: &NodeId, view: &AgentView) -> AgentSummary {
    let ready = view.workers().iter().filter(|w| w.state == WorkerState::Ready).count();
    AgentSummary {
        agent: id.clone(),
        connected: view.connected,
        workers: view.workers().len(),
        ready: if view.connected { ready } else { 0 },
    }
}

/// A node's part in its Raft group, in a word.
pub fn role(leadership: &Leadership) -> &'static str {
    match (&leadership.leader, leadership.here) {
        (_, true) => "leader",
        (Some(_), false) => "follower",
        (None, false) => "alone",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::health::{Load, Report};

    const REVISION: Hash = Hash([1; 32]);

    fn wanted(replicas: u32) -> Deployment {
        let id = DeploymentId::new("echo").unwrap();
        let (engine, constraints) = Default::default();
        Deployment { id, revision: REVISION, replicas, engine, constraints }
    }

    fn config(places: &[(&str, &str)]) -> Config {
        let mut config = Config::default();
        for (worker, agent) in places {
            let (agent, engine) = (NodeId::new(agent).unwrap(), Default::default());
            let place = Placement { deployment: wanted(1).id, agent, revision: REVISION, engine, retiring_ms: None };
            config.plan.workers.insert(WorkerId::new(worker).unwrap(), place);
        }
        config
    }

    fn report(worker: &str, state: WorkerState, revision: Hash) -> WorkerReport {
        WorkerReport {
            worker: WorkerId::new(worker).unwrap(),
            deployment: wanted(1).id,
            revision,
            state,
            pid: Some(7),
            load: Load::default(),
            max_batch: 32,
            restarts: 1,
            numerics: Some(NumericsId(0x17)),
            detail: String::new(),
            share: 100,
        }
    }

    fn agent_with(connected: bool, workers: Vec<WorkerReport>) -> AgentView {
        let report = Report {
            generation: Generation::default(),
            pid: 5,
            version: "0.1.0".into(),
            cores: 2,
            memory_bytes: 1,
            gpus: 0,
            labels: Default::default(),
            workers,
            health: Default::default(),
        };
        AgentView { connected, last_report_ms: 1, report: Some(report), ..AgentView::default() }
    }

    fn fleet(agents: Vec<(&str, AgentView)>) -> Fleet {
        let agents = agents.into_iter().map(|(id, view)| (NodeId::new(id).unwrap(), view)).collect();
        Fleet { since_ms: 0, agents }
    }

    #[test]
    fn wanted_and_reached_are_compared_replica_by_replica() {
        let config = config(&[("echo.0", "a1"), ("echo.1", "a2"), ("echo.2", "a3"), ("echo.3", "a1")]);
        let fleet = fleet(vec![
            ("a1", agent_with(true, vec![report("echo.0", WorkerState::Ready, REVISION)])),
            ("a2", agent_with(true, vec![report("echo.1", WorkerState::Ready, Hash([2; 32]))])),
            ("a3", agent_with(false, vec![report("echo.2", WorkerState::Ready, REVISION)])),
        ]);
        let view = deployment(&wanted(5), &config, &fleet);
        let states: Vec<ReplicaState> = view.workers.iter().map(|w| w.state).collect();
        use ReplicaState::{AgentAway, Assigned, Ready};
        assert_eq!(states, [Ready, Assigned, AgentAway, Assigned]);
        assert_eq!((view.wanted, view.ready, view.unplaced), (5, 1, 1));
        assert!(view.workers[1].detail.contains("still runs"));
        assert_eq!(view.workers[2].pid, None);
        assert_eq!((view.workers[0].numerics, view.workers[3].numerics), (Some(NumericsId(0x17)), None));
        assert_eq!(view.cache_bytes, 512 << 20);
    }

    #[test]
    fn what_computes_in_another_way_than_wanted_is_not_what_is_reached() {
        let config = config(&[("echo.0", "a1")]);
        let fleet = fleet(vec![("a1", agent_with(true, vec![report("echo.0", WorkerState::Ready, REVISION)]))]);
        let mut wanted = wanted(1);
        assert_eq!(deployment(&wanted, &config, &fleet).ready, 1);
        wanted.engine.max_batch += 1;
        let view = deployment(&wanted, &config, &fleet);
        assert_eq!((view.ready, view.unplaced, view.workers[0].outdated), (0, 1, true));
    }

    #[test]
    fn nothing_is_ready_on_an_agent_that_is_away() {
        let view = agent_with(false, vec![report("echo.0", WorkerState::Ready, REVISION)]);
        let summary = agent_summary(&NodeId::new("a1").unwrap(), &view);
        assert_eq!((summary.workers, summary.ready), (1, 0));
    }

    #[test]
    fn a_role_is_a_word() {
        let node = NodeId::new("c1").unwrap();
        let of = |leader, here| role(&Leadership { leader, term: 1, here });
        assert_eq!(of(Some(node.clone()), true), "leader");
        assert_eq!(of(Some(node), false), "follower");
        assert_eq!(of(None, false), "alone");
    }
}
