//! The replicated state: `apply(batch) -> (replies, changes)`, the same on every member.
//!
//! Pure: no clock, no randomness, no float, no I/O. `store` keeps its rows on disk; `raft` alone calls `apply`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, RwLock};

use izar_common::clock::Hlc;
use izar_common::health::gpu;
use izar_common::id::{DeploymentId, GpuId, Hash, KeyId, NodeId, ProjectId, SiteId, TenantId, TurnId};

pub mod audit;
pub mod command;
mod dedupe;
pub mod gpus;
pub mod last_backup;
pub mod models;
pub mod rebirth;
pub mod remedies;
pub mod rows;
pub mod store;
pub mod tenants;
pub mod turns;

use command::{Batch, Command, Origin, Refusal, Reply};
use dedupe::Origins;
pub use gpus::GpuRecord;
use izar_common::manifest::Manifest;
use last_backup::LastBackup;
pub use models::{Constraints, Deployment, Model, Placement, Plan, Standing};
use remedies::Remedy;
use rows::{Head, Row};
pub use tenants::{Key, KeyStatus, Project, Tenant};
use turns::{Opening, Outcome, Turn, Turns};

/// Keys of a site, revoked ones included: every member holds them all in memory, and copies them on a change.
pub const KEY_LIMIT: usize = 10_000;
/// Registered model revisions of a site.
pub const MODEL_LIMIT: usize = 1_000;
/// Deployments of a site.
pub const DEPLOYMENT_LIMIT: usize = 1_000;
/// Replicas of one deployment; with the deployments' limit it bounds a plan.
pub const REPLICA_LIMIT: u32 = 1_000;
/// Tenants, and projects, of a site.
pub const TENANT_LIMIT: usize = 1_000;
pub const PROJECT_LIMIT: usize = 10_000;
/// Other names of deployments.
pub const ALIAS_LIMIT: usize = 1_000;
/// Agents of which an operator has said something.
pub const STANDING_LIMIT: usize = 1_024;
/// Workers of a plan: a plan is one command and must fit into an entry.
pub const WORKER_LIMIT: usize = 5_000;

/// Which sequence of changes a change belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// What operators decided, and the leader's plan.
    Config,
    Turn,
    Audit,
}

/// One thing that became different. `seq` counts the changes of a site's stream from 1 without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub site: SiteId,
    pub stream: Stream,
    pub seq: u64,
    pub at: Hlc,
    pub what: What,
}

/// What became different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    KeyCreated(Key),
    KeyRevoked(KeyId),
    ModelRegistered(Model),
    Deployed(Deployment),
    Undeployed(DeploymentId),
    Planned(Plan),
    TurnOpened(Opening),
    TurnClosed { turn: TurnId, outcome: Outcome },
    TurnResumed { turn: TurnId, origin: Origin },
    Audited(audit::Event),
    TenantSet(Tenant),
    ProjectSet(Project),
    AliasSet { alias: DeploymentId, deployment: Option<DeploymentId> },
    StandingSet { agent: NodeId, standing: Option<Standing> },
    GpuNoted(GpuRecord),
    RemedyOrdered(Remedy),
    RemedyEnded { id: u64, outcome: gpu::Outcome },
}

/// What a batch came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// The batch was applied before, or its origin has begun anew: nothing happened.
    pub ignored: bool,
    /// One for each command, in order; none if the batch was ignored.
    pub replies: Vec<Reply>,
    pub changes: Vec<Change>,
    /// The rows that must be stored again, sorted, each once.
    pub touched: Vec<Row>,
}

/// A fingerprint of the state at an index of the log. Members that have applied as much have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    pub applied: u64,
    pub hash: Hash,
}

/// Everything that is replicated, in memory.
#[derive(Debug)]
pub struct State {
    site: SiteId,
    head: Head,
    tenants: BTreeMap<TenantId, Tenant>,
    projects: BTreeMap<ProjectId, Project>,
    keys: BTreeMap<KeyId, Key>,
    models: BTreeMap<Hash, Model>,
    deployments: BTreeMap<DeploymentId, Deployment>,
    aliases: BTreeMap<DeploymentId, DeploymentId>,
    standings: BTreeMap<NodeId, Standing>,
    gpus: BTreeMap<GpuId, GpuRecord>,
    /// By their ids.
    remedies: BTreeMap<u64, Remedy>,
    plan: Plan,
    last_backup: Option<LastBackup>,
    turns: Turns,
    origins: Origins,
    /// Index of the last entry that was applied. Not part of the rows: the store keeps it.
    applied: u64,
}

