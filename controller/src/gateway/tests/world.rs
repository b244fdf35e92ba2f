//! A whole controller in the test's process, with one agent that does what the prompt tells it.
//!
//! Raft, sessions and tokenizer are the real ones, on loopback sockets and a temporary folder; only the agent's worker
//! is a script. The tests speak raw HTTP to the plaintext listener.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use izar_common::blob;
use izar_common::chat::{Finish, Job, JobEvent, Logprobs, Token, Usage};
use izar_common::clock::{Clock, Hlc};
use izar_common::health::{Generation, Load, Report, WorkerReport, WorkerState};
use izar_common::id::{Identity, KeyId, NodeId, NumericsId, ProjectId, Role, TurnId};
use izar_common::quic::{self, Endpoint, Profile, Sender};
use izar_common::seal::Pepper;
use izar_common::tls::{Files, NodeTls, pki};
use izar_common::wire::agent::{Assignment, Down, EngineOptions, Recall, Recalled, Resume, Resumed, Submit, Up};
use izar_common::wire::handshake::Open;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::Agents;
use crate::catalog::Catalog;
use crate::gateway::provisional::Provisional;
use crate::gateway::{Gateway, Limits};
use crate::import;
use crate::raft::{self, Driver, Raft};
use crate::state::command::{Command, Reply};
use crate::state::turns::Turn;
use crate::state::{Deployment, Key, KeyStatus};

/// No test waits longer for what must come.
pub const LIMIT: Duration = Duration::from_secs(20);
pub const KEY: &str = "izar-test-key";
pub const OTHER_KEY: &str = "izar-other-key";
/// The model's name, and how many requests of the key may run at once.
pub const MODEL: &str = "echo";
pub const MAX_CONCURRENT: u32 = 2;

pub struct World {
    pub gateway: Gateway,
    pub raft: Raft,
    pub address: SocketAddr,
    /// Lets a `hold` job end.
    pub go: Arc<Notify>,
    /// What the worker says that it computes with; 0: nothing.
    pub numerics: Arc<AtomicU64>,
    /// Turns of jobs that were cancelled.
    pub cancelled: mpsc::Receiver<TurnId>,
    agents: Agents,
    driver: Driver,
    shutdown: CancellationToken,
    end: CancellationToken,
    tasks: TaskTracker,
    _dir: tempfile::TempDir,
}

fn node(dir: &Path, role: Role, name: &str) -> NodeTls {
    let identity: Identity = format!("izar://dev/local/{role}/{name}").parse().unwrap();
    pki::issue(dir, &identity, &["127.0.0.1".to_owned()], dir).unwrap();
    let at = |file: String| dir.join(file);
    let files = Files { ca: at("ca.pem".into()), cert: at(format!("{name}.pem")), key: at(format!("{name}.key")) };
    NodeTls::load(&files).unwrap()
}

fn bind(tls: &NodeTls) -> Arc<Endpoint> {
    Arc::new(Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), tls).unwrap())
}

fn options(dir: &Path, address: SocketAddr) -> raft::Options {
    let node: NodeId = "c1".parse().unwrap();
    raft::Options {
        data_dir: dir.join("c1"),
        cluster: "dev".parse().unwrap(),
        site: "local".parse().unwrap(),
        members: vec![raft::Member { id: 1, node: node.clone(), address }],
        node,
        tick: Duration::from_millis(5),
        election_ticks: 10,
        heartbeat_ticks: 2,
    }
}

pub async fn until(what: &str, mut met: impl FnMut() -> bool) {
    let wait = async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("{what} did not come in time"));
}

