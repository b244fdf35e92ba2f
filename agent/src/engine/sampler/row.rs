//! The arithmetic of a draw: one row of logits to one token. Pure, and the same bits on every machine.
//!
//! A row has 50,000 to 150,000 logits and is drawn once a step for every answer, so it is read few times and nothing of
//! its length is allocated or sorted: the maxima of blocks say where heavy candidates lie, sums of spans say where a draw
//! falls. Everything is added in a fixed order, and the exponential is ours, because that of the C library differs
//! between versions. Loops run over arrays of a fixed length, so that they vectorize, for the plainest x86-64 as for the widest.

use std::cmp::Ordering;

use izar_common::chat::{Logprobs, Token};

/// Logits whose maximum is kept.
const BLOCK: usize = 16;
/// Logits whose weights are added up together.
const SPAN: usize = 256;
/// A temperature below this is 0: dividing by it would leave the range of numbers.
const GREEDY: f32 = 1e-5;
/// The first look for the candidates of `top_p` goes down to this weight, and each next one so much deeper.
const FIRST_LOOK: f32 = 1.0 / 32.0;
const DEEPER: f32 = 1.0 / 1024.0;
/// Classes of weight: 64 for each halving, 24 halvings; what is lighter falls into the last.
const CLASSES: usize = 64 * 24;

/// How a distribution is cut to shape, in this order. Fields as in `Sampling`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub temperature: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub top_p: f32,
}

/// A token and what it weighs, relative to the heaviest (1); before that its logit.
type Candidate = (Token, f32);

/// Memory that is used again: one for each thread that draws.
#[derive(Debug, Default)]
pub struct Scratch {
    maxima: Vec<f32>,
    selected: Vec<f32>,
    sums: Vec<f64>,
    candidates: Vec<Candidate>,
    classes: Vec<f64>,
    crossing: Vec<Candidate>,
}

