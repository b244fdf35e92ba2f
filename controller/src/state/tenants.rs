//! Tenants, projects and keys: who may ask.

use izar_common::chat::Class;
use izar_common::clock::Hlc;
use izar_common::id::{Hash, KeyId, ProjectId, TenantId};
use serde::{Deserialize, Serialize};

/// The tenant and project that every cluster begins with.
pub const DEFAULT: &str = "default";

/// Tenants' shares of a full deployment are as their weights, 1 to this.
pub const WEIGHT_LIMIT: u32 = 1_000;
/// The longest deadline that a project or a request may have: a day.
pub const DEADLINE_LIMIT_MS: u32 = 86_400_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub id: TenantId,
    /// Its share of a deployment that has more work than it can do, relative to the others'. 1 unless an operator says
    /// otherwise.
    pub weight: u32,
}

impl Tenant {
    pub fn new(id: TenantId) -> Self {
        Self { id, weight: 1 }
    }
}

/// Keys that belong together, and what goes for their requests unless these say otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    pub id: ProjectId,
    pub tenant: TenantId,
    /// The most urgent class that its requests may have.
    pub class: Class,
    /// Milliseconds after which an answer is of no use any more; 0: never.
    pub deadline_ms: u32,
    /// Answers while the cluster cannot record them: records follow when it can.
    pub available: bool,
}

impl Project {
    pub fn new(id: ProjectId, tenant: TenantId) -> Self {
        Self { id, tenant, class: Class::default(), deadline_ms: 0, available: false }
    }
}

/// A bearer key. The key itself is shown once, when it is made; here lies only its keyed hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub id: KeyId,
    pub project: ProjectId,
    /// HMAC-SHA256 of the bearer key under the cluster's pepper.
    pub secret_hash: Hash,
    /// Requests that may run at once through one controller.
    pub max_concurrent: u32,
    pub status: KeyStatus,
    pub created: Hlc,
    /// What it is for, in its owner's words.
    pub note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyStatus {
    Active,
    /// For ever: a revoked key never comes back.
    Revoked,
}
