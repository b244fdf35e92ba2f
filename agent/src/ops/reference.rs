//! Reference operations: each in the plainest form that Burn's tensors allow, f32.
//!
//! Rows are tokens of a ragged step; a row's result depends on that row and, in attention, on its own sequence's cache.
//! One concession to speed: on a CPU a [`Linear`] keeps its weights in blocks of outputs, one stack of blocks per thread,
//! because Flex multiplies few rows on one thread. Sums are never cut.

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation, s};
use rayon::prelude::*;

use super::cpu::attention::Span;
use super::{CacheFormat, Grouped, HeadNorms, Latent, TOKENS};

/// Makes a tensor of f32 values.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Reads a tensor back.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("our tensors are f32")
}

/// How a layer's weights lie.
#[derive(Debug, Clone, Copy)]
pub struct Stacks {
    /// Stacks at most.
    count: usize,
    /// Outputs of a block; none: all.
    block: Option<usize>,
}

impl Stacks {
    /// In blocks, one stack of them for each thread of a CPU.
    pub fn of_threads(threads: usize) -> Self {
        Self { count: threads, block: Some(BLOCK) }
    }
    /// As one matrix.
    pub fn one() -> Self {
        Self { count: 1, block: None }
    }
}

/// A linear layer, `y = x W + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Blocks of outputs, each `[inputs, block]`; stacked, and cut into stacks.
    stacks: Vec<Tensor<3>>,
    /// Outputs of a block.
    block: usize,
    outputs: usize,
    /// `[1, outputs]`.
    bias: Option<Tensor<2>>,
}

/// Outputs in a block: what Flex's product computes at once. Blocks one after the other are read from memory in
/// sequence; a whole `[inputs, outputs]` matrix is read in strides, six times slower at 8 rows (Zen 3, 49152 outputs).
const BLOCK: usize = 16;

/// Smallest stack in weights: below it, waking a thread costs more than the product saves.
const STACK_WEIGHTS: usize = 64 << 10;

impl Linear {
    /// Takes weights as checkpoints store them, `[outputs, inputs]` row-major.
    pub fn new(rows: &[f32], outputs: usize, inputs: usize, shape: Stacks, device: &Device) -> Self {
        assert_eq!(rows.len(), outputs * inputs, "weights fill their shape");
        let block = shape.block.unwrap_or(outputs);
        let blocks = outputs.div_ceil(block);
        let count = shape.count.min(rows.len() / STACK_WEIGHTS).clamp(1, blocks);
        let stack = |range: Range<usize>| {
            let end = (range.end * block).min(outputs);
            let values = interleave(&rows[range.start * block * inputs..end * inputs], inputs, block);
            tensor(values, [range.len(), inputs, block], device)
        };
        let stacks = (0..count).map(|i| stack(i * blocks / count..(i + 1) * blocks / count)).collect();
        Self { stacks, block, outputs, bias: None }
    }
    /// Adds a bias, `[outputs]`.
    pub fn with_bias(mut self, bias: Vec<f32>, device: &Device) -> Self {
        assert_eq!(bias.len(), self.outputs, "a bias for each output");
        self.bias = Some(tensor(bias, [1, self.outputs], device));
        self
    }
    /// Memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.stacks.iter().map(|stack| stack.shape().num_elements() * 4).sum()
    }
    /// Multiplies. `x`: `[rows, inputs]`. Returns `[rows, outputs]`.
    ///
    /// A single row is computed as two: Flex multiplies one row by another method, which rounds differently.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, inputs] = x.dims();
        let x = if rows == 1 { x.expand([2, inputs]) } else { x };
        let x = x.unsqueeze::<3>();
        let y = match &self.stacks[..] {
            [only] => x.matmul(only.clone()),
            stacks => Tensor::cat(stacks.par_iter().map(|stack| x.clone().matmul(stack.clone())).collect(), 0),
        };
        let padded = y.dims()[0] * self.block;
        let y = y.slice(s![.., 0..rows, ..]).swap_dims(0, 1).reshape([rows, padded]);
        let y = if padded == self.outputs { y } else { y.slice(s![.., 0..self.outputs]) };
        match &self.bias {
            Some(bias) => y + bias.clone(),
            None => y,
        }
    }
}

