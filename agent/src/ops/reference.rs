//! Reference operations: each in the plainest form that Burn's tensors allow, f32.
//!
//! Rows are tokens of a ragged step; a row's result depends on that row and, in attention, on its own sequence's cache.
//! One concession to speed: a [`Linear`] keeps its weights in blocks of outputs, one stack of blocks per thread,
//! because Flex multiplies few rows on one thread. Sums are never cut.

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation, s};
use rayon::prelude::*;

/// Makes a tensor of f32 values.
pub fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Reads a tensor back.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("our tensors are f32")
}

/// A linear layer, `y = x W + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Blocks of outputs, each `[inputs, BLOCK]`; stacked, and cut into one stack per thread.
    stacks: Vec<Tensor<3>>,
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
    /// Takes weights as checkpoints store them, `[outputs, inputs]` row-major, and cuts them for so many threads.
    pub fn new(rows: &[f32], outputs: usize, inputs: usize, threads: usize, device: &Device) -> Self {
        assert_eq!(rows.len(), outputs * inputs, "weights fill their shape");
        let blocks = outputs.div_ceil(BLOCK);
        let count = threads.min(rows.len() / STACK_WEIGHTS).clamp(1, blocks);
        let stack = |range: Range<usize>| {
            let end = (range.end * BLOCK).min(outputs);
            let values = interleave(&rows[range.start * BLOCK * inputs..end * inputs], inputs);
            tensor(values, [range.len(), inputs, BLOCK], device)
        };
        let stacks = (0..count).map(|i| stack(i * blocks / count..(i + 1) * blocks / count)).collect();
        Self { stacks, outputs, bias: None }
    }
    /// Adds a bias, `[outputs]`.
    pub fn with_bias(mut self, bias: Vec<f32>, device: &Device) -> Self {
        assert_eq!(bias.len(), self.outputs, "a bias for each output");
        self.bias = Some(tensor(bias, [1, self.outputs], device));
        self
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
        let padded = y.dims()[0] * BLOCK;
        let y = y.slice(s![.., 0..rows, ..]).swap_dims(0, 1).reshape([rows, padded]);
        let y = if padded == self.outputs { y } else { y.slice(s![.., 0..self.outputs]) };
        match &self.bias {
            Some(bias) => y + bias.clone(),
            None => y,
        }
    }
}

/// Turns rows `[outputs, inputs]` into blocks `[outputs / BLOCK, inputs, BLOCK]`, the last one filled up with zeros.
fn interleave(rows: &[f32], inputs: usize) -> Vec<f32> {
    let blocks = rows.len().div_ceil(BLOCK * inputs);
    let mut out = vec![0.0; blocks * BLOCK * inputs];
    let pairs = out.par_chunks_exact_mut(BLOCK * inputs).zip(rows.par_chunks(BLOCK * inputs));
    pairs.for_each(|(block, rows)| {
        for (lane, row) in rows.chunks_exact(inputs).enumerate() {
            block.iter_mut().skip(lane).step_by(BLOCK).zip(row).for_each(|(to, from)| *to = *from);
        }
    });
    out
}

/// Looks rows up. `table`: `[rows, width]`. Returns `[indices, width]`. Every index must lie in the table.
pub fn gather(table: &Tensor<2>, indices: impl Iterator<Item = usize>) -> Tensor<2> {
    let indices: Vec<i32> = indices.map(|i| i32::try_from(i).expect("an index fits 31 bits")).collect();
    let count = indices.len();
    let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), (&table.device(), DType::I32));
    table.clone().select(0, indices)
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

