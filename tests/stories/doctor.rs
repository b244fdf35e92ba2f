//! The operator's two looks from outside: the doctor, on a machine where things are wrong, and the archive for support,
//! which holds no secret.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use izar_common::tls::pki::issue_until;
use izar_tests::cli::{self, Output};
use izar_tests::gpus::Server;
use izar_tests::nodes::Site;
use izar_tests::relay::contains;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

use crate::gpu_health::{FAULT, WORSE, wait_state};

fn text(path: &Path) -> &str {
    path.to_str().expect("our paths are UTF-8")
}

fn doctor(site: &Site) -> (Output, Value) {
    let agent = site.path("no-agent.toml");
    let output =
        cli::run("izar", &["doctor", "--json", "--config", text(&site.config("c1")), "--agent-config", text(&agent)]);
    let said =
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", output.stdout, output.stderr));
    (output, said)
}

/// A check's verdict and what was found and is to be done.
fn finding(said: &Value, check: &str) -> (String, String) {
    let found = said["findings"].as_array().into_iter().flatten().find(|finding| finding["check"] == check);
    let found = found.unwrap_or_else(|| panic!("no `{check}` in {said}"));
    (found["verdict"].as_str().unwrap_or_default().to_owned(), format!("{} {}", found["found"], found["mend"]))
}

#[test]
fn the_doctor_names_what_is_wrong_and_the_mend_whether_the_daemon_runs_or_not() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let (output, said) = doctor(&site);
    assert!(output.success, "a controller that was never started is no failure: {said}");
    assert_eq!(finding(&said, "controller").0, "warning");
    assert_eq!(finding(&said, "quic.listen").0, "ok");

    site.start_controllers();
    let (output, said) = doctor(&site);
    assert!(output.success, "{said}");
    for check in ["configuration", "master key", "node certificate", "api certificate", "quorum", "controller"] {
        assert_eq!(finding(&said, check).0, "ok", "{said}");
    }
    site.stop("c1");

    let taken = std::net::UdpSocket::bind(site.quic(1)).unwrap();
    let key = site.path("master.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::remove_file(site.pki().join("c1.key")).unwrap();
    let (output, said) = doctor(&site);
    assert!(!output.success, "a failure is an exit status");
    for (check, part) in
        [("quic.listen", "ss -lnp"), ("master key", "chmod 600"), ("node certificate", "izar pki issue")]
    {
        let (verdict, words) = finding(&said, check);
        assert!(verdict == "failure" && words.contains(part), "{check}: {words}");
    }
    drop(taken);
    std::fs::write(site.config("c1"), "cluster = \"story\"\nsiet = \"local\"\n").unwrap();
    let (_, said) = doctor(&site);
    let (verdict, words) = finding(&said, "configuration");
    assert!(verdict == "failure" && words.contains("c1.toml:2:1"), "{words}");
    site.finish(&[]);
}

#[test]
fn a_controller_that_could_not_serve_ends_before_it_promises_anything() {
    let _machine = izar_tests::shared();
    let site = Site::new(1, false);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    site.edit_config("c1", "[api]\nlisten = \"127.0.0.1:0\"", &format!("[api]\nlisten = \"{address}\""));
    let said = cli::refused_start("izar-controller", &["--config", text(&site.config("c1"))]);
    assert!(said.contains(&format!("api.listen: listen on {address}: Address already in use")), "{said}");
    assert!(!site.data("c1").exists(), "a vote that nobody else knows of");
    let (verdict, words) = finding(&doctor(&site).1, "api.listen");
    assert!(verdict == "failure" && words.contains("ss -lnp"), "{words}");
}

#[test]
fn the_doctor_asks_the_other_controllers_and_looks_for_a_backup() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(3, false);
    site.start_controllers();
    let (_, said) = doctor(&site);
    let peers = |said: &Value| -> Vec<(String, String)> {
        let findings = said["findings"].as_array().into_iter().flatten().filter(|finding| finding["check"] == "peer");
        findings.map(|f| (f["verdict"].as_str().unwrap_or_default().to_owned(), f["found"].to_string())).collect()
    };
    for (node, (verdict, found)) in ["c2", "c3"].iter().zip(peers(&said)) {
        let version = format!("{node} runs version {}", env!("CARGO_PKG_VERSION"));
        assert!(verdict == "ok" && found.contains(&version) && found.contains("its clock is"), "{said}");
    }
    assert_eq!((peers(&said).len(), finding(&said, "backup").0.as_str()), (2, "warning"), "{said}");

    site.admin(1).json(&["backup", "--to", text(&site.path("kept"))]).unwrap();
    site.stop("c3");
    let (output, said) = doctor(&site);
    assert!(output.success, "{said}");
    assert_eq!(finding(&said, "backup").0, "ok", "{said}");
    let verdicts: Vec<String> = peers(&said).into_iter().map(|(verdict, _)| verdict).collect();
    assert_eq!(verdicts, ["ok", "warning"], "{said}");
    site.finish(&[]);
}

