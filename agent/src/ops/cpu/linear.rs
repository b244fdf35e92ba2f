//! Products of activations with packed weights.
//!
//! A row's result depends on that row alone: sums run over the inputs from first to last, threads share outputs, and a
//! vector holds different outputs. Quantized weights are multiplied as integers, with activations that are quantized
//! by blocks of [`BLOCK`] on the way.

use super::isa::{Acts, BLOCK, INT4_BYTES, Isa, LANES, Lanes, SYMMETRIC_BYTES, Simd, dispatch};
use super::pack::{Format, Packed};
use super::pool::{self, Parts};

/// Multiply-adds that a thread gets at least: below that, sharing costs more than it saves.
const SHARE: usize = 64 << 10;

/// Inputs whose products are added up before they join the sum: short sums lose less to rounding.
const SUM: usize = 64;

/// What is added to a product before it is stored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// `[outputs]`, added first.
    pub bias: Option<&'a [f32]>,
    /// `[rows, outputs]`, added last.
    pub residual: Option<&'a [f32]>,
}

/// Computes `out = x W + bias + residual`. `x`: `[rows, inputs]`; `out`: `[rows, outputs]`.
///
/// For integer weights, an activation is rounded to the sum of `terms` integers of 8 bits, each with a scale for its block:
/// with one, its error is up to 1/254 of the largest in the block, with two 1/64,516, for up to twice the work.
pub fn linear(isa: Isa, x: &[f32], weights: &Packed, terms: usize, epilogue: Epilogue<'_>, out: &mut [f32]) {
    let (rows, outputs) = (x.len() / weights.inputs(), weights.outputs());
    assert_eq!((x.len(), out.len()), (rows * weights.inputs(), rows * outputs), "shapes fit");
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == outputs), "a bias for each output");
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()), "the residual is like the result");
    let (quantized, terms) = match weights.format() {
        Format::F32 | Format::F16 => (None, 1),
        Format::Int8 | Format::Int4 => (Some(Quantized::new(isa, x, weights, terms)), terms),
    };
    let acts = quantized.as_ref().map(Quantized::acts);
    let job = Product { x, rows: rows * terms, terms, weights, acts, epilogue, out: Parts::new(out) };
    let least = SHARE.div_ceil((rows * weights.inputs() * LANES).max(1));
    pool::split(weights.groups(), least, |from, to| dispatch!(isa, simd => job.groups(simd, from, to)));
}

/// Activations in blocks of integers.
struct Quantized {
    values: Vec<i8>,
    wide: Vec<i16>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    blocks: usize,
}

impl Quantized {
    fn new(isa: Isa, x: &[f32], weights: &Packed, terms: usize) -> Self {
        let inputs = weights.inputs();
        let (rows, blocks) = (x.len() / inputs, inputs.div_ceil(BLOCK));
        let widened = weights.format() == Format::Int8 && dispatch!(isa, simd => wide(simd));
        let mut values = vec![0; rows * terms * blocks * BLOCK];
        let mut wide = vec![0; if widened { values.len() } else { 0 }];
        let (mut scales, mut sums) = (vec![0.0; rows * terms * blocks], vec![0.0; rows * terms * blocks]);
        let parts = (Parts::new(&mut values), Parts::new(&mut wide), Parts::new(&mut scales), Parts::new(&mut sums));
        pool::split(rows, 16_384_usize.div_ceil(inputs), |from, to| {
            let (first, count) = (from * terms, (to - from) * terms);
            // SAFETY: runs of rows lie beside each other.
            let (values, wide, scales, sums) = unsafe {
                (
                    parts.0.part(first * blocks * BLOCK, count * blocks * BLOCK),
                    parts.1.part(
                        if widened { first * blocks * BLOCK } else { 0 },
                        if widened { count * blocks * BLOCK } else { 0 },
                    ),
                    parts.2.part(first * blocks, count * blocks),
                    parts.3.part(first * blocks, count * blocks),
                )
            };
            dispatch!(isa, _simd => quantize(&x[from * inputs..to * inputs], inputs, terms, values, scales, sums));
            wide.iter_mut().zip(values).for_each(|(wide, value)| *wide = i16::from(*value));
        });
        Self { values, wide, scales, sums, blocks }
    }
    fn acts(&self) -> Acts<'_> {
        let Self { values, wide, scales, sums, blocks } = self;
        Acts { values, wide, scales, sums, blocks: *blocks }
    }
}

