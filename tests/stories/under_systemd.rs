//! The daemons as services: they say when they are ready, well and stopping, take the socket and the credentials that they
//! are given, read certificates anew without cutting a stream, and are not called well when one of their loops hangs.

use std::time::Duration;

use izar_tests::cli;
use izar_tests::manager::Manager;
use izar_tests::nodes::{Site, issue, issue_server};
use izar_tests::process;
use izar_tests::waiting::{SOON, until, until_true};
use izar_tests::{client, logs};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// A watchdog's limit for stories: long beside a pause of a busy machine, short beside a story.
const WATCHDOG: Duration = Duration::from_secs(12);

fn body(tokens: u64) -> Value {
    json!({ "model": "slow", "messages": [{ "role": "user", "content": "Go on." }], "max_tokens": tokens, "stream": true })
}

/// A stream of so many tokens that has begun.
fn begun(client: &client::Client, tokens: u64) -> client::Answer {
    let mut answer = client.stream(CHAT, &body(tokens)).unwrap();
    assert_eq!(answer.status, 200);
    answer.event().unwrap().expect("a first event");
    answer
}

/// Reads a stream that has begun to its end; the text since then, and whether it ended well.
fn rest(answer: client::Answer) -> (String, bool) {
    let transcript = answer.transcript().unwrap();
    (transcript.text, transcript.done && transcript.error.is_none())
}

#[test]
fn a_controller_says_how_it_is_and_serves_on_the_socket_that_it_was_given() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let socket = site.path("given.sock");
    let manager = Manager::new().with_watchdog(WATCHDOG).with_admin_socket(&socket, 0o660);
    // Its configuration names another one, which is not used.
    site.start_under(&manager, "izar-controller", "c1");
    manager.wait("READY=1");
    let admin = cli::Admin::new(&socket);
    until("a leader, asked through the given socket", SOON, || {
        let status = admin.status()?;
        anyhow::ensure!(status["leader"] == "c1", "{status}");
        Ok(())
    });
    assert!(!site.path("c1.sock").exists(), "no other socket is bound");
    manager.wait("STATUS=leads (term ");
    let well = manager.count("WATCHDOG=1");
    manager.wait_count("WATCHDOG=1", well + 3);
    assert_eq!(manager.count("STOPPING=1"), 0);
    site.stop("c1");
    manager.wait("STOPPING=1");
    let said = manager.said();
    let stopping = said.iter().position(|word| word == "STOPPING=1").unwrap();
    assert!(said[stopping..].iter().any(|word| word.starts_with("EXTEND_TIMEOUT_USEC=")), "{said:?}");
    assert!(socket.exists(), "the socket is its owner's, and is there for the next start");

    // The same socket serves the next process, too.
    site.start_under(&manager, "izar-controller", "c1");
    manager.wait_count("READY=1", 2);
    until("a leader again", SOON, || {
        anyhow::ensure!(admin.status()?["leader"] == "c1");
        Ok(())
    });
    site.finish(&[]);
}

#[test]
fn a_socket_that_everybody_may_use_is_refused() {
    let _machine = izar_tests::shared();
    let site = Site::new(1, false);
    let manager = Manager::new().with_admin_socket(&site.path("open.sock"), 0o666);
    let mut command = manager.command(&izar_tests::binaries::path("izar-controller"));
    let output = command.arg("--config").arg(site.config("c1")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("everybody may use") && said.contains("SocketMode=0660"),
        "{said}"
    );
    assert_eq!(manager.count("READY=1"), 0);
}

#[test]
fn a_loop_that_hangs_starves_the_watchdog() {
    let _machine = izar_tests::shared();
    for thread in ["raft", "tokio-rt-worker"] {
        let mut site = Site::new(1, false);
        let manager = Manager::new().with_watchdog(WATCHDOG);
        site.start_under(&manager, "izar-controller", "c1");
        site.wait_led(1);
        manager.wait_count("WATCHDOG=1", 2);
        process::wedge(site.pid("c1"), thread);
        until("the record of it", SOON, || {
            let lines = logs::read(&site.logs());
            anyhow::ensure!(lines.iter().any(|line| line.text.contains("a loop stands still")), "{lines:?}");
            Ok(())
        });
        // The process lives on and could say that it is well; longer than a watchdog waits, it does not.
        until_true("the watchdog to be over", SOON, || manager.silence("WATCHDOG=1") > WATCHDOG);
        assert!(process::runs(site.pid("c1")), "{thread} stands still, the process does not end by itself");
        site.kill("c1");
        site.finish(&["a loop stands still"]);
    }
}

