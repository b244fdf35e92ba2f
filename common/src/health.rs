//! What an agent says of itself: its workers, their load, its processors and their health. An opinion, never replicated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{DeploymentId, Hash, NumericsId, WorkerId};

pub mod gpu;

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
    /// It is ready and shall not be used: its GPU, or the whole server, is not sound.
    Fenced,
}

/// What a worker is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Load {
    /// Sequences in the batch, and jobs waiting for a place in it.
    pub running: u32,
    pub waiting: u32,
    /// Blocks of the cache that sequences use, and all that there are; blocks kept for later prompts are not used.
    pub blocks_used: u32,
    pub blocks: u32,
}

impl Load {
    /// Jobs that the worker has.
    pub fn jobs(self) -> u32 {
        self.running + self.waiting
    }
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
    pub load: Load,
    /// The most sequences a batch can hold.
    pub max_batch: u32,
    /// How often it was started again since the agent began.
    pub restarts: u32,
    /// What computes it, once it is ready.
    pub numerics: Option<NumericsId>,
    /// Why it is not ready, in words.
    pub detail: String,
    /// Percent of the work that it should get for the health of its GPU; 100 if there is nothing against it.
    pub share: u8,
}

impl WorkerReport {
    /// Sequences that it should compute at once: its batch, less what its GPU's health speaks against.
    pub fn places(&self) -> u32 {
        (u64::from(self.max_batch) * u64::from(self.share.min(100)) / 100).max(1) as u32
    }
}

/// What an agent says of its machine: what an operator must see to before it ends what runs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// When the first certificate of those in use expires, Unix seconds.
    pub certificate_expires: i64,
    /// Room on the disk of its data directory, and all that it holds; both 0 before the first look.
    pub disk_free_bytes: u64,
    pub disk_bytes: u64,
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
    /// GPUs of the server.
    pub gpus: u32,
    /// What the agent's file says of it.
    pub labels: BTreeMap<String, String>,
    pub workers: Vec<WorkerReport>,
    pub health: gpu::Health,
}
