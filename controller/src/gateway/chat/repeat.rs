//! A request that was begun before, here or on another controller (`Idempotency-Key`): it gets that one's answer.
//!
//! While the first still runs, this one reads along with what the agents keep, and leaves the record to it. An answer
//! that finished is read there, too, or computed again by the very same numerics; it is never another one. A turn that
//! failed, or whose client left or controller died, is run again under its id. The state decides which request is the
//! first; this module only follows it.

use std::time::Duration;

use futures_util::future;
use izar_common::id::NumericsId;
use tokio::time::Instant;

use super::super::Gateway;
use super::super::error::Error;
use super::{Claim, Hold, Order, Placed, Stopped, job, record_end, take_over};
use crate::agents::JobStream;
use crate::state::command::{Command, Origin, Reply};
use crate::state::turns::{Outcome, Turn};

/// How long a request waits for the answer of a first one that has just begun, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long the first request's controller has to record an end that this one has seen.
const OTHERS_RECORD: Duration = Duration::from_secs(1);

/// Where the first request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    Runs,
    Finished,
    /// It came to no answer.
    Broken,
}

fn stand(first: &Turn) -> Stand {
    match &first.closed {
        None => Stand::Runs,
        Some((_, Outcome::Finished { .. })) => Stand::Finished,
        Some(_) => Stand::Broken,
    }
}

/// Whether a request may only read along: then it is not listed, for the turn is another's.
pub(super) fn reads_along(order: &Order) -> bool {
    matches!(&order.claim, Claim::Repeat(first) if stand(first) != Stand::Broken)
}

/// Whether what was asked first still means the same.
pub(super) fn check(order: &Order) -> Result<(), Error> {
    let Claim::Repeat(first) = &order.claim else { return Ok(()) };
    let opening = &first.opening;
    let lost = |reason: &str| Err(Error::AnswerLost { reason: reason.to_owned() });
    if (&opening.deployment, opening.revision) != (&order.served.deployment, order.served.revision) {
        return lost("another revision of the model is served since");
    }
    if opening.max_tokens != order.sampling.max_tokens || opening.prompt_tokens as usize != order.prompt.len() {
        return lost("the model is served with another context since");
    }
    Ok(())
}

/// What a replica cannot do whose numbers are others.
pub(super) fn elsewhere() -> Error {
    let reason = "no replica is ready that computes the first answer again, bit for bit".to_owned();
    Error::NoReplica { reason }
}

pub(super) async fn begin(gateway: &Gateway, order: &Order, first: &Turn, streamed: bool) -> Result<Placed, Stopped> {
    let refused = |error| Stopped::failed(error, false);
    match stand(first) {
        Stand::Broken => take_over(gateway, order, streamed).await,
        Stand::Finished => {
            let again = (0..order.choices).map(|choice| compute_again(gateway, order, choice));
            let streams: Result<_, Error> = future::join_all(again).await.into_iter().collect();
            Ok((streams.map_err(refused)?, Hold::Others))
        }
        Stand::Runs => read_along(gateway, order, first, streamed).await,
    }
}

async fn read_along(gateway: &Gateway, order: &Order, first: &Turn, streamed: bool) -> Result<Placed, Stopped> {
    let refused = |error| Stopped::failed(error, false);
    let turn = order.arrival.turn;
    let patience = Instant::now() + PATIENCE;
    loop {
        let attached = (0..order.choices).map(|choice| gateway.agents.attach(turn, choice));
        let attached: Option<Vec<_>> = future::join_all(attached).await.into_iter().collect();
        if let Some(streams) = attached {
            return Ok((streams, Hold::Others));
        }
        if gateway.raft.state().read(|state| state.turn(&turn).is_none_or(|turn| turn.closed.is_some())) {
            return Err(refused(Error::Repeats { turn }));
        }
        if !lives(gateway, &first.opening.origin) {
            return take_over(gateway, order, streamed).await;
        }
        if Instant::now() >= patience {
            return Err(refused(Error::InProgress));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Whether a controller may still be at work on its turns.
fn lives(gateway: &Gateway, origin: &Origin) -> bool {
    let here = gateway.raft.origin();
    match origin.node == here.node {
        true => origin.incarnation == here.incarnation,
        false => gateway.raft.away().iter().all(|(node, _)| *node != origin.node),
    }
}

/// Reads a finished answer where it is kept, or has it computed by what computed it.
async fn compute_again(gateway: &Gateway, order: &Order, choice: u32) -> Result<JobStream, Error> {
    if let Some(stream) = gateway.agents.attach(order.arrival.turn, choice).await {
        return Ok(stream);
    }
    if order.cursor.numerics == Some(NumericsId::SEVERAL) {
        let reason = "it was moved between replicas that compute differently, and no agent keeps it any longer";
        return Err(Error::AnswerLost { reason: reason.to_owned() });
    }
    let stream = gateway.agents.submit(job(gateway, order, choice, 0)).await?;
    if stream.numerics != order.cursor.numerics {
        return Err(elsewhere());
    }
    Ok(stream)
}

/// After an answer that was read along: if the first request's controller does not record its end, this one does.
pub(super) async fn settle(gateway: &Gateway, order: &Order, outcome: Outcome) {
    if !matches!((&order.claim, &outcome), (Claim::Repeat(_), Outcome::Finished { .. })) {
        return;
    }
    let turn = order.arrival.turn;
    let finished = |turn: &Turn| stand(turn) == Stand::Finished;
    let limit = Instant::now() + OTHERS_RECORD;
    loop {
        let recorded = gateway.raft.state().read(|state| state.turn(&turn).is_none_or(finished));
        if recorded {
            return;
        }
        if Instant::now() >= limit {
            break;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let (key, origin) = (order.caller.key.id.clone(), gateway.raft.origin().clone());
    match gateway.raft.propose(Command::ResumeTurn { turn, key, origin }).await {
        Ok(Reply::Done) => record_end(gateway, order, outcome).await,
        Ok(Reply::Refused(refusal)) => log::debug!(turn:%, refusal:%; "a turn was forgotten while it was read along"),
        Err(unavailable) => log::debug!(turn:%, reason = unavailable.reason; "a turn that was read along stays open"),
    }
}
