//! Attention over a paged cache.
//!
//! The cache of a layer is a pool of blocks of [`TOKENS`] positions; a sequence's block table says which block holds its
//! positions 16 i to 16 i + 15. New keys and values are stored first and then read back like all others, so that a
//! position gives the same bits whether it was computed now or long ago. Queries that share keys travel together;
//! what is computed for each does not depend on the others: scores stand at absolute positions, sums run over positions
//! from first to last.
//!
//! Keys lie `[blocks, kv_heads, dim, TOKENS]`, so that a vector holds the scores of a block; values
//! `[blocks, kv_heads, TOKENS, dim]`. Latent attention stores one row a position, `[blocks, TOKENS, width]`, which
//! serves all heads as key and, its first part, as value.

mod tile;

use std::ops::Range;

use half::f16;

use super::isa::{Isa, LANES, Lanes, Simd, dispatch};
use super::pool::{self, Parts};
use super::rows::{norm, rotate};
use tile::{GroupedBlocks, LatentBlocks, Query, tile};

/// Positions in a block; a vector holds the scores of one.
pub const TOKENS: usize = LANES;

/// Queries that are treated together at most: their scores shall stay in the fast caches.
const QUERIES: usize = 16;

/// Numbers that are stored in a cache.
pub trait Stored: Copy + Send + Sync + 'static {
    const ZERO: Self;
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::Vector;
    fn narrow<S: Simd>(simd: S, x: &Lanes) -> [Self; LANES];
}

impl Stored for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::Vector {
        simd.widen(x)
    }
    #[inline(always)]
    fn narrow<S: Simd>(simd: S, x: &Lanes) -> [Self; LANES] {
        simd.narrow(x)
    }
}

impl Stored for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn widen<S: Simd>(simd: S, x: &[Self; LANES]) -> S::Vector {
        simd.load(x)
    }
    #[inline(always)]
    fn narrow<S: Simd>(_simd: S, x: &Lanes) -> [Self; LANES] {
        *x
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its rows in the step.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
    /// Blocks of positions 0, 16, 32, … as far as the last row.
    pub blocks: Vec<u32>,
}

impl Span {
    fn slot(&self, row: usize) -> (usize, usize) {
        let position = self.start + row - self.rows.start;
        (self.blocks[position / TOKENS] as usize, position % TOKENS)
    }
}

/// How grouped-query attention is shaped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grouped {
    pub heads: usize,
    pub kv_heads: usize,
    /// Numbers of a head, of queries, keys and values alike; even.
    pub dim: usize,
    /// Scores are multiplied by it.
    pub scale: f32,
}

impl Grouped {
    /// Numbers that a block takes for keys and for values.
    pub fn block(&self) -> (usize, usize) {
        (self.kv_heads * self.dim * TOKENS, self.kv_heads * self.value_width() * TOKENS)
    }
    /// Values are stored in whole vectors.
    fn value_width(&self) -> usize {
        self.dim.next_multiple_of(LANES)
    }
    fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }
}

/// What grouped-query attention reads.
#[derive(Debug, Clone, Copy)]
pub struct GroupedInput<'a> {
    /// `[rows, (heads + 2 kv_heads) dim]`: queries, keys, values.
    pub qkv: &'a [f32],
    /// Norms of each head's queries and keys, `[dim]`, and their epsilon.
    pub norms: Option<(&'a [f32], &'a [f32], f32)>,
    /// Cosines and sines of each row's position, `[rows, dim / 2]`.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub spans: &'a [Span],
}

