//! What jobs gave, kept for a while: a controller that takes a turn over reads it from its beginning. And the capsules
//! that came with them, for a controller that does not have the request.
//!
//! Every job is kept while it runs and a grace time longer. A controller that dies leaves its jobs running for as long;
//! one that cancels a job has its answer forgotten, not its capsule: the client may come back. Memory is bounded: the oldest are forgotten first, and a turn of theirs is
//! computed again. Nothing here must survive.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use izar_common::chat::{Job, JobEvent, Logprobs, Token};
use izar_common::id::{NumericsId, TurnId, WorkerId};
use tokio::sync::watch;

/// How long the rest of a job is computed without its controller, and how long its answer is kept after the end.
pub const GRACE: Duration = Duration::from_secs(30);

/// Memory for all answers. At 4 bytes a token: some minutes of everything that a server computes.
const BYTES: usize = 64 << 20;

/// What an entry takes beside its tokens.
const ENTRY_BYTES: usize = 1000;

/// What a token's log-probabilities take beside their alternatives of 8 bytes.
const LOGPROB_BYTES: usize = 32;

/// Tokens in one event at most; see the inboxes of workers.
const TOKENS_PER_EVENT: usize = 256;

type Key = (TurnId, u32);

/// All that is kept.
#[derive(Debug, Clone, Default)]
pub struct Kept(Arc<Mutex<All>>);

#[derive(Debug, Default)]
struct All {
    entries: BTreeMap<Key, Arc<Entry>>,
    /// Oldest first; some may be forgotten or replaced already.
    order: VecDeque<(Key, Arc<Entry>)>,
    bytes: usize,
}

/// The answer of one job.
#[derive(Debug)]
pub struct Entry {
    pub worker: WorkerId,
    /// What computed it: several, if it was begun by another than this worker.
    pub numerics: Option<NumericsId>,
    scored: bool,
    /// Its beginning is known here.
    whole: bool,
    log: Mutex<Log>,
    /// Told of everything that is added.
    grew: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Log {
    tokens: Vec<Token>,
    logprobs: Vec<Logprobs>,
    end: Option<JobEvent>,
    ended: Option<Instant>,
    capsule: Vec<u8>,
    bytes: usize,
    /// The answer's memory was given back; nothing is added any more.
    forgotten: bool,
}

impl Kept {
    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().expect("no panic while answers are held")
    }

    /// Begins to keep a job's answer, which `worker` computes, and takes its capsule. A later attempt takes the place of an
    /// earlier one. Where the beginning is not known here (log-probabilities do not travel with a job that goes on), only
    /// the capsule is kept.
    pub fn begin(&self, job: &mut Job, worker: &WorkerId, numerics: Option<NumericsId>, now: Instant) -> Arc<Entry> {
        let scored = job.sampling.logprobs.is_some();
        let whole = !scored || job.delivered.is_empty();
        let numerics = match job.delivered.is_empty() || job.numerics == numerics {
            true => numerics,
            false => Some(NumericsId::SEVERAL),
        };
        let tokens = if whole { job.delivered.clone() } else { Vec::new() };
        let capsule = std::mem::take(&mut job.capsule);
        let bytes = ENTRY_BYTES + 4 * tokens.len() + capsule.len();
        let log = Log { tokens, capsule, bytes, ..Log::default() };
        let key = (job.turn, job.choice);
        let (grew, log) = (watch::Sender::new(()), Mutex::new(log));
        let entry = Arc::new(Entry { worker: worker.clone(), numerics, scored, whole, log, grew });
        let mut all = self.all();
        all.bytes += bytes;
        all.entries.insert(key, entry.clone());
        all.order.push_back((key, entry.clone()));
        all.shrink(now);
        entry
    }

    /// Finds what is kept of a job, unless it failed: then it is better begun anew.
    pub fn find(&self, turn: TurnId, choice: u32) -> Option<Arc<Entry>> {
        let entry = self.all().entries.get(&(turn, choice)).cloned()?;
        let failed = matches!(entry.log().end, Some(JobEvent::Failed { .. }));
        (entry.whole && !failed).then_some(entry)
    }

    /// The capsule of a turn's jobs, also of those whose answers are not kept.
    pub fn recall(&self, turn: TurnId) -> Option<Vec<u8>> {
        let all = self.all();
        let capsule = |entry: &Arc<Entry>| Some(entry.log().capsule.clone()).filter(|capsule| !capsule.is_empty());
        all.entries.range((turn, 0)..=(turn, u32::MAX)).find_map(|(_, entry)| capsule(entry))
    }