#[inline(always)]
fn wide<S: Simd>(_simd: S) -> bool {
    S::WIDE
}

/// Quantizes rows by blocks: the largest magnitude becomes 127. Further terms, each a row of its own, hold what the terms
/// before them leave. A block that holds something infinite, or no number, gives no number.
#[inline(always)]
fn quantize(x: &[f32], inputs: usize, terms: usize, values: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    let blocks = inputs.div_ceil(BLOCK);
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let mut rest = [0.0; BLOCK];
            rest[..x.len()].copy_from_slice(x);
            for term in 0..terms {
                let at = (row * terms + term) * blocks + block;
                let values: &mut [i8; BLOCK] = (&mut values[at * BLOCK..][..BLOCK]).try_into().expect("a block");
                // As bits, magnitudes have the order of numbers, and what is no number comes after all of them.
                let mut largest = [0_u32; LANES];
                for half in rest.chunks_exact(LANES) {
                    largest.iter_mut().zip(half).for_each(|(l, x)| *l = (*l).max(x.abs().to_bits()));
                }
                let largest = f32::from_bits(largest.into_iter().fold(0, u32::max));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
                let mut sum = 0_i32;
                for (value, x) in values.iter_mut().zip(&mut rest) {
                    let rounded = round(*x * inverse);
                    sum = sum.wrapping_add(rounded);
                    *value = rounded as i8;
                    *x = (-scale).mul_add(rounded as f32, *x);
                }
                (scales[at], sums[at]) = (scale, scale * sum as f32);
            }
        }
    }
}

/// Rounds a number from -127 to 127 to the nearest integer, ties to even, in a way that vectorizes everywhere.
#[inline(always)]
fn round(x: f32) -> i32 {
    /// Adding it leaves no bits for fractions.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = (x + SHIFT).to_bits().cast_signed();
    shifted.wrapping_sub(SHIFT.to_bits().cast_signed())
}

/// A product on its way.
struct Product<'a> {
    x: &'a [f32],
    /// Rows that are multiplied: each row of `x` is the sum of `terms` of them.
    rows: usize,
    terms: usize,
    weights: &'a Packed,
    acts: Option<Acts<'a>>,
    epilogue: Epilogue<'a>,
    out: Parts<'a, f32>,
}

