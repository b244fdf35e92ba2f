//! What both kinds of request have in common: which model, how to sample, when to stop; checked to the last field.
//!
//! A field that changes the answer and that we do not know how to honour is refused by name. Fields that no dialect
//! knows are skipped: clients send many that do not concern us (`user`, `store`, `metadata`).

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::gateway::chat::Asked;
use crate::gateway::error::Error;
use crate::gateway::intake;

/// Most stop strings, and bytes of one.
const STOPS: usize = 16;
const STOP_BYTES: usize = 1024;

/// The common fields as they come.
#[derive(Debug, Default, serde::Deserialize)]
pub struct Parameters {
    model: Option<String>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    seed: Option<i64>,
    stop: Option<Stop>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    ignore_eos: Option<bool>,
}

#[derive(Debug, Default, serde::Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// One stop string or several.
#[derive(Debug, Default)]
struct Stop(Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Stop;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Stop, A::Error> {
                let mut all = Vec::new();
                while let Some(text) = seq.next_element()? {
                    all.push(text);
                }
                Ok(Stop(all))
            }
        }
        deserializer.deserialize_any(Strings)
    }
}

/// Fields that we do not honour yet. They are refused unless their value asks for nothing.
const REFUSED: &[&str] = &[
    "audio",
    "best_of",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "logprobs",
    "min_p",
    "min_tokens",
    "modalities",
    "n",
    "prediction",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_penalty",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
    "web_search_options",
];

/// The refused fields of a body, with their values.
#[derive(Debug)]
struct Refused(Vec<(&'static str, Value)>);

impl<'de> Deserialize<'de> for Refused {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Refused;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Refused, A::Error> {
                let mut found = Vec::new();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    match REFUSED.iter().find(|name| **name == key) {
                        Some(name) => found.push((*name, map.next_value()?)),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Refused(found))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Whether a refused field's value asks for nothing beyond what happens anyway.
fn harmless(name: &str, value: &Value) -> bool {
    let empty = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    };
    match name {
        "n" | "best_of" | "repetition_penalty" => value.is_null() || value.as_f64() == Some(1.0),
        "response_format" => empty || value["type"] == "text",
        "modalities" => empty || value.as_array().is_some_and(|all| all.iter().all(|one| one == "text")),
        "tool_choice" | "function_call" => empty || value == "none" || value == "auto",
        // An integer in completions, where 0 still asks for the chosen token's own.
        "logprobs" => value.is_null() || *value == Value::Bool(false),
        _ => empty,
    }
}

/// What could be said beside that it is not supported.
fn detail(name: &str) -> &'static str {
    match name {
        "n" | "best_of" => "it must be 1",
        "response_format" => "only {\"type\": \"text\"} is",
        "modalities" => "only [\"text\"] is",
        _ => "",
    }
}

impl Parameters {
    /// Reads the common fields of a body and refuses what we do not honour.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let parameters = intake::parse(body)?;
        let Refused(found) = intake::parse(body)?;
        match found.iter().find(|(name, value)| !harmless(name, value)) {
            Some((name, _)) => Err(Error::Unsupported { field: (*name).to_owned(), detail: detail(name).to_owned() }),
            None => Ok(parameters),
        }
    }

    /// The model's name as the client wrote it.
    pub fn model(&self) -> Result<&str, Error> {
        match self.model.as_deref() {
            Some(name) if !name.is_empty() => Ok(name),
            _ => Err(Error::invalid("model", "`model` is required")),
        }
    }

    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// Checks every range.
    pub fn check(self) -> Result<Asked, Error> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(Error::invalid("stream_options", "`stream_options` is only allowed with `stream`: true"));
        }
        let temperature = self.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(Error::invalid(
                "temperature",
                format!("`temperature` is {temperature}; it must be from 0 to 2"),
            ));
        }
        let top_p = self.top_p.unwrap_or(1.0);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::invalid("top_p", format!("`top_p` is {top_p}; it must be above 0 and at most 1")));
        }
        let top_k = self.top_k.unwrap_or(0);
        let Ok(top_k) = u32::try_from(top_k) else {
            return Err(Error::invalid("top_k", format!("`top_k` is {top_k}; it must be 0 (all) or more")));
        };
        Ok(Asked {
            temperature: temperature as f32,
            // A tiny share must not become 0, which means nothing.
            top_p: (top_p as f32).max(f32::MIN_POSITIVE),
            top_k,
            seed: self.seed.map(|seed| seed as u64),
            max_tokens: max_tokens(self.max_completion_tokens, self.max_tokens)?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stops: stops(self.stop)?,
            stream,
        })
    }
}

/// The newer name goes first.
fn max_tokens(newer: Option<i64>, older: Option<i64>) -> Result<Option<u64>, Error> {
    let (name, value) = match (newer, older) {
        (Some(value), _) => ("max_completion_tokens", value),
        (None, Some(value)) => ("max_tokens", value),
        (None, None) => return Ok(None),
    };
    match u64::try_from(value) {
        Ok(value) if value >= 1 => Ok(Some(value)),
        _ => Err(Error::invalid(name, format!("`{name}` is {value}; it must be at least 1"))),
    }
}

