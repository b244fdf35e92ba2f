//! The inner part of attention: a few queries that read the same blocks. Scores, their softmax, and the weighted sum of
//! values; sums stay in registers while keys and values stream by, and what is read next is asked for ahead.

use std::cell::RefCell;
use std::ops::Range;

use super::super::isa::{LANES, Simd};
use super::super::rows::{exp, total};
use super::{Stored, TOKENS};

/// One head of one row.
pub struct Query<'a> {
    /// Already scaled.
    pub query: &'a [f32],
    /// Positions that it sees.
    pub visible: usize,
    /// What sums are multiplied by in the end.
    pub share: f32,
    pub out: &'a mut [f32],
}

/// Where a tile's keys and values come from.
pub trait Blocks<'a> {
    type Number: Stored;
    /// Numbers of a value; a multiple of [`LANES`].
    fn value_width(&self) -> usize;
    /// Values of a block, `[TOKENS, stride]`, and the stride.
    fn values(&self, block: usize) -> (&'a [Self::Number], usize);
    /// Scores of `M` queries with `N` of all `blocks`, from `block` on, into `[M, context]` from the block on.
    fn scores<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        block: usize,
        blocks: usize,
        queries: [&[f32]; M],
        out: &mut [f32],
        context: usize,
    );
}

pub struct GroupedBlocks<K, V> {
    pub key: K,
    pub value: V,
    pub dim: usize,
    pub value_width: usize,
}

impl<'a, T: Stored, K: Fn(usize) -> &'a [T], V: Fn(usize) -> &'a [T]> Blocks<'a> for GroupedBlocks<K, V> {
    type Number = T;
    #[inline(always)]
    fn value_width(&self) -> usize {
        self.value_width
    }
    #[inline(always)]
    fn values(&self, block: usize) -> (&'a [T], usize) {
        ((self.value)(block), self.value_width)
    }
    #[inline(always)]
    fn scores<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        block: usize,
        blocks: usize,
        queries: [&[f32]; M],
        out: &mut [f32],
        context: usize,
    ) {
        let keys: [&[[T; LANES]]; N] =
            std::array::from_fn(|n| &(self.key)(block + n).as_chunks::<LANES>().0[..self.dim]);
        let queries = queries.map(|q| &q[..self.dim]);
        let mut sums = [[simd.splat(0.0); N]; M];
        // What is read next: the blocks that follow, or else the first values.
        let next: [&[[T; LANES]]; N] = std::array::from_fn(|n| {
            let next = if block + N + n < blocks { (self.key)(block + N + n) } else { (self.value)(n.min(blocks - 1)) };
            &next.as_chunks::<LANES>().0[..self.dim]
        });
        for d in 0..self.dim {
            next.iter().for_each(|next| simd.soon(&next[d]));
            let keys: [S::Vector; N] = std::array::from_fn(|n| T::widen(simd, &keys[n][d]));
            for (sums, query) in sums.iter_mut().zip(queries) {
                let q = simd.splat(query[d]);
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = simd.fused(q, key, *sum);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            let out = out[m * context..][..N * TOKENS].as_chunks_mut::<LANES>().0;
            out.iter_mut().zip(sums).for_each(|(out, sum)| simd.store(sum, out));
        }
    }
}

pub struct LatentBlocks<B> {
    pub block: B,
    /// Numbers of a row.
    pub stored: usize,
    pub value_width: usize,
}

