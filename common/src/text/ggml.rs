//! A `tokenizer.json` from the metadata of a GGUF file.
//!
//! What both kinds share lies here: the tokens, their types, which of them end a turn. `bpe` and `spm` add how text
//! becomes words and words become tokens.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{Error, bpe, spm};
use crate::gguf::File;

/// GGUF's `token_type` of the token for what has none.
pub(super) const UNKNOWN: u32 = 2;
/// Of a token that is never text, and of one that text may hold but is never split.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Control tokens that end a turn whatever the metadata says, as in llama.cpp: converters often name only one of two.
const END_OF_TURN: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
];

/// A tokenizer that was found in a GGUF file.
pub(super) struct Found {
    pub json: Value,
    pub tokens: Vec<String>,
    /// Tokens whose text says that they end a turn.
    pub end_of_turn: Vec<u32>,
    /// Whether prompts begin with the first token where the metadata does not say.
    pub add_bos: bool,
}

/// The parts of a `tokenizer.json` in which the kinds differ.
pub(super) struct Parts {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    /// Pairs of tokens, the best first.
    pub merges: Vec<Value>,
    /// A word that is a token as a whole is taken without looking at merges.
    pub ignore_merges: bool,
    /// Characters that are no token are written in tokens of bytes.
    pub byte_fallback: bool,
    pub unknown: Option<String>,
}

/// Builds the tokenizer.
pub(super) fn from_gguf(file: &File) -> Result<Found, Error> {
    let model = file.str("tokenizer.ggml.model")?;
    let tokens = file.strings("tokenizer.ggml.tokens")?;
    let mut seen = HashSet::new();
    if let Some(twice) = tokens.iter().find(|t| !seen.insert(**t)) {
        return Err(malformed("tokens", format!("`{twice}` is there twice")));
    }
    let types = file.u32s("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        let reason = format!("{} types for {} tokens", types.len(), tokens.len());
        return Err(malformed("token_type", reason));
    }
    let (parts, add_bos) = match model {
        "gpt2" => (bpe::parts(file)?, false),
        "llama" => (spm::parts(file, &tokens, &types)?, true),
        other => {
            let what = format!("the tokenizer model `{other}` (tokenizer.ggml.model; `gpt2` and `llama` are)");
            return Err(Error::Unsupported(what));
        }
    };
    let of_type = |wanted: &'static [u32]| {
        let all = types.iter().zip(&tokens).enumerate();
        all.filter(move |(_, (t, _))| wanted.contains(t)).map(|(id, (t, text))| (id, *t, *text))
    };
    let added: Vec<Value> = of_type(&[CONTROL, USER_DEFINED])
        .map(|(id, kind, text)| {
            json!({"id": id, "content": text, "special": kind == CONTROL, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        })
        .collect();
    let end_of_turn =
        of_type(&[CONTROL]).filter(|(.., text)| END_OF_TURN.contains(text)).map(|(id, ..)| id as u32).collect();
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, text)| ((*text).to_owned(), json!(id))).collect();
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": null,
        "decoder": parts.decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": parts.unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": parts.byte_fallback, "byte_fallback": parts.byte_fallback,
            "ignore_merges": parts.ignore_merges, "vocab": vocabulary, "merges": parts.merges},
    });
    Ok(Found { json, tokens: tokens.into_iter().map(str::to_owned).collect(), end_of_turn, add_bos })
}

pub(super) fn malformed(key: &str, reason: String) -> Error {
    Error::Malformed { name: format!("tokenizer.ggml.{key}"), reason }
}
