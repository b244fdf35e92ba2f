//! The agent process: builds its parts, starts them in the order of their needs, stops them in reverse.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use izar_common::health::gpu::Mode;
use izar_common::id::{Identity, Role};
use izar_common::{blob, disk, quic, service, tls};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::gpu::Gpus;
use crate::link::{Facts, Link, Watched};
use crate::probe;
use crate::remedies::Remedies;
use crate::worker::files::Sources;
use crate::worker::{Options, Workers};

mod told;

/// How long the start waits for a first session. Controllers that are not there are no fault of the agent's, which then
/// counts as started all the same.
const LINKED: Duration = Duration::from_secs(20);

/// A running agent.
pub struct Daemon {
    link: Link,
    workers: Workers,
    gpus: Gpus,
    endpoint: Arc<quic::Endpoint>,
    certificates: Arc<tls::Certificates>,
    drain: Duration,
    /// What mends GPUs; ends before anything else does.
    remedies: JoinSet<()>,
    /// What looks and tells; ends with the daemon.
    _watches: JoinSet<()>,
    /// Held so that no second agent uses the same data directory.
    _lock: File,
}

impl Daemon {
    /// Builds and starts everything. Controllers need not be there yet.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        service::watch();
        let node_tls = node_tls(&config)?;
        let lock = claim(&config.data_dir)?;
        let store = blob::Store::open(config.data_dir.join("blobs"))?;
        let endpoint = Arc::new(quic::Endpoint::bind(config.bind(), &node_tls)?);
        let facts = Facts::of_this_machine(config.labels.clone());
        let exe = std::env::current_exe().context("find the own executable")?;
        let options = Options {
            exe: exe.clone(),
            threads: config.engine.threads,
            cpus: config.engine.cpus.map_or_else(Vec::new, |cpus| cpus.0),
            cores: facts.cores,
            log_level: config.log.level.clone(),
        };
        let sources = Sources::default();
        let gpus = Gpus::start(config.gpu.clone(), &config.data_dir);
        let workers = Workers::start(options, store, sources.clone());
        workers.heed(gpus.clone());
        let (prober, helper) = (config.gpu.probe.clone().unwrap_or(exe), config.gpu.helper.clone());
        let remedies = Remedies::new(gpus.clone(), workers.clone(), prober.clone(), helper, &config.data_dir);
        let (certificates, seen) = (Arc::new(tls::Certificates::new(node_tls, None)), Arc::new(disk::Seen::default()));
        let watched = Watched { certificates: certificates.clone(), disk: seen.clone() };
        let link = {
            let (endpoint, workers, gpus) = (endpoint.clone(), workers.clone(), gpus.clone());
            Link::start(endpoint, &config.controllers, workers, sources, facts, watched, gpus)
        };
        let (mut watches, dates, data_dir) = (JoinSet::new(), certificates.clone(), config.data_dir.clone());
        watches.spawn(async move { dates.watch_dates().await });
        watches.spawn(async move { disk::watch(&data_dir, &seen).await });
        let mut mending = JoinSet::new();
        mending.spawn(remedies.run());
        if config.gpu.mode != Mode::Observe {
            mending.spawn(probe::watch(gpus.clone(), prober));
        }
        if service::is_managed() {
            watches.spawn(told::state(link.sessions(), config.controllers.len(), workers.clone()));
        }
        log::info!(agent:% = config.node, controllers = config.controllers.len(); "agent runs");
        let drain = Duration::from_millis(config.stop.drain_ms);
        let (remedies, _watches, _lock) = (mending, watches, lock);
        Ok(Self { link, workers, gpus, endpoint, certificates, drain, remedies, _watches, _lock })
    }

    /// Returns when a controller has been reached, or was waited for long enough.
    pub async fn linked(&self) {
        let mut sessions = self.link.sessions();
        let _ = tokio::time::timeout(LINKED, sessions.wait_for(|sessions| *sessions > 0)).await;
    }

    /// Reads certificates anew; sessions and answers go on.
    pub fn reload(&self) {
        service::reload(&self.certificates);
    }

    /// Tells the controllers to send nothing more, lets answers end for a while, stops the workers, and returns when no
    /// process is left. What has not ended is handed over: the controllers continue it elsewhere.
    pub async fn stop(mut self) {
        log::info!("agent stops");
        self.remedies.shutdown().await;
        self.workers.leave();
        if tokio::time::timeout(self.drain, self.link.drained()).await.is_err() {
            log::info!(limit_ms = self.drain.as_millis() as u64; "answers that still run are handed over");
        }
        self.link.stop().await;
        self.workers.stop().await;
        self.gpus.stop();
        self.endpoint.close().await;
    }
}

/// Why the certificates that the configuration names could not be used at a start or a reload. Opens nothing else.
pub fn unusable(config: &Config) -> Option<String> {
    node_tls(config).err().map(|error| format!("tls: {error:#}"))
}

fn node_tls(config: &Config) -> anyhow::Result<tls::NodeTls> {
    let tls = tls::NodeTls::load(&config.tls)?;
    check_identity(config, tls.identity())?;
    Ok(tls)
}

/// Who this agent is, as its configuration says.
pub fn expected(config: &Config) -> Identity {
    Identity {
        cluster: config.cluster.clone(),
        site: config.site.clone(),
        role: Role::Agent,
        node: config.node.clone(),
    }
}

fn check_identity(config: &Config, identity: &Identity) -> anyhow::Result<()> {
    let expected = expected(config);
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
