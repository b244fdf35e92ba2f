//! Which sequences a step computes. Pure: jobs and drawn tokens in, steps and events out.
//!
//! Continuous batching: a job joins as soon as there is a place and there are blocks for its prompt, and leaves at the step
//! in which it ends. A step takes one token of every running answer first, then chunks of new prompts, oldest first, up
//! to a budget (`pace`), so that a long prompt slows running answers a little and never stops them. When blocks run out, the youngest
//! answer gives its own back and waits: it is computed again later, and gives the same tokens. Cancelled sequences
//! leave at once; the tokens of a step that was under way are dropped.

use std::collections::VecDeque;

use izar_common::chat::{Job, JobEvent};
use izar_common::health::Load;

use super::blocks::{Block, Blocks};
use super::pace::{self, Pace};
use super::sampler::{self, Drawer, Failure, Grammars};
use super::sequence::{self, Limits, Sequence, SequenceId};
use crate::model::{Batch, Wants};

/// Jobs that wait for a place in the batch. The scheduler of the controllers spreads load long before; a job past this
/// is sent back as retryable, since another replica or a later time serves it better than a queue of minutes.
pub const WAITING_LIMIT: usize = 512;

/// One step: what to forget, who draws for new answers, what to compute, what to draw.
#[derive(Debug, Default)]
pub struct Step {
    pub closed: Vec<SequenceId>,
    pub opened: Vec<(SequenceId, Drawer)>,
    pub batch: Batch,
    /// The sequences that draw from the last logits of their chunk, in the chunks' order.
    pub draws: Vec<SequenceId>,
}

/// A drawn token, or why there is none.
pub type Drawn = (SequenceId, Result<sampler::Drawn, Failure>);

/// The running and the waiting sequences of one model.
pub struct Batcher {
    limits: Limits,
    max_batch: usize,
    grammars: Grammars,
    blocks: Blocks,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    /// New ones with their drawer; those that gave their blocks back have one already.
    waiting: VecDeque<(Sequence, Option<Drawer>)>,
    /// Blocks that the step under way copies.
    copying: Vec<Block>,
    pace: Pace,
    /// Answers and prompt tokens in the step under way.
    under_way: (usize, usize),
    /// Running sequences in the step under way, and how much was computed before it.
    stepping: Vec<(SequenceId, usize)>,
    opened: Vec<(SequenceId, Drawer)>,
    closed: Vec<SequenceId>,
    next_id: u64,
}

