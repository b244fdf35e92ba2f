//! All that a controller needs of a model to speak for it, and where it is found: in a GGUF file's metadata, or in the
//! files of a Hugging Face folder.

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Error, ggml};
use crate::chat::Token;
use crate::gguf;

/// Bytes of one file of a folder; the largest `tokenizer.json` known has 33 MB.
const FILE_LIMIT: u64 = 64 << 20;

/// Tokenizer, chat template and the tokens that begin and end. Its JSON is the file that a manifest calls `text`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// A `tokenizer.json`; `None` is the echo model's own vocabulary.
    pub tokenizer: Option<Value>,
    pub chat_template: Option<String>,
    /// What a template sees as `bos_token`.
    pub bos: Option<String>,
    /// What a template sees as `eos_token`.
    pub eos_text: Option<String>,
    /// The tokens that end an answer; the model's own first.
    pub eos: Vec<Token>,
    /// Plain prompts begin with `bos` (also when the tokenizer's own post-processor does not see to it).
    pub add_bos: bool,
    /// How the model's makers draw, where a request does not say.
    #[serde(default, skip_serializing_if = "Defaults::is_empty")]
    pub defaults: Defaults,
}

/// What a model's makers recommend for drawing tokens. Here and not in a manifest, because the replicated state holds
/// no floats.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

impl Defaults {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads them from a `generation_config.json`. A value that no request could have is an error: the model would
    /// refuse every request.
    fn from_json(generation: &Value) -> Result<Self, Error> {
        let number = |key: &str, range: std::ops::RangeInclusive<f64>| match &generation[key] {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|n| range.contains(n)) {
                Some(n) => Ok(Some(n as f32)),
                None => {
                    let reason = format!("`{key}` is {value}; it must be from {} to {}", range.start(), range.end());
                    Err(Error::Malformed { name: "generation_config.json".to_owned(), reason })
                }
            },
        };
        Ok(Self {
            temperature: number("temperature", 0.0..=2.0)?,
            top_p: number("top_p", f64::from(f32::MIN_POSITIVE)..=1.0)?,
            // -1 is an older way to say all.
            top_k: number("top_k", -1.0..=f64::from(u32::MAX))?.map(|k| k.max(0.0) as u32),
            min_p: number("min_p", 0.0..=1.0)?,
            repetition_penalty: number("repetition_penalty", f64::from(f32::MIN_POSITIVE)..=2.0)?,
        })
    }
}

impl Bundle {
    /// The echo model's: bytes in, words out.
    pub fn echo() -> Self {
        Self {
            tokenizer: None,
            chat_template: None,
            bos: None,
            eos_text: None,
            eos: Vec::new(),
            add_bos: false,
            defaults: Defaults::default(),
        }
    }

    /// Reads it from a GGUF file's metadata.
    pub fn from_gguf(file: &gguf::File) -> Result<Self, Error> {
        let found = ggml::from_gguf(file)?;
        let token = |key: &str| -> Result<Option<Token>, Error> {
            let key = format!("tokenizer.ggml.{key}_token_id");
            if file.meta(&key).is_none() {
                return Ok(None);
            }
            let id = file.u32(&key)?;
            if id as usize >= found.tokens.len() {
                let reason = format!("{id} is outside the vocabulary of {}", found.tokens.len());
                return Err(Error::Malformed { name: key, reason });
            }
            Ok(Some(id))
        };
        let (bos, eos) = (token("bos")?, token("eos")?);
        let mut ends = Vec::new();
        let named = [eos, token("eot")?, token("eom")?];
        named.into_iter().flatten().chain(found.end_of_turn.iter().copied()).for_each(|id| add(&mut ends, id));
        if ends.is_empty() {
            return Err(Error::Malformed { name: "the GGUF metadata".into(), reason: "it names no end token".into() });
        }
        let string = |id: Token| found.tokens[id as usize].clone();
        let optional = |key: &str| file.meta(key).is_some();
        let add_bos = match optional("tokenizer.ggml.add_bos_token") {
            true => file.bool("tokenizer.ggml.add_bos_token")?,
            false => found.add_bos && bos.is_some(),
        };
        let chat_template = match optional("tokenizer.chat_template") {
            true => Some(file.str("tokenizer.chat_template")?.to_owned()),
            false => None,
        };
        Ok(Self {
            bos: bos.map(string),
            eos_text: eos.map(string),
            chat_template,
            eos: ends,
            add_bos,
            tokenizer: Some(found.json),
            // GGUF has none that converters agree on.
            defaults: Defaults::default(),
        })
    }

