//! Operations on the rows of a step, one row at a time: norms, activations, rotations.
//!
//! Sums run in [`LANES`] lanes from first to last and are then added half to half, so that a row gives the same
//! bits in any company and on any instruction set.

use super::isa::{Isa, LANES, Lanes, dispatch};
use super::pool::{self, Parts};

/// Numbers that a thread gets at least.
const SHARE: usize = 16 << 10;

/// e to the power of x; relative error below 3e-7, without branches. 0 below -87, and e^88 above 88.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; a polynomial for r, n into the exponent's bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding it leaves no bits for fractions.
    const SHIFT: f32 = 12_582_912.0;
    let bounded = if x > 88.0 { 88.0 } else { x };
    let bounded = if bounded < -87.0 { -87.0 } else { bounded };
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, bounded));
    let p = r.mul_add(0.000_198_41, 0.001_388_89);
    let p = r.mul_add(p, 0.008_333_335);
    let p = r.mul_add(p, 0.041_666_66);
    let p = r.mul_add(p, 0.166_666_67);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(r * p, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let result = p * power;
    if x < -87.0 { 0.0 } else { result }
}

/// Adds the lanes of a vector: its halves, then the halves of that.
#[inline(always)]
pub fn total(lanes: &Lanes) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Adds up products in lanes: `sum[i % LANES] += a[i] * b[i]`.
#[inline(always)]
pub fn dot_lanes(a: &[f32], b: &[f32], sum: &mut Lanes) {
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        (0..LANES).for_each(|i| sum[i] = a[i].mul_add(b[i], sum[i]));
    }
    for (i, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        sum[i] = a.mul_add(*b, sum[i]);
    }
}

/// Runs `one(row, out)` for every row, shared among threads.
fn each_row(rows: usize, width: usize, out: &mut [f32], one: impl Fn(usize, &mut [f32]) + Sync) {
    assert_eq!(out.len(), rows * width, "a result for each row");
    let parts = Parts::new(out);
    pool::split(rows, SHARE.div_ceil(width.max(1)), |from, to| {
        for row in from..to {
            // SAFETY: rows do not overlap, and each is computed by one task.
            one(row, unsafe { parts.part(row * width, width) });
        }
    });
}

/// Scales each row of `x`, `[rows, width]`, to a root mean square of one, then by `weight`, `[width]`.
///
/// Source: Zhang and Sennrich 2019; epsilon inside the root.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    each_row(
        x.len() / width,
        width,
        out,
        |row, out| dispatch!(isa, _simd => norm(&x[row * width..][..width], weight, epsilon, out)),
    );
}

/// One row of [`rms_norm`].
#[inline(always)]
pub fn norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut squares = [0.0; LANES];
    dot_lanes(x, x, &mut squares);
    let scale = 1.0 / (total(&squares) / x.len() as f32 + epsilon).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// The gated activation of feed-forward blocks. `gate_up`: `[rows, 2 * width]`, gates first; `out`: `[rows, width]`.
pub fn swiglu(isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    each_row(gate_up.len() / (2 * width), width, out, |row, out| {
        let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
        dispatch!(isa, _simd => gated(gate, up, out));
    });
}

/// One row of [`swiglu`].
#[inline(always)]
pub fn gated(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// Turns pairs of numbers in place: (i, i + half), or (2 i, 2 i + 1) if `neighbours`. `x`: `[2 * half]`.
#[inline(always)]
pub fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], neighbours: bool) {
    let half = cos.len();
    if neighbours {
        for (i, pair) in x.chunks_exact_mut(2).enumerate() {
            (pair[0], pair[1]) = turn(pair[0], pair[1], cos[i], sin[i]);
        }
    } else {
        let (a, b) = x.split_at_mut(half);
        for i in 0..half {
            (a[i], b[i]) = turn(a[i], b[i], cos[i], sin[i]);
        }
    }
}

#[inline(always)]
fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), b.mul_add(cos, a * sin))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{close, isas, numbers};
    use super::*;

    #[test]
    fn the_exponential_is_close() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (x, weight) = (numbers(3 * 100, 1), numbers(100, 2));
        let run = |isa| {
            let (mut normed, mut gated) = (vec![0.0; 300], vec![0.0; 150]);
            rms_norm(isa, &x, &weight, 1e-5, &mut normed);
            swiglu(isa, &x, 50, &mut gated);
            normed.extend(gated);
            normed.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        isas().for_each(|isa| assert_eq!(run(isa), run(Isa::Portable), "{isa:?}"));
    }

    #[test]
    fn normalized_rows_have_a_root_mean_square_of_the_weight() {
        let mut out = [0.0; 2];
        rms_norm(Isa::best(), &[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
        let rms = 12.5_f32.sqrt();
        close(&out, &[3.0 / rms, 8.0 / rms]);
    }

    #[test]
    fn gates_are_sigmoids() {
        let mut out = [0.0; 2];
        swiglu(Isa::best(), &[0.0, 2.0, 5.0, 3.0], 2, &mut out);
        close(&out, &[0.0, 2.0 / (1.0 + (-2.0_f32).exp()) * 3.0]);
    }

    #[test]
    fn rotations_turn_both_kinds_of_pairs() {
        let (cos, sin) = ([0.6, 0.0], [0.8, 1.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut x, &cos, &sin, false);
        close(&x, &[0.6 - 2.4, -4.0, 1.8 + 0.8, 2.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut x, &cos, &sin, true);
        close(&x, &[0.6 - 1.6, 1.2 + 0.8, -4.0, 3.0]);
    }
}
