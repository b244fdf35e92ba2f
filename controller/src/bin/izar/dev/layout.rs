//! The folder of a cluster: who is in it, on which ports, with which certificates and configuration.
//!
//! ```text
//! cluster.json       who and where, so that a later run with --dir finds the same cluster
//! pki/ api/          the private CA and the nodes' certificates; what API clients see
//! pepper master.key  secrets that all controllers share
//! c1/ a1/ …          configuration, data and admin socket of each daemon
//! logs/              <id>.log of each daemon
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use izar_common::id::{ClusterId, Identity, NodeId, Role, SiteId};
use izar_common::tls::pki;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::children::Spec;
use super::ports::{Kind, Ports};
use crate::ready::write_private;
use crate::{programs, ready};

const CLUSTER: &str = "dev";
const SITE: &str = "local";

/// The longest path of a Unix socket that Linux takes.
const SOCKET_LIMIT: usize = 107;

/// What `izar dev` was asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub controllers: usize,
    pub agents: usize,
    pub plaintext: bool,
    pub api_port: Option<u16>,
    pub default_port: u16,
    pub threads_per_agent: usize,
    pub log_level: String,
}

/// A prepared folder. Holds its lock: one `izar dev` at a time.
#[derive(Debug)]
pub struct Layout {
    pub dir: PathBuf,
    pub controllers: Vec<Controller>,
    pub agents: Vec<String>,
    /// Held as long as the layout is, like the ports.
    _lock: File,
    _ports: Ports,
}

/// A controller and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    pub id: String,
    pub quic: u16,
    pub api: u16,
    pub plaintext: Option<u16>,
    pub socket: PathBuf,
}

impl Controller {
    pub fn endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.api)
    }
    pub fn plaintext_endpoint(&self) -> Option<String> {
        self.plaintext.map(|port| format!("http://127.0.0.1:{port}"))
    }
}

/// `cluster.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    controllers: Vec<SavedController>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct SavedController {
    quic: u16,
    api: u16,
    plaintext: Option<u16>,
}

impl Layout {
    /// Makes what is missing in the folder and writes every configuration anew.
    pub fn prepare(dir: &Path, wanted: &Wanted) -> anyhow::Result<Self> {
        let lock = lock(dir)?;
        let saved = read_saved(&dir.join("cluster.json"))?;
        if let Some(saved) = &saved {
            ensure!(
                saved.controllers.len() == wanted.controllers,
                "{} holds a cluster of {} controllers; use --controllers {0}, or another --dir",
                dir.display(),
                saved.controllers.len(),
            );
        }
        let mut ports = Ports::default();
        let controllers = choose_ports(&mut ports, dir, wanted, saved.as_ref())?;
        let longest = controllers.iter().map(|c| c.socket.as_os_str().len()).max().unwrap_or(0);
        ensure!(
            longest <= SOCKET_LIMIT,
            "--dir: {} is too long for Unix sockets in it; use a shorter path",
            dir.display()
        );
        let agents: Vec<String> = (1..=wanted.agents).map(|i| format!("a{i}")).collect();
        let layout = Self { dir: dir.to_owned(), controllers, agents, _lock: lock, _ports: ports };
        layout.certificates().context("make certificates")?;
        layout.secrets()?;
        layout.configurations(wanted)?;
        layout.save()?;
        Ok(layout)
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.join("pki/ca.pem")
    }

    pub fn log(&self, id: &str) -> PathBuf {
        self.dir.join(format!("logs/{id}.log"))
    }

    /// Where a key that outlives a run is kept.
    pub fn key_file(&self) -> PathBuf {
        self.dir.join("key.json")
    }

    /// The daemons to start, controllers first.
    pub fn specs(&self) -> anyhow::Result<Vec<Spec>> {
        let (controller, agent) = (programs::beside("izar-controller")?, programs::beside("izar-agent")?);
        let spec = |id: &str, role, program: &Path, config: &str| Spec {
            id: id.to_owned(),
            role,
            program: program.to_owned(),
            config: self.dir.join(id).join(config),
            log: self.log(id),
        };
        let controllers =
            self.controllers.iter().map(|c| spec(&c.id, ready::Role::Controller, &controller, "controller.toml"));
        let agents = self.agents.iter().map(|id| spec(id, ready::Role::Agent, &agent, "agent.toml"));
        Ok(controllers.chain(agents).collect())
    }

