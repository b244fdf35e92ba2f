//! The supervisor against real worker processes: they serve, die, come back, and leave nothing behind.

use std::time::Duration;

use izar_agent::worker::files::Sources;
use izar_agent::worker::{Options, RunningJob, Workers};
use izar_common::blob::Store;
use izar_common::chat::{Class, Finish, Job, JobEvent, Sampling};
use izar_common::health::{Generation, WorkerReport, WorkerState};
use izar_common::id::{Hash, TurnId, WorkerId};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::wire::agent::{Assignment, EngineOptions, WorkerSpec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Far more than anything here takes, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn options() -> Options {
    let exe = env!("CARGO_BIN_EXE_izar-agent").into();
    Options { exe, threads: 1, cpus: Vec::new(), cores: 1, log_level: Some("debug".into()) }
}

fn manifest(kind: Kind, files: Vec<File>) -> Manifest {
    let text = File { name: "text.json".into(), hash: Hash([9; 32]), bytes: 0 };
    let (name, architecture) = ("m".into(), "echo".into());
    Manifest { name, kind, files, text, context: 100_000, vocabulary: 1024, architecture }
}

fn echo(next_token_us: u64) -> Manifest {
    manifest(Kind::Echo { first_token_us: 100, next_token_us }, Vec::new())
}

fn assignment(applied: u64, workers: &[(&str, Manifest)]) -> Assignment {
    let spec = |(worker, manifest): &(&str, Manifest)| WorkerSpec {
        worker: worker.parse().unwrap(),
        deployment: "m".parse().unwrap(),
        revision: manifest.revision(),
        manifest: manifest.clone(),
        engine: EngineOptions::default(),
    };
    let workers = workers.iter().map(spec).collect();
    Assignment { generation: Generation { incarnation: 1, applied }, workers, holds: Vec::new(), order: None }
}

/// A job for a replica of the model.
pub fn job(manifest: &Manifest, max_tokens: u32) -> Job {
    let sampling = Sampling { temperature: 0.0, seed: 1, max_tokens, ..Sampling::default() };
    Job {
        turn: TurnId(1),
        choice: 0,
        attempt: 0,
        deployment: "m".parse().unwrap(),
        revision: manifest.revision(),
        prompt: vec![104, 105],
        delivered: Vec::new(),
        sampling,
        cache_salt: [0; 16],
        numerics: None,
        class: Class::default(),
        capsule: Vec::new(),
    }
}

struct Agent {
    workers: Workers,
    store: Store,
    _dir: tempfile::TempDir,
}

fn agent() -> Agent {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("blobs")).unwrap();
    Agent { workers: Workers::start(options(), store.clone(), Sources::default()), store, _dir: dir }
}

impl Agent {
    /// Waits until the reports of all workers satisfy `test`.
    async fn until(&self, what: &str, test: impl Fn(&[WorkerReport]) -> bool) -> Vec<WorkerReport> {
        let mut changes = self.workers.changes();
        let wait = async {
            loop {
                changes.mark_unchanged();
                let report = self.workers.report();
                if test(&report) {
                    return report;
                }
                changes.changed().await.unwrap();
            }
        };
        let limited = tokio::time::timeout(LIMIT, wait).await;
        limited.unwrap_or_else(|_| panic!("not reached: {what}; {:?}", self.workers.report()))
    }
    async fn ready(&self) -> WorkerReport {
        self.until("ready", |all| all.len() == 1 && all[0].state == WorkerState::Ready).await.remove(0)
    }
    fn submit(&self, job: Job) -> Result<RunningJob, String> {
        self.workers.submit(&worker(), job)
    }
}

fn worker() -> WorkerId {
    "m.0".parse().unwrap()
}

async fn next(job: &RunningJob) -> JobEvent {
    tokio::time::timeout(LIMIT, job.next()).await.expect("an event comes in time")
}

/// Reads a job to its end; returns the number of tokens and the last event.
async fn finish(job: &RunningJob) -> (usize, JobEvent) {
    let mut count = 0;
    loop {
        match next(job).await {
            JobEvent::Tokens { position, tokens, .. } => {
                assert_eq!(position as usize, count, "tokens follow each other");
                count += tokens.len();
            }
            last => return (count, last),
        }
    }
}

