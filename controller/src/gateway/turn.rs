//! A running turn as a pure core: token ids in, text and the end out.
//!
//! It detokenizes, watches for stop strings, counts, and decides whether a failed job is placed again. A job that is
//! placed again goes on after the tokens that have come: they stay as they are, shown or not, and so does the state of
//! detokenizer and stop strings, so nobody can tell from the answer that it was moved. It knows no clock, no client and
//! no dialect; the shell around it (`chat`) passes on what it returns.

use std::sync::Arc;

use izar_common::chat::{Finish, JobEvent, Logprobs, Token, Usage};
use izar_common::text::{Detokenizer, StopMatcher, Text};

/// Workers that a job may fail without a new token: then it is more likely the cause than they.
pub const ATTEMPTS: u32 = 3;

/// An agent is another process than its workers. To be lost with one says little of a job, so it counts as this part of
/// a failed worker.
pub const AGENTS_FOR_A_WORKER: u32 = 3;

/// What one event came to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    pub shown: Shown,
    pub end: Option<End>,
}

/// A token of the answer and how probable it was, as clients are told.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Its bytes, or a special token's name.
    pub token: Vec<u8>,
    pub logprob: f32,
    /// The most probable ones, best first.
    pub top: Vec<(Vec<u8>, f32)>,
    /// Characters of the answer before it.
    pub offset: usize,
}

/// Text that may be shown now; empty while characters or stop strings are incomplete.
///
/// Remembers what came with which token, because a client is shown one event for each. With one token an event, the
/// usual case, that costs nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Shown {
    text: String,
    /// There is a piece.
    begun: bool,
    /// Where pieces but the first begin.
    cuts: Vec<usize>,
    /// The tokens of all pieces, if they were asked for, and where those of each piece end.
    scored: Vec<Scored>,
    scored_ends: Vec<usize>,
}

/// What is shown in one event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Piece<'a> {
    pub text: &'a str,
    /// Its tokens, if they were asked for.
    pub scored: &'a [Scored],
}

impl Shown {
    pub fn text(&self) -> &str {
        &self.text
    }
    pub fn scored(&self) -> &[Scored] {
        &self.scored
    }
    pub fn is_empty(&self) -> bool {
        !self.begun
    }
    /// How many pieces there are.
    pub fn len(&self) -> usize {
        if self.begun { self.cuts.len() + 1 } else { 0 }
    }
    /// The pieces, in order; none has neither text nor tokens.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let part = |ends: &[usize], i: usize, whole: usize| {
            let begin = if i == 0 { 0 } else { ends.get(i - 1).copied().unwrap_or(whole) };
            begin..ends.get(i).copied().unwrap_or(whole)
        };
        (0..self.len()).map(move |i| Piece {
            text: &self.text[part(&self.cuts, i, self.text.len())],
            scored: &self.scored[part(&self.scored_ends, i, self.scored.len())],
        })
    }

    /// Appends what came with one token.
    fn push(&mut self, piece: String, scored: impl IntoIterator<Item = Scored>) {
        let before = self.scored.len();
        self.scored.extend(scored);
        if piece.is_empty() && self.scored.len() == before {
            return;
        }
        if self.begun {
            self.cuts.push(self.text.len());
            self.text.push_str(&piece);
        } else {
            self.text = piece;
        }
        self.begun = true;
        if !self.scored.is_empty() {
            self.scored_ends.resize(self.cuts.len(), before);
            self.scored_ends.push(self.scored.len());
        }
    }
}

