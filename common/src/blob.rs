//! Content-addressed files: a folder where a file's name is its SHA-256, and the way from one node's folder to another's.
//!
//! A name appears only once the whole content is on the disk, so that what is there is whole. A transfer that broke
//! off leaves `<hash>.partial`, and the next one goes on from there; the hash is checked over everything before the
//! file gets its name. A store is used by one process.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use anyhow::Context as _;
use ring::digest;
use tokio::sync::Semaphore;

use crate::id::Hash;

mod transfer;

pub use transfer::{FetchError, fetch, serve};

/// How much of a file is read at once: large enough that a disk streams, small enough that many transfers fit.
const PIECE_BYTES: usize = 512 << 10;
/// Files served at the same time from one store; each holds a piece in memory and keeps the disk's head busy. More
/// wait for their turn, at most as many as peers may open streams.
const SERVED_AT_ONCE: usize = 16;

/// SHA-256.
pub fn hash(bytes: &[u8]) -> Hash {
    finish(digest::digest(&digest::SHA256, bytes))
}

/// SHA-256 and length of a file.
pub fn hash_file(path: &Path) -> io::Result<(Hash, u64)> {
    let mut digest = digest::Context::new(&digest::SHA256);
    let bytes = hash_reader(&mut File::open(path)?, &mut digest)?;
    Ok((finish(digest.finish()), bytes))
}

fn finish(digest: digest::Digest) -> Hash {
    Hash(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

/// SHA-256 of what comes in pieces.
pub struct Hasher(digest::Context);

impl Default for Hasher {
    fn default() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }
}

impl Hasher {
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }
    pub fn finish(self) -> Hash {
        finish(self.0.finish())
    }
}

/// Puts all that a reader gives into a hash; returns how much that was.
fn hash_reader(reader: &mut impl io::Read, digest: &mut digest::Context) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return Ok(bytes),
            Ok(count) => {
                digest.update(&piece[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A folder of files named by their hash. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    serving: Semaphore,
    /// One lock for each file that is being fetched, so that two fetches of it do not write the same partial file.
    /// As many as there are fetches.
    fetching: Mutex<HashMap<Hash, Weak<tokio::sync::Mutex<()>>>>,
}

impl Store {
    /// Opens a store, and makes its folder if there is none.
    pub fn open(dir: impl AsRef<Path>) -> anyhow::Result<Self> {
        let dir = dir.as_ref().to_owned();
        std::fs::create_dir_all(&dir).with_context(|| format!("create the blob folder {}", dir.display()))?;
        let listing = std::fs::read_dir(&dir).with_context(|| format!("list the blob folder {}", dir.display()))?;
        for entry in listing.filter_map(Result::ok) {
            // What an earlier process was adding; its content is elsewhere.
            if entry.file_name().to_string_lossy().ends_with(".new") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let inner = Inner { dir, serving: Semaphore::new(SERVED_AT_ONCE), fetching: Mutex::new(HashMap::new()) };
        Ok(Self(Arc::new(inner)))
    }

    /// Where a file lies, or would lie.
    pub fn path(&self, hash: &Hash) -> PathBuf {
        self.0.dir.join(hash.to_string())
    }

    /// Says whether a file is here, whole.
    pub fn has(&self, hash: &Hash) -> bool {
        self.path(hash).is_file()
    }

    /// Adds a small file from memory. Blocks on the disk.
    pub fn add_bytes(&self, bytes: &[u8]) -> anyhow::Result<Hash> {
        let hash = hash(bytes);
        if !self.has(&hash) {
            let temporary = self.temporary();
            let write = || -> io::Result<()> {
                std::fs::write(&temporary, bytes)?;
                self.name(&temporary, &hash)
            };
            write().with_context(|| format!("add a file to {}", self.0.dir.display()))?;
        }
        Ok(hash)
    }

    /// Adds a copy of a file. Blocks on the disk; the hash is that of the copy, whatever happens to the original.
    pub fn add_file(&self, path: &Path) -> anyhow::Result<(Hash, u64)> {
        let temporary = self.temporary();
        let copy = || -> io::Result<(Hash, u64)> {
            // The kernel copies, or shares the blocks where the file system can.
            std::fs::copy(path, &temporary)?;
            let (hash, bytes) = hash_file(&temporary)?;
            if self.has(&hash) {
                std::fs::remove_file(&temporary)?;
            } else {
                self.name(&temporary, &hash)?;
            }
            Ok((hash, bytes))
        };
        copy()
            .inspect_err(|_| drop(std::fs::remove_file(&temporary)))
            .with_context(|| format!("copy {} to {}", path.display(), self.0.dir.display()))
    }

    fn temporary(&self) -> PathBuf {
        self.0.dir.join(format!("{:032x}.new", rand::random::<u128>()))
    }

    fn partial(&self, hash: &Hash) -> PathBuf {
        self.0.dir.join(format!("{hash}.partial"))
    }

    /// Gives a file its name, once the content and then the name are on the disk.
    fn name(&self, from: &Path, hash: &Hash) -> io::Result<()> {
        File::open(from)?.sync_all()?;
        std::fs::rename(from, self.path(hash))?;
        File::open(&self.0.dir)?.sync_all()
    }

    /// The lock of one file's fetch.
    fn fetch_lock(&self, hash: &Hash) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = self.0.fetching.lock().expect("no panic while the table is held");
        fetching.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = fetching.get(hash).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        fetching.insert(*hash, Arc::downgrade(&lock));
        lock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_same_hash_however_it_came() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("blobs")).unwrap();
        let content = vec![7; 3 * PIECE_BYTES + 11];
        let original = dir.path().join("model.gguf");
        std::fs::write(&original, &content).unwrap();
        let (hash, bytes) = store.add_file(&original).unwrap();
        assert_eq!((hash, bytes), hash_file(&original).unwrap());
        assert_eq!((hash, bytes), (super::hash(&content), content.len() as u64));
        assert_eq!(store.add_bytes(&content).unwrap(), hash);
        assert!(store.has(&hash) && std::fs::read(store.path(&hash)).unwrap() == content);
        assert_eq!(std::fs::read_dir(dir.path().join("blobs")).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn sha_256_of_nothing_is_what_everyone_says() {
        assert_eq!(hash(b"").to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn opening_clears_what_was_half_added_and_keeps_what_was_half_fetched() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["1.new", "2.partial"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        Store::open(dir.path()).unwrap();
        assert!(!dir.path().join("1.new").exists() && dir.path().join("2.partial").exists());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Store::open(dir.path()).unwrap().add_file(Path::new("/no/such/file")).unwrap_err();
        assert!(error.to_string().starts_with("copy /no/such/file to"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
