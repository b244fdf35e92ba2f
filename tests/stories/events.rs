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

/// Deaths until it is told.
const FAILURES: usize = 5;

#[test]
fn what_an_operator_acts_on_comes_to_the_journal_under_its_id() {
    let _machine = izar_tests::exclusive();
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

    let server = Server::prepare(&site, "a1", "gpus 2", "expected = 2");
    site.start_with_journal(&journal, "izar-agent", "a1", true);
    journal.wait(events::DISK_NEARLY_FULL, has("PATH", "a1-data"));
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

    server.say("gpu1 xid 48");
    journal.wait(events::GPU_STOPPED, has("TO", "cordoned"));
    server.say("gpu1 xid 79");
    journal.wait(events::GPU_SERVER_FAULT, |record| !record["FAULT"].is_empty());
    site.finish(&[]);
}