    fn certificates(&self) -> anyhow::Result<()> {
        let (pki, api) = (self.dir.join("pki"), self.dir.join("api"));
        let cluster = ClusterId::new(CLUSTER)?;
        if !pki.join("ca.pem").exists() {
            pki::init(&pki, &cluster)?;
        }
        let hosts = ["127.0.0.1".to_owned(), "localhost".to_owned(), "::1".to_owned()];
        let nodes = self.controllers.iter().map(|c| (c.id.as_str(), Role::Controller));
        for (id, role) in nodes.chain(self.agents.iter().map(|id| (id.as_str(), Role::Agent))) {
            if !pki.join(format!("{id}.pem")).exists() {
                let identity =
                    Identity { cluster: cluster.clone(), site: SiteId::new(SITE)?, role, node: NodeId::new(id)? };
                pki::issue(&pki, &identity, &hosts, &pki)?;
            }
        }
        if !api.join("api.pem").exists() {
            std::fs::create_dir_all(&api).with_context(|| format!("create {}", api.display()))?;
            pki::issue_server(&pki, "api", &hosts, &api)?;
        }
        Ok(())
    }

    fn secrets(&self) -> anyhow::Result<()> {
        for name in ["pepper", "master.key"] {
            let path = self.dir.join(name);
            if !path.exists() {
                let secret = izar_common::id::Hash(rand::random()).to_string();
                write_private(&path, secret.as_bytes())?;
            }
        }
        Ok(())
    }

    fn configurations(&self, wanted: &Wanted) -> anyhow::Result<()> {
        let logs = self.dir.join("logs");
        std::fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
        for controller in &self.controllers {
            self.write_config(&controller.id, "controller.toml", &self.controller_toml(controller, wanted))?;
        }
        for agent in &self.agents {
            self.write_config(agent, "agent.toml", &self.agent_toml(agent, wanted))?;
        }
        Ok(())
    }

