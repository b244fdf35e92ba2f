//! A user's program: a small HTTP/1.1 client over TLS 1.3 that shows everything it was answered.
//!
//! It blocks, one connection a request, and never retries: a story wants to see what the first try got.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// Longest silence of a server before a story gives up; far above any time that a story provokes.
const SILENCE: Duration = Duration::from_secs(60);
/// No answer in the stories comes near it.
const BODY_LIMIT: usize = 64 << 20;

/// Where an API is and who asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    key: Option<String>,
    /// Further lines of every request's head.
    more: String,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    /// Parses the body; panics with the whole answer if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {} {}", self.status, self.text()))
    }
    /// Returns the text of an OpenAI error, `error.message`.
    pub fn error_message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("no error.message: {}", self.text())).into()
    }
    /// Returns the content of a chat answer's only choice.
    pub fn content(&self) -> String {
        let json = self.json();
        json["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content: {json}")).into()
    }
}

impl Client {
    /// `endpoint`: `https://127.0.0.1:8443` or `http://…`, a path is ignored. `ca`: what the server's certificate hangs on.
    pub fn new(endpoint: &str, ca: &Path, key: Option<&str>) -> Result<Self> {
        let (scheme, rest) = endpoint.split_once("://").with_context(|| format!("`{endpoint}` is not a URL"))?;
        let authority = rest.split('/').next().unwrap_or_default().replace("localhost", "127.0.0.1");
        let address = authority.parse().with_context(|| format!("`{authority}` is not an address"))?;
        let tls = match scheme {
            "https" => Some(tls_config(ca)?),
            "http" => None,
            other => bail!("unknown scheme `{other}`"),
        };
        Ok(Self { address, tls, key: key.map(str::to_owned), more: String::new() })
    }

    /// The same API asked by somebody else.
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Self { key: key.map(str::to_owned), ..self.clone() }
    }

    /// The same API asked with one more header.
    pub fn with_header(&self, name: &str, value: &str) -> Self {
        Self { more: format!("{}{name}: {value}\r\n", self.more), ..self.clone() }
    }

    /// The same API asked through another address, for example a relay's.
    pub fn through(&self, address: SocketAddr) -> Self {
        Self { address, ..self.clone() }
    }

    /// The bearer key that requests carry.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn get(&self, path: &str) -> Result<Response> {
        self.begin("GET", path, b"")?.finish()
    }
    pub fn post(&self, path: &str, body: &Value) -> Result<Response> {
        self.post_bytes(path, body.to_string().as_bytes())
    }
    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Result<Response> {
        self.begin("POST", path, body)?.finish()
    }
    /// Asks for server-sent events.
    pub fn stream(&self, path: &str, body: &Value) -> Result<Answer> {
        self.begin("POST", path, body.to_string().as_bytes())
    }
    /// Repeats a request whose stream broke off after an event.
    pub fn stream_after(&self, id: &str, path: &str, body: &Value) -> Result<Answer> {
        self.with_header("last-event-id", id).stream(path, body)
    }
    /// Reads a stream that broke off after an event on, by the event's id alone.
    pub fn read_on(&self, id: &str) -> Result<Answer> {
        self.begin("GET", &format!("/v1/streams/{id}"), b"")
    }

    /// Sends a request and reads the answer's head.
    fn begin(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let authorization = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\n{authorization}{}content-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            self.address,
            self.more,
            body.len()
        );
        let mut connection = self.connect()?;
        connection.write_all(head.as_bytes())?;
        // A server that refuses early may close while the body is on its way: its answer is still there to be read.
        let sent = connection.write_all(body).and_then(|()| connection.flush());
        Answer::read_head(connection).map_err(|error| match sent {
            Ok(()) => error,
            Err(write) => error.context(format!("after the request broke off: {write}")),
        })
    }

    /// Opens a connection on which a story writes bytes of its own.
    pub fn connect(&self) -> Result<Connection> {
        let tcp = TcpStream::connect_timeout(&self.address, Duration::from_secs(10))
            .with_context(|| format!("connect to {}", self.address))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(SILENCE))?;
        tcp.set_write_timeout(Some(SILENCE))?;
        let Some(config) = &self.tls else { return Ok(Connection::Plain(tcp)) };
        let session = ClientConnection::new(config.clone(), ServerName::IpAddress(self.address.ip().into()))?;
        Ok(Connection::Tls(Box::new(StreamOwned::new(session, tcp))))
    }
}

impl Client {
    /// The certificate that the server shows to a client it has never seen, as DER.
    pub fn server_certificate(&self) -> Result<Vec<u8>> {
        let Connection::Tls(mut stream) = self.connect()? else { bail!("{} speaks no TLS", self.address) };
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        let shown = stream.conn.peer_certificates().and_then(|chain| chain.first());
        Ok(shown.context("the server shows no certificate")?.to_vec())
    }
}

