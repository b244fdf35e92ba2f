//! The life of one worker: fetch, load, serve, and again after it died, until it is stopped.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use izar_common::blob::Store;
use izar_common::chat::Job;
use izar_common::events;
use izar_common::health::{Load, WorkerReport, WorkerState};
use izar_common::id::NumericsId;
use izar_common::prefix::Sketch;
use izar_common::wire::agent::{EngineOptions, WorkerSpec};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Options;
use super::files::{Files, Sources};
use super::jobs::{Jobs, RunningJob};
use super::process::Process;
use crate::backoff::Backoff;
use crate::gpu::Fit;

/// Waits before a worker is started again: soon after an accident, seldom when it cannot run at all.
const RESTART_FIRST: Duration = Duration::from_millis(200);
const RESTART_MOST: Duration = Duration::from_secs(10);

/// A worker that served this long was well: its next death begins with the first wait again.
const HEALTHY: Duration = Duration::from_secs(60);

/// Deaths in a row, none of them after such a time, that make a worker one that a human must look at.
const FAILURES_TOLD: u32 = 5;

/// Characters of a report's detail: reports of 64 workers must fit a frame of 1 MiB.
const DETAIL: usize = 500;

/// One worker's state and its jobs, seen from outside its task.
pub struct Replica {
    pub spec: WorkerSpec,
    /// Threads that its engine gets, and the CPUs that they are bound to, if they are.
    threads: u32,
    pub cpus: Vec<u32>,
    seen: Mutex<Seen>,
    /// Told whenever a report would look different.
    changed: watch::Sender<()>,
}

#[derive(Clone, PartialEq, Eq)]
struct Status {
    state: WorkerState,
    pid: Option<u32>,
    load: Load,
    restarts: u32,
    numerics: Option<NumericsId>,
    detail: String,
    /// What its GPU's health lets it be given.
    fit: Fit,
}

struct Seen {
    status: Status,
    /// While it is ready.
    jobs: Option<Arc<Jobs>>,
    /// What its cache holds, as it last said.
    sketch: Option<Arc<Sketch>>,
}

/// Why one run of the worker ended.
enum End {
    Stopped,
    /// It failed, after it had been ready for so long (if at all).
    Failed {
        reason: String,
        ready: Option<Duration>,
    },
}

impl Replica {
    pub fn new(spec: WorkerSpec, threads: u32, cpus: Vec<u32>, fit: Fit, changed: watch::Sender<()>) -> Self {
        let detail = "starting".to_owned();
        let (state, pid, numerics) = (WorkerState::Fetching, None, None);
        let status = Status { state, pid, load: Load::default(), restarts: 0, numerics, detail, fit };
        Self { spec, threads, cpus, seen: Mutex::new(Seen { status, jobs: None, sketch: None }), changed }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic while a worker's state is held")
    }

    /// Changes the status and, if it looks different now, wakes those who report it.
    fn note(&self, change: impl FnOnce(&mut Status)) {
        let mut seen = self.seen();
        let before = seen.status.clone();
        change(&mut seen.status);
        // Blocks change at almost every step: they travel with whatever is reported next.
        let quiet = Load { blocks_used: before.load.blocks_used, ..seen.status.load };
        if seen.status.detail.len() > DETAIL {
            seen.status.detail = seen.status.detail.chars().take(DETAIL).collect();
        }
        if (Status { load: quiet, ..seen.status.clone() }) != before {
            drop(seen);
            self.changed.send_replace(());
        }
    }

    pub fn report(&self) -> WorkerReport {
        let mut status = self.seen().status.clone();
        if status.fit.share == 0 && status.state == WorkerState::Ready {
            (status.state, status.detail) = (WorkerState::Fenced, status.fit.reason);
        }
        WorkerReport {
            worker: self.spec.worker.clone(),
            deployment: self.spec.deployment.clone(),
            revision: self.spec.revision,
            state: status.state,
            pid: status.pid,
            load: status.load,
            max_batch: self.spec.engine.max_batch,
            restarts: status.restarts,
            numerics: status.numerics,
            detail: status.detail,
            share: status.fit.share,
        }
    }

    /// What its cache holds for later prompts, if it has said so.
    pub fn sketch(&self) -> Option<Arc<Sketch>> {
        self.seen().sketch.clone()
    }

    /// Lets it be given more or less from now on; at nothing its jobs fail at once, to go on elsewhere.
    pub fn allow(&self, fit: Fit) {
        let mut seen = self.seen();
        if seen.status.fit == fit {
            return;
        }
        if (fit.share == 0) != (seen.status.fit.share == 0) {
            let worker = &self.spec.worker;
            match fit.share {
                0 => log::warn!(worker:%, reason = fit.reason; "worker is fenced"),
                share => log::info!(worker:%, share; "worker may be used again"),
            }
        }
        if let Some(jobs) = &seen.jobs {
            jobs.fence((fit.share == 0).then_some(fit.reason.as_str()));
        }
        seen.status.fit = fit;
        drop(seen);
        self.changed.send_replace(());
    }

