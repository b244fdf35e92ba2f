//! One answer in the making: what is computed, what comes next, when it ends. Pure.
//!
//! Delivered tokens of an answer that is continued are computed like prompt and counted like answer, and are never
//! given again: output never becomes prompt.

use izar_common::chat::{Class, Finish, Job, JobEvent, Logprobs, Sampling, TOP_LOGPROBS, Token, Usage};
use izar_common::prefix::{Name, Namer};

use super::blocks::{Block, Blocks, Title};
use crate::ops::TOKENS;

/// Names an answer between planner and executor; never used again after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

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
#[derive(Debug)]
pub struct Sequence {
    /// The agent's number for the job.
    pub job: u64,
    pub id: SequenceId,
    pub class: Class,
    /// Prompt, then answer.
    tokens: Vec<Token>,
    prompt: usize,
    /// Tokens of the prompt that the cache held when it first joined.
    cached: Option<usize>,
    /// Tokens that the cache holds, counting those of a step that is under way.
    computed: usize,
    namer: Namer,
    /// Names of the full blocks of `tokens`, as far as they are known: at first the prompt's.
    names: Vec<Name>,
    /// The table of its blocks.
    blocks: Vec<Block>,
    max_tokens: usize,
    ignore_eos: bool,
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
    check_sampling(sampling)
}

/// Controllers have checked it; what comes from elsewhere must not make arithmetic go astray.
fn check_sampling(s: &Sampling) -> Result<(), String> {
    let within = |name: &str, value: f32, low: f32, high: f32| match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}, not within {low} and {high}")),
    };
    within("temperature", s.temperature, 0.0, f32::MAX)?;
    within("top_p", s.top_p, f32::MIN_POSITIVE, 1.0)?;
    within("min_p", s.min_p, 0.0, 1.0)?;
    within("repetition_penalty", s.repetition_penalty, f32::MIN_POSITIVE, 2.0)?;
    within("frequency_penalty", s.frequency_penalty, -2.0, 2.0)?;
    within("presence_penalty", s.presence_penalty, -2.0, 2.0)?;
    s.logit_bias.iter().try_for_each(|(_, bias)| within("logit_bias", *bias, -100.0, 100.0))?;
    if s.logprobs.is_some_and(|count| count > TOP_LOGPROBS) {
        return Err(format!("logprobs has more than {TOP_LOGPROBS} alternatives"));
    }
    if s.grammar.is_some() && s.ignore_eos {
        return Err("ignore_eos does not go with a grammar, whose answer ends".into());
    }
    Ok(())
}

