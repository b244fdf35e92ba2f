//! The dense decoder of Llama, Qwen2 and Qwen3: one forward pass with two flags.
//!
//! All tokens of a step go through the linear layers together; attention then treats each chunk with its own
//! sequence's cache. Queries, keys and values are one product, so are gate and up.
//! Checked against `tests/golden`, tolerance 1e-4 of the largest logit.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::{Bool, Device, Tensor, s};
use rayon::prelude::*;

use super::config::Config;
use super::weights::Source;
use super::{Batch, CausalLm, Error, Logits, SequenceId};
use crate::ops::reference::{Cache, causal_mask, tensor, values};
use crate::ops::{Linear, Rotation, attend, gather, rms_norm, swiglu};

struct Layer {
    attention_norm: Tensor<1>,
    /// Outputs: queries, then keys, then values.
    qkv: Linear,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    output: Linear,
    mlp_norm: Tensor<1>,
    /// Outputs: gate, then up.
    gate_up: Linear,
    down: Linear,
}

/// A sequence's caches, one a layer, and how far they are filled.
struct Sequence {
    layers: Vec<Cache>,
    filled: usize,
}

/// A loaded decoder and the caches of its sequences.
pub struct Decoder {
    config: Config,
    device: Device,
    frequencies: Vec<f32>,
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    norm: Tensor<1>,
    head: Linear,
    sequences: HashMap<SequenceId, Sequence>,
}

/// One chunk on its way through the layers.
struct Running {
    id: SequenceId,
    sequence: Sequence,
    /// Its rows in the step.
    rows: Range<usize>,
    start: usize,
    mask: Option<Tensor<3, Bool>>,
}

impl Decoder {
    /// Reads the weights. Linear layers are cut for the threads of the current pool.
    pub fn load(config: &Config, source: &Source) -> Result<Self, Error> {
        let loading = Loading { config, source, device: Device::flex(), threads: rayon::current_num_threads() };
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        let table = loading.rows("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let head = if config.tied {
            loading.linear_of(&table, vocabulary, hidden)
        } else {
            loading.linear(&[("lm_head", vocabulary)], hidden)?
        };
        let layers = (0..config.layers).into_par_iter().map(|layer| loading.layer(layer)).collect::<Result<_, _>>()?;
        let mut frequencies = config.rope_frequencies();
        if let Some(divisors) = source.rope_divisors(config.rotary_dim() / 2)? {
            frequencies.iter_mut().zip(divisors).for_each(|(f, d)| *f /= d);
        }
        Ok(Self {
            embedding: tensor(table, [vocabulary, hidden], &loading.device),
            norm: loading.vector("model.norm.weight", hidden)?,
            config: config.clone(),
            device: loading.device,
            frequencies,
            layers,
            head,
            sequences: HashMap::new(),
        })
    }

    /// Takes the chunks' caches out, so that layers may change them side by side.
    fn begin(&mut self, batch: &Batch) -> Vec<Running> {
        let group = self.config.heads / self.config.kv_heads();
        let mut end = 0;
        let mut running = Vec::with_capacity(batch.chunks.len());
        for chunk in &batch.chunks {
            let rows = end..end + chunk.tokens;
            end = rows.end;
            let sequence = match chunk.start {
                0 => Sequence { layers: self.layers.iter().map(|_| Cache::default()).collect(), filled: 0 },
                _ => self.sequences.remove(&chunk.sequence).expect("a chunk continues an open sequence"),
            };
            assert_eq!(sequence.filled, chunk.start, "a chunk starts where its cache ends");
            let mask = causal_mask(chunk.start, chunk.tokens, group, &self.device);
            running.push(Running { id: chunk.sequence, sequence, rows, start: chunk.start, mask });
        }
        assert_eq!(end, batch.tokens.len(), "chunks cover the tokens");
        running
    }
}

impl Layer {
    fn forward(
        &self,
        index: usize,
        config: &Config,
        x: Tensor<2>,
        rotation: &Rotation,
        running: &mut [Running],
    ) -> Tensor<2> {
        let qkv = self.qkv.forward(rms_norm(x.clone(), &self.attention_norm, config.norm_epsilon));
        let mixed = self.mix(index, config, qkv, rotation, running);
        let x = x + self.output.forward(mixed);
        let gate_up = self.gate_up.forward(rms_norm(x.clone(), &self.mlp_norm, config.norm_epsilon));
        x + self.down.forward(swiglu(gate_up))
    }

