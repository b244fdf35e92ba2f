//! An S3-compatible store for stories: moto in a process of its own, over HTTPS with a certificate of the story's CA. It
//! checks signatures and rights, and tells what lies in a bucket.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use crate::cli::{self, Output};
use crate::python;

/// A store that runs. Its bucket `backups` is for its user; `foreign` is not.
#[derive(Debug)]
pub struct Store {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    port: u64,
    key_id: String,
    secret: String,
    ca: String,
}

impl Store {
    /// Starts one with the certificate `api` of a folder of certificates.
    pub fn start(pki: &Path) -> Self {
        let mut child = Command::new(python::with_moto())
            .args(["-c", include_str!("store.py")])
            .args(["api.pem", "api.key", "ca.pem"].map(|name| pki.join(name)))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the interpreter was just seen to work");
        let (orders, answers) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let ca = pki.join("ca.pem").to_str().expect("our paths are UTF-8").to_owned();
        let (key_id, secret) = (String::new(), String::new());
        let mut store = Self { child, orders, answers: BufReader::new(answers), port: 0, key_id, secret, ca };
        let known = store.answer();
        let text = |name: &str| known[name].as_str().expect("the store names its user's key").to_owned();
        (store.port, store.key_id, store.secret) =
            (known["port"].as_u64().expect("a port"), text("key_id"), text("secret"));
        store
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the store's output is readable");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("the store said `{line}`: {error}"))
    }

    /// What is in a bucket: `objects`, their names; `uploads`, how many were begun and not ended.
    pub fn look(&mut self, bucket: &str) -> Value {
        writeln!(self.orders, "{bucket}").expect("the store listens");
        self.answer()
    }

    /// The environment in which `izar` finds it.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", format!("https://127.0.0.1:{}", self.port)),
            ("AWS_ACCESS_KEY_ID", self.key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.secret.clone()),
            ("SSL_CERT_FILE", self.ca.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Runs `izar ARGUMENTS --json` in that environment, but for what `other` says.
    pub fn izar(&self, arguments: &[&str], other: &[(&str, &str)]) -> Output {
        let other = other.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Vec<(String, String)> = self.environment().into_iter().chain(other).collect();
        cli::run_in("izar", &[arguments, &["--json"]].concat(), &environment)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
