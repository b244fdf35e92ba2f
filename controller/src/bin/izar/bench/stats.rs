//! Counts and histograms of a run. Times in microseconds, three significant digits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::client::{Failure, Sample, Targets};

/// The largest time kept: longer ones count as this.
const LONGEST_US: u64 = 3_600_000_000;

/// Times of one kind.
#[derive(Debug, Clone)]
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_US, 3).expect("the bounds are ordered and the digits at most 5"))
    }
}

impl Times {
    pub fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(LONGEST_US));
    }

    fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }

    /// `None` if nothing was recorded.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        (!self.0.is_empty()).then(|| Percentiles {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.0.max() as f64 / 1000.0,
            mean: self.0.mean() / 1000.0,
        })
    }
}

/// In milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    pub mean: f64,
}

impl Percentiles {
    /// Each less `ms`, but the mean of what is left is the mean less `ms`, too.
    pub fn less(self, ms: f64) -> Self {
        Self {
            p50: self.p50 - ms,
            p90: self.p90 - ms,
            p99: self.p99 - ms,
            p999: self.p999 - ms,
            max: self.max - ms,
            mean: self.mean - ms,
        }
    }
}

/// What was measured by one thread of the generator, or by all.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Whole answers with status 200.
    pub requests: u64,
    pub tokens: u64,
    /// Tokens of prompts, and those of them that came from caches.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    /// From sending to the end of the answer.
    pub latency: Times,
    /// From sending to the first token.
    pub ttft: Times,
    pub between: Times,
    /// Open loop: from the scheduled arrival to the end of the answer.
    pub from_schedule: Times,
    /// Status or kind of failure.
    pub errors: BTreeMap<String, u64>,
    pub reconnects: u64,
    /// Answers that broke off and were read on: which request, and the fingerprint of what came.
    pub resumed: Vec<(usize, u64)>,
    /// From the break to the next token.
    pub pauses: Times,
    pub read_on: ReadOn,
    /// The request ids of whole answers, if they are to be kept.
    pub answered: Option<Vec<String>>,
}

/// What became of answers that broke off and were read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ReadOn {
    /// They are what they are in one go.
    pub exact: u64,
    /// Something was lost, doubled or changed.
    pub different: u64,
    /// Nobody got the answer in one go.
    pub unknown: u64,
}

impl ReadOn {
    pub fn sum(self) -> u64 {
        self.exact + self.different + self.unknown
    }
}

impl Stats {
    /// Takes a good answer, or counts the error that it was.
    pub fn answer(&mut self, sample: &Sample, sent: Instant, ended: Instant, scheduled: Option<Instant>) {
        if sample.status != 200 {
            return self.error(sample.status.to_string());
        }
        if !sample.whole {
            return self.error("broken stream".to_owned());
        }
        self.requests += 1;
        self.tokens += u64::from(sample.tokens);
        self.prompt_tokens += u64::from(sample.prompt.all);
        self.cached_tokens += u64::from(sample.prompt.cached);
        if !sample.pauses.is_empty() {
            self.resumed.push((sample.request, sample.digest));
            sample.pauses.iter().for_each(|pause| self.pauses.record(*pause));
        }
        if let Some(answered) = &mut self.answered {
            answered.push(sample.request_id.clone());
        }
        self.latency.record(ended - sent);
        if let Some(first) = sample.tokens_at.first().filter(|_| sample.tokens_at.len() > 1 || sample.tokens == 1) {
            self.ttft.record(*first - sent);
        }
        for pair in sample.tokens_at.windows(2) {
            self.between.record(pair[1] - pair[0]);
        }
        if let Some(scheduled) = scheduled {
            self.from_schedule.record(ended.saturating_duration_since(scheduled));
        }
    }

    pub fn failure(&mut self, failure: Failure) {
        self.error(failure.name().to_owned());
    }

    /// Compares the answers that were read on with those that came in one go.
    pub fn compare(&mut self, targets: &Targets) {
        for (request, digest) in self.resumed.drain(..) {
            match targets.is_exact(request, digest) {
                Some(true) => self.read_on.exact += 1,
                Some(false) => self.read_on.different += 1,
                None => self.read_on.unknown += 1,
            }
        }
    }

    fn error(&mut self, what: String) {
        *self.errors.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.reconnects += other.reconnects;
        self.resumed.extend(&other.resumed);
        if let Some(answered) = &other.answered {
            self.answered.get_or_insert_default().extend_from_slice(answered);
        }
        self.pauses.add(&other.pauses);
        self.latency.add(&other.latency);
        self.ttft.add(&other.ttft);
        self.between.add(&other.between);
        self.from_schedule.add(&other.from_schedule);
        for (what, count) in &other.errors {
            *self.errors.entry(what.clone()).or_default() += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parser::PromptTokens;
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_recorded() {
        let mut times = Times::default();
        assert_eq!(times.percentiles(), None);
        for ms in 1..=1000 {
            times.record(Duration::from_millis(ms));
        }
        let p = times.percentiles().unwrap();
        for (got, expected) in [(p.p50, 500.0), (p.p90, 900.0), (p.p99, 990.0), (p.p999, 999.0), (p.mean, 500.5)] {
            assert!((got - expected).abs() / expected < 2e-3, "{got} is not {expected}");
        }
        assert!((p.less(1.0).p50 - (p.p50 - 1.0)).abs() < 1e-9);
    }

    #[test]
    fn answers_and_errors_are_kept_apart_and_added() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut stats = Stats { answered: Some(Vec::new()), ..Stats::default() };
        let tokens_at = vec![at(5), at(6), at(8)];
        let prompt = PromptTokens { all: 10, cached: 4 };
        let mut sample = Sample { tokens_at, tokens: 3, prompt, status: 200, whole: true, ..Sample::default() };
        sample.request_id.push_str("turn_1");
        stats.answer(&sample, start, at(9), None);
        sample.whole = false;
        stats.answer(&sample, start, at(9), None);
        sample.status = 429;
        stats.answer(&sample, start, at(9), None);
        stats.failure(Failure::Timeout);
        let mut sum = stats.clone();
        sum.add(&stats);
        assert_eq!((sum.requests, sum.tokens, sum.prompt_tokens, sum.cached_tokens), (2, 6, 20, 8));
        assert_eq!(sum.ttft.percentiles().unwrap().p50.round(), 5.0);
        assert_eq!(sum.between.percentiles().unwrap().max.round(), 2.0);
        let errors: Vec<_> = sum.errors.iter().map(|(what, n)| (what.as_str(), *n)).collect();
        assert_eq!(sum.answered.unwrap(), ["turn_1", "turn_1"]);
        assert_eq!(errors, [("429", 2), ("broken stream", 2), ("timeout", 2)]);
    }
}
