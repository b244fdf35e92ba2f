//! Which turns run here now, for `izar requests list`, and what happened to them, for `izar explain`.
//!
//! Soft state of this process. A turn writes its progress into atomics of its own, so that a listing never waits for
//! a turn nor a turn for a listing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use izar_common::clock::wall_ms;
use izar_common::id::{DeploymentId, KeyId, NodeId, TurnId, WorkerId};
use serde::{Deserialize, Serialize};

use super::trace::{self, Ended, Events, Trace, What};
use crate::scheduler::Why;

/// How far a turn is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Stage {
    /// Being recorded and placed.
    Opening,
    /// Placed; the worker has given nothing yet.
    Waiting,
    Answering,
    /// Ended; its end is being recorded.
    Closing,
    /// Waits for its turn; not recorded yet.
    Queued,
}

/// A running turn as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub turn: TurnId,
    pub key: KeyId,
    pub deployment: DeploymentId,
    pub stream: bool,
    pub agent: Option<NodeId>,
    pub worker: Option<WorkerId>,
    pub state: Stage,
    pub prompt_tokens: u32,
    /// Tokens of the answer so far.
    pub tokens: u32,
    /// How often a choice of it went on elsewhere.
    pub moves: u32,
    /// Unix time in milliseconds.
    pub started_ms: u64,
}

/// What does not change while a turn runs.
#[derive(Debug, Clone)]
pub struct Begun {
    pub turn: TurnId,
    pub key: KeyId,
    pub deployment: DeploymentId,
    pub stream: bool,
    pub prompt_tokens: u32,
    pub started_ms: u64,
}

/// A turn's own entry in the list; leaving it out ends its listing.
#[derive(Debug)]
pub struct Entry {
    begun: Begun,
    stage: AtomicU8,
    tokens: AtomicU32,
    moves: AtomicU32,
    place: Mutex<Option<(NodeId, WorkerId)>>,
    events: Mutex<Events>,
}

impl Entry {
    pub fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Relaxed);
    }
    /// `why` is there if a job was placed; if not, what an agent keeps of it is read.
    pub fn placed(&self, choice: u32, agent: &NodeId, worker: &WorkerId, why: Option<&Why>) {
        let (agent, worker) = (agent.clone(), worker.clone());
        *self.place.lock().expect("no panic while a place is held") = Some((agent.clone(), worker.clone()));
        self.enter(Stage::Waiting);
        self.note(match why {
            Some(why) => What::Placed { choice, agent, worker, why: Box::new(why.clone()) },
            None => What::Attached { choice, agent, worker },
        });
    }
    /// A choice lost its worker and goes on elsewhere.
    pub fn lost(&self, choice: u32, worker: &WorkerId, reason: &str) {
        self.moves.fetch_add(1, Relaxed);
        self.note(What::Lost { choice, worker: worker.clone(), reason: trace::reason(reason) });
    }
    /// Keeps what happened, for whoever wants it explained.
    pub fn note(&self, what: What) {
        let at_ms = wall_ms().saturating_sub(self.begun.started_ms);
        self.events.lock().expect("no panic while events are held").push(at_ms, what);
    }
    fn trace(&self, running: bool) -> Trace {
        let Begun { turn, key, deployment, started_ms, .. } = self.begun.clone();
        let events = self.events.lock().expect("no panic while events are held");
        events.trace(turn, key, deployment.to_string(), started_ms, running)
    }
    pub fn tokens(&self, tokens: u32) {
        self.tokens.store(tokens, Relaxed);
    }

    fn snapshot(&self) -> Running {
        let place = self.place.lock().expect("no panic while a place is held").clone();
        let (agent, worker) = place.unzip();
        let stages = [Stage::Opening, Stage::Waiting, Stage::Answering, Stage::Closing, Stage::Queued];
        let Begun { turn, key, deployment, stream, prompt_tokens, started_ms } = self.begun.clone();
        Running {
            turn,
            key,
            deployment,
            stream,
            agent,
            worker,
            state: stages[usize::from(self.stage.load(Relaxed))],
            prompt_tokens,
            tokens: self.tokens.load(Relaxed),
            moves: self.moves.load(Relaxed),
            started_ms,
        }
    }
}

/// All running turns, bounded by the gateway's places for turns; and those that ended last.
#[derive(Debug, Clone, Default)]
pub struct List(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    running: Mutex<HashMap<TurnId, Arc<Entry>>>,
    ended: Ended,
}

impl Inner {
    fn running(&self) -> MutexGuard<'_, HashMap<TurnId, Arc<Entry>>> {
        self.running.lock().expect("no panic while the list is held")
    }
}

