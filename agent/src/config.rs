//! The agent's configuration: one TOML file, read once, checked whole before anything is opened.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use izar_common::health::gpu::GPUS;
use izar_common::id::{ClusterId, NodeId, SiteId};
use izar_common::{config, service, tls};
use serde::Deserialize;

use crate::gpu;

/// Controllers in the file at most: a site has up to five, and some may be on their way out.
const CONTROLLERS: usize = 16;

/// Labels, and bytes of each of their words: they stand in every report.
const LABELS: usize = 32;
const LABEL_BYTES: usize = 63;

/// Everything an agent is told by its file; what to run it learns from the controllers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub cluster: ClusterId,
    pub site: SiteId,
    /// This agent's name; no two agents of a site share one.
    pub node: NodeId,
    /// Model files that were fetched, and which order about GPUs was begun last. Created if missing, mode 0700; may be
    /// deleted while the agent is stopped and nothing is ordered (`izar gpus`).
    pub data_dir: PathBuf,
    /// This node's certificate for QUIC, issued by the cluster's CA (`izar pki issue`).
    pub tls: tls::Files,
    /// The QUIC addresses of every controller of the site. 1 to 16.
    pub controllers: Vec<SocketAddr>,
    /// What deployments may ask for of the server, as in `rack = "r7"`. At most 32, of at most 63 bytes each.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub engine: Engine,
    #[serde(default)]
    pub stop: Stop,
    #[serde(default)]
    pub gpu: gpu::Settings,
    #[serde(default)]
    pub log: Log,
}

/// How the agent stops.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stop {
    /// Milliseconds for which answers that run may go on at a stop; what has not ended then goes on at another agent, or
    /// waits for one. Default 10,000, at most 170,000 (the unit's `TimeoutStopSec=` is 180 s).
    pub drain_ms: u64,
}

impl Default for Stop {
    fn default() -> Self {
        Self { drain_ms: 10_000 }
    }
}

/// The longest drain.
const DRAIN_MS: u64 = 170_000;

/// How workers compute, where the deployment does not say it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Threads of each worker's engine. Default 0: the cores are divided among the workers. At most 1024.
    pub threads: u32,
    /// CPUs that engines' threads are bound to, one each: Linux' numbers and ranges of them, as in `"0-7,16"`. A worker
    /// takes the first that no other has; one that finds too few is not bound. Default: no thread is bound.
    pub cpus: Option<Cpus>,
}

/// A list of CPUs, in order, none twice.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Cpus(pub Vec<u32>);

/// The highest CPU number that Linux' affinity calls take.
const CPU_LIMIT: u32 = 1023;

