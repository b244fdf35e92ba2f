//! Real sockets on loopback: who gets in, who does not, and that the slow delay nobody.

use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::id::Role;
use crate::tls::NodeTls;
use crate::tls::tests::Pki;
use crate::wire::handshake::{Hello, Welcome};
use crate::wire::peer::{BlobAnswer, BlobRequest, Proposal};

/// No test waits longer for what must come.
const LIMIT: Duration = Duration::from_secs(10);

const C1: &str = "izar://dev/local/controller/c1";
const C2: &str = "izar://dev/local/controller/c2";
const A1: &str = "izar://dev/local/agent/a1";

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.expect("it comes in time")
}

fn bind(tls: &NodeTls) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), tls).unwrap()
}

/// Two nodes of one cluster, the first dialled by the second.
struct Pair {
    answering: Endpoint,
    dialling: Endpoint,
    answered: Connection,
    dialled: Connection,
}

async fn pair(first: &str, second: &str) -> Pair {
    let pki = Pki::new("dev");
    let (answering, dialling) = (bind(&pki.node(first)), bind(&pki.node(second)));
    let role = first.parse::<crate::id::Identity>().unwrap().role;
    let dial = dialling.connect(answering.local_addr(), role, None, Profile::Requests);
    let (dialled, answered) = soon(async { tokio::join!(dial, answering.accept()) }).await;
    Pair { dialled: dialled.unwrap(), answered: answered.unwrap(), answering, dialling }
}

/// A peer without our manners: the certificate is right, what it says is up to the test.
async fn raw(tls: &NodeTls, addr: SocketAddr) -> quinn::Connection {
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(settings::client(tls, None, None, Profile::Requests).unwrap());
    soon(endpoint.connect(addr, "izar.invalid").unwrap()).await.unwrap()
}

async fn raw_hello(conn: &quinn::Connection, hello: &Hello) -> Result<Welcome, wire::Error> {
    let (tx, rx) = conn.open_bi().await.unwrap();
    let (mut tx, mut rx) = (Sender::new(tx), Receiver::new(rx));
    tx.send(hello).await?;
    soon(rx.expect()).await
}

fn hello() -> Hello {
    Hello { schema_min: 1, schema_max: 1, cluster: "dev".parse().unwrap(), version: "0".into() }
}

