//! The state as rows, a key and a frame each: what is stored on disk, and what members compare.
//!
//! A row is found by what it is about, so that a change stores only the rows it touched. Rows in the order of their
//! keys are the canonical form of the state: the digest is their hash.

use izar_common::blob;
use izar_common::clock::Hlc;
use izar_common::id::{DeploymentId, GpuId, Hash, KeyId, NodeId, ProjectId, SiteId, TenantId, TurnId};
use izar_common::wire::{self, Wire};
use serde::{Deserialize, Serialize};

use super::dedupe::Seen;
use super::last_backup::LastBackup;
use super::turns::{Remembered, Turn};
use super::{Deployment, Digest, GpuRecord, Key, Model, Plan, Project, Remedy, Standing, State, Stream, Tenant};

/// Names one row. The order of the variants is the order of the rows and must not change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Row {
    Head,
    Tenant(TenantId),
    Project(ProjectId),
    Key(KeyId),
    Model(Hash),
    Deployment(DeploymentId),
    Plan,
    Turn(TurnId),
    Origin(NodeId),
    Alias(DeploymentId),
    Standing(NodeId),
    Gpu(GpuId),
    LastBackup,
    Remedy(u64),
}

impl Row {
    /// The row's key: a byte for what it is, and the id.
    pub fn key(&self) -> Vec<u8> {
        let (kind, id): (u8, &[u8]) = match self {
            Row::Head => (0, &[]),
            Row::Tenant(id) => (1, id.as_str().as_bytes()),
            Row::Project(id) => (2, id.as_str().as_bytes()),
            Row::Key(id) => (3, id.as_str().as_bytes()),
            Row::Model(hash) => (4, &hash.0),
            Row::Deployment(id) => (5, id.as_str().as_bytes()),
            Row::Plan => (6, &[]),
            Row::Turn(id) => (7, &id.0.to_be_bytes()),
            Row::Origin(node) => (8, node.as_str().as_bytes()),
            Row::Alias(id) => (9, id.as_str().as_bytes()),
            Row::Standing(node) => (10, node.as_str().as_bytes()),
            Row::Gpu(id) => (11, id.as_str().as_bytes()),
            Row::LastBackup => (12, &[]),
            Row::Remedy(id) => (13, &id.to_be_bytes()),
        };
        [&[kind], id].concat()
    }
}

/// Counters and marks of the whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub site: SiteId,
    /// How often the cluster was rebuilt after losing its quorum for good; counts from 1.
    pub incarnation: u64,
    pub config_seq: u64,
    pub turn_seq: u64,
    pub audit_seq: u64,
    /// The latest time of any batch.
    pub latest: Hlc,
    /// Index of the entry that last changed the configuration.
    pub config_index: u64,
    /// Index through which the log may be dropped.
    pub compacted: u64,
}

impl Head {
    pub fn new(site: SiteId) -> Self {
        Self {
            site,
            incarnation: 1,
            config_seq: 0,
            turn_seq: 0,
            audit_seq: 0,
            latest: Hlc::default(),
            config_index: 0,
            compacted: 0,
        }
    }
    pub fn seq(&mut self, stream: Stream) -> &mut u64 {
        match stream {
            Stream::Config => &mut self.config_seq,
            Stream::Turn => &mut self.turn_seq,
            Stream::Audit => &mut self.audit_seq,
        }
    }
}

/// A row's value; it holds its own id, so that a key is never parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Value {
    Head(Head),
    Tenant(Tenant),
    Project(Project),
    Key(Key),
    Model(Model),
    Deployment(Deployment),
    Plan(Plan),
    Turn { turn: Turn, order: u64 },
    Origin { node: NodeId, seen: Seen },
    Alias { alias: DeploymentId, deployment: DeploymentId },
    Standing { agent: NodeId, standing: Standing },
    Gpu(GpuRecord),
    LastBackup(LastBackup),
    Remedy(Remedy),
}

impl Wire for Value {
    const TYPE: u16 = 65;
    const LIMIT: usize = 8 << 20;
}

/// Why stored rows are not a state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a row does not decode")]
    Row(#[from] wire::Error),
    #[error("a row has {0} bytes too many")]
    Trailing(usize),
    #[error("the rows belong to site {0}")]
    Site(SiteId),
    #[error("rows, but none that says whose they are")]
    NoHead,
}

impl State {
    /// Returns a row's value as a frame, or `None` if there is no such row (any more).
    pub fn row(&self, row: &Row) -> Option<Vec<u8>> {
        Some(wire::to_bytes(&self.value(row)?).to_vec())
    }

