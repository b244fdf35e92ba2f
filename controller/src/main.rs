//! `izar-controller`: reads its configuration, runs the daemon until a signal, exits 0. SIGHUP reads certificates anew.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use izar_common::service;
use izar_controller::config::Config;
use izar_controller::daemon::{self, Daemon};
use tokio::signal::unix::{SignalKind, signal};

/// Threads of the runtime at most; it takes half of the cores. The other half is for consensus, which has threads of its
/// own, and for what else runs here; and what a thread passes on to itself wakes no other.
const RUNTIME_THREADS: usize = 16;

/// Answers the API, keeps the replicated state and schedules requests across agents.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long)]
    config: PathBuf,
    /// Check the configuration and exit; says which of the files that it names cannot be used yet.
    #[arg(long)]
    check_config: bool,
    /// Check the configuration, certificates and secrets, and exit: 1 if a start or a reload would be refused.
    #[arg(long)]
    check_files: bool,
    /// Stop when standard input ends (used by `izar dev`, so that no child outlives it).
    #[arg(long, hide = true)]
    stdin_lifeline: bool,
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("izar-controller: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    if arguments.check_config || arguments.check_files {
        let unusable = daemon::unusable(&config);
        if arguments.check_files && !unusable.is_empty() {
            anyhow::bail!("{}", unusable.join("\n"));
        }
        println!("{}: ok", arguments.config.display());
        unusable.iter().for_each(|reason| println!("not usable here and now: {reason}"));
        return Ok(());
    }
    let admin = service::inherited_socket()?;
    izar_common::logging::init(config.log.level.as_deref());
    let threads = std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).clamp(1, RUNTIME_THREADS));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
        let lifeline = stdin_end();
        tokio::pin!(lifeline);
        // A start may wait for other members. What it has begun by then bears a crash.
        let daemon = tokio::select! {
            started = service::extending(Daemon::start(config, admin)) => started?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = &mut lifeline, if arguments.stdin_lifeline => return Ok(()),
        };
        service::ready();
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                () = &mut lifeline, if arguments.stdin_lifeline => break,
                _ = hangup.recv() => daemon.reload(),
            }
        }
        service::stopping("drains");
        service::extending(daemon.stop()).await;
        Ok(())
    });
    // A read of standard input cannot be cancelled; do not wait for it.
    runtime.shutdown_background();
    result
}

/// Resolves when standard input ends.
async fn stdin_end() {
    let mut stdin = tokio::io::stdin();
    let _ = tokio::io::copy(&mut stdin, &mut tokio::io::sink()).await;
}