/// Norms and rotates queries and keys, stores keys and values, and attends. `out`: `[rows, heads dim]`.
///
/// Cost: O(rows * context) multiply-adds a head.
pub fn grouped<T: Stored>(
    isa: Isa,
    shape: Grouped,
    input: GroupedInput<'_>,
    keys: &mut [T],
    values: &mut [T],
    out: &mut [f32],
) {
    let rows = input.qkv.len() / shape.row();
    let width = shape.heads * shape.dim;
    assert!(shape.dim.is_multiple_of(2) && shape.heads.is_multiple_of(shape.kv_heads), "heads are in groups");
    assert_eq!(out.len(), rows * width, "a result for each row");
    assert_eq!(input.cos.len(), rows * shape.dim / 2, "an angle for each pair");
    let owner = owners(rows, input.spans);
    let mut queries = vec![0.0; rows * width];
    let parts = (Parts::new(&mut queries), Parts::new(keys), Parts::new(values));
    pool::split(rows, 2048_usize.div_ceil(shape.row()), |from, to| {
        for (row, &owner) in (from..to).zip(&owner[from..to]) {
            let slot = input.spans[owner].slot(row);
            // SAFETY: a row of queries, and a slot of the cache, belong to one row of the step: the planner gives no
            // two rows the same slot. Rows are in one task each.
            let queries = unsafe { parts.0.part(row * width, width) };
            dispatch!(isa, simd => store(simd, &shape, &input, row, slot, queries, &parts.1, &parts.2));
        }
    });
    let group = shape.heads / shape.kv_heads;
    let tiles = tiles(input.spans, shape.kv_heads, (QUERIES / group).max(1));
    let (keys, values) = (&*keys, &*values);
    let (key_block, value_block) = (shape.dim * TOKENS, shape.value_width() * TOKENS);
    let out = Parts::new(out);
    let attend = |index: usize| {
        let Tile { span, rows, kv_head } = &tiles[index];
        let (rows, span) = (rows.clone(), &input.spans[*span]);
        let picked: Vec<Query<'_>> = rows
            .flat_map(|row| (0..group).map(move |g| (row, kv_head * group + g)))
            .map(|(row, head)| {
                let at = row * width + head * shape.dim;
                Query {
                    query: &queries[at..at + shape.dim],
                    visible: span.start + row - span.rows.start + 1,
                    share: 0.0,
                    // SAFETY: a head of a row belongs to one tile.
                    out: unsafe { out.part(at, shape.dim) },
                }
            })
            .collect();
        let block = |index: usize| span.blocks[index] as usize * shape.kv_heads + kv_head;
        let source = GroupedBlocks {
            key: |index: usize| &keys[block(index) * key_block..][..key_block],
            value: |index: usize| &values[block(index) * value_block..][..value_block],
            dim: shape.dim,
            value_width: shape.value_width(),
        };
        dispatch!(isa, simd => tile(simd, picked, &source));
    };
    pool::run(tiles.len(), &attend);
}

/// The span of each row.
fn owners(rows: usize, spans: &[Span]) -> Vec<usize> {
    let mut owner = vec![0; rows];
    spans.iter().enumerate().for_each(|(index, span)| owner[span.rows.clone()].fill(index));
    assert_eq!(spans.iter().map(|s| s.rows.len()).sum::<usize>(), rows, "spans cover the rows");
    owner
}

/// Queries of neighbouring rows that read the same keys.
struct Tile {
    span: usize,
    rows: Range<usize>,
    kv_head: usize,
}

fn tiles(spans: &[Span], kv_heads: usize, rows: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        for from in span.rows.clone().step_by(rows) {
            let rows = from..(from + rows).min(span.rows.end);
            tiles.extend((0..kv_heads).map(|kv_head| Tile { span: index, rows: rows.clone(), kv_head }));
        }
    }
    // The longest first, so that no thread is left alone with one at the end.
    tiles.sort_by_key(|tile| std::cmp::Reverse(spans[tile.span].start + tile.rows.end - spans[tile.span].rows.start));
    tiles
}

