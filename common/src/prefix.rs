//! Names of what a prompt begins with, and a compact note of which names a worker holds. Pure.
//!
//! A worker's cache consists of blocks of [`BLOCK`] tokens. A full one is named by a hash over its tokens and the name of
//! the block before it, keyed by the tenant's salt: who knows salt and tokens (a controller that places a prompt) finds
//! the very names that the worker found, and nobody else can make or read one. A name says nothing of its tokens, and a
//! [`Sketch`] holds less than the names: no text can be had from either, nor whether two tenants asked the same.

use serde::{Deserialize, Serialize};

use crate::chat::Token;
use crate::seal;

/// Tokens of a block.
pub const BLOCK: usize = 16;

/// Names what a block holds, and all before it.
pub type Name = [u8; 16];

/// Names blocks for one tenant.
#[derive(Debug, Clone)]
pub struct Namer {
    salt: [u8; 16],
    key: seal::Namer,
    /// What comes before a sequence's first block.
    root: Name,
}

impl Namer {
    pub fn new(salt: [u8; 16]) -> Self {
        let key = seal::Namer::new(&salt);
        Self { salt, root: key.name(b"root"), key }
    }
    pub fn salt(&self) -> [u8; 16] {
        self.salt
    }
    /// What comes before a sequence's first block.
    pub fn root(&self) -> Name {
        self.root
    }
    /// Names the block of these 16 tokens after the block named `before`.
    pub fn name(&self, before: Name, tokens: &[Token]) -> Name {
        assert_eq!(tokens.len(), BLOCK, "full blocks have names");
        let mut text = [0; size_of::<Name>() + BLOCK * size_of::<Token>()];
        text[..before.len()].copy_from_slice(&before);
        let places = text[before.len()..].chunks_exact_mut(size_of::<Token>());
        places.zip(tokens).for_each(|(place, token)| place.copy_from_slice(&token.to_le_bytes()));
        self.key.name(&text)
    }
    /// Names the full blocks that tokens begin with, `most` of them at most.
    pub fn names(&self, tokens: &[Token], most: usize) -> Vec<Name> {
        let mut before = self.root;
        let blocks = tokens.chunks_exact(BLOCK).take(most);
        blocks
            .map(|tokens| {
                before = self.name(before, tokens);
                before
            })
            .collect()
    }
}

/// Bytes of a sketch at most, so that what an agent sends each second stays small. They serve 65,536 blocks, a million
/// tokens, at the rate of mistakes that [`Sketch`] states; more blocks are wrongly found more often: in one of six cases
/// with twice as many.
pub const SKETCH_BYTES: usize = 64 << 10;

/// Bits for a block at least, below that limit; the next power of two is taken.
const BITS: usize = 8;

/// Bits that a name sets: near the best for 8 to 16 bits a block.
const HASHES: usize = 4;

/// Which blocks a worker holds, roughly (Bloom 1970): one that is held is always found; one that is not is wrongly found in
/// 0.2 to 2.4 % of cases, by how full the last power of two is.
///
/// A prefix is counted from its beginning, so a mistake adds 16 tokens to it, and hardly ever 32. It costs a placement
/// that could have been better, never an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Sketch {
    /// A power of two of them, or none: nothing is held.
    bits: Vec<u8>,
}

/// Bytes that are no sketch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sketch of {0} bytes: a power of two up to {SKETCH_BYTES}, or none")]
pub struct WrongSize(usize);

impl Sketch {
    /// Notes so many names.
    pub fn of<'a>(names: impl ExactSizeIterator<Item = &'a Name>) -> Self {
        if names.len() == 0 {
            return Self::default();
        }
        let bytes = (names.len() * BITS).div_ceil(8).next_power_of_two().min(SKETCH_BYTES);
        let mut sketch = Self { bits: vec![0; bytes] };
        for name in names {
            for (byte, bit) in sketch.places(name) {
                sketch.bits[byte] |= bit;
            }
        }
        sketch
    }
    /// Whether a block is held; see above for how sure that is.
    pub fn holds(&self, name: &Name) -> bool {
        !self.bits.is_empty() && self.places(name).all(|(byte, bit)| self.bits[byte] & bit != 0)
    }
    /// How many of a prompt's first blocks are held.
    pub fn prefix(&self, names: &[Name]) -> usize {
        names.iter().take_while(|name| self.holds(name)).count()
    }
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.bits.len()
    }
    /// A name is a hash already: its parts say where its bits lie.
    fn places(&self, name: &Name) -> impl Iterator<Item = (usize, u8)> + use<> {
        let (name, last) = (*name, 8 * self.bits.len() - 1);
        (0..HASHES).map(move |i| {
            let part = u32::from_le_bytes(*name[4 * i..].first_chunk().expect("a name has four parts"));
            let place = part as usize & last;
            (place / 8, 1 << (place % 8))
        })
    }
}