/// Cosines and sines of the positions of a step's tokens, each `[tokens, 1, head_dim / 2]`.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rotation {
    /// `frequencies`: radians per position, `[head_dim / 2]`.
    pub fn new(positions: &[usize], frequencies: &[f32], device: &Device) -> Self {
        let angles = || positions.iter().flat_map(|p| frequencies.iter().map(move |f| *p as f32 * f));
        let shape = [positions.len(), 1, frequencies.len()];
        let cos = tensor(angles().map(f32::cos).collect(), shape, device);
        let sin = tensor(angles().map(f32::sin).collect(), shape, device);
        Self { cos, sin }
    }
    /// Multiplies cosines and sines (YaRN).
    pub fn times(self, magnitude: f32) -> Self {
        if magnitude == 1.0 { self } else { Self { cos: self.cos * magnitude, sin: self.sin * magnitude } }
    }
    /// Turns pairs (i, i + head_dim / 2) of every head. `x`: `[tokens, heads, head_dim]`.
    ///
    /// Source: Su et al. 2021, in the half-split order of Hugging Face checkpoints.
    pub fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let half = x.dims()[2] / 2;
        let a = x.clone().slice(s![.., .., 0..half]);
        let b = x.slice(s![.., .., half..2 * half]);
        let first = a.clone() * self.cos.clone() - b.clone() * self.sin.clone();
        let second = b * self.cos.clone() + a * self.sin.clone();
        Tensor::cat(vec![first, second], 2)
    }
}

/// Positions by which a cache grows. Growing copies it, which is little beside the weights that the same number of
/// steps read; larger steps would leave most of the memory of short answers empty.
const CACHE_STEP: usize = 64;

/// Keys and values of one sequence in one layer, each `[kv_heads, capacity, head_dim]`.
///
/// They are moved out, changed in place and moved back: a second owner would force a copy of the whole.
#[derive(Debug, Default)]
pub struct Cache(Option<(Tensor<3>, Tensor<3>)>);

impl Cache {
    /// Writes new positions and returns views of all that are filled. `k`, `v`: `[kv_heads, tokens, head_dim]`.
    fn extend(&mut self, start: usize, k: Tensor<3>, v: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let end = start + k.dims()[1];
        let (keys, values) = match self.0.take() {
            Some((keys, values)) => (grown(keys, start, end), grown(values, start, end)),
            None => (room(&k, end), room(&v, end)),
        };
        // A second owner would make these copy the whole cache: nothing else holds it between steps.
        let keys = keys.slice_assign(s![.., start..end, ..], k);
        let values = values.slice_assign(s![.., start..end, ..], v);
        let views = (keys.clone().slice(s![.., 0..end, ..]), values.clone().slice(s![.., 0..end, ..]));
        self.0 = Some((keys, values));
        views
    }
}

/// Returns an empty cache for keys or values like these, with room for `end` positions.
fn room(like: &Tensor<3>, end: usize) -> Tensor<3> {
    let [heads, _, head_dim] = like.dims();
    Tensor::zeros([heads, end.next_multiple_of(CACHE_STEP), head_dim], (&like.device(), like.dtype()))
}

/// Returns a cache with room for `end` positions that holds the first `filled` ones of `cache`.
fn grown(cache: Tensor<3>, filled: usize, end: usize) -> Tensor<3> {
    if end <= cache.dims()[1] {
        return cache;
    }
    let all = s![.., 0..filled, ..];
    room(&cache, end).slice_assign(all, cache.slice(all))
}

/// Which keys each query may not see: those after its own position. `[1, group * tokens, context]`, for one chunk.
///
/// `None` for a single token, which sees all. Made once a step, used by every layer.
pub fn causal_mask(start: usize, tokens: usize, group: usize, device: &Device) -> Option<Tensor<3, Bool>> {
    if tokens == 1 {
        return None;
    }
    let context = start + tokens;
    let row = |query: usize| (0..context).map(move |key| key > start + query);
    let hidden: Vec<bool> = (0..group).flat_map(|_| (0..tokens).flat_map(row)).collect();
    Some(Tensor::from_data(TensorData::new(hidden, [1, group * tokens, context]), device))
}

