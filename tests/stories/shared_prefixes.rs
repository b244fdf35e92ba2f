//! Requests that begin alike find what others of the tenant have had computed, wherever in the fleet that was.

use izar_tests::client::Client;
use izar_tests::cluster::Options;
use serde_json::{Value, json};

const MODEL: &str = "smollm2-135m";
/// Tokens that all requests of a kind begin with, and kinds.
const PREFIX: u64 = 1_000;
const KINDS: u64 = 4;
/// Questions of each kind, after its first.
const QUESTIONS: u64 = 5;

/// So much of a beginning must come from caches, in percent: it ends in the middle of a block, and a little may be computed
/// again elsewhere.
const WANTED: u64 = 90;

/// Tokens that look random, apart from the special ones.
fn tokens(seed: u64, count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |i| 100 + (seed * 1_000_003 + i * 7_919) * 2_654_435_761 % 40_000)
}

/// Asks a question of some tokens after a kind's beginning; returns how many tokens of the prompt came from a cache.
fn ask(client: &Client, kind: u64, question: u64) -> u64 {
    let prompt: Vec<u64> = tokens(kind, PREFIX).chain(tokens(1_000 + question, 20)).collect();
    let body = json!({ "model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0 });
    let answer = client.post("/v1/completions", &body).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let usage: Value = answer.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], PREFIX + 20, "{usage}");
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_else(|| panic!("{usage}"))
}

/// Asks everything at once; returns the sum of what came from caches.
fn ask_all(clients: &[Client], questions: impl Iterator<Item = (u64, u64)>) -> u64 {
    std::thread::scope(|scope| {
        let ask = |(i, (kind, question)): (usize, (u64, u64))| {
            let client = &clients[i % clients.len()];
            scope.spawn(move || ask(client, kind, question))
        };
        let asked: Vec<_> = questions.enumerate().map(ask).collect();
        asked.into_iter().map(|answer| answer.join().expect("a client was answered well")).sum()
    })
}

#[test]
fn what_was_computed_once_is_found_again_on_any_of_two_agents() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::model(MODEL, 1, 2).start();
    cluster.admin().wait_ready(MODEL, 2);
    let first = cluster.client();
    let second = first.with_key(Some(&cluster.admin().create_key(&["--note", "of the same tenant"]).unwrap()));
    let clients = [first, second];

    for kind in 0..KINDS {
        assert!(ask(&clients[0], kind, 0) < 16, "nobody has asked this before");
    }
    // Both keys, all kinds mixed, one kind of each at a time.
    let mut cached = 0;
    for question in 1..=QUESTIONS {
        cached += ask_all(&clients, (0..KINDS).map(|kind| (kind, question * KINDS + kind)));
    }
    let all = KINDS * QUESTIONS * PREFIX;
    assert!(100 * cached >= WANTED * all, "{cached} of {all} tokens of shared beginnings came from caches");

    // A beginning that is new, from many at once: one computes it, and the others wait for it there.
    let many = 6;
    let cached = ask_all(&clients, (0..many).map(|question| (KINDS, 500 + question)));
    let all = (many - 1) * PREFIX;
    assert!(100 * cached >= WANTED * all, "{cached} of {all} tokens of a burst came from caches");

    let metrics = clients[0].get("/metrics").unwrap().text();
    let counted = format!("izar_prompt_tokens_cached_total{{deployment=\"{MODEL}\"}} ");
    let counted = metrics.lines().find_map(|line| line.strip_prefix(&counted)).unwrap_or_else(|| panic!("{metrics}"));
    assert!(counted.parse::<u64>().unwrap() >= cached, "{counted}");
    cluster.finish(&[]);
}
