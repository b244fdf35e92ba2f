//! What is read through the admin socket.
//!
//! A listing is as new as the moment it was asked for (a ReadIndex first), so it needs a quorum; `?stale=true` shows
//! what this node knows instead. Status never waits: it is what one looks at when the quorum is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Json;
use axum::extract::Query;
use axum::extract::State as Extract;
use axum::extract::rejection::QueryRejection;
use izar_common::id::NodeId;
use serde::Deserialize;

use super::error::Error;
use super::view::{self, DeploymentSummary};
use super::{Control, Shared};
use crate::state::Config;

/// Turns in one listing: as many closed ones as the state remembers.
const TURN_LIMIT: usize = crate::state::turns::REMEMBERED;

/// Turns shown when nobody says how many.
const DEFAULT_TURNS: usize = 100;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    #[serde(default)]
    stale: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TurnsQuery {
    #[serde(default = "default_turns")]
    limit: usize,
    /// Only turns that still run.
    #[serde(default)]
    open: bool,
    #[serde(default)]
    stale: bool,
}

fn default_turns() -> usize {
    DEFAULT_TURNS
}

type Asked<T> = Result<Query<T>, QueryRejection>;

fn query<T>(asked: Asked<T>) -> Result<T, Error> {
    asked.map(|Query(query)| query).map_err(|e| Error::Invalid(e.body_text()))
}

impl Control {
    /// The configuration, as new as the caller wants it.
    async fn config(&self, stale: bool) -> Result<Arc<Config>, Error> {
        self.caught_up(stale).await?;
        Ok(self.parts.raft.config().borrow().clone())
    }

    async fn caught_up(&self, stale: bool) -> Result<(), Error> {
        if !stale {
            self.parts.raft.read_index().await?;
        }
        Ok(())
    }
}

fn away((node, time): (NodeId, Duration)) -> view::Away {
    view::Away { node, for_ms: time.as_millis() as u64 }
}

pub async fn status(Extract(control): Shared) -> Json<view::Status> {
    let parts = &control.parts;
    let leadership = parts.raft.leadership().borrow().clone();
    let (config, fleet) = (parts.raft.config().borrow().clone(), parts.agents.fleet());
    let summary = |d| {
        let seen = view::deployment(d, &config, &fleet);
        DeploymentSummary { name: seen.name, revision: seen.revision, wanted: seen.wanted, ready: seen.ready }
    };
    let refused = BTreeMap::from([
        ("peers".to_owned(), parts.peers.refused()),
        ("admin".to_owned(), control.refused.load(Relaxed)),
    ]);
    Json(view::Status {
        node: parts.raft.origin().node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        role: view::role(&leadership).to_owned(),
        leader: leadership.leader,
        term: leadership.term,
        applied: parts.raft.state().applied(),
        incarnation: config.incarnation,
        members: parts.members.clone(),
        api: parts.api.clone(),
        agents: fleet.agents.iter().map(|(id, agent)| view::agent_summary(id, agent)).collect(),
        deployments: config.deployments.values().map(summary).collect(),
        running: parts.gateway.running().len(),
        draining: *parts.gateway.draining().borrow(),
        away: parts.raft.away().into_iter().map(away).collect(),
        latest_ms: parts.raft.state().read(|state| state.latest().ms()),
        last_backup: parts.raft.state().read(|state| state.last_backup().cloned()),
        refused,
    })
}

pub async fn keys(Extract(control): Shared, asked: Asked<Reading>) -> Result<Json<view::Keys>, Error> {
    let config = control.config(query(asked)?.stale).await?;
    Ok(Json(view::Keys { keys: config.keys.values().map(Into::into).collect() }))
}

pub async fn models(Extract(control): Shared, asked: Asked<Reading>) -> Result<Json<view::Models>, Error> {
    let config = control.config(query(asked)?.stale).await?;
    let store = &control.parts.store;
    let mut models: Vec<view::ModelView> =
        config.models.values().map(|m| view::model(m, &config, |hash| store.has(hash))).collect();
    models.sort_by(|a, b| (&a.name, a.registered_ms).cmp(&(&b.name, b.registered_ms)));
    Ok(Json(view::Models { models }))
}

pub async fn deployments(Extract(control): Shared, asked: Asked<Reading>) -> Result<Json<view::Deployments>, Error> {
    let config = control.config(query(asked)?.stale).await?;
    let fleet = control.parts.agents.fleet();
    let deployments = config.deployments.values().map(|d| view::deployment(d, &config, &fleet)).collect();
    Ok(Json(view::Deployments { deployments }))
}

/// What agents say is soft state of this controller: there is nothing to catch up with.
pub async fn agents(Extract(control): Shared) -> Json<view::Agents> {
    let (config, fleet) = (control.parts.raft.config().borrow().clone(), control.parts.agents.fleet());
    Json(view::Agents { agents: fleet.agents.iter().map(|(id, agent)| view::agent(id, agent, &config)).collect() })
}

pub async fn tenants(Extract(control): Shared, asked: Asked<Reading>) -> Result<Json<view::Tenants>, Error> {
    let config = control.config(query(asked)?.stale).await?;
    Ok(Json(view::Tenants { tenants: config.tenants.values().cloned().collect() }))
}

pub async fn projects(Extract(control): Shared, asked: Asked<Reading>) -> Result<Json<view::Projects>, Error> {
    let config = control.config(query(asked)?.stale).await?;
    Ok(Json(view::Projects { projects: config.projects.values().cloned().collect() }))
}

pub async fn requests(Extract(control): Shared) -> Json<view::Requests> {
    Json(view::Requests { requests: control.parts.gateway.running() })
}

pub async fn turns(Extract(control): Shared, asked: Asked<TurnsQuery>) -> Result<Json<view::Turns>, Error> {
    let TurnsQuery { limit, open, stale } = query(asked)?;
    if !(1..=TURN_LIMIT).contains(&limit) {
        return Err(Error::Invalid(format!("limit: {limit} is not in 1..={TURN_LIMIT}")));
    }
    control.caught_up(stale).await?;
    let turns = control.parts.raft.state().turns(limit, |turn| !open || turn.closed.is_none());
    Ok(Json(view::Turns { turns: turns.iter().map(Into::into).collect() }))
}
