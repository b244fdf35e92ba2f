//! What a checkpoint says of its shape: `config.json` of transformers 4 and 5, or GGUF metadata, as one struct.
//!
//! A key that we do not know might change the computation, and a model that answers slightly wrong is worse than one
//! that does not load: so an unknown key is refused by name, unless its value is neutral (null, false, 0, empty) or it
//! is known to say nothing about the computation.

mod gguf;
mod json;
mod keys;
mod rope;

use izar_common::chat::Token;
use serde_json::Value;

pub use rope::{Scaling, Yarn};

use super::Error;

/// Largest size that is believed; products of three stay far from overflowing.
const SIZE_LIMIT: usize = 1 << 20;

/// A group of models that one set of flags describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    DeepseekV2,
    DeepseekV3,
}

impl Family {
    pub const ALL: &[Family] =
        &[Family::Llama, Family::Qwen2, Family::Qwen3, Family::Qwen3Moe, Family::DeepseekV2, Family::DeepseekV3];

    /// Its name in `model_type` of `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3_moe",
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
        }
    }
    /// Its name in `general.architecture` of GGUF, which calls both generations of DeepSeek by one.
    pub fn ggml_name(self) -> &'static str {
        match self {
            Family::Qwen3Moe => "qwen3moe",
            Family::DeepseekV2 | Family::DeepseekV3 => "deepseek2",
            Family::Llama | Family::Qwen2 | Family::Qwen3 => self.name(),
        }
    }
    /// Finds the first family of a name, or says which there are.
    fn find(name: &str, name_of: fn(Self) -> &'static str) -> Result<Self, String> {
        let found = Self::ALL.iter().copied().find(|family| name_of(*family) == name);
        found.ok_or_else(|| {
            let mut known: Vec<_> = Self::ALL.iter().map(|family| name_of(*family)).collect();
            known.dedup();
            format!("is \"{name}\"; supported are {}", known.join(", "))
        })
    }
}

/// How a layer's heads find their keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Groups of query heads share a head of keys and values; the whole head is rotated, halves against each other.
    Grouped {
        /// Heads of keys and values; `heads` is a multiple of it.
        kv_heads: usize,
        head_dim: usize,
    },
    /// Keys and values are projections of one small vector per token (DeepSeek's MLA).
    Latent(Latent),
}

/// The sizes of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Queries come through a normalized vector of this width; `None`: straight from the residual stream.
    pub q_rank: Option<usize>,
    /// Width of the vector that keys and values are made of, and that the cache holds.
    pub kv_rank: usize,
    /// Part of a head's query and key that knows no position.
    pub nope_dim: usize,
    /// Part that is rotated; all heads share one such key, which the cache holds too.
    pub rope_dim: usize,
    pub value_dim: usize,
    /// Rotary pairs are neighbours (0,1), (2,3), …; otherwise halves (i, i + rope_dim / 2).
    pub interleaved: bool,
}

impl Latent {
    /// Width of a head's query.
    pub fn query_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }
}

/// How a token's affinity to each expert is scored, and how groups of experts are compared where there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts; a group counts as much as its best expert (Qwen3, DeepSeek-V2).
    Softmax,
    /// Sigmoid, and a learned bias that counts in choosing but not in weighting; a group counts as much as its best two
    /// experts together (DeepSeek-V3).
    Sigmoid,
}

/// Feed-forward blocks of which each token uses a few.
///
/// The chosen experts' scores are their weights: divided by their sum if `normalized`, then times `scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    pub count: usize,
    pub per_token: usize,
    /// Width inside one expert.
    pub intermediate: usize,
    /// Experts that every token uses besides, in the checkpoint one block of `shared * intermediate`; 0: none.
    pub shared: usize,
    pub scoring: Scoring,
    /// Experts fall into so many groups of neighbours; 1: no groups.
    pub groups: usize,
    /// Only experts of the best so many groups can be chosen.
    pub groups_kept: usize,
    pub normalized: bool,
    pub scale: f32,
    /// Which layers have experts; the others have one dense block.
    sparse: Vec<bool>,
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
    /// Width inside a dense feed-forward block.
    pub intermediate: usize,
    /// Heads of queries.
    pub heads: usize,
    pub attention: Attention,
    /// The experts, where some layers have them: ask [`Config::experts`] for a layer's.
    experts: Option<Experts>,
    pub norm_epsilon: f32,
    pub rope_theta: f32,
    pub rope_scaling: Scaling,
    /// The output projection is the embedding table.
    pub tied: bool,
}

/// What a format calls the values that are checked after reading.
struct Names {
    kv_heads: &'static str,
    head_dim: &'static str,
    rope_dim: &'static str,
    norm_epsilon: &'static str,
    rope_theta: &'static str,
    per_token: &'static str,
    groups: &'static str,
    groups_kept: &'static str,
}