#[test]
fn certificates_are_read_anew_while_a_stream_runs() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let (controller, agent) = (Manager::new(), Manager::new());
    site.start_under(&controller, "izar-controller", "c1");
    site.wait_led(1);
    site.write_agent("a1");
    site.start_under(&agent, "izar-agent", "a1");
    agent.wait("READY=1");
    site.admin(1).deploy_echo("slow", 1, 5, 50);
    site.admin(1).wait_ready("slow", 1);
    agent.wait("STATUS=hears 1 of 1 controllers; 1 of 1 workers are ready");
    let key = site.admin(1).create_key(&[]).unwrap();
    let shown = || site.client(1, None).server_certificate().unwrap();
    let first = shown();
    let (whole, well) = rest(site.client(1, Some(&key)).stream(CHAT, &body(100)).unwrap());
    assert!(well);
    let running = begun(&site.client(1, Some(&key)), 100);

    // New ones for the API, the controller and the agent, younger than what is looked at without being told.
    issue_server(&site.pki(), "api", &site.pki());
    issue(&site.pki(), "controller", "c1", &site.pki());
    issue(&site.pki(), "agent", "a1", &site.pki());
    assert_eq!(shown(), first, "nobody has asked for it yet");
    for (manager, node) in [(&controller, "c1"), (&agent, "a1")] {
        process::signal(site.pid(node), Signal::SIGHUP).unwrap();
        manager.wait("RELOADING=1");
        manager.wait_count("READY=1", 2);
        manager.wait("MONOTONIC_USEC=");
    }
    let second = shown();
    assert_ne!(second, first);

    // What is no certificate changes nothing, and says why.
    std::fs::write(site.pki().join("api.pem"), "rubbish").unwrap();
    let checked = cli::run("izar-controller", &["--config", site.config("c1").to_str().unwrap(), "--check-files"]);
    assert!(!checked.success && checked.stderr.contains("api.pem"), "{checked:?}");
    process::signal(site.pid("c1"), Signal::SIGHUP).unwrap();
    controller.wait_count("READY=1", 3);
    until("the refusal to be logged", SOON, || {
        let lines = logs::read(&site.logs());
        let told = |line: &logs::Line| line.text.contains("a reload is refused") && line.text.contains("api.pem");
        anyhow::ensure!(lines.iter().any(told), "{lines:?}");
        Ok(())
    });
    assert_eq!(shown(), second, "the old one stays");

    let (text, well) = rest(running);
    assert!(well && whole.ends_with(&text) && !text.is_empty(), "the stream went on: {text:?}");
    // The agent reaches the controller with the new certificates of both.
    site.stop("a1");
    site.start_under(&agent, "izar-agent", "a1");
    site.admin(1).wait_ready("slow", 1);
    site.finish(&["a reload is refused"]);
}

