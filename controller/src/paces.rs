//! How fast workers give tokens, and which give far fewer than their peers: a card that is throttled, or a server that
//! swaps, without any error that would tell. Soft state; each controller measures what it sees itself.
//!
//! Pure: times come in as arguments. A worker is compared with those of the same deployment that compute the same way and
//! have about as much to do; alone it is never slow. One that is slow gets jobs only if no other can take them, for a
//! while; then it is measured anew.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use izar_common::id::WorkerId;

/// A worker that gives a twentieth of its peers' tokens is slow. Less is explained by load: several times as many jobs, a
/// long prompt beside them, another program on the server.
const FACTOR: f64 = 20.0;

/// What is older says nothing of now.
const WITHIN_MS: u64 = 30_000;

/// What must have been seen of a worker before it is called slow: time of its streams, and how often they gave something.
/// One long prompt holds up a worker's streams for a second or two, once.
const LEAST_TIME: Duration = Duration::from_secs(3);
const LEAST_MARKS: usize = 8;

/// And of a peer, before it is held against another.
const PEER_TOKENS: u64 = 20;

/// Peers with more than so many times the jobs, or fewer, are no measure.
const LIKE_LOAD: f64 = 2.0;

/// How long a slow worker is left alone: as long as a degraded GPU.
const SLOW_MS: u64 = 15 * 60_000;

/// How often a worker is compared, at most: it has many streams, and all its peers are looked at.
const COMPARE_MS: u64 = 1_000;

/// Marks remembered of a worker: each stands for a quarter of a second of one stream, or for one late token.
const MARKS: usize = 256;

/// Workers remembered: those that gave nothing lately are forgotten first.
const WORKERS: usize = 8_192;

/// What is known of all workers.
#[derive(Debug, Default)]
pub struct Paces {
    workers: HashMap<WorkerId, Pace>,
}

#[derive(Debug, Default)]
struct Pace {
    marks: VecDeque<Mark>,
    /// Until when it is slow, and why.
    slow: Option<(u64, String)>,
    /// When it was compared with its peers last.
    compared_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    at_ms: u64,
    tokens: u32,
    took: Duration,
    jobs: u32,
}

/// A worker's pace: tokens a second of a stream, and the jobs beside it.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    jobs: f64,
    tokens: u64,
    time: Duration,
    marks: usize,
}

impl Paces {
    /// Notes that one stream of a worker gave so many tokens in a time, with so many jobs on the worker.
    pub fn note(&mut self, worker: &WorkerId, tokens: u32, took: Duration, jobs: u32, now_ms: u64) {
        if self.workers.len() >= WORKERS && !self.workers.contains_key(worker) {
            let recent =
                |pace: &Pace| pace.marks.back().is_some_and(|mark| now_ms.saturating_sub(mark.at_ms) < WITHIN_MS);
            self.workers.retain(|_, pace| recent(pace) || pace.is_slow(now_ms));
            if self.workers.len() >= WORKERS {
                return;
            }
        }
        let marks = &mut self.workers.entry(worker.clone()).or_default().marks;
        if marks.len() >= MARKS {
            marks.pop_front();
        }
        marks.push_back(Mark { at_ms: now_ms, tokens, took, jobs });
    }

    /// Compares a worker with its peers; returns why it is slow, if that is new.
    pub fn compare<'a>(
        &mut self,
        worker: &WorkerId,
        peers: impl Iterator<Item = &'a WorkerId>,
        now_ms: u64,
    ) -> Option<String> {
        let own = self.workers.get(worker).filter(|pace| !pace.is_slow(now_ms))?.rate(now_ms)?;
        if own.time < LEAST_TIME || own.marks < LEAST_MARKS {
            return None;
        }
        let pace = self.workers.get_mut(worker)?;
        if pace.compared_ms.is_some_and(|at| now_ms.saturating_sub(at) < COMPARE_MS) {
            return None;
        }
        pace.compared_ms = Some(now_ms);
        let like = |rate: &Rate| rate.tokens >= PEER_TOKENS && alike(rate.jobs, own.jobs);
        let rates = peers.filter_map(|peer| self.workers.get(peer)?.rate(now_ms)).filter(like);
        let mut rates: Vec<f64> = rates.map(|rate| rate.per_second).collect();
        rates.sort_by(f64::total_cmp);
        let median = *rates.get(rates.len() / 2)?;
        if own.per_second * FACTOR > median {
            return None;
        }
        let reason = format!("it gives {:.1} tokens a second where its peers give {median:.1}", own.per_second);
        let pace = self.workers.get_mut(worker).expect("it was just looked at");
        // When its time is over it is measured anew.
        pace.marks.clear();
        pace.slow = Some((now_ms + SLOW_MS, reason.clone()));
        Some(reason)
    }

    /// Why a worker is slow, if it is.
    pub fn slow(&self, worker: &WorkerId, now_ms: u64) -> Option<&str> {
        let (until_ms, reason) = self.workers.get(worker)?.slow.as_ref()?;
        (now_ms < *until_ms).then_some(reason.as_str())
    }

    /// Every slow worker.
    pub fn all_slow(&self, now_ms: u64) -> Vec<WorkerId> {
        self.workers.iter().filter(|(_, pace)| pace.is_slow(now_ms)).map(|(id, _)| id.clone()).collect()
    }
}

