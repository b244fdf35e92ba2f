//! A cluster that is backed up under load and lives on from the file; one whose quorum is lost for good; and files that
//! must not be restored.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use izar_tests::cli::{self, Output};
use izar_tests::client::Client;
use izar_tests::logs;
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// What a controller says of one whose life is another.
const UNHEARD: &str = "a peer is of another life of this cluster and is not heard";

fn body(model: &str, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Remember this." }]);
    json!({ "model": model, "messages": messages, "max_tokens": 8, "stream": stream })
}

/// Three controllers, an agent, and two deployments: one answers at once, one keeps its turns open.
fn site() -> Site {
    let mut site = Site::new(3, false);
    site.start_controllers();
    site.start_agent("a1");
    site.admin(1).deploy_echo("echo", 1, 0, 1);
    site.admin(1).deploy_echo("slow", 1, 60_000, 1);
    wait_serving(&site);
    site
}

fn wait_serving(site: &Site) {
    for controller in 1..=3 {
        for deployment in ["echo", "slow"] {
            site.admin(controller).wait_ready(deployment, 1);
        }
    }
}

/// Asks once; the id of the request, if it was answered.
fn ask(client: &Client) -> anyhow::Result<String> {
    let answer = client.post(CHAT, &body("echo", false))?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
    Ok(answer.header("x-request-id").unwrap_or_default().to_owned())
}

fn status_of(client: &Client) -> u16 {
    client.post(CHAT, &body("echo", false)).map_or(0, |answer| answer.status)
}

/// Runs `izar ARGUMENTS --json` and reads its answer.
fn izar(arguments: &[&str]) -> Value {
    let output = offline(arguments);
    assert!(output.success, "izar {}: {}", arguments.join(" "), output.stderr);
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.stdout))
}

fn offline(arguments: &[&str]) -> Output {
    let mut all = arguments.to_vec();
    all.push("--json");
    cli::run("izar", &all)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our paths are UTF-8")
}

/// Restores a member from a file into an empty directory; the old one, if it is there, is put aside. Returns what it said.
fn restore(site: &Site, node: &str, file: &str) -> Value {
    let _ = std::fs::rename(site.data(node), site.path(&format!("{node}-old")));
    izar(&["restore", file, "--config", text(&site.config(node))])
}

fn restore_all(site: &Site, file: &str) -> Vec<Value> {
    (1..=3).map(|i| restore(site, &format!("c{i}"), file)).collect()
}

/// Every turn that a controller knows, by outcome.
fn turns(site: &Site, controller: usize, outcome: &str) -> BTreeSet<String> {
    let turns = site.admin(controller).turns_by_id().unwrap();
    turns.into_values().filter(|turn| turn.outcome == outcome).map(|turn| turn.id).collect()
}

/// A follower's number.
fn follower(site: &Site) -> usize {
    let follows = |i: &usize| site.admin(*i).status().unwrap()["role"] == "follower";
    (1..=3).find(follows).expect("two of three follow")
}