impl Batcher {
    /// `blocks`: what the cache has; enough for a sequence of the whole context.
    pub fn new(limits: Limits, max_batch: usize, blocks: usize, grammars: Grammars) -> Self {
        Self {
            limits,
            max_batch: max_batch.max(1),
            grammars,
            blocks: Blocks::new(blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            copying: Vec::new(),
            pace: Pace::default(),
            under_way: (0, 0),
            stepping: Vec::new(),
            opened: Vec::new(),
            closed: Vec::new(),
            next_id: 0,
        }
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
        let drawer = match Drawer::new(&job, &self.grammars) {
            Ok(drawer) => drawer,
            Err(reason) => return failed(reason, false),
        };
        let sequence = Sequence::new(number, SequenceId(self.next_id), job);
        self.next_id += 1;
        let ended = sequence.ended(&self.limits);
        if ended.is_none() {
            self.waiting.push_back((sequence, Some(drawer)));
        }
        ended
    }
    /// Forgets a job. There is no event: whoever cancelled does not listen any more.
    pub fn cancel(&mut self, number: u64) {
        if let Some(at) = self.waiting.iter().position(|(s, _)| s.job == number) {
            let (sequence, drawer) = self.waiting.remove(at).expect("it is there");
            if drawer.is_none() {
                self.closed.push(sequence.id);
            }
        }
        if let Some(at) = self.running.iter().position(|s| s.job == number) {
            self.close(at);
        }
    }
    /// Ends a running sequence. What a step under way still writes in its blocks, it writes before they are used again.
    fn close(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        sequence.release(&mut self.blocks);
        self.closed.push(sequence.id);
    }

    /// Plans the next step, if there is anything to do. Its results go to [`Batcher::finish`] before the next plan.
    pub fn plan(&mut self) -> Option<Step> {
        self.make_room();
        let mut copied = Vec::new();
        self.admit(&mut copied);
        let (closed, opened) = (std::mem::take(&mut self.closed), std::mem::take(&mut self.opened));
        let mut step = Step { closed, opened, ..Step::default() };
        let answers = self.running.iter().filter(|s| s.pending().len() == 1).count();
        let mut budget =
            if answers == 0 { pace::MOST } else { self.pace.beside(answers, self.running.len() - answers) };
        self.under_way = (answers, budget);
        let (prompts, answers): (Vec<_>, Vec<_>) = self.running.iter_mut().partition(|s| s.pending().len() > 1);
        self.stepping.clear();
        for (sequence, most) in answers.into_iter().map(|s| (s, 1)).chain(prompts.into_iter().map(|s| (s, usize::MAX)))
        {
            let tokens = if most == 1 { 1 } else { sequence.pending().len().min(budget) };
            if tokens > 0 {
                self.stepping.push((sequence.id, sequence.computed()));
                add(&mut step, sequence, tokens);
                budget -= if most == 1 { 0 } else { tokens };
            }
        }
        self.under_way.1 -= budget;
        self.copying = copied.iter().map(|(from, _)| *from).collect();
        step.batch.copied = copied;
        step.batch.cleared = self.blocks.take_cleared();
        (!step.batch.chunks.is_empty() || !step.closed.is_empty()).then_some(step)
    }
    /// Gives every running answer a block for its next token, the oldest first; the youngest give theirs up for it.
    fn make_room(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].grow(&mut self.blocks) {
                at += 1;
                continue;
            }
            let mut youngest = self.running.pop().expect("one is running");
            youngest.release(&mut self.blocks);
            self.waiting.push_front((youngest, None));
        }
    }
    /// Lets sequences join while there are places and blocks, in the order in which they came.
    fn admit(&mut self, copied: &mut Vec<(Block, Block)>) {
        while self.running.len() < self.max_batch {
            let Some((next, _)) = self.waiting.front_mut() else { return };
            // What another one is about to compute is not computed twice.
            if self.running.iter().any(|other| next.could_share_soon(other, &self.blocks)) {
                return;
            }
            // Each running answer will want a block before long.
            if !next.admit(&mut self.blocks, self.running.len(), copied) {
                return;
            }
            let (next, drawer) = self.waiting.pop_front().expect("it is there");
            self.opened.extend(drawer.map(|drawer| (next.id, drawer)));
            self.running.push(next);
        }
    }
    /// Takes the tokens that a step drew and the seconds that it took, and returns what the jobs shall hear.
    pub fn finish(&mut self, drawn: Vec<Drawn>, seconds: f64) -> Vec<(u64, JobEvent)> {
        let (answers, prompt) = self.under_way;
        self.pace.learn(answers, prompt, seconds);
        self.blocks.give_back(&std::mem::take(&mut self.copying));
        for (id, from) in std::mem::take(&mut self.stepping) {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
                sequence.name_filled(&mut self.blocks, from);
            }
        }
        let mut events = Vec::with_capacity(drawn.len());
        for (id, drawn) in drawn {
            let Some(at) = self.running.iter().position(|s| s.id == id) else { continue };
            let sequence = &mut self.running[at];
            let job = sequence.job;
            let ended = match drawn {
                Ok(sampler::Drawn { token, logprobs }) => {
                    let advance = sequence.advance(token, logprobs, &self.limits);
                    events.extend(advance.events.into_iter().map(|event| (job, event)));
                    advance.ended
                }
                Err(Failure { reason, retryable }) => {
                    events.push((job, JobEvent::Failed { reason, retryable }));
                    true
                }
            };
            if ended {
                self.close(at);
            }
        }
        events
    }
    /// Gives every job up.
    pub fn fail_all(&mut self, reason: &str) -> Vec<(u64, JobEvent)> {
        let failed = |s: Sequence| (s.job, JobEvent::Failed { reason: reason.to_owned(), retryable: true });
        let waiting = self.waiting.drain(..).map(|(sequence, _)| sequence);
        self.running.drain(..).chain(waiting).map(failed).collect()
    }
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            blocks_used: (self.blocks.count() - self.blocks.available()) as u32,
            blocks: self.blocks.count() as u32,
        }
    }
}

/// Adds a sequence's next tokens to a step; a token is drawn once none is left to compute.
fn add(step: &mut Step, sequence: &mut Sequence, tokens: usize) {
    let last = tokens == sequence.pending().len();
    let wants = if last { Wants::Last } else { Wants::Nothing };
    step.batch.push(sequence.computed(), &sequence.pending()[..tokens], wants, sequence.blocks());
    if last {
        step.draws.push(sequence.id);
    }
    sequence.compute(tokens);
}

