//! The operator's two looks from outside: the doctor, on a machine where things are wrong, and the archive for support,
//! which holds no secret.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use izar_tests::cli::{self, Output};
use izar_tests::nodes::Site;
use izar_tests::relay::contains;
use izar_tests::waiting::{SOON, until_true};
use serde_json::{Value, json};

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
    let _machine = izar_tests::exclusive();
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
fn the_doctor_asks_the_other_controllers_and_looks_for_a_backup() {
    let _machine = izar_tests::exclusive();
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

#[test]
fn the_archive_for_support_holds_what_is_needed_and_no_secret() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::with_log_level(1, false, "debug");
    let mut config = std::fs::read_to_string(site.config("c1")).unwrap();
    config.insert_str(0, "# password = \"hunter2-planted\"\n");
    std::fs::write(site.config("c1"), config).unwrap();
    site.start_controllers();
    site.start_agent("a1");
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
    let made = cli::run("izar", &arguments);
    assert!(made.success, "{}", made.stderr);
    assert!(!cli::run("izar", &arguments).success, "nothing is overwritten");
    let folder = site.path("");
    let untar = Command::new("tar").args(["xzf", text(&to), "-C", text(&folder)]).status().unwrap();
    assert!(untar.success());
    let mut all = Vec::new();
    for name in
        ["about.txt", "doctor.json", "status.json", "turns.json", "metrics.txt", "journal.txt", "config/c1.toml"]
    {
        let path = folder.join("izar-support").join(name);
        let content = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!content.starts_with(b"could not be had") || name == "journal.txt", "{name}");
        all.extend(content);
    }
    assert!(contains(&all, b"master_key = ") && contains(&all, b"izar_"), "what is needed is there");
    let digits = |name: &str| std::fs::read_to_string(site.path(name)).unwrap().trim().to_owned();
    for secret in [&key, &canary, &answer, "hunter2-planted", &digits("master.key"), &digits("pepper")] {
        assert!(!contains(&all, secret.as_bytes()), "a secret is in the archive");
    }
    site.finish(&[]);
}
