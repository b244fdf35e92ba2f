//! What both kinds of request have in common: which model, how to sample, when to stop; checked to the last field.
//!
//! A field that changes the answer and that we do not know how to honour is refused by name. Fields that no dialect
//! knows are skipped: clients send many that do not concern us (`user`, `store`, `metadata`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use izar_common::chat::{Grammar, TOP_LOGPROBS, Token};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::sse::Kind;
use crate::gateway::chat::Asked;
use crate::gateway::error::Error;
use crate::gateway::intake;

/// Answers to one request: each is computed on its own, so more cost what more requests would.
const CHOICES: i64 = 8;
/// Tokens with a bias: each is looked at for every token of the answer. OpenAI takes 300.
const BIASES: usize = 1024;
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
    n: Option<i64>,
    best_of: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    logit_bias: Option<BTreeMap<String, f64>>,
    logprobs: Option<Wanted>,
    top_logprobs: Option<i64>,
    response_format: Option<ResponseFormat>,
    /// vLLM's: a regular expression that the whole answer matches.
    guided_regex: Option<String>,
}

#[derive(Debug, Default, serde::Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, serde::Deserialize)]
struct ResponseFormat {
    r#type: Option<String>,
    json_schema: Option<JsonSchema>,
}

#[derive(Debug, serde::Deserialize)]
struct JsonSchema {
    name: Option<String>,
    schema: Option<Value>,
}

/// Whether log-probabilities are wanted: a chat says so, a completion says with how many alternatives.
#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(try_from = "Value")]
enum Wanted {
    Yes(bool),
    With(i64),
}

impl TryFrom<Value> for Wanted {
    type Error = &'static str;
    fn try_from(value: Value) -> Result<Self, Self::Error> {
        match value {
            Value::Bool(wanted) => Ok(Wanted::Yes(wanted)),
            Value::Number(number) => number.as_i64().map(Wanted::With).ok_or("a whole number is expected"),
            _ => Err("true, false or a number is expected"),
        }
    }
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
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "min_tokens",
    "modalities",
    "prediction",
    "prompt_logprobs",
    "suffix",
    "tool_choice",
    "tools",
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
        "modalities" => empty || value.as_array().is_some_and(|all| all.iter().all(|one| one == "text")),
        "tool_choice" | "function_call" => empty || value == "none" || value == "auto",
        _ => empty,
    }
}

/// What could be said beside that it is not supported.
fn detail(name: &str) -> &'static str {
    match name {
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
    pub fn check(self, kind: Kind) -> Result<Asked, Error> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(Error::invalid("stream_options", "`stream_options` is only allowed with `stream`: true"));
        }
        let top_k = self.top_k.map(|top_k| {
            u32::try_from(top_k)
                .map_err(|_| Error::invalid("top_k", format!("`top_k` is {top_k}; it must be 0 (all) or more")))
        });
        let grammar = grammar(self.response_format, self.guided_regex)?;
        let ignore_eos = self.ignore_eos.unwrap_or(false);
        if ignore_eos && grammar.is_some() {
            return Err(Error::invalid("ignore_eos", "`ignore_eos` does not go with an answer that has a form"));
        }
        let n = choices(self.n, self.best_of)?;
        let penalty = |name, value| within(name, value, -2.0..=2.0).map(Option::unwrap_or_default);
        Ok(Asked {
            temperature: within("temperature", self.temperature, 0.0..=2.0)?,
            top_p: share("top_p", self.top_p, 1.0)?,
            top_k: top_k.transpose()?,
            min_p: within("min_p", self.min_p, 0.0..=1.0)?,
            repetition_penalty: share("repetition_penalty", self.repetition_penalty, 2.0)?,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)?,
            presence_penalty: penalty("presence_penalty", self.presence_penalty)?,
            logit_bias: logit_bias(self.logit_bias.unwrap_or_default())?,
            logprobs: logprobs(kind, self.logprobs, self.top_logprobs)?,
            grammar,
            seed: self.seed.map(|seed| seed as u64),
            n,
            max_tokens: max_tokens(self.max_completion_tokens, self.max_tokens)?,
            ignore_eos,
            stops: stops(self.stop)?,
            stream,
        })
    }
}

