//! The events of a streamed answer, byte by byte as OpenAI writes them.
//!
//! An answer's events differ only in their text, so everything around it is written once for each request and copied.
//! Tests compare with what serde would have written.

use std::fmt::Write as _;

use bytes::{BufMut, BytesMut};
use izar_common::chat::{Finish, Usage};
use serde_json::Value;

use super::Head;
use super::{error, logprobs};
use crate::gateway::error::Error;
use crate::gateway::turn::Piece;

/// Which of the two kinds of answer is streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
}

/// Events beside those with text that one choice can have: role, end, usage, `[DONE]`, error, a keep-alive.
pub const OTHER_EVENTS: usize = 8;

/// Writes the events of one answer.
#[derive(Debug)]
pub struct Events {
    kind: Kind,
    /// From `data: ` to the opening bracket of `choices`.
    head: String,
    /// From the closing bracket of `choices` to the end of the event.
    tail: &'static str,
    include_usage: bool,
}

impl Events {
    pub fn new(kind: Kind, head: &Head, include_usage: bool) -> Self {
        let object = match kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut text = String::with_capacity(160);
        let (id, model) = (head.id(kind), Value::from(head.model.as_str()));
        let _ = write!(
            text,
            r#"data: {{"id":"{id}","object":"{object}","created":{},"model":{model},"choices":["#,
            head.created
        );
        let tail = if include_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" };
        Self { kind, head: text, tail, include_usage }
    }

