//! A file by hash over a stream: `BlobRequest`, `BlobAnswer`, then the bytes as they are.
//!
//! The disk has a thread of its own (`Landing`), fed through a short queue, so that neither side waits for the other
//! at every piece.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use ring::digest;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio::time::timeout;

use super::{PIECE_BYTES, Store, finish, hash_reader};
use crate::id::Hash;
use crate::manifest;
use crate::quic::{self, Connection, Receiver, Sender};
use crate::wire;
use crate::wire::handshake::Open;
use crate::wire::peer::{BlobAnswer, BlobRequest};

/// Longest time in which nothing at all moves: a loaded disk or a turn to wait for, no more.
const STALL: Duration = Duration::from_secs(30);
/// Pieces between the network and the disk: enough to keep both busy.
const PIECES_IN_FLIGHT: usize = 4;
/// Below other streams of the connection: a model may take a minute, a token may not.
const PRIORITY: i32 = -1;

/// Why a file did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Another peer may have it.
    #[error("the peer does not have the file {0}")]
    Missing(Hash),
    /// What came is thrown away; another peer may have the right one.
    #[error("the content that came for {0} has another hash")]
    WrongHash(Hash),
    #[error("the peer's file {hash} has {got} bytes, expected {expected}")]
    WrongLength { hash: Hash, got: u64, expected: u64 },
    /// What came is kept; a retry goes on from there.
    #[error("the peer went away or stopped sending {hash}: {reason}")]
    Interrupted { hash: Hash, reason: String },
    /// Trouble here, which no other peer mends.
    #[error("cannot keep the file {hash}")]
    Disk { hash: Hash, source: io::Error },
}

