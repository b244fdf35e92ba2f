//! The way out of a running turn: to a client that waits for the whole answer, or to one that reads along.
//!
//! Nothing leaves before the turn says so; the head of a streamed answer goes out with its first text, so that a
//! failure before it still has a status of its own.

use std::time::Duration;

use bytes::BytesMut;
use izar_common::chat::{Finish, Usage};
use izar_common::id::NumericsId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::chat::{Answer, Choice};
use super::cursor::Cursor;
use super::error::Error;
use super::openai::sse::Events;
use super::outlet::{Closed, Outlet};
use super::turn::Shown;

/// How long a streamed answer may wait for its first text before its head leaves without it. Most failures show
/// within this, and no client takes it for a dead server.
const HEAD_AFTER: Duration = Duration::from_secs(3);
/// Longest silence on a streamed answer; proxies cut connections after 30 to 60 seconds of it.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Where an answer goes.
pub enum Exit {
    Whole { client: oneshot::Sender<Result<Answer, Error>>, choices: Vec<Choice> },
    Stream(Stream),
}

/// The same while the answer is being moved: the client shall see that somebody cares.
const PAUSED: Duration = Duration::from_secs(1);

/// A client that reads along.
pub struct Stream {
    /// Waits for the decision whether the answer has a head or is an error; gone once it is made.
    head: Option<oneshot::Sender<Result<(), Error>>>,
    /// The first events are written.
    begun: bool,
    outlet: Outlet,
    events: Events,
    /// Where the client is: a client who came back has some events of each choice already, and they are not said again.
    cursor: Cursor,
    /// Events of each choice so far, those that the client had among them.
    said: Vec<u32>,
    written: Instant,
    /// A choice has lost its worker, and no text has come since.
    paused: bool,
}

impl Exit {
    pub fn whole(client: oneshot::Sender<Result<Answer, Error>>, choices: u32) -> Self {
        let none = || Choice { text: String::new(), scored: Vec::new(), finish: Finish::Stop };
        Self::Whole { client, choices: (0..choices).map(|_| none()).collect() }
    }

    /// `cursor`: where the client is in the stream; what it has is not said again.
    pub fn stream(head: oneshot::Sender<Result<(), Error>>, outlet: Outlet, events: Events, cursor: Cursor) -> Self {
        Self::Stream(Stream {
            head: Some(head),
            begun: cursor.events.iter().any(|events| *events > 0),
            outlet,
            events,
            said: vec![0; cursor.events.len()],
            cursor,
            written: Instant::now(),
            paused: false,
        })
    }

    /// Resolves when the client has left. Cancellation-safe.
    pub async fn gone(&mut self) {
        match self {
            Exit::Whole { client, .. } => client.closed().await,
            Exit::Stream(stream) => drop(stream.outlet.gone().await),
        }
    }

    /// Passes text of a choice on: to a client that reads along, one event for each token.
    pub fn text(&mut self, choice: u32, shown: &Shown, now: Instant) -> Result<(), Closed> {
        match self {
            Exit::Whole { choices, .. } => {
                let choice = &mut choices[choice as usize];
                choice.text.push_str(shown.text());
                choice.scored.extend_from_slice(shown.scored());
            }
            Exit::Stream(stream) => {
                let new = stream.say(choice, shown.len());
                stream.write(new, |events, cursor, out| {
                    for piece in shown.pieces().skip(shown.len() - new) {
                        cursor.events[choice as usize] += 1;
                        cursor.write(out);
                        events.text(choice, piece, out);
                    }
                })?;
                (stream.written, stream.paused) = (now, false);
                stream.send_head();
            }
        }
        Ok(())
    }

    /// Says what computes the answer.
    pub fn computed_by(&mut self, numerics: Option<NumericsId>) {
        if let Exit::Stream(stream) = self {
            stream.cursor.numerics = numerics;
        }
    }

    /// Lets a client that reads along know that its answer pauses and will go on.
    pub fn pause(&mut self) {
        if let Exit::Stream(stream) = self {
            stream.paused = true;
        }
    }

    /// Ends a choice while others go on.
    pub fn ended(&mut self, choice: u32, finish: Finish) -> Result<(), Closed> {
        match self {
            Exit::Whole { choices, .. } => choices[choice as usize].finish = finish,
            Exit::Stream(stream) => stream.end_of(choice, finish, 0, |_, _| ())?,
        }
        Ok(())
    }

    /// Lets a client know that its answer is still coming, when that is due; returns when it is due again.
    pub fn beat(&mut self, now: Instant) -> Option<Instant> {
        let Exit::Stream(stream) = self else { return None };
        let after = match (&stream.head, stream.paused) {
            (Some(_), _) => HEAD_AFTER,
            (None, true) => PAUSED,
            (None, false) => KEEP_ALIVE,
        };
        if now < stream.written + after {
            return Some(stream.written + after);
        }
        // A client that is gone, or full, is told apart where text is passed on.
        match stream.head {
            Some(_) => drop(stream.write(0, |_, _, _| ())),
            None => stream.keep_alive(),
        }
        stream.send_head();
        stream.written = now;
        Some(now + if stream.paused { PAUSED } else { KEEP_ALIVE })
    }

