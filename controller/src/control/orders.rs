//! What is changed through the admin socket: each order is checked here, then proposed as one command.

use std::path::PathBuf;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State as Extract};
use izar_common::chat::Class;
use izar_common::id::{DeploymentId, Hash, KeyId, NAME_LIMIT, NodeId, ProjectId, TenantId};
use izar_common::manifest::Manifest;
use izar_common::wire::agent::{Activations, CacheType, Device, EngineOptions, Kernels, Quant};
use rand::Rng;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::error::Error;
use super::view::{self, AgentDetail, CreatedKey, DeploymentView, KeyView, ModelView};
use super::{Control, Shared};
use crate::state::command::{Command, Reply};
use crate::state::tenants::{DEADLINE_LIMIT_MS, DEFAULT, WEIGHT_LIMIT};
use crate::state::{Config, Constraints, Deployment, Key, KeyStatus, Model, Project, REPLICA_LIMIT, Standing, Tenant};
use crate::{import, planner};

/// An order is a few fields; a path has at most 4 KiB.
const BODY_LIMIT: usize = 64 << 10;

/// Requests of one key that may run at once through one controller, if nobody says how many; and at most.
const DEFAULT_CONCURRENT: u32 = 256;
const MAX_CONCURRENT: u32 = 100_000;

/// A note is a line.
const NOTE_BYTES: usize = 256;

/// Sequences in a batch: beyond this a step takes seconds on any processor.
const MAX_BATCH: u32 = 4096;

/// Memory for keys and values: below this no sequence fits, beyond it the number was meant in another unit.
const MIN_CACHE: u64 = 1 << 20;
const MAX_CACHE: u64 = 1 << 44;

/// GPUs of one worker, and labels that its agent must have.
const MAX_GPUS: u32 = 64;
const MAX_LABELS: usize = 32;

/// The longest that jobs on a draining agent may be waited for: a day.
const MAX_DRAIN_MS: u64 = 86_400_000;

/// An echo that takes longer than this for a token is a typing error.
const MAX_ECHO_US: u64 = 60_000_000;

/// The beginning of every key, so that a key that leaked is recognised as one.
const KEY_PREFIX: &str = "sk-izar-";

/// Characters of a key after its prefix: 62^40 is 238 bits.
const KEY_CHARACTERS: usize = 40;

