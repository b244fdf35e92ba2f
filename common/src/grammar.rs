//! Grammars: what a whole answer must be, compiled into masks over a model's tokens. The one home of `llguidance`.
//!
//! A controller compiles each grammar once without a vocabulary ([`check`]), so that a schema which cannot be followed
//! is refused before anything is computed; a worker compiles it again over its model's tokens. What a schema may cost
//! is bounded by the limits here, counted in work and not in time, so that the answer is the same on every machine.

use std::sync::{Arc, OnceLock};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, ParserFactory};
use serde_json::{Value, json};

use crate::chat::{Grammar, Token};
use crate::text::Text;

/// Longest JSON schema in bytes: far above what people write by hand, and compiled within the limits below.
pub const SCHEMA_BYTES: usize = 64 << 10;
/// Longest regular expression in bytes.
pub const REGEX_BYTES: usize = 4 << 10;
/// Work to build the lexer of a grammar; about 20 ms.
const COMPILE_FUEL: u64 = 1_000_000;
/// Symbols of a compiled grammar; the largest useful schemas known have twice as many in megabytes of JSON.
const GRAMMAR_SYMBOLS: usize = 100_000;
/// States that a lexer may grow to while an answer is written, at one or two kilobytes each: 20 MB a sequence.
const LEXER_STATES: usize = 10_000;
/// Work for one mask: about 14 ms in the lexer and 2.5 ms in the parser. A grammar that needs more fails its request.
const MASK_FUEL: u64 = 200_000;
const MASK_ITEMS: usize = 50_000;
/// White space in one place between the parts of JSON: enough to indent deeply, too little to write nothing else.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// Bytes of an answer that [`check`] writes: past the first bracket, where the properties of an object may come.
const FIRST_BYTES: usize = 4;
/// Characters of a reason that are passed on.
const REASON: usize = 400;

/// Why a grammar cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("it has {bytes} bytes; at most {limit} are allowed")]
    Long { bytes: usize, limit: usize },
    #[error("it is not valid JSON: {0}")]
    Json(String),
    #[error("a schema must be a JSON object")]
    NoObject,
    /// It asks for what no grammar can, for what is not supported, or for too much.
    #[error("{0}")]
    Refused(String),
    /// The model's answers have no end that a grammar could allow.
    #[error("the model's tokenizer names no end token")]
    NoEnd,
}

/// Compiles grammars over one vocabulary. Built once for a model; takes some hundred milliseconds for a large one.
pub struct Compiler {
    factory: ParserFactory,
}

impl Compiler {
    /// Takes the tokens of a model. Special tokens are never part of an answer, its end tokens apart.
    pub fn new(text: &Text) -> Result<Self, Error> {
        let &[eos, ..] = text.eos() else { return Err(Error::NoEnd) };
        let words: Vec<Vec<u8>> = (0..text.vocabulary()).map(|token| text.token_bytes(token).to_vec()).collect();
        let trie = TokTrie::from(&TokRxInfo::new(text.vocabulary(), eos), &words).with_eos_tokens(text.eos());
        // Not canonical: the model chooses how it cuts forced text into tokens, as it does elsewhere.
        Self::over(Arc::new(ApproximateTokEnv::new(trie)))
    }

    fn over(tokens: TokEnv) -> Result<Self, Error> {
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|e| refused(&e))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: COMPILE_FUEL,
            max_grammar_size: GRAMMAR_SYMBOLS,
            max_lexer_states: LEXER_STATES,
            step_lexer_fuel: MASK_FUEL,
            step_max_items: MASK_ITEMS,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// Compiles a grammar. CPU work of up to about 300 ms.
    pub fn compile(&self, grammar: &Grammar) -> Result<Matcher, Error> {
        let grammar = top_level(grammar)?;
        let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.factory.create_parser(grammar)));
        let parser = parser.map_err(|_| Error::Refused("it is too strange to be compiled".to_owned()))?;
        let matcher = llguidance::Matcher::new(parser);
        match matcher.get_error() {
            Some(reason) => Err(Error::Refused(bounded(&reason))),
            None => Ok(Matcher(Box::new(matcher))),
        }
    }
}

