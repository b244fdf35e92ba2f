//! A client of the API for `chat`, `dev` and `bench`: connections over TLS or plain TCP, and one request on hyper.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

/// Connecting and the TLS handshake together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A byte stream: TCP, or TLS over it.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Where an API is served.
#[derive(Clone)]
pub struct Endpoint {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl Endpoint {
    /// Understands `https://host:port` (which needs the CA's file) and `http://host:port`; a trailing `/v1` is dropped.
    pub fn new(url: &str, ca: Option<&Path>) -> anyhow::Result<Self> {
        let (secure, host, port) = parse(url)?;
        let tls = match (secure, ca) {
            (false, _) => None,
            (true, Some(ca)) => Some((connector(ca)?, ServerName::try_from(host.clone()).context("the host's name")?)),
            (true, None) => bail!("{url}: the CA's file is needed for https (--ca)"),
        };
        Ok(Self { host, port, tls })
    }

    /// What stands in the `host` header.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub async fn connect(&self) -> anyhow::Result<Box<dyn Io>> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.dial())
            .await
            .map_err(|_| anyhow!("{} did not answer within {} s", self.authority(), CONNECT_TIMEOUT.as_secs()))?
    }

    async fn dial(&self) -> anyhow::Result<Box<dyn Io>> {
        let name = || format!("connect to {}", self.authority());
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await.with_context(name)?;
        tcp.set_nodelay(true).context("switch off Nagle's algorithm")?;
        Ok(match &self.tls {
            None => Box::new(tcp),
            Some((connector, name)) => {
                let stream = connector.connect(name.clone(), tcp).await;
                Box::new(stream.with_context(|| format!("TLS with {}", self.authority()))?)
            }
        })
    }

    /// Sends one request on a connection of its own, which ends with the answer's body.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Vec<u8>,
    ) -> anyhow::Result<Response<Incoming>> {
        self.send_after(None, method, path, key, body).await
    }

    /// Like `send`, to go on after an event of a stream that broke off.
    pub async fn send_after(
        &self,
        event: Option<&str>,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Vec<u8>,
    ) -> anyhow::Result<Response<Incoming>> {
        let stream = TokioIo::new(self.connect().await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.context("speak HTTP")?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.authority())
            .header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if let Some(event) = event {
            request = request.header("last-event-id", event);
        }
        let request = request.body(Full::new(Bytes::from(body))).context("build the request")?;
        sender.send_request(request).await.with_context(|| format!("ask {}", self.authority()))
    }
}

fn connector(ca: &Path) -> anyhow::Result<TlsConnector> {
    let mut config = ClientConfig::clone(&*izar_common::tls::https_client(ca)?);
    // These clients speak HTTP/1.1 alone.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Splits a URL into (TLS?, host, port).
fn parse(url: &str) -> anyhow::Result<(bool, String, u16)> {
    let (secure, rest) = if let Some(rest) = url.strip_prefix("https://") {
        (true, rest)
    } else if let Some(rest) = url.strip_prefix("http://") {
        (false, rest)
    } else {
        bail!("`{url}` is not an endpoint: it begins with https:// or http://");
    };
    let rest = rest.trim_end_matches('/');
    let authority = rest.strip_suffix("/v1").unwrap_or(rest);
    ensure!(!authority.contains('/'), "`{url}` is not an endpoint: only /v1 may follow the address");
    let default = if secure { 443 } else { 80 };
    let (host, port) = match authority.strip_prefix('[').and_then(|a| a.split_once(']')) {
        Some((host, "")) => (host, default),
        Some((host, port)) => (host, number(url, port.strip_prefix(':').unwrap_or(port))?),
        None => match authority.split_once(':') {
            Some((host, port)) => (host, number(url, port)?),
            None => (authority, default),
        },
    };
    ensure!(!host.is_empty(), "`{url}` is not an endpoint: it names no host");
    Ok((secure, host.to_owned(), port))
}

fn number(url: &str, port: &str) -> anyhow::Result<u16> {
    port.parse().map_err(|_| anyhow!("`{url}` is not an endpoint: `{port}` is not a port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_understood() {
        for (url, expected) in [
            ("https://127.0.0.1:8443", (true, "127.0.0.1", 8443)),
            ("https://localhost/v1/", (true, "localhost", 443)),
            ("http://[::1]:80/v1", (false, "::1", 80)),
            ("http://host", (false, "host", 80)),
        ] {
            let (secure, host, port) = parse(url).unwrap();
            assert_eq!((secure, host.as_str(), port), expected, "{url}");
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_by_name() {
        for url in ["127.0.0.1:80", "https://", "http://h:99999", "http://h/other", "ftp://h"] {
            let error = parse(url).unwrap_err().to_string();
            assert!(error.contains(url), "{error}");
        }
        assert!(Endpoint::new("https://h", None).err().unwrap().to_string().contains("--ca"));
    }
}
