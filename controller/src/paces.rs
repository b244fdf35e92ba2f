//! How fast workers give tokens, and which give far fewer than their peers: a card that is throttled, or a server that
//! swaps, without any error that would tell. Soft state; each controller measures what it sees itself.
//!
//! Pure: times come in as arguments. A worker is compared with those of the same deployment that compute the same way and
//! have about as much to do; alone it is never slow. One that is slow gets jobs only if no other can take them, for a
//! while; then it is measured anew.
//!
//! It does not know which jobs of a worker are urgent, for other controllers' are not told apart. Beside them the others
//! pause for most of the time (see the worker's batch), so a worker that has urgent jobs for seconds on end, while its
//! peers have none, may be called slow: wrongly of the card, but rightly of what the others there would get.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use izar_common::id::WorkerId;

/// A worker that gives a twentieth of its peers' tokens is slow. Less is explained by load: several times as many jobs, a
/// long prompt beside them, another program on the server.
const FACTOR: f64 = 20.0;

/// What is older says nothing of now, in seconds.
const WITHIN: u64 = 30;

/// What must have been seen of a worker before it is called slow: time of its streams, how often they gave something, and
/// in how many seconds, that lie over so long. One long prompt holds up all of a worker's streams at once, for a second or
/// two: that is one time, however many they are.
const LEAST_TIME: Duration = Duration::from_secs(3);
const LEAST_MARKS: u32 = 8;
const LEAST_SECONDS: usize = 5;
const LEAST_SPAN: u64 = 5;

/// A worker that gives a token every few seconds makes few marks. Of it this is enough: their whole time, how many, over
/// how long.
const RARE_TIME: Duration = Duration::from_secs(20);
const RARE_MARKS: u32 = 3;
const RARE_SPAN: u64 = 10;

/// A token that took longer counts as much as this: a sequence that waited minutes for blocks of the cache says nothing of
/// how fast its worker computes.
const MOST_TIME: Duration = Duration::from_secs(2);

/// And of a peer, before it is held against another.
const PEER_TOKENS: u64 = 20;

/// Peers with more than so many times the jobs, or fewer, are no measure.
const LIKE_LOAD: f64 = 2.0;

/// How long a slow worker is left alone: as long as a degraded GPU.
const SLOW_MS: u64 = 15 * 60_000;

/// How often a worker is compared, at most: it has many streams, and all its peers are looked at.
const COMPARE_MS: u64 = 1_000;

/// Workers remembered: those that gave nothing lately are forgotten first.
const WORKERS: usize = 8_192;

/// What is known of all workers.
#[derive(Debug, Default)]
pub struct Paces {
    workers: HashMap<WorkerId, Pace>,
}

#[derive(Debug, Default)]
struct Pace {
    /// What its streams gave in each second that any of them did: [`WITHIN`] at most, the newest last.
    seconds: VecDeque<Second>,
    /// Until when it is slow, and why.
    slow: Option<(u64, String)>,
    /// When it was compared with its peers last.
    compared_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Second {
    /// Unix time.
    at: u64,
    tokens: u64,
    time: Duration,
    /// The same, with nothing cut off.
    whole: Duration,
    /// How often streams gave something, and the jobs that the worker had then, added up.
    marks: u32,
    jobs: u64,
}

/// A worker's pace: tokens a second of a stream, and the jobs beside it.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    jobs: f64,
    tokens: u64,
}

impl Paces {
    /// Notes that one stream of a worker gave so many tokens in a time, with so many jobs on the worker.
    pub fn note(&mut self, worker: &WorkerId, tokens: u32, took: Duration, jobs: u32, now_ms: u64) {
        if self.workers.len() >= WORKERS && !self.workers.contains_key(worker) {
            self.workers.retain(|_, pace| pace.recent(now_ms).next().is_some() || pace.is_slow(now_ms));
            if self.workers.len() >= WORKERS {
                return;
            }
        }
        let seconds = &mut self.workers.entry(worker.clone()).or_default().seconds;
        let at = now_ms / 1_000;
        // A clock that was set back adds to the last second.
        if seconds.back().is_none_or(|last| last.at < at) {
            if seconds.len() as u64 >= WITHIN {
                seconds.pop_front();
            }
            seconds.push_back(Second { at, ..Second::default() });
        }
        if let Some(last) = seconds.back_mut() {
            last.tokens += u64::from(tokens);
            last.time += took.min(MOST_TIME);
            last.whole += took;
            last.marks = last.marks.saturating_add(1);
            last.jobs += u64::from(jobs);
        }
    }

