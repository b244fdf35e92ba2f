//! A client that may ask twice gets one answer: `Idempotency-Key`, on any controller, also after one was killed.

use izar_tests::client::{Client, Response};
use izar_tests::cluster::Options;
use izar_tests::process;
use izar_tests::waiting::{SOON, until};
use serde_json::{Value, json};

/// Two seconds' worth.
const TOKENS: u64 = 40;

fn body(say: &str) -> Value {
    let messages = json!([{ "role": "user", "content": say }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": TOKENS, "temperature": 1 })
}

/// Asks, and asks again while the first request still runs and cannot be read along.
fn ask(client: &Client, name: &str, say: &str) -> Response {
    until("an answer", SOON, || {
        let answer = client.with_header("idempotency-key", name).post("/v1/chat/completions", &body(say))?;
        let code = if answer.status == 200 { Value::Null } else { answer.json()["error"]["code"].clone() };
        anyhow::ensure!(code != "idempotency_in_progress" && code != "unavailable", "{code}");
        Ok(answer)
    })
}

fn same(one: &Response, two: &Response) {
    assert_eq!((one.status, two.status), (200, 200), "{} {}", one.text(), two.text());
    assert_eq!(one.body, two.body);
    assert_eq!(one.header("x-request-id"), two.header("x-request-id"));
}

#[test]
fn a_request_that_is_asked_twice_has_one_answer_and_one_record_whatever_dies() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 50, 50);
    cluster.wait_serving(3, "slow", 2);
    let clients = cluster.clients();
    let (one, two) = (&clients[0].1, &clients[1].1);

    // At once, on two controllers; and afterwards.
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| ask(one, "a", "Count."));
        (ask(two, "a", "Count."), first.join().unwrap())
    });
    same(&first, &second);
    same(&first, &ask(two, "a", "Count."));
    let other = one.with_header("idempotency-key", "a").post("/v1/chat/completions", &body("Count!")).unwrap();
    assert_eq!((other.status, other.json()["error"]["code"].as_str()), (422, Some("idempotency_mismatch")));

    // Its controller dies in the middle of the answer: another one gives it, and records it.
    let victim = cluster.processes("controller").into_iter().find(|c| c.id == clients[0].0).unwrap();
    let admin = cluster.admins().into_iter().find(|(id, _)| *id == victim.id).unwrap().1;
    std::thread::scope(|scope| {
        let broken =
            scope.spawn(|| one.with_header("idempotency-key", "b").post("/v1/chat/completions", &body("Count on.")));
        until("the answer to begin", SOON, || {
            let requests = admin.json(&["requests", "list"])?;
            let answering = requests["requests"].as_array().into_iter().flatten().any(|r| r["state"] == "answering");
            anyhow::ensure!(answering, "{requests}");
            Ok(())
        });
        process::kill_hard(victim.pid);
        assert!(broken.join().unwrap().is_err(), "its answer is lost");
    });
    let again = ask(two, "b", "Count on.");
    assert_eq!(again.header("idempotent-replayed"), Some("true"), "{}", again.text());
    cluster.wait_successor(&victim);
    cluster.wait_serving(3, "slow", 2);
    let returned = &cluster.clients()[0].1;
    same(&again, &ask(returned, "b", "Count on."));
    same(&first, &ask(returned, "a", "Count."));

    // The agents forget: it is computed again, bit for bit.
    for agent in cluster.processes("agent") {
        cluster.kill_and_wait(&agent);
    }
    cluster.wait_serving(3, "slow", 2);
    same(&first, &ask(returned, "a", "Count."));
    until("every turn to be closed", SOON, || {
        let turns = cluster.admins()[1].1.turns_by_id()?;
        let ended: Vec<&str> = turns.values().map(|turn| turn.outcome.as_str()).collect();
        anyhow::ensure!(ended == ["finished", "finished"], "{ended:?}");
        Ok(())
    });
    cluster.finish(&["agent is given up"]);
}
