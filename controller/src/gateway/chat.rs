//! The straight line of one request: parsed, tokenized, permitted, recorded and placed, computed, answered, recorded.
//!
//! A turn is a task of its own: a client that leaves cancels the computation, never the record. Recording its opening
//! and placing its job run side by side, and no byte of an answer leaves before the opening is committed.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use izar_common::chat::{Finish, Job, JobEvent, Message, Sampling, Token, Usage};
use izar_common::clock::wall_ms;
use izar_common::id::{DeploymentId, WorkerId};
use izar_common::text;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::Gateway;
use super::auth::Caller;
use super::error::Error;
use super::exit::Exit;
use super::front::Arrival;
use super::models::{self, Served};
use super::openai::sse::{Events, OTHER_EVENTS};
use super::outlet::{OutletBody, outlet};
use super::permits::Permit;
use super::running::{Begun, Listed, Stage};
use super::turn::{End, Turn};
use crate::agents::JobStream;
use crate::metrics::{Counter, Histogram};
use crate::state::command::{Command, Refusal, Reply};
use crate::state::turns::{Opening, Outcome};

/// Longest prompt in bytes that is tokenized on the spot: well under a millisecond. Longer ones would hold up the
/// streams of everybody else.
const INLINE_BYTES: usize = 4 << 10;
/// Pause before a failed job is placed again; the second is longer, for an agent that needs a moment to be seen dead.
const AGAIN: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(250)];
/// Pauses between attempts to record that a turn has ended, while the cluster cannot.
const RECORD_AGAIN: Duration = Duration::from_millis(100);
const RECORD_AGAIN_MOST: Duration = Duration::from_secs(2);

/// What is to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Chat(Vec<Message>),
    Text(String),
    Tokens(Vec<Token>),
}

impl Prompt {
    pub fn is_empty(&self) -> bool {
        match self {
            Prompt::Chat(messages) => messages.iter().all(|message| message.content.is_empty()),
            Prompt::Text(text) => text.is_empty(),
            Prompt::Tokens(tokens) => tokens.is_empty(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Prompt::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
            Prompt::Text(text) => text.len(),
            Prompt::Tokens(_) => 0,
        }
    }

    fn field(&self) -> &'static str {
        match self {
            Prompt::Chat(_) => "messages",
            Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
        }
    }

    fn encode(self, served: &Served) -> Result<Vec<Token>, Error> {
        let field = self.field();
        let tokens = match self {
            Prompt::Chat(messages) => served.text.encode_chat(&messages),
            Prompt::Text(text) => served.text.encode(&text),
            Prompt::Tokens(tokens) => match tokens.iter().find(|token| **token >= served.vocabulary) {
                Some(token) => {
                    let message = format!("`prompt` has token {token}; the vocabulary ends at {}", served.vocabulary);
                    return Err(Error::invalid(field, message));
                }
                None => Ok(tokens),
            },
        };
        tokens.map_err(|error: text::Error| Error::invalid(field, format!("`{field}`: {error}")))
    }
}

/// How it is to be answered, every range checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub seed: Option<u64>,
    pub max_tokens: Option<u64>,
    pub ignore_eos: bool,
    pub stops: Vec<String>,
    pub stream: bool,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub text: String,
    pub finish: Finish,
    pub usage: Usage,
}

/// A request that may run.
pub struct Order {
    arrival: Arrival,
    caller: Caller,
    served: Served,
    prompt: Vec<Token>,
    sampling: Sampling,
    stops: Vec<String>,
    /// The key's, given back just before the answer ends, so that a client that asks again at once finds it free.
    permit: Option<Permit>,
    /// The controller's, kept until the end is recorded: so closings that wait for a quorum are bounded too.
    _place: OwnedSemaphorePermit,
}

impl Order {
    pub fn deployment(&self) -> &DeploymentId {
        &self.served.deployment
    }
}

/// Takes a request to the point where it may run, or says why it may not.
pub async fn prepare(
    gateway: &Gateway,
    arrival: Arrival,
    caller: Caller,
    model: &str,
    prompt: Prompt,
    asked: Asked,
) -> Result<Order, Error> {
    let config = gateway.config();
    let served = models::find(&config, &gateway.catalog, model)?;
    let limit = caller.key.max_concurrent;
    let permit = gateway.permits.take(&caller.key.id, limit).ok_or(Error::TooManyRequests { limit })?;
    let place = gateway.places.clone().try_acquire_owned().map_err(|_| Error::Overloaded)?;
    let prompt = encode(gateway, &served, prompt).await?;
    let max_tokens = max_tokens(served.context, prompt.len(), asked.max_tokens)?;
    let sampling = Sampling {
        temperature: asked.temperature,
        top_p: asked.top_p,
        top_k: asked.top_k,
        seed: asked.seed.unwrap_or_else(rand::random),
        max_tokens,
        ignore_eos: asked.ignore_eos,
    };
    Ok(Order { arrival, caller, served, prompt, sampling, stops: asked.stops, permit: Some(permit), _place: place })
}