/// Stores a row's keys and values, and prepares its queries.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what one row needs")]
fn store<S: Simd, T: Stored>(
    simd: S,
    shape: &Grouped,
    input: &GroupedInput<'_>,
    row: usize,
    (block, token): (usize, usize),
    queries: &mut [f32],
    keys: &Parts<'_, T>,
    values: &Parts<'_, T>,
) {
    let (dim, half) = (shape.dim, shape.dim / 2);
    let (cos, sin) = (&input.cos[row * half..][..half], &input.sin[row * half..][..half]);
    let (q, kv) = input.qkv[row * shape.row()..][..shape.row()].split_at(shape.heads * dim);
    let (k, v) = kv.split_at(shape.kv_heads * dim);
    let turned = |from: &[f32], weight: Option<&[f32]>, to: &mut [f32]| {
        match (weight, input.norms) {
            (Some(weight), Some((_, _, epsilon))) => norm(from, weight, epsilon, to),
            _ => to.copy_from_slice(from),
        }
        rotate(to, cos, sin, false);
    };
    for (from, to) in q.chunks_exact(dim).zip(queries.chunks_exact_mut(dim)) {
        turned(from, input.norms.map(|n| n.0), to);
        to.iter_mut().for_each(|x| *x *= shape.scale);
    }
    let mut key = [0.0; 1024];
    assert!(dim <= key.len(), "a head is not that wide");
    for head in 0..shape.kv_heads {
        turned(&k[head * dim..][..dim], input.norms.map(|n| n.1), &mut key[..dim]);
        // SAFETY: blocks hold heads one after the other; other rows write other blocks, or other tokens of this one.
        // Those share the stretch of memory below, element by element apart, so it is never made a slice.
        let first = (block * shape.kv_heads + head) * dim * TOKENS + token;
        for (d, chunk) in key[..dim].chunks(LANES).enumerate() {
            let mut lanes = [0.0; LANES];
            lanes[..chunk.len()].copy_from_slice(chunk);
            let stored = T::narrow(simd, &lanes);
            for (i, &stored) in stored[..chunk.len()].iter().enumerate() {
                // SAFETY: this element belongs to this row alone.
                let to = unsafe { keys.part(first + (d * LANES + i) * TOKENS, 1) };
                to[0] = stored;
            }
        }
        let width = shape.value_width();
        // SAFETY: this stretch belongs to this row alone.
        let to = unsafe { values.part(((block * shape.kv_heads + head) * TOKENS + token) * width, width) };
        store_row(simd, &v[head * dim..][..dim], to);
    }
}

/// Stores numbers, filled up with zeros to whole vectors.
#[inline(always)]
fn store_row<S: Simd, T: Stored>(simd: S, from: &[f32], to: &mut [T]) {
    for (from, to) in from.chunks(LANES).zip(to.chunks_exact_mut(LANES)) {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        to.copy_from_slice(&T::narrow(simd, &lanes));
    }
}

/// How latent attention is shaped: every head reads the same row of each position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latent {
    pub heads: usize,
    /// Numbers of a stored row: the latent, then the rotated key.
    pub width: usize,
    /// The first numbers of a row, which are its value.
    pub rank: usize,
    /// Scores are multiplied by it.
    pub scale: f32,
}

impl Latent {
    /// Numbers that a block takes.
    pub fn block(&self) -> usize {
        self.stored() * TOKENS
    }
    fn stored(&self) -> usize {
        self.width.next_multiple_of(LANES)
    }
}

