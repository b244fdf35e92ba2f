//! A backup on its way: a thread reads it from the disk and seals it, a task gives it to whoever wants it; and the other
//! way round for whoever is given one. Pieces wait in a bounded queue; when it is full, the disk is read no further.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use izar_common::clock::wall_ms;
use izar_common::id::{ClusterId, Hash};
use izar_common::seal::MasterKey;
use tokio::sync::mpsc;

use super::contents::{Contents, Maker};
use crate::raft::Raft;
use crate::state::store::{Cut, Reader};

/// Pieces that wait for a slow taker, a megabyte each at most.
const PIECES: usize = 4;

/// A backup that is being made.
pub struct Taking {
    maker: Maker,
    key: Arc<MasterKey>,
    cut: Cut,
    /// With the weights of models.
    models: bool,
}

impl Taking {
    /// Of what a running member has on its disk now.
    pub async fn of(
        raft: &Raft,
        disk: Reader,
        cluster: &ClusterId,
        key: &Arc<MasterKey>,
        models: bool,
    ) -> anyhow::Result<Self> {
        let cut = tokio::task::spawn_blocking(move || disk.cut()).await.expect("reading does not panic")?;
        let maker = Maker {
            cluster: cluster.clone(),
            site: raft.state().read(|state| state.site().clone()),
            node: raft.origin().node.clone(),
            now_ms: wall_ms(),
            nonce: rand::random(),
        };
        Ok(Self { maker, key: key.clone(), cut, models })
    }

    /// Starts the thread. Without its end, which is an empty piece, a backup is not whole. `held` is dropped when it has
    /// ended; `place` says where a model file lies.
    pub fn start(
        self,
        place: impl Fn(&Hash) -> PathBuf + Send + 'static,
        held: impl Send + 'static,
    ) -> mpsc::Receiver<io::Result<Bytes>> {
        let (pieces, taken) = mpsc::channel(PIECES);
        tokio::task::spawn_blocking(move || {
            let mut out = Giving(pieces);
            if let Err(error) = self.write(place, &mut out) {
                log::warn!(error = format!("{error:#}"); "a backup broke off");
                // Who does not take any more need not be told.
                let _ = out.0.blocking_send(Err(io::Error::other(format!("{error:#}"))));
            }
            drop(held);
        });
        taken
    }

    fn write(self, place: impl Fn(&Hash) -> PathBuf, out: &mut Giving) -> anyhow::Result<()> {
        let Self { maker, key, cut, models } = self;
        let contents = Contents::of_cut(&maker.site, cut)?.with_files(models, place);
        for path in contents.damaged() {
            log::warn!(path = path.display().to_string(); "a model file is damaged and not in the backup");
        }
        let header = contents.header(&maker, &key);
        let (_, summary) = contents.write(&header, &key, &mut *out)?;
        out.send(Bytes::new())?;
        let (applied, rows, bytes) = (header.applied, summary.rows, summary.audit_bytes + summary.file_bytes);
        log::info!(applied, rows, bytes, models = header.models; "a backup was taken");
        Ok(())
    }
}

/// Gives what is written to whoever takes it.
struct Giving(mpsc::Sender<io::Result<Bytes>>);

impl Giving {
    fn send(&self, piece: Bytes) -> io::Result<()> {
        self.0.blocking_send(Ok(piece)).map_err(|_| io::Error::other("nobody takes it any more"))
    }
}

impl Write for Giving {
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

/// Reads, on a thread that may block, what a task puts into the queue; it ends with the queue.
pub struct Given {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Given {
    pub fn queue() -> (mpsc::Sender<Bytes>, Self) {
        let (put, pieces) = mpsc::channel(PIECES);
        (put, Self { pieces, piece: Bytes::new() })
    }
}

impl io::Read for Given {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let Some(next) = self.pieces.blocking_recv() else { return Ok(0) };
            self.piece = next;
        }
        let count = self.piece.len().min(into.len());
        self.piece.copy_to_slice(&mut into[..count]);
        Ok(count)
    }
}