impl World {
    pub async fn start(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), &"dev".parse().unwrap()).unwrap();
        let endpoint = bind(&node(dir.path(), Role::Controller, "c1"));
        let options = options(dir.path(), endpoint.local_addr());
        raft::claim_data_dir(&options).unwrap();
        let (raft, driver) = Raft::start(options, endpoint.clone(), Arc::new(Clock::default())).unwrap();
        let store = blob::Store::open(dir.path().join("blobs")).unwrap();
        let agents = Agents::start(raft.clone(), store.clone(), "local".parse().unwrap());
        let (tasks, end, shutdown) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let catalog = Catalog::start(raft.config(), store.clone(), endpoint.clone(), Vec::new(), &tasks, end.clone());
        let pepper = Arc::new(Pepper::generate());
        let provisional = Provisional::open(dir.path()).unwrap();
        let gateway = Gateway::new(raft.clone(), agents.clone(), catalog, pepper.clone(), provisional, limits);
        let plain = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = plain.local_addr().unwrap();
        tasks.spawn(gateway.clone().serve(None, Some(plain), shutdown.clone()));
        let (go, (cancel, cancelled)) = (Arc::new(Notify::new()), mpsc::channel(16));
        let numerics = Arc::new(AtomicU64::new(0));
        let tls = node(dir.path(), Role::Agent, "a1");
        let agent = Agent { tls, go: go.clone(), numerics: numerics.clone(), cancel };
        let controller = endpoint.local_addr();
        let (accept, agent_end, accept_end) = (agents.clone(), end.clone(), end.clone());
        tasks.spawn(async move {
            let accepting = async {
                while let Some(connection) = endpoint.accept().await {
                    let agents = accept.clone();
                    tokio::spawn(async move { agents.serve(connection).await });
                }
            };
            accept_end.run_until_cancelled(accepting).await;
        });
        tasks.spawn(async move {
            agent_end.run_until_cancelled(agent.run(controller)).await;
        });
        let world =
            Self { gateway, raft, address, go, numerics, cancelled, agents, driver, shutdown, end, tasks, _dir: dir };
        world.furnish(&pepper, &store).await;
        world
    }

    /// Makes the key and deploys the model; returns when it can generate.
    async fn furnish(&self, pepper: &Pepper, store: &blob::Store) {
        until("a leader", || self.raft.leadership().borrow().here).await;
        let key = |id: &str, secret: &str| Key {
            id: KeyId::new(id).unwrap(),
            project: ProjectId::new("default").unwrap(),
            secret_hash: pepper.keyed_hash(secret),
            max_concurrent: MAX_CONCURRENT,
            status: KeyStatus::Active,
            created: Hlc::default(),
            note: String::new(),
        };
        let (key, other) = (key("k1", KEY), key("k2", OTHER_KEY));
        let manifest = import::echo(MODEL, 0, 0, store).unwrap();
        let engine = EngineOptions { max_context: 1000, ..EngineOptions::default() };
        let deployment = Deployment {
            id: MODEL.parse().unwrap(),
            revision: manifest.revision(),
            replicas: 1,
            engine,
            constraints: Default::default(),
        };
        let keys = [Command::CreateKey(key), Command::CreateKey(other)];
        for command in keys.into_iter().chain([Command::RegisterModel(manifest), Command::Deploy(deployment)]) {
            assert_eq!(self.raft.propose(command).await.unwrap(), Reply::Done);
        }
        until("a ready replica", || self.gateway.readiness().ready).await;
    }

    /// Begins to stop the gateway.
    pub fn shutdown(&self) {
        self.shutdown.cancel();
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        let down = async {
            // The gateway ends by itself; the others once they are told.
            until("the gateway's end", || self.gateway.tasks.is_empty()).await;
            self.end.cancel();
            self.tasks.close();
            self.tasks.wait().await;
            self.agents.stop().await;
            self.driver.shutdown().await;
        };
        tokio::time::timeout(LIMIT, down).await.expect("everything stops");
    }

    /// Sends a request and leaves its answer to be read.
    pub async fn send(&self, method: &str, path: &str, key: Option<&str>, body: &str) -> TcpStream {
        let key = key.map_or(String::new(), |key| format!("authorization: Bearer {key}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{key}content-length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all((head + body).as_bytes()).await.unwrap();
        stream
    }

    /// Repeats a streamed chat whose stream broke off after an event.
    pub async fn chat_after(&self, id: &str, key: &str, say: &str, more: Value) -> Response {
        let key = format!("{key}\r\nlast-event-id: {id}");
        self.ask("POST", "/v1/chat/completions", Some(&key), &chat_body(say, more)).await
    }

    /// Asks for a chat that may be asked for again.
    pub async fn chat_once(&self, name: &str, say: &str, more: Value) -> Response {
        let key = format!("{KEY}\r\nidempotency-key: {name}");
        self.ask("POST", "/v1/chat/completions", Some(&key), &chat_body(say, more)).await
    }

    pub async fn ask(&self, method: &str, path: &str, key: Option<&str>, body: &str) -> Response {
        Response::read(self.send(method, path, key, body).await).await
    }

    /// Asks for a chat about `say`, with more fields.
    pub async fn chat(&self, say: &str, more: Value) -> Response {
        self.ask("POST", "/v1/chat/completions", Some(KEY), &chat_body(say, more)).await
    }

    /// The record of every turn, newest first.
    pub fn turns(&self) -> Vec<Turn> {
        self.raft.state().turns(1000, |_| true)
    }

    /// Waits until every turn is closed and returns them, newest first.
    pub async fn closed(&self, count: usize) -> Vec<Turn> {
        until("the end of every turn", || {
            let turns = self.turns();
            turns.len() == count && turns.iter().all(|turn| turn.closed.is_some())
        })
        .await;
        self.turns()
    }
}

pub fn chat_body(say: &str, more: Value) -> String {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": say}]});
    let fields = body.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    body.to_string()
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub async fn read(mut stream: TcpStream) -> Self {
        let mut text = String::new();
        let read = tokio::time::timeout(LIMIT, stream.read_to_string(&mut text)).await;
        read.expect("an answer in time").unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        Self { status, head: head.to_owned(), body: if chunked { dechunk(body) } else { body.to_owned() } }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The request's id.
    pub fn turn(&self) -> &str {
        self.head.lines().find_map(|line| line.strip_prefix("x-request-id: ")).expect("every answer has one")
    }

    /// What is said in `error`.
    pub fn error(&self, field: &str) -> String {
        self.json()["error"][field].as_str().unwrap_or_default().to_owned()
    }

    /// The data of every event.
    pub fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// The ids of the events that have one.
    pub fn ids(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("id: ")).collect()
    }

    /// The text of all events together.
    pub fn streamed_text(&self) -> String {
        let chunks = self.events().into_iter().filter_map(|data| serde_json::from_str::<Value>(data).ok());
        chunks.filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
    }
}

fn dechunk(mut body: &str) -> String {
    let mut all = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        all.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap_or_default();
    }
    all
}

