//! Workers and agents are killed: what ran there ends in an error that can be retried, the rest goes on, and the dead
//! come back.

use std::sync::atomic::{AtomicUsize, Ordering};

use izar_tests::client::{Client, Response, Transcript};
use izar_tests::cluster::{Cluster, Options, Process};
use izar_tests::process;
use izar_tests::waiting::{SOON, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: u64 = 60;

fn body(tokens: u64, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": tokens, "stream": stream })
}

/// How a request ended for its client.
#[derive(Debug)]
enum End {
    Whole,
    /// With an error that says that trying again makes sense.
    Retryable,
}

/// Judges a stream. Panics if it ended in neither of the good ways.
fn judge_stream(transcript: &Transcript) -> End {
    match &transcript.error {
        None if transcript.done && transcript.events.len() as u64 >= TOKENS => End::Whole,
        Some(error) if !transcript.done && error["type"] == "server_error" && error["message"].is_string() => {
            End::Retryable
        }
        _ => panic!("a stream that ended badly: {transcript:?}"),
    }
}

fn judge_response(response: &Response) -> End {
    match response.status {
        200 => End::Whole,
        503 if response.header("retry-after").is_some() => End::Retryable,
        _ => panic!("{}: {}", response.status, response.text()),
    }
}

/// Starts streamed and unstreamed requests, runs `during` once every one of them is in a worker, and judges all.
fn while_requests_run(cluster: &Cluster, during: impl FnOnce()) -> Vec<End> {
    const STREAMS: usize = 6;
    const WHOLES: usize = 6;
    let client = cluster.client();
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for i in 0..STREAMS + WHOLES {
            let (client, begun) = (&client, &begun);
            threads.push(scope.spawn(move || {
                if i < STREAMS {
                    let answer = client.stream(CHAT, &body(TOKENS, true)).unwrap();
                    begun.fetch_add(1, Ordering::Relaxed);
                    judge_stream(&answer.transcript().unwrap())
                } else {
                    judge_response(&client.post(CHAT, &body(TOKENS, false)).unwrap())
                }
            }));
        }
        until_true("every request to run", SOON, || {
            let requests = cluster.admin().json(&["requests", "list"]).unwrap();
            let all = requests["requests"].as_array().map_or(0, Vec::len);
            let with_tokens =
                requests["requests"].as_array().into_iter().flatten().filter(|r| r["tokens"] != 0).count();
            begun.load(Ordering::Relaxed) == STREAMS && all == STREAMS + WHOLES && with_tokens == all
        });
        during();
        threads.into_iter().map(|t| t.join().expect("a client was answered well")).collect()
    })
}

fn count(ends: &[End]) -> (usize, usize) {
    let whole = ends.iter().filter(|end| matches!(end, End::Whole)).count();
    (whole, ends.len() - whole)
}

fn short(client: &Client) -> Response {
    client.post(CHAT, &body(2, false)).unwrap()
}

#[test]
fn a_killed_worker_costs_only_what_ran_in_it() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::echo(1, 2).start();
    cluster.deploy_echo("slow", 2, 5, 50);
    let victim = cluster.workers("slow").remove(0);
    let client = cluster.client();
    let ends = while_requests_run(&cluster, || {
        process::kill_hard(victim.pid);
        for i in 0..10 {
            let response = short(&client);
            assert_eq!(response.status, 200, "request {i} after the kill: {}", response.text());
        }
    });
    let (whole, retryable) = count(&ends);
    assert!(whole > 0 && retryable > 0, "both workers had requests: {ends:?}");
    cluster.wait_successor(&victim);
    cluster.admin().wait_ready("slow", 2);
    assert_eq!(short(&client).status, 200);
    every_turn_is_closed(&cluster, ends.len() + 11);
    cluster.finish(&["worker failed and will be started again"]);
}

#[test]
fn a_killed_agent_costs_only_what_ran_on_it() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::echo(1, 2).start();
    cluster.deploy_echo("slow", 2, 5, 50);
    let victim = cluster.processes("agent").remove(0);
    let orphans: Vec<Process> =
        cluster.processes("worker").into_iter().filter(|p| p.agent.as_deref() == Some(&victim.id)).collect();
    assert!(!orphans.is_empty(), "the agent has workers");
    let client = cluster.client();
    let mut asked = 0;
    let ends = while_requests_run(&cluster, || {
        process::kill_hard(victim.pid);
        // Until the silence of the dead agent is noticed, a request may be sent there: it is served by another or
        // refused with a time to try again, and never lost.
        for _ in 0..10 {
            asked += 1;
            judge_response(&short(&client));
        }
    });
    let (whole, retryable) = count(&ends);
    assert!(whole > 0 && retryable > 0, "both agents had requests: {ends:?}");
    until_true("the dead agent's workers to end", SOON, || orphans.iter().all(|worker| !process::runs(worker.pid)));
    cluster.wait_successor(&victim);
    cluster.admin().wait_ready("slow", 2);
    for _ in 0..10 {
        asked += 1;
        assert_eq!(short(&client).status, 200);
    }
    every_turn_is_closed(&cluster, ends.len() + asked);
    cluster.finish(&[]);
}

/// A refused request need not be a turn; one that ran is, once.
fn every_turn_is_closed(cluster: &Cluster, asked: usize) {
    izar_tests::waiting::until("every turn to be closed", SOON, || {
        let turns = cluster.admin().turns_by_id()?;
        let open = turns.values().filter(|t| t.outcome == "running").count();
        anyhow::ensure!(open == 0, "{open} open turns");
        anyhow::ensure!(turns.len() <= asked, "{} turns of {asked} requests", turns.len());
        Ok(())
    });
}
