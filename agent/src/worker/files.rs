//! A model's files on this server: fetched by hash from whichever controller has them, kept from then on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use izar_common::blob::{self, FetchError, Store};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::quic::Connection;
use tokio::sync::Semaphore;

/// Files fetched at once by one agent. One: two workers of one model would otherwise write the same partial file, and
/// the network or the disk is the limit anyway.
const AT_ONCE: usize = 1;

/// The controllers that have a session now: where files can be fetched.
#[derive(Clone)]
pub struct Sources {
    connections: Arc<Mutex<BTreeMap<SocketAddr, Connection>>>,
    turn: Arc<Semaphore>,
}

impl Default for Sources {
    fn default() -> Self {
        Self { connections: Arc::default(), turn: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

/// Where a model's files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// In the manifest's order.
    pub model: Vec<PathBuf>,
    /// The text bundle; none for the echo model, whose words every worker knows.
    pub text: Option<PathBuf>,
}

/// Why a model's files are not here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no controller is connected")]
    NoController,
    #[error("{file} is on none of the {asked} connected controllers")]
    Missing { file: String, asked: usize },
    #[error("fetching {file}: {source}")]
    Fetch { file: String, source: FetchError },
}

impl Sources {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Connection>> {
        self.connections.lock().expect("no panic while the sources are held")
    }
    pub fn add(&self, controller: SocketAddr, connection: Connection) {
        self.connections().insert(controller, connection);
    }
    pub fn remove(&self, controller: SocketAddr) {
        self.connections().remove(&controller);
    }

    /// Brings every file of a model that is not here yet; returns where they are.
    ///
    /// `progress` is told in words. Dropping the future keeps what was fetched.
    pub async fn bring(
        &self,
        manifest: &Manifest,
        store: &Store,
        progress: impl Fn(String) + Sync,
    ) -> Result<Files, Error> {
        let text = Some(&manifest.text).filter(|_| !matches!(manifest.kind, Kind::Echo { .. }));
        for file in manifest.files.iter().chain(text) {
            if !store.has(&file.hash) {
                let _turn = self.turn.acquire().await.expect("the semaphore is never closed");
                self.bring_one(file, store, &progress).await?;
            }
        }
        let model = manifest.files.iter().map(|file| store.path(&file.hash)).collect();
        Ok(Files { model, text: text.map(|file| store.path(&file.hash)) })
    }

    async fn bring_one(&self, file: &File, store: &Store, progress: &(impl Fn(String) + Sync)) -> Result<(), Error> {
        // Another worker may have brought it while this one waited.
        if store.has(&file.hash) {
            return Ok(());
        }
        let connections: Vec<_> = self.connections().values().cloned().collect();
        let mut failed = None;
        for connection in &connections {
            let told = std::sync::atomic::AtomicU64::new(u64::MAX);
            let tell = |bytes: u64| {
                let percent = bytes.saturating_mul(100) / file.bytes.max(1);
                if told.swap(percent, std::sync::atomic::Ordering::Relaxed) != percent {
                    progress(format!("{}: {percent} % of {} MB", file.name, file.bytes.div_ceil(1_000_000)));
                }
            };
            match blob::fetch(connection, file, store, tell).await {
                Ok(()) => return Ok(()),
                Err(FetchError::Missing { .. }) => {}
                Err(source) => failed = Some(Error::Fetch { file: file.name.clone(), source }),
            }
        }
        let asked = connections.len();
        Err(match failed {
            Some(error) => error,
            None if asked == 0 => Error::NoController,
            None => Error::Missing { file: file.name.clone(), asked },
        })
    }
}