async fn encode(gateway: &Gateway, served: &Served, prompt: Prompt) -> Result<Vec<Token>, Error> {
    if prompt.bytes() <= INLINE_BYTES {
        return prompt.encode(served);
    }
    let _thread = gateway.encoders.acquire().await.expect("the semaphore is never closed");
    let served = served.clone();
    let encoded = tokio::task::spawn_blocking(move || prompt.encode(&served)).await;
    encoded.unwrap_or_else(|error| {
        log::error!(error:%; "tokenizing a prompt failed");
        Err(Error::Failed { reason: "the prompt could not be tokenized".into() })
    })
}

/// Decides how long an answer may be: what is asked if there is room for it, else what room there is.
fn max_tokens(context: u32, prompt: usize, asked: Option<u64>) -> Result<u32, Error> {
    let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
    let least = asked.unwrap_or(1);
    let room = context.saturating_sub(prompt);
    if least > u64::from(room) {
        return Err(Error::ContextTooShort { context, prompt, max_tokens: least });
    }
    Ok(asked.map_or(room, |asked| asked as u32))
}

/// Runs a request and returns its whole answer.
pub async fn whole(gateway: &Gateway, order: Order) -> Result<Answer, Error> {
    let (client, answer) = oneshot::channel();
    gateway.tasks.spawn(run(gateway.clone(), order, Exit::whole(client), false));
    answer.await.unwrap_or_else(|_| Err(broken()))
}

/// Runs a request and returns the body of its answer, once there is something in it.
pub async fn stream(gateway: &Gateway, order: Order, events: Events) -> Result<OutletBody, Error> {
    let (head, decided) = oneshot::channel();
    // A slow client is buffered up to all that it can be told.
    let (outlet, body) = outlet(order.sampling.max_tokens as usize + OTHER_EVENTS);
    gateway.tasks.spawn(run(gateway.clone(), order, Exit::stream(head, outlet, events), true));
    decided.await.unwrap_or_else(|_| Err(broken()))?;
    Ok(body)
}

fn broken() -> Error {
    Error::Failed { reason: "the turn broke off".into() }
}

/// How a turn ended, before it is told and recorded.
#[derive(Debug)]
enum Ended {
    Finished(Finish),
    Gone,
    Failed(Error),
}

/// The task of a turn.
async fn run(gateway: Gateway, mut order: Order, mut exit: Exit, streamed: bool) {
    let _running = gateway.metrics.running_requests.hold();
    let listed = gateway.list.begin(Begun {
        turn: order.arrival.turn,
        key: order.caller.key.id.clone(),
        deployment: order.served.deployment.clone(),
        stream: streamed,
        prompt_tokens: order.prompt.len() as u32,
        started_ms: wall_ms(),
    });
    let (ended, usage, recorded) = match begin(&gateway, &order, streamed).await {
        Ok(stream) => {
            let (ended, usage) = pump(&gateway, &order, &listed, stream, &mut exit, streamed).await;
            (ended, usage, true)
        }
        Err(refused) => (Ended::Failed(refused.error), Usage::default(), refused.recorded),
    };
    listed.enter(Stage::Closing);
    order.permit = None;
    let (outcome, word, rest) = match ended {
        Ended::Finished(finish) => (Outcome::Finished { finish, usage }, "finished", exit.finish(finish, usage)),
        Ended::Gone => (Outcome::Cancelled { usage }, "cancelled", None),
        Ended::Failed(error) => {
            log::debug!(turn:% = order.arrival.turn, error:%; "a turn failed");
            (Outcome::Failed { reason: error.to_string(), usage }, "failed", exit.fail(error))
        }
    };
    if streamed {
        let label = order.arrival.label;
        let seconds = gateway.metrics.request_seconds.with(&[label.dialect, label.route]);
        seconds.observe(order.arrival.at.elapsed());
    }
    if recorded {
        gateway.metrics.turns.with(&[word]).add(1);
        record_end(&gateway, &order, outcome).await;
    }
    drop((listed, order));
    if let Some(rest) = rest {
        rest.drain(gateway.limits.write_stall()).await;
    }
}

/// Why a turn did not begin.
struct Refused {
    error: Error,
    /// Its opening is, or may yet become, part of the record, and so must its end.
    recorded: bool,
}

