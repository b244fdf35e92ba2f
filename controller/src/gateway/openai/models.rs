//! `GET /v1/models` and `GET /v1/models/{id}`: what is deployed.

use izar_common::id::DeploymentId;
use serde::Serialize;

use crate::gateway::error::Error;
use crate::gateway::models;
use crate::state::{Config, Deployment};

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    id: String,
    object: &'static str,
    /// Unix time in seconds at which its revision was registered.
    created: u64,
    owned_by: &'static str,
    /// Tokens of prompt and answer together; not OpenAI's, but what other servers of open models give.
    max_model_len: u32,
}

fn model(config: &Config, name: &DeploymentId, deployment: &Deployment) -> Option<Model> {
    let revision = config.models.get(&deployment.revision)?;
    Some(Model {
        id: name.to_string(),
        object: "model",
        created: revision.registered.ms() / 1000,
        owned_by: "izar",
        max_model_len: models::context(revision, deployment),
    })
}

/// Lists every name that may be asked for: deployments, then aliases.
pub fn list(config: &Config) -> Vec<u8> {
    let names = config.deployments.keys().chain(config.aliases.keys());
    let data = names.filter_map(|name| model(config, name, models::look_up(config, name.as_str())?)).collect();
    serde_json::to_vec(&List { object: "list", data }).expect("strings and numbers are JSON")
}

/// Shows one deployment.
pub fn one(config: &Config, name: &str) -> Result<Vec<u8>, Error> {
    let named = name.parse().ok().zip(models::look_up(config, name));
    let found = named.and_then(|(name, deployment)| model(config, &name, deployment));
    let model = found.ok_or_else(|| models::unknown(config, name))?;
    Ok(serde_json::to_vec(&model).expect("strings and numbers are JSON"))
}
