//! The way out of a running turn: to a client that waits for the whole answer, or to one that reads along.
//!
//! Nothing leaves before the turn says so; the head of a streamed answer goes out with its first text, so that a
//! failure before it still has a status of its own.

use std::time::Duration;

use izar_common::chat::{Finish, Usage};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::chat::Answer;
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
    Whole { client: oneshot::Sender<Result<Answer, Error>>, text: String },
    Stream(Stream),
}

/// A client that reads along.
pub struct Stream {
    /// Waits for the decision whether the answer has a head or is an error; gone once it is made.
    head: Option<oneshot::Sender<Result<(), Error>>>,
    outlet: Outlet,
    events: Events,
    written: Instant,
}

impl Exit {
    pub fn whole(client: oneshot::Sender<Result<Answer, Error>>) -> Self {
        Self::Whole { client, text: String::new() }
    }

    pub fn stream(head: oneshot::Sender<Result<(), Error>>, outlet: Outlet, events: Events) -> Self {
        Self::Stream(Stream { head: Some(head), outlet, events, written: Instant::now() })
    }

    /// Resolves when the client has left. Cancellation-safe.
    pub async fn gone(&mut self) {
        match self {
            Exit::Whole { client, .. } => client.closed().await,
            Exit::Stream(stream) => drop(stream.outlet.gone().await),
        }
    }

    /// Passes text on: to a client that reads along, one event for each token.
    pub fn text(&mut self, shown: &Shown, now: Instant) -> Result<(), Closed> {
        match self {
            Exit::Whole { text, .. } => text.push_str(shown.text()),
            Exit::Stream(stream) => {
                let first = stream.head.is_some();
                stream.outlet.events(shown.len() + usize::from(first), |out| {
                    if first {
                        stream.events.begin(out);
                    }
                    shown.pieces().for_each(|piece| stream.events.text(piece, out));
                })?;
                stream.written = now;
                stream.send_head();
            }
        }
        Ok(())
    }

    /// Forgets what was said: the turn begins again.
    pub fn again(&mut self) {
        if let Exit::Whole { text, .. } = self {
            text.clear();
        }
    }

    /// Lets a client know that its answer is still coming, when that is due; returns when it is due again.
    pub fn beat(&mut self, now: Instant) -> Option<Instant> {
        let Exit::Stream(stream) = self else { return None };
        let after = if stream.head.is_some() { HEAD_AFTER } else { KEEP_ALIVE };
        if now < stream.written + after {
            return Some(stream.written + after);
        }
        // A client that is gone, or full, is told apart where text is passed on.
        let _ = match stream.head {
            Some(_) => stream.outlet.event(|out| stream.events.begin(out)),
            // One who has not taken the last bytes needs no more of them.
            None if stream.outlet.drained() => stream.outlet.event(|out| stream.events.keep_alive(out)),
            None => Ok(()),
        };
        stream.send_head();
        stream.written = now;
        Some(now + KEEP_ALIVE)
    }

    /// Ends the answer well. Returns what may still be on its way.
    pub fn finish(self, finish: Finish, usage: Usage) -> Option<Outlet> {
        match self {
            Exit::Whole { client, text } => {
                let _ = client.send(Ok(Answer { text, finish, usage }));
                None
            }
            Exit::Stream(mut stream) => {
                if stream.head.is_some() {
                    let _ = stream.outlet.event(|out| stream.events.begin(out));
                }
                let _ = stream.outlet.event(|out| stream.events.finish(finish, usage, out));
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
mod tests {
    use super::*;
    use crate::gateway::openai::Head;
    use crate::gateway::openai::sse::Kind;
    use crate::gateway::outlet::{OutletBody, outlet};
    use http_body_util::BodyExt;
    use izar_common::id::{DeploymentId, TurnId};

    const USAGE: Usage = Usage { prompt_tokens: 1, completion_tokens: 1 };

    fn stream() -> (Exit, oneshot::Receiver<Result<(), Error>>, OutletBody) {
        let (tx, rx) = oneshot::channel();
        let (outlet, body) = outlet(20);
        let head = Head { turn: TurnId(1), created: 1, model: DeploymentId::new("m").unwrap() };
        (Exit::stream(tx, outlet, Events::new(Kind::Chat, &head, false)), rx, body)
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
        exit.text(&shown("hi"), Instant::now()).unwrap();
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
        exit.finish(Finish::Stop, USAGE);
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
        exit.text(&shown("x"), due).unwrap();
        exit.beat(due + KEEP_ALIVE).unwrap();
        let text = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(!text.ends_with(b": keep-alive\n\n"), "a client that has not read its text gets no comment");
    }

    #[tokio::test]
    async fn a_whole_answer_begins_again_without_its_first_try() {
        let (tx, rx) = oneshot::channel();
        let mut exit = Exit::whole(tx);
        exit.text(&shown("lost"), Instant::now()).unwrap();
        exit.again();
        exit.text(&shown("kept"), Instant::now()).unwrap();
        exit.finish(Finish::Length, USAGE);
        assert_eq!(rx.await.unwrap().unwrap().text, "kept");
    }
}
