//! Stories of single requests, told by the bytes that a client sees and by the record that stays.

mod queued;
mod world;

use std::sync::atomic::Ordering::Relaxed;

use izar_common::chat::{Finish, Usage};
use izar_common::id::NumericsId;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::gateway::Limits;
use crate::gateway::cursor::Cursor;
use crate::gateway::running::Stage;
use crate::state::command::Command;
use crate::state::turns::{Outcome, Turn};
use world::{CACHED_TOKENS, KEY, LIMIT, MAX_CONCURRENT, OTHER_KEY, Response, World, chat_body, until};

fn finished(usage: Usage) -> Outcome {
    Outcome::Finished { finish: Finish::Stop, usage, inexact: false, numerics: None }
}

/// Tokens of the prompt `user: say\n` in the echo model.
const SAY_TOKENS: u32 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_comes_whole_or_streamed_and_is_recorded_once() {
    let world = World::start(Limits::default()).await;
    let whole = world.chat("say", json!({})).await;
    assert_eq!(whole.status, 200, "{whole:?}");
    assert_eq!(whole.json()["choices"][0]["message"]["content"], "one two");
    let cached = json!({"cached_tokens": CACHED_TOKENS});
    let usage = json!({"prompt_tokens": SAY_TOKENS, "prompt_tokens_details": cached, "completion_tokens": 7,
        "total_tokens": 17});
    assert_eq!(whole.json()["usage"], usage);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let streamed = world.chat("say", options).await;
    assert_eq!((streamed.status, streamed.streamed_text().as_str()), (200, "one two"), "{streamed:?}");
    assert!(streamed.head.contains("content-type: text/event-stream"), "{}", streamed.head);
    assert_eq!(streamed.events().last(), Some(&"[DONE]"));
    assert!(streamed.events().iter().any(|data| data.contains(r#""usage":{"prompt_tokens":10"#)), "{streamed:?}");

    let turns = world.closed(2).await;
    let usage = Usage { prompt_tokens: SAY_TOKENS, cached_tokens: CACHED_TOKENS, completion_tokens: 7 };
    // Within a millisecond they have no order.
    for (answer, stream) in [(&streamed, true), (&whole, false)] {
        let named = |turn: &&Turn| answer.head.contains(&format!("x-request-id: {}", turn.opening.turn));
        let turn = turns.iter().find(named).expect("the answer names its turn");
        assert_eq!(turn.closed.as_ref().unwrap().1, finished(usage));
        assert_eq!(turn.opening.stream, stream);
    }
    until("nothing to run", || world.gateway.running().is_empty()).await;
    let page = world.ask("GET", "/metrics", None, "").await.body;
    for line in [
        r#"izar_requests_total{dialect="openai",route="/v1/chat/completions",code="200"} 2"#,
        r#"izar_tokens_total{kind="completion",deployment="echo"} 14"#,
        r#"izar_tokens_total{kind="prompt",deployment="echo"} 20"#,
        r#"izar_time_to_first_token_seconds_count{deployment="echo"} 2"#,
        r#"izar_turns_total{outcome="finished"} 2"#,
        "izar_admission_seconds_count 2",
        "izar_commit_seconds_count 2",
        "izar_worker_first_token_seconds_count 2",
        "izar_ending_seconds_count 2",
        "izar_running_requests 0",
        "izar_raft_leader 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_strings_and_plain_completions_work_and_models_are_listed() {
    let world = World::start(Limits::default()).await;
    let stopped = world.chat("say", json!({"stop": "tw", "stream": true})).await;
    assert_eq!(stopped.streamed_text(), "one ");
    assert!(stopped.body.contains(r#""finish_reason":"stop""#), "{stopped:?}");
    let body = json!({"model": "echo", "prompt": ["say"]}).to_string();
    let plain = world.ask("POST", "/v1/completions", Some(KEY), &body).await;
    assert_eq!(plain.json()["choices"][0]["text"], "one two", "{plain:?}");
    let models = world.ask("GET", "/v1/models", Some(KEY), "").await.json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("echo"), &json!(1000)));
    assert_eq!(world.ask("GET", "/v1/models/echo", Some(KEY), "").await.json()["id"], "echo");
    assert_eq!(world.ask("GET", "/v1/models/other", Some(KEY), "").await.status, 404);
    assert_eq!(world.ask("GET", "/readyz", None, "").await.json()["ready"], true);
    assert_eq!(world.ask("GET", "/healthz", None, "").await.status, 200);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_choices_are_told_apart_mended_one_by_one_and_recorded_as_one_turn() {
    let world = World::start(Limits::default()).await;
    let ask = json!({"n": 3, "logprobs": true, "top_logprobs": 1});
    let body = chat_body("choice", ask.clone());
    let asked = world.send("POST", "/v1/chat/completions", Some(KEY), &body).await;
    until("the others to end", || world.gateway.running().iter().any(|turn| turn.tokens == 4)).await;
    world.go.notify_one();
    let whole = Response::read(asked).await;
    let choices = whole.json()["choices"].clone();
    let said: Vec<_> = choices.as_array().unwrap().iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(said, ["0", "1!", "2!"], "{whole:?}");
    assert_eq!(choices[2]["index"], 2);
    assert_eq!(choices[1]["logprobs"]["content"][1]["token"], "!", "{whole:?}");
    assert_eq!(choices[1]["logprobs"]["content"][1]["top_logprobs"][0]["bytes"], json!([33]));
    let prompt = u64::from(SAY_TOKENS) + 3;
    let cached = json!({"cached_tokens": CACHED_TOKENS});
    let usage = json!({"prompt_tokens": prompt, "prompt_tokens_details": cached, "completion_tokens": 5,
        "total_tokens": prompt + 5});
    assert_eq!(whole.json()["usage"], usage);

    let mut options = ask;
    options["stream"] = json!(true);
    options["stream_options"] = json!({"include_usage": true});
    world.go.notify_one();
    let streamed = world.chat("choice", options).await;
    let mut said = [String::new(), String::new(), String::new()];
    let mut ends = 0;
    for data in streamed.events().into_iter().filter(|data| *data != "[DONE]") {
        let event: serde_json::Value = serde_json::from_str(data).unwrap();
        let choice = &event["choices"][0];
        let Some(index) = choice["index"].as_u64() else { continue };
        said[index as usize] += choice["delta"]["content"].as_str().unwrap_or_default();
        ends += usize::from(choice["finish_reason"].is_string());
    }
    assert_eq!((said, ends), (["0".to_owned(), "1!".to_owned(), "2!".to_owned()], 3), "{streamed:?}");
    assert!(streamed.body.contains(&format!(r#""usage":{usage}"#)), "{streamed:?}");
    assert_eq!(world.gateway.metrics().placed_again.get(), 6);
    let usage = Usage { prompt_tokens: SAY_TOKENS + 3, cached_tokens: CACHED_TOKENS, completion_tokens: 5 };
    for turn in world.closed(2).await {
        assert_eq!(turn.closed.as_ref().unwrap().1, finished(usage));
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_is_not_recorded() {
    let world = World::start(Limits::default()).await;
    let check = |answer: Response, status: u16, param: &str, words: &str| {
        assert_eq!((answer.status, answer.error("param").as_str()), (status, param), "{answer:?}");
        assert!(answer.error("message").contains(words), "{answer:?}");
        assert!(answer.head.contains("x-request-id: turn_"), "{answer:?}");
    };
    let path = "/v1/chat/completions";
    check(world.ask("POST", path, None, &chat_body("say", json!({}))).await, 401, "", "no API key");
    check(world.ask("POST", path, Some("wrong"), &chat_body("say", json!({}))).await, 401, "", "wrong or revoked");
    check(world.ask("GET", "/v1/models", Some("wrong"), "").await, 401, "", "wrong or revoked");
    check(world.ask("POST", path, Some(KEY), "{\"model\"").await, 400, "", "not valid JSON");
    check(world.chat("say", json!({"model": "gpt-9"})).await, 404, "model", "there are: echo");
    check(world.chat("say", json!({"temperature": 3})).await, 400, "temperature", "from 0 to 2");
    let long = world.chat("say", json!({"max_tokens": 991})).await;
    assert_eq!(long.error("code"), "context_length_exceeded");
    check(long, 400, "max_tokens", "context is 1000 tokens; the prompt has 10 and max_tokens is 991");
    check(world.chat(&"x".repeat(5000), json!({})).await, 400, "max_tokens", "the prompt has 5007");
    let bias = json!({"logit_bias": {"512": 1}});
    check(world.chat("say", bias).await, 400, "logit_bias", "the vocabulary ends at 512");
    let format = json!({"response_format": {"type": "json_object"}});
    check(world.chat("say", format).await, 400, "response_format", "no end token");
    let tokens = json!({"model": "echo", "prompt": [7, 99999]}).to_string();
    check(world.ask("POST", "/v1/completions", Some(KEY), &tokens).await, 400, "prompt", "99999");
    assert!(world.turns().is_empty());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_is_refused_from_then_on() {
    let world = World::start(Limits::default()).await;
    assert_eq!(world.chat("say", json!({})).await.status, 200);
    world.raft.propose(Command::RevokeKey("k1".parse().unwrap())).await.unwrap();
    assert_eq!(world.chat("say", json!({})).await.status, 401);
    assert_eq!(world.closed(1).await.len(), 1);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_cancels_the_work_but_not_the_record() {
    let mut world = World::start(Limits::default()).await;
    for stream in [true, false] {
        let body = chat_body("hold", json!({"stream": stream}));
        let client = world.send("POST", "/v1/chat/completions", Some(KEY), &body).await;
        until("the first token", || world.gateway.running().iter().any(|turn| turn.state == Stage::Answering)).await;
        let running = world.gateway.running();
        assert_eq!((running[0].tokens, running[0].stream), (3, stream));
        assert_eq!(running[0].agent.as_ref().unwrap().as_str(), "a1");
        drop(client);
        let cancelled = tokio::time::timeout(LIMIT, world.cancelled.recv()).await.unwrap().unwrap();
        assert_eq!(cancelled, running[0].turn);
        let turns = world.closed(1 + usize::from(!stream)).await;
        let usage = Usage { prompt_tokens: SAY_TOKENS + 1, cached_tokens: 0, completion_tokens: 3 };
        assert_eq!(turns[0].closed.as_ref().unwrap().1, Outcome::Cancelled { usage });
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_runs_no_more_requests_at_once_than_it_may() {
    let world = World::start(Limits::default()).await;
    let body = chat_body("hold", json!({"stream": true}));
    let mut running = Vec::new();
    for count in 1..=MAX_CONCURRENT as usize {
        running.push(world.send("POST", "/v1/chat/completions", Some(KEY), &body).await);
        until("the request", || world.gateway.running().len() == count).await;
    }
    let refused = world.chat("say", json!({})).await;
    assert_eq!((refused.status, refused.error("code").as_str()), (429, "rate_limit_exceeded"), "{refused:?}");
    assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
    until("both jobs", || world.gateway.running().iter().all(|turn| turn.state == Stage::Answering)).await;
    world.go.notify_waiters();
    for stream in running {
        assert_eq!(Response::read(stream).await.streamed_text(), "one");
    }
    // The place is free when the answer has ended, not some time after.
    assert_eq!(world.chat("say", json!({})).await.status, 200);
    world.closed(MAX_CONCURRENT as usize + 1).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_after_every_token_goes_on_and_nobody_can_tell() {
    let world = World::start(Limits::default()).await;
    let streamed = world.chat("torn", json!({"stream": true})).await;
    assert_eq!((streamed.status, streamed.streamed_text().as_str()), (200, "one two"), "{streamed:?}");
    let stopped = world.chat("torn", json!({"stream": true, "stop": "tw"})).await;
    assert_eq!(stopped.streamed_text(), "one ");
    let whole = world.chat("torn", json!({})).await;
    assert_eq!(whole.json()["choices"][0]["message"]["content"], "one two", "{whole:?}");
    assert_eq!(world.gateway.metrics().placed_again.get(), 7 + 5 + 7);
    for turn in world.closed(3).await {
        assert!(matches!(turn.closed, Some((_, Outcome::Finished { inexact: false, .. }))), "{turn:?}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_after_any_event_for_who_repeats_the_request() {
    let world = World::start(Limits::default()).await;
    let ask = json!({"stream": true, "n": 1});
    let all = world.chat("say", ask.clone()).await;
    let ids = all.ids();
    assert_eq!((all.streamed_text().as_str(), ids.len()), ("one two", 8), "seven letters and the end: {all:?}");
    for (had, id) in (1..).zip(&ids) {
        let rest = world.chat_after(id, KEY, "say", ask.clone()).await;
        assert_eq!(rest.streamed_text(), "one two"[had.min(7)..], "{rest:?}");
        assert_eq!(rest.ids(), ids[had..], "{rest:?}");
        assert_eq!(rest.events().last(), Some(&"[DONE]"));
        let turn =
            |response: &Response| response.head.lines().find(|l| l.starts_with("x-request-id")).map(str::to_owned);
        assert_eq!(turn(&rest), turn(&all), "it is the same turn");
    }
    let other = world.chat_after(ids[0], KEY, "say it", ask.clone()).await;
    assert_eq!((other.status, other.error("code").as_str()), (409, "unknown_stream"), "another request: {other:?}");
    let forged = ids[0].replacen(|digit: char| digit != '0', "0", 1);
    let forged = world.chat_after(&forged, KEY, "say", ask.clone()).await;
    assert_eq!((forged.status, forged.error("code").as_str()), (409, "unknown_stream"), "{forged:?}");
    let whole = world.chat_after(ids[0], KEY, "say", json!({})).await;
    assert_eq!(whole.status, 400, "{whole:?}");
    assert_eq!(world.closed(1).await.len(), 1, "one turn, recorded once");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_say_when_something_else_went_on_with_an_answer() {
    let world = World::start(Limits::default()).await;
    let computed_by = async |id: u64| {
        world.numerics.store(id, Relaxed);
        until("the worker's word", || {
            let fleet = world.gateway.agents.fleet();
            let mut workers = fleet.agents.values().flat_map(|agent| agent.workers());
            workers.any(|worker| worker.numerics == Some(NumericsId(id)))
        })
        .await;
    };
    computed_by(1).await;
    let stream =
        world.send("POST", "/v1/chat/completions", Some(KEY), &chat_body("move", json!({"stream": true}))).await;
    until("the first word", || world.gateway.running().iter().any(|turn| turn.state == Stage::Answering)).await;
    computed_by(2).await;
    world.go.notify_one();
    let all = Response::read(stream).await;
    assert_eq!(all.streamed_text(), "one two", "{all:?}");
    let by: Vec<_> = all.ids().iter().map(|id| id.parse::<Cursor>().unwrap().numerics).collect();
    let (one, several) = (Some(NumericsId(1)), Some(NumericsId::SEVERAL));
    assert_eq!(by, [one, one, one, several, several, several, several, several]);
    let turn = world.closed(1).await.remove(0);
    let recorded = turn.closed.unwrap().1;
    assert!(
        matches!(recorded, Outcome::Finished { inexact: true, numerics, .. } if numerics == several),
        "{recorded:?}"
    );
    assert_eq!(world.gateway.metrics().inexact_moves.get(), 1);
    // Computed again from the beginning, by what the first events are not from.
    world.numerics.store(2, Relaxed);
    let rest = world.chat_after(all.ids()[0], KEY, "move", json!({"stream": true}));
    let go = async {
        until("the first word", || world.gateway.running().iter().any(|turn| turn.tokens == 3)).await;
        world.go.notify_one();
    };
    let (rest, ()) = tokio::join!(rest, go);
    let by: Vec<_> = rest.ids().iter().map(|id| id.parse::<Cursor>().unwrap().numerics).collect();
    assert_eq!(by, [several; 7], "{rest:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_by_its_event_id_alone_for_the_key_that_began_it() {
    let world = World::start(Limits::default()).await;
    let all = world.chat("say", json!({"stream": true, "stream_options": {"include_usage": true}})).await;
    let ids = all.ids();
    let read_on = |id: &str, key: &str| {
        let (path, key) = (format!("/v1/streams/{id}"), key.to_owned());
        let world = &world;
        async move { world.ask("GET", &path, Some(&key), "").await }
    };
    for (had, id) in (1..).zip(&ids) {
        let rest = read_on(id, KEY).await;
        assert_eq!((rest.status, rest.ids()), (200, ids[had..].to_vec()), "{rest:?}");
        let after = all.body.split_once(&format!("id: {id}\n")).unwrap().1.split_once("\n\n").unwrap().1;
        assert_eq!(rest.body, after, "every byte that followed");
        assert_eq!(rest.turn(), all.turn());
    }
    // What a browser's EventSource sends when it connects again.
    let newer = read_on(ids[0], &format!("{KEY}\r\nlast-event-id: {}", ids[5])).await;
    assert_eq!(newer.ids(), ids[6..], "{newer:?}");
    let refused = |answer: Response, words: &str| {
        assert_eq!((answer.status, answer.error("code").as_str()), (409, "unknown_stream"), "{answer:?}");
        assert!(answer.error("message").contains(words), "{answer:?}");
    };
    refused(read_on(ids[0], OTHER_KEY).await, "repeat the POST");
    let unknown = ids[0].replacen(|digit: char| digit != '0', "0", 1);
    refused(read_on(&unknown, KEY).await, "repeat the POST");
    let (turn, rest) = ids[0].split_at(33);
    let seal = rest.replacen(|digit: char| digit != '0', "0", 1);
    refused(read_on(&format!("{turn}{seal}"), KEY).await, "not the one that was begun");
    refused(read_on("nonsense", KEY).await, "names no stream");
    let long = json!({"stream": true, "user": "x".repeat(70_000)});
    let long = world.chat("say", long).await;
    refused(read_on(long.ids()[0], KEY).await, "too long");
    let nobody = world.ask("GET", &format!("/v1/streams/{}", ids[0]), None, "").await;
    assert_eq!(nobody.status, 401, "{nobody:?}");
    let mixed = read_on(ids[0], &format!("{KEY}\r\nlast-event-id: {}", long.ids()[0])).await;
    assert_eq!((mixed.status, mixed.error("param").as_str()), (400, "Last-Event-ID"), "{mixed:?}");
    assert_eq!(world.closed(2).await.len(), 2, "each turn is recorded once");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_an_idempotency_key_has_one_turn_and_one_answer() {
    let world = World::start(Limits::default()).await;
    for stream in [false, true] {
        let (name, ask) = (format!("order-{stream}"), json!({"stream": stream}));
        let first = world.chat_once(&name, "say", ask.clone()).await;
        assert!(first.status == 200 && !first.head.contains("idempotent-replayed"), "{first:?}");
        for _ in 0..2 {
            let again = world.chat_once(&name, "say", ask.clone()).await;
            assert_eq!((again.status, &again.body, again.turn()), (200, &first.body, first.turn()));
            assert!(again.head.contains("idempotent-replayed: true"), "{again:?}");
        }
        let other = world.chat_once(&name, "say it", ask.clone()).await;
        assert_eq!((other.status, other.error("code").as_str()), (422, "idempotency_mismatch"), "{other:?}");
    }
    let bad = world.chat_once("two words", "say", json!({})).await;
    assert_eq!((bad.status, bad.error("param").as_str()), (400, "Idempotency-Key"), "{bad:?}");
    let (one, two) = tokio::join!(world.chat_once("c", "say", json!({})), world.chat_once("c", "say", json!({})));
    assert_eq!((one.status, &one.body, one.turn()), (200, &two.body, two.turn()), "whichever came first");
    let turns = world.closed(3).await;
    assert!(turns.iter().all(|turn| turn.closed.as_ref().unwrap().1
        == finished(Usage { prompt_tokens: 10, cached_tokens: CACHED_TOKENS, completion_tokens: 7 })));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_waits_for_the_first_and_runs_what_came_to_nothing_again() {
    let world = World::start(Limits::default()).await;
    let body = chat_body("hold", json!({}));
    let key = format!("{KEY}\r\nidempotency-key: h");
    let first = world.send("POST", "/v1/chat/completions", Some(&key), &body).await;
    until("the first token", || world.gateway.running().iter().any(|turn| turn.state == Stage::Answering)).await;
    let second = world.chat_once("h", "hold", json!({})).await;
    assert_eq!((second.status, second.error("code").as_str()), (409, "idempotency_in_progress"), "{second:?}");
    assert!(second.head.contains("retry-after: 1"), "{second:?}");
    world.go.notify_one();
    let first = Response::read(first).await;
    assert_eq!(first.status, 200, "{first:?}");
    world.go.notify_one();
    let third = world.chat_once("h", "hold", json!({})).await;
    assert_eq!((&third.body, third.turn()), (&first.body, first.turn()));
    for _ in 0..2 {
        let broken = world.chat_once("b", "broken", json!({})).await;
        assert_eq!(broken.status, 500, "{broken:?}");
    }
    let turns = world.closed(2).await;
    assert!(matches!(turns[0].closed, Some((_, Outcome::Failed { .. }))), "it may be asked again: {turns:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_drains_says_so_and_serves_on() {
    let world = World::start(Limits::default()).await;
    let ready = async || world.ask("GET", "/readyz", None, "").await;
    assert_eq!(ready().await.status, 200);
    world.gateway.drain(true);
    let answer = ready().await;
    assert!(answer.status == 503 && answer.body.contains("this controller is draining"), "{answer:?}");
    assert_eq!(world.chat("say", json!({})).await.status, 200);
    world.gateway.drain(false);
    assert_eq!(ready().await.status, 200);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_before_its_first_token_is_placed_again() {
    let world = World::start(Limits::default()).await;
    for stream in [true, false] {
        let answer = world.chat("flaky", json!({"stream": stream})).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(world.gateway.metrics().placed_again.get(), 4);
    let turns = world.closed(2).await;
    assert!(turns.iter().all(|turn| matches!(turn.closed, Some((_, Outcome::Finished { .. })))));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_is_a_status_before_the_first_byte_and_an_event_after_it() {
    let world = World::start(Limits::default()).await;
    let late = world.chat("half", json!({"stream": true})).await;
    assert_eq!((late.status, late.streamed_text().as_str()), (200, "one"), "{late:?}");
    let last: serde_json::Value = serde_json::from_str(late.events().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "interrupted");
    let whole = world.chat("half", json!({})).await;
    assert_eq!((whole.status, whole.error("code").as_str()), (503, "interrupted"), "{whole:?}");
    assert!(whole.head.contains("retry-after: 1"), "{whole:?}");
    for stream in [true, false] {
        let broken = world.chat("broken", json!({"stream": stream})).await;
        assert_eq!((broken.status, broken.error("code").as_str()), (500, "internal_error"), "{broken:?}");
    }
    let turns = world.closed(4).await;
    assert!(turns.iter().all(|turn| matches!(turn.closed, Some((_, Outcome::Failed { .. })))));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_says_nothing_is_given_up() {
    let mut world = World::start(Limits { worker_silence_ms: 200, ..Limits::default() }).await;
    let answer = world.chat("silent", json!({"stream": true})).await;
    assert_eq!((answer.status, answer.error("code").as_str()), (503, "interrupted"), "{answer:?}");
    assert!(answer.error("message").contains("gave nothing for 200 ms"), "{answer:?}");
    for _ in 0..super::turn::ATTEMPTS {
        tokio::time::timeout(LIMIT, world.cancelled.recv()).await.unwrap().unwrap();
    }
    world.closed(1).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_without_a_replica_gives_503_and_is_not_ready() {
    let world = World::start(Limits::default()).await;
    let mut deployment = world.raft.config().borrow().deployments["echo"].clone();
    deployment.id = "idle".parse().unwrap();
    deployment.replicas = 0;
    world.raft.propose(Command::Deploy(deployment)).await.unwrap();
    let answer = world.chat("say", json!({"model": "idle"})).await;
    assert_eq!((answer.status, answer.error("code").as_str()), (503, "no_replica_ready"), "{answer:?}");
    assert!(answer.head.contains("retry-after: 2"), "{answer:?}");
    assert!(world.turns().is_empty(), "what never began is not recorded");
    world.raft.propose(Command::Undeploy("echo".parse().unwrap())).await.unwrap();
    let ready = world.ask("GET", "/readyz", None, "").await;
    assert_eq!((ready.status, &ready.json()["ready"]), (503, &json!(false)), "{ready:?}");
    assert!(ready.body.contains("no replica of idle is ready"), "{ready:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_tells_clients_of_turns_that_take_too_long_and_records_them() {
    let world = World::start(Limits { shutdown_ms: 50, ..Limits::default() }).await;
    let mut stream =
        world.send("POST", "/v1/chat/completions", Some(KEY), &chat_body("hold", json!({"stream": true}))).await;
    until("the first token", || world.gateway.running().iter().any(|turn| turn.state == Stage::Answering)).await;
    world.shutdown();
    let mut text = String::new();
    tokio::time::timeout(LIMIT, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    assert!(text.contains(r#""code":"stopping""#), "{text}");
    let turns = world.closed(1).await;
    assert!(matches!(&turns[0].closed, Some((_, Outcome::Failed { reason, .. })) if reason.contains("stopping")));
    world.stop().await;
}
