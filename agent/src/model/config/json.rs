//! `config.json`, as transformers 4 and 5 write it.

use serde_json::Value;

use super::keys::Keys;
use super::rope::{Scaling, Yarn, sharpening};
use super::{Attention, Config, Experts, Family, Latent, Names, Scoring};
use crate::model::Error;

/// Keys of `config.json` that do not change what is computed here.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "ep_size",
    "initializer_range",
    "is_llama_config",
    "max_window_layers",
    "model_type",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "router_aux_loss_coef",
    "seq_aux",
    "sliding_window",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
];

const NAMES: Names = Names {
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    rope_dim: "qk_rope_head_dim",
    norm_epsilon: "rms_norm_eps",
    rope_theta: "rope_theta",
    per_token: "num_experts_per_tok",
    groups: "n_group",
    groups_kept: "topk_group",
};

impl Config {
    /// Reads `config.json`.
    pub fn from_json(file: &str, text: &[u8]) -> Result<Self, Error> {
        let format = |reason: String| Error::Format { file: file.to_owned(), reason };
        let value: Value = serde_json::from_slice(text).map_err(|e| format(format!("not JSON: {e}")))?;
        let Value::Object(map) = value else { return Err(format("not a JSON object".into())) };
        let keys = Keys::new(file, String::new(), &map);
        let family = family(&keys)?;
        refuse_quantized(&keys)?;
        let layers = keys.size("num_hidden_layers")?;
        let hidden = keys.size("hidden_size")?;
        let heads = keys.size("num_attention_heads")?;
        let context = keys.size("max_position_embeddings")?;
        let (attention, experts) = match family {
            Family::Llama | Family::Qwen2 | Family::Qwen3 => (grouped(&keys, hidden, heads)?, None),
            Family::Qwen3Moe => (grouped(&keys, hidden, heads)?, Some(qwen_experts(&keys, layers)?)),
            Family::DeepseekV2 | Family::DeepseekV3 => {
                (latent(&keys, family, heads)?, Some(deepseek_experts(&keys, family, layers)?))
            }
        };
        let (rope_theta, rope_scaling) = rope(&keys, context, matches!(attention, Attention::Latent(_)))?;
        let config = Self {
            family,
            vocabulary: keys.size("vocab_size")?,
            context,
            layers,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            heads,
            attention,
            experts,
            norm_epsilon: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tied: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
        };
        keys.only("hidden_act", "silu")?;
        full_attention(&keys)?;
        keys.refuse_unknown(HARMLESS)?;
        config.check(&NAMES, |key, reason| keys.bad(key, reason))?;
        Ok(config)
    }
}

fn family(keys: &Keys<'_>) -> Result<Family, Error> {
    let name = keys.text("model_type")?.ok_or_else(|| keys.bad("model_type", "is missing"))?;
    Family::find(name, Family::name).map_err(|reason| keys.bad("model_type", &reason))
}

/// Refuses checkpoints whose weights are already quantized by somebody's method.
fn refuse_quantized(keys: &Keys<'_>) -> Result<(), Error> {
    let Some(quantization) = keys.object("quantization_config")? else { return Ok(()) };
    let method = quantization.text("quant_method")?.unwrap_or("an unnamed method");
    let reason = format!("asks for \"{method}\", and only checkpoints in f32, f16 and bf16 are supported");
    Err(keys.bad("quantization_config", &reason))
}

fn grouped(keys: &Keys<'_>, hidden: usize, heads: usize) -> Result<Attention, Error> {
    let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = keys.optional_size("head_dim")?.unwrap_or(hidden / heads);
    Ok(Attention::Grouped { kv_heads, head_dim })
}

fn latent(keys: &Keys<'_>, family: Family, heads: usize) -> Result<Attention, Error> {
    let latent = Latent {
        q_rank: keys.optional_size("q_lora_rank")?,
        kv_rank: keys.size("kv_lora_rank")?,
        nope_dim: keys.size("qk_nope_head_dim")?,
        rope_dim: keys.size("qk_rope_head_dim")?,
        value_dim: keys.size("v_head_dim")?,
        // V2 knows no other order; V3 names it.
        interleaved: family == Family::DeepseekV2 || keys.boolean("rope_interleave")?.unwrap_or(true),
    };
    // What follows from the sizes above, and is written down all the same.
    keys.only("num_key_value_heads", heads)?;
    keys.only("head_dim", latent.rope_dim)?;
    keys.only("qk_head_dim", latent.query_dim())?;
    Ok(Attention::Latent(latent))
}

/// Source: transformers, `modeling_qwen3_moe.py`.
fn qwen_experts(keys: &Keys<'_>, layers: usize) -> Result<Experts, Error> {
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let mut sparse: Vec<bool> = (1..=layers).map(|number| number.is_multiple_of(step)).collect();
    for layer in keys.get("mlp_only_layers").and_then(Value::as_array).into_iter().flatten() {
        let layer = layer.as_u64().and_then(|n| usize::try_from(n).ok()).and_then(|n| sparse.get_mut(n));
        *layer.ok_or_else(|| keys.bad("mlp_only_layers", "names what is not a layer"))? = false;
    }
    Ok(Experts {
        count: match keys.optional_size("num_experts")? {
            Some(count) => count,
            None => keys.size("num_local_experts")?,
        },
        per_token: keys.size("num_experts_per_tok")?,
        intermediate: keys.size("moe_intermediate_size")?,
        shared: 0,
        scoring: Scoring::Softmax,
        groups: 1,
        groups_kept: 1,
        normalized: keys.boolean("norm_topk_prob")?.unwrap_or(false),
        scale: 1.0,
        sparse,
    })
}