#[test]
fn a_cluster_that_was_backed_up_under_load_lives_on_from_the_file() {
    let _machine = izar_tests::shared();
    let mut site = site();
    let key = site.admin(1).create_key(&["--note", "stays"]).unwrap();
    let revoked = site.admin(1).json(&["keys", "create"]).unwrap();
    site.admin(1).json(&["keys", "revoke", revoked["id"].as_str().unwrap()]).unwrap();
    let clients: Vec<Client> = (1..=3).map(|i| site.client(i, Some(&key))).collect();
    until_true("the key to be known", SOON, || clients.iter().all(|client| status_of(client) == 200));
    let open = clients[0].stream(CHAT, &body("slow", true)).unwrap();
    let open_id = open.header("x-request-id").unwrap().to_owned();
    until_true("the turn to be open", SOON, || turns(&site, 1, "running").contains(&open_id));

    let (ended, answered) = (AtomicBool::new(false), Mutex::new(BTreeSet::new()));
    let kept = site.path("kept");
    let (before, taken) = std::thread::scope(|scope| {
        for client in &clients {
            let (ended, answered) = (&ended, &answered);
            scope.spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let id = ask(client).unwrap();
                    answered.lock().unwrap().insert(id);
                }
            });
        }
        let count = || answered.lock().unwrap().len();
        until_true("requests to be answered", SOON, || count() > 30);
        // An answer that is not kept for a client that asks twice is recorded as finished right afterwards.
        let before: BTreeSet<String> = answered.lock().unwrap().clone();
        let taken = site.admin(follower(&site)).json(&["backup", "--to", text(&kept)]).unwrap();
        let after = count();
        until_true("requests to be answered afterwards", SOON, || count() > after + 10);
        ended.store(true, Ordering::Relaxed);
        (before, taken)
    });
    drop(open);
    let file = taken["kept_as"].as_str().unwrap().to_owned();
    let listed = izar(&["backup", "list", "--to", text(&kept)]);
    assert_eq!(listed["backups"][0]["header"]["applied"], taken["applied"], "{listed}");
    let verified = izar(&["backup", "verify", &file, "--config", text(&site.config("c3"))]);
    assert_eq!((&verified["keys"], &verified["incarnation"]), (&json!(2), &json!(1)), "{verified}");
    assert!(verified["open_turns"].as_u64().unwrap() >= 1, "{verified}");

    for node in ["c1", "c2", "c3"] {
        site.stop(node);
    }
    let restored = restore_all(&site, &file);
    for one in &restored {
        assert_eq!((&one["digest"], &one["incarnation"]), (&restored[0]["digest"], &json!(2)), "{one}");
    }
    let again = offline(&["restore", &file, "--config", text(&site.config("c1"))]);
    assert!(!again.success && again.stderr.contains("is not empty"), "{}", again.stderr);
    site.start_controllers();
    // The agent never stopped: it follows the new life, and still has what it ran.
    wait_serving(&site);
    for controller in 1..=3 {
        let client = site.client(controller, Some(&key));
        until_true("the key to work", SOON, || status_of(&client) == 200);
        assert_eq!(status_of(&client.with_key(revoked["key"].as_str())), 401, "a revoked key stays revoked");
        let known: BTreeSet<String> = site.admin(controller).turns_by_id().unwrap().into_keys().collect();
        let lost: Vec<_> = before.difference(&known).collect();
        assert!(lost.is_empty(), "acknowledged before the backup, and not in it: {lost:?}");
        assert!(turns(&site, controller, "abandoned").contains(&open_id), "what was open is closed");
    }
    let taken = site.admin(1).json(&["backup", "--to", text(&kept), "--keep", "1"]).unwrap();
    assert_eq!(taken["removed"].as_array().map(Vec::len), Some(1), "{taken}");
    let file = taken["kept_as"].as_str().unwrap();
    let verified = izar(&["backup", "verify", file, "--config", text(&site.config("c1"))]);
    assert_eq!(verified["incarnation"], 2);
    assert_eq!(site.admin(1).status().unwrap()["incarnation"], 2, "whoever restores again learns which life it is");
    assert!(verified["audit_records"].as_u64() > restored[0]["records"].as_u64(), "the trail goes on: {verified}");
    site.finish(&[]);
}