impl From<String> for Shown {
    fn from(text: String) -> Self {
        Self { begun: !text.is_empty(), text, ..Self::default() }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Finished(Finish),
    /// Its worker failed: place it again, to go on after the tokens that have come, as `attempt`.
    Again {
        reason: String,
        attempt: u32,
    },
    Failed {
        reason: String,
        retryable: bool,
    },
}

/// What is to be answered, and how.
#[derive(Debug, Clone)]
pub struct Form {
    pub stops: Vec<String>,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// Whether tokens come with their log-probabilities.
    pub scored: bool,
}

/// An answer in the making.
#[derive(Debug)]
pub struct Turn {
    text: Arc<Text>,
    form: Form,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    usage: Usage,
    /// Prompt tokens that its worker did not compute, once it has said so.
    cached: Option<u32>,
    /// The tokens that have come.
    delivered: Vec<Token>,
    attempt: u32,
    /// Placements again since the last token that came.
    fruitless: u32,
    /// What speaks against the job itself since then: an agent lost with it counts 1, a worker that failed it
    /// `AGENTS_FOR_A_WORKER`.
    suspicion: u32,
    /// Tokens whose text is not shown yet.
    pending: Vec<Scored>,
    /// Characters that were decoded, and that were shown; counted for `pending` alone.
    decoded: usize,
    released: usize,
}

impl Turn {
    pub fn new(text: Arc<Text>, form: Form) -> Self {
        Self {
            detokenizer: text.decoder(),
            stops: StopMatcher::new(form.stops.clone()),
            text,
            usage: Usage { prompt_tokens: form.prompt_tokens, cached_tokens: 0, completion_tokens: 0 },
            cached: None,
            form,
            delivered: Vec::new(),
            attempt: 0,
            fruitless: 0,
            suspicion: 0,
            pending: Vec::new(),
            decoded: 0,
            released: 0,
        }
    }

    /// What was used so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Prompt tokens that came from a cache, once the worker has ended the answer itself.
    pub fn cached(&self) -> Option<u32> {
        self.cached
    }

    /// The tokens that have come: what the next placement goes on after.
    pub fn delivered(&self) -> &[Token] {
        &self.delivered
    }

    /// Placements since the last token that came.
    pub fn fruitless(&self) -> u32 {
        self.fruitless
    }

    /// Takes the next event of the job. After an `end` other than `Again` there must be no further one.
    pub fn on(&mut self, event: JobEvent) -> Step {
        match event {
            JobEvent::Tokens { position, tokens, logprobs } => self.tokens(position, &tokens, logprobs),
            JobEvent::Done { finish, usage } => self.done(finish, usage),
            JobEvent::Failed { reason, retryable } => {
                Step { end: Some(self.fail(reason, retryable, AGENTS_FOR_A_WORKER)), ..Step::default() }
            }
        }
    }

    /// Takes that the job's agent is lost, instead of a further event.
    pub fn agent_lost(&mut self, reason: String) -> Step {
        Step { end: Some(self.fail(reason, true, 1)), ..Step::default() }
    }

    fn tokens(&mut self, position: u32, tokens: &[Token], logprobs: Vec<Logprobs>) -> Step {
        if position as usize != self.delivered.len() {
            let reason = format!("tokens at {position} came where {} were expected", self.delivered.len());
            return Step { end: Some(End::Failed { reason, retryable: false }), ..Step::default() };
        }
        if self.form.scored && logprobs.len() != tokens.len() {
            let reason = format!("{} log-probabilities came for {} tokens", logprobs.len(), tokens.len());
            return Step { end: Some(End::Failed { reason, retryable: false }), ..Step::default() };
        }
        let mut logprobs = logprobs.into_iter();
        let mut shown = Shown::default();
        for &token in tokens {
            // The worker ends at `max_tokens` by itself; one that does not is not trusted to.
            if self.usage.completion_tokens >= self.form.max_tokens {
                let end = self.finish(&mut shown, Finish::Length);
                return Step { shown, end: Some(End::Finished(end)) };
            }
            self.usage.completion_tokens += 1;
            self.delivered.push(token);
            (self.fruitless, self.suspicion) = (0, 0);
            let text = self.detokenizer.push(token);
            if self.form.scored {
                self.pending.extend(logprobs.next().map(|logprobs| self.score(token, logprobs)));
                self.decoded += text.chars().count();
            }
            let released = self.stops.push(&text);
            self.show(&mut shown, released.text);
            if released.stopped {
                return Step { shown, end: Some(End::Finished(Finish::Stop)) };
            }
        }
        Step { shown, end: None }
    }

