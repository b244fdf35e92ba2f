//! Log-probabilities of tokens, in the two forms that OpenAI gives them.

use serde::Serialize;
use serde_json::{Map, Value};

use super::sse::Kind;
use crate::gateway::turn::Scored;

/// What OpenAI writes for a probability of 0.
const NEVER: f32 = -9999.0;

/// Writes the tokens of a piece of an answer, or `null` for none.
pub fn json(kind: Kind, scored: &[Scored]) -> Value {
    if scored.is_empty() {
        return Value::Null;
    }
    let value = match kind {
        Kind::Chat => serde_json::to_value(Chat { content: scored.iter().map(Token::from).collect(), refusal: None }),
        Kind::Completion => serde_json::to_value(completion(scored)),
    };
    value.expect("strings and finite numbers are JSON")
}

#[derive(Serialize)]
struct Chat<'a> {
    content: Vec<Token<'a>>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Token<'a> {
    #[serde(flatten)]
    token: Named<'a>,
    top_logprobs: Vec<Named<'a>>,
}

#[derive(Serialize)]
struct Named<'a> {
    token: String,
    logprob: f32,
    bytes: &'a [u8],
}

fn named(bytes: &[u8], logprob: f32) -> Named<'_> {
    Named { token: text(bytes), logprob: logprob.max(NEVER), bytes }
}

/// A token may be a part of a character.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl<'a> From<&'a Scored> for Token<'a> {
    fn from(scored: &'a Scored) -> Self {
        Self {
            token: named(&scored.token, scored.logprob),
            top_logprobs: scored.top.iter().map(|(token, logprob)| named(token, *logprob)).collect(),
        }
    }
}

#[derive(Serialize)]
struct Completion {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

fn completion(scored: &[Scored]) -> Completion {
    Completion {
        tokens: scored.iter().map(|s| text(&s.token)).collect(),
        token_logprobs: scored.iter().map(|s| s.logprob.max(NEVER)).collect(),
        top_logprobs: scored.iter().map(alternatives).collect(),
        text_offset: scored.iter().map(|s| s.offset).collect(),
    }
}

/// The most probable tokens and, if it is not among them, the one that was given.
fn alternatives(scored: &Scored) -> Map<String, Value> {
    let mut map = Map::new();
    let own = (scored.token.clone(), scored.logprob);
    for (token, logprob) in scored.top.iter().chain([&own]) {
        // Of several that look alike, the most probable is told.
        map.entry(text(token)).or_insert_with(|| Value::from(logprob.max(NEVER)));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn scored() -> Vec<Scored> {
        let top = vec![(b" b".to_vec(), -0.5), (b" a".to_vec(), f32::NEG_INFINITY)];
        let half = Scored { token: vec![0xc3], logprob: -2.0, top: vec![], offset: 2 };
        vec![Scored { token: b" a".to_vec(), logprob: -1.5, top, offset: 0 }, half]
    }

    #[test]
    fn a_chat_names_tokens_with_their_bytes() {
        let expected = json!({"content": [
            {"token": " a", "logprob": -1.5, "bytes": [32, 97], "top_logprobs": [
                {"token": " b", "logprob": -0.5, "bytes": [32, 98]},
                {"token": " a", "logprob": -9999.0, "bytes": [32, 97]}]},
            {"token": "\u{fffd}", "logprob": -2.0, "bytes": [195], "top_logprobs": []},
        ], "refusal": null});
        assert_eq!(json(Kind::Chat, &scored()), expected);
        assert_eq!(json(Kind::Chat, &[]), Value::Null);
    }

    #[test]
    fn a_completion_lists_them_side_by_side() {
        let expected = json!({
            "tokens": [" a", "\u{fffd}"], "token_logprobs": [-1.5, -2.0], "text_offset": [0, 2],
            "top_logprobs": [{" b": -0.5, " a": -9999.0}, {"\u{fffd}": -2.0}],
        });
        assert_eq!(json(Kind::Completion, &scored()), expected);
    }
}
