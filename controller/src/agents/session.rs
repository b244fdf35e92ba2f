//! One agent's connection: its session (assignments down, reports up) and the files it fetches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use izar_common::id::NodeId;
use izar_common::quic::{self, Connection, Receiver, Sender};
use izar_common::wire::agent::{Down, Up};
use izar_common::wire::handshake::Open;
use izar_common::{blob, events, wire};
use tokio::sync::Semaphore;

use super::assignment::assignment;
use super::tripwire::Tripwire;
use super::{Agents, Inner};

/// Files that one agent fetches from this controller at once; more wait their turn. An agent asks for one at a time,
/// twice that covers a fetch that was just given up.
const BLOBS_PER_AGENT: usize = 2;

/// Time between attempts to learn that the state here is fresh, while there is no quorum.
const FRESH_RETRY: Duration = Duration::from_millis(200);

/// An agent with jobs reports four times a second; so many ticks without a word are more than load explains.
const TICK: Duration = Duration::from_millis(250);
const SILENT_TICKS: u32 = 5;

/// After a tripwire fell: time for words that were on their way, and for a sign of life.
const LAST_WORDS: Duration = Duration::from_millis(30);
const SIGN_OF_LIFE: Duration = Duration::from_millis(200);

/// Serves a connection until it ends or the controller stops.
pub(super) async fn serve(agents: &Agents, connection: Connection) {
    let agent = connection.peer().node.clone();
    if connection.peer().site != agents.inner.site {
        log::warn!(agent:%, site:% = connection.peer().site; "refused an agent of another site");
        return connection.close("this controller is of another site");
    }
    let blobs = Arc::new(Semaphore::new(BLOBS_PER_AGENT));
    let mut begun = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept_bi() => accepted,
            () = agents.inner.stop.cancelled() => break connection.close("the controller stops"),
        };
        match accepted {
            Ok((Open::Session, tx, rx)) if !begun => {
                begun = true;
                let (inner, agent, connection) = (agents.inner.clone(), agent.clone(), connection.clone());
                agents.inner.tasks.spawn(async move { session(&inner, &agent, &connection, tx, rx).await });
            }
            Ok((Open::Blob, tx, rx)) => {
                let (store, blobs, agent) = (agents.inner.store.clone(), blobs.clone(), agent.clone());
                agents.inner.tasks.spawn(async move {
                    let _permit = blobs.acquire().await.expect("the semaphore is never closed");
                    if let Err(error) = blob::serve(&store, tx, rx).await {
                        log::debug!(agent:%, error:%; "a file was not sent whole");
                    }
                });
            }
            Ok((open, mut tx, mut rx)) => {
                log::warn!(agent:%, open:?; "refused a stream that an agent has no use for");
                quic::reset(&mut tx);
                quic::stop(&mut rx);
            }
            Err(_) => break,
        }
    }
}

async fn session(inner: &Inner, agent: &NodeId, connection: &Connection, tx: Sender, rx: Receiver) {
    if !inner.roster.join(agent, connection) {
        log::error!(agent:%; "refused an agent: too many are connected");
        return connection.close("too many agents");
    }
    log::info!(agent:%; "agent connected");
    let (heard, tripwire) = (AtomicU64::new(0), inner.tripwires.arm());
    let ended = tokio::select! {
        ended = read_reports(inner, agent, connection, rx, &heard) => ended,
        ended = write_orders(inner, agent, tx, &tripwire) => ended,
        reason = watch(inner, agent, &heard, &tripwire) => {
            log::warn!(message_id = events::AGENT_LOST, agent:%, reason; "agent is given up");
            inner.given_up.fetch_add(1, Relaxed);
            Ok(())
        }
    };
    if let Err(error) = &ended {
        connection.refuse_frame(error);
    }
    connection.close("the session ended");
    if inner.roster.leave(agent, connection) {
        let reason = ended.err().map_or("closed by the agent".into(), |error| error.to_string());
        log::info!(agent:%, reason; "agent disconnected");
    }
}