/// Turns rows `[outputs, inputs]` into blocks `[outputs / block, inputs, block]`, the last one filled up with zeros.
fn interleave(rows: &[f32], inputs: usize, block: usize) -> Vec<f32> {
    let blocks = rows.len().div_ceil(block * inputs);
    let mut out = vec![0.0; blocks * block * inputs];
    let pairs = out.par_chunks_exact_mut(block * inputs).zip(rows.par_chunks(block * inputs));
    pairs.for_each(|(out, rows)| {
        for (lane, row) in rows.chunks_exact(inputs).enumerate() {
            out.iter_mut().skip(lane).step_by(block).zip(row).for_each(|(to, from)| *to = *from);
        }
    });
    out
}

/// Makes a tensor of indices. Each must fit 31 bits.
pub fn indices(indices: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let indices: Vec<i32> = indices.map(|i| i32::try_from(i).expect("an index fits 31 bits")).collect();
    let count = indices.len();
    Tensor::from_data(TensorData::new(indices, [count]), (device, DType::I32))
}

/// Scales each row to a root mean square of one, then by `weight`.
///
/// `x`: `[…, width]`, `weight`: `[width]`. Source: Zhang and Sennrich 2019; epsilon inside the root.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: &Tensor<1>, epsilon: f32) -> Tensor<D> {
    let mean = (x.clone() * x.clone()).mean_dim(D - 1);
    x * mean.add_scalar(epsilon).sqrt().recip() * weight.clone().unsqueeze::<D>()
}

/// The gated activation of feed-forward blocks. `gate_up`: `[rows, 2 * width]`. Returns `silu(gate) * up`.
pub fn swiglu(gate_up: Tensor<2>) -> Tensor<2> {
    let width = gate_up.dims()[1] / 2;
    let gate = gate_up.clone().slice(s![.., 0..width]);
    let up = gate_up.slice(s![.., width..2 * width]);
    activation::silu(gate) * up
}

/// Cosines and sines of the positions of a step's rows, each `[rows, 1, pairs]`.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rotation {
    pub fn new(cos: Tensor<3>, sin: Tensor<3>) -> Self {
        Self { cos, sin }
    }
    /// Turns pairs of every head: (i, i + half), or (2 i, 2 i + 1) if `neighbours`. `x`: `[rows, heads, dim]`.
    ///
    /// Source: Su et al. 2021; halves in the order of Hugging Face checkpoints.
    pub fn apply(&self, x: Tensor<3>, neighbours: bool) -> Tensor<3> {
        let [rows, heads, dim] = x.dims();
        let half = dim / 2;
        let (a, b) = if neighbours {
            let pairs = x.reshape([rows, heads, half, 2]);
            let side = |i: usize| pairs.clone().slice(s![.., .., .., i..i + 1]).reshape([rows, heads, half]);
            (side(0), side(1))
        } else {
            (x.clone().slice(s![.., .., 0..half]), x.slice(s![.., .., half..dim]))
        };
        let first = a.clone() * self.cos.clone() - b.clone() * self.sin.clone();
        let second = b * self.cos.clone() + a * self.sin.clone();
        if neighbours {
            let pairs = [first, second].map(|x| x.reshape([rows, heads, half, 1]));
            Tensor::cat(pairs.into(), 3).reshape([rows, heads, dim])
        } else {
            Tensor::cat(vec![first, second], 2)
        }
    }
}

/// Keys and values of a layer, each `[blocks * TOKENS, heads, dim]`; with latent attention there are no values.
///
/// They are moved out, changed in place and moved back: a second owner would force a copy of the whole.
#[derive(Debug)]
pub struct Cache {
    keys: Option<Tensor<3>>,
    values: Option<Tensor<3>>,
    format: CacheFormat,
}

impl Cache {
    /// Makes an empty cache. `keys`, `values`: heads and numbers of a head.
    pub fn new(
        format: CacheFormat,
        blocks: usize,
        keys: [usize; 2],
        values: Option<[usize; 2]>,
        device: &Device,
    ) -> Self {
        let pool = |[heads, dim]: [usize; 2]| Tensor::zeros([blocks * TOKENS, heads, dim], (device, DType::F32));
        Self { keys: Some(pool(keys)), values: values.map(pool), format }
    }
    pub fn clear(&mut self, blocks: &[u32]) {
        for pool in [&mut self.keys, &mut self.values] {
            *pool = pool.take().map(|pool| {
                let [_, heads, dim] = pool.dims();
                let zeros = Tensor::zeros([TOKENS, heads, dim], (&pool.device(), pool.dtype()));
                blocks.iter().fold(pool, |pool, block| pool.slice_assign(s![of(*block), .., ..], zeros.clone()))
            });
        }
    }
    pub fn copy(&mut self, blocks: &[(u32, u32)]) {
        for pool in [&mut self.keys, &mut self.values] {
            *pool = pool.take().map(|pool| {
                blocks.iter().fold(pool, |pool, (from, to)| {
                    let block = pool.clone().slice(s![of(*from), .., ..]);
                    pool.slice_assign(s![of(*to), .., ..], block)
                })
            });
        }
    }