/// What the doctor says on a server that has an agent alone.
fn doctor_of_agent(site: &Site, agent: &str) -> Value {
    let (config, none) = (site.config(agent), site.path("no-controller.toml"));
    let mut tool = Command::new(izar_tests::binaries::path("izar"));
    tool.args(["doctor", "--json", "--config", text(&none), "--agent-config", text(&config)]);
    // What the GPU library of that server plays.
    tool.env("IZAR_FAKE_NVML", site.path(&format!("{agent}.gpus")));
    let output = tool.output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn the_doctor_sees_an_agents_gpus_from_its_server_and_from_a_controller() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let (hand, broken) = (site.path("a1.hand"), site.path("a2.hand"));
    let _listener = std::os::unix::net::UnixListener::bind(&hand).unwrap();
    let settings = |hand: &Path, expected: u32| format!("mode = \"act\"\nhelper = {hand:?}\nexpected = {expected}");
    let server = Server::start(&mut site, "a1", "gpus 2", &settings(&hand, 2));
    let _other = Server::start(&mut site, "a2", "gpus 2", &settings(&broken, 3));
    wait_state(&site, "a1", 1, "healthy");
    let said = doctor_of_agent(&site, "a1");
    for check in
        ["agent configuration", "agent certificate", "controller reached", "disk space", "gpu count", "gpu remediation"]
    {
        assert_ne!(finding(&said, check).0, "failure", "{said}");
    }
    assert_eq!(finding(&said, "controller reached").0, "ok", "{said}");
    let said = doctor_of_agent(&site, "a2");
    for (check, part) in [("gpu count", "2 GPUs are found, 3 are expected"), ("gpu remediation", "agent_remediation")] {
        let (verdict, words) = finding(&said, check);
        assert!(verdict == "failure" && words.contains(part), "{check}: {words}");
    }

    server.say("gpu1 xid 48");
    wait_state(&site, "a1", 1, "cordoned");
    until("the doctor on a controller to name both", SOON, || {
        let (output, said) = doctor(&site);
        let told = |check: &str, verdict: &str, part: &str| {
            let all = said["findings"].as_array().into_iter().flatten();
            let mut found = all.filter(|f| f["check"] == check && f["verdict"] == verdict);
            found.any(|f| f["found"].to_string().contains(part) && f["mend"].to_string().contains("izar gpus"))
        };
        anyhow::ensure!(told("gpu", "warning", "GPU 1 of a1 is cordoned: "), "{said}");
        anyhow::ensure!(told("agent", "failure", "a2 gets no work: "), "{said}");
        anyhow::ensure!(!output.success, "{said}");
        Ok(())
    });
    let admin = site.admin(1);
    let forget = || admin.json(&["agents", "forget", "a2"]);
    let refused = forget().unwrap_err().to_string();
    assert!(refused.contains("agent a2 is connected: stop it first"), "{refused}");
    site.stop("a2");
    until("the agent that was taken away to be forgotten", SOON, || forget().map(drop));
    let (_, said) = doctor(&site);
    assert!(!said.to_string().contains("a2"), "nothing is left to be said of it: {said}");
    assert!(forget().unwrap_err().to_string().contains("there is no agent a2"), "a name that is mistyped is told");
    site.finish(&[WORSE, FAULT, "GPUs are being mended", "a remedy of GPUs has not helped"]);
}

#[test]
fn an_expired_certificate_is_named_by_the_doctor_and_refused_by_the_agent() {
    let _machine = izar_tests::shared();
    let site = Site::new(2, false);
    site.write_agent("a1");
    let (verdict, words) = finding(&doctor_of_agent(&site, "a1"), "controller reached");
    assert!(verdict == "failure" && words.contains("does not answer over UDP"), "{words}");
    let identity = "izar://story/local/agent/a1".parse().unwrap();
    issue_until(&site.pki(), &identity, &[], &site.pki(), 0).unwrap();
    let expired = |said: &Value| {
        let (verdict, words) = finding(said, "agent certificate");
        assert!(verdict == "failure" && words.contains("a1.pem has expired (on 20"), "{words}");
        assert!(words.contains("rotate_certs.yml") && words.contains("izar pki issue"), "{words}");
    };
    expired(&doctor_of_agent(&site, "a1"));
    let config = site.config("a1");
    let started = cli::run("izar-agent", &["--config", text(&config)]);
    assert!(!started.success && started.stderr.contains("a1.pem has expired (on 20"), "{started:?}");

    // A key that the doctor cannot read hides neither the date nor the name.
    let key = format!("key = \"{}\"", site.pki().join("a1.key").display());
    site.edit_config("a1", &key, "key = \"credential:node.key\"");
    expired(&doctor_of_agent(&site, "a1"));
    let other = "izar://story/local/agent/a2".parse().unwrap();
    issue_until(&site.pki(), &other, &[], &site.pki(), 100).unwrap();
    std::fs::copy(site.pki().join("a2.pem"), site.pki().join("a1.pem")).unwrap();
    let (verdict, words) = finding(&doctor_of_agent(&site, "a1"), "agent certificate");
    assert!(verdict == "failure" && words.contains("agent/a2, but this is izar://story/local/agent/a1"), "{words}");
}

