//! Workers and agents are killed, stopped or cut off while they answer: every answer goes on exactly, the client sees a
//! pause at most, and the dead come back.

use std::sync::atomic::{AtomicUsize, Ordering};

use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options, Process};
use izar_tests::far::Far;
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
    let _machine = izar_tests::shared();
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
    let _machine = izar_tests::shared();
    let cluster = slow_model(1, 1);
    let victim = cluster.workers("slow").remove(0);
    while_requests_run(&cluster, || process::kill_hard(victim.pid));
    cluster.wait_successor(&victim);
    every_turn_is_closed(&cluster, 2 * EACH + 1);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn answers_of_a_stopped_worker_go_on_in_another() {
    let _machine = izar_tests::shared();
    let cluster = slow_model(2, 2);
    let victim = cluster.workers("slow").remove(0);
    while_requests_run(&cluster, || process::stop(victim.pid));
    cluster.wait_successor(&victim);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn answers_on_a_killed_agent_go_on_elsewhere() {
    let _machine = izar_tests::shared();
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
    let _machine = izar_tests::shared();
    let cluster = slow_model(2, 2);
    let victim = cluster.processes("agent").remove(0);
    while_requests_run(&cluster, || process::stop(victim.pid));
    process::cont(victim.pid);
    cluster.admin().wait_ready("slow", 2);
    cluster.finish(&["agent is given up"]);
}

/// The thread that computes stands still, the process lives: only the steps that do not end tell.
#[test]
fn an_answer_of_a_worker_that_hangs_in_a_step_goes_on_in_another() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::model("smollm2-135m", 1, 2).start();
    cluster.admin().wait_ready("smollm2-135m", 2);
    let client = cluster.client();
    let messages = json!([{ "role": "user", "content": "Tell me a long story about a river and a mill." }]);
    let body =
        json!({ "model": "smollm2-135m", "messages": messages, "max_tokens": 300, "temperature": 0, "stream": true });
    let expected = client.stream(CHAT, &body).unwrap().transcript().unwrap();
    let told = std::thread::scope(|scope| {
        let telling = scope.spawn(|| client.stream(CHAT, &body).unwrap().transcript().unwrap());
        let worker = until("the answer to have some tokens", SOON, || {
            let requests = cluster.admin().json(&["requests", "list"])?;
            let request = &requests["requests"][0];
            // The answer before it may still be in the list, closing.
            let tokens = request["tokens"].as_u64().unwrap_or(0);
            anyhow::ensure!(request["state"] == "answering" && (10..200).contains(&tokens), "{requests}");
            Ok(request["worker"].as_str().expect("it is placed").to_owned())
        });
        let victim = cluster.processes("worker").into_iter().find(|process| process.id == worker).expect("it runs");
        process::wedge(victim.pid, "executor");
        assert!(!telling.is_finished(), "it is held in the middle");
        telling.join().unwrap()
    });
    assert!(told.done && told.error.is_none(), "{told:?}");
    assert_eq!(told.text, expected.text, "as if nothing had happened");
    cluster.admin().wait_ready("smollm2-135m", 2);
    let hung = izar_tests::logs::surprises(&cluster.logs(), &[]);
    assert!(hung.iter().any(|line| line.text.contains("the worker hangs")), "{hung:?}");
    cluster.finish(&["worker failed and will be started again"]);
}

/// The link loses everything, in both directions, until the agent is given up. Then it brings what the agent computed
/// meanwhile, and computes still, while the answers are given by another: nobody listens to that.
#[test]
fn answers_behind_a_severed_link_go_on_elsewhere_and_late_ones_are_not_heard() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(1, 1).start();
    let far = Far::start(&cluster, "far");
    // Six seconds an answer: it runs long after the link is mended.
    cluster.admin().deploy_echo("slow", 2, 5, 100);
    cluster.admin().wait_ready("slow", 2);
    while_requests_run(&cluster, || {
        let requests = cluster.admin().json(&["requests", "list"]).unwrap();
        let there = requests["requests"].as_array().into_iter().flatten().filter(|r| r["agent"] == "far").count();
        assert!(there > 0, "{requests}");
        far.cut();
        until_true("the agent to be given up", SOON, || {
            let page = cluster.client().get("/metrics").unwrap().text();
            page.lines().any(|line| line == "izar_agents_given_up_total 1")
        });
        far.mend();
    });
    cluster.admin().wait_ready("slow", 2);
    every_turn_is_closed(&cluster, 2 * EACH + 1);
    far.stop();
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
