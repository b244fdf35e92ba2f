//! What came of everything: every stream compared with an undisturbed one, and how long those that were moved paused.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::kinds::Kind;
use crate::reader::{Event, Told};

/// A stream that was on a victim.
struct Hit {
    killed: Instant,
    /// What it was doing: `waiting` for its prompt to be computed, or `answering`.
    state: String,
    /// Nobody keeps what was computed of it: its agent is gone.
    lost: bool,
}

#[derive(Default)]
pub struct Tally {
    pub streams: u64,
    pub moved: Vec<Duration>,
    /// From a client's first retry to its next event: of answers that an agent kept, and of those that none did.
    kept: Vec<Duration>,
    computed_again: Vec<Duration>,
    anew: u64,
    by_kind: BTreeMap<&'static str, u64>,
    by_state: BTreeMap<String, u64>,
    pub by_fault: BTreeMap<&'static str, u64>,
    pub different: Vec<String>,
    pub failed: Vec<String>,
    hit: HashMap<String, Hit>,
    ended: HashSet<String>,
}

/// The events of each choice, and those of none: between choices the order is nobody's.
fn by_choice(events: &[Event]) -> BTreeMap<Option<u64>, Vec<&str>> {
    let mut parts: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for event in events {
        parts.entry(event.choice).or_default().push(event.said.as_str());
    }
    parts
}

impl Tally {
    /// Notes that a turn is on a victim, unless its client has its end already.
    pub fn hit(&mut self, turn: String, state: String, lost: bool, killed: Instant) {
        if !self.ended.contains(&turn) {
            self.hit.entry(turn).and_modify(|hit| hit.lost |= lost).or_insert(Hit { killed, state, lost });
        }
    }

    /// Takes a stream that came to its end.
    pub fn judge(&mut self, kind: &Kind, told: Told) {
        let (got, expected) = (by_choice(&told.events), by_choice(&kind.expected));
        if got != expected {
            let first = expected.iter().find_map(|(choice, expected)| {
                let got = got.get(choice).map(Vec::as_slice).unwrap_or_default();
                let at = (0..expected.len().max(got.len())).find(|at| got.get(*at) != expected.get(*at))?;
                Some(format!("event {at} of choice {choice:?} is {:?}, not {:?}", got.get(at), expected.get(at)))
            });
            self.different.push(format!("{} {}: {}", kind.name, told.turn, first.unwrap_or_default()));
        }
        let lost = self.hit.get(&told.turn).is_some_and(|hit| hit.lost);
        if lost { &mut self.computed_again } else { &mut self.kept }.extend(&told.resumed);
        self.anew += told.anew;
        self.ended.insert(told.turn.clone());
        let Some(Hit { killed, state, .. }) = self.hit.remove(&told.turn) else { return };
        self.moved.push(pause(&told.at, killed));
        *self.by_kind.entry(kind.name).or_default() += 1;
        *self.by_state.entry(state).or_default() += 1;
    }

    /// The report's part about streams.
    pub fn report(&mut self) -> Value {
        json!({
            "streams": self.streams, "moved": self.moved.len(), "moved_by_kind": self.by_kind,
            "moved_while": self.by_state, "faults": self.by_fault,
            "different": self.different.len(), "failed": self.failed.len(),
            "pause_s": percentiles(&mut self.moved),
            "read_on": self.kept.len() + self.computed_again.len(), "asked_again": self.anew,
            "after_retry_s": {
                "kept": percentiles(&mut self.kept), "computed_again": percentiles(&mut self.computed_again),
                "computed_again_count": self.computed_again.len(),
            },
        })
    }
}

/// What came after the kill may still have been on its way: the pause is the longest after it.
fn pause(at: &[Instant], killed: Instant) -> Duration {
    let later = at.iter().copied().filter(|at| *at > killed);
    let starts = std::iter::once(killed).chain(later.clone());
    starts.zip(later).map(|(from, to)| to - from).max().unwrap_or_default()
}

fn percentiles(times: &mut [Duration]) -> Value {
    times.sort();
    let at = |share: f64| {
        let at = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
        times.get(at).map_or(0.0, Duration::as_secs_f64)
    };
    json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_the_longest_time_without_an_event_after_the_kill() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let events = [at(0), at(900), at(1000), at(1500), at(1600)];
        assert_eq!(pause(&events, at(990)), Duration::from_millis(500));
        assert_eq!(pause(&events, at(1010)), Duration::from_millis(490), "it begins with the kill");
        assert_eq!(pause(&events, at(1700)), Duration::ZERO, "everything had come");
    }

    #[test]
    fn a_token_lost_or_told_twice_is_a_difference_and_the_order_between_choices_is_none() {
        let event = |choice, said: &str| Event { choice: Some(choice), said: said.into() };
        let expected = vec![event(0, "a"), event(1, "x"), event(0, "b")];
        let kind = Kind { name: "greedy", body: Value::Null, expected };
        for (events, different) in [
            (vec![event(1, "x"), event(0, "a"), event(0, "b")], 0),
            (vec![event(0, "a"), event(1, "x")], 1),
            (vec![event(0, "a"), event(0, "a"), event(1, "x"), event(0, "b")], 1),
        ] {
            let mut tally = Tally::default();
            tally.judge(&kind, Told { events, ..Told::default() });
            assert_eq!(tally.different.len(), different, "{:?}", tally.different);
        }
    }

    #[test]
    fn what_an_agent_kept_and_what_was_computed_again_are_told_apart() {
        let kind = Kind { name: "greedy", body: Value::Null, expected: Vec::new() };
        let mut tally = Tally::default();
        let second = Duration::from_secs(1);
        for (turn, lost, seconds) in [("a", false, 1), ("b", true, 3)] {
            tally.hit(turn.into(), "answering".into(), lost, Instant::now());
            tally.judge(&kind, Told { turn: turn.into(), resumed: vec![seconds * second], ..Told::default() });
        }
        let report = tally.report();
        assert_eq!(report["after_retry_s"]["kept"]["max"], 1.0);
        assert_eq!(report["after_retry_s"]["computed_again"]["max"], 3.0);
        assert_eq!((&report["read_on"], &report["moved"]), (&json!(2), &json!(2)));
    }

    #[test]
    fn percentiles_are_of_what_was_seen() {
        let mut times: Vec<_> = (1..=100).rev().map(Duration::from_secs).collect();
        assert_eq!(percentiles(&mut times), json!({ "p50": 50.0, "p99": 99.0, "max": 100.0 }));
        assert_eq!(percentiles(&mut []), json!({ "p50": 0.0, "p99": 0.0, "max": 0.0 }));
    }
}
