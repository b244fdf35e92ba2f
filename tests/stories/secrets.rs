//! Prompts, answers and keys stay between the user and the cluster: no wire, no file and no log shows them.

use std::path::{Path, PathBuf};

use izar_tests::client::Client;
use izar_tests::nodes::Site;
use izar_tests::relay::{Relay, contains};
use izar_tests::waiting::{SOON, until};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";

/// Files under a folder that hold any of the needles, sockets apart.
fn files_with(folder: &Path, needles: &[&[u8]], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            files_with(&path, needles, found);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            if needles.iter().any(|needle| contains(&bytes, needle)) {
                found.push(path);
            }
        }
    }
}

fn holders(folder: &Path, needles: &[&[u8]]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    files_with(folder, needles, &mut found);
    found
}

#[test]
fn a_canary_and_a_key_cross_no_wire_and_reach_no_disk_in_the_clear() {
    let _machine = izar_tests::shared();
    // At debug level the logs say most; still no content.
    let mut site = Site::with_log_level(3, true, "debug");
    site.start_controllers();
    site.start_agent("a1");
    site.admin(1).deploy_echo("echo", 1, 5, 1);
    let canary = format!("canary-{:016x}-{:016x}", rand::random::<u64>(), rand::random::<u64>());
    let key = site.admin(2).create_key(&["--note", "canary"]).unwrap();
    let wrong = format!("sk-wrong-{:016x}", rand::random::<u64>());

    let mut relays = Vec::new();
    let mut answers = Vec::new();
    for i in 1..=3 {
        site.admin(i).wait_ready("echo", 1);
        let direct = site.client(i, Some(&key));
        let relay = Relay::tcp(&format!("https of c{i}"), direct.address());
        answers.push(ask_everything(&direct.through(relay.address), &canary, &wrong));
        relays.push(relay);
    }
    the_relays_can_see(&site, &canary, &key);

    let needles: Vec<&[u8]> =
        [&canary, &key, &wrong].into_iter().chain(&answers).map(|needle| needle.as_bytes()).collect();
    for relay in relays.iter().chain(&site.relays) {
        assert!(relay.len() > 2000, "{} passed {} bytes: the story went around it", relay.name, relay.len());
        assert!(!needles.iter().any(|needle| relay.saw(needle)), "{} saw a secret", relay.name);
    }
    for i in 1..=3 {
        until("every turn to be recorded", SOON, || {
            let finished = site.admin(i).turns()?.iter().filter(|t| t.outcome == "finished").count();
            anyhow::ensure!(finished == 4 * 3 + 1, "{finished} turns on c{i}");
            Ok(())
        });
    }
    let folder = site.path("");
    assert!(!holders(&folder, &[b"c1".as_slice()]).is_empty(), "the search finds what is there");
    assert_eq!(holders(&folder, &needles), [] as [PathBuf; 0], "while the cluster runs");
    for node in ["a1", "c1", "c2", "c3"] {
        site.stop(node);
    }
    assert_eq!(holders(&folder, &needles), [] as [PathBuf; 0], "after everything was written out");
    site.finish(&[]);
}

/// Asks with the canary in every place where a user's words may stand; returns an answer.
fn ask_everything(client: &Client, canary: &str, wrong: &str) -> String {
    let messages = json!([{ "role": "system", "content": canary }, { "role": "user", "content": canary }]);
    let chat = |stream: bool| json!({ "model": "echo", "messages": messages, "max_tokens": 12, "stream": stream });
    let whole = client.post(CHAT, &chat(false)).unwrap();
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(client.stream(CHAT, &chat(true)).unwrap().transcript().unwrap().done);
    let completion = json!({ "model": "echo", "prompt": canary, "max_tokens": 4, "stop": [canary], "user": canary });
    assert_eq!(client.post("/v1/completions", &completion).unwrap().status, 200);
    let developer = json!([{ "role": "developer", "content": [{ "type": "text", "text": canary }] }]);
    let parts = json!({ "model": "echo", "messages": developer, "max_tokens": 2 });
    assert_eq!(client.post(CHAT, &parts).unwrap().status, 200);

    // What is refused is not logged either.
    let broken = format!("{{\"model\": \"echo\", \"messages\": [\"{canary}");
    assert_eq!(client.post_bytes(CHAT, broken.as_bytes()).unwrap().status, 400);
    let mut bad = chat(false);
    bad["temperature"] = json!(canary);
    assert_eq!(client.post(CHAT, &bad).unwrap().status, 400);
    bad = chat(false);
    bad["model"] = json!(canary);
    assert_eq!(client.post(CHAT, &bad).unwrap().status, 404);
    assert_eq!(client.with_key(Some(wrong)).post(CHAT, &chat(false)).unwrap().status, 401);
    assert_eq!(client.get(&format!("/{canary}")).unwrap().status, 404);
    whole.content()
}

/// The same question over the plaintext listener is seen by a relay there: the others would have seen it, too.
fn the_relays_can_see(site: &Site, canary: &str, key: &str) {
    let direct = site.plaintext_client(1, Some(key));
    let relay = Relay::tcp("plaintext of c1", direct.address());
    let body = json!({ "model": "echo", "messages": [{ "role": "user", "content": canary }], "max_tokens": 2 });
    assert_eq!(direct.through(relay.address).post(CHAT, &body).unwrap().status, 200);
    assert!(relay.saw(canary.as_bytes()) && relay.saw(key.as_bytes()), "a relay records what passes");
}
