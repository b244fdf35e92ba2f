//! What may be asked of the replicated state, and what it answers.
//!
//! A command is an intention: it carries every time and every random value it needs, and `State::apply` gives the same
//! answer for it on every member. Commands travel in batches, so that one fsync serves many requests.

use izar_common::clock::Hlc;
use izar_common::health::gpu::{Action, Hold, Outcome as Ending};
use izar_common::id::{DeploymentId, GpuId, Hash, KeyId, NodeId, ProjectId, TenantId, TurnId};
use izar_common::wire::Wire;
use serde::{Deserialize, Serialize};

use super::{Deployment, Key, Plan, Project, Standing, Tenant};
use crate::state::last_backup::LastBackup;
use crate::state::remedies::Target;
use crate::state::turns::{Opening, Outcome};
use izar_common::manifest::Manifest;

/// Commands of one controller that are decided together: one Raft entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    pub origin: Origin,
    /// Counts the batches of an origin from 1. A repeated number takes effect once.
    pub seq: u64,
    /// Every number below this is answered and will not be sent again.
    pub floor: u64,
    pub at: Hlc,
    pub commands: Vec<Command>,
}

impl Wire for Batch {
    const TYPE: u16 = 64;
    const LIMIT: usize = 8 << 20;
}

/// A controller process: the node, and how often it has started on its data directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    pub node: NodeId,
    pub incarnation: u64,
}

/// One intention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    CreateKey(Key),
    RevokeKey(KeyId),
    RegisterModel(Manifest),
    Deploy(Deployment),
    Undeploy(DeploymentId),
    /// The leader's plan: which worker runs where. `based_on` is the plan version it was computed from; an outdated
    /// one is refused.
    SetPlan {
        based_on: u64,
        plan: Plan,
    },
    OpenTurn(Opening),
    CloseTurn {
        turn: TurnId,
        outcome: Outcome,
    },
    /// Closes as abandoned what earlier incarnations of a controller left open.
    CloseOrphans {
        node: NodeId,
        before_incarnation: u64,
    },
    /// Says that the log up to here is on every voter's disk and may be dropped. Proposed by the leader, which alone
    /// knows how far the others are.
    CompactLog {
        through: u64,
    },
    /// Lets another controller go on with a turn of a key, if it has not finished: from then on only that one closes it.
    ResumeTurn {
        turn: TurnId,
        key: KeyId,
        origin: Origin,
    },
    /// Makes a tenant, or changes it.
    PutTenant(Tenant),
    /// Makes a project, or changes it; its tenant stays.
    PutProject(Project),
    /// Lets another name mean a deployment; `None` takes it away.
    SetAlias {
        alias: DeploymentId,
        deployment: Option<DeploymentId>,
    },
    /// `None`: the agent works like any other.
    SetStanding {
        agent: NodeId,
        standing: Option<Standing>,
    },
    /// Remembers what speaks against a GPU, and perhaps that it fell off the bus. Proposed by the leader.
    HoldGpu {
        agent: NodeId,
        hold: Hold,
        fell_ms: Option<u64>,
    },
    /// Lifts what is held against a GPU; quarantine only if an operator says so.
    ReleaseGpu {
        gpu: GpuId,
        reason: String,
        operator: bool,
    },
    /// A member that lost its memory begins anew: what its earlier processes still propose is refused. Also the entry
    /// behind all that they can have acknowledged (`controller/rejoin`).
    Readmit {
        node: NodeId,
    },
    /// Says that a backup was kept.
    NoteBackup(LastBackup),
    /// Orders an agent to mend GPUs; refused beyond the budget. Proposed by the leader.
    OrderRemedy {
        agent: NodeId,
        action: Action,
        gpus: Vec<Target>,
    },
    /// Says how an order ended: as its agent says, or that nothing was heard of it.
    EndRemedy {
        id: u64,
        outcome: Ending,
        reason: String,
    },
}

