//! The workers of this agent: one process per replica, as the newest assignment says.
//!
//! `offer` takes assignments from every session and keeps the newest; a loop compares it with what runs and starts or
//! stops replicas, each in its own task. `submit` passes a job to the replica that the scheduler chose.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use izar_common::blob::Store;
use izar_common::chat::Job;
use izar_common::health::{Generation, WorkerReport, WorkerState};
use izar_common::id::{NumericsId, WorkerId};
use izar_common::prefix::Sketch;
use izar_common::vitals::Vital;
use izar_common::wire::agent::{Assignment, WorkerSpec};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::gpu::{Fit, Gpus};
use crate::reconcile::{Action, cpus, reconcile, threads};

pub mod files;
mod jobs;
mod process;
mod pulse;
mod replica;

use files::Sources;
pub use jobs::RunningJob;
use replica::Replica;

/// Why nothing is taken any more.
const LEAVING: &str = "the agent stops";

/// Between two looks whether workers have ended.
const LOOK: Duration = Duration::from_millis(20);

/// How workers are started.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program: a worker is `exe worker`.
    pub exe: PathBuf,
    /// Threads of each engine; 0 divides the cores among the workers.
    pub threads: u32,
    /// CPUs that engines' threads are bound to; none: they are not bound.
    pub cpus: Vec<u32>,
    pub cores: u32,
    pub log_level: Option<String>,
}

/// The handle.
#[derive(Clone)]
pub struct Workers {
    inner: Arc<Inner>,
}

struct Inner {
    options: Options,
    store: Store,
    sources: Sources,
    assignment: watch::Sender<Option<Assignment>>,
    changed: watch::Sender<()>,
    slots: Mutex<Slots>,
    /// No more jobs: the agent stops.
    leaving: AtomicBool,
    /// No workers: GPUs are being mended.
    paused: watch::Sender<bool>,
    /// Whose health speaks for workers, if anybody's does.
    gpus: OnceLock<Gpus>,
    stop: CancellationToken,
    reconciler: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Slots {
    running: BTreeMap<WorkerId, Slot>,
    /// Tasks of stopped workers that have perhaps not ended. A new worker of the same name waits for the old one.
    ending: BTreeMap<WorkerId, JoinHandle<()>>,
}

struct Slot {
    replica: Arc<Replica>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Workers {
    /// Starts with no worker, until an assignment is offered.
    pub fn start(options: Options, store: Store, sources: Sources) -> Self {
        let inner = Arc::new(Inner {
            options,
            store,
            sources,
            assignment: watch::Sender::new(None),
            changed: watch::Sender::new(()),
            slots: Mutex::default(),
            leaving: AtomicBool::new(false),
            paused: watch::Sender::new(false),
            gpus: OnceLock::new(),
            stop: CancellationToken::new(),
            reconciler: Mutex::new(None),
        });
        let task = tokio::spawn(follow(inner.clone()));
        *inner.reconciler.lock().expect("no panic while the task is stored") = Some(task);
        Self { inner }
    }

    /// Lets GPUs' health decide from now on what each worker may be given.
    pub fn heed(&self, gpus: Gpus) {
        let inner = self.inner.clone();
        if inner.gpus.set(gpus.clone()).is_ok() {
            tokio::spawn(async move {
                let mut changes = gpus.changes();
                let heeding = async {
                    loop {
                        changes.mark_unchanged();
                        inner.judge();
                        if changes.changed().await.is_err() {
                            return;
                        }
                    }
                };
                inner.stop.run_until_cancelled(heeding).await;
            });
        }
    }

    /// Takes an assignment if it is newer than every one before.
    pub fn offer(&self, assignment: Assignment) {
        self.inner.assignment.send_if_modified(|current| {
            let newer = current.as_ref().is_none_or(|current| assignment.generation > current.generation);
            if newer {
                *current = Some(assignment);
            }
            newer
        });
    }

    /// Follows what is assigned.
    pub fn assignments(&self) -> watch::Receiver<Option<Assignment>> {
        self.inner.assignment.subscribe()
    }

    /// Whether any worker may be given jobs by its own word.
    pub fn serve(&self) -> bool {
        self.inner.slots().running.values().any(|slot| slot.replica.report().state == WorkerState::Ready)
    }

    /// Ends every worker, whatever is assigned, and returns when no process is left; fails with those that do not end
    /// within `limit`, as a process does not that waits inside a driver. [`Workers::resume`] must follow in any case.
    pub async fn pause(&self, limit: Duration) -> Result<(), Vec<WorkerId>> {
        let until = Instant::now() + limit;
        self.inner.paused.send_replace(true);
        {
            let mut slots = self.inner.slots();
            let running: Vec<WorkerId> = slots.running.keys().cloned().collect();
            running.iter().for_each(|id| slots.retire(id));
        }
        self.poke();
        loop {
            let left: Vec<WorkerId> = {
                let mut slots = self.inner.slots();
                slots.ending.retain(|_, task| !task.is_finished());
                slots.ending.keys().cloned().collect()
            };
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(left);
            }
            sleep(LOOK).await;
        }
    }

    /// Starts again what is assigned.
    pub fn resume(&self) {
        self.inner.paused.send_replace(false);
    }

    /// The generation that is worked on; zero before the first.
    pub fn generation(&self) -> Generation {
        self.inner.assignment.borrow().as_ref().map_or(Generation::default(), |assignment| assignment.generation)
    }

    /// What each worker is doing. Once the agent stops, none is ready: controllers send nothing more, and what runs goes on.
    pub fn report(&self) -> Vec<WorkerReport> {
        let mut reports: Vec<_> = self.inner.slots().running.values().map(|slot| slot.replica.report()).collect();
        if self.inner.leaving.load(Relaxed) {
            for report in reports.iter_mut().filter(|report| report.state == WorkerState::Ready) {
                (report.state, report.detail) = (WorkerState::Backoff, LEAVING.to_owned());
            }
        }
        reports
    }

