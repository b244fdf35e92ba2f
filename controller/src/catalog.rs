//! The catalog: keeps every registered model's files on this controller, and its text ready in memory.
//!
//! Any controller may be asked for any model, and agents fetch files from whichever controller they reach; so each one
//! holds all. What is missing comes from the other controllers. Texts have a lane of their own, so that a request does
//! not wait for another model's gigabytes. Files are never removed here.

mod lane;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};

use izar_common::id::{Hash, NodeId, Role};
use izar_common::manifest::File;
use izar_common::quic::{self, Profile};
use izar_common::text::{Bundle, Text};
use izar_common::{blob, quic::Endpoint};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::state::Config;
use lane::{Lane, Next};

/// How many attempts at a file fail before a human is told: about a second and a half, in which a peer may be starting.
const QUIET_FAILURES: u32 = 3;

/// How far one part of a model is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// It is being fetched or read.
    Missing,
    Here,
    /// The last attempt failed; unless the file itself is unusable, there will be another.
    Failed(String),
}

/// What this controller has of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holding {
    /// Whether prompts can be encoded here.
    pub text: Part,
    /// Whether agents can fetch the model's files here.
    pub files: Part,
}

/// A handle to the catalog. Cheap to clone.
#[derive(Clone)]
pub struct Catalog(Arc<Inner>);

struct Inner {
    store: blob::Store,
    endpoint: Arc<Endpoint>,
    peers: Vec<(NodeId, SocketAddr)>,
    texts: RwLock<HashMap<Hash, Arc<Text>>>,
    /// Each written by its own lane alone.
    text_parts: Parts,
    file_parts: Parts,
}

type Parts = RwLock<BTreeMap<Hash, Part>>;

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalog").field("holdings", &self.holdings()).finish_non_exhaustive()
    }
}

/// Which part of the models a lane sees to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Texts,
    Files,
}

/// Why a file is not here or of no use.
enum Failure {
    /// Worth another attempt.
    Absent(String),
    /// The content is what was registered, and cannot be used.
    Unusable(String),
}

impl Catalog {
    /// Starts to follow the configuration. The tasks end at `end`; what they were fetching is kept and continued.
    pub fn start(
        config: watch::Receiver<Arc<Config>>,
        store: blob::Store,
        endpoint: Arc<Endpoint>,
        peers: Vec<(NodeId, SocketAddr)>,
        tasks: &TaskTracker,
        end: CancellationToken,
    ) -> Self {
        let texts = RwLock::default();
        let (text_parts, file_parts) = Default::default();
        let catalog = Self(Arc::new(Inner { store, endpoint, peers, texts, text_parts, file_parts }));
        for kind in [Kind::Texts, Kind::Files] {
            let (catalog, config, end) = (catalog.clone(), config.clone(), end.clone());
            tasks.spawn(async move { end.run_until_cancelled(catalog.run(kind, config)).await });
        }
        catalog
    }

    /// The text of a model revision, once it is here.
    pub fn text(&self, revision: &Hash) -> Option<Arc<Text>> {
        self.0.texts.read().expect("no panic while texts are held").get(revision).cloned()
    }
    /// What is here of each registered model, for operators.
    pub fn holdings(&self) -> BTreeMap<Hash, Holding> {
        let files = self.parts(Kind::Files).read().expect("no panic while parts are held").clone();
        let texts = self.parts(Kind::Texts).read().expect("no panic while parts are held");
        let holding = |(revision, text): (&Hash, &Part)| {
            let files = files.get(revision).cloned().unwrap_or(Part::Missing);
            (*revision, Holding { text: text.clone(), files })
        };
        texts.iter().map(holding).collect()
    }
    fn parts(&self, kind: Kind) -> &Parts {
        match kind {
            Kind::Texts => &self.0.text_parts,
            Kind::Files => &self.0.file_parts,
        }
    }

