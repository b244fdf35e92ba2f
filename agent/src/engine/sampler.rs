//! Draws the next token from logits. Pure: what is drawn depends on the logits, the request's parameters and the place
//! (seed, choice, position) alone, never on what was drawn before or on company in the batch.
//!
//! So an answer that is continued elsewhere from its delivered tokens goes on as if nothing had happened. Everything is
//! computed in a fixed order, and the exponential is ours, because that of the C library differs between versions.

use izar_common::chat::{Sampling, Token};

/// Which draw this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub seed: u64,
    pub choice: u32,
    /// Index of the token in the answer, delivered tokens counted.
    pub position: u32,
}

/// A token and what it weighs, relative to the heaviest (1).
type Candidate = (Token, f32);

/// Draws a token, or `None` if no logit is a number.
///
/// Temperature first, then the `top_k` heaviest, then the smallest set of the heaviest that holds `top_p` of their
/// weight. Temperature 0 takes the largest logit, the lowest token among equals.
pub fn sample(logits: &[f32], sampling: &Sampling, place: Place) -> Option<Token> {
    let best = argmax(logits)?;
    if sampling.temperature <= 0.0 {
        return Some(best);
    }
    let largest = bounded(logits[best as usize]);
    let weigh = |logit: f32| exp((bounded(logit) - largest) / sampling.temperature);
    let mut candidates: Vec<Candidate> =
        logits.iter().enumerate().map(|(token, logit)| (token as Token, weigh(*logit))).collect();
    let limited = sampling.top_k > 0 && (sampling.top_k as usize) < candidates.len();
    if limited {
        candidates.select_nth_unstable_by(sampling.top_k as usize - 1, heaviest_first);
        candidates.truncate(sampling.top_k as usize);
        // Sorted at once: sums below must not depend on the order that selecting happens to leave.
        candidates.sort_unstable_by(heaviest_first);
    }
    if sampling.top_p < 1.0 {
        keep_share(&mut candidates, sampling.top_p);
    }
    Some(draw(&candidates, uniform(place)))
}

/// The largest logit's token, the lowest among equals; `None` if there is no number.
fn argmax(logits: &[f32]) -> Option<Token> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|(_, largest)| logit > largest) {
            best = Some((token, logit));
        }
    }
    best.map(|(token, _)| token as Token)
}

/// A logit without the values that make arithmetic go astray.
fn bounded(logit: f32) -> f32 {
    if logit.is_nan() { f32::MIN } else { logit.clamp(f32::MIN, f32::MAX) }
}

fn heaviest_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the smallest set of the heaviest candidates that holds a share of the weight, sorted.
fn keep_share(candidates: &mut Vec<Candidate>, share: f32) {
    let total = weight(candidates);
    let wanted = total * f64::from(share.max(0.0));
    // All that weigh so little hold less than what may be left out, so the set lies among the others: sorting those
    // few instead of the whole vocabulary saves most of the time.
    let least = (total - wanted) / candidates.len() as f64;
    candidates.retain(|(_, weight)| f64::from(*weight) > least || *weight == 1.0);
    candidates.sort_unstable_by(heaviest_first);
    let mut held = 0.0;
    let enough = candidates.iter().position(|(_, weight)| {
        held += f64::from(*weight);
        held >= wanted
    });
    candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
}

fn weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

/// Takes the candidate at a share `at` (in [0, 1)) of the weight, counted in the candidates' order.
fn draw(candidates: &[Candidate], at: f64) -> Token {
    let mut left = weight(candidates) * at;
    for (token, weight) in candidates {
        left -= f64::from(*weight);
        if left < 0.0 {
            return *token;
        }
    }
    // Rounding can leave a crumb past the end: it belongs to the last candidate that weighs anything.
    let last = candidates.iter().rfind(|(_, weight)| *weight > 0.0);
    last.expect("the best token weighs 1").0
}

