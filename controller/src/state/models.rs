//! Models, deployments and the plan: what is served, and where.

use std::collections::BTreeMap;

use izar_common::clock::Hlc;
use izar_common::id::{DeploymentId, Hash, NodeId, WorkerId};
use izar_common::manifest::Manifest;
use izar_common::wire::agent::EngineOptions;
use serde::{Deserialize, Serialize};

/// A registered model revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    pub revision: Hash,
    pub manifest: Manifest,
    pub registered: Hlc,
}

/// A model served under a name: what the operator wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    pub id: DeploymentId,
    pub revision: Hash,
    pub replicas: u32,
    pub engine: EngineOptions,
    pub constraints: Constraints,
}

/// Where the workers of a deployment may be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Constraints {
    /// Memory that a worker needs on its agent; 0: its model's files and its cache, if it computes on a CPU.
    pub memory_bytes: u64,
    /// GPUs that a worker needs for itself alone.
    pub gpus: u32,
    /// What its agent must be labelled with.
    pub labels: BTreeMap<String, String>,
    /// No agent has two of them.
    pub apart: bool,
}

/// A worker's place, and what it serves there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub deployment: DeploymentId,
    pub agent: NodeId,
    pub revision: Hash,
    pub engine: EngineOptions,
    /// Since when, in Unix milliseconds, it only ends what it has begun.
    pub retiring_ms: Option<u64>,
}

/// What an operator has said of an agent; of most nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Gets no new workers, and jobs only if no other agent can take them.
    Cordoned,
    /// Its workers go elsewhere, too; what still runs this long after a replacement is ready moves there.
    Draining { within_ms: u64 },
}

/// Which worker runs where. `version` counts the plans.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    pub version: u64,
    pub workers: BTreeMap<WorkerId, Placement>,
}
