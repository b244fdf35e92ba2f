//! Which sequences a step computes. Pure: jobs and drawn tokens in, steps and events out.
//!
//! Continuous batching: a job joins as soon as there is a place and there are blocks for its prompt, and leaves at the step
//! in which it ends. A step takes one token of every running answer first, then chunks of new prompts, oldest first, up
//! to a budget (`pace`), so that a long prompt slows running answers a little and never stops them. When blocks run out, the youngest
//! answer gives its own back and waits: it is computed again later, and gives the same tokens. Cancelled sequences
//! leave at once; the tokens of a step that was under way are dropped.
//!
//! Classes decide who comes first, never what is said. Who waits is admitted by class, then by age. An urgent sequence
//! waits for nobody: it has places of its own, takes blocks from others, has the step under way given up, and while it
//! is there, steps compute urgent sequences alone. Others pause meanwhile, for a bounded number of steps.

use std::collections::VecDeque;

use izar_common::chat::{Class, Job, JobEvent};
use izar_common::health::Load;
use izar_common::prefix::Sketch;

use super::blocks::{Block, Blocks};
use super::pace::{self, Pace};
use super::sampler::{self, Drawer, Failure, Grammars};
use super::sequence::{self, Limits, Sequence, SequenceId};
use crate::model::{Batch, Wants};

/// Jobs that wait for a place in the batch. The scheduler of the controllers spreads load long before; a job past this
/// is sent back as retryable, since another replica or a later time serves it better than a queue of minutes.
///
/// It holds for each class apart from those below it, so that a flood of work for which nobody waits keeps nobody out.
pub const WAITING_LIMIT: usize = 512;

/// Urgent sequences that run at once, beside a batch that may be full. More of them would make each other late: the
/// second of two prompts begins when the first is computed.
pub const URGENT_PLACES: usize = 4;

/// Steps of urgent sequences alone, or seconds of them, after which one step takes everybody: so long others pause at
/// most. An urgent answer of eight tokens takes eight steps, a fifth of a second at most where it is to be in time, so one
/// that comes alone, or with a few others, is never held up by it; and who reads along takes a second for a hiccup.
pub const PAUSE_STEPS: u32 = 32;
pub const PAUSE_SECONDS: f64 = 1.0;