/// Records the turn and places its job, side by side.
async fn begin(gateway: &Gateway, order: &Order, streamed: bool) -> Result<JobStream, Refused> {
    let refused = |error| Refused { error, recorded: false };
    let mut submit = pin!(gateway.agents.submit(job(order, 0)));
    // Placing is decided at once; a job that goes nowhere needs no record.
    let placed = match poll_fn(|cx| Poll::Ready(submit.as_mut().poll(cx))).await {
        Poll::Ready(Err(no_place)) => return Err(refused(no_place.into())),
        Poll::Ready(Ok(stream)) => Some(stream),
        Poll::Pending => None,
    };
    let placed = async {
        match placed {
            Some(stream) => Ok(stream),
            None => submit.await,
        }
    };
    let (opened, placed) = tokio::join!(record_begin(gateway, order, streamed), placed);
    opened?;
    placed.map_err(|no_place| Refused { error: no_place.into(), recorded: true })
}

fn job(order: &Order, attempt: u32) -> Job {
    Job {
        turn: order.arrival.turn,
        choice: 0,
        attempt,
        deployment: order.served.deployment.clone(),
        revision: order.served.revision,
        prompt: order.prompt.clone(),
        delivered: Vec::new(),
        sampling: order.sampling.clone(),
    }
}

async fn record_begin(gateway: &Gateway, order: &Order, stream: bool) -> Result<(), Refused> {
    if gateway.leadership.borrow().leader.is_none() {
        let error = Error::Unavailable { reason: "no leader is known".into() };
        return Err(Refused { error, recorded: false });
    }
    let opening = Opening {
        turn: order.arrival.turn,
        tenant: order.caller.tenant.clone(),
        project: order.caller.key.project.clone(),
        key: order.caller.key.id.clone(),
        deployment: order.served.deployment.clone(),
        revision: order.served.revision,
        prompt_tokens: order.prompt.len() as u32,
        max_tokens: order.sampling.max_tokens,
        stream,
        origin: gateway.raft.origin().clone(),
    };
    let begun = Instant::now();
    match gateway.raft.propose(Command::OpenTurn(opening)).await {
        Ok(Reply::Done) => {
            gateway.metrics.commit_seconds.observe(begun.elapsed());
            Ok(())
        }
        Ok(Reply::Refused(refusal)) => Err(Refused { error: refusal.into(), recorded: false }),
        // It may still be committed after we have stopped waiting.
        Err(unavailable) => Err(Refused { error: Error::Unavailable { reason: unavailable.reason }, recorded: true }),
    }
}

