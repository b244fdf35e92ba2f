//! From sockets to requests: HTTPS with HTTP/1.1 and HTTP/2, and plain HTTP/1.1 for programs on this machine.
//!
//! All that a stranger can cost before it is known is bounded here: connections, handshakes, slow heads, idle
//! connections, and clients that take nothing. Speaking TLS 1.2 is left to no setting: the configuration that comes
//! in has 1.3 alone.
//!
//! While the controller drains, clients are told to move on: an HTTP/1.1 connection ends with its next answer, an HTTP/2
//! connection is told at once that it takes no more, which no request can cross.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Request, header};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::front::Front;
use super::limits::Limits;

/// Pause after the system could not give us a connection (out of files, mostly), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often an HTTP/2 client is asked whether it is there, and how long it may take to answer.
const PING: Duration = Duration::from_secs(20);

/// A plain listener was given an address that others can reach.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a loopback address; plain HTTP is only for programs on this machine")]
pub struct NotLoopback(pub SocketAddr);

/// A listening socket and what is spoken on it.
pub enum Listener {
    Https(TcpListener, TlsAcceptor),
    Plain(TcpListener),
}

impl Listener {
    pub fn https(socket: TcpListener, config: Arc<ServerConfig>) -> Self {
        Self::Https(socket, TlsAcceptor::from(config))
    }

    /// Takes a socket for plain HTTP, if only this machine can reach it.
    pub fn plain(socket: TcpListener) -> std::io::Result<Result<Self, NotLoopback>> {
        let address = socket.local_addr()?;
        Ok(if address.ip().is_loopback() { Ok(Self::Plain(socket)) } else { Err(NotLoopback(address)) })
    }

    fn socket(&self) -> &TcpListener {
        match self {
            Self::Https(socket, _) | Self::Plain(socket) => socket,
        }
    }
}

/// Accepts connections and serves them. One for all listeners of a gateway: the bounds are common.
pub struct Acceptor {
    front: Arc<Front>,
    builder: auto::Builder<TokioExecutor>,
    connections: Arc<Semaphore>,
    handshakes: Semaphore,
    tasks: TaskTracker,
    /// Clients shall move on.
    draining: watch::Receiver<bool>,
    /// No new requests: connections end after the running ones.
    stop: CancellationToken,
    /// Connections end at once.
    abort: CancellationToken,
}

impl Acceptor {
    pub fn new(
        front: Front,
        draining: watch::Receiver<bool>,
        stop: CancellationToken,
        abort: CancellationToken,
    ) -> Arc<Self> {
        let limits = &front.limits;
        Arc::new(Self {
            builder: builder(limits),
            connections: Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS))),
            handshakes: Semaphore::new(limits.handshakes.min(Semaphore::MAX_PERMITS)),
            front: Arc::new(front),
            tasks: TaskTracker::new(),
            draining,
            stop,
            abort,
        })
    }

    /// Accepts until `stop`. Connections go on in tasks of their own; `ended` waits for them.
    pub async fn accept(self: Arc<Self>, listener: Listener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.socket().accept() => accepted,
                () = self.stop.cancelled() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    log::warn!(error:%; "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = self.connections.clone().try_acquire_owned() else {
                self.front.metrics.refused.with(&["connections"]).add(1);
                continue;
            };
            let acceptor = self.clone();
            match &listener {
                Listener::Https(_, tls) => {
                    let tls = tls.clone();
                    self.tasks.spawn(async move { acceptor.https(stream, tls, place).await });
                }
                Listener::Plain(_) => {
                    self.tasks.spawn(async move { acceptor.plain(stream, place).await });
                }
            }
        }
    }

    /// Waits until every connection has ended.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn https(&self, stream: TcpStream, tls: TlsAcceptor, _place: OwnedSemaphorePermit) {
        let _open = self.front.metrics.connections.hold();
        let handshake = async {
            let _turn = self.handshakes.acquire().await.expect("the semaphore is never closed");
            tls.accept(Paced::new(stream, self.front.limits.write_stall())?).await
        };
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(self.front.limits.handshake(), handshake) => shaken,
            () = self.stop.cancelled() => return,
        };
        let stream = match shaken {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                log::debug!(error:%; "a TLS handshake failed");
                return self.front.metrics.refused.with(&["handshake"]).add(1);
            }
            Err(_) => return self.front.metrics.refused.with(&["handshake_timeout"]).add(1),
        };
        // What the client chose, so that no guessing from its first bytes is left to stall.
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        self.serve(stream, http2).await;
    }

    async fn plain(&self, stream: TcpStream, _place: OwnedSemaphorePermit) {
        let _open = self.front.metrics.connections.hold();
        if let Ok(stream) = Paced::new(stream, self.front.limits.write_stall()) {
            self.serve(stream, false).await;
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, http2: bool) {
        let active = Arc::new(AtomicUsize::new(0));
        let service = {
            let (front, active, draining) = (self.front.clone(), active.clone(), self.draining.clone());
            service_fn(move |request: Request<Incoming>| {
                let (front, active, draining) = (front.clone(), Active::new(&active), draining.clone());
                async move {
                    let mut response = front.handle(request.map(Body::new)).await;
                    if !http2 && *draining.borrow() {
                        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    }
                    Ok::<_, std::convert::Infallible>(response.map(|body| Answer { body, _active: active }))
                }
            })
        };
        let builder = self.builder.clone();
        let builder = if http2 { builder.http2_only() } else { builder.http1_only() };
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut draining = self.draining.clone();
        let mut moving = pin!(async move { draining.wait_for(|draining| *draining).await.is_ok() });
        let (mut stop, mut abort) = (pin!(self.stop.cancelled()), pin!(self.abort.cancelled()));
        let mut idle = pin!(tokio::time::sleep(self.front.limits.idle()));
        let (mut stopping, mut unused) = (false, false);
        loop {
            tokio::select! {
                biased;
                // Errors are the client's: it left, sent nonsense, or was too slow. They are counted by nobody else.
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        log::debug!(error:%; "a connection ended early");
                    }
                    return;
                }
                _ = &mut moving, if http2 && !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut stop, if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut abort => return,
                // HTTP/1.1 has its own limit for idle connections: the time for the next head.
                () = &mut idle, if http2 && !stopping => {
                    if unused && active.load(Relaxed) == 0 {
                        stopping = true;
                        connection.as_mut().graceful_shutdown();
                    }
                    unused = active.load(Relaxed) == 0;
                    idle.as_mut().reset(Instant::now() + self.front.limits.idle());
                }
            }
        }
    }
}

fn builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header()).max_buf_size(limits.header_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.http2_streams)
        .max_header_list_size(limits.header_bytes as u32)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    builder
}

/// Counts a request of a connection from its head to the end of its answer.
#[derive(Debug)]
struct Active(Arc<AtomicUsize>);

impl Active {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The body of an answer, which keeps its connection from counting as idle.
struct Answer {
    body: Body,
    _active: Active,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A TCP stream that fails when its peer takes nothing for too long while something waits to be sent.
#[derive(Debug)]
struct Paced {
    stream: TcpStream,
    stall: Duration,
    /// Runs while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Paced {
    fn new(stream: TcpStream, stall: Duration) -> std::io::Result<Self> {
        // Tokens are small and must not wait for each other.
        stream.set_nodelay(true)?;
        Ok(Self { stream, stall, deadline: None })
    }

    fn pace<T>(&mut self, cx: &mut Context<'_>, written: Poll<std::io::Result<T>>) -> Poll<std::io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let stall = self.stall;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Paced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.pace(cx, written)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.pace(cx, written)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