/// Says whether a grammar can be followed, whatever the model: compiles it over single bytes and writes the beginning of
/// an answer, for much of the work is only done there. CPU work of up to about 300 ms, for a schema of the largest size.
pub fn check(grammar: &Grammar) -> Result<(), Error> {
    static BYTES: OnceLock<Result<Compiler, Error>> = OnceLock::new();
    let compiler = BYTES.get_or_init(|| Compiler::over(ApproximateTokEnv::single_byte_env()));
    let mut matcher = compiler.as_ref().map_err(Clone::clone)?.compile(grammar)?;
    for _ in 0..FIRST_BYTES {
        let mask = matcher.mask()?;
        let Some(byte) = (0..=Token::from(u8::MAX)).find(|byte| mask.has(*byte)) else { break };
        matcher.accept(&[byte])?;
    }
    Ok(())
}

fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, Error> {
    let short = |text: &str, limit| match text.len() {
        bytes if bytes > limit => Err(Error::Long { bytes, limit }),
        _ => Ok(()),
    };
    let json = |mut schema: Value| {
        if !schema.is_object() {
            return Err(Error::NoObject);
        }
        // What a client writes there would change the limits above.
        let options = JsonCompileOptions { whitespace_pattern: Some(WHITE_SPACE.to_owned()), ..Default::default() };
        options.apply_to(&mut schema);
        Ok(TopLevelGrammar::from_json_schema(schema))
    };
    match grammar {
        Grammar::JsonObject => json(json!({"type": "object"})),
        Grammar::JsonSchema(schema) => {
            short(schema, SCHEMA_BYTES)?;
            json(serde_json::from_str(schema).map_err(|e| Error::Json(e.to_string()))?)
        }
        Grammar::Regex(regex) => {
            short(regex, REGEX_BYTES)?;
            Ok(TopLevelGrammar::from_regex(regex))
        }
    }
}

fn refused(error: &impl std::fmt::Display) -> Error {
    Error::Refused(bounded(&format!("{error:#}")))
}

/// What is of use to a client: without the mark that a longer form was left out.
fn bounded(reason: &str) -> String {
    reason.replace("<non-verbose/>", "").trim().chars().take(REASON).collect()
}

/// Follows one answer. In a box, for it is passed from thread to thread with every token.
pub struct Matcher(Box<llguidance::Matcher>);

impl Matcher {
    /// Which tokens may come next; only end tokens once the answer is whole. CPU work of up to some milliseconds.
    pub fn mask(&mut self) -> Result<Mask, Error> {
        self.0.compute_mask_or_eos().map(Mask).map_err(|e| refused(&e))
    }
    /// Takes the next tokens of the answer.
    pub fn accept(&mut self, tokens: &[Token]) -> Result<(), Error> {
        self.0.consume_tokens(tokens).map_err(|e| refused(&e))
    }
}

/// A set of tokens.
#[derive(Debug, Clone)]
pub struct Mask(SimpleVob);