    /// Stores the rows of a span and reads back all that the sequence has. `k`, `v`: `[rows, heads, dim]`.
    fn extend(&mut self, span: &Span, k: Tensor<3>, v: Option<Tensor<3>>) -> (Tensor<3>, Option<Tensor<3>>) {
        let format = self.format;
        let pools = [(&mut self.keys, Some(k)), (&mut self.values, v)];
        let [keys, values] = pools.map(|(pool, new)| {
            let changed = pool.take().zip(new).map(|(pool, new)| stored(pool, span, new, format));
            *pool = changed;
            pool.as_ref().map(|pool| gathered(pool, span))
        });
        (keys.expect("there are keys"), values)
    }
}

fn of(block: u32) -> Range<usize> {
    block as usize * TOKENS..(block as usize + 1) * TOKENS
}

/// Writes a span's new rows into their slots, rounded as the cache keeps them.
fn stored(pool: Tensor<3>, span: &Span, new: Tensor<3>, format: CacheFormat) -> Tensor<3> {
    let new = match format {
        CacheFormat::F16 => new.cast(DType::F16).cast(DType::F32),
        CacheFormat::F32 => new,
    };
    let (mut pool, mut done) = (pool, 0);
    while done < span.rows.len() {
        let position = span.start + done;
        let count = (TOKENS - position % TOKENS).min(span.rows.len() - done);
        let slot = span.blocks[position / TOKENS] as usize * TOKENS + position % TOKENS;
        let rows = new.clone().slice(s![done..done + count, .., ..]);
        pool = pool.slice_assign(s![slot..slot + count, .., ..], rows);
        done += count;
    }
    pool
}

/// Reads a sequence's rows in the order of their positions.
fn gathered(pool: &Tensor<3>, span: &Span) -> Tensor<3> {
    let context = span.start + span.rows.len();
    let slot = |position: usize| span.blocks[position / TOKENS] as usize * TOKENS + position % TOKENS;
    pool.clone().select(0, indices((0..context).map(slot), &pool.device()))
}

/// Which keys each query may not see: those after its own position. `[1, group * rows, context]`.
///
/// `None` for a single row, which sees all.
fn causal_mask(span: &Span, group: usize, device: &Device) -> Option<Tensor<3, Bool>> {
    let rows = span.rows.len();
    if rows == 1 {
        return None;
    }
    let context = span.start + rows;
    let row = |query: usize| (0..context).map(move |key| key > span.start + query);
    let hidden: Vec<bool> = (0..group).flat_map(|_| (0..rows).flat_map(row)).collect();
    Some(Tensor::from_data(TensorData::new(hidden, [1, group * rows, context]), device))
}

/// Softmax attention of scaled queries. `q`: `[kv_heads, group * rows, dim]`; `keys`, `values`: `[context, kv_heads, dim]`.
fn mixed(q: Tensor<3>, keys: Tensor<3>, values: Tensor<3>, mask: Option<Tensor<3, Bool>>) -> Tensor<3> {
    let kv_heads = q.dims()[0];
    let scores = q.matmul(keys.permute([1, 2, 0]));
    let scores = match mask {
        Some(mask) => {
            let [_, rows, context] = mask.dims();
            scores.mask_fill(mask.expand([kv_heads, rows, context]), f32::NEG_INFINITY)
        }
        None => scores,
    };
    activation::softmax(scores, 2).matmul(values.swap_dims(0, 1))
}

