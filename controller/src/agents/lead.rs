//! The leader's loop: while this controller leads, it proposes the plan that the planner wants, notes what agents find of
//! their GPUs and orders what mends them, and closes the turns of controllers that have died and whose clients never came
//! back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use izar_common::clock::wall_ms;
use izar_common::events;
use izar_common::health::gpu::Outcome;
use izar_common::id::NodeId;

use super::Inner;
use crate::gpus::{self, remedies};
use crate::planner::{self, Times};
use crate::state::command::{Command, Refusal, Reply};

/// How often the leader looks although nothing has told it to: agents are lost, and workers retire, by the passing of
/// time.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A controller that cannot be reached for so long has lost its turns: their clients have gone on elsewhere by then, or
/// have given up. One that comes back sooner closes them itself.
const ABANDONED: Duration = Duration::from_secs(60);

/// Orders that have not ended, and since when this leader has seen them.
type Orders = BTreeMap<u64, Instant>;

/// Runs until the controller stops.
pub(super) async fn run(inner: &Inner) {
    let mut leadership = inner.raft.leadership();
    let mut config = inner.raft.config();
    let (mut leader_since_ms, mut orders) = (None, Orders::new());
    loop {
        let here = leadership.borrow_and_update().here;
        leader_since_ms = if here { leader_since_ms.or_else(|| Some(wall_ms())) } else { None };
        if let Some(leader_since_ms) = leader_since_ms {
            let wanted = {
                let config = config.borrow_and_update().clone();
                planner::plan(&config, &inner.roster.fleet(), Times { now_ms: wall_ms(), leader_since_ms })
            };
            if let Some(plan) = wanted {
                propose(inner, plan).await;
            }
            close_abandoned(inner).await;
            note_gpus(inner).await;
            mend_gpus(inner, &mut orders).await;
        } else {
            orders.clear();
        }
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            changed = config.changed(), if here => if changed.is_err() { return },
            () = inner.roster.moved.notified(), if here => {}
            () = tokio::time::sleep(LOOK_EVERY), if here => {}
        }
    }
}

async fn propose(inner: &Inner, plan: crate::state::Plan) {
    let (version, workers) = (plan.version, plan.workers.len());
    match inner.raft.propose(Command::SetPlan { based_on: version - 1, plan }).await {
        Ok(Reply::Done) => log::info!(version, workers; "plan changed"),
        // Somebody was faster; the next look starts from theirs.
        Ok(Reply::Refused(Refusal::OutdatedPlan)) => {}
        Ok(Reply::Refused(refusal)) => log::error!(version, refusal:%; "the state refused the plan"),
        Err(unavailable) => log::debug!(version, reason = unavailable.reason; "the plan was not decided"),
    }
}

/// Remembers what agents say of their GPUs, and lets go of what is mended.
async fn note_gpus(inner: &Inner) {
    let notes = gpus::notes(&inner.raft.config().borrow().clone(), &inner.roster.fleet());
    for command in notes {
        let (gpu, held) = match &command {
            Command::HoldGpu { hold, .. } => (hold.gpu.clone(), true),
            Command::ReleaseGpu { gpu, .. } => (gpu.clone(), false),
            other => unreachable!("no note of a GPU: {other:?}"),
        };
        match inner.raft.propose(command).await {
            Ok(Reply::Done) => log::info!(gpu:%, held; "what is remembered of a GPU changed"),
            Ok(Reply::Refused(refusal)) => log::warn!(gpu:%, refusal:%; "a note of a GPU was refused"),
            Err(unavailable) => log::debug!(gpu:%, reason = unavailable.reason; "a note of a GPU was not decided"),
        }
    }
}

/// Orders what would mend GPUs, where it may, and closes what has ended.
async fn mend_gpus(inner: &Inner, orders: &mut Orders) {
    let config = inner.raft.config().borrow().clone();
    orders.retain(|id, _| config.remedies.contains_key(id));
    for id in config.remedies.keys() {
        orders.entry(*id).or_insert_with(Instant::now);
    }
    let open_ms = |id| orders.get(&id).map_or(0, |since| since.elapsed().as_millis() as u64);
    for command in remedies::commands(&config, &inner.roster.fleet(), wall_ms(), open_ms) {
        match inner.raft.propose(command.clone()).await {
            Ok(Reply::Done) => {}
            // Between the look and the entry something has changed; the next look starts from there.
            Ok(Reply::Refused(refusal)) => {
                log::info!(refusal:%; "a remedy of GPUs was refused");
                continue;
            }
            Err(unavailable) => {
                log::debug!(reason = unavailable.reason; "a remedy of GPUs was not decided");
                continue;
            }
        }
        match command {
            Command::OrderRemedy { agent, action, gpus } => {
                log::info!(agent:%, action:%, gpus = gpus.len(); "a remedy of GPUs is ordered");
            }
            Command::EndRemedy { id, outcome, reason } => {
                if let Some(remedy) = config.remedies.get(&id) {
                    inner.count_remedy(remedy.action, outcome);
                }
                match outcome {
                    Outcome::Done => log::info!(id, reason; "a remedy of GPUs is done"),
                    _ => {
                        log::warn!(message_id = events::REMEDY_IN_VAIN, id, outcome:%, reason; "a remedy of GPUs has not helped")
                    }
                }
            }
            Command::HoldGpu { hold, .. } => {
                log::warn!(message_id = events::GPU_STOPPED, gpu:% = hold.gpu, reason = hold.reason; "a GPU is given up and quarantined");
            }
            other => unreachable!("no remedy of GPUs: {other:?}"),
        }
    }
}

async fn close_abandoned(inner: &Inner) {
    let open = |node: &NodeId| inner.raft.state().read(|state| state.open_turns_of(node));
    for (node, turns) in abandoned(inner.raft.away(), open) {
        let command = Command::CloseOrphans { node: node.clone(), before_incarnation: u64::MAX };
        match inner.raft.propose(command).await {
            Ok(_) => log::info!(controller:% = node, turns; "turns of a lost controller are closed as abandoned"),
            Err(unavailable) => log::debug!(reason = unavailable.reason; "abandoned turns wait for a quorum"),
        }
    }
}

/// The controllers whose turns are to be closed, and how many they have.
fn abandoned(away: Vec<(NodeId, Duration)>, open: impl Fn(&NodeId) -> usize) -> Vec<(NodeId, usize)> {
    let long = away.into_iter().filter(|(_, away)| *away >= ABANDONED);
    long.map(|(node, _)| (open(&node), node))
        .filter(|(turns, _)| *turns > 0)
        .map(|(turns, node)| (node, turns))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_turns_of_controllers_that_are_long_gone_are_closed() {
        let node = |name: &str| name.parse::<NodeId>().unwrap();
        let away = vec![(node("c1"), ABANDONED), (node("c2"), ABANDONED / 2), (node("c3"), 2 * ABANDONED)];
        let open = |id: &NodeId| if *id == node("c3") { 0 } else { 7 };
        assert_eq!(abandoned(away, open), [(node("c1"), 7)]);
    }
}