impl State {
    /// The state every site begins with: one tenant and one project, named `default`.
    pub fn new(site: SiteId) -> Self {
        let tenant = Tenant::new(TenantId::new(tenants::DEFAULT).expect("a valid name"));
        let project = Project::new(ProjectId::new(tenants::DEFAULT).expect("a valid name"), tenant.id.clone());
        Self {
            head: Head::new(site.clone()),
            site,
            tenants: BTreeMap::from([(tenant.id.clone(), tenant)]),
            projects: BTreeMap::from([(project.id.clone(), project)]),
            keys: BTreeMap::new(),
            models: BTreeMap::new(),
            deployments: BTreeMap::new(),
            aliases: BTreeMap::new(),
            standings: BTreeMap::new(),
            gpus: BTreeMap::new(),
            remedies: BTreeMap::new(),
            plan: Plan::default(),
            last_backup: None,
            turns: Turns::default(),
            origins: Origins::default(),
            applied: 0,
        }
    }

    /// Applies the batch of the entry at `index`.
    ///
    /// Panics if an index does not follow the last one: entries come in order, each once.
    pub fn apply(&mut self, index: u64, batch: &Batch) -> Applied {
        self.pass(index);
        let mut step = Step { at: batch.at, index, applied: Applied::default() };
        step.touch(Row::Head);
        step.touch(Row::Origin(batch.origin.node.clone()));
        if !self.origins.admit(batch) {
            step.applied.ignored = true;
        } else {
            self.head.latest = self.head.latest.max(batch.at);
            for command in &batch.commands {
                let reply = match self.run(&mut step, &batch.origin, command) {
                    Ok(()) => Reply::Done,
                    Err(refusal) => Reply::Refused(refusal),
                };
                step.applied.replies.push(reply);
            }
        }
        step.applied.touched.sort_unstable();
        step.applied.touched.dedup();
        step.applied
    }

    /// Passes over an entry that holds no batch (each new leader writes one).
    pub fn pass(&mut self, index: u64) {
        assert_eq!(index, self.applied + 1, "entries are applied in order");
        self.applied = index;
    }

    fn run(&mut self, step: &mut Step, proposer: &Origin, command: &Command) -> Result<(), Refusal> {
        match command {
            Command::CreateKey(key) => self.create_key(step, key),
            Command::RevokeKey(id) => self.revoke_key(step, id),
            Command::RegisterModel(manifest) => self.register(step, manifest),
            Command::Deploy(deployment) => self.deploy(step, deployment),
            Command::Undeploy(id) => self.undeploy(step, id),
            Command::SetPlan { based_on, plan } => self.set_plan(step, *based_on, plan),
            Command::OpenTurn(opening) => self.open_turn(step, opening),
            Command::CloseTurn { turn, outcome } => {
                // Whoever lost a turn to another controller has nothing to say of its end.
                match self.turns.get(turn) {
                    Some(open) if open.turn.opening.origin == *proposer => {
                        self.close_turn(step, *turn, outcome.clone())
                    }
                    _ => Err(Refusal::UnknownTurn(*turn)),
                }
            }
            Command::ResumeTurn { turn, key, origin } => {
                if self.turns.resume(*turn, key, origin)? {
                    step.touch(Row::Turn(*turn));
                    self.change(step, Stream::Turn, What::TurnResumed { turn: *turn, origin: origin.clone() });
                    self.audit(step, audit::Event::TurnResumed { turn: *turn, node: origin.node.clone() });
                }
                Ok(())
            }
            Command::CloseOrphans { node, before_incarnation } => {
                for turn in self.turns.orphans(node, *before_incarnation) {
                    self.close_turn(step, turn, Outcome::Abandoned)?;
                }
                Ok(())
            }
            Command::PutTenant(tenant) => self.put_tenant(step, tenant),
            Command::PutProject(project) => self.put_project(step, project),
            Command::SetAlias { alias, deployment } => self.set_alias(step, alias, deployment.as_ref()),
            Command::SetStanding { agent, standing } => self.set_standing(step, agent, *standing),
            Command::HoldGpu { agent, hold, fell_ms } => self.hold_gpu(step, agent, hold, *fell_ms),
            Command::ReleaseGpu { gpu, reason, operator } => self.release_gpu(step, gpu, reason, *operator),
            Command::Readmit { node } => {
                self.origins.readmit(node);
                step.touch(Row::Origin(node.clone()));
                self.audit(step, audit::Event::MemberReadmitted { node: node.clone() });
                Ok(())
            }
            Command::NoteBackup(backup) => {
                self.note_backup(step, backup);
                Ok(())
            }
            Command::OrderRemedy { agent, action, gpus } => self.order_remedy(step, agent, *action, gpus),
            Command::EndRemedy { id, outcome, reason } => self.end_remedy(step, *id, *outcome, reason),
            Command::CompactLog { through } => {
                self.head.compacted = self.head.compacted.max((*through).min(step.index));
                Ok(())
            }
        }
    }