/// Source: transformers, `modeling_deepseek_v2.py` and `modeling_deepseek_v3.py`.
fn deepseek_experts(keys: &Keys<'_>, family: Family, layers: usize) -> Result<Experts, Error> {
    let dense = keys.count("first_k_dense_replace")?;
    keys.only("moe_layer_freq", 1)?;
    let (scoring, normalized, grouped) = match family {
        Family::DeepseekV3 => {
            keys.only("scoring_func", "sigmoid")?;
            keys.only("topk_method", "noaux_tc")?;
            (Scoring::Sigmoid, keys.boolean("norm_topk_prob")?.unwrap_or(true), true)
        }
        _ => {
            keys.only("scoring_func", "softmax")?;
            // DeepSeek's own code then leaves out the scale, transformers ignores the key: nobody can be right.
            keys.only("norm_topk_prob", false)?;
            let grouped = match keys.text("topk_method")?.unwrap_or("greedy") {
                "greedy" => false,
                "group_limited_greedy" => true,
                other => {
                    let reason = format!("is \"{other}\"; supported are greedy, group_limited_greedy");
                    return Err(keys.bad("topk_method", &reason));
                }
            };
            (Scoring::Softmax, false, grouped)
        }
    };
    let groups = (keys.optional_size("n_group")?, keys.optional_size("topk_group")?);
    let (groups, groups_kept) = match groups {
        _ if !grouped => (1, 1),
        (Some(groups), Some(kept)) => (groups, kept),
        (None, _) => return Err(keys.bad("n_group", "is missing")),
        (_, None) => return Err(keys.bad("topk_group", "is missing")),
    };
    Ok(Experts {
        count: keys.size("n_routed_experts")?,
        per_token: keys.size("num_experts_per_tok")?,
        intermediate: keys.size("moe_intermediate_size")?,
        shared: keys.count("n_shared_experts")?,
        scoring,
        groups,
        groups_kept,
        normalized,
        scale: keys.positive("routed_scaling_factor")?.unwrap_or(1.0),
        sparse: (0..layers).map(|layer| layer >= dense).collect(),
    })
}

/// Refuses windows: every layer must see the whole context.
fn full_attention(keys: &Keys<'_>) -> Result<(), Error> {
    let windowed = keys.boolean("use_sliding_window")?;
    let window = keys.get("sliding_window").is_some();
    if windowed == Some(true) || (windowed.is_none() && window) {
        return Err(keys.bad("sliding_window", "is not supported"));
    }
    let types = keys.get("layer_types").and_then(Value::as_array);
    if types.is_some_and(|list| list.iter().any(|kind| kind != "full_attention")) {
        return Err(keys.bad("layer_types", "names other layers than \"full_attention\", which are not supported"));
    }
    Ok(())
}

/// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).
fn rope(keys: &Keys<'_>, context: usize, latent: bool) -> Result<(f32, Scaling), Error> {
    let outer_theta = keys.number("rope_theta")?;
    let rope = match keys.object("rope_parameters")? {
        Some(rope) => Some(rope),
        None => keys.object("rope_scaling")?,
    };
    let Some(rope) = rope else { return Ok((outer_theta.unwrap_or(10_000.0), Scaling::None)) };
    let theta = rope.number("rope_theta")?.or(outer_theta).unwrap_or(10_000.0);
    let kind = match (rope.text("rope_type")?, rope.text("type")?) {
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => "default",
    };
    rope.only("partial_rotary_factor", 1.0)?;
    let scaling = match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear { factor: rope.need("factor")? },
        "llama3" => Scaling::Llama3 {
            factor: rope.need("factor")?,
            low: rope.need("low_freq_factor")?,
            high: rope.need("high_freq_factor")?,
            original_context: rope.need("original_max_position_embeddings")?,
        },
        "yarn" => Scaling::Yarn(yarn(&rope, context as f32, latent)?),
        other => {
            let reason = format!("is \"{other}\"; supported are default, linear, llama3, yarn");
            return Err(rope.bad("rope_type", &reason));
        }
    };
    rope.refuse_unknown(&[])?;
    Ok((theta, scaling))
}

/// Only latent attention sharpens scores by `mscale_all_dim`; the others know it as a divisor.
fn yarn(rope: &Keys<'_>, context: f32, latent: bool) -> Result<Yarn, Error> {
    let original_context = rope.positive("original_max_position_embeddings")?.unwrap_or(context);
    let factor = rope.positive("factor")?.unwrap_or(context / original_context);
    let weight = |key| Ok::<_, Error>(rope.number(key)?.filter(|weight| *weight != 0.0));
    let (mscale, all) = (weight("mscale")?, weight("mscale_all_dim")?);
    let magnitude = match (mscale, all) {
        (Some(mscale), Some(all)) => sharpening(factor, mscale) / sharpening(factor, all),
        _ => sharpening(factor, 1.0),
    };
    let gain = all.filter(|_| latent).map_or(1.0, |all| sharpening(factor, all));
    Ok(Yarn {
        factor,
        original_context,
        beta_fast: rope.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.positive("beta_slow")?.unwrap_or(1.0),
        truncate: rope.boolean("truncate")?.unwrap_or(true),
        magnitude: rope.positive("attention_factor")?.unwrap_or(magnitude),
        score_gain: gain * gain,
    })
}
