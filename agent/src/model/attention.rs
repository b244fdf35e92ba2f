//! The two kinds of attention as models hold them: grouped-query heads, and DeepSeek's latent ones.

use std::sync::Arc;

use burn::tensor::{Tensor, s};

use super::Error;
use super::config::{self, Config};
use super::layers::Loading;
use crate::ops::{Cache, CacheFormat, Grouped, HeadNorms, Latent, Linear, Ops, Plan};

/// Epsilon of the norms inside latent attention, which no configuration names. As in transformers.
const LATENT_EPSILON: f32 = 1e-6;

/// The attention of a layer.
#[derive(Debug)]
pub enum Attention {
    Grouped(GroupedAttention),
    Latent(Box<LatentAttention>),
}

impl Attention {
    pub fn load(loading: &Loading<'_>, name: &str) -> Result<Self, Error> {
        Ok(match loading.config.attention {
            config::Attention::Grouped { kv_heads, head_dim } => {
                Self::Grouped(GroupedAttention::load(loading, name, kv_heads, head_dim)?)
            }
            config::Attention::Latent(latent) => Self::Latent(Box::new(LatentAttention::load(loading, name, latent)?)),
        })
    }
    /// Attends and adds the result to `residual`. `x`, `residual`: `[rows, hidden]`.
    pub fn forward_onto(
        &self,
        ops: &Ops,
        x: Tensor<2>,
        residual: Tensor<2>,
        cache: &mut Cache,
        plan: &Plan,
    ) -> Tensor<2> {
        match self {
            Self::Grouped(attention) => attention.forward_onto(ops, x, residual, cache, plan),
            Self::Latent(attention) => attention.forward_onto(ops, x, residual, cache, plan),
        }
    }
    pub fn bytes(&self) -> usize {
        match self {
            Self::Grouped(attention) => attention.qkv.bytes() + attention.output.bytes(),
            Self::Latent(attention) => attention.bytes(),
        }
    }
}

/// Makes the empty cache of a layer.
pub fn cache(config: &Config, ops: &Ops, format: CacheFormat, blocks: usize) -> Cache {
    match config.attention {
        config::Attention::Grouped { kv_heads, head_dim } => {
            ops.grouped_cache(grouped(config, kv_heads, head_dim), format, blocks)
        }
        config::Attention::Latent(latent) => ops.latent_cache(shape(config, latent), format, blocks),
    }
}

/// Memory that a block of a layer's cache takes.
pub fn block_bytes(config: &Config, format: CacheFormat) -> usize {
    let numbers = match config.attention {
        config::Attention::Grouped { kv_heads, head_dim } => {
            let (keys, values) = grouped(config, kv_heads, head_dim).block();
            keys + values
        }
        config::Attention::Latent(latent) => shape(config, latent).block(),
    };
    numbers * format.bytes()
}

fn grouped(config: &Config, kv_heads: usize, dim: usize) -> Grouped {
    Grouped { heads: config.heads, kv_heads, dim, scale: config.score_scale() }
}

fn shape(config: &Config, latent: config::Latent) -> Latent {
    let (rank, width) = (latent.kv_rank, latent.kv_rank + latent.rope_dim);
    Latent { heads: config.heads, width, rank, scale: config.score_scale() }
}

/// Heads in groups that share keys and values.
#[derive(Debug)]
pub struct GroupedAttention {
    shape: Grouped,
    norms: Option<HeadNorms>,
    /// Outputs: queries, then keys, then values.
    qkv: Linear,
    output: Linear,
}

impl GroupedAttention {
    fn load(loading: &Loading<'_>, name: &str, kv_heads: usize, dim: usize) -> Result<Self, Error> {
        let (config, format) = (loading.config, loading.options.format);
        let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|part| format!("{name}.{part}"));
        let (width, kv_width) = (config.heads * dim, kv_heads * dim);
        let projections = [(&q[..], width), (&k[..], kv_width), (&v[..], kv_width)];
        let norm = |part: &str| Ok(Arc::new(loading.rows(&format!("{name}.{part}.weight"), &[dim])?));
        let norms = match config.qk_norm() {
            true => Some(HeadNorms { q: norm("q_norm")?, k: norm("k_norm")?, epsilon: config.norm_epsilon }),
            false => None,
        };
        Ok(Self {
            shape: grouped(config, kv_heads, dim),
            norms,
            qkv: loading.linear(format, &projections, config.hidden, config.qkv_bias())?,
            output: loading.linear(format, &[(&o, config.hidden)], width, false)?,
        })
    }
    fn forward_onto(&self, ops: &Ops, x: Tensor<2>, residual: Tensor<2>, cache: &mut Cache, plan: &Plan) -> Tensor<2> {
        let mixed = ops.attend(self.shape, self.norms.as_ref(), self.qkv.forward(x), cache, plan);
        self.output.forward_onto(mixed, residual)
    }
}

