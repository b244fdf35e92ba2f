//! Weights of linear layers as the kernels read them: groups of [`LANES`] outputs, interleaved, so that one vector
//! holds the same input's weights for all outputs of a group and memory is read from front to back.
//!
//! f32 and f16: `[groups, inputs, LANES]`. int8: blocks of [`BLOCK`] inputs, `[groups, blocks]`, each holding values
//! `[8, LANES, 4]`, then an f16 scale for each output. int4: nibbles `[4, LANES, 4]` (low: the first half of the block's
//! inputs, high: the second), then an f16 scale and an f16 minimum for each output; without the minima if all of them are
//! -8 times their scale, as in a file of Q4_0. The last group and the last block
//! are filled up with zeros.

use half::f16;

use super::isa::{BLOCK, INT4_BYTES, INT8_BYTES, LANES, Lanes, SYMMETRIC_BYTES};
use super::memory::Memory;
use super::pool;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    F16,
    Int8,
    Int4,
}

impl Format {
    /// Bytes of a group of outputs.
    fn group_bytes(self, inputs: usize, symmetric: bool) -> usize {
        let blocks = inputs.div_ceil(BLOCK);
        match self {
            Self::F32 => inputs * LANES * 4,
            Self::F16 => inputs * LANES * 2,
            Self::Int8 => blocks * INT8_BYTES,
            Self::Int4 if symmetric => blocks * SYMMETRIC_BYTES,
            Self::Int4 => blocks * INT4_BYTES,
        }
    }
}

/// One output's weights as a file holds them.
#[derive(Debug, Clone, Copy)]
pub enum Row<'a> {
    F32(&'a [f32]),
    /// Blocks of a scale d (f16) and nibbles q: weights d (q - 8). Taken over as they are into int4.
    Q4_0(&'a [u8]),
    /// Blocks of a scale d, a minimum m (f16) and nibbles q: weights d q + m. Taken over as they are into int4.
    Q4_1(&'a [u8]),
    /// Blocks of a scale d (f16) and bytes q: weights d q. Taken over as they are into int8.
    Q8_0(&'a [u8]),
}

/// The weights of a linear layer.
#[derive(Debug)]
pub struct Packed {
    format: Format,
    outputs: usize,
    inputs: usize,
    /// Of int4: minima follow from scales and are not stored.
    symmetric: bool,
    memory: Memory,
}

impl Packed {
    /// Packs the rows that `row` gives for each output. A row that is not f32 must be of the format that it is taken over
    /// into, and every row has `inputs` weights.
    pub fn new<'a>(format: Format, outputs: usize, inputs: usize, row: impl Fn(usize) -> Row<'a> + Sync) -> Self {
        let symmetric = format == Format::Int4 && (0..outputs).all(|output| matches!(row(output), Row::Q4_0(_)));
        let group_bytes = format.group_bytes(inputs, symmetric);
        let groups = outputs.div_ceil(LANES);
        let mut memory = Memory::zeroed(groups * group_bytes);
        let parts = pool::Parts::new(&mut memory);
        pool::split(groups, 1, |from, to| {
            for group in from..to {
                // SAFETY: groups lie beside each other.
                let bytes = unsafe { parts.part(group * group_bytes, group_bytes) };
                for output in group * LANES..outputs.min((group + 1) * LANES) {
                    put(format, symmetric, bytes, output % LANES, inputs, row(output));
                }
            }
        });
        Self { format, outputs, inputs, symmetric, memory }
    }
    /// Packs `[outputs, inputs]` row-major weights.
    pub fn from_rows(format: Format, rows: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(rows.len(), outputs * inputs, "weights fill their shape");
        Self::new(format, outputs, inputs, |output| Row::F32(&rows[output * inputs..][..inputs]))
    }

    pub fn format(&self) -> Format {
        self.format
    }
    /// Whether int4 weights are stored without minima.
    pub fn symmetric(&self) -> bool {
        self.symmetric
    }
    pub fn outputs(&self) -> usize {
        self.outputs
    }
    pub fn inputs(&self) -> usize {
        self.inputs
    }
    pub fn groups(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }
    /// Memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }
    /// A group's bytes.
    pub fn group(&self, group: usize) -> &[u8] {
        let size = self.format.group_bytes(self.inputs, self.symmetric);
        &self.memory[group * size..][..size]
    }
    /// A group of f16 weights, `[inputs, LANES]`.
    pub fn group_f16(&self, group: usize) -> &[[f16; LANES]] {
        assert_eq!(self.format, Format::F16, "the format is another");
        let bytes = self.group(group);
        // SAFETY: any bits are an f16; the group begins at a multiple of 32 bytes of an aligned array.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.inputs) }
    }
    /// A group of f32 weights, `[inputs, LANES]`.
    pub fn group_f32(&self, group: usize) -> &[Lanes] {
        assert_eq!(self.format, Format::F32, "the format is another");
        let bytes = self.group(group);
        // SAFETY: any bits are an f32; the group begins at a multiple of 64 bytes of an aligned array.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.inputs) }
    }

    /// Writes one output's weights as numbers: an embedding is a row of the output layer's weights.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs && out.len() == self.inputs, "a row of the weights");
        let (group, lane) = (output / LANES, output % LANES);
        match self.format {
            Format::F32 => out.iter_mut().zip(self.group_f32(group)).for_each(|(out, w)| *out = w[lane]),
            Format::F16 => {
                out.iter_mut().zip(self.group_f16(group)).for_each(|(out, w)| *out = w[lane].to_f32_const());
            }
            Format::Int8 => {
                for (block, out) in self.group(group).chunks_exact(INT8_BYTES).zip(out.chunks_mut(BLOCK)) {
                    let scale = half_at(block, LANES * BLOCK + 2 * lane);
                    let value = |k: usize| f32::from(block[position(k, lane)].cast_signed());
                    out.iter_mut().enumerate().for_each(|(k, out)| *out = value(k) * scale);
                }
            }
            Format::Int4 => {
                let size = if self.symmetric { SYMMETRIC_BYTES } else { INT4_BYTES };
                for (block, out) in self.group(group).chunks_exact(size).zip(out.chunks_mut(BLOCK)) {
                    let scale = half_at(block, LANES * BLOCK / 2 + 2 * lane);
                    let minimum = match self.symmetric {
                        true => -8.0 * scale,
                        false => half_at(block, LANES * BLOCK / 2 + 2 * LANES + 2 * lane),
                    };
                    let value = |k: usize| block[position(k % 16, lane)] >> (k / 16 * 4) & 15;
                    out.iter_mut().enumerate().for_each(|(k, out)| *out = f32::from(value(k)).mul_add(scale, minimum));
                }
            }
        }
    }
    /// All weights as numbers, `[outputs, inputs]`.
    pub fn unpacked(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.outputs * self.inputs];
        out.chunks_exact_mut(self.inputs).enumerate().for_each(|(i, out)| self.row(i, out));
        out
    }
}

