//! The admin socket: HTTP and JSON over a Unix socket, for operators on this machine (`izar`, or `curl --unix-socket`).
//!
//! Who calls is what the kernel says (`peer`); what is shown has fixed shapes (`view`); reading is in `listings`,
//! changing in `orders`. A change is a command like any other: it is answered once this node has applied it. It never
//! shows a prompt, an answer or a stored key, for it has none.

pub mod backup;
mod drain;
mod error;
pub mod explain;
pub mod gpus;
mod listings;
mod orders;
pub mod peer;
pub mod peers;
pub mod view;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{delete, get, post, put};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use izar_common::id::{ClusterId, NodeId};
use izar_common::seal::{MasterKey, Pepper};
use izar_common::{blob, quic};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::Agents;
use crate::gateway::Gateway;
use crate::raft::Raft;
use error::Error;
use peer::{Caller, Gate};
pub use peer::{Listener, bind, inherit};

/// Connections at once: operators and their scripts; more wait in the socket's backlog.
const CONNECTIONS: usize = 64;

/// How long a caller may take over a request's headers. A script that hangs must not hold a place for ever.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Wait after a failed accept (out of file descriptors), so that it is not a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What the socket shows and changes.
pub struct Parts {
    pub raft: Raft,
    pub agents: Agents,
    pub gateway: Gateway,
    /// Where imported files go.
    pub store: blob::Store,
    pub pepper: Arc<Pepper>,
    /// Seals backups.
    pub master_key: Arc<MasterKey>,
    pub cluster: ClusterId,
    /// For the count of refused peers.
    pub peers: Arc<quic::Endpoint>,
    /// Where the API is served.
    pub api: view::Api,
    pub members: Vec<view::Member>,
    /// The other controllers, and where they are reached.
    pub others: Vec<(NodeId, SocketAddr)>,
}

/// The operators' side of a controller.
pub struct Control {
    parts: Parts,
    /// One import at a time: it reads and writes whole models.
    importing: Arc<Semaphore>,
    /// One backup at a time: it reads all that is on the disk.
    backing_up: Arc<Semaphore>,
    /// Callers turned away.
    refused: AtomicU64,
}

type Shared = axum::extract::State<Arc<Control>>;

impl Control {
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            importing: Arc::new(Semaphore::new(1)),
            backing_up: Arc::new(Semaphore::new(1)),
            refused: AtomicU64::new(0),
        })
    }

    /// Serves the socket until `stop`, lets running calls end, and removes the socket's file if it is its own.
    pub async fn serve(self: Arc<Self>, listener: Listener, stop: CancellationToken) {
        let (places, connections) = (Arc::new(Semaphore::new(CONNECTIONS)), TaskTracker::new());
        let app = self.router();
        while let Some(Some((stream, place))) = stop.run_until_cancelled(accept(&listener, &places)).await {
            let (control, app, gate, stop) = (self.clone(), app.clone(), listener.gate.clone(), stop.clone());
            connections.spawn(async move {
                control.connection(stream, app, gate, stop).await;
                drop(place);
            });
        }
        let own = listener.own.clone();
        drop(listener);
        if let Some(Err(error)) = own.map(std::fs::remove_file) {
            log::debug!(error:%; "the admin socket's file could not be removed");
        }
        connections.close();
        connections.wait().await;
    }

    async fn connection(self: Arc<Self>, stream: UnixStream, app: Router, gate: Gate, stop: CancellationToken) {
        let app = if self.admits(&stream, gate).await { app } else { Router::new().fallback(refuse) };
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            log::debug!(error:%; "an admin connection ended early");
        }
    }

    async fn admits(&self, stream: &UnixStream, gate: Gate) -> bool {
        let caller = match stream.peer_cred() {
            Ok(cred) => Caller { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() },
            Err(error) => {
                log::warn!(error:%; "the kernel does not say who calls the admin socket");
                return false;
            }
        };
        if gate.admits_without_lookup(caller) {
            return true;
        }
        // The user database may be a directory server far away.
        let admitted = tokio::task::spawn_blocking(move || gate.admits(caller)).await.unwrap_or(false);
        if !admitted {
            self.refused.fetch_add(1, Relaxed);
            log::warn!(uid = caller.uid, gid = caller.gid, pid = caller.pid.unwrap_or(0); "a caller of the admin socket is refused");
        }
        admitted
    }

    fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/v1/status", get(listings::status))
            .route("/v1/peers", get(peers::peers))
            .route("/v1/backup", get(backup::backup).post(backup::kept))
            .route("/v1/keys", get(listings::keys).post(orders::create_key))
            .route("/v1/keys/{id}/revoke", post(orders::revoke_key))
            .route("/v1/models", get(listings::models).post(orders::import))
            .route("/v1/deployments", get(listings::deployments).post(orders::deploy))
            .route("/v1/deployments/{name}", delete(orders::undeploy))
            .route("/v1/aliases/{name}", put(orders::set_alias).delete(orders::remove_alias))
            .route("/v1/agents", get(listings::agents))
            .route("/v1/agents/{name}", delete(orders::forget_agent))
            .route("/v1/agents/{name}/standing", put(orders::set_standing))
            .route("/v1/gpus", get(gpus::list))
            .route("/v1/gpus/release", post(gpus::release))
            .route("/v1/tenants", get(listings::tenants))
            .route("/v1/tenants/{name}", put(orders::put_tenant))
            .route("/v1/projects", get(listings::projects))
            .route("/v1/projects/{name}", put(orders::put_project))
            .route("/v1/requests", get(listings::requests))
            .route("/v1/requests/{id}", get(explain::explain))
            .route("/v1/turns", get(listings::turns))
            .route("/v1/drain", post(drain::drain))
            .route("/v1/undrain", post(drain::undrain))
            .fallback(unknown)
            .method_not_allowed_fallback(unknown)
            .with_state(self.clone())
    }
}

/// Waits for a place, then for a caller. A failure to accept is waited out; `None` only if there will be no place.
async fn accept(listener: &Listener, places: &Arc<Semaphore>) -> Option<(UnixStream, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    loop {
        match listener.socket.accept().await {
            Ok((stream, _)) => return Some((stream, place)),
            Err(error) => {
                log::warn!(error:%; "the admin socket could not accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn refuse() -> Error {
    Error::Forbidden
}

async fn unknown(method: Method, uri: Uri) -> Error {
    Error::NotFound(format!("there is no {method} {}", uri.path()))
}