#[cfg(test)]
mod tests {
    use super::super::sequence::tests::job;
    use super::*;
    use izar_common::chat::{Finish, Token, Usage};

    /// Jobs in the batch, and jobs waiting.
    fn jobs(b: &Batcher) -> (u32, u32) {
        (b.load().running, b.load().waiting)
    }
    fn batcher(max_batch: usize) -> Batcher {
        with_blocks(max_batch, 640)
    }
    fn with_blocks(max_batch: usize, blocks: usize) -> Batcher {
        let limits = Limits { context: 1000, vocabulary: 100, eos: vec![2] };
        Batcher::new(limits, max_batch, blocks, Grammars::new(None))
    }
    fn drawn(token: Token) -> sampler::Drawn {
        sampler::Drawn { token, logprobs: None }
    }
    /// Answers every draw of a step with one token.
    fn answer(batcher: &mut Batcher, step: &Step, token: Token) -> Vec<(u64, JobEvent)> {
        batcher.finish(step.draws.iter().map(|id| (*id, Ok(drawn(token)))).collect(), 0.0)
    }
    /// Chunks as (start, tokens, wants).
    fn chunks(step: &Step) -> Vec<(usize, usize, Wants)> {
        step.batch.chunks.iter().map(|c| (c.start, c.tokens, c.wants)).collect()
    }

    #[test]
    fn nothing_to_do_is_no_step() {
        assert!(batcher(4).plan().is_none());
    }

    #[test]
    fn jobs_join_while_there_are_places_and_the_others_wait() {
        let mut b = batcher(2);
        (0..3).for_each(|i| assert_eq!(b.submit(i, job(&[1, 3], &[], 1)), None));
        assert_eq!(jobs(&b), (0, 3));
        let step = b.plan().unwrap();
        assert_eq!((chunks(&step), jobs(&b)), (vec![(0, 2, Wants::Last); 2], (2, 1)));
        let events = answer(&mut b, &step, 9);
        let done = JobEvent::Done { finish: Finish::Length, usage: Usage { prompt_tokens: 2, completion_tokens: 1 } };
        assert_eq!(events.iter().filter(|(_, e)| *e == done).count(), 2);
        let next = b.plan().unwrap();
        assert_eq!((next.closed, next.draws.len(), jobs(&b)), (vec![SequenceId(0), SequenceId(1)], 1, (1, 0)));
    }

    #[test]
    fn running_answers_go_first_and_long_prompts_come_in_chunks() {
        let mut b = batcher(4);
        b.submit(0, job(&[1], &[], 10));
        let step = b.plan().unwrap();
        answer(&mut b, &step, 9);
        b.submit(1, job(&[1; 40], &[], 10));
        b.submit(2, job(&[3; 40], &[], 10));
        let mut steps = Vec::new();
        for _ in 0..3 {
            let step = b.plan().unwrap();
            answer(&mut b, &step, 9);
            steps.push(chunks(&step));
        }
        assert_eq!(steps[0], [(1, 1, Wants::Last), (0, 32, Wants::Nothing)]);
        assert_eq!(steps[1], [(2, 1, Wants::Last), (32, 8, Wants::Last), (0, 24, Wants::Nothing)]);
        assert_eq!(steps[2], [(3, 1, Wants::Last), (40, 1, Wants::Last), (24, 16, Wants::Last)]);
    }

    #[test]
    fn a_prompt_alone_is_computed_in_large_chunks() {
        let mut b = batcher(4);
        b.submit(0, job(&[1; 600], &[], 10));
        assert_eq!(chunks(&b.plan().unwrap()), [(0, 512, Wants::Nothing)]);
    }

    /// Runs until all jobs have ended; returns the chunks of each step.
    fn run(b: &mut Batcher) -> Vec<Vec<(usize, usize, Wants)>> {
        let mut steps = Vec::new();
        while let Some(step) = b.plan() {
            steps.push(chunks(&step));
            answer(b, &step, 9);
            assert!(steps.len() < 1000, "no progress");
        }
        assert_eq!((b.load().jobs(), b.load().blocks_used), (0, 0), "no block is lost");
        steps
    }

