//! A `tokenizer.json` from the metadata of a GGUF file: byte-level BPE as GPT-2 began it.
//!
//! GGUF keeps tokens and merges and only the name of the rule that splits text into words (`tokenizer.ggml.pre`).
//! A wrong rule gives a model that answers a little worse and nobody knows why, so an unknown name is an error.
//! Source: llama.cpp `src/llama-vocab.cpp` and the `tokenizer.json` files of the models named below.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::Error;
use crate::gguf::File;

/// GGUF's `token_type` of a token that is never text, and of one that text may hold but is never split.
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
}

/// Builds the tokenizer.
pub(super) fn from_gguf(file: &File) -> Result<Found, Error> {
    let model = file.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(Error::Unsupported(format!("the tokenizer model `{model}` (`gpt2`, byte-level BPE, is)")));
    }
    let rule = Rule::find(file.str("tokenizer.ggml.pre")?)?;
    let tokens = file.strings("tokenizer.ggml.tokens")?;
    let mut seen = HashSet::new();
    if let Some(twice) = tokens.iter().find(|t| !seen.insert(**t)) {
        return Err(malformed("tokens", format!("`{twice}` is there twice")));
    }
    let mut merges = Vec::new();
    for merge in file.strings("tokenizer.ggml.merges")? {
        // Within a token a space is written as `Ġ`; the one space is the border.
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| malformed("merges", format!("`{merge}` is not two tokens")))?;
        merges.push(json!([left, right]));
    }
    let types = file.u32s("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        let reason = format!("{} types for {} tokens", types.len(), tokens.len());
        return Err(malformed("token_type", reason));
    }
    let of_type = |wanted: &'static [u32]| {
        types
            .iter()
            .zip(&tokens)
            .enumerate()
            .filter(move |(_, (t, _))| wanted.contains(t))
            .map(|(id, (t, text))| (id, *t, *text))
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
        "normalizer": rule.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule.splits},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": rule.ignore_merges, "vocab": vocabulary, "merges": merges},
    });
    Ok(Found { json, tokens: tokens.into_iter().map(str::to_owned).collect(), end_of_turn })
}

fn malformed(key: &str, reason: String) -> Error {
    Error::Malformed { name: format!("tokenizer.ggml.{key}"), reason }
}

/// How text is prepared before the merges work on it.
struct Rule {
    normalizer: Value,
    splits: Vec<Value>,
    /// A word that is a token as a whole is taken without looking at merges.
    ignore_merges: bool,
}

/// Shared by Llama 3 and Qwen 2, which differ in how many digits make a number.
const LETTERS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const REST: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
    "\r\n",
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
    "\r\n",
    r"]*|\s*[",
    "\r\n",
    r"]+|\s+(?!\S)|\s+"
);

impl Rule {
    fn find(name: &str) -> Result<Self, Error> {
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let rule = |splits| Self { normalizer: Value::Null, splits, ignore_merges: false };
        Ok(match name {
            "gpt-2" | "gpt2" => rule(vec![bytes(true)]),
            "smollm" => rule(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]),
            "llama-bpe" | "llama-v3" | "llama3" => Self {
                ignore_merges: true,
                ..rule(vec![split(&format!(r"{LETTERS}\p{{N}}{{1,3}}{REST}")), bytes(false)])
            },
            "qwen2" | "deepseek-r1-qwen" => Self {
                normalizer: json!({"type": "NFC"}),
                ..rule(vec![split(&format!(r"{LETTERS}\p{{N}}{REST}")), bytes(false)])
            },
            "deepseek-v3" => {
                rule(vec![split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_V3), bytes(false)])
            }
            other => return Err(Error::Unsupported(format!("the pre-tokenizer `{other}` (tokenizer.ggml.pre)"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn check(rule: &str, text: &str, expected: &[&str]) {
        let json = json!({"type": "Sequence", "pretokenizers": Rule::find(rule).unwrap().splits});
        let splitter: tokenizers::PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        let mut split = PreTokenizedString::from(text);
        splitter.pre_tokenize(&mut split).unwrap();
        let words: Vec<String> = split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(word, ..)| word.replace('Ġ', " ").replace('Ċ', "\n"))
            .collect();
        assert_eq!(words, expected, "{rule}: {text}");
    }

    #[test]
    fn each_rule_splits_words_and_numbers_its_own_way() {
        check("gpt2", "It's 1234 ok\n\n x", &["It", "'s", " 1234", " ok", "\n\n", " x"]);
        check("smollm", "a 12 b", &["a", " ", "1", "2", " b"]);
        check("llama-bpe", "It's 1234!\n x", &["It", "'s", " ", "123", "4", "!\n", " x"]);
        check("qwen2", "12 (a)", &["1", "2", " (", "a", ")"]);
        check("deepseek-v3", "12345 a.b\n", &["123", "45", " a", ".b", "\n"]);
    }

    #[test]
    fn an_unknown_rule_is_refused_by_name() {
        let error = Rule::find("tekken").err().unwrap().to_string();
        assert!(error.contains("`tekken`"), "{error}");
    }
}
