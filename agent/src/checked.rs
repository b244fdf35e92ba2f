//! What `--check-config --json` says, for `izar doctor`.
//!
//! It opens nothing of the running agent's, and changes nothing. The library may hang on a sick GPU: whoever asks waits
//! with a limit.

use izar_common::checked::{Checked, Gpu};
use izar_common::id::Identity;

use crate::config::Config;
use crate::{daemon, gpu};

/// What there is to say of a configuration.
pub fn checked(config: Config) -> Checked {
    let identity: Identity = daemon::expected(&config);
    let (found, reason) = match gpu::count(&config.gpu) {
        Ok(found) => (Some(found), None),
        Err(reason) => (None, Some(reason)),
    };
    let helper = config.gpu.helper.clone().unwrap_or_else(|| gpu::HELPER.into());
    let gpu = Gpu { mode: config.gpu.mode, expected: config.gpu.expected, helper, found, reason };
    let unusable = daemon::unusable(&config);
    let Config { data_dir, tls, controllers, .. } = config;
    Checked {
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
