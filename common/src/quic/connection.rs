//! A connection to a known peer: its streams, and the rules of who may open which.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::endpoint::describe;
use super::refusal::{Kind, Refusals};
use super::{Error, Receiver, Sender, code};
use crate::id::{Identity, Role};
use crate::wire;
use crate::wire::handshake::Open;

/// For the first frame of a stream, once the stream is visible: it comes in the same packet unless that was lost.
const FIRST_FRAME: Duration = Duration::from_secs(2);
/// Streams that wait for their first frame, of each direction. When there are so many, new streams wait.
const LATE_STREAMS: usize = 64;
/// For the peer to allow another stream. A peer that takes longer has a thousand of ours open and is no help.
const ROOM: Duration = Duration::from_secs(5);

/// A connection to a node whose identity was checked. Cheap to clone; closes when the last clone and stream is dropped.
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    quinn: quinn::Connection,
    peer: Identity,
    own_role: Role,
    refusals: Arc<Refusals>,
    // Locked by whoever accepts, while it waits: several callers take turns.
    late_bi: Mutex<JoinSet<Arrived<(Sender, Receiver)>>>,
    late_uni: Mutex<JoinSet<Arrived<Receiver>>>,
}

/// A stream and what its first frame turned out to be; `None` if it did not come in time.
type Arrived<S> = (S, Option<Result<Open, wire::Error>>);

/// The two directions of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Both,
    One,
}

/// What is needed to read the first frame of a stream, whichever direction it has.
trait Arriving: Send + 'static {
    fn receiver(&mut self) -> &mut Receiver;
}
impl Arriving for (Sender, Receiver) {
    fn receiver(&mut self) -> &mut Receiver {
        &mut self.1
    }
}
impl Arriving for Receiver {
    fn receiver(&mut self) -> &mut Receiver {
        self
    }
}

impl Connection {
    pub(super) fn new(quinn: quinn::Connection, peer: Identity, own_role: Role, refusals: Arc<Refusals>) -> Self {
        let (late_bi, late_uni) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { quinn, peer, own_role, refusals, late_bi, late_uni }))
    }

    /// Who the peer is, as its certificate says.
    pub fn peer(&self) -> &Identity {
        &self.0.peer
    }

    /// Where the peer is.
    pub fn remote_addr(&self) -> SocketAddr {
        self.0.quinn.remote_address()
    }

    /// Opens a stream in both directions.
    ///
    /// For `Job` and `Blob`, whose opener speaks first anyway, the `Open` frame waits in the sender and leaves with the
    /// first message, in one packet; the peer sees nothing of the stream before. Waits while the peer has no room.
    pub async fn open_bi(&self, open: Open) -> Result<(Sender, Receiver), Error> {
        self.may_open(open, Direction::Both)?;
        let (tx, rx) = timeout(ROOM, self.0.quinn.open_bi()).await.map_err(|_| Error::Busy)?.map_err(lost)?;
        let mut tx = Sender::new(tx);
        tx.put(&open);
        if !matches!(open, Open::Job | Open::Blob) {
            tx.flush().await.map_err(|error| Error::Lost(error.to_string()))?;
        }
        Ok((tx, Receiver::new(rx)))
    }

    /// Opens a stream to the peer alone. Waits while the peer has no room.
    pub async fn open_uni(&self, open: Open) -> Result<Sender, Error> {
        self.may_open(open, Direction::One)?;
        let tx = timeout(ROOM, self.0.quinn.open_uni()).await.map_err(|_| Error::Busy)?.map_err(lost)?;
        let mut tx = Sender::new(tx);
        tx.send(&open).await.map_err(|error| Error::Lost(error.to_string()))?;
        Ok(tx)
    }

    fn may_open(&self, open: Open, direction: Direction) -> Result<(), Error> {
        let allowed = allowed(self.0.own_role, self.0.peer.role, open) == Some(direction);
        if allowed { Ok(()) } else { Err(Error::Forbidden(open)) }
    }

    /// Waits for the next stream in both directions that the peer may open; cancellation-safe.
    ///
    /// A stream that its role does not allow, or a first frame that does not decode, closes the connection.
    pub async fn accept_bi(&self) -> Result<(Open, Sender, Receiver), Error> {
        let mut late = self.0.late_bi.lock().await;
        loop {
            let arrived = tokio::select! {
                Some(done) = late.join_next(), if !late.is_empty() => done.ok(),
                stream = self.0.quinn.accept_bi(), if late.len() < LATE_STREAMS => {
                    let (tx, rx) = stream.map_err(lost)?;
                    first_frame((Sender::new(tx), Receiver::new(rx)), &mut late)
                }
            };
            if let Some(arrived) = arrived
                && let Some(((tx, rx), open)) = self.check(arrived, Direction::Both)?
            {
                return Ok((open, tx, rx));
            }
        }
    }

    /// Like `accept_bi`, for streams from the peer alone.
    pub async fn accept_uni(&self) -> Result<(Open, Receiver), Error> {
        let mut late = self.0.late_uni.lock().await;
        loop {
            let arrived = tokio::select! {
                Some(done) = late.join_next(), if !late.is_empty() => done.ok(),
                stream = self.0.quinn.accept_uni(), if late.len() < LATE_STREAMS => {
                    first_frame(Receiver::new(stream.map_err(lost)?), &mut late)
                }
            };
            if let Some(arrived) = arrived
                && let Some((rx, open)) = self.check(arrived, Direction::One)?
            {
                return Ok((open, rx));
            }
        }
    }

    /// Lets a stream pass, drops one that came to nothing, or closes the connection for it.
    fn check<S>(&self, (stream, first): Arrived<S>, direction: Direction) -> Result<Option<(S, Open)>, Error> {
        match first {
            Some(Ok(open)) if allowed(self.0.peer.role, self.0.own_role, open) == Some(direction) => {
                Ok(Some((stream, open)))
            }
            Some(Ok(open)) => {
                let reason = format!("{} may not open a {open:?} stream here", self.0.peer.role);
                Err(self.violation(Kind::Role, reason))
            }
            Some(Err(error)) if !error.is_lost() => Err(self.violation(Kind::Frame, error.to_string())),
            // The opener thought better of it, or said nothing for too long; the other streams do not care.
            Some(Err(_)) | None => Ok(None),
        }
    }

    fn violation(&self, kind: Kind, reason: String) -> Error {
        self.0.refusals.report(kind, self.remote_addr(), Some(&self.0.peer.node), &reason);
        self.0.quinn.close(code::VIOLATION.into(), reason.as_bytes());
        Error::Violation(reason)
    }

    /// Closes the connection for a frame that the peer must not send; counts and logs it once.
    ///
    /// Whoever reads a stream calls this with each error. One that only says that the peer went away does nothing.
    pub fn refuse_frame(&self, error: &wire::Error) {
        if !error.is_lost() {
            self.violation(Kind::Frame, error.to_string());
        }
    }

    /// Closes the connection and all its streams at once.
    pub fn close(&self, reason: &str) {
        self.0.quinn.close(code::DONE.into(), reason.as_bytes());
    }

    /// Waits until the connection is gone, whoever ended it.
    pub async fn closed(&self) {
        self.0.quinn.closed().await;
    }

    /// Why the connection is gone, or `None` while it lives.
    pub fn close_reason(&self) -> Option<String> {
        self.0.quinn.close_reason().map(|error| describe(&error))
    }

    /// Tells this connection from others to the same peer, for its whole life.
    pub fn stable_id(&self) -> usize {
        self.0.quinn.stable_id()
    }

    /// The current estimate of the time to the peer and back.
    pub fn rtt(&self) -> Duration {
        self.0.quinn.rtt()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} at {})", self.0.peer, self.remote_addr())
    }
}

