//! The engine inside a worker: jobs in, events out.
//!
//! A planner (the thread that calls this) decides what a step computes; an executor, on a thread of its own, owns the
//! model and computes it. The planner never waits for the executor: it submits a step and polls for the result, and is
//! woken when there is one. [`Lm`] runs a language model so; `model::echo` gives timed words without one.

pub mod batch;
pub mod blocks;
pub mod executor;
pub mod pace;
pub mod sampler;
pub mod sequence;

use std::time::Instant;

use izar_common::chat::{Class, Job, JobEvent};
use izar_common::health::Load;
use izar_common::prefix::Sketch;

use batch::Batcher;
use executor::{Executor, Outcome};
use sampler::Grammars;
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
    fn load(&self) -> Load;
    /// Counts the changes of what its cache holds for later prompts; 0 for ever if it has none.
    fn held(&self) -> u64;
    /// A note of what its cache holds for later prompts.
    fn sketch(&self) -> Sketch;
    /// Steps that were computed so far: they tell a long prompt from an engine that hangs.
    fn steps(&self) -> u64;
}

/// An engine that runs a language model.
pub struct Lm {
    executor: Executor,
    state: State,
    /// There from the moment the model is loaded.
    batcher: Option<Batcher>,
    grammars: Grammars,
    max_batch: usize,
    /// A step is under way.
    stepping: bool,
    steps: u64,
    /// Answers to submissions, for the next poll.
    answers: Events,
}

impl Lm {
    /// Takes an executor that has begun to load its model.
    pub fn new(executor: Executor, grammars: Grammars, max_batch: usize) -> Self {
        let (state, batcher, answers) = (State::Loading, None, Vec::new());
        Self { executor, state, batcher, grammars, max_batch, stepping: false, steps: 0, answers }
    }

