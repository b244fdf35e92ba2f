//! Raft's messages between our own structs and the crate's, converted by hand.
//!
//! The crate's protobuf is never parsed from the network or the disk (RUSTSEC-2024-0437). What comes from a peer is
//! checked here, for the crate panics on messages that no correct peer sends.

use izar_common::wire::peer::{RaftEntry, RaftMessage};
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

use super::rebuild::life_of;

/// Why a peer's message is not stepped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("message of kind {0}, which no peer sends")]
    Kind(i32),
    #[error("message from {from} to {to}, but the peer is {peer} and this node {me}")]
    Address { from: u64, to: u64, peer: u64, me: u64 },
    #[error("message without a term")]
    NoTerm,
    #[error("entries that do not follow each other")]
    Entries,
    #[error("a question without exactly one context")]
    ReadIndex,
}

/// Returns the message as it travels.
pub fn to_wire(message: Message) -> RaftMessage {
    RaftMessage {
        msg_type: message.msg_type as i32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message.entries.iter().map(entry_to_wire).collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        request_snapshot: message.request_snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context.to_vec(),
        priority: message.priority,
    }
}

/// Checks a message that `peer` sent to `me`.
pub fn from_wire(message: RaftMessage, peer: u64, me: u64) -> Result<Message, Refused> {
    if message.from != peer || message.to != me {
        return Err(Refused::Address { from: message.from, to: message.to, peer, me });
    }
    let kind = kind(message.msg_type).ok_or(Refused::Kind(message.msg_type))?;
    // The crate takes a message of term 0 for one of its own; only this question really has none.
    if message.term == 0 && kind != MessageType::MsgReadIndex {
        return Err(Refused::NoTerm);
    }
    check_entries(&message, kind)?;
    let mut out = Message::default();
    out.set_msg_type(kind);
    out.to = message.to;
    out.from = message.from;
    out.term = message.term;
    out.log_term = message.log_term;
    out.index = message.index;
    out.entries = message
        .entries
        .into_iter()
        .map(|entry| entry_from_wire(entry).ok_or(Refused::Entries))
        .collect::<Result<Vec<_>, _>>()?
        .into();
    out.commit = message.commit;
    out.commit_term = message.commit_term;
    out.request_snapshot = message.request_snapshot;
    out.reject = message.reject;
    out.reject_hint = message.reject_hint;
    out.context = message.context.into();
    out.priority = message.priority;
    Ok(out)
}

/// Takes out what members of another life say, and returns which life that was. Their terms and indices are not
/// comparable with ours: one side would take for an acknowledgement what is none. A question has no term, and its answer
/// has one.
pub fn strike_other_lives(messages: &mut Vec<RaftMessage>, life: u64) -> Option<u64> {
    let mut other = None;
    messages.retain(|message| {
        let is_ours = message.term == 0 || life_of(message.term) == life;
        if !is_ours {
            other = Some(life_of(message.term));
        }
        is_ours
    });
    other
}

fn check_entries(message: &RaftMessage, kind: MessageType) -> Result<(), Refused> {
    match kind {
        MessageType::MsgAppend => {
            let follows = |(i, entry): (usize, &RaftEntry)| {
                entry.index == message.index + 1 + i as u64 && (1..=message.term).contains(&entry.term)
            };
            if message.index < u64::MAX / 2 && message.entries.iter().enumerate().all(follows) {
                Ok(())
            } else {
                Err(Refused::Entries)
            }
        }
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp if message.entries.len() == 1 => Ok(()),
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => Err(Refused::ReadIndex),
        _ if message.entries.is_empty() => Ok(()),
        _ => Err(Refused::Entries),
    }
}

/// The kinds that peers may send: no local ones, no proposals (they have a stream of their own), no snapshots (this
/// version needs none, see `log`).
fn kind(number: i32) -> Option<MessageType> {
    use MessageType::*;
    [
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTransferLeader,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ]
    .into_iter()
    .find(|kind| *kind as i32 == number)
}

