//! A controller is drained, and the leader is stopped, under load: another one leads first, and no request fails.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use izar_tests::cli::Admin;
use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options};
use izar_tests::process;
use izar_tests::waiting::{SOON, until};
use nix::sys::signal::Signal;
use serde_json::json;

/// Ends the load, also when the story fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Asks until it shall stop, streamed and whole by turns; every answer must be whole.
fn ask_on(client: &Client, stop: &AtomicBool, answers: &AtomicUsize) {
    let messages = json!([{ "role": "user", "content": "Go on." }]);
    while !stop.load(Relaxed) {
        let stream = answers.load(Relaxed).is_multiple_of(2);
        let body = json!({ "model": "echo", "messages": messages, "max_tokens": 5, "stream": stream });
        if stream {
            let said = client.stream("/v1/chat/completions", &body).unwrap().transcript().unwrap();
            assert!(said.done && said.error.is_none(), "{said:?}");
        } else {
            let said = client.post("/v1/chat/completions", &body).unwrap();
            assert_eq!(said.status, 200, "{}", said.text());
        }
        answers.fetch_add(1, Relaxed);
    }
}

/// Does something to a controller while the others are asked all the time; none of their answers may fail.
fn under_load(cluster: &Cluster, spared: &str, act: impl FnOnce(&dyn Fn(&str))) -> usize {
    let (stop, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let clients: Vec<_> = cluster.clients().into_iter().filter(|(id, _)| id != spared).collect();
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for (_, client) in clients.iter().chain(&clients) {
            scope.spawn(|| ask_on(client, &stop, &answers));
        }
        let more = |what: &str| {
            let before = answers.load(Relaxed);
            until(what, SOON, || {
                anyhow::ensure!(answers.load(Relaxed) > before + 20, "{} answers", answers.load(Relaxed));
                Ok(())
            });
        };
        more("answers before");
        act(&more);
        more("answers after");
    });
    answers.load(Relaxed)
}

fn leader(admin: &Admin) -> String {
    admin.status().unwrap()["leader"].as_str().expect("somebody leads").to_owned()
}

#[test]
fn a_controller_is_drained_and_the_leader_stopped_under_load_and_no_request_fails() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 1).start();
    cluster.wait_serving(3, "echo", 1);
    let first = leader(&cluster.admin());
    let admin = |id: &str| cluster.admins().into_iter().find(|(other, _)| other == id).expect("it runs").1;
    let own = cluster.clients().into_iter().find(|(id, _)| *id == first).unwrap().1;
    let mut asked = under_load(&cluster, &first, |more| {
        let drained = admin(&first).json(&["drain"]).unwrap();
        assert_eq!((drained["draining"].as_bool(), drained["node"].as_str()), (Some(true), Some(first.as_str())));
        assert!(drained["leader"].is_string() && drained["leader"] != first.as_str(), "another one leads: {drained}");
        let ready = own.get("/readyz").unwrap();
        assert!(ready.status == 503 && ready.text().contains("draining"), "{}", ready.text());
        assert_eq!(own.get("/v1/models").unwrap().status, 200, "who asks all the same is served");
        more("answers while it drains");
        assert_eq!(admin(&first).json(&["undrain"]).unwrap()["draining"], false);
        assert_eq!(own.get("/readyz").unwrap().status, 200);
    });

    // The new leader is stopped without more ado.
    let watching = admin(&first);
    let second = leader(&watching);
    assert_ne!(second, first);
    let term = watching.status().unwrap()["term"].as_u64().unwrap();
    let victim = cluster.processes("controller").into_iter().find(|c| c.id == second).unwrap();
    asked += under_load(&cluster, &second, |_| {
        process::signal(victim.pid, Signal::SIGTERM).unwrap();
        cluster.wait_successor(&victim);
    });
    cluster.wait_serving(3, "echo", 1);
    let status = watching.status().unwrap();
    assert_ne!(status["leader"].as_str(), Some(second.as_str()), "{status}");
    assert_eq!(status["term"].as_u64(), Some(term + 1), "it was handed over, in one election: {status}");
    let turns = watching.turns_by_id().unwrap();
    assert!(turns.len() >= asked.min(5000), "{} turns for {asked} answers", turns.len());
    cluster.finish(&[]);
}

#[test]
fn a_controller_that_starts_again_refuses_nobody_who_comes_at_once() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.wait_serving(3, "echo", 2);
    for victim in cluster.processes("controller") {
        let own = cluster.clients().into_iter().find(|(id, _)| *id == victim.id).expect("it runs").1;
        process::kill_hard(victim.pid);
        let messages = json!([{ "role": "user", "content": "Already?" }]);
        let body = json!({ "model": "echo", "messages": messages, "max_tokens": 3 });
        // Until it listens there is nobody to answer.
        let said = until("a first answer", SOON, || own.post("/v1/chat/completions", &body));
        assert_eq!(said.status, 200, "{}: {}", victim.id, said.text());
        cluster.wait_successor(&victim);
    }
    cluster.finish(&[]);
}