fn within(name: &str, value: Option<f64>, range: RangeInclusive<f64>) -> Result<Option<f32>, Error> {
    match value {
        Some(value) if !range.contains(&value) => {
            let message = format!("`{name}` is {value}; it must be from {} to {}", range.start(), range.end());
            Err(Error::invalid(name, message))
        }
        value => Ok(value.map(|value| value as f32)),
    }
}

/// A number above 0.
fn share(name: &str, value: Option<f64>, most: f64) -> Result<Option<f32>, Error> {
    match value {
        Some(value) if !(value > 0.0 && value <= most) => {
            Err(Error::invalid(name, format!("`{name}` is {value}; it must be above 0 and at most {most}")))
        }
        // A tiny one must not become 0, which means nothing.
        value => Ok(value.map(|value| (value as f32).max(f32::MIN_POSITIVE))),
    }
}

/// How many answers are wanted. Choosing the best of more than are shown is not for us.
fn choices(n: Option<i64>, best_of: Option<i64>) -> Result<u32, Error> {
    let n = match n.unwrap_or(1) {
        n @ 1..=CHOICES => n,
        n => return Err(Error::invalid("n", format!("`n` is {n}; it must be from 1 to {CHOICES}"))),
    };
    if best_of.is_some_and(|best_of| best_of != n) {
        let detail = format!("it must be `n`, which is {n}");
        return Err(Error::Unsupported { field: "best_of".into(), detail });
    }
    Ok(n as u32)
}

fn logit_bias(given: BTreeMap<String, f64>) -> Result<Vec<(Token, f32)>, Error> {
    if given.len() > BIASES {
        let message = format!("`logit_bias` has {} tokens; at most {BIASES} are allowed", given.len());
        return Err(Error::invalid("logit_bias", message));
    }
    let mut all = Vec::with_capacity(given.len());
    for (token, bias) in given {
        let short: String = token.chars().take(40).collect();
        let Ok(token) = token.parse::<Token>() else {
            return Err(Error::invalid(
                "logit_bias",
                format!("`logit_bias` names `{short}`, which is not a token's id"),
            ));
        };
        if !(-100.0..=100.0).contains(&bias) {
            let message = format!("`logit_bias` of {token} is {bias}; it must be from -100 to 100");
            return Err(Error::invalid("logit_bias", message));
        }
        all.push((token, bias as f32));
    }
    all.sort_unstable_by_key(|(token, _)| *token);
    if let Some(twice) = all.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::invalid("logit_bias", format!("`logit_bias` names {} twice", twice[0].0)));
    }
    Ok(all)
}

fn logprobs(kind: Kind, wanted: Option<Wanted>, top: Option<i64>) -> Result<Option<u8>, Error> {
    let count = |name: &str, count: i64| match u8::try_from(count) {
        Ok(count) if count <= TOP_LOGPROBS => Ok(Some(count)),
        _ => Err(Error::invalid(name, format!("`{name}` is {count}; it must be from 0 to {TOP_LOGPROBS}"))),
    };
    match (kind, wanted, top) {
        (Kind::Chat, Some(Wanted::Yes(true)), top) => count("top_logprobs", top.unwrap_or(0)),
        (Kind::Chat, None | Some(Wanted::Yes(false)), None | Some(0)) => Ok(None),
        (Kind::Chat, None | Some(Wanted::Yes(false)), Some(_)) => {
            Err(Error::invalid("top_logprobs", "`top_logprobs` is only allowed with `logprobs`: true"))
        }
        (Kind::Chat, Some(Wanted::With(_)), _) => {
            Err(Error::invalid("logprobs", "`logprobs` must be true or false; the number is `top_logprobs`"))
        }
        (Kind::Completion, _, Some(_)) => {
            Err(Error::invalid("top_logprobs", "`top_logprobs` is for chats; here `logprobs` is the number"))
        }
        (Kind::Completion, Some(Wanted::With(number)), None) => count("logprobs", number),
        (Kind::Completion, None | Some(Wanted::Yes(false)), None) => Ok(None),
        (Kind::Completion, Some(Wanted::Yes(true)), None) => {
            Err(Error::invalid("logprobs", "`logprobs` must be a number: how many alternatives are wanted"))
        }
    }
}

