//! Echo: deterministic words at set times, without weights, for tests and benchmarks.
//!
//! Each answer has its own times: the first token `first_token_us` after the job came, each next one `next_token_us`
//! later, on a schedule that does not drift. Any number of answers run at once; a poll gives all that is due, one event
//! a token as from a real model, and nothing runs between.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use izar_common::chat::{Finish, Job, JobEvent, Logprobs, Token, Usage};
use izar_common::health::Load;
use izar_common::prefix::Sketch;
use izar_common::text;

use crate::engine::sampler::mix;
use crate::engine::sequence::{self, Limits};
use crate::engine::{Engine, Events, State};

/// Answers at once, cancelled ones that were not due yet included. Far above any benchmark's; a job past it is sent
/// back as retryable.
const ANSWER_LIMIT: usize = 1 << 16;

/// What is due within this time comes together: a step costs several times 10 µs of system calls, and no test looks
/// closer than 200 µs.
const GRAIN: Duration = Duration::from_micros(100);

/// Events of a poll at most, so that a frame stays far below its limit; the rest follows at once.
const EVENT_LIMIT: usize = 8192;

/// Tokens that an answer gives in a row before the others have their turn.
const TURN_TOKENS: usize = 64;

struct Answer {
    /// Tells it from an earlier answer of the same number.
    serial: u64,
    prompt_tokens: u32,
    /// Hash of the prompt.
    hash: u64,
    /// Tokens given, the delivered ones included.
    given: u32,
    last: u32,
    /// Whether tokens come with log-probabilities, and with how many alternatives.
    logprobs: Option<u8>,
    /// When the next token is due.
    due: Instant,
}

/// The engine of the echo model.
pub struct Echo {
    limits: Limits,
    first: Duration,
    next: Duration,
    answers: HashMap<u64, Answer>,
    /// (when, serial, number) of each answer's next token; those of cancelled answers are passed over.
    due: BinaryHeap<Reverse<(Instant, u64, u64)>>,
    serial: u64,
    /// Answers to submissions, for the next poll.
    immediate: Events,
}

impl Echo {
    pub fn new(first_token_us: u64, next_token_us: u64, context: usize) -> Self {
        Self {
            limits: Limits { context, vocabulary: text::echo::VOCABULARY as usize, eos: Vec::new() },
            first: Duration::from_micros(first_token_us),
            next: Duration::from_micros(next_token_us),
            answers: HashMap::new(),
            due: BinaryHeap::new(),
            serial: 0,
            immediate: Vec::new(),
        }
    }

    /// Takes a job, or returns its end.
    fn accept(&mut self, now: Instant, number: u64, job: &Job) -> Option<JobEvent> {
        if let Err(reason) = sequence::check(job, &self.limits) {
            return Some(JobEvent::Failed { reason, retryable: false });
        }
        if job.sampling.grammar.is_some() {
            let reason = "the echo model cannot follow a grammar".to_owned();
            return Some(JobEvent::Failed { reason, retryable: false });
        }
        if self.due.len() >= ANSWER_LIMIT {
            return Some(JobEvent::Failed { reason: format!("{ANSWER_LIMIT} answers run already"), retryable: true });
        }
        let prompt_tokens = job.prompt.len() as u32;
        let given = job.delivered.len() as u32;
        let last = job.sampling.max_tokens.min(self.limits.context as u32 - prompt_tokens);
        if given >= last {
            return Some(done(prompt_tokens, given));
        }
        let hash = job.prompt.iter().fold(0, |hash, token| mix(hash ^ u64::from(*token)));
        let due = now + self.first;
        self.serial += 1;
        self.due.push(Reverse((due, self.serial, number)));
        let (serial, logprobs) = (self.serial, job.sampling.logprobs);
        self.answers.insert(number, Answer { serial, prompt_tokens, hash, given, last, logprobs, due });
        None
    }