#[test]
fn the_archive_for_support_holds_what_is_needed_and_no_secret() {
    let _machine = izar_tests::shared();
    let mut site = Site::with_log_level(1, false, "debug");
    let mut config = std::fs::read_to_string(site.config("c1")).unwrap();
    config.insert_str(0, "# password = \"hunter2-planted\"\n");
    std::fs::write(site.config("c1"), config).unwrap();
    site.start_controllers();
    site.write_agent("a1");
    let mut agent = std::fs::read_to_string(site.config("a1")).unwrap();
    agent.insert_str(0, "# bmc_password: hunter3-planted\n");
    std::fs::write(site.config("a1"), agent).unwrap();
    site.start("izar-agent", "a1");
    site.admin(1).deploy_echo("echo", 1, 0, 1);
    site.admin(1).wait_ready("echo", 1);
    let key = site.admin(1).create_key(&[]).unwrap();
    let canary = format!("canary-{:016x}", rand::random::<u64>());
    let body = json!({ "model": "echo", "messages": [{ "role": "user", "content": canary }], "max_tokens": 8 });
    let client = site.client(1, Some(&key));
    let mut answer = String::new();
    until_true("an answer", SOON, || {
        let response = client.post("/v1/chat/completions", &body).unwrap();
        answer = if response.status == 200 { response.content() } else { String::new() };
        !answer.is_empty()
    });

    let to = site.path("bundle.tar.gz");
    let (config, agent) = (site.config("c1"), site.config("a1"));
    let arguments = ["support-bundle", "--to", text(&to), "--config", text(&config), "--agent-config", text(&agent)];
    // A script has logged what it should not have; credentials and the environment hold what nobody looks for there.
    let bin = site.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let journalctl = "#!/bin/sh\necho '2026-11-28T00:00:00 c1 hook: curl -H \"Authorization: Bearer hunter4-planted\" ok'\n\
                      echo 'c1 hook: SECRET_TOKEN=hunter5-planted'\necho c1 izar-controller: planted-and-harmless\n";
    std::fs::write(bin.join("journalctl"), journalctl).unwrap();
    std::fs::set_permissions(bin.join("journalctl"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(bin.join("node.key"), "hunter6-planted").unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let mut tool = Command::new(izar_tests::binaries::path("izar"));
    tool.args(arguments).env("PATH", path).env("CREDENTIALS_DIRECTORY", &bin);
    tool.env("IZAR_KEY", "hunter7-planted").env("AWS_SECRET_ACCESS_KEY", "hunter8-planted");
    let made = tool.output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(!cli::run("izar", &arguments).success, "nothing is overwritten");
    let folder = site.path("");
    let untar = Command::new("tar").args(["xzf", text(&to), "-C", text(&folder)]).status().unwrap();
    assert!(untar.success());
    let mut all = Vec::new();
    for name in [
        "about.txt",
        "doctor.json",
        "status.json",
        "agents.json",
        "turns.json",
        "metrics.txt",
        "journal.txt",
        "config/c1.toml",
        "config/a1.toml",
    ] {
        let path = folder.join("izar-support").join(name);
        let content = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!content.starts_with(b"could not be had") || name == "journal.txt", "{name}");
        all.extend(content);
    }
    assert!(contains(&all, b"planted-and-harmless"), "what is harmless stays");
    assert!(contains(&all, b"master_key = ") && contains(&all, b"izar_"), "what is needed is there");
    let digits = |name: &str| std::fs::read_to_string(site.path(name)).unwrap().trim().to_owned();
    for planted in 2..=8 {
        let secret = format!("hunter{planted}-planted");
        assert!(!contains(&all, secret.as_bytes()), "{secret} is in the archive");
    }
    for secret in [&key, &canary, &answer, &digits("master.key"), &digits("pepper")] {
        assert!(!contains(&all, secret.as_bytes()), "a secret is in the archive");
    }
    site.finish(&[]);
}
