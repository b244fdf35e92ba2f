//! SentencePiece's BPE (`tokenizer.ggml.model = llama`), from the metadata of a GGUF file.
//!
//! GGUF keeps a score for each token and no merges: two neighbours become one token if that token exists, the best
//! score first. That is BPE over all ways to cut a token in two, ranked by the whole's score.
//! Source: SentencePiece `bpe_model.cc`; checked against Llama 2's tokenizer.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::Error;
use super::ggml::{Parts, UNKNOWN, malformed};
use crate::gguf::File;

/// How a space is written within tokens.
const SPACE: &str = "▁";

/// Characters of one token; a longer one would make more merges than it is worth. The longest known have some hundred.
const TOKEN_LIMIT: usize = 512;

/// GGUF's `token_type` of a token that text becomes.
const NORMAL: u32 = 1;

/// Reads the parts of a `tokenizer.json` that are this kind's own.
pub(super) fn parts(file: &File, tokens: &[&str], types: &[u32]) -> Result<Parts, Error> {
    let flag = |key: &str, default| if file.meta(key).is_some() { file.bool(key) } else { Ok(default) };
    for key in ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.add_eos_token"] {
        if flag(key, false)? {
            return Err(Error::Unsupported(format!("the key `{key}`")));
        }
    }
    if file.meta("tokenizer.ggml.precompiled_charsmap").is_some() {
        return Err(Error::Unsupported("the key `tokenizer.ggml.precompiled_charsmap`".to_owned()));
    }
    let scores = file.f32s("tokenizer.ggml.scores")?;
    if scores.len() != tokens.len() {
        return Err(malformed("scores", format!("{} scores for {} tokens", scores.len(), tokens.len())));
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(malformed("scores", format!("token {id} has the score {}", scores[id])));
    }
    let prefix = flag("tokenizer.ggml.add_space_prefix", true)?;
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut normalizers = vec![space];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = types.iter().position(|kind| *kind == UNKNOWN);
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        merges: merges(tokens, types, &scores)?,
        ignore_merges: false,
        byte_fallback: true,
        unknown: unknown.map(|id| tokens[id].to_owned()),
    })
}

/// Every way to cut a token into two tokens, the best whole first.
fn merges(tokens: &[&str], types: &[u32], scores: &[f32]) -> Result<Vec<Value>, Error> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, text)| (*text, id)).collect();
    let normal = (0..tokens.len()).filter(|id| types[*id] == NORMAL);
    let mut all = Vec::new();
    for whole in normal {
        let text = tokens[whole];
        if text.chars().count() > TOKEN_LIMIT {
            return Err(malformed("tokens", format!("token {whole} is longer than {TOKEN_LIMIT} characters")));
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                all.push((whole, *a, *b));
            }
        }
    }
    let best_first = |x: &(usize, usize, usize), y: &(usize, usize, usize)| {
        scores[y.0].total_cmp(&scores[x.0]).then_with(|| x.cmp(y))
    };
    all.sort_by(best_first);
    Ok(all.into_iter().map(|(_, a, b)| json!([tokens[a], tokens[b]])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Writer;
    use crate::text::{Bundle, Text};
    use std::sync::Arc;

    const TOKENS: [&str; 13] = ["<unk>", "<s>", "</s>", "<0x21>", "▁", "H", "e", "l", "o", "▁H", "He", "lo", "▁Hello"];

    /// A vocabulary in which `▁Hello` can be made of `▁H`, `e`, `l` and `lo`, but not by the best merges.
    fn writer() -> Writer {
        let types = [2_i32, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        let scores: Vec<f32> = (0..13).map(|i| -(i as f32)).collect();
        Writer::default()
            .key("tokenizer.ggml.model", "llama")
            .key("tokenizer.ggml.tokens", TOKENS)
            .key("tokenizer.ggml.token_type", types)
            .key("tokenizer.ggml.scores", scores.into_iter().collect::<crate::gguf::Value>())
            .key("tokenizer.ggml.bos_token_id", 1_u32)
            .key("tokenizer.ggml.eos_token_id", 2_u32)
    }
    fn text(writer: Writer) -> Result<Arc<Text>, Error> {
        let file = File::from_bytes(writer.finish()).unwrap();
        Text::new(&Bundle::from_gguf(&file)?).map(Arc::new)
    }
    fn words(text: &Text, prompt: &str) -> Vec<&'static str> {
        text.encode(prompt).unwrap().into_iter().map(|id| TOKENS[id as usize]).collect()
    }

    #[test]
    fn the_best_score_is_merged_first_and_bytes_stand_for_the_rest() {
        let text = text(writer()).unwrap();
        assert_eq!(words(&text, "Hello!"), ["<s>", "▁H", "e", "l", "lo", "<0x21>"]);
        assert_eq!(words(&text, "o lo"), ["<s>", "▁", "o", "▁", "lo"]);
        let mut decoder = text.decoder();
        let said: String = text.encode("Hello o!").unwrap().into_iter().map(|id| decoder.push(id)).collect();
        assert_eq!(said, "Hello o!");
    }

    #[test]
    fn a_prefix_that_is_not_wanted_is_not_put_in() {
        let text =
            text(writer().key("tokenizer.ggml.add_space_prefix", false).key("tokenizer.ggml.add_bos_token", false));
        assert_eq!(words(&text.unwrap(), "He lo"), ["He", "▁", "lo"]);
    }

    #[test]
    fn what_is_not_supported_or_wrong_is_refused_by_its_key() {
        let check = |writer: Writer, words: &str| {
            let error = format!("{:#}", anyhow::Error::new(text(writer).expect_err("this tokenizer is wrong")));
            assert!(error.contains(words), "`{error}` does not say `{words}`");
        };
        check(
            writer().key("tokenizer.ggml.remove_extra_whitespaces", true),
            "`tokenizer.ggml.remove_extra_whitespaces`",
        );
        check(writer().key("tokenizer.ggml.precompiled_charsmap", [1_u32]), "`tokenizer.ggml.precompiled_charsmap`");
        let plain = || Writer::default().key("tokenizer.ggml.model", "llama").key("tokenizer.ggml.tokens", ["a", "b"]);
        let types = || plain().key("tokenizer.ggml.token_type", [1_i32, 1]);
        check(plain(), "metadata key `tokenizer.ggml.token_type` is missing");
        check(plain().key("tokenizer.ggml.token_type", [1_i32]), "tokenizer.ggml.token_type");
        check(types().key("tokenizer.ggml.scores", [0_f32]), "1 scores for 2 tokens");
        check(types().key("tokenizer.ggml.scores", [0_f32, f32::NAN]), "token 1 has the score NaN");
        check(types(), "`tokenizer.ggml.scores` is missing");
        let other = Writer::default().key("tokenizer.ggml.model", "bert").key("tokenizer.ggml.tokens", ["a"]);
        check(other.key("tokenizer.ggml.token_type", [1_i32]), "tokenizer model `bert`");
    }
}
