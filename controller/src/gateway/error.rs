//! Everything that a user can be told went wrong, and the one table from it to a status.
//!
//! Dialects differ in how they write an error, never in which status it has. A message names the thing and holds no
//! prompt, answer or key of anybody else.

use axum::http::StatusCode;
use izar_common::chat::Class;
use izar_common::id::TurnId;

use crate::scheduler::NoPlace;
use crate::state::command::Refusal;

/// Most names of models that a message lists.
const LISTED: usize = 50;

/// Why a request is refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no API key was given; send `Authorization: Bearer <key>`")]
    NoKey,
    #[error("the API key is wrong or revoked")]
    WrongKey,
    /// `field` is the path of the field that is wrong, if one is.
    #[error("{message}")]
    Invalid { field: Option<String>, message: String },
    #[error("`{field}` is not supported yet{}", if detail.is_empty() { String::new() } else { format!(": {detail}") })]
    Unsupported { field: String, detail: String },
    #[error(
        "this model's context is {context} tokens; the prompt has {prompt} and max_tokens is {max_tokens}, \
         together {}", max_tokens.saturating_add(u64::from(*prompt))
    )]
    ContextTooShort { context: u32, prompt: u32, max_tokens: u64 },
    #[error("there is no model `{name}`; {}", list(models))]
    UnknownModel { name: String, models: Vec<String> },
    #[error("there is no {method} {path}")]
    UnknownRoute { method: String, path: String },
    #[error("{path} does not take {method}")]
    WrongMethod { method: String, path: String },
    #[error("the body did not arrive within {limit_ms} ms")]
    SlowBody { limit_ms: u64 },
    #[error("the body is larger than {limit} bytes")]
    LargeBody { limit: usize },
    #[error("{limit} requests of this key run already, which is its limit")]
    TooManyRequests { limit: u32 },
    #[error("{reason}; try again a little later")]
    ReplicasFull { reason: String },
    #[error("{reason}; try again in {retry_after_s} s")]
    QueueFull { reason: String, retry_after_s: u32 },
    #[error(
        "the whole answer would take about {expected_ms} ms, longer than the deadline allows; ask again in \
         {retry_after_s} s, or with a later deadline"
    )]
    DeadlineUnreachable { expected_ms: u64, retry_after_s: u32 },
    #[error("X-Izar-Class: requests of this project are of class {most} at most; `{asked}` is more urgent")]
    ClassNotAllowed { asked: Class, most: Class },
    #[error("this server runs as many requests as it may")]
    Overloaded,
    #[error("{reason}")]
    NoReplica { reason: String },
    #[error("the request cannot be recorded: {reason}")]
    Unavailable { reason: String },
    #[error(
        "the event id names no stream that can go on here: it is unknown, too old, of another key, or the request is \
         not the one that was begun; ask anew without it"
    )]
    UnknownStream,
    #[error(
        "the stream cannot go on from its event id alone: {reason}; repeat the POST that began it, with the same body \
         and the id as Last-Event-ID"
    )]
    NoRequest { reason: &'static str },
    #[error("the first request with this Idempotency-Key still runs, and its answer cannot be read here; ask again")]
    InProgress,
    /// Of `turn`; who can, goes on with it.
    #[error("a request with this Idempotency-Key was begun already as {turn}; ask again")]
    Repeats { turn: TurnId },
    #[error("this Idempotency-Key was used for another request; a key belongs to one route and body")]
    OtherRequest,
    #[error("the first answer to this Idempotency-Key cannot be given again: {reason}; ask with another key")]
    AnswerLost { reason: String },
    /// The answer broke off, and the same request may succeed.
    #[error("the answer was interrupted: {reason}")]
    Interrupted { reason: String },
    #[error("the server is stopping")]
    Stopping,
    /// The model, or we, cannot do this; trying again will not help.
    #[error("the request failed: {reason}")]
    Failed { reason: String },
}

fn list(models: &[String]) -> String {
    match models.len() {
        0 => "no model is deployed".to_owned(),
        n if n > LISTED => format!("{n} are served, among them: {}", models[..LISTED].join(", ")),
        _ => format!("there are: {}", models.join(", ")),
    }
}

/// How an error looks from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: &'static str,
    /// Seconds after which trying again makes sense; `None` where it does not.
    pub retry_after_s: Option<u32>,
}