fn grammar(format: Option<ResponseFormat>, regex: Option<String>) -> Result<Option<Grammar>, Error> {
    let invalid = |field: &str, message: String| Err(Error::invalid(field, message));
    let Some(ResponseFormat { r#type: kind, json_schema }) = format else {
        return Ok(regex.map(Grammar::Regex));
    };
    let grammar = match kind.as_deref() {
        Some("text") => regex.clone().map(Grammar::Regex),
        Some("json_object") => Some(Grammar::JsonObject),
        Some("json_schema") => {
            let field = "response_format.json_schema";
            let Some(JsonSchema { name, schema }) = json_schema else {
                return invalid(field, format!("`{field}` is required"));
            };
            let good = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'-';
            if !name.is_some_and(|name| (1..=64).contains(&name.len()) && name.bytes().all(good)) {
                let field = format!("{field}.name");
                return invalid(&field, format!("`{field}` must be 1 to 64 letters, digits, `_` and `-`"));
            }
            match schema {
                Some(schema @ Value::Object(_)) => Some(Grammar::JsonSchema(schema.to_string())),
                _ => return invalid(&format!("{field}.schema"), format!("`{field}.schema` must be an object")),
            }
        }
        _ => {
            let field = "response_format.type";
            return invalid(field, format!("`{field}` must be text, json_object or json_schema"));
        }
    };
    match regex {
        Some(_) if kind.as_deref() != Some("text") => {
            invalid("guided_regex", "`guided_regex` does not go with this `response_format`".to_owned())
        }
        _ => Ok(grammar),
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
        of(Kind::Chat, body)
    }

    fn of(kind: Kind, body: &str) -> Result<Asked, Error> {
        Parameters::parse(body.as_bytes())?.check(kind)
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
    fn penalties_and_biases_have_ranges() {
        check(r#"{"min_p": 1.1}"#, "min_p", "from 0 to 1");
        check(r#"{"repetition_penalty": 0}"#, "repetition_penalty", "above 0 and at most 2");
        check(r#"{"frequency_penalty": 2.5}"#, "frequency_penalty", "from -2 to 2");
        check(r#"{"presence_penalty": -3}"#, "presence_penalty", "from -2 to 2");
        check(r#"{"logit_bias": {"x": 1}}"#, "logit_bias", "`x`");
        check(r#"{"logit_bias": {"5": 101}}"#, "logit_bias", "from -100 to 100");
        check(r#"{"logit_bias": {"5": 1, "05": 2}}"#, "logit_bias", "5 twice");
        check(r#"{"logit_bias": {"5": "much"}}"#, "logit_bias.5", "invalid type");
        let many: BTreeMap<String, f64> = (0..1025).map(|token| (token.to_string(), 1.0)).collect();
        check(&serde_json::json!({"logit_bias": many}).to_string(), "logit_bias", "at most 1024");
        let asked = asked(r#"{"logit_bias": {"10": -100, "9": 1.5}, "min_p": 0.1, "presence_penalty": -2}"#).unwrap();
        assert_eq!(asked.logit_bias, [(9, 1.5), (10, -100.0)]);
        assert_eq!((asked.min_p, asked.presence_penalty, asked.frequency_penalty), (Some(0.1), -2.0, 0.0));
    }

    #[test]
    fn choices_are_counted_and_bounded() {
        check(r#"{"n": 0}"#, "n", "from 1 to 8");
        check(r#"{"n": 9}"#, "n", "from 1 to 8");
        assert_eq!(asked(r#"{"n": 8, "best_of": 8}"#).unwrap().n, 8);
    }

    #[test]
    fn a_chat_and_a_completion_ask_for_log_probabilities_in_their_own_ways() {
        let chat = |body| asked(body).unwrap().logprobs;
        assert_eq!(chat(r#"{"logprobs": true}"#), Some(0));
        assert_eq!(chat(r#"{"logprobs": true, "top_logprobs": 20}"#), Some(20));
        assert_eq!(chat(r#"{"logprobs": false, "top_logprobs": null}"#), None);
        check(r#"{"logprobs": true, "top_logprobs": 21}"#, "top_logprobs", "from 0 to 20");
        check(r#"{"top_logprobs": 2}"#, "top_logprobs", "only allowed with `logprobs`");
        check(r#"{"logprobs": 2}"#, "logprobs", "true or false");
        check(r#"{"logprobs": "yes"}"#, "logprobs", "is expected");
        let completion = |body| of(Kind::Completion, body).map(|asked| asked.logprobs);
        assert_eq!(completion(r#"{"logprobs": 0}"#), Ok(Some(0)));
        assert_eq!(completion(r#"{"logprobs": null}"#), Ok(None));
        assert_eq!(completion(r#"{"logprobs": -1}"#).unwrap_err().field(), Some("logprobs"));
        assert_eq!(completion(r#"{"logprobs": true}"#).unwrap_err().field(), Some("logprobs"));
    }

    #[test]
    fn a_form_of_the_answer_is_read_and_its_mistakes_are_named() {
        let grammar = |body| asked(body).unwrap().grammar;
        assert_eq!(grammar(r#"{"response_format": {"type": "json_object"}}"#), Some(Grammar::JsonObject));
        let schema = r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "a-1", "strict": true,
            "schema": {"type": "object", "properties": {"z": {}, "a": {}}}}}}"#;
        let text = r#"{"type":"object","properties":{"z":{},"a":{}}}"#;
        assert_eq!(grammar(schema), Some(Grammar::JsonSchema(text.into())), "in the client's order");
        assert_eq!(grammar(r#"{"guided_regex": "a+"}"#), Some(Grammar::Regex("a+".into())));
        let both = r#"{"guided_regex": "a+", "response_format": {"type": "text"}}"#;
        assert_eq!(grammar(both), Some(Grammar::Regex("a+".into())));
        check(r#"{"response_format": {"type": "xml"}}"#, "response_format.type", "json_object");
        check(r#"{"response_format": {}}"#, "response_format.type", "json_object");
        check(r#"{"response_format": "json"}"#, "response_format", "invalid type");
        check(r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema", "required");
        let nameless = r#"{"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}"#;
        check(nameless, "response_format.json_schema.name", "letters");
        let empty = r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}"#;
        check(empty, "response_format.json_schema.schema", "an object");
        let two = r#"{"guided_regex": "a+", "response_format": {"type": "json_object"}}"#;
        check(two, "guided_regex", "does not go");
        check(r#"{"guided_regex": "a", "ignore_eos": true}"#, "ignore_eos", "a form");
    }

    #[test]
    fn what_would_be_silently_ignored_is_refused_by_name() {
        check(r#"{"best_of": 2}"#, "best_of", "it must be `n`");
        check(r#"{"tools": [{"type": "function"}]}"#, "tools", "not supported yet");
        check(r#"{"guided_json": {}, "guided_choice": ["a"]}"#, "guided_choice", "not supported yet");
        check(r#"{"suffix": "x"}"#, "suffix", "not supported yet");
        check(r#"{"tool_choice": "required"}"#, "tool_choice", "not supported yet");
    }

    #[test]
    fn what_asks_for_nothing_and_unknown_fields_are_accepted() {
        let body = r#"{"n": 1, "tools": [], "logprobs": false, "response_format": {"type": "text"}, "logit_bias": {},
            "presence_penalty": 0, "frequency_penalty": 0.0, "tool_choice": "none", "modalities": ["text"],
            "temperature": null, "stop": null, "stream_options": null, "user": "u", "store": true, "metadata": {"a": 1}}"#;
        let asked = asked(body).unwrap();
        assert_eq!((asked.temperature, asked.top_p, asked.top_k, asked.max_tokens), (None, None, None, None));
        assert_eq!((asked.n, asked.logprobs, asked.grammar, asked.logit_bias.len()), (1, None, None, 0));
        assert!(asked.stops.is_empty() && !asked.stream && asked.seed.is_none());
    }

    #[test]
    fn given_values_are_taken() {
        let body = r#"{"temperature": 0, "top_p": 0.5, "top_k": 7, "seed": -1, "stop": ["a", "b"], "stream": true,
            "stream_options": {"include_usage": true}, "max_tokens": 3, "max_completion_tokens": 4, "ignore_eos": true}"#;
        assert!(Parameters::parse(body.as_bytes()).unwrap().include_usage());
        let asked = asked(body).unwrap();
        assert_eq!((asked.temperature, asked.top_p, asked.top_k), (Some(0.0), Some(0.5), Some(7)));
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
