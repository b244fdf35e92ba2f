//! A user asks, in every form that the API has, and the operator finds every request recorded once.

use std::collections::BTreeSet;

use izar_tests::cli::Turn;
use izar_tests::client::{Client, Transcript};
use izar_tests::cluster::{Cluster, Options};
use izar_tests::waiting::{SOON, until};
use serde_json::{Value, json};

fn chat(model: &str, more: Value) -> Value {
    let mut body = json!({ "model": model, "messages": [{ "role": "user", "content": "Tell me something." }] });
    for (name, value) in more.as_object().expect("an object of more fields") {
        body[name] = value.clone();
    }
    body
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Waits until every controller lists exactly the turns of `ids`, all closed, and the same; returns them.
fn recorded(cluster: &Cluster, ids: &BTreeSet<String>) -> Vec<Turn> {
    until("every controller to list every request once", SOON, || {
        let mut first = None;
        for (node, admin) in cluster.admins() {
            let turns = admin.turns_by_id()?;
            let listed: BTreeSet<String> = turns.keys().cloned().collect();
            anyhow::ensure!(listed == *ids, "{node} lists {} turns, the clients had {}", listed.len(), ids.len());
            let open = turns.values().filter(|t| t.outcome == "running").count();
            anyhow::ensure!(open == 0, "{node} has {open} open turns");
            let turns: Vec<Turn> = turns.into_values().collect();
            let same = first.get_or_insert_with(|| turns.clone());
            anyhow::ensure!(*same == turns, "{node} lists other turns than the first");
        }
        Ok(first.expect("there are controllers"))
    })
}

#[test]
fn chats_and_completions_are_answered_whole_and_streamed_and_recorded_once() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.wait_serving(3, "echo", 2);
    let mut ids = BTreeSet::new();
    for (node, client) in cluster.clients() {
        let text = whole_and_streamed_chats_agree(&client, &mut ids);
        stop_strings_end_an_answer(&client, &text, &mut ids);
        completions_are_answered(&client, &mut ids);
        the_small_routes_answer(&client);
        assert_eq!(client.get("/v1/nonsense").unwrap().status, 404, "{node}");
    }
    let turns = recorded(&cluster, &ids);
    assert!(turns.iter().all(|t| t.outcome == "finished" && t.completion_tokens > 0 && t.prompt_tokens > 0));
    let nodes: BTreeSet<&str> = turns.iter().map(|t| t.node.as_str()).collect();
    assert_eq!(nodes.len(), 3, "each controller took requests of its own");
    cluster.finish(&[]);
}

/// Returns the answer's text.
fn whole_and_streamed_chats_agree(client: &Client, ids: &mut BTreeSet<String>) -> String {
    let whole = client.post(CHAT, &chat("echo", json!({ "max_tokens": 12, "seed": 7 }))).unwrap();
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(ids.insert(whole.header("x-request-id").expect("every answer has an id").to_owned()));
    let answer = whole.json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "echo");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    let (prompt, total) = (usage["prompt_tokens"].as_u64().unwrap(), usage["total_tokens"].as_u64().unwrap());
    assert!(prompt > 0 && total == prompt + 12);

    let plain = stream(client, CHAT, &chat("echo", json!({ "max_tokens": 12, "seed": 7, "stream": true })), ids);
    assert_eq!((plain.text.as_str(), plain.finish.as_deref()), (whole.content().as_str(), Some("length")));
    assert!(plain.usage.is_none(), "usage was not asked for");
    assert!(plain.events.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == plain.events[0]["id"]));
    assert_eq!(plain.events[0]["choices"][0]["delta"]["role"], "assistant");

    let options = json!({ "max_tokens": 12, "seed": 7, "stream": true, "stream_options": { "include_usage": true } });
    let counted = stream(client, CHAT, &chat("echo", options), ids);
    assert_eq!((counted.text, counted.usage.as_ref()), (plain.text, Some(usage)));
    let last = counted.events.last().expect("there are events");
    assert_eq!(last["choices"], json!([]), "usage comes in an event of its own, the last");
    whole.content()
}

/// Reads a stream to its end, which must be a good one.
fn stream(client: &Client, path: &str, body: &Value, ids: &mut BTreeSet<String>) -> Transcript {
    let answer = client.stream(path, body).unwrap();
    assert!(answer.header("content-type").is_some_and(|t| t.starts_with("text/event-stream")));
    let transcript = answer.transcript().unwrap();
    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    assert!(ids.insert(transcript.request_id.clone()), "an id was given twice");
    transcript
}

