//! What requests may hold in memory together: bodies while they are read, turns while they run, answers that clients are
//! slow to take. One budget, so that the controller's memory has a bound whatever the clients do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use izar_common::clock::wall_ms;
use izar_common::events;

/// What a turn takes besides its tokens: tasks, the stream to the agent, the first buffer of its answer.
pub const TURN_BYTES: usize = 24 << 10;

/// A body is there up to three times: as it came, parsed, and as text for the tokenizer.
pub const BODY_COPIES: usize = 3;

/// A token of the prompt: in the order, and in the job that is sent.
pub const PROMPT_TOKEN_BYTES: usize = 8;

/// A token of the answer, kept for the case that its worker dies; with the log-probabilities of all its alternatives.
pub const ANSWER_TOKEN_BYTES: usize = 4;
pub const SCORED_TOKEN_BYTES: usize = 512;

/// Refusals are told once in this time: they come in thousands.
const TOLD_EVERY_MS: u64 = 60_000;

/// The budget.
#[derive(Debug)]
pub struct Memory {
    used: AtomicUsize,
    limit: usize,
    /// When a refusal was told last, Unix milliseconds.
    told_ms: AtomicU64,
}

impl Memory {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit, told_ms: AtomicU64::new(0) })
    }

    /// Bytes that requests hold now.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    fn tell(&self, used: usize) {
        let (now, last) = (wall_ms(), self.told_ms.load(Relaxed));
        let due = now.saturating_sub(last) >= TOLD_EVERY_MS;
        if due && self.told_ms.compare_exchange(last, now, Relaxed, Relaxed).is_ok() {
            log::warn!(message_id = events::MEMORY_REFUSED, used_mib = used >> 20, limit_mib = self.limit >> 20; "requests are refused: the budget of memory is used up");
        }
    }

    /// Takes bytes until the charge is dropped; `None` if there are not so many left.
    pub fn charge(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        let mut charge = Charge { memory: self.clone(), bytes: 0 };
        charge.grow(bytes).then_some(charge)
    }
}

/// A part of the budget.
#[derive(Debug)]
pub struct Charge {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Charge {
    /// Takes more; returns whether there was so much left. If not, nothing changes.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let before = self.memory.used.fetch_add(bytes, Relaxed);
        if before.saturating_add(bytes) > self.memory.limit {
            self.memory.used.fetch_sub(bytes, Relaxed);
            self.memory.tell(before);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Gives all of it back.
    pub fn clear(&mut self) {
        self.memory.used.fetch_sub(std::mem::take(&mut self.bytes), Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A charge on a budget of its own, for tests of what lives on one.
#[cfg(test)]
pub fn plenty() -> Charge {
    Memory::new(1 << 30).charge(0).expect("an empty budget has room")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_never_exceeded_and_comes_back() {
        let memory = Memory::new(100);
        let mut first = memory.charge(60).unwrap();
        assert!(memory.charge(41).is_none() && memory.used() == 60);
        let second = memory.charge(40).unwrap();
        assert!(!first.grow(1) && memory.used() == 100);
        drop(second);
        assert!(first.grow(40));
        first.clear();
        assert_eq!(memory.used(), 0);
        drop(first);
        assert_eq!(memory.used(), 0);
    }
}
