//! Byte-level BPE, as GPT-2 began it, from the metadata of a GGUF file.
//!
//! GGUF keeps tokens and merges and only the name of the rule that splits text into words (`tokenizer.ggml.pre`).
//! A wrong rule gives a model that answers a little worse and nobody knows why, so an unknown name is an error.
//! Source: llama.cpp `src/llama-vocab.cpp` and the `tokenizer.json` files of the models named below.

use serde_json::{Value, json};

use super::Error;
use super::ggml::{Parts, malformed};
use crate::gguf::File;

/// Reads the parts of a `tokenizer.json` that are this kind's own.
pub(super) fn parts(file: &File) -> Result<Parts, Error> {
    let rule = Rule::find(file.str("tokenizer.ggml.pre")?)?;
    let mut merges = Vec::new();
    for merge in file.strings("tokenizer.ggml.merges")? {
        // Within a token a space is written as `Ġ`; the one space is the border.
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| malformed("merges", format!("`{merge}` is not two tokens")))?;
        merges.push(json!([left, right]));
    }
    Ok(Parts {
        normalizer: rule.normalizer,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": rule.splits}),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        merges,
        ignore_merges: rule.ignore_merges,
        byte_fallback: false,
        unknown: None,
    })
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

/// Chinese, Japanese and Korean, as DeepSeek's first tokenizers mean them.
const CJK: &str = "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

/// Letters with a case, as DeepSeek's first tokenizers list them.
const CASED: &str = concat!(
    "A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}",
    "\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}",
    "\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}",
    "\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}",
    "\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}",
    "\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}",
    "\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}",
    "\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}",
    "\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
    "\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}",
    "\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}",
    "\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}",
    "\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
);

impl Rule {
    fn find(name: &str) -> Result<Self, Error> {
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let rule = |splits| Self { normalizer: Value::Null, splits, ignore_merges: false };
        Ok(match name {
            "gpt-2" | "gpt2" => rule(vec![bytes(true)]),
            "smollm" => rule(vec![digits, bytes(true)]),
            "llama-bpe" | "llama-v3" | "llama3" => Self {
                ignore_merges: true,
                ..rule(vec![split(&format!(r"{LETTERS}\p{{N}}{{1,3}}{REST}")), bytes(false)])
            },
            "qwen2" | "deepseek-r1-qwen" => Self {
                normalizer: json!({"type": "NFC"}),
                ..rule(vec![split(&format!(r"{LETTERS}\p{{N}}{REST}")), bytes(false)])
            },
            "deepseek-llm" => rule(vec![
                split(r"[\r\n]"),
                split(&format!(r"\s?[{CASED}]+")),
                split("\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+"),
                split(r"\s+$"),
                split(CJK),
                digits,
                bytes(false),
            ]),
            "deepseek-coder" => {
                rule(vec![split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(CJK), digits, bytes(false)])
            }
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
        // Its punctuation takes letters of ASCII too, out of words with others.
        check("deepseek-llm", "It 12, a\n!", &["It", " ", "1", "2", ",", " a", "\n", "!"]);
        check("deepseek-coder", "x += 12;\n", &["x", " += ", "1", "2", ";", "\n"]);
        check("deepseek-v3", "12345 a.b\n", &["123", "45", " a", ".b", "\n"]);
    }

    #[test]
    fn an_unknown_rule_is_refused_by_name() {
        let error = Rule::find("tekken").err().unwrap().to_string();
        assert!(error.contains("`tekken`"), "{error}");
    }
}
