//! Tokens to text: a table from token to bytes, and a stream that releases whole characters only.
//!
//! The table gives each token's bytes as its tokenizer's decoder would; special tokens have none. Text is the lossy
//! UTF-8 reading of all bytes in a row, whatever pieces they come in. That is what `tokenizers` gives for byte-level
//! vocabularies; for byte-fallback ones it differs only in how many U+FFFD stand for broken bytes.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::{Error, Text};
use crate::chat::Token;

/// Largest vocabulary taken; the largest known have 260,000 tokens.
const VOCABULARY_LIMIT: u32 = 1 << 20;

/// What happens to spaces at the very beginning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leading {
    Keep,
    StripOne,
    StripAll,
}

/// The bytes of every token, in one piece of memory.
#[derive(Debug)]
pub(super) struct Table {
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where those of the token before end.
    ends: Vec<u32>,
    leading: Leading,
}

impl Table {
    pub(super) fn from_pieces(pieces: impl Iterator<Item = Vec<u8>>, leading: Leading) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for piece in pieces {
            bytes.extend(piece);
            ends.push(u32::try_from(bytes.len()).expect("a vocabulary's text is far below 4 GiB"));
        }
        Self { bytes, ends, leading }
    }

    /// Applies `decoder` (the entry of that name in `tokenizer.json`) to each token. `hidden` tokens get no bytes, like
    /// special ones.
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer, decoder: &Value, hidden: &[Token]) -> Result<Self, Error> {
        let steps = Steps::new(decoder)?;
        let vocabulary = tokenizer.get_vocab(true);
        let count = vocabulary.values().max().map_or(0, |max| max.saturating_add(1));
        if count > VOCABULARY_LIMIT {
            return Err(Error::Tokenizer(format!("{count} tokens are more than the limit of {VOCABULARY_LIMIT}")));
        }
        let mut pieces = vec![Vec::new(); count as usize];
        for (text, id) in vocabulary {
            pieces[id as usize] = steps.apply(&text);
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(piece) = pieces.get_mut(id as usize) {
                *piece = if token.special { Vec::new() } else { steps.apply(&token.content) };
            }
        }
        for id in hidden {
            if let Some(piece) = pieces.get_mut(*id as usize) {
                piece.clear();
            }
        }
        Ok(Self::from_pieces(pieces.into_iter(), steps.leading))
    }

    pub(super) fn len(&self) -> u32 {
        self.ends.len() as u32
    }
    /// A token's bytes; none for a token outside the vocabulary (models have padding rows that mean nothing).
    pub(super) fn get(&self, token: Token) -> &[u8] {
        let index = token as usize;
        let Some(end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..*end as usize]
    }
}

/// A tokenizer's decoder, as far as language models use them, told apart into what it does to one token.
struct Steps {
    byte_level: Option<HashMap<char, u8>>,
    byte_fallback: bool,
    replace: Vec<(String, String)>,
    leading: Leading,
}

impl Steps {
    fn new(decoder: &Value) -> Result<Self, Error> {
        let mut steps = Self { byte_level: None, byte_fallback: false, replace: Vec::new(), leading: Leading::Keep };
        match decoder["type"].as_str() {
            Some("Sequence") => {
                for one in decoder["decoders"].as_array().into_iter().flatten() {
                    steps.add(one)?;
                }
            }
            _ => steps.add(decoder)?,
        }
        Ok(steps)
    }
    fn add(&mut self, decoder: &Value) -> Result<(), Error> {
        let text = |key: &str| decoder[key].as_str().unwrap_or_default();
        match text("type") {
            "ByteLevel" => self.byte_level = Some(byte_chars()),
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" if decoder["pattern"]["String"].is_string() => {
                let pattern = decoder["pattern"]["String"].as_str().unwrap_or_default();
                self.replace.push((pattern.to_owned(), text("content").to_owned()));
            }
            "Metaspace" => {
                self.replace.push((text("replacement").to_owned(), " ".to_owned()));
                let prefix = text("prepend_scheme") != "never" && decoder["add_prefix_space"] != Value::Bool(false);
                self.leading = if prefix { Leading::StripAll } else { Leading::Keep };
            }
            "Strip" if text("content") == " " && decoder["start"] == 1 && decoder["stop"] == 0 => {
                self.leading = Leading::StripOne;
            }
            "Strip" if decoder["start"] == 0 && decoder["stop"] == 0 => {}
            _ => return Err(Error::Unsupported(format!("the tokenizer's decoder {decoder}"))),
        }
        Ok(())
    }
    fn apply(&self, token: &str) -> Vec<u8> {
        if let Some(map) = &self.byte_level {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| map.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|d| d.len() == 2);
        if let Some(byte) = digits.filter(|_| self.byte_fallback).and_then(|d| u8::from_str_radix(d, 16).ok()) {
            return vec![byte];
        }
        let replaced = self.replace.iter().fold(token.to_owned(), |text, (from, to)| text.replace(from, to));
        replaced.into_bytes()
    }
}

/// GPT-2's alphabet: printable Latin-1 bytes are written as themselves, the others as U+0100 and on.
fn byte_chars() -> HashMap<char, u8> {
    let mut next = 0x100;
    let mut map = HashMap::new();
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let char = if printable {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).expect("0x100 to 0x143 are characters")
        };
        map.insert(char, byte);
    }
    map
}

