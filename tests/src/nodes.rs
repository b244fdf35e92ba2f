//! Daemons without `izar dev`: certificates from `izar pki`, configuration files, and processes that a story starts,
//! stops and puts relays between.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;

use crate::cli::{self, Admin};
use crate::client::Client;
use crate::journal::Journal;
use crate::manager::Manager;
use crate::relay::Relay;
use crate::{logs, process, waiting};

/// The name of every cluster that this module makes.
pub const CLUSTER: &str = "story";
const SITE: &str = "local";

/// A site whose processes the story starts one by one.
#[derive(Debug)]
pub struct Site {
    folder: tempfile::TempDir,
    controllers: Vec<Place>,
    /// A relay on every controller's QUIC socket, if the story wants them.
    pub relays: Vec<Relay>,
    running: BTreeMap<String, Child>,
    mark: String,
    level: &'static str,
}

/// Where a controller is reached over QUIC.
#[derive(Debug, Clone, Copy)]
struct Place {
    listen: SocketAddr,
    /// Its relay's address, or its own.
    reached: SocketAddr,
}

impl Site {
    /// Writes certificates, secrets and configurations for controllers `c1`, `c2`, … With `relayed`, nodes reach each
    /// other only through relays that record.
    pub fn new(controllers: usize, relayed: bool) -> Self {
        Self::with_log_level(controllers, relayed, "info")
    }

