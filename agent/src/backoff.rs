//! How long to wait before trying again: doubling up to a limit. Pure.

use std::time::Duration;

/// Waits that double from `first` to `most` until something succeeds.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }
    /// Begins again with the first wait.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
    /// Returns the next wait.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.most);
        wait
    }
    /// Returns the next wait, shortened by up to half according to `draw`, so that many who lost the same peer do not
    /// come back at the same moment.
    pub fn jittered(&mut self, draw: u8) -> Duration {
        let wait = self.wait();
        wait - wait / 2 * u32::from(draw) / u32::from(u8::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_begin_again() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(200), ms(1000));
        let waits: Vec<_> = (0..5).map(|_| backoff.wait().as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.wait(), ms(200));
        assert_eq!(backoff.jittered(0), ms(400));
        assert_eq!(backoff.jittered(255), ms(400));
    }
}