/// The stop string lies across the border of two tokens: no half of it may come out.
fn stop_strings_end_an_answer(client: &Client, text: &str, ids: &mut BTreeSet<String>) {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let (left, right) = (words[3], words[4]);
    let stop = format!("{} {}", &left[left.len() - 1..], &right[..1]);
    let before = &text[..text.find(&stop).expect("the stop string is in the text")];
    for streamed in [false, true] {
        let more = json!({ "max_tokens": 12, "seed": 7, "stop": ["never said", stop], "stream": streamed });
        let (content, finish) = if streamed {
            let transcript = stream(client, CHAT, &chat("echo", more), ids);
            (transcript.text, transcript.finish.unwrap_or_default())
        } else {
            let response = client.post(CHAT, &chat("echo", more)).unwrap();
            assert!(ids.insert(response.header("x-request-id").unwrap_or_default().to_owned()));
            let finish = response.json()["choices"][0]["finish_reason"].as_str().unwrap_or_default().to_owned();
            (response.content(), finish)
        };
        assert_eq!((content.as_str(), finish.as_str()), (before, "stop"), "streamed: {streamed}, stop: {stop:?}");
    }
}

fn completions_are_answered(client: &Client, ids: &mut BTreeSet<String>) {
    let body = json!({ "model": "echo", "prompt": "Once upon a time, 在很久以前, 🦊", "max_tokens": 5, "seed": 1 });
    let whole = client.post(COMPLETIONS, &body).unwrap();
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(ids.insert(whole.header("x-request-id").unwrap_or_default().to_owned()));
    let answer = whole.json();
    assert_eq!(
        (answer["object"].as_str(), answer["usage"]["completion_tokens"].as_u64()),
        (Some("text_completion"), Some(5))
    );
    assert_eq!(answer["usage"]["prompt_tokens"], "Once upon a time, 在很久以前, 🦊".len(), "echo counts bytes");
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let transcript = stream(client, COMPLETIONS, &streamed, ids);
    assert_eq!(Some(transcript.text.as_str()), answer["choices"][0]["text"].as_str());
}

fn the_small_routes_answer(client: &Client) {
    let models = client.get("/v1/models").unwrap();
    assert_eq!((models.status, models.json()["data"][0]["id"].as_str()), (200, Some("echo")));
    assert!(models.header("x-request-id").is_some(), "every answer has an id");
    let stranger = client.with_key(None);
    assert_eq!(stranger.get("/healthz").unwrap().status, 200);
    assert_eq!(stranger.get("/readyz").unwrap().status, 200);
    let metrics = stranger.get("/metrics").unwrap();
    assert!(
        metrics.status == 200 && metrics.text().lines().any(|line| line.starts_with("izar_")),
        "{}",
        metrics.text()
    );
}

#[test]
fn a_client_that_leaves_cancels_the_computation_and_not_the_record() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(1, 1).start();
    cluster.deploy_echo("slow", 1, 5, 50);
    let client = cluster.client();
    let mut answer = client.stream(CHAT, &chat("slow", json!({ "max_tokens": 1000, "stream": true }))).unwrap();
    let streamed = answer.header("x-request-id").expect("every answer has an id").to_owned();
    for _ in 0..3 {
        answer.event().unwrap().expect("the stream goes on");
    }
    let requests = cluster.admin().json(&["requests", "list"]).unwrap();
    assert_eq!(requests["requests"][0]["turn"], streamed.as_str(), "{requests}");
    drop(answer);
    // The second one leaves before its answer has begun.
    leave_while_computing(&client, &cluster);

    until("both to be recorded as cancelled", SOON, || {
        let turns = cluster.admin().turns_by_id()?;
        let cancelled = turns.values().filter(|t| t.outcome == "cancelled" && t.completion_tokens < 1000).count();
        anyhow::ensure!(turns.len() == 2 && cancelled == 2, "{turns:?}");
        anyhow::ensure!(turns.contains_key(&streamed), "the streamed one is not there");
        Ok(())
    });
    until("the worker to be idle", SOON, || {
        let agents = cluster.admin().json(&["agents", "list"])?;
        let workers = agents["agents"][0]["workers"].as_array().cloned().unwrap_or_default();
        let running: u64 = workers.iter().map(|w| w["load"]["running"].as_u64().unwrap_or(1)).sum();
        anyhow::ensure!(workers.len() == 2 && running == 0, "{agents}");
        Ok(())
    });
    until("no request to run", SOON, || {
        let requests = cluster.admin().json(&["requests", "list"])?;
        anyhow::ensure!(requests["requests"] == json!([]), "{requests}");
        Ok(())
    });
    cluster.finish(&[]);
}

/// Sends an unstreamed request and closes the connection once the controller runs it.
fn leave_while_computing(client: &Client, cluster: &Cluster) {
    use std::io::Write;
    let body = chat("slow", json!({ "max_tokens": 1000 })).to_string();
    let mut connection = client.connect().unwrap();
    let key = client.key().expect("the cluster has a key");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: izar\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.flush().unwrap();
    until("the unstreamed request to run", SOON, || {
        let requests = cluster.admin().json(&["requests", "list"])?;
        let unstreamed = requests["requests"].as_array().into_iter().flatten().filter(|r| r["stream"] == false).count();
        anyhow::ensure!(unstreamed == 1, "{requests}");
        Ok(())
    });
}
