//! A real listener on port 0 in front of a plain router, driven by raw bytes.

use std::net::Ipv4Addr;
use std::time::Duration;

use axum::Router;
use axum::http::{Method, Response, Uri};
use axum::routing::post;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::memory::Memory;
use super::*;
use crate::gateway::{front, intake};
use crate::metrics::Metrics;

/// Longest any of these tests waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

struct Server {
    address: SocketAddr,
    front: Front,
    acceptor: Arc<Acceptor>,
    draining: watch::Sender<bool>,
    stop: CancellationToken,
}

fn front(limits: Limits) -> Front {
    let (limits, metrics, tasks) = (Arc::new(limits), Arc::new(Metrics::default()), TaskTracker::new());
    let (l, m, t) = (limits.clone(), metrics.clone(), tasks.clone());
    let echo = move |mut body: Body| {
        let (limits, metrics, tasks) = (l.clone(), m.clone(), t.clone());
        async move {
            let _running = metrics.running_requests.hold();
            match intake::read(&mut body, &limits, &Memory::new(1 << 30)).await {
                Ok((bytes, _)) => Response::new(Body::from(bytes)),
                Err(error) => front::refuse(&metrics, &tasks, &error, body),
            }
        }
    };
    let router = Router::new()
        .route("/v1/models", post(echo))
        .fallback(|method: Method, uri: Uri| async move { front::unknown_route(&method, uri.path()) })
        .method_not_allowed_fallback(
            |method: Method, uri: Uri| async move { front::wrong_method(&method, uri.path()) },
        );
    Front { router, limits, metrics, tasks }
}