/// Stores the rows of new positions, and attends. `queries`: `[rows, heads, width]`; `new`: `[rows, width]`; `out`:
/// `[rows, heads, rank]`.
pub fn latent<T: Stored>(
    isa: Isa,
    shape: Latent,
    queries: &[f32],
    new: &[f32],
    spans: &[Span],
    cache: &mut [T],
    out: &mut [f32],
) {
    let rows = new.len() / shape.width;
    assert_eq!(queries.len(), rows * shape.heads * shape.width, "a query for each head");
    assert_eq!(out.len(), rows * shape.heads * shape.rank, "a result for each row");
    let (owner, stored) = (owners(rows, spans), shape.stored());
    for row in 0..rows {
        let (block, token) = spans[owner[row]].slot(row);
        let to = &mut cache[(block * TOKENS + token) * stored..][..stored];
        dispatch!(isa, simd => store_row(simd, &new[row * shape.width..][..shape.width], to));
    }
    // Scaled, and filled up like the rows that they meet.
    let mut scaled = vec![0.0; rows * shape.heads * stored];
    for (to, from) in scaled.chunks_exact_mut(stored).zip(queries.chunks_exact(shape.width)) {
        to.iter_mut().zip(from).for_each(|(to, q)| *to = q * shape.scale);
    }
    // A tile is a few heads of one row.
    let each = QUERIES.min(shape.heads);
    let per_row = shape.heads.div_ceil(each);
    let (cache, out) = (&*cache, Parts::new(out));
    pool::run(rows * per_row, &|index| {
        let (row, first) = (index / per_row, index % per_row * each);
        let span = &spans[owner[row]];
        let picked: Vec<Query<'_>> = (first..(first + each).min(shape.heads))
            .map(|head| Query {
                query: &scaled[(row * shape.heads + head) * stored..][..stored],
                visible: span.start + row - span.rows.start + 1,
                share: 0.0,
                // SAFETY: a head of a row belongs to one tile.
                out: unsafe { out.part((row * shape.heads + head) * shape.rank, shape.rank) },
            })
            .collect();
        let block = |index: usize| &cache[span.blocks[index] as usize * stored * TOKENS..][..stored * TOKENS];
        let source = LatentBlocks { block, stored, value_width: shape.rank.next_multiple_of(LANES) };
        dispatch!(isa, simd => tile(simd, picked, &source));
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::{close, isas, numbers};
    use super::*;

    const SHAPE: Grouped = Grouped { heads: 6, kv_heads: 2, dim: 24, scale: 0.3 };
    /// Keeps its own order of blocks, as a pool that others use too would.
    const TABLE: [u32; 4] = [5, 1, 7, 2];

    /// Runs rows `from..to` of a sequence through a cache.
    fn run<T: Stored>(isa: Isa, range: Range<usize>, keys: &mut [T], values: &mut [T]) -> Vec<f32> {
        let rows = range.len();
        let take = |all: Vec<f32>, width: usize| all[range.start * width..range.end * width].to_vec();
        let qkv = take(numbers(64 * SHAPE.row(), 1), SHAPE.row());
        let (cos, sin) = (take(numbers(64 * 12, 2), 12), take(numbers(64 * 12, 3), 12));
        let spans = [Span { rows: 0..rows, start: range.start, blocks: TABLE.to_vec() }];
        let (q_norm, k_norm) = (numbers(24, 4), numbers(24, 5));
        let norms = Some((&q_norm[..], &k_norm[..], 1e-5));
        let input = GroupedInput { qkv: &qkv, norms, cos: &cos, sin: &sin, spans: &spans };
        let mut out = vec![f32::NAN; rows * 144];
        grouped(isa, SHAPE, input, keys, values, &mut out);
        out
    }
    fn caches<T: Stored>() -> (Vec<T>, Vec<T>) {
        let (keys, values) = SHAPE.block();
        (vec![T::ZERO; keys * 8], vec![T::ZERO; values * 8])
    }
    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }
    fn check_pieces<T: Stored>() {
        for isa in isas() {
            let (mut keys, mut values) = caches::<T>();
            let whole = run(isa, 0..60, &mut keys, &mut values);
            // Stale numbers, even strange ones, in blocks that are written again must not matter.
            let (mut keys, mut values) = (keys.clone(), values.clone());
            let pieces = [0..1, 1..17, 17..32, 32..33, 33..60];
            let pieced: Vec<f32> = pieces.into_iter().flat_map(|r| run(isa, r, &mut keys, &mut values)).collect();
            assert_eq!(bits(&whole), bits(&pieced), "{isa:?}");
            let (mut keys, mut values) = caches::<T>();
            assert_eq!(bits(&run(Isa::Portable, 0..60, &mut keys, &mut values)), bits(&whole), "{isa:?}");
        }
    }

    #[test]
    fn pieces_and_instruction_sets_give_the_same_bits() {
        check_pieces::<f32>();
        check_pieces::<f16>();
    }

    #[test]
    fn attention_is_a_softmax_over_what_came_before() {
        let shape = Grouped { heads: 2, kv_heads: 1, dim: 2, scale: 0.5 };
        let rows = 20;
        let qkv = numbers(rows * 8, 1);
        let (cos, sin) = (vec![1.0; rows], vec![0.0; rows]);
        let spans = [Span { rows: 0..rows, start: 0, blocks: vec![1, 0] }];
        let input = GroupedInput { qkv: &qkv, norms: None, cos: &cos, sin: &sin, spans: &spans };
        let (keys, values) = shape.block();
        let mut out = vec![0.0; rows * 4];
        grouped(Isa::best(), shape, input, &mut vec![0.0_f32; keys * 2], &mut vec![0.0_f32; values * 2], &mut out);
        let part = |row: usize, at: usize| [qkv[row * 8 + at], qkv[row * 8 + at + 1]];
        for row in 0..rows {
            for head in 0..2 {
                let q = part(row, head * 2);
                let weight = |t: usize| (0.5 * (q[0] * part(t, 4)[0] + q[1] * part(t, 4)[1])).exp();
                let total: f32 = (0..=row).map(weight).sum();
                let mixed = |i: usize| (0..=row).map(|t| weight(t) * part(t, 6)[i]).sum::<f32>() / total;
                close(&out[row * 4 + head * 2..][..2], &[mixed(0), mixed(1)]);
            }
        }
    }

    #[test]
    fn sequences_in_one_step_do_not_see_each_other() {
        let (mut keys, mut values) = caches::<f16>();
        let alone = run(Isa::best(), 0..20, &mut keys, &mut values);
        let qkv = [numbers(64 * SHAPE.row(), 1)[..20 * SHAPE.row()].to_vec(), numbers(5 * SHAPE.row(), 9)].concat();
        let (cos, sin) = (numbers(64 * 12, 2)[..25 * 12].to_vec(), numbers(64 * 12, 3)[..25 * 12].to_vec());
        let (q_norm, k_norm) = (numbers(24, 4), numbers(24, 5));
        let spans =
            [Span { rows: 0..20, start: 0, blocks: TABLE.to_vec() }, Span { rows: 20..25, start: 0, blocks: vec![3] }];
        let norms = Some((&q_norm[..], &k_norm[..], 1e-5));
        let input = GroupedInput { qkv: &qkv, norms, cos: &cos, sin: &sin, spans: &spans };
        let mut out = vec![0.0; 25 * 144];
        let (mut keys, mut values) = caches::<f16>();
        grouped(Isa::best(), SHAPE, input, &mut keys, &mut values, &mut out);
        assert_eq!(bits(&alone), bits(&out[..20 * 144]));
    }

    fn run_latent(isa: Isa, range: Range<usize>, cache: &mut [f16]) -> Vec<f32> {
        let shape = Latent { heads: 5, width: 40, rank: 24, scale: 0.2 };
        let take = |all: Vec<f32>, width: usize| all[range.start * width..range.end * width].to_vec();
        let (queries, new) = (take(numbers(64 * 200, 1), 200), take(numbers(64 * 40, 2), 40));
        let spans = [Span { rows: 0..range.len(), start: range.start, blocks: TABLE.to_vec() }];
        let mut out = vec![f32::NAN; range.len() * 5 * 24];
        latent(isa, shape, &queries, &new, &spans, cache, &mut out);
        out
    }

    #[test]
    fn latent_attention_gives_the_same_bits_in_pieces_and_on_every_instruction_set() {
        let cache = || vec![f16::ZERO; 8 * 48 * TOKENS];
        let whole = run_latent(Isa::best(), 0..50, &mut cache());
        for isa in isas() {
            let mut cache = cache();
            let pieces = [0..15, 15..16, 16..49, 49..50].into_iter();
            let pieced: Vec<f32> = pieces.flat_map(|r| run_latent(isa, r, &mut cache)).collect();
            assert_eq!(bits(&whole), bits(&pieced), "{isa:?}");
        }
    }

    #[test]
    fn latent_attention_weighs_the_first_part_of_rows() {
        let shape = Latent { heads: 1, width: 3, rank: 2, scale: 1.0 };
        let (queries, new) = ([0.0, 0.0, 0.0, 1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 3.0, 4.0, -0.5]);
        let spans = [Span { rows: 0..2, start: 0, blocks: vec![0] }];
        let mut out = [0.0; 4];
        latent(Isa::best(), shape, &queries, &new, &spans, &mut [0.0_f32; 256], &mut out);
        let (a, b) = (2.0_f32.exp(), 2.0_f32.exp());
        close(&out, &[1.0, 2.0, (a + 3.0 * b) / (a + b), (2.0 * a + 4.0 * b) / (a + b)]);
    }
}
