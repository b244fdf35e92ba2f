//! How long a job takes, learned from those that have ended. Soft state, in floats: a controller that restarts learns
//! it again.
//!
//! A job's time is what its prompt takes, which grows with its tokens, and what each further token takes, which grows
//! with the jobs beside it. Both are lines, fitted by least squares that forget. How long an answer gets is learned
//! apart for each magnitude of `max_tokens`: who allows 100,000 tokens hardly means them. All of it is then corrected by
//! how long the last jobs took against what was said of them, and its spread says how sure a promise is.

use std::time::{Duration, Instant};

/// Share of the old that is kept at each lesson: the last thirty or so jobs count. Fewer would follow single long
/// answers, more would lag behind a load that has changed.
const KEEP: f64 = 0.97;

/// What a promise adds to the expected time, in mean deviations; two and a half are two standard deviations of a bell
/// curve, which 97 of 100 jobs keep.
const DEVIATIONS: f64 = 2.5;

/// Spread of the first jobs' times, as nothing is known of it yet.
const FIRST_DEVIATION: f64 = 0.2;

/// After so long without a lesson what is known may be wrong, and a job is let through to learn from.
const STALE: Duration = Duration::from_secs(10);

/// What decides how long a job takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// Answers to the same prompt, computed side by side.
    pub choices: u32,
}

/// What is expected of a job.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Guess {
    /// Tokens of prompt and answers.
    pub tokens: f64,
    /// Seconds from dispatch to the end, before they are corrected.
    pub raw: f64,
    /// Expected seconds.
    pub seconds: f64,
    /// Seconds that nearly all such jobs keep.
    pub most: f64,
}

/// How a job went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lesson {
    /// Tokens of all answers.
    pub answer_tokens: u32,
    /// From dispatch to the first token, and to the end.
    pub first: Duration,
    pub whole: Duration,
}

/// Everything that was learned.
#[derive(Debug, Clone, Default)]
pub struct Estimate {
    /// Tokens of a prompt → seconds to the first token.
    prompt: Fit,
    /// Jobs on a replica → seconds to each further token.
    token: Fit,
    /// Part of `max_tokens` that answers used, by the bits of `max_tokens`.
    used: [Mean; 32],
    /// Tokens of answers of any kind.
    length: Mean,
    /// What jobs took against what was said of them.
    ratio: Mean,
    /// When the last job ended.
    last: Option<Instant>,
}

impl Estimate {
    /// Says what is expected of a job. `load`: jobs on its replica, itself included. All zero before the first lesson.
    pub fn guess(&self, size: Size, load: f64) -> Guess {
        let (prompt, most) = (f64::from(size.prompt_tokens), f64::from(size.max_tokens));
        let used = &self.used[bits(size.max_tokens)];
        let answer = match (used.count > 0, self.length.count > 0) {
            (true, _) => used.value * most,
            (false, true) => self.length.value.min(most),
            (false, false) => most,
        };
        let tokens = prompt + answer * f64::from(size.choices);
        let Some(first) = self.prompt.at(prompt) else { return Guess { tokens, ..Guess::default() } };
        let raw = first + self.token.at(load).unwrap_or(0.0) * (answer - 1.0).max(0.0);
        let (ratio, deviation) = match self.ratio.count {
            0 => (1.0, FIRST_DEVIATION),
            _ => (self.ratio.value, self.ratio.deviation),
        };
        Guess { tokens, raw, seconds: raw * ratio, most: raw * (ratio + DEVIATIONS * deviation) }
    }

    /// Learns from a job that ended well. `load`: jobs on its replica while it ran; `raw`: what was guessed of it.
    pub fn learn(&mut self, size: Size, load: f64, raw: f64, lesson: &Lesson, now: Instant) {
        let answer = f64::from(lesson.answer_tokens) / f64::from(size.choices.max(1));
        self.prompt.learn(f64::from(size.prompt_tokens), lesson.first.as_secs_f64());
        if answer > 1.0 {
            let rest = lesson.whole.saturating_sub(lesson.first).as_secs_f64();
            self.token.learn(load, rest / (answer - 1.0));
        }
        self.used[bits(size.max_tokens)].learn(answer / f64::from(size.max_tokens.max(1)));
        self.length.learn(answer);
        if raw > 0.0 {
            self.ratio.learn((lesson.whole.as_secs_f64() / raw).clamp(0.1, 10.0));
        }
        self.last = Some(now);
    }

    /// Whether what is known is too old to refuse anybody for it. Said once, until the next lesson is due.
    pub fn is_stale(&mut self, now: Instant) -> bool {
        let stale = self.last.is_none_or(|last| last + STALE <= now);
        if stale {
            self.last = Some(now);
        }
        stale
    }
}

fn bits(tokens: u32) -> usize {
    (u32::BITS - tokens.leading_zeros()).min(31) as usize
}

/// A mean and its mean deviation that forget.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    count: u32,
    value: f64,
    deviation: f64,
}