/// A number in [0, 1) with 53 bits that depends on the place alone.
fn uniform(place: Place) -> f64 {
    let bits = mix(mix(mix(place.seed) ^ u64::from(place.choice)) ^ u64::from(place.position));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Scrambles 64 bits. Source: SplitMix64, Steele, Lea and Flood 2014.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// e to the power of x, for x ≤ 0; relative error below 3e-7. Written without branches, so that it vectorizes.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; a polynomial for r, n into the exponent's bits.
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Below this the result would be subnormal: its weight beside 1 is nothing.
    let x = x.max(-87.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let tail = 0.041_666_66 + r * (0.008_333_335 + r * (0.001_388_89 + r * 0.000_198_41));
    let power = 1.0 + r * (1.0 + r * (0.5 + r * (0.166_666_67 + r * tail)));
    power * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampling(temperature: f32, top_k: u32, top_p: f32) -> Sampling {
        Sampling { temperature, top_p, top_k, seed: 0, max_tokens: 1, ignore_eos: false }
    }
    fn place(position: u32) -> Place {
        Place { seed: 42, choice: 0, position }
    }
    /// How often each token comes in many draws.
    fn shares(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        const DRAWS: u32 = 20_000;
        let mut counts = vec![0_u32; logits.len()];
        (0..DRAWS).for_each(|i| counts[sample(logits, sampling, place(i)).unwrap() as usize] += 1);
        counts.into_iter().map(|n| f64::from(n) / f64::from(DRAWS)).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_among_equals() {
        let greedy = sampling(0.0, 0, 1.0);
        assert_eq!(sample(&[0.0, 3.0, 3.0, 1.0], &greedy, place(0)), Some(1));
        assert_eq!(sample(&[f32::NAN, -1.0, f32::NEG_INFINITY], &greedy, place(0)), Some(1));
    }

    #[test]
    fn logits_without_a_number_give_no_token() {
        for temperature in [0.0, 1.0] {
            assert_eq!(sample(&[f32::NAN; 3], &sampling(temperature, 0, 1.0), place(0)), None);
            assert_eq!(sample(&[], &sampling(temperature, 0, 1.0), place(0)), None);
        }
    }

    #[test]
    fn strange_logits_are_survived() {
        let logits = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
        for (top_k, top_p) in [(0, 1.0), (2, 1.0), (0, 0.5), (3, 0.1)] {
            assert_eq!(sample(&logits, &sampling(1.0, top_k, top_p), place(0)), Some(1));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0_f32, 0.0, 2.0, -1.0];
        for temperature in [0.5_f32, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (got, weight) in shares(&logits, &sampling(temperature, 0, 1.0)).iter().zip(weights) {
                assert!((got - weight / total).abs() < 0.015, "{got} {}", weight / total);
            }
        }
    }

    #[test]
    fn top_k_keeps_the_heaviest_and_the_lowest_among_equals() {
        let drawn = shares(&[1.0, 1.0, 1.0, 5.0], &sampling(2.0, 2, 1.0));
        assert!(drawn[0] > 0.0 && drawn[3] > 0.0 && drawn[1] == 0.0 && drawn[2] == 0.0, "{drawn:?}");
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        // Shares 0.5, 0.25, 0.125, 0.125.
        let logits = [4.0_f32.ln(), 2.0_f32.ln(), 0.0, 0.0];
        let kept = |p| shares(&logits, &sampling(1.0, 0, p)).iter().filter(|share| **share > 0.0).count();
        assert_eq!([kept(0.01), kept(0.45), kept(0.6), kept(0.8), kept(0.99)], [1, 1, 2, 3, 4]);
    }

    #[test]
    fn draws_of_neighbouring_places_are_independent() {
        let mut sum = 0.0;
        let mut product = 0.0;
        const N: u32 = 50_000;
        for i in 0..N {
            let (a, b) = (uniform(place(i)), uniform(place(i + 1)));
            sum += a;
            product += (a - 0.5) * (b - 0.5);
        }
        assert!((sum / f64::from(N) - 0.5).abs() < 0.005);
        assert!((product / f64::from(N)).abs() < 0.002);
        let other = |seed, choice| uniform(Place { seed, choice, position: 3 });
        assert!(other(1, 0) != other(1, 1) && other(1, 0) != other(2, 0) && other(0, 1) != other(1, 0));
    }

    #[test]
    fn the_generator_never_changes() {
        // Answers of a seed must stay the same from version to version.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(uniform(Place { seed: 7, choice: 1, position: 5 }).to_bits(), 4_606_615_143_637_764_205);
    }

    #[test]
    fn the_exponential_is_close() {
        for i in 0..8700 {
            let x = -(i as f32) / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    proptest! {
        #[test]
        fn a_draw_is_always_a_candidate_and_repeats(
            logits in proptest::collection::vec(-50.0_f32..50.0, 1..80),
            temperature in 0.0_f32..2.0, top_k in 0_u32..90, top_p in 0.001_f32..=1.0,
            seed: u64, choice: u32, position: u32,
        ) {
            let (sampling, place) = (sampling(temperature, top_k, top_p), Place { seed, choice, position });
            let token = sample(&logits, &sampling, place).unwrap();
            prop_assert_eq!(sample(&logits, &sampling, place), Some(token));
            let better = logits.iter().filter(|l| **l > logits[token as usize]).count();
            prop_assert!(top_k == 0 || better < top_k as usize);
        }
    }
}
