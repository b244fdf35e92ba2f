//! More is asked than can be computed: some wait, some are refused at once and told when to come again, and who leaves
//! makes room.

use std::time::Duration;

use izar_tests::cli::Admin;
use izar_tests::client::{Client, Response};
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
/// Its worker computes one answer at a time, of 20 ms a token, and is sent one more.
const MODEL: &str = "narrow";

fn site() -> (Site, Client) {
    let mut site = Site::new(1, false);
    site.start_controllers();
    let admin = site.admin(1);
    let import = ["models", "import", "--echo", "--name", MODEL, "--first-ms", "20", "--next-ms", "20"];
    admin.json(&import).unwrap();
    admin.json(&["models", "deploy", MODEL, "--max-batch", "1"]).unwrap();
    let key = admin.create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));
    site.start_agent("a1");
    site.admin(1).wait_ready(MODEL, 1);
    (site, client)
}

fn body(tokens: u32) -> Value {
    json!({ "model": MODEL, "messages": [{ "role": "user", "content": "hi" }], "max_tokens": tokens })
}

fn streamed(tokens: u32) -> Value {
    let mut body = body(tokens);
    body["stream"] = json!(true);
    body
}

/// Asks with one more header.
fn post(client: &Client, header: &str, tokens: u32) -> Response {
    let key = client.key().map(|key| format!("{key}\r\n{header}"));
    client.with_key(key.as_deref()).post(CHAT, &body(tokens)).unwrap()
}

/// Requests that wait for a place, as the metrics say.
fn waiting(client: &Client) -> u32 {
    let page = client.get("/metrics").unwrap().text();
    let prefix = format!("izar_queue_length{{deployment=\"{MODEL}\",class=\"interactive\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&prefix)?.parse().ok()).unwrap_or(0)
}

fn wait_for(client: &Client, count: u32) {
    until("requests to wait", SOON, || {
        let now = waiting(client);
        anyhow::ensure!(now == count, "{now} wait");
        Ok(())
    });
}

#[test]
fn who_cannot_be_in_time_is_refused_at_once_and_who_leaves_makes_room() {
    let _machine = izar_tests::exclusive();
    let (site, client) = site();
    bad_headers_are_refused_by_name(&client);
    assert_eq!(client.post(CHAT, &body(20)).unwrap().status, 200, "a first one, to learn from");

    // 50 tokens take a second; half of one is not enough, however idle the worker.
    let refused = post(&client, "x-izar-deadline-ms: 500", 50);
    check_refused(&refused);
    assert_eq!(post(&client, "x-izar-deadline-ms: 20000", 20).status, 200);

    // Two answers without an end in sight take all places; who comes now waits.
    let mut running = Vec::new();
    for _ in 0..2 {
        let mut stream = client.stream(CHAT, &streamed(1500)).unwrap();
        stream.event().unwrap().expect("it runs");
        running.push(stream);
    }
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.post(CHAT, &body(2)).unwrap());
        wait_for(&client, 1);
        // Another one's deadline is nearer than the end of those.
        check_refused(&post(&client, "x-izar-deadline-ms: 2000", 2));
        let leaves = client.connect().unwrap();
        leave(&client, leaves);
        wait_for(&client, 1);
        // Who leaves while it is computed makes room for who waits.
        drop(running.pop());
        assert_eq!(waits.join().unwrap().status, 200);
    });
    drop(running);
    recorded_is_what_was_computed(&site.admin(1));
    site.finish(&[]);
}

/// Begins to wait on a connection of its own and closes it.
fn leave(client: &Client, mut connection: izar_tests::client::Connection) {
    use std::io::Write;
    let body = body(2).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: izar\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n{body}",
        client.key().expect("this client has a key"),
        body.len()
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.flush().unwrap();
    wait_for(client, 2);
}

fn check_refused(response: &Response) {
    assert_eq!(response.status, 503, "{}", response.text());
    assert_eq!(response.json()["error"]["code"], "deadline_unreachable");
    let seconds: u64 = response.header("retry-after").and_then(|s| s.parse().ok()).expect("Retry-After in seconds");
    assert!(Duration::from_secs(seconds) >= Duration::from_secs(1) && seconds <= 600, "{seconds}");
}

fn bad_headers_are_refused_by_name(client: &Client) {
    for (header, status, name) in [
        ("x-izar-deadline-ms: 0", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-deadline-ms: -3", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-deadline-ms: tomorrow", 400, "X-Izar-Deadline-Ms"),
        ("x-izar-class: faster", 400, "X-Izar-Class"),
        ("x-izar-class: urgent", 403, "X-Izar-Class"),
    ] {
        let refused = post(client, header, 2);
        assert_eq!(refused.status, status, "{header}: {}", refused.text());
        assert!(refused.error_message().contains(name), "{header}: {}", refused.error_message());
    }
    assert_eq!(post(client, "x-izar-class: batch", 2).status, 200);
}

fn recorded_is_what_was_computed(admin: &Admin) {
    until("every turn to be closed", SOON, || {
        let turns = admin.turns()?;
        anyhow::ensure!(turns.iter().all(|turn| turn.outcome != "running"), "{turns:?}");
        // A batch, two to learn from, two that were left, one that waited; nothing of what was refused or left waiting.
        anyhow::ensure!(turns.len() == 6, "{turns:?}");
        Ok(())
    });
}
