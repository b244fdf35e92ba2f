//! A cluster run by `izar dev`, as a newcomer runs it: one command, a ready file, Ctrl-C.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::cli::Admin;
use crate::client::Client;
use crate::{logs, process, waiting};

/// From the start of `izar dev` to ready, certificates and an election included.
const START: Duration = Duration::from_secs(60);
/// Like [`START`], with the model to download and its weights to load.
const START_WITH_WEIGHTS: Duration = Duration::from_secs(300);
/// From Ctrl-C to the end of the last process.
const STOP: Duration = Duration::from_secs(30);

/// What `izar dev --ready-file` says.
#[derive(Debug, Clone, Deserialize)]
pub struct Ready {
    pub endpoint: String,
    pub plaintext_endpoint: Option<String>,
    pub ca: PathBuf,
    pub key: String,
    pub processes: Vec<Process>,
}

/// A process of the cluster.
#[derive(Debug, Clone, Deserialize)]
pub struct Process {
    /// `controller`, `agent` or `worker`.
    pub role: String,
    pub id: String,
    pub pid: u32,
    pub agent: Option<String>,
    pub admin_socket: Option<PathBuf>,
    pub endpoint: Option<String>,
}

/// How to start a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    controllers: usize,
    agents: usize,
    model: String,
}

impl Options {
    /// The echo model, as fast as `izar dev` makes it.
    pub fn echo(controllers: usize, agents: usize) -> Self {
        Self { controllers, agents, model: "echo".into() }
    }

    /// A model with weights.
    pub fn model(name: &str, controllers: usize, agents: usize) -> Self {
        Self { model: name.into(), ..Self::echo(controllers, agents) }
    }

    pub fn start(self) -> Cluster {
        let folder = tempfile::Builder::new().prefix("izar-").tempdir().expect("a temporary folder can be made");
        let limit = if self.model == "echo" { START } else { START_WITH_WEIGHTS };
        let mark = process::new_mark();
        let (dir, ready_file) = (folder.path().join("c"), folder.path().join("ready.json"));
        let output = std::fs::File::create(folder.path().join("dev.out")).expect("the folder is ours");
        let mut command = Command::new(crate::binaries::path("izar"));
        command.arg("dev").arg("--dir").arg(&dir).arg("--ready-file").arg(&ready_file);
        command.args(["--controllers", &self.controllers.to_string(), "--agents", &self.agents.to_string()]);
        command.args(["--model", &self.model]);
        command.env(process::MARK, &mark).stdin(Stdio::null());
        command.stdout(output.try_clone().expect("a file has two ends")).stderr(output);
        let child = command.spawn().expect("izar runs");
        let mut cluster = Cluster { child, dir, ready_file, mark, model: self.model, finished: false, folder };
        waiting::until("izar dev to be ready", limit, || {
            if let Some(status) = cluster.child.try_wait()? {
                panic!("izar dev ended with {status}:\n{}", cluster.output());
            }
            cluster.read_ready().map(|_| ())
        });
        cluster
    }
}

