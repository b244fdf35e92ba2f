//! Requests that find every place taken: they wait, leave, are refused, and get their turn.

use serde_json::json;

use super::world::{KEY, LIMIT, MODEL, Response, World, chat_body, until};
use crate::gateway::Limits;
use crate::gateway::running::Stage;
use crate::state::command::{Command, Reply};
use crate::state::{Deployment, Key};

const PATH: &str = "/v1/chat/completions";
/// A model whose worker computes one answer at a time; one more job is sent ahead.
const NARROW: &str = "narrow";
const PLACES: usize = 2;
const OTHER_KEY: &str = "izar-narrow-key";

/// A world with a narrow model and a key that may ask for as much as it likes.
async fn narrow() -> World {
    let world = World::start(Limits::default()).await;
    let config = world.raft.config().borrow().clone();
    let mut deployment: Deployment = config.deployments[MODEL].clone();
    deployment.id = NARROW.parse().unwrap();
    deployment.engine.max_batch = 1;
    let first = config.keys_by_hash.values().next().unwrap().clone();
    let secret_hash = world.gateway.pepper.keyed_hash(OTHER_KEY);
    let key = Key { id: "k3".parse().unwrap(), secret_hash, max_concurrent: 1000, ..first };
    for command in [Command::CreateKey(key), Command::Deploy(deployment)] {
        assert_eq!(world.raft.propose(command).await.unwrap(), Reply::Done);
    }
    until("the narrow model", || world.gateway.readiness().deployments.iter().any(|name| name == NARROW)).await;
    world
}

fn body(say: &str) -> String {
    chat_body(say, json!({"model": NARROW}))
}

/// The key with more headers.
fn with(headers: &str) -> String {
    format!("{OTHER_KEY}\r\n{headers}")
}

async fn ask(world: &World, headers: &str, say: &str) -> Response {
    world.ask("POST", PATH, Some(&with(headers)), &body(say)).await
}

fn number(world: &World, metric: &str) -> f64 {
    let page = world.gateway.metrics().render();
    let line = page.lines().find_map(|line| line.strip_prefix(metric).map(str::to_owned));
    line.map_or(0.0, |value| value.trim().parse().unwrap())
}

fn waiting(world: &World) -> f64 {
    number(world, r#"izar_queue_length{deployment="narrow",class="interactive"}"#)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_finds_no_place_waits_and_who_leaves_is_neither_computed_nor_recorded() {
    let world = narrow().await;
    let mut held = Vec::new();
    for _ in 0..PLACES {
        held.push(world.send("POST", PATH, Some(OTHER_KEY), &body("hold")).await);
    }
    let answering = || world.gateway.running().iter().filter(|turn| turn.state == Stage::Answering).count();
    until("both places to be taken", || answering() == PLACES).await;
    let left = world.send("POST", PATH, Some(OTHER_KEY), &body("say")).await;
    until("one to wait", || waiting(&world) == 1.0).await;
    assert_eq!(world.turns().len(), PLACES, "what waits is not recorded");
    drop(left);
    until("nobody to wait", || waiting(&world) == 0.0 && world.gateway.running().len() == PLACES).await;
    let stays = world.send("POST", PATH, Some(OTHER_KEY), &body("say")).await;
    until("one to wait", || waiting(&world) == 1.0).await;
    world.go.notify_waiters();
    let answer = Response::read(stays).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "one two");
    for stream in held {
        assert_eq!(Response::read(stream).await.status, 200);
    }
    assert_eq!(world.closed(PLACES + 1).await.len(), PLACES + 1);
    let waits = number(&world, r#"izar_queue_wait_seconds_count{deployment="narrow",class="interactive"}"#);
    assert_eq!(waits, (PLACES + 1) as f64, "who left was never dispatched");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_cannot_be_met_is_refused_at_once_with_a_time() {
    let world = narrow().await;
    // Until it has seen one it promises nothing and refuses nobody.
    assert_eq!(ask(&world, "x-izar-deadline-ms: 20000", "say").await.status, 200);
    until("the end to be counted", || {
        number(&world, r#"izar_deadlines_total{deployment="narrow",class="interactive",outcome="met"}"#) == 1.0
    })
    .await;
    let refused = ask(&world, "x-izar-deadline-ms: 1", "say").await;
    assert_eq!((refused.status, refused.error("code").as_str()), (503, "deadline_unreachable"), "{refused:?}");
    assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
    assert_eq!(ask(&world, "x-izar-deadline-ms: 20000", "say").await.status, 200);

    // Somebody waits whose time passes.
    let mut held = Vec::new();
    for _ in 0..PLACES {
        held.push(world.send("POST", PATH, Some(OTHER_KEY), &body("hold")).await);
    }
    let answering = || world.gateway.running().iter().filter(|turn| turn.state == Stage::Answering).count();
    until("both places to be taken", || answering() == PLACES).await;
    let late = tokio::time::timeout(LIMIT, ask(&world, "x-izar-deadline-ms: 300", "say")).await.unwrap();
    assert_eq!((late.status, late.error("code").as_str()), (503, "deadline_unreachable"), "{late:?}");
    world.go.notify_waiters();
    for stream in held {
        assert_eq!(Response::read(stream).await.status, 200);
    }
    assert_eq!(world.closed(2 + PLACES).await.len(), 2 + PLACES, "what is refused is not recorded");
    let refusals =
        number(&world, r#"izar_queue_refused_total{deployment="narrow",class="interactive",reason="deadline"}"#);
    assert_eq!(refusals, 2.0);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_say_nothing_sensible_are_refused_by_name() {
    let world = World::start(Limits::default()).await;
    for (header, status, param) in [
        ("x-izar-deadline-ms: 0", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-deadline-ms: -1", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-deadline-ms: soon", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-class: fast", 400, "X-Izar-Class"),
        ("x-izar-class: urgent", 403, "X-Izar-Class"),
    ] {
        let key = format!("{KEY}\r\n{header}");
        let refused = world.ask("POST", PATH, Some(&key), &chat_body("say", json!({}))).await;
        assert_eq!((refused.status, refused.error("param").as_str()), (status, param), "{header}: {refused:?}");
        assert!(refused.error("message").contains(param), "{refused:?}");
    }
    let key = format!("{KEY}\r\nx-izar-class: batch");
    assert_eq!(world.ask("POST", PATH, Some(&key), &chat_body("say", json!({}))).await.status, 200);
    world.stop().await;
}
