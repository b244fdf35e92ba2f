//! Between an agent and its worker processes, over a Unix socket pair.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Wire;
use super::agent::EngineOptions;
use crate::chat::{Job, JobEvent};
use crate::health::Load;
use crate::id::NumericsId;
use crate::manifest::Manifest;
use crate::prefix::Sketch;

/// Characters of a reason that travel; the frames' limits are far higher.
pub const REASON: usize = 1000;

/// From the agent. The first frame is `Load`; the end of the stream ends the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// `files`: where each of the manifest's `files` lies, in their order; `text`: where its text bundle
    /// lies, if it has one; `cpus`: what its threads are bound to, one each, or none for wherever they like.
    Load {
        manifest: Manifest,
        files: Vec<PathBuf>,
        text: Option<PathBuf>,
        engine: EngineOptions,
        cpus: Vec<u32>,
    },
    /// `id` is the agent's own number for the job.
    Submit {
        id: u64,
        job: Job,
    },
    Cancel {
        id: u64,
    },
}
impl Wire for ToWorker {
    const TYPE: u16 = 32;
    const LIMIT: usize = 8 << 20;
}

/// From the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// The model is loaded and warm; `numerics` says what computes it.
    Ready { numerics: NumericsId },
    /// The model cannot be loaded; the process ends after it. The reason has at most [`REASON`] characters.
    Unloadable { reason: String },
    /// What a step gave, for all its jobs together, and the load after it.
    Step { events: Vec<(u64, JobEvent)>, load: Load },
    /// What the cache holds for later prompts, when that has changed.
    Sketch(Sketch),
}
impl Wire for FromWorker {
    const TYPE: u16 = 33;
    const LIMIT: usize = 4 << 20;
}