/// TLS 1.3 with exactly one authority.
fn tls_config(ca: &Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let read = || format!("read {}", ca.display());
    for certificate in CertificateDer::pem_file_iter(ca).with_context(read)? {
        roots.add(certificate.with_context(read)?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A connection to the API.
pub enum Connection {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}
impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// How a body ends.
enum Framing {
    Length(usize),
    Chunked,
    /// The connection's end is the body's.
    Close,
}

/// An answer whose head was read and whose body comes.
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    reader: BufReader<Connection>,
    framing: Framing,
    /// Body bytes that no event has taken yet.
    pending: Vec<u8>,
    /// The id of the last event that has one.
    pub last_id: Option<String>,
}

impl Answer {
    /// Reads an answer's head off a connection.
    pub fn read_head(connection: Connection) -> Result<Self> {
        let mut reader = BufReader::new(connection);
        let first = read_line(&mut reader)?;
        let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("`{first}` is not a status line"))?;
        let mut headers = BTreeMap::new();
        loop {
            let line = read_line(&mut reader)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').with_context(|| format!("`{line}` is not a header"))?;
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let framing = if headers.get("transfer-encoding").is_some_and(|v| v == "chunked") {
            Framing::Chunked
        } else if let Some(length) = headers.get("content-length") {
            Framing::Length(length.parse().context("content-length")?)
        } else {
            Framing::Close
        };
        Ok(Self { status, headers, reader, framing, pending: Vec::new(), last_id: None })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Reads the next piece of the body; `None` at its end. A connection that breaks inside a body is an error.
    fn piece(&mut self) -> Result<Option<Vec<u8>>> {
        let mut piece;
        match &mut self.framing {
            Framing::Length(0) => return Ok(None),
            Framing::Length(left) => {
                piece = vec![0; (*left).min(1 << 16)];
                let n = self.reader.read(&mut piece)?;
                ensure!(n > 0, "the connection ended inside a body");
                *left -= n;
                piece.truncate(n);
            }
            Framing::Chunked => {
                let line = read_line(&mut self.reader)?;
                let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16)
                    .with_context(|| format!("`{line}` is not a chunk size"))?;
                ensure!(size <= BODY_LIMIT, "a chunk of {size} bytes");
                piece = vec![0; size];
                self.reader.read_exact(&mut piece).context("the connection ended inside a chunk")?;
                ensure!(read_line(&mut self.reader)?.is_empty(), "a chunk without its end");
                if size == 0 {
                    self.framing = Framing::Length(0);
                    return Ok(None);
                }
            }
            Framing::Close => {
                piece = vec![0; 1 << 16];
                let n = self.reader.read(&mut piece)?;
                if n == 0 {
                    self.framing = Framing::Length(0);
                    return Ok(None);
                }
                piece.truncate(n);
            }
        }
        Ok(Some(piece))
    }

    /// Reads the whole body.
    pub fn finish(mut self) -> Result<Response> {
        let mut body = std::mem::take(&mut self.pending);
        while let Some(piece) = self.piece()? {
            ensure!(body.len() + piece.len() <= BODY_LIMIT, "a body of more than {BODY_LIMIT} bytes");
            body.extend_from_slice(&piece);
        }
        Ok(Response { status: self.status, headers: self.headers, body })
    }

    /// Reads the next server-sent event's data; `None` at the stream's end. Comments are skipped.
    pub fn event(&mut self) -> Result<Option<String>> {
        loop {
            while let Some(end) = find(&self.pending, b"\n\n") {
                let block: Vec<u8> = self.pending.drain(..end + 2).collect();
                let text = String::from_utf8(block).context("an event is not UTF-8")?;
                if let Some(id) = text.lines().find_map(|line| line.strip_prefix("id:")) {
                    self.last_id = Some(id.trim().to_owned());
                }
                let lines = text.lines().filter_map(|line| line.strip_prefix("data:").map(str::trim_start));
                let data: Vec<&str> = lines.collect();
                if !data.is_empty() {
                    return Ok(Some(data.join("\n")));
                }
            }
            match self.piece()? {
                Some(piece) => self.pending.extend_from_slice(&piece),
                None => {
                    ensure!(self.pending.is_empty(), "the stream ended inside an event");
                    return Ok(None);
                }
            }
        }
    }

    /// Reads a whole chat or completion stream.
    pub fn transcript(mut self) -> Result<Transcript> {
        if self.status != 200 {
            let response = self.finish()?;
            bail!("status {}: {}", response.status, response.text());
        }
        let request_id = self.header("x-request-id").unwrap_or_default().to_owned();
        let mut out = Transcript { request_id, ..Transcript::default() };
        loop {
            let Some(data) = self.event()? else { return Ok(out) };
            ensure!(!out.done, "an event after [DONE]: {data}");
            if data == "[DONE]" {
                out.done = true;
                continue;
            }
            let event: Value = serde_json::from_str(&data).with_context(|| format!("event {data}"))?;
            out.take(&event);
            out.events.push(event);
        }
    }
}

/// What a stream said, taken together.
#[derive(Debug, Clone, Default)]
pub struct Transcript {
    pub request_id: String,
    pub text: String,
    pub finish: Option<String>,
    pub usage: Option<Value>,
    /// The `error` object of an event, if one came.
    pub error: Option<Value>,
    /// `[DONE]` came.
    pub done: bool,
    pub events: Vec<Value>,
}

impl Transcript {
    fn take(&mut self, event: &Value) {
        let choice = &event["choices"][0];
        // Chat events carry `delta.content`, completion events `text`.
        if let Some(text) = choice["delta"]["content"].as_str().or(choice["text"].as_str()) {
            self.text += text;
        }
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
        if event["usage"].is_object() {
            self.usage = Some(event["usage"].clone());
        }
        if event["error"].is_object() {
            self.error = Some(event["error"].clone());
        }
    }
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

fn read_line(reader: &mut BufReader<Connection>) -> Result<String> {
    const LINE_LIMIT: u64 = 64 << 10;
    let mut line = Vec::new();
    reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line)?;
    ensure!(line.ends_with(b"\n"), "the connection ended inside an answer's head");
    let text = String::from_utf8(line).context("a header is not text")?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}