/// Attends the queries of one chunk to the keys of its own sequence, new ones included, and extends the cache.
///
/// `q`: `[tokens, heads, head_dim]`, rotated; `k`, `v`: `[tokens, kv_heads, head_dim]`, keys rotated; `start`: how many
/// positions the cache held before. Returns `[tokens, heads * head_dim]`. Scores are divided by sqrt(head_dim). The
/// heads that share keys become rows of one product, so that nothing is repeated. Cost: O(tokens * context)
/// multiply-adds.
pub fn attend(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    cache: &mut Cache,
    start: usize,
    mask: &Option<Tensor<3, Bool>>,
) -> Tensor<2> {
    let [tokens, heads, head_dim] = q.dims();
    let kv_heads = k.dims()[1];
    let (keys, values) = cache.extend(start, k.swap_dims(0, 1), v.swap_dims(0, 1));
    let q = q.mul_scalar(1.0 / (head_dim as f32).sqrt());
    let q = q.swap_dims(0, 1).reshape([kv_heads, heads / kv_heads * tokens, head_dim]);
    let scores = q.matmul(keys.swap_dims(1, 2));
    let scores = match mask {
        Some(mask) => scores.mask_fill(mask.clone().expand(mask_shape(mask, kv_heads)), f32::NEG_INFINITY),
        None => scores,
    };
    let mixed = activation::softmax(scores, 2).matmul(values);
    mixed.reshape([heads, tokens, head_dim]).swap_dims(0, 1).reshape([tokens, heads * head_dim])
}

fn mask_shape(mask: &Tensor<3, Bool>, kv_heads: usize) -> [usize; 3] {
    let [_, rows, context] = mask.dims();
    [kv_heads, rows, context]
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
        for threads in [1, 3] {
            let linear = Linear::new(&rows, outputs, inputs, threads, &device);
            assert_eq!(linear.stacks.len(), threads);
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
        let linear = Linear::new(&[1.0, 2.0], 2, 1, 1, &device).with_bias(vec![10.0, 20.0], &device);
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

    #[test]
    fn rotation_turns_pairs_half_a_head_apart() {
        let device = Device::flex();
        let rotation = Rotation::new(&[0, 2], &[0.5, 0.25], &device);
        let x = tensor(vec![1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [2, 1, 4], &device);
        let (one, half) = (1.0_f32, 0.5_f32);
        let turned = [1.0, 1.0, 0.0, 0.0, one.cos(), half.cos(), one.sin(), half.sin()];
        close(&values(rotation.apply(x.clone())), &turned);
        close(&values(rotation.times(2.0).apply(x)), &turned.map(|value| 2.0 * value));
    }

    #[test]
    fn attention_in_pieces_equals_attention_in_one() {
        let device = Device::flex();
        let (tokens, heads, kv_heads, head_dim) = (300, 4, 2, 8);
        let q = numbers(tokens * heads * head_dim, 3);
        let k = numbers(tokens * kv_heads * head_dim, 4);
        let v = numbers(tokens * kv_heads * head_dim, 5);
        let run = |cache: &mut Cache, from: usize, to: usize| {
            let part = |all: &[f32], heads: usize| {
                let width = heads * head_dim;
                tensor(all[from * width..to * width].to_vec(), [to - from, heads, head_dim], &device)
            };
            let mask = causal_mask(from, to - from, heads / kv_heads, &device);
            values(attend(part(&q, heads), part(&k, kv_heads), part(&v, kv_heads), cache, from, &mask))
        };
        let whole = run(&mut Cache::default(), 0, tokens);
        let mut cache = Cache::default();
        let pieces = [(0, 1), (1, 100), (100, 256), (256, 257), (257, 299), (299, 300)];
        let pieced: Vec<f32> = pieces.iter().flat_map(|(from, to)| run(&mut cache, *from, *to)).collect();
        close(&whole, &pieced);
    }

    #[test]
    fn a_single_token_attends_to_itself_alone() {
        let device = Device::flex();
        let one = |x: f32| tensor(vec![x, -x], [1, 1, 2], &device);
        let out = attend(one(3.0), one(5.0), one(7.0), &mut Cache::default(), 0, &None);
        close(&values(out), &[7.0, -7.0]);
    }
}
