//! Turns under every order of death, delay, repetition and loss, held against a model that knows what a client may see.
//!
//! The answer is fixed: whoever computes it gives the same tokens. A schedule says in which pieces they come, where workers
//! die, and what confused ones send. Whatever happens, what is shown is a beginning of what an undisturbed run shows, and
//! all of it if the turn ends well.

use izar_common::text::{Bundle, echo};
use proptest::prelude::*;

use super::*;

/// What is answered, and how. Tokens of the echo vocabulary: bytes, and some words.
#[derive(Debug, Clone)]
struct Answer {
    /// To its end, `max_tokens` or not.
    tokens: Vec<Token>,
    stops: Vec<String>,
    max_tokens: u32,
    scored: bool,
    /// Its workers do not end at `max_tokens`.
    stubborn: bool,
}

/// What comes next.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// So many tokens at once, perhaps none; after the last one the end.
    Give(usize),
    /// The worker is lost.
    Die,
    /// Its agent is lost, or the link to it.
    Lose,
    /// It cannot be done, here or anywhere.
    Refuse,
    /// Tokens come again that came before, and perhaps more.
    Repeat { back: usize, count: usize },
    /// So many tokens are missing.
    Skip(usize),
    /// Tokens come without their probabilities.
    Bare,
}

/// Everything that a client is told of a choice.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    pieces: Vec<(String, Vec<Scored>)>,
    end: Option<Finish>,
    usage: Usage,
}

impl Seen {
    fn take(&mut self, shown: &Shown) {
        let pieces: Vec<_> = shown.pieces().map(|p| (p.text.to_owned(), p.scored.to_vec())).collect();
        assert_eq!(pieces.iter().map(|(text, _)| text.as_str()).collect::<String>(), shown.text());
        self.pieces.extend(pieces);
    }

    fn text(&self) -> String {
        self.pieces.iter().map(|(text, _)| text.as_str()).collect()
    }
}

impl Answer {
    fn turn(&self) -> Turn {
        thread_local!(static TEXT: Arc<Text> = Arc::new(Text::new(&Bundle::echo()).unwrap()));
        let form =
            Form { stops: self.stops.clone(), prompt_tokens: 7, max_tokens: self.max_tokens, scored: self.scored };
        Turn::new(TEXT.with(Arc::clone), form)
    }

    /// The tokens that an honest worker gives.
    fn honest(&self) -> &[Token] {
        &self.tokens[..self.tokens.len().min(self.max_tokens as usize)]
    }

    /// Tokens of the answer as they come; probabilities depend on the place alone.
    fn give(&self, from: usize, to: usize) -> JobEvent {
        let logprob = |at: usize| Logprobs { logprob: -(at as f32), top: vec![(self.tokens[at], -(at as f32))] };
        let logprobs = if self.scored { (from..to).map(logprob).collect() } else { Vec::new() };
        JobEvent::Tokens { position: from as u32, tokens: self.tokens[from..to].to_vec(), logprobs }
    }

    /// A model that ends the answer itself counts the token that says so.
    fn done(&self) -> JobEvent {
        let given = self.honest().len() as u32;
        let (finish, completion_tokens) =
            if given < self.max_tokens { (Finish::Stop, given + 1) } else { (Finish::Length, given) };
        JobEvent::Done { finish, usage: Usage { prompt_tokens: 7, completion_tokens, cached_tokens: 0 } }
    }

    /// What an honest worker's answer says, token by token.
    fn undisturbed(&self) -> Seen {
        let (mut turn, mut seen) = (self.turn(), Seen::default());
        let count = self.honest().len();
        for event in (0..count).map(|at| self.give(at, at + 1)).chain([self.done()]) {
            let step = turn.on(event);
            seen.take(&step.shown);
            seen.usage = turn.usage();
            match step.end {
                None => {}
                Some(End::Finished(finish)) => {
                    seen.end = Some(finish);
                    return seen;
                }
                Some(end) => panic!("undisturbed, and yet {end:?}"),
            }
        }
        panic!("an answer has an end")
    }

