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
}

/// A worker's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub deployment: DeploymentId,
    pub agent: NodeId,
}

/// Which worker runs where. `version` counts the plans.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    pub version: u64,
    pub workers: BTreeMap<WorkerId, Placement>,
}