/// Digits of a revision that name it, at least.
const MIN_PREFIX: usize = 6;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateKey {
    #[serde(default)]
    note: String,
    max_concurrent: Option<u32>,
    project: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    name: String,
    path: Option<PathBuf>,
    sha256: Option<Hash>,
    echo: Option<Echo>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Echo {
    first_token_us: u64,
    next_token_us: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Deploy {
    name: Option<String>,
    model: String,
    replicas: Option<u32>,
    max_batch: Option<u32>,
    max_context: Option<u32>,
    device: Option<Device>,
    quant: Option<Quant>,
    activations: Option<Activations>,
    kernels: Option<Kernels>,
    cache_type: Option<CacheType>,
    cache_bytes: Option<u64>,
    #[serde(default)]
    constraints: Constraints,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetAlias {
    deployment: DeploymentId,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetStanding {
    /// `null`: like any other agent.
    standing: Option<Standing>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutTenant {
    weight: Option<u32>,
}

/// What is not said stays as it is; of a new project it is the default.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutProject {
    tenant: Option<TenantId>,
    class: Option<Class>,
    deadline_ms: Option<u32>,
    available: Option<bool>,
}

pub(super) async fn read<T: DeserializeOwned>(body: Body) -> Result<T, Error> {
    let bytes = axum::body::to_bytes(body, BODY_LIMIT).await;
    let bytes = bytes.map_err(|e| Error::Invalid(format!("the body could not be read: {e}")))?;
    parse(&bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "the body".to_owned() } else { path };
        Error::Invalid(format!("{field}: {}", error.into_inner()))
    })
}

impl Control {
    pub(super) async fn order(&self, command: Command) -> Result<(), Error> {
        match self.parts.raft.propose(command).await? {
            Reply::Done => Ok(()),
            Reply::Refused(refusal) => Err(refusal.into()),
        }
    }

    pub(super) async fn current(&self) -> Result<std::sync::Arc<Config>, Error> {
        self.parts.raft.read_index().await?;
        Ok(self.parts.raft.config().borrow().clone())
    }
}

pub async fn create_key(Extract(control): Shared, body: Body) -> Result<Json<CreatedKey>, Error> {
    let order: CreateKey = read(body).await?;
    let secret = new_secret();
    let at = control.parts.raft.clock().now();
    let key = Key {
        id: new_key_id(),
        project: check_project(order.project.as_deref())?,
        secret_hash: control.parts.pepper.keyed_hash(&secret),
        max_concurrent: check_concurrent(order.max_concurrent)?,
        status: KeyStatus::Active,
        created: at,
        note: check_note(order.note)?,
    };
    let view = KeyView::from(&key);
    control.order(Command::CreateKey(key)).await?;
    log::info!(key:% = view.id; "key is created");
    Ok(Json(CreatedKey { key: secret, view }))
}

fn new_secret() -> String {
    let random = rand::rng().sample_iter(rand::distr::Alphanumeric).take(KEY_CHARACTERS).map(char::from);
    KEY_PREFIX.chars().chain(random).collect()
}

fn new_key_id() -> KeyId {
    let random: u64 = rand::random();
    KeyId::new(&format!("key-{random:016x}")).expect("`key-` and hexadecimal digits are a name")
}

fn check_project(project: Option<&str>) -> Result<ProjectId, Error> {
    ProjectId::new(project.unwrap_or(DEFAULT)).map_err(|e| Error::Invalid(format!("project: {e}")))
}

fn check_concurrent(wanted: Option<u32>) -> Result<u32, Error> {
    in_range("max_concurrent", wanted.unwrap_or(DEFAULT_CONCURRENT), 1, MAX_CONCURRENT)
}

fn check_note(note: String) -> Result<String, Error> {
    if note.len() > NOTE_BYTES {
        return Err(Error::Invalid(format!("note: {} bytes are more than {NOTE_BYTES}", note.len())));
    }
    if note.chars().any(char::is_control) {
        return Err(Error::Invalid("note: control characters are not allowed".into()));
    }
    Ok(note)
}

fn in_range(field: &str, value: u32, low: u32, high: u32) -> Result<u32, Error> {
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(Error::Invalid(format!("{field}: {value} is not in {low}..={high}")))
    }
}

pub async fn revoke_key(Extract(control): Shared, Path(id): Path<String>) -> Result<Json<KeyView>, Error> {
    let id = KeyId::new(&id).map_err(|e| Error::Invalid(format!("id: {e}")))?;
    let config = control.current().await?;
    let key = config.keys.get(&id).ok_or_else(|| Error::NotFound(format!("there is no key {id}")))?;
    control.order(Command::RevokeKey(id)).await?;
    log::info!(key:% = key.id; "key is revoked");
    Ok(Json(KeyView { status: KeyStatus::Revoked, ..key.into() }))
}

pub async fn import(Extract(control): Shared, body: Body) -> Result<Json<ModelView>, Error> {
    let order: Import = read(body).await?;
    // Whatever is imported can be deployed under its own name.
    check_name(&order.name)?;
    let Ok(place) = control.importing.clone().try_acquire_owned() else {
        return Err(Error::Conflict("another import runs on this controller; wait for it to end".into()));
    };
    let source = check_source(&order)?;
    let (name, store) = (order.name, control.parts.store.clone());
    // Reads and copies whole models; the place is held until the copy ends, even if the caller leaves.
    let work = tokio::task::spawn_blocking(move || {
        let _place = place;
        match source {
            Source::Files { path, sha256 } => import::import(&path, &name, sha256, &store),
            Source::Echo(echo) => import::echo(&name, echo.first_token_us, echo.next_token_us, &store),
        }
    });
    let manifest: Manifest = work
        .await
        .map_err(|_| Error::Internal("the import ended unexpectedly; see the controller's log".into()))?
        .map_err(|e| Error::Invalid(format!("{:#}", anyhow::Error::from(e))))?;
    let model = Model { revision: manifest.revision(), manifest, registered: control.parts.raft.clock().now() };
    control.order(Command::RegisterModel(model.manifest.clone())).await?;
    log::info!(model = model.manifest.name, revision:% = model.revision; "model is registered");
    let config = control.parts.raft.config().borrow().clone();
    let model = config.models.get(&model.revision).unwrap_or(&model);
    Ok(Json(view::model(model, &config, |hash| control.parts.store.has(hash))))
}

/// What is imported.
#[derive(Debug)]
enum Source {
    Files { path: PathBuf, sha256: Option<Hash> },
    Echo(Echo),
}

fn check_source(order: &Import) -> Result<Source, Error> {
    match (&order.path, &order.echo) {
        (Some(path), None) if path.is_absolute() => Ok(Source::Files { path: path.clone(), sha256: order.sha256 }),
        (Some(path), None) => Err(Error::Invalid(format!("path: {} is not absolute", path.display()))),
        (None, Some(echo)) => {
            for (field, us) in
                [("echo.first_token_us", echo.first_token_us), ("echo.next_token_us", echo.next_token_us)]
            {
                if us > MAX_ECHO_US {
                    return Err(Error::Invalid(format!("{field}: {us} is more than {MAX_ECHO_US}")));
                }
            }
            if order.sha256.is_some() {
                return Err(Error::Invalid("sha256: the echo model has no file".into()));
            }
            Ok(Source::Echo(Echo { ..*echo }))
        }
        _ => Err(Error::Invalid("give either path or echo".into())),
    }
}

pub async fn deploy(Extract(control): Shared, body: Body) -> Result<Json<DeploymentView>, Error> {
    let order: Deploy = read(body).await?;
    let config = control.current().await?;
    let deployment = check_deployment(&order, &config)?;
    control.order(Command::Deploy(deployment.clone())).await?;
    log::info!(deployment:% = deployment.id, revision:% = deployment.revision, replicas = deployment.replicas; "deployment is wanted");
    let config = control.parts.raft.config().borrow().clone();
    Ok(Json(view::deployment(&deployment, &config, &control.parts.agents.fleet())))
}

/// A name that a deployment and all its workers can have.
fn check_name(name: &str) -> Result<DeploymentId, Error> {
    let id = DeploymentId::new(name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    if !planner::can_be_named(&id) {
        let most = NAME_LIMIT - format!(".{}", 2 * REPLICA_LIMIT - 1).len();
        let reason =
            format!("name: `{id}` has {} characters; {most} leave room for the numbers of workers", name.len());
        return Err(Error::Invalid(reason));
    }
    Ok(id)
}

fn check_deployment(order: &Deploy, config: &Config) -> Result<Deployment, Error> {
    let model = find_model(&order.model, config)?;
    let name = order.name.as_deref().unwrap_or(&model.manifest.name);
    let id = check_name(name)?;
    let defaults = EngineOptions::default();
    let context = model.manifest.context;
    let engine = EngineOptions {
        max_batch: in_range("max_batch", order.max_batch.unwrap_or(defaults.max_batch), 1, MAX_BATCH)?,
        max_context: match order.max_context {
            Some(tokens) => in_range("max_context", tokens, 1, context)?,
            None => defaults.max_context,
        },
        threads: defaults.threads,
        device: order.device.unwrap_or(defaults.device),
        quant: order.quant.unwrap_or(defaults.quant),
        activations: order.activations.unwrap_or(defaults.activations),
        kernels: order.kernels.unwrap_or(defaults.kernels),
        cache: order.cache_type.unwrap_or(defaults.cache),
        cache_bytes: match order.cache_bytes {
            Some(0) | None => 0,
            Some(bytes) if (MIN_CACHE..=MAX_CACHE).contains(&bytes) => bytes,
            Some(bytes) => {
                return Err(Error::Invalid(format!(
                    "cache_bytes: {bytes} is not 0 (the default) or in {MIN_CACHE}..={MAX_CACHE}"
                )));
            }
        },
    };
    if let (Device::Cuda(_), Kernels::Portable | Kernels::Avx2 | Kernels::Avx512) = (engine.device, engine.kernels) {
        let reason = format!("kernels: {} run on a CPU, not on {}: say auto", engine.kernels, engine.device);
        return Err(Error::Invalid(reason));
    }
    let replicas = in_range("replicas", order.replicas.unwrap_or(1), 0, REPLICA_LIMIT)?;
    let constraints = check_constraints(&order.constraints)?;
    Ok(Deployment { id, revision: model.revision, replicas, engine, constraints })
}

fn check_constraints(constraints: &Constraints) -> Result<Constraints, Error> {
    let Constraints { memory_bytes, gpus, labels, .. } = constraints;
    if *memory_bytes > MAX_CACHE {
        return Err(Error::Invalid(format!("constraints.memory_bytes: {memory_bytes} is more than {MAX_CACHE}")));
    }
    in_range("constraints.gpus", *gpus, 0, MAX_GPUS)?;
    if labels.len() > MAX_LABELS {
        return Err(Error::Invalid(format!("constraints.labels: {} are more than {MAX_LABELS}", labels.len())));
    }
    let long = |word: &&String| word.is_empty() || word.len() > NAME_LIMIT || word.contains(char::is_control);
    match labels.iter().flat_map(|(key, value)| [key, value]).find(long) {
        Some(word) => Err(Error::Invalid(format!(
            "constraints.labels: {word:?} is empty, longer than {NAME_LIMIT} bytes or not printable"
        ))),
        None => Ok(constraints.clone()),
    }
}

/// Finds a model by its name (the newest revision of it) or by the beginning of a revision.
fn find_model<'a>(wanted: &str, config: &'a Config) -> Result<&'a Model, Error> {
    let named = config.models.values().filter(|m| m.manifest.name == wanted);
    if let Some(newest) = named.max_by_key(|m| m.registered) {
        return Ok(newest);
    }
    let is_prefix = wanted.len() >= MIN_PREFIX && wanted.bytes().all(|b| b.is_ascii_hexdigit());
    let digits = wanted.to_ascii_lowercase();
    let mut matching = config.models.values().filter(|m| is_prefix && m.revision.to_string().starts_with(&digits));
    match (matching.next(), matching.next()) {
        (Some(model), None) => Ok(model),
        (Some(_), Some(_)) => Err(Error::Invalid(format!("model: more than one revision begins with {wanted}"))),
        _ => {
            let mut names: Vec<&str> = config.models.values().map(|m| m.manifest.name.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            let there =
                if names.is_empty() { "none is registered".into() } else { format!("there is {}", names.join(", ")) };
            Err(Error::NotFound(format!("model: there is no {wanted}; {there}")))
        }
    }
}

pub async fn undeploy(Extract(control): Shared, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let id = DeploymentId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    control.order(Command::Undeploy(id.clone())).await?;
    log::info!(deployment:% = id; "deployment is no longer wanted");
    Ok(Json(json!({ "undeployed": id })))
}

pub async fn set_alias(Extract(control): Shared, Path(name): Path<String>, body: Body) -> Result<Json<Value>, Error> {
    let (alias, order) = (check_name(&name)?, read::<SetAlias>(body).await?);
    let deployment = Some(order.deployment.clone());
    control.order(Command::SetAlias { alias: alias.clone(), deployment }).await?;
    log::info!(alias:%, deployment:% = order.deployment; "alias is set");
    Ok(Json(json!({ "alias": alias, "deployment": order.deployment })))
}

pub async fn remove_alias(Extract(control): Shared, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let alias = DeploymentId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    control.order(Command::SetAlias { alias: alias.clone(), deployment: None }).await?;
    log::info!(alias:%; "alias is taken away");
    Ok(Json(json!({ "alias": alias, "deployment": null })))
}

pub async fn set_standing(
    Extract(control): Shared,
    Path(name): Path<String>,
    body: Body,
) -> Result<Json<AgentDetail>, Error> {
    let agent = NodeId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    let SetStanding { standing } = read(body).await?;
    if let Some(Standing::Draining { within_ms }) = standing
        && within_ms > MAX_DRAIN_MS
    {
        return Err(Error::Invalid(format!("standing.draining.within_ms: {within_ms} is more than {MAX_DRAIN_MS}")));
    }
    let config = control.current().await?;
    let known = control.parts.agents.fleet().agents.contains_key(&agent)
        || config.standings.contains_key(&agent)
        || config.plan.workers.values().any(|place| place.agent == agent);
    if !known {
        return Err(Error::NotFound(format!("there is no agent {agent}; see: izar agents list")));
    }
    control.order(Command::SetStanding { agent: agent.clone(), standing }).await?;
    log::info!(agent:%, standing:?; "an agent's standing is set");
    let (config, fleet) = (control.parts.raft.config().borrow().clone(), control.parts.agents.fleet());
    let view = fleet.agents.get(&agent).cloned().unwrap_or_default();
    Ok(Json(view::agent(&agent, &view, &config)))
}

/// An agent that was taken away for good need not be listed here any longer. Others keep their own lists.
pub async fn forget_agent(Extract(control): Shared, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let agent = NodeId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    let config = control.current().await?;
    let fleet = control.parts.agents.fleet();
    let view = fleet.agents.get(&agent);
    let view = view.ok_or_else(|| Error::NotFound(format!("there is no agent {agent}; see: izar agents list")))?;
    if config.plan.workers.values().any(|place| place.agent == agent) {
        return Err(Error::Conflict(format!("agent {agent} has replicas: izar agents drain {agent} moves them first")));
    }
    if view.connected || !control.parts.agents.forget(&agent) {
        return Err(Error::Conflict(format!("agent {agent} is connected: stop it first, or it is back at once")));
    }
    log::info!(agent:%; "an agent is forgotten");
    Ok(Json(json!({ "agent": agent })))
}

pub async fn put_tenant(Extract(control): Shared, Path(name): Path<String>, body: Body) -> Result<Json<Tenant>, Error> {
    let id = TenantId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    let order: PutTenant = read(body).await?;
    let config = control.current().await?;
    let mut tenant = config.tenants.get(&id).cloned().unwrap_or_else(|| Tenant::new(id));
    if let Some(weight) = order.weight {
        tenant.weight = in_range("weight", weight, 1, WEIGHT_LIMIT)?;
    }
    control.order(Command::PutTenant(tenant.clone())).await?;
    log::info!(tenant:% = tenant.id, weight = tenant.weight; "tenant is set");
    Ok(Json(tenant))
}

pub async fn put_project(
    Extract(control): Shared,
    Path(name): Path<String>,
    body: Body,
) -> Result<Json<Project>, Error> {
    let id = ProjectId::new(&name).map_err(|e| Error::Invalid(format!("name: {e}")))?;
    let order: PutProject = read(body).await?;
    let config = control.current().await?;
    let project = changed_project(id, &order, &config)?;
    control.order(Command::PutProject(project.clone())).await?;
    log::info!(project:% = project.id; "project is set");
    Ok(Json(project))
}

fn changed_project(id: ProjectId, order: &PutProject, config: &Config) -> Result<Project, Error> {
    let default = || TenantId::new(DEFAULT).expect("a valid name");
    let tenant = || order.tenant.clone().unwrap_or_else(default);
    let mut project = config.projects.get(&id).cloned().unwrap_or_else(|| Project::new(id, tenant()));
    if let Some(tenant) = &order.tenant {
        project.tenant = tenant.clone();
    }
    if let Some(class) = order.class {
        project.class = class;
    }
    if let Some(deadline_ms) = order.deadline_ms {
        project.deadline_ms = in_range("deadline_ms", deadline_ms, 0, DEADLINE_LIMIT_MS)?;
    }
    if let Some(available) = order.available {
        project.available = available;
    }
    Ok(project)
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::clock::Hlc;
    use izar_common::manifest::{File, Kind};

    fn config(names: &[(&str, u64)]) -> Config {
        let mut config = Config::default();
        for (name, registered) in names {
            let manifest = Manifest {
                name: (*name).to_owned(),
                kind: Kind::Echo { first_token_us: *registered, next_token_us: 0 },
                files: Vec::new(),
                text: File { name: "text.json".into(), hash: Hash([0; 32]), bytes: 2 },
                context: 2048,
                vocabulary: 1,
                architecture: "echo".into(),
            };
            let model = Model { revision: manifest.revision(), manifest, registered: Hlc::from_ms(*registered) };
            config.models.insert(model.revision, model);
        }
        config
    }

    fn deploy(json: &str, config: &Config) -> Result<Deployment, String> {
        let order = parse::<Deploy>(json.as_bytes()).map_err(|e| e.to_string())?;
        check_deployment(&order, config).map_err(|e| e.to_string())
    }

    #[test]
    fn a_name_means_the_newest_revision_and_a_prefix_exactly_one() {
        let config = config(&[("echo", 1), ("echo", 9), ("other", 5)]);
        let newest = find_model("echo", &config).unwrap();
        assert_eq!(newest.registered.ms(), 9);
        let prefix = &newest.revision.to_string()[..12];
        assert_eq!(find_model(prefix, &config).unwrap().revision, newest.revision);
        assert_eq!(find_model(&prefix.to_uppercase(), &config).unwrap().revision, newest.revision);
        let error = find_model("llama", &config).unwrap_err().to_string();
        assert_eq!(error, "model: there is no llama; there is echo, other");
        assert!(find_model(&prefix[..5], &config).is_err());
    }

    #[test]
    fn a_deployment_out_of_range_names_the_field() {
        let config = config(&[("echo", 1)]);
        let good = deploy(r#"{"model":"echo","replicas":2,"max_context":100}"#, &config).unwrap();
        assert_eq!((good.id.as_str(), good.replicas, good.engine.max_context), ("echo", 2, 100));
        let engine = EngineOptions { max_context: 100, ..EngineOptions::default() };
        assert_eq!(good.engine, engine, "what is not said has its default");
        let all = r#"{"model":"echo","max_batch":8,"device":"cuda:1","quant":"int8","activations":"int16","kernels":"reference","cache_type":"f32","cache_bytes":1048576}"#;
        let engine = EngineOptions {
            max_batch: 8,
            device: Device::Cuda(1),
            quant: Quant::Int8,
            activations: Activations::Int16,
            kernels: Kernels::Reference,
            cache: CacheType::F32,
            cache_bytes: 1 << 20,
            ..EngineOptions::default()
        };
        assert_eq!(deploy(all, &config).unwrap().engine, engine);
        for (json, part) in [
            (r#"{"model":"echo","replicas":1001}"#, "replicas: 1001"),
            (r#"{"model":"echo","constraints":{"gpus":99}}"#, "constraints.gpus: 99 is not in 0..=64"),
            (r#"{"model":"echo","constraints":{"labels":{"rack":""}}}"#, "constraints.labels: \"\" is empty"),
            (r#"{"model":"echo","constraints":{"memory":1}}"#, "unknown field `memory`"),
            (r#"{"model":"echo","max_batch":5000}"#, "max_batch: 5000"),
            (r#"{"model":"echo","max_context":4096}"#, "max_context: 4096 is not in 1..=2048"),
            (r#"{"model":"echo","name":"Not a name"}"#, "name: `Not a name`"),
            (&format!(r#"{{"model":"echo","name":"{}"}}"#, "x".repeat(60)), "60 characters; 58 leave room"),
            (r#"{"model":"echo","quant":"int5"}"#, "quant: unknown variant `int5`, expected one of `f32`"),
            (r#"{"model":"echo","device":"gpu"}"#, "device: `gpu` is not one of cpu, cuda:0"),
            (r#"{"model":"echo","device":"cuda:0","kernels":"avx2"}"#, "kernels: avx2 run on a CPU, not on cuda:0"),
            (r#"{"model":"echo","activations":"f16"}"#, "activations: unknown variant `f16`"),
            (r#"{"model":"echo","kernels":"sse"}"#, "kernels: unknown variant `sse`"),
            (r#"{"model":"echo","cache_type":"int8"}"#, "cache_type: unknown variant"),
            (r#"{"model":"echo","cache_bytes":512}"#, "cache_bytes: 512"),
            (r#"{"model":"echo","replica":1}"#, "unknown field `replica`"),
            (r#"{"model":"echo","replicas":"two"}"#, "replicas: invalid type"),
            (r#"{"model""#, "the body: EOF"),
        ] {
            let error = deploy(json, &config).unwrap_err();
            assert!(error.contains(part), "{json}: {error}");
        }
    }

    #[test]
    fn a_project_keeps_what_is_not_said() {
        let mut config = config(&[]);
        let change = |json: &str, config: &Config| {
            changed_project("desk".parse().unwrap(), &parse(json.as_bytes()).unwrap(), config)
        };
        let new = change(r#"{"class":"urgent","deadline_ms":200}"#, &config).unwrap();
        assert_eq!(
            (new.tenant.as_str(), new.class, new.deadline_ms, new.available),
            ("default", Class::Urgent, 200, false)
        );
        config.projects.insert(new.id.clone(), new.clone());
        assert_eq!(change(r#"{"available":true}"#, &config).unwrap(), Project { available: true, ..new });
        let error = change(r#"{"deadline_ms":99999999}"#, &config).unwrap_err().to_string();
        assert!(error.contains("deadline_ms: 99999999"), "{error}");
    }

    #[test]
    fn an_import_has_one_source() {
        let source = |json: &str| check_source(&parse::<Import>(json.as_bytes()).unwrap()).map_err(|e| e.to_string());
        assert!(matches!(source(r#"{"name":"m","path":"/m.gguf"}"#), Ok(Source::Files { .. })));
        assert!(source(r#"{"name":"m","path":"m.gguf"}"#).unwrap_err().contains("not absolute"));
        assert!(source(r#"{"name":"m"}"#).unwrap_err().contains("either path or echo"));
        let slow = r#"{"name":"m","echo":{"first_token_us":99000000,"next_token_us":0}}"#;
        assert!(source(slow).unwrap_err().contains("echo.first_token_us"));
    }

    #[test]
    fn keys_are_long_random_and_recognisable() {
        let (a, b) = (new_secret(), new_secret());
        assert_ne!(a, b);
        assert_eq!(a.len(), KEY_PREFIX.len() + KEY_CHARACTERS);
        assert!(a.strip_prefix(KEY_PREFIX).unwrap().bytes().all(|c| c.is_ascii_alphanumeric()));
    }

    #[test]
    fn notes_and_bounds_are_checked() {
        assert!(check_note("x".repeat(NOTE_BYTES)).is_ok());
        assert!(check_note("x".repeat(NOTE_BYTES + 1)).unwrap_err().to_string().contains("note"));
        assert!(check_note("a\nb".into()).is_err());
        assert_eq!(check_concurrent(None).unwrap(), DEFAULT_CONCURRENT);
        assert!(check_concurrent(Some(0)).unwrap_err().to_string().contains("max_concurrent: 0"));
        assert!(check_project(Some("No")).unwrap_err().to_string().contains("project"));
    }
}
