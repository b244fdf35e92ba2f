//! The straight line of one request: parsed, tokenized, permitted, recorded and placed, computed, answered, recorded.
//!
//! A turn is a task of its own: a client that leaves cancels the computation, never the record. Recording its opening
//! and placing its job run side by side, and no byte of an answer leaves before the opening is committed.

mod pump;
mod record;
mod repeat;
mod wait;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{self, FutureExt, MaybeDone};
use izar_common::chat::{Finish, Grammar, Job, Message, Sampling, Token, Usage};
use izar_common::clock::wall_ms;
use izar_common::id::{DeploymentId, NumericsId, TurnId};
use izar_common::{grammar, text};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Gateway;
use super::auth::Caller;
use super::cursor::{self, Cursor, Seal};
use super::error::Error;
use super::exit::Exit;
use super::front::Arrival;
use super::memory::{self, Charge};
use super::models::{self, Served};
use super::openai::sse::{Events, OTHER_EVENTS};
use super::outlet::{OutletBody, outlet};
use super::permits::Permit;
use super::queues::{Facts, Pass};
use super::running::{self, Begun, Stage};
use super::trace::{self, What};
use super::turn::Scored;
use crate::agents::{JobStream, NoPlace};
use crate::state::turns::{Once, Outcome, Turn};
use pump::pump;
use record::{record_begin, record_end, try_record_end};

/// Longest prompt in bytes that is tokenized on the spot: well under a millisecond. Longer ones would hold up the
/// streams of everybody else.
const INLINE_BYTES: usize = 4 << 10;
/// Pause before a turn that no worker took is placed again: long enough for some to end, and no time to who waits.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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

/// How it is to be answered, every range checked. What is `None` is as the model's makers recommend.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub logit_bias: Vec<(Token, f32)>,
    pub logprobs: Option<u8>,
    pub grammar: Option<Grammar>,
    pub seed: Option<u64>,
    /// How many answers.
    pub n: u32,
    pub max_tokens: Option<u64>,
    pub ignore_eos: bool,
    pub stops: Vec<String>,
    pub stream: bool,
}

/// A whole answer: all its choices.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub choices: Vec<Choice>,
    pub usage: Usage,
}

/// One of the answers to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub text: String,
    /// Its tokens, if they were asked for.
    pub scored: Vec<Scored>,
    pub finish: Finish,
}

/// How a request comes to its turn.
#[derive(Debug, Clone)]
pub enum Claim {
    /// It begins one; `once` if its client may ask again.
    Begin { once: Option<Once> },
    /// Its client goes on with a stream, wherever that was begun.
    Resume(Cursor),
    /// The same request was begun before, as this turn.
    Repeat(Box<Turn>),
}

impl Claim {
    /// The turn, if there is one already.
    pub fn turn(&self) -> Option<TurnId> {
        match self {
            Claim::Begin { .. } => None,
            Claim::Resume(cursor) => Some(cursor.turn),
            Claim::Repeat(first) => Some(first.opening.turn),
        }
    }

    /// What computed an answer that shall be given again.
    fn computed_by(&self) -> Option<NumericsId> {
        match self {
            Claim::Repeat(first) => match first.closed {
                Some((_, Outcome::Finished { numerics, .. })) => numerics,
                _ => None,
            },
            _ => None,
        }
    }

    /// Its client may ask again for the very same.
    fn once(&self) -> bool {
        matches!(self, Claim::Begin { once: Some(_) } | Claim::Repeat(_))
    }
}

/// A request that may run.
pub struct Order {
    arrival: Arrival,
    caller: Caller,
    served: Served,
    prompt: Vec<Token>,
    sampling: Sampling,
    choices: u32,
    stops: Vec<String>,
    /// The key's, given back just before the answer ends, so that a client that asks again at once finds it free.
    permit: Option<Permit>,
    /// Where the client is in the stream: at its beginning, or where another controller left it.
    cursor: Cursor,
    /// Its turn at the workers, and how it came to it.
    pass: Option<Pass>,
    facts: Option<Facts>,
    claim: Claim,
    /// The request, sealed, for agents to keep.
    capsule: Vec<u8>,
    /// The controller's, kept until the end is recorded: so closings that wait for a quorum are bounded too.
    _place: OwnedSemaphorePermit,
    /// For its tokens and what goes with them.
    memory: Charge,
}

impl Order {
    pub fn deployment(&self) -> &DeploymentId {
        &self.served.deployment
    }

    /// Nothing of it was computed before.
    fn is_new(&self) -> bool {
        matches!(self.claim, Claim::Begin { .. })
    }

    /// Has agents keep the sealed request beside the answer, if there is room for it: here, and in the job that is sent.
    pub fn keep(&mut self, capsule: Vec<u8>) {
        if self.memory.grow(2 * capsule.len()) {
            self.capsule = capsule;
        }
    }

