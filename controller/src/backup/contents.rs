//! What goes into a backup: the state's rows and the audit trail of one index, from a running member or from what an
//! ended one left; the texts of its models, and their weights if they are wanted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use izar_common::id::{ClusterId, Hash, NodeId, SiteId};
use izar_common::seal::MasterKey;

use super::archive::{Summary, Writer};
use super::{FORMAT, Header};
use crate::raft::rebuild::Remains;
use crate::state::State;
use crate::state::store::{Cut, Segment};

/// Whose backup it is, and when it was made.
#[derive(Debug, Clone)]
pub struct Maker {
    pub cluster: ClusterId,
    pub site: SiteId,
    pub node: NodeId,
    pub now_ms: u64,
    /// 16 random bytes.
    pub nonce: u128,
}

/// What is put into one backup.
#[derive(Debug)]
pub struct Contents {
    state: State,
    rows: Vec<Vec<u8>>,
    segments: Vec<Segment>,
    /// Audit records that are in no segment yet; they become one.
    tail: Vec<u8>,
    /// Model files, by hash, and where they lie.
    files: BTreeMap<Hash, PathBuf>,
    weights: bool,
}

impl Contents {
    /// Of a running member.
    pub fn of_cut(site: &SiteId, cut: Cut) -> anyhow::Result<Self> {
        let state = State::from_rows(site.clone(), cut.applied, &cut.rows).context("read the state's rows")?;
        Ok(Self {
            state,
            rows: cut.rows,
            segments: cut.segments,
            tail: Vec::new(),
            files: BTreeMap::new(),
            weights: false,
        })
    }

    /// Of a member that has ended.
    pub fn of_remains(remains: Remains) -> Self {
        let Remains { state, segments, tail, .. } = remains;
        let rows = state.all_rows().iter().map(|row| state.row(row).expect("the row was just named")).collect();
        Self { state, rows, segments, tail, files: BTreeMap::new(), weights: false }
    }

    /// Adds the files of the state's models that are where `place` says: their texts, which are small and without which
    /// no controller can take a request; and with `weights` all of them. What is not there is left out.
    pub fn with_files(mut self, weights: bool, place: impl Fn(&Hash) -> PathBuf) -> Self {
        let manifests = self.state.manifests().map(|(_, manifest)| manifest);
        let wanted = manifests.flat_map(|manifest| {
            let files = if weights { &manifest.files[..] } else { &[] };
            std::iter::once(&manifest.text).chain(files)
        });
        let placed = wanted.map(|file| (file.hash, place(&file.hash)));
        (self.files, self.weights) = (placed.filter(|(_, path)| path.is_file()).collect(), weights);
        self
    }

    pub fn header(&self, maker: &Maker, key: &MasterKey) -> Header {
        let Maker { cluster, site, node, now_ms, nonce } = maker.clone();
        Header {
            format: FORMAT,
            cluster,
            site,
            node,
            incarnation: self.state.incarnation(),
            applied: self.state.applied(),
            taken_ms: now_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            master_key: key.fingerprint(),
            models: self.weights,
            nonce: format!("{nonce:032x}"),
        }
    }

    /// Writes the backup. Blocks on the disk, and on whoever takes it.
    pub fn write<W: Write>(&self, header: &Header, key: &MasterKey, out: W) -> anyhow::Result<(W, Summary)> {
        let mut writer = Writer::begin(out, header, key)?;
        for row in &self.rows {
            writer.row(row)?;
        }
        for Segment { number, path, bytes } in &self.segments {
            let shown = || format!("read {}", path.display());
            writer.segment(*number, *bytes, File::open(path).with_context(shown)?).with_context(shown)?;
        }
        if !self.tail.is_empty() {
            let number = self.segments.last().map_or(1, |segment| segment.number + 1);
            writer.segment(number, self.tail.len() as u64, &self.tail[..])?;
        }
        for (hash, path) in &self.files {
            let shown = || format!("read the model file {}", path.display());
            let file = File::open(path).with_context(shown)?;
            let bytes = file.metadata().with_context(shown)?.len();
            writer.file(hash, bytes, file).with_context(shown)?;
        }
        Ok(writer.finish(self.state.digest().hash)?)
    }
}