fn stops(stop: Option<Stop>) -> Result<Vec<String>, Error> {
    let Stop(stops) = stop.unwrap_or_default();
    if stops.len() > STOPS {
        return Err(Error::invalid("stop", format!("`stop` has {} strings; at most {STOPS} are allowed", stops.len())));
    }
    for (i, stop) in stops.iter().enumerate() {
        if stop.is_empty() || stop.len() > STOP_BYTES {
            let message = format!("stop string {i} has {} bytes; it must have 1 to {STOP_BYTES}", stop.len());
            return Err(Error::invalid("stop", message));
        }
    }
    Ok(stops)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: &str) -> Result<Asked, Error> {
        Parameters::parse(body.as_bytes())?.check()
    }

    fn check(body: &str, field: &str, words: &str) {
        let error = asked(body).expect_err(body);
        assert_eq!(error.row().status, 400, "{body}");
        assert_eq!(error.field(), Some(field), "{body}: {error}");
        assert!(error.to_string().contains(words) && error.to_string().contains(field), "{body}: {error}");
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        check(r#"{"temperature": 2.1}"#, "temperature", "2.1");
        check(r#"{"temperature": -0.5}"#, "temperature", "from 0 to 2");
        check(r#"{"temperature": "hot"}"#, "temperature", "invalid type");
        check(r#"{"top_p": 0}"#, "top_p", "above 0");
        check(r#"{"top_p": 1.5}"#, "top_p", "at most 1");
        check(r#"{"top_k": -1}"#, "top_k", "-1");
        check(r#"{"max_tokens": 0}"#, "max_tokens", "at least 1");
        check(r#"{"max_completion_tokens": -3, "max_tokens": 5}"#, "max_completion_tokens", "-3");
        check(r#"{"max_tokens": 1.5}"#, "max_tokens", "1.5");
        check(r#"{"seed": "x"}"#, "seed", "invalid type");
        check(r#"{"stop": ""}"#, "stop", "0 bytes");
        check(r#"{"stop": ["a", ""]}"#, "stop", "0 bytes");
        check(r#"{"stop": 5}"#, "stop", "a string or an array");
        check(r#"{"stop": [5]}"#, "stop[0]", "invalid type");
        check(&format!(r#"{{"stop": {:?}}}"#, vec!["x"; 17]), "stop", "17");
        check(r#"{"stream": "yes"}"#, "stream", "invalid type");
        check(r#"{"stream_options": {"include_usage": true}}"#, "stream_options", "only allowed with");
    }

    #[test]
    fn what_would_be_silently_ignored_is_refused_by_name() {
        check(r#"{"n": 2}"#, "n", "it must be 1");
        check(r#"{"tools": [{"type": "function"}]}"#, "tools", "not supported yet");
        check(r#"{"logprobs": true}"#, "logprobs", "not supported yet");
        check(r#"{"logprobs": 0}"#, "logprobs", "not supported yet");
        check(r#"{"response_format": {"type": "json_object"}}"#, "response_format", "text");
        check(r#"{"presence_penalty": 0.5}"#, "presence_penalty", "not supported yet");
        check(r#"{"logit_bias": {"50256": -100}}"#, "logit_bias", "not supported yet");
        check(r#"{"suffix": "x"}"#, "suffix", "not supported yet");
        check(r#"{"tool_choice": "required"}"#, "tool_choice", "not supported yet");
    }

    #[test]
    fn what_asks_for_nothing_and_unknown_fields_are_accepted() {
        let body = r#"{"n": 1, "tools": [], "logprobs": false, "response_format": {"type": "text"}, "logit_bias": {},
            "presence_penalty": 0, "frequency_penalty": 0.0, "tool_choice": "none", "modalities": ["text"],
            "temperature": null, "stop": null, "stream_options": null, "user": "u", "store": true, "metadata": {"a": 1}}"#;
        let asked = asked(body).unwrap();
        assert_eq!((asked.temperature, asked.top_p, asked.top_k, asked.max_tokens), (1.0, 1.0, 0, None));
        assert!(asked.stops.is_empty() && !asked.stream && asked.seed.is_none());
    }

    #[test]
    fn given_values_are_taken() {
        let body = r#"{"temperature": 0, "top_p": 0.5, "top_k": 7, "seed": -1, "stop": ["a", "b"], "stream": true,
            "stream_options": {"include_usage": true}, "max_tokens": 3, "max_completion_tokens": 4, "ignore_eos": true}"#;
        assert!(Parameters::parse(body.as_bytes()).unwrap().include_usage());
        let asked = asked(body).unwrap();
        assert_eq!((asked.temperature, asked.top_p, asked.top_k), (0.0, 0.5, 7));
        assert_eq!((asked.seed, asked.max_tokens, asked.ignore_eos), (Some(u64::MAX), Some(4), true));
        assert_eq!(asked.stops, ["a", "b"]);
        assert!(asked.stream);
    }

    #[test]
    fn a_model_must_be_named() {
        for body in ["{}", r#"{"model": ""}"#, r#"{"model": null}"#] {
            let error = Parameters::parse(body.as_bytes()).unwrap().model().unwrap_err();
            assert_eq!(error.field(), Some("model"));
        }
    }
}