/// Takes reports, and what workers hold, until the stream ends; only the newest is kept.
async fn read_reports(
    inner: &Inner,
    agent: &NodeId,
    connection: &Connection,
    mut rx: Receiver,
    heard: &AtomicU64,
) -> Result<(), wire::Error> {
    while let Some(up) = rx.next().await? {
        heard.fetch_add(1, Relaxed);
        match up {
            Up::Report(report) => inner.roster.report(agent, connection, *report),
            Up::Machine(machine) => inner.roster.machine(agent, connection, machine),
            Up::Sketch { worker, sketch } => inner.roster.sketch(agent, connection, &worker, sketch),
        }
    }
    Ok(())
}

/// How long an agent with jobs has said nothing. Pure.
///
/// Ticks are counted, not time: a controller that gets no processor itself is late with both.
#[derive(Debug)]
struct Silence {
    /// Reports heard at the last tick.
    heard: u64,
    ticks: u32,
}

impl Silence {
    fn new(heard: u64) -> Self {
        Self { heard, ticks: 0 }
    }

    /// Takes a tick: reports heard so far, and whether the agent has jobs. Returns whether it has been silent too long.
    fn tick(&mut self, heard: u64, busy: bool) -> bool {
        self.ticks = if heard == self.heard && busy { self.ticks + 1 } else { 0 };
        self.heard = heard;
        self.ticks >= SILENT_TICKS
    }
}

/// Waits until an agent with jobs of this controller's is as good as dead; says why. Its jobs go on elsewhere then, and it
/// is welcome to come back.
async fn watch(inner: &Inner, agent: &NodeId, heard: &AtomicU64, tripwire: &Tripwire) -> &'static str {
    let mut silence = Silence::new(heard.load(Relaxed));
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {
                if silence.tick(heard.load(Relaxed), inner.roster.jobs(agent) > 0) {
                    return "it has jobs and says nothing";
                }
            }
            () = tripwire.fell() => {
                // What was on its way when it died may still arrive; a living agent reports because the wire fell.
                tokio::time::sleep(LAST_WORDS).await;
                let before = heard.load(Relaxed);
                tokio::time::sleep(SIGN_OF_LIFE).await;
                if heard.load(Relaxed) == before {
                    return "its process died";
                }
            }
        }
    }
}

/// Sends the whole assignment once the state here is known to be fresh, and again whenever it changes.
///
/// A controller cut off from the others thus never tells an agent anything old; and what changes later is newer.
async fn write_orders(inner: &Inner, agent: &NodeId, mut tx: Sender, tripwire: &Tripwire) -> Result<(), wire::Error> {
    tx.send(&Down::Tripwire(tripwire.words)).await?;
    while inner.raft.read_index().await.is_err() {
        tokio::time::sleep(FRESH_RETRY).await;
    }
    let mut config = inner.raft.config();
    let mut sent = None;
    loop {
        let now = config.borrow_and_update().clone();
        let wanted = assignment(&now, agent);
        // What is remembered of a GPU may come and go between two looks: the agent must hear that it was looked at since.
        let noted = now.gpus.values().filter(|record| record.agent == *agent).map(|record| record.index).max();
        let content = (wanted.workers.clone(), wanted.holds.clone(), wanted.order.clone(), noted);
        if sent.as_ref() != Some(&content) {
            log::debug!(agent:%, workers = wanted.workers.len(), applied = wanted.generation.applied; "assignment sent");
            sent = Some(content);
            tx.send(&Down::Assignment(wanted)).await?;
        }
        if config.changed().await.is_err() {
            // Raft has stopped; the session ends with the controller.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_agent_is_given_up_after_five_ticks_with_jobs_and_without_a_word_and_never_otherwise(
            // Reports between two ticks, mostly none, and whether there are jobs, mostly some.
            ticks in prop::collection::vec((prop_oneof![4 => Just(0), 1 => 1..3_u64], prop::bool::weighted(0.9)), 0..80),
        ) {
            let (mut silence, mut heard) = (Silence::new(7), 7);
            for at in 0..ticks.len() {
                heard += ticks[at].0;
                let last = &ticks[(at + 1).saturating_sub(SILENT_TICKS as usize)..=at];
                let dead = last.len() == SILENT_TICKS as usize && last.iter().all(|(reports, busy)| *reports == 0 && *busy);
                prop_assert_eq!(silence.tick(heard, ticks[at].1), dead, "tick {}", at);
            }
        }
    }
}
