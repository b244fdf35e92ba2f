//! The choices of a turn, computed side by side: passes on what workers give until every choice has ended.
//!
//! A choice whose worker fails is placed again and goes on after what it has given, as soon as a replica is ready; one
//! whose worker gives nothing for too long counts as failed. No choice can keep the others from being looked at.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use izar_common::chat::{Finish, Job, JobEvent, Usage};
use izar_common::id::{NumericsId, WorkerId};
use tokio::time::Instant;

use super::super::Gateway;
use super::super::error::Error;
use super::super::exit::Exit;
use super::super::running::{Listed, Stage};
use super::super::trace::What;
use super::super::turn::{End, Form, Turn};
use super::{Ended, Order, job};
use crate::agents::{AgentLost, JobStream, NoPlace};
use crate::metrics::{Counter, Histogram};

/// Pause before a failed job is placed again; one that failed again at once waits longer, for an agent that needs a moment
/// to be seen dead.
const AGAIN: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(250)];

/// How often a choice that no replica can take looks for one.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Passes on what the workers give until every choice has ended, and places a job again where that is allowed.
pub async fn pump(
    gateway: &Gateway,
    order: &Order,
    listed: &Listed,
    streams: Vec<JobStream>,
    exit: &mut Exit,
) -> (Ended, Usage) {
    let mut pump = Pump::new(gateway, order, listed, streams);
    exit.computed_by(pump.numerics());
    let silence = gateway.limits.worker_silence();
    let mut killed = pin!(gateway.kill.cancelled());
    let mut tick = pin!(tokio::time::sleep_until(pump.next_tick(exit, silence)));
    let mut rotation = 0;
    loop {
        // Every choice has its turn, whatever the others give.
        rotation += 1;
        let (at, happened) = tokio::select! {
            biased;
            next = poll_fn(|cx| pump.poll(rotation, cx)) => next,
            () = exit.gone() => return (Ended::Gone, pump.usage()),
            () = &mut killed => return (Ended::Failed(Error::Stopping), pump.usage()),
            () = &mut tick => {
                let now = Instant::now();
                let silent = |(at, branch): (usize, &Branch<'_>)| Some((at, branch.silent(silence, now)?));
                match pump.branches.iter().enumerate().find_map(silent) {
                    Some((at, event)) => (at, Happened::Event(Ok(event))),
                    None => {
                        tick.as_mut().reset(pump.next_tick(exit, silence));
                        continue;
                    }
                }
            }
        };
        let ended = match happened {
            Happened::Event(event) => pump.event(at, event, exit),
            Happened::Placed(placed) => pump.placed(at, placed, exit),
        };
        if let Some(ended) = ended {
            return (ended, pump.usage());
        }
        if tick.is_elapsed() || std::mem::take(&mut pump.moving) {
            tick.as_mut().reset(pump.next_tick(exit, silence));
        }
    }
}

/// Measures what a turn gives.
struct Gauges {
    between: Arc<Histogram>,
    completion: Arc<Counter>,
    /// A token of any choice has come; and that has not been told yet.
    begun: bool,
    just_begun: bool,
    /// When the first job was sent, until a token has come.
    sent: Option<std::time::Instant>,
}

impl Gauges {
    fn new(gateway: &Gateway, order: &Order, sent: Option<std::time::Instant>) -> Self {
        let deployment = order.served.deployment.as_str();
        let tokens = &gateway.metrics.tokens;
        tokens.with(&["prompt", deployment]).add(order.prompt.len() as u64);
        Self {
            between: gateway.metrics.between_tokens_seconds.with(&[deployment]),
            completion: tokens.with(&["completion", deployment]),
            begun: false,
            just_begun: false,
            sent,
        }
    }

    /// Counts what came with an event, `tokens` being all tokens of its choice so far.
    fn event(&mut self, gateway: &Gateway, order: &Order, branch: &mut Branch<'_>, tokens: u32, now: Instant) {
        if tokens > branch.tokens {
            branch.failed.clear();
            if !self.begun {
                let first = gateway.metrics.first_token_seconds.with(&[order.served.deployment.as_str()]);
                first.observe(now - order.arrival.at);
                if let Some(sent) = self.sent.take() {
                    gateway.metrics.worker_first_token_seconds.observe(now.into_std() - sent);
                }
                (self.begun, self.just_begun) = (true, true);
                if let Some(pass) = &order.pass {
                    pass.first_token(now.into_std());
                }
            }
            if branch.tokens > 0 {
                self.between.observe(now - branch.last);
            }
            self.completion.add(u64::from(tokens - branch.tokens));
        }
        (branch.tokens, branch.last) = (tokens, now);
    }
}

/// One choice of a turn.
struct Branch<'a> {
    choice: u32,
    source: Source<'a>,
    turn: Turn,
    /// When it gave something, or was placed, for the last time.
    last: Instant,
    tokens: u32,
    /// What computed what its client has of it, and computes the rest.
    numerics: Option<NumericsId>,
    /// Its client has some of it from an earlier stream.
    resumed: bool,
    /// Workers that failed it since its last token.
    failed: Vec<WorkerId>,
}

