//! Tenants, projects and keys: who may ask.

use izar_common::clock::Hlc;
use izar_common::id::{Hash, KeyId, ProjectId, TenantId};
use serde::{Deserialize, Serialize};

/// The tenant and project that every cluster begins with.
pub const DEFAULT: &str = "default";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub id: TenantId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    pub id: ProjectId,
    pub tenant: TenantId,
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