    /// Shows text with the tokens that begin in it or before.
    fn show(&mut self, shown: &mut Shown, text: String) {
        if !self.form.scored {
            return shown.push(text, []);
        }
        self.released += text.chars().count();
        let begun = self.pending.partition_point(|scored| scored.offset < self.released);
        shown.push(text, self.pending.drain(..begun));
    }

    fn score(&self, token: Token, logprobs: Logprobs) -> Scored {
        let name = |token| self.text.token_name(token);
        let top = logprobs.top.into_iter().map(|(token, logprob)| (name(token), logprob)).collect();
        Scored { token: name(token), logprob: logprobs.logprob, top, offset: self.decoded }
    }

    fn done(&mut self, finish: Finish, usage: Usage) -> Step {
        // The worker also counts an end-of-text token, which it need not send.
        self.usage.completion_tokens = self.usage.completion_tokens.max(usage.completion_tokens);
        self.cached = Some(usage.cached_tokens.min(self.form.prompt_tokens));
        let mut shown = Shown::default();
        let end = self.finish(&mut shown, finish);
        Step { shown, end: Some(End::Finished(end)) }
    }

    /// Shows what was held back; says how the answer ended after all.
    fn finish(&mut self, shown: &mut Shown, finish: Finish) -> Finish {
        let released = self.stops.push(&self.detokenizer.finish());
        self.show(shown, released.text);
        if released.stopped {
            return Finish::Stop;
        }
        shown.push(self.stops.finish(), self.pending.drain(..));
        finish
    }

    fn fail(&mut self, reason: String, retryable: bool, suspicion: u32) -> End {
        self.suspicion += suspicion;
        if !retryable || self.suspicion >= ATTEMPTS * AGENTS_FOR_A_WORKER {
            return End::Failed { reason, retryable };
        }
        self.attempt += 1;
        self.fruitless += 1;
        End::Again { reason, attempt: self.attempt }
    }
}

#[cfg(test)]
mod schedules;

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::text::Bundle;

    fn turn(stops: &[&str], max_tokens: u32) -> Turn {
        form(stops, max_tokens, false)
    }

    fn form(stops: &[&str], max_tokens: u32, scored: bool) -> Turn {
        let text = Arc::new(Text::new(&Bundle::echo()).unwrap());
        let stops = stops.iter().map(|s| s.to_string()).collect();
        Turn::new(text, Form { stops, prompt_tokens: 7, max_tokens, scored })
    }

    /// Bytes are tokens of the echo vocabulary.
    fn bytes(position: u32, bytes: &[u8]) -> JobEvent {
        JobEvent::Tokens { position, tokens: bytes.iter().map(|b| Token::from(*b)).collect(), logprobs: Vec::new() }
    }

    fn done(tokens: u32) -> JobEvent {
        JobEvent::Done {
            finish: Finish::Length,
            usage: Usage { prompt_tokens: 7, cached_tokens: 0, completion_tokens: tokens },
        }
    }

    fn shown(text: &str) -> Step {
        ended(text, None)
    }

    /// A step that showed `text`, its pieces parted by `|`.
    fn ended(text: &str, end: Option<End>) -> Step {
        let mut shown = Shown::default();
        text.split('|').for_each(|piece| shown.push(piece.into(), []));
        Step { shown, end }
    }

    fn lost() -> JobEvent {
        JobEvent::Failed { reason: "lost".into(), retryable: true }
    }

    #[test]
    fn text_is_shown_as_it_comes_and_counted() {
        let mut turn = turn(&[], 10);
        assert_eq!(turn.on(bytes(0, b"he")), shown("h|e"));
        assert_eq!(turn.on(bytes(2, b"y")), shown("y"));
        assert_eq!(turn.on(done(3)), ended("", Some(End::Finished(Finish::Length))));
        assert_eq!(turn.usage(), Usage { prompt_tokens: 7, cached_tokens: 0, completion_tokens: 3 });
    }