    /// Gives an answer's due tokens; returns when the next is due, or `None` at its end.
    fn go_on(answer: &mut Answer, next: Duration, until: Instant, mut give: impl FnMut(JobEvent)) -> Option<Instant> {
        for _ in 0..TURN_TOKENS {
            if answer.due > until {
                break;
            }
            let token = word(answer.hash, answer.given);
            // No other word could come.
            let sure = |count: u8| Logprobs { logprob: 0.0, top: (0..count.min(1)).map(|_| (token, 0.0)).collect() };
            let logprobs = answer.logprobs.map(sure).into_iter().collect();
            give(JobEvent::Tokens { position: answer.given, tokens: vec![token], logprobs });
            answer.given += 1;
            answer.due += next;
            if answer.given == answer.last {
                give(done(answer.prompt_tokens, answer.given));
                return None;
            }
        }
        Some(answer.due)
    }
}

/// The word at a position of the answer to a prompt.
fn word(hash: u64, position: u32) -> Token {
    let words = text::echo::VOCABULARY - text::echo::FIRST_WORD;
    text::echo::FIRST_WORD + (mix(hash ^ u64::from(position) << 32) % u64::from(words)) as Token
}

fn done(prompt_tokens: u32, completion_tokens: u32) -> JobEvent {
    JobEvent::Done { finish: Finish::Length, usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens } }
}

impl Engine for Echo {
    fn submit(&mut self, now: Instant, number: u64, job: Job) {
        let answer = self.accept(now, number, &job);
        self.immediate.extend(answer.map(|event| (number, event)));
    }
    fn cancel(&mut self, number: u64) {
        self.answers.remove(&number);
    }
    fn poll(&mut self, now: Instant) -> Events {
        let mut events = std::mem::take(&mut self.immediate);
        let until = now + GRAIN;
        while let Some(&Reverse((at, serial, number))) = self.due.peek()
            && at <= until
            && events.len() < EVENT_LIMIT
        {
            self.due.pop();
            let Some(answer) = self.answers.get_mut(&number).filter(|a| a.serial == serial) else { continue };
            match Self::go_on(answer, self.next, until, |event| events.push((number, event))) {
                // A new serial sends it behind the others that are due at the same time.
                Some(due) => {
                    self.serial += 1;
                    answer.serial = self.serial;
                    self.due.push(Reverse((due, self.serial, number)));
                }
                None => drop(self.answers.remove(&number)),
            }
        }
        events
    }
    fn due(&self) -> Option<Instant> {
        // A sleeper is woken about half a grain late (Linux' timer slack), so it asks for that much less.
        self.due.peek().map(|Reverse((at, ..))| at.checked_sub(GRAIN / 2).unwrap_or(*at))
    }
    fn state(&self) -> &State {
        &State::Ready
    }
    fn load(&self) -> Load {
        Load { running: self.answers.len() as u32, ..Load::default() }
    }
    fn held(&self) -> u64 {
        // It keeps nothing.
        0
    }
    fn sketch(&self) -> Sketch {
        Sketch::default()
    }
    fn steps(&self) -> u64 {
        // It computes none.
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sequence::tests::job;

    const MS: Duration = Duration::from_millis(1);

    fn tokens(events: &Events, number: u64) -> Vec<Token> {
        let of = events.iter().filter(|(n, _)| *n == number);
        of.filter_map(|(_, e)| if let JobEvent::Tokens { tokens, .. } = e { Some(tokens[0]) } else { None }).collect()
    }
    fn ended(events: &Events) -> usize {
        events.iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).count()
    }

    #[test]
    fn tokens_come_at_their_times_and_not_before() {
        let (mut echo, start) = (Echo::new(5000, 2000, 100), Instant::now());
        echo.submit(start, 1, job(&[1, 2], &[], 3));
        assert_eq!(echo.due(), Some(start + 5 * MS - GRAIN / 2));
        assert_eq!(echo.poll(start + 4 * MS), []);
        assert_eq!(tokens(&echo.poll(start + 5 * MS), 1).len(), 1);
        assert_eq!(echo.due(), Some(start + 7 * MS - GRAIN / 2));
        let rest = echo.poll(start + 20 * MS);
        assert_eq!((tokens(&rest, 1).len(), ended(&rest), echo.due()), (2, 1, None));
    }

