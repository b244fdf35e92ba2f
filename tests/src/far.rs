//! An agent of a cluster of `izar dev` that reaches the controllers only through relays: its link can be cut.
//!
//! While it is cut, both sides live and hear nothing of each other, not even of an end: what a pulled cable looks like.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::cluster::Cluster;
use crate::nodes::issue_of;
use crate::relay::Relay;
use crate::{process, waiting};

/// What `izar dev` calls its cluster and its site.
const CLUSTER: &str = "dev";
const SITE: &str = "local";

/// The agent; it ends when it is dropped.
#[derive(Debug)]
pub struct Far {
    pub node: String,
    child: Child,
    /// One for each controller.
    relays: Vec<Relay>,
}

/// `cluster.json`, as far as it matters here.
#[derive(Deserialize)]
struct Saved {
    controllers: Vec<Ports>,
}

#[derive(Deserialize)]
struct Ports {
    quic: u16,
}

impl Far {
    pub fn start(cluster: &Cluster, node: &str) -> Self {
        let dir = cluster.dir();
        let saved = std::fs::read(dir.join("cluster.json")).expect("izar dev writes it");
        let saved: Saved = serde_json::from_slice(&saved).expect("cluster.json names the controllers' ports");
        let link = |(i, ports): (usize, &Ports)| {
            Relay::link(&format!("{node} to c{}", i + 1), ([127, 0, 0, 1], ports.quic).into())
        };
        let relays: Vec<Relay> = saved.controllers.iter().enumerate().map(link).collect();
        issue_of(CLUSTER, &dir.join("pki"), "agent", node, &dir.join("pki"));
        let config = dir.join(format!("{node}.toml"));
        std::fs::write(&config, self::config(dir, node, &relays)).expect("the folder is ours");
        let log = std::fs::File::options().create(true).append(true).open(cluster.logs().join(format!("{node}.log")));
        let log = log.expect("the folder is ours");
        let child = Command::new(crate::binaries::path("izar-agent"))
            .arg("--config")
            .arg(config)
            .env(process::MARK, cluster.mark())
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file has two ends"))
            .stderr(log)
            .spawn()
            .expect("our programs run");
        Self { node: node.to_owned(), child, relays }
    }

    /// Cuts the links to all controllers.
    pub fn cut(&self) {
        self.relays.iter().for_each(Relay::cut);
    }

    pub fn mend(&self) {
        self.relays.iter().for_each(Relay::mend);
    }

    /// Ends it as `systemctl stop` does.
    pub fn stop(mut self) {
        process::signal(self.child.id(), Signal::SIGTERM).expect("it runs");
        waiting::until_true("the far agent to end", waiting::SOON, || self.child.try_wait().is_ok_and(|s| s.is_some()));
        let status = self.child.wait().expect("it has ended");
        assert!(status.success(), "{} ended with {status}", self.node);
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(dir: &Path, node: &str, relays: &[Relay]) -> String {
    let controllers: Vec<String> = relays.iter().map(|relay| format!("\"{}\"", relay.address)).collect();
    let (dir, controllers) = (dir.display(), controllers.join(", "));
    format!(
        r#"controllers = [{controllers}]
cluster = "{CLUSTER}"
site = "{SITE}"
node = "{node}"
data_dir = "{dir}/{node}-data"

[tls]
ca = "{dir}/pki/ca.pem"
cert = "{dir}/pki/{node}.pem"
key = "{dir}/pki/{node}.key"

[engine]
threads = 1

[log]
level = "info"
"#
    )
}