impl Product<'_> {
    #[inline(always)]
    fn groups<S: Simd>(&self, simd: S, from: usize, to: usize) {
        for group in from..to {
            let mut row = 0;
            while self.rows - row >= S::ROWS && S::ROWS == 8 {
                self.tile::<S, 8>(simd, group, row);
                row += 8;
            }
            while self.rows - row >= 4 {
                self.tile::<S, 4>(simd, group, row);
                row += 4;
            }
            if self.rows - row >= 2 {
                self.tile::<S, 2>(simd, group, row);
                row += 2;
            }
            if self.rows > row {
                self.tile::<S, 1>(simd, group, row);
            }
        }
    }

    /// `M` rows of a group of outputs.
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(&self, simd: S, group: usize, row: usize) {
        let sums: [Lanes; M] = match (self.weights.format(), &self.acts) {
            (Format::Int4, Some(acts)) if self.weights.symmetric() => {
                simd.int4::<M, SYMMETRIC_BYTES>(self.weights.group(group), acts, row)
            }
            (Format::Int4, Some(acts)) => simd.int4::<M, INT4_BYTES>(self.weights.group(group), acts, row),
            (Format::Int8, Some(acts)) => simd.int8(self.weights.group(group), acts, row),
            (Format::F16, _) => self.floats(
                simd,
                row,
                self.weights.group_f16(group),
                #[inline(always)]
                |w| simd.widen(w),
            ),
            (_, _) => self.floats(
                simd,
                row,
                self.weights.group_f32(group),
                #[inline(always)]
                |w| simd.load(w),
            ),
        };
        let (outputs, first) = (self.weights.outputs(), group * LANES);
        let count = LANES.min(outputs - first);
        for (m, terms) in sums.chunks_exact(self.terms).enumerate() {
            let mut sum = terms[0];
            for term in &terms[1..] {
                (0..LANES).for_each(|i| sum[i] += term[i]);
            }
            let at = (row / self.terms + m) * outputs + first;
            if let Some(bias) = self.epilogue.bias {
                sum.iter_mut().zip(&bias[first..first + count]).for_each(|(sum, bias)| *sum += bias);
            }
            if let Some(residual) = self.epilogue.residual {
                sum.iter_mut().zip(&residual[at..at + count]).for_each(|(sum, residual)| *sum += residual);
            }
            // SAFETY: groups of outputs and rows do not overlap, and each is computed by one task.
            unsafe { self.out.part(at, count) }.copy_from_slice(&sum[..count]);
        }
    }

    #[inline(always)]
    fn floats<S: Simd, W, const M: usize>(
        &self,
        simd: S,
        row: usize,
        weights: &[W],
        widen: impl Fn(&W) -> S::Vector,
    ) -> [Lanes; M] {
        let inputs = weights.len();
        let x: [&[f32]; M] = std::array::from_fn(|m| &self.x[(row + m) * inputs..][..inputs]);
        let mut sums = [simd.splat(0.0); M];
        for (block, weights) in weights.chunks(SUM).enumerate() {
            let x = x.map(|x| &x[block * SUM..][..weights.len()]);
            let mut partial = [simd.splat(0.0); M];
            for (k, weights) in weights.iter().enumerate() {
                let weights = widen(weights);
                for (sum, x) in partial.iter_mut().zip(x) {
                    *sum = simd.fused(simd.splat(x[k]), weights, *sum);
                }
            }
            for (sum, partial) in sums.iter_mut().zip(partial) {
                *sum = simd.add(*sum, partial);
            }
        }
        let mut out = [[0.0; LANES]; M];
        out.iter_mut().zip(sums).for_each(|(out, sum)| simd.store(sum, out));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::Row;
    use super::super::tests::{isas, numbers};
    use super::*;

    const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Int8, Format::Int4];

    fn product(isa: Isa, x: &[f32], weights: &Packed, epilogue: Epilogue<'_>) -> Vec<f32> {
        product_of(isa, x, weights, 1, epilogue)
    }
    fn product_of(isa: Isa, x: &[f32], weights: &Packed, terms: usize, epilogue: Epilogue<'_>) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / weights.inputs() * weights.outputs()];
        linear(isa, x, weights, terms, epilogue, &mut out);
        out
    }
    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn products_are_right_within_the_format() {
        for (outputs, inputs) in [(16, 32), (40, 96), (7, 33), (64, 576)] {
            let (rows, x) = (numbers(outputs * inputs, 1), numbers(5 * inputs, 2));
            for format in FORMATS {
                let weights = Packed::from_rows(format, &rows, outputs, inputs);
                let out = product(Isa::best(), &x, &weights, Epilogue::default());
                // What the format makes of the weights, times the activations as they are.
                let mut row = vec![0.0; inputs];
                for output in 0..outputs {
                    weights.row(output, &mut row);
                    for (r, x) in x.chunks(inputs).enumerate() {
                        let exact: f64 = x.iter().zip(&row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let off = (exact - f64::from(out[r * outputs + output])).abs() / (inputs as f64).sqrt();
                        assert!(
                            off < if format == Format::Int8 || format == Format::Int4 { 0.02 } else { 2e-6 },
                            "{format:?} {off}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn two_terms_leave_hardly_an_error_and_the_same_bits_everywhere() {
        let (outputs, inputs) = (33, 96);
        let (rows, x) = (numbers(outputs * inputs, 1), numbers(11 * inputs, 2));
        for format in [Format::Int8, Format::Int4] {
            let weights = Packed::from_rows(format, &rows, outputs, inputs);
            let exact = Packed::from_rows(Format::F32, &weights.unpacked(), outputs, inputs);
            let expected = product(Isa::best(), &x, &exact, Epilogue::default());
            let all = product_of(Isa::Portable, &x, &weights, 2, Epilogue::default());
            all.iter().zip(&expected).for_each(|(a, b)| assert!((a - b).abs() < 2e-4, "{format:?} {a} {b}"));
            for isa in isas() {
                let some = product_of(isa, &x[..3 * inputs], &weights, 2, Epilogue::default());
                assert_eq!(bits(&some), bits(&all[..3 * outputs]), "{format:?} {isa:?}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (outputs, inputs) in [(40, 96), (33, 65)] {
            let (rows, x) = (numbers(outputs * inputs, 3), numbers(11 * inputs, 4));
            for format in FORMATS {
                let weights = Packed::from_rows(format, &rows, outputs, inputs);
                let expected = product(Isa::Portable, &x, &weights, Epilogue::default());
                for isa in isas() {
                    assert_eq!(
                        bits(&product(isa, &x, &weights, Epilogue::default())),
                        bits(&expected),
                        "{format:?} {isa:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_company() {
        let (outputs, inputs) = (48, 160);
        let (rows, x) = (numbers(outputs * inputs, 5), numbers(64 * inputs, 6));
        for format in FORMATS {
            let weights = Packed::from_rows(format, &rows, outputs, inputs);
            for isa in isas() {
                let all = product(isa, &x, &weights, Epilogue::default());
                for count in [1, 2, 3, 7, 13, 64] {
                    let some = product(isa, &x[..count * inputs], &weights, Epilogue::default());
                    assert_eq!(bits(&some), bits(&all[..count * outputs]), "{format:?} {isa:?} {count}");
                }
            }
        }
    }

    #[test]
    fn weights_without_minima_give_the_same_bits() {
        let (outputs, inputs) = (33, 96);
        let bytes: Vec<u8> = (0..outputs * inputs / BLOCK * 18).map(|i| (i * 37 % 251) as u8).collect();
        // Scales that are small numbers: their high byte is that of about 0.01.
        let row = |output: usize| {
            let mut row = bytes[output * inputs / BLOCK * 18..][..inputs / BLOCK * 18].to_vec();
            row.chunks_exact_mut(18).for_each(|block| block[1] = 0x21);
            row
        };
        let rows: Vec<Vec<u8>> = (0..outputs).map(row).collect();
        let other = [0; 3 * 20];
        let short = Packed::new(Format::Int4, outputs, inputs, |output| Row::Q4_0(&rows[output]));
        // One row of another kind makes all of them keep their minima.
        let long = Packed::new(Format::Int4, outputs + 1, inputs, |output| match rows.get(output) {
            Some(row) => Row::Q4_0(row),
            None => Row::Q4_1(&other),
        });
        assert!(short.symmetric() && !long.symmetric() && short.bytes() < long.bytes());
        assert_eq!(short.unpacked(), long.unpacked()[..outputs * inputs]);
        let x = numbers(9 * inputs, 7);
        for isa in isas() {
            let short = product(isa, &x, &short, Epilogue::default());
            let long = product(isa, &x, &long, Epilogue::default());
            let pairs = short.chunks(outputs).zip(long.chunks(outputs + 1));
            pairs.for_each(|(short, long)| assert_eq!(bits(short), bits(&long[..outputs]), "{isa:?}"));
        }
    }

    #[test]
    fn bias_and_residual_are_added_in_this_order() {
        let weights = Packed::from_rows(Format::F32, &[1.0, 2.0], 2, 1);
        let (bias, residual) = ([1e8, 20.0], [-1e8, 1.0, -1e8, 2.0]);
        let epilogue = Epilogue { bias: Some(&bias), residual: Some(&residual) };
        assert_eq!(product(Isa::best(), &[1.0, 3.0], &weights, epilogue), [0.0, 23.0, 0.0, 28.0]);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for format in FORMATS {
            let weights = Packed::from_rows(format, &numbers(16 * 32, 1), 16, 32);
            for strange in [f32::NAN, f32::INFINITY] {
                let mut x = numbers(64, 2);
                x[40] = strange;
                let out = product(Isa::best(), &x, &weights, Epilogue::default());
                assert!(
                    out[..16].iter().all(|y| y.is_finite()) && out[16..].iter().all(|y| !y.is_finite()),
                    "{format:?}"
                );
            }
        }
    }

    #[test]
    fn rounding_is_to_even() {
        let cases = [(0.5, 0), (1.5, 2), (-0.5, 0), (-1.5, -2), (126.5, 126), (-126.7, -127), (0.0, 0), (3.2, 3)];
        cases.iter().for_each(|(x, expected)| assert_eq!(round(*x), *expected));
    }
}