/// Keeps a turn on the list.
#[derive(Debug)]
pub struct Listed {
    entry: Arc<Entry>,
    list: List,
}

impl std::ops::Deref for Listed {
    type Target = Entry;
    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl List {
    /// Lists a turn until the guard is dropped.
    pub fn begin(&self, begun: Begun) -> Listed {
        let turn = begun.turn;
        let entry = Arc::new(Entry {
            begun,
            stage: AtomicU8::new(Stage::Opening as u8),
            tokens: AtomicU32::new(0),
            moves: AtomicU32::new(0),
            place: Mutex::new(None),
            events: Mutex::default(),
        });
        self.0.running().insert(turn, entry.clone());
        Listed { entry, list: self.clone() }
    }

    /// Begins an entry that is not listed: for who reads along with a turn that is.
    pub fn unlisted(begun: Begun) -> Listed {
        List::default().begin(begun)
    }

    /// Keeps why a request of a known key was refused before it became a turn.
    pub fn refused(&self, turn: TurnId, key: &KeyId, model: &str, at_ms: u64, code: &str, reason: &str) {
        let mut events = Events::default();
        events.push(at_ms, What::Refused { code: code.to_owned(), reason: trace::reason(reason) });
        let started_ms = wall_ms().saturating_sub(at_ms);
        self.0.ended.push(events.trace(turn, key.clone(), trace::reason(model), started_ms, false));
    }

    /// What happened to a request here.
    pub fn explain(&self, turn: TurnId) -> Option<Trace> {
        let running = self.0.running().get(&turn).cloned();
        running.map(|entry| entry.trace(true)).or_else(|| self.0.ended.find(turn))
    }

    /// Returns what runs now, oldest first.
    pub fn snapshot(&self) -> Vec<Running> {
        let entries: Vec<_> = self.0.running().values().cloned().collect();
        let mut running: Vec<_> = entries.iter().map(|entry| entry.snapshot()).collect();
        running.sort_by_key(|running| (running.started_ms, running.turn));
        running
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if self.is_current() {
            self.list.0.running().remove(&self.entry.begun.turn);
        }
        self.list.0.ended.push(self.entry.trace(false));
    }
}

impl Listed {
    /// Whether nobody has gone on with the turn on this controller since.
    pub fn is_current(&self) -> bool {
        let running = self.list.0.running();
        running.get(&self.entry.begun.turn).is_some_and(|entry| Arc::ptr_eq(entry, &self.entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(turn: u128, started_ms: u64) -> Begun {
        Begun {
            turn: TurnId(turn),
            key: KeyId::new("k").unwrap(),
            deployment: DeploymentId::new("m").unwrap(),
            stream: true,
            prompt_tokens: 3,
            started_ms,
        }
    }

    #[test]
    fn a_turn_is_listed_while_it_runs_with_its_progress() {
        let list = List::default();
        let late = list.begin(begun(1, 20));
        let early = list.begin(begun(2, 10));
        early.placed(0, &NodeId::new("a1").unwrap(), &WorkerId::new("m.0").unwrap(), None);
        early.enter(Stage::Answering);
        early.tokens(5);
        let running = list.snapshot();
        assert_eq!(running.iter().map(|r| r.turn.0).collect::<Vec<_>>(), [2, 1]);
        assert_eq!((running[0].state, running[0].tokens), (Stage::Answering, 5));
        assert_eq!(running[0].worker.as_ref().unwrap().as_str(), "m.0");
        assert_eq!((running[1].state, &running[1].agent), (Stage::Opening, &None));
        let again = list.begin(begun(1, 20));
        assert!(again.is_current() && !late.is_current());
        drop(late);
        assert_eq!(list.snapshot().len(), 2, "the one that goes on stays");
        early.lost(0, &WorkerId::new("m.0").unwrap(), "it died");
        assert_eq!(list.snapshot()[0].moves, 1);
        assert!(list.explain(TurnId(2)).unwrap().running);
        drop((again, early));
        assert!(list.snapshot().is_empty());
        let told = list.explain(TurnId(2)).unwrap();
        assert!(!told.running && matches!(told.events[1].what, What::Lost { .. }), "{told:?}");
        assert!(list.explain(TurnId(3)).is_none());
        list.refused(TurnId(3), &KeyId::new("k").unwrap(), "gpt", 4, "replicas_full", "all are full");
        assert!(matches!(list.explain(TurnId(3)).unwrap().events[0].what, What::Refused { .. }));
    }
}
