//! The two ends of a turn in the record: its opening, before the first byte of the answer, and its closing.
//!
//! While the cluster cannot record, turns of projects that want it so are noted for later (`provisional`).

use std::time::Duration;

use tokio::time::Instant;

use super::super::Gateway;
use super::super::error::Error;
use super::{Claim, Order, Stopped};
use crate::state::command::{Command, Refusal, Reply};
use crate::state::turns::{Opening, Outcome};

/// Pauses between attempts to record that a turn has ended, while the cluster cannot.
const RECORD_AGAIN: Duration = Duration::from_millis(100);
const RECORD_AGAIN_MOST: Duration = Duration::from_secs(2);

/// Records that a turn begins, or that it goes on here; until then no byte of its answer leaves.
pub(super) async fn record_begin(gateway: &Gateway, order: &Order, stream: bool) -> Result<(), Stopped> {
    let opening = Opening {
        turn: order.arrival.turn,
        tenant: order.caller.tenant.clone(),
        project: order.caller.key.project.clone(),
        key: order.caller.key.id.clone(),
        deployment: order.served.deployment.clone(),
        revision: order.served.revision,
        prompt_tokens: order.prompt.len() as u32,
        max_tokens: order.sampling.max_tokens,
        stream,
        origin: gateway.raft.origin().clone(),
        once: if let Claim::Begin { once } = order.claim { once } else { None },
        provisional: false,
    };
    if !gateway.leaderless.ends(&gateway.leadership).await {
        return note_begin(gateway, order, opening, "no leader is known", false).await;
    }
    let command = match &order.claim {
        Claim::Begin { .. } => Command::OpenTurn(opening.clone()),
        _ => Command::ResumeTurn { turn: opening.turn, key: opening.key.clone(), origin: opening.origin.clone() },
    };
    let begun = Instant::now();
    match gateway.raft.propose(command).await {
        Ok(Reply::Done) => {
            gateway.metrics.commit_seconds.observe(begun.elapsed());
            Ok(())
        }
        Ok(Reply::Refused(Refusal::UnknownTurn(_))) => Err(Stopped::failed(Error::UnknownStream, false)),
        Ok(Reply::Refused(refusal)) => Err(Stopped::failed(refusal.into(), false)),
        // It may still be committed after we have stopped waiting.
        Err(unavailable) => note_begin(gateway, order, opening, &unavailable.reason, true).await,
    }
}

/// Notes a turn that cannot be recorded now, if its project wants that; `proposed`: it may yet be recorded.
async fn note_begin(
    gateway: &Gateway,
    order: &Order,
    opening: Opening,
    reason: &str,
    proposed: bool,
) -> Result<(), Stopped> {
    let refused = |reason: String| Err(Stopped::failed(Error::Unavailable { reason }, proposed));
    if !order.caller.project.available {
        return refused(reason.to_owned());
    }
    if !matches!(order.claim, Claim::Begin { once: None }) {
        return refused(format!("{reason}; streams are read on, and idempotency keys taken, only with a quorum"));
    }
    match gateway.provisional.begin(Opening { provisional: true, ..opening }).await {
        Ok(()) => Ok(()),
        Err(error) => refused(format!("{reason}; {error}")),
    }
}

/// Records how a turn ended, however long that takes: what is not recorded by the time the process ends is closed as
/// abandoned by the next one.
pub(super) async fn record_end(gateway: &Gateway, order: &Order, outcome: Outcome) {
    if gateway.provisional.holds(order.arrival.turn) {
        return gateway.provisional.end(order.arrival.turn, outcome).await;
    }
    let mut pause = RECORD_AGAIN;
    while !try_record_end(gateway, order, &outcome).await {
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (2 * pause).min(RECORD_AGAIN_MOST),
            () = gateway.kill.cancelled() => {
                return log::warn!(turn:% = order.arrival.turn; "stopping before the end of a turn was recorded");
            }
        }
    }
}

/// Returns whether nothing is left to record.
pub(super) async fn try_record_end(gateway: &Gateway, order: &Order, outcome: &Outcome) -> bool {
    let turn = order.arrival.turn;
    match gateway.raft.propose(Command::CloseTurn { turn, outcome: outcome.clone() }).await {
        Ok(Reply::Done) => {}
        // Never opened after all, closed by an attempt whose answer was lost, or another's by now.
        Ok(Reply::Refused(Refusal::UnknownTurn(_))) => log::debug!(turn:%; "no such turn was open"),
        Ok(Reply::Refused(refusal)) => log::error!(turn:%, refusal:%; "the end of a turn was refused"),
        Err(unavailable) => {
            log::debug!(turn:%, reason = unavailable.reason; "the end of a turn waits for a quorum");
            return false;
        }
    }
    true
}
