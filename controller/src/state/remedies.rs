//! What agents are ordered to do to their GPUs, and how many may be at it at once: the budget.
//!
//! Part of the replicated state, so whichever leader proposes, the budget holds and an agent has one order at a time. An
//! order's id is the index of its entry: agents do each once, and a later one's is higher. What is done meanwhile is the
//! agent's business; here it begins and ends.

use std::collections::BTreeSet;

use izar_common::health::gpu::{Action, GPUS, Hold, Order, Outcome, reason};
use izar_common::id::{GpuId, NodeId};
use serde::{Deserialize, Serialize};

use super::command::Refusal;
use super::rows::Row;
use super::{Config, Plan, Standing, State, Step, What, audit};

/// Orders about one GPU within [`ORDERS_WITHIN_MS`] at most: what two have not mended is for a human.
pub const ORDERS: usize = 2;
pub const ORDERS_WITHIN_MS: u64 = 24 * 60 * 60 * 1_000;

/// How long an agent may take to begin an order: its workers go elsewhere first.
pub const BEGIN_MS: u64 = 5 * 60 * 1_000;

/// How long answers may go on at an agent that is emptied for its remedy, once others can take them: what has not ended
/// then goes on elsewhere.
pub const EMPTY_MS: u64 = 30 * 1_000;

/// Of so many agents that work, one may be under a remedy.
const OF_AGENTS: usize = 10;

/// An order that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remedy {
    pub id: u64,
    pub agent: NodeId,
    pub action: Action,
    pub gpus: Vec<Target>,
    pub ordered_ms: u64,
}

/// A GPU that an order is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub gpu: GpuId,
    /// Index of the entry that held it so: what is held otherwise by now, the order was not meant for.
    pub index: u64,
}

impl Remedy {
    /// What its agent is told.
    pub fn order(&self) -> Order {
        let gpus = self.gpus.iter().map(|target| target.gpu.clone()).collect();
        Order { id: self.id, action: self.action, gpus, begin_by_ms: self.ordered_ms + BEGIN_MS }
    }
}

/// How many agents may be under a remedy at once: a tenth of those that work or are under one, and one in any case.
fn budget<'a>(plan: &Plan, open: impl Iterator<Item = &'a Remedy>) -> usize {
    let working = plan.workers.values().map(|place| &place.agent);
    let agents: BTreeSet<&NodeId> = working.chain(open.map(|remedy| &remedy.agent)).collect();
    (agents.len() / OF_AGENTS).max(1)
}

/// Whether a GPU was ordered about as often as it may be.
pub fn too_often(ordered_ms: &[u64], now_ms: u64) -> bool {
    ordered_ms.iter().filter(|at_ms| now_ms.abs_diff(**at_ms) < ORDERS_WITHIN_MS).count() >= ORDERS
}

impl Config {
    /// The order that an agent has.
    pub fn remedy_of(&self, agent: &NodeId) -> Option<&Remedy> {
        self.remedies.values().find(|remedy| remedy.agent == *agent)
    }

    /// What an operator has said of an agent, or that it is emptied because its GPUs are mended.
    pub fn standing(&self, agent: &NodeId) -> Option<Standing> {
        match self.standings.get(agent) {
            Some(draining @ Standing::Draining { .. }) => Some(*draining),
            _ if self.remedy_of(agent).is_some() => Some(Standing::Draining { within_ms: EMPTY_MS }),
            other => other.copied(),
        }
    }

    /// Whether one more agent may be put under a remedy.
    pub fn has_budget(&self) -> bool {
        self.remedies.len() < budget(&self.plan, self.remedies.values())
    }
}

impl State {
    /// Orders a remedy, if the budget has room and its GPUs are held as whoever proposes it thinks.
    pub(super) fn order_remedy(
        &mut self,
        step: &mut Step,
        agent: &NodeId,
        action: Action,
        gpus: &[Target],
    ) -> Result<(), Refusal> {
        let ordered_ms = step.at.ms();
        // An entry is one id, so it orders once.
        let taken = self.remedies.contains_key(&step.index) || self.remedies.values().any(|open| open.agent == *agent);
        if taken || self.remedies.len() >= budget(&self.plan, self.remedies.values()) {
            return Err(Refusal::BudgetSpent);
        }
        if gpus.is_empty() || gpus.len() > GPUS {
            return Err(Refusal::Full { what: "GPUs of an order, one at least,".into(), limit: GPUS as u64 });
        }
        for target in gpus {
            let record = self.gpus.get(&target.gpu);
            let same = record.filter(|record| (&record.agent, record.index) == (agent, target.index));
            let hold = same.and_then(|record| record.hold.as_ref());
            if hold.is_none_or(|hold| hold.quarantined) {
                return Err(Refusal::HeldOtherwise(target.gpu.clone()));
            }
            if same.is_some_and(|record| too_often(&record.ordered_ms, ordered_ms)) {
                return Err(Refusal::TooOften(target.gpu.clone()));
            }
        }
        for target in gpus {
            let mut record = self.gpus[&target.gpu].clone();
            record.ordered_ms.push(ordered_ms);
            let old = record.ordered_ms.len().saturating_sub(ORDERS);
            record.ordered_ms.drain(..old);
            self.set_gpu(step, record);
        }
        let remedy = Remedy { id: step.index, agent: agent.clone(), action, gpus: gpus.to_vec(), ordered_ms };
        step.touch(Row::Remedy(remedy.id));
        self.config(step, What::RemedyOrdered(remedy.clone()));
        self.audit(step, audit::Event::RemedyOrdered { remedy: remedy.clone() });
        self.remedies.insert(remedy.id, remedy);
        Ok(())
    }

    /// Ends an order. Done, it lifts what was held; of one that nobody has heard of since, a human must.
    pub(super) fn end_remedy(&mut self, step: &mut Step, id: u64, outcome: Outcome, why: &str) -> Result<(), Refusal> {
        let remedy = self.remedies.remove(&id).ok_or(Refusal::UnknownRemedy(id))?;
        let why = reason(why.to_owned());
        step.touch(Row::Remedy(id));
        self.config(step, What::RemedyEnded { id, outcome });
        let (agent, said) = (remedy.agent.clone(), why.clone());
        self.audit(step, audit::Event::RemedyEnded { id, agent, outcome, reason: said });
        for Target { gpu, index } in &remedy.gpus {
            let Some(record) = self.gpus.get(gpu) else { continue };
            let (agent, Some(hold)) = (record.agent.clone(), record.hold.clone()) else { continue };
            match outcome {
                Outcome::Done if record.index == *index && !hold.quarantined => {
                    self.release_gpu(step, gpu, &format!("{} by order {id}", remedy.action), false)?;
                }
                Outcome::Late => {
                    let reason = format!("{why} (order {id}, {}); before: {}", remedy.action, hold.reason);
                    self.hold_gpu(step, &agent, &Hold { quarantined: true, reason, ..hold }, None)?;
                }
                // Which of them computes wrongly its agent says, and has quarantined.
                Outcome::Done | Outcome::Failed | Outcome::Unknown | Outcome::Wrong => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
