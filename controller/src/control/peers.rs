//! The other controllers, asked for their clocks and versions: `GET /v1/peers` for `izar doctor`, which compares, and a
//! metric of the clocks.
//!
//! Each is asked over the link that controllers have anyway; one that does not answer is no error, but what is to be seen.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State as Extract;
use futures_util::future;
use izar_common::clock::wall_ms;
use izar_common::id::{NodeId, Role};
use izar_common::quic::{self, Profile, Sender};
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::About;

use super::Shared;
use super::view::{Peer, Peers};

/// How long another controller is waited for: an operator looks on.
const LIMIT: Duration = Duration::from_secs(2);

/// How often clocks are compared for the metric.
const COMPARE_EVERY: Duration = Duration::from_secs(30);

pub async fn peers(Extract(control): Shared) -> Json<Peers> {
    Json(Peers { peers: ask_all(&control.parts.peers, &control.parts.others).await })
}

/// Compares clocks again and again; `ahead_ms` is how far the fastest of those that answer is ahead of this one, not below
/// zero. Records alone would not tell of it at night: where nothing is recorded, this clock catches up with the last one.
pub async fn watch_clocks(endpoint: &quic::Endpoint, others: &[(NodeId, SocketAddr)], ahead_ms: &AtomicU64) {
    loop {
        tokio::time::sleep(COMPARE_EVERY).await;
        let fastest = ask_all(endpoint, others).await.into_iter().filter_map(|peer| peer.ahead_ms).max();
        ahead_ms.store(fastest.map_or(0, |ms| ms.max(0).unsigned_abs()), Relaxed);
    }
}

async fn ask_all(endpoint: &quic::Endpoint, others: &[(NodeId, SocketAddr)]) -> Vec<Peer> {
    let asked = others.iter().map(async |(node, address)| {
        let about = tokio::time::timeout(LIMIT, ask(endpoint, node, *address)).await.ok().flatten();
        let (version, ahead_ms) = about.map_or((None, None), |(version, ahead_ms)| (Some(version), Some(ahead_ms)));
        Peer { node: node.clone(), version, ahead_ms }
    });
    future::join_all(asked).await
}

/// Another controller's version, and how far its clock is ahead of this one's.
async fn ask(endpoint: &quic::Endpoint, node: &NodeId, address: SocketAddr) -> Option<(String, i64)> {
    let connecting = endpoint.connect(address, Role::Controller, Some(node), Profile::Requests);
    let connection = connecting.await.ok()?;
    let (sent_ms, sent) = (wall_ms(), Instant::now());
    let (_tx, mut rx) = connection.open_bi(Open::About).await.ok()?;
    let About { version, now_ms } = rx.expect().await.ok()?;
    let took = sent.elapsed();
    connection.close("done");
    Some((version, ahead(sent_ms, took, now_ms)))
}

/// How far a clock is ahead that showed `there_ms` in the middle of a question: off by half the question's time at most.
fn ahead(sent_ms: u64, took: Duration, there_ms: u64) -> i64 {
    there_ms as i64 - (sent_ms as i64 + took.as_millis() as i64 / 2)
}

/// Answers another controller.
pub async fn serve(mut tx: Sender) -> anyhow::Result<()> {
    tx.send(&About { version: env!("CARGO_PKG_VERSION").to_owned(), now_ms: wall_ms() }).await?;
    quic::finish(&mut tx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_compared_with_the_middle_of_the_question() {
        let took = Duration::from_millis(20);
        assert_eq!([990, 1010, 1510].map(|there| ahead(1000, took, there)), [-20, 0, 500]);
    }
}