/// Returns an entry as it travels and is stored.
pub fn entry_to_wire(entry: &Entry) -> RaftEntry {
    RaftEntry {
        entry_type: entry.entry_type as i32,
        term: entry.term,
        index: entry.index,
        data: entry.data.to_vec(),
        context: entry.context.to_vec(),
    }
}

/// Returns the crate's form of an entry, or `None` if its kind is unknown.
pub fn entry_from_wire(entry: RaftEntry) -> Option<Entry> {
    let mut out = Entry::default();
    out.entry_type = match entry.entry_type {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        _ => return None,
    };
    out.term = entry.term;
    out.index = entry.index;
    out.data = entry.data.into();
    out.context = entry.context.into();
    Some(out)
}

/// About how many bytes a message takes.
pub fn size(message: &Message) -> usize {
    /// Numbers of a message or an entry as varints, rarely more.
    const FIXED: usize = 64;
    FIXED + message.entries.iter().map(entry_size).sum::<usize>()
}

/// About how many bytes an entry takes.
pub fn entry_size(entry: &Entry) -> usize {
    64 + entry.data.len() + entry.context.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append() -> RaftMessage {
        let entry = |index| RaftEntry { term: 2, index, data: vec![index as u8], ..RaftEntry::default() };
        RaftMessage {
            msg_type: MessageType::MsgAppend as i32,
            to: 1,
            from: 2,
            term: 3,
            log_term: 2,
            index: 7,
            entries: vec![entry(8), entry(9)],
            commit: 6,
            commit_term: 1,
            request_snapshot: 4,
            reject: true,
            reject_hint: 5,
            context: b"context".to_vec(),
            priority: -1,
        }
    }

    fn check(change: impl FnOnce(&mut RaftMessage), expected: Refused) {
        let mut message = append();
        change(&mut message);
        assert_eq!(from_wire(message, 2, 1).unwrap_err(), expected);
    }

    #[test]
    fn messages_round_trip() {
        assert_eq!(to_wire(from_wire(append(), 2, 1).unwrap()), append());
    }

    #[test]
    fn a_member_of_another_life_is_not_heard() {
        let of = |term| RaftMessage { term, ..append() };
        let check = |life, terms: &[u64], heard: &[u64], other| {
            let mut messages: Vec<_> = terms.iter().map(|term| of(*term)).collect();
            assert_eq!(strike_other_lives(&mut messages, life), other, "{terms:?}");
            assert_eq!(messages.iter().map(|message| message.term).collect::<Vec<_>>(), heard);
        };
        let second = 2 << 32;
        check(0, &[1, second, 0], &[1, 0], Some(2));
        check(0, &[1, 0, 7], &[1, 0, 7], None);
        check(2, &[second + 5, 9, 0], &[second + 5, 0], Some(0));
        check(2, &[3 << 32], &[], Some(3));
    }

    #[test]
    fn what_no_correct_peer_sends_is_refused() {
        check(|m| m.from = 3, Refused::Address { from: 3, to: 1, peer: 2, me: 1 });
        check(|m| m.to = 3, Refused::Address { from: 2, to: 3, peer: 2, me: 1 });
        for kind in [-1, 0, 1, 2, 7, 10, 11, 12, 19, 99] {
            check(|m| m.msg_type = kind, Refused::Kind(kind));
        }
        check(|m| m.term = 0, Refused::NoTerm);
        check(|m| m.entries[1].index = 10, Refused::Entries);
        check(|m| m.entries[0].term = 4, Refused::Entries);
        check(|m| m.entries[0].entry_type = 3, Refused::Entries);
        check(|m| m.msg_type = MessageType::MsgHeartbeat as i32, Refused::Entries);
        check(|m| m.msg_type = MessageType::MsgReadIndex as i32, Refused::ReadIndex);
    }
}