    /// The text and the end by another way: all bytes at once, cut before the first stop string.
    fn told_at_once(&self) -> (String, Finish) {
        let bytes: Vec<u8> = self.honest().iter().flat_map(|token| bytes(*token)).collect();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        let first = self.stops.iter().filter_map(|s| whole.find(s.as_str()).map(|at| (at + s.len(), at))).min();
        let ended = if self.honest().len() < self.max_tokens as usize { Finish::Stop } else { Finish::Length };
        first.map_or((whole.clone(), ended), |(_, at)| (whole[..at].to_owned(), Finish::Stop))
    }
}

fn bytes(token: Token) -> Vec<u8> {
    match token.checked_sub(echo::FIRST_WORD) {
        None => vec![token as u8],
        Some(word) => format!(" {}", echo::WORDS[word as usize]).into_bytes(),
    }
}

/// Runs the schedule, then honest workers to the end; checks at every step what the client was told.
fn check(answer: &Answer, schedule: &[Act]) {
    let expected = answer.undisturbed();
    let (mut turn, mut seen) = (answer.turn(), Seen::default());
    let (mut fruitless, mut suspicion, mut placed) = (0, 0, 0);
    let last = if answer.stubborn { answer.tokens.len() } else { answer.honest().len() };
    for act in schedule.iter().copied().chain(std::iter::repeat(Act::Give(1))) {
        let at = turn.delivered().len();
        let event = match act {
            Act::Lose => JobEvent::Failed { reason: "unused".into(), retryable: true },
            Act::Give(count) if at < last => answer.give(at, last.min(at + count)),
            Act::Give(_) => answer.done(),
            Act::Die => JobEvent::Failed { reason: "lost".into(), retryable: true },
            Act::Refuse => JobEvent::Failed { reason: "no".into(), retryable: false },
            Act::Repeat { back, count } if (1..=at).contains(&back) => {
                answer.give(at - back, answer.tokens.len().min(at - back + count))
            }
            Act::Skip(count) if at + count < answer.tokens.len() => answer.give(at + count, at + count + 1),
            Act::Bare if answer.scored && at < last => {
                JobEvent::Tokens { position: at as u32, tokens: vec![answer.tokens[at]], logprobs: Vec::new() }
            }
            Act::Repeat { .. } | Act::Skip(_) | Act::Bare => continue,
        };
        let step = if let Act::Lose = act { turn.agent_lost("lost".into()) } else { turn.on(event) };
        seen.take(&step.shown);
        seen.usage = turn.usage();
        assert!(expected.pieces.starts_with(&seen.pieces), "{:?} instead of {:?}", seen.pieces, expected.pieces);
        let came = turn.delivered().len() - at;
        assert_eq!(turn.delivered(), &answer.tokens[..at + came], "what goes to the next worker is what has come");
        if came > 0 {
            (fruitless, suspicion) = (0, 0);
        }
        suspicion += match act {
            Act::Die => AGENTS_FOR_A_WORKER,
            Act::Lose => 1,
            _ => 0,
        };
        match (act, step.end) {
            (Act::Give(_), None) => assert!(at < last),
            (Act::Give(_), Some(End::Finished(finish))) => {
                seen.end = Some(finish);
                assert_eq!(seen, expected);
                return;
            }
            (Act::Die | Act::Lose, Some(End::Again { attempt, .. })) => {
                (fruitless, placed) = (fruitless + 1, placed + 1);
                assert!(attempt == placed && fruitless == turn.fruitless());
                assert!(suspicion < ATTEMPTS * AGENTS_FOR_A_WORKER);
            }
            (Act::Die | Act::Lose, Some(End::Failed { retryable: true, .. })) => {
                assert!(suspicion >= ATTEMPTS * AGENTS_FOR_A_WORKER, "nobody gives up sooner");
                return;
            }
            (Act::Die | Act::Lose | Act::Give(_), end) => panic!("{act:?} came to {end:?}"),
            (_, Some(End::Failed { retryable: false, .. })) => {
                return assert!(step.shown.is_empty() && came == 0, "what does not fit is not shown");
            }
            (act, end) => panic!("{act:?} came to {end:?}"),
        }
    }
}

