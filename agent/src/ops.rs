//! Operations that models are written against.
//!
//! [`Ops`] says how a model computes: with the kernels of `cpu`, which are extensions of Burn's Flex backend, or with
//! `reference`, plain Burn operations on any device: the oracle of the tests, and the path for training. A model holds
//! [`Linear`] layers and one [`Cache`] a layer, and passes Burn tensors from one operation to the next; it never asks
//! which path it is on.

pub mod cpu;
pub mod cuda;
pub mod probe;
pub mod reference;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use cpu::attention::Span;
pub use cpu::attention::{Grouped, Latent, TOKENS};
use cpu::isa::Isa;
use cpu::pack::Packed;
pub use cpu::pack::{Format, Row};
pub use reference::{tensor, values};

/// Counts changes of the kernels that change bits: part of what names the numerics of an answer.
pub const KERNELS: u32 = 3;

/// Which operations compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Burn's own operations, f32.
    Reference,
    /// Kernels of ours, on the CPU.
    Kernels(Isa),
}

/// How numbers are kept in the cache of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheFormat {
    F16,
    F32,
}

impl CacheFormat {
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// The operations of a path on a device.
#[derive(Debug, Clone)]
pub struct Ops {
    path: Path,
    device: Device,
}

impl Ops {
    /// The CPU, by either path.
    pub fn cpu(path: Path) -> Self {
        Self { path, device: Device::flex() }
    }
    /// A card, where the reference operations compute.
    pub fn cuda(index: u16) -> Result<Self, cuda::Error> {
        Ok(Self { path: Path::Reference, device: cuda::open(index)? })
    }
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        tensor(values, shape, &self.device)
    }

    /// Makes a linear layer of the weights that `row` gives for each output.
    pub fn linear<'a>(
        &self,
        format: Format,
        outputs: usize,
        inputs: usize,
        row: impl Fn(usize) -> Row<'a> + Sync,
        bias: Option<Vec<f32>>,
        terms: usize,
    ) -> Linear {
        let packed = Packed::new(format, outputs, inputs, row);
        match self.path {
            Path::Kernels(isa) => Linear::Kernels { isa, layer: Arc::new(cpu::Layer { weights: packed, bias, terms }) },
            Path::Reference => {
                let shape = if self.device == Device::flex() {
                    reference::Stacks::of_threads(rayon::current_num_threads())
                } else {
                    reference::Stacks::one()
                };
                let linear = reference::Linear::new(&packed.unpacked(), outputs, inputs, shape, &self.device);
                let linear = match bias {
                    Some(bias) => linear.with_bias(bias, &self.device),
                    None => linear,
                };
                // What embeddings are looked up in, in the form that takes least.
                Linear::Reference { linear: Box::new(linear), rows: Arc::new(packed) }
            }
        }
    }

    /// Scales each row of `x`, `[rows, width]`, to a root mean square of one, then by `weight`, `[width]`.
    pub fn rms_norm(&self, x: Tensor<2>, weight: &Tensor<1>, epsilon: f32) -> Tensor<2> {
        match self.path {
            Path::Kernels(isa) => cpu::rms_norm(isa, x, weight, epsilon),
            Path::Reference => reference::rms_norm(x, weight, epsilon),
        }
    }

    /// The gated activation. `gate_up`: `[rows, 2 * width]`, gates first. Returns `silu(gate) * up`.
    pub fn swiglu(&self, gate_up: Tensor<2>) -> Tensor<2> {
        match self.path {
            Path::Kernels(isa) => cpu::swiglu(isa, gate_up),
            Path::Reference => reference::swiglu(gate_up),
        }
    }

    /// Makes the plan of a step: where each row stands, and how far it is turned.
    ///
    /// `frequencies`: radians per position, one for each pair; `magnitude`: what cosines and sines are multiplied by.
    pub fn plan(&self, spans: Vec<Span>, frequencies: &[f32], magnitude: f32) -> Plan {
        let positions = spans.iter().flat_map(|s| s.start..s.start + s.rows.len());
        let angles: Vec<f32> = positions.flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos() * magnitude).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin() * magnitude).collect();
        let shape = [angles.len() / frequencies.len().max(1), 1, frequencies.len()];
        let rotation = match self.path {
            Path::Reference => {
                let (cos, sin) = (self.tensor(cos.clone(), shape), self.tensor(sin.clone(), shape));
                Some(reference::Rotation::new(cos, sin))
            }
            Path::Kernels(_) => None,
        };
        Plan { step: Arc::new(cpu::Step { spans, cos, sin }), rotation }
    }

    /// Turns pairs of every row's last axis by the row's position. `x`: `[rows, heads, dim]`, the whole of which is
    /// turned; `neighbours`: pairs are (0,1), (2,3), …, otherwise halves.
    pub fn rotate(&self, x: Tensor<3>, plan: &Plan, neighbours: bool) -> Tensor<3> {
        match (&plan.rotation, self.path) {
            (Some(rotation), _) => rotation.apply(x, neighbours),
            (None, Path::Kernels(isa)) => cpu::rotate(isa, x, &plan.step, neighbours),
            (None, Path::Reference) => unreachable!("a plan of the reference path has a rotation"),
        }
    }

    /// Makes the empty cache of a layer with grouped-query attention.
    pub fn grouped_cache(&self, shape: Grouped, format: CacheFormat, blocks: usize) -> Cache {
        match self.path {
            Path::Kernels(_) => Cache::Kernels(cpu::Cache::grouped(shape, format, blocks, &self.device)),
            Path::Reference => {
                let heads = [shape.kv_heads, shape.dim];
                Cache::Reference(reference::Cache::new(format, blocks, heads, Some(heads), &self.device))
            }
        }
    }
    /// Makes the empty cache of a layer with latent attention.
    pub fn latent_cache(&self, shape: Latent, format: CacheFormat, blocks: usize) -> Cache {
        match self.path {
            Path::Kernels(_) => Cache::Kernels(cpu::Cache::latent(shape, format, blocks, &self.device)),
            Path::Reference => {
                Cache::Reference(reference::Cache::new(format, blocks, [1, shape.width], None, &self.device))
            }
        }
    }

    /// Grouped-query attention: norms heads (if there are `norms`), rotates queries and keys, stores keys and values, and
    /// attends each row to its own sequence as far as itself.
    ///
    /// `qkv`: `[rows, (heads + 2 kv_heads) dim]`. Returns `[rows, heads dim]`. Cost: O(rows * context) multiply-adds.
    pub fn attend(
        &self,
        shape: Grouped,
        norms: Option<&HeadNorms>,
        qkv: Tensor<2>,
        cache: &mut Cache,
        plan: &Plan,
    ) -> Tensor<2> {
        match (cache, self.path) {
            (Cache::Kernels(cache), Path::Kernels(isa)) => cpu::grouped(isa, shape, norms, qkv, cache, &plan.step),
            (Cache::Reference(cache), _) => {
                let rotation = plan.rotation.as_ref().expect("a plan of the reference path has a rotation");
                reference::grouped(shape, norms, qkv, cache, &plan.step.spans, rotation)
            }
            (Cache::Kernels(_), Path::Reference) => unreachable!("a model has caches of its own path"),
        }
    }

    /// Latent attention in its absorbed form: stores `new`, `[rows, width]`, and attends `queries`,
    /// `[rows, heads, width]`, to the stored rows, whose first `rank` numbers are the values. Everything is rotated
    /// already. Returns `[rows, heads, rank]`.
    pub fn attend_latent(
        &self,
        shape: Latent,
        queries: Tensor<3>,
        new: Tensor<2>,
        cache: &mut Cache,
        plan: &Plan,
    ) -> Tensor<3> {
        match (cache, self.path) {
            (Cache::Kernels(cache), Path::Kernels(isa)) => cpu::latent(isa, shape, queries, new, cache, &plan.step),
            (Cache::Reference(cache), _) => reference::latent(shape, queries, new, cache, &plan.step.spans),
            (Cache::Kernels(_), Path::Reference) => unreachable!("a model has caches of its own path"),
        }
    }
}

