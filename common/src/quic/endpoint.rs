//! The socket: dialling, answering, and the first words of a connection.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use quinn::ConnectionError;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::connection::Connection;
use super::refusal::{Kind, Refusals};
use super::{ConnectError, Profile, Receiver, Sender, code, settings};
use crate::id::{ClusterId, Identity, NodeId, Role};
use crate::tls::{NodeTls, identity_of_peer};
use crate::wire;
use crate::wire::handshake::{Hello, Welcome};

/// From the first packet to `Welcome`. Between nodes of a site it takes milliseconds.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Handshakes under way at once, including those that wait for `accept`. A site has some hundred nodes; the rest of a
/// crowd is refused and comes again.
const HANDSHAKES: usize = 64;
/// Connections that wait for `accept`.
const ACCEPTED: usize = 16;
/// For a refusal to reach the peer before the connection is closed.
const FAREWELL: Duration = Duration::from_millis(500);
/// For the last packets when an endpoint closes.
const DRAIN: Duration = Duration::from_secs(1);
/// Longest reason that is sent or logged: it must fit into `Welcome`, and a peer's own text may be long.
const REASON_CHARS: usize = 200;
/// QUIC wants a server name; the certificate's identity is checked in its place, and it is never sent.
const SERVER_NAME: &str = "izar.invalid";

/// A UDP socket that dials and answers nodes of this cluster. Cheap to clone.
///
/// When the last clone goes nobody is answered any more; connections live on until they are dropped or `close` is
/// called.
#[derive(Clone)]
pub struct Endpoint(Arc<Inner>);

struct Inner {
    quinn: quinn::Endpoint,
    tls: NodeTls,
    local: SocketAddr,
    refusals: Arc<Refusals>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    answering: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

impl Endpoint {
    /// Binds a UDP socket and begins to answer. Needs a tokio runtime.
    pub fn bind(addr: SocketAddr, tls: &NodeTls) -> anyhow::Result<Self> {
        let socket = std::net::UdpSocket::bind(addr).with_context(|| format!("bind the UDP address {addr}"))?;
        settings::enlarge(&socket);
        let server = settings::server(tls)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let quinn = quinn::Endpoint::new(settings::endpoint(tls), Some(server), socket, runtime)
            .with_context(|| format!("use the UDP address {addr}"))?;
        let local = quinn.local_addr().context("ask for the bound address")?;
        let refusals = Arc::new(Refusals::default());
        let (accepting, accepted) = mpsc::channel(ACCEPTED);
        let answerer = Answerer { own: tls.identity().clone(), refusals: refusals.clone() };
        let answering = tokio::spawn(answer_all(quinn.clone(), Arc::new(answerer), accepting)).abort_handle();
        let accepted = Mutex::new(accepted);
        Ok(Self(Arc::new(Inner { quinn, tls: tls.clone(), local, refusals, accepted, answering })))
    }

    /// The address that was bound; its port is never 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local
    }

    /// Waits for the next peer that dialled and was welcomed; `None` once the endpoint is closed.
    ///
    /// Cancellation-safe. Peers that were refused are counted and logged, and do not appear.
    pub async fn accept(&self) -> Option<Connection> {
        // The lock is held while waiting on purpose: it makes several callers take turns.
        self.0.accepted.lock().await.recv().await
    }

    /// Dials a node that must have this role and, if given, this name. Takes at most two seconds.
    pub async fn connect(
        &self,
        addr: SocketAddr,
        role: Role,
        node: Option<&NodeId>,
        profile: Profile,
    ) -> Result<Connection, ConnectError> {
        let unreachable = |reason: String| ConnectError::Unreachable { addr, reason };
        let config = settings::client(&self.0.tls, Some(role), node, profile)
            .map_err(|error| unreachable(format!("{error:#}")))?;
        let connecting =
            self.0.quinn.connect_with(config, addr, SERVER_NAME).map_err(|error| unreachable(error.to_string()))?;
        let dialled = timeout(HANDSHAKE, self.greet(addr, connecting))
            .await
            .unwrap_or_else(|_| Err(unreachable("no answer in time".into())));
        if let Err(ConnectError::WrongPeer { .. }) = dialled {
            self.0.refusals.add();
        }
        dialled
    }

