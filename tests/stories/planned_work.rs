//! What operators plan: a new revision, an agent that is taken down, another name for a model. No request fails, no
//! answer changes; and what cannot be done is said.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::ensure;
use izar_tests::cluster::{Cluster, Options};
use izar_tests::process;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: u64 = 40;

fn body(model: &str, tokens: u64, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": model, "messages": messages, "max_tokens": tokens, "stream": stream })
}

fn deployment(cluster: &Cluster, name: &str) -> anyhow::Result<Value> {
    let listed = cluster.admin().json(&["models", "list"])?;
    let found = listed["deployments"].as_array().into_iter().flatten().find(|d| d["name"] == name).cloned();
    found.ok_or_else(|| anyhow::anyhow!("{name} is not deployed"))
}

/// Asks again and again, streamed and not, on every controller, while `during` runs; every answer must be whole.
fn under_load(cluster: &Cluster, during: impl FnOnce()) -> usize {
    let (ended, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let asking: Vec<_> = cluster
            .clients()
            .into_iter()
            .flat_map(|(_, client)| [(client.clone(), true), (client, false)])
            .map(|(client, stream)| {
                let (ended, answered) = (&ended, &answered);
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        if stream {
                            let transcript = client.stream(CHAT, &body("slow", TOKENS, true)).unwrap().transcript();
                            let transcript = transcript.unwrap();
                            assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
                        } else {
                            let response = client.post(CHAT, &body("slow", TOKENS, false)).unwrap();
                            assert_eq!(response.status, 200, "{}", response.text());
                        }
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let before = answered.load(Ordering::Relaxed);
        until_true("requests to be answered", SOON, || answered.load(Ordering::Relaxed) > before + 4);
        during();
        let after = answered.load(Ordering::Relaxed);
        until_true("requests to be answered afterwards", SOON, || answered.load(Ordering::Relaxed) > after + 8);
        ended.store(true, Ordering::Relaxed);
        asking.into_iter().for_each(|thread| thread.join().expect("every request was answered"));
    });
    answered.into_inner()
}

#[test]
fn a_new_revision_takes_over_without_a_failed_request() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 5, 20);
    let old = deployment(&cluster, "slow").unwrap()["revision"].clone();
    under_load(&cluster, || {
        // Other times are another revision of the model.
        let admin = cluster.admin();
        admin.json(&["models", "import", "--echo", "--name", "slow", "--first-ms", "5", "--next-ms", "10"]).unwrap();
        admin.json(&["models", "deploy", "slow", "--replicas", "2"]).unwrap();
        until("the new revision to have taken over", SOON, || {
            let deployment = deployment(&cluster, "slow")?;
            let workers = deployment["workers"].as_array().cloned().unwrap_or_default();
            ensure!(deployment["revision"] != old && deployment["ready"] == 2, "{deployment}");
            ensure!(workers.len() == 2 && workers.iter().all(|w| w["retiring"] == false), "{deployment}");
            Ok(())
        });
    });
    cluster.finish(&[]);
}

#[test]
fn a_drained_agent_is_empty_and_its_answers_went_on_elsewhere() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(1, 2).start();
    cluster.deploy_echo("slow", 2, 5, 100);
    let (client, admin) = (cluster.client(), cluster.admin());
    let ask = |stream| body("slow", 80, stream);
    let expected = client.post(CHAT, &ask(false)).unwrap().content();
    let victim = cluster.workers("slow").remove(0).agent.expect("a worker has an agent");
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let answers: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    let answer = client.stream(CHAT, &ask(true)).unwrap();
                    begun.fetch_add(1, Ordering::Relaxed);
                    answer.transcript().unwrap()
                })
            })
            .collect();
        until_true("every answer to have begun", SOON, || begun.load(Ordering::Relaxed) == 6);
        let drained = admin.json(&["agents", "drain", &victim, "--within", "1"]).unwrap();
        assert_eq!(drained["planned"], 0, "{drained}");
        for answer in answers {
            let transcript = answer.join().unwrap();
            assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
            assert_eq!(transcript.text, expected, "as if nothing had happened");
        }
    });
    let deployment = deployment(&cluster, "slow").unwrap();
    assert_eq!((&deployment["ready"], &deployment["unmet"]), (&json!(2), &json!("")), "{deployment}");
    let refused = admin.json(&["agents", "forget", &victim]).unwrap_err().to_string();
    assert!(refused.contains("is connected: stop it first"), "{refused}");
    // A second agent cannot go: there would be nobody left.
    let other = if victim == "a1" { "a2" } else { "a1" };
    admin.json(&["agents", "drain", other, "--no-wait"]).unwrap();
    until("what cannot move to be said", SOON, || {
        let deployment = self::deployment(&cluster, "slow")?;
        let unmet = deployment["unmet"].as_str().unwrap_or_default();
        ensure!(unmet.contains(other) && unmet.contains("being drained"), "{deployment}");
        Ok(())
    });
    assert_eq!(client.post(CHAT, &ask(false)).unwrap().content(), expected, "it serves on");
    let refused = admin.json(&["agents", "forget", other]).unwrap_err().to_string();
    assert!(refused.contains("has replicas: izar agents drain"), "{refused}");
    for agent in ["a1", "a2"] {
        admin.json(&["agents", "uncordon", agent]).unwrap();
    }
    until("the replicas to spread again", SOON, || {
        let deployment = self::deployment(&cluster, "slow")?;
        let workers = deployment["workers"].as_array().cloned().unwrap_or_default();
        ensure!(workers.len() == 2 && workers[0]["agent"] != workers[1]["agent"], "{deployment}");
        Ok(())
    });
    let unknown = admin.json(&["agents", "drain", "a9"]).unwrap_err().to_string();
    assert!(unknown.contains("there is no agent a9"), "{unknown}");
    cluster.finish(&[]);
}

