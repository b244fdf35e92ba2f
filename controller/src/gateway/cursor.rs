//! The ids of a stream's events: where a client is in its answer, for any controller to go on from there.
//!
//! An id names the turn, what computed it, and how many events of each choice the client has. A seal over the turn, the
//! key and everything that was asked proves that it is ours, and that the same client repeats the same request: only
//! then does the answer have the same tokens. The counts are the client's own: who changes them reads its own answer
//! from another place. Pure.

use std::fmt::Write as _;
use std::str::FromStr;

use bytes::BytesMut;
use izar_common::chat::{Sampling, Token};
use izar_common::id::{Hash, KeyId, NumericsId, TurnId};
use izar_common::seal::Pepper;
use serde::Serialize;

/// Longest id that is looked at: eight choices of ten digits each.
const ID_BYTES: usize = 200;

/// Choices of an answer at most.
const CHOICES: usize = 8;

/// Proves that an id belongs to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seal(u64);

/// A turn and everything that decides its answer.
#[derive(Debug, Serialize)]
pub struct Request<'a> {
    pub turn: TurnId,
    pub key: &'a KeyId,
    pub revision: Hash,
    pub prompt: &'a [Token],
    pub sampling: &'a Sampling,
    pub stops: &'a [String],
    pub choices: u32,
}

impl Seal {
    pub fn of(pepper: &Pepper, request: &Request<'_>) -> Self {
        let request = serde_json::to_string(request).expect("numbers, strings and hashes are JSON");
        // No bearer key begins like this.
        let Hash(hash) = pepper.keyed_hash(&format!("stream {request}"));
        Self(u64::from_be_bytes(*hash.first_chunk().expect("a hash has 32 bytes")))
    }
}

/// A place in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    pub turn: TurnId,
    pub seal: Seal,
    /// What computes the answer, once that is known.
    pub numerics: Option<NumericsId>,
    /// Events of each choice: with text, and the one that ends it.
    pub events: Vec<u32>,
}

/// An id that is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown;

impl Cursor {
    /// The beginning of a stream.
    pub fn begin(turn: TurnId, seal: Seal, choices: u32) -> Self {
        Self { turn, seal, numerics: None, events: vec![0; choices as usize] }
    }
    /// Writes the `id:` line of an event.
    pub fn write(&self, out: &mut BytesMut) {
        let numerics = self.numerics.map_or(0, |numerics| numerics.0);
        write!(out, "id: {:032x}-{:016x}-{numerics:016x}", self.turn.0, self.seal.0).expect("memory takes all");
        for (i, events) in self.events.iter().enumerate() {
            write!(out, "{}{events}", if i == 0 { '-' } else { '.' }).expect("memory takes all");
        }
        out.extend_from_slice(b"\n");
    }
}

impl FromStr for Cursor {
    type Err = Unknown;
    fn from_str(id: &str) -> Result<Self, Unknown> {
        if id.len() > ID_BYTES {
            return Err(Unknown);
        }
        let mut parts = id.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits).ok_or(Unknown)?;
            u128::from_str_radix(part, 16).map_err(|_| Unknown)
        };
        let (turn, seal, numerics) = (hex(32)?, hex(16)?, hex(16)?);
        let counts = parts.next().ok_or(Unknown)?;
        let events: Vec<u32> = counts.split('.').map(str::parse).collect::<Result<_, _>>().map_err(|_| Unknown)?;
        if parts.next().is_some() || events.len() > CHOICES {
            return Err(Unknown);
        }
        let numerics = (numerics != 0).then_some(NumericsId(numerics as u64));
        Ok(Self { turn: TurnId(turn), seal: Seal(seal as u64), numerics, events })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(prompt: &[Token], seed: u64) -> Seal {
        let (pepper, key) = (Pepper::from_bytes([7; 32]), KeyId::new("k").unwrap());
        let sampling = &Sampling { seed, ..Sampling::default() };
        let (turn, key, revision, stops) = (TurnId(5), &key, Hash([1; 32]), &["x".to_owned()]);
        Seal::of(&pepper, &Request { turn, key, revision, prompt, sampling, stops, choices: 2 })
    }

    #[test]
    fn an_id_reads_as_it_was_written() {
        let mut cursor = Cursor::begin(TurnId(u128::MAX - 3), seal(&[1], 2), 2);
        for numerics in [None, Some(NumericsId(u64::MAX))] {
            (cursor.numerics, cursor.events) = (numerics, vec![0, u32::MAX]);
            let mut out = BytesMut::new();
            cursor.write(&mut out);
            let line = String::from_utf8(out.to_vec()).unwrap();
            let id = line.strip_prefix("id: ").unwrap().strip_suffix('\n').unwrap();
            assert_eq!(id.parse(), Ok(cursor.clone()), "{id}");
        }
    }

    #[test]
    fn what_is_no_id_of_ours_is_refused() {
        let good = format!("{:032x}-{:016x}-{:016x}-1.2", 1, 2, 3);
        assert!(good.parse::<Cursor>().is_ok());
        for bad in ["", "7", &good[1..], &format!("{good}-1"), &format!("{good}.x"), &format!("{good}.-1")] {
            assert_eq!(bad.parse::<Cursor>(), Err(Unknown), "{bad}");
        }
        let many = format!("{:032x}-{:016x}-{:016x}-1{}", 1, 2, 3, ".1".repeat(CHOICES));
        assert_eq!(many.parse::<Cursor>(), Err(Unknown));
    }

    #[test]
    fn a_seal_is_of_one_request() {
        assert_eq!(seal(&[1, 2], 3), seal(&[1, 2], 3));
        assert_ne!(seal(&[1, 2], 3), seal(&[1], 3));
        assert_ne!(seal(&[1, 2], 3), seal(&[1, 2], 4));
    }
}