    /// Adds an event to an answer, unless it had to be forgotten.
    pub fn push(&self, entry: &Entry, event: &JobEvent, now: Instant) {
        // What is counted is what `shrink` takes off again: both happen under this lock.
        let mut all = self.all();
        all.bytes += entry.add(event, now);
        if all.bytes > BYTES {
            all.shrink(now);
        }
    }

    /// Forgets an answer that nobody wants any more; who reads it is told that it failed. Its capsule stays for the grace
    /// time: a client whose connection broke off looks the same as one that left for good.
    pub fn forget(&self, entry: &Entry, now: Instant) {
        let mut all = self.all();
        all.bytes -= entry.cancel(now);
    }
}

impl All {
    /// Forgets what ended long ago, and the oldest while there is too much.
    fn shrink(&mut self, now: Instant) {
        while let Some((key, entry)) = self.order.front() {
            let current = self.entries.get(key).is_some_and(|kept| Arc::ptr_eq(kept, entry));
            let over = entry.log().ended.is_some_and(|ended| ended + GRACE <= now);
            if current && !over && self.bytes <= BYTES {
                return;
            }
            let (key, entry) = self.order.pop_front().expect("it was just seen");
            self.bytes -= entry.drop_log();
            if current {
                self.entries.remove(&key);
            }
        }
    }
}

impl Entry {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("no panic while an answer is held")
    }

    /// Returns how many bytes it grew by.
    fn add(&self, event: &JobEvent, now: Instant) -> usize {
        let mut log = self.log();
        if log.forgotten {
            return 0;
        }
        let before = log.bytes;
        match event {
            JobEvent::Tokens { .. } if !self.whole => {}
            JobEvent::Tokens { tokens, logprobs, .. } => {
                log.tokens.extend_from_slice(tokens);
                log.logprobs.extend_from_slice(logprobs);
                let scored: usize = logprobs.iter().map(|l| LOGPROB_BYTES + 8 * l.top.len()).sum();
                log.bytes += 4 * tokens.len() + scored;
            }
            end => (log.end, log.ended) = (Some(end.clone()), Some(now)),
        }
        let added = log.bytes - before;
        drop(log);
        self.grew.send_replace(());
        added
    }

    /// Gives its memory back; who reads it is told that it failed. Returns how many bytes it had.
    fn drop_log(&self) -> usize {
        let mut log = self.log();
        let end = JobEvent::Failed { reason: "the answer is not kept any longer".to_owned(), retryable: true };
        let dropped = std::mem::replace(&mut *log, Log { end: Some(end), forgotten: true, ..Log::default() });
        drop(log);
        self.grew.send_replace(());
        dropped.bytes
    }

    /// Gives the answer's memory back and keeps the capsule. Returns how many bytes fewer it has.
    fn cancel(&self, now: Instant) -> usize {
        let mut log = self.log();
        if log.forgotten {
            return 0;
        }
        let end = JobEvent::Failed { reason: "the job was cancelled".to_owned(), retryable: true };
        let (before, capsule) = (log.bytes, std::mem::take(&mut log.capsule));
        let bytes = ENTRY_BYTES + capsule.len();
        *log = Log { end: Some(end), ended: Some(now), capsule, bytes, forgotten: true, ..Log::default() };
        drop(log);
        self.grew.send_replace(());
        before - bytes
    }

    /// Changes whenever something is added.
    pub fn growth(&self) -> watch::Receiver<()> {
        self.grew.subscribe()
    }

    /// What follows the first `position` tokens, if there is anything.
    pub fn after(&self, position: usize) -> Option<JobEvent> {
        let log = self.log();
        let end = log.tokens.len().min(position + TOKENS_PER_EVENT);
        if position >= end {
            return log.end.clone();
        }
        let logprobs = if self.scored { log.logprobs[position..end].to_vec() } else { Vec::new() };
        Some(JobEvent::Tokens { position: position as u32, tokens: log.tokens[position..end].to_vec(), logprobs })
    }
}