    /// Reads it from `tokenizer.json`, `config.json` and, where these are there, `tokenizer_config.json`,
    /// `generation_config.json` and `chat_template.jinja`.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let tokenizer = json(folder, "tokenizer.json")?.ok_or(Error::Missing { name: "tokenizer.json" })?;
        let config = json(folder, "config.json")?.ok_or(Error::Missing { name: "config.json" })?;
        let options = json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let generation = json(folder, "generation_config.json")?.unwrap_or_default();
        let chat_template = match read(folder, "chat_template.jinja")? {
            Some(template) => Some(template),
            None => template_of(&options["chat_template"])?,
        };
        let declared = match ids(&generation["eos_token_id"]) {
            Some(ids) => Some(ids),
            None => ids(&config["eos_token_id"]),
        };
        let bos = token_text(&options["bos_token"]).or_else(|| text_of(&tokenizer, first_id(&config["bos_token_id"])));
        let eos_text = token_text(&options["eos_token"]);
        let mut eos = Vec::new();
        declared.iter().flatten().for_each(|id| add(&mut eos, *id));
        if let Some(id) = eos_text.as_deref().and_then(|text| id_of(&tokenizer, text)) {
            add(&mut eos, id);
        }
        if eos.is_empty() {
            let name = "generation_config.json, config.json or tokenizer_config.json".to_owned();
            return Err(Error::Malformed { name, reason: "none names an end token (`eos_token_id`)".to_owned() });
        }
        Ok(Self {
            eos_text: eos_text.or_else(|| text_of(&tokenizer, eos.first().copied())),
            add_bos: bos.is_some() && options["add_bos_token"] == Value::Bool(true),
            tokenizer: Some(tokenizer),
            defaults: Defaults::from_json(&generation)?,
            chat_template,
            bos,
            eos,
        })
    }
}

fn add(ids: &mut Vec<Token>, id: Token) {
    if !ids.contains(&id) {
        ids.push(id);
    }
}

/// Reads a file of the folder, if it is there.
fn read(folder: &Path, name: &str) -> Result<Option<String>, Error> {
    let failed = |source| Error::Read { name: name.to_owned(), source };
    let file = match std::fs::File::open(folder.join(name)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = String::new();
    file.take(FILE_LIMIT + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_LIMIT {
        return Err(Error::Malformed {
            name: name.to_owned(),
            reason: format!("it is larger than {FILE_LIMIT} bytes"),
        });
    }
    Ok(Some(text))
}

fn json(folder: &Path, name: &str) -> Result<Option<Value>, Error> {
    let parse = |text: String| {
        let value: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        if value.is_object() { Ok(value) } else { Err("it is not a JSON object".to_owned()) }
    };
    let parsed = read(folder, name)?.map(parse).transpose();
    parsed.map_err(|reason| Error::Malformed { name: name.to_owned(), reason })
}

/// A template, or a list of named ones of which `default` is for chats.
fn template_of(value: &Value) -> Result<Option<String>, Error> {
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            let reason = || "`chat_template` is a list without a `default`".to_owned();
            let error = || Error::Malformed { name: "tokenizer_config.json".to_owned(), reason: reason() };
            default.map(|t| Some(t.to_owned())).ok_or_else(error)
        }
        _ => {
            let reason = "`chat_template` is neither a text nor a list".to_owned();
            Err(Error::Malformed { name: "tokenizer_config.json".to_owned(), reason })
        }
    }
}

/// A token's text, plain or as an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// A token id or a list of them.
fn ids(value: &Value) -> Option<Vec<Token>> {
    let id = |v: &Value| v.as_u64().and_then(|n| n.try_into().ok());
    match value {
        Value::Array(list) => list.iter().map(id).collect(),
        other => id(other).map(|id| vec![id]),
    }
}

fn first_id(value: &Value) -> Option<Token> {
    ids(value)?.first().copied()
}