    fn value(&self, row: &Row) -> Option<Value> {
        Some(match row {
            Row::Head => Value::Head(self.head.clone()),
            Row::Tenant(id) => Value::Tenant(self.tenants.get(id)?.clone()),
            Row::Project(id) => Value::Project(self.projects.get(id)?.clone()),
            Row::Key(id) => Value::Key(self.keys.get(id)?.clone()),
            Row::Model(revision) => Value::Model(self.models.get(revision)?.clone()),
            Row::Deployment(id) => Value::Deployment(self.deployments.get(id)?.clone()),
            Row::Plan => Value::Plan(self.plan.clone()),
            Row::Turn(id) => {
                let Remembered { turn, order } = self.turns.get(id)?.clone();
                Value::Turn { turn, order }
            }
            Row::Origin(node) => Value::Origin { node: node.clone(), seen: self.origins.get(node)?.clone() },
            Row::Alias(id) => Value::Alias { alias: id.clone(), deployment: self.aliases.get(id)?.clone() },
            Row::Standing(node) => Value::Standing { agent: node.clone(), standing: *self.standings.get(node)? },
            Row::Gpu(id) => Value::Gpu(self.gpus.get(id)?.clone()),
            Row::LastBackup => Value::LastBackup(self.last_backup.clone()?),
            Row::Remedy(id) => Value::Remedy(self.remedies.get(id)?.clone()),
        })
    }

    /// Names every row, in order.
    pub fn all_rows(&self) -> Vec<Row> {
        let mut rows = vec![Row::Head];
        rows.extend(self.tenants.keys().cloned().map(Row::Tenant));
        rows.extend(self.projects.keys().cloned().map(Row::Project));
        rows.extend(self.keys.keys().cloned().map(Row::Key));
        rows.extend(self.models.keys().cloned().map(Row::Model));
        rows.extend(self.deployments.keys().cloned().map(Row::Deployment));
        rows.push(Row::Plan);
        rows.extend(self.turns.iter().map(|(id, _)| Row::Turn(*id)));
        rows.extend(self.origins.iter().map(|(node, _)| Row::Origin(node.clone())));
        rows.extend(self.aliases.keys().cloned().map(Row::Alias));
        rows.extend(self.standings.keys().cloned().map(Row::Standing));
        rows.extend(self.gpus.keys().cloned().map(Row::Gpu));
        rows.extend(self.last_backup.iter().map(|_| Row::LastBackup));
        rows.extend(self.remedies.keys().copied().map(Row::Remedy));
        rows
    }

    /// Returns the fingerprint of all rows.
    pub fn digest(&self) -> Digest {
        let mut all = Vec::new();
        for row in self.all_rows() {
            let value = self.row(&row).expect("the row was just named");
            for part in [row.key(), value] {
                all.extend_from_slice(&(part.len() as u64).to_be_bytes());
                all.extend_from_slice(&part);
            }
        }
        Digest { applied: self.applied, hash: blob::hash(&all) }
    }

    /// Rebuilds the state of `site` as it was at `applied` from its rows; no rows at all are a new state.
    pub fn from_rows(
        site: SiteId,
        applied: u64,
        rows: impl IntoIterator<Item = impl AsRef<[u8]>>,
    ) -> Result<Self, Error> {
        let mut state = State::new(site);
        state.applied = applied;
        let (mut any, mut head) = (false, false);
        for row in rows {
            let row = row.as_ref();
            let (value, length) = wire::decode::<Value>(row)?;
            if length != row.len() {
                return Err(Error::Trailing(row.len() - length));
            }
            any = true;
            head |= matches!(value, Value::Head(_));
            state.restore(value)?;
        }
        if any && !head { Err(Error::NoHead) } else { Ok(state) }
    }

    fn restore(&mut self, value: Value) -> Result<(), Error> {
        match value {
            Value::Head(head) if head.site != self.site => return Err(Error::Site(head.site)),
            Value::Head(head) => self.head = head,
            Value::Tenant(tenant) => drop(self.tenants.insert(tenant.id.clone(), tenant)),
            Value::Project(project) => drop(self.projects.insert(project.id.clone(), project)),
            Value::Key(key) => drop(self.keys.insert(key.id.clone(), key)),
            Value::Model(model) => drop(self.models.insert(model.revision, model)),
            Value::Deployment(deployment) => drop(self.deployments.insert(deployment.id.clone(), deployment)),
            Value::Plan(plan) => self.plan = plan,
            Value::Turn { turn, order } => self.turns.restore(Remembered { turn, order }),
            Value::Origin { node, seen } => self.origins.restore(node, seen),
            Value::Alias { alias, deployment } => drop(self.aliases.insert(alias, deployment)),
            Value::Standing { agent, standing } => drop(self.standings.insert(agent, standing)),
            Value::Gpu(record) => drop(self.gpus.insert(record.gpu.clone(), record)),
            Value::LastBackup(backup) => self.last_backup = Some(backup),
            Value::Remedy(remedy) => drop(self.remedies.insert(remedy.id, remedy)),
        }
        Ok(())
    }
}
