//! The audit trail: who did what when, without a prompt, an answer or a key.
//!
//! A record is one frame, `length u32 | crc32 u32 | JSON` (big-endian), in an append-only segment that `store` keeps.

use izar_common::clock::Hlc;
use izar_common::health::gpu::Outcome as Ending;
use izar_common::id::{DeploymentId, GpuId, Hash, KeyId, NodeId, ProjectId, SiteId, TurnId};
use izar_common::wire::checksum;
use serde::{Deserialize, Serialize};

use super::last_backup::LastBackup;
use super::turns::{Opening, Outcome};
use super::{Project, Remedy, Standing, Tenant};

/// Largest record that is believed when a segment is read; openings have about 700 bytes, reasons at most 512.
pub const RECORD_LIMIT: usize = 64 << 10;
/// Bytes before the JSON of a record.
const HEADER_BYTES: usize = 8;

/// Something that must be provable later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    TurnOpened {
        opening: Opening,
    },
    TurnClosed {
        turn: TurnId,
        outcome: Outcome,
    },
    /// The client went on with it on another controller.
    TurnResumed {
        turn: TurnId,
        node: NodeId,
    },
    KeyCreated {
        key: KeyId,
        project: ProjectId,
    },
    KeyRevoked {
        key: KeyId,
    },
    ModelRegistered {
        revision: Hash,
        name: String,
    },
    Deployed {
        deployment: DeploymentId,
        revision: Hash,
        replicas: u32,
    },
    Undeployed {
        deployment: DeploymentId,
    },
    TenantSet {
        tenant: Tenant,
    },
    ProjectSet {
        project: Project,
    },
    AliasSet {
        alias: DeploymentId,
        deployment: Option<DeploymentId>,
    },
    StandingSet {
        agent: NodeId,
        standing: Option<Standing>,
    },
    /// The cluster goes on from a backup, or from what one member had: what followed `applied` in the life before is not
    /// part of this one.
    ClusterRebuilt {
        incarnation: u64,
        applied: u64,
    },
    GpuHeld {
        gpu: GpuId,
        agent: NodeId,
        quarantined: bool,
        reason: String,
    },
    /// By an operator, or because its agent saw that it is back.
    GpuReleased {
        gpu: GpuId,
        agent: NodeId,
        reason: String,
        operator: bool,
    },
    /// A controller that lost its memory was given the group's.
    MemberReadmitted {
        node: NodeId,
    },
    BackupKept {
        backup: LastBackup,
    },
    RemedyOrdered {
        remedy: Remedy,
    },
    RemedyEnded {
        id: u64,
        agent: NodeId,
        outcome: Ending,
        reason: String,
    },
}

/// An event with its place: `seq` counts the records of a site without a gap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub site: SiteId,
    pub seq: u64,
    pub at: Hlc,
    pub what: Event,
}

/// Why a segment's bytes are not records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the record at byte {0} is cut off")]
    Truncated(usize),
    #[error("the record at byte {0} has a wrong checksum or length")]
    Damaged(usize),
}

/// Appends a record's frame to `out`.
pub fn encode(record: &Record, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    serde_json::to_writer(&mut *out, record).expect("a record has only string keys and memory takes it");
    let json = &out[start + HEADER_BYTES..];
    let (length, crc) = ((json.len() as u32).to_be_bytes(), checksum(json).to_be_bytes());
    out[start..start + 4].copy_from_slice(&length);
    out[start + 4..start + HEADER_BYTES].copy_from_slice(&crc);
}

/// Reads all records of a segment.
pub fn decode(segment: &[u8]) -> Result<Vec<Record>, Error> {
    let mut records = Vec::new();
    let mut at = 0;
    while at < segment.len() {
        let header = segment[at..].first_chunk::<HEADER_BYTES>().ok_or(Error::Truncated(at))?;
        let [a, b, c, d, e, f, g, h] = *header;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > RECORD_LIMIT {
            return Err(Error::Damaged(at));
        }
        let json = segment.get(at + HEADER_BYTES..at + HEADER_BYTES + length).ok_or(Error::Truncated(at))?;
        if checksum(json) != u32::from_be_bytes([e, f, g, h]) {
            return Err(Error::Damaged(at));
        }
        records.push(serde_json::from_slice(json).map_err(|_| Error::Damaged(at))?);
        at += HEADER_BYTES + length;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seq: u64) -> Record {
        Record {
            site: "east".parse().unwrap(),
            seq,
            at: Hlc::from_ms(1),
            what: Event::TurnClosed { turn: TurnId(7), outcome: Outcome::Abandoned },
        }
    }

    #[test]
    fn records_round_trip_and_damage_is_noticed() {
        let mut segment = Vec::new();
        encode(&record(1), &mut segment);
        encode(&record(2), &mut segment);
        assert_eq!(decode(&segment).unwrap(), [record(1), record(2)]);
        assert_eq!(decode(&segment[..segment.len() - 1]), Err(Error::Truncated(segment.len() / 2)));
        segment[12] ^= 1;
        assert_eq!(decode(&segment), Err(Error::Damaged(0)));
    }
}