impl Mean {
    fn learn(&mut self, x: f64) {
        if self.count == 0 {
            (self.value, self.deviation) = (x, FIRST_DEVIATION * x);
        }
        self.count = self.count.saturating_add(1);
        // The first few weigh as much as each other.
        let new = (1.0 - KEEP).max(1.0 / f64::from(self.count));
        self.deviation += (1.0 - KEEP) * ((x - self.value).abs() - self.deviation);
        self.value += new * (x - self.value);
    }
}

/// A line that neither falls nor begins below zero, by least squares that forget.
#[derive(Debug, Clone, Copy, Default)]
struct Fit {
    n: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Fit {
    fn learn(&mut self, x: f64, y: f64) {
        for (sum, new) in
            [(&mut self.n, 1.0), (&mut self.x, x), (&mut self.y, y), (&mut self.xx, x * x), (&mut self.xy, x * y)]
        {
            *sum = KEEP * *sum + new;
        }
    }

    fn at(&self, x: f64) -> Option<f64> {
        if self.n == 0.0 {
            return None;
        }
        let (mean_x, mean_y) = (self.x / self.n, self.y / self.n);
        let spread = self.xx / self.n - mean_x * mean_x;
        // Without a spread nothing tells a slope; what is larger is then taken to cost as much more.
        if spread < 1e-3 * mean_x * mean_x {
            return Some(if mean_x > 0.0 { mean_y * (x / mean_x).max(1.0) } else { mean_y });
        }
        let slope = ((self.xy / self.n - mean_x * mean_y) / spread).max(0.0);
        let begin = mean_y - slope * mean_x;
        Some(if begin < 0.0 { mean_y / mean_x * x } else { begin + slope * x })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(prompt_tokens: u32, max_tokens: u32) -> Size {
        Size { prompt_tokens, max_tokens, choices: 1 }
    }

    fn near(got: f64, expected: f64) {
        assert!((got - expected).abs() <= 0.05 * expected.abs() + 1e-9, "{got} is not about {expected}");
    }

    /// 10 ms and 1 ms for each token of the prompt, then 2 ms and 1 ms more for each job beside it for a token.
    fn lesson(prompt: u32, answer: u32, load: f64) -> Lesson {
        let first = 0.010 + 0.001 * f64::from(prompt);
        let rest = f64::from(answer - 1) * 0.001 * (1.0 + load);
        let seconds = Duration::from_secs_f64;
        Lesson { answer_tokens: answer, first: seconds(first), whole: seconds(first + rest) }
    }

    #[test]
    fn prompts_answers_and_the_load_are_told_apart() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        for i in 0..200u32 {
            let (prompt, answer, load) = (10 + i * 37 % 300, 2 + i * 13 % 60, f64::from(1 + i % 8));
            let size = size(prompt, 2 * answer);
            let raw = estimate.guess(size, load).raw;
            estimate.learn(size, load, raw, &lesson(prompt, answer, load), now);
        }
        for (prompt, answer, load) in [(10, 32, 1.0), (300, 32, 8.0), (1000, 63, 4.0)] {
            let guess = estimate.guess(size(prompt, 2 * answer), load);
            near(guess.seconds, lesson(prompt, answer, load).whole.as_secs_f64());
            near(guess.tokens, f64::from(prompt + answer));
            assert!(guess.most >= guess.seconds);
        }
    }

    #[test]
    fn before_the_first_lesson_nothing_is_said_to_take_time() {
        let guess = Estimate::default().guess(size(100, 50), 1.0);
        assert_eq!((guess.seconds, guess.most, guess.tokens), (0.0, 0.0, 150.0));
    }

    #[test]
    fn who_allows_a_long_answer_does_not_mean_it() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        for _ in 0..50 {
            estimate.learn(size(10, 100_000), 1.0, 0.0, &lesson(10, 50, 1.0), now);
        }
        near(estimate.guess(size(10, 100_000), 1.0).tokens, 60.0);
        near(estimate.guess(size(10, 20), 1.0).tokens, 30.0);
        near(estimate.guess(size(10, 4_000), 1.0).tokens, 60.0);
    }

    #[test]
    fn times_that_vary_make_a_promise_longer() {
        let promise = |factors: &[f64]| {
            let (mut estimate, now) = (Estimate::default(), Instant::now());
            for i in 0..200 {
                let mut lesson = lesson(100, 10, 1.0);
                lesson.whole = lesson.whole.mul_f64(factors[i % factors.len()]);
                lesson.first = lesson.first.mul_f64(factors[i % factors.len()]);
                let raw = estimate.guess(size(100, 10), 1.0).raw;
                estimate.learn(size(100, 10), 1.0, raw, &lesson, now);
            }
            let guess = estimate.guess(size(100, 10), 1.0);
            guess.most / guess.seconds
        };
        assert!(promise(&[1.0]) < 1.05 && promise(&[0.5, 1.5]) > 1.5);
    }

    #[test]
    fn what_is_known_becomes_stale_and_is_asked_for_once() {
        let (mut estimate, now) = (Estimate::default(), Instant::now());
        assert!(estimate.is_stale(now) && !estimate.is_stale(now));
        estimate.learn(size(1, 2), 1.0, 0.0, &lesson(1, 2, 1.0), now);
        assert!(!estimate.is_stale(now + STALE / 2));
        assert!(estimate.is_stale(now + STALE) && !estimate.is_stale(now + STALE));
    }
}
