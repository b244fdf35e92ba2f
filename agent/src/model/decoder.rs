//! The decoder of all families: attention of one kind or the other, dense feed-forward blocks or experts.
//!
//! All tokens of a step go through the linear layers together; attention treats each with its own sequence's blocks.
//! Checked against `tests/golden`, tolerance 1e-4 of the largest logit.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::attention::{self, Attention};
use super::config::Config;
use super::experts::Experts;
use super::layers::{Loading, Mlp};
use super::weights::Source;
use super::{Batch, CausalLm, Error, Logits, Options};
use crate::ops::reference::indices;
use crate::ops::{Cache, Linear, Ops, span, values};

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor<1>,
    attention: Attention,
    mlp_norm: Tensor<1>,
    feed_forward: FeedForward,
}

/// A loaded decoder and the cache of its sequences.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    ops: Ops,
    frequencies: Vec<f32>,
    /// Rows are tokens.
    embedding: Linear,
    layers: Vec<Layer>,
    /// One a layer.
    caches: Vec<Cache>,
    norm: Tensor<1>,
    /// Outputs are tokens.
    head: Linear,
}

impl Decoder {
    /// Reads the weights and makes room for so many blocks of keys and values.
    pub fn load(config: &Config, source: &Source, options: &Options, ops: Ops, blocks: usize) -> Result<Self, Error> {
        let loading = Loading { config, source, options, ops: ops.clone() };
        let embedding = loading.table("model.embed_tokens")?;
        let head = if config.tied { embedding.clone() } else { loading.table("lm_head")? };
        let layer = |index| Layer::load(&loading, index);
        let layers = (0..config.layers).into_par_iter().map(layer).collect::<Result<_, _>>()?;
        let mut frequencies = config.rope_frequencies();
        if let Some(divisors) = source.rope_divisors(config.rotary_dim() / 2)? {
            frequencies.iter_mut().zip(divisors).for_each(|(f, d)| *f /= d);
        }
        let cache = |_| attention::cache(config, &ops, options.cache, blocks);
        Ok(Self {
            frequencies,
            embedding,
            layers,
            caches: (0..config.layers).map(cache).collect(),
            norm: loading.vector("model.norm.weight", config.hidden)?,
            head,
            config: config.clone(),
            ops,
        })
    }
}

impl Layer {
    fn load(loading: &Loading<'_>, index: usize) -> Result<Self, Error> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let config = loading.config;
        let mlp = name("mlp");
        Ok(Self {
            attention_norm: loading.vector(&name("input_layernorm.weight"), config.hidden)?,
            attention: Attention::load(loading, &name("self_attn"))?,
            mlp_norm: loading.vector(&name("post_attention_layernorm.weight"), config.hidden)?,
            feed_forward: match config.experts(index) {
                Some(rule) => FeedForward::Experts(Experts::load(loading, &mlp, rule)?),
                None => FeedForward::Dense(loading.mlp(&mlp, config.intermediate)?),
            },
        })
    }
    fn bytes(&self) -> usize {
        let feed_forward = match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.bytes(),
            FeedForward::Experts(experts) => experts.bytes(),
        };
        self.attention.bytes() + feed_forward
    }
}

impl CausalLm for Decoder {
    fn forward(&mut self, batch: &Batch) -> Logits {
        self.forward_unless(batch, &AtomicBool::new(false)).expect("nobody stops it")
    }
    fn forward_unless(&mut self, batch: &Batch, stop: &AtomicBool) -> Option<Logits> {
        let ops = &self.ops;
        for cache in &mut self.caches {
            cache.clear(&batch.cleared);
            cache.copy(&batch.copied);
        }
        if batch.chunks.is_empty() {
            return Some(Logits::new(Vec::new(), self.config.vocabulary));
        }
        let mut rows = 0;
        let spans = batch.chunks.iter().map(|chunk| {
            rows += chunk.tokens;
            span(rows - chunk.tokens..rows, chunk.start, chunk.blocks.clone())
        });
        let plan = ops.plan(spans.collect(), &self.frequencies, self.config.rope_magnitude());
        let epsilon = self.config.norm_epsilon;
        let mut x = self.embedding.embed(ops, batch.tokens.iter().map(|token| *token as usize));
        for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
            // A layer takes a millisecond or a few.
            if stop.load(Relaxed) {
                return None;
            }
            let normed = ops.rms_norm(x.clone(), &layer.attention_norm, epsilon);
            x = layer.attention.forward_onto(ops, normed, x, cache, &plan);
            let normed = ops.rms_norm(x.clone(), &layer.mlp_norm, epsilon);
            x = match &layer.feed_forward {
                FeedForward::Dense(mlp) => mlp.forward_onto(ops, normed, x),
                FeedForward::Experts(experts) => experts.forward_onto(ops, normed, x),
            };
        }
        let wanted = batch.wanted();
        if wanted.is_empty() {
            return Some(Logits::new(Vec::new(), self.config.vocabulary));
        }
        let x =
            if wanted.len() == batch.tokens.len() { x } else { x.select(0, indices(wanted.into_iter(), ops.device())) };
        let logits = self.head.forward(ops.rms_norm(x, &self.norm, epsilon));
        Some(Logits::new(values(logits), self.config.vocabulary))
    }
    fn weight_bytes(&self) -> usize {
        let tables = if self.config.tied { 0 } else { self.embedding.bytes() } + self.head.bytes();
        tables + self.layers.iter().map(Layer::bytes).sum::<usize>()
    }
}