fn alike(a: f64, b: f64) -> bool {
    let (a, b) = (a.max(1.0), b.max(1.0));
    a <= b * LIKE_LOAD && b <= a * LIKE_LOAD
}

impl Pace {
    fn is_slow(&self, now_ms: u64) -> bool {
        self.slow.as_ref().is_some_and(|(until_ms, _)| now_ms < *until_ms)
    }

    fn rate(&self, now_ms: u64) -> Option<Rate> {
        let recent = self.marks.iter().filter(|mark| now_ms.saturating_sub(mark.at_ms) < WITHIN_MS);
        let (mut tokens, mut time, mut jobs, mut marks) = (0_u64, Duration::ZERO, 0.0, 0);
        for mark in recent {
            tokens += u64::from(mark.tokens);
            time += mark.took;
            jobs += f64::from(mark.jobs);
            marks += 1;
        }
        let per_second = tokens as f64 / time.as_secs_f64();
        (marks > 0 && !time.is_zero()).then(|| Rate { per_second, jobs: jobs / marks as f64, tokens, time, marks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> WorkerId {
        text.parse().unwrap()
    }

    /// Each worker gives a token in so many milliseconds, ten times, with so many jobs; returns what the first is.
    fn check(workers: &[(&str, u64, u32)]) -> Option<String> {
        let mut paces = Paces::default();
        for (worker, ms, jobs) in workers {
            (0..30).for_each(|at| paces.note(&id(worker), 1, Duration::from_millis(*ms), *jobs, 1_000 + at));
        }
        let peers: Vec<WorkerId> = workers[1..].iter().map(|(worker, ..)| id(worker)).collect();
        paces.compare(&id(workers[0].0), peers.iter(), 2_000)
    }

    #[test]
    fn a_twentieth_of_the_peers_is_slow_and_a_tenth_is_not() {
        let slow = check(&[("m.0", 1_000, 4), ("m.1", 50, 4), ("m.2", 40, 4)]);
        assert_eq!(slow.as_deref(), Some("it gives 1.0 tokens a second where its peers give 25.0"));
        assert_eq!(check(&[("m.0", 500, 4), ("m.1", 50, 4), ("m.2", 50, 4)]), None);
    }

    #[test]
    fn alone_or_beside_others_with_other_loads_none_is_slow() {
        assert_eq!(check(&[("m.0", 1_000, 4)]), None);
        assert_eq!(check(&[("m.0", 1_000, 32), ("m.1", 10, 1)]), None);
        assert!(check(&[("m.0", 1_000, 32), ("m.1", 10, 16)]).is_some());
    }

    #[test]
    fn most_peers_decide_and_not_the_fastest() {
        assert_eq!(check(&[("m.0", 100, 1), ("m.1", 1, 1), ("m.2", 100, 1), ("m.3", 100, 1)]), None);
    }

    #[test]
    fn a_worker_of_many_streams_is_compared_once_a_second() {
        let mut paces = Paces::default();
        let both = |paces: &mut Paces, slow_ms: u64, now_ms: u64| {
            for (worker, ms) in [("m.0", slow_ms), ("m.1", 10)] {
                (0..MARKS).for_each(|_| paces.note(&id(worker), 1, Duration::from_millis(ms), 1, now_ms));
            }
            paces.compare(&id("m.0"), [id("m.1")].iter(), now_ms).is_some()
        };
        assert!(!both(&mut paces, 12, 0), "it is as fast as the other");
        assert!(!both(&mut paces, 1_000, COMPARE_MS / 2));
        assert!(!both(&mut paces, 1_000, COMPARE_MS - 1));
        assert!(both(&mut paces, 1_000, COMPARE_MS), "however often it was asked meanwhile");
    }

    #[test]
    fn little_is_no_evidence() {
        let mut paces = Paces::default();
        (0..30).for_each(|_| paces.note(&id("m.1"), 1, Duration::from_millis(10), 1, 0));
        let peers = [id("m.1")];
        for _ in 0..LEAST_MARKS - 1 {
            paces.note(&id("m.0"), 1, Duration::from_secs(1), 1, 0);
            assert_eq!(paces.compare(&id("m.0"), peers.iter(), 0), None);
        }
        paces.note(&id("m.0"), 1, Duration::from_secs(1), 1, 0);
        assert_eq!(paces.compare(&id("m.0"), peers.iter(), WITHIN_MS), None, "it is too old");
        assert!(paces.compare(&id("m.0"), peers.iter(), 0).is_some());
    }

    #[test]
    fn a_slow_worker_is_told_once_and_measured_anew_after_a_while() {
        let mut paces = Paces::default();
        for (worker, ms) in [("m.0", 1_000), ("m.1", 10)] {
            (0..30).for_each(|_| paces.note(&id(worker), 1, Duration::from_millis(ms), 1, 0));
        }
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), 0).is_some());
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), 1).is_none());
        assert_eq!(paces.all_slow(SLOW_MS - 1), [id("m.0")]);
        assert!(paces.slow(&id("m.0"), SLOW_MS - 1).is_some() && paces.slow(&id("m.0"), SLOW_MS).is_none());
        assert!(paces.slow(&id("m.1"), 0).is_none());
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), SLOW_MS).is_none());
    }
}
