//! The jobs of one worker process: what goes to it, and an inbox for what comes back to each.
//!
//! Nothing here waits for a slow reader. An inbox merges tokens that follow each other, so it holds no more than the
//! answer's own length; and when the worker dies, every job fails at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use izar_common::chat::{Job, JobEvent, Logprobs, Token};
use izar_common::wire::worker::{REASON, ToWorker};
use tokio::sync::Notify;

/// Jobs in one worker at most, in batches. Each controller stops at 8; the rest is for reports that come late.
pub const BATCHES_PER_WORKER: usize = 32;

/// Frames that wait for a worker to read them. A worker reads between two steps; one that is so far behind is stuck,
/// and new jobs are refused as retryable. Cancellations always find room: each belongs to an accepted job.
const OUTBOX: usize = 256;

/// Tokens in one event at most, so that it fits a frame of 64 KiB: at five bytes each, or with log-probabilities and all
/// their alternatives at 200.
const TOKENS_PER_EVENT: usize = 4096;
const LOGPROBS_PER_EVENT: usize = 256;

/// The table of one worker process. Ids are its own and begin at 1.
#[derive(Debug)]
pub struct Jobs {
    table: Mutex<Table>,
    /// Told when the outbox has something.
    filled: Notify,
    limit: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// Why the worker takes no more jobs.
    closed: Option<String>,
    /// Why it takes none for now.
    fenced: Option<String>,
    last_id: u64,
    inboxes: HashMap<u64, Arc<Inbox>>,
    outbox: Vec<ToWorker>,
}

impl Jobs {
    /// `max_batch`: sequences in the worker's batch.
    pub fn new(max_batch: u32) -> Self {
        let limit = BATCHES_PER_WORKER * max_batch.max(1) as usize;
        Self { table: Mutex::default(), filled: Notify::new(), limit }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while the table is held")
    }

    /// Gives a job to the worker, or says why it cannot take it now.
    pub fn submit(self: &Arc<Self>, job: Job) -> Result<RunningJob, String> {
        let inbox = Arc::new(Inbox::new(&job));
        let mut table = self.table();
        if let Some(reason) = table.closed.as_ref().or(table.fenced.as_ref()) {
            return Err(reason.clone());
        }
        if table.inboxes.len() >= self.limit {
            return Err(format!("the worker has {} jobs already", self.limit));
        }
        if table.outbox.len() >= OUTBOX {
            return Err("the worker takes no jobs at the moment".into());
        }
        table.last_id += 1;
        let id = table.last_id;
        table.inboxes.insert(id, inbox.clone());
        table.outbox.push(ToWorker::Submit { id, job });
        drop(table);
        self.filled.notify_one();
        Ok(RunningJob { jobs: self.clone(), id, inbox })
    }

    /// Whether the worker has any job.
    pub fn busy(&self) -> bool {
        !self.table().inboxes.is_empty()
    }

    /// Waits for frames to the worker and takes them all. Cancellation-safe.
    pub async fn outgoing(&self) -> Vec<ToWorker> {
        loop {
            let frames = std::mem::take(&mut self.table().outbox);
            if !frames.is_empty() {
                return frames;
            }
            self.filled.notified().await;
        }
    }

    /// Hands out what a step gave. Events of jobs that were cancelled meanwhile are dropped.
    pub fn deliver(&self, events: Vec<(u64, JobEvent)>) {
        let mut table = self.table();
        for (id, event) in events {
            let ended = table.inboxes.get(&id).is_some_and(|inbox| inbox.push(event));
            if ended {
                table.inboxes.remove(&id);
            }
        }
    }

    /// Fails every job, and every later one, as retryable: the worker is gone.
    pub fn close(&self, reason: &str) {
        let mut table = self.table();
        table.closed.get_or_insert_with(|| reason.to_owned());
        table.outbox.clear();
        for (_, inbox) in table.inboxes.drain() {
            inbox.push(JobEvent::Failed { reason: reason.to_owned(), retryable: true });
        }
    }

