//! From started processes to a cluster that answers: waits for the controllers, imports and deploys the model, makes a
//! key, and waits until every controller says that it can really generate.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use hyper::{Method, StatusCode};
use izar_controller::control::view::{CreatedKey, DeploymentView, Deployments, Keys, ModelView, ReplicaState, Status};
use izar_controller::state::KeyStatus;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::children::{Children, State};
use super::layout::{Controller, Layout};
use super::model::Model;
use crate::admin::{Admin, IMPORT_TIMEOUT};
use crate::http::Endpoint;
use crate::ready::write_private;

/// Until every controller answers and knows a leader and the agents; an election takes less than a second.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Until all replicas serve: a large model is fetched by every agent and loaded from a slow disk.
const SERVE_LIMIT: Duration = Duration::from_secs(900);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Silence after which the wait says what it waits for.
const SPEAK_AFTER: Duration = Duration::from_secs(10);

/// Deaths in a row after which a daemon is not expected to come up.
const HOPELESS: u32 = 3;

/// Lines of a log that are shown when its daemon does not come up.
const TAIL_LINES: usize = 5;

/// What shall be served.
#[derive(Debug)]
pub struct Wanted<'a> {
    pub model: &'a Model,
    pub replicas: u32,
    pub max_batch: Option<u32>,
}

/// The key that a folder kept.
#[derive(Debug, Serialize, Deserialize)]
struct KeptKey {
    id: String,
    key: String,
}

/// Brings the cluster up and returns its key. `keep_key`: store it for the next run in the same folder.
pub async fn run(layout: &Layout, wanted: &Wanted<'_>, children: &Children, keep_key: bool) -> anyhow::Result<String> {
    let deaths = async {
        let mut states = children.states();
        // The children outlive this wait, so the channel does not close.
        match states.wait_for(|states| states.iter().any(|s| s.deaths >= HOPELESS)).await {
            Ok(states) => states.iter().find(|s| s.deaths >= HOPELESS).cloned(),
            Err(_) => None,
        }
    };
    tokio::select! {
        key = steps(layout, wanted, keep_key) => key,
        dead = deaths => Err(hopeless(layout, dead)),
    }
}

