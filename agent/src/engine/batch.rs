//! Which sequences a step computes. Pure: jobs and drawn tokens in, steps and events out.
//!
//! Continuous batching: a job joins as soon as there is a place, and leaves at the step in which it ends. A step takes
//! one token of every running answer first, then chunks of new prompts, oldest first, up to a budget, so that a long
//! prompt slows running answers but never stops them. Cancelled sequences leave at once; the tokens of a step that was
//! under way are dropped.

use std::collections::VecDeque;

use izar_common::chat::{Job, JobEvent, Sampling, Token};

use super::sampler::Place;
use super::sequence::{self, Limits, Sequence};
use crate::model::{Batch, SequenceId, Wants};

/// Jobs that wait for a place in the batch. The scheduler of the controllers spreads load long before; a job past this
/// is sent back as retryable, since another replica or a later time serves it better than a queue of minutes.
pub const WAITING_LIMIT: usize = 512;

/// Tokens that a step computes at most, the answers' own not counted. On the reference path 256 tokens of a model of
/// 135 million parameters take 0.8 s on two cores, and no running answer shall pause for longer.
const STEP_TOKENS: usize = 256;

/// One step: what to forget, what to compute, what to draw.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    pub closed: Vec<SequenceId>,
    pub batch: Batch,
    /// One for each chunk that wants its last logits, in the chunks' order.
    pub draws: Vec<Draw>,
}

/// A token to be drawn from a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    pub sequence: SequenceId,
    pub sampling: Sampling,
    pub place: Place,
}

/// A drawn token; `None` if the logits held no number.
pub type Drawn = (SequenceId, Option<Token>);

/// The running and the waiting sequences of one model.
#[derive(Debug)]
pub struct Batcher {
    limits: Limits,
    max_batch: usize,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    closed: Vec<SequenceId>,
    next_id: u64,
}

impl Batcher {
    pub fn new(limits: Limits, max_batch: usize) -> Self {
        let (running, waiting, closed) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { limits, max_batch: max_batch.max(1), running, waiting, closed, next_id: 0 }
    }
    /// Takes a job; returns its end if it has one already.
    pub fn submit(&mut self, number: u64, job: Job) -> Option<JobEvent> {
        let failed = |reason: String, retryable| Some(JobEvent::Failed { reason, retryable });
        if let Err(reason) = sequence::check(&job, &self.limits) {
            return failed(reason, false);
        }
        if self.waiting.len() >= WAITING_LIMIT {
            return failed(format!("{WAITING_LIMIT} jobs wait already"), true);
        }
        let sequence = Sequence::new(number, SequenceId(self.next_id), job);
        self.next_id += 1;
        let ended = sequence.ended(&self.limits);
        if ended.is_none() {
            self.waiting.push_back(sequence);
        }
        ended
    }
    /// Forgets a job. There is no event: whoever cancelled does not listen any more.
    pub fn cancel(&mut self, number: u64) {
        self.waiting.retain(|s| s.job != number);
        let closed = &mut self.closed;
        self.running.retain(|s| {
            let stays = s.job != number;
            if !stays {
                closed.push(s.id);
            }
            stays
        });
    }
    /// Plans the next step, if there is anything to do. Its results go to [`Batcher::finish`] before the next plan.
    pub fn plan(&mut self) -> Option<Step> {
        while self.running.len() < self.max_batch {
            let Some(next) = self.waiting.pop_front() else { break };
            self.running.push(next);
        }
        let mut step = Step { closed: std::mem::take(&mut self.closed), ..Step::default() };
        let mut budget = STEP_TOKENS;
        let (prompts, answers): (Vec<_>, Vec<_>) = self.running.iter_mut().partition(|s| s.pending().len() > 1);
        answers.into_iter().for_each(|s| add(&mut step, s, 1));
        for sequence in prompts {
            let tokens = sequence.pending().len().min(budget);
            if tokens > 0 {
                add(&mut step, sequence, tokens);
                budget -= tokens;
            }
        }
        (!step.batch.chunks.is_empty() || !step.closed.is_empty()).then_some(step)
    }
    /// Takes the tokens that a step drew, and returns what the jobs shall hear.
    pub fn finish(&mut self, drawn: Vec<Drawn>) -> Vec<(u64, JobEvent)> {
        let mut events = Vec::with_capacity(drawn.len());
        for (id, token) in drawn {
            let Some(at) = self.running.iter().position(|s| s.id == id) else { continue };
            let sequence = &mut self.running[at];
            let job = sequence.job;
            let ended = match token {
                Some(token) => {
                    let advance = sequence.advance(token, &self.limits);
                    events.extend(advance.events.into_iter().map(|event| (job, event)));
                    advance.ended
                }
                None => {
                    let reason = "the model gave no number".to_owned();
                    events.push((job, JobEvent::Failed { reason, retryable: true }));
                    true
                }
            };
            if ended {
                self.closed.push(self.running.remove(at).id);
            }
        }
        events
    }
    /// Gives every job up.
    pub fn fail_all(&mut self, reason: &str) -> Vec<(u64, JobEvent)> {
        let failed = |s: Sequence| (s.job, JobEvent::Failed { reason: reason.to_owned(), retryable: true });
        self.running.drain(..).chain(self.waiting.drain(..)).map(failed).collect()
    }
    /// Sequences in the batch, and jobs waiting for a place in it.
    pub fn load(&self) -> (u32, u32) {
        (self.running.len() as u32, self.waiting.len() as u32)
    }
}

