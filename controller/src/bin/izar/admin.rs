//! The client of the admin socket: one request, one JSON answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Where a controller that systemd started listens.
pub const DEFAULT_SOCKET: &str = "/run/izar/admin.sock";

/// The longest wait for an answer: a controller gives up on its quorum sooner.
const TIMEOUT: Duration = Duration::from_secs(30);

/// An import reads and copies a whole model; an hour is a terabyte at 280 MB/s.
pub const IMPORT_TIMEOUT: Duration = Duration::from_secs(3600);

/// The largest answer taken: 10,000 turns are about 4 MiB.
const ANSWER_LIMIT: usize = 64 << 20;

/// What drives a connection until it ends.
type Driver = tokio::task::JoinHandle<hyper::Result<()>>;

/// A controller's admin socket.
#[derive(Debug, Clone)]
pub struct Admin {
    socket: PathBuf,
}

impl Admin {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None, TIMEOUT).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::DELETE, path, None, TIMEOUT).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.post_within(path, body, TIMEOUT).await
    }

    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let body = serde_json::to_vec(body).context("write the request")?;
        self.call(Method::PUT, path, Some(body), TIMEOUT).await
    }

    /// Like `post`, for what may take long.
    pub async fn post_within<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> anyhow::Result<T> {
        let body = serde_json::to_vec(body).context("write the request")?;
        self.call(Method::POST, path, Some(body), limit).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> anyhow::Result<T> {
        let listing = method == Method::GET;
        let exchange = self.exchange(method, path, body);
        let (status, bytes) = tokio::time::timeout(limit, exchange)
            .await
            .map_err(|_| anyhow!("the controller did not answer within {} s", limit.as_secs()))??;
        if !status.is_success() {
            let hint = if status == StatusCode::SERVICE_UNAVAILABLE && listing {
                "; see what this node knows with --stale"
            } else {
                ""
            };
            bail!("{}{hint}", refusal(status.as_u16(), &bytes));
        }
        serde_json::from_slice(&bytes).with_context(|| format!("understand the controller's answer to {path}"))
    }

    /// Asks for what comes as a stream; the controller must have it, and begin within the usual time.
    pub async fn open(&self, path: &str) -> anyhow::Result<Incoming> {
        let (response, driver) = tokio::time::timeout(TIMEOUT, self.send(Method::GET, path, None))
            .await
            .map_err(|_| anyhow!("the controller did not answer within {} s", TIMEOUT.as_secs()))??;
        // It ends with the body.
        drop(driver);
        let status = response.status();
        if !status.is_success() {
            let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
            let body = body.map_err(|e| anyhow!("read the controller's answer: {e}"))?.to_bytes();
            bail!("{}", refusal(status.as_u16(), &body));
        }
        Ok(response.into_body())
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> anyhow::Result<(StatusCode, Bytes)> {
        let (response, driver) = self.send(method, path, body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
        driver.abort();
        Ok((status, body.map_err(|e| anyhow!("read the controller's answer: {e}"))?.to_bytes()))
    }

    /// Sends a request; the task drives the connection.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<(Response<Incoming>, Driver)> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("connect to the admin socket {} (see --socket)", self.socket.display()))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("speak HTTP")?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "izar")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .context("build the request")?;
        let response = sender.send_request(request).await.context("ask the controller")?;
        Ok((response, driver))
    }
}

/// What a refusal says to a person.
fn refusal(status: u16, body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Body {
        error: String,
    }
    match serde_json::from_slice::<Body>(body) {
        Ok(body) => body.error,
        Err(_) => format!("the controller answered with status {status}"),
    }
}

/// Escapes what stands in a path or a query.
pub fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => out.push(char::from(b)),
            _ => out.push_str(&format!("%{b:02X}")),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_shown_in_the_controllers_words() {
        assert_eq!(refusal(404, br#"{"error":"there is no key k"}"#), "there is no key k");
        assert_eq!(refusal(500, b"oops"), "the controller answered with status 500");
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escape("key-1.a_b"), "key-1.a_b");
        assert_eq!(escape("a/b ?é"), "a%2Fb%20%3F%C3%A9");
    }
}
