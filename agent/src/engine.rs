//! The engine inside a worker: jobs in, events out.
//!
//! A planner (the thread that calls this) decides what a step computes; an executor, on a thread of its own, owns the
//! model and computes it. The planner never waits for the executor: it submits a step and polls for the result, and is
//! woken when there is one. [`Lm`] runs a language model so; `model::echo` gives timed words without one.

pub mod batch;
pub mod executor;
pub mod sampler;
pub mod sequence;

use std::time::Instant;

use izar_common::chat::{Job, JobEvent};

use batch::Batcher;
use executor::{Executor, Outcome};
use sequence::Limits;

/// Where an engine is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Loading,
    Ready,
    /// The model cannot be loaded, and why.
    Unloadable(String),
    /// It broke while it computed; its jobs have failed, and its process must be started again.
    Broken(String),
}

/// Events for jobs, each with the agent's number for its job, in order.
pub type Events = Vec<(u64, JobEvent)>;

/// What drives jobs to their ends.
///
/// Nothing here waits. After `submit`, `cancel`, a wake-up or the time of `due`, `poll` goes on as far as it can.
pub trait Engine {
    fn submit(&mut self, now: Instant, number: u64, job: Job);
    fn cancel(&mut self, number: u64);
    fn poll(&mut self, now: Instant) -> Events;
    /// When it wants to be polled even if nothing happens.
    fn due(&self) -> Option<Instant>;
    fn state(&self) -> &State;
    /// Sequences in the batch, and jobs waiting for a place in it.
    fn load(&self) -> (u32, u32);
}

/// An engine that runs a language model.
pub struct Lm {
    executor: Executor,
    state: State,
    /// There from the moment the model is loaded.
    batcher: Option<Batcher>,
    max_batch: usize,
    /// Most tokens of prompt and answer together; 0 means what the model was made for.
    max_context: usize,
    /// A step is under way.
    stepping: bool,
    /// Answers to submissions, for the next poll.
    answers: Events,
}

impl Lm {
    /// Takes an executor that has begun to load its model.
    pub fn new(executor: Executor, max_batch: usize, max_context: usize) -> Self {
        let (state, batcher, answers) = (State::Loading, None, Vec::new());
        Self { executor, state, batcher, max_batch, max_context, stepping: false, answers }
    }

    fn take(&mut self, outcome: Outcome, events: &mut Events) {
        match outcome {
            Outcome::Loaded { context, vocabulary, eos } => {
                let context = if self.max_context == 0 { context } else { context.min(self.max_context) };
                self.batcher = Some(Batcher::new(Limits { context, vocabulary, eos }, self.max_batch));
                self.state = State::Ready;
            }
            Outcome::Unloadable(reason) => self.state = State::Unloadable(reason),
            Outcome::Stepped(drawn) => {
                self.stepping = false;
                let batcher = self.batcher.as_mut().expect("a step follows the load");
                events.extend(batcher.finish(drawn));
            }
            Outcome::Broken(reason) => {
                self.stepping = false;
                if let Some(batcher) = &mut self.batcher {
                    events.extend(batcher.fail_all("the engine broke and is started again"));
                }
                self.state = State::Broken(reason);
            }
        }
    }
}

impl Engine for Lm {
    fn submit(&mut self, _now: Instant, number: u64, job: Job) {
        let answer = match (&mut self.batcher, &self.state) {
            (Some(batcher), State::Ready) => batcher.submit(number, job),
            _ => Some(JobEvent::Failed { reason: "the model is not ready".into(), retryable: true }),
        };
        self.answers.extend(answer.map(|event| (number, event)));
    }
    fn cancel(&mut self, number: u64) {
        if let Some(batcher) = &mut self.batcher {
            batcher.cancel(number);
        }
    }
    fn poll(&mut self, _now: Instant) -> Events {
        let mut events = std::mem::take(&mut self.answers);
        while let Some(outcome) = self.executor.poll() {
            self.take(outcome, &mut events);
        }
        if let (Some(batcher), State::Ready, false) = (&mut self.batcher, &self.state, self.stepping)
            && let Some(step) = batcher.plan()
        {
            self.executor.submit(step);
            self.stepping = true;
        }
        events
    }
    fn due(&self) -> Option<Instant> {
        None
    }
    fn state(&self) -> &State {
        &self.state
    }
    fn load(&self) -> (u32, u32) {
        self.batcher.as_ref().map_or((0, 0), Batcher::load)
    }
}