impl Sequence {
    /// Begins or continues an answer. The job has passed [`check`].
    pub fn new(number: u64, id: SequenceId, job: Job) -> Self {
        let prompt = job.prompt.len();
        let mut tokens = job.prompt;
        tokens.extend(job.delivered);
        let Sampling { max_tokens, ignore_eos, .. } = job.sampling;
        let mut sequence = Self {
            job: number,
            id,
            class: job.class,
            tokens,
            prompt,
            cached: None,
            computed: 0,
            namer: Namer::new(job.cache_salt),
            names: Vec::new(),
            blocks: Vec::new(),
            max_tokens: max_tokens as usize,
            ignore_eos,
        };
        sequence.find_names();
        sequence
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
    /// Notes that the step which was to compute tokens from here on did not.
    pub fn take_back(&mut self, to: usize) {
        assert!(to <= self.computed, "what was not computed is not taken back");
        self.computed = to;
    }
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Gets blocks for all known tokens: shares those that hold the same already, takes the others. `copied` gets the
    /// block of which a beginning is taken over by copying, with the block that it is copied to. `false`, and nothing is
    /// held, if there are too few while `reserve` stay free.
    ///
    /// One token at least is left to compute: the next one is drawn from its logits.
    pub fn admit(&mut self, blocks: &mut Blocks, reserve: usize, copied: &mut Vec<(Block, Block)>) -> bool {
        let reusable = self.tokens.len() - 1;
        for name in &self.names[..reusable / TOKENS] {
            let Some(block) = blocks.share(*name) else { break };
            self.blocks.push(block);
        }
        let shared = self.blocks.len();
        // Held until it is copied: it must not be given to somebody else before.
        let rest = &self.tokens[shared * TOKENS..reusable.min((shared + 1) * TOKENS)];
        let alike = blocks.alike(self.before(shared), rest);
        let alike = alike.and_then(|(name, count)| Some((blocks.share(name)?, count)));
        let wanted = self.tokens.len().div_ceil(TOKENS) - shared;
        if blocks.available() < wanted + reserve {
            self.release(blocks);
            blocks.give_back(&Vec::from_iter(alike.map(|(block, _)| block)));
            return false;
        }
        self.blocks.extend((0..wanted).map(|_| blocks.take(&self.namer).expect("enough are there")));
        self.computed = shared * TOKENS;
        if let Some((block, count)) = alike {
            copied.push((block, self.blocks[shared]));
            self.computed += count;
        }
        self.cached.get_or_insert(self.computed.min(self.prompt));
        true
    }
    /// Makes sure that there is a block for the next token.
    pub fn grow(&mut self, blocks: &mut Blocks) -> bool {
        if self.tokens.len().div_ceil(TOKENS) > self.blocks.len() {
            let Some(block) = blocks.take(&self.namer) else { return false };
            self.blocks.push(block);
        }
        true
    }
    /// Names the blocks that a step has filled, so that others can share them.
    pub fn name_filled(&mut self, blocks: &mut Blocks, from: usize) {
        self.find_names();
        for index in from / TOKENS..self.computed / TOKENS {
            let tokens = *self.tokens[index * TOKENS..].first_chunk().expect("what is computed is known");
            let (name, before) = (self.names[index], self.before(index));
            blocks.name(self.blocks[index], Title { name, before, tokens });
        }
    }
    /// Gives all blocks back; everything must be computed again, or found.
    pub fn release(&mut self, blocks: &mut Blocks) {
        blocks.give_back(&self.blocks);
        self.blocks.clear();
        self.computed = 0;
    }
    /// Whether this one waits best until `other` has computed what both begin with.
    pub fn could_share_soon(&self, other: &Self, blocks: &Blocks) -> bool {
        let reusable = (self.tokens.len() - 1) / TOKENS;
        let missing = self.names[..reusable].iter().position(|name| !blocks.knows(*name));
        missing.is_some_and(|i| other.names.get(i) == Some(&self.names[i]) && other.tokens.len() > other.computed)
    }
    /// The name of what comes before a block.
    fn before(&self, index: usize) -> Name {
        index.checked_sub(1).map_or(self.namer.root(), |before| self.names[before])
    }
    fn find_names(&mut self) {
        for index in self.names.len()..self.tokens.len() / TOKENS {
            let name = self.namer.name(self.before(index), &self.tokens[index * TOKENS..][..TOKENS]);
            self.names.push(name);
        }
    }

    /// Takes the token that was drawn.
    pub fn advance(&mut self, token: Token, logprobs: Option<Logprobs>, limits: &Limits) -> Advance {
        if self.is_end(token, limits) {
            return Advance { events: vec![self.done(Finish::Stop)], ended: true };
        }
        let position = self.answer().len() as u32;
        self.tokens.push(token);
        let mut events = vec![JobEvent::Tokens { position, tokens: vec![token], logprobs: Vec::from_iter(logprobs) }];
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
        !self.ignore_eos && limits.eos.contains(&token)
    }
    fn full(&self, limits: &Limits) -> bool {
        self.answer().len() >= self.max_tokens || self.tokens.len() >= limits.context
    }
    fn done(&self, finish: Finish) -> JobEvent {
        let (prompt_tokens, completion_tokens) = (self.prompt as u32, self.answer().len() as u32);
        let cached_tokens = self.cached.unwrap_or(0) as u32;
        JobEvent::Done { finish, usage: Usage { prompt_tokens, cached_tokens, completion_tokens } }
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
            sampling: Sampling { temperature: 0.0, seed: 9, max_tokens, ..Sampling::default() },
            cache_salt: [0; 16],
            numerics: None,
            class: Class::default(),
            capsule: Vec::new(),
        }
    }
    fn limits() -> Limits {
        Limits { context: 8, vocabulary: 100, eos: vec![2, 7] }
    }
    fn sequence(job: Job) -> Sequence {
        Sequence::new(5, SequenceId(0), job)
    }
    fn done(finish: Finish, prompt_tokens: u32, completion_tokens: u32) -> JobEvent {
        JobEvent::Done { finish, usage: Usage { prompt_tokens, cached_tokens: 0, completion_tokens } }
    }
    fn tokens(position: u32, token: Token) -> JobEvent {
        JobEvent::Tokens { position, tokens: vec![token], logprobs: Vec::new() }
    }