fn lives(pid: u32) -> bool {
    kill(Pid::from_raw(pid as i32), None).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_serves_many_jobs_at_once() {
    let (agent, model) = (agent(), echo(100));
    agent.workers.offer(assignment(1, &[("m.0", model.clone())]));
    assert!(agent.submit(job(&model, 4)).is_err(), "nothing is ready yet");
    agent.ready().await;
    let jobs: Vec<_> = (0..40).map(|_| agent.submit(job(&model, 16)).unwrap()).collect();
    for running in &jobs {
        let (tokens, last) = finish(running).await;
        assert!(matches!(last, JobEvent::Done { finish: Finish::Length, .. }), "{last:?}");
        assert_eq!(tokens, 16);
    }
    agent.until("idle", |all| all[0].load.jobs() == 0).await;
    assert_eq!(agent.submit(job(&echo(777), 4)).unwrap_err(), "the worker runs another revision of the model");
    agent.workers.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_fails_its_jobs_as_retryable_and_comes_back() {
    let (agent, model) = (agent(), echo(20_000));
    agent.workers.offer(assignment(1, &[("m.0", model.clone())]));
    let pid = agent.ready().await.pid.unwrap();
    let running = agent.submit(job(&model, 10_000)).unwrap();
    assert!(matches!(next(&running).await, JobEvent::Tokens { .. }));
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    let (_, last) = finish(&running).await;
    assert!(matches!(last, JobEvent::Failed { retryable: true, .. }), "{last:?}");
    let again =
        agent.until("ready again", |all| all[0].state == WorkerState::Ready && all[0].restarts == 1).await.remove(0);
    assert_ne!(again.pid, Some(pid));
    assert_eq!(finish(&agent.submit(job(&model, 2)).unwrap()).await.0, 2);
    agent.workers.stop().await;
    assert!(!lives(again.pid.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_job_is_cancelled_in_the_worker() {
    let (agent, model) = (agent(), echo(20_000));
    agent.workers.offer(assignment(1, &[("m.0", model.clone())]));
    agent.ready().await;
    let running = agent.submit(job(&model, 10_000)).unwrap();
    next(&running).await;
    agent.until("running", |all| all[0].load.running == 1).await;
    drop(running);
    agent.until("cancelled", |all| all[0].load.running == 0).await;
    agent.workers.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_newer_assignments_count_and_a_changed_one_replaces_the_process() {
    let (agent, first, second) = (agent(), echo(100), echo(200));
    agent.workers.offer(assignment(5, &[("m.0", first.clone())]));
    let before = agent.ready().await.pid.unwrap();
    agent.workers.offer(assignment(4, &[]));
    agent.workers.offer(assignment(6, &[("m.0", second.clone())]));
    let revision = second.revision();
    let replaced = |all: &[WorkerReport]| all[0].state == WorkerState::Ready && all[0].revision == revision;
    let after = agent.until("replaced", replaced).await.remove(0).pid.unwrap();
    assert!(before != after && !lives(before) && lives(after), "the old one has ended before the new one began");
    assert_eq!(agent.workers.generation().applied, 6);
    agent.workers.offer(assignment(7, &[]));
    agent.until("gone", <[_]>::is_empty).await;
    agent.workers.stop().await;
    assert!(!lives(after), "a retired worker is waited for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_had_or_loaded_waits_with_its_reason() {
    let agent = agent();
    let hash = agent.store.add_bytes(b"this is no model").unwrap();
    let mut here = manifest(Kind::Gguf, vec![File { name: "m.gguf".into(), hash, bytes: 16 }]);
    here.text.hash = agent.store.add_bytes(b"{}").unwrap();
    let away = manifest(Kind::Gguf, vec![File { name: "m.gguf".into(), hash: Hash([1; 32]), bytes: 16 }]);
    agent.workers.offer(assignment(1, &[("m.0", here), ("m.1", away)]));
    let failed = |report: &WorkerReport| report.state == WorkerState::Backoff && report.restarts > 0;
    let all = agent.until("both wait", |all| all.len() == 2 && all.iter().all(failed)).await;
    assert!(all[0].detail.starts_with("the model cannot be loaded: "), "{}", all[0].detail);
    assert!(all[1].detail.starts_with("no controller is connected"), "{}", all[1].detail);
    assert!(agent.submit(job(&echo(1), 1)).is_err());
    agent.workers.stop().await;
}
