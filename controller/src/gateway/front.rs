//! What happens around every request, whatever it asks: its id, the limit of its body, its count and its time.
//!
//! Knows routes only as labels. A plain axum router stands behind it, so that it is tested without a cluster.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Method, Request, Response};
use hyper::body::Body as _;
use izar_common::clock::wall_ms;
use izar_common::id::TurnId;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::error::Error;
use super::intake;
use super::limits::Limits;
use super::openai;
use super::urgency::Urgency;
use crate::metrics::Metrics;

/// The id of a request, on its answer. For a request that is recorded, the turn's.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What handlers find in the extensions of a request.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub turn: TurnId,
    pub at: Instant,
    pub label: Label,
    /// As urgent as any, until its headers are read.
    pub urgency: Urgency,
}

/// What handlers put into the extensions of an answer whose end they observe themselves.
#[derive(Debug, Clone, Copy)]
pub struct Streamed;

/// How a path is counted: never by what a client made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    pub dialect: &'static str,
    pub route: &'static str,
}

/// Every route that exists, as it is counted.
fn label(path: &str) -> Label {
    let (dialect, route) = match path {
        "/v1/chat/completions" => ("openai", "/v1/chat/completions"),
        "/v1/completions" => ("openai", "/v1/completions"),
        "/v1/models" => ("openai", "/v1/models"),
        path if path.starts_with("/v1/models/") => ("openai", "/v1/models/{id}"),
        path if path.starts_with("/v1/streams/") => ("openai", "/v1/streams/{id}"),
        path if path.starts_with("/v1/") => ("openai", "other"),
        "/healthz" => ("none", "/healthz"),
        "/readyz" => ("none", "/readyz"),
        "/metrics" => ("none", "/metrics"),
        _ => ("none", "other"),
    };
    Label { dialect, route }
}

/// Stands between the listener and the router.
#[derive(Clone)]
pub struct Front {
    pub router: Router,
    pub limits: Arc<Limits>,
    pub metrics: Arc<Metrics>,
    /// Work that goes on after its answer.
    pub tasks: TaskTracker,
}

impl Front {
    /// Answers one request.
    pub async fn handle(&self, mut request: Request<Body>) -> Response<Body> {
        let (turn, label) = (TurnId::random(wall_ms()), label(request.uri().path()));
        let arrival = Arrival { turn, at: Instant::now(), label, urgency: Urgency::default() };
        let mut response = match intake::check_length(request.headers(), &self.limits) {
            Ok(()) => {
                request.extensions_mut().insert(arrival);
                let answered: Result<_, Infallible> = self.router.clone().call(request).await;
                answered.unwrap_or_else(|never| match never {})
            }
            Err(error) => refuse(&self.metrics, &self.tasks, &error, request.into_body()),
        };
        let id = HeaderValue::try_from(arrival.turn.to_string()).expect("a turn id is plain ASCII");
        // A stream that goes on keeps the id that it began with.
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
        let Label { dialect, route } = arrival.label;
        self.metrics.requests.with(&[dialect, route, response.status().as_str()]).add(1);
        if response.extensions().get::<Streamed>().is_none() {
            self.metrics.request_seconds.with(&[dialect, route]).observe(arrival.at.elapsed());
        }
        response
    }
}

/// Answers with an error to a request whose body may not have been read to its end.
///
/// Lets a client that still sends go on for a moment, so that it gets to read the answer.
pub fn refuse(metrics: &Metrics, tasks: &TaskTracker, error: &Error, rest: Body) -> Response<Body> {
    if !matches!(error, Error::Interrupted { .. } | Error::Failed { .. }) {
        metrics.refused.with(&[error.row().code]).add(1);
    }
    if !rest.is_end_stream() {
        tasks.spawn(intake::linger(rest));
    }
    openai::error::response(error)
}

/// Answers a path that does not exist.
pub fn unknown_route(method: &Method, path: &str) -> Response<Body> {
    openai::error::response(&Error::UnknownRoute { method: method.to_string(), path: shorten(path) })
}

/// Answers a method that a path does not take.
pub fn wrong_method(method: &Method, path: &str) -> Response<Body> {
    openai::error::response(&Error::WrongMethod { method: method.to_string(), path: shorten(path) })
}

fn shorten(path: &str) -> String {
    path.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_never_holds_what_a_client_made_up() {
        assert_eq!(label("/v1/models/whatever").route, "/v1/models/{id}");
        assert_eq!(label("/v1/streams/whatever").route, "/v1/streams/{id}");
        assert_eq!(label("/v1/secret-thing"), Label { dialect: "openai", route: "other" });
        assert_eq!(label("/wp-admin.php"), Label { dialect: "none", route: "other" });
    }
}