/// Waits until so many peers were refused.
async fn until_refused(endpoint: &Endpoint, count: u64) {
    soon(async {
        while endpoint.refused() < count {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(endpoint.refused(), count);
}

#[tokio::test]
async fn each_side_sees_who_the_other_is() {
    let pair = pair(C1, A1).await;
    assert_eq!(pair.answered.peer().to_string(), A1);
    assert_eq!(pair.dialled.peer().to_string(), C1);
    assert_eq!((pair.answering.refused(), pair.dialling.refused()), (0, 0));
    pair.dialled.close("enough");
    soon(pair.answered.closed()).await;
    assert_eq!(pair.answered.close_reason().as_deref(), Some("enough"));
}

#[tokio::test]
async fn messages_go_both_ways_on_a_stream() {
    let pair = pair(C1, C2).await;
    let (mut tx, mut rx) = pair.dialled.open_bi(Open::Blob).await.unwrap();
    let request = BlobRequest { hash: crate::blob::hash(b"x"), offset: 7 };
    tx.send(&request).await.unwrap();
    let (open, mut back, mut got) = soon(pair.answered.accept_bi()).await.unwrap();
    assert_eq!(open, Open::Blob);
    assert_eq!(soon(got.expect::<BlobRequest>()).await.unwrap(), request);
    back.send(&BlobAnswer::Missing).await.unwrap();
    assert_eq!(soon(rx.expect::<BlobAnswer>()).await.unwrap(), BlobAnswer::Missing);

    let mut tx = pair.answered.open_uni(Open::Propose).await.unwrap();
    tx.send(&Proposal(vec![1])).await.unwrap();
    finish(&mut tx);
    let (open, mut rx) = soon(pair.dialled.accept_uni()).await.unwrap();
    assert_eq!(open, Open::Propose);
    assert_eq!(soon(rx.next::<Proposal>()).await.unwrap(), Some(Proposal(vec![1])));
    assert!(soon(rx.next::<Proposal>()).await.unwrap().is_none());
    soon(stopped(&mut tx)).await;
}

#[tokio::test]
async fn a_cancelled_stream_is_noticed_on_both_sides() {
    let pair = pair(C1, A1).await;
    let (mut tx, mut rx) = pair.answered.open_bi(Open::Job).await.unwrap();
    tx.flush().await.unwrap();
    let (_, mut back, mut got) = soon(pair.dialled.accept_bi()).await.unwrap();
    stop(&mut rx);
    reset(&mut tx);
    soon(stopped(&mut back)).await;
    assert!(soon(got.next::<BlobRequest>()).await.is_err_and(|error| error.is_lost()));
    assert_eq!(pair.dialling.refused(), 0);
}

#[tokio::test]
async fn a_node_of_another_ca_is_refused_and_counted() {
    let (ours, theirs) = (Pki::new("dev"), Pki::new("dev"));
    let controller = bind(&ours.node(C1));
    // It trusts our CA, but shows a certificate of its own.
    let mut config = ours.node(C2).quic_client().unwrap();
    config.client_auth_cert_resolver = theirs.node(A1).quic_client().unwrap().client_auth_cert_resolver;
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(std::sync::Arc::new(config)));
    if let Ok(conn) = soon(endpoint.connect(controller.local_addr(), "izar.invalid").unwrap()).await {
        soon(conn.closed()).await;
    }
    until_refused(&controller, 1).await;

    // And the other way round, ours does not believe in theirs.
    let stranger = bind(&theirs.node("izar://dev/local/controller/c9"));
    let error = soon(controller.connect(stranger.local_addr(), Role::Controller, None, Profile::Raft)).await;
    assert!(matches!(error, Err(ConnectError::WrongPeer { .. })), "{error:?}");
    assert_eq!(controller.refused(), 2);
}

#[tokio::test]
async fn the_dialler_refuses_another_role_or_node() {
    let pki = Pki::new("dev");
    let (controller, other) = (bind(&pki.node(C1)), bind(&pki.node(C2)));
    let addr = controller.local_addr();
    let name = "c3".parse().unwrap();
    let wrong_node = soon(other.connect(addr, Role::Controller, Some(&name), Profile::Raft)).await.unwrap_err();
    assert!(wrong_node.to_string().contains("the peer is node c1, expected c3"), "{wrong_node}");
    let wrong_role = soon(other.connect(addr, Role::Agent, None, Profile::Raft)).await.unwrap_err();
    assert!(wrong_role.to_string().contains("the peer is controller c1, expected role agent"), "{wrong_role}");
    assert_eq!((other.refused(), controller.refused()), (2, 0));
}

#[tokio::test]
async fn a_peer_with_a_schema_of_its_own_is_told_why_it_is_refused() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let conn = raw(&pki.node(A1), controller.local_addr()).await;
    let welcome = raw_hello(&conn, &Hello { schema_min: 900, schema_max: 901, ..hello() }).await.unwrap();
    let reason = "the peer speaks schemas 900 to 901, this node 1 to 1";
    assert_eq!(welcome, Welcome::Refused { reason: reason.into() });
    let closed = soon(conn.closed()).await;
    assert!(closed.to_string().contains(reason), "{closed}");
    assert_eq!(controller.refused(), 1);
}

#[tokio::test]
async fn a_refusal_reaches_the_dialling_side_with_its_reason() {
    let pki = Pki::new("dev");
    let (first, second) = (bind(&pki.node(A1)), bind(&pki.node("izar://dev/local/agent/a2")));
    let error = soon(second.connect(first.local_addr(), Role::Agent, None, Profile::Raft)).await.unwrap_err();
    assert!(matches!(&error, ConnectError::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("agents do not talk to agents"), "{error}");
    assert_eq!((first.refused(), second.refused()), (1, 0));
}

#[tokio::test]
async fn an_oversized_hello_is_refused() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let conn = raw(&pki.node(A1), controller.local_addr()).await;
    let (mut tx, rx) = conn.open_bi().await.unwrap();
    let mut frame = wire::to_bytes(&hello());
    frame[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    tx.write_all(&frame).await.unwrap();
    let answer = soon(Receiver::new(rx).expect::<Welcome>()).await.unwrap();
    assert!(matches!(answer, Welcome::Refused { reason } if reason.contains("the limit of this type is 1024")));
    until_refused(&controller, 1).await;
}

#[tokio::test]
async fn an_oversized_frame_on_a_stream_closes_the_connection() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let raw = raw(&pki.node(A1), controller.local_addr()).await;
    raw_hello(&raw, &hello()).await.unwrap();
    let conn = soon(controller.accept()).await.unwrap();
    // As the first frame.
    let (mut tx, _rx) = raw.open_bi().await.unwrap();
    let mut frame = wire::to_bytes(&Open::Session);
    frame[8..12].copy_from_slice(&4096u32.to_be_bytes());
    tx.write_all(&frame).await.unwrap();
    assert!(matches!(soon(conn.accept_bi()).await, Err(Error::Violation(_))));
    assert!(soon(raw.closed()).await.to_string().contains("the limit of this type is 16"));
    assert_eq!(controller.refused(), 1);
}

#[tokio::test]
async fn an_oversized_frame_later_closes_the_connection_too() {
    let pair = pair(C1, A1).await;
    let (mut tx, _rx) = pair.dialled.open_bi(Open::Session).await.unwrap();
    let mut frame = wire::to_bytes(&BlobAnswer::Missing);
    frame[8..12].copy_from_slice(&4096u32.to_be_bytes());
    tx.get_mut().write_all(&frame).await.unwrap();
    let (_, _back, mut rx) = soon(pair.answered.accept_bi()).await.unwrap();
    let error = soon(rx.next::<BlobAnswer>()).await.unwrap_err();
    pair.answered.refuse_frame(&error);
    soon(pair.dialled.closed()).await;
    assert!(pair.dialled.close_reason().unwrap().contains("the limit of this type is 64"));
    assert_eq!(pair.answering.refused(), 1);
}

#[tokio::test]
async fn an_agent_that_speaks_raft_is_cut_off() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let raw = raw(&pki.node(A1), controller.local_addr()).await;
    raw_hello(&raw, &hello()).await.unwrap();
    let conn = soon(controller.accept()).await.unwrap();
    assert!(matches!(conn.open_uni(Open::RaftBulk).await, Err(Error::Forbidden(Open::RaftBulk))));
    let mut tx = Sender::new(raw.open_uni().await.unwrap());
    tx.send(&Open::RaftUrgent).await.unwrap();
    assert!(matches!(soon(conn.accept_uni()).await, Err(Error::Violation(_))));
    assert!(soon(raw.closed()).await.to_string().contains("agent may not open a RaftUrgent stream here"));
    assert_eq!(controller.refused(), 1);
}