fn hopeless(layout: &Layout, dead: Option<State>) -> anyhow::Error {
    let Some(dead) = dead else { return anyhow!("the children are gone") };
    let path = layout.log(&dead.id);
    let text = std::fs::read(&path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n  ");
    anyhow!("{} ended {} times before it was ready; the end of {}:\n  {tail}", dead.id, dead.deaths, path.display())
}

async fn steps(layout: &Layout, wanted: &Wanted<'_>, keep_key: bool) -> anyhow::Result<String> {
    for controller in &layout.controllers {
        wait_for_nodes(controller, layout.agents.len()).await?;
    }
    let first = layout.controllers.first().context("there is a controller")?;
    let admin = Admin::new(first.socket.clone());
    let order = wanted.model.import_order()?;
    let model: ModelView = admin.post_within("/v1/models", &order, IMPORT_TIMEOUT).await.context("import the model")?;
    let order = json!({
        "name": wanted.model.name(),
        "model": model.revision,
        "replicas": wanted.replicas,
        "max_batch": wanted.max_batch,
        // A first model is small: with activations of 8 bits it forgets answers that it knows (as it does in llama.cpp).
        "quant": "int4",
        "activations": "int16",
    });
    let deployment: DeploymentView = admin.post("/v1/deployments", &order).await.context("deploy the model")?;
    let key = key(layout, &admin, keep_key).await.context("make a key")?;
    wait_for_replicas(&admin, &deployment).await?;
    for controller in &layout.controllers {
        wait_for_readiness(layout, controller).await?;
    }
    Ok(key)
}

/// Waits until a controller knows a leader and every agent: replicas are then spread at once, not moved later.
async fn wait_for_nodes(controller: &Controller, agents: usize) -> anyhow::Result<()> {
    let admin = Admin::new(controller.socket.clone());
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let seen = match admin.get::<Status>("/v1/status").await {
            Ok(status) => match status.agents.iter().filter(|agent| agent.connected).count() {
                _ if status.leader.is_none() => anyhow!("it knows no leader"),
                connected if connected < agents => anyhow!("{connected} of {agents} agents are connected"),
                _ => return Ok(()),
            },
            Err(error) => error,
        };
        if Instant::now() > deadline {
            return Err(seen.context(format!("{} did not start within {} s", controller.id, START_LIMIT.as_secs())));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The kept key if it is still valid, else a new one.
async fn key(layout: &Layout, admin: &Admin, keep: bool) -> anyhow::Result<String> {
    let file = layout.key_file();
    if let Some(kept) = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<KeptKey>(&text).ok()) {
        let keys: Keys = admin.get("/v1/keys").await?;
        if keys.keys.iter().any(|k| k.id.as_str() == kept.id && k.status == KeyStatus::Active) {
            return Ok(kept.key);
        }
    }
    let created: CreatedKey = admin.post("/v1/keys", &json!({ "note": "izar dev" })).await?;
    if keep {
        let kept = KeptKey { id: created.view.id.to_string(), key: created.key.clone() };
        write_private(&file, &serde_json::to_vec_pretty(&kept)?)?;
    }
    Ok(created.key)
}

async fn wait_for_replicas(admin: &Admin, deployment: &DeploymentView) -> anyhow::Result<()> {
    let deadline = Instant::now() + SERVE_LIMIT;
    let (mut said, mut quiet_since) = (String::new(), Instant::now());
    loop {
        let seen: anyhow::Result<Deployments> = admin.get("/v1/deployments").await;
        let now = seen.as_ref().ok().and_then(|all| all.deployments.iter().find(|d| d.name == deployment.name));
        if now.is_some_and(|d| d.ready >= deployment.wanted) {
            return Ok(());
        }
        let text = match (&seen, now) {
            (Err(error), _) => format!("{error:#}"),
            (Ok(_), Some(d)) => progress(d),
            (Ok(_), None) => format!("{} is no longer wanted", deployment.name),
        };
        if Instant::now() > deadline {
            bail!("{} did not serve within {} s: {text}", deployment.name, SERVE_LIMIT.as_secs());
        }
        if text != said && quiet_since.elapsed() > SPEAK_AFTER {
            eprintln!("izar dev: waiting: {text}");
            (said, quiet_since) = (text, Instant::now());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What keeps a deployment from being complete.
fn progress(d: &DeploymentView) -> String {
    let mut text = format!("{} of {} replicas of {} are ready", d.ready, d.wanted, d.name);
    for w in d.workers.iter().filter(|w| w.state != ReplicaState::Ready) {
        text += &format!("; {} on {}: {}", w.worker, w.agent, w.state);
        if !w.detail.is_empty() {
            text += &format!(" ({})", w.detail);
        }
    }
    if d.unplaced > 0 {
        text += &format!("; {} without a place", d.unplaced);
    }
    text
}

/// A controller is ready when it can really generate.
async fn wait_for_readiness(layout: &Layout, controller: &Controller) -> anyhow::Result<()> {
    let endpoint = Endpoint::new(&controller.endpoint(), Some(&layout.ca()))?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let seen = match endpoint.send(Method::GET, "/readyz", None, Vec::new()).await {
            Ok(response) if response.status() == StatusCode::OK => return Ok(()),
            Ok(response) => anyhow!("/readyz answers {}: {}", response.status(), text(response).await),
            Err(error) => error,
        };
        if Instant::now() > deadline {
            return Err(seen.context(format!("{} was not ready within {} s", controller.id, START_LIMIT.as_secs())));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The beginning of an answer, for a person.
async fn text(response: hyper::Response<hyper::body::Incoming>) -> String {
    use http_body_util::{BodyExt, Limited};
    const LIMIT: usize = 64 << 10;
    let Ok(body) = Limited::new(response.into_body(), LIMIT).collect().await else { return String::new() };
    let bytes = body.to_bytes();
    let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let message = value["error"]["message"].as_str().map(str::to_owned);
    message.unwrap_or_else(|| String::from_utf8_lossy(&bytes).chars().take(200).collect())
}