    async fn greet(&self, addr: SocketAddr, connecting: quinn::Connecting) -> Result<Connection, ConnectError> {
        let quinn = connecting.await.map_err(|error| dial_error(addr, error))?;
        let peer = identity_of_peer(quinn.peer_identity())
            .map_err(|error| ConnectError::WrongPeer { addr, reason: error.to_string() })?;
        match exchange(&quinn, &self.0.tls.identity().cluster).await {
            Ok(Welcome::Accepted { schema, .. }) if wire::SCHEMA.contains(&schema) => {
                Ok(Connection::new(quinn, peer, self.0.tls.identity().role, self.0.refusals.clone()))
            }
            Ok(Welcome::Accepted { schema, .. }) => {
                let reason = format!("the peer chose schema {schema}, which this build does not speak");
                Err(ConnectError::WrongPeer { addr, reason })
            }
            Ok(Welcome::Refused { reason }) => Err(ConnectError::Refused { addr, reason: clip(&reason) }),
            // Why the connection ended says more than what a stream noticed of it.
            Err(error) => Err(match quinn.close_reason() {
                Some(closed) => dial_error(addr, closed),
                None if error.is_lost() => ConnectError::Unreachable { addr, reason: error.to_string() },
                None => ConnectError::WrongPeer { addr, reason: error.to_string() },
            }),
        }
    }

    /// Peers that were refused since the start, dialling or dialled.
    pub fn refused(&self) -> u64 {
        self.0.refusals.count()
    }

    /// Closes every connection and waits a moment for the peers to hear of it. `accept` then returns `None`.
    pub async fn close(&self) {
        self.0.quinn.close(code::DONE.into(), b"shutting down");
        let _ = timeout(DRAIN, self.0.quinn.wait_idle()).await;
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Endpoint({} at {})", self.0.tls.identity(), self.0.local)
    }
}

/// Sends `Hello` on the first stream and waits for the answer.
async fn exchange(quinn: &quinn::Connection, cluster: &ClusterId) -> Result<Welcome, wire::Error> {
    let (tx, rx) = quinn.open_bi().await.map_err(std::io::Error::from)?;
    let (mut tx, mut rx) = (Sender::new(tx), Receiver::new(rx));
    let hello = Hello {
        schema_min: *wire::SCHEMA.start(),
        schema_max: *wire::SCHEMA.end(),
        cluster: cluster.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    tx.send(&hello).await?;
    super::finish(&mut tx);
    rx.expect().await
}

/// Says what a failed dial means for the caller.
fn dial_error(addr: SocketAddr, error: ConnectionError) -> ConnectError {
    let reason = clip(&describe(&error));
    match &error {
        ConnectionError::TransportError(e) if is_tls(e.code) => ConnectError::WrongPeer { addr, reason },
        ConnectionError::ConnectionClosed(e) if is_tls(e.error_code) => ConnectError::Refused { addr, reason },
        ConnectionError::ApplicationClosed(e) if e.error_code == code::REFUSED.into() => {
            ConnectError::Refused { addr, reason }
        }
        _ => ConnectError::Unreachable { addr, reason },
    }
}

/// TLS alerts lie in a range of QUIC's error codes. Source: RFC 9001, section 4.8.
fn is_tls(code: quinn::TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

/// A connection's end in words; a reason that the peer gave is shown alone.
pub(super) fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            clip(&String::from_utf8_lossy(&close.reason))
        }
        other => other.to_string(),
    }
}

fn clip(text: &str) -> String {
    text.chars().take(REASON_CHARS).collect()
}

/// Answers whoever dials, each in a task of its own, so that a slow one delays nobody.
async fn answer_all(quinn: quinn::Endpoint, answerer: Arc<Answerer>, accepting: mpsc::Sender<Connection>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    while let Some(incoming) = quinn.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            let from = incoming.remote_address();
            answerer.refusals.report(Kind::Crowd, from, None, "too many handshakes at once");
            incoming.refuse();
            continue;
        };
        // In a crowd, a peer first proves that it receives at the address it sends from.
        if handshakes.available_permits() < HANDSHAKES / 2 && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(answerer.clone().answer(incoming, permit, accepting.clone()));
    }
}

/// Why a handshake came to nothing.
enum Failed {
    /// The peer went away or did not want us: its business.
    Gone(String),
    Refused(Refused),
}

struct Refused {
    kind: Kind,
    node: Option<NodeId>,
    reason: String,
    /// Where the peer can still be told.
    farewell: Option<(quinn::Connection, Sender)>,
}

struct Answerer {
    own: Identity,
    refusals: Arc<Refusals>,
}

impl Answerer {
    /// Holds its permit until somebody accepts the connection, so that those who wait are bounded too.
    async fn answer(
        self: Arc<Self>,
        incoming: quinn::Incoming,
        permit: OwnedSemaphorePermit,
        accepting: mpsc::Sender<Connection>,
    ) {
        let from = incoming.remote_address();
        match timeout(HANDSHAKE, self.shake(incoming)).await {
            Ok(Ok(connection)) => drop(accepting.send(connection).await),
            Ok(Err(Failed::Gone(reason))) => log::debug!(from:% = from, reason; "handshake given up by the peer"),
            Ok(Err(Failed::Refused(refused))) => {
                self.refusals.report(refused.kind, from, refused.node.as_ref(), &refused.reason);
                if let Some((quinn, tx)) = refused.farewell {
                    say_no(&quinn, tx, refused.reason).await;
                }
            }
            Err(_) => self.refusals.report(Kind::Slow, from, None, "no handshake in time"),
        }
        drop(permit);
    }

