//! What a checkpoint says of its shape: `config.json` of transformers 4 and 5, or GGUF metadata, as one struct.
//!
//! A key that we do not know might change the computation, and a model that answers slightly wrong is worse than one
//! that does not load: so an unknown key is refused by name, unless its value is neutral (null, false, 0, empty) or it
//! is known to say nothing about the computation.

mod gguf;
mod json;

use izar_common::chat::Token;
use serde_json::Value;

use super::Error;

/// Largest size that is believed; products of three stay far from overflowing.
const SIZE_LIMIT: usize = 1 << 20;

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
    /// Finds a family by its name, or says which there are.
    fn from_name(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.iter().map(|family| family.name()).collect::<Vec<_>>().join(", ");
        let found = Self::ALL.iter().copied().find(|family| family.name() == name);
        found.ok_or_else(|| format!("is \"{name}\"; supported are {}", known()))
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
