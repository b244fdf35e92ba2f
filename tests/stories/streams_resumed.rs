//! A controller is killed while it streams: its clients repeat their requests elsewhere, or name the last event alone, and
//! read on, exactly once.

use izar_tests::cli::Admin;
use izar_tests::client::{Answer, Client};
use izar_tests::cluster::Options;
use izar_tests::process;
use izar_tests::waiting::{SOON, until};
use serde_json::{Value, json};

/// Five seconds' worth.
const TOKENS: u64 = 100;

const CHAT: &str = "/v1/chat/completions";

/// Takes the wrapper's folder, the endpoints, the CA and the key; prints the answer.
const PROGRAM: &str = r#"
import ssl, sys, httpx
folder, endpoints, ca, key = sys.argv[1:]
sys.path.insert(0, folder)
from izar_streams import Streams
client = httpx.Client(verify=ssl.create_default_context(cafile=ca))
streams = Streams([url + "/v1" for url in endpoints.split(",")], api_key=key, http_client=client)
question = [{"role": "user", "content": "Count with me."}]
for chunk in streams.chat(model="slow", messages=question, max_tokens=100, n=1):
    print(chunk.choices[0].delta.content or "", end="")
"#;

fn body(n: u64) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": TOKENS, "stream": true, "n": n })
}

/// What each choice said, and the id of the last event.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    texts: Vec<String>,
    last_id: Option<String>,
    done: bool,
}

/// Listens until the end, or until the stream breaks off, and adds what is said to what was heard before.
fn listen(client: &Client, n: u64, heard: Heard) -> Heard {
    let answer = match &heard.last_id {
        None => client.stream(CHAT, &body(n)),
        Some(id) => client.stream_after(id, CHAT, &body(n)),
    };
    hear(answer, n, heard)
}

fn hear(answer: anyhow::Result<Answer>, n: u64, mut heard: Heard) -> Heard {
    heard.texts.resize(n as usize, String::new());
    let Ok(mut answer) = answer else { return heard };
    if answer.status != 200 {
        panic!("{}", answer.finish().unwrap().text());
    }
    while let Ok(Some(data)) = answer.event() {
        if data == "[DONE]" {
            heard.done = true;
            break;
        }
        let event: Value = serde_json::from_str(&data).unwrap();
        if !event["error"].is_null() {
            break;
        }
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap_or(0) as usize;
        heard.texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        heard.last_id.clone_from(&answer.last_id);
    }
    heard
}

/// Waits until a controller has so many requests, each in the middle of its answer.
fn answering(admin: &Admin, count: usize) {
    until("the answers to begin", SOON, || {
        let requests = admin.json(&["requests", "list"])?;
        let with_text = requests["requests"].as_array().into_iter().flatten().filter(|r| r["state"] == "answering");
        let with_text = with_text.count();
        anyhow::ensure!(with_text == count, "{with_text} of {count} are being answered");
        Ok(())
    });
}

