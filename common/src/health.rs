//! What an agent says of itself: its workers, their load, its processors. An opinion, never replicated.

use serde::{Deserialize, Serialize};

use crate::id::{DeploymentId, Hash, NumericsId, WorkerId};

/// Orders assignments: the highest wins, and a new cluster incarnation beats every index of an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Generation {
    pub incarnation: u64,
    pub applied: u64,
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Its model's files are being fetched.
    Fetching,
    /// The process runs and loads the model.
    Loading,
    Ready,
    /// It died or could not load, and waits to be started again.
    Backoff,
}

/// One worker as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReport {
    pub worker: WorkerId,
    pub deployment: DeploymentId,
    pub revision: Hash,
    pub state: WorkerState,
    /// The process, while there is one.
    pub pid: Option<u32>,
    /// Sequences in the batch, and jobs waiting for a place in it.
    pub running: u32,
    pub waiting: u32,
    /// The most sequences a batch can hold.
    pub max_batch: u32,
    /// How often it was started again since the agent began.
    pub restarts: u32,
    /// What computes it, once it is ready.
    pub numerics: Option<NumericsId>,
    /// Why it is not ready, in words.
    pub detail: String,
}

/// An agent's whole report; the newest replaces all older ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The assignment that the agent works on.
    pub generation: Generation,
    pub pid: u32,
    pub version: String,
    pub cores: u32,
    pub memory_bytes: u64,
    pub workers: Vec<WorkerReport>,
}
