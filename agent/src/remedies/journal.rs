//! Which order was begun last, on disk before anything is done: so that it is done once, whatever ends in between.
//!
//! One small file, replaced whole. The last order is enough, for their numbers grow. A file that cannot be read stops all
//! orders: what was begun would not be known.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use izar_common::health::gpu::Outcome;
use serde::{Deserialize, Serialize};

/// The order that was begun last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub id: u64,
    /// The start of the server in which it was begun.
    pub boot: String,
    /// How it ended, and why so.
    pub ended: Option<(Outcome, String)>,
}

/// The file.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
}

impl Journal {
    pub fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.folder.join("order.json")
    }

    pub fn last(&self) -> anyhow::Result<Option<Entry>> {
        let path = self.path();
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| format!("read {}", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// Notes that an order begins; when this returns it is on disk.
    pub fn begin(&self, id: u64, boot: &str) -> anyhow::Result<()> {
        self.write(&Entry { id, boot: boot.to_owned(), ended: None })
    }

    /// Notes how it ended.
    pub fn end(&self, id: u64, boot: &str, outcome: Outcome, reason: &str) -> anyhow::Result<()> {
        self.write(&Entry { id, boot: boot.to_owned(), ended: Some((outcome, reason.to_owned())) })
    }

    fn write(&self, entry: &Entry) -> anyhow::Result<()> {
        let (path, new) = (self.path(), self.folder.join("order.json.new"));
        let bytes = serde_json::to_vec(entry).context("write an order as JSON")?;
        let written = || {
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        written().with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_begun_is_known_to_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Journal::at(dir.path()).last().unwrap(), None);
        Journal::at(dir.path()).begin(7, "b1").unwrap();
        let entry = Entry { id: 7, boot: "b1".into(), ended: None };
        assert_eq!(Journal::at(dir.path()).last().unwrap(), Some(entry.clone()));
        Journal::at(dir.path()).end(7, "b1", Outcome::Failed, "in use").unwrap();
        let ended = Some((Outcome::Failed, "in use".to_owned()));
        assert_eq!(Journal::at(dir.path()).last().unwrap(), Some(Entry { ended, ..entry }));
    }

    #[test]
    fn a_file_that_cannot_be_read_or_written_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("order.json"), "{\"id\":").unwrap();
        assert!(Journal::at(dir.path()).last().is_err());
        assert!(Journal::at(&dir.path().join("nowhere")).begin(7, "b1").is_err());
    }
}