/// A running cluster. Dropping it kills what is left; [`Cluster::finish`] also looks at what it leaves.
#[derive(Debug)]
pub struct Cluster {
    child: Child,
    dir: PathBuf,
    ready_file: PathBuf,
    mark: String,
    model: String,
    finished: bool,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// The deployment's name.
    pub fn model(&self) -> &str {
        &self.model
    }
    /// The cluster's folder: configuration, certificates, data, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }
    /// What marks every process of this cluster.
    pub fn mark(&self) -> &str {
        &self.mark
    }
    /// What `izar dev` printed.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("dev.out")).unwrap_or_default()
    }

    fn read_ready(&self) -> Result<Ready> {
        let text = std::fs::read(&self.ready_file).context("read the ready file")?;
        serde_json::from_slice(&text).context("the ready file")
    }
    /// The ready file as it stands.
    pub fn ready(&self) -> Ready {
        self.read_ready().expect("the ready file is replaced, never half written")
    }

    /// A client of the first controller, over HTTPS, with the cluster's key.
    pub fn client(&self) -> Client {
        let ready = self.ready();
        Client::new(&ready.endpoint, &ready.ca, Some(&ready.key)).expect("the ready file's endpoint works")
    }

    /// Processes of a role that run now, by id.
    pub fn processes(&self, role: &str) -> Vec<Process> {
        let mut processes = self.ready().processes;
        processes.retain(|p| p.role == role);
        processes.sort_by(|a, b| a.id.cmp(&b.id));
        processes
    }

    /// The workers of a deployment that run now.
    pub fn workers(&self, deployment: &str) -> Vec<Process> {
        let mut workers = self.processes("worker");
        workers.retain(|p| p.id.rsplit_once('.').is_some_and(|(name, _)| name == deployment));
        workers
    }

    /// A client of each controller that runs now, by the controller's id.
    pub fn clients(&self) -> Vec<(String, Client)> {
        let ready = self.ready();
        let client = |p: Process| {
            let endpoint = p.endpoint.expect("a controller has an endpoint");
            (p.id, Client::new(&endpoint, &ready.ca, Some(&ready.key)).expect("the ready file's endpoints work"))
        };
        self.processes("controller").into_iter().map(client).collect()
    }

    /// The admin socket of the first controller that runs.
    pub fn admin(&self) -> Admin {
        self.admins().remove(0).1
    }
    /// The admin socket of each controller that runs now, by its id.
    pub fn admins(&self) -> Vec<(String, Admin)> {
        let admin = |p: Process| (p.id, Admin::new(&p.admin_socket.expect("a controller has an admin socket")));
        self.processes("controller").into_iter().map(admin).collect()
    }

    /// Imports and deploys an echo model with times of its own, and waits until every controller sees it ready.
    pub fn deploy_echo(&self, name: &str, replicas: usize, first_ms: u64, next_ms: u64) {
        self.admin().deploy_echo(name, replicas, first_ms, next_ms);
        for (_, admin) in self.admins() {
            admin.wait_ready(name, replicas as u64);
        }
        waiting::until_true("the ready file to name the workers", waiting::SOON, || {
            self.workers(name).len() == replicas
        });
    }

    /// Waits until that many controllers answer, know a leader, and see `replicas` ready workers of a deployment.
    pub fn wait_serving(&self, controllers: usize, deployment: &str, replicas: u64) {
        waiting::until("every controller to serve", waiting::SOON, || {
            let admins = self.admins();
            ensure!(admins.len() == controllers, "{} controllers run", admins.len());
            for (id, admin) in admins {
                ensure!(admin.status()?["leader"].is_string(), "{id} knows no leader");
                let ready = admin.ready_replicas(deployment)?;
                ensure!(ready == replicas, "{id} sees {ready} ready replicas");
            }
            Ok(())
        });
    }

    /// Kills a process as a power cut would, and waits until the ready file names its successor.
    pub fn kill_and_wait(&self, victim: &Process) {
        process::kill_hard(victim.pid);
        self.wait_successor(victim);
    }
    /// Waits until the ready file names another process in the place of one that was killed.
    pub fn wait_successor(&self, victim: &Process) {
        waiting::until("the killed process's successor", waiting::SOON, || {
            let successor = self.processes(&victim.role).into_iter().find(|p| p.id == victim.id);
            let successor = successor.with_context(|| format!("{} is away", victim.id))?;
            ensure!(successor.pid != victim.pid, "{} is still the old one", victim.id);
            Ok(())
        });
    }

    /// Presses Ctrl-C; checks that no process stays and that the logs hold no warning but the `expected` ones.
    pub fn finish(mut self, expected: &[&str]) {
        process::signal(self.child.id(), Signal::SIGINT).expect("izar dev runs");
        waiting::until_true("izar dev to end", STOP, || self.child.try_wait().is_ok_and(|status| status.is_some()));
        let status = self.child.try_wait().expect("a child can be asked").expect("it has ended");
        let left: Vec<String> = process::marked(&self.mark).into_iter().map(process::command_line).collect();
        assert_eq!(left, [] as [String; 0], "processes outlive Ctrl-C");
        assert!(status.success(), "izar dev ended with {status}:\n{}", self.output());
        logs::check(&self.logs(), expected);
        self.finished = true;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if std::thread::panicking() {
            eprintln!("izar dev said:\n{}\nlogs:\n{}", self.output(), logs::excerpt(&self.logs()));
        }
        // First `izar dev`, so that it starts nothing again.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in process::marked(&self.mark) {
            let _ = process::signal(pid, Signal::SIGKILL);
        }
    }
}
