//! Streams that break off anywhere and are read on elsewhere, again and again: a client that goes by the ids of its
//! events has in the end what one read in one go has, byte for byte.
//!
//! Every controller that goes on begins with the first token of each choice, as agents keep them, in pieces of its own,
//! with deaths of its own.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use hyper::body::Body;
use izar_common::chat::{JobEvent, Token};
use izar_common::id::{DeploymentId, TurnId};
use izar_common::text::{Bundle, Text, echo};
use proptest::prelude::*;

use super::*;
use crate::gateway::memory;
use crate::gateway::openai::Head;
use crate::gateway::openai::sse::Kind;
use crate::gateway::outlet::{OutletBody, outlet};
use crate::gateway::turn::{End, Form, Turn};

/// What is answered; one list of tokens for each choice.
#[derive(Debug, Clone)]
struct Asked {
    choices: Vec<Vec<Token>>,
    stops: Vec<String>,
    usage: bool,
}

/// What a client has.
#[derive(Debug, Default)]
struct Client {
    /// Whole events but comments: whose they are, and their bytes.
    events: Vec<(Option<u64>, String)>,
    last_id: Option<Cursor>,
    /// Events up to the one with that id.
    sure: usize,
    done: bool,
}

impl Client {
    /// Reads as far as a stream came; half an event is nothing.
    fn read(&mut self, bytes: &str) {
        self.events.truncate(self.sure);
        for block in bytes.split_inclusive("\n\n").filter(|block| block.ends_with("\n\n")) {
            let Some(data) = block.lines().find_map(|line| line.strip_prefix("data: ")) else { continue };
            if data == "[DONE]" {
                self.done = true;
                return;
            }
            let event: serde_json::Value = serde_json::from_str(data).expect("an event is JSON");
            self.events.push((event["choices"][0]["index"].as_u64(), data.to_owned()));
            if let Some(id) = block.lines().find_map(|line| line.strip_prefix("id: ")) {
                (self.last_id, self.sure) = (Some(id.parse().expect("an id is a cursor")), self.events.len());
            }
        }
    }

    /// What each choice said: between choices the order is nobody's.
    fn by_choice(&self) -> Vec<Vec<&str>> {
        let of = |choice| self.events.iter().filter(move |e| e.0 == choice).map(|e| e.1.as_str()).collect();
        [None, Some(0), Some(1), Some(2)].into_iter().map(of).collect()
    }
}

/// All that one controller would write, from where the client is. `order` says which choice has something next, and how
/// many tokens; no token is a death.
fn serve(asked: &Asked, from: Option<&Cursor>, order: &[(usize, usize)]) -> String {
    thread_local!(static TEXT: Arc<Text> = Arc::new(Text::new(&Bundle::echo()).unwrap()));
    let count = asked.choices.len();
    let cursor = from.cloned().unwrap_or_else(|| Cursor::begin(TurnId(1), Default::default(), count as u32));
    let head = Head { turn: TurnId(1), created: 1, model: DeploymentId::new("m").unwrap() };
    let ((tx, _rx), (outlet, body)) = (oneshot::channel(), outlet(10_000, memory::plenty()));
    let mut exit = Exit::stream(tx, outlet, Events::new(Kind::Chat, &head, asked.usage), cursor);
    let turn = |tokens: &Vec<Token>| {
        let max_tokens = tokens.len().max(1) as u32;
        Turn::new(
            TEXT.with(Arc::clone),
            Form { stops: asked.stops.clone(), prompt_tokens: 1, max_tokens, scored: false },
        )
    };
    let mut turns: Vec<Option<Turn>> = asked.choices.iter().map(|tokens| Some(turn(tokens))).collect();
    let to_the_end = (0..count).map(|choice| (choice, usize::MAX)).cycle();
    for (choice, take) in order.iter().copied().chain(to_the_end) {
        let (choice, tokens) = (choice % count, &asked.choices[choice % count]);
        let Some(turn) = &mut turns[choice] else { continue };
        let (at, completion_tokens) = (turn.delivered().len(), tokens.len() as u32);
        let event = match take {
            0 if turn.fruitless() == 0 => JobEvent::Failed { reason: "lost".into(), retryable: true },
            _ if at < tokens.len() => {
                let tokens = tokens[at..].iter().copied().take(take.max(1)).collect();
                JobEvent::Tokens { position: at as u32, tokens, logprobs: Vec::new() }
            }
            _ => JobEvent::Done {
                finish: Finish::Length,
                usage: Usage { prompt_tokens: 1, completion_tokens, ..Usage::default() },
            },
        };
        let step = turn.on(event);
        if !step.shown.is_empty() {
            exit.text(choice as u32, &step.shown, Instant::now()).unwrap();
        }
        let Some(End::Finished(finish)) = step.end else { continue };
        turns[choice] = None;
        if turns.iter().all(Option::is_none) {
            exit.finish(choice as u32, finish, Usage::default());
            return everything(body);
        }
        exit.ended(choice as u32, finish).unwrap();
    }
    unreachable!("every choice comes to its end")
}

fn everything(mut body: OutletBody) -> String {
    let (mut all, mut cx) = (Vec::new(), Context::from_waker(Waker::noop()));
    while let Poll::Ready(Some(frame)) = Pin::new(&mut body).poll_frame(&mut cx) {
        all.extend_from_slice(&frame.unwrap().into_data().unwrap());
    }
    String::from_utf8(all).expect("events are text")
}

prop_compose! {
    fn asked()(
        choices in prop::collection::vec(prop::collection::vec(prop_oneof![
            prop::sample::select(vec![b'a', b'b', b'E', 0xc3, 0xa9]).prop_map(Token::from),
            (0..3_u32).prop_map(|word| echo::FIRST_WORD + word),
        ], 0..20), 1..4),
        stops in prop::collection::vec("[abE]{2,3}", 0..3),
        usage: bool,
    ) -> Asked {
        Asked { choices, stops, usage }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_stream_that_is_cut_anywhere_and_read_on_elsewhere_says_everything_once(
        asked in asked(),
        cuts in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::collection::vec((0..3_usize, 0..4_usize), 0..30)), 0..6),
        last in prop::collection::vec((0..3_usize, 0..4_usize), 0..30),
    ) {
        let mut undisturbed = Client::default();
        undisturbed.read(&serve(&asked, None, &[]));
        prop_assert!(undisturbed.done);
        let mut client = Client::default();
        for (cut, order) in &cuts {
            let stream = serve(&asked, client.last_id.as_ref(), order);
            // A cut in the middle of a character is one in the middle of an event.
            let at = (0..=cut.index(stream.len() + 1)).rev().find(|at| stream.is_char_boundary(*at)).unwrap_or(0);
            if !client.done {
                client.read(&stream[..at]);
            }
        }
        if !client.done {
            client.read(&serve(&asked, client.last_id.as_ref(), &last));
        }
        prop_assert!(client.done);
        prop_assert_eq!(client.by_choice(), undisturbed.by_choice());
    }
}