fn lost(error: quinn::ConnectionError) -> Error {
    Error::Lost(describe(&error))
}

/// Reads a stream's first frame if it is here, as it nearly always is; otherwise leaves that to a task.
fn first_frame<S: Arriving>(mut stream: S, late: &mut JoinSet<Arrived<S>>) -> Option<Arrived<S>> {
    // Polled once, with a waker that does nothing: the task below polls again with its own.
    let mut context = Context::from_waker(Waker::noop());
    let polled = pin!(stream.receiver().expect::<Open>()).poll(&mut context);
    if let Poll::Ready(first) = polled {
        return Some((stream, Some(first)));
    }
    late.spawn(async move {
        let first = timeout(FIRST_FRAME, stream.receiver().expect::<Open>()).await.ok();
        (stream, first)
    });
    None
}

/// The direction of a stream that `opener` may open to `other`, or `None` if it may not.
fn allowed(opener: Role, other: Role, open: Open) -> Option<Direction> {
    use Role::{Agent, Controller};
    match (opener, other, open) {
        (Agent, Controller, Open::Session | Open::Blob) => Some(Direction::Both),
        (Controller, Agent, Open::Job | Open::Resume | Open::Recall)
        | (Controller, Controller, Open::Blob | Open::Explain | Open::Rejoin | Open::About) => Some(Direction::Both),
        (Controller, Controller, Open::RaftUrgent | Open::RaftBulk | Open::Propose) => Some(Direction::One),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_controllers_speak_raft_and_only_they_give_jobs() {
        use Role::{Agent, Controller};
        let all = [
            Open::Session,
            Open::Job,
            Open::Blob,
            Open::RaftUrgent,
            Open::RaftBulk,
            Open::Propose,
            Open::Resume,
            Open::Explain,
            Open::Recall,
            Open::Rejoin,
            Open::About,
        ];
        let may = |opener, other| -> Vec<Open> {
            all.into_iter().filter(|open| allowed(opener, other, *open).is_some()).collect()
        };
        assert_eq!(may(Agent, Controller), [Open::Session, Open::Blob]);
        assert_eq!(may(Controller, Agent), [Open::Job, Open::Resume, Open::Recall]);
        assert_eq!(
            may(Controller, Controller),
            [Open::Blob, Open::RaftUrgent, Open::RaftBulk, Open::Propose, Open::Explain, Open::Rejoin, Open::About]
        );
        assert_eq!(may(Agent, Agent), []);
    }
}