    #[test]
    fn tokens_that_come_together_are_shown_one_by_one() {
        let mut turn = turn(&[], 10);
        let step = turn.on(bytes(0, "aé!".as_bytes()));
        assert_eq!(
            (step.shown.pieces().map(|p| p.text).collect::<Vec<_>>(), step.shown.len()),
            (vec!["a", "é", "!"], 3)
        );
        assert_eq!(step.shown.text(), "aé!");
        assert_eq!((Shown::default().pieces().count(), Shown::default().len()), (0, 0));
    }

    #[test]
    fn a_character_is_never_split() {
        let mut turn = turn(&[], 10);
        let e = "é".as_bytes();
        assert_eq!(turn.on(bytes(0, &e[..1])), shown(""));
        assert_eq!(turn.on(bytes(1, &e[1..])), shown("é"));
    }

    #[test]
    fn a_stop_string_ends_the_answer_and_is_not_shown() {
        let mut turn = turn(&["END"], 10);
        assert_eq!(turn.on(bytes(0, b"a EN")), shown("a| "));
        assert_eq!(turn.on(bytes(4, b"Dxx")), ended("", Some(End::Finished(Finish::Stop))));
        assert_eq!(turn.usage().completion_tokens, 5, "what comes after the stop string is not counted");
    }

    #[test]
    fn a_half_stop_string_is_shown_at_the_end() {
        let mut turn = turn(&["END"], 10);
        assert_eq!(turn.on(bytes(0, b"EN")), shown(""));
        assert_eq!(turn.on(done(2)), ended("EN", Some(End::Finished(Finish::Length))));
    }

    #[test]
    fn a_worker_that_goes_on_too_long_is_ended() {
        let mut turn = turn(&[], 2);
        assert_eq!(turn.on(bytes(0, b"ab")).end, None);
        assert_eq!(turn.on(bytes(2, b"c")).end, Some(End::Finished(Finish::Length)));
    }

    #[test]
    fn tokens_out_of_order_fail_the_turn_for_good() {
        let mut turn = turn(&[], 10);
        turn.on(bytes(0, b"a"));
        assert!(matches!(turn.on(bytes(5, b"b")).end, Some(End::Failed { retryable: false, .. })));
    }

    #[test]
    fn what_has_come_stays_and_the_next_placement_goes_on_after_it() {
        let mut turn = turn(&["END"], 10);
        let e = "é".as_bytes();
        assert_eq!(turn.on(bytes(0, &[b'a', e[0]])), shown("a"));
        assert_eq!(turn.on(lost()).end, Some(End::Again { reason: "lost".into(), attempt: 1 }));
        assert_eq!(turn.delivered(), [u32::from(b'a'), u32::from(e[0])]);
        assert_eq!(turn.on(bytes(2, &[e[1], b'E'])), shown("é"));
        assert_eq!(turn.on(lost()).end, Some(End::Again { reason: "lost".into(), attempt: 2 }));
        assert_eq!(turn.on(bytes(4, b"ND")), ended("", Some(End::Finished(Finish::Stop))));
        assert_eq!(turn.usage().completion_tokens, 6);
    }

    #[test]
    fn placements_without_a_new_token_come_to_an_end_and_those_with_one_do_not() {
        let mut turn = turn(&[], 100);
        for attempt in 1..20 {
            turn.on(bytes(attempt - 1, b"a"));
            assert_eq!(turn.on(lost()).end, Some(End::Again { reason: "lost".into(), attempt }));
        }
        for attempt in 20..20 + ATTEMPTS - 2 {
            assert_eq!(turn.on(lost()).end, Some(End::Again { reason: "lost".into(), attempt }));
        }
        assert_eq!(turn.on(lost()).end, Some(End::Failed { reason: "lost".into(), retryable: true }));
    }