    fn take(&mut self, outcome: Outcome, events: &mut Events) {
        match outcome {
            Outcome::Loaded { context, vocabulary, eos, blocks } => {
                let limits = Limits { context, vocabulary, eos };
                self.batcher = Some(Batcher::new(limits, self.max_batch, blocks, self.grammars.clone()));
                self.state = State::Ready;
            }
            Outcome::Unloadable(reason) => self.state = State::Unloadable(reason),
            Outcome::Stepped { drawn, seconds } => {
                self.stepping = false;
                self.steps += 1;
                let batcher = self.batcher.as_mut().expect("a step follows the load");
                events.extend(batcher.finish(drawn, seconds));
            }
            Outcome::GivenUp => {
                self.stepping = false;
                self.steps += 1;
                self.batcher.as_mut().expect("a step follows the load").give_up();
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
        let urgent = job.class == Class::Urgent;
        let answer = match (&mut self.batcher, &self.state) {
            (Some(batcher), State::Ready) => {
                let answer = batcher.submit(number, job);
                if urgent && answer.is_none() && self.stepping && batcher.may_give_up() {
                    self.executor.give_up();
                }
                answer
            }
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
    fn load(&self) -> Load {
        self.batcher.as_ref().map_or(Load::default(), Batcher::load)
    }
    fn held(&self) -> u64 {
        self.batcher.as_ref().map_or(0, Batcher::held)
    }
    fn sketch(&self) -> Sketch {
        self.batcher.as_ref().map_or(Sketch::default(), Batcher::sketch)
    }
    fn steps(&self) -> u64 {
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::time::Duration;

    use super::sequence::tests::job;
    use super::*;
    use crate::model::{Batch, CausalLm, Error, Loaded, Logits};

    /// What a test waits for an outcome at most.
    const LIMIT: Duration = Duration::from_secs(10);

    /// Says the token after each chunk's last one; breaks at token 13.
    struct Counter;

    impl CausalLm for Counter {
        fn forward(&mut self, batch: &Batch) -> Logits {
            assert!(!batch.tokens.contains(&13), "a kernel broke");
            let wanted = batch.wanted();
            let mut values = vec![0.0; wanted.len() * 16];
            (0..).zip(wanted).for_each(|(row, at)| values[row * 16 + (batch.tokens[at] as usize + 1) % 16] = 1.0);
            Logits::new(values, 16)
        }
        fn weight_bytes(&self) -> usize {
            0
        }
    }

    fn start(load: impl FnOnce() -> Result<Loaded, Error> + Send + 'static) -> (Lm, Receiver<()>) {
        let (say, woken) = sync_channel(16);
        let wake = move || say.send(()).expect("the test listens");
        let mut engine = Lm::new(
            Executor::start(crate::ops::cpu::pool::Threads::any(1), load, wake).unwrap(),
            Grammars::new(None),
            4,
        );
        wait(&mut engine, &woken);
        (engine, woken)
    }
    fn counter() -> (Lm, Receiver<()>) {
        start(|| {
            Ok(Loaded {
                model: Box::new(Counter),
                context: 100,
                vocabulary: 16,
                eos: vec![9],
                blocks: 64,
                warm_up: &[2],
            })
        })
    }
    /// Polls after the next outcome.
    fn wait(engine: &mut Lm, woken: &Receiver<()>) -> Events {
        woken.recv_timeout(LIMIT).expect("an outcome in time");
        engine.poll(Instant::now())
    }

    #[test]
    fn jobs_that_come_during_a_step_join_the_next() {
        let (mut engine, woken) = counter();
        assert_eq!(*engine.state(), State::Ready);
        let now = Instant::now();
        engine.submit(now, 1, job(&[5], &[], 50));
        assert_eq!(engine.poll(now), []);
        engine.submit(now, 2, job(&[7], &[], 50));
        let mut events = Vec::new();
        while events.iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).count() < 2 {
            events.extend(wait(&mut engine, &woken));
        }
        let tokens = |number| {
            let of = events.iter().filter(move |(n, _)| *n == number);
            of.filter_map(|(_, e)| if let JobEvent::Tokens { tokens, .. } = e { Some(tokens[0]) } else { None })
        };
        assert_eq!((tokens(1).collect::<Vec<_>>(), tokens(2).collect::<Vec<_>>()), (vec![6, 7, 8], vec![8]));
        assert_eq!(engine.load().jobs(), 0);
    }

    #[test]
    fn a_panic_fails_every_job_as_retryable_and_breaks_the_engine() {
        let (mut engine, woken) = counter();
        (0..6).for_each(|number| engine.submit(Instant::now(), number, job(&[12], &[], 50)));
        engine.poll(Instant::now());
        wait(&mut engine, &woken);
        let events = wait(&mut engine, &woken);
        assert_eq!(events.len(), 6);
        assert!(events.iter().all(|(_, e)| matches!(e, JobEvent::Failed { retryable: true, .. })), "{events:?}");
        assert_eq!(*engine.state(), State::Broken("a kernel broke".into()));
        engine.submit(Instant::now(), 9, job(&[1], &[], 1));
        assert!(matches!(engine.poll(Instant::now())[..], [(9, JobEvent::Failed { retryable: true, .. })]));
    }

    #[test]
    fn a_token_brings_its_log_probabilities_to_the_job_that_asked_for_them() {
        let (mut engine, woken) = counter();
        let mut asking = job(&[5], &[], 1);
        asking.sampling.logprobs = Some(2);
        engine.submit(Instant::now(), 1, asking);
        engine.submit(Instant::now(), 2, job(&[5], &[], 1));
        let mut events = engine.poll(Instant::now());
        while events.len() < 4 {
            events.extend(wait(&mut engine, &woken));
        }
        for (number, event) in events {
            let JobEvent::Tokens { tokens, logprobs, .. } = event else { continue };
            let asked = number == 1;
            assert_eq!((tokens, logprobs.len()), (vec![6], usize::from(asked)));
            assert!(logprobs.iter().all(|l| l.top.len() == 2 && l.top[0] == (6, l.logprob)), "{logprobs:?}");
        }
    }

    #[test]
    fn a_load_that_fails_or_panics_is_said_with_its_reason() {
        let state = |(engine, _): (Lm, _)| engine.state().clone();
        let missing = start(|| Err(Error::NoFile("x".into())));
        assert_eq!(state(missing), State::Unloadable("the model has no file `x`".into()));
        let broken = start(|| panic!("no device"));
        assert_eq!(state(broken), State::Unloadable("loading panicked: no device".into()));
    }
}