impl<'a, T: Stored, B: Fn(usize) -> &'a [T]> Blocks<'a> for LatentBlocks<B> {
    type Number = T;
    #[inline(always)]
    fn value_width(&self) -> usize {
        self.value_width
    }
    #[inline(always)]
    fn values(&self, block: usize) -> (&'a [T], usize) {
        ((self.block)(block), self.stored)
    }
    #[inline(always)]
    fn scores<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        block: usize,
        blocks: usize,
        queries: [&[f32]; M],
        out: &mut [f32],
        context: usize,
    ) {
        let count = self.stored / LANES;
        let queries = queries.map(|q| &q.as_chunks::<LANES>().0[..count]);
        for (n, block) in (block..block + N).enumerate() {
            // Pairs of positions, so that enough sums are on their way.
            let next = (self.block)(if block + 1 < blocks { block + 1 } else { 0 }).chunks_exact(2 * self.stored);
            for ((pair, rows), next) in (self.block)(block).chunks_exact(2 * self.stored).enumerate().zip(next) {
                let (a, b) = rows.split_at(self.stored);
                let rows = [a, b].map(|row| &row.as_chunks::<LANES>().0[..count]);
                let next = &next.as_chunks::<LANES>().0[..2 * count];
                let mut sums = [[simd.splat(0.0); 2]; M];
                for at in 0..count {
                    simd.soon(&next[2 * at]);
                    let keys = rows.map(
                        #[inline(always)]
                        |row| T::widen(simd, &row[at]),
                    );
                    for (sums, query) in sums.iter_mut().zip(queries) {
                        let q = simd.load(&query[at]);
                        for (sum, key) in sums.iter_mut().zip(keys) {
                            *sum = simd.fused(q, key, *sum);
                        }
                    }
                }
                for (m, sums) in sums.into_iter().enumerate() {
                    for (i, sum) in sums.into_iter().enumerate() {
                        let mut lanes = [0.0; LANES];
                        simd.store(sum, &mut lanes);
                        out[m * context + n * TOKENS + pair * 2 + i] = total(&lanes);
                    }
                }
            }
        }
    }
}

/// Memory that a thread uses again for each tile.
#[derive(Default)]
struct Scratch {
    /// Scores, then weights, `[queries, context]`.
    scores: Vec<f32>,
    /// Sums of values, `[queries, width]`.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs `$run` with so many queries (at most four) as `$m`, and as `$n` as many blocks or vectors at once as registers
/// allow.
macro_rules! sized {
    ($simd:ident, $queries:expr, $m:ident, $n:ident => $run:expr) => {{
        macro_rules! with {
            ($many:literal, $each:literal) => {{
                const $m: usize = $many;
                const $n: usize = $each;
                $run
            }};
        }
        match ($queries, $simd::SUMS >= 16) {
            (1, true) => with!(1, 8),
            (2, true) => with!(2, 4),
            (3, true) => with!(3, 4),
            (_, true) => with!(4, 4),
            (1, false) => with!(1, 4),
            (2, false) => with!(2, 2),
            (3, false) => with!(3, 1),
            (_, false) => with!(4, 1),
        }
    }};
}

/// Attends a tile's queries.
#[inline(always)]
pub fn tile<'a, S: Simd, B: Blocks<'a>>(simd: S, mut queries: Vec<Query<'_>>, source: &B) {
    let mut scratch = SCRATCH.take();
    let longest = queries.iter().map(|q| q.visible).max().unwrap_or(0);
    let blocks = longest.div_ceil(TOKENS);
    let (context, width) = (blocks * TOKENS, source.value_width());
    scratch.scores.resize(queries.len() * context, 0.0);
    scratch.sums.clear();
    scratch.sums.resize(queries.len() * width, 0.0);
    let Scratch { scores, sums } = &mut scratch;
    let each = queries.chunks_mut(4).zip(scores.chunks_mut(4 * context)).zip(sums.chunks_mut(4 * width));
    for ((queries, scores), sums) in each {
        sized!(S, queries.len(), M, N => score::<S, B, M, N>(simd, source, blocks, queries, scores, context));
        for (query, scores) in queries.iter_mut().zip(scores.chunks_exact_mut(context)) {
            query.share = 1.0 / softmax(&mut scores[..query.visible.next_multiple_of(TOKENS)], query.visible);
        }
        // What all of them see, then what only some do.
        let common = queries.iter().map(|q| q.visible).min().unwrap_or(0);
        sized!(S, queries.len(), M, N => mix::<S, B, M, N>(simd, source, 0..common, scores, context, sums));
        for (i, query) in queries.iter().enumerate().filter(|(_, q)| q.visible > common) {
            let (scores, sums) = (&scores[i * context..], &mut sums[i * width..][..width]);
            sized!(S, 1, M, N => mix::<S, B, M, N>(simd, source, common..query.visible, scores, context, sums));
        }
        for (query, sums) in queries.iter_mut().zip(sums.chunks_exact(width)) {
            query.out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * query.share);
        }
    }
    SCRATCH.set(scratch);
}

