//! Whether a worker that says nothing hangs, judged by how long its steps take. Pure: times come in as arguments.
//!
//! Steps last milliseconds or, with long prompts of a large model on few cores, seconds; a machine under load makes them
//! several times longer. So a worker is measured by its own pace: it hangs when it has jobs and ends no step in a time
//! that is many times the longest of its recent ones.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Times that are remembered: a second or more of steps.
const REMEMBERED: usize = 64;

/// A silence that many times longer than the longest step is not load.
const FACTOR: u32 = 20;

/// Never sooner, however fast steps were: a machine that swaps or a cgroup that is throttled stalls for seconds.
const LEAST: Duration = Duration::from_secs(5);

/// While nothing is known, since the first step may be the longest; and never later.
const MOST: Duration = Duration::from_secs(300);

/// What is known of a worker's pace.
#[derive(Debug)]
pub struct Pulse {
    /// How long it was silent between two signs of progress while it had jobs.
    gaps: VecDeque<Duration>,
    last: Instant,
}

impl Pulse {
    pub fn new(now: Instant) -> Self {
        Self { gaps: VecDeque::with_capacity(REMEMBERED), last: now }
    }

    /// Takes a look: whether the worker has jobs, and whether it made progress since the last look. Returns how long it
    /// has been silent if it hangs.
    pub fn look(&mut self, now: Instant, busy: bool, progress: bool) -> Option<Duration> {
        let silence = now.saturating_duration_since(self.last);
        if busy && !progress {
            return (silence >= self.limit()).then_some(silence);
        }
        if busy {
            if self.gaps.len() == REMEMBERED {
                self.gaps.pop_front();
            }
            self.gaps.push_back(silence);
        }
        self.last = now;
        None
    }

    fn limit(&self) -> Duration {
        self.gaps.iter().max().map_or(MOST, |longest| (*longest * FACTOR).clamp(LEAST, MOST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a worker once every so many milliseconds; `#` progress, `.` none, `_` no jobs. Returns after which look
    /// it was given up, and its silence in milliseconds.
    fn check(every_ms: u64, looks: &str) -> Option<(u32, u128)> {
        let begin = Instant::now();
        let mut pulse = Pulse::new(begin);
        looks.chars().zip(1u32..).find_map(|(look, i)| {
            let now = begin + Duration::from_millis(every_ms) * i;
            pulse.look(now, look != '_', look == '#').map(|silence| (i, silence.as_millis()))
        })
    }

    #[test]
    fn a_worker_is_measured_by_its_own_pace() {
        assert_eq!(check(1_000, &("##".to_owned() + &".".repeat(30))), Some((22, 20_000)), "a step a second");
        assert_eq!(check(200, &("##".to_owned() + &".".repeat(30))), Some((27, 5_000)), "never sooner than 5 s");
        assert_eq!(
            check(1_000, &("#....#".to_owned() + &".".repeat(100))),
            Some((106, 100_000)),
            "it had a step of 5 s"
        );
    }

    #[test]
    fn before_its_first_step_a_worker_has_minutes() {
        assert_eq!(check(1_000, &".".repeat(299)), None);
        assert_eq!(check(1_000, &".".repeat(301)), Some((300, 300_000)));
    }

    #[test]
    fn without_jobs_silence_means_nothing() {
        let looks = "##".to_owned() + &"_".repeat(1_000) + &".".repeat(10);
        assert_eq!(check(200, &looks), None, "time begins with the job");
    }
}
