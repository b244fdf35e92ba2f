//! Between controllers: Raft's messages as structs of our own, proposals for the leader, and files by hash.
//!
//! Raft's protobuf is never parsed from the network or the disk; `controller/raft/message` converts by hand.

use serde::{Deserialize, Serialize};

use super::Wire;
use crate::id::{Hash, NodeId, TurnId};

/// Bytes as one piece: the same frame as a sequence of bytes has, without a call for each.
mod raw {
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// Mirrors `eraftpb::Message`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RaftMessage {
    pub msg_type: i32,
    pub to: u64,
    pub from: u64,
    pub term: u64,
    pub log_term: u64,
    pub index: u64,
    pub entries: Vec<RaftEntry>,
    pub commit: u64,
    pub commit_term: u64,
    pub request_snapshot: u64,
    pub reject: bool,
    pub reject_hint: u64,
    #[serde(with = "raw")]
    pub context: Vec<u8>,
    pub priority: i64,
}

/// Mirrors `eraftpb::Entry`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RaftEntry {
    /// 0 normal, 1 and 2 membership.
    pub entry_type: i32,
    pub term: u64,
    pub index: u64,
    #[serde(with = "raw")]
    pub data: Vec<u8>,
    #[serde(with = "raw")]
    pub context: Vec<u8>,
}

/// Raft messages that travel together on one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftBatch(pub Vec<RaftMessage>);
impl Wire for RaftBatch {
    const TYPE: u16 = 48;
    const LIMIT: usize = 32 << 20;
}

/// A batch of commands (encoded by `controller/state/command`), passed to the leader. There is no answer: the
/// origin sees the entry when it applies it, and sends it again when it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal(#[serde(with = "raw")] pub Vec<u8>);
impl Wire for Proposal {
    const TYPE: u16 = 49;
    const LIMIT: usize = 8 << 20;
}

/// Asks for a file from `offset` on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRequest {
    pub hash: Hash,
    pub offset: u64,
}
impl Wire for BlobRequest {
    const TYPE: u16 = 50;
    const LIMIT: usize = 256;
}

/// The answer: the whole length, then that many bytes less the offset follow raw on the stream; or not here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlobAnswer {
    Found { bytes: u64 },
    Missing,
}
impl Wire for BlobAnswer {
    const TYPE: u16 = 51;
    const LIMIT: usize = 64;
}

/// Asks what happened to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainRequest {
    pub turn: TurnId,
}
impl Wire for ExplainRequest {
    const TYPE: u16 = 52;
    const LIMIT: usize = 64;
}

/// The answer: the story as JSON, which is for people; `None` if it is not known there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainAnswer {
    pub trace: Option<String>,
}
impl Wire for ExplainAnswer {
    const TYPE: u16 = 53;
    /// 65 events of at most 700 bytes each.
    const LIMIT: usize = 1 << 16;
}

/// What a member without memory asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejoinRequest {
    /// How far the group is.
    Standing,
    /// All that was decided. Only the leader gives it.
    Snapshot,
}
impl Wire for RejoinRequest {
    const TYPE: u16 = 54;
    const LIMIT: usize = 16;
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejoinAnswer {
    /// The newest term that the member knows, 0 if it has not begun either; who leads in it; and whether the state there
    /// knows a process of who asks.
    Standing { term: u64, leader: Option<NodeId>, known: bool },
    /// A backup follows raw on the stream, to its end: of the state as of an entry of this term, in which the member
    /// leads.
    Snapshot { term: u64 },
    /// It can be asked again.
    Refused { reason: String },
}
impl Wire for RejoinAnswer {
    const TYPE: u16 = 55;
    const LIMIT: usize = 1 << 10;
}

/// What a controller says of itself; the stream is the question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    pub version: String,
    /// Its clock, in Unix milliseconds, when it answered.
    pub now_ms: u64,
}
impl Wire for About {
    const TYPE: u16 = 56;
    const LIMIT: usize = 256;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_bytes_have_the_frame_of_a_sequence() {
        #[derive(Serialize, Deserialize)]
        struct AsSequence(Vec<u8>);
        impl Wire for AsSequence {
            const TYPE: u16 = Proposal::TYPE;
            const LIMIT: usize = Proposal::LIMIT;
        }
        for length in [0, 1, 250, 251, 70_000] {
            let bytes: Vec<u8> = (0..length).map(|i: u32| i as u8).collect();
            let frame = crate::wire::to_bytes(&Proposal(bytes.clone()));
            assert_eq!(frame, crate::wire::to_bytes(&AsSequence(bytes.clone())));
            assert_eq!(crate::wire::decode::<Proposal>(&frame).unwrap().0, Proposal(bytes));
        }
    }
}
