//! `izar-agent`: the daemon of a server that computes. With `worker` it is one of its own child processes; with
//! `inspect` it describes a model file, with `bench` it measures the engine, with `remediate` it is root's hand for a GPU.
#![forbid(unsafe_code)]

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use izar_agent::checked::checked;
use izar_agent::config::Config;
use izar_agent::daemon::Daemon;
use izar_common::{logging, service};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Threads of the daemon's runtime at most, and cores for each of them: it moves frames; the cores belong to the workers,
/// and a frame that is passed on by the thread that received it wakes nobody.
const RUNTIME_THREADS: usize = 4;
const CORES_EACH: usize = 4;

/// Runs the workers that the controllers assign to this server.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// The configuration file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Check the configuration and exit; says which of the files that it names cannot be used yet.
    #[arg(long)]
    check_config: bool,
    /// With --check-config: what was read, as JSON (for izar doctor).
    #[arg(long, requires = "check_config", hide = true)]
    json: bool,
    /// Check the configuration and certificates, and exit: 1 if a start or a reload would be refused.
    #[arg(long)]
    check_files: bool,
    /// Stop when standard input ends (used by `izar dev`, so that no child outlives it).
    #[arg(long, hide = true)]
    stdin_lifeline: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One replica: started by the agent, which holds the other end of the socket that is standard input.
    #[command(hide = true)]
    Worker {
        /// Which replica, so that process lists show it.
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        log_level: Option<String>,
    },
    /// Describe a model file or folder.
    Inspect {
        path: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Carry out one request of the agent that needs root; standard input is the request's socket (izar-gpu@.service).
    #[command(hide = true)]
    Remediate(izar_agent::remediate::Arguments),
    /// Ask a device questions with known answers.
    Probe(izar_agent::probe::Arguments),
    /// Measure the engine.
    #[command(subcommand)]
    Bench(izar_agent::bench::Command),
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let result = match arguments.command.take() {
        Some(Command::Worker { log_level, .. }) => worker(log_level.as_deref()),
        Some(Command::Inspect { path, json }) => izar_agent::inspect::run(&path, json),
        Some(Command::Remediate(arguments)) => izar_agent::remediate::run(&arguments),
        Some(Command::Probe(arguments)) => izar_agent::probe::run(&arguments),
        Some(Command::Bench(command)) => izar_agent::bench::run(command),
        None => match &arguments.config {
            Some(config) => daemon(config, &arguments),
            None => Err(anyhow::anyhow!("--config FILE is needed")),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("izar-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn worker(log_level: Option<&str>) -> anyhow::Result<()> {
    logging::init(log_level);
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("take standard input")?;
    let stream = UnixStream::from(stdin);
    stream.peer_addr().context("standard input is not the agent's socket; workers are started by the agent")?;
    izar_agent::serve::run(stream)
}

fn daemon(config: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    let path = config;
    let config = Config::load(path)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&checked(config)).context("write what was read")?);
        return Ok(());
    }
    if arguments.check_config || arguments.check_files {
        let unusable = izar_agent::daemon::unusable(&config);
        if let Some(reason) = unusable.as_ref().filter(|_| arguments.check_files) {
            anyhow::bail!("{reason}");
        }
        println!("{}: ok", path.display());
        unusable.iter().for_each(|reason| println!("not usable here and now: {reason}"));
        return Ok(());
    }
    logging::init(config.log.level.as_deref());
    let threads =
        std::thread::available_parallelism().map_or(1, |cores| (cores.get() / CORES_EACH).clamp(1, RUNTIME_THREADS));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let stdin_end = arguments.stdin_lifeline.then(stdin_end);
        let lifeline = async {
            match stdin_end {
                Some(end) => drop(end.await),
                None => std::future::pending().await,
            }
        };
        let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
        let daemon = service::extending(Daemon::start(config)).await?;
        let mut starting = true;
        {
            let linked = service::extending(daemon.linked());
            tokio::pin!(lifeline, linked);
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = interrupt.recv() => break,
                    () = &mut lifeline => break,
                    _ = hangup.recv() => daemon.reload(),
                    () = &mut linked, if starting => {
                        starting = false;
                        service::ready();
                    }
                }
            }
        }
        service::stopping("drains");
        service::extending(daemon.stop()).await;
        Ok(())
    })
}

/// Resolves when standard input ends. The thread is not waited for: a read of standard input cannot be cancelled.
fn stdin_end() -> oneshot::Receiver<()> {
    let (tx, rx) = oneshot::channel();
    std::thread::spawn(move || {
        let (mut stdin, mut buffer) = (std::io::stdin().lock(), [0; 256]);
        while stdin.read(&mut buffer).is_ok_and(|bytes| bytes > 0) {}
        let _ = tx.send(());
    });
    rx
}
