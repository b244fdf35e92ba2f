//! Where backups are kept: a folder, or a bucket of an S3-compatible store (`bucket`). A name appears there only when
//! all of its content is there.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use hyper::body::Bytes;
use izar_controller::backup::{ENDING, Header};
use serde::Serialize;

use super::bucket::{self, Bucket, SCHEME};

/// What the file of a backup in a folder is called before its end: these, and so many letters and digits between them.
const BEFORE: (&str, usize, &str) = (".", 6, ".partial");
/// A file that nobody has written to for so long is what a kill or a power cut has left: no backup waits a day.
const LEFT_BEHIND: Duration = Duration::from_secs(24 * 60 * 60);

/// A place for backups.
#[derive(Debug)]
pub enum Place {
    Folder(PathBuf),
    Bucket(Bucket),
}

/// A backup in a place.
#[derive(Debug, Clone, Serialize)]
pub struct Stored {
    pub name: String,
    pub bytes: u64,
    /// `None`: it does not begin as a backup does.
    pub header: Option<Header>,
}

impl Place {
    /// Understands a folder's path, or `s3://bucket/prefix`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        ensure!(!text.is_empty(), "a place for backups is a folder, or s3://BUCKET/PREFIX");
        if text.starts_with(SCHEME) {
            return Bucket::parse(text).map(Self::Bucket);
        }
        // As a folder it would be one of that name here.
        ensure!(!text.contains("://"), "`{text}` is no place for backups: a folder, or s3://BUCKET/PREFIX");
        Ok(Self::Folder(text.into()))
    }

    /// Begins to keep a backup; `large` if it will have weights.
    pub async fn begin(&self, name: &str, large: bool) -> anyhow::Result<Upload> {
        let dir = match self {
            Self::Folder(dir) => dir,
            Self::Bucket(bucket) => return Ok(Upload::Bucket(Box::new(bucket.begin(name, large).await?))),
        };
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        clear(dir, SystemTime::now());
        let shown = || format!("write to {}", dir.display());
        let (prefix, digits, suffix) = BEFORE;
        let mut file = tempfile::Builder::new();
        let file = file.prefix(prefix).rand_bytes(digits).suffix(suffix).tempfile_in(dir).with_context(shown)?;
        Ok(Upload::Folder { file, path: dir.join(name), bytes: 0 })
    }

    /// The backups that are here, in no order.
    pub async fn list(&self) -> anyhow::Result<Vec<Stored>> {
        match self {
            Self::Folder(dir) => listed(dir),
            Self::Bucket(bucket) => bucket.list().await,
        }
    }

    /// Removes a backup.
    pub async fn remove(&self, name: &str) -> anyhow::Result<()> {
        match self {
            Self::Folder(dir) => {
                let path = dir.join(name);
                std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
            }
            Self::Bucket(bucket) => bucket.remove(name).await,
        }
    }
}