/// Where a block's `k`-th input of an output lies.
fn position(k: usize, lane: usize) -> usize {
    k / 4 * 4 * LANES + lane * 4 + k % 4
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32_const()
}

/// Writes an output's weights into its lane of a group.
fn put(format: Format, symmetric: bool, group: &mut [u8], lane: usize, inputs: usize, row: Row<'_>) {
    match (format, row) {
        (Format::F32, Row::F32(row)) => {
            assert_eq!(row.len(), inputs, "a row has a weight for each input");
            for (to, weight) in group.chunks_exact_mut(LANES * 4).zip(row) {
                to[lane * 4..][..4].copy_from_slice(&weight.to_le_bytes());
            }
        }
        (Format::F16, Row::F32(row)) => {
            assert_eq!(row.len(), inputs, "a row has a weight for each input");
            for (to, weight) in group.chunks_exact_mut(LANES * 2).zip(row) {
                to[lane * 2..][..2].copy_from_slice(&f16::from_f32_const(*weight).to_le_bytes());
            }
        }
        (Format::Int8, Row::F32(row)) => {
            assert_eq!(row.len(), inputs, "a row has a weight for each input");
            for (block, weights) in group.chunks_exact_mut(INT8_BYTES).zip(row.chunks(BLOCK)) {
                put_int8(block, lane, weights);
            }
        }
        (Format::Int4, Row::F32(row)) => {
            assert_eq!(row.len(), inputs, "a row has a weight for each input");
            for (block, weights) in group.chunks_exact_mut(INT4_BYTES).zip(row.chunks(BLOCK)) {
                let (scale, minimum, values) = quantize_int4(weights);
                put_int4(block, lane, scale, Some(minimum), |k| values[k]);
            }
        }
        (Format::Int4, Row::Q4_0(row)) => {
            assert_eq!(row.len(), inputs / BLOCK * 18, "a row has a weight for each input");
            let size = if symmetric { SYMMETRIC_BYTES } else { INT4_BYTES };
            for (block, from) in group.chunks_exact_mut(size).zip(row.chunks_exact(18)) {
                let scale = f16::from_le_bytes([from[0], from[1]]);
                let minimum = (!symmetric).then(|| f16::from_f32_const(-8.0 * scale.to_f32_const()));
                put_int4(block, lane, scale, minimum, |k| from[2 + k % 16] >> (k / 16 * 4) & 15);
            }
        }
        (Format::Int4, Row::Q4_1(row)) => {
            assert_eq!(row.len(), inputs / BLOCK * 20, "a row has a weight for each input");
            for (block, from) in group.chunks_exact_mut(INT4_BYTES).zip(row.chunks_exact(20)) {
                let (scale, minimum) = (f16::from_le_bytes([from[0], from[1]]), f16::from_le_bytes([from[2], from[3]]));
                put_int4(block, lane, scale, Some(minimum), |k| from[4 + k % 16] >> (k / 16 * 4) & 15);
            }
        }
        (Format::Int8, Row::Q8_0(row)) => {
            assert_eq!(row.len(), inputs / BLOCK * 34, "a row has a weight for each input");
            for (block, from) in group.chunks_exact_mut(INT8_BYTES).zip(row.chunks_exact(34)) {
                (0..BLOCK).for_each(|k| block[position(k, lane)] = from[2 + k]);
                block[LANES * BLOCK + 2 * lane..][..2].copy_from_slice(&from[..2]);
            }
        }
        (_, Row::Q4_0(_) | Row::Q4_1(_) | Row::Q8_0(_)) => panic!("quantized rows are taken over as they are"),
    }
}

