//! Rotary frequencies, and how they are stretched for contexts longer than the first training's.

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    None,
    /// Every frequency divided by the factor.
    Linear {
        factor: f32,
    },
    /// Low frequencies divided, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original_context: f32,
    },
    Yarn(Yarn),
}

/// YaRN: pairs that turn often keep their frequency, pairs that turn seldom get it divided, a ramp lies between; and
/// attention is sharpened to make up for the longer context.
///
/// Source: Peng et al. 2023; the constants as in transformers, `modeling_rope_utils.py`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    pub factor: f32,
    pub original_context: f32,
    /// Turns within the original context from which on a pair is kept.
    pub beta_fast: f32,
    /// Turns within the original context up to which a pair is stretched in full.
    pub beta_slow: f32,
    /// The ramp begins and ends at whole pairs.
    pub truncate: bool,
    /// What cosines and sines are multiplied by.
    pub magnitude: f32,
    /// What scores are multiplied by besides (DeepSeek).
    pub score_gain: f32,
}

/// YaRN's sharpening for a stretch by `factor`, weighted by `weight`.
pub(super) fn sharpening(factor: f32, weight: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(weight) * f64::from(factor).ln() + 1.0) as f32 }
}

impl Scaling {
    /// The angle by which each pair turns from one position to the next, `[dim / 2]`, in radians.
    ///
    /// Source: transformers, `modeling_rope_utils.py`, in the same order of f32 operations.
    pub(super) fn frequencies(self, theta: f32, dim: usize) -> Vec<f32> {
        let periods = (0..dim / 2).map(|i| theta.powf((2 * i) as f32 / dim as f32));
        match self {
            Scaling::None => periods.map(|p| 1.0 / p).collect(),
            Scaling::Linear { factor } => periods.map(|p| 1.0 / p / factor).collect(),
            Scaling::Llama3 { factor, low, high, original_context } => {
                periods.map(|p| llama3(1.0 / p, factor, low, high, original_context)).collect()
            }
            Scaling::Yarn(yarn) => {
                let kept = yarn.kept(theta, dim);
                let blend = |(p, kept): (f32, f32)| 1.0 / (yarn.factor * p) * (1.0 - kept) + 1.0 / p * kept;
                periods.zip(kept).map(blend).collect()
            }
        }
    }
}

fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original_context: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength > original_context / low {
        frequency / factor
    } else if wavelength < original_context / high {
        frequency
    } else {
        let smooth = (original_context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

impl Yarn {
    /// How much of its frequency each pair keeps, from 1 to 0.
    fn kept(&self, theta: f32, dim: usize) -> Vec<f32> {
        // The pair that turns so often within the original context.
        let pair = |turns: f32| {
            let around = f64::from(turns) * 2.0 * std::f64::consts::PI;
            dim as f64 * (f64::from(self.original_context) / around).ln() / (2.0 * f64::from(theta).ln())
        };
        let (mut first, mut last) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        let (first, mut last) = (first.max(0.0), last.min(dim as f64 - 1.0));
        if first == last {
            last += 0.001; // the ramp must not divide by nothing
        }
        let ramp = |i: usize| ((i as f32 - first as f32) / (last - first) as f32).clamp(0.0, 1.0);
        (0..dim / 2).map(|i| 1.0 - ramp(i)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_frequencies_are_stretched_and_high_ones_kept() {
        let apply = |frequency| llama3(frequency, 8.0, 1.0, 4.0, 64.0);
        assert_eq!(apply(1.0), 1.0);
        assert_eq!(apply(0.01), 0.01 / 8.0);
        let between = apply(0.2);
        assert!(0.2 / 8.0 < between && between < 0.2);
        assert_eq!(Scaling::Linear { factor: 4.0 }.frequencies(100.0, 2), [0.25]);
    }

    /// The formula of the paper, computed apart in f64: a tiny model's stretch, Qwen2.5's, and one without whole pairs.
    #[test]
    fn yarn_agrees_with_its_formula_in_double_precision() {
        let yarn = |factor, original_context| Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            magnitude: 1.0,
            score_gain: 1.0,
        };
        let check = |yarn, theta, dim, expected: &[(usize, f32)]| {
            let found = Scaling::Yarn(yarn).frequencies(theta, dim);
            assert_eq!(found.len(), dim / 2);
            for (i, value) in expected {
                assert!((found[*i] / value - 1.0).abs() < 1e-5, "pair {i}: {} and {value}", found[*i]);
            }
        };
        check(yarn(4.0, 64.0), 10_000.0, 8, &[(0, 1.0), (1, 0.0625), (2, 0.0025), (3, 0.00025)]);
        let qwen = [(0, 1.0), (23, 6.978_306e-3), (24, 5.375_321_5e-3), (30, 1.064_361e-3), (63, 3.102_344_4e-7)];
        check(yarn(4.0, 32_768.0), 1e6, 128, &qwen);
        let smooth = Yarn { truncate: false, ..yarn(40.0, 4096.0) };
        let ramp = [
            (10, 5.623_413_3e-2),
            (11, 4.036_758_4e-2),
            (15, 8.446_235e-3),
            (22, 1.183_877_3e-4),
            (31, 3.333_803_6e-6),
        ];
        check(smooth, 10_000.0, 64, &ramp);
        assert!((sharpening(40.0, 0.707) - 1.260_803_8).abs() < 1e-6);
        assert_eq!(sharpening(1.0, 1.0), 1.0);
    }
}