    /// Brings one file after the other, until the configuration is gone.
    async fn run(self, kind: Kind, mut config: watch::Receiver<Arc<Config>>) {
        let mut lane = Lane::default();
        loop {
            let newest = config.borrow_and_update().clone();
            self.follow(kind, &newest, &mut lane);
            match lane.next(Instant::now()) {
                Next::Fetch { revision, file } => self.bring(kind, &mut lane, revision, &file).await,
                Next::WaitUntil(when) => {
                    tokio::select! {
                        changed = config.changed() => if changed.is_err() { return },
                        () = tokio::time::sleep_until(when) => {}
                    }
                }
                Next::Idle => {
                    if config.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Takes up new models and forgets those that are registered no more.
    fn follow(&self, kind: Kind, config: &Config, lane: &mut Lane) {
        let files = config.models.iter().map(|(revision, model)| match kind {
            Kind::Texts => (*revision, vec![model.manifest.text.clone()]),
            Kind::Files => (*revision, model.manifest.files.clone()),
        });
        if !lane.follow(files.collect()) {
            return;
        }
        if kind == Kind::Texts {
            let mut texts = self.0.texts.write().expect("no panic while texts are held");
            texts.retain(|revision, _| config.models.contains_key(revision));
        }
        let mut parts = self.parts(kind).write().expect("no panic while parts are held");
        parts.retain(|revision, _| config.models.contains_key(revision));
        for revision in config.models.keys() {
            parts.entry(*revision).or_insert(Part::Missing);
        }
        for revision in lane.complete() {
            parts.insert(revision, Part::Here);
        }
    }

    fn hold(&self, kind: Kind, revision: Hash, part: Part) {
        self.parts(kind).write().expect("no panic while parts are held").insert(revision, part);
    }

    async fn bring(&self, kind: Kind, lane: &mut Lane, revision: Hash, file: &File) {
        let result = match self.obtain(file).await {
            Ok(()) if kind == Kind::Texts => self.load(revision, file).await,
            other => other,
        };
        match result {
            Ok(()) => {
                if lane.done(&revision) {
                    self.hold(kind, revision, Part::Here);
                    log::debug!(revision:%, file = file.name; "model part is here");
                }
            }
            Err(Failure::Absent(reason)) => {
                if lane.failed(&revision, Instant::now()) == QUIET_FAILURES {
                    log::warn!(revision:%, file = file.name, reason; "model file cannot be fetched yet");
                }
                self.hold(kind, revision, Part::Failed(reason));
            }
            Err(Failure::Unusable(reason)) => {
                lane.give_up(&revision);
                log::error!(revision:%, file = file.name, reason; "model text is unusable");
                self.hold(kind, revision, Part::Failed(reason));
            }
        }
    }

    /// Sees to it that a file is in the store, asking one peer after the other.
    async fn obtain(&self, file: &File) -> Result<(), Failure> {
        if self.0.store.has(&file.hash) {
            return Ok(());
        }
        let mut reasons = Vec::new();
        for (node, address) in &self.0.peers {
            match self.fetch_from(node, *address, file).await {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(format!("{node}: {reason}")),
            }
        }
        let nobody = "there is no other controller that may have it".to_owned();
        Err(Failure::Absent(if reasons.is_empty() { nobody } else { reasons.join("; ") }))
    }

    async fn fetch_from(&self, node: &NodeId, address: SocketAddr, file: &File) -> Result<(), String> {
        let connecting = self.0.endpoint.connect(address, Role::Controller, Some(node), Profile::Requests);
        let connection: quic::Connection = connecting.await.map_err(|e| e.to_string())?;
        let result = blob::fetch(&connection, file, &self.0.store, |_| ()).await;
        connection.close("done");
        result.map_err(|e| e.to_string())
    }

    /// Reads a bundle that is in the store and keeps its text.
    async fn load(&self, revision: Hash, file: &File) -> Result<(), Failure> {
        let path = self.0.store.path(&file.hash);
        let work = move || -> Result<Text, Failure> {
            let json = std::fs::read(path).map_err(|e| Failure::Absent(format!("cannot read it: {e}")))?;
            let bundle: Bundle = serde_json::from_slice(&json).map_err(|e| Failure::Unusable(e.to_string()))?;
            Text::new(&bundle).map_err(|e| Failure::Unusable(e.to_string()))
        };
        let loaded = tokio::task::spawn_blocking(work).await;
        let text = loaded.map_err(|e| Failure::Unusable(format!("reading it failed: {e}")))??;
        self.0.texts.write().expect("no panic while texts are held").insert(revision, Arc::new(text));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