const REQUEST: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl Error {
    /// Makes an error about one field.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field.into()), message: message.into() }
    }

    /// The table.
    pub fn row(&self) -> Row {
        let row = |status, kind, code, retry_after_s| Row { status, kind, code, retry_after_s };
        match self {
            Error::NoKey => row(StatusCode::UNAUTHORIZED, REQUEST, "missing_api_key", None),
            Error::WrongKey => row(StatusCode::UNAUTHORIZED, REQUEST, "invalid_api_key", None),
            Error::Invalid { .. } => row(StatusCode::BAD_REQUEST, REQUEST, "invalid_value", None),
            Error::Unsupported { .. } => row(StatusCode::BAD_REQUEST, REQUEST, "unsupported_parameter", None),
            Error::ContextTooShort { .. } => row(StatusCode::BAD_REQUEST, REQUEST, "context_length_exceeded", None),
            Error::UnknownModel { .. } => row(StatusCode::NOT_FOUND, REQUEST, "model_not_found", None),
            Error::UnknownRoute { .. } => row(StatusCode::NOT_FOUND, REQUEST, "unknown_url", None),
            Error::WrongMethod { .. } => row(StatusCode::METHOD_NOT_ALLOWED, REQUEST, "method_not_supported", None),
            Error::SlowBody { .. } => row(StatusCode::REQUEST_TIMEOUT, REQUEST, "body_too_slow", None),
            Error::LargeBody { .. } => row(StatusCode::PAYLOAD_TOO_LARGE, REQUEST, "body_too_large", None),
            Error::TooManyRequests { .. } => {
                row(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded", Some(1))
            }
            Error::ReplicasFull { .. } => {
                row(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "replicas_full", Some(1))
            }
            Error::QueueFull { retry_after_s, .. } => {
                row(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", Some(*retry_after_s))
            }
            Error::DeadlineUnreachable { retry_after_s, .. } => {
                row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "deadline_unreachable", Some(*retry_after_s))
            }
            Error::ClassNotAllowed { .. } => row(StatusCode::FORBIDDEN, REQUEST, "class_not_allowed", None),
            Error::Overloaded => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "overloaded", Some(1)),
            // A worker that was started again needs a few seconds for its model.
            Error::NoReplica { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "no_replica_ready", Some(2)),
            // An election is over within a second.
            Error::Unavailable { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "unavailable", Some(1)),
            Error::UnknownStream => row(StatusCode::CONFLICT, REQUEST, "unknown_stream", None),
            Error::NoRequest { .. } => row(StatusCode::CONFLICT, REQUEST, "unknown_stream", None),
            Error::InProgress | Error::Repeats { .. } => {
                row(StatusCode::CONFLICT, REQUEST, "idempotency_in_progress", Some(1))
            }
            Error::OtherRequest => row(StatusCode::UNPROCESSABLE_ENTITY, REQUEST, "idempotency_mismatch", None),
            Error::AnswerLost { .. } => row(StatusCode::CONFLICT, REQUEST, "idempotency_lost", None),
            Error::Interrupted { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "interrupted", Some(1)),
            Error::Stopping => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "stopping", Some(1)),
            Error::Failed { .. } => row(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", None),
        }
    }

    /// The path of the field that is wrong.
    pub fn field(&self) -> Option<&str> {
        match self {
            Error::Invalid { field, .. } => field.as_deref(),
            Error::Unsupported { field, .. } => Some(field),
            Error::UnknownModel { .. } => Some("model"),
            Error::ClassNotAllowed { .. } => Some("X-Izar-Class"),
            Error::ContextTooShort { .. } => Some("max_tokens"),
            Error::OtherRequest => Some("Idempotency-Key"),
            _ => None,
        }
    }
}

/// What the scheduler says of a job that goes nowhere.
impl From<NoPlace> for Error {
    fn from(no_place: NoPlace) -> Self {
        let reason = no_place.to_string();
        match no_place {
            NoPlace::NoDeployment(id) => Error::UnknownModel { name: id.to_string(), models: Vec::new() },
            NoPlace::NoReplicaReady { .. } => Error::NoReplica { reason },
            NoPlace::AllFull { .. } => Error::ReplicasFull { reason },
        }
    }
}

