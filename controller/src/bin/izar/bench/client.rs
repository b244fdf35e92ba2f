//! One kept connection of the load generator: sends one request after the other, and times each answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::parser::{Parser, PromptTokens};
use crate::http::{Endpoint, Io};

/// Bytes taken from a connection at once: a TLS record.
const READ_BYTES: usize = 16 << 10;

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
    /// A stream that was not cut, without an error in it.
    pub whole: bool,
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
    fn next(&self) -> &[u8] {
        &self.all[self.next.fetch_add(1, Relaxed) % self.all.len()]
    }
}

pub struct Client {
    endpoint: Endpoint,
    requests: Arc<Requests>,
    connection: Option<Box<dyn Io>>,
    parser: Parser,
    buffer: Box<[u8]>,
    /// Connections that the server closed between two requests.
    pub reconnects: u64,
}

impl Client {
    pub fn new(endpoint: Endpoint, requests: Arc<Requests>) -> Self {
        let buffer = vec![0; READ_BYTES].into_boxed_slice();
        Self { endpoint, requests, connection: None, parser: Parser::default(), buffer, reconnects: 0 }
    }

    pub async fn connect(&mut self) -> anyhow::Result<()> {
        self.connection = Some(self.endpoint.connect().await?);
        Ok(())
    }

    /// Sends the next request and reads its answer. Cancelling it drops the connection.
    pub async fn exchange(&mut self, sample: &mut Sample) -> Result<(), Failure> {
        let requests = self.requests.clone();
        self.ask(requests.next(), sample).await
    }

    /// The same with a request of the caller's.
    pub async fn ask(&mut self, request: &[u8], sample: &mut Sample) -> Result<(), Failure> {
        // A kept connection may have been closed since; then a new one gets the request, once.
        let kept = self.connection.is_some();
        match self.attempt(request, sample).await {
            Err(Failure::Cut) if kept && self.parser.is_fresh() => {
                self.reconnects += 1;
                self.attempt(request, sample).await
            }
            other => other,
        }
    }

    async fn attempt(&mut self, request: &[u8], sample: &mut Sample) -> Result<(), Failure> {
        self.parser.reset();
        sample.tokens_at.clear();
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.endpoint.connect().await.map_err(|_| Failure::Connect)?,
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
            if done {
                break;
            }
        }
        (sample.tokens, sample.status, sample.whole) = (self.parser.tokens, self.parser.status, self.parser.is_whole());
        sample.prompt = self.parser.prompt;
        if !self.parser.closes {
            self.connection = Some(connection);
        }
        Ok(())
    }
}
