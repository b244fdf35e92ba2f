//! A backup becomes a member, in an empty data directory: of a new life of the cluster, or of the same one, if its leader
//! makes it for a member that lost its memory.
//!
//! In a new life every member is restored from the same file and begins with the same rows, so Raft needs to send none. The directory
//! is usable only when all of it is on the disk; one in which a restore broke off is refused by the daemon.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use izar_common::id::Hash;
use izar_common::seal::MasterKey;
use serde::{Deserialize, Serialize};

use super::archive::{Item, Reader};
use super::load::{Loaded, NeededModel, load};
use crate::raft::{self, rebuild};
use crate::state::audit;
use crate::state::rebirth::LAST_LIFE;

/// What a restored member begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    pub data_dir: PathBuf,
    pub incarnation: u64,
    pub applied: u64,
    /// When the backup was made; what happened later is not in it.
    pub taken_ms: u64,
    /// Turns that were open then and are closed now.
    pub abandoned: usize,
    pub keys: usize,
    pub turns: usize,
    pub records: u64,
    /// Fingerprint of the state: the same on every member.
    pub digest: Hash,
    pub models: Vec<NeededModel>,
}

/// Restores a member. `incarnation` numbers the new life; `None`: the one after the backup's.
pub fn restore<R: Read>(
    input: R,
    key: &MasterKey,
    options: &raft::Options,
    incarnation: Option<u64>,
) -> anyhow::Result<Restored> {
    let reader = Reader::open(input, key)?;
    reader.header.belongs_to(&options.cluster, &options.site)?;
    let life = incarnation.unwrap_or(reader.header.incarnation + 1);
    ensure!(
        life > reader.header.incarnation,
        "--incarnation: {life} is not above the backup's own, {}",
        reader.header.incarnation
    );
    ensure!(
        life <= LAST_LIFE,
        "--incarnation: {life} is above {LAST_LIFE}: take the next number after the last life's"
    );
    rebuild::claim(options)?;
    let mut loaded = receive(reader, options)?;
    let rebirth = loaded.state.begin_life(life);
    let (models, segment) = (loaded.models(), loaded.segment + 1);
    let mut frames = Vec::new();
    rebirth.audit.iter().for_each(|record| audit::encode(record, &mut frames));
    write_synced(&rebuild::audit_segment(options, segment), &frames)?;
    rebuild::finish(options, &loaded.state, &rebirth, segment)?;
    give_to_owner(&options.data_dir)?;
    let state = &loaded.state;
    Ok(Restored {
        data_dir: options.data_dir.clone(),
        incarnation: state.incarnation(),
        applied: state.applied(),
        taken_ms: loaded.header.taken_ms,
        abandoned: rebirth.abandoned,
        keys: state.config_snapshot().keys.len(),
        turns: state.turns().count(),
        records: state.audit_seq(),
        digest: state.digest().hash,
        models,
    })
}

/// Makes a member of the life that the backup is of. Its last entry must be of `term`, in which whoever made it leads.
/// Returns that entry's index.
pub fn join<R: Read>(input: R, key: &MasterKey, options: &raft::Options, term: u64) -> anyhow::Result<u64> {
    let reader = Reader::open(input, key)?;
    reader.header.belongs_to(&options.cluster, &options.site)?;
    rebuild::claim_to_join(options)?;
    let loaded = receive(reader, options)?;
    rebuild::finish_joining(options, &loaded.state, term, loaded.segment)?;
    Ok(loaded.state.applied())
}

/// Reads a backup, and writes its audit segments and model files where they belong.
fn receive<R: Read>(reader: Reader<R>, options: &raft::Options) -> anyhow::Result<Loaded> {
    let mut files = Files { options, open: None };
    let loaded = load(reader, |item| files.take(item))?;
    files.close()?;
    Ok(loaded)
}

/// Writes segments and model files as they come.
struct Files<'a> {
    options: &'a raft::Options,
    /// The file that is being written, and the name that it gets when it is whole.
    open: Option<(File, PathBuf, PathBuf)>,
}

impl Files<'_> {
    fn take(&mut self, item: &Item) -> anyhow::Result<()> {
        if let Item::Piece(piece) = item {
            let (file, path, _) = self.open.as_mut().context("a piece of nothing")?;
            return file.write_all(piece).with_context(|| format!("write {}", path.display()));
        }
        // The loader has checked it by now.
        self.close()?;
        match item {
            Item::Segment { number, .. } => self.create(rebuild::audit_segment(self.options, *number)),
            Item::File { hash, .. } => {
                let blobs = self.options.data_dir.join("blobs");
                match fs::create_dir(&blobs) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => rebuild::refuse_links(&blobs)?,
                    made => made.with_context(|| format!("create {}", blobs.display()))?,
                }
                self.create(blobs.join(hash.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn create(&mut self, path: PathBuf) -> anyhow::Result<()> {
        let partial = path.with_extension("new");
        // One that an earlier restore left is removed; nothing that is there is followed or written to.
        let _ = fs::remove_file(&partial);
        let file = File::create_new(&partial).with_context(|| format!("create {}", partial.display()))?;
        self.open = Some((file, partial, path));
        Ok(())
    }

    fn close(&mut self) -> anyhow::Result<()> {
        let Some((file, partial, path)) = self.open.take() else { return Ok(()) };
        let named = file.sync_all().and_then(|()| fs::rename(&partial, &path));
        named.with_context(|| format!("write {}", path.display()))
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// What root wrote into a directory that is another user's becomes that user's: the daemon's. Never what a link there
/// points to, which may be anybody's.
fn give_to_owner(dir: &Path) -> anyhow::Result<()> {
    let owner = fs::metadata(dir).with_context(|| format!("look at {}", dir.display()))?;
    if !nix::unistd::Uid::effective().is_root() || owner.uid() == 0 {
        return Ok(());
    }
    let (uid, gid) = (Some(owner.uid()), Some(owner.gid()));
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        for entry in fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
            let path = entry.with_context(|| format!("list {}", path.display()))?.path();
            let give = || -> io::Result<bool> {
                lchown(&path, uid, gid)?;
                Ok(fs::symlink_metadata(&path)?.is_dir())
            };
            if give().with_context(|| format!("give {} to its directory's owner", path.display()))? {
                left.push(path);
            }
        }
    }
    Ok(())
}