#[cfg(test)]
mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sequence::tests::job;

    fn tokens(position: u32, tokens: &[Token]) -> JobEvent {
        JobEvent::Tokens { position, tokens: tokens.to_vec(), logprobs: Vec::new() }
    }

    fn begin(kept: &Kept, turn: u128, delivered: &[Token], now: Instant) -> Arc<Entry> {
        let mut job = Job { turn: TurnId(turn), capsule: b"sealed".to_vec(), ..job(&[1], delivered, 100) };
        let entry = kept.begin(&mut job, &"m.0".parse().unwrap(), Some(NumericsId(1)), now);
        assert!(job.capsule.is_empty(), "no worker gets it");
        entry
    }

    #[test]
    fn an_answer_is_read_from_its_beginning_also_if_it_went_on_here() {
        let (kept, now) = (Kept::default(), Instant::now());
        let entry = begin(&kept, 1, &[5, 6], now);
        kept.push(&entry, &tokens(2, &[7]), now);
        let found = kept.find(TurnId(1), 0).unwrap();
        assert_eq!(found.after(0), Some(tokens(0, &[5, 6, 7])));
        assert_eq!((found.after(2), found.after(3)), (Some(tokens(2, &[7])), None));
        let many: Vec<Token> = (0..TOKENS_PER_EVENT as u32 + 9).collect();
        kept.push(&entry, &tokens(3, &many), now);
        let Some(JobEvent::Tokens { tokens, .. }) = found.after(3) else { panic!("there is more") };
        assert_eq!(tokens.len(), TOKENS_PER_EVENT);
        assert!(kept.find(TurnId(1), 1).is_none() && kept.find(TurnId(2), 0).is_none());
    }

    #[test]
    fn answers_are_forgotten_after_the_grace_time_and_when_they_are_cancelled() {
        let (kept, now) = (Kept::default(), Instant::now());
        let (first, second) = (begin(&kept, 1, &[], now), begin(&kept, 2, &[], now));
        kept.push(&first, &JobEvent::Failed { reason: "x".into(), retryable: true }, now);
        assert!(kept.find(TurnId(1), 0).is_none(), "what failed is begun anew");
        kept.push(&second, &tokens(0, &[1, 2]), now);
        kept.forget(&second, now);
        assert!(kept.find(TurnId(2), 0).is_none() && matches!(second.after(0), Some(JobEvent::Failed { .. })));
        assert_eq!(kept.recall(TurnId(2)).unwrap(), b"sealed", "its client may come back");
        let third = begin(&kept, 3, &[], now);
        kept.push(&third, &tokens(0, &[1]), now);
        let done = JobEvent::Done { finish: izar_common::chat::Finish::Stop, usage: Default::default() };
        kept.push(&third, &done, now);
        begin(&kept, 4, &[], now + GRACE / 2);
        assert_eq!(kept.find(TurnId(3), 0).unwrap().after(1), Some(done));
        begin(&kept, 5, &[], now + GRACE);
        assert!(kept.find(TurnId(3), 0).is_none() && kept.find(TurnId(4), 0).is_some());
        assert_eq!(kept.all().order.len(), 2);
        assert_eq!((kept.recall(TurnId(2)), kept.recall(TurnId(9))), (None, None));
    }

    #[test]
    fn an_answer_that_other_numerics_began_says_so() {
        let (kept, now) = (Kept::default(), Instant::now());
        let begin = |turn, delivered: &[Token], by, here| {
            let mut job = Job { turn: TurnId(turn), numerics: by, ..job(&[1], delivered, 100) };
            kept.begin(&mut job, &"m.0".parse().unwrap(), here, now).numerics
        };
        let (one, two) = (Some(NumericsId(1)), Some(NumericsId(2)));
        assert_eq!((begin(1, &[], one, two), begin(2, &[5], one, one)), (two, one));
        assert_eq!(begin(3, &[5], one, two), Some(NumericsId::SEVERAL));
    }

    #[test]
    fn of_an_answer_whose_beginning_is_unknown_only_the_capsule_is_kept() {
        let (kept, now) = (Kept::default(), Instant::now());
        let mut job = Job { turn: TurnId(1), capsule: b"sealed".to_vec(), ..job(&[1], &[5], 100) };
        job.sampling.logprobs = Some(0);
        let entry = kept.begin(&mut job, &"m.0".parse().unwrap(), None, now);
        kept.push(&entry, &tokens(1, &[6]), now);
        assert!(kept.find(TurnId(1), 0).is_none() && kept.recall(TurnId(1)).is_some());
        assert_eq!(kept.all().bytes, ENTRY_BYTES + 6);
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_goes_first() {
        let (kept, now) = (Kept::default(), Instant::now());
        let entries: Vec<_> = (0..10).map(|turn| begin(&kept, turn, &[], now)).collect();
        let many = vec![7; BYTES / 4 / 8];
        entries.iter().for_each(|entry| kept.push(entry, &tokens(0, &many), now));
        assert!(kept.all().bytes <= BYTES);
        assert!(kept.find(TurnId(0), 0).is_none() && kept.find(TurnId(9), 0).is_some());
        assert!(matches!(entries[0].after(0), Some(JobEvent::Failed { .. })), "who reads it goes on otherwise");
        (0..100).for_each(|_| kept.push(&entries[0], &tokens(0, &many), now));
        let counted: usize = kept.all().order.iter().map(|(_, entry)| entry.log().bytes).sum();
        assert_eq!(kept.all().bytes, counted, "a forgotten answer counts no longer");
    }
}
