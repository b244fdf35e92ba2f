//! Jobs over real QUIC, with an agent that is played by the test.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use izar_common::chat::{Class, Finish, Job, JobEvent, Sampling, Usage};
use izar_common::health::{Report, WorkerState};
use izar_common::id::{ClusterId, Hash, Identity, NodeId, Role, TurnId};
use izar_common::manifest::Kind;
use izar_common::prefix::{Namer, Sketch};
use izar_common::quic::{self, Connection, Endpoint, Profile, Receiver, Sender};
use izar_common::tls::{Files, NodeTls, pki};
use izar_common::wire::agent::Submit;
use izar_common::wire::handshake::Open;
use tokio::sync::watch;

use super::fixture::{config, fleet};
use super::job::AgentLost;
use super::roster::{JOB_TOKENS, Roster};
use crate::scheduler::NoPlace;
use crate::state::Config;

const LIMIT: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("not reached: {what}"))
}

fn bind(dir: &Path, role: Role, node: &str) -> Endpoint {
    let cluster = ClusterId::new("test").unwrap();
    if !dir.join("ca.pem").exists() {
        pki::init(dir, &cluster).unwrap();
    }
    let identity = Identity { cluster, site: "east".parse().unwrap(), role, node: node.parse().unwrap() };
    pki::issue(dir, &identity, &["127.0.0.1".to_owned()], dir).unwrap();
    let (cert, key) = (dir.join(format!("{node}.pem")), dir.join(format!("{node}.key")));
    let tls = NodeTls::load(&Files { ca: dir.join("ca.pem"), cert, key }).unwrap();
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), &tls).unwrap()
}

/// A controller's roster, with agent `a1` that runs `m.0` and whose side of the connection the test holds.
struct Pair {
    roster: Arc<Roster>,
    controller: Endpoint,
    agent: Endpoint,
    /// The agent's side and the controller's side.
    agent_side: Connection,
    controller_side: Connection,
    _config: watch::Sender<Arc<Config>>,
    _dir: tempfile::TempDir,
}

fn a1() -> NodeId {
    "a1".parse().unwrap()
}

async fn pair() -> Pair {
    pair_of(Kind::Echo { first_token_us: 0, next_token_us: 0 }).await
}

/// `kind`: what the worker runs.
async fn pair_of(kind: Kind) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let controller = bind(dir.path(), Role::Controller, "c1");
    let agent = bind(dir.path(), Role::Agent, "a1");
    let (agent_side, controller_side) = dial(&controller, &agent).await;
    let mut config = config("m 1", "m.0@a1");
    config.models.values_mut().for_each(|model| model.manifest.kind = kind.clone());
    let config_tx = watch::Sender::new(Arc::new(config));
    let roster = Arc::new(Roster::new(config_tx.subscribe()));
    assert!(roster.join(&a1(), &controller_side));
    roster.report(&a1(), &controller_side, report());
    Pair { roster, controller, agent, agent_side, controller_side, _config: config_tx, _dir: dir }
}

async fn dial(controller: &Endpoint, agent: &Endpoint) -> (Connection, Connection) {
    let dialled = agent.connect(controller.local_addr(), Role::Controller, None, Profile::Requests);
    let (dialled, accepted) = within("a connection", async { tokio::join!(dialled, controller.accept()) }).await;
    (dialled.unwrap(), accepted.unwrap())
}

fn report() -> Report {
    fleet("a1 m.0 ready 0 0 0", 0).agents[&a1()].report.clone().unwrap()
}

fn job() -> Job {
    let sampling = Sampling { temperature: 0.0, seed: 1, max_tokens: 9, ..Sampling::default() };
    Job {
        turn: TurnId(1),
        choice: 0,
        attempt: 0,
        deployment: "m".parse().unwrap(),
        revision: Hash([1; 32]),
        prompt: vec![1, 2],
        delivered: Vec::new(),
        sampling,
        cache_salt: [0; 16],
        numerics: None,
        class: Class::default(),
        capsule: Vec::new(),
    }
}

fn tokens(position: u32) -> JobEvent {
    JobEvent::Tokens { position, tokens: vec![7], logprobs: Vec::new() }
}

fn done() -> JobEvent {
    JobEvent::Done { finish: Finish::Length, usage: Usage::default() }
}

impl Pair {
    async fn accept_job(&self) -> (Submit, Sender, Receiver) {
        let (open, tx, mut rx) = within("a job", self.agent_side.accept_bi()).await.unwrap();
        assert_eq!(open, Open::Job);
        (within("a submission", rx.expect::<Submit>()).await.unwrap(), tx, rx)
    }
    fn in_flight(&self) -> u32 {
        self.roster.fleet().agents[&a1()].jobs()
    }
}