#[test]
fn streams_of_a_killed_controller_go_on_on_another_exactly_once() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 50, 50);
    cluster.wait_serving(3, "slow", 2);
    let clients = cluster.clients();
    let victim = cluster.processes("controller").into_iter().find(|c| c.id == clients[0].0).unwrap();
    let (through, other) = (&clients[0].1, &clients[1].1);
    let expected: Vec<Heard> = (1..=2).map(|n| listen(other, n, Heard::default())).collect();
    let admin = cluster.admins().into_iter().find(|(id, _)| *id == victim.id).unwrap().1;
    let ready = cluster.ready();
    let endpoints: Vec<String> = clients.iter().map(|(_, client)| format!("https://{}", client.address())).collect();
    let tokens = TOKENS.to_string();
    let chat = [
        "chat",
        "--endpoint",
        &endpoints.join(","),
        "--ca",
        ready.ca.to_str().unwrap(),
        "--key",
        &ready.key,
        "--model",
        "slow",
        "--max-tokens",
        &tokens,
        "--once",
        "Count with me.",
    ];
    let wrapper = izar_tests::binaries::repository().join("clients/python");
    let python = [wrapper.to_str().unwrap(), &endpoints.join(","), ready.ca.to_str().unwrap(), &ready.key];
    let (broken, chatted, streamed): (Vec<(u64, Heard)>, _, _) = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| izar_tests::python::run(izar_tests::python::with_openai(), PROGRAM, &python));
        // It takes a while to begin; the others are quick.
        answering(&admin, 1);
        let chatting = scope.spawn(|| izar_tests::cli::run("izar", &chat));
        let listening: Vec<_> =
            (0..8).map(|i| (1 + i % 2, scope.spawn(move || listen(through, 1 + i % 2, Heard::default())))).collect();
        answering(&admin, 10);
        process::kill_hard(victim.pid);
        let broken = listening.into_iter().map(|(n, heard)| (n, heard.join().unwrap())).collect();
        (broken, chatting.join().unwrap(), streaming.join().unwrap())
    });
    assert_eq!(streamed.stdout, expected[0].texts[0], "so does the wrapper of the openai package: {}", streamed.stderr);
    assert_eq!(chatted.stdout.trim_end(), expected[0].texts[0], "izar chat reads on by itself: {}", chatted.stderr);
    for (i, (n, heard)) in broken.into_iter().enumerate() {
        assert!(!heard.done && heard.last_id.is_some(), "it broke off in the middle: {heard:?}");
        let whole = until("another controller to go on", SOON, || {
            let before = Heard { last_id: heard.last_id.clone(), texts: heard.texts.clone(), done: false };
            let whole = match (i % 4 < 2, &heard.last_id) {
                (true, Some(id)) => hear(other.read_on(id), n, before),
                _ => listen(other, n, before),
            };
            anyhow::ensure!(whole.done, "not at its end: {whole:?}");
            Ok(whole)
        });
        assert_eq!(whole.texts, expected[n as usize - 1].texts, "exactly once");
    }
    cluster.wait_successor(&victim);
    until("every turn to be closed", SOON, || {
        let turns = cluster.admins()[1].1.turns_by_id()?;
        let ended: Vec<&str> = turns.values().map(|turn| turn.outcome.as_str()).collect();
        anyhow::ensure!(ended.len() == 12 && ended.iter().all(|outcome| *outcome == "finished"), "{ended:?}");
        Ok(())
    });
    cluster.finish(&[]);
}

#[test]
fn the_load_generator_reads_on_by_itself_and_finds_every_answer_exact() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 50, 20);
    cluster.wait_serving(3, "slow", 2);
    let victim = cluster.processes("controller").remove(0);
    let ready = cluster.ready();
    let endpoints: Vec<String> =
        cluster.clients().iter().map(|(_, client)| format!("https://{}", client.address())).collect();
    let (endpoints, ca) = (endpoints.join(","), ready.ca.to_str().unwrap());
    let mut bench = vec!["bench", "api", "--endpoint", &endpoints, "--ca", ca, "--key", &ready.key, "--model", "slow"];
    bench.extend([
        "--stream",
        "--max-tokens",
        "50",
        "--concurrency",
        "12",
        "--requests",
        "60",
        "--warmup",
        "0",
        "--json",
    ]);
    let report = std::thread::scope(|scope| {
        let running = scope.spawn(|| izar_tests::cli::run("izar", &bench));
        answering(&cluster.admins()[0].1, 4);
        process::kill_hard(victim.pid);
        running.join().unwrap()
    });
    assert!(report.success, "{}", report.stderr);
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!((&report["requests"], &report["errors"]), (&json!(60), &json!({})), "{report}");
    let read_on = &report["read_on"];
    assert!(read_on["exact"].as_u64() > Some(0), "{report}");
    assert_eq!((&read_on["different"], &read_on["unknown"]), (&json!(0), &json!(0)), "{report}");
    cluster.wait_successor(&victim);
    cluster.finish(&[]);
}
