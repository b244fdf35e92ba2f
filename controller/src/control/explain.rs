//! `GET /v1/requests/{id}`: what happened to a request, on whichever controllers it was.
//!
//! The record of its turn is replicated; the story around it (where it waited, why it moved) is each controller's own,
//! so the others are asked for theirs.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State as Extract};
use futures_util::future;
use izar_common::id::{NodeId, Role, TurnId};
use izar_common::quic::{self, Profile, Receiver, Sender};
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::{ExplainAnswer, ExplainRequest};

use super::error::Error;
use super::view::{Explained, Story};
use super::{Control, Shared};
use crate::gateway::Gateway;

/// How long another controller is waited for: an operator looks on.
const PEER_LIMIT: Duration = Duration::from_secs(2);

/// Reads a request's id as clients and listings show it.
fn parse(id: &str) -> Result<TurnId, Error> {
    let bare = id.trim_start_matches("chatcmpl-").trim_start_matches("cmpl-");
    let plain =
        bare.parse().ok().or_else(|| u128::from_str_radix(bare, 16).ok().filter(|_| bare.len() == 32).map(TurnId));
    plain.ok_or_else(|| {
        Error::Invalid(format!("`{id}` is no id of a request: it stands in X-Request-Id and in izar turns list"))
    })
}

pub async fn explain(Extract(control): Shared, Path(id): Path<String>) -> Result<Json<Explained>, Error> {
    let turn = parse(&id)?;
    let parts = &control.parts;
    let asked = parts.others.iter().map(|(node, _)| ask(&control, node, turn));
    let answers = future::join_all(asked).await;
    let here = parts.gateway.explain(turn).map(|trace| Story { node: parts.raft.origin().node.clone(), trace });
    let (mut stories, mut unreachable): (Vec<Story>, Vec<NodeId>) = (here.into_iter().collect(), Vec::new());
    for ((node, _), answer) in parts.others.iter().zip(answers) {
        match answer {
            Some(trace) => stories.extend(trace.map(|trace| Story { node: node.clone(), trace })),
            None => unreachable.push(node.clone()),
        }
    }
    stories.sort_by_key(|story| story.trace.started_ms);
    let record = parts.raft.state().read(|state| state.turn(&turn).map(Into::into));
    if record.is_none() && stories.is_empty() {
        let lost: Vec<&str> = unreachable.iter().map(|node| node.as_str()).collect();
        let unasked = if lost.is_empty() { String::new() } else { format!(" (not asked: {})", lost.join(", ")) };
        return Err(Error::NotFound(format!("no controller knows request {turn} any longer{unasked}")));
    }
    Ok(Json(Explained { turn, record, stories, unreachable }))
}

/// Asks another controller; `None` if it cannot be asked.
async fn ask(control: &Control, node: &NodeId, turn: TurnId) -> Option<Option<crate::gateway::trace::Trace>> {
    let (_, address) = control.parts.others.iter().find(|(other, _)| other == node)?;
    let asking = async {
        let connecting = control.parts.peers.connect(*address, Role::Controller, Some(node), Profile::Requests);
        let connection = connecting.await.ok()?;
        let (mut tx, mut rx) = connection.open_bi(Open::Explain).await.ok()?;
        tx.send(&ExplainRequest { turn }).await.ok()?;
        quic::finish(&mut tx);
        let answer = rx.expect::<ExplainAnswer>().await.ok()?;
        connection.close("done");
        answer.trace.map(|json| serde_json::from_str(&json)).transpose().ok()
    };
    tokio::time::timeout(PEER_LIMIT, asking).await.ok()?
}

/// Answers another controller.
pub async fn serve(gateway: &Gateway, mut tx: Sender, mut rx: Receiver) -> anyhow::Result<()> {
    let ExplainRequest { turn } = tokio::time::timeout(PEER_LIMIT, rx.expect()).await??;
    let trace = gateway.explain(turn).map(|trace| serde_json::to_string(&trace)).transpose()?;
    tx.send(&ExplainAnswer { trace }).await?;
    quic::finish(&mut tx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_in_every_form_that_is_shown() {
        let turn = TurnId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        let hex = format!("{:032x}", turn.0);
        for id in [turn.to_string(), format!("chatcmpl-{hex}"), format!("cmpl-{hex}"), hex] {
            assert_eq!(parse(&id).unwrap(), turn, "{id}");
        }
        assert!(parse("nonsense").unwrap_err().to_string().contains("X-Request-Id"));
    }
}