    /// Ends the last choice and the answer well. Returns what may still be on its way.
    pub fn finish(mut self, choice: u32, finish: Finish, usage: Usage) -> Option<Outlet> {
        if let Exit::Whole { .. } = self {
            let _ = self.ended(choice, finish);
        }
        match self {
            Exit::Whole { client, choices } => {
                let _ = client.send(Ok(Answer { choices, usage }));
                None
            }
            Exit::Stream(mut stream) => {
                let _ = stream.end_of(choice, finish, 1, |events, out| events.finish(usage, out));
                stream.end()
            }
        }
    }

    /// Ends the answer with an error: as a status if nothing was sent, else as the last event.
    pub fn fail(self, error: Error) -> Option<Outlet> {
        match self {
            Exit::Whole { client, .. } => {
                let _ = client.send(Err(error));
                None
            }
            Exit::Stream(mut stream) => match stream.head.take() {
                Some(head) => {
                    let _ = head.send(Err(error));
                    None
                }
                None => {
                    let _ = stream.outlet.event(|out| stream.events.fail(&error, out));
                    stream.end()
                }
            },
        }
    }
}

impl Stream {
    /// Writes so many events, after the first ones of every choice where these are still missing.
    fn write(&mut self, count: usize, write: impl FnOnce(&Events, &mut Cursor, &mut BytesMut)) -> Result<(), Closed> {
        let first = if self.begun { 0 } else { self.said.len() };
        self.begun = true;
        let (events, cursor) = (&self.events, &mut self.cursor);
        self.outlet.events(count + first, |out| {
            (0..first as u32).for_each(|choice| events.begin(choice, out));
            write(events, cursor, out);
        })
    }

    /// Counts the next events of a choice; returns how many of them its client does not have.
    fn say(&mut self, choice: u32, count: usize) -> usize {
        let (said, has) = (&mut self.said[choice as usize], self.cursor.events[choice as usize]);
        *said += count as u32;
        said.saturating_sub(has) as usize
    }

    /// Writes the event that ends a choice, if it is new, and so many more after it.
    fn end_of(
        &mut self,
        choice: u32,
        finish: Finish,
        more: usize,
        rest: impl FnOnce(&Events, &mut BytesMut),
    ) -> Result<(), Closed> {
        let new = self.say(choice, 1);
        self.write(new + more, |events, cursor, out| {
            if new > 0 {
                cursor.events[choice as usize] += 1;
                cursor.write(out);
                events.end(choice, finish, out);
            }
            rest(events, out);
        })
    }

    /// Tells a client that there is nothing to tell; one who has not taken the last bytes needs no more of them.
    fn keep_alive(&mut self) {
        if self.outlet.drained() {
            let _ = self.outlet.event(|out| self.events.keep_alive(out));
        }
    }

    fn send_head(&mut self) {
        if let Some(head) = self.head.take() {
            let _ = head.send(Ok(()));
        }
    }

    /// The head leaves after the end is set, so that a short answer leaves in one piece.
    fn end(mut self) -> Option<Outlet> {
        self.outlet.end();
        self.send_head();
        Some(self.outlet)
    }
}