fn id_of(tokenizer: &Value, text: &str) -> Option<Token> {
    let added = tokenizer["added_tokens"].as_array()?.iter().find(|t| t["content"] == text);
    added.and_then(|t| first_id(&t["id"])).or_else(|| first_id(&tokenizer["model"]["vocab"][text]))
}

/// The text of a special token.
fn text_of(tokenizer: &Value, id: Option<Token>) -> Option<String> {
    let id = id?;
    let added = tokenizer["added_tokens"].as_array()?.iter().find(|t| t["id"] == id)?;
    token_text(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }
    fn tokenizer() -> Value {
        json!({"added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}, {"id": 7, "content": "<end>"}]})
    }

    #[test]
    fn end_tokens_come_from_the_generation_config_and_the_tokenizer() {
        let dir = folder(&[
            ("tokenizer.json", tokenizer()),
            ("config.json", json!({"bos_token_id": 0, "eos_token_id": 3})),
            ("generation_config.json", json!({"eos_token_id": [1, 5]})),
            (
                "tokenizer_config.json",
                json!({"eos_token": {"content": "<end>"}, "add_bos_token": true,
                "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}),
            ),
        ]);
        let bundle = Bundle::from_folder(dir.path()).unwrap();
        assert_eq!((bundle.eos, bundle.eos_text.as_deref()), (vec![1, 5, 7], Some("<end>")));
        assert_eq!((bundle.bos.as_deref(), bundle.add_bos), (Some("<s>"), true));
        assert_eq!(bundle.chat_template.as_deref(), Some("d"));
    }

    #[test]
    fn the_jinja_file_goes_before_the_tokenizer_config() {
        let dir = folder(&[
            ("tokenizer.json", tokenizer()),
            ("config.json", json!({"eos_token_id": 1})),
            ("tokenizer_config.json", json!({"chat_template": "old"})),
            ("chat_template.jinja", json!("new")),
        ]);
        let bundle = Bundle::from_folder(dir.path()).unwrap();
        assert_eq!(bundle.chat_template.as_deref(), Some("new"));
        assert_eq!((bundle.eos, bundle.eos_text.as_deref()), (vec![1], Some("</s>")));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let check = |files: &[(&str, Value)], words: &str| {
            let error = Bundle::from_folder(folder(files).path()).unwrap_err().to_string();
            assert!(error.contains(words), "`{error}` does not say `{words}`");
        };
        check(&[("config.json", json!({}))], "tokenizer.json is missing");
        check(&[("tokenizer.json", tokenizer())], "config.json is missing");
        check(&[("tokenizer.json", json!("{ no"))], "tokenizer.json is not as it should be");
        check(&[("tokenizer.json", tokenizer()), ("config.json", json!({}))], "none names an end token");
        check(&[("tokenizer.json", tokenizer()), ("config.json", json!([]))], "not a JSON object");
    }

    #[test]
    fn sampling_defaults_come_from_the_generation_config_and_are_checked() {
        let read = |generation: Value| {
            let config = ("config.json", json!({"eos_token_id": 1}));
            let dir = folder(&[("tokenizer.json", tokenizer()), config, ("generation_config.json", generation)]);
            Bundle::from_folder(dir.path()).map(|bundle| bundle.defaults).map_err(|e| e.to_string())
        };
        let all = json!({"temperature": 0.6, "top_p": 0.95, "top_k": -1, "min_p": null, "repetition_penalty": 1.05});
        let expected = Defaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(0),
            min_p: None,
            repetition_penalty: Some(1.05),
        };
        assert_eq!(read(all), Ok(expected));
        assert_eq!(read(json!({"do_sample": true})), Ok(Defaults::default()));
        for (wrong, key) in [(json!({"top_p": 0}), "`top_p` is 0"), (json!({"temperature": "warm"}), "`temperature`")] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains("generation_config.json") && error.contains(key), "{error}");
        }
    }

    #[test]
    fn it_survives_its_json() {
        let defaults = Defaults { top_k: Some(20), ..Defaults::default() };
        let bundle = Bundle { tokenizer: Some(tokenizer()), eos: vec![1], defaults, ..Bundle::echo() };
        let back: Bundle = serde_json::from_slice(&serde_json::to_vec(&bundle).unwrap()).unwrap();
        assert_eq!(back, bundle);
    }
}