    fn create_key(&mut self, step: &mut Step, key: &Key) -> Result<(), Refusal> {
        if !self.projects.contains_key(&key.project) {
            return Err(Refusal::UnknownProject(key.project.to_string()));
        }
        if self.keys.contains_key(&key.id) {
            return Err(Refusal::KeyExists(key.id.clone()));
        }
        full(self.keys.len(), KEY_LIMIT, "keys")?;
        self.keys.insert(key.id.clone(), key.clone());
        step.touch(Row::Key(key.id.clone()));
        self.config(step, What::KeyCreated(key.clone()));
        self.audit(step, audit::Event::KeyCreated { key: key.id.clone(), project: key.project.clone() });
        Ok(())
    }

    fn revoke_key(&mut self, step: &mut Step, id: &KeyId) -> Result<(), Refusal> {
        let key = self.keys.get_mut(id).ok_or_else(|| Refusal::UnknownKey(id.clone()))?;
        if key.status == KeyStatus::Revoked {
            return Ok(());
        }
        key.status = KeyStatus::Revoked;
        step.touch(Row::Key(id.clone()));
        self.config(step, What::KeyRevoked(id.clone()));
        self.audit(step, audit::Event::KeyRevoked { key: id.clone() });
        Ok(())
    }

    fn register(&mut self, step: &mut Step, manifest: &Manifest) -> Result<(), Refusal> {
        let revision = manifest.revision();
        if self.models.contains_key(&revision) {
            return Ok(());
        }
        full(self.models.len(), MODEL_LIMIT, "models")?;
        let model = Model { revision, manifest: manifest.clone(), registered: step.at };
        self.models.insert(revision, model.clone());
        step.touch(Row::Model(revision));
        self.config(step, What::ModelRegistered(model));
        self.audit(step, audit::Event::ModelRegistered { revision, name: manifest.name.clone() });
        Ok(())
    }

    fn deploy(&mut self, step: &mut Step, deployment: &Deployment) -> Result<(), Refusal> {
        if !self.models.contains_key(&deployment.revision) {
            return Err(Refusal::UnknownModel(deployment.revision));
        }
        if deployment.replicas > REPLICA_LIMIT {
            return Err(Refusal::Full { what: "replicas of a deployment".into(), limit: u64::from(REPLICA_LIMIT) });
        }
        if self.aliases.contains_key(&deployment.id) {
            return Err(Refusal::IsAlias(deployment.id.clone()));
        }
        match self.deployments.get(&deployment.id) {
            Some(same) if same == deployment => return Ok(()),
            Some(_) => {}
            None => full(self.deployments.len(), DEPLOYMENT_LIMIT, "deployments")?,
        }
        self.deployments.insert(deployment.id.clone(), deployment.clone());
        step.touch(Row::Deployment(deployment.id.clone()));
        self.config(step, What::Deployed(deployment.clone()));
        let Deployment { id, revision, replicas, .. } = deployment.clone();
        self.audit(step, audit::Event::Deployed { deployment: id, revision, replicas });
        Ok(())
    }

