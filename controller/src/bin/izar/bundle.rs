//! `izar support-bundle`: what somebody needs who looks at a cluster from afar, in one archive: the doctor's findings,
//! status and listings, metrics, configuration, the journal's end, and what happened to requests that failed.
//!
//! Never a prompt, an answer or a key: none of the sources has one, and every text passes `redact` all the same, which
//! takes out whatever looks like a secret that a person has put into a configuration or a script has logged. What
//! cannot be had is a line in the archive, not an error: a bundle is made when things are broken.

mod redact;
mod tar;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use clap::Args;
use http_body_util::{BodyExt, Limited};
use hyper::Method;
use izar_common::clock::wall_ms;
use izar_controller::config::Config;
use izar_controller::control::view::Status;
use serde_json::{Value, json};

use crate::admin::{Admin, escape};
use crate::doctor::{self, Doctor};
use crate::http::Endpoint;
use crate::{Common, show};
use redact::redact;

/// Failed and abandoned requests that are explained: the newest.
const EXPLAINED: usize = 20;
/// Turns in the listing: a few minutes of a busy cluster.
const TURNS: usize = 500;
/// Lines of the journal: some hours of a quiet node.
const JOURNAL_LINES: usize = 5000;
/// Largest answer of `/metrics`; one has some hundred kilobytes.
const METRICS_LIMIT: usize = 16 << 20;

/// Gather what support needs into one archive; never a prompt, an answer or a key
#[derive(Debug, Args)]
pub struct Bundle {
    /// The archive to write, a .tar.gz; nothing is overwritten
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    doctor: Doctor,
}

pub async fn run(bundle: Bundle, common: &Common) -> anyhow::Result<()> {
    let mut files = vec![("about.txt".to_owned(), about()), ("journal.txt".to_owned(), journal())];
    let findings = doctor::examine(&bundle.doctor, common).await;
    files.push(("doctor.json".into(), pretty(&json!({ "findings": findings }))));
    for path in [&bundle.doctor.config, &bundle.doctor.agent_config] {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if path.exists() {
            files.push((format!("config/{name}"), or_error(std::fs::read_to_string(path).map_err(Into::into))));
        }
    }
    let config = Config::load(&bundle.doctor.config).ok();
    let admin = match &config {
        Some(config) => common.admin_of(&config.admin.socket),
        None => common.admin(),
    };
    if doctor::stopped(admin.socket()) {
        let why = "the controller is stopped, and was not asked for listings and metrics, for that would start it\n";
        files.push(("stopped.txt".into(), why.to_owned()));
    } else {
        files.extend(listings(&admin).await);
        files.push(("metrics.txt".into(), or_error(metrics(&admin, config.as_ref()).await)));
    }
    let names: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
    let files: Vec<_> = files.into_iter().map(|(name, text)| (name, redact(&text).into_bytes())).collect();
    let bytes = write(&bundle.to, &files)?;
    let made = json!({ "bundle": bundle.to, "bytes": bytes, "files": names });
    show::print(common.json, &made, |_| {
        let size = show::bytes(bytes);
        format!("{} ({size}): {}\nlook through it before you give it away\n", bundle.to.display(), names.join(" "))
    })
}

/// Writes the archive; returns its size.
fn write(path: &Path, files: &[(String, Vec<u8>)]) -> anyhow::Result<u64> {
    let shown = || format!("write {}", path.display());
    let file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path).with_context(shown)?;
    let out = file.try_clone().with_context(shown)?;
    // Part of every Linux; a crate for it would be compiled for this alone.
    let mut gzip = Command::new("gzip").arg("-n").stdin(Stdio::piped()).stdout(out).spawn().context("run gzip")?;
    let mut stdin = gzip.stdin.take().expect("it was asked for");
    tar::write(&mut stdin, "izar-support", files, wall_ms() / 1000).with_context(shown)?;
    drop(stdin);
    ensure!(gzip.wait().with_context(shown)?.success(), "gzip could not write {}", path.display());
    file.sync_all().with_context(shown)?;
    Ok(file.metadata().with_context(shown)?.len())
}

