//! `izar dev`: a whole cluster on this machine, from real processes with real certificates, until Ctrl-C.
//!
//! Plans a folder, brings the model, starts the daemons, makes them serve, then only watches: a child that dies is
//! started again, the ready file follows what runs, and at the end nothing is left, workers included.

mod bring_up;
mod children;
mod layout;
mod model;
mod ports;
mod roster;

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::ready::Ready;
use children::Children;
use layout::Layout;
pub use model::{Model, SMOLLM2};

/// More daemons than this on one machine measure the machine, not Izar.
const MAX_AGENTS: usize = 16;

/// The port that the first controller takes if it is free and no other was asked for.
const DEFAULT_PORT: u16 = 8443;

#[derive(Debug, Args)]
pub struct Options {
    /// How many controllers: 1, 3 or 5
    #[arg(long, default_value_t = 1)]
    controllers: usize,
    /// How many agents
    #[arg(long, default_value_t = 1)]
    agents: usize,
    /// How many sites; only one is possible yet
    #[arg(long, default_value_t = 1)]
    sites: usize,
    /// smollm2-135m, echo (deterministic words, no download), or the path of a .gguf file or a model folder
    #[arg(long, default_value = model::SMOLLM2)]
    model: String,
    /// Echo: milliseconds until the first token
    #[arg(long, default_value_t = 5.0)]
    echo_first_ms: f64,
    /// Echo: milliseconds between tokens
    #[arg(long, default_value_t = 0.0)]
    echo_next_ms: f64,
    /// Replicas of the model [default: one for each agent]
    #[arg(long)]
    replicas: Option<u32>,
    /// Most requests that one replica computes at once [default: 32; echo: 256]
    #[arg(long)]
    max_batch: Option<u32>,
    /// Keep the cluster's data in this folder, and go on with what is there [default: a temporary folder]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write endpoint, CA, key and processes to this file, as JSON, whenever they change [default: DIR/ready.json]
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Also serve plain HTTP on loopback
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    plaintext: bool,
    /// HTTPS port of the first controller, the next ones follow; 0 takes any [default: 8443 if free, else any]
    #[arg(long)]
    api_port: Option<u16>,
    /// What the daemons log to DIR/logs: error, warn, info, debug or trace
    #[arg(long, default_value = "info")]
    log_level: String,
}

impl Options {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.sites == 1, "--sites {}: a second site is not built yet; use --sites 1", self.sites);
        ensure!(
            matches!(self.controllers, 1 | 3 | 5),
            "--controllers {}: use 1, 3 or 5 (an even number survives no more losses)",
            self.controllers
        );
        ensure!((1..=MAX_AGENTS).contains(&self.agents), "--agents {}: use 1 to {MAX_AGENTS}", self.agents);
        ensure!(self.replicas != Some(0), "--replicas 0: at least one is needed to answer");
        let levels = ["error", "warn", "info", "debug", "trace"];
        ensure!(levels.contains(&self.log_level.as_str()), "--log-level {}: use {}", self.log_level, levels.join(", "));
        for (flag, ms) in [("--echo-first-ms", self.echo_first_ms), ("--echo-next-ms", self.echo_next_ms)] {
            ensure!((0.0..=60_000.0).contains(&ms), "{flag} {ms}: use 0 to 60000 milliseconds");
        }
        Ok(())
    }

    fn model(&self) -> anyhow::Result<Model> {
        let us = |ms: f64| (ms * 1000.0).round() as u64;
        Model::parse(&self.model, us(self.echo_first_ms), us(self.echo_next_ms))
    }

    fn plan(&self) -> layout::Wanted {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        layout::Wanted {
            controllers: self.controllers,
            agents: self.agents,
            plaintext: self.plaintext,
            api_port: self.api_port,
            default_port: DEFAULT_PORT,
            threads_per_agent: (cores / self.agents).max(1),
            log_level: self.log_level.clone(),
        }
    }
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    options.check()?;
    let model = options.model()?;
    // From here on Ctrl-C ends what was begun instead of this process alone.
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let asked_to_stop = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    };
    tokio::pin!(asked_to_stop);

    let (folder, _temporary) = folder(options.dir.as_deref())?;
    let model = tokio::select! {
        model = model.fetch() => model?,
        () = &mut asked_to_stop => return Ok(()),
    };
    let layout = Layout::prepare(&folder, &options.plan())?;
    let children = Children::start(layout.specs()?)?;
    let result = tokio::select! {
        result = serve(&options, &layout, &model, &children) => result,
        () = &mut asked_to_stop => Ok(()),
    };
    eprintln!("izar dev: stopping");
    children.stop().await;
    if let Some(file) = &options.ready_file {
        // It speaks of processes that are no more.
        let _ = std::fs::remove_file(file);
    }
    result
}

