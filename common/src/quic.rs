//! Connections between nodes: QUIC with mutual TLS, every limit set, and a first word that both sides agree on.
//!
//! One UDP socket dials and answers. A connection exists for its user only after `Hello` and `Welcome` were exchanged,
//! so that the dialling side knows that the other has checked it. Every stream begins with an `Open` frame, and the
//! role in the certificate decides who may open what: whoever breaks a rule is cut off, counted and logged once.
//! A slow peer delays nobody but itself: handshakes and streams whose first frame is late wait aside, in bounded number.
//! This is the only home of quinn.

use std::net::SocketAddr;

use crate::wire;
use crate::wire::handshake::Open;

mod connection;
mod endpoint;
mod refusal;
mod settings;

pub use connection::Connection;
pub use endpoint::Endpoint;

/// Writes messages to a stream.
pub type Sender = wire::Writer<quinn::SendStream>;
/// Reads messages from a stream.
pub type Receiver = wire::Reader<quinn::RecvStream>;

/// How soon a dialled connection notices that its peer is gone. The dialling side sends the keep-alives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// 3 s without a sign, asked every 500 ms: an election waits for it.
    Raft,
    /// 5 s without a sign, asked every second.
    Requests,
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answered, or not in time. Worth a retry.
    #[error("no connection to {addr}: {reason}")]
    Unreachable { addr: SocketAddr, reason: String },
    /// Whoever answered is not the node we want; it was counted as refused.
    #[error("{addr} is not the expected peer: {reason}")]
    WrongPeer { addr: SocketAddr, reason: String },
    /// The peer does not want us.
    #[error("{addr} refused this node: {reason}")]
    Refused { addr: SocketAddr, reason: String },
}

/// Why a stream could not be opened or accepted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection is gone; nothing more will come of it.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer broke a rule, and the connection was closed for it.
    #[error("peer broke a rule: {0}")]
    Violation(String),
    /// This node's role may not open such a stream to this peer: our mistake, nothing was sent.
    #[error("no {0:?} stream may be opened to this peer")]
    Forbidden(Open),
    /// The peer allows no more streams at the moment.
    #[error("the peer has no room for another stream")]
    Busy,
}

/// Application codes that close connections and streams. Numbers on the wire: never reused.
mod code {
    pub(super) const DONE: u32 = 0;
    /// The handshake failed.
    pub(super) const REFUSED: u32 = 1;
    /// A rule was broken later.
    pub(super) const VIOLATION: u32 = 2;
    /// A stream was given up by its sender or is no longer wanted by its reader.
    pub(super) const CANCELLED: u32 = 3;
}

/// Gives up a stream: what was not sent yet never is, and the peer's reads fail. Harmless on a finished stream.
pub fn reset(sender: &mut Sender) {
    let _ = sender.get_mut().reset(code::CANCELLED.into());
}

/// Says that nothing more follows. What was put but not flushed is lost.
pub fn finish(sender: &mut Sender) {
    let _ = sender.get_mut().finish();
}

/// Tells the peer that its messages on this stream are no longer wanted.
pub fn stop(receiver: &mut Receiver) {
    let _ = receiver.get_mut().stop(code::CANCELLED.into());
}

/// Waits until the peer wants nothing more on this stream: it stopped it, it took all of a finished stream, or the
/// connection is gone. Cancellation-safe.
pub async fn stopped(sender: &mut Sender) {
    let _ = sender.get_mut().stopped().await;
}

#[cfg(test)]
mod tests;