/// Norms of the heads' queries and keys, each `[dim]`.
#[derive(Debug, Clone)]
pub struct HeadNorms {
    pub q: Arc<Vec<f32>>,
    pub k: Arc<Vec<f32>>,
    pub epsilon: f32,
}

/// What all layers of a step share.
#[derive(Debug, Clone)]
pub struct Plan {
    step: Arc<cpu::Step>,
    /// On the reference path.
    rotation: Option<reference::Rotation>,
}

/// Makes the spans of a step; see [`Span`].
pub fn span(rows: Range<usize>, start: usize, blocks: Vec<u32>) -> Span {
    Span { rows, start, blocks }
}

/// The keys and values of a layer, in blocks.
#[derive(Debug)]
pub enum Cache {
    Kernels(cpu::Cache),
    Reference(reference::Cache),
}

impl Cache {
    /// Makes blocks as if they had never been written.
    pub fn clear(&mut self, blocks: &[u32]) {
        match self {
            Self::Kernels(cache) => cache.clear(blocks),
            Self::Reference(cache) => cache.clear(blocks),
        }
    }
    /// Copies whole blocks, each `(from, to)`.
    pub fn copy(&mut self, blocks: &[(u32, u32)]) {
        match self {
            Self::Kernels(cache) => cache.copy(blocks),
            Self::Reference(cache) => cache.copy(blocks),
        }
    }
}

/// A linear layer, `y = x W + b`.
#[derive(Debug, Clone)]
pub enum Linear {
    Kernels { isa: Isa, layer: Arc<cpu::Layer> },
    Reference { linear: Box<reference::Linear>, rows: Arc<Packed> },
}

impl Linear {
    /// Multiplies. `x`: `[rows, inputs]`. Returns `[rows, outputs]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Kernels { isa, layer } => cpu::linear(*isa, x, None, layer),
            Self::Reference { linear, .. } => linear.forward(x),
        }
    }
    /// Multiplies and adds to `residual`, `[rows, outputs]`.
    pub fn forward_onto(&self, x: Tensor<2>, residual: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Kernels { isa, layer } => cpu::linear(*isa, x, Some(residual), layer),
            Self::Reference { linear, .. } => linear.forward(x) + residual,
        }
    }
    /// Looks rows of the weights up: embeddings. Returns `[indices, inputs]`.
    pub fn embed(&self, ops: &Ops, indices: impl ExactSizeIterator<Item = usize>) -> Tensor<2> {
        let weights = match self {
            Self::Kernels { layer, .. } => &layer.weights,
            Self::Reference { rows, .. } => rows,
        };
        let (count, width) = (indices.len(), weights.inputs());
        let mut out = vec![0.0; count * width];
        indices.zip(out.chunks_exact_mut(width)).for_each(|(index, out)| weights.row(index, out));
        ops.tensor(out, [count, width])
    }
    /// Memory that the weights take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Kernels { layer, .. } => layer.weights.bytes(),
            Self::Reference { linear, .. } => linear.bytes(),
        }
    }
}

#[cfg(test)]
mod tests;
