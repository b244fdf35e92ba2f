//! A controller's disk is wiped, or its server replaced: it is given the group's memory before it votes or acknowledges
//! anything, and nothing that was acknowledged is lost.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use izar_tests::client::Client;
use izar_tests::logs;
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";

/// Three controllers and an agent with a model that answers at once.
fn site() -> (Site, String) {
    let mut site = Site::new(3, false);
    site.start_controllers();
    site.start_agent("a1");
    site.admin(1).deploy_echo("echo", 1, 0, 1);
    (1..=3).for_each(|i| site.admin(i).wait_ready("echo", 1));
    let key = site.admin(1).create_key(&["--note", "stays"]).unwrap();
    let clients: Vec<Client> = (1..=3).map(|i| site.client(i, Some(&key))).collect();
    until_true("the key to be known", SOON, || clients.iter().all(|client| ask(client).is_ok()));
    (site, key)
}

/// Asks once; the request's id, if it was answered.
fn ask(client: &Client) -> anyhow::Result<String> {
    let messages = json!([{ "role": "user", "content": "Remember this." }]);
    let answer = client.post(CHAT, &json!({ "model": "echo", "messages": messages, "max_tokens": 8 }))?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
    Ok(answer.header("x-request-id").unwrap_or_default().to_owned())
}

fn leader(site: &Site, controller: usize) -> usize {
    let status = site.admin(controller).status().unwrap();
    status["leader"].as_str().expect("there is a leader")[1..].parse().unwrap()
}

/// Kills a controller and takes all that it knew.
fn wipe(site: &mut Site, controller: usize) {
    let node = format!("c{controller}");
    site.kill(&node);
    std::fs::remove_dir_all(site.data(&node)).unwrap();
}

/// Waits until all controllers list the same turns, none of them open, and returns their ids.
fn agreed(site: &Site) -> BTreeSet<String> {
    until("all controllers to list the same turns", SOON, || {
        let lists: Vec<_> = (1..=3).map(|i| site.admin(i).turns_by_id()).collect::<Result<_, _>>()?;
        ensure!(lists.iter().all(|list| *list == lists[0]), "the lists differ");
        ensure!(lists[0].values().all(|turn| turn.outcome != "running"), "turns are open");
        Ok(lists[0].keys().cloned().collect())
    })
}

#[test]
fn controllers_whose_disks_are_wiped_one_after_the_other_under_load_lose_nothing() {
    let _machine = izar_tests::shared();
    let (mut site, key) = site();
    let (ended, answered) = (AtomicBool::new(false), Mutex::new(BTreeSet::new()));
    // A controller that comes back listens elsewhere.
    let clients: [Mutex<Client>; 3] = [1, 2, 3].map(|i| Mutex::new(site.client(i, Some(&key))));
    std::thread::scope(|scope| {
        for client in &clients {
            let (ended, answered, key) = (&ended, &answered, &key);
            // What is refused while a controller is away was not acknowledged.
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let client = client.lock().unwrap().with_key(Some(key));
                    if let Ok(id) = ask(&client) {
                        answered.lock().unwrap().insert(id);
                    }
                }
            });
        }
        let back = |site: &mut Site, controller: usize| {
            site.start("izar-controller", &format!("c{controller}"));
            site.wait_led(controller);
            *clients[controller - 1].lock().unwrap() = site.client(controller, Some(&key));
        };
        let count = || answered.lock().unwrap().len();
        // Every member once, a leader and followers among them: at the end nobody has the disk that it began with.
        let first = leader(&site, 1);
        for victim in [first, first % 3 + 1, (first + 1) % 3 + 1] {
            wipe(&mut site, victim);
            let before = count();
            until_true("the others to serve", SOON, || count() > before + 20);
            back(&mut site, victim);
            let before = count();
            until_true("requests to be answered afterwards", SOON, || count() > before + 20);
        }
        // One of the others away, the member that was given its memory last is part of every majority.
        let last = (first + 1) % 3 + 1;
        let other = last % 3 + 1;
        site.kill(&format!("c{other}"));
        let before = count();
        until_true("the last one to decide with another", SOON, || count() > before + 20);
        back(&mut site, other);
        ended.store(true, Ordering::Relaxed);
    });
    let listed = agreed(&site);
    let answered = answered.into_inner().unwrap();
    let lost: Vec<&String> = answered.difference(&listed).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged turns are lost", lost.len(), answered.len());
    let audit = site.data("c1").join("audit");
    let trail: String = std::fs::read_dir(audit)
        .unwrap()
        .flatten()
        .map(|f| String::from_utf8_lossy(&std::fs::read(f.path()).unwrap()).into_owned())
        .collect();
    assert_eq!(trail.matches("member_readmitted").count(), 3, "each is in the audit trail");
    site.finish(&["this member had lost its memory"]);
}