/// Records how a turn ended, however long that takes: what is not recorded by the time the process ends is closed as
/// abandoned by the next one.
async fn record_end(gateway: &Gateway, order: &Order, outcome: Outcome) {
    let turn = order.arrival.turn;
    let mut pause = RECORD_AGAIN;
    loop {
        match gateway.raft.propose(Command::CloseTurn { turn, outcome: outcome.clone() }).await {
            Ok(Reply::Done) => return,
            // Never opened after all, or closed by an attempt whose answer was lost.
            Ok(Reply::Refused(Refusal::UnknownTurn(_))) => return log::debug!(turn:%; "no such turn was open"),
            Ok(Reply::Refused(refusal)) => return log::error!(turn:%, refusal:%; "the end of a turn was refused"),
            Err(unavailable) => {
                log::debug!(turn:%, reason = unavailable.reason; "the end of a turn waits for a quorum")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (2 * pause).min(RECORD_AGAIN_MOST),
            () = gateway.kill.cancelled() => {
                return log::warn!(turn:%; "stopping before the end of a turn was recorded");
            }
        }
    }
}

/// Measures what a turn gives.
struct Gauges {
    between: Arc<Histogram>,
    completion: Arc<Counter>,
    last: Instant,
    tokens: u32,
}

impl Gauges {
    fn new(gateway: &Gateway, order: &Order) -> Self {
        let deployment = order.served.deployment.as_str();
        let tokens = &gateway.metrics.tokens;
        tokens.with(&["prompt", deployment]).add(order.prompt.len() as u64);
        Self {
            between: gateway.metrics.between_tokens_seconds.with(&[deployment]),
            completion: tokens.with(&["completion", deployment]),
            last: Instant::now(),
            tokens: 0,
        }
    }

    /// Counts what came with an event, `tokens` being all tokens of the answer so far.
    fn event(&mut self, gateway: &Gateway, order: &Order, tokens: u32, now: Instant) {
        if tokens > self.tokens {
            if self.tokens == 0 {
                let first = gateway.metrics.first_token_seconds.with(&[order.served.deployment.as_str()]);
                first.observe(now - order.arrival.at);
            } else {
                self.between.observe(now - self.last);
            }
            self.completion.add(u64::from(tokens - self.tokens));
        }
        (self.tokens, self.last) = (tokens, now);
    }
}

/// Passes on what the worker gives until the answer ends, and places the job again where that is allowed.
async fn pump(
    gateway: &Gateway,
    order: &Order,
    listed: &Listed,
    mut stream: JobStream,
    exit: &mut Exit,
    streamed: bool,
) -> (Ended, Usage) {
    let (text, stops) = (order.served.text.clone(), order.stops.clone());
    let mut turn = Turn::new(text, stops, order.prompt.len() as u32, order.sampling.max_tokens, streamed);
    let mut gauges = Gauges::new(gateway, order);
    let silence = gateway.limits.worker_silence();
    let mut killed = pin!(gateway.kill.cancelled());
    let mut tick = pin!(tokio::time::sleep_until(next_tick(exit, gauges.last, silence)));
    let mut failed = Vec::new();
    listed.placed(&stream.agent, &stream.worker);
    loop {
        let event = tokio::select! {
            biased;
            event = stream.next() => event,
            () = exit.gone() => return (Ended::Gone, turn.usage()),
            () = &mut killed => return (Ended::Failed(Error::Stopping), turn.usage()),
            () = &mut tick => match gauges.last + silence <= Instant::now() {
                true => silent(&stream, silence),
                false => {
                    tick.as_mut().reset(next_tick(exit, gauges.last, silence));
                    continue;
                }
            },
        };
        let now = Instant::now();
        let step = turn.on(event);
        let tokens = turn.usage().completion_tokens;
        gauges.event(gateway, order, tokens, now);
        listed.tokens(tokens);
        if !step.shown.is_empty() {
            listed.enter(Stage::Answering);
            if exit.text(&step.shown, now).is_err() {
                return (Ended::Gone, turn.usage());
            }
        }
        match step.end {
            None => {}
            Some(End::Finished(finish)) => return (Ended::Finished(finish), turn.usage()),
            Some(End::Failed { reason, retryable: true }) => {
                return (Ended::Failed(Error::Interrupted { reason }), turn.usage());
            }
            Some(End::Failed { reason, .. }) => return (Ended::Failed(Error::Failed { reason }), turn.usage()),
            Some(End::Again { reason, attempt }) => {
                log::debug!(turn:% = order.arrival.turn, worker:% = stream.worker, reason; "a job is placed again");
                exit.again();
                failed.push(stream.worker.clone());
                stream = match place_again(gateway, order, attempt, &failed).await {
                    Ok(stream) => stream,
                    Err(error) => return (Ended::Failed(error), turn.usage()),
                };
                listed.placed(&stream.agent, &stream.worker);
                // The new worker has as long as the first one had.
                gauges.last = Instant::now();
                tick.as_mut().reset(next_tick(exit, gauges.last, silence));
            }
        }
    }
}

/// When to look after the client and the worker next, whatever comes meanwhile.
fn next_tick(exit: &mut Exit, last: Instant, silence: Duration) -> Instant {
    let worker = last + silence;
    exit.beat(Instant::now()).map_or(worker, |client| client.min(worker))
}

fn silent(stream: &JobStream, silence: Duration) -> JobEvent {
    let reason = format!("worker {} gave nothing for {} ms", stream.worker, silence.as_millis());
    JobEvent::Failed { reason, retryable: true }
}

async fn place_again(gateway: &Gateway, order: &Order, attempt: u32, failed: &[WorkerId]) -> Result<JobStream, Error> {
    gateway.metrics.placed_again.add(1);
    let pause = AGAIN[(attempt as usize - 1).min(AGAIN.len() - 1)];
    tokio::time::sleep(pause).await;
    Ok(gateway.agents.submit_avoiding(job(order, attempt), failed).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_gets_what_is_asked_or_the_rest_of_the_context() {
        assert_eq!(max_tokens(100, 60, None), Ok(40));
        assert_eq!(max_tokens(100, 60, Some(40)), Ok(40));
        assert_eq!(max_tokens(100, 60, Some(5)), Ok(5));
        let long = |prompt, max_tokens| Err(Error::ContextTooShort { context: 100, prompt, max_tokens });
        assert_eq!(max_tokens(100, 60, Some(41)), long(60, 41));
        assert_eq!(max_tokens(100, 100, None), long(100, 1));
        assert_eq!(max_tokens(100, 500, None), long(500, 1));
        assert_eq!(max_tokens(100, 60, Some(u64::MAX)), long(60, u64::MAX));
    }
}
