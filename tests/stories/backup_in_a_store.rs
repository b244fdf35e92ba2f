//! Backups in an S3-compatible store: taken under load, listed, verified and restored from there; what a store may refuse,
//! said so that one knows what to do; and nothing left of one that breaks off.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use izar_tests::cli::Output;
use izar_tests::client::Client;
use izar_tests::nodes::Site;
use izar_tests::store::Store;
use izar_tests::waiting::{SOON, until_true};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const MEASURED: &str = "izar_backup_last_success_timestamp_seconds";
const PLACE: &str = "s3://backups/izar/east";

fn text(path: &Path) -> &str {
    path.to_str().expect("our paths are UTF-8")
}

fn said(output: Output) -> Value {
    assert!(output.success, "{}", output.stderr);
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.stdout))
}

fn asked(client: &Client) -> u16 {
    let messages = json!([{ "role": "user", "content": "Remember this." }]);
    let body = json!({ "model": "echo", "messages": messages, "max_tokens": 8 });
    client.post(CHAT, &body).map_or(0, |answer| answer.status)
}

#[test]
fn a_cluster_lives_on_from_a_backup_in_a_store() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(3, false);
    let mut store = Store::start(&site.pki());
    site.start_controllers();
    site.start_agent("a1");
    site.admin(1).deploy_echo("echo", 1, 0, 1);
    (1..=3).for_each(|controller| site.admin(controller).wait_ready("echo", 1));
    let key = site.admin(1).create_key(&[]).unwrap();
    let client = site.client(2, Some(&key));
    until_true("the key to be known", SOON, || asked(&client) == 200);

    let socket = site.path("c2.sock");
    let take = || store.izar(&["backup", "--to", PLACE, "--keep", "2", "--socket", text(&socket)], &[]);
    let ended = AtomicBool::new(false);
    let taken: Vec<Value> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                assert_eq!(asked(&client), 200);
            }
        });
        let taken = (0..3).map(|_| said(take())).collect();
        ended.store(true, Ordering::Relaxed);
        taken
    });
    let file = taken[2]["kept_as"].as_str().unwrap();
    assert!(file.starts_with(&format!("{PLACE}/story-local-")), "{file}");
    assert_eq!(taken[2]["removed"].as_array().map(Vec::len), Some(1), "{taken:?}");
    let listed = said(store.izar(&["backup", "list", "--to", PLACE], &[]));
    assert_eq!(listed["backups"].as_array().map(Vec::len), Some(2), "{listed}");
    assert_eq!(listed["backups"][1]["header"]["applied"], taken[2]["applied"], "{listed}");
    let here = store.look("backups");
    assert_eq!((here["objects"].as_array().map(Vec::len), &here["uploads"]), (Some(2), &json!(0)), "{here}");
    let verify = ["backup", "verify", file, "--config", text(&site.config("c3"))].map(str::to_owned);
    let verified = said(store.izar(&verify.each_ref().map(String::as_str), &[]));
    assert_eq!((&verified["keys"], &verified["deployments"]), (&json!(1), &json!(["echo"])), "{verified}");

    for controller in 1..=3 {
        let admin = site.admin(controller);
        until_true("all to know of it", SOON, || admin.status().unwrap()["last_backup"]["kept_as"] == file);
        let page = site.client(controller, None).get("/metrics").unwrap().text();
        let noted = format!("{MEASURED} {}", taken[2]["taken_ms"].as_f64().unwrap() / 1000.0);
        assert!(page.lines().any(|line| line == noted), "{noted}: {page}");
    }

    let mut fingerprints = Vec::new();
    for node in ["c1", "c2", "c3"] {
        site.stop(node);
        std::fs::rename(site.data(node), site.path(&format!("{node}-old"))).unwrap();
    }
    for node in ["c1", "c2", "c3"] {
        let restored = said(store.izar(&["restore", file, "--config", text(&site.config(node))], &[]));
        fingerprints.push((restored["digest"].clone(), restored["incarnation"].clone()));
    }
    assert!(fingerprints.iter().all(|one| *one == fingerprints[0]), "{fingerprints:?}");
    site.start_controllers();
    for controller in 1..=3 {
        site.admin(controller).wait_ready("echo", 1);
        let client = site.client(controller, Some(&key));
        until_true("the key to work", SOON, || asked(&client) == 200);
    }
    site.finish(&[]);
}