#[test]
fn a_cluster_that_lost_its_quorum_for_good_goes_on_with_what_one_member_had() {
    let _machine = izar_tests::shared();
    let mut site = site();
    let key = site.admin(1).create_key(&[]).unwrap();
    let survivor = follower(&site);
    let (left, others): (String, Vec<usize>) = (format!("c{survivor}"), (1..=3).filter(|i| *i != survivor).collect());
    let client = site.client(survivor, Some(&key));
    until_true("the key to be known", SOON, || status_of(&client) == 200);
    let kept: BTreeSet<String> = (0..20).map(|_| ask(&client).unwrap()).collect();
    let known = site.admin(survivor).status().unwrap()["applied"].as_u64().unwrap();

    // The survivor hangs while the others decide, and then they are gone with their disks.
    izar_tests::process::stop(site.pid(&left));
    let unheard = site.admin(others[0]);
    let lost_key = until("a key that the survivor does not hear of", SOON, || unheard.create_key(&[]));
    let lost_turn = {
        let client = site.client(others[0], Some(&key));
        until("a turn that the survivor does not hear of", SOON, || ask(&client))
    };
    for other in &others {
        site.kill(&format!("c{other}"));
        std::fs::remove_dir_all(site.data(&format!("c{other}"))).unwrap();
    }
    site.kill(&left);

    let (config, to) = (site.config(&left), site.path("kept"));
    let recovered = izar(&["recover", "--config", text(&config), "--to", text(&to)]);
    assert!(recovered["last"].as_u64().unwrap() >= known, "{recovered}");
    let said = cli::run("izar", &["recover", "--config", text(&config)]);
    assert!(said.success && said.stdout.contains("may be lost"), "{}{}", said.stdout, said.stderr);
    restore_all(&site, recovered["kept_as"].as_str().unwrap());
    site.start_controllers();
    wait_serving(&site);
    for controller in 1..=3 {
        let client = site.client(controller, Some(&key));
        until_true("the key to work", SOON, || status_of(&client) == 200);
        assert_eq!(
            status_of(&client.with_key(Some(&lost_key))),
            401,
            "decided without the survivor: lost, as was said"
        );
        let turns = site.admin(controller).turns_by_id().unwrap();
        assert!(!turns.contains_key(&lost_turn));
        for id in &kept {
            let outcome = turns.get(id).map(|turn| turn.outcome.as_str());
            assert!(matches!(outcome, Some("finished" | "abandoned")), "{id}: {outcome:?}");
        }
    }
    site.finish(&[]);
}

#[test]
fn a_member_of_the_old_life_that_comes_back_does_no_harm_and_joins_once_it_is_restored() {
    let _machine = izar_tests::shared();
    let mut site = site();
    let key = site.admin(1).create_key(&[]).unwrap();
    let taken = site.admin(1).json(&["backup", "--to", text(&site.path("kept"))]).unwrap();
    let file = taken["kept_as"].as_str().unwrap().to_owned();
    // What the old life decided after the backup makes the forgotten member's log longer than the new life's.
    (0..20).for_each(|i| drop(site.admin(1).create_key(&["--note", &format!("later {i}")]).unwrap()));
    for node in ["c1", "c2", "c3"] {
        site.stop(node);
    }
    ["c1", "c2"].iter().for_each(|node| drop(restore(&site, node, &file)));
    (1..=3).for_each(|i| site.start("izar-controller", &format!("c{i}")));
    [1, 2].into_iter().for_each(|i| site.wait_led(i));
    let new_key = until("a key of the new life", SOON, || site.admin(1).create_key(&["--note", "new"]));
    for controller in [1, 2] {
        let client = site.client(controller, Some(&new_key));
        until_true("the new life to serve", SOON, || status_of(&client) == 200);
        let leader = site.admin(controller).status().unwrap()["leader"].clone();
        assert!(leader == "c1" || leader == "c2", "{leader}");
        let keys = site.admin(controller).json(&["keys", "list"]).unwrap();
        assert_eq!(keys["keys"].as_array().map(Vec::len), Some(2), "{keys}");
    }
    until_true("it to be told of", SOON, || {
        logs::read(&site.logs()).iter().any(|line| line.text.contains(UNHEARD) && line.text.contains("life=2 its=1"))
    });
    let keys = site.admin(3).json(&["keys", "list", "--stale"]).unwrap();
    assert_eq!(keys["keys"].as_array().map(Vec::len), Some(21), "it still has its old state: {keys}");

    site.stop("c3");
    restore(&site, "c3", &file);
    site.start("izar-controller", "c3");
    site.wait_led(3);
    wait_serving(&site);
    for key in [&key, &new_key] {
        let client = site.client(3, Some(key));
        until_true("the restored member to know what the new life decided", SOON, || status_of(&client) == 200);
    }
    site.finish(&[UNHEARD, "no controller leads"]);
}

/// A backup of a cluster with one controller that runs no more, and its site.
fn small() -> (Site, PathBuf) {
    let mut site = Site::new(1, false);
    site.start_controllers();
    let taken = site.admin(1).json(&["backup", "--to", text(&site.path("kept")), "--if-leader"]).unwrap();
    let file = PathBuf::from(taken["kept_as"].as_str().unwrap());
    (site, file)
}

