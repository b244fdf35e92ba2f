//! The agent's sessions over real QUIC, with controllers that are played by the test.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use izar_agent::gpu::Gpus;
use izar_agent::link::{Facts, Link, Watched};
use izar_agent::worker::files::Sources;
use izar_agent::worker::{Options, Workers};
use izar_common::blob::{self, Store};
use izar_common::chat::JobEvent;
use izar_common::health::{Generation, Report, WorkerState};
use izar_common::id::{ClusterId, Hash, Identity, Role};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::quic::{self, Connection, Endpoint, Receiver, Sender};
use izar_common::tls::{Certificates, Files, NodeTls, pki};
use izar_common::wire::agent::{Assignment, Down, EngineOptions, Submit, Up, WorkerSpec};
use izar_common::wire::handshake::Open;

use super::worker::job;

const LIMIT: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("not reached: {what}"))
}

fn node_tls(dir: &Path, role: Role, node: &str) -> NodeTls {
    let cluster = ClusterId::new("test").unwrap();
    if !dir.join("ca.pem").exists() {
        pki::init(dir, &cluster).unwrap();
    }
    let identity = Identity { cluster, site: "east".parse().unwrap(), role, node: node.parse().unwrap() };
    pki::issue(dir, &identity, &["127.0.0.1".to_owned()], dir).unwrap();
    let files =
        Files { ca: dir.join("ca.pem"), cert: dir.join(format!("{node}.pem")), key: dir.join(format!("{node}.key")) };
    NodeTls::load(&files).unwrap()
}

fn bind(tls: &NodeTls) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), tls).unwrap()
}

/// An agent with a link to the given controllers.
struct Agent {
    link: Link,
    workers: Workers,
    endpoint: Arc<Endpoint>,
}

impl Agent {
    fn start(dir: &Path, controllers: &[SocketAddr]) -> Self {
        let tls = node_tls(dir, Role::Agent, "a1");
        let endpoint = Arc::new(bind(&tls));
        let watched = Watched { certificates: Arc::new(Certificates::new(tls, None)), disk: Arc::default() };
        let store = Store::open(dir.join("agent-blobs")).unwrap();
        let exe = env!("CARGO_BIN_EXE_izar-agent").into();
        let options = Options { exe, threads: 1, cpus: Vec::new(), cores: 1, log_level: None };
        let sources = Sources::default();
        let workers = Workers::start(options, store, sources.clone());
        let facts = Facts::of_this_machine(Default::default());
        let gpus = Gpus::start(Default::default(), dir);
        let link = Link::start(endpoint.clone(), controllers, workers.clone(), sources, facts, watched, gpus);
        Self { link, workers, endpoint }
    }
    async fn stop(self) {
        self.link.stop().await;
        self.workers.stop().await;
        self.endpoint.close().await;
    }
}

/// A session as a controller sees it.
struct Session {
    connection: Connection,
    tx: Sender,
    rx: Receiver,
}

impl Session {
    async fn accept(endpoint: &Endpoint) -> Self {
        let connection = within("an agent dials", endpoint.accept()).await.expect("the endpoint is open");
        let (open, tx, rx) = within("a session", connection.accept_bi()).await.unwrap();
        assert_eq!(open, Open::Session);
        Self { connection, tx, rx }
    }
    async fn report_until(&mut self, what: &str, test: impl Fn(&Report) -> bool) -> Report {
        let reading = async {
            loop {
                let Up::Report(report) = self.rx.expect::<Up>().await.unwrap() else { continue };
                if test(&report) {
                    return *report;
                }
            }
        };
        within(what, reading).await
    }
    async fn assign(&mut self, applied: u64, manifests: &[&Manifest]) {
        let workers = manifests.iter().enumerate().map(|(i, manifest)| WorkerSpec {
            worker: format!("m.{i}").parse().unwrap(),
            deployment: "m".parse().unwrap(),
            revision: manifest.revision(),
            manifest: (*manifest).clone(),
            engine: EngineOptions::default(),
        });
        let generation = Generation { incarnation: 1, applied };
        self.tx
            .send(&Down::Assignment(Assignment {
                generation,
                workers: workers.collect(),
                holds: Vec::new(),
                order: None,
            }))
            .await
            .unwrap();
    }
    async fn submit(&self, worker: &str, manifest: &Manifest, max_tokens: u32) -> (Sender, Receiver) {
        let job = job(manifest, max_tokens);
        let (mut tx, rx) = self.connection.open_bi(Open::Job).await.unwrap();
        tx.send(&Submit { worker: worker.parse().unwrap(), job }).await.unwrap();
        (tx, rx)
    }
}

fn echo(next_token_us: u64) -> Manifest {
    let text = File { name: "text.json".into(), hash: Hash([9; 32]), bytes: 0 };
    Manifest {
        name: "m".into(),
        kind: Kind::Echo { first_token_us: 100, next_token_us },
        files: Vec::new(),
        text,
        context: 100_000,
        vocabulary: 1024,
        architecture: "echo".into(),
    }
}