#[test]
fn a_controller_without_memory_waits_for_every_other_one() {
    let _machine = izar_tests::shared();
    let (mut site, key) = site();
    let acknowledged: BTreeSet<String> = (1..=3).map(|i| ask(&site.client(i, Some(&key))).unwrap()).collect();
    wipe(&mut site, 2);
    site.kill("c3");
    site.start("izar-controller", "c2");
    let waits = "every other member must say how far the group is, and c3 does not";
    let said = |site: &Site| logs::read(&site.logs()).iter().any(|line| line.text.contains(waits));
    until_true("it to say that it waits", SOON, || said(&site));
    let status = site.admin(1).status().unwrap();
    assert!(status["leader"].is_null(), "c1 alone decides nothing, and c2 does not help it: {status}");
    site.stop("c2");
    site.start("izar-controller", "c3");
    site.wait_led(3);
    site.start("izar-controller", "c2");
    site.wait_led(2);
    assert!(acknowledged.is_subset(&agreed(&site)));
    site.finish(&[waits, "this member had lost its memory", "no controller leads"]);
}

#[test]
fn a_wiped_directory_that_was_filled_halfway_is_filled_anew() {
    let _machine = izar_tests::shared();
    let (mut site, key) = site();
    let before = ask(&site.client(1, Some(&key))).unwrap();
    let whole = std::fs::read(site.data("c2").join("izar.json")).unwrap();
    wipe(&mut site, 2);
    // What a daemon leaves that is killed while it takes the group's memory.
    let dir = site.data("c2");
    std::fs::create_dir_all(dir.join("audit")).unwrap();
    let halfway =
        String::from_utf8(whole).unwrap().replace("\"ready\": true", "\"ready\": false,\n  \"joining\": true");
    std::fs::write(dir.join("izar.json"), halfway).unwrap();
    std::fs::write(dir.join("audit/00000001.log"), "half").unwrap();
    std::fs::write(dir.join("state.redb"), "half").unwrap();
    site.start("izar-controller", "c2");
    site.wait_led(2);
    assert!(agreed(&site).contains(&before));
    site.finish(&["this member had lost its memory"]);
}

#[test]
fn two_controllers_replaced_at_once_do_not_begin_anew_while_the_third_is_away() {
    let _machine = izar_tests::shared();
    let (mut site, _) = site();
    wipe(&mut site, 1);
    wipe(&mut site, 2);
    site.kill("c3");
    let said = |site: &Site, text: &str| logs::read(&site.logs()).iter().any(|line| line.text.contains(text));
    site.start("izar-controller", "c1");
    site.start("izar-controller", "c2");
    let waits = "c3 does not answer, and may have the group's";
    until_true("both to say that they wait", SOON, || {
        logs::read(&site.logs()).iter().filter(|line| line.text.contains(waits)).count() >= 2
    });
    // It comes back with everything, and is not alone enough to decide; nor do the others help it.
    site.start("izar-controller", "c3");
    until_true("them to see that it has the group's", SOON, || said(&site, "nobody leads the group"));
    let status = site.admin(3).status().unwrap();
    assert!(status["leader"].is_null(), "{status}");
    let keys = site.admin(3).json(&["keys", "list", "--stale"]).unwrap().to_string();
    assert!(keys.contains("stays"), "what was decided is there: {keys}");
    site.finish(&[waits, "nobody leads the group", "no controller leads"]);
}
