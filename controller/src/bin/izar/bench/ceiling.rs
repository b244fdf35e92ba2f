//! A server that does nothing but answer canned bytes over TLS, in this process: what the generator reaches against it
//! is the generator's own ceiling. It has a thread of its own, whose CPU time is not counted as the generator's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use izar_common::id::ClusterId;
use izar_common::tls::{self, pki};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// The name of the server's thread.
pub const THREAD: &str = "bench-server";

/// The generator's requests are far smaller.
const REQUEST_LIMIT: usize = 16 << 10;

/// A running server; it ends with the process.
pub struct Server {
    port: u16,
    ca: PathBuf,
    /// Certificates lie in it.
    _dir: tempfile::TempDir,
}

impl Server {
    pub fn start(tokens: u32, stream: bool) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("make a temporary folder")?;
        pki::init(dir.path(), &ClusterId::new("bench")?)?;
        pki::issue_server(dir.path(), "api", &["127.0.0.1".to_owned()], dir.path())?;
        let tls = tls::https_server(&dir.path().join("api.pem"), &dir.path().join("api.key"))?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
        listener.set_nonblocking(true).context("prepare the listener")?;
        let port = listener.local_addr()?.port();
        let pieces: Arc<[Vec<u8>]> = if stream { streamed(tokens) } else { plain(tokens) }.into();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        let body = move || runtime.block_on(serve(listener, TlsAcceptor::from(tls), pieces));
        std::thread::Builder::new().name(THREAD.to_owned()).spawn(body).context("start a thread")?;
        Ok(Self { port, ca: dir.path().join("ca.pem"), _dir: dir })
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub fn ca(&self) -> &Path {
        &self.ca
    }
}

async fn serve(listener: std::net::TcpListener, tls: TlsAcceptor, pieces: Arc<[Vec<u8>]>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    while let Ok((tcp, _)) = listener.accept().await {
        // The generator's connections bound these tasks.
        tokio::spawn(answer(tcp, tls.clone(), pieces.clone()));
    }
}

/// Answers each request on a connection; an error ends it.
async fn answer(tcp: TcpStream, tls: TlsAcceptor, pieces: Arc<[Vec<u8>]>) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    let mut stream = tls.accept(tcp).await?;
    let mut buffer = vec![0; REQUEST_LIMIT];
    let mut have = 0;
    loop {
        let length = stream.read(&mut buffer[have..]).await?;
        if length == 0 {
            return Ok(());
        }
        have += length;
        let Some(end) = request_end(&buffer[..have]) else { continue };
        buffer.copy_within(end..have, 0);
        have -= end;
        // One write a piece, as a server that streams does it.
        for piece in pieces.iter() {
            stream.write_all(piece).await?;
        }
        stream.flush().await?;
    }
}

/// The length of the first request in the buffer, if it is all there.
fn request_end(bytes: &[u8]) -> Option<usize> {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = request.parse(bytes).ok()? else { return None };
    let length = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    let length: usize = length.and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok()).unwrap_or(0);
    (bytes.len() >= head + length).then_some(head + length)
}

fn plain(tokens: u32) -> Vec<Vec<u8>> {
    let answer = " word".repeat(tokens as usize);
    let body = format!(
        r#"{{"id":"canned","object":"chat.completion","created":1,"model":"canned","choices":[{{"index":0,"message":{{"role":"assistant","content":"{answer}"}},"finish_reason":"length"}}],"usage":{{"prompt_tokens":32,"completion_tokens":{tokens},"total_tokens":{}}}}}"#,
        32 + tokens
    );
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    vec![(head + &body).into_bytes()]
}

fn streamed(tokens: u32) -> Vec<Vec<u8>> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = |event: String| format!("{:x}\r\n{event}\n\n\r\n", event.len() + 2).into_bytes();
    let event = |delta: &str| {
        let id = "chatcmpl-0123456789abcdef0123456789abcdef";
        format!(
            r#"data: {{"id":"{id}","object":"chat.completion.chunk","created":1,"model":"canned","choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]}}"#
        )
    };
    let mut pieces = vec![head.as_bytes().to_vec()];
    pieces.extend((0..tokens).map(|_| chunk(event(r#"{"content":" word"}"#))));
    pieces.push(chunk(event("{}")));
    let mut end = chunk("data: [DONE]".to_owned());
    end.extend_from_slice(b"0\r\n\r\n");
    pieces.push(end);
    pieces
}
