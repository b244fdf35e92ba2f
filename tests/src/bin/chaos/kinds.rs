//! What is asked: requests of many kinds, each with what an undisturbed run answered.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use izar_tests::client::Client;
use serde_json::{Value, json};

use crate::reader::{Event, listen};

/// Ends no text of any model: a stop string with it is begun and never met.
const NEVER: char = '\u{7}';

/// A kind of request.
pub struct Kind {
    pub name: &'static str,
    pub body: Value,
    /// What it says undisturbed.
    pub expected: Vec<Event>,
}

/// Asks everything once, undisturbed.
pub fn undisturbed(client: &Client, model: &str, grammar: bool) -> Result<Vec<Kind>> {
    let answer = |name, body: Value| -> Result<Kind> {
        let told = listen(&[client], &body).with_context(|| format!("{name}, undisturbed"))?;
        Ok(Kind { name, body, expected: told.events })
    };
    let mut kinds = Vec::new();
    for (name, body) in plain(model) {
        kinds.push(answer(name, body)?);
    }
    if grammar {
        kinds.push(answer("schema", schema(model))?);
    }
    for (name, of) in [("half stop strings", "greedy"), ("half stop strings, all mixed in", "all mixed in")] {
        let kind = kinds.iter().find(|kind| kind.name == of).expect("it was just asked");
        let mut body = kind.body.clone();
        body["stop"] = json!(texts(&kind.expected).iter().flat_map(|text| half_stops(text)).collect::<Vec<_>>());
        kinds.push(answer(name, body)?);
    }
    let greedy = &kinds[0];
    let mut body = greedy.body.clone();
    let text = texts(&greedy.expected).concat();
    body["stop"] = json!([part(&text, 5, 7, 8) + &NEVER.to_string(), part(&text, 6, 7, 8)]);
    kinds.push(answer("stop string", body)?);
    Ok(kinds)
}

fn ask(model: &str, text: &str, more: Value) -> Value {
    let mut body = json!({
        "model": model, "messages": [{ "role": "user", "content": text }], "stream": true,
        "stream_options": { "include_usage": true }, "max_tokens": 80, "temperature": 0,
    });
    for (key, value) in more.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// The kinds that any model answers.
fn plain(model: &str) -> Vec<(&'static str, Value)> {
    let story = "Tell me a long story about a river and a mill.";
    let long = "The sea is calm and far from here. ".repeat(40);
    let penalties = json!({"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "presence_penalty": 0.4,
        "repetition_penalty": 1.1});
    let mixed = json!({"temperature": 0.9, "seed": 17, "n": 2, "logprobs": true, "top_logprobs": 2, "top_p": 0.9,
        "frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.05});
    vec![
        ("greedy", ask(model, story, json!({}))),
        ("seeded", ask(model, story, json!({"temperature": 1.0, "seed": 7, "top_p": 0.95, "top_k": 50}))),
        ("penalties", ask(model, story, penalties)),
        ("logprobs", ask(model, story, json!({"logprobs": true, "top_logprobs": 3, "temperature": 0.7, "seed": 5}))),
        ("two choices", ask(model, story, json!({"n": 2, "temperature": 1.0, "seed": 11}))),
        ("all mixed in", ask(model, story, mixed)),
        ("long prompt", ask(model, &long, json!({"max_tokens": 40}))),
    ]
}

fn schema(model: &str) -> Value {
    let city = json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 60},
        "people": {"type": "integer"}}, "required": ["city", "people"], "additionalProperties": false});
    let schema = json!({"type": "json_schema", "json_schema": {"name": "city", "schema": city}});
    ask(model, "Name a city as JSON.", json!({"response_format": schema, "seed": 2}))
}

/// The whole text of each choice.
fn texts(events: &[Event]) -> Vec<String> {
    let mut texts: BTreeMap<u64, String> = BTreeMap::new();
    for event in events {
        let choice: Value = serde_json::from_str(&event.said).expect("it was JSON when it came");
        if let (Some(index), Some(text)) = (event.choice, choice["choices"][0]["delta"]["content"].as_str()) {
            *texts.entry(index).or_default() += text;
        }
    }
    texts.into_values().collect()
}

/// Stop strings that hold most of a text back and are never met: whenever it breaks off, one of them is half matched.
fn half_stops(text: &str) -> Vec<String> {
    (0..4).map(|quarter| part(text, 4 * quarter, 4 * quarter + 3, 16) + &NEVER.to_string()).collect()
}

/// Characters of a text, from one share of it to another.
fn part(text: &str, from: usize, to: usize, of: usize) -> String {
    let length = text.chars().count();
    text.chars().skip(from * length / of).take((to - from) * length / of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_stops_lie_in_the_text_but_for_their_ends() {
        let text: String = (0..96).map(|i| char::from(b'!' + i % 90)).collect();
        let stops = half_stops(&text);
        assert_eq!(stops.len(), 4);
        for stop in &stops {
            let begun = stop.strip_suffix(NEVER).unwrap();
            assert!(begun.len() == 18 && text.contains(begun), "{stop}");
        }
        assert_eq!(part("abcdefgh", 6, 7, 8), "g");
    }
}
