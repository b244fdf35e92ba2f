//! What `--check-config --json` says: the parts of an agent's configuration that `izar doctor` looks at, and what the GPU
//! library counts. The doctor is a program of the controller's side, which never reads this file's format by itself.
//!
//! It opens nothing of the running agent's, and changes nothing. The library may hang on a sick GPU: whoever asks waits
//! with a limit.

use std::net::SocketAddr;
use std::path::PathBuf;

use izar_common::health::gpu::Mode;
use izar_common::id::Identity;
use serde::Serialize;

use crate::config::Config;
use crate::{daemon, gpu};

/// Field names stay; new ones may come.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// Who the certificate must say that this is.
    identity: String,
    data_dir: PathBuf,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    controllers: Vec<SocketAddr>,
    /// Why the certificates could not be used at a start, as far as whoever asks may read them.
    unusable: Option<String>,
    gpu: Gpu,
}

#[derive(Debug, Serialize)]
struct Gpu {
    mode: Mode,
    expected: Option<u32>,
    helper: PathBuf,
    /// What the library counts; 0 where there is none.
    found: Option<u32>,
    /// Why it does not count.
    reason: Option<String>,
}

impl Checked {
    pub fn new(config: Config) -> Self {
        let identity: Identity = daemon::expected(&config);
        let (found, reason) = match gpu::count(&config.gpu) {
            Ok(found) => (Some(found), None),
            Err(reason) => (None, Some(reason)),
        };
        let helper = config.gpu.helper.clone().unwrap_or_else(|| gpu::HELPER.into());
        let gpu = Gpu { mode: config.gpu.mode, expected: config.gpu.expected, helper, found, reason };
        let unusable = daemon::unusable(&config);
        let Config { data_dir, tls, controllers, .. } = config;
        Self {
            identity: identity.to_string(),
            data_dir,
            ca: tls.ca,
            cert: tls.cert,
            key: tls.key,
            controllers,
            unusable,
            gpu,
        }
    }
}