    /// Takes no more jobs from now on, and tells every controller.
    pub fn leave(&self) {
        self.inner.leaving.store(true, Relaxed);
        self.poke();
    }

    /// What each worker holds for later prompts, as far as it has said so.
    pub fn sketches(&self) -> Vec<(WorkerId, Arc<Sketch>)> {
        let slots = self.inner.slots();
        slots.running.iter().filter_map(|(id, slot)| Some((id.clone(), slot.replica.sketch()?))).collect()
    }

    /// Changes whenever a report would look different.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.changed.subscribe()
    }

    /// Passes a job to a worker, or says why it cannot take it now.
    pub fn submit(&self, worker: &WorkerId, job: Job) -> Result<RunningJob, String> {
        if self.inner.leaving.load(Relaxed) {
            return Err(LEAVING.to_owned());
        }
        let replica = self.inner.slots().running.get(worker).map(|slot| slot.replica.clone());
        let running = replica.ok_or("the worker is not on this agent")?.submit(job);
        self.poke();
        running
    }

    /// What a worker computes with, once it has said so.
    pub fn numerics(&self, worker: &WorkerId) -> Option<NumericsId> {
        self.inner.slots().running.get(worker)?.replica.report().numerics
    }

    /// Whether any worker has a job.
    pub fn busy(&self) -> bool {
        self.inner.slots().running.values().any(|slot| slot.replica.busy())
    }

    /// Makes every session report now.
    pub fn poke(&self) {
        self.inner.changed.send_replace(());
    }

    /// Stops every worker and returns when no process is left.
    pub async fn stop(&self) {
        self.inner.stop.cancel();
        let task = self.inner.reconciler.lock().expect("no panic while the task is stored").take();
        if let Some(task) = task {
            let _ = task.await;
        }
        let slots = std::mem::take(&mut *self.inner.slots());
        for task in slots.running.into_values().map(|slot| slot.task).chain(slots.ending.into_values()) {
            let _ = task.await;
        }
    }
}

/// Makes what runs equal to each new assignment, until the agent stops.
async fn follow(inner: Arc<Inner>) {
    let (mut assignment, mut paused) = (inner.assignment.subscribe(), inner.paused.subscribe());
    let vital = Vital::new("workers");
    loop {
        vital.work();
        paused.mark_unchanged();
        let wanted = assignment.borrow_and_update().clone();
        if let Some(wanted) = wanted {
            inner.apply(&wanted);
        }
        tokio::select! {
            _ = assignment.changed() => {}
            _ = paused.changed() => {}
            () = vital.sign() => {}
            () = inner.stop.cancelled() => return,
        }
    }
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("no panic while the workers are held")
    }

    /// Tells every worker what its GPU's health lets it be given, and reports it.
    fn judge(&self) {
        if let Some(gpus) = self.gpus.get() {
            let (fitness, slots) = (gpus.fitness(), self.slots());
            for slot in slots.running.values() {
                slot.replica.allow(fitness.of(slot.replica.spec.engine.device));
            }
        }
        self.changed.send_replace(());
    }

    fn apply(self: &Arc<Self>, wanted: &Assignment) {
        let mut slots = self.slots();
        slots.ending.retain(|_, task| !task.is_finished());
        // Asked under the lock, so that whoever pauses ends whatever was started before.
        if *self.paused.borrow() {
            return;
        }
        let actual = slots.running.iter().map(|(id, slot)| (id.clone(), slot.replica.spec.clone())).collect();
        let actions = reconcile(&wanted.workers, &actual);
        if actions.is_empty() {
            return;
        }
        let Generation { incarnation, applied } = wanted.generation;
        log::info!(workers = wanted.workers.len(), changes = actions.len(), incarnation, applied; "assignment changed");
        for action in actions {
            match action {
                Action::Stop(id) => slots.retire(&id),
                Action::Replace(spec) => {
                    slots.retire(&spec.worker);
                    self.launch(&mut slots, spec, wanted.workers.len());
                }
                Action::Start(spec) => self.launch(&mut slots, spec, wanted.workers.len()),
            }
        }
        drop(slots);
        self.changed.send_replace(());
    }

    /// Starts a worker's task, after the end of an older one of the same name.
    fn launch(self: &Arc<Self>, slots: &mut Slots, spec: WorkerSpec, workers: usize) {
        let id = spec.worker.clone();
        let threads = threads(spec.engine.threads, self.options.threads, self.options.cores, workers);
        let taken: Vec<u32> = slots.running.values().flat_map(|slot| slot.replica.cpus.iter().copied()).collect();
        let cpus = cpus(&self.options.cpus, &taken, threads);
        if cpus.is_empty() && !self.options.cpus.is_empty() {
            log::warn!(worker:% = id, threads; "engine.cpus has too few CPUs left for this worker: it is not bound");
        }
        let fit = self.gpus.get().map_or(Fit::WHOLE, |gpus| gpus.fitness().of(spec.engine.device));
        let replica = Arc::new(Replica::new(spec, threads, cpus, fit, self.changed.clone()));
        let (stop, before) = (self.stop.child_token(), slots.ending.remove(&id));
        let (inner, own, token) = (self.clone(), replica.clone(), stop.clone());
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            own.run(&inner.options, &inner.store, &inner.sources, &token).await;
        });
        slots.running.insert(id, Slot { replica, stop, task });
    }
}

impl Slots {
    fn retire(&mut self, id: &WorkerId) {
        if let Some(slot) = self.running.remove(id) {
            slot.stop.cancel();
            self.ending.insert(id.clone(), slot.task);
        }
    }
}
