//! Counters that only grow, compared as differences, and how many there were of something lately. Pure.

use std::collections::VecDeque;

use super::limits::Rate;

/// Steps that a window is divided into: it forgets in steps, so that it never holds more than so many numbers.
const STEPS: u64 = 60;

/// How many there were within the time that a rate speaks of.
#[derive(Debug, Clone)]
pub struct Window {
    rate: Rate,
    /// When a step began, and how many it saw.
    steps: VecDeque<(u64, u64)>,
}

impl Window {
    pub fn new(rate: Rate) -> Self {
        Self { rate, steps: VecDeque::new() }
    }

    /// Counts `n` more.
    pub fn add(&mut self, now_ms: u64, n: u64) {
        if n == 0 {
            return;
        }
        let step_ms = (self.rate.within_ms / STEPS).max(1);
        match self.steps.back_mut() {
            Some((began, count)) if now_ms.saturating_sub(*began) < step_ms => *count = count.saturating_add(n),
            _ => self.steps.push_back((now_ms, n)),
        }
        self.forget(now_ms);
    }

    fn forget(&mut self, now_ms: u64) {
        while self.steps.front().is_some_and(|(began, _)| now_ms.saturating_sub(*began) >= self.rate.within_ms) {
            self.steps.pop_front();
        }
    }

    /// How many there were, if they are too many.
    pub fn excess(&mut self, now_ms: u64) -> Option<u64> {
        let total = self.total(now_ms);
        (total >= self.rate.count).then_some(total)
    }

    /// How many there were.
    pub fn total(&mut self, now_ms: u64) -> u64 {
        self.forget(now_ms);
        self.steps.iter().fold(0_u64, |sum, (_, n)| sum.saturating_add(*n))
    }
}

/// What a counter stood at last.
#[derive(Debug, Clone, Default)]
pub struct Counter(Option<u64>);

impl Counter {
    /// How much it has grown. Nothing at first, nor when it went back (the driver was loaded anew), nor while the driver
    /// does not say.
    pub fn grown(&mut self, value: Option<u64>) -> u64 {
        let Some(value) = value else { return 0 };
        let before = self.0.replace(value);
        before.map_or(0, |before| value.saturating_sub(before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_counter_tells_what_was_added_and_nothing_else() {
        let mut counter = Counter::default();
        let values = [Some(70), Some(70), Some(73), None, Some(74), Some(2), Some(4)];
        assert_eq!(values.map(|value| counter.grown(value)), [0, 0, 3, 0, 1, 0, 2]);
    }

    proptest! {
        #[test]
        fn a_window_counts_all_of_its_time_and_little_more(events in prop::collection::vec((0..400_u64, 0..5_u64), 1..120)) {
            let rate = Rate { count: 1, within_ms: 6_000 };
            let (mut window, mut now, mut seen) = (Window::new(rate), 0, Vec::new());
            for (pause, n) in events {
                now += pause;
                window.add(now, n);
                seen.push((now, n));
                let within = |span: u64| seen.iter().filter(|(at, _)| now - at < span).map(|(_, n)| n).sum::<u64>();
                let total = window.excess(now).unwrap_or(0);
                // A step may have begun a step's time before what it counts.
                prop_assert!(total <= within(rate.within_ms) && total >= within(rate.within_ms - rate.within_ms / STEPS));
                prop_assert!(window.steps.len() as u64 <= STEPS + 1);
            }
        }
    }
}
