//! `izar chat`: a conversation in the terminal. The conversation lives here; each question sends it whole. An answer whose
//! server dies is read on from another one.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use http_body_util::{BodyExt, Limited};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::http::Endpoint;
use crate::ready::Ready;
use crate::sse::Scanner;

/// The largest answer that is no stream (errors, the list of models).
const ANSWER_LIMIT: usize = 1 << 20;

/// Times that an answer is read on, and the pause before each: an election is over within a second.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub struct Options {
    /// The API; several, separated by commas, are used in turn when one dies [default: $IZAR_ENDPOINT, else the ready
    /// file's]
    #[arg(long)]
    endpoint: Option<String>,
    /// The CA's file [default: $IZAR_CA, else the ready file's]
    #[arg(long)]
    ca: Option<PathBuf>,
    /// The key [default: $IZAR_KEY, else the ready file's]
    #[arg(long)]
    key: Option<String>,
    /// What `izar dev --ready-file` wrote [default: $IZAR_READY_FILE]
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// The model [default: the first that is served]
    #[arg(long)]
    model: Option<String>,
    /// What the model is told before the first question
    #[arg(long)]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512)]
    max_tokens: u32,
    /// 0 gives the most likely words, 2 the wildest [default: the server's]
    #[arg(long)]
    temperature: Option<f32>,
    /// Ask this, print the answer and leave
    #[arg(long, value_name = "QUESTION")]
    once: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

/// A conversation with one model.
struct Chat {
    /// The first one is asked; the others when it dies.
    endpoints: Vec<Endpoint>,
    key: String,
    model: String,
    max_tokens: u32,
    temperature: Option<f32>,
    messages: Vec<Message>,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let (endpoints, key) = target(&options)?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => first_model(&endpoints[0], &key).await?,
    };
    let messages = options.system.iter().map(|s| Message { role: "system", content: s.clone() }).collect();
    let (max_tokens, temperature) = (options.max_tokens, options.temperature);
    let mut chat = Chat { endpoints, key, model, max_tokens, temperature, messages };
    match options.once {
        Some(question) => chat.ask(question).await,
        None => chat.converse().await,
    }
}

/// Flags win over the environment, which wins over the ready file.
fn target(options: &Options) -> anyhow::Result<(Vec<Endpoint>, String)> {
    let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let file = options.ready_file.clone().or_else(|| variable("IZAR_READY_FILE").map(PathBuf::from));
    let ready = file.as_deref().map(Ready::read).transpose()?;
    let from_file = |part: fn(&Ready) -> String| ready.as_ref().map(part);
    let endpoint = options
        .endpoint
        .clone()
        .or_else(|| variable("IZAR_ENDPOINT"))
        .or_else(|| from_file(|r| r.endpoints().join(",")))
        .context("no endpoint: give --endpoint, IZAR_ENDPOINT or --ready-file")?;
    let key = options
        .key
        .clone()
        .or_else(|| variable("IZAR_KEY"))
        .or_else(|| from_file(|r| r.key.clone()))
        .context("no key: give --key, IZAR_KEY or --ready-file")?;
    let ca = options
        .ca
        .clone()
        .or_else(|| variable("IZAR_CA").map(PathBuf::from))
        .or_else(|| ready.as_ref().map(|r| r.ca.clone()));
    let endpoints = endpoint.split(',').map(|url| Endpoint::new(url.trim(), ca.as_deref()));
    Ok((endpoints.collect::<anyhow::Result<_>>()?, key))
}

async fn first_model(endpoint: &Endpoint, key: &str) -> anyhow::Result<String> {
    let response = endpoint.send(Method::GET, "/v1/models", Some(key), Vec::new()).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    let body = body.map_err(|e| anyhow::anyhow!("read the list of models: {e}"))?.to_bytes();
    if !status.is_success() {
        bail!(error_text(status.as_u16(), &body));
    }
    let list: Value = serde_json::from_slice(&body).context("understand the list of models")?;
    let first = list["data"][0]["id"].as_str().context("no model is served yet")?;
    Ok(first.to_owned())
}

impl Chat {
    async fn converse(&mut self) -> anyhow::Result<()> {
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            eprintln!("{} listens. /clear forgets the conversation, /exit leaves.", self.model);
        }
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        loop {
            if terminal {
                eprint!("> ");
            }
            let line = tokio::select! {
                line = lines.next_line() => line.context("read your question")?,
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(line) = line else { return Ok(()) };
            match line.trim() {
                "" => {}
                "/exit" => return Ok(()),
                "/clear" => self.messages.retain(|m| m.role == "system"),
                question => {
                    if let Err(error) = self.ask(question.to_owned()).await {
                        eprintln!("izar: {error:#}");
                    }
                }
            }
        }
    }