#[tokio::test]
async fn events_come_back_and_a_job_is_counted_until_its_last() {
    let pair = pair().await;
    let mut stream = pair.roster.submit(job(), &[]).await.unwrap();
    let (submit, mut tx, _rx) = pair.accept_job().await;
    assert_eq!((submit.worker.as_str(), &submit.job), ("m.0", &job()));
    assert_eq!(pair.in_flight(), 1);
    for event in [tokens(0), tokens(1), done()] {
        tx.put(&event);
    }
    tx.flush().await.unwrap();
    quic::finish(&mut tx);
    for event in [tokens(0), tokens(1), done()] {
        assert_eq!(within("an event", stream.next()).await, Ok(event));
    }
    assert_eq!(pair.in_flight(), 0);
    assert!(matches!(stream.next().await, Ok(JobEvent::Failed { retryable: false, .. })), "nothing follows the last");
}

#[tokio::test]
async fn a_stream_that_ends_early_or_is_lost_is_a_failure_that_may_be_retried() {
    for how in ["finish", "reset", "close"] {
        let pair = pair().await;
        let mut stream = pair.roster.submit(job(), &[]).await.unwrap();
        let (_, mut tx, _rx) = pair.accept_job().await;
        tx.send(&tokens(0)).await.unwrap();
        assert_eq!(within("an event", stream.next()).await, Ok(tokens(0)));
        match how {
            "finish" => quic::finish(&mut tx),
            "reset" => quic::reset(&mut tx),
            _ => pair.agent_side.close("test"),
        }
        let last = within("the end", stream.next()).await;
        match how {
            "finish" => assert!(matches!(last, Ok(JobEvent::Failed { retryable: true, .. })), "{last:?}"),
            _ => assert!(matches!(last, Err(AgentLost(_))), "{how}: {last:?}"),
        }
        assert_eq!(pair.in_flight(), 0, "{how}");
    }
}

#[tokio::test]
async fn a_dropped_stream_is_seen_by_the_agent() {
    let pair = pair().await;
    let stream = pair.roster.submit(job(), &[]).await.unwrap();
    let (_, mut tx, _rx) = pair.accept_job().await;
    drop(stream);
    within("the cancellation", quic::stopped(&mut tx)).await;
    assert_eq!(pair.in_flight(), 0);
}

#[tokio::test]
async fn a_job_that_cannot_be_sent_fails_as_its_first_event() {
    let pair = pair().await;
    let long = Job { prompt: vec![0; JOB_TOKENS + 1], ..job() };
    let mut stream = pair.roster.submit(long, &[]).await.unwrap();
    assert!(matches!(stream.next().await, Ok(JobEvent::Failed { retryable: false, .. })));
    pair.controller_side.close("test");
    let mut stream = pair.roster.submit(job(), &[]).await.unwrap();
    assert!(matches!(stream.next().await, Err(AgentLost(_))));
    assert_eq!(pair.in_flight(), 0);
}

#[tokio::test]
async fn an_agent_without_a_session_gets_no_jobs_and_a_newer_session_replaces_the_older() {
    let pair = pair().await;
    let (newer_agent, newer) = dial(&pair.controller, &pair.agent).await;
    assert!(pair.roster.join(&a1(), &newer));
    within("the older one's end", pair.agent_side.closed()).await;
    assert!(!pair.roster.leave(&a1(), &pair.controller_side), "the older one no longer counts");
    pair.roster.report(&a1(), &pair.controller_side, report());
    let error = pair.roster.submit(job(), &[]).await.err().unwrap();
    assert!(matches!(error, NoPlace::NoReplicaReady { .. }), "a report of the older session is not believed");
    pair.roster.report(&a1(), &newer, report());
    assert!(pair.roster.submit(job(), &[]).await.is_ok());
    assert!(pair.roster.leave(&a1(), &newer));
    let view = pair.roster.fleet().agents.remove(&a1()).unwrap();
    assert!(!view.connected && view.workers()[0].state == WorkerState::Ready, "what it said last is kept");
    assert!(pair.roster.submit(job(), &[]).await.is_err());
    drop(newer_agent);
}

