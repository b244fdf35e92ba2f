//! What a checkpoint says of its shape: `config.json` of transformers 4 and 5, or GGUF metadata, as one struct.
//!
//! A key that we do not know might change the computation, and a model that answers slightly wrong is worse than one
//! that does not load: so an unknown key is refused by name, unless its value is neutral (null, false, 0, empty) or it
//! is known to say nothing about the computation.

use std::cell::RefCell;
use std::collections::BTreeSet;

use izar_common::chat::Token;
use izar_common::gguf;
use serde_json::{Map, Value};

use super::Error;

/// Largest size that is believed; products of three stay far from overflowing.
const SIZE_LIMIT: usize = 1 << 20;

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

/// Keys of GGUF metadata, after the architecture's name, that do not change what is computed here.
const HARMLESS_GGUF: &[&str] = &["vocab_size", "rope.dimension_count", "attention.value_length"];

/// A group of models that one set of flags describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

impl Family {
    pub const ALL: &[Family] = &[Family::Llama, Family::Qwen2, Family::Qwen3];

    /// Its name in `model_type` and in `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|family| family.name() == name)
    }
}

/// How rotary frequencies are stretched for contexts longer than the first training's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    None,
    /// Every frequency divided by the factor.
    Linear {
        factor: f32,
    },
    /// Low frequencies divided, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original_context: f32,
    },
}

/// The shape of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub family: Family,
    pub vocabulary: usize,
    /// Tokens of prompt and answer together that the model was made for.
    pub context: usize,
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    pub heads: usize,
    /// Heads of keys and values; `heads` is a multiple of it.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_epsilon: f32,
    pub rope_theta: f32,
    pub rope_scaling: Scaling,
    /// The output projection is the embedding table.
    pub tied: bool,
}

impl Config {
    /// Whether the query, key and value projections add a bias.
    pub fn qkv_bias(&self) -> bool {
        self.family == Family::Qwen2
    }
    /// Whether queries and keys are normalized per head before they are rotated.
    pub fn qk_norm(&self) -> bool {
        self.family == Family::Qwen3
    }

    /// The angle by which each pair of a head turns from one position to the next, `[head_dim / 2]`, in radians.
    ///
    /// Source: transformers, `modeling_rope_utils.py`, in the same order of f32 operations.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let pairs = self.head_dim / 2;
        let plain = (0..pairs).map(|i| 1.0 / self.rope_theta.powf((2 * i) as f32 / self.head_dim as f32));
        plain.map(|frequency| self.rope_scaling.apply(frequency)).collect()
    }

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

    /// Reads GGUF metadata.
    pub fn from_gguf(name: &str, file: &gguf::File) -> Result<Self, Error> {
        let keys = GgufKeys { name, file, used: RefCell::default() };
        let family = keys.family()?;
        let hidden = keys.size("embedding_length")?;
        let heads = keys.size("attention.head_count")?;
        let vocabulary = file.meta("tokenizer.ggml.tokens").and_then(|v| v.as_array()).map(<[_]>::len);
        let config = Self {
            family,
            vocabulary: vocabulary.ok_or_else(|| keys.bad("tokenizer.ggml.tokens", "is missing"))?,
            context: keys.size("context_length")?,
            layers: keys.size("block_count")?,
            hidden,
            intermediate: keys.size("feed_forward_length")?,
            heads,
            kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: keys.optional_size("attention.key_length")?.unwrap_or(hidden / heads),
            norm_epsilon: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
            rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: keys.scaling()?,
            tied: file.tensor("output.weight").is_none(),
        };
        for key in ["rope.dimension_count", "attention.value_length"] {
            if keys.optional_size(key)?.is_some_and(|n| n != config.head_dim) {
                return Err(keys.bad(&keys.full(key), "differs from the size of a head, which is not supported"));
            }
        }
        keys.refuse_unknown()?;
        config.check(|key, reason| keys.bad(key, reason))?;
        Ok(config)
    }

    fn check(&self, bad: impl Fn(&str, &str) -> Error) -> Result<(), Error> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(bad("num_key_value_heads", "does not divide the number of attention heads"));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(bad("head_dim", "is not a positive even number, or hidden_size has no room for its heads"));
        }
        let positive = |value: f32| value.is_finite() && value > 0.0;
        if !positive(self.norm_epsilon) {
            return Err(bad("rms_norm_eps", "is not a positive number"));
        }
        if !positive(self.rope_theta) || !self.rope_frequencies().iter().all(|f| f.is_finite()) {
            return Err(bad("rope_theta", "or the rotary scaling gives no finite frequencies"));
        }
        Ok(())
    }
}

