//! The queues of this controller, one for each deployment and revision, and the turns that wait in them.
//!
//! Who finds room and nobody waiting goes through without a task or a channel. Who must wait holds the end of a channel,
//! and one task gives the verdicts: when a job has ended, an agent has reported, or somebody's time is over. A guard
//! stands for a turn, waiting or dispatched, so whoever drops it leaves nothing behind. No lock is held over an await.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use izar_common::chat::{Class, Usage};
use izar_common::id::{DeploymentId, Hash};
use serde::Serialize;
use tokio::sync::{Notify, oneshot};

use super::error::Error;
use crate::agents::Agents;
use crate::metrics::{Counter, Histogram, Kind, Metrics};
use crate::queue::estimate::Lesson;
use crate::queue::{Ask, Offer, Queue, Refusal, TENANT_ENTRIES, Ticket, Verdict, Why};

/// Queues kept at once. Deployments are fewer; what a redeployment leaves empty is dropped for new ones.
const QUEUES: usize = 1024;

/// How a request came to its turn, for whoever explains it later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Facts {
    pub class: Class,
    /// Requests of its class and of more urgent ones that waited when it came.
    pub ahead: u32,
    pub waited_ms: u64,
    /// Why it was refused: `queue_full`, `tenant_full`, `displaced`, `wait` or `deadline`.
    pub refused: Option<&'static str>,
    /// What the answer was expected to take, waiting included, when it was refused.
    pub expected_ms: Option<u64>,
}

impl Facts {
    /// Whether it found no place free.
    pub fn waited(&self) -> bool {
        self.ahead > 0 || self.waited_ms > 0
    }
}

/// A handle to all queues. Cheap to clone.
#[derive(Clone)]
pub struct Queues(Arc<Inner>);

struct Inner {
    agents: Agents,
    metrics: Arc<Metrics>,
    lines: Mutex<HashMap<(DeploymentId, Hash), Arc<Line>>>,
    /// Told when somebody begins to wait.
    waiting: Notify,
    /// How long nobody may be there to compute before those that wait are refused.
    patience: Duration,
}

/// One queue, its waiters and its metrics.
struct Line {
    deployment: DeploymentId,
    revision: Hash,
    core: Mutex<Core>,
    /// By class.
    waits: [Arc<Histogram>; 3],
    met: [Arc<Counter>; 3],
    missed: [Arc<Counter>; 3],
}

#[derive(Default)]
struct Core {
    queue: Queue,
    waiters: HashMap<Ticket, oneshot::Sender<Verdict>>,
    /// Since when there is no replica.
    bare_since: Option<Instant>,
}

/// What becomes of a request that wants its turn.
pub enum Entered {
    Turn(Pass),
    Waits(Waiting),
    Refused(Refused),
}

/// A refusal: what the client is told, and what is kept.
#[derive(Debug)]
pub struct Refused {
    pub error: Error,
    pub facts: Facts,
}

impl Line {
    fn new(metrics: &Metrics, deployment: &DeploymentId, revision: Hash) -> Self {
        let name = deployment.as_str();
        let deadlines = |outcome| Class::ALL.map(|class| metrics.deadlines.with(&[name, class.as_str(), outcome]));
        Self {
            deployment: deployment.clone(),
            revision,
            core: Mutex::default(),
            waits: Class::ALL.map(|class| metrics.queue_wait_seconds.with(&[name, class.as_str()])),
            met: deadlines("met"),
            missed: deadlines("missed"),
        }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().expect("no panic while a queue is held")
    }
}

impl Core {
    /// Tells the verdicts to those that wait for them.
    fn tell(&mut self) {
        for (ticket, verdict) in self.queue.verdicts() {
            let waiter = self.waiters.remove(&ticket).expect("who waits has a waiter");
            // Who has left meanwhile takes its entry along.
            let _ = waiter.send(verdict);
        }
    }
}

impl Queues {
    /// `patience`: how long a replica may be missing before those that wait for it are refused.
    pub fn new(agents: Agents, metrics: Arc<Metrics>, patience: Duration) -> Self {
        let inner =
            Inner { agents, metrics: metrics.clone(), lines: Mutex::default(), waiting: Notify::new(), patience };
        let queues = Self(Arc::new(inner));
        let read = Arc::downgrade(&queues.0);
        let help = "Requests that wait for a place in a worker's batch.";
        metrics.numbers("izar_queue_length", help, Kind::Gauge, move |samples| {
            let Some(inner) = read.upgrade() else { return };
            let mut lengths = HashMap::new();
            for line in inner.all() {
                for class in Class::ALL {
                    *lengths.entry((line.deployment.clone(), class)).or_insert(0) += line.core().queue.waiting(class);
                }
            }
            for ((deployment, class), length) in lengths {
                let labels = [("deployment", deployment.as_str()), ("class", class.as_str())];
                samples(&labels, f64::from(length));
            }
        });
        queues
    }