fn put_int8(block: &mut [u8], lane: usize, weights: &[f32]) {
    let largest = weights.iter().fold(0.0_f32, |largest, w| largest.max(w.abs()));
    let scale = f16::from_f32_const(largest / 127.0);
    let inverse = inverse(scale.to_f32_const());
    for (k, weight) in weights.iter().enumerate() {
        let value = (weight * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
        block[position(k, lane)] = value.cast_unsigned();
    }
    block[LANES * BLOCK + 2 * lane..][..2].copy_from_slice(&scale.to_le_bytes());
}

fn put_int4(block: &mut [u8], lane: usize, scale: f16, minimum: Option<f16>, value: impl Fn(usize) -> u8) {
    for k in 0..BLOCK / 2 {
        block[position(k, lane)] = value(k) | value(k + BLOCK / 2) << 4;
    }
    block[LANES * BLOCK / 2 + 2 * lane..][..2].copy_from_slice(&scale.to_le_bytes());
    if let Some(minimum) = minimum {
        block[LANES * BLOCK / 2 + 2 * LANES + 2 * lane..][..2].copy_from_slice(&minimum.to_le_bytes());
    }
}

fn inverse(x: f32) -> f32 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

/// Rounds of fitting scale and minimum to the values that they gave.
const FITS: usize = 4;

/// Finds a scale, a minimum and values 0 to 15 for up to [`BLOCK`] weights.
///
/// Starts from the extremes; then values and the least-squares line through them improve each other as long as the
/// squared error falls.
fn quantize_int4(weights: &[f32]) -> (f16, f16, [u8; BLOCK]) {
    let (low, high) =
        weights.iter().fold((f32::MAX, f32::MIN), |(low, high), weight| (low.min(*weight), high.max(*weight)));
    let mut best = round_int4(weights, (high - low) / 15.0, low);
    for _ in 0..FITS {
        let Some((scale, minimum)) = fit(weights, &best.values) else { break };
        let next = round_int4(weights, scale, minimum);
        if next.error >= best.error {
            break;
        }
        best = next;
    }
    (best.scale, best.minimum, best.values)
}

struct Int4 {
    scale: f16,
    minimum: f16,
    values: [u8; BLOCK],
    /// Sum of squares.
    error: f32,
}

fn round_int4(weights: &[f32], scale: f32, minimum: f32) -> Int4 {
    let (scale, minimum) = (f16::from_f32_const(scale), f16::from_f32_const(minimum));
    let (d, m) = (scale.to_f32_const(), minimum.to_f32_const());
    let inverse = inverse(d);
    let mut values = [0; BLOCK];
    let mut error = 0.0;
    for (value, weight) in values.iter_mut().zip(weights) {
        *value = ((weight - m) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
        let off = f32::from(*value) * d + m - weight;
        error += off * off;
    }
    Int4 { scale, minimum, values, error }
}

/// The line (slope, start) through values and weights; `None` if the values are all equal or it falls.
fn fit(weights: &[f32], values: &[u8; BLOCK]) -> Option<(f32, f32)> {
    let count = weights.len() as f32;
    let (mut x, mut y, mut xx, mut xy) = (0.0_f32, 0.0_f32, 0.0_f32, 0.0_f32);
    for (weight, value) in weights.iter().zip(values) {
        let value = f32::from(*value);
        (x, y, xx, xy) = (x + value, y + weight, xx + value * value, xy + value * weight);
    }
    let spread = count * xx - x * x;
    let slope = (count * xy - x * y) / spread;
    (spread > 0.0 && slope > 0.0).then(|| (slope, (y - slope * x) / count))
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::*;

    fn largest_error(format: Format, outputs: usize, inputs: usize) -> f32 {
        let rows = numbers(outputs * inputs, 1);
        let packed = Packed::from_rows(format, &rows, outputs, inputs);
        packed.unpacked().iter().zip(&rows).fold(0.0, |largest, (a, b)| largest.max((a - b).abs()))
    }

    #[test]
    fn what_is_packed_comes_back_within_the_format() {
        for (outputs, inputs) in [(16, 32), (33, 100), (1, 7), (48, 64)] {
            assert_eq!(largest_error(Format::F32, outputs, inputs), 0.0);
            assert!(largest_error(Format::F16, outputs, inputs) < 1.0 / 2048.0);
            assert!(largest_error(Format::Int8, outputs, inputs) < 1.0 / 127.0);
            assert!(largest_error(Format::Int4, outputs, inputs) < 1.3 / 15.0);
        }
    }

    #[test]
    fn int8_takes_about_half_of_f16() {
        let bytes = |format| Packed::from_rows(format, &numbers(64 * 256, 1), 64, 256).bytes() as f32;
        let share = bytes(Format::Int8) / bytes(Format::F16);
        assert!(share < 0.54, "{share}");
    }

    #[test]
    fn blocks_of_files_are_taken_over_exactly() {
        let nibbles: Vec<u8> = (0..16).map(|i| i * 37 % 251).collect();
        let (scale, minimum) = (f16::from_f32(0.37), f16::from_f32(-1.5));
        let q4_0: Vec<u8> = scale.to_le_bytes().into_iter().chain(nibbles.clone()).collect();
        let q4_1: Vec<u8> =
            scale.to_le_bytes().into_iter().chain(minimum.to_le_bytes()).chain(nibbles.clone()).collect();
        let value = |k: usize| f32::from(nibbles[k % 16] >> (k / 16 * 4) & 15);
        let packed = Packed::new(Format::Int4, 1, 32, |_| Row::Q4_0(&q4_0));
        let expected: Vec<f32> = (0..32).map(|k| (value(k) - 8.0) * scale.to_f32()).collect();
        assert_eq!(packed.unpacked(), expected);
        let packed = Packed::new(Format::Int4, 1, 32, |_| Row::Q4_1(&q4_1));
        let expected: Vec<f32> = (0..32).map(|k| value(k).mul_add(scale.to_f32(), minimum.to_f32())).collect();
        assert_eq!(packed.unpacked(), expected);
        let bytes: Vec<u8> = (0..32).map(|i: u8| i.wrapping_mul(91)).collect();
        let q8_0: Vec<u8> = scale.to_le_bytes().into_iter().chain(bytes.clone()).collect();
        let packed = Packed::new(Format::Int8, 1, 32, |_| Row::Q8_0(&q8_0));
        let expected: Vec<f32> = bytes.iter().map(|b| f32::from(b.cast_signed()) * scale.to_f32()).collect();
        assert_eq!(packed.unpacked(), expected);
    }

    #[test]
    fn fitting_never_makes_it_worse() {
        let squares = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
        for seed in 0..50 {
            let weights = numbers(32, seed);
            let low = weights.iter().copied().fold(f32::MAX, f32::min);
            let high = weights.iter().copied().fold(f32::MIN, f32::max);
            let plain = round_int4(&weights, (high - low) / 15.0, low).error;
            let packed = Packed::from_rows(Format::Int4, &weights, 1, 32);
            assert!(squares(&packed.unpacked(), &weights) <= plain * 1.0001);
        }
    }
}