/// Adds a sequence's next tokens to a step; a token is drawn once none is left to compute.
fn add(step: &mut Step, sequence: &mut Sequence, tokens: usize) {
    let last = tokens == sequence.pending().len();
    let wants = if last { Wants::Last } else { Wants::Nothing };
    step.batch.push(sequence.id, sequence.computed(), &sequence.pending()[..tokens], wants);
    if last {
        let (sampling, place) = sequence.draw();
        step.draws.push(Draw { sequence: sequence.id, sampling, place });
    }
    sequence.compute(tokens);
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::job;
    use super::*;
    use izar_common::chat::{Finish, Usage};

    fn batcher(max_batch: usize) -> Batcher {
        Batcher::new(Limits { context: 1000, vocabulary: 100, eos: vec![2] }, max_batch)
    }
    /// Answers every draw of a step with one token.
    fn answer(batcher: &mut Batcher, step: &Step, token: Token) -> Vec<(u64, JobEvent)> {
        batcher.finish(step.draws.iter().map(|d| (d.sequence, Some(token))).collect())
    }
    /// Chunks as (start, tokens, wants).
    fn chunks(step: &Step) -> Vec<(usize, usize, Wants)> {
        step.batch.chunks.iter().map(|c| (c.start, c.tokens, c.wants)).collect()
    }

    #[test]
    fn nothing_to_do_is_no_step() {
        assert_eq!(batcher(4).plan(), None);
    }

    #[test]
    fn jobs_join_while_there_are_places_and_the_others_wait() {
        let mut b = batcher(2);
        (0..3).for_each(|i| assert_eq!(b.submit(i, job(&[1, 3], &[], 1)), None));
        assert_eq!(b.load(), (0, 3));
        let step = b.plan().unwrap();
        assert_eq!((chunks(&step), b.load()), (vec![(0, 2, Wants::Last); 2], (2, 1)));
        let events = answer(&mut b, &step, 9);
        let done = JobEvent::Done { finish: Finish::Length, usage: Usage { prompt_tokens: 2, completion_tokens: 1 } };
        assert_eq!(events.iter().filter(|(_, e)| *e == done).count(), 2);
        let next = b.plan().unwrap();
        assert_eq!((next.closed, next.draws.len(), b.load()), (vec![SequenceId(0), SequenceId(1)], 1, (1, 0)));
    }

    #[test]
    fn running_answers_go_first_and_long_prompts_come_in_chunks() {
        let mut b = batcher(4);
        b.submit(0, job(&[1], &[], 10));
        let step = b.plan().unwrap();
        answer(&mut b, &step, 9);
        b.submit(1, job(&[1; 300], &[], 10));
        b.submit(2, job(&[1; 300], &[], 10));
        let mut steps = Vec::new();
        for _ in 0..3 {
            let step = b.plan().unwrap();
            answer(&mut b, &step, 9);
            steps.push(chunks(&step));
        }
        assert_eq!(steps[0], [(1, 1, Wants::Last), (0, 256, Wants::Nothing)]);
        assert_eq!(steps[1], [(2, 1, Wants::Last), (256, 44, Wants::Last), (0, 212, Wants::Nothing)]);
        assert_eq!(steps[2], [(3, 1, Wants::Last), (300, 1, Wants::Last), (212, 88, Wants::Last)]);
    }

    #[test]
    fn a_cancelled_job_frees_its_cache_and_its_late_token_is_dropped() {
        let mut b = batcher(1);
        b.submit(0, job(&[1], &[], 10));
        b.submit(1, job(&[1], &[], 10));
        let step = b.plan().unwrap();
        b.cancel(0);
        b.cancel(1);
        assert_eq!(answer(&mut b, &step, 9), []);
        assert_eq!(b.load(), (0, 0));
        let last = b.plan().unwrap();
        assert_eq!((last.closed, last.batch.chunks.len()), (vec![SequenceId(0)], 0));
        assert_eq!(b.plan(), None);
    }

    #[test]
    fn a_full_queue_refuses_instead_of_waiting() {
        let mut b = batcher(1);
        (0..WAITING_LIMIT as u64).for_each(|i| assert_eq!(b.submit(i, job(&[1], &[], 1)), None));
        assert!(matches!(b.submit(9999, job(&[1], &[], 1)), Some(JobEvent::Failed { retryable: true, .. })));
    }

    #[test]
    fn impossible_jobs_fail_for_good_and_finished_ones_end_at_once() {
        let mut b = batcher(1);
        assert!(matches!(b.submit(0, job(&[], &[], 1)), Some(JobEvent::Failed { retryable: false, .. })));
        assert!(matches!(b.submit(1, job(&[1], &[5], 1)), Some(JobEvent::Done { .. })));
        assert_eq!(b.plan(), None);
    }

    #[test]
    fn a_broken_row_fails_its_own_job_alone() {
        let mut b = batcher(2);
        b.submit(0, job(&[1], &[], 10));
        b.submit(1, job(&[1], &[], 10));
        let step = b.plan().unwrap();
        let events = b.finish(vec![(step.draws[0].sequence, None), (step.draws[1].sequence, Some(9))]);
        assert!(matches!(events[0], (0, JobEvent::Failed { retryable: true, .. })));
        assert!(matches!(events[1], (1, JobEvent::Tokens { .. })));
        assert_eq!(b.load(), (1, 0));
    }

    #[test]
    fn giving_up_fails_running_and_waiting_jobs_as_retryable() {
        let mut b = batcher(1);
        b.submit(0, job(&[1], &[], 10));
        b.submit(1, job(&[1], &[], 10));
        b.plan();
        let events = b.fail_all("broken");
        assert_eq!(events.len(), 2);
        assert!(events.iter().all(|(_, e)| matches!(e, JobEvent::Failed { retryable: true, .. })));
        assert_eq!(b.load(), (0, 0));
    }
}