async fn serve(limits: Limits) -> Server {
    let front = front(limits);
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    let draining = watch::Sender::new(false);
    let acceptor = Acceptor::new(front.clone(), draining.subscribe(), stop.clone(), abort);
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(acceptor.clone().accept(Listener::plain(socket).unwrap().unwrap()));
    Server { address, front, acceptor, draining, stop }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes on a new connection and reads all that comes until the server closes it.
    async fn exchange(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        rest(&mut stream).await
    }
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server closes in time");
    read.unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Reads until `end` has come.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains(end) {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.expect("an answer comes in time");
        let count = read.unwrap();
        assert!(count > 0, "the server closed after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    text
}

fn request(method: &str, path: &str, head: &str, body: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n{body}")
}

#[tokio::test]
async fn every_answer_has_a_request_id_and_errors_have_openais_shape() {
    let server = serve(Limits::default()).await;
    let check = |answer: &str, status: &str, words: &str| {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(answer.contains("x-request-id: turn_"), "{answer}");
        assert!(answer.contains(words), "{answer}");
    };
    let answer = server.exchange(&request("POST", "/v1/models", "content-length: 2\r\n", "hi")).await;
    check(&answer, "200", "\r\n\r\nhi");
    check(&server.exchange(&request("GET", "/nowhere", "", "")).await, "404", r#""code":"unknown_url""#);
    check(&server.exchange(&request("DELETE", "/v1/models", "", "")).await, "405", r#""code":"method_not_supported""#);
    assert_eq!(server.front.metrics.requests.with(&["openai", "/v1/models", "405"]).get(), 1);
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_read() {
    let server = serve(Limits { body_bytes: 10, ..Limits::default() }).await;
    let mut stream = server.connect().await;
    let head = request("POST", "/v1/models", "content-length: 1000000000\r\n", "");
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut stream, "body_too_large").await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("x-request-id: turn_"), "{answer}");
}

#[tokio::test]
async fn a_chunked_body_is_refused_as_soon_as_it_is_too_large() {
    let server = serve(Limits { body_bytes: 10, ..Limits::default() }).await;
    let mut stream = server.connect().await;
    let head = request("POST", "/v1/models", "transfer-encoding: chunked\r\n", "8\r\n12345678\r\n8\r\n12345678\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut stream, "body_too_large").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(server.front.metrics.refused.with(&["body_too_large"]).get(), 1);
}

#[tokio::test]
async fn a_slow_head_is_cut() {
    let server = serve(Limits { header_ms: 30, ..Limits::default() }).await;
    let mut stream = server.connect().await;
    stream.write_all(b"POST /v1/models HTTP/1.1\r\nhost:").await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(!answer.contains("200"), "{answer}");
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_cut() {
    let server = serve(Limits { header_ms: 30, ..Limits::default() }).await;
    assert_eq!(rest(&mut server.connect().await).await, "");
}

#[tokio::test]
async fn a_slow_body_is_cut_with_408() {
    let server = serve(Limits { body_ms: 30, ..Limits::default() }).await;
    let mut stream = server.connect().await;
    stream.write_all(request("POST", "/v1/models", "content-length: 5\r\n", "h").as_bytes()).await.unwrap();
    let answer = until(&mut stream, "body_too_slow").await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test]
async fn a_large_head_is_refused() {
    let server = serve(Limits { header_bytes: 8192, ..Limits::default() }).await;
    let answer =
        server.exchange(&request("POST", "/v1/models", &format!("x-long: {}\r\n", "y".repeat(9000)), "")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once_and_counted() {
    let server = serve(Limits { connections: 1, ..Limits::default() }).await;
    let mut first = server.connect().await;
    first.write_all(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
    until(&mut first, "hi").await;
    assert_eq!(rest(&mut server.connect().await).await, "");
    assert_eq!(server.front.metrics.refused.with(&["connections"]).get(), 1);
    assert_eq!(server.front.metrics.connections.get(), 1);
}

#[tokio::test]
async fn stopping_closes_idle_connections_and_lets_running_requests_end() {
    let server = serve(Limits::default()).await;
    let mut idle = server.connect().await;
    idle.write_all(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
    until(&mut idle, "hi").await;
    let mut running = server.connect().await;
    running.write_all(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nh").await.unwrap();
    let began = Instant::now();
    while server.front.metrics.running_requests.get() < 1 {
        assert!(began.elapsed() < PATIENCE, "the request never began");
        tokio::task::yield_now().await;
    }
    server.stop.cancel();
    assert_eq!(rest(&mut idle).await, "");
    running.write_all(b"i").await.unwrap();
    assert!(rest(&mut running).await.ends_with("hi"));
    tokio::time::timeout(PATIENCE, server.acceptor.ended()).await.expect("every connection has ended");
}

#[tokio::test]
async fn a_drain_serves_on_and_ends_each_connection_with_its_next_answer() {
    let server = serve(Limits::default()).await;
    let ask = b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi";
    let (mut held, mut kept) = (server.connect().await, server.connect().await);
    for stream in [&mut held, &mut kept] {
        stream.write_all(ask).await.unwrap();
        let answer = until(stream, "hi").await;
        assert!(!answer.contains("connection: close"), "{answer}");
    }
    server.draining.send_replace(true);
    held.write_all(ask).await.unwrap();
    let answer = rest(&mut held).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    let answer = server.exchange("POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hi"), "a new one is served, too: {answer}");
    server.draining.send_replace(false);
    kept.write_all(ask).await.unwrap();
    assert!(!until(&mut kept, "hi").await.contains("connection: close"), "it may stay after all");
}

#[tokio::test]
async fn an_http2_connection_is_told_of_a_drain_at_once() {
    let server = serve(Limits::default()).await;
    let (mut ours, theirs) = tokio::io::duplex(1 << 16);
    let acceptor = server.acceptor.clone();
    let serving = tokio::spawn(async move { acceptor.serve(theirs, true).await });
    // The preface and empty settings.
    ours.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let frame = async |ours: &mut tokio::io::DuplexStream| {
        let mut head = [0; 9];
        ours.read_exact(&mut head).await.unwrap();
        let mut body = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        ours.read_exact(&mut body).await.unwrap();
        head[3]
    };
    const SETTINGS: u8 = 4;
    const GO_AWAY: u8 = 7;
    assert_eq!(frame(&mut ours).await, SETTINGS);
    server.draining.send_replace(true);
    let told = async { while frame(&mut ours).await != GO_AWAY {} };
    tokio::time::timeout(PATIENCE, told).await.expect("the client is told");
    drop(ours);
    tokio::time::timeout(PATIENCE, serving).await.expect("the connection ends").unwrap();
}

#[tokio::test]
async fn a_plain_listener_is_refused_where_others_can_reach_it() {
    let socket = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    assert_eq!(Listener::plain(socket).unwrap().err(), Some(NotLoopback(address)));
}