    /// Takes no jobs for a reason, and fails those that run as retryable; or takes them again.
    pub fn fence(&self, reason: Option<&str>) {
        let mut table = self.table();
        table.fenced = reason.map(str::to_owned);
        let Some(reason) = reason else { return };
        let ended: Vec<(u64, Arc<Inbox>)> = table.inboxes.drain().collect();
        for (id, inbox) in ended {
            inbox.push(JobEvent::Failed { reason: reason.to_owned(), retryable: true });
            table.outbox.push(ToWorker::Cancel { id });
        }
        drop(table);
        self.filled.notify_one();
    }

    fn cancel(&self, id: u64) {
        let mut table = self.table();
        if table.inboxes.remove(&id).is_some() {
            table.outbox.push(ToWorker::Cancel { id });
            drop(table);
            self.filled.notify_one();
        }
    }
}

/// A job in a worker. Dropping it cancels the job unless it has ended.
#[derive(Debug)]
pub struct RunningJob {
    jobs: Arc<Jobs>,
    id: u64,
    inbox: Arc<Inbox>,
}

impl RunningJob {
    /// Waits for the next event; after the last one it waits for ever. Cancellation-safe.
    pub async fn next(&self) -> JobEvent {
        loop {
            if let Some(event) = self.ready() {
                return event;
            }
            self.inbox.filled.notified().await;
        }
    }
    /// Returns the next event if it is there already.
    pub fn ready(&self) -> Option<JobEvent> {
        self.inbox.pop()
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        self.jobs.cancel(self.id);
    }
}

#[derive(Debug)]
struct Inbox {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

/// Tokens not yet taken, then perhaps the end.
#[derive(Debug)]
struct Waiting {
    tokens: Vec<Token>,
    /// One for each of them if the job asks for them, else none.
    logprobs: Vec<Logprobs>,
    asked: bool,
    /// Position in the answer of the next token to come, and the one that no token may reach.
    next: u32,
    limit: u32,
    end: Option<JobEvent>,
}

impl Inbox {
    fn new(job: &Job) -> Self {
        let next = u32::try_from(job.delivered.len()).unwrap_or(u32::MAX);
        let limit = job.sampling.max_tokens;
        let asked = job.sampling.logprobs.is_some();
        let waiting = Waiting { tokens: Vec::new(), logprobs: Vec::new(), asked, next, limit, end: None };
        Self { waiting: Mutex::new(waiting), filled: Notify::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no panic while an inbox is held")
    }

    /// Puts an event in; returns whether it was the last. A worker that breaks the rules ends the job.
    fn push(&self, event: JobEvent) -> bool {
        let mut waiting = self.waiting();
        let end = match event {
            JobEvent::Tokens { position, tokens, logprobs } => {
                let room = waiting.limit.saturating_sub(waiting.next) as usize;
                let complete = logprobs.len() == if waiting.asked { tokens.len() } else { 0 };
                if position == waiting.next && tokens.len() <= room && complete {
                    waiting.next += tokens.len() as u32;
                    waiting.tokens.extend(tokens);
                    waiting.logprobs.extend(logprobs);
                    None
                } else {
                    let reason = "the worker sent tokens that do not follow".to_owned();
                    Some(JobEvent::Failed { reason, retryable: true })
                }
            }
            JobEvent::Failed { reason, retryable } => {
                Some(JobEvent::Failed { reason: reason.chars().take(REASON).collect(), retryable })
            }
            done @ JobEvent::Done { .. } => Some(done),
        };
        let ended = end.is_some();
        if ended {
            waiting.end = end;
        }
        drop(waiting);
        self.filled.notify_one();
        ended
    }

    fn pop(&self) -> Option<JobEvent> {
        let mut waiting = self.waiting();
        if waiting.tokens.is_empty() {
            return waiting.end.take();
        }
        let position = waiting.next - waiting.tokens.len() as u32;
        let most = if waiting.asked { LOGPROBS_PER_EVENT } else { TOKENS_PER_EVENT };
        let cut = waiting.tokens.len().min(most);
        let rest = waiting.tokens.split_off(cut);
        let tokens = std::mem::replace(&mut waiting.tokens, rest);
        let scored = if waiting.asked { cut } else { 0 };
        let rest = waiting.logprobs.split_off(scored);
        let logprobs = std::mem::replace(&mut waiting.logprobs, rest);
        Some(JobEvent::Tokens { position, tokens, logprobs })
    }
}

#[cfg(test)]
mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::chat::{Class, Finish, Sampling, Usage};
    use izar_common::id::{Hash, TurnId};