#[test]
fn a_backup_that_is_damaged_or_of_another_key_is_refused_and_nothing_is_made() {
    let _machine = izar_tests::shared();
    let (mut site, file) = small();
    let held = offline(&["recover", "--config", text(&site.config("c1"))]);
    assert!(!held.success && held.stderr.contains("stop the controller first"), "{}", held.stderr);
    site.stop("c1");
    let (config, whole) = (site.config("c1"), std::fs::read(&file).unwrap());
    let fresh = site.path("fresh");
    let refused = |content: &[u8], more: &[&str]| {
        let bad = site.path("bad.izarbak");
        std::fs::write(&bad, content).unwrap();
        let mut said = String::new();
        for command in [&["backup", "verify"][..], &["restore"]] {
            let mut arguments = command.to_vec();
            arguments.extend([text(&bad), "--config", text(&config)]);
            arguments.extend(more);
            if command[0] == "restore" {
                arguments.extend(["--data-dir", text(&fresh)]);
            }
            let output = offline(&arguments);
            assert!(!output.success, "{arguments:?}");
            said += &output.stderr;
        }
        let log = fresh.join("raft.redb");
        assert!(!log.exists(), "no member was made");
        let _ = std::fs::remove_dir_all(&fresh);
        said
    };
    let mut tampered = whole.clone();
    let middle = tampered.len() - 100;
    tampered[middle] ^= 1;
    let said = refused(&tampered, &[]);
    assert_eq!(said.matches("damaged, changed or in the wrong place").count(), 2, "{said}");
    let said = refused(&whole[..whole.len() - 10], &[]);
    assert!(said.matches("cut off").count() == 2 && said.contains("take another one"), "{said}");
    let said = refused(b"not at all", &[]);
    assert!(said.contains("it is no backup"), "{said}");
    let other = site.path("other.key");
    std::fs::copy(site.path("pepper"), &other).unwrap();
    let said = refused(&whole, &["--master-key", text(&other)]);
    assert_eq!(said.matches("another master key").count(), 2, "{said}");
    site.finish(&[]);
}

#[test]
fn a_member_of_another_life_acknowledges_nothing_to_the_old_one() {
    let _machine = izar_tests::shared();
    let mut site = site();
    let kept = site.path("kept");
    let taken = site.admin(1).json(&["backup", "--to", text(&kept)]).unwrap();
    // Somebody believes the others lost, and restores on one of them alone.
    let alone = follower(&site);
    let node = format!("c{alone}");
    site.stop(&node);
    restore(&site, &node, taken["kept_as"].as_str().unwrap());
    site.start("izar-controller", &node);
    let lives = |from: &str| {
        let lines = logs::read(&site.logs());
        lines.iter().any(|line| line.text.contains(UNHEARD) && line.text.contains(from))
    };
    until_true("both sides to say so", SOON, || lives("life=1 its=2") && lives("life=2 its=1"));
    let others: Vec<usize> = (1..=3).filter(|i| *i != alone).collect();
    let key = site.admin(others[0]).create_key(&["--note", "of the old life"]).unwrap();
    let clients: Vec<Client> = others.iter().map(|i| site.client(*i, Some(&key))).collect();
    until_true("the old life to go on", SOON, || clients.iter().all(|client| status_of(client) == 200));
    assert!(site.admin(alone).status().unwrap()["leader"].is_null(), "the new one has no majority");

    // One of the old ones away, what the other says is decided by nobody.
    site.kill(&format!("c{}", others[0]));
    until("the old life to have lost its majority", SOON, || {
        let status = site.admin(others[1]).status()?;
        ensure!(status["leader"].is_null(), "{status}");
        Ok(())
    });
    assert_eq!(status_of(&clients[1]), 503, "nothing is acknowledged that one disk alone has");
    site.start("izar-controller", &format!("c{}", others[0]));
    site.wait_led(others[1]);
    until_true("the old life to go on again", SOON, || status_of(&clients[1]) == 200);
    site.finish(&[UNHEARD, "no controller leads"]);
}
