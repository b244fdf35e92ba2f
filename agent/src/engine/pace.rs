//! How many prompt tokens go into a step beside running answers, learned from how long steps take. Pure: times come in as
//! arguments.
//!
//! Readers of an answer notice a step that takes several times as long as the ones before it, and those who wait for
//! their first token gain little from it. What a prompt token costs beside the reading of the weights differs by orders
//! between machines and models, so it is measured: steps without prompt tokens tell what `a + b answers` take, and what
//! the others take beyond that, divided by their prompt tokens, tells the rest.

/// A step beside answers may take so many times as long as it would without prompt tokens, …
const SLOWER: f64 = 2.0;

/// … and as the gap between two tokens that most readers see: a reader compares a pause with the others of the answer.
const TYPICAL: f64 = 2.0;

/// With more prompts than this in the batch a step may take longer in proportion: then every step is a long one, readers
/// see no difference between them, and long chunks are computed faster.
const CALM: f64 = 4.0;

/// How fast the typical gap is learned: its change with each token.
const LEARN: f64 = 0.01;

/// Prompt tokens of a step at least, so that a prompt comes to an end on the slowest machine …
pub const LEAST: usize = 4;

/// … and at most: more would not be computed faster.
pub const MOST: usize = 512;

/// Before anything is known: so many, or twice the number of answers, whose own work grows likewise.
const FIRST: usize = 32;

/// What a step's weight is multiplied by with each later one of its kind: the last few hundred count.
const FADE: f64 = 0.995;

/// Steps of each kind that make what was learned worth believing.
const KNOWN: u32 = 8;

/// What is known of the time that steps take. Times in seconds.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    /// Of the steps without prompt tokens: fading sums of 1, answers, their square, time, time by answers.
    sums: [f64; 5],
    /// What a prompt token takes.
    token: f64,
    /// Steps without and with prompt tokens that were learned from.
    known: [u32; 2],
    /// About the median of the time between two tokens of an answer; 0 before the first.
    typical: f64,
}

impl Pace {
    /// Learns how long a step took, with one token of each of so many answers and so many prompt tokens.
    pub fn learn(&mut self, answers: usize, prompt: usize, seconds: f64) {
        if answers == 0 || seconds <= 0.0 {
            return;
        }
        let towards = if seconds > self.typical { 1.0 + LEARN } else { 1.0 - LEARN };
        self.typical = if self.typical == 0.0 { seconds } else { self.typical * towards.powi(answers as i32) };
        let (k, p) = (answers as f64, prompt as f64);
        // A step during which the machine was elsewhere says nothing about the work in it.
        let expected = self.alone(k) + self.token.max(0.0) * p;
        let seconds = if self.is_known() { seconds.min(2.0 * expected) } else { seconds };
        let kind = usize::from(prompt > 0);
        self.known[kind] = self.known[kind].saturating_add(1);
        if prompt > 0 {
            let token = (seconds - self.alone(k)) / p;
            self.token += (token - self.token) * (1.0 / f64::from(self.known[kind])).max(1.0 - FADE);
            return;
        }
        for (sum, x) in self.sums.iter_mut().zip([1.0, k, k * k, seconds, seconds * k]) {
            *sum = *sum * FADE + x;
        }
    }

    /// Prompt tokens that a step may have beside so many answers, while so many prompts are to be computed.
    pub fn beside(&self, answers: usize, prompts: usize) -> usize {
        if !self.is_known() {
            return FIRST.max(2 * answers);
        }
        let alone = self.alone(answers as f64);
        let hurry = (prompts as f64 / CALM).max(1.0);
        let most = hurry * (SLOWER * alone).min(TYPICAL * self.typical);
        // Where prompt tokens cost nothing that can be measured, the quotient is infinite, and so many are computed.
        (((most - alone) / self.token.max(0.0)) as usize).clamp(LEAST, MOST)
    }

    fn is_known(&self) -> bool {
        self.known.iter().all(|steps| *steps >= KNOWN)
    }

    /// What a step without prompt tokens takes: a line through those that were, or their mean if they all had about as
    /// many answers.
    fn alone(&self, answers: f64) -> f64 {
        let [n, k, kk, t, tk] = self.sums;
        if n == 0.0 {
            return 0.0;
        }
        let spread = n * kk - k * k;
        if spread < 1e-3 * n * kk {
            return t / n;
        }
        let slope = ((n * tk - k * t) / spread).max(0.0);
        ((t - slope * k) / n).max(0.0) + slope * answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Learns from a machine that takes so many microseconds a step, an answer and a prompt token, with some noise.
    fn learned(pace: &mut Pace, [a, b, c]: [f64; 3]) {
        for step in 0..400 {
            let (answers, prompt) = (1 + step * 7 % 5, if step % 3 == 0 { 16 } else { 0 });
            let noise = 1.0 + (step * 13 % 11) as f64 / 100.0;
            let stall = if step % 50 == 49 { 30.0 } else { 1.0 };
            pace.learn(answers, prompt, (a + b * answers as f64 + c * prompt as f64) * 1e-6 * noise * stall);
        }
    }

    fn check(machine: [f64; 3], answers: usize, prompts: usize, expected: std::ops::RangeInclusive<usize>) {
        let mut pace = Pace::default();
        learned(&mut pace, machine);
        let beside = pace.beside(answers, prompts);
        assert!(expected.contains(&beside), "{machine:?} with {answers} and {prompts}: {beside}");
    }

    #[test]
    fn a_step_takes_at_most_twice_as_long_whatever_the_machine() {
        check([2500.0, 800.0, 600.0], 1, 1, LEAST..=7);
        check([20_000.0, 100.0, 100.0], 1, 1, 120..=300);
        check([20_000.0, 100.0, 10.0], 1, 1, 400..=MOST);
        check([100.0, 10.0, 5000.0], 1, 1, LEAST..=LEAST);
    }

    #[test]
    fn a_step_of_more_answers_than_usual_has_fewer_prompt_tokens_unless_prompts_pile_up() {
        check([2500.0, 800.0, 600.0], 5, 4, 5..=10);
        check([2500.0, 800.0, 600.0], 10, 4, LEAST..=LEAST);
        check([2500.0, 800.0, 600.0], 5, 12, 20..=60);
    }

    #[test]
    fn a_machine_that_changes_is_learned_anew() {
        let mut pace = Pace::default();
        learned(&mut pace, [2500.0, 800.0, 600.0]);
        (0..4).for_each(|_| learned(&mut pace, [20_000.0, 100.0, 100.0]));
        assert!((60..=300).contains(&pace.beside(1, 1)), "{}", pace.beside(1, 1));
    }

    #[test]
    fn before_anything_is_known_there_is_a_rule() {
        let mut pace = Pace::default();
        assert_eq!((pace.beside(1, 1), pace.beside(40, 1)), (32, 80));
        (0..100).for_each(|_| pace.learn(1, 0, 0.01));
        assert_eq!(pace.beside(1, 1), 32, "steps without prompts do not tell what those cost");
        (0..100).for_each(|_| pace.learn(1, 32, 0.04));
        assert!((8..=24).contains(&pace.beside(1, 1)), "{}", pace.beside(1, 1));
    }
}