/// An agent whose workers are ready at once and follow the words of the prompt.
struct Agent {
    tls: NodeTls,
    go: Arc<Notify>,
    numerics: Arc<AtomicU64>,
    cancel: mpsc::Sender<TurnId>,
}

impl Agent {
    async fn run(self, controller: SocketAddr) {
        let endpoint = bind(&self.tls);
        let connection = endpoint.connect(controller, Role::Controller, None, Profile::Requests).await.unwrap();
        let (mut tx, mut rx) = connection.open_bi(Open::Session).await.unwrap();
        let mut workers = Vec::new();
        let capsules = Arc::new(Mutex::new(HashMap::new()));
        let mut again = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                down = rx.expect::<Down>() => {
                    let Ok(down) = down else { return };
                    let Down::Assignment(assignment) = down else { continue };
                    workers = ready(&assignment);
                    again.reset_immediately();
                }
                _ = again.tick() => {
                    if tx.send(&Up::Report(Box::new(report(workers.clone(), self.numerics.load(Relaxed))))).await.is_err() {
                        return;
                    }
                }
                job = connection.accept_bi() => {
                    let Ok((open, mut tx, mut rx)) = job else { return };
                    let (go, cancel, capsules) = (self.go.clone(), self.cancel.clone(), capsules.clone());
                    tokio::spawn(async move {
                        match open {
                            Open::Recall => {
                                let Recall { turn } = rx.expect().await.unwrap();
                                let capsule = capsules.lock().unwrap().get(&turn).cloned();
                                tx.send(&Recalled { capsule }).await.unwrap();
                            }
                            // It keeps no answers.
                            Open::Resume => {
                                rx.expect::<Resume>().await.unwrap();
                                tx.send(&Resumed::Missing).await.unwrap();
                            }
                            _ => {
                                let Ok(Submit { mut job, .. }) = rx.expect().await else { return };
                                capsules.lock().unwrap().insert(job.turn, std::mem::take(&mut job.capsule));
                                act(job, tx, &go, &cancel).await;
                            }
                        }
                    });
                }
            }
        }
    }
}

fn ready(assignment: &Assignment) -> Vec<WorkerReport> {
    let worker = |spec: &izar_common::wire::agent::WorkerSpec| WorkerReport {
        worker: spec.worker.clone(),
        deployment: spec.deployment.clone(),
        revision: spec.revision,
        state: WorkerState::Ready,
        pid: None,
        load: Load::default(),
        max_batch: spec.engine.max_batch,
        restarts: 0,
        numerics: None,
        detail: String::new(),
        share: 100,
    };
    assignment.workers.iter().map(worker).collect()
}