impl Scaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, original_context } => {
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength > original_context / low {
                    frequency / factor
                } else if wavelength < original_context / high {
                    frequency
                } else {
                    let smooth = (original_context / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Reads a token or a list of tokens, as `eos_token_id` may be either.
pub fn tokens(value: Option<&Value>) -> Vec<Token> {
    let token = |v: &Value| v.as_u64().and_then(|n| Token::try_from(n).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(token).collect(),
        Some(value) => token(value).into_iter().collect(),
        None => Vec::new(),
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
        let known = || Family::ALL.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
        Family::from_name(name)
            .ok_or_else(|| self.bad("model_type", &format!("is \"{name}\"; supported are {}", known())))
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

/// The metadata keys of one architecture, that remember which were read.
struct GgufKeys<'a> {
    name: &'a str,
    file: &'a gguf::File,
    used: RefCell<BTreeSet<String>>,
}

impl GgufKeys<'_> {
    fn bad(&self, key: &str, reason: &str) -> Error {
        Error::Key { file: self.name.to_owned(), key: key.to_owned(), reason: reason.to_owned() }
    }
    fn family(&self) -> Result<Family, Error> {
        let key = "general.architecture";
        let name = self.file.str(key).map_err(|e| self.gguf(e))?;
        let known = || Family::ALL.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
        Family::from_name(name).ok_or_else(|| self.bad(key, &format!("is \"{name}\"; supported are {}", known())))
    }
    fn gguf(&self, source: gguf::Error) -> Error {
        Error::Gguf { file: self.name.to_owned(), source }
    }
    /// The whole key, with the architecture before it.
    fn full(&self, key: &str) -> String {
        let architecture = self.file.str("general.architecture").unwrap_or_default();
        format!("{architecture}.{key}")
    }
    fn find(&self, key: &str) -> Option<String> {
        let full = self.full(key);
        self.used.borrow_mut().insert(full.clone());
        self.file.meta(&full).is_some().then_some(full)
    }
    fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(full) = self.find(key) else { return Ok(None) };
        let size = self.file.u64(&full).map_err(|e| self.gguf(e))?;
        let size = usize::try_from(size).ok().filter(|n| (1..=SIZE_LIMIT).contains(n));
        size.map(Some).ok_or_else(|| self.bad(&full, &format!("is not a number from 1 to {SIZE_LIMIT}")))
    }
    fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.bad(&self.full(key), "is missing"))
    }
    fn number(&self, key: &str) -> Result<Option<f32>, Error> {
        self.find(key).map(|full| self.file.f32(&full).map_err(|e| self.gguf(e))).transpose()
    }
    fn scaling(&self) -> Result<Scaling, Error> {
        let factor = self.number("rope.scaling.factor")?;
        let Some(full) = self.find("rope.scaling.type") else { return Ok(Scaling::None) };
        match (self.file.str(&full).map_err(|e| self.gguf(e))?, factor) {
            ("none", _) => Ok(Scaling::None),
            ("linear", Some(factor)) if factor > 0.0 => Ok(Scaling::Linear { factor }),
            ("linear", _) => Err(self.bad(&self.full("rope.scaling.factor"), "is missing or not positive")),
            (other, _) => Err(self.bad(&full, &format!("is \"{other}\"; supported are none, linear"))),
        }
    }
    fn refuse_unknown(&self) -> Result<(), Error> {
        let used = self.used.borrow();
        let prefix = self.full("");
        let neutral = |value: &gguf::Value| value.as_f64() == Some(0.0) || value.as_bool() == Some(false);
        let mut unknown = self.file.metadata().filter(|(key, value)| {
            let ours = key.strip_prefix(&prefix);
            ours.is_some_and(|key| !HARMLESS_GGUF.contains(&key)) && !used.contains(*key) && !neutral(value)
        });
        match unknown.next() {
            Some((key, _)) => Err(self.bad(key, "is not supported")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sample() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 2,
            "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32", "tie_word_embeddings": true,
        })
    }
    fn read(change: impl FnOnce(&mut Value)) -> Result<Config, String> {
        let mut value = sample();
        change(&mut value);
        Config::from_json("config.json", value.to_string().as_bytes()).map_err(|e| e.to_string())
    }
    fn refused(key: &str, value: Value) -> String {
        read(|v| v[key] = value).unwrap_err()
    }