    fn choice(&self, choice: u32, out: &mut BytesMut, before: &str, text: &str, after: &str) {
        out.reserve(self.head.len() + before.len() + text.len() + after.len() + self.tail.len() + 32);
        out.put_slice(self.head.as_bytes());
        let _ = write!(out, r#"{{"index":{choice},"#);
        out.put_slice(before.as_bytes());
        escape(text, out);
        out.put_slice(after.as_bytes());
        out.put_slice(self.tail.as_bytes());
    }

    /// The first event of a choice of a chat says who speaks; a completion has none.
    pub fn begin(&self, choice: u32, out: &mut BytesMut) {
        if self.kind == Kind::Chat {
            let before = r#""delta":{"role":"assistant","content":""#;
            self.choice(choice, out, before, "", r#""},"logprobs":null,"finish_reason":null}"#);
        }
    }

    pub fn text(&self, choice: u32, piece: Piece<'_>, out: &mut BytesMut) {
        let (before, after) = match self.kind {
            Kind::Chat => (r#""delta":{"content":""#, r#""},"logprobs":null,"finish_reason":null}"#),
            Kind::Completion => (r#""text":""#, r#"","logprobs":null,"finish_reason":null}"#),
        };
        if piece.scored.is_empty() {
            return self.choice(choice, out, before, piece.text, after);
        }
        let logprobs = logprobs::json(self.kind, piece.scored).to_string();
        self.choice(choice, out, before, piece.text, &after.replacen("null", &logprobs, 1));
    }

    /// The last event of a choice that came to its end.
    pub fn end(&self, choice: u32, finish: Finish, out: &mut BytesMut) {
        let before = match self.kind {
            Kind::Chat => r#""delta":{},"logprobs":null,"finish_reason":""#,
            Kind::Completion => r#""text":"","logprobs":null,"finish_reason":""#,
        };
        self.choice(choice, out, before, super::finish_reason(finish), r#""}"#);
    }

    /// The last events of an answer whose choices have come to their ends.
    pub fn finish(&self, usage: Usage, out: &mut BytesMut) {
        if self.include_usage {
            out.put_slice(self.head.as_bytes());
            let usage = serde_json::to_string(&super::UsageOut::from(usage)).expect("numbers are JSON");
            out.put_slice(b"],\"usage\":");
            out.put_slice(usage.as_bytes());
            out.put_slice(b"}\n\n");
        }
        out.put_slice(b"data: [DONE]\n\n");
    }

    /// The last event of an answer that broke off.
    pub fn fail(&self, error: &Error, out: &mut BytesMut) {
        out.put_slice(b"data: ");
        out.put_slice(&error::json(error));
        out.put_slice(b"\n\n");
    }

    /// A comment, which clients skip; it keeps the connection from looking dead.
    pub fn keep_alive(&self, out: &mut BytesMut) {
        out.put_slice(b": keep-alive\n\n");
    }
}

/// Appends a text as the inside of a JSON string.
fn escape(text: &str, out: &mut BytesMut) {
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (i, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.put_slice(&bytes[copied..i]);
        copied = i + 1;
        match byte {
            b'"' => out.put_slice(b"\\\""),
            b'\\' => out.put_slice(b"\\\\"),
            b'\n' => out.put_slice(b"\\n"),
            b'\r' => out.put_slice(b"\\r"),
            b'\t' => out.put_slice(b"\\t"),
            0x08 => out.put_slice(b"\\b"),
            0x0c => out.put_slice(b"\\f"),
            control => {
                let hex = b"0123456789abcdef";
                out.put_slice(b"\\u00");
                out.put_slice(&[hex[usize::from(control >> 4)], hex[usize::from(control & 15)]]);
            }
        }
    }
    out.put_slice(&bytes[copied..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::turn::Scored;
    use izar_common::id::{DeploymentId, TurnId};
    use proptest::prelude::*;
    use serde_json::json;

    fn events(kind: Kind, include_usage: bool) -> Events {
        let head = Head { turn: TurnId(0xab), created: 17, model: DeploymentId::new("m").unwrap() };
        Events::new(kind, &head, include_usage)
    }

    fn piece(text: &str) -> Piece<'_> {
        Piece { text, scored: &[] }
    }

    /// The JSON of each event that `write` wrote.
    fn written(write: impl FnOnce(&mut BytesMut)) -> Vec<Value> {
        let mut out = BytesMut::new();
        write(&mut out);
        let text = String::from_utf8(out.to_vec()).unwrap();
        let events = text.strip_suffix("\n\n").unwrap().split("\n\n");
        let data = events.map(|event| event.strip_prefix("data: ").unwrap());
        data.map(|data| if data == "[DONE]" { json!(data) } else { serde_json::from_str(data).unwrap() }).collect()
    }

    fn chunk(choices: Value) -> Value {
        let id = format!("chatcmpl-{:032x}", 0xab);
        json!({"id": id, "object": "chat.completion.chunk", "created": 17, "model": "m", "choices": choices})
    }

    #[test]
    fn a_chat_begins_with_the_role_and_ends_with_done() {
        let events = events(Kind::Chat, false);
        let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 3 };
        let written = written(|out| {
            events.begin(0, out);
            events.text(0, piece("hi"), out);
            events.end(0, Finish::Stop, out);
            events.finish(usage, out);
        });
        let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
        let expected = [
            chunk(choice(json!({"role": "assistant", "content": ""}), Value::Null)),
            chunk(choice(json!({"content": "hi"}), Value::Null)),
            chunk(choice(json!({}), json!("stop"))),
            json!("[DONE]"),
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn usage_comes_in_an_event_without_choices_and_is_null_before() {
        let events = events(Kind::Chat, true);
        let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 3 };
        let written = written(|out| {
            events.text(0, piece("hi"), out);
            events.end(0, Finish::Length, out);
            events.finish(usage, out);
        });
        assert_eq!(written[0]["usage"], Value::Null);
        assert!(written[0].as_object().unwrap().contains_key("usage"));
        assert_eq!(written[1]["choices"][0]["finish_reason"], "length");
        let mut expected = chunk(json!([]));
        expected["usage"] = json!({"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens": 3,
            "total_tokens": 5});
        assert_eq!(written[2..], [expected, json!("[DONE]")]);
    }

    #[test]
    fn a_completion_has_text_and_no_role() {
        let events = events(Kind::Completion, false);
        let mut none = BytesMut::new();
        events.begin(0, &mut none);
        assert!(none.is_empty());
        let written = written(|out| events.text(0, piece("hi"), out));
        assert_eq!(written[0]["object"], "text_completion");
        assert_eq!(written[0]["choices"], json!([{"index": 0, "text": "hi", "logprobs": null, "finish_reason": null}]));
        assert!(written[0]["id"].as_str().unwrap().starts_with("cmpl-"));
    }

    #[test]
    fn every_event_names_its_choice_and_the_tokens_that_were_asked_for() {
        let scored = [Scored { token: b"null".to_vec(), logprob: -0.5, top: Vec::new(), offset: 0 }];
        for (kind, place) in
            [(Kind::Chat, "/choices/0/logprobs/content/0/token"), (Kind::Completion, "/choices/0/logprobs/tokens/0")]
        {
            let events = events(kind, false);
            let written = written(|out| {
                events.text(7, Piece { text: "null", scored: &scored }, out);
                events.end(7, Finish::Stop, out);
            });
            assert_eq!(written[0].pointer(place).unwrap(), "null", "{written:?}");
            assert!(written.iter().all(|event| event["choices"][0]["index"] == 7), "{written:?}");
            assert_eq!(written[1]["choices"][0]["logprobs"], Value::Null);
        }
    }

    #[test]
    fn a_broken_answer_ends_with_an_error_event() {
        let written = written(|out| events(Kind::Chat, false).fail(&Error::Stopping, out));
        assert_eq!(written[0]["error"]["code"], "stopping");
    }

    fn check_escape(text: &str) {
        let mut out = BytesMut::new();
        escape(text, &mut out);
        assert_eq!(format!("\"{}\"", std::str::from_utf8(&out).unwrap()), serde_json::to_string(text).unwrap());
    }

    #[test]
    fn awkward_texts_are_escaped_as_serde_does() {
        for text in
            ["", "\"", "\\", "a\"b\\c", "\n\r\t\u{8}\u{c}", "\0\u{1f}\u{7f}", "é\u{2028}😀\u{fffd}", "</script>"]
        {
            check_escape(text);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_escaped_as_serde_does(text in any::<String>()) {
            check_escape(&text);
        }
    }
}
