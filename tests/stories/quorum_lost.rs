//! Two of three controllers hang: a project that is `available` is answered by the third, and recorded once they are back.

use izar_tests::client::Client;
use izar_tests::cluster::Options;
use izar_tests::process;
use izar_tests::waiting::{SOON, until};
use serde_json::{Value, json};

fn body(stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Who decides?" }]);
    json!({ "model": "echo", "messages": messages, "max_tokens": 5, "stream": stream })
}

/// Asks once; the id of the request, and the status.
fn ask(client: &Client) -> (String, u16) {
    let answer = client.post("/v1/chat/completions", &body(false)).unwrap();
    (answer.header("x-request-id").unwrap_or_default().to_owned(), answer.status)
}

#[test]
fn a_project_that_is_available_is_answered_without_a_quorum_and_recorded_once_there_is_one() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 1).start();
    cluster.wait_serving(3, "echo", 1);
    let admin = cluster.admin();
    admin.json(&["projects", "set", "desk", "--available", "true"]).unwrap();
    let key = admin.create_key(&["--project", "desk"]).unwrap();
    let (left, strict) = cluster.clients().remove(0);
    let available = strict.with_key(Some(&key));
    until("the key to be known", SOON, || {
        anyhow::ensure!(ask(&available).1 == 200, "not yet");
        Ok(())
    });
    let others: Vec<_> = cluster.processes("controller").into_iter().filter(|c| c.id != left).collect();
    others.iter().for_each(|other| process::stop(other.pid));
    until("the quorum to be lost", SOON, || {
        let status = cluster.admin().status()?;
        anyhow::ensure!(status["leader"].is_null(), "{status}");
        Ok(())
    });

    assert_eq!(ask(&strict).1, 503, "by default nothing is answered that cannot be recorded");
    let ready = strict.get("/readyz").unwrap();
    let said = ready.json();
    assert_eq!((ready.status, &said["ready"], &said["available"]), (200, &json!(false), &json!(true)), "{said}");
    let mut answered: Vec<String> = (0..5)
        .map(|_| ask(&available))
        .map(|(id, status)| {
            assert_eq!(status, 200);
            id
        })
        .collect();
    let streamed = available.stream("/v1/chat/completions", &body(true)).unwrap().transcript().unwrap();
    assert!(streamed.done && streamed.error.is_none(), "{streamed:?}");
    answered.push(streamed.request_id);
    let once = available.with_header("idempotency-key", "a").post("/v1/chat/completions", &body(false)).unwrap();
    assert!(once.status == 503 && once.error_message().contains("quorum"), "{}", once.text());

    // Its process dies as well; what it noted is there when all are back.
    let victim = cluster.processes("controller").into_iter().find(|c| c.id == left).unwrap();
    cluster.kill_and_wait(&victim);
    others.iter().for_each(|other| process::cont(other.pid));
    cluster.wait_serving(3, "echo", 1);
    until("every answer to be recorded, once", SOON, || {
        let turns = cluster.admin().turns_by_id()?;
        for id in &answered {
            let outcome = turns.get(id).map(|turn| turn.outcome.as_str());
            anyhow::ensure!(outcome == Some("finished"), "{id}: {outcome:?}");
        }
        Ok(())
    });
    assert_eq!(ask(&strict).1, 200);
    until("the notes to be cleared", SOON, || {
        let mut notes = Vec::new();
        for folder in walk(cluster.dir()) {
            let file = folder.join("provisional.log");
            if let Ok(meta) = std::fs::metadata(&file) {
                notes.push(meta.len());
            }
        }
        anyhow::ensure!(notes == [0, 0, 0], "{notes:?}");
        Ok(())
    });
    // When the machine is slow, it lasts long enough to be told.
    cluster.finish(&["no controller leads"]);
}

/// All folders below one.
fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let below = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let below: Vec<_> = below.filter(|path| path.is_dir() && !path.is_symlink()).flat_map(|path| walk(&path)).collect();
    std::iter::once(folder.to_owned()).chain(below).collect()
}