    /// Gives the worker a job, or says why it cannot take it now.
    pub fn submit(&self, job: Job) -> Result<RunningJob, String> {
        if job.revision != self.spec.revision {
            return Err("the worker runs another revision of the model".into());
        }
        let jobs = self.seen().jobs.clone();
        jobs.ok_or("the worker is not ready")?.submit(job)
    }

    /// Whether it has any job.
    pub fn busy(&self) -> bool {
        self.seen().jobs.as_ref().is_some_and(|jobs| jobs.busy())
    }

    /// Runs until `stop`; then no process is left.
    pub async fn run(&self, options: &Options, store: &Store, sources: &Sources, stop: &CancellationToken) {
        let worker = &self.spec.worker;
        let (mut backoff, mut failures) = (Backoff::new(RESTART_FIRST, RESTART_MOST), 0u32);
        loop {
            let (reason, ready) = match self.live(options, store, sources, stop).await {
                End::Stopped => break,
                End::Failed { reason, ready } => (reason, ready),
            };
            if ready.is_some_and(|time| time >= HEALTHY) {
                backoff.reset();
                failures = 0;
            }
            failures = failures.saturating_add(1);
            if failures == FAILURES_TOLD {
                log::error!(message_id = events::WORKER_FAILS, worker:%, failures, reason; "worker fails again and again");
            }
            let wait = backoff.wait();
            log::warn!(worker:%, reason, wait_ms = wait.as_millis() as u64; "worker failed and will be started again");
            self.note(|status| {
                *status = Status {
                    state: WorkerState::Backoff,
                    pid: None,
                    load: Load::default(),
                    restarts: status.restarts + 1,
                    numerics: None,
                    detail: reason,
                    fit: status.fit.clone(),
                };
            });
            if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                break;
            }
        }
        log::info!(worker:%; "worker stopped");
    }

    /// One run, from the files to the end of the process.
    async fn live(&self, options: &Options, store: &Store, sources: &Sources, stop: &CancellationToken) -> End {
        let failed = |reason| End::Failed { reason, ready: None };
        let tell = |detail| self.note(|status| status.detail = detail);
        self.note(|status| status.state = WorkerState::Fetching);
        let bringing = stop.run_until_cancelled(sources.bring(&self.spec.manifest, store, tell));
        let files = match bringing.await {
            None => return End::Stopped,
            Some(Err(error)) => return failed(error.to_string()),
            Some(Ok(files)) => files,
        };
        let spawned = Process::spawn(&options.exe, &self.spec.worker, options.log_level.as_deref());
        let mut process = match spawned {
            Ok(process) => process,
            Err(error) => return failed(format!("cannot start {}: {error}", options.exe.display())),
        };
        self.note(|status| {
            status.state = WorkerState::Loading;
            status.pid = process.pid();
            status.detail = "loading the model".into();
        });
        let served = stop.run_until_cancelled(self.serve(&mut process, files)).await;
        // Stopped or failed: jobs end now, before the process is waited for, and no more are asked for.
        let jobs = {
            let mut seen = self.seen();
            seen.sketch = None;
            seen.jobs.take()
        };
        if let Some(jobs) = jobs {
            jobs.close("the worker was stopped");
        }
        self.note(|status| {
            (status.state, status.load) = (WorkerState::Backoff, Load::default());
            status.numerics = None;
            status.detail = "ending".into();
        });
        let status = process.end().await;
        match served {
            None => End::Stopped,
            Some((reason, ready)) => End::Failed { reason: format!("{reason} ({status})"), ready },
        }
    }

    /// Loads and serves until the worker fails; says why, and how long it was ready.
    async fn serve(&self, process: &mut Process, files: Files) -> (String, Option<Duration>) {
        let worker = &self.spec.worker;
        let begun = Instant::now();
        let engine = EngineOptions { threads: self.threads, ..self.spec.engine.clone() };
        let numerics = match process.load(&self.spec.manifest, files.model, files.text, engine, self.cpus.clone()).await
        {
            Ok(numerics) => numerics,
            Err(reason) => return (reason, None),
        };
        let ready = Instant::now();
        log::info!(worker:%, pid = process.pid(), load_ms = begun.elapsed().as_millis() as u64, numerics:%; "worker ready");
        let jobs = Arc::new(Jobs::new(self.spec.engine.max_batch));
        {
            let mut seen = self.seen();
            jobs.fence((seen.status.fit.share == 0).then_some(seen.status.fit.reason.as_str()));
            seen.jobs = Some(jobs.clone());
        }
        self.note(|status| {
            status.state = WorkerState::Ready;
            status.numerics = Some(numerics);
            status.detail = String::new();
        });
        let load = |load| self.note(|status| status.load = load);
        let hold = |sketch| {
            self.seen().sketch = Some(Arc::new(sketch));
            self.changed.send_replace(());
        };
        let reason = process.carry(&jobs, load, hold).await;
        jobs.close(&reason);
        (reason, Some(ready.elapsed()))
    }
}