    #[test]
    fn an_answer_ends_at_an_end_token_which_is_not_given() {
        for eos in [2, 7] {
            let mut s = sequence(job(&[1, 3], &[], 5));
            assert_eq!(s.advance(9, None, &limits()), Advance { events: vec![tokens(0, 9)], ended: false });
            assert_eq!(
                s.advance(eos, None, &limits()),
                Advance { events: vec![done(Finish::Stop, 2, 1)], ended: true }
            );
        }
    }

    #[test]
    fn end_tokens_are_given_when_they_are_ignored() {
        let mut job = job(&[1], &[], 2);
        job.sampling.ignore_eos = true;
        let mut s = sequence(job);
        assert_eq!(s.advance(2, None, &limits()).events, [tokens(0, 2)]);
        assert_eq!(s.advance(2, None, &limits()).events, [tokens(1, 2), done(Finish::Length, 1, 2)]);
    }

    #[test]
    fn an_answer_ends_at_max_tokens_and_at_the_end_of_the_context() {
        let mut s = sequence(job(&[1], &[], 1));
        assert_eq!(s.advance(9, None, &limits()).events, [tokens(0, 9), done(Finish::Length, 1, 1)]);
        let mut s = sequence(job(&[1; 6], &[], 50));
        assert!(!s.advance(9, None, &limits()).ended);
        assert_eq!(s.advance(9, None, &limits()).events, [tokens(1, 9), done(Finish::Length, 6, 2)]);
    }

    #[test]
    fn delivered_tokens_are_computed_and_counted_and_not_given_again() {
        let mut s = sequence(job(&[1, 3], &[8, 9], 3));
        assert_eq!(s.pending(), [1, 3, 8, 9]);
        assert_eq!(s.ended(&limits()), None);
        assert_eq!(s.advance(4, None, &limits()).events, [tokens(2, 4), done(Finish::Length, 2, 3)]);
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
        s.take_back(2);
        assert_eq!((s.computed(), s.pending()), (2, &[4][..]));
        s.compute(1);
        s.advance(9, None, &limits());
        assert_eq!(s.pending(), [9]);
    }

    #[test]
    fn impossible_jobs_are_refused_with_the_numbers() {
        let refused = |job: Job| check(&job, &limits()).unwrap_err();
        assert_eq!(refused(job(&[], &[], 1)), "the prompt is empty");
        assert_eq!(refused(job(&[1; 8], &[], 1)), "the prompt has 8 tokens, the context holds 8");
        assert_eq!(refused(job(&[1], &[100], 1)), "token 100 is not in the vocabulary of 100");
        type Change = (&'static str, fn(&mut Sampling));
        let changes: [Change; 9] = [
            ("temperature", |s| s.temperature = f32::NAN),
            ("temperature", |s| s.temperature = -1.0),
            ("top_p", |s| s.top_p = 0.0),
            ("top_p", |s| s.top_p = f32::NAN),
            ("min_p", |s| s.min_p = 1.5),
            ("repetition_penalty", |s| s.repetition_penalty = 0.0),
            ("presence_penalty", |s| s.presence_penalty = f32::INFINITY),
            ("logit_bias", |s| s.logit_bias = vec![(1, 0.0), (2, f32::NAN)]),
            ("logprobs", |s| s.logprobs = Some(21)),
        ];
        for (name, change) in changes {
            let mut job = job(&[1], &[], 1);
            change(&mut job.sampling);
            assert!(refused(job).contains(name), "{name}");
        }
        assert!(check(&job(&[1; 7], &[], 1), &limits()).is_ok());
    }
}
