//! Reads an HTTP/1.1 response as it comes, as cheaply as a load generator must, and counts the tokens in it. Pure.

use crate::sse::{Scanner, after_key};

/// The longest head taken.
const HEAD_LIMIT: usize = 16 << 10;

/// The longest body kept for counting; the rest of a longer one is read and dropped.
const BODY_LIMIT: usize = 1 << 20;

/// The most digits of a chunk's length: 64 bits.
const CHUNK_DIGITS: usize = 16;

/// Why the bytes are no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed response")]
pub struct Malformed;

/// Where in a response the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Head,
    /// In a body of known length, this many bytes before its end.
    Length(u64),
    /// In the line that gives a chunk's length.
    ChunkSize {
        digits: usize,
        size: u64,
        extension: bool,
    },
    /// In a chunk, this many bytes before its end.
    Chunk(u64),
    /// In the line end after a chunk.
    ChunkEnd,
    /// In the lines after the last chunk; `blank` while the line has no byte yet.
    Trailer {
        blank: bool,
    },
    Done,
}

/// Tokens of a prompt, and those of them that came from a cache; 0 where an answer does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PromptTokens {
    pub all: u32,
    pub cached: u32,
}

/// One response. `reset` makes it ready for the next, without giving memory back, and `go_on` for the rest of an answer
/// that broke off.
#[derive(Debug)]
pub struct Parser {
    at: At,
    head: Vec<u8>,
    body: Vec<u8>,
    scanner: Scanner,
    pub status: u16,
    /// The request's id, as the answer's first head says it (`x-request-id`); empty if it does not.
    pub request_id: String,
    stream: bool,
    /// The server will close the connection.
    pub closes: bool,
    /// Of the whole answer.
    pub tokens: u32,
    /// What the answer says of its prompt.
    pub prompt: PromptTokens,
    /// A fingerprint of the whole answer's text.
    pub digest: u64,
    /// The server stops, and another one goes on.
    pub stopping: bool,
    /// The stream carried an error instead of an answer.
    pub failed: bool,
    /// The stream ended as it should.
    pub ended: bool,
}

impl Default for Parser {
    fn default() -> Self {
        Self {
            at: At::Head,
            head: Vec::new(),
            body: Vec::new(),
            scanner: Scanner::with_ids(),
            status: 0,
            request_id: String::new(),
            stream: false,
            closes: false,
            tokens: 0,
            prompt: PromptTokens::default(),
            digest: 0,
            stopping: false,
            failed: false,
            ended: false,
        }
    }
}

impl Parser {
    pub fn reset(&mut self) {
        self.go_on();
        self.scanner.reset();
        self.request_id.clear();
        (self.tokens, self.digest) = (0, 0);
    }

    /// What comes next is the rest of the same answer.
    pub fn go_on(&mut self) {
        self.at = At::Head;
        self.head.clear();
        self.body.clear();
        self.scanner.clear();
        (self.status, self.prompt) = (0, PromptTokens::default());
        (self.stream, self.closes, self.stopping, self.failed, self.ended) = (false, false, false, false, false);
    }

    /// Where in its stream the answer is, if it can be read on from there.
    pub fn last_id(&self) -> Option<&str> {
        self.scanner.last_id()
    }

    /// Whether no byte of the response has come.
    pub fn is_fresh(&self) -> bool {
        self.at == At::Head && self.head.is_empty()
    }

    /// Whether the answer is a whole one: a stream that was not cut, without an error in it.
    pub fn is_whole(&self) -> bool {
        !self.failed && (!self.stream || self.ended)
    }

