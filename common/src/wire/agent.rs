//! Between a controller and an agent: reports up, whole assignments down, and a stream for each job.

use serde::{Deserialize, Serialize};

use super::Wire;
use crate::chat::{Job, JobEvent};
use crate::health::{Generation, Report};
use crate::id::{DeploymentId, Hash, WorkerId};
use crate::manifest::Manifest;

/// From an agent, on its session stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Up {
    Report(Report),
}
impl Wire for Up {
    const TYPE: u16 = 16;
    const LIMIT: usize = 1 << 20;
}

/// From a controller, on an agent's session stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Down {
    Assignment(Assignment),
}
impl Wire for Down {
    const TYPE: u16 = 17;
    const LIMIT: usize = 4 << 20;
}

/// All that an agent shall run. Never a difference: the agent compares it with what runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    pub generation: Generation,
    pub workers: Vec<WorkerSpec>,
}

/// One worker that an agent shall run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    pub worker: WorkerId,
    pub deployment: DeploymentId,
    pub revision: Hash,
    pub manifest: Manifest,
    pub engine: EngineOptions,
}

/// How a worker's engine runs its model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineOptions {
    /// Most sequences in a step. Default 32.
    pub max_batch: u32,
    /// Most tokens of prompt and answer together; 0 means what the model was made for.
    pub max_context: u32,
    /// Threads of the engine; 0 leaves it to the agent.
    pub threads: u32,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_batch: 32, max_context: 0, threads: 0 }
    }
}

/// The first frame of a job stream, after `Open::Job`. The controller cancels by resetting the stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// The worker that the scheduler chose.
    pub worker: WorkerId,
    pub job: Job,
}
impl Wire for Submit {
    const TYPE: u16 = 18;
    /// A million tokens of prompt, each of up to five bytes, and room.
    const LIMIT: usize = 8 << 20;
}

/// The frames that come back on a job stream; the last one is `Done` or `Failed`.
impl Wire for JobEvent {
    const TYPE: u16 = 19;
    const LIMIT: usize = 1 << 16;
}
