//! GGUF metadata: keys under the architecture's name.
//!
//! Source: the constants of llama.cpp's `gguf` package, and what its converter and its loader make of them.

use izar_common::gguf;
use serde_json::{Map, Value};

use super::keys::Keys;
use super::rope::{Scaling, Yarn, sharpening};
use super::{Attention, Config, Experts, Family, Latent, Names, Scoring};
use crate::model::Error;

/// Keys of GGUF metadata, after the architecture's name, that do not change what is computed here.
const HARMLESS: &[&str] = &["vocab_size", "rope.scaling.finetuned"];

const NAMES: Names = Names {
    kv_heads: "attention.head_count_kv",
    head_dim: "attention.key_length",
    rope_dim: "rope.dimension_count",
    norm_epsilon: "attention.layer_norm_rms_epsilon",
    rope_theta: "rope.freq_base",
    per_token: "expert_used_count",
    groups: "expert_group_count",
    groups_kept: "expert_group_used_count",
};

/// Values of `expert_gating_func`.
const GATING_SOFTMAX: usize = 1;
const GATING_SIGMOID: usize = 2;

impl Config {
    /// Reads GGUF metadata.
    pub fn from_gguf(name: &str, file: &gguf::File) -> Result<Self, Error> {
        let wrong = |source| Error::Gguf { file: name.to_owned(), source };
        let outer = |key: &str, reason: String| Error::Key { file: name.to_owned(), key: key.to_owned(), reason };
        let architecture = file.str("general.architecture").map_err(wrong)?;
        let prefix = format!("{architecture}.");
        let ours =
            file.metadata().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), json(value))));
        let map: Map<String, Value> = ours.collect();
        let keys = Keys::new(name, prefix.clone(), &map);
        let family = family(architecture, &keys).map_err(|reason| outer("general.architecture", reason))?;
        let layers = keys.size("block_count")?;
        let hidden = keys.size("embedding_length")?;
        let heads = keys.size("attention.head_count")?;
        let context = keys.size("context_length")?;
        let vocabulary = file.meta("tokenizer.ggml.tokens").and_then(|v| v.as_array()).map(<[_]>::len);
        let (attention, experts) = match family {
            Family::Llama | Family::Qwen2 | Family::Qwen3 => (grouped(&keys, hidden, heads)?, None),
            Family::Qwen3Moe => (grouped(&keys, hidden, heads)?, Some(qwen_experts(&keys, layers)?)),
            Family::DeepseekV2 | Family::DeepseekV3 => {
                (latent(&keys, heads)?, Some(deepseek_experts(&keys, family, layers)?))
            }
        };
        let config = Self {
            family,
            vocabulary: vocabulary.ok_or_else(|| outer("tokenizer.ggml.tokens", "is missing".into()))?,
            context,
            layers,
            hidden,
            intermediate: keys.size("feed_forward_length")?,
            heads,
            attention,
            experts,
            norm_epsilon: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
            rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: scaling(&keys, context as f32, matches!(attention, Attention::Latent(_)))?,
            tied: file.tensor("output.weight").is_none(),
        };
        keys.refuse_unknown(HARMLESS)?;
        config.check(&NAMES, |key, reason| keys.bad(key, reason))?;
        Ok(config)
    }
}

/// Metadata as JSON. A number that JSON has no word for becomes a text, so that it is refused as no number.
fn json(value: &gguf::Value) -> Value {
    match value {
        gguf::Value::Unsigned(n) => (*n).into(),
        gguf::Value::Signed(n) => (*n).into(),
        gguf::Value::Float(n) => serde_json::Number::from_f64(*n).map_or_else(|| n.to_string().into(), Value::Number),
        gguf::Value::Bool(b) => (*b).into(),
        gguf::Value::String(s) => s.as_str().into(),
        gguf::Value::Array(list) => list.iter().map(json).collect(),
    }
}

/// One architecture holds both DeepSeek-V2 and V3; how experts are scored tells them apart.
fn family(architecture: &str, keys: &Keys<'_>) -> Result<Family, String> {
    let family = Family::find(architecture, Family::ggml_name)?;
    let sigmoid = keys.get("expert_gating_func").is_some_and(|v| v.as_u64() == Some(GATING_SIGMOID as u64));
    Ok(if family == Family::DeepseekV2 && sigmoid { Family::DeepseekV3 } else { family })
}

fn grouped(keys: &Keys<'_>, hidden: usize, heads: usize) -> Result<Attention, Error> {
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = keys.optional_size("attention.key_length")?.unwrap_or(hidden / heads);
    for key in ["rope.dimension_count", "attention.value_length"] {
        if keys.optional_size(key)?.is_some_and(|n| n != head_dim) {
            return Err(keys.bad(key, "differs from the size of a head, which is not supported"));
        }
    }
    Ok(Attention::Grouped { kv_heads, head_dim })
}

