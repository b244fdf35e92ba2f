//! Draws the tokens of one answer from logits. What is drawn depends on the logits, the request's parameters, the place
//! (seed, choice, position) and the answer's own tokens so far; never on company in the batch.
//!
//! So an answer that is continued elsewhere from its delivered tokens goes on as if nothing had happened. The order of
//! operations is that of vLLM and llama.cpp: grammar, bias, penalties (repetition, frequency, presence), temperature,
//! top-k, min-p, top-p, draw. Log-probabilities are of the logits as the model gave them.

pub mod grammar;
mod penalties;
mod row;

use std::cell::RefCell;
use std::fmt;

use izar_common::chat::{Job, Logprobs, Sampling, Token};
use izar_common::grammar::Mask;

use grammar::Constraint;
pub use grammar::Grammars;
use penalties::Penalties;
use row::{Scratch, Shape};

/// Which draw this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub seed: u64,
    pub choice: u32,
    /// Index of the token in the answer, delivered tokens counted.
    pub position: u32,
}

/// A token that was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    pub token: Token,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
}

/// Why no token could be drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    /// Another worker, or a later time, may do it.
    pub retryable: bool,
}

/// Draws one answer's tokens, one after the other. Owned by whoever computes the answer.
pub struct Drawer {
    shape: Shape,
    place: Place,
    bias: Vec<(Token, f32)>,
    penalties: Option<Penalties>,
    logprobs: Option<u8>,
    grammar: Option<Constraint>,
    failure: Option<Failure>,
}

impl fmt::Debug for Drawer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drawer").field("shape", &self.shape).field("place", &self.place).finish_non_exhaustive()
    }
}

thread_local! {
    /// The memory of this thread's draws: a changed row, and what `row` needs. Never held over a wait.
    static SCRATCH: RefCell<(Vec<f32>, Scratch)> = RefCell::default();
}

impl Drawer {
    /// Begins or continues an answer: what was delivered is counted, and followed by the grammar.
    pub fn new(job: &Job, grammars: &Grammars) -> Result<Self, String> {
        let Sampling { temperature, top_k, min_p, top_p, seed, logprobs, .. } = job.sampling;
        let grammar = job.sampling.grammar.as_ref();
        let grammar = grammar.map(|grammar| Constraint::new(grammar, &job.delivered, grammars)).transpose()?;
        Ok(Self {
            shape: Shape { temperature, top_k, min_p, top_p },
            place: Place { seed, choice: job.choice, position: job.delivered.len() as u32 },
            bias: job.sampling.logit_bias.clone(),
            penalties: Penalties::new(job),
            logprobs,
            grammar,
            failure: None,
        })
    }

    /// Draws the next token and goes on to the one after it. `None`: see [`Drawer::failure`]; nothing more is drawn.
    ///
    /// May wait for a grammar's mask, for some milliseconds at most.
    pub fn draw(&mut self, logits: &[f32]) -> Option<Drawn> {
        let mask = match self.grammar.as_mut().map(Constraint::mask).transpose() {
            Ok(mask) => mask,
            Err(failure) => {
                self.failure = Some(failure);
                return None;
            }
        };
        let drawn = SCRATCH.with_borrow_mut(|(changed, scratch)| {
            let row = match self.changes(&mask) {
                true => self.change(logits, &mask, changed),
                false => logits,
            };
            let token = row::choose(row, &self.shape, uniform(self.place), scratch)?;
            let logprobs = self.logprobs.map(|count| row::logprobs(logits, token, usize::from(count), scratch));
            Some(Drawn { token, logprobs })
        });
        match &drawn {
            Some(drawn) => self.advance(drawn.token),
            None => self.failure = Some(Failure { reason: "the model gave no number".into(), retryable: true }),
        }
        drawn
    }