#[test]
fn what_a_store_refuses_is_said_with_what_to_do() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let mut store = Store::start(&site.pki());
    site.start_controllers();
    let socket = site.path("c1.sock");
    let refused = |place: &str, other: &[(&str, &str)], expected: &str| {
        for command in [&["backup", "--to", place, "--socket", text(&socket)][..], &["backup", "list", "--to", place]] {
            let output = store.izar(command, other);
            assert!(!output.success && output.stderr.contains(expected), "{command:?}, {other:?}: {}", output.stderr);
            let secret = store.environment()[2].1.clone();
            assert!(!output.stderr.contains(&secret), "{}", output.stderr);
        }
    };
    refused(PLACE, &[("AWS_SECRET_ACCESS_KEY", "wrong")], "see AWS_SECRET_ACCESS_KEY");
    refused(PLACE, &[("AWS_ACCESS_KEY_ID", "AKIANOBODY")], "see AWS_ACCESS_KEY_ID");
    refused(PLACE, &[("AWS_ACCESS_KEY_ID", "")], "AWS_ACCESS_KEY_ID is not set");
    refused("s3://missing/izar", &[], "there is no bucket missing");
    refused("s3://foreign/izar", &[], "may not do this in bucket foreign");
    refused("s3:///izar", &[], "names no bucket");
    refused("https://store/izar", &[], "is no place for backups");
    refused(PLACE, &[("AWS_ENDPOINT_URL", "https://127.0.0.1:1")], "connect to 127.0.0.1:1");
    refused(PLACE, &[("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")], "is not https");
    refused(PLACE, &[("SSL_CERT_FILE", text(&site.pki().join("c1.pem")))], "SSL_CERT_FILE names its CA");
    let missing = store.izar(&["restore", "s3://backups/no.izarbak", "--config", text(&site.config("c1"))], &[]);
    assert!(missing.stderr.contains("has no such backup"), "{}", missing.stderr);
    assert_eq!(store.look("backups"), json!({ "objects": [], "uploads": 0 }));
    site.finish(&[]);
}

#[test]
fn nothing_is_left_in_a_store_of_a_backup_that_breaks_off() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    let mut store = Store::start(&site.pki());
    site.start_controllers();
    let taken = site.admin(1).json(&["backup", "--to", text(&site.path("kept"))]).unwrap();
    let whole = std::fs::read(taken["kept_as"].as_str().unwrap()).unwrap();

    // A controller that dies in the middle, after more than one part.
    let socket = site.path("dying.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let begin = || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = [0; 4096];
        assert!(stream.read(&mut asked).unwrap() > 0);
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", 1_u64 << 30).unwrap();
        stream.write_all(&whole).unwrap();
        stream.write_all(&vec![0; 20 << 20]).unwrap();
        stream
    };
    let arguments = ["backup", "--to", PLACE, "--socket", text(&socket)];
    std::thread::scope(|scope| {
        scope.spawn(|| drop(begin()));
        let output = store.izar(&arguments, &[]);
        assert!(!output.success && output.stderr.contains("the controller broke off"), "{}", output.stderr);
    });
    assert_eq!(store.look("backups"), json!({ "objects": [], "uploads": 0 }));

    // An operator, or systemd, that has waited long enough for a controller that hangs.
    let mut command = Command::new(izar_tests::binaries::path("izar"));
    let mut waiting = command.args(arguments).envs(store.environment()).stderr(Stdio::piped()).spawn().unwrap();
    let hanging = begin();
    until_true("the upload to begin", SOON, || store.look("backups")["uploads"] == 1);
    izar_tests::process::signal(waiting.id(), Signal::SIGTERM).unwrap();
    until_true("it to end", SOON, || waiting.try_wait().unwrap().is_some());
    let output = waiting.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("broken off by a signal"), "{output:?}");
    drop(hanging);
    assert_eq!(store.look("backups"), json!({ "objects": [], "uploads": 0 }));
    site.finish(&[]);
}
