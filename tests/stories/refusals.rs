//! What bad input gets: refused early, by name, with what to do about it.

use std::io::Write;
use std::path::{Path, PathBuf};

use izar_tests::cli::{self, Admin};
use izar_tests::client::{Answer, Client, Response};
use izar_tests::nodes::{self, Site};
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// One controller and one agent that serve `slow` (echo, 50 ms a token) and `small` (a context of 64 tokens).
fn site() -> (Site, Client) {
    let mut site = Site::new(1, false);
    site.start_controllers();
    let admin = site.admin(1);
    admin.deploy_echo("slow", 1, 5, 50);
    admin.json(&["models", "deploy", "slow", "--name", "small", "--max-context", "64"]).unwrap();
    let key = admin.create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));
    (site, client)
}

fn messages(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

#[test]
fn no_replica_ready_is_503_with_a_time_to_try_again_until_there_is_one() {
    let _machine = izar_tests::shared();
    let (mut site, client) = site();
    let body = json!({ "model": "slow", "messages": messages("hi"), "max_tokens": 2 });
    check_retryable(&client.post(CHAT, &body).unwrap(), 503);
    assert_eq!(client.get("/readyz").unwrap().status, 503, "ready means: can really generate");
    assert_eq!(client.get("/healthz").unwrap().status, 200);
    site.start_agent("a1");
    site.admin(1).wait_ready("slow", 1);
    assert_eq!(client.post(CHAT, &body).unwrap().status, 200);
    assert_eq!(client.get("/readyz").unwrap().status, 200);
    site.finish(&[]);
}

fn check_retryable(response: &Response, status: u16) {
    assert_eq!(response.status, status, "{}", response.text());
    let seconds: u64 = response.header("retry-after").and_then(|s| s.parse().ok()).expect("Retry-After in seconds");
    assert!((1..=60).contains(&seconds), "{seconds}");
    assert!(!response.error_message().is_empty());
}

#[test]
fn bad_requests_are_refused_by_name() {
    let _machine = izar_tests::shared();
    let (mut site, client) = site();
    site.start_agent("a1");
    site.admin(1).wait_ready("slow", 1);
    site.admin(1).wait_ready("small", 1);
    wrong_keys_are_401(&client, &site.admin(1));
    bad_bodies_are_400_and_name_the_field(&client);
    unknown_models_are_404_and_list_what_there_is(&client);
    a_prompt_longer_than_the_context_is_400_with_both_numbers(&client);
    a_large_body_is_413_before_it_is_read(&client);
    one_request_too_many_is_429(&client, &site.admin(1));
    until("only what was answered to be recorded, and as finished", SOON, || {
        let turns = site.admin(1).turns()?;
        anyhow::ensure!(turns.iter().all(|t| t.outcome == "finished"), "{turns:?}");
        Ok(())
    });
    site.finish(&[]);
}

fn wrong_keys_are_401(client: &Client, admin: &Admin) {
    let body = json!({ "model": "slow", "messages": messages("hi"), "max_tokens": 1 });
    for key in [None, Some("sk-izar-wrong"), Some("")] {
        let stranger = client.with_key(key);
        for response in [stranger.post(CHAT, &body).unwrap(), stranger.get("/v1/models").unwrap()] {
            assert_eq!(response.status, 401, "{key:?}: {}", response.text());
            assert!(response.header("x-request-id").is_some());
            assert!(!response.error_message().contains("sk-izar-wrong"), "a key is never repeated");
        }
    }
    let created = admin.json(&["keys", "create", "--note", "to be revoked"]).unwrap();
    let (key, id) = (created["key"].as_str().unwrap(), created["id"].as_str().unwrap());
    let holder = client.with_key(Some(key));
    assert_eq!(holder.post(CHAT, &body).unwrap().status, 200);
    admin.json(&["keys", "revoke", id]).unwrap();
    until_true("the revoked key to be refused", SOON, || holder.post(CHAT, &body).unwrap().status == 401);
}

fn bad_bodies_are_400_and_name_the_field(client: &Client) {
    let chat = |field: &str, value: Value| {
        let mut body = json!({ "model": "slow", "messages": messages("hi"), "max_tokens": 1 });
        body[field] = value;
        (CHAT, body, field.to_owned())
    };
    let completion = |prompt: Value| (COMPLETIONS, json!({ "model": "slow", "prompt": prompt }), "prompt".to_owned());
    let mut table = vec![
        chat("messages", json!([])),
        chat("messages", messages("")),
        chat("messages", json!("hi")),
        chat("messages", Value::Null),
        chat("temperature", json!(2.5)),
        chat("temperature", json!(-0.1)),
        chat("temperature", json!("warm")),
        chat("top_p", json!(0)),
        chat("top_p", json!(1.5)),
        chat("max_tokens", json!(0)),
        chat("max_tokens", json!(-5)),
        chat("stop", json!(5)),
        chat("stop", json!(vec!["a"; 100])),
        chat("stream", json!("yes")),
        chat("model", Value::Null),
        completion(json!("")),
        completion(json!([])),
        completion(json!({ "text": "hi" })),
    ];
    let king = json!([{ "role": "king", "content": "hi" }]);
    table.push((CHAT, json!({ "model": "slow", "messages": king }), "messages[0].role".into()));
    for (path, body, field) in &table {
        let response = client.post(path, body).unwrap();
        assert_eq!(response.status, 400, "{body}: {}", response.text());
        let (error, message) = (response.json()["error"].clone(), response.error_message());
        let param = error["param"].as_str().unwrap_or_default();
        assert!(param.starts_with(field) && message.contains(field), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error", "{body}");
    }
    for bytes in [&b""[..], b"{", b"[1, 2]", b"{\"model\": \"slow\"", b"\xff\xfe", b"nonsense"] {
        let response = client.post_bytes(CHAT, bytes).unwrap();
        assert_eq!(response.status, 400, "{:?}: {}", String::from_utf8_lossy(bytes), response.text());
        assert_eq!(response.json()["error"]["type"], "invalid_request_error");
    }
}

fn unknown_models_are_404_and_list_what_there_is(client: &Client) {
    for path in [CHAT, COMPLETIONS] {
        let body = json!({ "model": "gpt-9", "messages": messages("hi"), "prompt": "hi" });
        let response = client.post(path, &body).unwrap();
        let message = response.error_message();
        assert_eq!(response.status, 404, "{message}");
        assert!(["gpt-9", "slow", "small"].iter().all(|name| message.contains(name)), "{message}");
        assert_eq!(response.json()["error"]["code"], "model_not_found");
    }
}

fn a_prompt_longer_than_the_context_is_400_with_both_numbers(client: &Client) {
    let prompt = "x".repeat(100);
    let response = client.post(COMPLETIONS, &json!({ "model": "small", "prompt": prompt, "max_tokens": 5 })).unwrap();
    let message = response.error_message();
    assert_eq!(response.status, 400, "{message}");
    assert!(message.contains("64") && message.contains("100"), "{message}");
    let fits =
        client.post(COMPLETIONS, &json!({ "model": "small", "prompt": "x".repeat(60), "max_tokens": 4 })).unwrap();
    assert_eq!(fits.status, 200, "exactly the context is allowed: {}", fits.text());
}

/// Announces more than the limit and sends only a little: the answer comes all the same.
fn a_large_body_is_413_before_it_is_read(client: &Client) {
    const LIMIT: usize = 4 << 20;
    let mut connection = client.connect().unwrap();
    let key = client.key().expect("this client has a key");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: izar\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{{\"model\": ",
        LIMIT + 1
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.flush().unwrap();
    let early = Answer::read_head(connection).unwrap().finish().unwrap();
    assert_eq!(early.status, 413, "{}", early.text());

    let large = client.post_bytes(CHAT, &vec![b' '; LIMIT + 1]).unwrap();
    assert_eq!(large.status, 413, "{}", large.text());
    assert!(large.error_message().contains(&LIMIT.to_string()), "{}", large.error_message());
}

fn one_request_too_many_is_429(client: &Client, admin: &Admin) {
    let key = admin.create_key(&["--max-concurrent", "1", "--note", "one at a time"]).unwrap();
    let client = client.with_key(Some(&key));
    let body = |stream: bool, tokens: u32| json!({ "model": "slow", "messages": messages("hi"), "max_tokens": tokens, "stream": stream });
    let mut first = client.stream(CHAT, &body(true, 40)).unwrap();
    first.event().unwrap().expect("the first request runs");
    check_retryable(&client.post(CHAT, &body(false, 1)).unwrap(), 429);
    assert!(first.transcript().unwrap().done, "the one that runs is not disturbed");
    until("a place for the next", SOON, || {
        let response = client.post(CHAT, &body(false, 1))?;
        anyhow::ensure!(response.status == 200, "{}", response.text());
        Ok(())
    });
}

/// A GGUF file of one tensor whose data is not there.
fn truncated_gguf() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    let mut put = |data: &[u8]| bytes.extend_from_slice(data);
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    put(&3u32.to_le_bytes());
    put(&1u64.to_le_bytes()); // tensors
    put(&1u64.to_le_bytes()); // metadata
    put(&text("general.architecture"));
    put(&8u32.to_le_bytes()); // a string
    put(&text("llama"));
    put(&text("token_embd.weight"));
    put(&1u32.to_le_bytes()); // dimensions
    put(&1_000_000u64.to_le_bytes());
    put(&0u32.to_le_bytes()); // f32
    put(&0u64.to_le_bytes()); // offset
    bytes
}

/// Copies the golden model's folder to `to`.
fn copy_model(to: &Path) -> PathBuf {
    std::fs::create_dir(to).unwrap();
    let from = izar_tests::binaries::repository().join("tests/golden/llama");
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        if entry.file_name() != "golden.json" {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    to.to_owned()
}

#[test]
fn a_broken_model_is_not_imported_and_the_reason_is_named() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let admin = site.admin(1);
    let refused = |path: &Path, more: &[&str], words: &[&str]| {
        let mut arguments = vec!["models", "import", path.to_str().unwrap(), "--name", "broken"];
        arguments.extend(more);
        let output = admin.run(&arguments);
        assert!(!output.success, "{arguments:?}: {}", output.stdout);
        let said = output.stderr.to_lowercase();
        assert!(words.iter().all(|word| said.contains(word)), "{arguments:?} said: {said}");
    };
    let gguf = site.path("model.gguf");
    std::fs::write(&gguf, truncated_gguf()).unwrap();
    refused(&gguf, &[], &["model.gguf", "token_embd.weight"]);
    let zeros = "0".repeat(64);
    refused(&gguf, &["--sha256", &zeros], &["model.gguf", &zeros]);
    std::fs::write(&gguf, b"not a model at all").unwrap();
    refused(&gguf, &[], &["model.gguf"]);
    refused(&site.path("nowhere.gguf"), &[], &["nowhere.gguf"]);

    let without = copy_model(&site.path("without-tokenizer"));
    std::fs::remove_file(without.join("tokenizer.json")).unwrap();
    refused(&without, &[], &["tokenizer"]);
    let cut = copy_model(&site.path("cut-weights"));
    let weights = std::fs::read(cut.join("model.safetensors")).unwrap();
    std::fs::write(cut.join("model.safetensors"), &weights[..weights.len() - 1000]).unwrap();
    refused(&cut, &[], &["model.safetensors"]);
    assert_eq!(admin.json(&["models", "list"]).unwrap()["models"], json!([]));

    let whole = copy_model(&site.path("whole"));
    let imported = admin.json(&["models", "import", whole.to_str().unwrap(), "--name", "tiny"]).unwrap();
    assert_eq!(imported["architecture"], "llama", "the same folder unbroken is taken: {imported}");
    let unknown = admin.run(&["models", "deploy", "no-such-model"]);
    assert!(!unknown.success && unknown.stderr.contains("no-such-model"), "{}", unknown.stderr);
    site.finish(&[]);
}

#[test]
fn a_typo_in_a_configuration_is_named_with_file_line_and_key() {
    let site = Site::new(1, false);
    site.write_agent("a1");
    for (program, node, right, wrong) in [
        ("izar-controller", "c1", "data_dir = ", "data_dri = "),
        ("izar-controller", "c1", "master_key = ", "master_kee = "),
        ("izar-agent", "a1", "controllers = ", "controlers = "),
        ("izar-agent", "a1", "level = ", "levle = "),
    ] {
        let text = std::fs::read_to_string(site.config(node)).unwrap();
        let typo = site.path("typo.toml");
        std::fs::write(&typo, text.replace(right, wrong)).unwrap();
        let line = 1 + text.lines().position(|line| line.starts_with(right)).expect("the key is in the file");
        let key = wrong.trim_end_matches([' ', '=']);
        for more in [&["--check-config"][..], &[]] {
            let mut arguments = vec!["--config", typo.to_str().unwrap()];
            arguments.extend(more);
            let said = cli::refused_start(program, &arguments);
            let place = format!("typo.toml:{line}");
            assert!(said.contains(&place) && said.contains(key), "{program} said: {said}");
        }
        let good = site.config(node);
        let checked = cli::run(program, &["--config", good.to_str().unwrap(), "--check-config"]);
        assert!(checked.success, "{}", checked.stderr);
    }
}

#[test]
fn two_sites_are_refused_as_not_yet_possible() {
    let output = cli::run("izar", &["dev", "--sites", "2", "--model", "echo"]);
    assert!(!output.success && output.stderr.contains("--sites"), "{}", output.stderr);
    assert!(output.stderr.contains("yet"), "{}", output.stderr);
}

/// Every file below a folder, with its content.
fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            files.extend(content(&entry.path()));
        } else {
            files.push((entry.path(), std::fs::read(entry.path()).unwrap()));
        }
    }
    files.sort();
    files
}

