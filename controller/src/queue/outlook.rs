//! When a newcomer would be dispatched, at the latest: what runs, what waits ahead of it, and what others may still put
//! there.
//!
//! Two bounds hold, and the better one counts. All places work until the newcomer has one, so it waits no longer than
//! the work ahead divided by the places (Graham, 1966). And with m jobs ahead it has a place, at the latest, when m + 1
//! of those that run have ended. Others of its class are counted with their whole share, whether or not they have asked
//! for it yet: so a promise holds when they do.

use super::BATCH_EVERY;
use super::lane::Sum;

/// Part of the places that a class is always counted with, however much more urgent ones have used of late.
const LEAST_PART: f64 = 0.1;

/// A tenant that shares with the newcomer's.
#[derive(Debug, Clone, Copy)]
pub struct Other {
    /// Where its virtual time stands.
    pub start: f64,
    pub weight: f64,
    /// Whether it has entries now.
    pub waits: bool,
}

/// Everything that decides how long one tenant's entries of one class wait.
#[derive(Debug, Clone)]
pub struct Outlook {
    /// Seconds until each place is free, the soonest first.
    ends: Vec<f64>,
    running_s: f64,
    /// Places that this class can count on.
    places: f64,
    /// More urgent classes' entries.
    above: Sum,
    /// Mean seconds of a job of class `Batch`, if these take turns with the newcomer's.
    batch_s: Option<f64>,
    start: f64,
    weight: f64,
    others: Vec<Other>,
    /// Means of the class: seconds of a token, tokens of a job.
    token_s: f64,
    job_tokens: f64,
}

/// What an outlook is made of.
pub struct Sight {
    /// Seconds until each place is free, in any order; zero for those that are.
    pub ends: Vec<f64>,
    /// Part of the work of late that was of more urgent classes.
    pub above_part: f64,
    pub above: Sum,
    pub batch_s: Option<f64>,
    pub start: f64,
    pub weight: f64,
    pub others: Vec<Other>,
    /// The class's entries, the newcomer included.
    pub class: Sum,
}

impl Outlook {
    pub fn new(sight: Sight) -> Self {
        let Sight { mut ends, above_part, above, batch_s, start, weight, others, class } = sight;
        ends.sort_unstable_by(f64::total_cmp);
        let places = ends.len().max(1) as f64 * (1.0 - above_part).max(LEAST_PART);
        let (token_s, job_tokens) =
            (class.seconds / class.tokens.max(1.0), class.tokens / f64::from(class.jobs.max(1)));
        Self {
            running_s: ends.iter().sum(),
            ends,
            places,
            above,
            batch_s,
            start,
            weight,
            others,
            token_s,
            job_tokens: job_tokens.max(1.0),
        }
    }

    /// Seconds until an entry is dispatched that has so much of its own tenant's ahead of it.
    pub fn wait_s(&self, own: Sum) -> f64 {
        let until = self.start + own.tokens / self.weight;
        let of_other = |other: &Other| match until - other.start {
            lead if lead >= 0.0 => lead * other.weight + if other.waits { self.job_tokens } else { 0.0 },
            _ => 0.0,
        };
        let tokens: f64 = self.others.iter().map(of_other).sum();
        let mut jobs = f64::from(self.above.jobs + own.jobs) + tokens / self.job_tokens;
        let mut seconds = self.above.seconds + own.seconds + tokens * self.token_s;
        if let Some(batch_s) = self.batch_s {
            let turns = jobs / f64::from(BATCH_EVERY - 1) + 1.0;
            (jobs, seconds) = (jobs + turns, seconds + turns * batch_s);
        }
        let shared = (self.running_s + seconds) / self.places;
        self.ends.get(jobs.ceil() as usize).map_or(shared, |end| end.min(shared))
    }
}