    /// Asks, prints the answer as it comes, and remembers both; a question that failed is forgotten.
    async fn ask(&mut self, question: String) -> anyhow::Result<()> {
        self.messages.push(Message { role: "user", content: question });
        let mut answer = String::new();
        let result = tokio::select! {
            result = self.stream(&mut answer) => result,
            // Leaving the connection cancels the computation.
            _ = tokio::signal::ctrl_c() => Ok(()),
        };
        if !answer.is_empty() {
            println!();
        }
        if answer.is_empty() || result.is_err() {
            self.messages.pop();
        } else {
            self.messages.push(Message { role: "assistant", content: answer });
        }
        result
    }

    /// Asks, and reads on elsewhere if the server dies in the middle.
    async fn stream(&self, answer: &mut String) -> anyhow::Result<()> {
        let mut body = json!({
            "model": self.model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "stream": true,
        });
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        let body = serde_json::to_vec(&body)?;
        let (mut heard, mut tries) = (Scanner::with_ids(), 0);
        loop {
            let endpoint = &self.endpoints[tries % self.endpoints.len()];
            let cut = match self.read(endpoint, &body, &mut heard, answer).await {
                Ok(End::Done) => return Ok(()),
                Ok(End::Error(text)) => bail!(text),
                Ok(End::Cut) => anyhow::anyhow!("the answer was cut off"),
                Err(error) => error,
            };
            tries += 1;
            // What has not begun is simply asked again, by whoever asks.
            if heard.last_id().is_none() || tries == TRIES {
                return Err(cut);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reads an answer, or the rest of it, as far as it comes.
    async fn read(
        &self,
        endpoint: &Endpoint,
        body: &[u8],
        heard: &mut Scanner,
        answer: &mut String,
    ) -> anyhow::Result<End> {
        let (path, key) = ("/v1/chat/completions", Some(self.key.as_str()));
        let response = endpoint.send_after(heard.last_id(), Method::POST, path, key, body.to_vec()).await?;
        let status = response.status();
        if !status.is_success() {
            let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
            let body = body.map_err(|e| anyhow::anyhow!("read the error: {e}"))?.to_bytes();
            let text = error_text(status.as_u16(), &body);
            return if status.is_server_error() { Err(anyhow::anyhow!(text)) } else { Ok(End::Error(text)) };
        }
        heard.clear();
        let (mut frames, mut end) = (response.into_body(), End::Cut);
        while let Some(frame) = frames.frame().await {
            let Ok(data) = frame.context("read the answer")?.into_data() else { continue };
            let from = answer.len();
            heard.push(&data, |event| end.see(event, answer))?;
            print!("{}", &answer[from..]);
            std::io::stdout().flush().context("write to the terminal")?;
        }
        Ok(end)
    }
}

/// How a stream has ended so far.
enum End {
    Cut,
    Done,
    Error(String),
}

impl End {
    fn see(&mut self, event: &[u8], answer: &mut String) {
        #[derive(Deserialize)]
        struct Chunk {
            #[serde(default)]
            choices: Vec<Choice>,
            error: Option<Value>,
        }
        #[derive(Deserialize)]
        struct Choice {
            delta: Delta,
        }
        #[derive(Deserialize)]
        struct Delta {
            content: Option<String>,
        }
        if event == b"[DONE]" {
            if matches!(self, End::Cut) {
                *self = End::Done;
            }
            return;
        }
        match serde_json::from_slice::<Chunk>(event) {
            // It goes on elsewhere.
            Ok(Chunk { error: Some(error), .. }) if error["code"] == "stopping" => {}
            Ok(Chunk { error: Some(error), .. }) => {
                *self = End::Error(error["message"].as_str().unwrap_or("the answer failed").to_owned());
            }
            Ok(chunk) => answer.extend(chunk.choices.into_iter().filter_map(|c| c.delta.content)),
            Err(_) => *self = End::Error("the server sent an event that is not JSON".to_owned()),
        }
    }
}

fn error_text(status: u16, body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    match value["error"]["message"].as_str() {
        Some(message) => format!("{message} ({status})"),
        None => format!("the server answered with status {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[&str]) -> (String, End) {
        let (mut answer, mut end) = (String::new(), End::Cut);
        for event in events {
            end.see(event.as_bytes(), &mut answer);
        }
        (answer, end)
    }

    #[test]
    fn an_answer_is_put_together_from_its_deltas() {
        let (answer, end) = read(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":"Par"}}]}"#,
            r#"{"choices":[{"delta":{"content":"is"}}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":1}}"#,
            "[DONE]",
        ]);
        assert_eq!(answer, "Paris");
        assert!(matches!(end, End::Done));
    }

    #[test]
    fn an_error_in_the_stream_is_told_and_not_forgotten() {
        let (_, end) = read(&[r#"{"error":{"message":"the worker died"}}"#, "[DONE]"]);
        assert!(matches!(end, End::Error(text) if text == "the worker died"));
        assert!(matches!(read(&["{"]).1, End::Error(_)));
        assert!(matches!(read(&[]).1, End::Cut));
    }
}
