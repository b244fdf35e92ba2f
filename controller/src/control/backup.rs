//! `GET /v1/backup`: a sealed backup of what this controller has on disk, as a stream.
//!
//! Whichever controller is asked, nothing is missing that was acknowledged anywhere before. It is sealed here, where the
//! master key is; whoever keeps it needs none. A body that does not end well is no backup. Whoever kept one says so with
//! `POST /v1/backup`, so that the whole group knows how old its newest one is.

use std::io::{self, Write};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use izar_common::clock::wall_ms;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::error::Error;
use super::orders::read;
use super::{Control, Shared};
use crate::backup::Header;
use crate::backup::contents::{Contents, Maker};
use crate::state::command::Command;
use crate::state::last_backup::{LastBackup, PLACE_BYTES};

/// Pieces of a backup that wait for a slow taker, a megabyte each; then the disk is read no further.
const PIECES: usize = 4;

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
    let (pieces, taken) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut out = Pieces(pieces);
        let ended = (|| {
            let site = control.parts.raft.state().read(|state| state.site().clone());
            let contents = Contents::of_cut(&site, store.cut()?)?;
            let contents = contents.with_files(models, |hash| control.parts.store.path(hash));
            for path in contents.damaged() {
                log::warn!(path = path.display().to_string(); "a model file is damaged and not in the backup");
            }
            let header = contents.header(&control.maker(site), &control.parts.master_key);
            write(&contents, &header, &control, &mut out)
        })();
        if let Err(error) = ended {
            log::warn!(error = format!("{error:#}"); "a backup broke off");
            // Who does not take any more need not be told.
            let _ = out.0.blocking_send(Err(io::Error::other(format!("{error:#}"))));
        }
        drop(place);
    });
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

impl Control {
    fn maker(&self, site: izar_common::id::SiteId) -> Maker {
        let (cluster, node) = (self.parts.cluster.clone(), self.parts.raft.origin().node.clone());
        Maker { cluster, site, node, now_ms: wall_ms(), nonce: rand::random() }
    }
}

fn write(contents: &Contents, header: &Header, control: &Control, out: &mut Pieces) -> anyhow::Result<()> {
    let (_, summary) = contents.write(header, &control.parts.master_key, &mut *out)?;
    out.end()?;
    let (applied, rows, bytes) = (header.applied, summary.rows, summary.audit_bytes + summary.file_bytes);
    log::info!(applied, rows, bytes, models = header.models; "a backup was taken");
    Ok(())
}

/// Gives what is written to whoever takes the body.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Pieces {
    fn end(&self) -> io::Result<()> {
        self.send(Bytes::new())
    }
    fn send(&self, piece: Bytes) -> io::Result<()> {
        self.0.blocking_send(Ok(piece)).map_err(|_| io::Error::other("nobody takes it any more"))
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            self.send(Bytes::copy_from_slice(bytes))?;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