/// See [`super::Ops::attend`]. The heads that share keys become rows of one product.
pub fn grouped(
    shape: Grouped,
    norms: Option<&HeadNorms>,
    qkv: Tensor<2>,
    cache: &mut Cache,
    spans: &[Span],
    rotation: &Rotation,
) -> Tensor<2> {
    let Grouped { heads, kv_heads, dim, scale } = shape;
    let (rows, device) = (qkv.dims()[0], qkv.device());
    let qkv = qkv.reshape([rows, heads + 2 * kv_heads, dim]);
    let normed = |x: Tensor<3>, pick: fn(&HeadNorms) -> &Vec<f32>| match norms {
        Some(norms) => rms_norm(x, &tensor(pick(norms).clone(), [dim], &device), norms.epsilon),
        None => x,
    };
    let q = normed(qkv.clone().slice(s![.., 0..heads, ..]), |n| &n.q);
    let k = normed(qkv.clone().slice(s![.., heads..heads + kv_heads, ..]), |n| &n.k);
    let v = qkv.slice(s![.., heads + kv_heads.., ..]);
    let q = rotation.apply(q, false).mul_scalar(scale);
    let k = rotation.apply(k, false);
    let one = |span: &Span| {
        let take = |x: &Tensor<3>| x.clone().slice(s![span.rows.clone(), .., ..]);
        let (rows, group) = (span.rows.len(), heads / kv_heads);
        let (keys, values) = cache.extend(span, take(&k), Some(take(&v)));
        let q = take(&q).swap_dims(0, 1).reshape([kv_heads, group * rows, dim]);
        let out = mixed(q, keys, values.expect("there are values"), causal_mask(span, group, &device));
        out.reshape([heads, rows, dim]).swap_dims(0, 1).reshape([rows, heads * dim])
    };
    Tensor::cat(spans.iter().map(one).collect(), 0)
}

/// See [`super::Ops::attend_latent`]: all heads share one key, whose first numbers are the value.
pub fn latent(shape: Latent, queries: Tensor<3>, new: Tensor<2>, cache: &mut Cache, spans: &[Span]) -> Tensor<3> {
    let Latent { heads, width, rank, scale } = shape;
    let device = queries.device();
    let queries = queries.mul_scalar(scale);
    let one = |span: &Span| {
        let rows = span.rows.len();
        let new = new.clone().slice(s![span.rows.clone(), ..]).reshape([rows, 1, width]);
        let (keys, _) = cache.extend(span, new, None);
        let values = keys.clone().slice(s![.., .., 0..rank]);
        let q = queries.clone().slice(s![span.rows.clone(), .., ..]).swap_dims(0, 1).reshape([1, heads * rows, width]);
        let out = mixed(q, keys, values, causal_mask(span, heads, &device));
        out.reshape([heads, rows, rank]).swap_dims(0, 1)
    };
    Tensor::cat(spans.iter().map(one).collect(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern, the same at each call.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }
    fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            assert!((a - b).abs() < 1e-5, "element {i}: {a} and {b}");
        }
    }

    #[test]
    fn a_linear_layer_is_the_same_in_stacks() {
        let device = Device::flex();
        let (outputs, inputs) = (1031, 257);
        let (rows, x) = (numbers(outputs * inputs, 1), numbers(3 * inputs, 2));
        let expected: Vec<f32> = x
            .chunks(inputs)
            .flat_map(|x| rows.chunks(inputs).map(move |row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>()))
            .collect();
        for (shape, stacks) in [(Stacks::of_threads(1), 1), (Stacks::of_threads(3), 3), (Stacks::one(), 1)] {
            let linear = Linear::new(&rows, outputs, inputs, shape, &device);
            assert_eq!(linear.stacks.len(), stacks);
            let y = values(linear.forward(tensor(x.clone(), [3, inputs], &device)));
            assert_eq!(y.len(), expected.len());
            y.iter().zip(&expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-3, "{a} {b}"));
            let alone = values(linear.forward(tensor(x[inputs..2 * inputs].to_vec(), [1, inputs], &device)));
            assert_eq!(alone, y[outputs..2 * outputs], "a row is the same alone");
        }
    }

    #[test]
    fn a_bias_is_added_to_every_row() {
        let device = Device::flex();
        let linear = Linear::new(&[1.0, 2.0], 2, 1, Stacks::one(), &device).with_bias(vec![10.0, 20.0], &device);
        let y = linear.forward(tensor(vec![1.0, 3.0], [2, 1], &device));
        assert_eq!(values(y), [11.0, 22.0, 13.0, 26.0]);
    }

    #[test]
    fn normalized_rows_have_a_root_mean_square_of_the_weight() {
        let device = Device::flex();
        let y = rms_norm(tensor(vec![3.0, 4.0], [1, 2], &device), &tensor(vec![1.0, 2.0], [2], &device), 0.0);
        let rms = 12.5_f32.sqrt();
        close(&values(y), &[3.0 / rms, 8.0 / rms]);
    }
}