/// Newer files describe the cache (one head as wide as latent and rotary part) and name the heads' own sizes `_mla`;
/// older ones describe the heads.
fn latent(keys: &Keys<'_>, heads: usize) -> Result<Attention, Error> {
    let (kv_rank, rope_dim) = (keys.size("attention.kv_lora_rank")?, keys.size("rope.dimension_count")?);
    let query_dim = match keys.optional_size("attention.key_length_mla")? {
        Some(query_dim) => {
            keys.only("attention.head_count_kv", 1)?;
            keys.only("attention.key_length", kv_rank + rope_dim)?;
            keys.only("attention.value_length", kv_rank)?;
            query_dim
        }
        None => {
            keys.only("attention.head_count_kv", heads)?;
            keys.size("attention.key_length")?
        }
    };
    let value_dim = match keys.optional_size("attention.value_length_mla")? {
        Some(value_dim) => value_dim,
        None => keys.size("attention.value_length")?,
    };
    let nope_dim = query_dim.checked_sub(rope_dim).filter(|dim| *dim > 0);
    Ok(Attention::Latent(Latent {
        q_rank: keys.optional_size("attention.q_lora_rank")?,
        kv_rank,
        nope_dim: nope_dim.ok_or_else(|| keys.bad("rope.dimension_count", "leaves no room in a head"))?,
        rope_dim,
        value_dim,
        interleaved: true,
    }))
}

fn qwen_experts(keys: &Keys<'_>, layers: usize) -> Result<Experts, Error> {
    keys.only("expert_gating_func", GATING_SOFTMAX)?;
    Ok(Experts {
        count: keys.size("expert_count")?,
        per_token: keys.size("expert_used_count")?,
        intermediate: keys.size("expert_feed_forward_length")?,
        shared: 0,
        scoring: Scoring::Softmax,
        groups: 1,
        groups_kept: 1,
        // Files of this architecture do not say so; every model of it wants it, and ggml computes it.
        normalized: true,
        scale: 1.0,
        sparse: vec![true; layers],
    })
}

fn deepseek_experts(keys: &Keys<'_>, family: Family, layers: usize) -> Result<Experts, Error> {
    let dense = keys.count("leading_dense_block_count")?;
    let (scoring, normalized) = match family {
        Family::DeepseekV3 => (Scoring::Sigmoid, keys.boolean("expert_weights_norm")?.unwrap_or(false)),
        _ => {
            // Files older than the key mean softmax.
            keys.only("expert_gating_func", GATING_SOFTMAX)?;
            keys.only("expert_weights_norm", false)?;
            (Scoring::Softmax, false)
        }
    };
    Ok(Experts {
        count: keys.size("expert_count")?,
        per_token: keys.size("expert_used_count")?,
        intermediate: keys.size("expert_feed_forward_length")?,
        shared: keys.count("expert_shared_count")?,
        scoring,
        groups: keys.optional_size("expert_group_count")?.unwrap_or(1),
        groups_kept: keys.optional_size("expert_group_used_count")?.unwrap_or(1),
        normalized,
        scale: keys.positive("expert_weights_scale")?.unwrap_or(1.0),
        sparse: (0..layers).map(|layer| layer >= dense).collect(),
    })
}

fn scaling(keys: &Keys<'_>, context: f32, latent: bool) -> Result<Scaling, Error> {
    let factor = keys.number("rope.scaling.factor")?.filter(|factor| *factor != 0.0);
    if factor.is_some_and(|factor| factor < 0.0) {
        return Err(keys.bad("rope.scaling.factor", "is not positive"));
    }
    let original_context = keys.positive("rope.scaling.original_context_length")?;
    match (keys.text("rope.scaling.type")?, factor) {
        (None | Some("none"), None) | (Some("none"), _) => Ok(Scaling::None),
        // A factor alone means this, as in ggml.
        (None | Some("linear"), Some(factor)) => Ok(Scaling::Linear { factor }),
        (Some("yarn"), Some(factor)) => {
            yarn(keys, factor, original_context.unwrap_or(context), latent).map(Scaling::Yarn)
        }
        (Some("linear" | "yarn"), None) => Err(keys.bad("rope.scaling.factor", "is missing")),
        (Some(other), _) => {
            Err(keys.bad("rope.scaling.type", &format!("is \"{other}\"; supported are none, linear, yarn")))
        }
    }
}

fn yarn(keys: &Keys<'_>, factor: f32, original_context: f32, latent: bool) -> Result<Yarn, Error> {
    for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"] {
        keys.only(key, 1.0)?;
    }
    let (magnitude, score_gain) = if latent {
        // The converter writes a tenth of `mscale_all_dim` and takes `mscale` to be the same: their quotient is 1.
        let gain = sharpening(factor, 10.0 * keys.need("rope.scaling.yarn_log_multiplier")?);
        (1.0, gain * gain)
    } else {
        (sharpening(factor, 1.0), 1.0)
    };
    Ok(Yarn {
        factor,
        original_context,
        beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        truncate: true,
        magnitude,
        score_gain,
    })
}