fn about() -> String {
    let run = |program: &str, arguments: &[&str]| command(Command::new(program).args(arguments));
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    format!(
        "izar {}\nat {} UTC\n{}{os}{}{}",
        env!("CARGO_PKG_VERSION"),
        show::time(wall_ms()),
        run("uname", &["-srvm"]),
        run("df", &["-h"]),
        run("free", &["-m"]),
    )
}

/// The end of the journal: of the namespace that the units log to, or of the units.
fn journal() -> String {
    let lines = JOURNAL_LINES.to_string();
    let common = ["--no-pager", "--output=short-iso", "--lines", &lines];
    let namespace = command(Command::new("journalctl").arg("--namespace=izar").args(common));
    let units = command(Command::new("journalctl").args(["--unit=izar-*"]).args(common));
    format!("== namespace izar\n{namespace}== units izar-*\n{units}")
}

fn command(command: &mut Command) -> String {
    match command.output() {
        Ok(output) => {
            let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            format!("{said}{errors}")
        }
        Err(error) => format!("{}: {error}\n", command.get_program().to_string_lossy()),
    }
}

/// What the controller says, as it says it.
async fn listings(admin: &Admin) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let turns = format!("/v1/turns?stale=true&limit={TURNS}");
    for (name, path) in [
        ("status", "/v1/status"),
        ("agents", "/v1/agents?stale=true"),
        ("deployments", "/v1/deployments?stale=true"),
        ("models", "/v1/models?stale=true"),
        ("requests", "/v1/requests"),
        ("turns", &turns),
    ] {
        let answer = admin.get::<Value>(path).await;
        if let (Ok(answer), "turns") = (&answer, name) {
            files.extend(explained(admin, answer).await);
        }
        files.push((format!("{name}.json"), or_error(answer.map(|answer| pretty(&answer)))));
    }
    files
}

/// What happened to the newest requests that did not end well.
async fn explained(admin: &Admin, turns: &Value) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for id in unwell(turns) {
        let answer = admin.get::<Value>(&format!("/v1/requests/{}", escape(&id))).await;
        files.push((format!("explained/{id}.json"), or_error(answer.map(|answer| pretty(&answer)))));
    }
    files
}

fn unwell(turns: &Value) -> Vec<String> {
    let failed = |turn: &&Value| ["failed", "abandoned"].iter().any(|outcome| turn["outcome"] == *outcome);
    let turns = turns["turns"].as_array().into_iter().flatten().filter(failed);
    turns.filter_map(|turn| turn["turn"].as_str().map(str::to_owned)).take(EXPLAINED).collect()
}

/// The metrics, from the listener that is nearer.
async fn metrics(admin: &Admin, config: Option<&Config>) -> anyhow::Result<String> {
    let status: Status = admin.get("/v1/status").await?;
    let endpoint = match (&status.api.plaintext_endpoint, config) {
        (Some(plain), _) => Endpoint::new(plain, None)?,
        (None, config) => Endpoint::new(&status.api.endpoint, config.map(|config| config.tls.ca.as_path()))?,
    };
    let answer = endpoint.send(Method::GET, "/metrics", None, Vec::new()).await?;
    let body = Limited::new(answer.into_body(), METRICS_LIMIT).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("read the metrics: {error}"))?.to_bytes();
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn or_error(text: anyhow::Result<String>) -> String {
    text.unwrap_or_else(|error| format!("could not be had: {error:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_did_not_end_well_are_explained() {
        let turn = |id: &str, outcome: &str| json!({ "turn": id, "outcome": outcome });
        let turns = json!({ "turns": [turn("a", "finished"), turn("b", "failed"), turn("c", "abandoned")] });
        assert_eq!(unwell(&turns), ["b", "c"]);
    }
}