/// Where a choice's events come from.
enum Source<'a> {
    Worker(Box<JobStream>),
    /// It is being placed again.
    Placing(Pin<Box<dyn Future<Output = Result<Box<JobStream>, NoPlace>> + Send + 'a>>),
    Ended,
}

/// What happened to a choice.
enum Happened {
    Event(Result<JobEvent, AgentLost>),
    Placed(Result<Box<JobStream>, NoPlace>),
}

impl Branch<'_> {
    /// Notes what computes it from now on; returns whether it is something else than before.
    fn computed_by(&mut self, numerics: Option<NumericsId>) -> bool {
        let inexact = (self.resumed || self.tokens > 0) && self.numerics != numerics;
        self.numerics = if inexact { Some(NumericsId::SEVERAL) } else { numerics };
        inexact
    }
    /// Looks for what comes next. Each look begins anew, which waiting for an event allows.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Happened> {
        match &mut self.source {
            Source::Worker(stream) => pin!(stream.next()).poll(cx).map(Happened::Event),
            Source::Placing(placing) => placing.as_mut().poll(cx).map(Happened::Placed),
            Source::Ended => Poll::Pending,
        }
    }
    fn runs(&self) -> bool {
        !matches!(self.source, Source::Ended)
    }
    /// What is said of a worker that gives nothing; choices that wait for none are never silent.
    fn silent(&self, silence: Duration, now: Instant) -> Option<JobEvent> {
        let Source::Worker(stream) = &self.source else { return None };
        let reason = || format!("worker {} gave nothing for {} ms", stream.worker, silence.as_millis());
        (self.last + silence <= now).then(|| JobEvent::Failed { reason: reason(), retryable: true })
    }
}

/// A turn whose choices are computed.
struct Pump<'a> {
    gateway: &'a Gateway,
    order: &'a Order,
    listed: &'a Listed,
    branches: Vec<Branch<'a>>,
    gauges: Gauges,
    /// `Length` if any choice ended so.
    finish: Finish,
    /// A choice went on with other numerics than it was begun with.
    inexact: bool,
    /// A choice has just lost its worker: the client is to be told of the pause soon.
    moving: bool,
}

impl<'a> Pump<'a> {
    fn new(gateway: &'a Gateway, order: &'a Order, listed: &'a Listed, streams: Vec<JobStream>) -> Self {
        let form = Form {
            stops: order.stops.clone(),
            prompt_tokens: order.prompt.len() as u32,
            max_tokens: order.sampling.max_tokens,
            scored: order.sampling.logprobs.is_some(),
        };
        let mut inexact = false;
        let branch = |(choice, stream): (u32, JobStream)| {
            listed.placed(choice, &stream.agent, &stream.worker, stream.why.as_ref());
            let (turn, last) = (Turn::new(order.served.text.clone(), form.clone()), Instant::now());
            let begun_by = order.cursor.numerics;
            let resumed = begun_by.is_some() && order.cursor.events[choice as usize] > 0;
            let (by, source) = (stream.numerics, Source::Worker(Box::new(stream)));
            let mut branch =
                Branch { choice, source, turn, last, tokens: 0, numerics: begun_by, resumed, failed: Vec::new() };
            inexact |= branch.computed_by(by);
            branch
        };
        let sent = streams.iter().map(|stream| stream.sent).min();
        let branches = (0..).zip(streams).map(branch).collect();
        Self {
            gateway,
            order,
            listed,
            branches,
            gauges: Gauges::new(gateway, order, sent),
            finish: Finish::Stop,
            inexact,
            moving: false,
        }
    }

    /// Looks for what comes next, first at the choice that `rotation` says.
    fn poll(&mut self, rotation: usize, cx: &mut Context<'_>) -> Poll<(usize, Happened)> {
        let count = self.branches.len();
        for at in (0..count).map(|i| (i + rotation) % count) {
            if let Poll::Ready(happened) = self.branches[at].poll(cx) {
                return Poll::Ready((at, happened));
            }
        }
        Poll::Pending
    }

    /// What has computed all that a client has of the choices.
    fn numerics(&self) -> Option<NumericsId> {
        let first = self.branches[0].numerics;
        let one = self.branches.iter().all(|branch| branch.numerics == first);
        if one { first } else { Some(NumericsId::SEVERAL) }
    }

    /// Of all choices; the prompt counts once, and of it what every choice found in a cache: the first computes it for the
    /// others.
    fn usage(&self) -> Usage {
        let cached_tokens = self.branches.iter().filter_map(|branch| branch.turn.cached()).min().unwrap_or(0);
        let completion_tokens = self.branches.iter().map(|branch| branch.turn.usage().completion_tokens).sum();
        Usage { prompt_tokens: self.order.prompt.len() as u32, cached_tokens, completion_tokens }
    }

    /// When to look after the client and the workers next, whatever comes meanwhile.
    fn next_tick(&self, exit: &mut Exit, silence: Duration) -> Instant {
        let now = Instant::now();
        let working = self.branches.iter().filter(|branch| matches!(branch.source, Source::Worker(_)));
        let worker = working.map(|branch| branch.last).min().unwrap_or(now) + silence;
        exit.beat(now).map_or(worker, |client| client.min(worker))
    }

