//! What goes into a backup: the state's rows and the audit trail of one index, from a running member or from what an
//! ended one left; the texts of its models, and their weights if they are wanted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use izar_common::blob::hash_file;
use izar_common::id::{ClusterId, Hash, NodeId, SiteId};
use izar_common::seal::MasterKey;

use super::archive::{Summary, Writer};
use super::{FORMAT, Header};
use crate::raft::rebuild::Remains;
use crate::state::store::{Cut, Segment};
use crate::state::{State, audit};

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
    /// Files that are there and not what they should be: left out, so that the state is not lost for them.
    damaged: Vec<PathBuf>,
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
            damaged: Vec::new(),
            weights: false,
        })
    }

    /// Of a member that has ended.
    pub fn of_remains(remains: Remains) -> Self {
        let Remains { state, segments, tail, .. } = remains;
        let rows = state.all_rows().iter().map(|row| state.row(row).expect("the row was just named")).collect();
        Self { state, rows, segments, tail, files: BTreeMap::new(), damaged: Vec::new(), weights: false }
    }

    /// Adds the files of the state's models that are where `place` says: their texts, which are small and without which
    /// no controller can take a request; and with `weights` all of them. What is not there is left out, and what is
    /// damaged, for a backup with it could not be restored. Reads all of them.
    pub fn with_files(mut self, weights: bool, place: impl Fn(&Hash) -> PathBuf) -> Self {
        let manifests = self.state.manifests().map(|(_, manifest)| manifest);
        let wanted = manifests.flat_map(|manifest| {
            let files = if weights { &manifest.files[..] } else { &[] };
            std::iter::once(&manifest.text).chain(files)
        });
        let placed: BTreeMap<Hash, PathBuf> = wanted.map(|file| (file.hash, place(&file.hash))).collect();
        let there = placed.into_iter().filter(|(_, path)| path.is_file());
        let (files, damaged): (BTreeMap<_, _>, BTreeMap<_, _>) =
            there.partition(|(hash, path)| hash_file(path).is_ok_and(|(is, _)| is == *hash));
        (self.files, self.damaged, self.weights) = (files, damaged.into_values().collect(), weights);
        self
    }

    /// The model files that were left out because they are not what their names say.
    pub fn damaged(&self) -> &[PathBuf] {
        &self.damaged
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
            damaged_files: self.damaged.len() as u64,
            nonce: format!("{nonce:032x}"),
        }
    }

    /// Writes the backup. Blocks on the disk, and on whoever takes it. Fails on an audit trail that could not be restored:
    /// better none than one that is believed to be good.
    pub fn write<W: Write>(&self, header: &Header, key: &MasterKey, out: W) -> anyhow::Result<(W, Summary)> {
        let mut writer = Writer::begin(out, header, key)?;
        for row in &self.rows {
            writer.row(row)?;
        }
        let mut records = 0;
        for Segment { number, path, bytes } in &self.segments {
            let shown = || format!("read {}", path.display());
            let mut frames = Vec::new();
            File::open(path).and_then(|file| file.take(*bytes).read_to_end(&mut frames)).with_context(shown)?;
            records = follow(records, &frames).with_context(shown)?;
            writer.segment(*number, *bytes, &frames[..]).with_context(shown)?;
        }
        if !self.tail.is_empty() {
            let number = self.segments.last().map_or(1, |segment| segment.number + 1);
            records = follow(records, &self.tail).context("the audit trail's end")?;
            writer.segment(number, self.tail.len() as u64, &self.tail[..])?;
        }
        let counted = self.state.audit_seq();
        ensure!(records == counted, "the audit trail ends at record {records}, the state counts {counted}");
        for (hash, path) in &self.files {
            let shown = || format!("read the model file {}", path.display());
            let file = File::open(path).with_context(shown)?;
            let bytes = file.metadata().with_context(shown)?.len();
            writer.file(hash, bytes, file).with_context(shown)?;
        }
        Ok(writer.finish(self.state.digest().hash)?)
    }
}

/// Checks that a segment's records follow the one of number `last`; returns the number of its own last one.
pub(super) fn follow(last: u64, segment: &[u8]) -> anyhow::Result<u64> {
    audit::decode(segment)?.iter().try_fold(last, |last, record| {
        ensure!(record.seq == last + 1, "audit record {} stands where {} should", record.seq, last + 1);
        Ok(record.seq)
    })
}