    /// Rotates, then attends chunk by chunk. `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`.
    fn mix(
        &self,
        index: usize,
        config: &Config,
        qkv: Tensor<2>,
        rotation: &Rotation,
        running: &mut [Running],
    ) -> Tensor<2> {
        let (heads, kv_heads, tokens) = (config.heads, config.kv_heads(), qkv.dims()[0]);
        let qkv = qkv.reshape([tokens, heads + 2 * kv_heads, config.head_dim()]);
        let normed = |x: Tensor<3>, weight: &Option<Tensor<1>>| match weight {
            Some(weight) => rms_norm(x, weight, config.norm_epsilon),
            None => x,
        };
        let q = normed(qkv.clone().slice(s![.., 0..heads, ..]), &self.q_norm);
        let k = normed(qkv.clone().slice(s![.., heads..heads + kv_heads, ..]), &self.k_norm);
        let v = qkv.slice(s![.., heads + kv_heads.., ..]);
        let (q, k) = (rotation.apply(q), rotation.apply(k));
        let one = |chunk: &mut Running| {
            let rows = |x: &Tensor<3>| x.clone().slice(s![chunk.rows.clone(), .., ..]);
            let (q, k, v) = (rows(&q), rows(&k), rows(&v));
            attend(q, k, v, &mut chunk.sequence.layers[index], chunk.start, &chunk.mask)
        };
        match running {
            [only] => one(only),
            many => Tensor::cat(many.par_iter_mut().map(one).collect(), 0),
        }
    }
}

impl CausalLm for Decoder {
    fn forward(&mut self, batch: &Batch) -> Logits {
        let mut running = self.begin(batch);
        let positions: Vec<usize> = running.iter().flat_map(|c| c.start..c.start + c.rows.len()).collect();
        let rotation = Rotation::new(&positions, &self.frequencies, &self.device).times(self.config.rope_magnitude());
        let mut x = gather(&self.embedding, batch.tokens.iter().map(|t| *t as usize));
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, &self.config, x, &rotation, &mut running);
        }
        for mut chunk in running {
            chunk.sequence.filled += chunk.rows.len();
            self.sequences.insert(chunk.id, chunk.sequence);
        }
        let wanted = batch.wanted();
        if wanted.is_empty() {
            return Logits::new(Vec::new(), self.config.vocabulary);
        }
        let x = if wanted.len() == batch.tokens.len() { x } else { gather(&x, wanted.into_iter()) };
        let logits = self.head.forward(rms_norm(x, &self.norm, self.config.norm_epsilon));
        Logits::new(values(logits), self.config.vocabulary)
    }

    fn close(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }
}

/// What reading a layer needs.
struct Loading<'a> {
    config: &'a Config,
    source: &'a Source,
    device: Device,
    threads: usize,
}

impl Loading<'_> {
    fn rows(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        self.source.rows(self.config, name, shape)
    }
    fn vector(&self, name: &str, width: usize) -> Result<Tensor<1>, Error> {
        Ok(tensor(self.rows(name, &[width])?, [width], &self.device))
    }
    fn linear_of(&self, rows: &[f32], outputs: usize, inputs: usize) -> Linear {
        Linear::new(rows, outputs, inputs, self.threads, &self.device)
    }
    /// Reads projections with the same input as one: their outputs follow each other.
    fn linear(&self, projections: &[(&str, usize)], inputs: usize) -> Result<Linear, Error> {
        let (mut rows, mut total) = (Vec::new(), 0);
        for (name, outputs) in projections {
            rows.extend(self.rows(&format!("{name}.weight"), &[*outputs, inputs])?);
            total += outputs;
        }
        Ok(self.linear_of(&rows, total, inputs))
    }
    fn biases(&self, projections: &[(&str, usize)]) -> Result<Vec<f32>, Error> {
        let mut biases = Vec::new();
        for (name, outputs) in projections {
            biases.extend(self.rows(&format!("{name}.bias"), &[*outputs])?);
        }
        Ok(biases)
    }
    fn layer(&self, index: usize) -> Result<Layer, Error> {
        let c = self.config;
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (q, k, v) = (name("self_attn.q_proj"), name("self_attn.k_proj"), name("self_attn.v_proj"));
        let (q_width, kv_width) = (c.heads * c.head_dim(), c.kv_heads() * c.head_dim());
        let projections = [(&q[..], q_width), (&k[..], kv_width), (&v[..], kv_width)];
        let mut qkv = self.linear(&projections, c.hidden)?;
        if c.qkv_bias() {
            qkv = qkv.with_bias(self.biases(&projections)?, &self.device);
        }
        let head_norm = |part: &str| c.qk_norm().then(|| self.vector(&name(part), c.head_dim())).transpose();
        let (gate, up) = (name("mlp.gate_proj"), name("mlp.up_proj"));
        Ok(Layer {
            attention_norm: self.vector(&name("input_layernorm.weight"), c.hidden)?,
            qkv,
            q_norm: head_norm("self_attn.q_norm.weight")?,
            k_norm: head_norm("self_attn.k_norm.weight")?,
            output: self.linear(&[(&name("self_attn.o_proj"), c.hidden)], q_width)?,
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), c.hidden)?,
            gate_up: self.linear(&[(&gate, c.intermediate), (&up, c.intermediate)], c.hidden)?,
            down: self.linear(&[(&name("mlp.down_proj"), c.hidden)], c.intermediate)?,
        })
    }
}
