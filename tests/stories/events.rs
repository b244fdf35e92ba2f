//! What an operator is told of comes to the journal as events, each under its own id, as the field that `journalctl
//! MESSAGE_ID=` asks for. The causes are real: a certificate that ends soon, a full disk, a worker and an agent that are
//! killed, GPUs that fail.

use izar_common::events;
use izar_common::tls::pki::issue_until;
use izar_tests::gpus::Server;
use izar_tests::journal::{Journal, Record};
use izar_tests::nodes::Site;
use izar_tests::process;
use izar_tests::waiting::{SOON, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// Deaths until it is told.
const FAILURES: usize = 5;

#[test]
fn what_an_operator_acts_on_comes_to_the_journal_under_its_id() {
    let _machine = izar_tests::shared();
    let Some(journal) = Journal::new() else {
        eprintln!("skipped: this kernel gives nobody a mount namespace, so no journal can be played");
        return;
    };
    let has = |name: &'static str, value: &'static str| move |record: &Record| record[name].contains(value);
    let mut site = Site::new(1, false);
    let identity = "izar://story/local/controller/c1".parse().unwrap();
    issue_until(&site.pki(), &identity, &["127.0.0.1".into()], &site.pki(), 6).unwrap();
    site.start_with_journal(&journal, "izar-controller", "c1", false);
    site.wait_led(1);
    let led = journal.wait(events::LEADER_CHANGED, has("LEADER", "c1"));
    assert_eq!(led["PRIORITY"], "5", "INFO is the journal's notice: {led:?}");
    let ends = journal.wait(events::CERTIFICATE_EXPIRES, has("FILE", "c1.pem"));
    assert_eq!((ends["DAYS"].as_str(), ends["PRIORITY"].as_str()), ("5", "3"), "{ends:?}");

    let controller = site.client(1, None);
    let page = || controller.get("/metrics").unwrap().text();
    let measured = |page: &str, name: &str, part: &str| {
        page.lines().any(|line| line.starts_with(name) && line.contains(part) && !line.ends_with(" 0"))
    };
    assert!(measured(&page(), "izar_certificate_expiry_timestamp_seconds{", "c1.pem\"} 1"), "{}", page());
    until_true("the disk to be measured", SOON, || {
        ["izar_disk_free_bytes ", "izar_disk_bytes "].iter().all(|name| measured(&page(), name, ""))
    });

    let settings = format!("expected = 2\nmode = \"act\"\nhelper = {:?}", site.path("no-hand"));
    let server = Server::prepare(&site, "a1", "gpus 2\nuuids", &settings);
    site.start_with_journal(&journal, "izar-agent", "a1", true);
    journal.wait(events::DISK_NEARLY_FULL, has("PATH", "a1-data"));
    until_true("an agent's machine to be measured", SOON, || {
        let names = ["certificate_expiry_timestamp_seconds", "disk_free_bytes", "disk_bytes"];
        names.iter().all(|name| measured(&page(), &format!("izar_agent_{name}"), "{agent=\"a1\"}"))
    });
    site.admin(1).deploy_echo("echo", 1, 0, 1);
    site.admin(1).wait_ready("echo", 1);
    let worker = || site.admin(1).json(&["agents", "list"]).ok()?["agents"][0]["workers"][0]["pid"].as_u64();
    for _ in 0..FAILURES {
        let mut pid = None;
        until_true("a worker that runs", SOON, || {
            pid = worker().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| process::runs(*pid));
            pid.is_some()
        });
        process::kill_hard(pid.expect("it was waited for"));
    }
    let fails = journal.wait(events::WORKER_FAILS, |_| true);
    assert_eq!(fails["FAILURES"], "5", "{fails:?}");

    // What serves there has no room elsewhere, so that nothing would be ordered.
    site.admin(1).json(&["models", "undeploy", "echo"]).unwrap();
    server.say("gpu1 field 230 1\ngpu1 xid 95");
    journal.wait(events::GPU_STOPPED, has("TO", "cordoned"));
    let vain = journal.wait(events::REMEDY_IN_VAIN, has("OUTCOME", "failed"));
    assert!(!vain["REASON"].is_empty(), "{vain:?}");
    server.say("gpu1 xid 79");
    journal.wait(events::GPU_SERVER_FAULT, |record| !record["FAULT"].is_empty());
    site.finish(&[]);
}

#[test]
fn an_agent_that_dies_with_work_and_a_budget_that_is_used_up_come_to_the_journal() {
    let _machine = izar_tests::shared();
    let Some(journal) = Journal::new() else {
        eprintln!("skipped: this kernel gives nobody a mount namespace, so no journal can be played");
        return;
    };
    let mut site = Site::new(1, false);
    let config = std::fs::read_to_string(site.config("c1")).unwrap();
    std::fs::write(site.config("c1"), format!("{config}\n[limits]\nmemory_bytes = 67108864\n")).unwrap();
    site.start_with_journal(&journal, "izar-controller", "c1", false);
    site.wait_led(1);
    site.write_agent("a1");
    site.start_with_journal(&journal, "izar-agent", "a1", false);
    site.admin(1).deploy_echo("slow", 1, 5, 200);
    site.admin(1).wait_ready("slow", 1);
    let key = site.admin(1).create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));
    let body = |more: Value| {
        let mut body = json!({ "model": "slow", "messages": [{ "role": "user", "content": "Go on." }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    // Room is taken for the whole answer before it begins: 8 of them, each token with its probability.
    let most = json!({ "max_tokens": 20_000, "n": 8, "logprobs": true });
    let refused = client.post(CHAT, &body(most)).unwrap();
    assert_eq!(refused.status, 503, "{}", refused.text());
    let told = journal.wait(events::MEMORY_REFUSED, |_| true);
    assert_eq!(told["LIMIT_MIB"], "64", "{told:?}");

    let mut answer = client.stream(CHAT, &body(json!({ "max_tokens": 200, "stream": true }))).unwrap();
    answer.event().unwrap().expect("a first event");
    site.kill("a1");
    let lost = journal.wait(events::AGENT_LOST, |record| record["AGENT"] == "a1");
    assert_eq!(lost["PRIORITY"], "4", "{lost:?}");
    drop(answer);
    site.finish(&[]);
}

#[test]
fn a_controller_that_waits_to_join_anew_says_so_in_the_journal() {
    let _machine = izar_tests::shared();
    let Some(journal) = Journal::new() else {
        eprintln!("skipped: this kernel gives nobody a mount namespace, so no journal can be played");
        return;
    };
    let mut site = Site::new(3, false);
    site.start_controllers();
    site.stop("c2");
    site.kill("c3");
    std::fs::remove_dir_all(site.data("c3")).unwrap();
    site.start_with_journal(&journal, "izar-controller", "c3", false);
    let waits = journal.wait(events::JOIN_WAITS, |_| true);
    assert!(waits["REASON"].contains("c2") && waits["PRIORITY"] == "4", "{waits:?}");
    site.start("izar-controller", "c2");
    site.wait_led(3);
    site.finish(&["no controller leads"]);
}