#[tokio::test]
async fn a_peer_that_never_says_hello_delays_nobody() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let silent = raw(&pki.node(A1), controller.local_addr()).await;
    let agent = bind(&pki.node("izar://dev/local/agent/a2"));
    let dial = agent.connect(controller.local_addr(), Role::Controller, None, Profile::Requests);
    let (dialled, accepted) = soon(async { tokio::join!(dial, controller.accept()) }).await;
    assert_eq!(accepted.unwrap().peer().node.as_str(), "a2");
    dialled.unwrap();
    soon(silent.closed()).await;
    until_refused(&controller, 1).await;
}

#[tokio::test]
async fn a_stream_whose_first_frame_is_late_delays_no_other() {
    let pki = Pki::new("dev");
    let controller = bind(&pki.node(C1));
    let raw = raw(&pki.node(A1), controller.local_addr()).await;
    raw_hello(&raw, &hello()).await.unwrap();
    let conn = soon(controller.accept()).await.unwrap();
    let frame = wire::to_bytes(&Open::Session);
    let (mut late, _rx) = raw.open_bi().await.unwrap();
    late.write_all(&frame[..5]).await.unwrap();
    let (mut quick, _rx) = raw.open_bi().await.unwrap();
    quick.write_all(&wire::to_bytes(&Open::Blob)).await.unwrap();
    assert_eq!(soon(conn.accept_bi()).await.unwrap().0, Open::Blob);
    // An accept that is given up loses no stream.
    assert!(timeout(Duration::from_millis(1), conn.accept_bi()).await.is_err());
    late.write_all(&frame[5..]).await.unwrap();
    assert_eq!(soon(conn.accept_bi()).await.unwrap().0, Open::Session);
}

#[tokio::test]
async fn an_endpoint_that_closes_tells_its_peers_and_accepts_no_more() {
    let pair = pair(C1, A1).await;
    soon(pair.answering.close()).await;
    soon(pair.dialled.closed()).await;
    assert_eq!(pair.dialled.close_reason().as_deref(), Some("shutting down"));
    assert!(soon(pair.answering.accept()).await.is_none());
}

#[tokio::test]
async fn nobody_at_an_address_is_said_in_time() {
    let pki = Pki::new("dev");
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let dial = bind(&pki.node(A1));
    let error = soon(dial.connect(nobody.local_addr().unwrap(), Role::Controller, None, Profile::Raft)).await;
    assert!(matches!(error, Err(ConnectError::Unreachable { .. })), "{error:?}");
}

/// A crash frees the port without a word; what dies here is a runtime with everything that ran in it.
#[test]
fn a_restarted_node_lets_its_peers_know_at_once() {
    let pki = Pki::new("dev");
    let (controller, agent) = (pki.node(C1), pki.node(A1));
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first_life, here) = (runtime(), runtime());
    let answering = first_life.block_on(async { bind(&controller) });
    let addr = answering.local_addr();
    let dialling = here.block_on(async { bind(&agent) });
    let dialled =
        here.block_on(async { soon(dialling.connect(addr, Role::Controller, None, Profile::Raft)).await.unwrap() });
    let answered = first_life.block_on(async { soon(answering.accept()).await.unwrap() });
    // Without its runtime the endpoint cannot say goodbye when it is dropped.
    first_life.shutdown_timeout(LIMIT);
    drop((answered, answering));
    here.block_on(async {
        let began = std::time::Instant::now();
        let _second_life = soon(async {
            loop {
                match Endpoint::bind(addr, &controller) {
                    Ok(endpoint) => break endpoint,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        soon(dialled.closed()).await;
        assert!(began.elapsed() < Duration::from_secs(2), "sooner than the idle time: {:?}", began.elapsed());
        assert!(dialled.close_reason().unwrap().contains("reset"), "{:?}", dialled.close_reason());
    });
}