    /// Like [`Site::new`], with daemons that log at a level of the story's choice.
    pub fn with_log_level(controllers: usize, relayed: bool, level: &'static str) -> Self {
        let folder = tempfile::Builder::new().prefix("izar-").tempdir().expect("a temporary folder can be made");
        let mut site = Self {
            folder,
            controllers: Vec::new(),
            relays: Vec::new(),
            running: BTreeMap::new(),
            mark: process::new_mark(),
            level,
        };
        for i in 1..=controllers {
            let listen = free_udp_port();
            let mut reached = listen;
            if relayed {
                let relay = Relay::udp(&format!("quic of c{i}"), listen);
                reached = relay.address;
                site.relays.push(relay);
            }
            site.controllers.push(Place { listen, reached });
        }
        make_ca(&site.pki(), CLUSTER);
        issue_server(&site.pki(), "api", &site.pki());
        write_secret(&site.path("pepper"));
        write_secret(&site.path("master.key"));
        std::fs::create_dir(site.logs()).expect("the folder is ours");
        for i in 1..=controllers {
            let node = format!("c{i}");
            issue(&site.pki(), "controller", &node, &site.pki());
            let text = site.controller_config(&node, i - 1);
            std::fs::write(site.config(&node), text).expect("the folder is ours");
        }
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    /// The folder of the private CA: `ca.pem`, and a certificate and key for each node.
    pub fn pki(&self) -> PathBuf {
        self.path("pki")
    }
    pub fn logs(&self) -> PathBuf {
        self.path("logs")
    }
    pub fn config(&self, node: &str) -> PathBuf {
        self.path(&format!("{node}.toml"))
    }
    pub fn data(&self, node: &str) -> PathBuf {
        self.path(&format!("{node}-data"))
    }
    /// A controller's QUIC socket itself, past any relay.
    pub fn quic(&self, controller: usize) -> SocketAddr {
        self.controllers[controller - 1].listen
    }

    fn controller_config(&self, node: &str, index: usize) -> String {
        let folder = self.folder.path().display();
        let (listen, level) = (self.controllers[index].listen, self.level);
        let mut text = format!(
            r#"cluster = "{CLUSTER}"
site = "{SITE}"
node = "{node}"
data_dir = "{folder}/{node}-data"

[tls]
ca = "{folder}/pki/ca.pem"
cert = "{folder}/pki/{node}.pem"
key = "{folder}/pki/{node}.key"

[quic]
listen = "{listen}"

[api]
listen = "127.0.0.1:0"
cert = "{folder}/pki/api.pem"
key = "{folder}/pki/api.key"
plaintext_listen = "127.0.0.1:0"

[admin]
socket = "{folder}/{node}.sock"

[secrets]
pepper = "{folder}/pepper"
master_key = "{folder}/master.key"

[log]
level = "{level}"
"#
        );
        for (i, place) in self.controllers.iter().enumerate() {
            let (id, reached) = (i + 1, place.reached);
            text += &format!("\n[[members]]\nid = {id}\nnode = \"c{id}\"\naddress = \"{reached}\"\n");
        }
        text
    }

    /// Issues a certificate for an agent and writes its configuration.
    pub fn write_agent(&self, node: &str) {
        issue(&self.pki(), "agent", node, &self.pki());
        self.write_agent_config(node, &self.pki());
    }

    /// Writes an agent's configuration with certificates from a folder of the story's choice.
    pub fn write_agent_config(&self, node: &str, certificates: &Path) {
        let (folder, certificates) = (self.folder.path().display(), certificates.display());
        let controllers: Vec<String> = self.controllers.iter().map(|place| format!("\"{}\"", place.reached)).collect();
        let text = format!(
            r#"cluster = "{CLUSTER}"
site = "{SITE}"
node = "{node}"
data_dir = "{folder}/{node}-data"
controllers = [{}]

[tls]
ca = "{certificates}/ca.pem"
cert = "{certificates}/{node}.pem"
key = "{certificates}/{node}.key"

[log]
level = "{level}"
"#,
            controllers.join(", "),
            level = self.level
        );
        std::fs::write(self.config(node), text).expect("the folder is ours");
    }

    /// Starts every controller and waits until each knows a leader.
    pub fn start_controllers(&mut self) {
        for i in 1..=self.controllers.len() {
            self.start("izar-controller", &format!("c{i}"));
        }
        for i in 1..=self.controllers.len() {
            self.wait_led(i);
        }
    }

    /// Waits until a controller knows a leader.
    pub fn wait_led(&mut self, controller: usize) {
        let node = format!("c{controller}");
        waiting::until("a leader", waiting::SOON, || {
            let child = self.running.get_mut(&node).context("not started")?;
            if let Some(status) = child.try_wait()? {
                panic!("{node} ended with {status}:\n{}", logs::excerpt(&self.logs()));
            }
            let status = self.admin(controller).status()?;
            ensure!(status["leader"].is_string(), "{node} knows no leader");
            Ok(())
        });
    }

    /// Starts a node's daemon on the configuration that was written for it.
    pub fn start(&mut self, program: &str, node: &str) {
        let mut command = Command::new(crate::binaries::path(program));
        command.stdin(Stdio::null());
        self.spawn(command, node);
    }

    /// Like [`Site::start`], with something in its environment, and in that of its workers.
    pub fn start_with(&mut self, program: &str, node: &str, name: &str, value: &str) {
        let mut command = Command::new(crate::binaries::path(program));
        command.stdin(Stdio::null()).env(name, value);
        self.spawn(command, node);
    }

    /// Like [`Site::start`], as a service manager's child.
    pub fn start_under(&mut self, manager: &Manager, program: &str, node: &str) {
        self.spawn(manager.command(&crate::binaries::path(program)), node);
    }

    /// Like [`Site::start`], with its records sent to a journal; an agent's data may lie on a nearly full disk.
    pub fn start_with_journal(&mut self, journal: &Journal, program: &str, node: &str, full: bool) {
        let disk = full.then(|| self.path(&format!("{node}-data")));
        self.spawn(journal.command(&crate::binaries::path(program), disk.as_deref()), node);
    }

    fn spawn(&mut self, mut command: Command, node: &str) {
        let log = std::fs::File::options().create(true).append(true).open(self.logs().join(format!("{node}.log")));
        let log = log.expect("the folder is ours");
        let child = command
            .arg("--config")
            .arg(self.config(node))
            .env(process::MARK, &self.mark)
            .env_remove("JOURNAL_STREAM")
            .env("IZAR_FAKE_NVML", self.path(&format!("{node}.gpus")))
            .stdout(log.try_clone().expect("a file has two ends"))
            .stderr(log)
            .spawn()
            .expect("our programs run");
        self.running.insert(node.to_owned(), child);
    }

    /// Writes an agent's certificate and configuration, and starts it.
    pub fn start_agent(&mut self, node: &str) {
        self.write_agent(node);
        self.start("izar-agent", node);
    }

    pub fn admin(&self, controller: usize) -> Admin {
        Admin::new(&self.path(&format!("c{controller}.sock")))
    }
    /// A client of a controller's HTTPS listener.
    pub fn client(&self, controller: usize, key: Option<&str>) -> Client {
        self.client_of(controller, "endpoint", key)
    }
    /// A client of a controller's plaintext listener.
    pub fn plaintext_client(&self, controller: usize, key: Option<&str>) -> Client {
        self.client_of(controller, "plaintext_endpoint", key)
    }
    fn client_of(&self, controller: usize, listener: &str, key: Option<&str>) -> Client {
        let status = self.admin(controller).status().expect("the controller runs");
        let endpoint = status["api"][listener].as_str().expect("the controller has this listener");
        Client::new(endpoint, &self.pki().join("ca.pem"), key).expect("a controller's own endpoint works")
    }

    /// Ends one node as `systemctl stop` does and checks that it ends well.
    pub fn stop(&mut self, node: &str) {
        let mut child = self.running.remove(node).expect("the story started it");
        process::signal(child.id(), Signal::SIGTERM).unwrap_or_else(|error| panic!("stop {node}: {error}"));
        waiting::until_true("the daemon to end", waiting::SOON, || child.try_wait().is_ok_and(|s| s.is_some()));
        let status = child.wait().expect("it has ended");
        assert!(status.success(), "{node} ended with {status}:\n{}", logs::excerpt(&self.logs()));
    }

    /// Ends one node as a power cut would.
    pub fn kill(&mut self, node: &str) {
        let mut child = self.running.remove(node).expect("the story started it");
        process::kill_hard(child.id());
        waiting::until_true("the daemon to end", waiting::SOON, || !process::runs(child.id()));
        // Whoever held one of its threads may have seen the end first.
        let _ = child.wait();
    }

    /// The process of a node that runs.
    pub fn pid(&self, node: &str) -> u32 {
        self.running[node].id()
    }

    /// Changes the text of a node's configuration; panics if it has nothing to change.
    pub fn edit_config(&self, node: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.config(node)).expect("it was written");
        assert!(text.contains(from), "{from} is not in the configuration of {node}");
        std::fs::write(self.config(node), text.replace(from, to)).expect("the folder is ours");
    }