    fn undeploy(&mut self, step: &mut Step, id: &DeploymentId) -> Result<(), Refusal> {
        if let Some((alias, _)) = self.aliases.iter().find(|(_, deployment)| *deployment == id) {
            return Err(Refusal::HasAlias { alias: alias.clone(), deployment: id.clone() });
        }
        self.deployments.remove(id).ok_or_else(|| Refusal::UnknownDeployment(id.clone()))?;
        step.touch(Row::Deployment(id.clone()));
        self.config(step, What::Undeployed(id.clone()));
        self.audit(step, audit::Event::Undeployed { deployment: id.clone() });
        Ok(())
    }

    fn put_tenant(&mut self, step: &mut Step, tenant: &Tenant) -> Result<(), Refusal> {
        match self.tenants.get(&tenant.id) {
            Some(same) if same == tenant => return Ok(()),
            Some(_) => {}
            None => full(self.tenants.len(), TENANT_LIMIT, "tenants")?,
        }
        self.tenants.insert(tenant.id.clone(), tenant.clone());
        step.touch(Row::Tenant(tenant.id.clone()));
        self.config(step, What::TenantSet(tenant.clone()));
        self.audit(step, audit::Event::TenantSet { tenant: tenant.clone() });
        Ok(())
    }

    fn put_project(&mut self, step: &mut Step, project: &Project) -> Result<(), Refusal> {
        if !self.tenants.contains_key(&project.tenant) {
            return Err(Refusal::UnknownTenant(project.tenant.clone()));
        }
        match self.projects.get(&project.id) {
            Some(same) if same == project => return Ok(()),
            // What was asked under it is the first tenant's, and so are the keys.
            Some(old) if old.tenant != project.tenant => {
                return Err(Refusal::OtherTenant { project: old.id.clone(), tenant: old.tenant.clone() });
            }
            Some(_) => {}
            None => full(self.projects.len(), PROJECT_LIMIT, "projects")?,
        }
        self.projects.insert(project.id.clone(), project.clone());
        step.touch(Row::Project(project.id.clone()));
        self.config(step, What::ProjectSet(project.clone()));
        self.audit(step, audit::Event::ProjectSet { project: project.clone() });
        Ok(())
    }

    fn set_alias(
        &mut self,
        step: &mut Step,
        alias: &DeploymentId,
        deployment: Option<&DeploymentId>,
    ) -> Result<(), Refusal> {
        if self.aliases.get(alias) == deployment {
            // Taking away what is not there is a mistake in its name.
            return deployment.map(|_| ()).ok_or_else(|| Refusal::UnknownAlias(alias.clone()));
        }
        match deployment {
            None => drop(self.aliases.remove(alias)),
            Some(_) if self.deployments.contains_key(alias) => return Err(Refusal::IsDeployment(alias.clone())),
            Some(to) if !self.deployments.contains_key(to) => return Err(Refusal::UnknownDeployment(to.clone())),
            Some(to) => {
                if !self.aliases.contains_key(alias) {
                    full(self.aliases.len(), ALIAS_LIMIT, "aliases")?;
                }
                self.aliases.insert(alias.clone(), to.clone());
            }
        }
        let (alias, deployment) = (alias.clone(), deployment.cloned());
        step.touch(Row::Alias(alias.clone()));
        self.config(step, What::AliasSet { alias: alias.clone(), deployment: deployment.clone() });
        self.audit(step, audit::Event::AliasSet { alias, deployment });
        Ok(())
    }

    fn set_standing(&mut self, step: &mut Step, agent: &NodeId, standing: Option<Standing>) -> Result<(), Refusal> {
        if self.standings.get(agent).copied() == standing {
            return Ok(());
        }
        match standing {
            None => drop(self.standings.remove(agent)),
            Some(standing) => {
                if !self.standings.contains_key(agent) {
                    full(self.standings.len(), STANDING_LIMIT, "agents with a standing")?;
                }
                self.standings.insert(agent.clone(), standing);
            }
        }
        let agent = agent.clone();
        step.touch(Row::Standing(agent.clone()));
        self.config(step, What::StandingSet { agent: agent.clone(), standing });
        self.audit(step, audit::Event::StandingSet { agent, standing });
        Ok(())
    }

