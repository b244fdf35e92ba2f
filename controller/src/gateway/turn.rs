//! A running turn as a pure core: token ids in, text and the end out.
//!
//! It detokenizes, watches for stop strings, counts, and decides whether a failed job is placed again. It knows no
//! clock, no client and no dialect; the shell around it (`chat`) passes on what it returns.

use std::sync::Arc;

use izar_common::chat::{Finish, JobEvent, Token, Usage};
use izar_common::text::{Detokenizer, StopMatcher, Text};

/// Placements of one job at most: the first, and two after failures. A job that failed three workers is more likely
/// the cause than they.
pub const ATTEMPTS: u32 = 3;

/// What one event came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    pub shown: Shown,
    pub end: Option<End>,
}

/// Text that may be shown now; empty while characters or stop strings are incomplete.
///
/// Remembers what came with which token, because a client is shown one event for each. With one token an event, the
/// usual case, that costs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shown {
    text: String,
    /// Where pieces but the first begin.
    cuts: Vec<usize>,
}

impl Shown {
    pub fn text(&self) -> &str {
        &self.text
    }
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
    /// How many pieces there are.
    pub fn len(&self) -> usize {
        if self.text.is_empty() { 0 } else { self.cuts.len() + 1 }
    }
    /// The pieces, in order; none is empty.
    pub fn pieces(&self) -> impl Iterator<Item = &str> {
        let begins = std::iter::once(0).chain(self.cuts.iter().copied());
        let ends = self.cuts.iter().copied().chain(std::iter::once(self.text.len()));
        begins.zip(ends).map(|(begin, end)| &self.text[begin..end]).filter(|piece| !piece.is_empty())
    }

    /// Appends what came with one token.
    fn push(&mut self, piece: String) {
        if self.text.is_empty() {
            self.text = piece;
        } else if !piece.is_empty() {
            self.cuts.push(self.text.len());
            self.text.push_str(&piece);
        }
    }
}

impl From<String> for Shown {
    fn from(text: String) -> Self {
        Self { text, cuts: Vec::new() }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Finished(Finish),
    /// Failed before anything was shown: place it again, from its prompt, as `attempt`.
    Again {
        reason: String,
        attempt: u32,
    },
    Failed {
        reason: String,
        retryable: bool,
    },
}

/// An answer in the making.
#[derive(Debug)]
pub struct Turn {
    text: Arc<Text>,
    stop_strings: Vec<String>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    usage: Usage,
    max_tokens: u32,
    attempt: u32,
    /// Whether text is shown as it comes. If not, nothing is shown before the end, so that every failure can be
    /// mended.
    streamed: bool,
    shown: bool,
}

impl Turn {
    pub fn new(
        text: Arc<Text>,
        stop_strings: Vec<String>,
        prompt_tokens: u32,
        max_tokens: u32,
        streamed: bool,
    ) -> Self {
        Self {
            detokenizer: text.decoder(),
            stops: StopMatcher::new(stop_strings.clone()),
            text,
            stop_strings,
            usage: Usage { prompt_tokens, completion_tokens: 0 },
            max_tokens,
            attempt: 0,
            streamed,
            shown: false,
        }
    }

    /// What was used so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Takes the next event of the job. After an `end` other than `Again` there must be no further one.
    pub fn on(&mut self, event: JobEvent) -> Step {
        let step = match event {
            JobEvent::Tokens { position, tokens } => self.tokens(position, &tokens),
            JobEvent::Done { finish, usage } => self.done(finish, usage),
            JobEvent::Failed { reason, retryable } => {
                Step { end: Some(self.fail(reason, retryable)), ..Step::default() }
            }
        };
        self.shown |= self.streamed && !step.shown.is_empty();
        step
    }

    fn tokens(&mut self, position: u32, tokens: &[Token]) -> Step {
        if position != self.usage.completion_tokens {
            let reason = format!("tokens at {position} came where {} were expected", self.usage.completion_tokens);
            return Step { end: Some(self.fail(reason, false)), ..Step::default() };
        }
        let mut shown = Shown::default();
        for &token in tokens {
            self.usage.completion_tokens += 1;
            let released = self.stops.push(&self.detokenizer.push(token));
            shown.push(released.text);
            if released.stopped {
                return Step { shown, end: Some(End::Finished(Finish::Stop)) };
            }
        }
        // The worker ends at `max_tokens` by itself; one that does not is not trusted to.
        if self.usage.completion_tokens > self.max_tokens {
            shown.push(self.stops.finish());
            return Step { shown, end: Some(End::Finished(Finish::Length)) };
        }
        Step { shown, end: None }
    }

    fn done(&mut self, finish: Finish, usage: Usage) -> Step {
        // The worker also counts an end-of-text token, which it need not send.
        self.usage.completion_tokens = self.usage.completion_tokens.max(usage.completion_tokens);
        let released = self.stops.push(&self.detokenizer.finish());
        let mut shown = Shown::default();
        shown.push(released.text);
        if released.stopped {
            return Step { shown, end: Some(End::Finished(Finish::Stop)) };
        }
        shown.push(self.stops.finish());
        Step { shown, end: Some(End::Finished(finish)) }
    }

