//! `izar models`: what can be served, and what is.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use izar_common::wire::agent::{Activations, CacheType, Device, Kernels, Quant};
use izar_controller::control::view::{DeploymentView, Deployments, ModelView, Models};
use serde_json::{Value, json};

use crate::admin::{Admin, IMPORT_TIMEOUT, escape};
use crate::{Common, programs, show};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a model's files, copy them to the controller and register them
    Import(Import),
    /// Serve a model under a name, or change how it is served
    Deploy(Deploy),
    /// Serve it no longer
    Undeploy {
        /// The deployment's name
        name: String,
    },
    /// Let another name mean a deployment: requests for it go there from now on
    Alias {
        /// The other name
        alias: String,
        /// The deployment's name
        deployment: String,
    },
    /// Take an alias away
    Unalias { alias: String },
    /// List models and their deployments
    List,
    /// Look into a model's files on this machine, without a cluster
    Inspect {
        /// A .gguf file, or a folder in Hugging Face form
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Import {
    /// A .gguf file, or a folder in Hugging Face form, readable by the controller
    #[arg(required_unless_present = "echo", conflicts_with = "echo")]
    path: Option<PathBuf>,
    /// The echo model: deterministic words without weights, for tests and benchmarks
    #[arg(long)]
    echo: bool,
    /// Echo: milliseconds until the first token
    #[arg(long, default_value_t = 5.0, requires = "echo", conflicts_with = "path")]
    first_ms: f64,
    /// Echo: milliseconds between tokens
    #[arg(long, default_value_t = 0.0, requires = "echo", conflicts_with = "path")]
    next_ms: f64,
    /// The model's name
    #[arg(long)]
    name: String,
    /// Refuse the file unless its SHA-256 is this
    #[arg(long, conflicts_with = "echo")]
    sha256: Option<String>,
}

#[derive(Debug, Args)]
pub struct Deploy {
    /// A model's name (its newest revision) or the beginning of a revision
    model: String,
    /// The name that users ask for [default: the model's name]
    #[arg(long)]
    name: Option<String>,
    /// Workers, each on an agent of its own while there are enough; 0 keeps the name and serves nothing
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    /// Most requests that one replica computes at once
    #[arg(long)]
    max_batch: Option<u32>,
    /// Most tokens of prompt and answer together [default: what the model was made for]
    #[arg(long)]
    max_context: Option<u32>,
    /// What holds the model and computes it: cpu, or cuda:0 for the first card [default: cpu]
    #[arg(long)]
    device: Option<Device>,
    /// How weights are kept in memory: f32, f16, int8 or int4 [default: int4]
    #[arg(long)]
    quant: Option<Quant>,
    /// How finely activations are rounded before a product with integer weights: int8 or int16 [default: int16 for int8
    /// weights, int8 for int4]
    #[arg(long)]
    activations: Option<Activations>,
    /// What computes: auto (the fastest that the processor has), reference, portable, avx2 or avx512 [default: auto]
    #[arg(long)]
    kernels: Option<Kernels>,
    /// How keys and values are kept: f16 or f32 [default: f16]
    #[arg(long)]
    cache_type: Option<CacheType>,
    /// Memory of each replica for keys and values, in MiB [default: 512]
    #[arg(long)]
    cache_mib: Option<u64>,
    /// Memory that each worker needs on its agent, in MiB [default: its files and its cache]
    #[arg(long)]
    memory_mib: Option<u64>,
    /// GPUs that each worker needs for itself
    #[arg(long)]
    gpus: Option<u32>,
    /// A label that its agents must have (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// Never two workers of it on one agent
    #[arg(long)]
    apart: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it has no `=`, as in rack=r7")?;
    Ok((key.to_owned(), value.to_owned()))
}

pub async fn run(command: Command, common: &Common) -> anyhow::Result<()> {
    let admin = common.admin();
    match command {
        Command::Import(import) => {
            let model: ModelView = admin.post_within("/v1/models", &import_body(&import)?, IMPORT_TIMEOUT).await?;
            show::print(common.json, &model, |m| format!("{} is registered as revision {}\n", m.name, m.revision))
        }
        Command::Deploy(deploy) => {
            let view = self::deploy(&admin, &deploy).await?;
            show::print(common.json, &view, |d| {
                format!(
                    "{} serves {} (revision {}) with {} replicas; see: izar models list\n",
                    d.name,
                    d.model,
                    show::short(&d.revision),
                    d.wanted
                )
            })
        }
        Command::Undeploy { name } => {
            let gone: Value = admin.delete(&format!("/v1/deployments/{}", escape(&name))).await?;
            show::print(common.json, &gone, |_| format!("{name} is not served any longer\n"))
        }
        Command::Alias { alias, deployment } => {
            let body = json!({ "deployment": deployment });
            let set: Value = admin.put(&format!("/v1/aliases/{}", escape(&alias)), &body).await?;
            show::print(common.json, &set, |_| format!("{alias} means {deployment}\n"))
        }
        Command::Unalias { alias } => {
            let gone: Value = admin.delete(&format!("/v1/aliases/{}", escape(&alias))).await?;
            show::print(common.json, &gone, |_| format!("{alias} means nothing any longer\n"))
        }
        Command::List => list(&admin, common).await,
        Command::Inspect { path } => inspect(path, common.json),
    }
}

fn import_body(import: &Import) -> anyhow::Result<Value> {
    let name = &import.name;
    let Some(path) = &import.path else {
        let us = |ms: f64, flag: &str| -> anyhow::Result<u64> {
            anyhow::ensure!((0.0..=60_000.0).contains(&ms), "{flag}: {ms} is not in 0..=60000 milliseconds");
            Ok((ms * 1000.0).round() as u64)
        };
        let echo = json!({
            "first_token_us": us(import.first_ms, "--first-ms")?,
            "next_token_us": us(import.next_ms, "--next-ms")?,
        });
        return Ok(json!({ "name": name, "echo": echo }));
    };
    // The controller has another working directory.
    let path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
    Ok(json!({ "name": name, "path": path, "sha256": import.sha256 }))
}

async fn deploy(admin: &Admin, deploy: &Deploy) -> anyhow::Result<DeploymentView> {
    let body = json!({
        "name": deploy.name,
        "model": deploy.model,
        "replicas": deploy.replicas,
        "max_batch": deploy.max_batch,
        "max_context": deploy.max_context,
        "quant": deploy.quant,
        "device": deploy.device,
        "activations": deploy.activations,
        "kernels": deploy.kernels,
        "cache_type": deploy.cache_type,
        "cache_bytes": deploy.cache_mib.map(|mib| mib.saturating_mul(1 << 20)),
        "constraints": {
            "memory_bytes": deploy.memory_mib.unwrap_or(0).saturating_mul(1 << 20),
            "gpus": deploy.gpus.unwrap_or(0),
            "labels": deploy.label.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "apart": deploy.apart,
        },
    });
    admin.post("/v1/deployments", &body).await
}

async fn list(admin: &Admin, common: &Common) -> anyhow::Result<()> {
    let models: Models = admin.get(&common.listing("/v1/models")).await?;
    let deployments: Deployments = admin.get(&common.listing("/v1/deployments")).await?;
    if common.json {
        let both = json!({ "models": models.models, "deployments": deployments.deployments });
        return show::print(true, &both, |_| String::new());
    }
    show::print(false, &(), |()| human_models(&models) + "\n" + &human_deployments(&deployments))
}

fn human_models(models: &Models) -> String {
    let rows: Vec<Vec<String>> = models
        .models
        .iter()
        .map(|m| {
            vec![
                m.name.clone(),
                show::short(&m.revision),
                m.architecture.clone(),
                m.context.to_string(),
                show::bytes(m.bytes),
                if m.here { "yes" } else { "coming" }.to_owned(),
                show::time(m.registered_ms),
            ]
        })
        .collect();
    show::table(&["MODEL", "REVISION", "KIND", "CONTEXT", "SIZE", "HERE", "REGISTERED (UTC)"], &rows)
}

fn human_deployments(deployments: &Deployments) -> String {
    let mut rows = Vec::new();
    for d in &deployments.deployments {
        let reached = format!("{} of {}", d.ready, d.wanted);
        let cache = format!("{} cache of {} MiB", d.cache_type, d.cache_bytes >> 20);
        let how = format!("{}: {}, {} kernels, {cache}, batches of {}", d.device, d.quant, d.kernels, d.max_batch);
        rows.push(vec![d.name.to_string(), show::short(&d.revision), reached, how]);
        for w in &d.workers {
            let place = format!(
                "on {}: {}{}",
                w.agent,
                w.state,
                match (w.outdated, w.retiring) {
                    (true, _) => ", outdated",
                    (_, true) => ", retiring",
                    _ => "",
                }
            );
            let detail = match w.numerics {
                Some(numerics) if w.detail.is_empty() => format!("numerics {numerics}"),
                _ => w.detail.clone(),
            };
            let revision = if w.revision == d.revision { String::new() } else { show::short(&w.revision) };
            rows.push(vec![format!("  {}", w.worker), revision, place, detail]);
        }
        if d.unplaced > 0 {
            let why = if d.unmet.is_empty() { format!("{} without a place", d.unplaced) } else { d.unmet.clone() };
            rows.push(vec![String::new(), String::new(), String::new(), why]);
        }
        if !d.aliases.is_empty() {
            let names: Vec<&str> = d.aliases.iter().map(|alias| alias.as_str()).collect();
            rows.push(vec![String::new(), String::new(), String::new(), format!("also named {}", names.join(", "))]);
        }
    }
    show::table(&["DEPLOYMENT", "REVISION", "READY", "DETAIL"], &rows)
}

/// Becomes `izar-agent inspect`: only agents read weights.
fn inspect(path: PathBuf, json: bool) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    let program = programs::beside("izar-agent")?;
    let mut command = std::process::Command::new(&program);
    command.arg("inspect").arg(path);
    if json {
        command.arg("--json");
    }
    Err(command.exec()).with_context(|| format!("run {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: Command,
    }

    fn import(arguments: &[&str]) -> Result<Import, String> {
        let line = ["izar", "import"].iter().chain(arguments);
        match Line::try_parse_from(line).map_err(|e| e.to_string())?.command {
            Command::Import(import) => Ok(import),
            _ => unreachable!("import was asked for"),
        }
    }

    #[test]
    fn an_import_is_of_a_path_or_of_echo() {
        assert!(import(&["--name", "m"]).is_err());
        assert!(import(&["/p", "--echo", "--name", "m"]).is_err());
        assert!(import(&["/p", "--first-ms", "1", "--name", "m"]).is_err());
        let echo = import(&["--echo", "--first-ms", "2.5", "--name", "m"]).unwrap();
        assert_eq!(
            import_body(&echo).unwrap(),
            json!({ "name": "m", "echo": { "first_token_us": 2500, "next_token_us": 0 } })
        );
        let slow = import(&["--echo", "--first-ms", "1e9", "--name", "m"]).unwrap();
        assert!(import_body(&slow).unwrap_err().to_string().contains("--first-ms"));
        let missing = import(&["/no/such/file", "--name", "m"]).unwrap();
        assert!(import_body(&missing).unwrap_err().to_string().contains("/no/such/file"));
    }
}