    /// Why the last draw gave nothing.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    fn changes(&self, mask: &Option<Mask>) -> bool {
        mask.is_some() || !self.bias.is_empty() || self.penalties.is_some()
    }

    /// Copies the logits and changes the copy.
    fn change<'a>(&self, logits: &[f32], mask: &Option<Mask>, changed: &'a mut Vec<f32>) -> &'a [f32] {
        changed.clear();
        changed.extend_from_slice(logits);
        if let Some(mask) = mask {
            forbid(mask.words(), changed);
        }
        penalties::add_bias(&self.bias, changed);
        if let Some(penalties) = &self.penalties {
            penalties.apply(changed);
        }
        changed
    }

    fn advance(&mut self, token: Token) {
        self.place.position += 1;
        if let Some(penalties) = &mut self.penalties {
            penalties.count(token);
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.take(token);
        }
    }
}

/// Makes every token impossible whose bit is not set.
fn forbid(mask: &[u32], row: &mut [f32]) {
    let mut words = mask.iter();
    for logits in row.chunks_mut(32) {
        match words.next().copied().unwrap_or(0) {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            word => logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0).for_each(|(_, logit)| {
                *logit = f32::NEG_INFINITY;
            }),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sequence::tests::job;
    use izar_common::chat::Grammar;
    use proptest::prelude::*;

    fn drawer(delivered: &[Token], change: impl Fn(&mut Sampling)) -> Drawer {
        let mut job = job(&[1, 2], delivered, 100);
        job.sampling.temperature = 1.0;
        change(&mut job.sampling);
        Drawer::new(&job, &Grammars::new(None)).unwrap()
    }
    fn place(position: u32) -> Place {
        Place { seed: 42, choice: 0, position }
    }
    /// Rows that differ from position to position.
    fn row(position: u32) -> Vec<f32> {
        (0..300).map(|token| (mix(u64::from(position) << 32 | token) >> 40) as f32 / (1 << 22) as f32).collect()
    }
    fn tokens(drawer: &mut Drawer, from: u32, to: u32) -> Vec<Token> {
        (from..to).map(|position| drawer.draw(&row(position)).unwrap().token).collect()
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
    fn an_answer_that_is_continued_goes_on_as_if_nothing_had_happened() {
        let all = |s: &mut Sampling| {
            (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) = (1.3, 0.4, 0.2);
            (s.top_k, s.min_p, s.top_p) = (50, 0.05, 0.9);
            s.logit_bias = vec![(3, 2.0), (4, -100.0)];
        };
        let whole = tokens(&mut drawer(&[], all), 0, 30);
        for cut in [1, 7, 29] {
            assert_eq!(tokens(&mut drawer(&whole[..cut], all), cut as u32, 30), whole[cut..], "{cut}");
        }
        assert!(!whole.contains(&4));
    }

    #[test]
    fn choices_and_seeds_give_other_answers() {
        let mut other = job(&[1, 2], &[], 100);
        other.sampling.temperature = 1.0;
        other.choice = 1;
        let other = tokens(&mut Drawer::new(&other, &Grammars::new(None)).unwrap(), 0, 20);
        let first = tokens(&mut drawer(&[], |_| ()), 0, 20);
        let seeded = tokens(&mut drawer(&[], |s| s.seed = 1), 0, 20);
        assert!(first != other && first != seeded && other != seeded);
    }

    #[test]
    fn a_bias_forces_and_bans() {
        let greedy = |bias: &[(Token, f32)]| {
            drawer(&[], |s| (s.temperature, s.logit_bias) = (0.0, bias.to_vec())).draw(&[1.0, 3.0, 2.0]).unwrap().token
        };
        assert_eq!([greedy(&[]), greedy(&[(1, -100.0)]), greedy(&[(0, 100.0)])], [1, 2, 0]);
    }

    #[test]
    fn a_frequent_token_gets_rarer() {
        let mut drawer = drawer(&[], |s| (s.temperature, s.frequency_penalty) = (0.0, 1.0));
        let drawn: Vec<Token> = (0..6).map(|_| drawer.draw(&[1.5, 3.2, 2.1]).unwrap().token).collect();
        assert_eq!(drawn, [1, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn log_probabilities_are_of_the_model_and_not_of_what_was_made_of_it() {
        let mut drawer = drawer(&[], |s| {
            (s.temperature, s.top_k, s.logprobs) = (0.0, 1, Some(2));
            s.logit_bias = vec![(0, -100.0)];
        });
        let drawn = drawer.draw(&[4.0_f32.ln(), 2.0_f32.ln(), 0.0, 0.0]).unwrap();
        let logprobs = drawn.logprobs.unwrap();
        assert_eq!((drawn.token, logprobs.top[0].0, logprobs.top[1].0), (1, 0, 1));
        assert!((logprobs.logprob - 0.25_f32.ln()).abs() < 1e-6 && logprobs.top[1].1 == logprobs.logprob);
        assert!(self::drawer(&[], |_| ()).draw(&[0.0]).unwrap().logprobs.is_none());
    }

    #[test]
    fn a_row_without_a_number_fails_as_retryable() {
        let mut drawer = drawer(&[], |_| ());
        assert_eq!(drawer.draw(&[f32::NAN; 3]), None);
        assert!(drawer.failure().unwrap().retryable);
    }

    #[test]
    fn only_allowed_tokens_are_left() {
        let mut row = vec![1.0; 80];
        forbid(&[u32::MAX, 1 << 5], &mut row);
        let left: Vec<usize> = (0..80).filter(|token| row[*token] == 1.0).collect();
        assert_eq!(left, (0..32).chain([37]).collect::<Vec<_>>());
    }

    #[test]
    fn a_structured_answer_follows_its_grammar_and_ends() {
        let (_dir, grammars) = grammar::tests::golden();
        for regex in ["(red|green|blue){2}", "[0-9]{4}-[0-9]{2}"] {
            let mut job = job(&[1, 2], &[], 100);
            job.sampling.temperature = 1.0;
            job.sampling.grammar = Some(Grammar::Regex(regex.into()));
            let answer = |delivered: &[Token]| {
                let mut job = job.clone();
                job.delivered = delivered.to_vec();
                let mut drawer = Drawer::new(&job, &grammars).unwrap();
                let mut tokens = delivered.to_vec();
                while tokens.last() != Some(&1) {
                    tokens.push(drawer.draw(&row(tokens.len() as u32).repeat(2)[..512]).unwrap().token);
                    assert!(tokens.len() < 20, "{regex}: {tokens:?} has no end");
                }
                tokens
            };
            let whole = answer(&[]);
            assert!(whole.len() > 2, "{whole:?}");
            assert_eq!(answer(&whole[..2]), whole);
        }
        let mut job = job(&[1], &[], 9);
        job.sampling.grammar = Some(Grammar::Regex("(".into()));
        let mut drawer = Drawer::new(&job, &grammars).unwrap();
        assert_eq!(drawer.draw(&row(0)), None);
        assert!(!drawer.failure().unwrap().retryable);
    }

    proptest! {
        #[test]
        fn a_draw_repeats_whatever_was_drawn_on_this_thread_before(
            logits in proptest::collection::vec(-50.0_f32..50.0, 1..400),
            temperature in 0.0_f32..2.0, top_k in 0_u32..90, top_p in 0.001_f32..=1.0, min_p in 0.0_f32..0.5,
            repetition in 0.5_f32..2.0, seed: u64,
        ) {
            let change = |s: &mut Sampling| {
                (s.temperature, s.top_k, s.top_p, s.min_p) = (temperature, top_k, top_p, min_p);
                (s.repetition_penalty, s.seed, s.logprobs) = (repetition, seed, Some(3));
            };
            let first = drawer(&[5], change).draw(&logits).unwrap();
            let other: Vec<f32> = logits.iter().rev().copied().chain([9.0; 100]).collect();
            drawer(&[6], change).draw(&other).unwrap();
            prop_assert_eq!(drawer(&[5], change).draw(&logits).unwrap(), first);
        }
    }
}