fn is_ready(report: &Report) -> bool {
    report.workers.first().is_some_and(|worker| worker.state == WorkerState::Ready)
}

async fn read_all(rx: &mut Receiver) -> (usize, JobEvent) {
    let mut count = 0;
    loop {
        match within("an event", rx.expect::<JobEvent>()).await.unwrap() {
            JobEvent::Tokens { tokens, .. } => count += tokens.len(),
            last => return (count, last),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_reach_their_worker_and_events_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let controller = bind(&node_tls(dir.path(), Role::Controller, "c1"));
    let agent = Agent::start(dir.path(), &[controller.local_addr()]);
    let mut session = Session::accept(&controller).await;
    let first = session.report_until("a first report", |_| true).await;
    assert_eq!((first.workers.len(), first.generation), (0, Generation::default()));
    assert!(first.memory_bytes > 0 && first.cores > 0 && first.pid == std::process::id());

    let model = echo(100);
    session.assign(1, &[&model]).await;
    session.report_until("a ready worker", is_ready).await;
    let (mut tx, mut rx) = session.submit("m.0", &model, 16).await;
    quic::finish(&mut tx);
    assert!(matches!(read_all(&mut rx).await, (16, JobEvent::Done { .. })));
    let (_tx, mut rx) = session.submit("m.7", &model, 16).await;
    let (tokens, last) = read_all(&mut rx).await;
    assert!(tokens == 0 && matches!(last, JobEvent::Failed { retryable: true, .. }), "{last:?}");
    agent.stop().await;
    within("the connection's end", session.connection.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_cancels_by_stopping_or_resetting_a_stream() {
    let dir = tempfile::tempdir().unwrap();
    let controller = bind(&node_tls(dir.path(), Role::Controller, "c1"));
    let agent = Agent::start(dir.path(), &[controller.local_addr()]);
    let mut session = Session::accept(&controller).await;
    let model = echo(20_000);
    session.assign(1, &[&model]).await;
    session.report_until("a ready worker", is_ready).await;
    for how in ["stop", "reset"] {
        let (mut tx, mut rx) = session.submit("m.0", &model, 10_000).await;
        within("a token", rx.expect::<JobEvent>()).await.unwrap();
        session.report_until("a running job", |report| report.workers[0].load.running == 1).await;
        match how {
            "stop" => {
                quic::finish(&mut tx);
                quic::stop(&mut rx);
            }
            _ => quic::reset(&mut tx),
        }
        session.report_until(how, |report| report.workers[0].load.running == 0).await;
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_assignment_counts_whoever_sent_it() {
    let dir = tempfile::tempdir().unwrap();
    let one = bind(&node_tls(dir.path(), Role::Controller, "c1"));
    let two = bind(&node_tls(dir.path(), Role::Controller, "c2"));
    let agent = Agent::start(dir.path(), &[one.local_addr(), two.local_addr()]);
    let (mut first, mut second) = tokio::join!(Session::accept(&one), Session::accept(&two));
    let model = echo(100);
    second.assign(8, &[&model]).await;
    second.report_until("a ready worker", is_ready).await;
    first.assign(7, &[]).await;
    first.assign(9, &[&model, &model]).await;
    let report = second.report_until("generation 9", |report| report.generation.applied == 9).await;
    assert_eq!((report.workers.len(), report.workers[0].restarts), (2, 0));
    // A session that is lost is dialled again, and the worker goes on meanwhile.
    let pid = report.workers[0].pid;
    first.connection.close("test");
    let mut again = Session::accept(&one).await;
    let report = again.report_until("a report", is_ready).await;
    assert_eq!(report.workers[0].pid, pid);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_fetched_from_the_controller_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("blobs")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| i as u8).collect();
    let hash = store.add_bytes(&bytes).unwrap();
    let one = bind(&node_tls(dir.path(), Role::Controller, "c1"));
    let two = bind(&node_tls(dir.path(), Role::Controller, "c2"));
    let empty = Store::open(dir.path().join("empty")).unwrap();
    let agent = Agent::start(dir.path(), &[one.local_addr(), two.local_addr()]);
    let (first, mut second) = tokio::join!(Session::accept(&one), Session::accept(&two));
    for (connection, store) in [(first.connection.clone(), empty), (second.connection.clone(), store)] {
        tokio::spawn(async move {
            while let Ok((Open::Blob, tx, rx)) = connection.accept_bi().await {
                blob::serve(&store, tx, rx).await.unwrap();
            }
        });
    }
    let mut model = echo(100);
    model.files = vec![File { name: "weights".into(), hash, bytes: bytes.len() as u64 }];
    second.assign(1, &[&model]).await;
    second.report_until("a ready worker", is_ready).await;
    assert!(Store::open(dir.path().join("agent-blobs")).unwrap().has(&hash));
    agent.stop().await;
}
