//! The kernels as operations of Burn's Flex backend.
//!
//! Tensors come in as they are and are read where they lie. Caches are moved in, changed in place, and moved out again:
//! a second owner would make the backend copy them. Weights are ours: packed once at load, for these kernels alone.
#![allow(unsafe_code, reason = "kernels use the processor's own instructions, and threads write parts of one result")]

pub mod attention;
pub mod isa;
pub mod linear;
pub mod memory;
pub mod pack;
pub mod pool;
pub mod rows;

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use burn_flex::{FlexTensor, Layout};
use half::f16;

use super::{CacheFormat, Grouped, HeadNorms, Latent};
use attention::{GroupedInput, Span, Stored};
use isa::{Isa, dispatch};
use linear::Epilogue;
use memory::room;
use pack::Packed;

/// The weights and the bias of a linear layer.
#[derive(Debug)]
pub struct Layer {
    pub weights: Packed,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
    /// Integers that an activation is the sum of, where weights are integers: one of 8 bits, or two.
    pub terms: usize,
}

/// Where the rows of a step stand, and how far they are turned.
#[derive(Debug)]
pub struct Step {
    pub spans: Vec<Span>,
    /// `[rows, pairs]`.
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

/// What grouped-query attention needs besides tensors.
#[derive(Debug, Clone)]
pub struct GroupedCall {
    isa: Isa,
    shape: Grouped,
    norms: Option<HeadNorms>,
    step: Arc<Step>,
}

/// What latent attention needs besides tensors.
#[derive(Debug, Clone)]
pub struct LatentCall {
    isa: Isa,
    shape: Latent,
    step: Arc<Step>,
}

/// What rotation needs besides its tensor.
#[derive(Debug, Clone)]
pub struct RotateCall {
    isa: Isa,
    neighbours: bool,
    step: Arc<Step>,
}

/// Operations that Burn's backend gains.
#[backend_extension(Flex)]
pub trait Kernels: Backend {
    fn packed_linear(x: FloatTensor<Self>, isa: Isa, layer: Arc<Layer>) -> FloatTensor<Self>;
    fn packed_linear_onto(
        x: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        isa: Isa,
        layer: Arc<Layer>,
    ) -> FloatTensor<Self>;
    fn norm_rows(x: FloatTensor<Self>, weight: FloatTensor<Self>, isa: Isa, epsilon: f32) -> FloatTensor<Self>;
    fn gate_rows(gate_up: FloatTensor<Self>, isa: Isa) -> FloatTensor<Self>;
    fn rotate_rows(x: FloatTensor<Self>, call: RotateCall) -> FloatTensor<Self>;
    fn paged_grouped(
        qkv: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        call: GroupedCall,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn paged_latent(
        queries: FloatTensor<Self>,
        new: FloatTensor<Self>,
        cache: FloatTensor<Self>,
        call: LatentCall,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Copies blocks of `size` numbers, `(from, to)`; without a source, fills with zeros.
    fn move_blocks(cache: FloatTensor<Self>, size: usize, moves: Vec<(Option<u32>, u32)>) -> FloatTensor<Self>;
}

pub fn linear(isa: Isa, x: Tensor<2>, residual: Option<Tensor<2>>, layer: &Arc<Layer>) -> Tensor<2> {
    let x = x.into_dispatch();
    Tensor::from_dispatch(match residual {
        Some(residual) => Dispatch::packed_linear_onto(x, residual.into_dispatch(), isa, layer.clone()),
        None => Dispatch::packed_linear(x, isa, layer.clone()),
    })
}

pub fn rms_norm(isa: Isa, x: Tensor<2>, weight: &Tensor<1>, epsilon: f32) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::norm_rows(x.into_dispatch(), weight.clone().into_dispatch(), isa, epsilon))
}

pub fn swiglu(isa: Isa, gate_up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gate_rows(gate_up.into_dispatch(), isa))
}

pub fn rotate(isa: Isa, x: Tensor<3>, step: &Arc<Step>, neighbours: bool) -> Tensor<3> {
    let call = RotateCall { isa, neighbours, step: step.clone() };
    Tensor::from_dispatch(Dispatch::rotate_rows(x.into_dispatch(), call))
}

pub fn grouped(
    isa: Isa,
    shape: Grouped,
    norms: Option<&HeadNorms>,
    qkv: Tensor<2>,
    cache: &mut Cache,
    step: &Arc<Step>,
) -> Tensor<2> {
    let call = GroupedCall { isa, shape, norms: norms.cloned(), step: step.clone() };
    let values = cache.values.take().expect("the cache is back between operations");
    let keys = cache.keys.take().expect("the cache is back between operations");
    let (out, keys, values) =
        Dispatch::paged_grouped(qkv.into_dispatch(), keys.into_dispatch(), values.into_dispatch(), call);
    cache.keys = Some(Tensor::from_dispatch(keys));
    cache.values = Some(Tensor::from_dispatch(values));
    Tensor::from_dispatch(out)
}