    fn fail(&mut self, reason: String, retryable: bool) -> End {
        if !retryable || self.shown || self.attempt + 1 >= ATTEMPTS {
            return End::Failed { reason, retryable };
        }
        self.attempt += 1;
        self.detokenizer = self.text.decoder();
        self.stops = StopMatcher::new(self.stop_strings.clone());
        self.usage.completion_tokens = 0;
        End::Again { reason, attempt: self.attempt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::text::Bundle;

    fn turn(stops: &[&str], max_tokens: u32, streamed: bool) -> Turn {
        let text = Arc::new(Text::new(&Bundle::echo()).unwrap());
        Turn::new(text, stops.iter().map(|s| s.to_string()).collect(), 7, max_tokens, streamed)
    }

    /// Bytes are tokens of the echo vocabulary.
    fn bytes(position: u32, bytes: &[u8]) -> JobEvent {
        JobEvent::Tokens { position, tokens: bytes.iter().map(|b| Token::from(*b)).collect() }
    }

    fn done(tokens: u32) -> JobEvent {
        JobEvent::Done { finish: Finish::Length, usage: Usage { prompt_tokens: 7, completion_tokens: tokens } }
    }

    fn shown(text: &str) -> Step {
        ended(text, None)
    }

    /// A step that showed `text`, its pieces parted by `|`.
    fn ended(text: &str, end: Option<End>) -> Step {
        let mut shown = Shown::default();
        text.split('|').for_each(|piece| shown.push(piece.into()));
        Step { shown, end }
    }

    fn lost() -> JobEvent {
        JobEvent::Failed { reason: "lost".into(), retryable: true }
    }

    #[test]
    fn text_is_shown_as_it_comes_and_counted() {
        let mut turn = turn(&[], 10, true);
        assert_eq!(turn.on(bytes(0, b"he")), shown("h|e"));
        assert_eq!(turn.on(bytes(2, b"y")), shown("y"));
        assert_eq!(turn.on(done(3)), ended("", Some(End::Finished(Finish::Length))));
        assert_eq!(turn.usage(), Usage { prompt_tokens: 7, completion_tokens: 3 });
    }

    #[test]
    fn tokens_that_come_together_are_shown_one_by_one() {
        let mut turn = turn(&[], 10, true);
        let step = turn.on(bytes(0, "aé!".as_bytes()));
        assert_eq!((step.shown.pieces().collect::<Vec<_>>(), step.shown.len()), (vec!["a", "é", "!"], 3));
        assert_eq!(step.shown.text(), "aé!");
        assert_eq!((Shown::default().pieces().count(), Shown::default().len()), (0, 0));
    }

    #[test]
    fn a_character_is_never_split() {
        let mut turn = turn(&[], 10, true);
        let e = "é".as_bytes();
        assert_eq!(turn.on(bytes(0, &e[..1])), shown(""));
        assert_eq!(turn.on(bytes(1, &e[1..])), shown("é"));
    }

    #[test]
    fn a_stop_string_ends_the_answer_and_is_not_shown() {
        let mut turn = turn(&["END"], 10, true);
        assert_eq!(turn.on(bytes(0, b"a EN")), shown("a| "));
        assert_eq!(turn.on(bytes(4, b"Dxx")), ended("", Some(End::Finished(Finish::Stop))));
        assert_eq!(turn.usage().completion_tokens, 5, "what comes after the stop string is not counted");
    }

    #[test]
    fn a_half_stop_string_is_shown_at_the_end() {
        let mut turn = turn(&["END"], 10, true);
        assert_eq!(turn.on(bytes(0, b"EN")), shown(""));
        assert_eq!(turn.on(done(2)), ended("EN", Some(End::Finished(Finish::Length))));
    }

    #[test]
    fn a_worker_that_goes_on_too_long_is_ended() {
        let mut turn = turn(&[], 2, true);
        assert_eq!(turn.on(bytes(0, b"ab")).end, None);
        assert_eq!(turn.on(bytes(2, b"c")).end, Some(End::Finished(Finish::Length)));
    }

    #[test]
    fn tokens_out_of_order_fail_the_turn_for_good() {
        let mut turn = turn(&[], 10, true);
        turn.on(bytes(0, b"a"));
        assert!(matches!(turn.on(bytes(5, b"b")).end, Some(End::Failed { retryable: false, .. })));
    }

    #[test]
    fn a_failure_before_anything_was_shown_is_mended_twice() {
        let mut turn = turn(&["END"], 10, true);
        turn.on(bytes(0, b"E"));
        for attempt in 1..ATTEMPTS {
            assert_eq!(turn.on(lost()).end, Some(End::Again { reason: "lost".into(), attempt }));
            assert_eq!(turn.usage().completion_tokens, 0);
        }
        assert_eq!(turn.on(lost()).end, Some(End::Failed { reason: "lost".into(), retryable: true }));
    }

    #[test]
    fn after_the_first_shown_text_a_failure_ends_a_streamed_turn() {
        let mut turn = turn(&[], 10, true);
        turn.on(bytes(0, b"a"));
        assert_eq!(turn.on(lost()).end, Some(End::Failed { reason: "lost".into(), retryable: true }));
    }

    #[test]
    fn an_unstreamed_turn_has_shown_nothing_and_begins_again() {
        let mut turn = turn(&[], 10, false);
        turn.on(bytes(0, b"ab"));
        assert!(matches!(turn.on(lost()).end, Some(End::Again { attempt: 1, .. })));
        assert_eq!(turn.on(bytes(0, b"abc")), shown("a|b|c"));
    }

    #[test]
    fn a_failure_that_is_nobodys_bad_luck_is_not_tried_again() {
        let mut turn = turn(&[], 10, true);
        let event = JobEvent::Failed { reason: "too long".into(), retryable: false };
        assert_eq!(turn.on(event).end, Some(End::Failed { reason: "too long".into(), retryable: false }));
    }
}