    /// Takes the next bytes; returns true when the response is complete. Bytes after it are an error, for one request
    /// is answered at a time.
    pub fn push(&mut self, bytes: &[u8]) -> Result<bool, Malformed> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = match self.at {
                At::Head => self.head(rest)?,
                At::Length(left) => {
                    let (data, after) = split(rest, left);
                    self.data(data)?;
                    let left = left - data.len() as u64;
                    self.at = if left == 0 { self.complete() } else { At::Length(left) };
                    after
                }
                At::Chunk(left) => {
                    let (data, after) = split(rest, left);
                    self.data(data)?;
                    let left = left - data.len() as u64;
                    self.at = if left == 0 { At::ChunkEnd } else { At::Chunk(left) };
                    after
                }
                At::ChunkSize { digits, size, extension } => {
                    self.at = chunk_size(rest[0], digits, size, extension)?;
                    &rest[1..]
                }
                At::ChunkEnd => {
                    match rest[0] {
                        b'\r' => {}
                        b'\n' => self.at = At::ChunkSize { digits: 0, size: 0, extension: false },
                        _ => return Err(Malformed),
                    }
                    &rest[1..]
                }
                At::Trailer { blank } => {
                    self.at = match rest[0] {
                        b'\r' => At::Trailer { blank },
                        b'\n' if blank => self.complete(),
                        b'\n' => At::Trailer { blank: true },
                        _ => At::Trailer { blank: false },
                    };
                    &rest[1..]
                }
                At::Done => return Err(Malformed),
            };
        }
        Ok(self.at == At::Done)
    }

    /// Gathers the head; returns what follows it.
    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Malformed> {
        let before = self.head.len();
        self.head.extend_from_slice(&bytes[..bytes.len().min(HEAD_LIMIT + 1 - before.min(HEAD_LIMIT))]);
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = response.parse(&self.head).map_err(|_| Malformed)? else {
            return if self.head.len() > HEAD_LIMIT { Err(Malformed) } else { Ok(&[]) };
        };
        self.status = response.code.ok_or(Malformed)?;
        let mut body_length = None;
        let mut chunked = false;
        for header in response.headers.iter() {
            if header.name.eq_ignore_ascii_case("content-length") {
                let text = std::str::from_utf8(header.value).map_err(|_| Malformed)?;
                body_length = Some(text.trim().parse::<u64>().map_err(|_| Malformed)?);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                chunked = header.value.eq_ignore_ascii_case(b"chunked");
            } else if header.name.eq_ignore_ascii_case("content-type") {
                self.stream = header.value.starts_with(b"text/event-stream");
            } else if header.name.eq_ignore_ascii_case("connection") {
                self.closes = header.value.eq_ignore_ascii_case(b"close");
            } else if self.request_id.is_empty() && header.name.eq_ignore_ascii_case("x-request-id") {
                self.request_id.push_str(std::str::from_utf8(header.value).map_err(|_| Malformed)?);
            }
        }
        self.at = match (chunked, body_length) {
            (true, _) => At::ChunkSize { digits: 0, size: 0, extension: false },
            (false, Some(0)) => self.complete(),
            (false, Some(length)) => At::Length(length),
            // A body that ends with the connection: no server that keeps connections sends one.
            (false, None) => return Err(Malformed),
        };
        Ok(&bytes[length - before..])
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        if !self.stream {
            let room = BODY_LIMIT.saturating_sub(self.body.len());
            self.body.extend_from_slice(&bytes[..bytes.len().min(room)]);
            return Ok(());
        }
        let Self { scanner, tokens, prompt, digest, stopping, failed, ended, .. } = self;
        let scanned = scanner.push(bytes, |event| {
            if event == b"[DONE]" {
                *ended = true;
            } else if let Some(text) = text(event) {
                *tokens += 1;
                *digest = mix(*digest, text);
            } else if event.starts_with(b"{\"error\"") {
                *failed = true;
                *stopping = after_key(event, b"\"code\":").is_some_and(|code| code.starts_with(b"\"stopping\""));
            } else if let Some(usage) = after_key(event, b"\"usage\":").filter(|usage| usage.starts_with(b"{")) {
                *prompt = PromptTokens::read(usage);
            }
        });
        scanned.map_err(|_| Malformed)
    }

    fn complete(&mut self) -> At {
        // A refusal is no part of an answer that is to be read on.
        if !self.stream && self.status == 200 {
            self.tokens = number(&self.body, b"\"completion_tokens\":");
            self.prompt = PromptTokens::read(&self.body);
        }
        At::Done
    }
}

fn split(bytes: &[u8], left: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len())))
}

fn chunk_size(byte: u8, digits: usize, size: u64, extension: bool) -> Result<At, Malformed> {
    Ok(match byte {
        b'\n' if digits == 0 => return Err(Malformed),
        b'\n' if size == 0 => At::Trailer { blank: true },
        b'\n' => At::Chunk(size),
        b'\r' | b' ' | b'\t' => At::ChunkSize { digits, size, extension },
        b';' => At::ChunkSize { digits, size, extension: true },
        _ if extension => At::ChunkSize { digits, size, extension },
        _ => {
            let digit = char::from(byte).to_digit(16).ok_or(Malformed)?;
            if digits == CHUNK_DIGITS {
                return Err(Malformed);
            }
            At::ChunkSize { digits: digits + 1, size: size << 4 | u64::from(digit), extension }
        }
    })
}

/// The piece of the answer that an event carries, and what stands after it.
fn text(event: &[u8]) -> Option<&[u8]> {
    let value = after_key(event, b"\"content\":").or_else(|| after_key(event, b"\"text\":"))?;
    (value.first() == Some(&b'"') && value.get(1) != Some(&b'"')).then_some(value)
}

