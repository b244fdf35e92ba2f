//! `GET /v1/backup`: a sealed backup of what this controller has on disk, as a stream.
//!
//! Whichever controller is asked, nothing is missing that was acknowledged anywhere before. It is sealed here, where the
//! master key is; whoever keeps it needs none. A body that does not end well is no backup. Whoever kept one says so with
//! `POST /v1/backup`, so that the whole group knows how old its newest one is.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};

use super::Shared;
use super::error::Error;
use super::orders::read;
use crate::backup::take::Taking;
use crate::state::command::Command;
use crate::state::last_backup::{LastBackup, PLACE_BYTES};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// With the weights of models.
    #[serde(default)]
    models: bool,
}

pub async fn backup(Extract(control): Shared, asked: Result<Query<Asked>, QueryRejection>) -> Result<Response, Error> {
    let Query(Asked { models }) = asked.map_err(|error| Error::Invalid(error.body_text()))?;
    let busy = || Error::Conflict("a backup of this controller is being taken already".into());
    let place = control.backing_up.clone().try_acquire_owned().map_err(|_| busy())?;
    let store = control.parts.raft.durable().await?;
    let parts = &control.parts;
    let taking = Taking::of(&parts.raft, store, &parts.cluster, &parts.master_key, models).await;
    let taking = taking.map_err(|error| Error::Internal(format!("{error:#}")))?;
    let files = parts.store.clone();
    let taken = taking.start(move |hash| files.path(hash), place);
    // Without its end, which is an empty piece, a backup must not look whole.
    let pieces = stream::unfold(taken, |mut taken| async {
        let broken = || Err(io::Error::other("the backup broke off"));
        match taken.recv().await.unwrap_or_else(broken) {
            Ok(piece) if piece.is_empty() => None,
            piece => Some((piece, taken)),
        }
    });
    Ok(([(CONTENT_TYPE, "application/octet-stream")], Body::from_stream(pieces)).into_response())
}

/// `POST /v1/backup`: a backup of this controller lies where it shall be kept.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub taken_ms: u64,
    pub applied: u64,
    pub kept_as: String,
}

pub async fn kept(Extract(control): Shared, body: Body) -> Result<Json<LastBackup>, Error> {
    let Kept { taken_ms, applied, kept_as } = read(body).await?;
    if kept_as.len() > PLACE_BYTES {
        return Err(Error::Invalid(format!("kept_as: a place has at most {PLACE_BYTES} bytes")));
    }
    let backup = LastBackup { node: control.parts.raft.origin().node.clone(), taken_ms, applied, kept_as };
    control.order(Command::NoteBackup(backup.clone())).await?;
    Ok(Json(backup))
}