    /// Asks for a turn.
    pub fn enter(&self, deployment: &DeploymentId, revision: Hash, ask: Ask) -> Entered {
        let (line, now, class) = (self.0.line(deployment, revision), Instant::now(), ask.class);
        let deadline = ask.deadline;
        let mut core = line.core();
        let room = self.0.agents.room(deployment, revision);
        let facts = Facts { class, ..Facts::default() };
        let pass = |ticket| {
            line.waits[class as usize].observe(Duration::ZERO);
            Pass::new(line.clone(), self.clone(), ticket, deadline, facts, now)
        };
        if room.replicas == 0 {
            // Placing says why there is nobody.
            drop(core);
            return Entered::Turn(pass(None));
        }
        match core.queue.offer(ask, room, now) {
            Offer::Dispatched(ticket) => {
                drop(core);
                Entered::Turn(pass(Some(ticket)))
            }
            Offer::Refused(refusal) => {
                // Nobody was displaced for it.
                drop(core);
                Entered::Refused(self.refused(&line, refusal, facts))
            }
            Offer::Waits { ticket, ahead } => {
                let (tell, verdict) = oneshot::channel();
                core.waiters.insert(ticket, tell);
                // There may be room for it all the same.
                core.queue.turn(room, now);
                core.tell();
                drop(core);
                self.0.waiting.notify_one();
                let facts = Facts { ahead, ..facts };
                Entered::Waits(Waiting { line, queues: self.clone(), ticket, verdict, deadline, facts, since: now })
            }
        }
    }

    /// Gives verdicts for as long as it is polled.
    pub async fn run(self) {
        loop {
            let due = self.turn();
            tokio::select! {
                () = self.0.waiting.notified() => {}
                () = self.0.agents.freed(), if due.is_some() => {}
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            }
        }
    }

    /// Gives the verdicts that are due; returns when the next one is, if anybody waits.
    fn turn(&self) -> Option<Instant> {
        let now = Instant::now();
        let due = self.0.all().into_iter().filter_map(|line| self.turn_of(&line, now)).min()?;
        // The queue looks for what is past.
        Some(due.max(now) + Duration::from_millis(1))
    }

    fn turn_of(&self, line: &Line, now: Instant) -> Option<Instant> {
        let mut core = line.core();
        if core.queue.is_empty() {
            core.bare_since = None;
            return None;
        }
        let room = self.0.agents.room(&line.deployment, line.revision);
        if room.replicas > 0 {
            core.bare_since = None;
        } else if now >= *core.bare_since.get_or_insert(now) + self.0.patience {
            core.queue.refuse_all(Why::Nobody);
        }
        core.queue.turn(room, now);
        core.tell();
        core.queue.due()
    }

    fn refused(&self, line: &Line, refusal: Refusal, facts: Facts) -> Refused {
        let (why, class) = (refusal.why.as_str(), facts.class);
        self.0.metrics.queue_refused.with(&[line.deployment.as_str(), class.as_str(), why]).add(1);
        let expected_ms = refusal.expected.as_millis() as u64;
        let error = error(&line.deployment, class, &refusal, expected_ms);
        Refused { error, facts: Facts { refused: Some(why), expected_ms: Some(expected_ms), ..facts } }
    }
}

impl Inner {
    fn line(&self, deployment: &DeploymentId, revision: Hash) -> Arc<Line> {
        let mut lines = self.lines.lock().expect("no panic while the queues are held");
        let name = (deployment.clone(), revision);
        if let Some(line) = lines.get(&name) {
            return line.clone();
        }
        if lines.len() >= QUEUES {
            lines.retain(|_, line| !line.core().queue.is_idle());
        }
        let line = Arc::new(Line::new(&self.metrics, deployment, revision));
        lines.insert(name, line.clone());
        line
    }

    fn all(&self) -> Vec<Arc<Line>> {
        self.lines.lock().expect("no panic while the queues are held").values().cloned().collect()
    }
}

