//! `POST /v1/completions`: what it takes and what it answers.

use std::fmt;

use izar_common::chat::Token;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize as FromJson, Serialize, de};
use serde_json::Value;

use super::sse::Kind;
use super::{Head, UsageOut, finish_reason, logprobs};
use crate::gateway::chat::{self, Answer, Prompt};
use crate::gateway::error::Error;
use crate::gateway::intake;

/// What OpenAI gives a completion that names no `max_tokens`; a base model might otherwise never end.
pub const MAX_TOKENS: u64 = 16;

#[derive(Debug, FromJson)]
struct Body {
    prompt: Option<PromptIn>,
}

/// A text, one text or one prompt in tokens in an array, or the tokens themselves.
#[derive(Debug)]
struct PromptIn(Vec<Item>);

#[derive(Debug)]
enum Item {
    Text(String),
    Token(Token),
    Tokens(Vec<Token>),
}

impl<'de> Deserialize<'de> for PromptIn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = PromptIn;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of one string, or an array of tokens")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptIn, E> {
                Ok(PromptIn(vec![Item::Text(text.to_owned())]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptIn, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(PromptIn(items))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Item;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token or an array of tokens")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, token: u64) -> Result<Item, E> {
                let token = Token::try_from(token).map_err(|_| E::custom("a token is a 32-bit number"))?;
                Ok(Item::Token(token))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Item, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Item::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Reads the prompt of a body.
pub fn prompt(body: &[u8]) -> Result<Prompt, Error> {
    let Body { prompt } = intake::parse(body)?;
    let Some(PromptIn(mut items)) = prompt else {
        return Err(Error::invalid("prompt", "`prompt` is required"));
    };
    let tokens: Vec<Token> =
        items.iter().filter_map(|item| if let Item::Token(t) = item { Some(*t) } else { None }).collect();
    let prompt = match items.len() {
        0 => Prompt::Tokens(Vec::new()),
        n if tokens.len() == n => Prompt::Tokens(tokens),
        1 => match items.remove(0) {
            Item::Text(text) => Prompt::Text(text),
            Item::Tokens(tokens) => Prompt::Tokens(tokens),
            Item::Token(_) => unreachable!("one token is as many tokens as items"),
        },
        _ if tokens.is_empty() => {
            let detail = "more than one prompt in a request".to_owned();
            return Err(Error::Unsupported { field: "prompt".into(), detail });
        }
        _ => return Err(Error::invalid("prompt", "`prompt` mixes tokens with other things")),
    };
    if prompt.is_empty() {
        return Err(Error::invalid("prompt", "`prompt` is empty"));
    }
    Ok(prompt)
}

#[derive(Serialize)]
struct Completion<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: UsageOut,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Value,
    finish_reason: &'static str,
}

fn choice((index, choice): (u32, &chat::Choice)) -> Choice<'_> {
    let (logprobs, finish_reason) = (logprobs::json(Kind::Completion, &choice.scored), finish_reason(choice.finish));
    Choice { index, text: &choice.text, logprobs, finish_reason }
}

/// Writes a whole answer.
pub fn answer(head: &Head, answer: &Answer) -> Vec<u8> {
    let completion = Completion {
        id: head.id(Kind::Completion),
        object: "text_completion",
        created: head.created,
        model: head.model.as_str(),
        choices: (0..).zip(&answer.choices).map(choice).collect(),
        usage: answer.usage.into(),
    };
    serde_json::to_vec(&completion).expect("strings and numbers are JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::chat::{Finish, Usage};
    use izar_common::id::{DeploymentId, TurnId};

    fn check(prompt_json: &str, expected: Result<Prompt, &str>) {
        let read = prompt(format!(r#"{{"prompt": {prompt_json}}}"#).as_bytes());
        match (read, expected) {
            (Ok(read), Ok(expected)) => assert_eq!(read, expected, "{prompt_json}"),
            (Err(error), Err(words)) => {
                assert!(error.field().is_some_and(|field| field.starts_with("prompt")), "{prompt_json}: {error}");
                assert!(error.to_string().contains(words), "{prompt_json}: {error}");
            }
            (read, expected) => panic!("{prompt_json}: {read:?} is not {expected:?}"),
        }
    }

    #[test]
    fn one_prompt_in_any_form_is_taken() {
        check(r#""hi""#, Ok(Prompt::Text("hi".into())));
        check(r#"["hi"]"#, Ok(Prompt::Text("hi".into())));
        check("[5]", Ok(Prompt::Tokens(vec![5])));
        check("[5, 6]", Ok(Prompt::Tokens(vec![5, 6])));
        check("[[5, 6]]", Ok(Prompt::Tokens(vec![5, 6])));
    }

    #[test]
    fn other_prompts_are_refused_by_name() {
        check("null", Err("required"));
        check(r#""""#, Err("empty"));
        check("[]", Err("empty"));
        check("[[]]", Err("empty"));
        check(r#"[""]"#, Err("empty"));
        check(r#"["a", "b"]"#, Err("more than one prompt"));
        check("[[1], [2]]", Err("more than one prompt"));
        check(r#"[1, "b"]"#, Err("mixes"));
        check("[-1]", Err("a token"));
        check("[4294967296]", Err("32-bit"));
        check("{}", Err("a string"));
    }

    #[test]
    fn an_answer_has_openais_shape() {
        let head = Head { turn: TurnId(1), created: 5, model: DeploymentId::new("m").unwrap() };
        let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 4 };
        let whole = answer(
            &head,
            &Answer {
                choices: vec![chat::Choice { text: "hi".into(), scored: Vec::new(), finish: Finish::Length }],
                usage,
            },
        );
        let json: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!(
            (json["object"].as_str(), json["choices"][0]["text"].as_str()),
            (Some("text_completion"), Some("hi"))
        );
        assert_eq!(json["choices"][0]["finish_reason"], "length");
    }
}
