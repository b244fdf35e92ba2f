//! The real `izar-agent` process: what it refuses at the start, and that it and its workers end together.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use izar_common::health::{Generation, WorkerState};
use izar_common::id::{ClusterId, Hash, Identity, Role};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::quic::{Connection, Endpoint, Receiver, Sender};
use izar_common::tls::{Files, NodeTls, pki};
use izar_common::wire::agent::{Assignment, Down, EngineOptions, Up, WorkerSpec};
use izar_common::wire::handshake::Open;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("not reached: {what}"))
}

/// A folder with a CA, a certificate for `c1` (controller) and `a1` (agent), and `agent.toml`.
struct Place {
    dir: tempfile::TempDir,
    controller: Endpoint,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = ClusterId::new("test").unwrap();
        pki::init(dir.path(), &cluster).unwrap();
        for (role, node) in [(Role::Controller, "c1"), (Role::Agent, "a1")] {
            let (cluster, site) = (cluster.clone(), "east".parse().unwrap());
            let identity = Identity { cluster, site, role, node: node.parse().unwrap() };
            pki::issue(dir.path(), &identity, &["127.0.0.1".to_owned()], dir.path()).unwrap();
        }
        let file = |name: &str| dir.path().join(name);
        let files = Files { ca: file("ca.pem"), cert: file("c1.pem"), key: file("c1.key") };
        let controller = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &NodeTls::load(&files).unwrap()).unwrap();
        let text = format!(
            r#"
cluster = "test"
site = "east"
node = "a1"
data_dir = "data"
controllers = ["{}"]
[tls]
ca = "ca.pem"
cert = "a1.pem"
key = "a1.key"
"#,
            controller.local_addr()
        );
        std::fs::write(file("agent.toml"), text).unwrap();
        Self { dir, controller }
    }
    fn config(&self) -> PathBuf {
        self.dir.path().join("agent.toml")
    }
    fn replace(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from));
        std::fs::write(self.config(), text.replace(from, to)).unwrap();
    }
    /// A worker that runs, by the process id that the agent reports.
    async fn assign(&self) -> (Session, u32) {
        let connection = within("an agent dials", self.controller.accept()).await.unwrap();
        let (open, tx, rx) = within("a session", connection.accept_bi()).await.unwrap();
        assert_eq!(open, Open::Session);
        let mut session = Session { _connection: connection, tx, rx };
        session.tx.send(&Down::Assignment(echo())).await.unwrap();
        let ready = async {
            loop {
                let Up::Report(report) = session.rx.expect::<Up>().await.unwrap() else { continue };
                if let Some(worker) = report.workers.iter().find(|worker| worker.state == WorkerState::Ready) {
                    return worker.pid.unwrap();
                }
            }
        };
        let pid = within("a ready worker", ready).await;
        (session, pid)
    }
}

struct Session {
    _connection: Connection,
    tx: Sender,
    rx: Receiver,
}

fn echo() -> Assignment {
    let manifest = Manifest {
        name: "m".into(),
        kind: Kind::Echo { first_token_us: 100, next_token_us: 100 },
        files: Vec::new(),
        text: File { name: "text.json".into(), hash: Hash([9; 32]), bytes: 0 },
        context: 4096,
        vocabulary: 1024,
        architecture: "echo".into(),
    };
    let worker = WorkerSpec {
        worker: "m.0".parse().unwrap(),
        deployment: "m".parse().unwrap(),
        revision: manifest.revision(),
        manifest,
        engine: EngineOptions::default(),
    };
    Assignment {
        generation: Generation { incarnation: 1, applied: 1 },
        workers: vec![worker],
        holds: Vec::new(),
        order: None,
    }
}

fn agent(config: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_izar-agent"))
        .arg("--config")
        .arg(config)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Waits for a process that must refuse to start; returns what it says.
async fn refusal(child: Child) -> String {
    let output = within("a refusal", child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

fn lives(pid: u32) -> bool {
    // A process that has ended and waits for its parent to look is no longer running.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

async fn gone(pid: u32) {
    let looking = async {
        while lives(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("the worker's end", looking).await;
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap() as i32), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_is_refused_with_its_place_or_reason() {
    let place = Place::new();
    let good = within("a check", agent(&place.config(), &["--check-config"]).wait_with_output()).await.unwrap();
    assert!(good.status.success() && !place.dir.path().join("data").exists(), "a check opens nothing");
    place.replace("node = \"a1\"", "node = \"a2\"");
    assert!(refusal(agent(&place.config(), &[])).await.contains("izar://test/east/agent/a1"));
    place.replace("site = ", "siet = ");
    let said = refusal(agent(&place.config(), &["--check-config"])).await;
    assert!(said.contains("agent.toml:3:") && said.contains("siet"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_agent_ends_its_workers_and_exits_well() {
    for how in ["SIGTERM", "SIGINT", "end of input"] {
        let place = Place::new();
        let mut child = agent(&place.config(), &["--stdin-lifeline"]);
        let (_session, worker) = place.assign().await;
        assert!(lives(worker));
        match how {
            "SIGTERM" => signal(&child, Signal::SIGTERM),
            "SIGINT" => signal(&child, Signal::SIGINT),
            _ => drop(child.stdin.take()),
        }
        let status = within(how, child.wait()).await.unwrap();
        assert!(status.success() && !lives(worker), "{how}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_takes_its_workers_with_it() {
    let place = Place::new();
    let mut child = agent(&place.config(), &[]);
    let (_session, worker) = place.assign().await;
    child.kill().await.unwrap();
    gone(worker).await;
    // What it left does not keep the next one from starting.
    let _next = agent(&place.config(), &[]);
    let (_session, next) = place.assign().await;
    assert_ne!(next, worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_do_not_share_a_data_directory() {
    let place = Place::new();
    let _first = agent(&place.config(), &[]);
    let _session = place.assign().await;
    let said = refusal(agent(&place.config(), &[])).await;
    assert!(said.contains("is in use by another agent"), "{said}");
}