/// Adds a piece to a fingerprint: cheap, and good enough to find what was lost, doubled or changed.
fn mix(digest: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(digest, |digest, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (digest ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}

impl PromptTokens {
    /// Reads OpenAI's `usage`.
    fn read(usage: &[u8]) -> Self {
        Self { all: number(usage, b"\"prompt_tokens\":"), cached: number(usage, b"\"cached_tokens\":") }
    }
}

/// The number after a key; 0 if there is none.
fn number(json: &[u8], quoted_key_and_colon: &[u8]) -> u32 {
    let digits = after_key(json, quoted_key_and_colon).unwrap_or_default();
    digits
        .iter()
        .take_while(|b| b.is_ascii_digit())
        .fold(0, |n: u32, b| n.saturating_mul(10).saturating_add(u32::from(b - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 35\r\n\r\n{\"usage\":{\"completion_tokens\": 16}}";

    fn streamed() -> String {
        let mut text =
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
        for event in [
            r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"data: {"choices":[{"delta":{"content":" one"}}]}"#,
            r#"data: {"choices":[{"delta":{"content": " two"}}]}"#,
            r#"data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            "data: [DONE]",
        ] {
            text += &format!("{:x};ext=1\r\n{event}\n\n\r\n", event.len() + 2);
        }
        text + "0\r\ntrailer: x\r\n\r\n"
    }

    /// Reads a response cut at every place, byte by byte and whole.
    fn check(response: &str, expected: (u16, u32, bool)) {
        let bytes = response.as_bytes();
        let mut parser = Parser::default();
        let mut cuts: Vec<Vec<&[u8]>> = (0..bytes.len()).map(|i| vec![&bytes[..i], &bytes[i..]]).collect();
        cuts.push(bytes.chunks(1).collect());
        for cut in cuts {
            parser.reset();
            let mut done = false;
            for piece in cut.into_iter().filter(|p| !p.is_empty()) {
                assert!(!done);
                done = parser.push(piece).unwrap();
            }
            assert!(done);
            assert_eq!((parser.status, parser.tokens, parser.is_whole()), expected);
        }
    }

    #[test]
    fn responses_are_read_wherever_they_are_cut() {
        check(PLAIN, (200, 16, true));
        check(&streamed(), (200, 2, true));
        check("HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", (429, 0, true));
    }

    #[test]
    fn what_an_answer_says_of_its_prompt_is_read() {
        let usage =
            r#""usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":32},"completion_tokens":2}"#;
        let whole = format!("{{\"choices\":[],{usage}}}");
        let whole = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{whole}", whole.len());
        let (last, with_usage) = ("\"finish_reason\":\"stop\"}]}", format!("data: {{\"choices\":[],{usage}}}\n\n"));
        let end = format!("\n\n\r\n{:x}\r\n{with_usage}\r\n", with_usage.len());
        let streamed = streamed().replacen(&format!("{last}\n\n\r\n"), &format!("{last}{end}"), 1);
        for response in [whole, streamed] {
            let mut parser = Parser::default();
            assert!(parser.push(response.as_bytes()).unwrap());
            assert_eq!((parser.tokens, parser.prompt), (2, PromptTokens { all: 40, cached: 32 }), "{response}");
        }
    }

    #[test]
    fn a_stream_that_was_cut_or_failed_is_not_whole() {
        check(&streamed().replace("[DONE]", "[DROP]"), (200, 2, false));
        let failed = streamed().replace(
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            &format!("{:<49}", r#"{"error":{"message":"no"}}"#),
        );
        check(&failed, (200, 2, false));
    }

    #[test]
    fn an_answer_in_two_streams_is_one_answer() {
        let whole = streamed().replace(
            "data: {\"choices\":[{\"delta\":{\"content\": \" two\"",
            "id: x-2\ndata: {\"choices\":[{\"delta\":{\"content\": \" two\"",
        );
        let whole = whole.replace(";ext=1", "");
        let unchunked = |text: &str| {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: ";
            format!("{head}{}\r\n\r\n{text}", text.len())
        };
        let events: Vec<String> = whole
            .lines()
            .filter(|line| line.starts_with("data") || line.starts_with("id"))
            .map(|line| if line.starts_with("id") { format!("{line}\n") } else { format!("{line}\n\n") })
            .collect();
        let read =
            |parser: &mut Parser, events: &[String]| parser.push(unchunked(&events.concat()).as_bytes()).unwrap();
        let mut parser = Parser::default();
        assert!(read(&mut parser, &events));
        let expected = (parser.tokens, parser.digest);
        assert!(expected.0 == 2 && expected.1 != 0 && parser.is_whole());
        parser.reset();
        assert_eq!(parser.last_id(), None);
        read(&mut parser, &events[..4]);
        assert_eq!((parser.last_id(), parser.is_whole()), (Some("x-2"), false));
        parser.go_on();
        read(&mut parser, &events[4..]);
        assert_eq!((parser.tokens, parser.digest, parser.is_whole()), (expected.0, expected.1, true));
        for wrong in [&events[3..], &events[2..]] {
            parser.reset();
            read(&mut parser, &events[..4]);
            parser.go_on();
            read(&mut parser, wrong);
            assert_ne!(parser.digest, expected.1, "a token came twice");
        }
    }

    #[test]
    fn a_server_that_stops_says_so() {
        let stops = r#"data: {"error":{"message":"m","type":"t","code":"stopping"}}"#;
        let mut parser = Parser::default();
        let text = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n{stops}\n\n",
            stops.len() + 2
        );
        assert!(parser.push(text.as_bytes()).unwrap());
        assert!(parser.stopping && !parser.is_whole());
    }

    #[test]
    fn what_is_no_response_is_refused() {
        for bad in [
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n11111111111111111\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab",
            &format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_LIMIT)),
        ] {
            assert_eq!(Parser::default().push(bad.as_bytes()), Err(Malformed), "{bad:.60}");
        }
    }
}
