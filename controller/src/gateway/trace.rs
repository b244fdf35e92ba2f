//! What happened to each request on this controller, for `izar explain`: while it runs, and for some time after.
//!
//! Soft state, bounded, and without a word of prompt or answer. What must be provable is in the replicated record.

use std::collections::VecDeque;
use std::sync::Mutex;

use izar_common::chat::Class;
use izar_common::id::{KeyId, NodeId, TurnId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::scheduler::Why;

/// Requests that have ended or were refused and are still explained: half a minute of full load, days of a quiet
/// office. The oldest gives way.
pub const ENDED: usize = 10_000;

/// Events of one request; more say that there were more.
pub const EVENTS: usize = 64;

/// Longest reason that is kept, in bytes; ours are sentences.
const REASON_BYTES: usize = 400;

/// One request's story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    pub turn: TurnId,
    pub key: KeyId,
    /// The deployment, or what the client called it.
    pub model: String,
    /// Unix time in milliseconds.
    pub started_ms: u64,
    pub running: bool,
    pub events: Vec<Event>,
    /// Events beyond [`EVENTS`].
    pub more: u32,
}

/// Something that happened, milliseconds after the request's start here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub at_ms: u64,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum What {
    /// A client came back with it from another stream.
    Resumed,
    /// It found no place free, and waited for one or for its refusal. `ahead`: requests of its class and of more urgent
    /// ones that waited when it came.
    Waited {
        class: Class,
        ahead: u32,
        waited_ms: u64,
    },
    Placed {
        choice: u32,
        agent: NodeId,
        worker: WorkerId,
        why: Box<Why>,
    },
    /// What an agent keeps of it is read.
    Attached {
        choice: u32,
        agent: NodeId,
        worker: WorkerId,
    },
    FirstToken,
    /// Its worker gives nothing any more; it goes on elsewhere after the tokens that have come.
    Lost {
        choice: u32,
        worker: WorkerId,
        reason: String,
    },
    Refused {
        code: String,
        reason: String,
    },
    Ended {
        /// As in `izar turns list`.
        outcome: String,
        tokens: u32,
    },
}

/// The events of a request that runs.
#[derive(Debug, Default)]
pub struct Events {
    list: Vec<Event>,
    more: u32,
}

impl Events {
    pub fn push(&mut self, at_ms: u64, what: What) {
        // The end always finds room: it is what one asks for first.
        if self.list.len() < EVENTS || matches!(what, What::Ended { .. } | What::Refused { .. }) {
            self.list.push(Event { at_ms, what });
        } else {
            self.more += 1;
        }
    }

    pub fn trace(&self, turn: TurnId, key: KeyId, model: String, started_ms: u64, running: bool) -> Trace {
        Trace { turn, key, model, started_ms, running, events: self.list.clone(), more: self.more }
    }
}

/// A reason that is short enough to keep.
pub fn reason(text: &str) -> String {
    text.chars().take(REASON_BYTES / 4).collect()
}

/// The requests that have ended.
#[derive(Debug, Default)]
pub struct Ended(Mutex<VecDeque<Trace>>);

impl Ended {
    pub fn push(&self, trace: Trace) {
        let mut ended = self.0.lock().expect("no panic while traces are held");
        if ended.len() == ENDED {
            ended.pop_front();
        }
        ended.push_back(trace);
    }

    /// The newest story of a request that ended here.
    pub fn find(&self, turn: TurnId) -> Option<Trace> {
        let ended = self.0.lock().expect("no panic while traces are held");
        ended.iter().rev().find(|trace| trace.turn == turn).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(turn: u128) -> Trace {
        Events::default().trace(TurnId(turn), "k".parse().unwrap(), "m".into(), 5, false)
    }

    #[test]
    fn the_oldest_gives_way_and_the_newest_of_one_request_counts() {
        let ended = Ended::default();
        (0..=ENDED as u128).for_each(|turn| ended.push(trace(turn)));
        assert!(ended.find(TurnId(0)).is_none() && ended.find(TurnId(1)).is_some());
        ended.push(Trace { started_ms: 9, ..trace(7) });
        assert_eq!(ended.find(TurnId(7)).unwrap().started_ms, 9);
    }

    #[test]
    fn events_are_bounded_and_the_end_is_always_told() {
        let mut events = Events::default();
        (0..100).for_each(|at_ms| events.push(at_ms, What::FirstToken));
        events.push(100, What::Ended { outcome: "finished".into(), tokens: 3 });
        let trace = events.trace(TurnId(1), "k".parse().unwrap(), "m".into(), 0, false);
        assert_eq!((trace.events.len(), trace.more), (EVENTS + 1, 36));
        assert!(matches!(trace.events.last().unwrap().what, What::Ended { tokens: 3, .. }));
    }

    #[test]
    fn an_event_is_flat_json() {
        let event =
            Event { at_ms: 4, what: What::Lost { choice: 0, worker: "m.0".parse().unwrap(), reason: "x".into() } };
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json, serde_json::json!({"at_ms": 4, "what": "lost", "choice": 0, "worker": "m.0", "reason": "x"}));
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
    }
}