    /// Takes an event of a choice; says how the turn has ended, if it has.
    fn event(&mut self, at: usize, event: Result<JobEvent, AgentLost>, exit: &mut Exit) -> Option<Ended> {
        let now = Instant::now();
        let branch = &mut self.branches[at];
        let step = match event {
            Ok(event) => branch.turn.on(event),
            Err(AgentLost(reason)) => branch.turn.agent_lost(reason),
        };
        let tokens = branch.turn.usage().completion_tokens;
        self.gauges.event(self.gateway, self.order, branch, tokens, now);
        let choice = branch.choice;
        self.listed.tokens(self.usage().completion_tokens);
        if std::mem::take(&mut self.gauges.just_begun) {
            self.listed.note(What::FirstToken);
        }
        if !step.shown.is_empty() {
            self.listed.enter(Stage::Answering);
            if exit.text(choice, &step.shown, now).is_err() {
                return Some(Ended::Gone);
            }
        }
        match step.end? {
            End::Finished(finish) => self.finished(at, finish, exit),
            End::Failed { reason, retryable: true } => Some(Ended::Failed(Error::Interrupted { reason })),
            End::Failed { reason, .. } => Some(Ended::Failed(Error::Failed { reason })),
            End::Again { reason, attempt } => {
                exit.pause();
                self.moving = true;
                self.place_again(at, attempt, &reason);
                None
            }
        }
    }

    fn finished(&mut self, at: usize, finish: Finish, exit: &mut Exit) -> Option<Ended> {
        self.branches[at].source = Source::Ended;
        let choice = self.branches[at].choice;
        if finish == Finish::Length {
            self.finish = finish;
        }
        if !self.branches.iter().any(Branch::runs) {
            let deployment = self.order.served.deployment.as_str();
            let cached = u64::from(self.usage().cached_tokens);
            self.gateway.metrics.cached_prompt_tokens.with(&[deployment]).add(cached);
            let (recorded, inexact, numerics) = (self.finish, self.inexact, self.numerics());
            return Some(Ended::Finished { choice, finish, recorded, inexact, numerics });
        }
        exit.ended(choice, finish).err().map(|_| Ended::Gone)
    }

    fn place_again(&mut self, at: usize, attempt: u32, reason: &str) {
        let (gateway, order) = (self.gateway, self.order);
        let branch = &mut self.branches[at];
        if let Source::Worker(stream) = &branch.source {
            log::debug!(turn:% = order.arrival.turn, worker:% = stream.worker, reason; "a job is placed again");
            self.listed.lost(branch.choice, &stream.worker, reason);
            branch.failed.push(stream.worker.clone());
        }
        gateway.metrics.placed_again.add(1);
        if let Some(pass) = &order.pass {
            pass.disturbed();
        }
        let mut job = job(gateway, order, branch.choice, attempt);
        job.delivered = branch.turn.delivered().to_vec();
        // What nothing has come of yet may begin anywhere.
        job.numerics = branch.numerics.filter(|_| branch.resumed || !job.delivered.is_empty() || order.exact());
        let pause = AGAIN[(branch.turn.fruitless() as usize - 1).min(AGAIN.len() - 1)];
        branch.source = Source::Placing(Box::pin(place_again(gateway, job, branch.failed.clone(), pause)));
    }

    fn placed(&mut self, at: usize, placed: Result<Box<JobStream>, NoPlace>, exit: &mut Exit) -> Option<Ended> {
        let stream = match placed {
            Ok(stream) => stream,
            Err(no_place) => return Some(Ended::Failed(no_place.into())),
        };
        self.listed.placed(self.branches[at].choice, &stream.agent, &stream.worker, stream.why.as_ref());
        if self.order.exact() && stream.numerics != self.order.cursor.numerics {
            return Some(Ended::Failed(super::repeat::elsewhere()));
        }
        if self.branches[at].computed_by(stream.numerics) {
            self.inexact = true;
            self.gateway.metrics.inexact_moves.add(1);
        }
        exit.computed_by(self.numerics());
        let branch = &mut self.branches[at];
        // The new worker has as long as the first one had.
        branch.last = Instant::now();
        branch.source = Source::Worker(stream);
        None
    }
}

/// Places a job as soon as there is a replica for it; its worker may be the only one, and just about to be started again.
async fn place_again(
    gateway: &Gateway,
    job: Job,
    failed: Vec<WorkerId>,
    pause: Duration,
) -> Result<Box<JobStream>, NoPlace> {
    tokio::time::sleep(pause).await;
    let patience = Instant::now() + gateway.limits.replica_wait();
    loop {
        match gateway.agents.submit_avoiding(job.clone(), &failed).await {
            Err(NoPlace::NoReplicaReady { .. } | NoPlace::AllFull { .. }) if Instant::now() < patience => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            placed => return placed.map(Box::new),
        }
    }
}
