//! Where backups are kept: a folder, or a bucket of an S3-compatible store (`bucket`). A name appears there only when
//! all of its content is there.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use hyper::body::Bytes;
use izar_controller::backup::{ENDING, Header};
use serde::Serialize;

use super::bucket::{self, Bucket, SCHEME};

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
        let shown = || format!("write to {}", dir.display());
        let file = tempfile::Builder::new().prefix(".").suffix(".partial").tempfile_in(dir).with_context(shown)?;
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
}
