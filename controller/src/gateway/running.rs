//! Which turns run here now, for `izar requests list`.
//!
//! Soft state of this process. A turn writes its progress into atomics of its own, so that a listing never waits for
//! a turn nor a turn for a listing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use izar_common::id::{DeploymentId, KeyId, NodeId, TurnId, WorkerId};
use serde::{Deserialize, Serialize};

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
    place: Mutex<Option<(NodeId, WorkerId)>>,
}

impl Entry {
    pub fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Relaxed);
    }
    pub fn placed(&self, agent: &NodeId, worker: &WorkerId) {
        *self.place.lock().expect("no panic while a place is held") = Some((agent.clone(), worker.clone()));
        self.enter(Stage::Waiting);
    }
    pub fn tokens(&self, tokens: u32) {
        self.tokens.store(tokens, Relaxed);
    }

    fn snapshot(&self) -> Running {
        let place = self.place.lock().expect("no panic while a place is held").clone();
        let (agent, worker) = place.unzip();
        let stages = [Stage::Opening, Stage::Waiting, Stage::Answering, Stage::Closing];
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
            started_ms,
        }
    }
}

/// All running turns. Bounded by the gateway's places for turns.
#[derive(Debug, Clone, Default)]
pub struct List(Arc<Mutex<HashMap<TurnId, Arc<Entry>>>>);

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
        let (stage, tokens, place) = (AtomicU8::new(Stage::Opening as u8), AtomicU32::new(0), Mutex::new(None));
        let entry = Arc::new(Entry { begun, stage, tokens, place });
        self.0.lock().expect("no panic while the list is held").insert(turn, entry.clone());
        Listed { entry, list: self.clone() }
    }

    /// Begins an entry that is not listed: for who reads along with a turn that is.
    pub fn unlisted(begun: Begun) -> Listed {
        List::default().begin(begun)
    }

    /// Returns what runs now, oldest first.
    pub fn snapshot(&self) -> Vec<Running> {
        let entries: Vec<_> = self.0.lock().expect("no panic while the list is held").values().cloned().collect();
        let mut running: Vec<_> = entries.iter().map(|entry| entry.snapshot()).collect();
        running.sort_by_key(|running| (running.started_ms, running.turn));
        running
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if self.is_current() {
            self.list.0.lock().expect("no panic while the list is held").remove(&self.entry.begun.turn);
        }
    }
}

impl Listed {
    /// Whether nobody has gone on with the turn on this controller since.
    pub fn is_current(&self) -> bool {
        let list = self.list.0.lock().expect("no panic while the list is held");
        list.get(&self.entry.begun.turn).is_some_and(|entry| Arc::ptr_eq(entry, &self.entry))
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
        early.placed(&NodeId::new("a1").unwrap(), &WorkerId::new("m.0").unwrap());
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
        drop((again, early));
        assert!(list.snapshot().is_empty());
    }
}