    /// Whether the whole answer must be the one that was given before.
    fn exact(&self) -> bool {
        matches!(&self.claim, Claim::Repeat(first) if matches!(first.closed, Some((_, Outcome::Finished { .. }))))
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
    claim: Claim,
) -> Result<Order, Error> {
    let config = gateway.config();
    let served = models::find(&config, &gateway.agents, &gateway.catalog, model)?;
    let limit = caller.key.max_concurrent;
    let permit = gateway.permits.take(&caller.key.id, limit).ok_or(Error::TooManyRequests { limit })?;
    let place = gateway.places.clone().try_acquire_owned().map_err(|_| Error::Overloaded)?;
    let prompt = encode(gateway, &served, prompt).await?;
    let max_tokens = max_tokens(served.context, prompt.len(), asked.max_tokens)?;
    let each = if asked.logprobs.is_some() { memory::SCORED_TOKEN_BYTES } else { memory::ANSWER_TOKEN_BYTES };
    let tokens = memory::PROMPT_TOKEN_BYTES * prompt.len() + each * max_tokens as usize * asked.n as usize;
    let memory = gateway.memory.charge(memory::TURN_BYTES + tokens).ok_or(Error::Overloaded)?;
    check_bias(&served, &asked.logit_bias)?;
    let grammar = match asked.grammar {
        Some(grammar) => Some(compile(gateway, &served, grammar).await?),
        None => None,
    };
    let (plain, defaults) = (Sampling::default(), served.text.defaults());
    let sampling = Sampling {
        temperature: asked.temperature.or(defaults.temperature).unwrap_or(plain.temperature),
        top_p: asked.top_p.or(defaults.top_p).unwrap_or(plain.top_p),
        top_k: asked.top_k.or(defaults.top_k).unwrap_or(plain.top_k),
        min_p: asked.min_p.or(defaults.min_p).unwrap_or(plain.min_p),
        repetition_penalty: asked
            .repetition_penalty
            .or(defaults.repetition_penalty)
            .unwrap_or(plain.repetition_penalty),
        frequency_penalty: asked.frequency_penalty,
        presence_penalty: asked.presence_penalty,
        logit_bias: asked.logit_bias,
        logprobs: asked.logprobs,
        grammar,
        // Asked again under the same turn, it is the same.
        seed: asked.seed.unwrap_or(arrival.turn.seed()),
        max_tokens,
        ignore_eos: asked.ignore_eos,
    };
    let (choices, stops, stream) = (asked.n, asked.stops, asked.stream);
    let request = cursor::Request {
        turn: arrival.turn,
        key: &caller.key.id,
        revision: served.revision,
        prompt: &prompt,
        sampling: &sampling,
        stops: &stops,
        choices,
    };
    // Who gets the whole answer at once has nothing to go on with.
    let seal = if stream { Seal::of(&gateway.pepper, &request) } else { Seal::default() };
    let cursor = match &claim {
        Claim::Resume(cursor) if cursor.seal == seal && cursor.events.len() == choices as usize => cursor.clone(),
        Claim::Resume(_) => return Err(Error::UnknownStream),
        _ => Cursor { numerics: claim.computed_by(), ..Cursor::begin(arrival.turn, seal, choices) },
    };
    let (permit, capsule) = (Some(permit), Vec::new());
    let order = Order {
        arrival,
        caller,
        served,
        prompt,
        sampling,
        choices,
        stops,
        permit,
        cursor,
        pass: None,
        facts: None,
        claim,
        capsule,
        _place: place,
        memory,
    };
    repeat::check(&order)?;
    Ok(order)
}

fn check_bias(served: &Served, bias: &[(Token, f32)]) -> Result<(), Error> {
    match bias.last() {
        Some((token, _)) if *token >= served.vocabulary => {
            let message = format!("`logit_bias` has token {token}; the vocabulary ends at {}", served.vocabulary);
            Err(Error::invalid("logit_bias", message))
        }
        _ => Ok(()),
    }
}

/// Proves that a grammar can be followed, before anything is recorded or computed.
async fn compile(gateway: &Gateway, served: &Served, grammar: Grammar) -> Result<Grammar, Error> {
    let field = match grammar {
        Grammar::JsonObject | Grammar::JsonSchema(_) => "response_format",
        Grammar::Regex(_) => "guided_regex",
    };
    let invalid = |reason: &dyn std::fmt::Display| Error::invalid(field, format!("`{field}`: {reason}"));
    if served.text.eos().is_empty() {
        return Err(invalid(&grammar::Error::NoEnd));
    }
    let _thread = gateway.encoders.acquire().await.expect("the semaphore is never closed");
    let compiled = tokio::task::spawn_blocking(move || grammar::check(&grammar).map(|()| grammar)).await;
    match compiled {
        Ok(checked) => checked.map_err(|error| invalid(&error)),
        Err(error) => {
            log::error!(error:%; "compiling a grammar failed");
            Err(invalid(&"it cannot be compiled"))
        }
    }
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
    let choices = order.choices;
    gateway.tasks.spawn(run(gateway.clone(), order, Exit::whole(client, choices), false));
    answer.await.unwrap_or_else(|_| Err(broken()))
}

/// Runs a request and returns the body of its answer, once there is something in it.
pub async fn stream(gateway: &Gateway, order: Order, events: Events) -> Result<OutletBody, Error> {
    let (head, decided) = oneshot::channel();
    // A slow client is buffered up to all that it can be told.
    let choices = order.choices;
    let unsent = gateway.memory.charge(0).ok_or_else(broken)?;
    let (outlet, body) = outlet(choices as usize * (order.sampling.max_tokens as usize + OTHER_EVENTS), unsent);
    let exit = Exit::stream(head, outlet, events, order.cursor.clone());
    gateway.tasks.spawn(run(gateway.clone(), order, exit, true));
    decided.await.unwrap_or_else(|_| Err(broken()))?;
    Ok(body)
}

fn broken() -> Error {
    Error::Failed { reason: "the turn broke off".into() }
}

/// How a turn ended, before it is told and recorded.
#[derive(Debug)]
enum Ended {
    /// The choice that ended last; the others have been told. `recorded` speaks for all of them.
    Finished {
        choice: u32,
        finish: Finish,
        recorded: Finish,
        inexact: bool,
        numerics: Option<NumericsId>,
    },
    Gone,
    Failed(Error),
}

/// The task of a turn.
async fn run(gateway: Gateway, mut order: Order, mut exit: Exit, streamed: bool) {
    let _running = gateway.metrics.running_requests.hold();
    let begun = Begun {
        turn: order.arrival.turn,
        key: order.caller.key.id.clone(),
        deployment: order.served.deployment.clone(),
        stream: streamed,
        prompt_tokens: order.prompt.len() as u32,
        started_ms: wall_ms(),
    };
    let listed = match repeat::reads_along(&order) {
        false => gateway.list.begin(begun),
        true => running::List::unlisted(begun),
    };
    if !order.is_new() {
        listed.note(What::Resumed);
    }
    let begun = match wait::wait(&gateway, &mut order, &listed, &mut exit).await {
        Ok(()) => begin(&gateway, &order, &mut exit, streamed).await,
        Err(ended) => Err(Stopped { ended, recorded: false }),
    };
    if let Some(Facts { class, ahead, waited_ms, .. }) = order.facts.filter(Facts::waited) {
        listed.note(What::Waited { class, ahead, waited_ms });
    }
    let (ended, usage, hold) = match begun {
        Ok((streams, hold)) => {
            let (ended, usage) = pump(&gateway, &order, &listed, streams, &mut exit).await;
            (ended, usage, hold)
        }
        Err(stopped) => {
            if let Ended::Failed(error) = &stopped.ended {
                let (code, reason) = (error.row().code.to_owned(), trace::reason(&error.to_string()));
                listed.note(What::Refused { code, reason });
            }
            (stopped.ended, Usage::default(), if stopped.recorded { Hold::Ours } else { Hold::Others })
        }
    };
    if let Some(pass) = order.pass.take() {
        match &ended {
            Ended::Finished { .. } => pass.finish(Some(usage)),
            Ended::Failed(_) => pass.finish(None),
            Ended::Gone => {}
        }
    }
    listed.enter(Stage::Closing);
    let ending = Instant::now();
    // A client that came back to this very controller has its end told by the task that goes on.
    let ours = hold == Hold::Ours && listed.is_current();
    let mut settled = false;
    let (outcome, word, rest) = match ended {
        Ended::Finished { choice, finish, recorded, inexact, numerics } => {
            let outcome = Outcome::Finished { finish: recorded, usage, inexact, numerics };
            // Who asks again after the last byte shall find what computed it.
            settled = ours && order.claim.once() && try_record_end(&gateway, &order, &outcome).await;
            order.permit = None;
            let rest = exit.finish(choice, finish, usage);
            gateway.metrics.ending_seconds.observe(ending.elapsed());
            (outcome, "finished", rest)
        }
        Ended::Gone => (Outcome::Cancelled { usage }, "cancelled", None),
        Ended::Failed(error) => {
            log::debug!(turn:% = order.arrival.turn, error:%; "a turn failed");
            order.permit = None;
            (Outcome::Failed { reason: error.to_string(), usage }, "failed", exit.fail(error))
        }
    };
    listed.note(What::Ended { outcome: word.to_owned(), tokens: usage.completion_tokens });
    if streamed {
        let label = order.arrival.label;
        let seconds = gateway.metrics.request_seconds.with(&[label.dialect, label.route]);
        seconds.observe(order.arrival.at.elapsed());
    }
    order.permit = None;
    if ours {
        gateway.metrics.turns.with(&[word]).add(1);
        if !settled {
            record_end(&gateway, &order, outcome).await;
        }
    } else if hold == Hold::Others {
        repeat::settle(&gateway, &order, outcome).await;
    }
    drop((listed, order));
    if let Some(rest) = rest {
        rest.drain(gateway.limits.write_stall()).await;
    }
}

/// How a turn ended that did not begin.
struct Stopped {
    ended: Ended,
    /// Its opening is, or may yet become, part of the record, and so must its end.
    recorded: bool,
}

impl Stopped {
    fn failed(error: Error, recorded: bool) -> Self {
        Self { ended: Ended::Failed(error), recorded }
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// This task records its end.
    Ours,
    /// Nobody's, or of a request that was here before.
    Others,
}

/// The jobs of a turn, and who records its end.
type Placed = (Vec<JobStream>, Hold);

/// Records the turn and places its jobs, side by side.
async fn begin(gateway: &Gateway, order: &Order, exit: &mut Exit, streamed: bool) -> Result<Placed, Stopped> {
    match &order.claim {
        Claim::Begin { .. } => {}
        Claim::Resume(_) => return take_over(gateway, order, streamed).await,
        Claim::Repeat(first) => return repeat::begin(gateway, order, first, streamed).await,
    }
    let submit = |choice| Box::pin(gateway.agents.submit(job(gateway, order, choice, 0)));
    // Placing is decided at once; a job that goes nowhere needs no record.
    let mut jobs = 'placed: loop {
        let mut jobs: Vec<_> = (0..order.choices).map(submit).map(future::maybe_done).collect();
        for job in &mut jobs {
            let _ = poll_fn(|cx| Poll::Ready(job.poll_unpin(cx))).await;
            if let MaybeDone::Done(Err(_)) = job {
                let Some(Err(no_place)) = Pin::new(job).take_output() else { unreachable!("it was just seen") };
                let waits = order.pass.as_ref().is_some_and(Pass::may_wait);
                if !(waits && matches!(no_place, NoPlace::AllFull { .. })) {
                    return Err(Stopped::failed(no_place.into(), false));
                }
                drop(jobs);
                // Another controller was faster. This one keeps its place in front of who came later.
                tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => continue 'placed,
                    () = exit.gone() => return Err(Stopped { ended: Ended::Gone, recorded: false }),
                    () = gateway.kill.cancelled() => return Err(Stopped::failed(Error::Stopping, false)),
                }
            }
        }
        break jobs;
    };
    gateway.metrics.admission_seconds.observe(order.arrival.at.elapsed());
    if let Some(pass) = &order.pass {
        pass.placed();
    }
    let (opened, _) = tokio::join!(record_begin(gateway, order, streamed), future::join_all(&mut jobs));
    opened?;
    let placed = jobs.iter_mut().map(|job| Pin::new(job).take_output().expect("all jobs were waited for"));
    let placed: Result<_, NoPlace> = placed.collect();
    let placed = placed.map_err(|no_place| Stopped::failed(no_place.into(), true))?;
    Ok((placed, Hold::Ours))
}

