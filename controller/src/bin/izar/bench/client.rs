//! One kept connection of the load generator: sends one request after the other, and times each answer. A stream that
//! breaks off is read on at the next endpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::parser::{Parser, PromptTokens};
use crate::http::{Endpoint, Io};

/// Bytes taken from a connection at once: a TLS record.
const READ_BYTES: usize = 16 << 10;

/// Pause before an answer is read on, but the first time: an election is over within a second.
const AGAIN: Duration = Duration::from_millis(100);

/// Why there was no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    Connect,
    /// The connection ended in the middle of an answer.
    Cut,
    Malformed,
    Timeout,
}

impl Failure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Cut => "cut",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
        }
    }
}

/// What was seen of one answer. Kept and filled again, so that no memory is taken while measuring.
#[derive(Debug, Default)]
pub struct Sample {
    /// When each token came.
    pub tokens_at: Vec<Instant>,
    pub tokens: u32,
    pub prompt: PromptTokens,
    pub status: u16,
    /// As the server says it; empty if it does not.
    pub request_id: String,
    /// A stream that was not cut, without an error in it.
    pub whole: bool,
    /// Which of the requests was answered, and a fingerprint of the text if it was streamed.
    pub request: usize,
    pub digest: u64,
    /// Whenever it broke off and was read on: from there to the next token.
    pub pauses: Vec<Duration>,
    /// When it broke off, until it goes on.
    pub cut: Option<Instant>,
}

/// The bytes of requests, taken in turn by all connections to an endpoint.
pub struct Requests {
    all: Vec<Vec<u8>>,
    next: AtomicUsize,
}

impl Requests {
    /// Panics if there are none.
    pub fn new(all: Vec<Vec<u8>>) -> Self {
        assert!(!all.is_empty(), "there is something to ask");
        Self { all, next: AtomicUsize::new(0) }
    }
    fn next(&self) -> usize {
        self.next.fetch_add(1, Relaxed) % self.all.len()
    }
}

/// Everything that is asked, of whom, and what undisturbed answers were.
pub struct Targets {
    endpoints: Vec<(Endpoint, Requests)>,
    /// Of each request: the fingerprint of an answer that did not break off; 0 if there was none yet.
    heard: Vec<AtomicU64>,
}