impl TryFrom<String> for Cpus {
    type Error = String;
    fn try_from(list: String) -> Result<Self, String> {
        let mut cpus = Vec::new();
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let [first, last] = [first, last].map(|number| number.trim().parse::<u32>());
            let (Ok(first), Ok(last)) = (first, last) else {
                return Err(format!("`{part}` is not a CPU or a range of them, as in 0-7,16"));
            };
            if first > last || last > CPU_LIMIT {
                return Err(format!("`{part}` is not a range between 0 and {CPU_LIMIT}"));
            }
            if let Some(twice) = (first..=last).find(|cpu| cpus.contains(cpu)) {
                return Err(format!("CPU {twice} stands twice"));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

/// What is logged.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info` (default), `debug` or `trace`; workers log at the same level.
    pub level: Option<String>,
}

impl Config {
    /// Reads and checks the file; relative paths in it count from its own folder, `credential:NAME` from that of the
    /// credentials.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let mut config: Self = config::load(path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        let credentials = service::credentials();
        for file in [&mut config.data_dir, &mut config.tls.ca, &mut config.tls.cert, &mut config.tls.key] {
            *file = config::locate(base, file, credentials.as_deref());
        }
        let gpu = &mut config.gpu;
        for file in [&mut gpu.nvml, &mut gpu.kernel_log, &mut gpu.helper, &mut gpu.probe].into_iter().flatten() {
            *file = base.join(&*file);
        }
        config.check().with_context(|| format!("check {}", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        let count = self.controllers.len();
        ensure!((1..=CONTROLLERS).contains(&count), "controllers: {count} addresses; 1 to {CONTROLLERS} are needed");
        for (i, address) in self.controllers.iter().enumerate() {
            ensure!(!self.controllers[..i].contains(address), "controllers: {address} stands twice");
            ensure!(address.port() != 0, "controllers: {address} has no port");
        }
        ensure!(self.labels.len() <= LABELS, "labels: {} are more than {LABELS}", self.labels.len());
        for (key, value) in &self.labels {
            for word in [key, value] {
                let fits = !word.is_empty() && word.len() <= LABEL_BYTES && !word.contains(|c: char| c.is_control());
                ensure!(fits, "labels: `{key} = {value:?}` is empty, longer than {LABEL_BYTES} bytes or not printable");
            }
        }
        let drain = self.stop.drain_ms;
        ensure!(drain <= DRAIN_MS, "stop.drain_ms: {drain} is more than {DRAIN_MS}; systemd would cut it short");
        ensure!(self.engine.threads <= 1024, "engine.threads: {} is more than 1024", self.engine.threads);
        let expected = self.gpu.expected.unwrap_or(0);
        ensure!(expected as usize <= GPUS, "gpu.expected: {expected} is more than {GPUS}");
        if let Some(probe) = &self.gpu.probe {
            let runs = probe.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
            ensure!(runs, "gpu.probe: {} is no program that can be run", probe.display());
        }
        self.gpu.limits.check().map_err(|error| anyhow::anyhow!("gpu.limits.{error}"))?;
        Ok(())
    }

    /// Where the agent's own UDP socket is bound: any free port, on loopback if every controller is there.
    pub fn bind(&self) -> SocketAddr {
        let any = |test: fn(&SocketAddr) -> bool| self.controllers.iter().any(test);
        let address = match (any(SocketAddr::is_ipv6), any(|address| !address.ip().is_loopback())) {
            (false, false) => "127.0.0.1:0",
            (false, true) => "0.0.0.0:0",
            (true, _) => "[::]:0",
        };
        address.parse().expect("the addresses above are addresses")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "dev"
        site = "local"
        node = "a1"
        data_dir = "data"
        controllers = ["127.0.0.1:7001", "127.0.0.1:7002"]
        [tls]
        ca = "ca.pem"
        cert = "/etc/a1.pem"
        key = "a1.key"
    "#;

    fn load(text: &str) -> anyhow::Result<Config> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text)?;
        Config::load(&path)
    }

    fn check(from: &str, to: &str, expected: &str) {
        let error = format!("{:#}", load(&GOOD.replace(from, to)).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_good_file_is_read_with_paths_from_its_own_folder() {
        let config = load(GOOD).unwrap();
        assert!(config.data_dir.is_absolute() && config.data_dir.ends_with("data"));
        assert_eq!(config.tls.cert, Path::new("/etc/a1.pem"));
        assert_eq!((config.engine.threads, config.bind().to_string().as_str()), (0, "127.0.0.1:0"));
    }

    #[test]
    fn cpus_are_numbers_and_ranges() {
        let config = load(&GOOD.replace("[tls]", "[engine]\ncpus = \"2, 4-6\"\n[tls]")).unwrap();
        assert_eq!(config.engine.cpus, Some(Cpus(vec![2, 4, 5, 6])));
    }

    #[test]
    fn mistakes_are_named() {
        check("[tls]", "[engine]\nthreds = 2\n[tls]", "threds");
        check("7002", "7001", "controllers: 127.0.0.1:7001 stands twice");
        check("7002", "0", "controllers: 127.0.0.1:0 has no port");
        check(r#"["127.0.0.1:7001", "127.0.0.1:7002"]"#, "[]", "controllers: 0 addresses");
        check("[tls]", "[engine]\ncpus = \"0-3,x\"\n[tls]", "`x` is not a CPU");
        check("[tls]", "[engine]\ncpus = \"3-1\"\n[tls]", "`3-1` is not a range between 0 and 1023");
        check("[tls]", "[engine]\ncpus = \"0-3,2\"\n[tls]", "CPU 2 stands twice");
        check("[tls]", "[engine]\nthreads = 5000\n[tls]", "engine.threads: 5000");
        check("[tls]", "[gpu]\nexpected = 65\n[tls]", "gpu.expected: 65 is more than 64");
        check("[tls]", "[gpu]\nmode = \"acts\"\n[tls]", "acts");
        check("[tls]", "[gpu]\nprobe = \"agent.toml\"\n[tls]", "agent.toml is no program that can be run");
        check("[tls]", "[gpu]\nnmvl = \"/x\"\n[tls]", "nmvl");
        check("[tls]", "[gpu.limits]\nhot_celcius = 80\n[tls]", "hot_celcius");
        check("[tls]", "[gpu.limits]\nhot_celcius = 80\n[tls]", "agent.toml:8:1: ");
        let hot = "gpu.limits.hot_celsius: 850 is not between 40 and 120";
        check("[tls]", "[gpu.limits]\nhot_celsius = 850\n[tls]", hot);
        check("[tls]", "[gpu.limits]\nprobation_minutes = 0\n[tls]", "gpu.limits.probation_minutes: 0 is not");
    }
}