    #[test]
    fn what_was_computed_before_is_not_computed_again() {
        let mut b = batcher(4);
        let prompt: Vec<Token> = (10..60).collect();
        b.submit(0, job(&prompt, &[], 1));
        assert_eq!(run(&mut b)[0], [(0, 50, Wants::Last)]);
        b.submit(1, job(&prompt, &[], 1));
        assert_eq!(run(&mut b)[0], [(48, 2, Wants::Last)], "full blocks are shared");
        b.submit(2, job(&prompt[..48], &[], 1));
        assert_eq!(run(&mut b)[0], [(47, 1, Wants::Last)], "a token is left, in a copy of its block");
        b.submit(3, job(&[&prompt[..37], &[5; 9]].concat(), &[], 1));
        let step = b.plan().unwrap();
        assert_eq!((chunks(&step), step.batch.copied.len()), (vec![(37, 9, Wants::Last)], 1));
        answer(&mut b, &step, 9);
        run(&mut b);
        let mut other = job(&prompt, &[], 1);
        other.cache_salt = [7; 16];
        b.submit(4, other);
        assert_eq!(run(&mut b)[0], [(0, 50, Wants::Last)], "another tenant finds nothing");
    }

    #[test]
    fn a_prompt_that_begins_like_a_running_one_waits_for_it() {
        let mut b = batcher(4);
        let prompt: Vec<Token> = (10..90).collect();
        (0..3).for_each(|number| assert_eq!(b.submit(number, job(&prompt, &[], 2)), None));
        let steps = run(&mut b);
        assert_eq!(steps[0], [(0, 80, Wants::Last)]);
        assert_eq!(steps[1], [(80, 1, Wants::Last), (79, 1, Wants::Last), (79, 1, Wants::Last)]);
    }

    #[test]
    fn the_youngest_gives_way_when_blocks_run_out_and_comes_back() {
        // Two answers of up to 64 tokens in a cache of 96.
        let mut b = with_blocks(4, 6);
        b.submit(0, job(&[1; 20], &[], 40));
        b.submit(1, job(&[3; 20], &[], 40));
        let steps = run(&mut b);
        let together = steps.iter().filter(|chunks| chunks.len() == 2).count();
        assert!((20..40).contains(&together), "{together}");
        let tokens: usize = steps.iter().flatten().map(|chunk| chunk.1).sum();
        assert!(tokens > 2 * 59, "something was computed twice: {tokens}");
    }

    #[test]
    fn jobs_join_only_if_there_are_blocks_for_their_prompt() {
        let mut b = with_blocks(4, 6);
        b.submit(0, job(&[1; 60], &[], 3));
        b.submit(1, job(&[3; 60], &[], 3));
        b.plan().unwrap();
        assert_eq!(jobs(&b), (1, 1));
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
        assert_eq!(jobs(&b), (0, 0));
        let last = b.plan().unwrap();
        assert_eq!((last.closed, last.batch.chunks.len()), (vec![SequenceId(0)], 0));
        assert!(b.plan().is_none());
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
        assert!(b.plan().is_none());
    }

    #[test]
    fn each_answer_brings_its_drawer_once_and_refused_ones_bring_none() {
        let mut b = batcher(1);
        b.submit(0, job(&[1], &[], 10));
        let mut structured = job(&[1], &[], 10);
        structured.sampling.grammar = Some(izar_common::chat::Grammar::JsonObject);
        assert!(matches!(b.submit(1, structured), Some(JobEvent::Failed { retryable: false, .. })), "no tokenizer");
        let opened = |step: &Step| step.opened.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        let step = b.plan().unwrap();
        assert_eq!(opened(&step), step.draws);
        answer(&mut b, &step, 9);
        assert_eq!(opened(&b.plan().unwrap()), []);
    }

    #[test]
    fn a_broken_row_fails_its_own_job_alone() {
        let mut b = batcher(2);
        b.submit(0, job(&[1], &[], 10));
        b.submit(1, job(&[1], &[], 10));
        let step = b.plan().unwrap();
        let events = b.finish(
            vec![
                (step.draws[0], Err(Failure { reason: "no number".into(), retryable: true })),
                (step.draws[1], Ok(drawn(9))),
            ],
            0.0,
        );
        assert!(matches!(events[0], (0, JobEvent::Failed { retryable: true, .. })));
        assert!(matches!(events[1], (1, JobEvent::Tokens { .. })));
        assert_eq!(jobs(&b), (1, 0));
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
        assert_eq!(jobs(&b), (0, 0));
    }
}