/// Decodes one answer, token by token. Joined, what it gives is exactly the text of all tokens at once.
pub struct Detokenizer {
    text: Arc<Text>,
    /// The bytes of an unfinished character, three at most.
    pending: Vec<u8>,
    /// Whether a leading space may still come.
    leading: Leading,
}

/// Shows nothing of the answer.
impl fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detokenizer").field("pending_bytes", &self.pending.len()).finish_non_exhaustive()
    }
}

impl Detokenizer {
    pub(super) fn new(text: Arc<Text>) -> Self {
        let leading = text.table.leading;
        Self { text, pending: Vec::new(), leading }
    }
    /// Takes a token and gives the text that it completes, often none. Special tokens give none.
    pub fn push(&mut self, token: Token) -> String {
        let mut out = String::new();
        self.push_to(token, &mut out);
        out
    }
    /// Like `push`, at the end of `out`.
    pub fn push_to(&mut self, token: Token, out: &mut String) {
        let mut bytes = self.text.table.get(token);
        if self.leading != Leading::Keep && !bytes.is_empty() {
            let spaces = bytes.iter().take_while(|b| **b == b' ').count();
            bytes = &bytes[if self.leading == Leading::StripOne { spaces.min(1) } else { spaces }..];
            self.leading = Leading::Keep;
        }
        if self.pending.is_empty() {
            self.pending = release(bytes, out).to_vec();
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(bytes);
            self.pending = release(&joined, out).to_vec();
        }
    }
    /// Ends the answer; an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&pending).into_owned()
    }
}

/// Appends whole characters to `out`, U+FFFD for each broken sequence, and returns the unfinished rest.
fn release<'a>(mut bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => error,
        };
        let (good, rest) = bytes.split_at(error.valid_up_to());
        out.push_str(std::str::from_utf8(good).expect("it is valid up to here"));
        let Some(broken) = error.error_len() else { return rest };
        out.push(char::REPLACEMENT_CHARACTER);
        bytes = &rest[broken..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn text(pieces: Vec<Vec<u8>>, leading: Leading) -> Arc<Text> {
        let table = Table::from_pieces(pieces.into_iter(), leading);
        Arc::new(Text { language: super::super::Language::Echo, table, eos: Vec::new(), defaults: Default::default() })
    }
    fn stream(text: &Arc<Text>, tokens: impl IntoIterator<Item = Token>) -> Vec<String> {
        let mut decoder = text.decoder();
        let mut out: Vec<String> = tokens.into_iter().map(|t| decoder.push(t)).collect();
        out.push(decoder.finish());
        out
    }

    #[test]
    fn a_character_in_pieces_is_released_whole() {
        let euro = text(vec![vec![0xe2], vec![0x82], vec![0xac, b'!']], Leading::Keep);
        assert_eq!(stream(&euro, [0, 1, 2]), ["", "", "€!", ""]);
        assert_eq!(stream(&euro, [0, 1]), ["", "", "\u{fffd}"]);
        assert_eq!(stream(&euro, [0, 9, 1, 2]), ["", "", "", "€!", ""], "a token outside the vocabulary is nothing");
    }

    #[test]
    fn a_leading_space_goes_where_the_decoder_says_so() {
        let pieces = vec![vec![], b"  a".to_vec(), b" b".to_vec()];
        let check = |leading, expected: &str| {
            assert_eq!(stream(&text(pieces.clone(), leading), [0, 1, 2]).concat(), expected);
        };
        check(Leading::Keep, "  a b");
        check(Leading::StripOne, " a b");
        check(Leading::StripAll, "a b");
    }

    #[test]
    fn sentencepiece_tokens_become_spaces_and_bytes() {
        let steps = Steps::new(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
        .unwrap();
        assert_eq!(steps.apply("▁the▁"), b" the ");
        assert_eq!(steps.apply("<0xE2>"), [0xe2]);
        assert_eq!(steps.apply("<0xZZ>"), b"<0xZZ>");
        assert_eq!(steps.leading, Leading::StripOne);
    }

    #[test]
    fn an_unknown_decoder_is_refused_by_name() {
        let error = Steps::new(&json!({"type": "WordPiece"})).err().unwrap().to_string();
        assert!(error.contains("WordPiece"), "{error}");
        assert!(Steps::new(&Value::Null).is_err());
    }

    #[test]
    fn the_byte_alphabet_is_that_of_gpt2() {
        let map = byte_chars();
        assert_eq!(map.len(), 256);
        assert_eq!((map[&'Ġ'], map[&'Ċ'], map[&'a'], map[&'é']), (b' ', b'\n', b'a', 0xe9));
    }

    proptest! {
        #[test]
        fn pieces_joined_equal_the_whole(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5), 0..40),
            words in proptest::collection::vec("\\PC{0,3}", 0..10),
        ) {
            let mut pieces = pieces;
            // Real characters cut anywhere, among random bytes.
            pieces.extend(words.concat().as_bytes().chunks(2).map(<[u8]>::to_vec));
            let whole = pieces.concat();
            let count = pieces.len() as Token;
            let streamed = stream(&text(pieces, Leading::Keep), 0..count).concat();
            prop_assert_eq!(streamed, String::from_utf8_lossy(&whole));
        }
    }
}
