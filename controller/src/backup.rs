//! Backups: the replicated state and the audit trail as of one index, in one sealed file.
//!
//! ```text
//! "izar.bak" | length u32 | header, JSON | sealed stream (common/seal/stream) of items (archive)
//! ```
//! The header is readable without a key, so that a listing needs none, and nothing opens if it was changed. The file is
//! sealed with a key made of the cluster's master key, which is not in it, nor is the pepper, a certificate or a
//! configuration. The weights of models are in it only if asked for: they are content-addressed, and the state says which
//! are needed. A restored cluster is a new life of the old one (`state/rebirth`). Nothing here reads a clock: times come in.

use std::io::{self, Read};

use anyhow::{Context, bail, ensure};
use izar_common::id::{ClusterId, NodeId, SiteId};
use serde::{Deserialize, Serialize};

pub mod archive;
pub mod contents;
pub mod load;
pub mod restore;
pub mod take;

const MAGIC: &[u8; 8] = b"izar.bak";
/// Version of the file's form.
const FORMAT: u32 = 1;
/// What the key of the stream is for.
const PURPOSE: &str = "backup";
/// Longest header; one has about 500 bytes.
pub const HEADER_LIMIT: usize = 4 << 10;
/// The ending of a backup's name.
pub const ENDING: &str = ".izarbak";

/// What a backup says of itself without a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub cluster: ClusterId,
    pub site: SiteId,
    /// The controller that made it.
    pub node: NodeId,
    /// The life of the cluster that it is of.
    pub incarnation: u64,
    /// Index of the last entry that is in it.
    pub applied: u64,
    pub taken_ms: u64,
    /// The version that made it.
    pub version: String,
    /// Which master key opens it (`MasterKey::fingerprint`).
    pub master_key: String,
    /// The weights of models are in it.
    pub models: bool,
    /// Model files that the controller had, and that were not what their names say: they are not in it.
    #[serde(default, skip_serializing_if = "none")]
    pub damaged_files: u64,
    /// Makes every header another one.
    pub nonce: String,
}

fn none(count: &u64) -> bool {
    *count == 0
}

/// Of a newer format only this is sure to be there.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

impl Header {
    /// Reads the beginning of a backup; returns the header and its bytes, which the seal covers.
    pub fn read(input: &mut impl Read) -> anyhow::Result<(Self, Vec<u8>)> {
        let mut begin = [0; 12];
        let is_none = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => anyhow::anyhow!("it is no backup: it is too short"),
            _ => error.into(),
        };
        input.read_exact(&mut begin).map_err(is_none)?;
        let (magic, length) = begin.split_at(MAGIC.len());
        ensure!(magic == MAGIC, "it is no backup of izar");
        let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
        ensure!(length <= HEADER_LIMIT, "its header is damaged: take another backup");
        let mut bytes = vec![0; length];
        input.read_exact(&mut bytes).map_err(is_none)?;
        let damaged = "its header is damaged: take another backup";
        let Version { format } = serde_json::from_slice(&bytes).context(damaged)?;
        ensure!(format <= FORMAT, "it has format {format}, this version knows up to {FORMAT}: install a newer izar");
        Ok((serde_json::from_slice(&bytes).context(damaged)?, bytes))
    }

    /// Reads the header from the first bytes of a backup; `None` if they are too few yet.
    pub fn of_prefix(bytes: &[u8]) -> anyhow::Result<Option<Self>> {
        let whole = bytes.get(8..12).map(|length| {
            let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
            bytes.len() >= 12 + length.min(HEADER_LIMIT)
        });
        if whole == Some(true) || bytes.len() >= 12 + HEADER_LIMIT {
            return Ok(Some(Self::read(&mut &bytes[..])?.0));
        }
        Ok(None)
    }

    /// The name of a backup's file; sorts by time within a cluster and site.
    pub fn file_name(&self) -> String {
        let Self { cluster, site, node, applied, taken_ms, .. } = self;
        format!("{cluster}-{site}-{}-{applied}-{node}{ENDING}", time_in_name(*taken_ms))
    }

    /// Refuses a backup of another cluster or site.
    pub fn belongs_to(&self, cluster: &ClusterId, site: &SiteId) -> anyhow::Result<()> {
        if self.cluster != *cluster || self.site != *site {
            bail!(
                "it is a backup of cluster {}, site {}, but the configuration is of cluster {cluster}, site {site}",
                self.cluster,
                self.site
            );
        }
        Ok(())
    }
}

/// `20261124T120000Z`.
fn time_in_name(ms: u64) -> String {
    let (year, month, day) = izar_common::clock::civil((ms / 86_400_000) as i64);
    let second = ms / 1000 % 86_400;
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests;