impl Command {
    /// Nobody waits for its reply, so it may be gathered with what comes next.
    pub fn may_ride(&self) -> bool {
        matches!(self, Command::CloseTurn { .. })
    }
    /// About how many bytes the command takes in a batch; never much less than it really takes.
    pub fn weight(&self) -> usize {
        /// Covers ids (at most 63 bytes each), numbers and hashes of any one command.
        const FIXED: usize = 640;
        /// A worker of a plan: two names of at most 63 bytes and a worker's, a hash, options.
        const WORKER: usize = 320;
        /// A GPU of an order: its identity and an index.
        const TARGET: usize = 80;
        FIXED
            + match self {
                Command::CreateKey(key) => key.note.len(),
                Command::RegisterModel(manifest) => {
                    let files = manifest.all_files().map(|file| file.name.len() + 64).sum::<usize>();
                    files + manifest.name.len() + manifest.architecture.len()
                }
                Command::Deploy(deployment) => {
                    deployment.constraints.labels.iter().map(|(key, value)| key.len() + value.len() + 20).sum()
                }
                Command::SetPlan { plan, .. } => plan.workers.len() * WORKER,
                Command::CloseTurn { outcome: Outcome::Failed { reason, .. }, .. } => reason.len(),
                Command::HoldGpu { hold, .. } => hold.reason.len() + hold.boot.len(),
                Command::NoteBackup(backup) => backup.kept_as.len(),
                Command::ReleaseGpu { reason, .. } | Command::EndRemedy { reason, .. } => reason.len(),
                Command::OrderRemedy { gpus, .. } => gpus.len() * TARGET,
                _ => 0,
            }
    }
}

/// What a command came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Refused(Refusal),
}

/// Why the state refused a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error("there is no key {0}")]
    UnknownKey(KeyId),
    #[error("key {0} exists already")]
    KeyExists(KeyId),
    #[error("key {0} is revoked")]
    KeyRevoked(KeyId),
    #[error("there is no project {0}")]
    UnknownProject(String),
    #[error("there is no model revision {0}")]
    UnknownModel(Hash),
    #[error("there is no deployment {0}")]
    UnknownDeployment(DeploymentId),
    #[error("turn {0} is recorded already")]
    TurnExists(TurnId),
    #[error("there is no open turn {0}")]
    UnknownTurn(TurnId),
    #[error("there is no tenant {0}")]
    UnknownTenant(TenantId),
    #[error("project {project} belongs to tenant {tenant}")]
    OtherTenant { project: ProjectId, tenant: TenantId },
    #[error("there is no alias {0}")]
    UnknownAlias(DeploymentId),
    #[error("{0} is a deployment")]
    IsDeployment(DeploymentId),
    #[error("{0} is an alias; take it away first (izar models unalias {0})")]
    IsAlias(DeploymentId),
    #[error("alias {alias} points to {deployment}; point it elsewhere or take it away first")]
    HasAlias { alias: DeploymentId, deployment: DeploymentId },
    #[error("the plan was computed from an older one")]
    OutdatedPlan,
    #[error("the limit of {limit} {what} is reached")]
    Full { what: String, limit: u64 },
    #[error("the same request was begun as turn {0}")]
    Repeats(TurnId),
    #[error("another request with this idempotency key was begun as turn {0}")]
    OtherRequest(TurnId),
    #[error("nothing is held against GPU {0}; see: izar gpus")]
    NotHeld(GpuId),
    #[error("GPU {0} is quarantined: only an operator releases it")]
    Quarantined(GpuId),
    #[error("as many agents are under a remedy as may be")]
    BudgetSpent,
    #[error("GPU {0} is not held as it was when its remedy was chosen")]
    HeldOtherwise(GpuId),
    #[error("GPU {0} was to be mended too often")]
    TooOften(GpuId),
    #[error("no remedy {0} is under way")]
    UnknownRemedy(u64),
}