/// Removes what backups have left in a folder that were killed before their end. What cannot be removed stays: the next
/// backup tries again.
fn clear(dir: &Path, now: SystemTime) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let old = |modified| now.duration_since(modified).is_ok_and(|age| age > LEFT_BEHIND);
        // Of the entry itself, and not of what a link names.
        let left = entry.metadata().is_ok_and(|meta| meta.is_file() && meta.modified().is_ok_and(old));
        if left && is_partial(&entry.file_name().to_string_lossy()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn is_partial(name: &str) -> bool {
    let (prefix, digits, suffix) = BEFORE;
    let middle = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(suffix));
    middle.is_some_and(|m| m.len() == digits && m.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn listed(dir: &Path) -> anyhow::Result<Vec<Stored>> {
    let mut stored = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(ENDING) {
            let bytes = entry.metadata().with_context(|| format!("look at {name}"))?.len();
            let header = File::open(entry.path()).map_err(anyhow::Error::from).and_then(|mut f| Header::read(&mut f));
            stored.push(Stored { name, bytes, header: header.ok().map(|(header, _)| header) });
        }
    }
    Ok(stored)
}

/// A backup that is being kept. Ended by `finish` or `abort`, it leaves nothing that looks like one before its end.
pub enum Upload {
    Folder { file: tempfile::NamedTempFile, path: PathBuf, bytes: u64 },
    Bucket(Box<bucket::Upload>),
}

impl Upload {
    pub async fn write(&mut self, piece: Bytes) -> anyhow::Result<()> {
        match self {
            Self::Folder { file, path, bytes } => {
                *bytes += piece.len() as u64;
                file.write_all(&piece).with_context(|| format!("write {}", path.display()))
            }
            Self::Bucket(upload) => upload.write(piece).await,
        }
    }

    /// Gives the backup its name, or takes it back if that fails; returns where it is and how large.
    pub async fn finish(self) -> anyhow::Result<(String, u64)> {
        let (file, path, bytes) = match self {
            Self::Folder { file, path, bytes } => (file, path, bytes),
            Self::Bucket(mut upload) => {
                return match upload.finish().await {
                    Ok(kept) => Ok(kept),
                    Err(error) => Err(Self::Bucket(upload).abort(error).await),
                };
            }
        };
        let keep = || -> std::io::Result<()> {
            file.as_file().sync_all()?;
            file.persist_noclobber(&path)?;
            File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        keep().with_context(|| format!("write {}", path.display()))?;
        Ok((path.display().to_string(), bytes))
    }

    /// Takes back what is there; returns why it had to, and whether something is left.
    pub async fn abort(self, why: anyhow::Error) -> anyhow::Error {
        match self {
            // It has no name yet and goes with its handle.
            Self::Folder { .. } => why,
            Self::Bucket(mut upload) => match upload.abort().await {
                Ok(()) => why,
                Err(left) => why.context(format!("{left:#}")),
            },
        }
    }
}

/// Keeps a backup that is in a file already; returns where it is.
pub async fn keep(place: &Place, mut file: File, name: &str, large: bool) -> anyhow::Result<String> {
    file.rewind().context("read the temporary file")?;
    let mut upload = place.begin(name, large).await?;
    match copy(&mut file, &mut upload).await {
        Ok(()) => Ok(upload.finish().await?.0),
        Err(error) => Err(upload.abort(error).await),
    }
}

async fn copy(file: &mut File, upload: &mut Upload) -> anyhow::Result<()> {
    const PIECE_BYTES: u64 = 1 << 20;
    loop {
        let mut piece = Vec::new();
        if file.take(PIECE_BYTES).read_to_end(&mut piece).context("read the temporary file")? == 0 {
            return Ok(());
        }
        upload.write(piece.into()).await?;
    }
}

/// Opens one backup, by its path or URL, for a thread that may block.
pub async fn open(file: &str) -> anyhow::Result<Box<dyn Read + Send>> {
    if !file.starts_with(SCHEME) {
        return Ok(Box::new(std::io::BufReader::new(File::open(file).with_context(|| format!("open {file}"))?)));
    }
    let (place, name) = bucket::split_object(file)?;
    Ok(Box::new(Bucket::parse(place)?.open(name).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_backup_that_breaks_off_leaves_nothing_and_none_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::parse(dir.path().join("kept").to_str().unwrap()).unwrap();
        let mut upload = place.begin("a.izarbak", false).await.unwrap();
        upload.write(Bytes::from_static(b"half")).await.unwrap();
        drop(upload);
        assert_eq!(std::fs::read_dir(dir.path().join("kept")).unwrap().count(), 0);
        for first in [true, false] {
            let mut upload = place.begin("a.izarbak", false).await.unwrap();
            upload.write(Bytes::from_static(b"whole")).await.unwrap();
            assert_eq!(upload.finish().await.is_ok(), first);
        }
        let stored = place.list().await.unwrap();
        assert_eq!((stored.len(), stored[0].bytes, stored[0].header.is_none()), (1, 5, true));
        place.remove("a.izarbak").await.unwrap();
        assert!(place.list().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_a_killed_backup_left_goes_after_a_day_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::parse(dir.path().to_str().unwrap()).unwrap();
        let hours_ago = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 60 * 60);
        let put = |name: &str, hours: u64| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_modified(hours_ago(hours)).unwrap();
        };
        let stays = [".a1B2c3.part", ".notes.d.partial", "a1B2c3.partial", "old.izarbak"];
        stays.iter().for_each(|name| put(name, 25));
        put(".killed.partial", 25);
        put(".writes.partial", 23);
        std::os::unix::fs::symlink("old.izarbak", dir.path().join(".linked.partial")).unwrap();
        let Upload::Folder { file, .. } = place.begin("a.izarbak", false).await.unwrap() else { unreachable!() };
        assert!(is_partial(file.path().file_name().unwrap().to_str().unwrap()), "its own name is known");
        assert!(!dir.path().join(".killed.partial").exists());
        for name in stays.iter().chain(&[".writes.partial", ".linked.partial"]) {
            assert!(dir.path().join(name).exists(), "{name}");
        }
    }
}
