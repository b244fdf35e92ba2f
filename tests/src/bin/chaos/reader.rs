//! A client that reads a stream to its end, and on elsewhere when its controller dies; what it saw and when.
//!
//! It forgives what the documentation tells clients to try again: a connection that is lost, a 503, a server that says
//! that it is stopping. Anything else is an error of ours.

use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use izar_tests::client::{Answer, Client};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// How long a client tries to go on, and its pause between two tries.
const PATIENCE: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Everything of an event but what names the request and what a cache held, as its bytes were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Whose it is; events of the whole answer have none.
    pub choice: Option<u64>,
    pub said: String,
}

/// A stream that came to its end.
#[derive(Default)]
pub struct Told {
    pub turn: String,
    pub events: Vec<Event>,
    pub at: Vec<Instant>,
    /// For each time that it was read on: from the first retry to the next event.
    pub resumed: Vec<Duration>,
    /// Times that it broke off before it had begun, and was simply asked again.
    pub anew: u64,
}

/// Why a stream broke off.
enum Cut {
    /// A client tries again.
    Lost(Error),
    Wrong(Error),
}

impl From<Error> for Cut {
    fn from(error: Error) -> Self {
        Self::Lost(error)
    }
}

/// Asks the first of the controllers and listens to the end; goes on with the others when it dies.
pub fn listen(clients: &[&Client], body: &Value) -> Result<Told> {
    let mut reader = Reader { told: Told::default(), last_id: None, sure: 0, retried: None };
    let (mut broken, mut tries) = (None, 0);
    loop {
        let error = match reader.read(clients[tries % clients.len()], body) {
            Ok(()) => return Ok(reader.told),
            Err(Cut::Wrong(error)) => return Err(error),
            Err(Cut::Lost(error)) => error,
        };
        tries += 1;
        let since = *broken.get_or_insert_with(Instant::now);
        if clients.len() == 1 || since.elapsed() > PATIENCE {
            return Err(error);
        }
        std::thread::sleep(ASK_AGAIN);
        reader.retry();
    }
}

struct Reader {
    told: Told,
    last_id: Option<String>,
    /// Events up to the one with that id; the server tells those after it again.
    sure: usize,
    /// When it was first tried to read on, until an event comes.
    retried: Option<Instant>,
}

impl Reader {
    fn retry(&mut self) {
        if self.last_id.is_some() {
            self.retried.get_or_insert_with(Instant::now);
        } else {
            // A request of which nothing with an id has come is simply asked again.
            self.told.anew += 1;
        }
        self.told.events.truncate(self.sure);
        self.told.at.truncate(self.sure);
    }

    /// Reads as far as it comes.
    fn read(&mut self, client: &Client, body: &Value) -> Result<(), Cut> {
        let mut answer = match &self.last_id {
            None => client.stream(CHAT, body)?,
            Some(id) => client.stream_after(id, CHAT, body)?,
        };
        if answer.status != 200 {
            return Err(refused(answer)?);
        }
        self.told.turn = answer.header("x-request-id").unwrap_or_default().to_owned();
        while let Some(data) = answer.event()? {
            if data == "[DONE]" {
                return Ok(());
            }
            let event: Value =
                serde_json::from_str(&data).with_context(|| format!("event {data}")).map_err(Cut::Wrong)?;
            match event["error"]["code"].as_str() {
                Some("stopping") => return Err(Cut::Lost(anyhow!("the server is stopping"))),
                Some(_) => return Err(Cut::Wrong(anyhow!("the stream broke: {event}"))),
                None => {}
            }
            self.take(&event, answer.last_id.clone());
        }
        Err(Cut::Lost(anyhow!("the stream ended without [DONE]")))
    }

    fn take(&mut self, event: &Value, last_id: Option<String>) {
        let now = Instant::now();
        if let Some(retried) = self.retried.take() {
            self.told.resumed.push(now - retried);
        }
        let said = json!({ "choices": event["choices"], "usage": usage(event) }).to_string();
        self.told.events.push(Event { choice: event["choices"][0]["index"].as_u64(), said });
        self.told.at.push(now);
        // An answer that is read on begins without an id; where the client was stays true.
        if last_id.is_some() && last_id != self.last_id {
            (self.last_id, self.sure) = (last_id, self.told.events.len());
        }
    }
}

/// An event's usage without how much of the prompt a cache held: that depends on who computed, and when.
fn usage(event: &Value) -> Value {
    let mut usage = event["usage"].clone();
    if let Some(usage) = usage.as_object_mut() {
        usage.remove("prompt_tokens_details");
    }
    usage
}

/// What a refusal means for a client.
fn refused(answer: Answer) -> Result<Cut> {
    let status = answer.status;
    let error = anyhow!("status {status}: {}", answer.finish()?.text());
    Ok(if status == 503 { Cut::Lost(error) } else { Cut::Wrong(error) })
}