    /// Stops everything, agents first; checks what is left and the logs.
    pub fn finish(mut self, expected: &[&str]) {
        let nodes: Vec<String> = self.running.keys().cloned().collect();
        for node in nodes {
            self.stop(&node);
        }
        let left: Vec<String> = process::marked(&self.mark).into_iter().map(process::command_line).collect();
        assert_eq!(left, [] as [String; 0], "processes outlive their daemons");
        logs::check(&self.logs(), expected);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("logs:\n{}", logs::excerpt(&self.logs()));
        }
        for child in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in process::marked(&self.mark) {
            let _ = process::signal(pid, Signal::SIGKILL);
        }
    }
}

/// Makes a private CA in a folder.
pub fn make_ca(folder: &Path, cluster: &str) {
    let folder = folder.to_str().expect("our paths are UTF-8");
    izar(&["pki", "init", "--dir", folder, "--cluster", cluster]);
}

/// Issues a node's certificate; `out` gets `<node>.pem` and `<node>.key`.
pub fn issue(ca: &Path, role: &str, node: &str, out: &Path) {
    issue_of(CLUSTER, ca, role, node, out);
}

/// Like [`issue`], for a cluster of any name.
pub fn issue_of(cluster: &str, ca: &Path, role: &str, node: &str, out: &Path) {
    let (ca, out) = (ca.to_str().expect("our paths are UTF-8"), out.to_str().expect("our paths are UTF-8"));
    let node_of = ["--cluster", cluster, "--site", SITE, "--role", role, "--node", node];
    let mut arguments = vec!["pki", "issue", "--dir", ca, "--out", out, "--host", "127.0.0.1"];
    arguments.extend(node_of);
    izar(&arguments);
}

/// Issues a certificate for an API listener.
pub fn issue_server(ca: &Path, name: &str, out: &Path) {
    let (ca, out) = (ca.to_str().expect("our paths are UTF-8"), out.to_str().expect("our paths are UTF-8"));
    let hosts = ["--host", "127.0.0.1", "--host", "localhost"];
    let mut arguments = vec!["pki", "issue", "--dir", ca, "--out", out, "--cluster", CLUSTER];
    arguments.extend(["--role", "api", "--node", name].iter().chain(&hosts));
    izar(&arguments);
}

fn izar(arguments: &[&str]) {
    let output = cli::run("izar", arguments);
    assert!(output.success, "izar {}: {}", arguments.join(" "), output.stderr);
}

/// Writes 32 random bytes as hexadecimal digits, for its owner alone.
fn write_secret(path: &Path) {
    use std::io::Write;
    let bytes: [u8; 32] = rand::random();
    let digits: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).expect("the folder is ours");
    file.write_all(digits.as_bytes()).expect("a small file can be written");
}

/// Finds a UDP port that was free a moment ago.
fn free_udp_port() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has a free port");
    socket.local_addr().expect("a bound socket has an address")
}
