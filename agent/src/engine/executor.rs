//! The thread that owns a model: loads it, computes steps, draws tokens.
//!
//! A panic in it is caught, because a fault of a device shows as one; the model is dropped and never used again, and
//! what was asked of it is answered with `Broken`. Parallel work runs in a thread pool of its own, and the whole step
//! inside that pool, so that the operations of a step need not wake it one by one. Between steps all threads sleep.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use izar_common::chat::Token;

use super::batch::{Drawn, Step};
use super::sampler::sample;
use crate::model::{Batch, CausalLm, Error, Loaded, SequenceId, Wants};

/// Steps that wait for the executor: the planner has one under way at most.
const STEPS: usize = 1;

/// Outcomes that wait for the planner: of the load, of the step under way, and room for a last word.
const OUTCOMES: usize = 4;

/// What an executor says.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Loaded {
        context: usize,
        vocabulary: usize,
        eos: Vec<Token>,
    },
    Unloadable(String),
    /// The tokens that a step drew, in the order of its draws.
    Stepped(Vec<Drawn>),
    Broken(String),
}

/// A handle of the thread. Dropped, the thread ends after its step.
pub struct Executor {
    steps: SyncSender<Step>,
    outcomes: Receiver<Outcome>,
}

impl Executor {
    /// Starts the thread, which loads its model first. `wake` is called after each outcome. `threads`: 0 takes all
    /// cores.
    pub fn start(
        threads: usize,
        load: impl FnOnce() -> Result<Loaded, Error> + Send + 'static,
        wake: impl Fn() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (steps, submitted) = sync_channel(STEPS);
        let (say, outcomes) = sync_channel(OUTCOMES);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}"));
        let pool = pool.build()?;
        let run = move || {
            let say = |outcome| {
                // A planner that is gone needs no answer; that it is gone shows when no step comes.
                let _ = say.send(outcome);
                wake();
            };
            if let Err(last) = work(&pool, load, &submitted, &say) {
                say(last);
            }
        };
        std::thread::Builder::new().name("executor".into()).spawn(run)?;
        Ok(Self { steps, outcomes })
    }
    /// Gives the executor a step. One may be under way at a time.
    pub fn submit(&self, step: Step) {
        // An executor that broke has said so in its last outcome.
        let _ = self.steps.try_send(step);
    }
    /// The next outcome, if there is one.
    pub fn poll(&self) -> Option<Outcome> {
        self.outcomes.try_recv().ok()
    }
}

/// Loads the model and computes steps until the planner is gone; the error is the last word.
fn work(
    pool: &rayon::ThreadPool,
    load: impl FnOnce() -> Result<Loaded, Error> + Send,
    steps: &Receiver<Step>,
    say: &impl Fn(Outcome),
) -> Result<(), Outcome> {
    let loaded = guarded(|| pool.install(|| load_warm(load)));
    let loaded = loaded.map_err(|panic| Outcome::Unloadable(format!("loading panicked: {panic}")))?;
    let (mut model, loaded) =
        loaded.map_err(|error| Outcome::Unloadable(format!("{:#}", anyhow::Error::new(error))))?;
    say(loaded);
    while let Ok(step) = steps.recv() {
        let drawn = guarded(|| pool.install(|| compute(model.as_mut(), &step)));
        say(Outcome::Stepped(drawn.map_err(Outcome::Broken)?));
    }
    Ok(())
}

/// Loads a model and runs a token through it: what is set up at first use is set up before the first request.
fn load_warm(load: impl FnOnce() -> Result<Loaded, Error>) -> Result<(Box<dyn CausalLm>, Outcome), Error> {
    let Loaded { mut model, context, vocabulary, eos } = load()?;
    let mut batch = Batch::default();
    let warm = SequenceId(u64::MAX);
    batch.push(warm, 0, &[0, 0], Wants::Last);
    model.forward(&batch);
    model.close(warm);
    Ok((model, Outcome::Loaded { context, vocabulary, eos }))
}

fn compute(model: &mut dyn CausalLm, step: &Step) -> Vec<Drawn> {
    step.closed.iter().for_each(|sequence| model.close(*sequence));
    if step.batch.chunks.is_empty() {
        return Vec::new();
    }
    let logits = model.forward(&step.batch);
    assert_eq!(logits.rows().len(), step.draws.len(), "a step wants the rows that it draws from");
    let rows = step.draws.iter().zip(logits.rows());
    rows.map(|(draw, row)| (draw.sequence, sample(row, &draw.sampling, draw.place))).collect()
}

/// Runs something that may panic; says what it said.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    // What the closure leaves half changed is the model, which is dropped after a panic.
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| message(panic.as_ref()))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panicked").to_owned()
}