/// Fetches a file from a peer into the store. Does nothing if it is here already.
///
/// `progress` hears how many of the file's bytes are here. A fetch that fails or is dropped keeps what came, unless
/// that turned out to be wrong, and the next goes on from there. Of two fetches of one file the second waits.
pub async fn fetch(
    conn: &Connection,
    file: &manifest::File,
    store: &Store,
    progress: impl Fn(u64) + Send,
) -> Result<(), FetchError> {
    let hash = file.hash;
    let alone = store.fetch_lock(&hash).lock_owned().await;
    if store.has(&hash) {
        progress(file.bytes);
        return Ok(());
    }
    let disk = |source| FetchError::Disk { hash, source };
    let (path, expected) = (store.partial(&hash), file.bytes);
    let landing = blocking(move || Landing::open(path, expected, alone)).await.map_err(disk)?;
    let mut here = landing.bytes;
    progress(here);

    let (pieces, queue) = mpsc::channel::<Bytes>(PIECES_IN_FLIGHT);
    let keeper = tokio::task::spawn_blocking(move || landing.take(queue));
    // Nothing to ask for if all of it came before and only the check was missed.
    let received = if here == file.bytes {
        drop(pieces);
        Ok(())
    } else {
        receive(conn, file, &mut here, &progress, pieces).await
    };
    let landing = keeper.await.map_err(|error| disk(io::Error::other(error)))?.map_err(disk)?;
    received?;
    let store = store.clone();
    if blocking(move || landing.keep(&store, &hash)).await.map_err(disk)? {
        Ok(())
    } else {
        Err(FetchError::WrongHash(hash))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Asks for the rest of a file and passes it on in pieces, the last ones too if the peer breaks off.
async fn receive(
    conn: &Connection,
    file: &manifest::File,
    here: &mut u64,
    progress: &(impl Fn(u64) + Send),
    pieces: mpsc::Sender<Bytes>,
) -> Result<(), FetchError> {
    let hash = file.hash;
    let interrupted = |reason: String| FetchError::Interrupted { hash, reason };
    let ask = async {
        let (mut tx, mut rx) = conn.open_bi(Open::Blob).await.map_err(|e| e.to_string())?;
        tx.send(&BlobRequest { hash, offset: *here }).await.map_err(|e| e.to_string())?;
        quic::finish(&mut tx);
        let answer = rx.expect::<BlobAnswer>().await.map_err(|e: wire::Error| {
            conn.refuse_frame(&e);
            e.to_string()
        })?;
        Ok::<_, String>((answer, rx))
    };
    let (answer, rx) = match timeout(STALL, ask).await {
        Ok(asked) => asked.map_err(interrupted)?,
        Err(_) => return Err(interrupted("no answer".into())),
    };
    match answer {
        BlobAnswer::Missing => return Err(FetchError::Missing(hash)),
        BlobAnswer::Found { bytes } if bytes != file.bytes => {
            return Err(FetchError::WrongLength { hash, got: bytes, expected: file.bytes });
        }
        BlobAnswer::Found { .. } => {}
    }
    let (mut stream, mut piece) = rx.into_parts();
    let mut left = file.bytes - *here - (piece.len() as u64).min(file.bytes - *here);
    loop {
        let mut failed = None;
        while left > 0 && piece.len() < PIECE_BYTES {
            piece.reserve(PIECE_BYTES - piece.len());
            let mut limited = (&mut stream).take(left);
            match timeout(STALL, limited.read_buf(&mut piece)).await {
                Ok(Ok(0)) => failed = Some("the stream ended".to_owned()),
                Ok(Ok(count)) => left -= count as u64,
                Ok(Err(error)) => failed = Some(error.to_string()),
                Err(_) => failed = Some("nothing came for too long".to_owned()),
            }
            if failed.is_some() {
                break;
            }
        }
        // The keeper ends early only when the disk fails; it says so itself.
        let count = piece.len() as u64;
        let full = std::mem::take(&mut piece).freeze();
        if pieces.send(full).await.is_err() {
            return Ok(());
        }
        *here += count;
        progress((*here).min(file.bytes));
        match failed {
            Some(reason) => return Err(interrupted(reason)),
            None if left == 0 => return Ok(()),
            None => {}
        }
    }
}

/// A partial file on its way to being whole.
struct Landing {
    path: PathBuf,
    file: File,
    digest: digest::Context,
    bytes: u64,
    /// Held until the last piece is written, also when the fetch itself was dropped.
    _alone: OwnedMutexGuard<()>,
}

impl Landing {
    /// Opens the partial file and hashes what is there. One longer than `expected` is another file: begun anew.
    fn open(path: PathBuf, expected: u64, alone: OwnedMutexGuard<()>) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        if file.metadata()?.len() > expected {
            file.set_len(0)?;
        }
        let mut digest = digest::Context::new(&digest::SHA256);
        let bytes = hash_reader(&mut file, &mut digest)?;
        Ok(Self { path, file, digest, bytes, _alone: alone })
    }

    /// Writes pieces until there are no more.
    fn take(mut self, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<Self> {
        while let Some(piece) = pieces.blocking_recv() {
            self.file.write_all(&piece)?;
            self.digest.update(&piece);
            self.bytes += piece.len() as u64;
        }
        Ok(self)
    }

    /// Gives the file its name if the hash is right; throws it away and returns false if not.
    fn keep(self, store: &Store, hash: &Hash) -> io::Result<bool> {
        if finish(self.digest.finish()) != *hash {
            std::fs::remove_file(&self.path)?;
            return Ok(false);
        }
        store.name(&self.path, hash)?;
        Ok(true)
    }
}

/// Answers one request for a file, on the stream that a peer opened with `Open::Blob`.
pub async fn serve(store: &Store, mut tx: Sender, mut rx: Receiver) -> anyhow::Result<()> {
    let request: BlobRequest = timeout(STALL, rx.expect()).await??;
    let _turn = store.0.serving.acquire().await.expect("the semaphore is never closed");
    let path = store.path(&request.hash);
    let opened = blocking(move || {
        let mut file = File::open(path)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(request.offset.min(bytes)))?;
        Ok((file, bytes))
    })
    .await;
    let (file, bytes) = match opened {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tx.send(&BlobAnswer::Missing).await?;
            quic::finish(&mut tx);
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let _ = tx.get_mut().set_priority(PRIORITY);
    tx.send(&BlobAnswer::Found { bytes }).await?;
    let sent = send_rest(&mut tx, file).await;
    // A file cut short must not look like a whole one.
    if sent.is_ok() {
        quic::finish(&mut tx)
    } else {
        quic::reset(&mut tx)
    }
    sent
}

async fn send_rest(tx: &mut Sender, mut file: File) -> anyhow::Result<()> {
    loop {
        let (back, piece) = blocking(move || {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece)?;
            Ok((file, piece))
        })
        .await?;
        file = back;
        if piece.is_empty() {
            return Ok(());
        }
        // The window lets parts of a piece go; the whole of it takes no longer than a stall on any link that works.
        timeout(STALL, tx.get_mut().write_chunk(piece.into())).await??;
    }
}

#[cfg(test)]
mod tests;
