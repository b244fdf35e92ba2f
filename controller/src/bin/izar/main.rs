//! `izar`: the operator's tool. A thin client of a controller's admin socket, and the way to try everything on one
//! machine (`izar dev`, `izar chat`, `izar bench`).
//!
//! It decides nothing that a controller decides: it asks, and shows the answer as a short table or, with `--json`, as
//! the controller gave it.
#![forbid(unsafe_code)]

mod admin;
mod backup;
mod bench;
mod bundle;
mod chat;
mod dev;
mod doctor;
mod drain;
mod gpus;
mod http;
mod keys;
mod listings;
mod models;
mod pki;
mod programs;
mod ready;
mod restore;
mod show;
mod sse;
mod status;
mod tenants;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

/// Operate an Izar cluster, or run one on this machine (`izar dev`).
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The controller's admin socket [default: $IZAR_SOCKET, else /run/izar/admin.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    pub json: bool,
    /// In listings, show what this controller knows without asking the others: when there is no quorum
    #[arg(long, global = true)]
    stale: bool,
}

impl Common {
    /// A listing's path, as new as was asked for.
    pub fn listing(&self, path: &str) -> String {
        let separator = if path.contains('?') { '&' } else { '?' };
        if self.stale { format!("{path}{separator}stale=true") } else { path.to_owned() }
    }

    /// The client of the chosen controller.
    pub fn admin(&self) -> admin::Admin {
        self.admin_of(Path::new(admin::DEFAULT_SOCKET))
    }

    /// Like `admin`, where a configuration says which socket it is if nobody else does.
    pub fn admin_of(&self, default: &Path) -> admin::Admin {
        let socket = self.socket.clone().or_else(|| std::env::var_os("IZAR_SOCKET").map(PathBuf::from));
        admin::Admin::new(socket.unwrap_or_else(|| default.to_owned()))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the node, its leader, what is wanted and what is reached
    Status,
    /// API keys
    #[command(subcommand)]
    Keys(keys::Command),
    /// Tenants and their shares
    #[command(subcommand)]
    Tenants(tenants::Tenants),
    /// Projects: whose keys they hold, how urgent their requests are
    #[command(subcommand)]
    Projects(tenants::Projects),
    /// Models and their deployments
    #[command(subcommand)]
    Models(models::Command),
    /// Agents and their workers
    #[command(subcommand)]
    Agents(listings::Agents),
    /// GPUs: how each is, why, and what would mend it
    Gpus(gpus::Command),
    /// Requests that run on this controller now
    #[command(subcommand)]
    Requests(listings::Requests),
    /// Tell what happened to a request: where it waited, why it was placed there, moved or refused
    Explain {
        /// Its id: of X-Request-Id, of an answer, or of a listing
        request: String,
    },
    /// The record of requests
    #[command(subcommand)]
    Turns(listings::Turns),
    /// Prepare this controller for a stop: clients move on, another controller leads
    Drain,
    /// Take a drain back
    Undrain,
    /// Take, list and verify backups
    Backup(backup::Backup),
    Restore(restore::Restore),
    Recover(restore::Recover),
    Doctor(doctor::Doctor),
    SupportBundle(bundle::Bundle),
    /// Talk to a model in the terminal
    Chat(chat::Options),
    /// The private CA and the certificates of nodes
    #[command(subcommand)]
    Pki(pki::Command),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Command),
    /// Run a whole cluster on this machine until Ctrl-C
    Dev(dev::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("izar: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let common = arguments.common;
    let command = match arguments.command {
        // These have their own threads, or none.
        Command::Bench(command) => return bench::run(command, common.json).map(|()| ExitCode::SUCCESS),
        Command::Pki(command) => return pki::run(command, common.json).map(|()| ExitCode::SUCCESS),
        other => other,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let result = runtime.block_on(async {
        let done = match command {
            Command::Doctor(command) => return doctor::run(command, &common).await,
            Command::SupportBundle(command) => bundle::run(command, &common).await,
            Command::Status => status::run(&common).await,
            Command::Keys(command) => keys::run(command, &common).await,
            Command::Tenants(command) => tenants::tenants(command, &common).await,
            Command::Projects(command) => tenants::projects(command, &common).await,
            Command::Models(command) => models::run(command, &common).await,
            Command::Agents(command) => listings::agents(command, &common).await,
            Command::Gpus(command) => gpus::run(command, &common).await,
            Command::Requests(command) => listings::requests(command, &common).await,
            Command::Explain { request } => listings::explain(&request, &common).await,
            Command::Turns(command) => listings::turns(command, &common).await,
            Command::Drain => drain::run(true, &common).await,
            Command::Undrain => drain::run(false, &common).await,
            Command::Backup(command) => backup::run(command, &common).await,
            Command::Restore(command) => restore::restore(command, &common).await,
            Command::Recover(command) => restore::recover(command, &common).await,
            Command::Chat(options) => chat::run(options).await,
            Command::Dev(options) => dev::run(options).await,
            Command::Bench(_) | Command::Pki(_) => unreachable!("returned above"),
        };
        done.map(|()| ExitCode::SUCCESS)
    });
    // A thread may still wait for a line of standard input; it must not keep the program alive.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_anywhere() {
        let arguments = Arguments::try_parse_from(["izar", "keys", "list", "--json", "--socket", "/s"]).unwrap();
        assert!(arguments.common.json);
        assert_eq!(arguments.common.socket.unwrap(), PathBuf::from("/s"));
    }

    #[test]
    fn a_listing_is_stale_only_if_asked() {
        let common = |stale| Common { socket: None, json: false, stale };
        assert_eq!(common(false).listing("/v1/keys"), "/v1/keys");
        assert_eq!(common(true).listing("/v1/keys"), "/v1/keys?stale=true");
        assert_eq!(common(true).listing("/v1/turns?limit=5"), "/v1/turns?limit=5&stale=true");
    }
}