/// Brings the cluster up, tells how to use it, and keeps the ready file true. Ends only by an error.
async fn serve(options: &Options, layout: &Layout, model: &Model, children: &Children) -> anyhow::Result<()> {
    let wanted = bring_up::Wanted {
        model,
        replicas: options.replicas.unwrap_or(options.agents as u32),
        max_batch: options.max_batch.or(model.default_batch()),
    };
    let key = bring_up::run(layout, &wanted, children, options.dir.is_some()).await?;
    let file = options.ready_file.clone().unwrap_or_else(|| layout.dir.join("ready.json"));
    let first = layout.controllers.first().context("there is a controller")?;
    let ready = Ready {
        endpoint: first.endpoint(),
        plaintext_endpoint: first.plaintext_endpoint(),
        ca: layout.ca(),
        key,
        model: model.name().to_owned(),
        dir: layout.dir.clone(),
        processes: Vec::new(),
    };
    let told = ready.clone();
    roster::follow(layout, children, ready, &file, || tell(&told, layout, &file)).await
}

/// Prints what a person needs next.
fn tell(ready: &Ready, layout: &Layout, file: &std::path::Path) {
    let others: Vec<String> = layout.controllers.iter().skip(1).map(|c| c.endpoint()).collect();
    let more = if others.is_empty() { String::new() } else { format!("  (also {})", others.join(", ")) };
    println!(
        "{} is ready: {} controllers, {} agents, folder {}\n",
        ready.model,
        layout.controllers.len(),
        layout.agents.len(),
        layout.dir.display()
    );
    println!("endpoint  {}{more}", ready.endpoint);
    if let Some(plain) = &ready.plaintext_endpoint {
        println!("plain     {plain}");
    }
    println!("ca        {}", ready.ca.display());
    println!("key       {}\n", ready.key);
    println!("{}\n", curl(ready));
    println!("izar chat --ready-file {}", quote(&file.display().to_string()));
    println!(
        "export IZAR_SOCKET={}   # for izar status, models, turns, …",
        quote(&layout.controllers[0].socket.display().to_string())
    );
    println!("\nCtrl-C stops everything.");
}

/// One line that streams an answer.
fn curl(ready: &Ready) -> String {
    let body = format!(
        r#"{{"model": "{}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}], "temperature": 0, "max_tokens": 64, "stream": true}}"#,
        ready.model
    );
    format!(
        "curl --cacert {} -N -H 'Authorization: Bearer {}' -H 'Content-Type: application/json' -d '{body}' {}/v1/chat/completions",
        quote(&ready.ca.display().to_string()),
        ready.key,
        ready.endpoint
    )
}

/// Quotes for a shell where it is needed.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The cluster's folder, and what removes it at the end if it is a temporary one.
fn folder(wanted: Option<&std::path::Path>) -> anyhow::Result<(PathBuf, Option<tempfile::TempDir>)> {
    use std::os::unix::fs::DirBuilderExt;
    let Some(dir) = wanted else {
        let temporary = tempfile::Builder::new().prefix("izar-dev-").tempdir().context("make a temporary folder")?;
        return Ok((temporary.path().to_owned(), Some(temporary)));
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("--dir: create {}", dir.display()))?;
    let dir = dir.canonicalize().with_context(|| format!("--dir: find {}", dir.display()))?;
    if !dir.is_dir() {
        bail!("--dir: {} is not a folder", dir.display());
    }
    Ok((dir, None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn check(arguments: &[&str], expected: Result<(), &str>) {
        let options = Line::parse_from(["dev"].iter().chain(arguments)).options;
        match (options.check(), expected) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (got, _) => panic!("{arguments:?}: {got:?}"),
        }
    }

    #[test]
    fn arguments_are_checked_before_anything_starts() {
        check(&[], Ok(()));
        check(&["--controllers", "3", "--agents", "2"], Ok(()));
        check(&["--sites", "2"], Err("not built yet"));
        check(&["--controllers", "2"], Err("use 1, 3 or 5"));
        check(&["--agents", "0"], Err("--agents 0"));
        check(&["--replicas", "0"], Err("--replicas 0"));
        check(&["--echo-first-ms", "nan"], Err("--echo-first-ms"));
        check(&["--log-level", "loud"], Err("--log-level loud"));
    }

    #[test]
    fn what_is_printed_can_be_pasted() {
        assert_eq!(quote("/tmp/izar-dev-1/ca.pem"), "/tmp/izar-dev-1/ca.pem");
        assert_eq!(quote("/tmp/it's here"), r"'/tmp/it'\''s here'");
    }
}
