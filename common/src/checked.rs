//! What `izar-agent --check-config --json` says and `izar doctor` reads: the parts of an agent's configuration that a doctor
//! looks at, and what the GPU library counts. The doctor never reads that file's format by itself.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::health::gpu::Mode;

/// Field names stay; new ones may come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checked {
    /// Who the certificate must say that this is.
    pub identity: String,
    pub data_dir: PathBuf,
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub controllers: Vec<SocketAddr>,
    /// Why the certificates could not be used at a start, as far as whoever asks may read them.
    pub unusable: Option<String>,
    pub gpu: Gpu,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gpu {
    pub mode: Mode,
    pub expected: Option<u32>,
    pub helper: PathBuf,
    /// What the library counts; 0 where there is none.
    pub found: Option<u32>,
    /// Why it does not count.
    pub reason: Option<String>,
}