    #[test]
    fn answers_depend_on_prompt_and_position_alone() {
        let answer = |prompt: &[Token], delivered: &[Token]| {
            let (mut echo, start) = (Echo::new(0, 0, 100), Instant::now());
            echo.submit(start, 1, job(prompt, delivered, 8));
            tokens(&echo.poll(start), 1)
        };
        let whole = answer(&[1, 2, 3], &[]);
        assert_eq!((whole.len(), answer(&[1, 2, 3], &[])), (8, whole.clone()));
        assert_ne!(answer(&[1, 2, 4], &[]), whole);
        assert_eq!(answer(&[1, 2, 3], &whole[..3]), whole[3..]);
        assert!(whole.iter().all(|t| (text::echo::FIRST_WORD..text::echo::VOCABULARY).contains(t)));
    }

    #[test]
    fn every_token_is_an_event_of_its_own_with_its_position() {
        let (mut echo, start) = (Echo::new(0, 0, 100), Instant::now());
        echo.submit(start, 1, job(&[1], &[], 3));
        let events = echo.poll(start);
        let positions: Vec<u32> = events
            .iter()
            .filter_map(|(_, e)| if let JobEvent::Tokens { position, .. } = e { Some(*position) } else { None })
            .collect();
        assert_eq!(positions, [0, 1, 2]);
        assert_eq!(events[3].1, done(1, 3));
    }

    #[test]
    fn long_answers_take_turns_and_a_poll_is_bounded() {
        let (mut echo, start) = (Echo::new(0, 0, 100_000), Instant::now());
        (0..2).for_each(|i| echo.submit(start, i, job(&[1], &[], 50_000)));
        let events = echo.poll(start);
        assert!(events.len() < EVENT_LIMIT + TURN_TOKENS + 1);
        assert!(tokens(&events, 0).len().abs_diff(tokens(&events, 1).len()) <= TURN_TOKENS);
        assert!(echo.due().unwrap() <= start);
        let (mut all, mut polls) = (events.len(), 0);
        while echo.due().is_some() && polls < 100 {
            all += echo.poll(start).len();
            polls += 1;
        }
        assert_eq!(all, 100_002);
    }

    #[test]
    fn cancelled_answers_fall_silent_and_their_number_may_come_again() {
        let (mut echo, start) = (Echo::new(1000, 1000, 100), Instant::now());
        echo.submit(start, 1, job(&[1], &[], 3));
        echo.cancel(1);
        assert_eq!(echo.load().jobs(), 0);
        echo.submit(start + 5 * MS, 1, job(&[1], &[], 3));
        assert_eq!(echo.poll(start + 2 * MS), []);
        assert_eq!(tokens(&echo.poll(start + 6 * MS), 1).len(), 1);
    }

    #[test]
    fn words_are_sure_and_follow_no_grammar() {
        let (mut echo, start) = (Echo::new(0, 0, 100), Instant::now());
        let mut asking = job(&[1], &[], 1);
        asking.sampling.logprobs = Some(5);
        echo.submit(start, 1, asking.clone());
        let events = echo.poll(start);
        let (_, JobEvent::Tokens { tokens, logprobs, .. }) = &events[0] else { panic!("{events:?}") };
        assert_eq!(*logprobs, [Logprobs { logprob: 0.0, top: vec![(tokens[0], 0.0)] }]);
        asking.sampling.grammar = Some(izar_common::chat::Grammar::JsonObject);
        echo.submit(start, 2, asking);
        assert!(matches!(echo.poll(start)[0].1, JobEvent::Failed { retryable: false, .. }));
    }

    #[test]
    fn the_context_bounds_an_answer_and_full_ones_end_at_once() {
        let (mut echo, start) = (Echo::new(0, 0, 10), Instant::now());
        echo.submit(start, 1, job(&[1; 8], &[], 50));
        assert_eq!(echo.poll(start).last(), Some(&(1, done(8, 2))));
        echo.submit(start, 2, job(&[1], &[300, 301], 2));
        assert_eq!(echo.poll(start), [(2, done(1, 2))]);
        echo.submit(start, 3, job(&[1; 10], &[], 1));
        assert!(matches!(echo.poll(start)[0].1, JobEvent::Failed { retryable: false, .. }));
    }
}