    fn job(max_tokens: u32, delivered: usize) -> Job {
        let sampling = Sampling { max_tokens, ..Sampling::default() };
        Job {
            turn: TurnId(1),
            choice: 0,
            attempt: 0,
            deployment: "m".parse().unwrap(),
            revision: Hash([0; 32]),
            prompt: vec![1],
            delivered: vec![9; delivered],
            sampling,
            cache_salt: [0; 16],
            numerics: None,
            class: Class::default(),
            capsule: Vec::new(),
        }
    }

    fn tokens(position: u32, tokens: &[Token]) -> JobEvent {
        JobEvent::Tokens { position, tokens: tokens.to_vec(), logprobs: Vec::new() }
    }

    fn done() -> JobEvent {
        JobEvent::Done { finish: Finish::Stop, usage: Usage::default() }
    }

    fn drain(job: &RunningJob) -> Vec<JobEvent> {
        std::iter::from_fn(|| job.ready()).collect()
    }

    #[tokio::test]
    async fn tokens_that_follow_are_merged_while_nobody_reads() {
        let jobs = Arc::new(Jobs::new(1));
        let running = jobs.submit(job(100, 2)).unwrap();
        jobs.deliver(vec![(1, tokens(2, &[5])), (77, done())]);
        assert_eq!(running.next().await, tokens(2, &[5]));
        jobs.deliver(vec![(1, tokens(3, &[6])), (1, tokens(4, &[7, 8])), (1, done()), (1, done())]);
        assert_eq!(drain(&running), [tokens(3, &[6, 7, 8]), done()]);
        let sent = jobs.outgoing().await;
        drop(running);
        assert_eq!((sent.len(), jobs.table().outbox.len()), (1, 0), "a job that has ended is not cancelled");
    }

    #[test]
    fn a_long_backlog_is_cut_into_frames() {
        let jobs = Arc::new(Jobs::new(1));
        let running = jobs.submit(job(10_000, 0)).unwrap();
        jobs.deliver(vec![(1, tokens(0, &vec![1; 9000]))]);
        let lengths = drain(&running).into_iter().map(|event| match event {
            JobEvent::Tokens { position, tokens, .. } => (position, tokens.len()),
            other => panic!("{other:?}"),
        });
        assert_eq!(lengths.collect::<Vec<_>>(), [(0, 4096), (4096, 4096), (8192, 808)]);
    }

    #[test]
    fn log_probabilities_stay_with_their_tokens_and_fit_their_frames() {
        let jobs = Arc::new(Jobs::new(1));
        let mut asking = job(10_000, 0);
        asking.sampling.logprobs = Some(20);
        let running = jobs.submit(asking.clone()).unwrap();
        let of = |token: Token| Logprobs { logprob: -(token as f32), top: vec![(Token::MAX, f32::MIN); 20] };
        for token in 0..600 {
            let (position, tokens) = (token, vec![token]);
            jobs.deliver(vec![(1, JobEvent::Tokens { position, tokens, logprobs: vec![of(token)] })]);
        }
        let mut seen = 0;
        for event in drain(&running) {
            assert!(izar_common::wire::to_bytes(&event).len() < 64 << 10);
            let JobEvent::Tokens { tokens, logprobs, .. } = event else { panic!("{event:?}") };
            assert!(tokens.len() == logprobs.len() && tokens.iter().zip(&logprobs).all(|(t, l)| of(*t) == *l));
            seen += tokens.len();
        }
        assert_eq!(seen, 600);
        let running = jobs.submit(asking).unwrap();
        jobs.deliver(vec![(2, tokens(0, &[1]))]);
        assert!(matches!(drain(&running)[..], [JobEvent::Failed { .. }]), "it sent none");
    }