    async fn shake(&self, incoming: quinn::Incoming) -> Result<Connection, Failed> {
        let quinn = incoming.await.map_err(|error| match &error {
            ConnectionError::TransportError(e) if is_tls(e.code) => {
                let (kind, reason) = (Kind::Certificate, clip(&e.reason));
                Failed::Refused(Refused { kind, node: None, reason, farewell: None })
            }
            _ => Failed::Gone(describe(&error)),
        })?;
        let peer = identity_of_peer(quinn.peer_identity()).map_err(|error| Failed::Gone(error.to_string()))?;
        let (tx, rx) = quinn.accept_bi().await.map_err(|error| Failed::Gone(describe(&error)))?;
        let (mut tx, mut rx) = (Sender::new(tx), Receiver::new(rx));
        let node = Some(peer.node.clone());
        let verdict = match rx.expect::<Hello>().await {
            Ok(hello) => judge(&self.own, &peer, &hello, wire::SCHEMA),
            Err(error) if error.is_lost() => return Err(Failed::Gone(error.to_string())),
            Err(error) => Err((Kind::Hello, error.to_string())),
        };
        match verdict {
            Ok(schema) => {
                let welcome = Welcome::Accepted { schema, version: env!("CARGO_PKG_VERSION").into() };
                tx.send(&welcome).await.map_err(|error| Failed::Gone(error.to_string()))?;
                super::finish(&mut tx);
                Ok(Connection::new(quinn, peer, self.own.role, self.refusals.clone()))
            }
            Err((kind, reason)) => {
                let farewell = Some((quinn, tx));
                Err(Failed::Refused(Refused { kind, node, reason: clip(&reason), farewell }))
            }
        }
    }
}

/// Decides whether a peer with a good certificate is welcome; returns the schema to speak.
fn judge(own: &Identity, peer: &Identity, hello: &Hello, schemas: RangeInclusive<u16>) -> Result<u16, (Kind, String)> {
    if hello.cluster != own.cluster {
        return Err((Kind::Cluster, format!("the peer means cluster {}, this is {}", hello.cluster, own.cluster)));
    }
    if (peer.role, own.role) == (Role::Agent, Role::Agent) {
        return Err((Kind::Role, "agents do not talk to agents".into()));
    }
    let (oldest, newest) = (*schemas.start().max(&hello.schema_min), *schemas.end().min(&hello.schema_max));
    if oldest > newest {
        let reason = format!(
            "the peer speaks schemas {} to {}, this node {} to {}",
            hello.schema_min,
            hello.schema_max,
            schemas.start(),
            schemas.end()
        );
        return Err((Kind::Schema, reason));
    }
    Ok(newest)
}

/// Tells a peer why it is refused, and closes.
async fn say_no(quinn: &quinn::Connection, mut tx: Sender, reason: String) {
    let farewell = async {
        if tx.send(&Welcome::Refused { reason: reason.clone() }).await.is_ok() {
            super::finish(&mut tx);
            super::stopped(&mut tx).await;
        }
    };
    let _ = timeout(FAREWELL, farewell).await;
    quinn.close(code::REFUSED.into(), reason.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(peer: &str, hello_cluster: &str, schemas: (u16, u16), expected: Result<u16, Kind>) {
        let hello = Hello {
            schema_min: schemas.0,
            schema_max: schemas.1,
            cluster: hello_cluster.parse().unwrap(),
            version: "0".into(),
        };
        let own = "izar://dev/local/agent/a1".parse().unwrap();
        let verdict = judge(&own, &peer.parse().unwrap(), &hello, 3..=5).map_err(|(kind, _)| kind);
        assert_eq!(verdict, expected, "{peer} {hello:?}");
    }

    #[test]
    fn the_newest_common_schema_is_spoken_or_none() {
        let peer = "izar://dev/local/controller/c1";
        for (schemas, expected) in [((1, 3), Ok(3)), ((4, 9), Ok(5)), ((3, 5), Ok(5)), ((4, 4), Ok(4))] {
            check(peer, "dev", schemas, expected);
        }
        for schemas in [(1, 2), (6, 9), (5, 3)] {
            check(peer, "dev", schemas, Err(Kind::Schema));
        }
    }

    #[test]
    fn another_cluster_and_agents_among_themselves_are_refused() {
        check("izar://dev/local/controller/c1", "prod", (3, 5), Err(Kind::Cluster));
        check("izar://dev/local/agent/a2", "dev", (3, 5), Err(Kind::Role));
    }
}
