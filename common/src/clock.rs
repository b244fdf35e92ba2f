//! Hybrid logical time: wall-clock milliseconds that never run backwards, ordered across nodes by what they have seen.
//!
//! Replicated state holds these as data; only a proposer reads the clock. Source: Kulkarni et al. 2014, "Logical
//! Physical Clocks".

use std::fmt;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// 48 bits of Unix milliseconds and a 16-bit counter, in one integer that sorts by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Hlc(pub u64);

impl Hlc {
    pub fn from_ms(ms: u64) -> Self {
        Self(ms << 16)
    }
    /// Unix time in milliseconds.
    pub fn ms(self) -> u64 {
        self.0 >> 16
    }
    /// Returns the smallest time that is later than `self` and not before the wall clock.
    pub fn next(self, wall_ms: u64) -> Self {
        Self((self.0 + 1).max(wall_ms << 16))
    }
}

impl fmt::Display for Hlc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.ms(), self.0 & 0xffff)
    }
}

/// A node's hybrid clock.
#[derive(Debug, Default)]
pub struct Clock(Mutex<Hlc>);

impl Clock {
    /// Returns a time later than every one this clock has given or seen.
    pub fn now(&self) -> Hlc {
        let mut last = self.0.lock().expect("no panic while the clock is held");
        *last = last.next(wall_ms());
        *last
    }
    /// Moves past a time that another node gave.
    pub fn see(&self, other: Hlc) {
        let mut last = self.0.lock().expect("no panic while the clock is held");
        *last = (*last).max(other);
    }
}

/// Unix time in milliseconds; 0 if the clock stands before 1970.
pub fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Days since 1970 as year, month, day. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
pub fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_stands_still_nor_runs_back() {
        let clock = Clock::default();
        let ahead = Hlc::from_ms(wall_ms() + 60_000);
        let first = clock.now();
        clock.see(ahead);
        let (second, third) = (clock.now(), clock.now());
        assert!(first < ahead && ahead < second && second < third);
        assert_eq!(ahead.next(5), Hlc(ahead.0 + 1));
    }
}