/// Latent attention in its absorbed form: the projections from the latent to keys are part of the queries, those to
/// values come after attending, so that the cache holds, and every head reads, the latent alone. Prefill and decode
/// compute the same.
///
/// Source: DeepSeek-V2 (2024), section 2.1.
#[derive(Debug)]
pub struct LatentAttention {
    sizes: config::Latent,
    shape: Latent,
    /// Makes the normalized vector that queries are made from, where that is not the input itself.
    compress: Option<(Linear, Tensor<1>)>,
    query: Linear,
    /// Outputs: the latent, then the rotated key.
    kv_a: Linear,
    kv_norm: Tensor<1>,
    /// For each head, from the unrotated query to the latent.
    absorb: Vec<Linear>,
    /// For each head, from the latent to the value.
    expand: Vec<Linear>,
    output: Linear,
}

impl LatentAttention {
    fn load(loading: &Loading<'_>, name: &str, sizes: config::Latent) -> Result<Self, Error> {
        let (config, format) = (loading.config, loading.options.format);
        let (hidden, heads) = (config.hidden, config.heads);
        let named = |part: &str| format!("{name}.{part}");
        let linear = |part: &str, outputs, inputs| loading.linear(format, &[(&named(part), outputs)], inputs, false);
        let width = heads * sizes.query_dim();
        let (compress, query) = match sizes.q_rank {
            None => (None, linear("q_proj", width, hidden)?),
            Some(rank) => {
                let norm = loading.vector(&named("q_a_layernorm.weight"), rank)?;
                (Some((linear("q_a_proj", rank, hidden)?, norm)), linear("q_b_proj", width, rank)?)
            }
        };
        let (nope, rank, value) = (sizes.nope_dim, sizes.kv_rank, sizes.value_dim);
        let kv_b = loading.rows(&named("kv_b_proj.weight"), &[heads * (nope + value), rank])?;
        let (mut absorb, mut expand) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
        for head in kv_b.chunks_exact((nope + value) * rank) {
            let (keys, values) = head.split_at(nope * rank);
            let turned: Vec<f32> = (0..rank).flat_map(|r| (0..nope).map(move |n| keys[n * rank + r])).collect();
            absorb.push(loading.linear_of(format, &turned, rank, nope));
            expand.push(loading.linear_of(format, values, value, rank));
        }
        Ok(Self {
            sizes,
            shape: shape(config, sizes),
            compress,
            query,
            kv_a: linear("kv_a_proj_with_mqa", rank + sizes.rope_dim, hidden)?,
            kv_norm: loading.vector(&named("kv_a_layernorm.weight"), rank)?,
            absorb,
            expand,
            output: linear("o_proj", hidden, heads * value)?,
        })
    }
    fn forward_onto(&self, ops: &Ops, x: Tensor<2>, residual: Tensor<2>, cache: &mut Cache, plan: &Plan) -> Tensor<2> {
        let (rows, heads, rank) = (x.dims()[0], self.shape.heads, self.shape.rank);
        let config::Latent { nope_dim, rope_dim, interleaved, .. } = self.sizes;
        let kv = self.kv_a.forward(x.clone());
        let latent = ops.rms_norm(kv.clone().slice(s![.., 0..rank]), &self.kv_norm, LATENT_EPSILON);
        let key = ops.rotate(kv.slice(s![.., rank..]).reshape([rows, 1, rope_dim]), plan, interleaved);
        let new = Tensor::cat(vec![latent, key.reshape([rows, rope_dim])], 1);
        let from = match &self.compress {
            Some((linear, norm)) => ops.rms_norm(linear.forward(x), norm, LATENT_EPSILON),
            None => x,
        };
        let q = self.query.forward(from).reshape([rows, heads, nope_dim + rope_dim]);
        let absorbed = per_head(&self.absorb, q.clone().slice(s![.., .., 0..nope_dim]));
        let turned = ops.rotate(q.slice(s![.., .., nope_dim..]), plan, interleaved);
        let queries = Tensor::cat(vec![absorbed, turned], 2);
        let mixed = per_head(&self.expand, ops.attend_latent(self.shape, queries, new, cache, plan));
        self.output.forward_onto(mixed.reshape([rows, heads * self.sizes.value_dim]), residual)
    }
    fn bytes(&self) -> usize {
        let compress = self.compress.iter().map(|(linear, _)| linear);
        let linears = [&self.query, &self.kv_a, &self.output].into_iter().chain(compress);
        linears.chain(&self.absorb).chain(&self.expand).map(Linear::bytes).sum()
    }
}

/// Multiplies each head with its own weights. `x`: `[rows, heads, inputs]`. Returns `[rows, heads, outputs]`.
fn per_head(heads: &[Linear], x: Tensor<3>) -> Tensor<3> {
    let [rows, _, inputs] = x.dims();
    let one = |(head, linear): (usize, &Linear)| {
        let x = x.clone().slice(s![.., head..head + 1, ..]).reshape([rows, inputs]);
        let y = linear.forward(x);
        let outputs = y.dims()[1];
        y.reshape([rows, 1, outputs])
    };
    Tensor::cat(heads.iter().enumerate().map(one).collect(), 1)
}