/// Characters of one to four bytes, broken ones among them, and words; few, so that stop strings meet them.
fn tokens() -> impl Strategy<Value = Vec<Token>> {
    let character = prop::sample::select(vec!["a", "b", "E", "é", "€", "😀", " "]);
    let some = prop_oneof![
        8 => character.prop_map(|c| c.bytes().map(Token::from).collect::<Vec<_>>()),
        1 => any::<u8>().prop_map(|byte| vec![Token::from(byte)]),
        2 => (0..4_u32).prop_map(|word| vec![echo::FIRST_WORD + word]),
    ];
    prop::collection::vec(some, 0..24).prop_map(|parts: Vec<Vec<Token>>| parts.concat())
}

fn stops() -> impl Strategy<Value = Vec<String>> {
    let words = prop::sample::select(vec![" the", "e of", "of an", "\u{fffd}", "😀😀"]).prop_map(str::to_owned);
    prop::collection::vec(prop_oneof!["[abEé€]{1,5}", words], 0..4)
}

prop_compose! {
    fn answers()(
        tokens in tokens(), stops in stops(), max_tokens in 1..40_u32, scored: bool, stubborn: bool,
    ) -> Answer {
        Answer { tokens, stops, max_tokens, scored, stubborn }
    }
}

/// Mostly tokens, and deaths among them.
fn deaths() -> impl Strategy<Value = Act> {
    prop_oneof![4 => (0..5_usize).prop_map(Act::Give), 1 => Just(Act::Die), 2 => Just(Act::Lose)]
}

fn everything() -> impl Strategy<Value = Act> {
    prop_oneof![
        20 => deaths(),
        1 => Just(Act::Refuse),
        2 => (1..8_usize, 1..8_usize).prop_map(|(back, count)| Act::Repeat { back, count }),
        1 => (1..4_usize).prop_map(Act::Skip),
        1 => Just(Act::Bare),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn an_answer_says_the_same_whoever_dies_while_it_is_computed(
        answer in answers(), schedule in prop::collection::vec(deaths(), 0..60),
    ) {
        check(&answer, &schedule);
    }

    #[test]
    fn what_does_not_belong_ends_the_turn_and_is_never_shown(
        answer in answers(), schedule in prop::collection::vec(everything(), 0..60),
    ) {
        check(&answer, &schedule);
    }

    #[test]
    fn an_undisturbed_answer_is_its_text_before_the_first_stop_string(answer in answers()) {
        let seen = answer.undisturbed();
        prop_assert_eq!((seen.text(), seen.end.unwrap()), answer.told_at_once());
        if answer.scored {
            let scored: Vec<&Scored> = seen.pieces.iter().flat_map(|(_, scored)| scored).collect();
            let places: Vec<i32> = scored.iter().map(|scored| -scored.logprob as i32).collect();
            prop_assert_eq!(&places, &(0..scored.len() as i32).collect::<Vec<_>>(), "each token once, in order");
        }
    }
}

#[test]
fn an_answer_never_has_more_tokens_than_it_may_however_they_come() {
    let tokens = b"abcdef".map(Token::from).to_vec();
    let answer = Answer { tokens, stops: Vec::new(), max_tokens: 3, scored: true, stubborn: true };
    for schedule in [vec![Act::Give(6)], vec![Act::Give(3), Act::Die], vec![Act::Give(2), Act::Give(4)]] {
        check(&answer, &schedule);
    }
    assert_eq!(answer.undisturbed().text(), "abc");
}
