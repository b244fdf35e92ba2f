//! The agent process: builds its parts, starts them in the order of their needs, stops them in reverse.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use izar_common::id::{Identity, Role};
use izar_common::{blob, quic, tls};

use crate::config::Config;
use crate::gpu::Gpus;
use crate::link::{Facts, Link};
use crate::worker::files::Sources;
use crate::worker::{Options, Workers};

/// A running agent.
pub struct Daemon {
    link: Link,
    workers: Workers,
    gpus: Gpus,
    endpoint: Arc<quic::Endpoint>,
    /// Held so that no second agent uses the same data directory.
    _lock: File,
}

impl Daemon {
    /// Builds and starts everything. Controllers need not be there yet.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let node_tls = tls::NodeTls::load(&config.tls)?;
        check_identity(&config, node_tls.identity())?;
        let lock = claim(&config.data_dir)?;
        let store = blob::Store::open(config.data_dir.join("blobs"))?;
        let endpoint = Arc::new(quic::Endpoint::bind(config.bind(), &node_tls)?);
        let facts = Facts::of_this_machine(config.labels.clone());
        let options = Options {
            exe: std::env::current_exe().context("find the own executable")?,
            threads: config.engine.threads,
            cpus: config.engine.cpus.map_or_else(Vec::new, |cpus| cpus.0),
            cores: facts.cores,
            log_level: config.log.level.clone(),
        };
        let sources = Sources::default();
        let gpus = Gpus::start(config.gpu.clone());
        let workers = Workers::start(options, store, sources.clone());
        workers.heed(gpus.clone());
        let link = Link::start(endpoint.clone(), &config.controllers, workers.clone(), sources, facts, gpus.clone());
        log::info!(agent:% = config.node, controllers = config.controllers.len(); "agent runs");
        Ok(Self { link, workers, gpus, endpoint, _lock: lock })
    }

    /// Tells the controllers, stops the workers, and returns when no process is left.
    pub async fn stop(self) {
        log::info!("agent stops");
        self.link.stop().await;
        self.workers.stop().await;
        self.gpus.stop();
        self.endpoint.close().await;
    }
}

fn check_identity(config: &Config, identity: &Identity) -> anyhow::Result<()> {
    let expected = Identity {
        cluster: config.cluster.clone(),
        site: config.site.clone(),
        role: Role::Agent,
        node: config.node.clone(),
    };
    ensure!(
        *identity == expected,
        "tls.cert: {} is {identity}, but this configuration is of {expected}",
        config.tls.cert.display()
    );
    Ok(())
}

/// Creates the data directory and takes its lock.
fn claim(data_dir: &Path) -> anyhow::Result<File> {
    let create = DirBuilder::new().recursive(true).mode(0o700).create(data_dir);
    create.with_context(|| format!("data_dir: create {}", data_dir.display()))?;
    let path = data_dir.join("lock");
    let lock = File::create(&path).with_context(|| format!("data_dir: open {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => bail!("data_dir: {} is in use by another agent", data_dir.display()),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("data_dir: lock {}", path.display()))
        }
    }
}
