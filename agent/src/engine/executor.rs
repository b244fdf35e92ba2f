//! The thread that owns a model: loads it, computes steps, draws tokens.
//!
//! A panic in it is caught, because a fault of a device shows as one; the model is dropped and never used again, and
//! what was asked of it is answered with `Broken`. Kernels and draws share the process's pool (`ops::cpu::pool`); Burn's
//! own operations have one of theirs, which this thread belongs to. Between steps all threads sleep.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use izar_common::chat::Token;

use super::batch::{Drawn, Step};
use super::sampler::{Drawer, Failure};
use super::sequence::SequenceId;
use crate::model::{Batch, CausalLm, Error, Loaded, Wants};
use crate::ops::TOKENS;
use crate::ops::cpu::pool::{self, Threads};

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
        blocks: usize,
    },
    Unloadable(String),
    /// The tokens that a step drew, in the order of its draws, and how long it took.
    Stepped {
        drawn: Vec<Drawn>,
        seconds: f64,
    },
    /// A step ended before it drew anything, because it was asked to.
    GivenUp,
    Broken(String),
}

/// A handle of the thread. Dropped, the thread ends after its step.
pub struct Executor {
    steps: SyncSender<Step>,
    outcomes: Receiver<Outcome>,
    /// The step under way shall end without a result.
    stop: Arc<AtomicBool>,
}

impl Executor {
    /// Starts the thread, which loads its model first. `wake` is called after each outcome.
    pub fn start(
        threads: Threads,
        load: impl FnOnce() -> Result<Loaded, Error> + Send + 'static,
        wake: impl Fn() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (steps, submitted) = sync_channel(STEPS);
        let (say, outcomes) = sync_channel(OUTCOMES);
        pool::start(&threads);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            let say = |outcome| {
                // A planner that is gone needs no answer; that it is gone shows when no step comes.
                let _ = say.send(outcome);
                wake();
            };
            if let Err(last) = work(&threads, load, &submitted, &stopped, &say) {
                say(last);
            }
        };
        std::thread::Builder::new().name("executor".into()).spawn(run)?;
        Ok(Self { steps, outcomes, stop })
    }
    /// Gives the executor a step. One may be under way at a time.
    pub fn submit(&self, step: Step) {
        self.stop.store(false, Relaxed);
        // An executor that broke has said so in its last outcome.
        let _ = self.steps.try_send(step);
    }
    /// Asks the step under way to end soon, without a result if it can; its outcome tells whether it did.
    pub fn give_up(&self) {
        self.stop.store(true, Relaxed);
    }
    /// The next outcome, if there is one.
    pub fn poll(&self) -> Option<Outcome> {
        self.outcomes.try_recv().ok()
    }
}

/// Loads the model and computes steps until the planner is gone; the error is the last word.
fn work(
    threads: &Threads,
    load: impl FnOnce() -> Result<Loaded, Error> + Send,
    steps: &Receiver<Step>,
    stop: &AtomicBool,
    say: &impl Fn(Outcome),
) -> Result<(), Outcome> {
    // This thread is one of the pool's: a step begins at once, without waking another.
    threads.bind(0);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.count).thread_name(|i| format!("compute-{i}"));
    let bound = threads.clone();
    let pool = pool.start_handler(move |i| bound.bind(i));
    let pool = pool.use_current_thread().build().map_err(|error| Outcome::Unloadable(error.to_string()))?;
    let loaded = guarded(|| pool.install(|| load_warm(load)));
    let loaded = loaded.map_err(|panic| Outcome::Unloadable(format!("loading panicked: {panic}")))?;
    let (mut model, loaded) =
        loaded.map_err(|error| Outcome::Unloadable(format!("{:#}", anyhow::Error::new(error))))?;
    say(loaded);
    let mut drawers = HashMap::new();
    while let Ok(step) = steps.recv() {
        let begun = Instant::now();
        let drawn = guarded(|| pool.install(|| compute(model.as_mut(), &mut drawers, step, stop)));
        say(match drawn.map_err(Outcome::Broken)? {
            Some(drawn) => Outcome::Stepped { drawn, seconds: begun.elapsed().as_secs_f64() },
            None => Outcome::GivenUp,
        });
    }
    Ok(())
}

/// Loads a model and computes steps of some sizes: what is set up at first use is set up before the first request.
fn load_warm(load: impl FnOnce() -> Result<Loaded, Error>) -> Result<(Box<dyn CausalLm>, Outcome), Error> {
    let Loaded { mut model, context, vocabulary, eos, blocks, warm_up } = load()?;
    for rows in warm_up {
        let rows = *rows.min(&context.min(blocks * TOKENS));
        let table: Vec<u32> = (0..rows.div_ceil(TOKENS) as u32).collect();
        let mut batch = Batch { cleared: table.clone(), ..Batch::default() };
        batch.push(0, &vec![0; rows], Wants::Last, &table);
        model.forward(&batch);
    }
    Ok((model, Outcome::Loaded { context, vocabulary, eos, blocks }))
}

/// Who draws for each open answer.
type Drawers = HashMap<SequenceId, Drawer>;

/// Computes a step and draws, unless it is given up before.
fn compute(model: &mut dyn CausalLm, drawers: &mut Drawers, step: Step, stop: &AtomicBool) -> Option<Vec<Drawn>> {
    step.closed.iter().for_each(|sequence| drop(drawers.remove(sequence)));
    drawers.extend(step.opened);
    if step.batch.chunks.is_empty() {
        return Some(Vec::new());
    }
    let logits = model.forward_unless(&step.batch, stop)?;
    let rows: Vec<&[f32]> = logits.rows().collect();
    assert_eq!(rows.len(), step.draws.len(), "a step wants the rows that it draws from");
    let mut take = |id: &SequenceId| drawers.remove(id).expect("an answer was opened before it draws");
    let mut drawing: Vec<(Drawer, Option<_>)> = step.draws.iter().map(|id| (take(id), None)).collect();
    pool::each(&mut drawing, |i, (drawer, drawn)| *drawn = Some(draw(drawer, rows[i])));
    let (drawing, drawn): (Vec<_>, Vec<_>) =
        drawing.into_iter().map(|(drawer, drawn)| (drawer, drawn.expect("every row is drawn from"))).unzip();
    drawers.extend(step.draws.iter().copied().zip(drawing));
    Some(step.draws.into_iter().zip(drawn).collect())
}

fn draw(drawer: &mut Drawer, row: &[f32]) -> Result<super::sampler::Drawn, Failure> {
    drawer.draw(row).ok_or_else(|| drawer.failure().expect("what could not be drawn says why").clone())
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