/// Compiles a function for wider registers, too, and calls the widest that the processor has. The bits are the same:
/// lanes are counted in the code, not by the processor, and nothing is contracted.
macro_rules! widest {
    ($(#[$doc:meta])* $name:ident = $plain:ident($($arg:ident: $type:ty),*) -> $result:ty) => {
        $(#[$doc])*
        pub fn $name($($arg: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($arg: $type),*) -> $result {
                    $plain($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) -> $result {
                    $plain($($arg),*)
                }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor was just asked for what the function is compiled for.
                    #[allow(unsafe_code)]
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    return unsafe { avx2($($arg),*) };
                }
            }
            $plain($($arg),*)
        }
    };
}

widest! {
    /// Takes the token at a share `at` (in [0, 1)) of the shaped distribution; `None` if no logit is a number above
    /// minus infinity. Logits that are not numbers, or minus infinity, are never taken; infinity always is.
    ///
    /// Temperature 0 takes the largest logit, the lowest token among equals.
    choose = choose_plainly(row: &[f32], shape: &Shape, at: f64, scratch: &mut Scratch) -> Option<Token>
}
widest! {
    /// The log-probability of a token in the distribution that the row itself is, and the `count` most probable tokens.
    logprobs = logprobs_plainly(row: &[f32], token: Token, count: usize, scratch: &mut Scratch) -> Logprobs
}

#[inline(always)]
fn choose_plainly(row: &[f32], shape: &Shape, at: f64, scratch: &mut Scratch) -> Option<Token> {
    let largest = maxima(row, &mut scratch.maxima);
    if largest == f32::NEG_INFINITY {
        return None;
    }
    if shape.temperature < GREEDY || largest == f32::INFINITY {
        return Some(position(row, largest, &scratch.maxima));
    }
    let weigh = Weigh::new(largest, shape.temperature);
    let limited = shape.top_k > 0 && (shape.top_k as usize) < row.len();
    if limited {
        heaviest(row, shape.top_k as usize, scratch);
        scratch.candidates.iter_mut().for_each(|(_, logit)| *logit = weigh.one(*logit));
        scratch.candidates.retain(|(_, weight)| *weight > 0.0 && *weight >= shape.min_p);
    } else if shape.min_p > 0.0 {
        collect(row, &weigh, shape.min_p, scratch);
    } else {
        weigh.spans(row, &mut scratch.sums);
        if shape.top_p >= 1.0 {
            return Some(fall(row, &weigh, &scratch.sums, at));
        }
        let wanted = scratch.sums.iter().sum::<f64>() * f64::from(shape.top_p);
        collect_share(row, &weigh, wanted, scratch);
        keep_share(scratch, wanted);
        return Some(draw(&scratch.candidates, at));
    }
    if shape.top_p < 1.0 {
        let wanted = weight(&scratch.candidates) * f64::from(shape.top_p);
        keep_share(scratch, wanted);
    }
    Some(draw(&scratch.candidates, at))
}

#[inline(always)]
fn logprobs_plainly(row: &[f32], token: Token, count: usize, scratch: &mut Scratch) -> Logprobs {
    let largest = maxima(row, &mut scratch.maxima);
    if !largest.is_finite() {
        return Logprobs { logprob: 0.0, top: Vec::new() };
    }
    let weigh = Weigh::new(largest, 1.0);
    weigh.spans(row, &mut scratch.sums);
    let total = f64::from(largest) + scratch.sums.iter().sum::<f64>().ln();
    let logprob = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { (f64::from(logit) - total) as f32 };
    let mut top = Vec::new();
    if count > 0 {
        heaviest(row, count, scratch);
        scratch.candidates.sort_unstable_by(heaviest_first);
        top = scratch.candidates.iter().map(|(token, logit)| (*token, logprob(*logit))).collect();
    }
    Logprobs { logprob: logprob(row[token as usize]), top }
}

/// The larger of two, the second if one is not a number: one instruction.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Fills in the maximum of each block and returns that of all; what is not a number counts as minus infinity.
#[inline(always)]
fn maxima(row: &[f32], out: &mut Vec<f32>) -> f32 {
    #[inline(always)]
    fn of(block: &[f32; BLOCK]) -> f32 {
        let clean: [f32; BLOCK] = std::array::from_fn(|i| larger(block[i], f32::NEG_INFINITY));
        let eight: [f32; 8] = std::array::from_fn(|i| larger(clean[i], clean[i + 8]));
        let four: [f32; 4] = std::array::from_fn(|i| larger(eight[i], eight[i + 4]));
        larger(larger(four[0], four[2]), larger(four[1], four[3]))
    }
    let (blocks, rest) = row.as_chunks::<BLOCK>();
    out.clear();
    out.resize(blocks.len(), 0.0);
    for (block, out) in blocks.iter().zip(out.iter_mut()) {
        *out = of(block);
    }
    if !rest.is_empty() {
        out.push(of(&padded(rest)));
    }
    let (lanes, rest) = out.as_chunks::<BLOCK>();
    let mut best = padded::<BLOCK>(rest);
    for lane in lanes {
        for i in 0..BLOCK {
            best[i] = larger(lane[i], best[i]);
        }
    }
    of(&best)
}

/// The end of a row, filled up with what weighs nothing.
#[inline(always)]
fn padded<const N: usize>(rest: &[f32]) -> [f32; N] {
    let mut all = [f32::NEG_INFINITY; N];
    all[..rest.len()].copy_from_slice(rest);
    all
}

/// The first token that has the largest logit.
fn position(row: &[f32], largest: f32, maxima: &[f32]) -> Token {
    let block = maxima.iter().position(|max| *max == largest).expect("a block has the largest");
    let start = block * BLOCK;
    let inside = row[start..].iter().position(|logit| *logit == largest).expect("the block has it");
    (start + inside) as Token
}

/// Turns logits into weights.
struct Weigh {
    largest: f32,
    /// log2(e) / temperature.
    scale: f32,
}

impl Weigh {
    #[inline(always)]
    fn new(largest: f32, temperature: f32) -> Self {
        Self { largest, scale: std::f32::consts::LOG2_E / temperature }
    }
    #[inline(always)]
    fn one(&self, logit: f32) -> f32 {
        power((logit - self.largest) * self.scale)
    }
    /// Adds up the weights of each span.
    #[inline(always)]
    fn spans(&self, row: &[f32], out: &mut Vec<f64>) {
        let (spans, rest) = row.as_chunks::<SPAN>();
        out.clear();
        out.resize(spans.len(), 0.0);
        // Loops and not closures: only what is inlined is compiled for wide registers.
        for (span, out) in spans.iter().zip(out.iter_mut()) {
            *out = self.span(span);
        }
        if !rest.is_empty() {
            out.push(self.span(&padded(rest)));
        }
    }
    #[inline(always)]
    fn span(&self, span: &[f32; SPAN]) -> f64 {
        let mut lanes = [0.0_f32; BLOCK];
        for block in span.as_chunks::<BLOCK>().0 {
            for i in 0..BLOCK {
                lanes[i] += self.one(block[i]);
            }
        }
        let mut sum = 0.0;
        for lane in lanes {
            sum += f64::from(lane);
        }
        sum
    }
    /// A logit that surely weighs less than `weight`, or minus infinity.
    fn below(&self, weight: f32) -> f32 {
        // The logarithm only says where to look, so that of the C library will do, with room for its last bits.
        if weight > 0.0 { self.largest + (weight.log2() - 1e-3) / self.scale } else { f32::NEG_INFINITY }
    }
}

/// Takes the token at a share of the whole distribution.
fn fall(row: &[f32], weigh: &Weigh, sums: &[f64], at: f64) -> Token {
    let mut left = sums.iter().sum::<f64>() * at;
    let inside = sums.iter().position(|sum| {
        let inside = left < *sum;
        if !inside {
            left -= sum;
        }
        inside
    });
    // Rounding can leave a crumb past the end: it belongs to the last token that weighs anything.
    let span = inside.unwrap_or_else(|| {
        left = f64::INFINITY;
        sums.iter().rposition(|sum| *sum > 0.0).expect("the heaviest weighs 1")
    });
    let start = span * SPAN;
    let mut token = start;
    for (i, &logit) in row[start..].iter().take(SPAN).enumerate() {
        let weight = f64::from(weigh.one(logit));
        if weight > 0.0 {
            token = start + i;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    token as Token
}

/// Collects the `count` largest logits, in the order of their tokens; the lowest tokens among equals.
#[inline(always)]
fn heaviest(row: &[f32], count: usize, scratch: &mut Scratch) {
    let Scratch { maxima, selected, candidates, .. } = scratch;
    // As many blocks hold a logit that is at least this, so none of the wanted is smaller.
    let least = if count <= maxima.len() {
        selected.clone_from(maxima);
        *selected.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    candidates.clear();
    for_candidates(row, maxima, least, |token, logit| candidates.push((token, logit)));
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count - 1, heaviest_first);
        candidates.truncate(count);
        candidates.sort_unstable_by_key(|(token, _)| *token);
    }
}

/// Gives each logit that is at least `least` and more than minus infinity, in order.
fn for_candidates(row: &[f32], maxima: &[f32], least: f32, mut give: impl FnMut(Token, f32)) {
    for (block, _) in maxima.iter().enumerate().filter(|(_, max)| **max >= least) {
        let start = block * BLOCK;
        let logits = row[start..].iter().take(BLOCK).enumerate();
        logits.filter(|(_, l)| **l >= least && **l > f32::NEG_INFINITY).for_each(|(i, l)| {
            give((start + i) as Token, *l);
        });
    }
}

/// Collects every candidate of at least this weight, in the order of their tokens.
#[inline(always)]
fn collect(row: &[f32], weigh: &Weigh, least: f32, scratch: &mut Scratch) {
    let Scratch { maxima, candidates, .. } = scratch;
    candidates.clear();
    for_candidates(row, maxima, weigh.below(least), |token, logit| {
        let weight = weigh.one(logit);
        if weight >= least && weight > 0.0 {
            candidates.push((token, weight));
        }
    });
}

/// Collects the heaviest candidates down to some weight, so that they hold `wanted` together.
fn collect_share(row: &[f32], weigh: &Weigh, wanted: f64, scratch: &mut Scratch) {
    let mut least = FIRST_LOOK;
    loop {
        collect(row, weigh, least, scratch);
        if least == 0.0 || weight(&scratch.candidates) >= wanted {
            return;
        }
        least = if least > f32::MIN_POSITIVE / DEEPER { least * DEEPER } else { 0.0 };
    }
}

/// Keeps the smallest set of the heaviest candidates that holds `wanted`, in the order of their tokens.
///
/// Candidates are put into classes of about equal weight, heaviest first; only the class in which the border falls is
/// sorted.
fn keep_share(scratch: &mut Scratch, wanted: f64) {
    let Scratch { candidates, classes, crossing, .. } = scratch;
    // For numbers from 0 on the order of the bits is that of the numbers. 1 is the heaviest.
    let class =
        |weight: f32| ((1.0_f32.to_bits().saturating_sub(weight.to_bits())) >> 17).min(CLASSES as u32 - 1) as usize;
    classes.clear();
    classes.resize(CLASSES, 0.0);
    candidates.iter().for_each(|(_, weight)| classes[class(*weight)] += f64::from(*weight));
    let mut held = 0.0;
    let border = classes.iter().position(|mass| {
        let enough = held + mass >= wanted;
        if !enough {
            held += mass;
        }
        enough
    });
    let Some(border) = border else { return };
    crossing.clear();
    crossing.extend(candidates.iter().filter(|(_, weight)| class(*weight) == border));
    crossing.sort_unstable_by(heaviest_first);
    let enough = crossing.iter().position(|(_, weight)| {
        held += f64::from(*weight);
        held >= wanted
    });
    let Some(last) = enough.map_or(crossing.last(), |at| crossing.get(at)).copied() else { return };
    candidates.retain(|candidate| match class(candidate.1).cmp(&border) {
        Ordering::Less => true,
        Ordering::Equal => heaviest_first(candidate, &last) != Ordering::Greater,
        Ordering::Greater => false,
    });
}

fn heaviest_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

/// Takes the candidate at a share of the weight, counted in the candidates' order.
fn draw(candidates: &[Candidate], at: f64) -> Token {
    let mut left = weight(candidates) * at;
    for (token, weight) in candidates {
        left -= f64::from(*weight);
        if left < 0.0 {
            return *token;
        }
    }
    // Rounding can leave a crumb past the end.
    candidates.last().expect("the heaviest is always kept").0
}

/// 2 to the power of x, for x ≤ 0; relative error below 3e-7, and 0 below -126 and for what is not a number. Written
/// without branches and casts, so that it vectorizes.
///
/// x = n + f with |f| ≤ 1/2; Taylor's polynomial for f, in pairs so that less waits for what comes before, and n into
/// the exponent's bits.
#[inline(always)]
fn power(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x + ROUND;
    let f = x - (rounded - ROUND);
    let f2 = f * f;
    let high = (0.009_618_129 + f * 0.001_333_355_8) + f2 * 0.000_154_035_3;
    let low = (1.0 + f * std::f32::consts::LN_2) + f2 * ((0.240_226_5 + f * 0.055_504_11) + f2 * high);
    let exact = low * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    // Below this the result would be subnormal: its weight beside 1 is nothing.
    if x > -126.0 { exact } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Shape = Shape { temperature: 1.0, top_k: 0, min_p: 0.0, top_p: 1.0 };

    fn take(row: &[f32], shape: &Shape, at: f64) -> Option<Token> {
        choose(row, shape, at, &mut Scratch::default())
    }

    /// How often each token comes when the shares are spread evenly.
    fn shares(row: &[f32], shape: &Shape) -> Vec<f64> {
        const DRAWS: u32 = 20_000;
        let mut counts = vec![0_u32; row.len()];
        let mut scratch = Scratch::default();
        for i in 0..DRAWS {
            let at = (f64::from(i) + 0.5) / f64::from(DRAWS);
            counts[choose(row, shape, at, &mut scratch).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|n| f64::from(n) / f64::from(DRAWS)).collect()
    }

    /// The tokens that can come.
    fn kept(row: &[f32], shape: &Shape) -> Vec<usize> {
        shares(row, shape).iter().enumerate().filter(|(_, share)| **share > 0.0).map(|(token, _)| token).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_among_equals() {
        let greedy = Shape { temperature: 0.0, ..PLAIN };
        assert_eq!(take(&[0.0, 3.0, 3.0, 1.0], &greedy, 0.9), Some(1));
        assert_eq!(take(&[f32::NAN, -1.0, f32::NEG_INFINITY], &greedy, 0.9), Some(1));
        let mut row = vec![0.0; 1000];
        (row[700], row[900]) = (5.0, 5.0);
        assert_eq!(take(&row, &greedy, 0.9), Some(700));
    }

    #[test]
    fn logits_without_a_number_give_no_token() {
        for temperature in [0.0, 1.0] {
            for row in [&[f32::NAN; 3][..], &[], &[f32::NEG_INFINITY; 40]] {
                assert_eq!(take(row, &Shape { temperature, ..PLAIN }, 0.5), None);
            }
        }
    }

    #[test]
    fn what_is_not_a_number_or_minus_infinity_is_never_taken() {
        let row = [f32::NAN, f32::NEG_INFINITY, 0.0, f32::NAN, 1.0, f32::NEG_INFINITY];
        for shape in [
            PLAIN,
            Shape { top_k: 5, ..PLAIN },
            Shape { min_p: 1e-30, ..PLAIN },
            Shape { top_p: 0.999_999, ..PLAIN },
            Shape { temperature: 2.0, top_k: 3, top_p: 0.999, min_p: 0.0 },
        ] {
            assert_eq!(kept(&row, &shape), [2, 4], "{shape:?}");
            assert!((0..=1).all(|at| [2, 4].contains(&take(&row, &shape, f64::from(at)).unwrap())), "{shape:?}");
        }
        assert_eq!(kept(&[f32::NAN, f32::INFINITY, 0.0], &PLAIN), [1]);
        assert_eq!(kept(&[f32::MAX, -f32::MAX, 0.0], &PLAIN), [0]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let row = [1.0_f32, 0.0, 2.0, -1.0];
        for temperature in [0.5_f32, 1.0, 2.0] {
            let weights: Vec<f64> = row.iter().map(|l| f64::from(l / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (got, weight) in shares(&row, &Shape { temperature, ..PLAIN }).iter().zip(weights) {
                assert!((got - weight / total).abs() < 1e-4, "{got} {}", weight / total);
            }
        }
    }

    #[test]
    fn top_k_keeps_the_heaviest_and_the_lowest_among_equals() {
        assert_eq!(kept(&[1.0, 1.0, 1.0, 5.0], &Shape { top_k: 2, temperature: 2.0, ..PLAIN }), [0, 3]);
        let row: Vec<f32> = (0..500).map(|i| (i % 100) as f32 / 50.0).collect();
        assert_eq!(kept(&row, &Shape { top_k: 7, ..PLAIN }), [98, 99, 198, 199, 299, 399, 499]);
    }

    #[test]
    fn min_p_drops_what_is_much_less_probable_than_the_best() {
        let row = [4.0_f32.ln(), 2.0_f32.ln(), 0.0, -1.0];
        for (min_p, expected) in [(0.2, 3), (0.3, 2), (0.6, 1), (1.0, 1)] {
            assert_eq!(kept(&row, &Shape { min_p, ..PLAIN }).len(), expected, "{min_p}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_set() {
        // Shares 0.5, 0.25, 0.125, 0.125.
        let row = [0.0, 4.0_f32.ln(), 2.0_f32.ln(), 0.0];
        let kept = |top_p| kept(&row, &Shape { top_p, ..PLAIN });
        assert_eq!(kept(0.01), [1]);
        assert_eq!(kept(0.45), [1]);
        assert_eq!(kept(0.6), [1, 2]);
        assert_eq!(kept(0.8), [0, 1, 2]);
        assert_eq!(kept(0.99), [0, 1, 2, 3]);
    }

    #[test]
    fn top_p_counts_within_what_top_k_and_min_p_left() {
        // Shares 0.5, 0.25, 0.125, 0.125; of the first two alone 2/3, 1/3.
        let row = [4.0_f32.ln(), 2.0_f32.ln(), 0.0, 0.0];
        assert_eq!(kept(&row, &Shape { top_k: 2, top_p: 0.6, ..PLAIN }), [0]);
        assert_eq!(kept(&row, &Shape { min_p: 0.4, top_p: 0.6, ..PLAIN }), [0]);
        assert_eq!(kept(&row, &Shape { top_p: 0.6, ..PLAIN }), [0, 1]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_row_and_sorted() {
        let row = [4.0_f32.ln(), f32::NAN, 2.0_f32.ln(), 0.0, 0.0, f32::NEG_INFINITY];
        let found = logprobs(&row, 3, 2, &mut Scratch::default());
        let near = |a: f32, share: f32| (a - share.ln()).abs() < 1e-6;
        assert!(near(found.logprob, 0.125), "{found:?}");
        assert!(found.top[0].0 == 0 && near(found.top[0].1, 0.5), "{found:?}");
        assert!(found.top[1].0 == 2 && near(found.top[1].1, 0.25), "{found:?}");
        let all = logprobs(&row, 5, 20, &mut Scratch::default());
        assert_eq!((all.logprob, all.top.len()), (f32::NEG_INFINITY, 4));
        assert_eq!(logprobs(&row, 0, 0, &mut Scratch::default()).top, []);
    }

    #[test]
    fn the_power_is_close() {
        for i in 0..12_600 {
            let x = -(i as f32) / 100.0;
            let want = f64::from(x).exp2();
            assert!((f64::from(power(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert_eq!((power(0.0), power(-3.0)), (1.0, 0.125));
        assert_eq!((power(f32::NEG_INFINITY), power(f32::NAN), power(f32::MIN)), (0.0, 0.0, 0.0));
    }

    /// The slow and plain way to the same set.
    fn plainly(row: &[f32], shape: &Shape) -> Vec<usize> {
        let mut all: Vec<(usize, f32)> = row.iter().copied().enumerate().collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if shape.top_k > 0 {
            all.truncate(shape.top_k as usize);
        }
        let weigh = Weigh::new(all[0].1, shape.temperature);
        let mut all: Vec<(usize, f64)> = all.into_iter().map(|(t, l)| (t, f64::from(weigh.one(l)))).collect();
        all.retain(|(_, w)| *w > 0.0 && *w >= f64::from(shape.min_p));
        let wanted = all.iter().map(|(_, w)| w).sum::<f64>() * f64::from(shape.top_p);
        let mut held = 0.0;
        let enough = all.iter().position(|(_, w)| {
            held += w;
            held >= wanted
        });
        if shape.top_p < 1.0 {
            all.truncate(enough.map_or(all.len(), |at| at + 1));
        }
        let mut tokens: Vec<usize> = all.into_iter().map(|(t, _)| t).collect();
        tokens.sort_unstable();
        tokens
    }

    proptest! {
        #[test]
        fn the_widest_form_has_the_bits_of_the_plain_one(
            row in proptest::collection::vec(-30.0_f32..30.0, 1..1500),
            temperature in 0.1_f32..2.0, top_k in 0_u32..50, top_p in 0.05_f32..=1.0, at in 0.0_f64..1.0,
        ) {
            let shape = Shape { temperature, top_k, min_p: 0.0, top_p };
            let (mut wide, mut plain) = (Scratch::default(), Scratch::default());
            prop_assert_eq!(choose(&row, &shape, at, &mut wide), choose_plainly(&row, &shape, at, &mut plain));
            let bits = |scratch: &Scratch| scratch.sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&wide), bits(&plain));
            prop_assert_eq!(logprobs(&row, 0, 5, &mut wide), logprobs_plainly(&row, 0, 5, &mut plain));
        }

        #[test]
        fn every_draw_is_one_of_the_plainly_found_candidates_and_repeats(
            row in proptest::collection::vec(-30.0_f32..30.0, 1..700),
            temperature in 0.1_f32..2.0, top_k in 0_u32..90, min_p in 0.0_f32..0.3, top_p in 0.05_f32..0.99,
            at in 0.0_f64..1.0, off in 0_u32..8,
        ) {
            let on = |bit: u32| off >> bit & 1 == 0;
            let shape = Shape {
                temperature,
                top_k: if on(0) { top_k } else { 0 },
                min_p: if on(1) { min_p } else { 0.0 },
                top_p: if on(2) { top_p } else { 1.0 },
            };
            let token = take(&row, &shape, at).unwrap();
            prop_assert_eq!(take(&row, &shape, at), Some(token));
            let tokens = plainly(&row, &shape);
            prop_assert!(tokens.contains(&(token as usize)), "{} {:?}", token, tokens);
            // The ends of the range are the first of them, and the last but for what is lost in rounding.
            let first = take(&row, &shape, 0.0).unwrap() as usize;
            let last = take(&row, &shape, 1.0).unwrap() as usize;
            prop_assert!(tokens.contains(&first) && tokens.contains(&last));
            if shape.top_k > 0 || shape.min_p > 0.0 || shape.top_p < 1.0 {
                let weigh = Weigh::new(row.iter().copied().fold(f32::NEG_INFINITY, f32::max), shape.temperature);
                let beyond: f32 = tokens.iter().filter(|t| **t > last).map(|t| weigh.one(row[*t])).sum();
                prop_assert!(first == tokens[0] && beyond < 1e-12, "{} {} {:?}", first, last, tokens);
            }
        }
    }
}