impl Config {
    /// Whether the query, key and value projections add a bias.
    pub fn qkv_bias(&self) -> bool {
        self.family == Family::Qwen2
    }
    /// Whether queries and keys are normalized per head before they are rotated.
    pub fn qk_norm(&self) -> bool {
        matches!(self.family, Family::Qwen3 | Family::Qwen3Moe)
    }
    /// The experts of a layer, or `None` where it has a dense block.
    pub fn experts(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.sparse[layer])
    }
    /// The experts of those layers that have them, if any has.
    pub fn mixture(&self) -> Option<&Experts> {
        self.experts.as_ref()
    }
    /// Heads of keys and values; with latent attention each query head has its own.
    pub fn kv_heads(&self) -> usize {
        match self.attention {
            Attention::Grouped { kv_heads, .. } => kv_heads,
            Attention::Latent(_) => self.heads,
        }
    }
    /// Width of a head's query and key.
    pub fn head_dim(&self) -> usize {
        match self.attention {
            Attention::Grouped { head_dim, .. } => head_dim,
            Attention::Latent(latent) => latent.query_dim(),
        }
    }
    /// How much of a head is rotated.
    pub fn rotary_dim(&self) -> usize {
        match self.attention {
            Attention::Grouped { head_dim, .. } => head_dim,
            Attention::Latent(latent) => latent.rope_dim,
        }
    }

    /// How many numbers a token keeps in the cache in one layer: keys and values, or the latent and its rotated key.
    pub fn cache_values(&self) -> usize {
        match self.attention {
            Attention::Grouped { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            Attention::Latent(latent) => latent.kv_rank + latent.rope_dim,
        }
    }

    /// The angle by which each pair of a head turns from one position to the next, `[rotary_dim / 2]`, in radians.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        self.rope_scaling.frequencies(self.rope_theta, self.rotary_dim())
    }
    /// What cosines and sines are multiplied by: 1 but for YaRN.
    pub fn rope_magnitude(&self) -> f32 {
        if let Scaling::Yarn(yarn) = self.rope_scaling { yarn.magnitude } else { 1.0 }
    }
    /// What the product of a query and a key is multiplied by: one over the root of the head's width, and YaRN's gain.
    pub fn score_scale(&self) -> f32 {
        let gain = if let Scaling::Yarn(yarn) = self.rope_scaling { yarn.score_gain } else { 1.0 };
        gain / (self.head_dim() as f32).sqrt()
    }

    fn check(&self, names: &Names, bad: impl Fn(&str, &str) -> Error) -> Result<(), Error> {
        match self.attention {
            Attention::Grouped { kv_heads, .. } if !self.heads.is_multiple_of(kv_heads) => {
                return Err(bad(names.kv_heads, "does not divide the number of attention heads"));
            }
            Attention::Grouped { head_dim, .. } if head_dim == 0 || !head_dim.is_multiple_of(2) => {
                return Err(bad(names.head_dim, "is not a positive even number, or there is no room for the heads"));
            }
            Attention::Latent(latent) if !latent.rope_dim.is_multiple_of(2) => {
                return Err(bad(names.rope_dim, "is not even"));
            }
            _ => {}
        }
        let positive = |value: f32| value.is_finite() && value > 0.0;
        if !positive(self.norm_epsilon) {
            return Err(bad(names.norm_epsilon, "is not a positive number"));
        }
        if !positive(self.rope_theta) || !self.rope_frequencies().iter().all(|f| f.is_finite()) {
            return Err(bad(names.rope_theta, "or the rotary scaling gives no finite frequencies"));
        }
        if !positive(self.rope_magnitude()) || !positive(self.score_scale()) {
            return Err(bad(names.rope_theta, "has a rotary scaling that makes scores vanish or overflow"));
        }
        self.experts.as_ref().map_or(Ok(()), |experts| experts.check(names, bad))
    }
}

impl Experts {
    #[cfg(test)]
    pub fn for_tests(
        count: usize,
        per_token: usize,
        scoring: Scoring,
        groups: usize,
        groups_kept: usize,
        normalized: bool,
        scale: f32,
    ) -> Self {
        let (intermediate, shared, sparse) = (1, 0, vec![true]);
        Self { count, per_token, intermediate, shared, scoring, groups, groups_kept, normalized, scale, sparse }
    }
    fn check(&self, names: &Names, bad: impl Fn(&str, &str) -> Error) -> Result<(), Error> {
        if !self.count.is_multiple_of(self.groups) {
            return Err(bad(names.groups, "does not divide the number of experts"));
        }
        let in_group = self.count / self.groups;
        if self.scoring == Scoring::Sigmoid && self.groups > 1 && in_group < 2 {
            return Err(bad(names.groups, "leaves fewer than two experts to a group"));
        }
        if self.groups_kept > self.groups {
            return Err(bad(names.groups_kept, "is more than there are groups"));
        }
        if self.per_token > in_group * self.groups_kept {
            return Err(bad(names.per_token, "is more than can be chosen from"));
        }
        Ok(())
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
mod tests;
