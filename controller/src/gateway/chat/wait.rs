//! Waits for a turn to compute: through the queue of the deployment, while its client stays.

use std::time::Duration;

use izar_common::id::TenantId;
use tokio::time::{Instant, sleep_until};

use super::super::Gateway;
use super::super::error::Error;
use super::super::exit::Exit;
use super::super::queues::{Entered, Pass, Refused};
use super::super::running::{Listed, Stage};
use super::{Ended, Order};
use crate::queue::Ask;
use crate::queue::estimate::Size;

/// After so long without a byte a client that reads along is told that its request is alive: proxies cut connections
/// after 30 seconds of silence. From then on a refusal can only be an event of its stream.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// Waits until an order may be computed, or says how it ended before. What goes on with a turn that was begun before has
/// waited already, and goes ahead.
pub(super) async fn wait(gateway: &Gateway, order: &mut Order, listed: &Listed, exit: &mut Exit) -> Result<(), Ended> {
    if !order.is_new() {
        return Ok(());
    }
    let mut waiting = match gateway.queues.enter(&order.served.deployment, order.served.revision, ask(order)) {
        Entered::Turn(pass) => return enter(order, pass),
        Entered::Refused(refused) => return refuse(order, refused),
        Entered::Waits(waiting) => waiting,
    };
    listed.enter(Stage::Queued);
    let mut beat = Instant::now() + SIGN_OF_LIFE;
    loop {
        tokio::select! {
            biased;
            verdict = waiting.verdict() => return match verdict {
                Ok(pass) => {
                    listed.enter(Stage::Opening);
                    enter(order, pass)
                }
                Err(refused) => refuse(order, refused),
            },
            () = exit.gone() => return Err(Ended::Gone),
            () = gateway.kill.cancelled() => return Err(Ended::Failed(Error::Stopping)),
            () = sleep_until(beat) => {
                let now = Instant::now();
                beat = exit.beat(now).unwrap_or(now + SIGN_OF_LIFE);
            }
        }
    }
}

fn ask(order: &Order) -> Ask {
    let (urgency, caller) = (order.arrival.urgency, &order.caller);
    let tenant: TenantId = caller.tenant.clone();
    let size = Size {
        prompt_tokens: order.prompt.len() as u32,
        max_tokens: order.sampling.max_tokens,
        choices: order.choices,
    };
    Ask { class: urgency.class, tenant, weight: caller.weight, deadline: urgency.deadline.map(Instant::into_std), size }
}

fn enter(order: &mut Order, pass: Pass) -> Result<(), Ended> {
    order.facts = Some(pass.facts());
    order.pass = Some(pass);
    Ok(())
}

fn refuse(order: &mut Order, refused: Refused) -> Result<(), Ended> {
    order.facts = Some(refused.facts);
    Err(Ended::Failed(refused.error))
}
