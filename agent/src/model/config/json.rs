//! `config.json`, as transformers 4 and 5 write it.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{Config, Family, SIZE_LIMIT, Scaling};
use crate::model::Error;

/// Keys of `config.json` that do not change what is computed here.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "max_window_layers",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "sliding_window",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
];

impl Config {
    /// Reads `config.json`.
    pub fn from_json(file: &str, text: &[u8]) -> Result<Self, Error> {
        let format = |reason: String| Error::Format { file: file.to_owned(), reason };
        let value: Value = serde_json::from_slice(text).map_err(|e| format(format!("not JSON: {e}")))?;
        let Value::Object(map) = value else { return Err(format("not a JSON object".into())) };
        let keys = Keys { file, map: &map, used: RefCell::default() };
        let family = keys.family()?;
        let hidden = keys.size("hidden_size")?;
        let heads = keys.size("num_attention_heads")?;
        let (rope_theta, rope_scaling) = keys.rope()?;
        let config = Self {
            family,
            vocabulary: keys.size("vocab_size")?,
            context: keys.size("max_position_embeddings")?,
            layers: keys.size("num_hidden_layers")?,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: keys.optional_size("head_dim")?.unwrap_or(hidden / heads),
            norm_epsilon: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tied: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
        };
        keys.only("hidden_act", "silu")?;
        keys.full_attention()?;
        keys.refuse_unknown()?;
        config.check(|key, reason| keys.bad(key, reason))?;
        Ok(config)
    }
}

/// An object of `config.json` that remembers which keys were read.
struct Keys<'a> {
    file: &'a str,
    map: &'a Map<String, Value>,
    used: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Keys<'a> {
    fn bad(&self, key: &str, reason: &str) -> Error {
        Error::Key { file: self.file.to_owned(), key: key.to_owned(), reason: reason.to_owned() }
    }
    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(key);
        self.map.get(key).filter(|v| !v.is_null())
    }
    fn optional_size(&self, key: &'static str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=SIZE_LIMIT).contains(n));
        size.map(Some).ok_or_else(|| self.bad(key, &format!("is not a number from 1 to {SIZE_LIMIT}")))
    }
    fn size(&self, key: &'static str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }
    fn number(&self, key: &'static str) -> Result<Option<f32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(|n| Some(n as f32)).ok_or_else(|| self.bad(key, "is not a number"))
    }
    fn boolean(&self, key: &'static str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(key, "is not true or false"))
    }
    fn only(&self, key: &'static str, supported: &str) -> Result<(), Error> {
        match self.get(key) {
            Some(value) if value != supported => {
                Err(self.bad(key, &format!("is {value}, and only \"{supported}\" is supported")))
            }
            _ => Ok(()),
        }
    }
    fn family(&self) -> Result<Family, Error> {
        let name =
            self.get("model_type").and_then(Value::as_str).ok_or_else(|| self.bad("model_type", "is missing"))?;
        Family::from_name(name).map_err(|reason| self.bad("model_type", &reason))
    }
    /// Refuses windows: every layer must see the whole context.
    fn full_attention(&self) -> Result<(), Error> {
        let windowed = self.boolean("use_sliding_window")?;
        let window = self.get("sliding_window").is_some();
        if windowed == Some(true) || (windowed.is_none() && window) {
            return Err(self.bad("sliding_window", "is not supported"));
        }
        let types = self.get("layer_types").and_then(Value::as_array);
        if types.is_some_and(|list| list.iter().any(|kind| kind != "full_attention")) {
            return Err(self.bad("layer_types", "names other layers than \"full_attention\", which are not supported"));
        }
        Ok(())
    }
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).
    fn rope(&self) -> Result<(f32, Scaling), Error> {
        let outer_theta = self.number("rope_theta")?;
        let (key, value) = match self.get("rope_parameters") {
            Some(value) => ("rope_parameters", Some(value)),
            None => ("rope_scaling", self.get("rope_scaling")),
        };
        let Some(value) = value else { return Ok((outer_theta.unwrap_or(10_000.0), Scaling::None)) };
        let map = value.as_object().ok_or_else(|| self.bad(key, "is not an object"))?;
        let rope = Keys { file: self.file, map, used: RefCell::default() };
        let theta = rope.number("rope_theta")?.or(outer_theta).unwrap_or(10_000.0);
        let kind = rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        let need = |name| -> Result<f32, Error> {
            rope.number(name)?.filter(|n| *n > 0.0).ok_or_else(|| rope.bad(name, "is missing or not positive"))
        };
        let scaling = match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: need("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: need("factor")?,
                low: need("low_freq_factor")?,
                high: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")?,
            },
            other => {
                let reason = format!("is \"{other}\"; supported are default, linear, llama3");
                return Err(rope.bad(&format!("{key}.rope_type"), &reason));
            }
        };
        rope.refuse_unknown()?;
        Ok((theta, scaling))
    }
    fn refuse_unknown(&self) -> Result<(), Error> {
        let used = self.used.borrow();
        let known = |key: &str| used.contains(key) || HARMLESS.contains(&key) || key.starts_with('_');
        match self.map.iter().find(|(key, value)| !known(key) && !neutral(value)) {
            Some((key, _)) => Err(self.bad(key, "is not supported")),
            None => Ok(()),
        }
    }
}

fn neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