#[test]
fn data_of_another_cluster_or_a_newer_version_is_refused_and_left_untouched() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    site.admin(1).deploy_echo("slow", 1, 5, 50);
    site.stop("c1");
    let before = content(&site.data("c1"));

    let other = site.path("other-pki");
    nodes::make_ca(&other, "other");
    let node = ["--cluster", "other", "--site", "local", "--role", "controller", "--node", "c1"];
    let mut issue = vec!["pki", "issue", "--dir", other.to_str().unwrap(), "--host", "127.0.0.1"];
    issue.extend(node);
    assert!(cli::run("izar", &issue).success);
    let text = std::fs::read_to_string(site.config("c1")).unwrap();
    let text = text.replace("cluster = \"story\"", "cluster = \"other\"").replace("/pki/c1", "/other-pki/c1");
    std::fs::write(site.path("other.toml"), text.replace("/pki/ca.pem", "/other-pki/ca.pem")).unwrap();
    let said = cli::refused_start("izar-controller", &["--config", site.path("other.toml").to_str().unwrap()]);
    assert!(said.contains("story") && said.contains("other"), "both clusters are named: {said}");
    assert_eq!(content(&site.data("c1")), before, "the data is untouched");

    let marker = site.data("c1").join("izar.json");
    let now = std::fs::read_to_string(&marker).unwrap();
    let newer = now.replace("\"format\": 1", "\"format\": 1000");
    assert_ne!(now, newer);
    std::fs::write(&marker, &newer).unwrap();
    let before = content(&site.data("c1"));
    let said = cli::refused_start("izar-controller", &["--config", site.config("c1").to_str().unwrap()]);
    assert!(said.contains("1000") && said.contains("newer"), "{said}");
    assert_eq!(content(&site.data("c1")), before, "the data is untouched");
    std::fs::write(&marker, now).unwrap();

    site.start("izar-controller", "c1");
    site.wait_led(1);
    assert_eq!(site.admin(1).json(&["models", "list"]).unwrap()["models"][0]["name"], "slow");
    site.finish(&[]);
}
