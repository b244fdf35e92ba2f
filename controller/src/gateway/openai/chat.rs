//! `POST /v1/chat/completions`: what it takes and what it answers.

use std::fmt;

use izar_common::chat::{Message, Role};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize as FromJson, Serialize};
use serde_json::Value;

use super::sse::Kind;
use super::{Head, UsageOut, finish_reason, logprobs};
use crate::gateway::chat::{self, Answer, Prompt};
use crate::gateway::error::Error;
use crate::gateway::intake;

#[derive(Debug, FromJson)]
struct Body {
    messages: Option<Vec<MessageIn>>,
}

#[derive(Debug, FromJson)]
struct MessageIn {
    role: Option<String>,
    content: Option<Content>,
    tool_calls: Option<Value>,
    function_call: Option<Value>,
}

/// A text, or its parts.
#[derive(Debug)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, FromJson)]
struct Part {
    r#type: Option<String>,
    text: Option<String>,
}

/// By hand, because an untagged enum would lose the path of a mistake.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Reads the messages of a body.
pub fn prompt(body: &[u8]) -> Result<Prompt, Error> {
    let Body { messages } = intake::parse(body)?;
    let messages = messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(Error::invalid("messages", "`messages` must have at least one message"));
    }
    let messages: Vec<_> = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    if messages.iter().all(|message| message.content.is_empty()) {
        return Err(Error::invalid("messages", "the prompt is empty: no message in `messages` has any content"));
    }
    Ok(Prompt::Chat(messages))
}

fn message((i, message): (usize, MessageIn)) -> Result<Message, Error> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let role = match message.role.as_deref() {
        Some("system") => Role::System,
        Some("developer") => Role::Developer,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            let message =
                format!("`{}` is `{other}`; it must be system, developer, user, assistant or tool", at("role"));
            return Err(Error::invalid(at("role"), message));
        }
        None => return Err(Error::invalid(at("role"), format!("`{}` is required", at("role")))),
    };
    for (name, value) in [("tool_calls", &message.tool_calls), ("function_call", &message.function_call)] {
        if value.as_ref().is_some_and(|value| value.as_array().is_none_or(|calls| !calls.is_empty())) {
            return Err(Error::Unsupported { field: at(name), detail: String::new() });
        }
    }
    let content = match message.content {
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => join(parts, &at("content"))?,
        None if role == Role::Assistant => String::new(),
        None => return Err(Error::invalid(at("content"), format!("`{}` is required", at("content")))),
    };
    Ok(Message { role, content })
}

fn join(parts: Vec<Part>, at: &str) -> Result<String, Error> {
    let mut all = String::new();
    for (j, part) in parts.into_iter().enumerate() {
        match (part.r#type.as_deref(), part.text) {
            (Some("text"), Some(text)) => all.push_str(&text),
            (Some("text"), None) => {
                let field = format!("{at}[{j}].text");
                return Err(Error::invalid(&field, format!("`{field}` is required")));
            }
            _ => {
                let detail = "only parts of type `text` are".to_owned();
                return Err(Error::Unsupported { field: format!("{at}[{j}].type"), detail });
            }
        }
    }
    Ok(all)
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
    message: MessageOut<'a>,
    logprobs: Value,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct MessageOut<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

fn choice((index, choice): (u32, &chat::Choice)) -> Choice<'_> {
    Choice {
        index,
        message: MessageOut { role: "assistant", content: &choice.text, refusal: None },
        logprobs: logprobs::json(Kind::Chat, &choice.scored),
        finish_reason: finish_reason(choice.finish),
    }
}

/// Writes a whole answer.
pub fn answer(head: &Head, answer: &Answer) -> Vec<u8> {
    let completion = Completion {
        id: head.id(Kind::Chat),
        object: "chat.completion",
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

    fn check(body: &str, field: Option<&str>, words: &str) {
        let error = prompt(body.as_bytes()).expect_err(body);
        assert_eq!((error.row().status.as_u16(), error.field()), (400, field), "{body}: {error}");
        assert!(error.to_string().contains(words), "{body}: {error}");
        if let Some(field) = field {
            assert!(error.to_string().contains(field), "{body}: {error}");
        }
    }

    #[test]
    fn bad_messages_are_refused_by_path() {
        check("{", None, "not valid JSON");
        check("[1]", None, "not the expected object");
        check("{}", Some("messages"), "at least one");
        check(r#"{"messages": []}"#, Some("messages"), "at least one");
        check(r#"{"messages": "hi"}"#, Some("messages"), "invalid type");
        check(r#"{"messages": [{"content": "x"}]}"#, Some("messages[0].role"), "required");
        check(r#"{"messages": [{"role": "king", "content": "x"}]}"#, Some("messages[0].role"), "`king`");
        check(r#"{"messages": [{"role": "user"}]}"#, Some("messages[0].content"), "required");
        check(r#"{"messages": [{"role": "user", "content": 5}]}"#, Some("messages[0].content"), "a string or an array");
        check(r#"{"messages": [{"role": "user", "content": ""}]}"#, Some("messages"), "empty");
        let image = r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}"#;
        check(image, Some("messages[0].content[0].type"), "not supported yet");
        let bare = r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#;
        check(bare, Some("messages[0].content[0].text"), "required");
        let number = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}"#;
        check(number, Some("messages[0].content[0].text"), "invalid type");
        let calls = r#"{"messages": [{"role": "assistant", "tool_calls": [{}]}]}"#;
        check(calls, Some("messages[0].tool_calls"), "not supported yet");
    }

    #[test]
    fn texts_and_parts_become_messages() {
        let body = r#"{"messages": [
            {"role": "system", "content": "be brief", "name": "x"},
            {"role": "assistant", "content": null},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}"#;
        let Prompt::Chat(messages) = prompt(body.as_bytes()).unwrap() else { panic!("a chat") };
        let read: Vec<_> = messages.iter().map(|m| (m.role, m.content.as_str())).collect();
        assert_eq!(read, [(Role::System, "be brief"), (Role::Assistant, ""), (Role::User, "ab")]);
    }

    fn said(text: &str) -> chat::Choice {
        chat::Choice { text: text.into(), scored: Vec::new(), finish: Finish::Stop }
    }

    #[test]
    fn an_answer_has_openais_shape() {
        let head = Head { turn: TurnId(1), created: 5, model: DeploymentId::new("m").unwrap() };
        let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 4 };
        let json: Value =
            serde_json::from_slice(&answer(&head, &Answer { choices: vec![said("hi"), said("ho")], usage })).unwrap();
        assert_eq!(
            (&json["choices"][1]["index"], &json["choices"][1]["message"]["content"]),
            (&1.into(), &"ho".into())
        );
        assert_eq!(json["choices"][0]["logprobs"], Value::Null);
        assert_eq!((json["object"].as_str(), json["created"].as_u64()), (Some("chat.completion"), Some(5)));
        assert_eq!(json["choices"][0]["message"]["content"], "hi");
        assert_eq!(json["choices"][0]["finish_reason"], "stop");
        assert_eq!(json["usage"]["total_tokens"], 7);
    }
}
