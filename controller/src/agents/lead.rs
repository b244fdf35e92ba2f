//! The planner's loop: while this controller leads, it proposes the plan that the planner wants.

use std::time::Duration;

use izar_common::clock::wall_ms;

use super::Inner;
use crate::planner::{self, Times};
use crate::state::command::{Command, Refusal, Reply};

/// How often the leader looks although nothing has told it to: agents are lost by the passing of time.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Runs until the controller stops.
pub(super) async fn run(inner: &Inner) {
    let mut leadership = inner.raft.leadership();
    let mut config = inner.raft.config();
    let mut leader_since_ms = None;
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