#[test]
fn an_agent_that_is_stopped_lets_its_answers_end_and_takes_no_more() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    site.write_agent("a1");
    let manager = Manager::new().with_watchdog(WATCHDOG);
    site.start_under(&manager, "izar-agent", "a1");
    manager.wait("READY=1");
    site.admin(1).deploy_echo("slow", 1, 5, 50);
    site.admin(1).wait_ready("slow", 1);
    let well = manager.count("WATCHDOG=1");
    manager.wait_count("WATCHDOG=1", well + 3);
    let key = site.admin(1).create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));
    let (whole, _) = rest(client.stream(CHAT, &body(60)).unwrap());
    let running = begun(&client, 60);
    process::signal(site.pid("a1"), Signal::SIGTERM).unwrap();
    manager.wait("STOPPING=1");
    until("the controller to send it nothing more", SOON, || {
        let ready = site.admin(1).ready_replicas("slow")?;
        anyhow::ensure!(ready == 0, "{ready} replicas are ready");
        Ok(())
    });
    // Nobody else could go on with it.
    let (text, well) = rest(running);
    assert!(well && whole.ends_with(&text) && !text.is_empty(), "{text:?}");
    site.stop("a1");
    let said = manager.said();
    let stopping = said.iter().position(|word| word == "STOPPING=1").unwrap();
    assert!(said[stopping..].iter().any(|word| word.starts_with("EXTEND_TIMEOUT_USEC=")), "{said:?}");

    site.start_under(&manager, "izar-agent", "a1");
    site.admin(1).wait_ready("slow", 1);
    assert_eq!(rest(client.stream(CHAT, &body(60)).unwrap()), (whole, true));
    site.finish(&[]);
}

#[test]
fn keys_and_secrets_come_as_credentials_and_a_missing_one_is_named_with_the_mend() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let (folder, pki) = (site.path("").display().to_string(), site.pki());
    let folder = folder.trim_end_matches('/');
    let secrets = format!("[secrets]\npepper = \"{folder}/pepper\"\nmaster_key = \"{folder}/master.key\"\n");
    site.edit_config("c1", &secrets, "");
    site.edit_config("c1", &format!("key = \"{folder}/pki/c1.key\"\n"), "");
    site.edit_config("c1", &format!("key = \"{folder}/pki/api.key\"\n"), "key = \"credential:api.key\"\n");
    let config = site.config("c1");
    let config = config.to_str().unwrap();

    // By hand, without a service manager.
    let checked = cli::run("izar-controller", &["--config", config, "--check-config"]);
    assert!(checked.success && checked.stdout.contains("c1.toml: ok"), "{checked:?}");
    let refused = cli::refused_start("izar-controller", &["--config", config]);
    for said in [&checked.stdout, &refused] {
        assert!(said.contains("the credential node.key is missing: make it with `systemd-creds encrypt"), "{said}");
    }
    assert!(checked.stdout.contains("secrets.master_key: the credential master-key is missing"), "{checked:?}");

    // With some of them.
    let manager = Manager::new();
    manager.put_credential("node.key", &pki.join("c1.key"));
    manager.put_credential("api.key", &pki.join("api.key"));
    manager.put_credential("pepper", &site.path("pepper"));
    let mut command = manager.command(&izar_tests::binaries::path("izar-controller"));
    let output = command.args(["--config", config, "--check-files"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("the credential master-key is missing"), "{said}");
    assert!(!said.contains("node.key") && !said.contains("pepper is"), "the others are there: {said}");

    // With all.
    manager.put_credential("master-key", &site.path("master.key"));
    site.start_under(&manager, "izar-controller", "c1");
    manager.wait("READY=1");
    site.wait_led(1);
    let agent = Manager::new();
    site.write_agent("a1");
    site.edit_config("a1", &format!("key = \"{folder}/pki/a1.key\"\n"), "");
    agent.put_credential("node.key", &pki.join("a1.key"));
    site.start_under(&agent, "izar-agent", "a1");
    agent.wait("READY=1");
    site.admin(1).deploy_echo("slow", 1, 5, 5);
    site.admin(1).wait_ready("slow", 1);
    let key = site.admin(1).create_key(&[]).unwrap();
    assert!(rest(site.client(1, Some(&key)).stream(CHAT, &body(5)).unwrap()).1);
    site.finish(&[]);
}

#[test]
fn an_agent_counts_as_started_though_no_controller_is_there_and_serves_once_one_is() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.write_agent("a1");
    let manager = Manager::new();
    site.start_under(&manager, "izar-agent", "a1");
    manager.wait("EXTEND_TIMEOUT_USEC=");
    manager.wait("STATUS=hears 0 of 1 controllers");
    assert_eq!(manager.count("READY=1"), 0, "it waits for a while");
    manager.wait("READY=1");
    site.start_controllers();
    manager.wait("STATUS=hears 1 of 1 controllers");
    site.finish(&[]);
}
