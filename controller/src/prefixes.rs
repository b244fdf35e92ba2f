//! What workers hold of prompts, as far as this controller knows: the last word of each, and what was sent to it since.
//!
//! Soft state, pure: times come in as arguments. A worker speaks once a second and only of what it has computed, so jobs
//! with one beginning that come together would scatter over all workers; what was just sent to a worker counts as held.

use std::collections::{BTreeMap, HashMap, VecDeque};

use izar_common::health::{Report, WorkerState};
use izar_common::id::{NodeId, WorkerId};
use izar_common::prefix::{Name, Sketch};

/// How long a block that was sent to a worker counts as held. By then it has been computed and spoken of, unless the
/// worker has more to do than it can.
pub const SENT_MS: u64 = 10_000;

/// Blocks sent to a worker that are remembered: of a hundred prompts of 1,300 tokens. The oldest are forgotten first. With
/// a sketch of 64 KiB at most, a worker costs less than a megabyte here.
pub const SENT_BLOCKS: usize = 8_192;

/// What all workers hold.
#[derive(Debug, Default)]
pub struct Prefixes {
    workers: HashMap<WorkerId, Held>,
}

/// What one process holds; a new one begins with nothing.
#[derive(Debug)]
struct Held {
    agent: NodeId,
    pid: Option<u32>,
    sketch: Sketch,
    sent: Sent,
}

impl Prefixes {
    /// Takes an agent's report: workers that it does not name as ready, or that are other processes now, hold nothing.
    pub fn report(&mut self, agent: &NodeId, report: &Report) {
        let mut ready: BTreeMap<&WorkerId, Option<u32>> = BTreeMap::new();
        for worker in report.workers.iter().filter(|worker| worker.state == WorkerState::Ready) {
            ready.insert(&worker.worker, worker.pid);
        }
        self.workers.retain(|id, held| held.agent != *agent || ready.get(id) == Some(&held.pid));
        for (id, pid) in ready {
            // Another agent's worker of that name was moved away.
            if self.workers.get(id).is_none_or(|held| held.agent != *agent) {
                let held = Held { agent: agent.clone(), pid, sketch: Sketch::default(), sent: Sent::default() };
                self.workers.insert(id.clone(), held);
            }
        }
    }
    /// Takes a worker's word, if its agent has reported it.
    pub fn sketch(&mut self, agent: &NodeId, worker: &WorkerId, sketch: Sketch) {
        if let Some(held) = self.workers.get_mut(worker).filter(|held| held.agent == *agent) {
            held.sketch = sketch;
        }
    }
    /// Forgets an agent's workers.
    pub fn forget(&mut self, agent: &NodeId) {
        self.workers.retain(|_, held| held.agent != *agent);
    }

    /// Notes that a worker gets a prompt that begins so.
    pub fn sent(&mut self, worker: &WorkerId, names: &[Name], now_ms: u64) {
        if let Some(held) = self.workers.get_mut(worker) {
            held.sent.note(names, now_ms);
        }
    }
    /// How many of a prompt's first blocks a worker holds, or will before long.
    pub fn held(&self, agent: &NodeId, worker: &WorkerId, names: &[Name], now_ms: u64) -> usize {
        let held = self.workers.get(worker).filter(|held| held.agent == *agent);
        held.map_or(0, |held| {
            names.iter().take_while(|name| held.sketch.holds(name) || held.sent.holds(name, now_ms)).count()
        })
    }
}

/// Blocks that were sent lately.
#[derive(Debug, Default)]
struct Sent {
    /// When each was sent, in that order; an entry that is not the block's newest counts for nothing.
    order: VecDeque<(u64, Name)>,
    newest: HashMap<Name, u64>,
}