#[cfg(test)]
mod cuts;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::memory;
    use crate::gateway::openai::Head;
    use crate::gateway::openai::sse::Kind;
    use crate::gateway::outlet::{OutletBody, outlet};
    use http_body_util::BodyExt;
    use izar_common::id::{DeploymentId, TurnId};

    const CURSOR: &str = "00000000000000000000000000000001-0000000000000002-0000000000000003-0";
    const USAGE: Usage = Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: 1 };

    fn stream() -> (Exit, oneshot::Receiver<Result<(), Error>>, OutletBody) {
        choices(1)
    }

    fn choices(count: u32) -> (Exit, oneshot::Receiver<Result<(), Error>>, OutletBody) {
        let (tx, rx) = oneshot::channel();
        let (outlet, body) = outlet(40, memory::plenty());
        let head = Head { turn: TurnId(1), created: 1, model: DeploymentId::new("m").unwrap() };
        let cursor = Cursor { events: vec![0; count as usize], ..CURSOR.parse().unwrap() };
        (Exit::stream(tx, outlet, Events::new(Kind::Chat, &head, false), cursor), rx, body)
    }

    fn shown(text: &str) -> Shown {
        Shown::from(text.to_owned())
    }

    async fn all(body: OutletBody) -> String {
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_failure_before_the_first_text_is_a_status() {
        let (exit, mut head, _body) = stream();
        assert!(exit.fail(Error::Stopping).is_none());
        assert_eq!(head.try_recv().unwrap(), Err(Error::Stopping));
    }

    #[tokio::test]
    async fn a_failure_after_it_is_the_last_event() {
        let (mut exit, mut head, body) = stream();
        exit.text(0, &shown("hi"), Instant::now()).unwrap();
        assert_eq!(head.try_recv().unwrap(), Ok(()));
        exit.fail(Error::Stopping);
        let text = all(body).await;
        assert!(
            text.contains("hi") && text.trim_end().ends_with("}}") && text.contains("\"code\":\"stopping\""),
            "{text}"
        );
    }

    #[tokio::test]
    async fn an_empty_answer_still_has_its_role_and_its_end() {
        let (exit, _head, body) = stream();
        exit.finish(0, Finish::Stop, USAGE);
        let text = all(body).await;
        assert!(text.contains("\"role\":\"assistant\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    }

    #[tokio::test]
    async fn a_pause_sends_the_head_and_later_comments() {
        let (mut exit, mut head, mut body) = stream();
        let start = Instant::now();
        let due = exit.beat(start).unwrap();
        assert!(head.try_recv().is_err(), "too early for the head");
        let due = exit.beat(due).unwrap();
        assert_eq!(head.try_recv().unwrap(), Ok(()));
        let _ = body.frame().await;
        exit.beat(due).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), ": keep-alive\n\n");
        exit.text(0, &shown("x"), due).unwrap();
        exit.beat(due + KEEP_ALIVE).unwrap();
        let text = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(!text.ends_with(b": keep-alive\n\n"), "a client that has not read its text gets no comment");
    }

    #[tokio::test]
    async fn while_an_answer_is_moved_comments_come_every_second() {
        let (mut exit, _head, mut body) = stream();
        let start = Instant::now();
        exit.text(0, &shown("x"), start).unwrap();
        let _ = body.frame().await;
        assert_eq!(exit.beat(start), Some(start + KEEP_ALIVE));
        exit.pause();
        assert_eq!(exit.beat(start), Some(start + PAUSED));
        assert_eq!(exit.beat(start + PAUSED), Some(start + 2 * PAUSED));
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), ": keep-alive\n\n");
        exit.text(0, &shown("y"), start + PAUSED).unwrap();
        assert_eq!(exit.beat(start + PAUSED), Some(start + PAUSED + KEEP_ALIVE));
    }

    #[tokio::test]
    async fn an_id_counts_what_a_client_has_of_the_other_choices_too() {
        let (tx, _rx) = oneshot::channel();
        let (outlet, body) = outlet(40, memory::plenty());
        let head = Head { turn: TurnId(1), created: 1, model: DeploymentId::new("m").unwrap() };
        let cursor = Cursor { events: vec![5, 1], ..CURSOR.parse().unwrap() };
        let mut exit = Exit::stream(tx, outlet, Events::new(Kind::Chat, &head, false), cursor);
        // The choice of which the client has less is told first.
        exit.text(1, &shown("x"), Instant::now()).unwrap();
        exit.text(1, &shown("y"), Instant::now()).unwrap();
        exit.ended(0, Finish::Stop).unwrap();
        exit.finish(1, Finish::Stop, USAGE);
        let text = all(body).await;
        let ids: Vec<&str> = text.lines().filter(|line| line.starts_with("id: ")).collect();
        assert!(ids.len() == 2 && ids[0].ends_with("-5.2") && ids[1].ends_with("-5.3"), "{text}");
    }

    #[tokio::test]
    async fn choices_are_told_apart_each_with_its_beginning_and_its_end() {
        let (mut exit, mut head, body) = choices(2);
        exit.ended(1, Finish::Stop).unwrap();
        assert!(head.try_recv().is_err(), "nothing was said yet that could not still become a status");
        exit.text(0, &shown("x"), Instant::now()).unwrap();
        exit.finish(0, Finish::Length, USAGE);
        let text = all(body).await;
        let order = [
            r#"{"index":0,"delta":{"role""#,
            r#"{"index":1,"delta":{"role""#,
            r#"{"index":1,"delta":{},"#,
            r#"{"index":0,"delta":{"content":"x"}"#,
            r#"{"index":0,"delta":{},"#,
            "[DONE]",
        ];
        let mut rest = text.as_str();
        for part in order {
            rest = rest.split_once(part).unwrap_or_else(|| panic!("{part} is not in {rest} of {text}")).1;
        }
        let (tx, rx) = oneshot::channel();
        let mut exit = Exit::whole(tx, 2);
        exit.text(1, &shown("one"), Instant::now()).unwrap();
        exit.ended(1, Finish::Length).unwrap();
        exit.finish(0, Finish::Stop, USAGE);
        let said: Vec<_> = rx.await.unwrap().unwrap().choices.into_iter().map(|c| (c.text, c.finish)).collect();
        assert_eq!(said, [(String::new(), Finish::Stop), ("one".to_owned(), Finish::Length)]);
    }
}