    #[test]
    fn an_agent_that_is_lost_speaks_less_against_a_job_than_a_worker() {
        let mut turn = turn(&[], 100);
        let again = |attempt| Some(End::Again { reason: "lost".into(), attempt });
        for attempt in 1..ATTEMPTS {
            assert_eq!(turn.on(lost()).end, again(attempt));
        }
        for attempt in ATTEMPTS..ATTEMPTS + AGENTS_FOR_A_WORKER - 1 {
            assert_eq!(turn.agent_lost("lost".into()).end, again(attempt));
        }
        let end = turn.agent_lost("lost".into()).end;
        assert_eq!(end, Some(End::Failed { reason: "lost".into(), retryable: true }), "and yet it comes to an end");
    }

    /// Bytes with the probability of each: its place in the answer, negative; the alternative is `?`.
    fn scored(position: u32, bytes: &[u8]) -> JobEvent {
        let top = vec![(Token::from(b'?'), 0.0)];
        let logprobs = (position..).zip(bytes).map(|(at, _)| Logprobs { logprob: -(at as f32), top: top.clone() });
        JobEvent::Tokens {
            position,
            tokens: bytes.iter().map(|b| Token::from(*b)).collect(),
            logprobs: logprobs.collect(),
        }
    }

    /// Text and places of the tokens of each piece.
    fn pieces(step: &Step) -> Vec<(&str, Vec<i32>)> {
        step.shown.pieces().map(|p| (p.text, p.scored.iter().map(|s| -s.logprob as i32).collect())).collect()
    }

    #[test]
    fn tokens_come_with_the_text_that_they_begin_and_none_is_lost() {
        let mut turn = form(&["END"], 20, true);
        let e = "é".as_bytes();
        assert_eq!(pieces(&turn.on(scored(0, b"a"))), [("a", vec![0])]);
        assert_eq!(pieces(&turn.on(scored(1, &e[..1]))), []);
        let step = turn.on(scored(2, &e[1..]));
        assert_eq!(pieces(&step), [("é", vec![1, 2])]);
        let first = &step.shown.scored()[0];
        assert_eq!((first.token.as_slice(), first.offset, &first.top), (&e[..1], 1, &vec![(b"?".to_vec(), 0.0)]));
        assert_eq!(pieces(&turn.on(scored(3, b"xE"))), [("x", vec![3])]);
        let step = turn.on(scored(5, b"-"));
        assert_eq!((pieces(&step), step.shown.scored()[0].offset), (vec![("E-", vec![4, 5])], 3));
        assert_eq!(pieces(&turn.on(scored(6, b"E"))), []);
        assert_eq!(pieces(&turn.on(done(7))), [("E", vec![6])]);
    }

    #[test]
    fn tokens_of_a_stop_string_are_not_told_and_those_without_text_are() {
        let mut turn = form(&["END"], 20, true);
        let step = turn.on(scored(0, b"aEND"));
        assert_eq!(pieces(&step), [("a", vec![0])]);
        assert_eq!(step.end, Some(End::Finished(Finish::Stop)));
        let mut turn = form(&[], 20, true);
        assert_eq!(pieces(&turn.on(scored(0, &[b'a', 0xc3]))), [("a", vec![0])]);
        assert!(matches!(turn.on(lost()).end, Some(End::Again { .. })));
        assert_eq!(pieces(&turn.on(scored(2, &[0xc3]))), [("\u{fffd}", vec![1, 2])]);
        assert_eq!(pieces(&turn.on(done(3))), [("\u{fffd}", vec![])]);
    }

    #[test]
    fn tokens_without_their_probabilities_fail_a_turn_that_wants_them() {
        let mut turn = form(&[], 20, true);
        assert!(matches!(turn.on(bytes(0, b"a")).end, Some(End::Failed { retryable: false, .. })));
    }

    #[test]
    fn a_failure_that_is_nobodys_bad_luck_is_not_tried_again() {
        let mut turn = turn(&[], 10);
        let event = JobEvent::Failed { reason: "too long".into(), retryable: false };
        assert_eq!(turn.on(event).end, Some(End::Failed { reason: "too long".into(), retryable: false }));
    }
}
