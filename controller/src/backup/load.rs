//! Reads a backup whole and checks all of it: every chunk, the state's fingerprint, an audit trail without a gap, every
//! model file's hash. Verifying is this alone; restoring also writes what passes.

use std::collections::BTreeSet;
use std::io::Read;

use anyhow::{Context, ensure};
use izar_common::blob::Hasher;
use izar_common::id::Hash;
use serde::{Deserialize, Serialize};

use super::Header;
use super::archive::{Item, Reader, Summary};
use super::contents::follow;
use crate::state::State;

/// Longest segment that is believed: one is sealed at 64 MiB, and the last records of a lost member may be one more.
const SEGMENT_LIMIT: u64 = 1 << 30;

/// A backup that was read to its end and found whole.
#[derive(Debug)]
pub struct Loaded {
    pub header: Header,
    pub summary: Summary,
    pub state: State,
    /// Number of the last audit segment.
    pub segment: u64,
    pub records: u64,
    /// The model files in it.
    pub files: BTreeSet<Hash>,
}

/// A model as a backup knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeededModel {
    pub name: String,
    pub revision: Hash,
    pub bytes: u64,
    /// What controllers need of it is in the backup.
    pub text: bool,
    /// What agents need of it is in the backup.
    pub weights: bool,
}

impl Loaded {
    /// The models that the state knows.
    pub fn models(&self) -> Vec<NeededModel> {
        let needed = |(revision, manifest): (&Hash, &izar_common::manifest::Manifest)| NeededModel {
            name: manifest.name.clone(),
            revision: *revision,
            bytes: manifest.all_files().map(|file| file.bytes).sum(),
            text: self.files.contains(&manifest.text.hash),
            weights: manifest.files.iter().all(|file| self.files.contains(&file.hash)),
        };
        self.state.manifests().map(needed).collect()
    }
}

/// The segment or file that is being read.
enum Part {
    None,
    Segment { number: u64, bytes: Vec<u8> },
    File { hash: Hash, hasher: Box<Hasher> },
}

/// What was read so far.
struct Load {
    rows: Vec<Vec<u8>>,
    part: Part,
    segment: u64,
    records: u64,
    files: BTreeSet<Hash>,
}

/// Reads the backup; `sink` sees every item in order, and that a segment or file was whole only when the next comes.
pub fn load<R: Read>(
    mut reader: Reader<R>,
    mut sink: impl FnMut(&Item) -> anyhow::Result<()>,
) -> anyhow::Result<Loaded> {
    let mut load = Load { rows: Vec::new(), part: Part::None, segment: 0, records: 0, files: BTreeSet::new() };
    let mut end = None;
    while let Some(item) = reader.item()? {
        if let Some(summary) = load.take(&item)? {
            end = Some(summary);
        }
        sink(&item)?;
    }
    let summary = end.context("the backup has no end")?;
    let header = reader.header;
    let state = State::from_rows(header.site.clone(), header.applied, &load.rows).context("read the state's rows")?;
    let same = state.digest().hash == summary.digest && state.incarnation() == header.incarnation;
    ensure!(same, "the state in the backup is not the one that was put into it: take another backup");
    ensure!(
        load.records == state.audit_seq(),
        "the audit trail in the backup has {} records, the state counts {}: take another backup",
        load.records,
        state.audit_seq()
    );
    let Load { segment, records, files, .. } = load;
    Ok(Loaded { header, summary, state, segment, records, files })
}

impl Load {
    fn take(&mut self, item: &Item) -> anyhow::Result<Option<Summary>> {
        if let Item::Piece(piece) = item {
            match &mut self.part {
                Part::None => anyhow::bail!("a piece of nothing"),
                Part::Segment { bytes, .. } => bytes.extend_from_slice(piece),
                Part::File { hasher, .. } => hasher.update(piece),
            }
            return Ok(None);
        }
        self.part_ends()?;
        match item {
            Item::Row(row) => self.rows.push(row.clone()),
            Item::Segment { number, bytes } => {
                ensure!(*number == self.segment + 1, "audit segment {number} follows {}", self.segment);
                ensure!(*bytes <= SEGMENT_LIMIT, "an audit segment of {bytes} bytes, the limit is {SEGMENT_LIMIT}");
                self.part = Part::Segment { number: *number, bytes: Vec::new() };
            }
            Item::File { hash, .. } => self.part = Part::File { hash: *hash, hasher: Box::default() },
            Item::End(summary) => return Ok(Some(summary.clone())),
            Item::Piece(_) => unreachable!("taken above"),
        }
        Ok(None)
    }

    fn part_ends(&mut self) -> anyhow::Result<()> {
        match std::mem::replace(&mut self.part, Part::None) {
            Part::None => {}
            Part::Segment { number, bytes } => {
                self.records = follow(self.records, &bytes).with_context(|| format!("audit segment {number}"))?;
                self.segment = number;
            }
            Part::File { hash, hasher } => {
                ensure!(hasher.finish() == hash, "the model file {hash} is not what its name says");
                self.files.insert(hash);
            }
        }
        Ok(())
    }
}
