//! Every limit of the transport, in one place, with its reason.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig,
};

use super::Profile;
use crate::id::{NodeId, Role};
use crate::tls::NodeTls;

/// A stream for each running request: more requests than this wait for an agent's answer elsewhere.
const BIDI_STREAMS: u32 = 4096;
/// Raft and proposals take three; room for reconnecting while old ones die.
const UNI_STREAMS: u32 = 64;
/// What one stream may have under way: a model file flows at 10 Gbit/s over 6 ms, or at 600 Mbit/s over 100 ms.
const STREAM_WINDOW: u32 = 8 << 20;
/// What a peer may make us hold in all.
const CONNECTION_WINDOW: u32 = 32 << 20;
/// What may wait here for a peer's acknowledgement.
const SEND_WINDOW: u64 = 32 << 20;
/// Between nodes of a site a lost handshake packet is sent again after some 300 ms, not after the second that the
/// internet's default gives.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Idle time that the answering side grants; the dialling side asks for less, and the smaller one holds.
const ACCEPTED_IDLE: Duration = Duration::from_secs(10);
/// Handshakes that were begun by strangers and not yet looked at; each holds at most `INCOMING_BYTES`.
const INCOMING: usize = 256;
const INCOMING_BYTES: u64 = 64 << 10;
const INCOMING_BYTES_TOTAL: u64 = 4 << 20;
/// Asked of the kernel, which may give less: a burst from many peers should not be dropped while the process is busy.
const SOCKET_BYTES: usize = 8 << 20;
/// A process that was restarted tells peers of the old one that their connection is gone, at most this often.
const RESET_INTERVAL: Duration = Duration::from_millis(20);

fn transport(idle: Duration, keep_alive: Option<Duration>) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(idle).expect("seconds fit");
    config
        .max_concurrent_bidi_streams(BIDI_STREAMS.into())
        .max_concurrent_uni_streams(UNI_STREAMS.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(SEND_WINDOW)
        .initial_rtt(INITIAL_RTT)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(keep_alive)
        .datagram_receive_buffer_size(None)
        .allow_spin(false);
    Arc::new(config)
}

/// Settings of the answering side.
pub(super) fn server(tls: &NodeTls) -> anyhow::Result<ServerConfig> {
    let crypto = QuicServerConfig::try_from(tls.quic_server()?)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport(ACCEPTED_IDLE, None))
        .migration(false)
        .max_incoming(INCOMING)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES_TOTAL);
    Ok(config)
}

/// Settings of the dialling side.
pub(super) fn client(
    tls: &NodeTls,
    role: Option<Role>,
    node: Option<&NodeId>,
    profile: Profile,
) -> anyhow::Result<ClientConfig> {
    let crypto = QuicClientConfig::try_from(tls.quic_client_to(role, node)?)?;
    let (idle, keep_alive) = match profile {
        Profile::Raft => (Duration::from_secs(3), Duration::from_millis(500)),
        Profile::Requests => (Duration::from_secs(5), Duration::from_secs(1)),
    };
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(idle, Some(keep_alive)));
    Ok(config)
}

/// Settings of the socket's endpoint.
///
/// The key of stateless resets comes from the node's private key: after a crash and a restart the new process can tell
/// peers that connections of the old one are gone, and they need not wait for the idle time.
pub(super) fn endpoint(tls: &NodeTls) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(tls.derived_key("izar quic stateless reset")));
    config.min_reset_interval(RESET_INTERVAL);
    // quinn's default generator refuses the ids of an earlier process before a reset could be sent.
    config.cid_generator(|| Box::new(RandomIds));
    config
}

/// Random connection ids. Any id may have been one of ours, so that none is refused.
struct RandomIds;

const ID_BYTES: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::random::<[u8; ID_BYTES]>())
    }
    fn cid_len(&self) -> usize {
        ID_BYTES
    }
    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Enlarges a socket's buffers as far as the kernel allows.
pub(super) fn enlarge(socket: &std::net::UdpSocket) {
    if let Ok(state) = quinn::udp::UdpSocketState::new(socket.into()) {
        // Best effort: a smaller buffer costs speed, nothing else.
        let _ = state.set_recv_buffer_size(socket.into(), SOCKET_BYTES);
        let _ = state.set_send_buffer_size(socket.into(), SOCKET_BYTES);
    }
}