impl Targets {
    /// The requests of all endpoints are the same but for the endpoint's name. Panics if there are none.
    pub fn new(endpoints: Vec<(Endpoint, Requests)>) -> Self {
        let count = endpoints.first().expect("there is somebody to ask").1.all.len();
        Self { endpoints, heard: (0..count).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Remembers an answer that did not break off: all answers to a request are the same, at temperature 0.
    pub fn hear(&self, sample: &Sample) {
        if self.heard[sample.request].load(Relaxed) == 0 {
            self.heard[sample.request].store(sample.digest, Relaxed);
        }
    }

    /// Whether an answer is what it is undisturbed; `None` if that is not known.
    pub fn is_exact(&self, request: usize, digest: u64) -> Option<bool> {
        let heard = self.heard[request].load(Relaxed);
        (heard != 0).then_some(heard == digest)
    }
}

pub struct Client {
    targets: Arc<Targets>,
    /// The endpoint that is asked, until it dies.
    at: usize,
    connection: Option<Box<dyn Io>>,
    parser: Parser,
    buffer: Box<[u8]>,
    /// Connections that the server closed between two requests.
    pub reconnects: u64,
}

impl Client {
    /// `at`: which endpoint is asked first.
    pub fn new(targets: Arc<Targets>, at: usize) -> Self {
        let buffer = vec![0; READ_BYTES].into_boxed_slice();
        Self { targets, at, connection: None, parser: Parser::default(), buffer, reconnects: 0 }
    }

    pub async fn connect(&mut self) -> anyhow::Result<()> {
        self.connection = Some(self.targets.endpoints[self.at].0.connect().await?);
        Ok(())
    }

    /// Sends the next request and reads its answer, from several endpoints if need be. Cancelling it drops the connection.
    pub async fn exchange(&mut self, sample: &mut Sample) -> Result<(), Failure> {
        let targets = self.targets.clone();
        let requests = &targets.endpoints[self.at].1;
        sample.request = requests.next();
        let first = self.ask(&requests.all[sample.request], sample).await;
        if !self.is_cut(first) {
            return first;
        }
        self.go_on(&targets, first, sample).await
    }

    /// Sends a request and reads its answer from one endpoint.
    pub async fn ask(&mut self, request: &[u8], sample: &mut Sample) -> Result<(), Failure> {
        // A kept connection may have been closed since; then a new one gets the request, once.
        let kept = self.connection.is_some();
        self.begin(sample);
        match self.attempt(request, sample).await {
            Err(Failure::Cut) if kept && self.parser.is_fresh() => {
                self.reconnects += 1;
                self.attempt(request, sample).await
            }
            other => other,
        }
    }

    fn begin(&mut self, sample: &mut Sample) {
        self.parser.reset();
        sample.tokens_at.clear();
        sample.pauses.clear();
        sample.cut = None;
    }

    /// Whether an answer broke off and can be had elsewhere: read on, or asked again if nothing of it has come.
    fn is_cut(&self, result: Result<(), Failure>) -> bool {
        let can = self.parser.last_id().is_some() || (self.targets.endpoints.len() > 1 && self.parser.tokens == 0);
        let lost = match result {
            Ok(()) => self.parser.stopping,
            Err(failure) => matches!(failure, Failure::Cut | Failure::Connect),
        };
        lost && can
    }

    /// Asks one endpoint after the other for the rest; the caller limits the time.
    async fn go_on(
        &mut self,
        targets: &Targets,
        mut result: Result<(), Failure>,
        sample: &mut Sample,
    ) -> Result<(), Failure> {
        let mut pause = Duration::ZERO;
        // Whoever takes over may need a moment to know the others.
        while self.is_cut(result) || result.is_ok() && self.parser.status == 503 {
            self.at = (self.at + 1) % targets.endpoints.len();
            self.connection = None;
            tokio::time::sleep(std::mem::replace(&mut pause, AGAIN)).await;
            let plain = &targets.endpoints[self.at].1.all[sample.request];
            result = match self.parser.last_id().map(|id| after(plain, id)) {
                Some(request) => {
                    sample.cut.get_or_insert_with(Instant::now);
                    self.parser.go_on();
                    self.attempt(&request, sample).await
                }
                None => {
                    self.begin(sample);
                    self.reconnects += 1;
                    self.attempt(plain, sample).await
                }
            };
        }
        result
    }

    async fn attempt(&mut self, request: &[u8], sample: &mut Sample) -> Result<(), Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.targets.endpoints[self.at].0.connect().await.map_err(|_| Failure::Connect)?,
        };
        connection.write_all(request).await.map_err(|_| Failure::Cut)?;
        connection.flush().await.map_err(|_| Failure::Cut)?;
        loop {
            let length = connection.read(&mut self.buffer).await.map_err(|_| Failure::Cut)?;
            if length == 0 {
                return Err(Failure::Cut);
            }
            let before = self.parser.tokens;
            let done = self.parser.push(&self.buffer[..length]).map_err(|_| Failure::Malformed)?;
            let now = Instant::now();
            sample.tokens_at.extend((before..self.parser.tokens).map(|_| now));
            if sample.cut.is_some() && (self.parser.ended || self.parser.tokens > before) {
                sample.pauses.extend(sample.cut.take().map(|cut| now - cut));
            }
            if done {
                break;
            }
        }
        (sample.tokens, sample.status, sample.whole) = (self.parser.tokens, self.parser.status, self.parser.is_whole());
        sample.prompt = self.parser.prompt;
        sample.digest = self.parser.digest;
        sample.request_id.clone_from(&self.parser.request_id);
        if !self.parser.closes {
            self.connection = Some(connection);
        }
        Ok(())
    }
}