/// Scores of `M` queries with all blocks, `N` at once.
#[inline(always)]
fn score<'a, S: Simd, B: Blocks<'a>, const M: usize, const N: usize>(
    simd: S,
    source: &B,
    blocks: usize,
    queries: &[Query<'_>],
    out: &mut [f32],
    context: usize,
) {
    let queries: [&[f32]; M] = std::array::from_fn(|m| queries[m].query);
    let mut block = 0;
    while block + N <= blocks {
        source.scores::<S, M, N>(simd, block, blocks, queries, &mut out[block * TOKENS..], context);
        block += N;
    }
    while block < blocks {
        source.scores::<S, M, 1>(simd, block, blocks, queries, &mut out[block * TOKENS..], context);
        block += 1;
    }
}

/// Turns the first `visible` scores into weights relative to the largest; the rest becomes 0. Returns their sum.
#[inline(always)]
fn softmax(scores: &mut [f32], visible: usize) -> f32 {
    scores[visible..].fill(f32::NEG_INFINITY);
    let (vectors, _) = scores.as_chunks_mut::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for scores in vectors.iter() {
        (0..LANES).for_each(|i| largest[i] = if scores[i] > largest[i] { scores[i] } else { largest[i] });
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let mut sum = [0.0; LANES];
    for scores in vectors {
        for i in 0..LANES {
            scores[i] = exp(scores[i] - largest);
            sum[i] += scores[i];
        }
    }
    total(&sum)
}

/// Adds the values at some positions, weighted, to the sums of `M` queries, `[M, width]`, `N` vectors at once.
#[inline(always)]
fn mix<'a, S: Simd, B: Blocks<'a>, const M: usize, const N: usize>(
    simd: S,
    source: &B,
    positions: Range<usize>,
    weights: &[f32],
    context: usize,
    sums: &mut [f32],
) {
    let vectors = source.value_width() / LANES;
    let mut at = 0;
    while at + N <= vectors {
        mix_vectors::<S, B, M, N>(simd, source, positions.clone(), weights, context, sums, at);
        at += N;
    }
    while at < vectors {
        mix_vectors::<S, B, M, 1>(simd, source, positions.clone(), weights, context, sums, at);
        at += 1;
    }
}

/// [`mix`] for the vectors `at` to `at + N` of the values.
#[inline(always)]
fn mix_vectors<'a, S: Simd, B: Blocks<'a>, const M: usize, const N: usize>(
    simd: S,
    source: &B,
    positions: Range<usize>,
    weights: &[f32],
    context: usize,
    sums: &mut [f32],
    at: usize,
) {
    let width = source.value_width();
    let weights: [&[f32]; M] = std::array::from_fn(|m| &weights[m * context..][..positions.end]);
    let mut held = [[simd.splat(0.0); N]; M];
    for (m, held) in held.iter_mut().enumerate() {
        let sums = sums[m * width + at * LANES..][..N * LANES].as_chunks::<LANES>().0;
        held.iter_mut().zip(sums).for_each(|(held, sum)| *held = simd.load(sum));
    }
    let mut position = positions.start;
    while position < positions.end {
        let (values, stride) = source.values(position / TOKENS);
        let end = positions.end.min((position / TOKENS + 1) * TOKENS);
        let next = if end < positions.end { source.values(end / TOKENS).0 } else { values };
        for position in position..end {
            let ahead = &next[position % TOKENS * stride + at * LANES..][..N * LANES];
            ahead.iter().step_by(2 * LANES).for_each(|ahead| simd.soon(ahead));
            let value = values[position % TOKENS * stride + at * LANES..][..N * LANES].as_chunks::<LANES>().0;
            let value: [S::Vector; N] = std::array::from_fn(|n| B::Number::widen(simd, &value[n]));
            for (held, weights) in held.iter_mut().zip(weights) {
                let weight = simd.splat(weights[position]);
                for (held, value) in held.iter_mut().zip(value) {
                    *held = simd.fused(weight, value, *held);
                }
            }
        }
        position = end;
    }
    for (m, held) in held.into_iter().enumerate() {
        let sums = sums[m * width + at * LANES..][..N * LANES].as_chunks_mut::<LANES>().0;
        sums.iter_mut().zip(held).for_each(|(sum, held)| simd.store(held, sum));
    }
}
