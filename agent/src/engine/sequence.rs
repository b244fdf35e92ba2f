//! One answer in the making: what is computed, what comes next, when it ends. Pure.
//!
//! Delivered tokens of an answer that is continued are computed like prompt and counted like answer, and are never
//! given again: output never becomes prompt.

use izar_common::chat::{Finish, Job, JobEvent, Sampling, Token, Usage};

use super::sampler::Place;
use crate::model::SequenceId;

/// What bounds every sequence of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of prompt and answer together.
    pub context: usize,
    pub vocabulary: usize,
    /// Tokens that end an answer.
    pub eos: Vec<Token>,
}

/// An answer that is being computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// The agent's number for the job.
    pub job: u64,
    /// Its cache in the model.
    pub id: SequenceId,
    /// Prompt, then answer.
    tokens: Vec<Token>,
    prompt: usize,
    /// Tokens that the cache holds, counting those of a step that is under way.
    computed: usize,
    sampling: Sampling,
    choice: u32,
}

/// What becomes of a sequence with a new token.
#[derive(Debug, Clone, PartialEq)]
pub struct Advance {
    /// At most a token, then at most an end.
    pub events: Vec<JobEvent>,
    pub ended: bool,
}

/// Refuses a job that no worker of this model could run, in words for its client.
pub fn check(job: &Job, limits: &Limits) -> Result<(), String> {
    let sampling = &job.sampling;
    if job.prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    if job.prompt.len() >= limits.context {
        return Err(format!("the prompt has {} tokens, the context holds {}", job.prompt.len(), limits.context));
    }
    if let Some(token) = job.prompt.iter().chain(&job.delivered).find(|t| **t as usize >= limits.vocabulary) {
        return Err(format!("token {token} is not in the vocabulary of {}", limits.vocabulary));
    }
    if !(sampling.temperature.is_finite() && sampling.temperature >= 0.0) {
        return Err("temperature is not a number from 0 on".into());
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err("top_p is not within (0, 1]".into());
    }
    Ok(())
}

impl Sequence {
    /// Begins or continues an answer. The job has passed [`check`].
    pub fn new(number: u64, id: SequenceId, job: Job) -> Self {
        let prompt = job.prompt.len();
        let mut tokens = job.prompt;
        tokens.extend(job.delivered);
        Self { job: number, id, tokens, prompt, computed: 0, sampling: job.sampling, choice: job.choice }
    }

    /// An end that needs no computing: what was delivered fills the answer already.
    pub fn ended(&self, limits: &Limits) -> Option<JobEvent> {
        let delivered_end = self.answer().last().is_some_and(|t| self.is_end(*t, limits));
        if delivered_end {
            return Some(self.done(Finish::Stop));
        }
        self.full(limits).then(|| self.done(Finish::Length))
    }

    /// Tokens that the cache does not hold yet: never none.
    pub fn pending(&self) -> &[Token] {
        &self.tokens[self.computed..]
    }
    pub fn computed(&self) -> usize {
        self.computed
    }
    /// Notes that a step computes the next tokens.
    pub fn compute(&mut self, tokens: usize) {
        self.computed += tokens;
        assert!(self.computed <= self.tokens.len(), "only known tokens are computed");
    }
    /// How the next token is drawn, and where.
    pub fn draw(&self) -> (Sampling, Place) {
        let place = Place { seed: self.sampling.seed, choice: self.choice, position: self.answer().len() as u32 };
        (self.sampling.clone(), place)
    }

    /// Takes the token that was drawn.
    pub fn advance(&mut self, token: Token, limits: &Limits) -> Advance {
        if self.is_end(token, limits) {
            return Advance { events: vec![self.done(Finish::Stop)], ended: true };
        }
        let position = self.answer().len() as u32;
        self.tokens.push(token);
        let mut events = vec![JobEvent::Tokens { position, tokens: vec![token] }];
        let ended = self.full(limits);
        if ended {
            events.push(self.done(Finish::Length));
        }
        Advance { events, ended }
    }

