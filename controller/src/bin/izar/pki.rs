//! `izar pki`: the private CA of a cluster. Needs no controller; the folder with `ca.key` belongs in a safe place.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use izar_common::id::{ClusterId, Identity, NodeId, Role, SiteId};
use izar_common::tls::pki;
use serde_json::json;

use crate::show;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the CA of a cluster: ca.pem for every node, ca.key to keep away from them
    Init {
        /// The folder to make it in; nothing there is overwritten
        #[arg(long, default_value = "pki")]
        dir: PathBuf,
        #[arg(long)]
        cluster: String,
    },
    /// Issue a node's certificate and key, or (--role api) those that API clients see
    Issue(Issue),
}

#[derive(Debug, Args)]
pub struct Issue {
    /// The CA's folder
    #[arg(long, default_value = "pki")]
    dir: PathBuf,
    #[arg(long)]
    cluster: String,
    #[arg(long, required_if_eq_any([("role", "controller"), ("role", "agent")]))]
    site: Option<String>,
    #[arg(long, value_enum)]
    role: Kind,
    /// The node's name; also the name of the files
    #[arg(long)]
    node: String,
    /// A name or address under which it is reached; may be given many times
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<String>,
    /// Where to write <node>.pem and <node>.key [default: the CA's folder]
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Controller,
    Agent,
    Api,
}

pub fn run(command: Command, as_json: bool) -> anyhow::Result<()> {
    match command {
        Command::Init { dir, cluster } => {
            let cluster = ClusterId::new(&cluster).context("--cluster")?;
            pki::init(&dir, &cluster)?;
            let made = json!({ "ca": dir.join("ca.pem"), "key": dir.join("ca.key") });
            show::print(as_json, &made, |_| format!("the CA of {cluster} lies in {}\n", dir.display()))
        }
        Command::Issue(issue) => self::issue(issue, as_json),
    }
}

fn issue(issue: Issue, as_json: bool) -> anyhow::Result<()> {
    let node = NodeId::new(&issue.node).context("--node")?;
    let out = issue.out.unwrap_or_else(|| issue.dir.clone());
    let role = match issue.role {
        Kind::Controller => Some(Role::Controller),
        Kind::Agent => Some(Role::Agent),
        Kind::Api => None,
    };
    let whose = if let Some(role) = role {
        let cluster = ClusterId::new(&issue.cluster).context("--cluster")?;
        let site = SiteId::new(issue.site.as_deref().unwrap_or_default()).context("--site")?;
        let identity = Identity { cluster, site, role, node: node.clone() };
        pki::issue(&issue.dir, &identity, &issue.hosts, &out)?;
        identity.to_string()
    } else {
        anyhow::ensure!(!issue.hosts.is_empty(), "--host: an API certificate needs the names that clients use");
        pki::issue_server(&issue.dir, node.as_str(), &issue.hosts, &out)?;
        issue.hosts.join(", ")
    };
    let (cert, key) = (out.join(format!("{node}.pem")), out.join(format!("{node}.key")));
    let made = json!({ "cert": cert, "key": key });
    show::print(as_json, &made, |_| format!("{whose}: {} and {}\n", cert.display(), key.display()))
}
