//! Penalties for tokens that were there before, and biases that the request gives. Pure.
//!
//! All of them depend on the tokens so far alone, so an answer that is continued elsewhere counts them again.

use izar_common::chat::{Job, Sampling, Token};

/// What a sequence has seen, by token.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// Each token of prompt (only if `repetition` looks at it) and answer, once, sorted.
    seen: Vec<Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    token: Token,
    /// How often it stands in the answer.
    answer: u32,
}

impl Penalties {
    /// Counts the tokens of a job, or returns `None` if it asks for no penalty.
    pub fn new(job: &Job) -> Option<Self> {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = job.sampling;
        if repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0 {
            return None;
        }
        let (repetition, frequency, presence) = (repetition_penalty, frequency_penalty, presence_penalty);
        let mut penalties = Self { repetition, frequency, presence, seen: Vec::new() };
        if repetition != 1.0 {
            let mut tokens = job.prompt.clone();
            tokens.sort_unstable();
            tokens.dedup();
            penalties.seen = tokens.into_iter().map(|token| Seen { token, answer: 0 }).collect();
        }
        job.delivered.iter().for_each(|token| penalties.count(*token));
        Some(penalties)
    }

    /// Counts a token of the answer.
    pub fn count(&mut self, token: Token) {
        match self.seen.binary_search_by_key(&token, |seen| seen.token) {
            Ok(at) => self.seen[at].answer += 1,
            Err(at) => self.seen.insert(at, Seen { token, answer: 1 }),
        }
    }

    /// Changes the logits of what was seen. Tokens outside the row are passed over.
    pub fn apply(&self, row: &mut [f32]) {
        for seen in &self.seen {
            let Some(logit) = row.get_mut(seen.token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            if seen.answer > 0 {
                *logit -= seen.answer as f32 * self.frequency;
                *logit -= self.presence;
            }
        }
    }
}

/// Adds the request's own biases. What the grammar forbids stays forbidden.
pub fn add_bias(bias: &[(Token, f32)], row: &mut [f32]) {
    for (token, bias) in bias {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit += bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sequence::tests::job;

    fn check(change: impl Fn(&mut Sampling), row: &[f32], expected: &[f32]) {
        let mut job = job(&[0, 1, 1], &[1, 2, 2], 9);
        change(&mut job.sampling);
        let mut row = row.to_vec();
        Penalties::new(&job).unwrap().apply(&mut row);
        assert_eq!(row, expected);
    }

    #[test]
    fn repetition_is_of_prompt_and_answer_and_pushes_down_on_both_sides_of_zero() {
        check(|s| s.repetition_penalty = 2.0, &[4.0, -4.0, 0.0, 4.0], &[2.0, -8.0, 0.0, 4.0]);
        check(|s| s.repetition_penalty = 0.5, &[4.0, -4.0, 0.0, 4.0], &[8.0, -2.0, 0.0, 4.0]);
    }

    #[test]
    fn frequency_and_presence_are_of_the_answer_alone() {
        check(|s| s.frequency_penalty = 0.5, &[1.0; 4], &[1.0, 0.5, 0.0, 1.0]);
        check(|s| s.presence_penalty = 0.5, &[1.0; 4], &[1.0, 0.5, 0.5, 1.0]);
        check(|s| s.presence_penalty = -0.5, &[1.0; 4], &[1.0, 1.5, 1.5, 1.0]);
    }

    #[test]
    fn they_come_in_their_order() {
        let all = |s: &mut Sampling| (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) = (2.0, 1.0, 0.25);
        check(all, &[4.0; 4], &[2.0, 0.75, -0.25, 4.0]);
    }

    #[test]
    fn a_continued_answer_counts_as_one_that_went_on() {
        let mut whole = job(&[5], &[7, 8, 7], 9);
        whole.sampling.frequency_penalty = 1.0;
        let mut first = whole.clone();
        first.delivered.clear();
        let mut counted = Penalties::new(&first).unwrap();
        whole.delivered.iter().for_each(|token| counted.count(*token));
        assert_eq!(Penalties::new(&whole), Some(counted));
        assert_eq!(Penalties::new(&job(&[5], &[7], 9)), None, "nothing is counted for nothing");
    }

    #[test]
    fn tokens_outside_the_row_are_passed_over_and_what_is_forbidden_stays_so() {
        let mut row = [0.0, f32::NEG_INFINITY];
        add_bias(&[(0, -100.0), (1, 100.0), (9, 1.0)], &mut row);
        assert_eq!(row, [-100.0, f32::NEG_INFINITY]);
        let mut job = job(&[99], &[98], 9);
        job.sampling.repetition_penalty = 1.5;
        Penalties::new(&job).unwrap().apply(&mut row);
        assert_eq!(row, [-100.0, f32::NEG_INFINITY]);
    }
}