    fn answer(&self) -> &[Token] {
        &self.tokens[self.prompt..]
    }
    fn is_end(&self, token: Token, limits: &Limits) -> bool {
        !self.sampling.ignore_eos && limits.eos.contains(&token)
    }
    fn full(&self, limits: &Limits) -> bool {
        self.answer().len() >= self.sampling.max_tokens as usize || self.tokens.len() >= limits.context
    }
    fn done(&self, finish: Finish) -> JobEvent {
        let usage = Usage { prompt_tokens: self.prompt as u32, completion_tokens: self.answer().len() as u32 };
        JobEvent::Done { finish, usage }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use izar_common::id::{DeploymentId, Hash, TurnId};

    /// A job with this prompt and length, greedy.
    pub fn job(prompt: &[Token], delivered: &[Token], max_tokens: u32) -> Job {
        Job {
            turn: TurnId(1),
            choice: 0,
            attempt: 0,
            deployment: DeploymentId::new("d").unwrap(),
            revision: Hash([0; 32]),
            prompt: prompt.to_vec(),
            delivered: delivered.to_vec(),
            sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 9, max_tokens, ignore_eos: false },
        }
    }
    fn limits() -> Limits {
        Limits { context: 8, vocabulary: 100, eos: vec![2, 7] }
    }
    fn sequence(job: Job) -> Sequence {
        Sequence::new(5, SequenceId(0), job)
    }
    fn done(finish: Finish, prompt_tokens: u32, completion_tokens: u32) -> JobEvent {
        JobEvent::Done { finish, usage: Usage { prompt_tokens, completion_tokens } }
    }
    fn tokens(position: u32, token: Token) -> JobEvent {
        JobEvent::Tokens { position, tokens: vec![token] }
    }

    #[test]
    fn an_answer_ends_at_an_end_token_which_is_not_given() {
        for eos in [2, 7] {
            let mut s = sequence(job(&[1, 3], &[], 5));
            assert_eq!(s.advance(9, &limits()), Advance { events: vec![tokens(0, 9)], ended: false });
            assert_eq!(s.advance(eos, &limits()), Advance { events: vec![done(Finish::Stop, 2, 1)], ended: true });
        }
    }

    #[test]
    fn end_tokens_are_given_when_they_are_ignored() {
        let mut job = job(&[1], &[], 2);
        job.sampling.ignore_eos = true;
        let mut s = sequence(job);
        assert_eq!(s.advance(2, &limits()).events, [tokens(0, 2)]);
        assert_eq!(s.advance(2, &limits()).events, [tokens(1, 2), done(Finish::Length, 1, 2)]);
    }

    #[test]
    fn an_answer_ends_at_max_tokens_and_at_the_end_of_the_context() {
        let mut s = sequence(job(&[1], &[], 1));
        assert_eq!(s.advance(9, &limits()).events, [tokens(0, 9), done(Finish::Length, 1, 1)]);
        let mut s = sequence(job(&[1; 6], &[], 50));
        assert!(!s.advance(9, &limits()).ended);
        assert_eq!(s.advance(9, &limits()).events, [tokens(1, 9), done(Finish::Length, 6, 2)]);
    }

    #[test]
    fn delivered_tokens_are_computed_and_counted_and_not_given_again() {
        let mut s = sequence(job(&[1, 3], &[8, 9], 3));
        assert_eq!(s.pending(), [1, 3, 8, 9]);
        assert_eq!(s.ended(&limits()), None);
        assert_eq!(s.draw().1.position, 2);
        assert_eq!(s.advance(4, &limits()).events, [tokens(2, 4), done(Finish::Length, 2, 3)]);
    }

    #[test]
    fn a_continued_answer_that_is_full_already_ends_at_once() {
        let ended = |delivered: &[Token], max| sequence(job(&[1, 3], delivered, max)).ended(&limits());
        assert_eq!(ended(&[8, 9], 2), Some(done(Finish::Length, 2, 2)));
        assert_eq!(ended(&[8; 6], 50), Some(done(Finish::Length, 2, 6)));
        assert_eq!(ended(&[8, 2], 9), Some(done(Finish::Stop, 2, 2)));
        assert_eq!(ended(&[], 0), Some(done(Finish::Length, 2, 0)));
    }

    #[test]
    fn computing_moves_the_border_of_what_is_pending() {
        let mut s = sequence(job(&[1, 3, 4], &[], 3));
        s.compute(2);
        assert_eq!((s.computed(), s.pending()), (2, &[4][..]));
        s.compute(1);
        s.advance(9, &limits());
        assert_eq!(s.pending(), [9]);
    }

    #[test]
    fn impossible_jobs_are_refused_with_the_numbers() {
        let refused = |job: Job| check(&job, &limits()).unwrap_err();
        assert_eq!(refused(job(&[], &[], 1)), "the prompt is empty");
        assert_eq!(refused(job(&[1; 8], &[], 1)), "the prompt has 8 tokens, the context holds 8");
        assert_eq!(refused(job(&[1], &[100], 1)), "token 100 is not in the vocabulary of 100");
        for (temperature, top_p) in [(f32::NAN, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, f32::NAN), (1.0, 1.5)] {
            let mut job = job(&[1], &[], 1);
            (job.sampling.temperature, job.sampling.top_p) = (temperature, top_p);
            assert!(check(&job, &limits()).is_err());
        }
        assert!(check(&job(&[1; 7], &[], 1), &limits()).is_ok());
    }
}
