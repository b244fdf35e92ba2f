//! The operator's tool, run as an operator runs it, `--json` read back.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::waiting;

/// What a run of a program left.
#[derive(Debug)]
pub struct Output {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program of ours to its end.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    run_in(program, arguments, &[])
}

/// Like [`run`], with more in the environment.
pub fn run_in(program: &str, arguments: &[&str], environment: &[(String, String)]) -> Output {
    let mut command = Command::new(crate::binaries::path(program));
    command.args(arguments).stdin(std::process::Stdio::null()).envs(environment.iter().cloned());
    let output = command.output().unwrap_or_else(|error| panic!("run {program}: {error}"));
    Output {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a daemon that must refuse to start; returns what it said. Panics if it runs on.
pub fn refused_start(program: &str, arguments: &[&str]) -> String {
    const LIMIT: Duration = Duration::from_secs(20);
    let mut child = Command::new(crate::binaries::path(program))
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("run {program}: {error}"));
    let begin = Instant::now();
    while child.try_wait().expect("a child can be asked").is_none() {
        if begin.elapsed() > LIMIT {
            let _ = child.kill();
            let output = child.wait_with_output().expect("a killed child ends");
            panic!("{program} {arguments:?} started: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().expect("an ended child has output");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{program} {arguments:?} ended well: {said}");
    said
}

/// A controller's admin socket, asked through `izar`.
#[derive(Debug, Clone)]
pub struct Admin {
    socket: String,
}

/// A turn as `izar turns list --json` shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub struct Turn {
    /// The request's `X-Request-Id`.
    #[serde(rename = "turn")]
    pub id: String,
    /// `running`, or how it ended: `finished`, `cancelled`, `failed`, `abandoned`.
    pub outcome: String,
    pub finish: Option<String>,
    pub reason: Option<String>,
    /// The controller that took it.
    pub node: String,
    pub deployment: String,
    pub stream: bool,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

impl Admin {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_str().expect("our paths are UTF-8").to_owned() }
    }

    /// Runs `izar --socket S ARGUMENTS`.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["--socket", self.socket.as_str()];
        all.extend(arguments);
        run("izar", &all)
    }

    /// Runs `izar --socket S ARGUMENTS --json`; its answer, or what it said when it failed.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.push("--json");
        let output = self.run(&all);
        if !output.success {
            bail!("izar {}: {}", arguments.join(" "), output.stderr.trim());
        }
        serde_json::from_str(&output.stdout).with_context(|| format!("izar {}: {}", arguments.join(" "), output.stdout))
    }

    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// Makes a key and returns it.
    pub fn create_key(&self, more: &[&str]) -> Result<String> {
        let mut arguments = vec!["keys", "create"];
        arguments.extend(more);
        let answer = self.json(&arguments)?;
        let key = answer["key"].as_str().with_context(|| format!("no `key` in {answer}"))?;
        Ok(key.to_owned())
    }

    /// Imports the echo model with times of its own, in milliseconds, and deploys it under the same name.
    pub fn deploy_echo(&self, name: &str, replicas: usize, first_ms: u64, next_ms: u64) {
        let (first, next, replicas) = (first_ms.to_string(), next_ms.to_string(), replicas.to_string());
        let import = ["models", "import", "--echo", "--name", name, "--first-ms", &first, "--next-ms", &next];
        self.json(&import).expect("the echo model can be imported");
        let deploy = ["models", "deploy", name, "--replicas", &replicas];
        self.json(&deploy).expect("an imported model can be deployed");
    }

    /// Waits until this controller sees exactly that many ready replicas of a deployment.
    pub fn wait_ready(&self, deployment: &str, replicas: u64) {
        waiting::until("ready replicas", waiting::SOON, || {
            let ready = self.ready_replicas(deployment)?;
            ensure!(ready == replicas, "{ready} of {replicas} replicas of {deployment} are ready");
            Ok(())
        });
    }

    /// Returns how many replicas of a deployment this controller sees ready; 0 if it does not know the deployment.
    pub fn ready_replicas(&self, deployment: &str) -> Result<u64> {
        let status = self.status()?;
        let found = status["deployments"].as_array().into_iter().flatten().find(|d| d["name"] == deployment);
        Ok(found.and_then(|d| d["ready"].as_u64()).unwrap_or(0))
    }

    /// Returns every turn that this controller knows.
    pub fn turns(&self) -> Result<Vec<Turn>> {
        // More than any story asks.
        let mut answer = self.json(&["turns", "list", "--limit", "5000"])?;
        Ok(serde_json::from_value(answer["turns"].take())?)
    }

    /// Returns the turns by id; fails if one stands twice.
    pub fn turns_by_id(&self) -> Result<BTreeMap<String, Turn>> {
        let mut by_id = BTreeMap::new();
        for turn in self.turns()? {
            let id = turn.id.clone();
            ensure!(by_id.insert(id.clone(), turn).is_none(), "turn {id} is recorded twice");
        }
        Ok(by_id)
    }
}
