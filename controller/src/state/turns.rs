//! Turns: the record of every request, opened before the first byte of its answer and closed once.
//!
//! Open turns are all kept; of closed ones the newest are remembered for `izar turns list` and against a turn id, or a
//! client's idempotency key, that comes twice. The audit segments keep every one for ever.

use std::collections::BTreeMap;

use izar_common::chat::{Finish, Usage};
use izar_common::id::{DeploymentId, Hash, KeyId, NumericsId, ProjectId, TenantId, TurnId};
use serde::{Deserialize, Serialize};

use super::command::{Origin, Refusal};
use izar_common::clock::Hlc;
use izar_common::id::NodeId;

/// Turns that may be open at once in a site: far more than its agents can run, so that only a leak of turns meets it.
pub const OPEN_LIMIT: usize = 100_000;
/// Closed turns that stay in the state; about 6 MiB of memory, and a second and more of full load.
pub const REMEMBERED: usize = 20_000;
/// Longest reason of a failed turn that is recorded, in bytes; the rest is cut off.
pub const REASON_BYTES: usize = 512;

/// What is known when a turn begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    pub turn: TurnId,
    pub tenant: TenantId,
    pub project: ProjectId,
    pub key: KeyId,
    pub deployment: DeploymentId,
    pub revision: Hash,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    pub stream: bool,
    pub origin: Origin,
    /// A client that may ask twice says so.
    pub once: Option<Once>,
    /// It was answered without a quorum, and is recorded afterwards.
    pub provisional: bool,
}

/// A request that shall have one answer however often it is asked. Keyed hashes alone: what a client chose as its
/// idempotency key, and what it asked, cannot be guessed from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Once {
    /// Of the API key's id and the idempotency key.
    pub name: Hash,
    /// Of the route and the body.
    pub request: Hash,
}

/// How a turn ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Finished {
        finish: Finish,
        usage: Usage,
        /// Part of it was computed by other numerics than its beginning: valid, but not what an undisturbed run had given.
        inexact: bool,
        /// What computed it, as far as it is known; several if more than one did.
        numerics: Option<NumericsId>,
    },
    /// The client left; `usage` is what was computed for it.
    Cancelled {
        usage: Usage,
    },
    Failed {
        reason: String,
        usage: Usage,
    },
    /// Its controller died.
    Abandoned,
}

/// A turn as it is remembered and listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub opening: Opening,
    pub opened: Hlc,
    /// `None` while it runs.
    pub closed: Option<(Hlc, Outcome)>,
}

/// A turn and the place it has among the closed ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remembered {
    pub turn: Turn,
    /// Counts closings in the order of the log; 0 while it is open. The smallest is forgotten first.
    pub order: u64,
}

/// All turns that the state knows.
#[derive(Debug, Default)]
pub(super) struct Turns {
    by_id: BTreeMap<TurnId, Remembered>,
    closed: BTreeMap<u64, TurnId>,
    /// The turns that may be asked for twice, by the name of the request.
    once: BTreeMap<Hash, TurnId>,
}

impl Turns {
    pub fn get(&self, id: &TurnId) -> Option<&Remembered> {
        self.by_id.get(id)
    }
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&TurnId, &Remembered)> {
        self.by_id.iter()
    }
    pub fn open_count(&self) -> usize {
        self.by_id.len() - self.closed.len()
    }
    /// Puts back what was stored.
    pub fn restore(&mut self, remembered: Remembered) {
        let id = remembered.turn.opening.turn;
        if remembered.order > 0 {
            self.closed.insert(remembered.order, id);
        }
        if let Some(once) = remembered.turn.opening.once {
            self.once.insert(once.name, id);
        }
        self.by_id.insert(id, remembered);
    }
    /// The turn that a client's request of this name began.
    pub fn named(&self, name: &Hash) -> Option<&Turn> {
        self.by_id.get(self.once.get(name)?).map(|remembered| &remembered.turn)
    }
    pub fn open(&mut self, opening: Opening, at: Hlc) -> Result<(), Refusal> {
        let id = opening.turn;
        if self.by_id.contains_key(&id) {
            return Err(Refusal::TurnExists(id));
        }
        if let Some(once) = opening.once
            && let Some(first) = self.named(&once.name)
        {
            let same = first.opening.once.is_some_and(|first| first.request == once.request);
            let turn = first.opening.turn;
            return Err(if same { Refusal::Repeats(turn) } else { Refusal::OtherRequest(turn) });
        }
        if self.open_count() >= OPEN_LIMIT {
            return Err(Refusal::Full { what: "open turns".into(), limit: OPEN_LIMIT as u64 });
        }
        if let Some(once) = opening.once {
            self.once.insert(once.name, id);
        }
        self.by_id.insert(id, Remembered { turn: Turn { opening, opened: at, closed: None }, order: 0 });
        Ok(())
    }
    /// Gives a turn that did not finish to another controller, and opens it again if it is closed; returns whether there
    /// was anything to change. A turn that finished stays as it is recorded.
    pub fn resume(&mut self, id: TurnId, key: &KeyId, origin: &Origin) -> Result<bool, Refusal> {
        let remembered = self.by_id.get_mut(&id).filter(|r| r.turn.opening.key == *key);
        let remembered = remembered.ok_or(Refusal::UnknownTurn(id))?;
        if matches!(remembered.turn.closed, Some((_, Outcome::Finished { .. }))) {
            return Ok(false);
        }
        self.closed.remove(&remembered.order);
        (remembered.order, remembered.turn.closed) = (0, None);
        remembered.turn.opening.origin = origin.clone();
        Ok(true)
    }
    /// Closes an open turn; returns the turn that was forgotten for it, if one had to be.
    pub fn close(&mut self, id: TurnId, outcome: Outcome, at: Hlc, order: u64) -> Result<Option<TurnId>, Refusal> {
        let remembered = self.by_id.get_mut(&id).filter(|r| r.order == 0).ok_or(Refusal::UnknownTurn(id))?;
        remembered.turn.closed = Some((at, outcome));
        remembered.order = order;
        self.closed.insert(order, id);
        if self.closed.len() <= REMEMBERED {
            return Ok(None);
        }
        let forgotten = self.closed.pop_first().map(|(_, id)| id);
        let once = forgotten.and_then(|id| self.by_id.remove(&id)).and_then(|forgotten| forgotten.turn.opening.once);
        if let Some(once) = once {
            self.once.remove(&once.name);
        }
        Ok(forgotten)
    }
    /// Every open turn, in the order of their ids.
    pub fn open_turns(&self) -> Vec<TurnId> {
        self.by_id.values().filter(|r| r.order == 0).map(|r| r.turn.opening.turn).collect()
    }
    /// Open turns that earlier incarnations of a controller left, in the order of their ids.
    pub fn orphans(&self, node: &NodeId, before_incarnation: u64) -> Vec<TurnId> {
        let left = |r: &&Remembered| {
            let origin = &r.turn.opening.origin;
            r.order == 0 && origin.node == *node && origin.incarnation < before_incarnation
        };
        self.by_id.values().filter(left).map(|r| r.turn.opening.turn).collect()
    }
}

impl Outcome {
    /// Returns the outcome with a reason that is not too long to keep.
    pub(super) fn bounded(mut self) -> Self {
        if let Outcome::Failed { reason, .. } = &mut self {
            let mut end = REASON_BYTES.min(reason.len());
            while !reason.is_char_boundary(end) {
                end -= 1;
            }
            reason.truncate(end);
        }
        self
    }
}
