//! Workers and agents are killed or stopped while they answer: every answer goes on exactly, the client sees a pause at
//! most, and the dead come back.

use std::sync::atomic::{AtomicUsize, Ordering};

use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options, Process};
use izar_tests::process;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: u64 = 60;

/// Streamed requests at once, and as many that are not.
const EACH: usize = 6;

fn body(tokens: u64, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": tokens, "stream": stream })
}

/// The whole answer to an unstreamed request. Panics if it is anything else.
fn whole(client: &Client, tokens: u64) -> String {
    let response = client.post(CHAT, &body(tokens, false)).unwrap();
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()["choices"][0]["message"]["content"].as_str().expect("a message has content").to_owned()
}

/// Two replicas of a model that takes seconds to answer, on a cluster of so many agents.
fn slow_model(agents: usize, replicas: usize) -> Cluster {
    let cluster = Options::echo(1, agents).start();
    cluster.deploy_echo("slow", replicas, 5, 50);
    cluster
}

/// Starts requests, runs `during` once every one of them has tokens, and compares all answers with an undisturbed one.
fn while_requests_run(cluster: &Cluster, during: impl FnOnce()) {
    let client = cluster.client();
    let expected = whole(&client, TOKENS);
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let mut answers = Vec::new();
        for i in 0..2 * EACH {
            let (client, begun) = (&client, &begun);
            answers.push(scope.spawn(move || {
                if i < EACH {
                    let answer = client.stream(CHAT, &body(TOKENS, true)).unwrap();
                    begun.fetch_add(1, Ordering::Relaxed);
                    let transcript = answer.transcript().unwrap();
                    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
                    assert!(transcript.events.len() as u64 >= TOKENS, "an event for each token: {transcript:?}");
                    transcript.text
                } else {
                    whole(client, TOKENS)
                }
            }));
        }
        until_true("every request to run", SOON, || {
            let requests = cluster.admin().json(&["requests", "list"]).unwrap();
            let requests = requests["requests"].as_array().cloned().unwrap_or_default();
            let with_tokens = requests.iter().filter(|r| r["tokens"] != 0).count();
            begun.load(Ordering::Relaxed) == EACH && with_tokens == 2 * EACH
        });
        during();
        for answer in answers {
            let answer = answer.join().expect("a client was answered well");
            assert_eq!(answer, expected, "as if nothing had happened");
        }
    });
}

#[test]
fn answers_of_a_killed_worker_go_on_in_another() {
    let _machine = izar_tests::exclusive();
    let cluster = slow_model(2, 2);
    let victim = cluster.workers("slow").remove(0);
    let client = cluster.client();
    while_requests_run(&cluster, || {
        process::kill_hard(victim.pid);
        (0..10).for_each(|_| drop(whole(&client, 2)));
    });
    cluster.wait_successor(&victim);
    cluster.admin().wait_ready("slow", 2);
    whole(&client, 2);
    every_turn_is_closed(&cluster, 2 * EACH + 12);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn answers_of_the_only_worker_wait_for_its_successor() {
    let _machine = izar_tests::exclusive();
    let cluster = slow_model(1, 1);
    let victim = cluster.workers("slow").remove(0);
    while_requests_run(&cluster, || process::kill_hard(victim.pid));
    cluster.wait_successor(&victim);
    every_turn_is_closed(&cluster, 2 * EACH + 1);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn answers_of_a_stopped_worker_go_on_in_another() {
    let _machine = izar_tests::exclusive();
    let cluster = slow_model(2, 2);
    let victim = cluster.workers("slow").remove(0);
    while_requests_run(&cluster, || process::stop(victim.pid));
    cluster.wait_successor(&victim);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn answers_on_a_killed_agent_go_on_elsewhere() {
    let _machine = izar_tests::exclusive();
    let cluster = slow_model(2, 2);
    let victim = cluster.processes("agent").remove(0);
    let orphans: Vec<Process> =
        cluster.processes("worker").into_iter().filter(|p| p.agent.as_deref() == Some(&victim.id)).collect();
    assert!(!orphans.is_empty(), "the agent has workers");
    let client = cluster.client();
    while_requests_run(&cluster, || {
        process::kill_hard(victim.pid);
        // Until the death is noticed, a request may be sent there: it is served by another.
        (0..10).for_each(|_| drop(whole(&client, 2)));
    });
    until_true("the dead agent's workers to end", SOON, || orphans.iter().all(|worker| !process::runs(worker.pid)));
    cluster.wait_successor(&victim);
    cluster.admin().wait_ready("slow", 2);
    whole(&client, 2);
    every_turn_is_closed(&cluster, 2 * EACH + 12);
    cluster.finish(&["agent is given up"]);
}

#[test]
fn answers_on_a_stopped_agent_go_on_elsewhere_and_it_is_welcome_again() {
    let _machine = izar_tests::exclusive();
    let cluster = slow_model(2, 2);
    let victim = cluster.processes("agent").remove(0);
    while_requests_run(&cluster, || process::stop(victim.pid));
    process::cont(victim.pid);
    cluster.admin().wait_ready("slow", 2);
    cluster.finish(&["agent is given up"]);
}

fn every_turn_is_closed(cluster: &Cluster, asked: usize) {
    until("every turn to be closed", SOON, || {
        let turns = cluster.admin().turns_by_id()?;
        let open = turns.values().filter(|t| t.outcome == "running").count();
        anyhow::ensure!(open == 0, "{open} open turns");
        anyhow::ensure!(turns.len() == asked, "{} turns of {asked} requests", turns.len());
        anyhow::ensure!(turns.values().all(|t| t.outcome == "finished"), "a turn did not finish");
        Ok(())
    });
}