pub fn latent(
    isa: Isa,
    shape: Latent,
    queries: Tensor<3>,
    new: Tensor<2>,
    cache: &mut Cache,
    step: &Arc<Step>,
) -> Tensor<3> {
    let call = LatentCall { isa, shape, step: step.clone() };
    let keys = cache.keys.take().expect("the cache is back between operations");
    let (out, keys) = Dispatch::paged_latent(queries.into_dispatch(), new.into_dispatch(), keys.into_dispatch(), call);
    cache.keys = Some(Tensor::from_dispatch(keys));
    Tensor::from_dispatch(out)
}

/// A layer's keys and values. They are away only while an operation changes them.
#[derive(Debug)]
pub struct Cache {
    keys: Option<Tensor<1>>,
    values: Option<Tensor<1>>,
    /// Numbers of a block.
    sizes: (usize, usize),
}

impl Cache {
    pub fn grouped(shape: Grouped, format: CacheFormat, blocks: usize, device: &Device) -> Self {
        let sizes = shape.block();
        let pool = |size: usize| Some(zeros(format, size * blocks, device));
        Self { keys: pool(sizes.0), values: pool(sizes.1), sizes }
    }
    pub fn latent(shape: Latent, format: CacheFormat, blocks: usize, device: &Device) -> Self {
        let size = shape.block();
        Self { keys: Some(zeros(format, size * blocks, device)), values: None, sizes: (size, 0) }
    }
    pub fn clear(&mut self, blocks: &[u32]) {
        self.change(blocks.iter().map(|to| (None, *to)).collect());
    }
    pub fn copy(&mut self, blocks: &[(u32, u32)]) {
        self.change(blocks.iter().map(|(from, to)| (Some(*from), *to)).collect());
    }
    fn change(&mut self, moves: Vec<(Option<u32>, u32)>) {
        for (pool, size) in [(&mut self.keys, self.sizes.0), (&mut self.values, self.sizes.1)] {
            *pool = pool
                .take()
                .map(|pool| Tensor::from_dispatch(Dispatch::move_blocks(pool.into_dispatch(), size, moves.clone())));
        }
    }
}

/// A tensor of zeros in memory of its own.
fn zeros(format: CacheFormat, count: usize, device: &Device) -> Tensor<1> {
    let (bytes, dtype) = match format {
        CacheFormat::F16 => (Bytes::from_elems(memory::zeros::<f16>(count)), DType::F16),
        CacheFormat::F32 => (Bytes::from_elems(memory::zeros::<f32>(count)), DType::F32),
    };
    Tensor::from_data(TensorData::from_bytes(bytes, [count], dtype), (device, dtype))
}

/// A tensor's numbers, which lie side by side.
fn slice(x: &FlexTensor) -> &[f32] {
    x.as_slice::<f32>().expect("activations are f32 and contiguous")
}

/// A tensor whose numbers lie side by side.
fn whole(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// An operand that is done with: its memory serves the next results, if nobody else holds it.
fn done(x: FlexTensor) {
    let data = x.data_arc();
    drop(x);
    if let Some(values) = Arc::into_inner(data).and_then(|bytes| bytes.try_into_vec().ok()) {
        memory::spare(values);
    }
}

fn made(values: Vec<f32>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(shape)), DType::F32)
}

fn product(x: FlexTensor, residual: Option<FlexTensor>, isa: Isa, layer: &Layer) -> FlexTensor {
    let (x, residual) = (whole(x), residual.map(whole));
    let rows = x.layout().shape()[0];
    let mut out = room(rows * layer.weights.outputs());
    let epilogue = Epilogue { bias: layer.bias.as_deref(), residual: residual.as_ref().map(slice) };
    linear::linear(isa, slice(&x), &layer.weights, layer.terms, epilogue, &mut out);
    std::iter::once(x).chain(residual).for_each(done);
    made(out, vec![rows, layer.weights.outputs()])
}

