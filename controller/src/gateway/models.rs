//! From a model's name to what a request needs of it: deployment, revision, context and language.

use std::sync::Arc;

use izar_common::id::{DeploymentId, Hash};
use izar_common::text::Text;

use super::error::Error;
use crate::agents::Agents;
use crate::catalog::Catalog;
use crate::state::{Config, Deployment, Model};

/// A deployment as one request sees it, whatever is deployed meanwhile.
#[derive(Clone)]
pub struct Served {
    pub deployment: DeploymentId,
    pub revision: Hash,
    /// Tokens of prompt and answer together.
    pub context: u32,
    pub vocabulary: u32,
    pub text: Arc<Text>,
}

/// Tokens of prompt and answer together: what the model was made for, or less if the operator says so.
pub fn context(model: &Model, deployment: &Deployment) -> u32 {
    match deployment.engine.max_context {
        0 => model.manifest.context,
        limit => limit.min(model.manifest.context),
    }
}

/// Finds what a name means now: until workers of a new revision are ready, the old one.
pub fn find(config: &Config, agents: &Agents, catalog: &Catalog, name: &str) -> Result<Served, Error> {
    let deployment = look_up(config, name).ok_or_else(|| unknown(config, name))?;
    let revision = match config.rolling.contains(&deployment.id) {
        true => agents.revision(config, deployment),
        false => deployment.revision,
    };
    let model = config.models.get(&revision).ok_or_else(|| unknown(config, name))?;
    let text = catalog
        .text(&revision)
        .ok_or_else(|| Error::NoReplica { reason: format!("the tokenizer of {name} is not here yet") })?;
    Ok(Served {
        deployment: deployment.id.clone(),
        revision,
        context: context(model, deployment),
        vocabulary: model.manifest.vocabulary,
        text,
    })
}

/// The deployment that a name means: its own, or an alias.
pub fn look_up<'a>(config: &'a Config, name: &str) -> Option<&'a Deployment> {
    config.deployments.get(name).or_else(|| config.deployments.get(config.aliases.get(name)?))
}

/// Says that a name is not served, and which are.
pub fn unknown(config: &Config, name: &str) -> Error {
    // A name may be anything that a client sent.
    let name = name.chars().take(100).collect();
    let names = config.deployments.keys().chain(config.aliases.keys());
    Error::UnknownModel { name, models: names.map(|id| id.to_string()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::clock::Hlc;
    use izar_common::manifest::{File, Kind, Manifest};
    use izar_common::wire::agent::EngineOptions;

    fn config(max_context: u32) -> Config {
        let text = File { name: "text.json".into(), hash: Hash([1; 32]), bytes: 1 };
        let kind = Kind::Echo { first_token_us: 0, next_token_us: 0 };
        let manifest = Manifest {
            name: "echo".into(),
            kind,
            files: Vec::new(),
            text,
            context: 4096,
            vocabulary: 512,
            architecture: "echo".into(),
        };
        let revision = manifest.revision();
        let engine = EngineOptions { max_context, ..EngineOptions::default() };
        let id = DeploymentId::new("echo").unwrap();
        let deployment = Deployment { id, revision, replicas: 1, engine, constraints: Default::default() };
        let mut config = Config::default();
        config.models.insert(revision, Model { revision, manifest, registered: Hlc::from_ms(5000) });
        config.deployments.insert(deployment.id.clone(), deployment);
        config
    }

    #[test]
    fn the_operator_may_shorten_the_context_but_not_stretch_it() {
        for (max_context, expected) in [(0, 4096), (100, 100), (9999, 4096)] {
            let config = config(max_context);
            let deployment = look_up(&config, "echo").unwrap();
            assert_eq!(context(&config.models[&deployment.revision], deployment), expected);
        }
    }

    #[test]
    fn an_alias_means_its_deployment() {
        let mut config = config(0);
        config.aliases.insert("gpt-4o".parse().unwrap(), "echo".parse().unwrap());
        assert_eq!(look_up(&config, "gpt-4o").unwrap().id.as_str(), "echo");
        assert!(unknown(&config, "x").to_string().ends_with("there are: echo, gpt-4o"));
    }

    #[test]
    fn an_unknown_name_is_answered_with_those_that_exist() {
        let config = config(0);
        assert!(look_up(&config, "gpt-9").is_none());
        assert_eq!(unknown(&config, "gpt-9").to_string(), "there is no model `gpt-9`; there are: echo");
        assert!(unknown(&config, &"x".repeat(5000)).to_string().len() < 300);
    }
}