    /// Compares a worker with its peers; returns why it is slow, if that is new.
    pub fn compare<'a>(
        &mut self,
        worker: &WorkerId,
        peers: impl Iterator<Item = &'a WorkerId>,
        now_ms: u64,
    ) -> Option<String> {
        let pace = self.workers.get_mut(worker)?;
        let lately = pace.compared_ms.is_some_and(|at| now_ms.saturating_sub(at) < COMPARE_MS);
        if lately || pace.is_slow(now_ms) {
            return None;
        }
        pace.compared_ms = Some(now_ms);
        let own = pace.rate(now_ms).filter(|_| pace.is_evidence(now_ms))?;
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
        pace.seconds.clear();
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

    fn recent(&self, now_ms: u64) -> impl Iterator<Item = &Second> {
        self.seconds.iter().filter(move |second| (now_ms / 1_000).saturating_sub(second.at) < WITHIN)
    }

    fn rate(&self, now_ms: u64) -> Option<Rate> {
        let (mut tokens, mut time, mut jobs, mut marks) = (0_u64, Duration::ZERO, 0_u64, 0_u32);
        for second in self.recent(now_ms) {
            tokens += second.tokens;
            time += second.time;
            jobs += second.jobs;
            marks += second.marks;
        }
        let (per_second, jobs) = (tokens as f64 / time.as_secs_f64(), jobs as f64 / f64::from(marks));
        (marks > 0 && !time.is_zero()).then_some(Rate { per_second, jobs, tokens })
    }

    /// Whether enough was seen of it to be held against it.
    fn is_evidence(&self, now_ms: u64) -> bool {
        let seconds: Vec<&Second> = self.recent(now_ms).collect();
        let time: Duration = seconds.iter().map(|second| second.time).sum();
        let whole: Duration = seconds.iter().map(|second| second.whole).sum();
        let marks: u32 = seconds.iter().map(|second| second.marks).sum();
        let span = seconds.first().zip(seconds.last()).map_or(0, |(first, last)| last.at - first.at);
        let often = time >= LEAST_TIME && marks >= LEAST_MARKS && seconds.len() >= LEAST_SECONDS && span >= LEAST_SPAN;
        often || (whole >= RARE_TIME && marks >= RARE_MARKS && span >= RARE_SPAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> WorkerId {
        text.parse().unwrap()
    }

    /// A worker gives a token in so many milliseconds, three times a second, from one second to another.
    fn give(paces: &mut Paces, worker: &str, ms: u64, jobs: u32, from: u64, to: u64) {
        for at in (from * 3..=to * 3).map(|third| third * 1_000 / 3) {
            paces.note(&id(worker), 1, Duration::from_millis(ms), jobs, at);
        }
    }

    /// Each worker gives a token in so many milliseconds, with so many jobs; returns what the first is.
    fn check(workers: &[(&str, u64, u32)]) -> Option<String> {
        let mut paces = Paces::default();
        workers.iter().for_each(|(worker, ms, jobs)| give(&mut paces, worker, *ms, *jobs, 1, 9));
        let peers: Vec<WorkerId> = workers[1..].iter().map(|(worker, ..)| id(worker)).collect();
        paces.compare(&id(workers[0].0), peers.iter(), 9_000)
    }

    #[test]
    fn a_worker_that_hardly_gives_anything_is_slow_though_it_makes_few_marks() {
        let check = |every_s: u64, marks: u64| {
            let mut paces = Paces::default();
            give(&mut paces, "m.1", 20, 1, 1, 40);
            for mark in 1..=marks {
                paces.note(&id("m.0"), 1, Duration::from_secs(every_s), 1, (10 + mark * every_s) * 1_000);
            }
            paces.compare(&id("m.0"), [id("m.1")].iter(), (10 + marks * every_s) * 1_000).is_some()
        };
        assert!(check(5, 5) && check(8, 3));
        assert!(!check(8, 2), "two may be chance");
        assert!(!check(3, 3), "so may a few seconds");
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
        give(&mut paces, "m.1", 10, 1, 0, 30);
        give(&mut paces, "m.0", 12, 1, 0, 20);
        let peers = [id("m.1")];
        let slow = |paces: &mut Paces, now_ms| paces.compare(&id("m.0"), peers.iter(), now_ms).is_some();
        assert!(!slow(&mut paces, 20_000), "it is as fast as the other");
        (0..500).for_each(|_| give(&mut paces, "m.0", 1_000, 1, 20, 20));
        assert!(!slow(&mut paces, 20_000 + COMPARE_MS / 2));
        assert!(!slow(&mut paces, 20_000 + COMPARE_MS - 1));
        assert!(slow(&mut paces, 20_000 + COMPARE_MS), "however often it was asked meanwhile");
    }

    #[test]
    fn little_is_no_evidence() {
        // So many times, so many seconds apart.
        let check = |times: u64, apart: u64, ms: u64, later: u64| {
            let mut paces = Paces::default();
            give(&mut paces, "m.1", 10, 1, 0, 60);
            (0..times).for_each(|at| paces.note(&id("m.0"), 1, Duration::from_millis(ms), 1, at * apart * 1_000));
            let now_ms = ((times - 1) * apart + later) * 1_000;
            paces.compare(&id("m.0"), [id("m.1")].iter(), now_ms).is_some()
        };
        assert!(check(8, 1, 1_000, 0));
        assert!(!check(7, 1, 1_000, 0), "it gave something too seldom");
        assert!(!check(8, 1, 300, 0), "of too short a time");
        assert!(!check(8, 1, 1_000, WITHIN), "long ago");
        assert!(!check(8, 0, 1_000, 0), "all at once");
    }

    #[test]
    fn many_streams_that_one_long_prompt_holds_up_once_are_no_evidence() {
        for streams in [8, 64] {
            let mut paces = Paces::default();
            give(&mut paces, "m.1", 10, 8, 0, 9);
            (0..streams).for_each(|_| paces.note(&id("m.0"), 1, Duration::from_millis(1_500), 8, 1_500));
            assert_eq!(paces.compare(&id("m.0"), [id("m.1")].iter(), 1_500), None, "{streams}");
            // Nor if they are held up again before five seconds have passed.
            (0..streams).for_each(|_| paces.note(&id("m.0"), 1, Duration::from_millis(1_500), 8, 4_500));
            assert_eq!(paces.compare(&id("m.0"), [id("m.1")].iter(), 4_500), None, "{streams}");
        }
    }

    #[test]
    fn a_sequence_that_waited_minutes_for_blocks_does_not_make_its_worker_slow() {
        let mut paces = Paces::default();
        give(&mut paces, "m.1", 10, 1, 0, 9);
        give(&mut paces, "m.0", 10, 1, 0, 9);
        paces.note(&id("m.0"), 1, Duration::from_secs(300), 1, 9_000);
        assert_eq!(paces.compare(&id("m.0"), [id("m.1")].iter(), 9_000), None);
    }

    #[test]
    fn a_slow_worker_is_told_once_and_measured_anew_after_a_while() {
        let mut paces = Paces::default();
        for (worker, ms) in [("m.0", 1_000), ("m.1", 10)] {
            give(&mut paces, worker, ms, 1, 0, 9);
        }
        let now_ms = 9_000;
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), now_ms).is_some());
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), now_ms + COMPARE_MS).is_none());
        assert_eq!(paces.all_slow(now_ms + SLOW_MS - 1), [id("m.0")]);
        assert!(paces.slow(&id("m.0"), now_ms + SLOW_MS - 1).is_some());
        assert!(paces.slow(&id("m.0"), now_ms + SLOW_MS).is_none());
        assert!(paces.slow(&id("m.1"), now_ms).is_none());
        assert!(paces.compare(&id("m.0"), [id("m.1")].iter(), now_ms + SLOW_MS).is_none());
    }
}