impl Sent {
    fn note(&mut self, names: &[Name], now_ms: u64) {
        for name in names {
            // Half of the time is left: a prompt that comes all the time is noted now and then.
            if self.newest.get(name).is_some_and(|sent| now_ms < sent + SENT_MS / 2) {
                continue;
            }
            self.newest.insert(*name, now_ms);
            self.order.push_back((now_ms, *name));
        }
        while let Some((sent, name)) = self.order.front().copied()
            && (self.order.len() > SENT_BLOCKS || sent + SENT_MS < now_ms)
        {
            self.order.pop_front();
            if self.newest.get(&name) == Some(&sent) {
                self.newest.remove(&name);
            }
        }
    }
    fn holds(&self, name: &Name, now_ms: u64) -> bool {
        self.newest.get(name).is_some_and(|sent| now_ms <= sent + SENT_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::fleet;
    use izar_common::prefix::{BLOCK, Namer};

    fn names(prompt: u8, count: u32) -> Vec<Name> {
        let tokens: Vec<u32> = (0..count * BLOCK as u32).collect();
        Namer::new([prompt; 16]).names(&tokens, usize::MAX)
    }
    fn a1() -> NodeId {
        "a1".parse().unwrap()
    }
    fn worker() -> WorkerId {
        "m.0".parse().unwrap()
    }
    fn reported(said: &str, pid: u32) -> Report {
        let mut report = fleet(said, 0).agents[&a1()].report.clone().unwrap();
        report.workers[0].pid = Some(pid);
        report
    }
    fn prefixes() -> Prefixes {
        let mut prefixes = Prefixes::default();
        prefixes.report(&a1(), &reported("a1 m.0 ready 0 0 0", 7));
        prefixes
    }
    fn held(prefixes: &Prefixes, names: &[Name], now_ms: u64) -> usize {
        prefixes.held(&a1(), &worker(), names, now_ms)
    }

    #[test]
    fn what_a_worker_says_and_what_it_was_sent_count_together() {
        let (mut prefixes, prompt) = (prefixes(), names(1, 10));
        prefixes.sketch(&a1(), &worker(), Sketch::of(prompt[..4].iter()));
        prefixes.sent(&worker(), &prompt[4..9], 100);
        assert_eq!((held(&prefixes, &prompt, 100), held(&prefixes, &names(2, 10), 100)), (9, 0));
        assert_eq!(held(&prefixes, &prompt, 101 + SENT_MS), 4, "it was not computed after all");
    }

    #[test]
    fn a_prompt_that_keeps_coming_stays_and_the_memory_is_bounded() {
        let (mut prefixes, prompt) = (prefixes(), names(1, 3));
        (0..20).for_each(|i| prefixes.sent(&worker(), &prompt, i * SENT_MS / 4));
        assert_eq!(held(&prefixes, &prompt, 5 * SENT_MS), 3);
        prefixes.sent(&worker(), &names(2, SENT_BLOCKS as u32), 5 * SENT_MS);
        assert_eq!((held(&prefixes, &prompt, 5 * SENT_MS), held(&prefixes, &names(2, 9), 5 * SENT_MS)), (0, 9));
        let sent = &prefixes.workers[&worker()].sent;
        assert!(sent.order.len() == SENT_BLOCKS && sent.newest.len() == SENT_BLOCKS);
    }

    #[test]
    fn a_process_that_is_gone_holds_nothing() {
        let prompt = names(1, 4);
        let check = |expected, change: &dyn Fn(&mut Prefixes)| {
            let mut prefixes = prefixes();
            prefixes.sketch(&a1(), &worker(), Sketch::of(prompt[..2].iter()));
            prefixes.sent(&worker(), &prompt, 0);
            change(&mut prefixes);
            assert_eq!(held(&prefixes, &prompt, 0), expected);
        };
        check(4, &|p| p.report(&a1(), &reported("a1 m.0 ready 3 0 0", 7)));
        check(0, &|p| p.report(&a1(), &reported("a1 m.0 ready 0 0 0", 8)));
        check(0, &|p| p.report(&a1(), &reported("a1 m.0 loading 0 0 0", 7)));
        check(0, &|p| p.report(&a1(), &reported("a1 m.1 ready 0 0 0", 7)));
        check(0, &|p| p.forget(&a1()));
        let a2: NodeId = "a2".parse().unwrap();
        check(4, &|p| p.forget(&a2));
        check(0, &|p| p.report(&a2, &reported("a1 m.0 ready 0 0 0", 7)));
        check(4, &|p| p.sketch(&a2, &worker(), Sketch::default()));
    }
}