impl Kernels for Flex {
    fn packed_linear(x: FlexTensor, isa: Isa, layer: Arc<Layer>) -> FlexTensor {
        product(x, None, isa, &layer)
    }
    fn packed_linear_onto(x: FlexTensor, residual: FlexTensor, isa: Isa, layer: Arc<Layer>) -> FlexTensor {
        product(x, Some(residual), isa, &layer)
    }
    fn norm_rows(x: FlexTensor, weight: FlexTensor, isa: Isa, epsilon: f32) -> FlexTensor {
        let (x, weight) = (whole(x), whole(weight));
        let shape = x.layout().shape().to_vec();
        let mut out = room(slice(&x).len());
        rows::rms_norm(isa, slice(&x), slice(&weight), epsilon, &mut out);
        done(x);
        made(out, shape)
    }
    fn gate_rows(gate_up: FlexTensor, isa: Isa) -> FlexTensor {
        let gate_up = whole(gate_up);
        let (rows, width) = (gate_up.layout().shape()[0], gate_up.layout().shape()[1] / 2);
        let mut out = room(rows * width);
        rows::swiglu(isa, slice(&gate_up), width, &mut out);
        done(gate_up);
        made(out, vec![rows, width])
    }
    fn rotate_rows(x: FlexTensor, call: RotateCall) -> FlexTensor {
        let x = x.to_contiguous();
        let shape = x.layout().shape().to_vec();
        let (heads, dim) = (shape[1], shape[2]);
        let mut out = slice(&x).to_vec();
        for (row, out) in out.chunks_exact_mut(heads * dim).enumerate() {
            let at = row * dim / 2..(row + 1) * dim / 2;
            let (cos, sin) = (&call.step.cos[at.clone()], &call.step.sin[at]);
            dispatch!(call.isa, _simd => for head in out.chunks_exact_mut(dim) {
                rows::rotate(head, cos, sin, call.neighbours);
            });
        }
        made(out, shape)
    }
    fn paged_grouped(
        qkv: FlexTensor,
        mut keys: FlexTensor,
        mut values: FlexTensor,
        call: GroupedCall,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let qkv = whole(qkv);
        let rows = qkv.layout().shape()[0];
        let width = call.shape.heads * call.shape.dim;
        let mut out = room(rows * width);
        let GroupedCall { isa, shape, norms, step } = call;
        let norms = norms.as_ref().map(|n| (&n.q[..], &n.k[..], n.epsilon));
        let input = GroupedInput { qkv: slice(&qkv), norms, cos: &step.cos, sin: &step.sin, spans: &step.spans };
        assert!(keys.is_unique() && values.is_unique(), "a cache has one owner");
        match keys.dtype() {
            DType::F16 => {
                let (keys, values) = (keys.storage_mut::<f16>(), values.storage_mut::<f16>());
                attention::grouped(isa, shape, input, keys, values, &mut out);
            }
            _ => {
                let (keys, values) = (keys.storage_mut::<f32>(), values.storage_mut::<f32>());
                attention::grouped(isa, shape, input, keys, values, &mut out);
            }
        }
        done(qkv);
        (made(out, vec![rows, width]), keys, values)
    }
    fn paged_latent(
        queries: FlexTensor,
        new: FlexTensor,
        mut cache: FlexTensor,
        call: LatentCall,
    ) -> (FlexTensor, FlexTensor) {
        let (queries, new) = (whole(queries), whole(new));
        let LatentCall { isa, shape, step } = call;
        let rows = new.layout().shape()[0];
        let mut out = room(rows * shape.heads * shape.rank);
        assert!(cache.is_unique(), "a cache has one owner");
        let (q, n) = (slice(&queries), slice(&new));
        match cache.dtype() {
            DType::F16 => {
                attention::latent(isa, shape, q, n, &step.spans, cache.storage_mut::<f16>(), &mut out);
            }
            _ => attention::latent(isa, shape, q, n, &step.spans, cache.storage_mut::<f32>(), &mut out),
        }
        [queries, new].into_iter().for_each(done);
        (made(out, vec![rows, shape.heads, shape.rank]), cache)
    }
    fn move_blocks(mut cache: FlexTensor, size: usize, moves: Vec<(Option<u32>, u32)>) -> FlexTensor {
        assert!(cache.is_unique(), "a cache has one owner");
        match cache.dtype() {
            DType::F16 => move_all(cache.storage_mut::<f16>(), size, &moves),
            _ => move_all(cache.storage_mut::<f32>(), size, &moves),
        }
        cache
    }
}

fn move_all<T: Stored>(cache: &mut [T], size: usize, moves: &[(Option<u32>, u32)]) {
    for (from, to) in moves {
        let to = *to as usize * size;
        match from {
            Some(from) => cache.copy_within(*from as usize * size..(*from as usize + 1) * size, to),
            None => cache[to..to + size].fill(T::ZERO),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::isa::Isa;

    /// The instruction sets that this processor has.
    pub fn isas() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }
    /// Numbers without a pattern, the same at each call.
    pub fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }
    pub fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            assert!((a - b).abs() < 1e-5, "element {i}: {a} and {b}");
        }
    }
}