fn error(deployment: &DeploymentId, class: Class, refusal: &Refusal, expected_ms: u64) -> Error {
    let retry_after_s = refusal.retry_after.as_secs() as u32;
    let reason = match refusal.why {
        Why::Deadline => return Error::DeadlineUnreachable { expected_ms, retry_after_s },
        Why::Nobody => return Error::NoReplica { reason: format!("no replica of {deployment} is ready any more") },
        Why::Full => format!("too many requests wait for {deployment} already"),
        Why::TenantFull => format!("{TENANT_ENTRIES} requests of this tenant wait for {deployment} already"),
        Why::Displaced => format!("the queue of {deployment} is full, and this tenant has more than its share of it"),
        Why::Wait => {
            format!("{deployment} is busy: a request of class {class} may not wait for as long as it would take")
        }
    };
    Error::QueueFull { reason, retry_after_s }
}

/// A request that waits for its turn. Dropping it leaves the queue.
pub struct Waiting {
    line: Arc<Line>,
    queues: Queues,
    ticket: Ticket,
    verdict: oneshot::Receiver<Verdict>,
    deadline: Option<Instant>,
    facts: Facts,
    since: Instant,
}

impl Waiting {
    /// Waits for the verdict. Cancellation-safe; to be called until it has said it, once.
    pub async fn verdict(&mut self) -> Result<Pass, Refused> {
        let verdict = (&mut self.verdict).await.expect("a verdict is told before the line forgets the waiter");
        let (now, ticket) = (Instant::now(), std::mem::take(&mut self.ticket));
        let waited = now - self.since;
        let facts = Facts { waited_ms: waited.as_millis() as u64, ..self.facts };
        match verdict {
            Verdict::Dispatched => {
                self.line.waits[facts.class as usize].observe(waited);
                Ok(Pass::new(self.line.clone(), self.queues.clone(), Some(ticket), self.deadline, facts, now))
            }
            Verdict::Refused(refusal) => Err(self.queues.refused(&self.line, refusal, facts)),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Tickets begin at 1; 0 is of who has its verdict.
        if self.ticket == 0 {
            return;
        }
        let mut core = self.line.core();
        core.waiters.remove(&self.ticket);
        core.queue.leave(self.ticket);
        // Its verdict may be on the way.
        core.queue.ended(self.ticket, None, Instant::now());
        drop(core);
        self.queues.0.waiting.notify_one();
    }
}

/// A turn that may go to workers. Dropping it ends it for the queue.
pub struct Pass {
    line: Arc<Line>,
    queues: Queues,
    /// `None`: there was nobody to queue for.
    ticket: Option<Ticket>,
    deadline: Option<Instant>,
    since: Instant,
    first: OnceLock<Instant>,
    /// Its jobs did not run on one worker from their beginning to their end.
    disturbed: AtomicBool,
    facts: Facts,
}

impl Pass {
    fn new(
        line: Arc<Line>,
        queues: Queues,
        ticket: Option<Ticket>,
        deadline: Option<Instant>,
        facts: Facts,
        since: Instant,
    ) -> Self {
        let (first, disturbed) = (OnceLock::new(), AtomicBool::new(false));
        Self { line, queues, ticket, deadline, since, first, disturbed, facts }
    }

    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// Whether it has a place that workers did not take, and time to wait for one.
    pub fn may_wait(&self) -> bool {
        let now = Instant::now();
        let longest = self.since + self.queues.0.patience;
        self.ticket.is_some() && now < self.deadline.map_or(longest, |deadline| deadline.min(longest))
    }

    /// Says that the turn's jobs are counted for their workers.
    pub fn placed(&self) {
        if let Some(ticket) = self.ticket {
            self.line.core().queue.placed(ticket);
        }
    }

    /// Notes the first token.
    pub fn first_token(&self, now: Instant) {
        let _ = self.first.set(now);
    }

    /// Says that a job was placed again: its times teach nothing.
    pub fn disturbed(&self) {
        self.disturbed.store(true, Relaxed);
    }

    /// Ends it. `usage`: what the whole answer came to; `None` if it failed.
    pub fn finish(mut self, usage: Option<Usage>) {
        let (now, class) = (Instant::now(), self.facts.class as usize);
        let first = self.first.get().copied();
        let undisturbed = first.zip(usage).filter(|_| !self.disturbed.load(Relaxed));
        self.end(undisturbed.map(|(first, usage)| Lesson {
            answer_tokens: usage.completion_tokens,
            first: first - self.since,
            whole: now - self.since,
        }));
        if let Some(deadline) = self.deadline {
            let met = usage.is_some() && now <= deadline;
            (if met { &self.line.met } else { &self.line.missed })[class].add(1);
        }
    }

    fn end(&mut self, lesson: Option<Lesson>) {
        let Some(ticket) = self.ticket.take() else { return };
        let mut core = self.line.core();
        core.queue.ended(ticket, lesson, Instant::now());
        if !core.queue.is_empty() {
            drop(core);
            self.queues.0.waiting.notify_one();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.end(None);
    }
}