    fn write_config(&self, id: &str, name: &str, text: &str) -> anyhow::Result<()> {
        let folder = self.dir.join(id);
        std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    fn controller_toml(&self, controller: &Controller, wanted: &Wanted) -> String {
        let mut text = self.node_toml(&controller.id);
        text += &format!("[quic]\nlisten = \"127.0.0.1:{}\"\n\n", controller.quic);
        for (i, member) in self.controllers.iter().enumerate() {
            text += &format!(
                "[[members]]\nid = {}\nnode = \"{}\"\naddress = \"127.0.0.1:{}\"\n\n",
                i + 1,
                member.id,
                member.quic
            );
        }
        let file = |name: &str| toml_string(&self.dir.join(name));
        text += &format!("[api]\nlisten = \"127.0.0.1:{}\"\n", controller.api);
        text += &format!("cert = {}\nkey = {}\n", file("api/api.pem"), file("api/api.key"));
        if let Some(port) = controller.plaintext {
            text += &format!("plaintext_listen = \"127.0.0.1:{port}\"\n");
        }
        text += &format!("\n[admin]\nsocket = {}\n", toml_string(&controller.socket));
        text += &format!("\n[secrets]\npepper = {}\nmaster_key = {}\n", file("pepper"), file("master.key"));
        text + &format!("\n[log]\nlevel = \"{}\"\n", wanted.log_level)
    }

    fn agent_toml(&self, id: &str, wanted: &Wanted) -> String {
        let addresses: Vec<String> = self.controllers.iter().map(|c| format!("\"127.0.0.1:{}\"", c.quic)).collect();
        format!("controllers = [{}]\n", addresses.join(", "))
            + &self.node_toml(id)
            + &format!("[engine]\nthreads = {}\n\n[log]\nlevel = \"{}\"\n", wanted.threads_per_agent, wanted.log_level)
    }

    /// What both daemons begin with.
    fn node_toml(&self, id: &str) -> String {
        let file = |name: &str| toml_string(&self.dir.join(name));
        format!(
            "cluster = \"{CLUSTER}\"\nsite = \"{SITE}\"\nnode = \"{id}\"\ndata_dir = {}\n\n\
             [tls]\nca = {}\ncert = {}\nkey = {}\n\n",
            file(&format!("{id}/data")),
            file("pki/ca.pem"),
            file(&format!("pki/{id}.pem")),
            file(&format!("pki/{id}.key")),
        )
    }

    fn save(&self) -> anyhow::Result<()> {
        let controllers: Vec<_> = self
            .controllers
            .iter()
            .map(|c| json!({ "quic": c.quic, "api": c.api, "plaintext": c.plaintext }))
            .collect();
        let text = serde_json::to_vec_pretty(&json!({ "controllers": controllers }))?;
        write_private(&self.dir.join("cluster.json"), &text)
    }
}

fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => bail!("another izar dev runs in {}", dir.display()),
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

fn read_saved(path: &Path) -> anyhow::Result<Option<Saved>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| format!("understand {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn choose_ports(
    ports: &mut Ports,
    dir: &Path,
    wanted: &Wanted,
    saved: Option<&Saved>,
) -> anyhow::Result<Vec<Controller>> {
    let mut controllers = Vec::new();
    for i in 0..wanted.controllers {
        let earlier = saved.and_then(|s| s.controllers.get(i)).copied();
        let api = match wanted.api_port {
            Some(0) => ports.any(Kind::Tcp)?,
            Some(first) => {
                let port = first.checked_add(i as u16).context("--api-port: the ports after it end at 65535")?;
                ports.exactly(Kind::Tcp, port)?
            }
            // The first takes the port that people remember.
            None => ports.again(Kind::Tcp, earlier.map(|e| e.api).or((i == 0).then_some(wanted.default_port)))?,
        };
        let plaintext =
            if wanted.plaintext { Some(ports.again(Kind::Tcp, earlier.and_then(|e| e.plaintext))?) } else { None };
        let quic = ports.again(Kind::Udp, earlier.map(|e| e.quic))?;
        let id = format!("c{}", i + 1);
        let socket = dir.join(&id).join("admin.sock");
        controllers.push(Controller { id, quic, api, plaintext, socket });
    }
    Ok(controllers)
}

/// A path as a TOML string: JSON's escapes are TOML's, too.
fn toml_string(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy().into_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(controllers: usize) -> Wanted {
        Wanted {
            controllers,
            agents: 2,
            plaintext: true,
            api_port: Some(0),
            default_port: 8443,
            threads_per_agent: 1,
            log_level: "info".into(),
        }
    }

    #[test]
    fn a_folder_is_one_cluster_for_one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Layout::prepare(dir.path(), &wanted(3)).unwrap();
        let error = Layout::prepare(dir.path(), &wanted(3)).unwrap_err().to_string();
        assert!(error.contains("another izar dev"), "{error}");
        let ports: Vec<u16> = first.controllers.iter().map(|c| c.quic).collect();
        let ca = std::fs::read(first.ca()).unwrap();
        drop(first);
        let error = Layout::prepare(dir.path(), &wanted(1)).unwrap_err().to_string();
        assert!(error.contains("cluster of 3 controllers"), "{error}");
        let again = Layout::prepare(dir.path(), &wanted(3)).unwrap();
        assert_eq!(again.controllers.iter().map(|c| c.quic).collect::<Vec<_>>(), ports);
        assert_eq!(std::fs::read(again.ca()).unwrap(), ca);
    }

    #[test]
    fn the_written_configuration_is_one_that_the_controller_takes() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::prepare(dir.path(), &wanted(3)).unwrap();
        for controller in &layout.controllers {
            let path = dir.path().join(&controller.id).join("controller.toml");
            let config = izar_controller::config::Config::load(&path).unwrap();
            assert_eq!(config.members.len(), 3);
            assert_eq!(config.admin.socket, controller.socket);
            assert_eq!(config.api.listen.port(), controller.api);
        }
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        std::fs::create_dir(&long).unwrap();
        assert!(Layout::prepare(&long, &wanted(1)).unwrap_err().to_string().contains("shorter path"));
    }
}
