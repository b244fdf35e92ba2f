//! Controllers are killed while requests run: nothing that was acknowledged is lost, and nothing stands twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use izar_tests::cli::Turn;
use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options, Process};
use izar_tests::process;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";
const THREADS: usize = 10;
const EACH: usize = 5;

/// One request of about a second; streamed or not. Returns its id if the client got the whole answer.
fn ask(client: &Client, stream: bool) -> Result<String, String> {
    let body = json!({
        "model": "slow",
        "messages": [{ "role": "user", "content": "Count with me." }],
        "max_tokens": 40,
        "stream": stream,
    });
    if stream {
        let transcript = client.stream(CHAT, &body).and_then(|a| a.transcript()).map_err(|e| format!("{e:#}"))?;
        let whole = transcript.done && transcript.error.is_none() && transcript.finish.as_deref() == Some("length");
        if whole { Ok(transcript.request_id) } else { Err(format!("{transcript:?}")) }
    } else {
        let response = client.post(CHAT, &body).map_err(|e| format!("{e:#}"))?;
        let id = response.header("x-request-id").unwrap_or_default().to_owned();
        if response.status == 200 { Ok(id) } else { Err(format!("{}: {}", response.status, response.text())) }
    }
}

/// Runs `THREADS * EACH` requests through `clients` and `during` once a fifth of them is answered.
fn ask_many(clients: &[Client], during: impl FnOnce()) -> Vec<Result<String, String>> {
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let run = |thread: usize| {
            let answered = &answered;
            move || -> Vec<Result<String, String>> {
                let one = |i: usize| {
                    let result = ask(&clients[(thread + i) % clients.len()], i.is_multiple_of(2));
                    answered.fetch_add(1, Ordering::Relaxed);
                    result
                };
                (0..EACH).map(one).collect()
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(run(thread))).collect();
        until_true("a fifth of the requests", SOON, || answered.load(Ordering::Relaxed) >= THREADS * EACH / 5);
        during();
        threads.into_iter().flat_map(|t| t.join().expect("a client does not panic")).collect()
    })
}

/// Waits until all three controllers list the same turns, all closed and each once, and returns these.
fn agreed(cluster: &Cluster) -> BTreeMap<String, Turn> {
    until("three controllers to list the same turns", SOON, || {
        let mut lists = Vec::new();
        for (node, admin) in cluster.admins() {
            let turns = admin.turns_by_id()?;
            let open = turns.values().filter(|t| t.outcome == "running").count();
            anyhow::ensure!(open == 0, "{node} has {open} open turns");
            lists.push(turns);
        }
        anyhow::ensure!(lists.len() == 3, "{} controllers run", lists.len());
        let sizes: Vec<usize> = lists.iter().map(BTreeMap::len).collect();
        anyhow::ensure!(lists[0] == lists[1] && lists[0] == lists[2], "the lists differ: {sizes:?} turns");
        Ok(lists.remove(0))
    })
}

fn leader(cluster: &Cluster) -> String {
    let status = cluster.admin().status().unwrap();
    status["leader"].as_str().expect("there is a leader").to_owned()
}

fn survivors(cluster: &Cluster, victim: &Process) -> Vec<Client> {
    cluster.clients().into_iter().filter(|(id, _)| *id != victim.id).map(|(_, client)| client).collect()
}

#[test]
fn fifty_requests_through_the_others_finish_while_any_one_controller_is_killed() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 100, 20);
    let mut seen = BTreeSet::new();
    let mut leaders_killed = 0;
    for i in 0..3 {
        let victim = cluster.processes("controller").remove(i);
        leaders_killed += usize::from(leader(&cluster) == victim.id);
        kill_one(&cluster, &victim, &mut seen);
    }
    if leaders_killed == 0 {
        // Leadership moved ahead of the kills: the leader gets its own.
        let name = leader(&cluster);
        let victim = cluster.processes("controller").into_iter().find(|p| p.id == name).expect("it runs");
        kill_one(&cluster, &victim, &mut seen);
    }
    cluster.finish(&[]);
}

/// Kills one controller among requests through the others; the three must agree with the clients afterwards.
fn kill_one(cluster: &Cluster, victim: &Process, seen: &mut BTreeSet<String>) {
    let results = ask_many(&survivors(cluster, victim), || process::kill_hard(victim.pid));
    for result in results {
        let id = result.unwrap_or_else(|error| panic!("a request through a survivor of {}: {error}", victim.id));
        assert!(seen.insert(id.clone()), "{id} was given twice");
    }
    cluster.wait_successor(victim);
    cluster.wait_serving(3, "slow", 2);
    let turns = agreed(cluster);
    let listed: BTreeSet<String> = turns.keys().cloned().collect();
    assert_eq!(listed, *seen, "after {} was killed", victim.id);
    assert!(turns.values().all(|t| t.outcome == "finished" && t.completion_tokens == 40), "{turns:?}");
}

#[test]
fn all_controllers_killed_at_once_keep_what_they_acknowledged() {
    let _machine = izar_tests::shared();
    let cluster = Options::echo(3, 2).start();
    cluster.deploy_echo("slow", 2, 100, 20);
    let clients: Vec<Client> = cluster.clients().into_iter().map(|(_, client)| client).collect();
    let victims = cluster.processes("controller");
    let results = ask_many(&clients, || victims.iter().for_each(|victim| process::kill_hard(victim.pid)));
    let asked = results.len();
    let acknowledged: BTreeSet<String> = results.into_iter().flatten().collect();
    assert!(!acknowledged.is_empty() && acknowledged.len() < asked, "{} of {asked}", acknowledged.len());

    for victim in &victims {
        cluster.wait_successor(victim);
    }
    cluster.wait_serving(3, "slow", 2);
    let turns = agreed(&cluster);
    let missing: Vec<&String> = acknowledged.iter().filter(|id| !turns.contains_key(*id)).collect();
    assert!(missing.is_empty(), "acknowledged and lost: {missing:?}");
    assert!(turns.len() <= asked, "{} turns of {asked} requests", turns.len());
    for turn in turns.values() {
        let known = acknowledged.contains(&turn.id);
        // An answer whose end was on its way when its controller died may be closed as abandoned, never as failed.
        let good: &[&str] = if known { &["finished", "abandoned"] } else { &["finished", "abandoned", "cancelled"] };
        assert!(good.contains(&turn.outcome.as_str()), "{turn:?}");
    }
    let after = ask(&cluster.client(), true).expect("the cluster serves again");
    assert!(agreed(&cluster).contains_key(&after));
    cluster.finish(&[]);
}
