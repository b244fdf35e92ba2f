//! The OpenAI dialect under `/v1`: what unmodified clients of that API send and expect.
//!
//! Each kind of request parses its own body and writes its own answer; the way between is `chat`, which knows no
//! dialect.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use axum::routing::{get, post};
use izar_common::chat::{Finish, Usage};
use izar_common::id::{DeploymentId, TurnId};
use serde::Serialize;

use super::Gateway;
use super::chat::{self as line, Order};
use super::cursor::Cursor;
use super::error::Error;
use super::front::{Arrival, REQUEST_ID, Streamed};
use super::{auth, intake, urgency};
use parameters::Parameters;
use sse::{Events, Kind};

pub mod chat;
pub mod completions;
pub mod error;
mod logprobs;
pub mod models;
pub mod parameters;
pub mod sse;

/// With it a client repeats a request whose stream broke off: the id of the last event that it has.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The routes of this dialect.
pub fn routes() -> Router<Gateway> {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(plain_completions))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{id}", get(show_model))
}

/// What every form of an answer begins with.
#[derive(Debug, Clone)]
pub struct Head {
    pub turn: TurnId,
    /// Unix time in seconds.
    pub created: u64,
    pub model: DeploymentId,
}

impl Head {
    fn id(&self, kind: Kind) -> String {
        let prefix = match kind {
            Kind::Chat => "chatcmpl",
            Kind::Completion => "cmpl",
        };
        format!("{prefix}-{:032x}", self.turn.0)
    }
}

/// Usage as OpenAI writes it.
#[derive(Debug, Clone, Copy, Serialize)]
struct UsageOut {
    prompt_tokens: u32,
    prompt_tokens_details: PromptTokens,
    completion_tokens: u32,
    total_tokens: u32,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PromptTokens {
    cached_tokens: u32,
}

impl From<Usage> for UsageOut {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = usage;
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, prompt_tokens_details: PromptTokens { cached_tokens }, completion_tokens, total_tokens }
    }
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

async fn chat_completions(State(gateway): State<Gateway>, request: Request<Body>) -> Response<Body> {
    generate(&gateway, Kind::Chat, request).await
}

async fn plain_completions(State(gateway): State<Gateway>, request: Request<Body>) -> Response<Body> {
    generate(&gateway, Kind::Completion, request).await
}

async fn generate(gateway: &Gateway, kind: Kind, request: Request<Body>) -> Response<Body> {
    let (parts, mut body) = request.into_parts();
    let arrival = *parts.extensions.get::<Arrival>().expect("every request came through the front");
    match answer(gateway, kind, arrival, &parts.headers, &mut body).await {
        Ok(response) => response,
        Err(error) => gateway.refuse(&error, body),
    }
}

async fn answer(
    gateway: &Gateway,
    kind: Kind,
    arrival: Arrival,
    headers: &HeaderMap,
    body: &mut Body,
) -> Result<Response<Body>, Error> {
    let caller = auth::authenticate(headers, &gateway.pepper, &gateway.config())?;
    let (class, deadline_ms) = (caller.project.class, caller.project.deadline_ms);
    let arrival = Arrival { urgency: urgency::read(headers, class, deadline_ms, arrival.at)?, ..arrival };
    let (body, _charge) = intake::read(body, &gateway.limits, &gateway.memory).await?;
    let parameters = Parameters::parse(&body)?;
    let include_usage = parameters.include_usage();
    let model = parameters.model()?.to_owned();
    let prompt = match kind {
        Kind::Chat => chat::prompt(&body)?,
        Kind::Completion => completions::prompt(&body)?,
    };
    drop(body);
    let mut asked = parameters.check(kind)?;
    if kind == Kind::Completion {
        asked.max_tokens.get_or_insert(completions::MAX_TOKENS);
    }
    let stream = asked.stream;
    let resume = resume(headers, stream)?;
    let arrival = Arrival { turn: resume.as_ref().map_or(arrival.turn, |cursor| cursor.turn), ..arrival };
    let key = caller.key.id.clone();
    let prepared = line::prepare(gateway, arrival, caller, &model, prompt, asked, resume).await;
    let order = prepared.inspect_err(|error| {
        let at_ms = arrival.at.elapsed().as_millis() as u64;
        gateway.list.refused(arrival.turn, &key, &model, at_ms, error.row().code, &error.to_string());
    })?;
    let head = Head { turn: arrival.turn, created: arrival.turn.ms() / 1000, model: order.deployment().clone() };
    if stream {
        streamed(gateway, kind, &head, order, include_usage).await
    } else {
        whole(gateway, kind, &head, order).await
    }
}

/// Where a client that comes back was in its stream.
fn resume(headers: &HeaderMap, stream: bool) -> Result<Option<Cursor>, Error> {
    let Some(id) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
    if !stream {
        return Err(Error::invalid("Last-Event-ID", "Last-Event-ID goes on with a stream, and `stream` is not true"));
    }
    let cursor = id.to_str().ok().and_then(|id| id.parse().ok());
    cursor.map(Some).ok_or(Error::UnknownStream)
}

async fn whole(gateway: &Gateway, kind: Kind, head: &Head, order: Order) -> Result<Response<Body>, Error> {
    let answer = line::whole(gateway, order).await?;
    Ok(json(match kind {
        Kind::Chat => chat::answer(head, &answer),
        Kind::Completion => completions::answer(head, &answer),
    }))
}

async fn streamed(
    gateway: &Gateway,
    kind: Kind,
    head: &Head,
    order: Order,
    include_usage: bool,
) -> Result<Response<Body>, Error> {
    let body = line::stream(gateway, order, Events::new(kind, head, include_usage)).await?;
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(REQUEST_ID, HeaderValue::try_from(head.turn.to_string()).expect("a turn id is plain ASCII"));
    response.extensions_mut().insert(Streamed);
    Ok(response)
}

async fn list_models(State(gateway): State<Gateway>, headers: HeaderMap) -> Response<Body> {
    let config = gateway.config();
    match auth::authenticate(&headers, &gateway.pepper, &config) {
        Ok(_) => json(models::list(&config)),
        Err(error) => gateway.refuse(&error, Body::empty()),
    }
}

async fn show_model(State(gateway): State<Gateway>, Path(id): Path<String>, headers: HeaderMap) -> Response<Body> {
    let config = gateway.config();
    let shown = auth::authenticate(&headers, &gateway.pepper, &config).and_then(|_| models::one(&config, &id));
    match shown {
        Ok(shown) => json(shown),
        Err(error) => gateway.refuse(&error, Body::empty()),
    }
}

fn json(body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
