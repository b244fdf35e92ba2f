//! A streamed request, sealed: agents keep it beside the answer, and another controller can go on with it although the
//! client does not send it again.
//!
//! It holds what the client sent, byte for byte, and takes the same way again as a repeated request. Its seal names the
//! turn and the key: with another key it does not open, and looks the same as one that nobody keeps. Pure but for the
//! random number that a seal needs.

use bytes::Bytes;
use izar_common::chat::CAPSULE_BYTES;
use izar_common::id::{KeyId, TurnId};
use izar_common::seal::MasterKey;

use super::openai::sse::Kind;

/// What a seal adds.
const SEAL_BYTES: usize = 64;

const TOO_LONG: u8 = 0;
const CHAT: u8 = 1;
const COMPLETION: u8 = 2;

/// What a capsule holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Request(Kind, Bytes),
    /// The request was too long to be kept.
    TooLong,
}

/// Seals a request. One that is too long leaves a mark in its place, so that its client is told why.
pub fn seal(key: &MasterKey, turn: TurnId, owner: &KeyId, kind: Kind, body: &[u8]) -> Vec<u8> {
    let tag = match kind {
        _ if body.len() + SEAL_BYTES > CAPSULE_BYTES => return key.seal(&place(turn, owner), &[TOO_LONG]),
        Kind::Chat => CHAT,
        Kind::Completion => COMPLETION,
    };
    key.seal(&place(turn, owner), &[&[tag], body].concat())
}

/// Opens a capsule; `None` if it is of another turn or key, or damaged.
pub fn open(key: &MasterKey, turn: TurnId, owner: &KeyId, sealed: &[u8]) -> Option<Content> {
    let mut content = Bytes::from(key.open(&place(turn, owner), sealed).ok()?);
    let kind = match *content.first()? {
        TOO_LONG => return Some(Content::TooLong),
        CHAT => Kind::Chat,
        COMPLETION => Kind::Completion,
        _ => return None,
    };
    Some(Content::Request(kind, content.split_off(1)))
}

fn place(turn: TurnId, owner: &KeyId) -> Vec<u8> {
    [b"stream", turn.0.to_be_bytes().as_slice(), owner.as_str().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capsule_opens_for_its_turn_and_key_alone() {
        let (key, owner) = (MasterKey::from_bytes([1; 32]), KeyId::new("k").unwrap());
        let sealed = seal(&key, TurnId(1), &owner, Kind::Completion, b"{}");
        assert_eq!(
            open(&key, TurnId(1), &owner, &sealed),
            Some(Content::Request(Kind::Completion, Bytes::from_static(b"{}")))
        );
        assert_eq!(open(&key, TurnId(2), &owner, &sealed), None);
        assert_eq!(open(&key, TurnId(1), &KeyId::new("l").unwrap(), &sealed), None);
        assert_eq!(open(&MasterKey::from_bytes([2; 32]), TurnId(1), &owner, &sealed), None);
        assert_eq!(open(&key, TurnId(1), &owner, &sealed[..sealed.len() - 1]), None);
    }

    #[test]
    fn a_request_that_is_too_long_leaves_a_mark() {
        let (key, owner) = (MasterKey::from_bytes([1; 32]), KeyId::new("k").unwrap());
        let long = |bytes: usize| {
            let sealed = seal(&key, TurnId(1), &owner, Kind::Chat, &vec![b'x'; bytes]);
            assert!(sealed.len() <= CAPSULE_BYTES);
            open(&key, TurnId(1), &owner, &sealed).unwrap() == Content::TooLong
        };
        assert!(long(CAPSULE_BYTES) && long(CAPSULE_BYTES - SEAL_BYTES + 1) && !long(CAPSULE_BYTES - SEAL_BYTES));
    }
}