impl Mask {
    /// One bit for each token, the lowest first; tokens beyond the last word are not in it.
    pub fn words(&self) -> &[u32] {
        self.0.as_slice()
    }
    pub fn has(&self, token: Token) -> bool {
        self.words().get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Bundle;
    use std::path::Path;

    fn schema(schema: Value) -> Grammar {
        Grammar::JsonSchema(schema.to_string())
    }

    fn golden() -> Text {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama");
        Text::new(&Bundle::from_folder(&folder).unwrap()).unwrap()
    }

    /// Whether a model may write this answer and end there.
    fn allows(grammar: &Grammar, answer: &str) -> bool {
        let text = golden();
        let mut matcher = Compiler::new(&text).unwrap().compile(grammar).unwrap();
        for token in text.encode(answer).unwrap() {
            if !matcher.mask().unwrap().has(token) {
                return false;
            }
            matcher.accept(&[token]).unwrap();
        }
        matcher.mask().unwrap().has(text.eos()[0])
    }

    #[test]
    fn an_answer_is_what_its_grammar_says_and_whole() {
        let person = schema(json!({
            "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"], "additionalProperties": false,
        }));
        for (grammar, answer, expected) in [
            (&person, r#"{"name": "Ann", "age": 7}"#, true),
            (&person, "{\n  \"name\": \"Ann\",\n  \"age\": 7\n}", true),
            (&person, r#"{"name": "Ann"}"#, false),
            (&person, r#"{"name": "Ann", "age": 7"#, false),
            (&person, r#"{"age": 7, "name": "Ann"}"#, false),
            (&person, r#"{"name": "Ann", "age": "7"}"#, false),
            (&person, "Sure! {", false),
            (&Grammar::JsonObject, r#"{"a": [1, {"b": null}]}"#, true),
            (&Grammar::JsonObject, "[1]", false),
            (&Grammar::Regex("(yes|no)/[0-9]{2}".into()), "yes/07", true),
            (&Grammar::Regex("(yes|no)/[0-9]{2}".into()), "yes/7", false),
            (&Grammar::Regex("ä+".into()), "ää", true),
        ] {
            assert_eq!(allows(grammar, answer), expected, "{grammar:?} {answer}");
        }
    }

    #[test]
    fn special_tokens_are_no_part_of_an_answer() {
        let text = golden();
        let mut matcher = Compiler::new(&text).unwrap().compile(&Grammar::Regex("(?s:.*)".into())).unwrap();
        let mask = matcher.mask().unwrap();
        let specials: Vec<Token> = (0..4).filter(|token| mask.has(*token)).collect();
        assert_eq!(specials, text.eos(), "the end is allowed, the others are not");
        assert!(!mask.has(text.vocabulary()) && !mask.has(Token::MAX));
    }

    #[test]
    fn white_space_has_an_end() {
        let spaces = |n: usize| format!("{{{}\"a\": 1}}", " ".repeat(n));
        assert!(allows(&Grammar::JsonObject, &spaces(40)));
        assert!(!allows(&Grammar::JsonObject, &spaces(41)));
    }

    #[test]
    fn properties_come_in_the_order_of_the_schema() {
        let text = r#"{"type":"object","properties":{"z":{"type":"null"},"a":{"type":"null"}},"required":["z","a"]}"#;
        assert!(allows(&Grammar::JsonSchema(text.into()), r#"{"z": null, "a": null}"#));
    }

    fn check_refused(grammar: Grammar, words: &str) {
        let error = check(&grammar).expect_err(words).to_string();
        assert!(error.contains(words) && error.len() < 500, "{error}");
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_the_reason() {
        check_refused(Grammar::JsonSchema("{".into()), "not valid JSON");
        check_refused(Grammar::JsonSchema("[]".into()), "must be a JSON object");
        check_refused(schema(json!({"type": "strin"})), "strin");
        check_refused(schema(json!({"$ref": "https://example.com/s.json"})), "ref");
        check_refused(schema(json!({"type": "array", "uniqueItems": true})), "uniqueItems");
        check_refused(schema(json!({"const": "x".repeat(SCHEMA_BYTES)})), "at most 65536");
        check_refused(Grammar::Regex("(".into()), "");
        check_refused(Grammar::Regex("(?=a)b".into()), "");
        check_refused(Grammar::Regex("a".repeat(REGEX_BYTES + 1)), "at most 4096");
        assert_eq!(check(&Grammar::JsonObject), Ok(()));
    }

    #[test]
    fn a_grammar_that_explodes_is_refused_instead_of_compiled() {
        let property = |i: u32| (format!("property_{i}"), json!({"type": "string"}));
        let optional: serde_json::Map<String, Value> = (0..1500).map(property).collect();
        check_refused(schema(json!({"type": "object", "properties": optional})), "max is 2000");
    }

    #[test]
    fn nesting_is_followed_as_far_as_json_itself_is_read() {
        check_refused(Grammar::JsonSchema("[".repeat(5000)), "not valid JSON");
        let deep = (0..100).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
        assert_eq!(check(&schema(deep)), Ok(()));
    }

    #[test]
    fn a_model_without_an_end_cannot_follow_a_grammar() {
        assert_eq!(Compiler::new(&Text::new(&Bundle::echo()).unwrap()).err(), Some(Error::NoEnd));
    }
}