#[tokio::test]
async fn a_job_says_why_it_was_placed_and_what_its_worker_holds_counts() {
    let pair = pair_of(Kind::Gguf).await;
    let prompt: Vec<u32> = (0..40).collect();
    let ask = Job { prompt: prompt.clone(), ..job() };
    let first = pair.roster.submit(ask.clone(), &[]).await.unwrap();
    assert_eq!(first.why.as_ref().unwrap().chosen.cached_tokens, 0);
    let second = pair.roster.submit(ask.clone(), &[]).await.unwrap();
    assert_eq!(second.why.as_ref().unwrap().chosen.cached_tokens, 32, "it was sent there just before");
    // A new session begins with nothing, until the worker has spoken.
    let (_newer_agent, newer) = dial(&pair.controller, &pair.agent).await;
    assert!(pair.roster.join(&a1(), &newer));
    pair.roster.report(&a1(), &newer, report());
    let names = Namer::new([0; 16]).names(&prompt, 9);
    pair.roster.sketch(&a1(), &pair.controller_side, &"m.0".parse().unwrap(), Sketch::of(names.iter()));
    pair.roster.sketch(&a1(), &newer, &"m.0".parse().unwrap(), Sketch::of(names[..1].iter()));
    let third = pair.roster.submit(ask, &[]).await.unwrap();
    assert_eq!(third.why.as_ref().unwrap().chosen.cached_tokens, 16, "the older session no longer counts");
}

/// Two agents, one of which gives a token when the other gives fifty. Here time is what is measured, so it must pass.
#[tokio::test]
async fn a_job_on_a_worker_that_is_far_slower_than_its_peers_goes_on_elsewhere() {
    let pair = pair().await;
    let two = {
        let mut config = config("m 2", "m.0@a1 m.1@a2");
        config.models.values_mut().for_each(|model| model.manifest.kind = Kind::Gguf);
        config
    };
    pair._config.send_replace(Arc::new(two));
    let second = bind(pair._dir.path(), Role::Agent, "a2");
    let (second_agent, second_controller) = dial(&pair.controller, &second).await;
    let a2: NodeId = "a2".parse().unwrap();
    assert!(pair.roster.join(&a2, &second_controller));
    let other = fleet("a2 m.1 ready 0 0 0", 0).agents[&a2].report.clone().unwrap();
    pair.roster.report(&a2, &second_controller, other.clone());

    // Both compute one job each, for as long as it takes to tell.
    let long = || Job { sampling: Sampling { max_tokens: 100_000, ..job().sampling }, ..job() };
    let mut slow = pair.roster.submit(long(), &["m.1".parse().unwrap()]).await.unwrap();
    let mut fast = pair.roster.submit(long(), &["m.0".parse().unwrap()]).await.unwrap();
    assert_eq!((slow.worker.as_str(), fast.worker.as_str()), ("m.0", "m.1"));
    let give = |agent: Connection, every: Duration| {
        tokio::spawn(async move {
            let (_, mut tx, mut rx) = agent.accept_bi().await.unwrap();
            rx.expect::<Submit>().await.unwrap();
            let mut tick = tokio::time::interval(every);
            for position in 0.. {
                tick.tick().await;
                if tx.send(&tokens(position)).await.is_err() {
                    return position;
                }
            }
            0
        })
    };
    let giving = give(pair.agent_side.clone(), Duration::from_millis(500));
    let _other = give(second_agent.clone(), Duration::from_millis(10));
    let failed = within("the slow worker to be noticed", async {
        loop {
            tokio::select! {
                event = slow.next() => if let Ok(event @ JobEvent::Failed { .. }) = event { return event },
                event = fast.next() => assert!(matches!(event, Ok(JobEvent::Tokens { .. })), "{event:?}"),
            }
        }
    })
    .await;
    let JobEvent::Failed { reason, retryable: true } = &failed else { panic!("{failed:?}") };
    assert!(reason.starts_with("worker m.0 is slow: it gives "), "{reason}");
    assert!(within("the slow worker's job to be cancelled", giving).await.unwrap() >= 8);
    assert!(pair.roster.fleet().agents[&a1()].slow.contains_key("m.0"));
    // A job that finds no other place stays there when a better one comes.
    assert!(pair.roster.leave(&a2, &second_controller));
    let giving = give(pair.agent_side.clone(), Duration::from_millis(300));
    pair.roster.report(&a1(), &pair.controller_side, report());
    let mut content = pair.roster.submit(long(), &[]).await.unwrap();
    assert_eq!(content.worker.as_str(), "m.0");
    assert!(pair.roster.join(&a2, &second_controller));
    pair.roster.report(&a2, &second_controller, other.clone());
    for position in 0..5 {
        assert_eq!(within("a token", content.next()).await, Ok(tokens(position)));
    }
    drop(content);
    assert!(within("its end", giving).await.unwrap() >= 5);
    // Both agents are heard of again, so that nothing but the pace speaks against either.
    pair.roster.report(&a1(), &pair.controller_side, report());
    pair.roster.report(&a2, &second_controller, other);
    for _ in 0..20 {
        let next = pair.roster.submit(job(), &[]).await.unwrap();
        assert_eq!(next.worker.as_str(), "m.1", "it gets none while another can take them");
    }
}