/// Prompt tokens of a step that takes everybody after such a pause. It is not given up, so that others cannot starve, and
/// an urgent job that comes meanwhile waits for its end.
const HELD_TOKENS: usize = 64;

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
    /// By class, then in the order in which they came. New ones with their drawer; those that gave their blocks back have
    /// one already.
    waiting: VecDeque<(Sequence, Option<Drawer>)>,
    /// Blocks that the step under way copies.
    copying: Vec<Block>,
    pace: Pace,
    /// Answers and prompt tokens in the step under way.
    under_way: (usize, usize),
    /// The step under way computes urgent sequences alone.
    urgent_only: bool,
    /// Such steps since others were last computed, and the seconds that they took.
    paused: (u32, f64),
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
            urgent_only: false,
            paused: (0, 0.0),
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
        if self.waiting.partition_point(|(s, _)| s.class <= job.class) >= WAITING_LIMIT {
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
            let at = self.waiting.partition_point(|(s, _)| s.class <= sequence.class);
            self.waiting.insert(at, (sequence, Some(drawer)));
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

    /// Plans the next step, if there is anything to do. Its results go to [`Batcher::finish`], or its end without any to
    /// [`Batcher::give_up`], before the next plan.
    pub fn plan(&mut self) -> Option<Step> {
        let held = self.is_held();
        self.urgent_only = self.has_urgent() && !held;
        self.make_room();
        let mut copied = Vec::new();
        self.admit(&mut copied);
        let (closed, opened) = (std::mem::take(&mut self.closed), std::mem::take(&mut self.opened));
        let mut step = Step { closed, opened, ..Step::default() };
        let urgent_only = self.urgent_only;
        let taken = self.running.iter_mut().filter(|s| !urgent_only || s.class == Class::Urgent);
        let (mut prompts, answers): (Vec<_>, Vec<_>) = taken.partition(|s| s.pending().len() > 1);
        prompts.sort_by_key(|s| s.class);
        let mut budget = match answers.len() {
            0 => pace::MOST,
            _ if urgent_only => pace::MOST,
            count => self.pace.beside(count, prompts.len()),
        };
        if held {
            budget = budget.min(HELD_TOKENS);
        }
        // What a step without the others takes says nothing about the gap that readers see.
        self.under_way = (if urgent_only { 0 } else { answers.len() }, budget);
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
    /// Whether an urgent sequence is here. Waiting ones come first, so the first tells.
    fn has_urgent(&self) -> bool {
        let waiting = self.waiting.front().map(|(sequence, _)| sequence);
        self.running.iter().chain(waiting).any(|s| s.class == Class::Urgent)
    }
    /// Whether an urgent job is worth the loss of the step under way.
    pub fn may_give_up(&self) -> bool {
        !self.urgent_only && !self.is_held()
    }
    /// Whether others have paused for so long that the next step takes everybody.
    fn is_held(&self) -> bool {
        let (steps, seconds) = self.paused;
        steps >= PAUSE_STEPS || seconds >= PAUSE_SECONDS
    }
    /// Gives every answer of the next step a block for its next token, the oldest first; those that [`Self::displace`]
    /// finds give theirs up for it.
    fn make_room(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let pauses = self.urgent_only && self.running[at].class != Class::Urgent;
            if pauses || self.running[at].grow(&mut self.blocks) {
                at += 1;
            } else if self.displace(Class::Urgent).expect("one is running") < at {
                at -= 1;
            }
        }
    }
    /// Takes the youngest of the least urgent sequences off the batch, if there is one as little urgent as `least`;
    /// returns where it was. It is computed again later, and gives the same tokens.
    fn displace(&mut self, least: Class) -> Option<usize> {
        let victims = (0..self.running.len()).filter(|at| self.running[*at].class >= least);
        let at = victims.max_by_key(|at| (self.running[*at].class, *at))?;
        let mut victim = self.running.remove(at);
        victim.release(&mut self.blocks);
        let first = self.waiting.partition_point(|(s, _)| s.class < victim.class);
        self.waiting.insert(first, (victim, None));
        Some(at)
    }
    /// Lets sequences join while there are places and blocks, in the order in which they wait; none that would pause.
    fn admit(&mut self, copied: &mut Vec<(Block, Block)>) {
        let urgent = |b: &Self| b.running.iter().filter(|s| s.class == Class::Urgent).count();
        let first = |b: &Self| b.waiting.partition_point(|(s, _)| s.class == Class::Urgent);
        while urgent(self) < URGENT_PLACES && first(self) > 0 && self.admit_one(0, copied) {}
        if self.urgent_only {
            return;
        }
        while self.running.len() - urgent(self) < self.max_batch
            && first(self) < self.waiting.len()
            && self.admit_one(first(self), copied)
        {}
    }
    /// Lets one of the waiting sequences join, if there are blocks for it.
    fn admit_one(&mut self, at: usize, copied: &mut Vec<(Block, Block)>) -> bool {
        let next = &self.waiting[at].0;
        let urgent = next.class == Class::Urgent;
        // An urgent one neither waits for those that pause, nor leaves blocks for them.
        let beside = || self.running.iter().filter(|s| !urgent || s.class == Class::Urgent);
        // What another one is about to compute is not computed twice.
        if beside().any(|other| next.could_share_soon(other, &self.blocks)) {
            return false;
        }
        // Each running answer will want a block before long.
        let reserve = beside().count();
        while !self.waiting[at].0.admit(&mut self.blocks, reserve, copied) {
            if !urgent || self.displace(Class::Interactive).is_none() {
                return false;
            }
        }
        let (next, drawer) = self.waiting.remove(at).expect("it is there");
        self.opened.extend(drawer.map(|drawer| (next.id, drawer)));
        self.running.push(next);
        true
    }
    /// Takes it that the step under way was given up: what it was to compute is to be computed still.
    pub fn give_up(&mut self) {
        self.blocks.give_back(&std::mem::take(&mut self.copying));
        for (id, from) in std::mem::take(&mut self.stepping) {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
                sequence.take_back(from);
            }
        }
    }
    /// Takes the tokens that a step drew and the seconds that it took, and returns what the jobs shall hear.
    pub fn finish(&mut self, drawn: Vec<Drawn>, seconds: f64) -> Vec<(u64, JobEvent)> {
        let (answers, prompt) = self.under_way;
        self.pace.learn(answers, prompt, seconds);
        let others = self.running.len() + self.waiting.len() > self.stepping.len();
        let (steps, before) = self.paused;
        self.paused = if self.urgent_only && others { (steps + 1, before + seconds) } else { (0, 0.0) };
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
    /// Counts the changes of what the cache holds for later prompts.
    pub fn held(&self) -> u64 {
        self.blocks.changes()
    }
    /// A note of what the cache holds for later prompts.
    pub fn sketch(&self) -> Sketch {
        self.blocks.sketch()
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
mod tests;