#[test]
fn what_no_agent_can_hold_is_shown_as_unmet_and_names_are_checked() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(1, 1).start();
    let (client, admin) = (cluster.client(), cluster.admin());
    admin.json(&["models", "deploy", "echo", "--name", "big", "--gpus", "3"]).unwrap();
    until("the reason", SOON, || {
        let deployment = deployment(&cluster, "big")?;
        let unmet = deployment["unmet"].as_str().unwrap_or_default();
        ensure!(unmet == "1 without a place: a1: has 0 free GPUs of 3 needed", "{deployment}");
        Ok(())
    });
    admin.json(&["models", "deploy", "echo", "--name", "big", "--label", "rack=r7"]).unwrap();
    until_true("another reason", SOON, || {
        deployment(&cluster, "big").is_ok_and(|d| d["unmet"].as_str().unwrap_or_default().contains("label rack=r7"))
    });
    admin.json(&["models", "deploy", "echo", "--name", "big", "--replicas", "0"]).unwrap();
    let none = client.post(CHAT, &body("big", 4, false)).unwrap();
    assert_eq!(none.status, 503, "{}", none.text());
    assert!(none.error_message().contains("none is wanted"), "{}", none.text());

    let refused = |arguments: &[&str]| admin.json(arguments).unwrap_err().to_string();
    assert!(refused(&["models", "alias", "gpt-4o", "nothing"]).contains("there is no deployment nothing"));
    assert!(refused(&["models", "alias", "big", "echo"]).contains("big is a deployment"));
    admin.json(&["models", "alias", "gpt-4o", "echo"]).unwrap();
    let named = client.post(CHAT, &body("gpt-4o", 4, false)).unwrap();
    assert_eq!(named.status, 200, "{}", named.text());
    let models = client.get("/v1/models").unwrap().json();
    assert!(models["data"].as_array().unwrap().iter().any(|model| model["id"] == "gpt-4o"), "{models}");
    assert!(refused(&["models", "undeploy", "echo"]).contains("alias gpt-4o points to echo"));
    assert!(refused(&["models", "deploy", "echo", "--name", "gpt-4o"]).contains("gpt-4o is an alias"));
    admin.json(&["models", "unalias", "gpt-4o"]).unwrap();
    assert_eq!(client.post(CHAT, &body("gpt-4o", 4, false)).unwrap().status, 404);
    assert!(refused(&["models", "unalias", "gpt-4o"]).contains("there is no alias gpt-4o"));

    admin.json(&["tenants", "set", "bank", "--weight", "3"]).unwrap();
    assert!(refused(&["projects", "set", "desk", "--tenant", "nobody"]).contains("there is no tenant nobody"));
    let project = admin.json(&["projects", "set", "desk", "--tenant", "bank", "--class", "batch"]).unwrap();
    assert_eq!((&project["tenant"], &project["class"]), (&json!("bank"), &json!("batch")));
    let key = admin.create_key(&["--project", "desk"]).unwrap();
    let asked = client.with_key(Some(&key)).post(CHAT, &body("echo", 4, false)).unwrap();
    assert_eq!(asked.status, 200, "{}", asked.text());
    cluster.finish(&[]);
}

#[test]
fn any_controller_explains_a_request_also_after_the_fact() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 5, 50);
    let mut admins = cluster.admins();
    let client = cluster.clients().remove(0).1;
    let mut answer = client.stream(CHAT, &body("slow", TOKENS, true)).unwrap();
    let id = answer.header("x-request-id").unwrap().to_owned();
    answer.event().unwrap();
    let running = admins[0].1.json(&["requests", "list"]).unwrap()["requests"][0].clone();
    let worker = running["worker"].as_str().expect("it has a worker").to_owned();
    let victim = cluster.workers("slow").into_iter().find(|w| w.id == worker).expect("its worker runs");
    process::kill_hard(victim.pid);
    let transcript = answer.transcript().unwrap();
    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    // The other controller knows nothing of it but its record, and asks the one that does.
    let other = admins.remove(1).1;
    until("the whole story", SOON, || {
        let story = other.json(&["explain", &id])?;
        ensure!(story["record"]["outcome"] == "finished", "{story}");
        let events = story["stories"][0]["events"].as_array().cloned().unwrap_or_default();
        let whats: Vec<&str> = events.iter().filter_map(|event| event["what"].as_str()).collect();
        ensure!(whats == ["placed", "first_token", "lost", "placed", "ended"], "{story}");
        ensure!(story["stories"][0]["node"] == "c1" && events[2]["worker"] == worker.as_str(), "{story}");
        Ok(())
    });
    let refused = client
        .post(
            CHAT,
            &json!({ "model": "slow", "messages": [{ "role": "user", "content": "x" }], "max_tokens": 9_000_000 }),
        )
        .unwrap();
    assert_eq!(refused.status, 400, "{}", refused.text());
    let story = other.json(&["explain", refused.header("x-request-id").unwrap()]).unwrap();
    assert_eq!(story["stories"][0]["events"][0]["code"], "context_length_exceeded", "{story}");
    let words = other.run(&["explain", &id]).stdout;
    assert!(words.contains("goes on elsewhere") && words.contains("finished after"), "{words}");
    let unknown = other.json(&["explain", "chatcmpl-00000000000000000000000000000001"]).unwrap_err().to_string();
    assert!(unknown.contains("no controller knows request"), "{unknown}");
    cluster.finish(&["worker failed and will be started again"]);
}