    /// The version is ours to count: whatever the proposer wrote there, a plan follows the one it was based on.
    fn set_plan(&mut self, step: &mut Step, based_on: u64, plan: &Plan) -> Result<(), Refusal> {
        if based_on != self.plan.version {
            return Err(Refusal::OutdatedPlan);
        }
        if plan.workers.len() > WORKER_LIMIT {
            return Err(Refusal::Full { what: "workers of a plan".into(), limit: WORKER_LIMIT as u64 });
        }
        self.plan = Plan { version: based_on + 1, workers: plan.workers.clone() };
        step.touch(Row::Plan);
        self.config(step, What::Planned(self.plan.clone()));
        Ok(())
    }

    fn open_turn(&mut self, step: &mut Step, opening: &Opening) -> Result<(), Refusal> {
        let key = self.keys.get(&opening.key).ok_or_else(|| Refusal::UnknownKey(opening.key.clone()))?;
        // What was answered is recorded, whatever was decided meanwhile where there was a quorum.
        if key.status == KeyStatus::Revoked && !opening.provisional {
            return Err(Refusal::KeyRevoked(key.id.clone()));
        }
        self.turns.open(opening.clone(), step.at)?;
        step.touch(Row::Turn(opening.turn));
        self.change(step, Stream::Turn, What::TurnOpened(opening.clone()));
        self.audit(step, audit::Event::TurnOpened { opening: opening.clone() });
        Ok(())
    }

    fn close_turn(&mut self, step: &mut Step, turn: TurnId, outcome: Outcome) -> Result<(), Refusal> {
        let outcome = outcome.bounded();
        // The number of the change is also the place among the closed turns.
        let forgotten = self.turns.close(turn, outcome.clone(), step.at, self.head.turn_seq + 1)?;
        step.touch(Row::Turn(turn));
        if let Some(forgotten) = forgotten {
            step.touch(Row::Turn(forgotten));
        }
        self.change(step, Stream::Turn, What::TurnClosed { turn, outcome: outcome.clone() });
        self.audit(step, audit::Event::TurnClosed { turn, outcome });
        Ok(())
    }

    fn config(&mut self, step: &mut Step, what: What) {
        self.head.config_index = step.index;
        self.change(step, Stream::Config, what);
    }

    fn audit(&mut self, step: &mut Step, event: audit::Event) {
        self.change(step, Stream::Audit, What::Audited(event));
    }

    fn change(&mut self, step: &mut Step, stream: Stream, what: What) {
        let seq = self.head.seq(stream);
        *seq += 1;
        step.applied.changes.push(Change { site: self.site.clone(), stream, seq: *seq, at: step.at, what });
    }

    /// Index of the last applied entry.
    pub fn applied(&self) -> u64 {
        self.applied
    }
    /// Index through which the log is on every voter's disk.
    pub fn compacted(&self) -> u64 {
        self.head.compacted
    }
    /// The latest time of any batch.
    pub fn latest(&self) -> Hlc {
        self.head.latest
    }
    /// How often a controller has started, as far as anything was decided of it.
    pub fn starts_of(&self, node: &NodeId) -> u64 {
        self.origins.get(node).map_or(0, |seen| seen.incarnation)
    }
    /// How often the cluster was rebuilt, from 1.
    pub fn incarnation(&self) -> u64 {
        self.head.incarnation
    }
    /// Number of the last audit record.
    pub fn audit_seq(&self) -> u64 {
        self.head.audit_seq
    }
    /// What every registered model consists of, by revision.
    pub fn manifests(&self) -> impl Iterator<Item = (&Hash, &Manifest)> {
        self.models.iter().map(|(revision, model)| (revision, &model.manifest))
    }
    pub fn site(&self) -> &SiteId {
        &self.site
    }
    /// Index of the entry that last changed the configuration.
    pub fn config_index(&self) -> u64 {
        self.head.config_index
    }
    /// Open turns and the newest closed ones, oldest first (ids sort by time).
    pub fn turns(&self) -> impl DoubleEndedIterator<Item = &Turn> {
        self.turns.iter().map(|(_, remembered)| &remembered.turn)
    }
    pub fn turn(&self, id: &TurnId) -> Option<&Turn> {
        self.turns.get(id).map(|remembered| &remembered.turn)
    }
    /// The turn that a client's request began, by the request's name.
    pub fn named_turn(&self, name: &Hash) -> Option<&Turn> {
        self.turns.named(name)
    }
    pub fn open_turns(&self) -> usize {
        self.turns.open_count()
    }