/// The same request, to go on after an event.
fn after(request: &[u8], id: &str) -> Vec<u8> {
    let line = request.windows(2).position(|end| end == b"\r\n").map_or(request.len(), |at| at + 2);
    let header = format!("last-event-id: {id}\r\n");
    [&request[..line], header.as_bytes(), &request[line..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n";
    const FIRST: &str = "x-request-id: first\r\n";

    fn events(places: std::ops::Range<usize>) -> String {
        let event = |i| format!("id: s-{i}\ndata: {{\"choices\":[{{\"delta\":{{\"content\":\" word{i}\"}}}}]}}\n\n");
        places.map(event).collect()
    }

    /// Answers one connection after the other with these bytes, and tells what it was asked.
    async fn server(answers: Vec<String>) -> (Endpoint, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap();
        let serving = tokio::spawn(async move {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut stream, mut buffer) = (listener.accept().await.unwrap().0, vec![0; 4096]);
                let length = stream.read(&mut buffer).await.unwrap();
                asked.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        });
        (endpoint, serving)
    }

    fn whole(body: &str) -> String {
        format!("{HEAD}content-length: {}\r\n\r\n{body}data: [DONE]\n\n", body.len() + 14)
    }

    fn request() -> Requests {
        Requests::new(vec![b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n".to_vec()])
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_read_on_at_the_next_endpoint() {
        let broken = format!("{HEAD}{FIRST}content-length: 9999\r\n\r\n{}id: s-4\nda", events(0..4));
        let (dying, asked_first) = server(vec![broken]).await;
        let (busy, asked_then) =
            server(vec!["HTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".into()]).await;
        let (other, asked_last) = server(vec![whole(&events(4..6)), whole(&events(0..6)), whole(&events(0..7))]).await;
        let targets = Arc::new(Targets::new(vec![(dying, request()), (busy, request()), (other, request())]));
        let (mut client, mut sample) = (Client::new(targets.clone(), 0), Sample::default());
        client.exchange(&mut sample).await.unwrap();
        assert_eq!((sample.status, sample.whole, sample.tokens, sample.tokens_at.len()), (200, true, 6, 6));
        assert_eq!((sample.pauses.len(), targets.is_exact(0, sample.digest)), (1, None));
        assert_eq!(sample.request_id, "first", "it is one request, wherever it is read on");
        let resumed = sample.digest;
        client.exchange(&mut sample).await.unwrap();
        assert!(sample.pauses.is_empty() && sample.request_id.is_empty(), "this one came in one go, without an id");
        targets.hear(&sample);
        assert_eq!(targets.is_exact(0, resumed), Some(true));
        client.exchange(&mut sample).await.unwrap();
        assert_eq!(targets.is_exact(0, sample.digest), Some(false));
        assert!(!asked_first.await.unwrap()[0].contains("last-event-id"));
        let line = "POST / HTTP/1.1\r\nlast-event-id: s-3\r\nhost: h\r\n";
        assert!(asked_then.await.unwrap()[0].starts_with(line), "half an event is none");
        let asked = asked_last.await.unwrap();
        assert!(asked[0].starts_with(line) && !asked[1].contains("last-event-id"));
    }

    #[tokio::test]
    async fn what_has_not_begun_is_asked_again_if_there_is_another_endpoint() {
        let gone = Endpoint::new("http://127.0.0.1:1", None).unwrap();
        let (other, _) = server(vec![whole(&events(0..2))]).await;
        let targets = Arc::new(Targets::new(vec![(gone.clone(), request()), (other, request())]));
        let (mut client, mut sample) = (Client::new(targets, 0), Sample::default());
        client.exchange(&mut sample).await.unwrap();
        assert_eq!((sample.tokens, client.reconnects, sample.pauses.len()), (2, 1, 0));
        let mut alone = Client::new(Arc::new(Targets::new(vec![(gone, request())])), 0);
        assert_eq!(alone.exchange(&mut sample).await, Err(Failure::Connect));
    }
}
