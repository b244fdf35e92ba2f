//! A newcomer's first minute: a real model with real weights answers a question, in whole and in pieces.

use izar_tests::client::Client;
use izar_tests::cluster::Options;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn ask(question: &str, stream: bool) -> Value {
    json!({
        "model": "smollm2-135m",
        "messages": [{ "role": "user", "content": question }],
        "max_tokens": 40,
        "temperature": 0,
        "stream": stream,
    })
}

#[test]
fn the_small_model_knows_the_capital_of_france() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::model("smollm2-135m", 1, 1).start();
    let said = cluster.output();
    assert!(said.contains("curl") && said.contains(&cluster.ready().endpoint), "a curl line is printed: {said}");
    let client = cluster.client();

    let whole = client.post(CHAT, &ask("What is the capital of France?", false)).unwrap();
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(whole.content().contains("Paris"), "{}", whole.content());
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "stop", "the model ends its own answer");
    let streamed = client.stream(CHAT, &ask("What is the capital of France?", true)).unwrap().transcript().unwrap();
    assert_eq!(streamed.text, whole.content(), "greedy answers are equal");
    assert!(streamed.done && streamed.events.len() > 3, "it came in pieces");

    characters_are_never_split(&client);
    the_context_is_the_models(&client);
    cluster.finish(&[]);
}

/// Greedy text of many bytes a character comes out of a stream as it comes out whole.
fn characters_are_never_split(client: &Client) {
    let question = "Repeat exactly: 你好，世界 🦊🦊 naïve café";
    let whole = client.post(CHAT, &ask(question, false)).unwrap().content();
    let streamed = client.stream(CHAT, &ask(question, true)).unwrap().transcript().unwrap();
    assert_eq!(streamed.text, whole);
    let broken = streamed.events.iter().filter(|e| e.to_string().contains('\u{fffd}')).count();
    assert!(broken <= 1, "only an answer cut off by its length may end in half a character: {}", streamed.text);
}

fn the_context_is_the_models(client: &Client) {
    let long = "word ".repeat(9000);
    let refused = client.post(CHAT, &ask(&long, false)).unwrap();
    assert_eq!(refused.status, 400, "{}", refused.text());
    let message = refused.error_message();
    assert!(message.contains("8192") && refused.json()["error"]["code"] == "context_length_exceeded", "{message}");
}