    /// How many of them a controller has.
    pub fn open_turns_of(&self, node: &NodeId) -> usize {
        self.turns.orphans(node, u64::MAX).len()
    }

    /// Deployments of which the plan has workers with another revision than the wanted one.
    fn rolling(&self) -> BTreeSet<DeploymentId> {
        let other = |place: &&Placement| {
            self.deployments.get(&place.deployment).is_some_and(|wanted| wanted.revision != place.revision)
        };
        self.plan.workers.values().filter(other).map(|place| place.deployment.clone()).collect()
    }

    /// Copies the configuration for those who follow it.
    pub fn config_snapshot(&self) -> Config {
        Config {
            tenants: self.tenants.clone(),
            projects: self.projects.clone(),
            keys_by_hash: self.keys.values().map(|key| (key.secret_hash, key.clone())).collect(),
            keys: self.keys.clone(),
            models: self.models.clone(),
            deployments: self.deployments.clone(),
            aliases: self.aliases.clone(),
            standings: self.standings.clone(),
            gpus: self.gpus.clone(),
            remedies: self.remedies.clone(),
            rolling: self.rolling(),
            plan: self.plan.clone(),
            applied: self.head.config_index,
            incarnation: self.head.incarnation,
        }
    }
}

fn full(count: usize, limit: usize, what: &str) -> Result<(), Refusal> {
    if count < limit { Ok(()) } else { Err(Refusal::Full { what: what.into(), limit: limit as u64 }) }
}

/// What is gathered while one batch is applied.
struct Step {
    at: Hlc,
    index: u64,
    applied: Applied,
}

impl Step {
    fn touch(&mut self, row: Row) {
        self.applied.touched.push(row);
    }
}

/// The configuration at one moment: what operators decided and the leader planned. Rebuilt only when it changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub tenants: BTreeMap<TenantId, Tenant>,
    pub projects: BTreeMap<ProjectId, Project>,
    pub keys_by_hash: HashMap<Hash, Key>,
    pub keys: BTreeMap<KeyId, Key>,
    pub models: BTreeMap<Hash, Model>,
    pub deployments: BTreeMap<DeploymentId, Deployment>,
    pub aliases: BTreeMap<DeploymentId, DeploymentId>,
    pub standings: BTreeMap<NodeId, Standing>,
    pub gpus: BTreeMap<GpuId, GpuRecord>,
    /// Orders to agents that have not ended.
    pub remedies: BTreeMap<u64, Remedy>,
    /// Deployments whose workers are on their way from one revision to another.
    pub rolling: BTreeSet<DeploymentId>,
    pub plan: Plan,
    /// Index of the entry that made it so; with `incarnation` it orders assignments.
    pub applied: u64,
    /// How often the cluster was rebuilt after losing its quorum for good. 1 until then.
    pub incarnation: u64,
}

/// The state for readers. The Raft applier alone writes it, for microseconds at a time; never hold it over an await.
#[derive(Debug, Clone)]
pub struct Shared(Arc<RwLock<State>>);

impl Shared {
    pub fn new(state: State) -> Self {
        Self(Arc::new(RwLock::new(state)))
    }
    /// Lets `look` see the state at one moment; keep it short, for entries wait meanwhile.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.0.read().expect("no panic while the state is held"))
    }
    /// The newest turns that `wanted` picks, newest first, `limit` at most.
    pub fn turns(&self, limit: usize, wanted: impl Fn(&Turn) -> bool) -> Vec<Turn> {
        self.read(|state| state.turns().rev().filter(|turn| wanted(turn)).take(limit).cloned().collect())
    }
    /// Index of the last applied entry.
    pub fn applied(&self) -> u64 {
        self.read(State::applied)
    }
    /// Reads every row: for tests and for operators who compare members, not for the path of a request.
    pub fn digest(&self) -> Digest {
        self.read(State::digest)
    }
    pub(crate) fn write<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.write().expect("no panic while the state is held"))
    }
}

#[cfg(test)]
pub(crate) mod tests;
