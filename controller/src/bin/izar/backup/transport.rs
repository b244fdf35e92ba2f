//! How a store is spoken to: HTTP/1.1 over the TLS that everything here uses, one connection for each request, no wait
//! without an end.
//!
//! The store's library would bring an HTTP client and a second TLS provider of its own. It signs requests and reads
//! answers; this only carries them, and decides nothing but whether a failure is worth another try.

use std::pin::Pin;
use std::time::Duration;

use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use tokio::time::timeout;

use crate::http::Endpoint;

/// A part of the largest size at 1 MB/s, and the store's own time for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);
/// The longest silence in the middle of an answer.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);

/// What went wrong on the way, in words for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

fn failed(kind: HttpErrorKind, said: String) -> HttpError {
    HttpError::new(kind, Failure(said))
}

/// Carries requests to one endpoint.
#[derive(Clone)]
pub struct Transport(pub Endpoint);

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Transport({})", self.0.authority())
    }
}

impl HttpConnector for Transport {
    fn connect(&self, _: &object_store::ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Transport {
    // What the library's `async fn` in a trait is without its macro.
    fn call<'s, 'a>(&'s self, request: HttpRequest) -> Answer<'a>
    where
        's: 'a,
        Self: 'a,
    {
        Box::pin(self.exchange(request))
    }
}

impl Transport {
    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let name = self.0.authority();
        let unreachable = |error: anyhow::Error| failed(HttpErrorKind::Connect, format!("{error:#}"));
        let stream = TokioIo::new(self.0.connect().await.map_err(unreachable)?);
        let broke_off = |error: hyper::Error| failed(HttpErrorKind::Interrupted, format!("{name} broke off: {error}"));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.map_err(broke_off)?;
        // It ends with the answer's body.
        tokio::spawn(connection);
        let (mut parts, body) = request.into_parts();
        // The name that was signed.
        parts.headers.insert(HOST, host(&parts.uri)?);
        parts.uri = parts.uri.path_and_query().map_or_else(Uri::default, |path| path.clone().into());
        let answer = timeout(ANSWER_TIMEOUT, sender.send_request(Request::from_parts(parts, body))).await;
        let silent = || failed(HttpErrorKind::Timeout, format!("{name} did not answer within {ANSWER_TIMEOUT:?}"));
        let (parts, body) = answer.map_err(|_| silent())?.map_err(broke_off)?.into_parts();
        let pieces = stream::unfold(body, next);
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(StreamBody::new(pieces))))
    }
}

type Frame = hyper::body::Frame<hyper::body::Bytes>;

async fn next(mut body: Incoming) -> Option<(Result<Frame, HttpError>, Incoming)> {
    let frame = match timeout(PIECE_TIMEOUT, body.frame()).await {
        Ok(frame) => frame?.map_err(|error| failed(HttpErrorKind::Interrupted, format!("it broke off: {error}"))),
        Err(_) => Err(failed(HttpErrorKind::Timeout, format!("it is silent for {PIECE_TIMEOUT:?}"))),
    };
    Some((frame, body))
}

/// What stands in the `host` header, and in the signature: the port only where it is not the usual one.
fn host(uri: &Uri) -> Result<HeaderValue, HttpError> {
    let usual = match uri.scheme_str() {
        Some("http") => 80,
        _ => 443,
    };
    let host = uri.host().unwrap_or_default();
    let text = match uri.port_u16() {
        Some(port) if port != usual => format!("{host}:{port}"),
        _ => host.to_owned(),
    };
    HeaderValue::from_str(&text).map_err(|_| failed(HttpErrorKind::Unknown, format!("`{text}` is no host")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_named_as_it_was_signed() {
        for (uri, expected) in [
            ("https://s3.example:443/b/k?uploads", "s3.example"),
            ("http://127.0.0.1:80/b", "127.0.0.1"),
            ("http://127.0.0.1:9000/b", "127.0.0.1:9000"),
            ("https://[::1]:80/b", "[::1]:80"),
        ] {
            assert_eq!(host(&uri.parse().unwrap()).unwrap(), expected);
        }
    }
}