    #[test]
    fn both_generations_say_the_same() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let four = read(|v| {
            v["rope_theta"] = json!(5e5);
            v["rope_scaling"] = llama3.clone();
        });
        let five = read(|v| {
            v["rope_parameters"] = llama3;
            v["rope_parameters"]["rope_theta"] = json!(5e5);
        });
        assert_eq!(four, five);
        let config = four.unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.tied, config.rope_theta), (16, 2, true, 5e5));
        assert!(matches!(config.rope_scaling, Scaling::Llama3 { factor: 8.0, .. }));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_key() {
        assert_eq!(refused("sandwich_norm", json!(true)), "config.json: key `sandwich_norm` is not supported");
        assert!(refused("attention_bias", json!(true)).contains("`attention_bias` is not supported"));
        assert!(refused("quantization_config", json!({"bits": 4})).contains("`quantization_config`"));
        assert!(refused("hidden_act", json!("gelu")).contains("`hidden_act`"));
        assert!(refused("sliding_window", json!(4096)).contains("`sliding_window`"));
        assert!(refused("layer_types", json!(["sliding_attention"])).contains("`layer_types`"));
        assert!(refused("model_type", json!("mamba")).contains("supported are llama, qwen2, qwen3"));
        assert!(refused("rope_scaling", json!({"type": "yarn", "factor": 2})).contains("`rope_scaling.rope_type`"));
        let strange = json!({"type": "linear", "factor": 2, "mscale": 0.7});
        assert!(refused("rope_scaling", strange).contains("`mscale` is not supported"));
    }

    #[test]
    fn neutral_and_harmless_keys_are_passed_over() {
        let plain = read(|_| {}).unwrap();
        let more = read(|v| {
            for (key, value) in [("mlp_bias", json!(false)), ("_name_or_path", json!("x")), ("new_thing", json!(null))]
            {
                v[key] = value;
            }
        });
        assert_eq!(more.unwrap(), plain);
    }

    #[test]
    fn impossible_sizes_are_refused_by_their_key() {
        assert!(refused("hidden_size", json!(0)).contains("`hidden_size`"));
        assert!(refused("vocab_size", json!(1_u64 << 40)).contains("`vocab_size`"));
        assert!(refused("num_hidden_layers", json!("two")).contains("`num_hidden_layers`"));
        assert!(refused("num_key_value_heads", json!(3)).contains("`num_key_value_heads`"));
        assert!(refused("head_dim", json!(15)).contains("`head_dim`"));
        assert!(refused("rope_theta", json!(-1.0)).contains("`rope_theta`"));
        assert!(read(|v| drop(v.as_object_mut().unwrap().remove("hidden_size"))).unwrap_err().contains("is missing"));
        assert!(Config::from_json("config.json", b"[]").is_err());
        assert!(Config::from_json("config.json", b"{").is_err());
    }

    #[test]
    fn low_frequencies_are_stretched_and_high_ones_kept() {
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 64.0 };
        assert_eq!(scaling.apply(1.0), 1.0);
        assert_eq!(scaling.apply(0.01), 0.01 / 8.0);
        let between = scaling.apply(0.2);
        assert!(0.2 / 8.0 < between && between < 0.2);
        assert_eq!(Scaling::Linear { factor: 4.0 }.apply(1.0), 0.25);
    }

    #[test]
    fn ends_of_text_are_one_or_many() {
        assert_eq!(tokens(Some(&json!(2))), [2]);
        assert_eq!(tokens(Some(&json!([2, 7]))), [2, 7]);
        assert_eq!(tokens(None), [] as [Token; 0]);
    }
}