/// What the state refuses about an `OpenTurn`.
impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::KeyRevoked(_) | Refusal::UnknownKey(_) => Error::WrongKey,
            Refusal::UnknownDeployment(id) => Error::UnknownModel { name: id.to_string(), models: Vec::new() },
            Refusal::Full { .. } => Error::Overloaded,
            Refusal::Repeats(turn) => Error::Repeats { turn },
            Refusal::OtherRequest(_) => Error::OtherRequest,
            // The deployment moved to another revision between reading and recording: the same request will pass.
            Refusal::UnknownModel(_) => Error::Interrupted { reason: refusal.to_string() },
            other => Error::Failed { reason: other.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(error: Error, status: u16, code: &str, retry: bool) {
        let row = error.row();
        assert_eq!((row.status.as_u16(), row.code, row.retry_after_s.is_some()), (status, code, retry), "{error}");
    }

    #[test]
    fn every_error_has_the_status_that_clients_know() {
        let text = || "x".to_owned();
        check(Error::NoKey, 401, "missing_api_key", false);
        check(Error::WrongKey, 401, "invalid_api_key", false);
        check(Error::invalid("a", "b"), 400, "invalid_value", false);
        check(Error::Unsupported { field: text(), detail: text() }, 400, "unsupported_parameter", false);
        let long = Error::ContextTooShort { context: 8, prompt: 9, max_tokens: 1 };
        check(long, 400, "context_length_exceeded", false);
        check(Error::UnknownModel { name: text(), models: vec![] }, 404, "model_not_found", false);
        check(Error::UnknownRoute { method: text(), path: text() }, 404, "unknown_url", false);
        check(Error::WrongMethod { method: text(), path: text() }, 405, "method_not_supported", false);
        check(Error::SlowBody { limit_ms: 1 }, 408, "body_too_slow", false);
        check(Error::LargeBody { limit: 1 }, 413, "body_too_large", false);
        check(Error::TooManyRequests { limit: 1 }, 429, "rate_limit_exceeded", true);
        check(Error::Overloaded, 503, "overloaded", true);
        check(Error::ReplicasFull { reason: text() }, 429, "replicas_full", true);
        check(Error::QueueFull { reason: text(), retry_after_s: 7 }, 429, "queue_full", true);
        let unreachable = Error::DeadlineUnreachable { expected_ms: 900, retry_after_s: 7 };
        assert_eq!(unreachable.row().retry_after_s, Some(7));
        check(unreachable, 503, "deadline_unreachable", true);
        let raised = Error::ClassNotAllowed { asked: Class::Urgent, most: Class::Batch };
        check(raised, 403, "class_not_allowed", false);
        check(Error::NoReplica { reason: text() }, 503, "no_replica_ready", true);
        check(Error::Unavailable { reason: text() }, 503, "unavailable", true);
        check(Error::UnknownStream, 409, "unknown_stream", false);
        check(Error::NoRequest { reason: "x" }, 409, "unknown_stream", false);
        check(Error::InProgress, 409, "idempotency_in_progress", true);
        check(Error::OtherRequest, 422, "idempotency_mismatch", false);
        check(Error::AnswerLost { reason: text() }, 409, "idempotency_lost", false);
        check(Error::Interrupted { reason: text() }, 503, "interrupted", true);
        check(Error::Stopping, 503, "stopping", true);
        check(Error::Failed { reason: text() }, 500, "internal_error", false);
    }

    #[test]
    fn messages_name_what_a_user_needs() {
        let models = vec!["echo".to_owned(), "smollm2-135m".to_owned()];
        let unknown = Error::UnknownModel { name: "gpt-9".into(), models };
        assert_eq!(unknown.to_string(), "there is no model `gpt-9`; there are: echo, smollm2-135m");
        let long = Error::ContextTooShort { context: 2048, prompt: 2000, max_tokens: 100 };
        let text = long.to_string();
        assert!(["2048", "2000", "100", "2100"].iter().all(|number| text.contains(number)), "{text}");
        let tools = Error::Unsupported { field: "tools".into(), detail: String::new() };
        assert_eq!((tools.to_string().as_str(), tools.field()), ("`tools` is not supported yet", Some("tools")));
    }
}
