//! `izar doctor`: is this machine fit to run its part of a cluster, and is the cluster well, as far as it can be seen
//! from here? Every check says what it found and, where that is not well, what to do.
//!
//! It works whether the daemon runs or not, and changes nothing (a small file in the data directory apart, whose fsync
//! is timed and which is removed). `machine` looks at the machine, `agent` at what an agent needs of it, `cluster` at what a
//! running controller says. It exits with 1 if a check failed; warnings alone are exit 0.

mod agent;
mod cluster;
mod credential;
mod machine;
mod unit;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use izar_controller::config::Config;
use serde::Serialize;

use crate::{Common, show};

/// Check this machine and, if a controller runs here, the cluster; say what to do
#[derive(Debug, Args)]
pub struct Doctor {
    /// The controller's configuration, if this is a controller
    #[arg(long, default_value = "/etc/izar/controller.toml")]
    pub config: PathBuf,
    /// The agent's configuration, if this is a GPU server
    #[arg(long, default_value = "/etc/izar/agent.toml")]
    pub agent_config: PathBuf,
}

/// What is known of the controller's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    Runs(u32),
    Stopped,
    /// Whoever asks may not see it.
    Unseen,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// It works, and should not stay so.
    Warning,
    /// It does not work, or will soon not.
    Failure,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: String,
    pub verdict: Verdict,
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    pub fn ok(check: &str, found: impl Into<String>) -> Self {
        Self { check: check.to_owned(), verdict: Verdict::Ok, found: found.into(), mend: None }
    }
    pub fn warning(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        let (found, mend) = (found.into(), Some(mend.into()));
        Self { check: check.to_owned(), verdict: Verdict::Warning, found, mend }
    }
    pub fn failure(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failure, ..Self::warning(check, found, mend) }
    }
    pub fn is_failure(&self) -> bool {
        self.verdict == Verdict::Failure
    }
}

pub async fn run(doctor: Doctor, common: &Common) -> anyhow::Result<ExitCode> {
    let findings = examine(&doctor, common).await;
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    show::print(common.json, &serde_json::json!({ "verdict": worst, "findings": findings }), |_| human(&findings))?;
    Ok(if worst == Verdict::Failure { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether the controller is stopped, and to connect to its socket would start it.
pub fn stopped(socket: &std::path::Path) -> bool {
    unit::Unit::behind(socket).stopped
}

/// Runs every check that applies here.
pub async fn examine(doctor: &Doctor, common: &Common) -> Vec<Finding> {
    let mut findings = vec![machine::clock()];
    let (controller, agent) = (doctor.config.exists(), doctor.agent_config.exists());
    if !controller && !agent {
        let found = format!("neither {} nor {} is there", doctor.config.display(), doctor.agent_config.display());
        findings.push(Finding::failure("configuration", found, "name the files with --config and --agent-config"));
    }
    if controller && let Err(hidden) = readable("configuration", &doctor.config) {
        findings.push(hidden);
    } else if controller {
        match Config::load(&doctor.config) {
            Ok(config) => {
                findings.push(Finding::ok("configuration", format!("{} is sound", doctor.config.display())));
                let (seen, daemon) = cluster::examine(common, &config).await;
                findings.extend(machine::controller(&config, daemon));
                findings.extend(seen);
            }
            Err(error) => {
                let mend = "correct the line; izar-controller --check-config says the same";
                findings.push(Finding::failure("configuration", format!("{error:#}"), mend));
            }
        }
    }
    if agent && let Err(hidden) = readable("agent configuration", &doctor.agent_config) {
        findings.push(hidden);
    } else if agent {
        findings.extend(agent::examine(&doctor.agent_config).await);
    }
    findings
}

/// A file that whoever asks may not read is no mistake in it.
fn readable(check: &str, path: &Path) -> Result<(), Finding> {
    match std::fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let found = format!("{} was not read: {error}", path.display());
            Err(Finding::warning(check, found, "ask as root: what it names is not looked at"))
        }
        _ => Ok(()),
    }
}

fn human(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { check, verdict, found, mend } in findings {
        let mark = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Failure => "FAILURE",
        };
        out += &format!("{mark:<8} {check}: {found}\n");
        if let Some(mend) = mend {
            out += &format!("         {mend}\n");
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failures, warnings) = (count(Verdict::Failure), count(Verdict::Warning));
    out + &match (failures, warnings) {
        (0, 0) => format!("all {} checks are well\n", findings.len()),
        _ => format!("{failures} failures, {warnings} warnings among {} checks\n", findings.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_well_stands_out_with_what_to_do() {
        let findings = [Finding::ok("disk", "100 GB are free"), Finding::failure("quorum", "no leader", "start them")];
        let text = human(&findings);
        assert_eq!(
            text,
            "ok       disk: 100 GB are free\nFAILURE  quorum: no leader\n         start them\n1 failures, 0 warnings \
             among 2 checks\n"
        );
        assert!(Verdict::Failure > Verdict::Warning && Verdict::Warning > Verdict::Ok);
    }
}