/// Makes a turn this controller's and goes on with its answer.
async fn take_over(gateway: &Gateway, order: &Order, streamed: bool) -> Result<Placed, Stopped> {
    record_begin(gateway, order, streamed).await?;
    let going_on = (0..order.choices).map(|choice| go_on(gateway, order, choice));
    let placed: Result<_, NoPlace> = future::join_all(going_on).await.into_iter().collect();
    let placed = placed.map_err(|no_place| Stopped::failed(no_place.into(), true))?;
    Ok((placed, Hold::Ours))
}

/// Reads on what an agent keeps of a choice; if none does, it is computed again from its beginning.
async fn go_on(gateway: &Gateway, order: &Order, choice: u32) -> Result<JobStream, NoPlace> {
    match gateway.agents.attach(order.arrival.turn, choice).await {
        Some(stream) => Ok(stream),
        None => gateway.agents.submit(job(gateway, order, choice, 0)).await,
    }
}

fn job(gateway: &Gateway, order: &Order, choice: u32, attempt: u32) -> Job {
    Job {
        turn: order.arrival.turn,
        choice,
        attempt,
        deployment: order.served.deployment.clone(),
        revision: order.served.revision,
        prompt: order.prompt.clone(),
        delivered: Vec::new(),
        sampling: order.sampling.clone(),
        cache_salt: gateway.pepper.cache_salt(&order.caller.tenant),
        // What a client has of a stream goes on exactly where the same computes it.
        numerics: order.cursor.numerics,
        class: order.arrival.urgency.class,
        capsule: order.capsule.clone(),
    }
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
