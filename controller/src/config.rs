//! The controller's configuration: one TOML file, read once, checked whole before anything is opened.
//!
//! Addresses of members live in replicated state once the cluster runs; `[[members]]` only bootstraps. Everything has
//! a default but identities, addresses and the files of keys.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use izar_common::id::{ClusterId, NodeId, SiteId};
use izar_common::{config, service, tls};
use serde::Deserialize;

use crate::gateway::Limits;
use crate::raft;

/// Everything a controller is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub cluster: ClusterId,
    pub site: SiteId,
    /// This controller's name; must be one of `members`.
    pub node: NodeId,
    /// Raft's log, the state, audit segments and model files. Created if missing, mode 0700.
    pub data_dir: PathBuf,
    /// This node's certificate for QUIC, issued by the cluster's CA (`izar pki issue`).
    pub tls: tls::Files,
    pub quic: Quic,
    /// The voters of this site, the same in every controller's file.
    pub members: Vec<Member>,
    pub api: Api,
    pub admin: Admin,
    #[serde(default)]
    pub secrets: Secrets,
    /// What a client may cost before and after it is known. Defaults are in `gateway::Limits`.
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub raft: RaftTimes,
    #[serde(default)]
    pub log: Log,
}

/// The UDP socket for controllers and agents.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quic {
    pub listen: SocketAddr,
}

/// A voter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Raft's number for it, from 1; never reused.
    pub id: u64,
    pub node: NodeId,
    /// Where the others reach its QUIC socket.
    pub address: SocketAddr,
}

/// The API that users call.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Api {
    /// HTTPS, TLS 1.3 only. Port 0 picks a free one (see `endpoints.json` in the data directory).
    pub listen: SocketAddr,
    /// Certificate chain and key that clients see; may come from another CA than the cluster's.
    pub cert: PathBuf,
    /// Default: the credential `api.key`.
    #[serde(default = "Api::credential")]
    pub key: PathBuf,
    /// Plain HTTP for programs on this machine; refused for any address but loopback. Default: none.
    #[serde(default)]
    pub plaintext_listen: Option<SocketAddr>,
}

impl Api {
    fn credential() -> PathBuf {
        "credential:api.key".into()
    }
}

/// The operator's socket.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// A Unix socket. One that systemd has bound is used in its place; its unit then says who may use it.
    pub socket: PathBuf,
    /// Members of this group may use it besides root and the daemon's own user. Default: nobody else.
    #[serde(default)]
    pub group: Option<String>,
}

/// Files of 64 hexadecimal digits, mode 0600, the same on all controllers of all sites. Never replicated.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Secrets {
    /// Keys the hashes of API keys. Default: the credential `pepper`.
    pub pepper: PathBuf,
    /// Wraps the data keys of tenants. Default: the credential `master-key`.
    pub master_key: PathBuf,
}

impl Default for Secrets {
    fn default() -> Self {
        Self { pepper: "credential:pepper".into(), master_key: "credential:master-key".into() }
    }
}

/// Raft's clock.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RaftTimes {
    /// Milliseconds of a tick. Default 20, from 5 to 1000.
    pub tick_ms: u64,
    /// Ticks without a leader until an election begins (up to twice as many). Default 10, at least 3 x heartbeat.
    pub election_ticks: usize,
    /// Ticks between heartbeats. Default 2.
    pub heartbeat_ticks: usize,
}

impl Default for RaftTimes {
    fn default() -> Self {
        Self { tick_ms: 20, election_ticks: 10, heartbeat_ticks: 2 }
    }
}

/// What is logged.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info` (default), `debug` or `trace`.
    pub level: Option<String>,
}

impl Config {
    /// Reads and checks the file; relative paths in it count from its own folder, `credential:NAME` from that of the
    /// credentials.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let mut config: Self = config::load(path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        let credentials = service::credentials();
        for file in [
            &mut config.data_dir,
            &mut config.tls.ca,
            &mut config.tls.cert,
            &mut config.tls.key,
            &mut config.api.cert,
            &mut config.api.key,
            &mut config.admin.socket,
            &mut config.secrets.pepper,
            &mut config.secrets.master_key,
        ] {
            *file = config::locate(base, file, credentials.as_deref());
        }
        config.check().with_context(|| format!("check {}", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        let count = self.members.len();
        ensure!(count == 1 || count % 2 == 1, "members: {count} voters; use 1, 3 or 5 (an even number gains nothing)");
        for (i, a) in self.members.iter().enumerate() {
            ensure!(a.id > 0, "members: {} has id 0; ids begin at 1", a.node);
            for b in &self.members[..i] {
                ensure!(a.id != b.id, "members: {} and {} have the same id {}", b.node, a.node, a.id);
                ensure!(a.node != b.node, "members: {} stands twice", a.node);
                ensure!(a.address != b.address, "members: {} and {} have the same address", b.node, a.node);
            }
        }
        ensure!(
            self.members.iter().any(|m| m.node == self.node),
            "members: this node, {}, is not among them",
            self.node
        );
        if let Some(plain) = self.api.plaintext_listen {
            ensure!(plain.ip().is_loopback(), "api.plaintext_listen: {plain} is not a loopback address");
        }
        self.limits.check().map_err(anyhow::Error::msg).context("limits")?;
        let t = &self.raft;
        ensure!((5..=1000).contains(&t.tick_ms), "raft.tick_ms: {} is not in 5..=1000", t.tick_ms);
        if t.heartbeat_ticks == 0 || t.election_ticks < 3 * t.heartbeat_ticks {
            bail!("raft.election_ticks: {} is less than 3 x heartbeat_ticks ({})", t.election_ticks, t.heartbeat_ticks);
        }
        Ok(())
    }

    /// The other controllers, and where they are reached.
    pub fn others(&self) -> Vec<(NodeId, SocketAddr)> {
        self.members.iter().filter(|m| m.node != self.node).map(|m| (m.node.clone(), m.address)).collect()
    }

    /// What the Raft driver needs of it.
    pub fn raft_options(&self) -> raft::Options {
        raft::Options {
            data_dir: self.data_dir.clone(),
            cluster: self.cluster.clone(),
            site: self.site.clone(),
            node: self.node.clone(),
            members: self
                .members
                .iter()
                .map(|m| raft::Member { id: m.id, node: m.node.clone(), address: m.address })
                .collect(),
            tick: Duration::from_millis(self.raft.tick_ms),
            election_ticks: self.raft.election_ticks,
            heartbeat_ticks: self.raft.heartbeat_ticks,
        }
    }
}