    #[test]
    fn a_worker_that_breaks_the_order_or_the_limit_fails_the_job() {
        for (first, second) in [(tokens(1, &[1]), 0), (tokens(0, &[1, 2, 3, 4]), 0), (tokens(0, &[1, 2, 3]), 1)] {
            let jobs = Arc::new(Jobs::new(1));
            let running = jobs.submit(job(3, 0)).unwrap();
            jobs.deliver(vec![(1, first), (1, tokens(4, &[1]))]);
            let events = drain(&running);
            assert_eq!(events.len(), second + 1);
            assert!(matches!(events[second], JobEvent::Failed { retryable: true, .. }), "{events:?}");
        }
    }

    #[test]
    fn a_dead_worker_fails_its_jobs_and_takes_no_more() {
        let jobs = Arc::new(Jobs::new(1));
        let running = jobs.submit(job(3, 0)).unwrap();
        jobs.deliver(vec![(1, tokens(0, &[1]))]);
        jobs.close("it died");
        let failed = JobEvent::Failed { reason: "it died".into(), retryable: true };
        assert_eq!(drain(&running), [tokens(0, &[1]), failed]);
        assert_eq!(jobs.submit(job(3, 0)).unwrap_err(), "it died");
    }

    #[tokio::test]
    async fn a_fenced_worker_gives_its_jobs_back_and_takes_some_again_when_it_may() {
        let jobs = Arc::new(Jobs::new(1));
        let running = jobs.submit(job(3, 0)).unwrap();
        jobs.deliver(vec![(1, tokens(0, &[1]))]);
        jobs.fence(Some("its GPU is cordoned"));
        let failed = JobEvent::Failed { reason: "its GPU is cordoned".into(), retryable: true };
        assert_eq!(drain(&running), [tokens(0, &[1]), failed]);
        assert!(!jobs.busy());
        assert_eq!(jobs.submit(job(3, 0)).unwrap_err(), "its GPU is cordoned");
        drop(running);
        let sent = jobs.outgoing().await;
        assert!(matches!(sent[..], [ToWorker::Submit { id: 1, .. }, ToWorker::Cancel { id: 1 }]), "{sent:?}");
        jobs.fence(None);
        assert!(jobs.submit(job(3, 0)).is_ok());
    }

    #[tokio::test]
    async fn a_dropped_job_is_cancelled_once() {
        let jobs = Arc::new(Jobs::new(1));
        drop(jobs.submit(job(3, 0)).unwrap());
        let sent = jobs.outgoing().await;
        assert!(matches!(sent[..], [ToWorker::Submit { id: 1, .. }, ToWorker::Cancel { id: 1 }]), "{sent:?}");
    }

    #[tokio::test]
    async fn jobs_beyond_the_limit_or_a_stuck_worker_are_refused() {
        let jobs = Arc::new(Jobs::new(1));
        let running: Vec<_> = (0..BATCHES_PER_WORKER).map(|_| jobs.submit(job(1, 0)).unwrap()).collect();
        assert_eq!(jobs.submit(job(1, 0)).unwrap_err(), "the worker has 32 jobs already");
        drop(running);
        while jobs.table().outbox.len() < OUTBOX {
            drop(jobs.submit(job(1, 0)).unwrap());
        }
        assert_eq!(jobs.submit(job(1, 0)).unwrap_err(), "the worker takes no jobs at the moment");
        assert_eq!(jobs.outgoing().await.len(), OUTBOX);
        assert!(jobs.submit(job(1, 0)).is_ok());
    }
}
