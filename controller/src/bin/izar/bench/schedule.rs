//! When requests of the open loop begin. Pure: a seed gives the same times again.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How arrivals are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// As independent users arrive: sometimes many at once.
    Poisson,
    /// Evenly.
    Uniform,
}

/// Gives the time of each arrival after the start, for ever.
pub struct Schedule {
    arrivals: Arrivals,
    mean_s: f64,
    next_s: f64,
    random: StdRng,
}

impl Schedule {
    /// `rate`: arrivals a second, more than 0.
    pub fn new(arrivals: Arrivals, rate: f64, seed: u64) -> Self {
        Self { arrivals, mean_s: 1.0 / rate, next_s: 0.0, random: StdRng::seed_from_u64(seed) }
    }
}

impl Iterator for Schedule {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.next_s += match self.arrivals {
            Arrivals::Uniform => self.mean_s,
            // 1 - u is in (0, 1], so the logarithm is finite.
            Arrivals::Poisson => -(1.0 - self.random.random::<f64>()).ln() * self.mean_s,
        };
        Some(Duration::from_secs_f64(self.next_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_keep_their_rate_and_follow_their_seed() {
        for arrivals in [Arrivals::Poisson, Arrivals::Uniform] {
            let at = Schedule::new(arrivals, 1000.0, 7).nth(9_999).unwrap().as_secs_f64();
            assert!((9.5..10.5).contains(&at), "{arrivals:?}: {at}");
        }
        let times = |seed| Schedule::new(Arrivals::Poisson, 10.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(times(1), times(1));
        assert_ne!(times(1), times(2));
    }
}