fn report(mut workers: Vec<WorkerReport>, numerics: u64) -> Report {
    workers.iter_mut().for_each(|worker| worker.numerics = (numerics > 0).then_some(NumericsId(numerics)));
    let generation = Generation::default();
    Report {
        generation,
        pid: 1,
        version: "0".into(),
        cores: 1,
        memory_bytes: 1,
        gpus: 0,
        labels: Default::default(),
        workers,
        health: Default::default(),
    }
}

/// Does what the prompt says:
/// `say`: the words "one two"; `hold`: one word, then waits for `go`; `silent`: nothing, ever; `flaky`: fails on the
/// first two attempts; `half`: says a word once, and fails on every attempt; `torn`: says one letter on every attempt, then fails; `move`: one word, then waits for `go`
/// and fails, and says the rest when it goes on; `broken`: fails for good.
async fn act(job: Job, mut tx: Sender, go: &Notify, cancel: &mpsc::Sender<TurnId>) {
    let prompt: Vec<u8> = job.prompt.iter().map(|token| *token as u8).collect();
    let prompt = String::from_utf8(prompt).unwrap();
    let has = |word: &str| prompt.contains(word);
    let failed = |retryable: bool| JobEvent::Failed { reason: "the script says so".into(), retryable };
    let events = match () {
        () if has("hold") => {
            let _ = tx.send(&tokens(0, "one")).await;
            tokio::select! {
                () = go.notified() => vec![done(&job, 3)],
                () = quic::stopped(&mut tx) => return told(cancel, job.turn).await,
            }
        }
        () if has("silent") => {
            quic::stopped(&mut tx).await;
            return told(cancel, job.turn).await;
        }
        () if has("flaky") && job.attempt < 2 => vec![failed(true)],
        () if has("half") && job.delivered.is_empty() => vec![tokens(0, "one"), failed(true)],
        () if has("half") => vec![failed(true)],
        () if has("torn") => {
            let said = job.delivered.len();
            match "one two".get(said..=said) {
                Some(letter) => vec![tokens(said as u32, letter), failed(true)],
                None => vec![done(&job, 7)],
            }
        }
        () if has("move") && job.delivered.is_empty() => {
            let _ = tx.send(&tokens(0, "one")).await;
            go.notified().await;
            vec![failed(true)]
        }
        () if has("move") => vec![tokens(3, " two"), done(&job, 7)],
        () if has("broken") => vec![failed(false)],
        () if has("choice") => choose(&job, go).await,
        () => vec![tokens(0, "one "), tokens(4, "two"), done(&job, 7)],
    };
    for event in events {
        let _ = tx.send(&event).await;
    }
    quic::finish(&mut tx);
    quic::stopped(&mut tx).await;
}

async fn told(cancel: &mpsc::Sender<TurnId>, turn: TurnId) {
    let _ = cancel.send(turn).await;
}

/// Choice 0 waits for `go` and says one word less than the others; each says its number, and fails on its first attempt.
async fn choose(job: &Job, go: &Notify) -> Vec<JobEvent> {
    if job.attempt == 0 {
        return vec![JobEvent::Failed { reason: "the script says so".into(), retryable: true }];
    }
    if job.choice == 0 {
        go.notified().await;
        return vec![scored(job, 0, "0"), done(job, 1)];
    }
    vec![scored(job, 0, &job.choice.to_string()), scored(job, 1, "!"), done(job, 2)]
}

fn tokens(position: u32, text: &str) -> JobEvent {
    JobEvent::Tokens { position, tokens: text.bytes().map(Token::from).collect(), logprobs: Vec::new() }
}

/// Like `tokens`, with log-probabilities if the job asks for them.
fn scored(job: &Job, position: u32, text: &str) -> JobEvent {
    let tokens: Vec<Token> = text.bytes().map(Token::from).collect();
    let score = |token: &Token| Logprobs { logprob: -0.5, top: vec![(*token, -0.5)] };
    let logprobs = job.sampling.logprobs.iter().flat_map(|_| tokens.iter().map(score)).collect();
    JobEvent::Tokens { position, tokens, logprobs }
}

/// Tokens of the prompt that the worker's cache held, in every answer that it ends itself.
pub const CACHED_TOKENS: u32 = 4;

fn done(job: &Job, completion_tokens: u32) -> JobEvent {
    // The first choice computes what the others find.
    let (prompt_tokens, cached_tokens) = (job.prompt.len() as u32, CACHED_TOKENS * (1 + job.choice));
    let usage = Usage { prompt_tokens, cached_tokens, completion_tokens };
    JobEvent::Done { finish: Finish::Stop, usage }
}