impl TryFrom<Vec<u8>> for Sketch {
    type Error = WrongSize;
    fn try_from(bits: Vec<u8>) -> Result<Self, WrongSize> {
        let right = bits.is_empty() || bits.len().is_power_of_two() && bits.len() <= SKETCH_BYTES;
        if right { Ok(Self { bits }) } else { Err(WrongSize(bits.len())) }
    }
}

impl From<Sketch> for Vec<u8> {
    fn from(sketch: Sketch) -> Self {
        sketch.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(salt: u8, prompt: u32, blocks: u32) -> Vec<Name> {
        let tokens: Vec<Token> = (0..blocks).flat_map(|block| [prompt * 1_000_000 + block; BLOCK]).collect();
        Namer::new([salt; 16]).names(&tokens, usize::MAX)
    }

    #[test]
    fn a_name_depends_on_tokens_on_what_is_before_and_on_the_tenant() {
        let (a, b) = (Namer::new([1; 16]), Namer::new([2; 16]));
        let name = a.name(a.root(), &[7; BLOCK]);
        assert_eq!(name, a.name(a.root(), &[7; BLOCK]));
        assert_ne!(name, b.name(b.root(), &[7; BLOCK]));
        assert_ne!(name, a.name(name, &[7; BLOCK]));
        let mut other = [7; BLOCK];
        other[15] = 8;
        assert_ne!(name, a.name(a.root(), &other));
    }

    #[test]
    fn only_full_blocks_have_names_and_each_knows_those_before() {
        let namer = Namer::new([1; 16]);
        let tokens: Vec<Token> = (0..50).collect();
        let all = namer.names(&tokens, 9);
        assert_eq!(all.len(), 3);
        assert_eq!((namer.names(&tokens, 2), namer.names(&tokens[..15], 9)), (all[..2].to_vec(), vec![]));
        assert_eq!(all[1], namer.name(all[0], &tokens[16..32]));
    }

    #[test]
    fn what_is_held_is_found_from_the_beginning() {
        let (held, other) = (names(1, 1, 100), names(2, 1, 100));
        let sketch = Sketch::of(held[..60].iter());
        assert_eq!((sketch.prefix(&held[..60]), sketch.prefix(&held[..7])), (60, 7));
        assert!((60..=62).contains(&sketch.prefix(&held)), "{}", sketch.prefix(&held));
        assert!(sketch.prefix(&other) <= 2, "another tenant has other names");
        assert_eq!((Sketch::default().prefix(&held), Sketch::of([].iter())), (0, Sketch::default()));
    }

    #[test]
    fn mistakes_are_as_rare_as_stated_and_the_size_is_bounded() {
        let wrong = |blocks: u32| {
            let sketch = Sketch::of(names(1, 1, blocks).iter());
            let others = names(1, 2, 20_000);
            (sketch.bytes(), others.iter().filter(|name| sketch.holds(name)).count() as f64 / others.len() as f64)
        };
        for (blocks, bytes, range) in [
            (1024, 1024, 0.02..0.03),
            (1025, 2048, 0.001..0.005),
            (65_536, SKETCH_BYTES, 0.02..0.03),
            (131_072, SKETCH_BYTES, 0.14..0.18),
        ] {
            let (size, rate) = wrong(blocks);
            assert!(size == bytes && range.contains(&rate), "{blocks} blocks: {size} bytes, {rate}");
        }
    }

    #[test]
    fn bytes_of_another_size_are_no_sketch() {
        let sketch = Sketch::of(names(1, 1, 5).iter());
        let bytes = Vec::from(sketch.clone());
        assert_eq!((bytes.len(), Sketch::try_from(bytes)), (8, Ok(sketch)));
        assert_eq!(Sketch::try_from(Vec::new()), Ok(Sketch::default()));
        for size in [3, 12, 2 * SKETCH_BYTES] {
            assert_eq!(Sketch::try_from(vec![0; size]), Err(WrongSize(size)));
        }
        assert!(serde_json::from_str::<Sketch>("[1,2,3]").unwrap_err().to_string().contains("3 bytes"));
    }
}
