//! Runs the daemons as child processes: starts one again when it dies, and ends them all with nothing left.
//!
//! Each child leads a process group of its own, so that the terminal's Ctrl-C reaches `izar dev` alone, and holds the
//! reading end of a pipe: should `izar dev` be killed outright, the pipe ends and so do they. `izar dev` is the reaper
//! of its descendants, so workers that lose their agent are waited for here.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ready::Role;

/// The first wait before a child is started again; it doubles up to the longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// A child that ran this long is healthy: its next death is a first one.
const HEALTHY: Duration = Duration::from_secs(10);

/// How long a child may take to end when asked, before it is killed. Longer than a controller's drain.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// How long the workers of an agent that ended may take: they end when its socket does.
const ORPHAN_LIMIT: Duration = Duration::from_secs(3);

/// A daemon to run.
#[derive(Debug, Clone)]
pub struct Spec {
    pub id: String,
    pub role: Role,
    pub program: PathBuf,
    pub config: PathBuf,
    pub log: PathBuf,
}

/// What is known of a child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub id: String,
    pub role: Role,
    /// While it runs.
    pub pid: Option<u32>,
    /// Deaths in a row without a healthy run between them.
    pub deaths: u32,
}

/// The running children.
#[derive(Debug)]
pub struct Children {
    states: watch::Sender<Vec<State>>,
    supervisors: Vec<Supervisor>,
}

/// The task that keeps one child running.
#[derive(Debug)]
struct Supervisor {
    role: Role,
    stop: CancellationToken,
    ended: TaskTracker,
}

impl Children {
    /// Starts all of them.
    pub fn start(specs: Vec<Spec>) -> anyhow::Result<Self> {
        nix::sys::prctl::set_child_subreaper(true).context("become the reaper of orphaned workers")?;
        let state = |spec: &Spec| State { id: spec.id.clone(), role: spec.role, pid: None, deaths: 0 };
        let states = watch::Sender::new(specs.iter().map(state).collect::<Vec<_>>());
        let supervisor = |(index, spec): (usize, Spec)| {
            let (role, stop, ended) = (spec.role, CancellationToken::new(), TaskTracker::new());
            ended.spawn(supervise(index, spec, states.clone(), stop.clone()));
            ended.close();
            Supervisor { role, stop, ended }
        };
        let supervisors = specs.into_iter().enumerate().map(supervisor).collect();
        Ok(Self { states, supervisors })
    }

    pub fn states(&self) -> watch::Receiver<Vec<State>> {
        self.states.subscribe()
    }

    /// Ends all children; returns when no process of them is left.
    ///
    /// Agents go first, so that running answers end, and controllers one after the other, so that the ends of their
    /// turns still find a quorum to record them.
    pub async fn stop(&self) {
        let (controllers, agents): (Vec<_>, Vec<_>) = self.supervisors.iter().partition(|s| s.role == Role::Controller);
        agents.iter().for_each(|agent| agent.stop.cancel());
        for controller in controllers {
            controller.stop.cancel();
            controller.ended.wait().await;
        }
        for agent in agents {
            agent.ended.wait().await;
        }
    }
}

/// Keeps one daemon running until the end is asked for.
async fn supervise(index: usize, spec: Spec, states: watch::Sender<Vec<State>>, stop: CancellationToken) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let started = Instant::now();
        let how = match spawn(&spec) {
            Err(error) => format!("could not be started ({error:#})"),
            Ok(mut child) => {
                let pid = child.id();
                states.send_modify(|s| s[index].pid = pid);
                // Held apart, since `wait` would close it, and a daemon ends when its standard input does.
                let lifeline = child.stdin.take();
                let status = tokio::select! {
                    status = child.wait() => Some(status),
                    () = stop.cancelled() => None,
                };
                if status.is_none() {
                    end(&mut child).await;
                }
                drop(lifeline);
                states.send_modify(|s| s[index].pid = None);
                reap_orphans(&states).await;
                match status {
                    None => return,
                    Some(Ok(status)) => format!("ended ({})", describe(status)),
                    Some(Err(error)) => format!("was lost ({error})"),
                }
            }
        };
        if started.elapsed() >= HEALTHY {
            backoff = FIRST_BACKOFF;
        }
        states.send_modify(|s| s[index].deaths = if started.elapsed() >= HEALTHY { 1 } else { s[index].deaths + 1 });
        eprintln!("izar dev: {} {how}; starting it again in {} ms", spec.id, backoff.as_millis());
        if stop.run_until_cancelled(tokio::time::sleep(backoff)).await.is_none() {
            return;
        }
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

fn spawn(spec: &Spec) -> anyhow::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(&spec.log);
    let log = log.with_context(|| format!("open {}", spec.log.display()))?;
    let errors = log.try_clone().context("share the log file")?;
    Command::new(&spec.program)
        .arg("--config")
        .arg(&spec.config)
        .arg("--stdin-lifeline")
        // Under journald this program's own stderr may be a journal stream; the child's is a file.
        .env_remove("JOURNAL_STREAM")
        .stdin(Stdio::piped())
        .stdout(log)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", spec.program.display()))
}

/// Asks a child to end, and makes it.
async fn end(child: &mut Child) {
    let Some(pid) = child.id() else { return };
    // It may have ended already; its status is then waiting below.
    let _ = kill(as_pid(pid), Signal::SIGTERM);
    if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
        eprintln!("izar dev: process {pid} did not end within {} s; killing it", STOP_LIMIT.as_secs());
        let _ = child.kill().await;
    }
}

/// Waits for the processes that a child which ended has left to us, then kills them.
async fn reap_orphans(states: &watch::Sender<Vec<State>>) {
    let begun = Instant::now();
    loop {
        // A child is spawned and noted without an await between, so whoever is not noted is an orphan.
        let noted: Vec<u32> = states.borrow().iter().filter_map(|s| s.pid).collect();
        let mut left = false;
        for orphan in children_of(std::process::id()).into_iter().filter(|pid| !noted.contains(pid)).map(as_pid) {
            if waitpid(orphan, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
                left = true;
                if begun.elapsed() >= ORPHAN_LIMIT {
                    let _ = kill(orphan, Signal::SIGKILL);
                }
            }
        }
        if !left {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The processes whose parent is `parent`, those included that wait to be waited for.
fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        // The command's name, in parentheses, may hold anything; then come the state and the parent.
        let parent_of = |stat: String| stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok();
        stat.and_then(parent_of) == Some(parent)
    };
    entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed())
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("killed by {name}"),
            Err(_) => format!("killed by signal {signal}"),
        },
        _ => "for no known reason".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A daemon that is a shell script with a child of its own.
    fn script(dir: &std::path::Path, text: &str) -> Spec {
        let program = dir.join("daemon");
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Spec { id: "d".into(), role: Role::Agent, program, config: dir.join("c"), log: dir.join("log") }
    }

    /// The numbers in a file, once it has so many lines.
    async fn wait_for_lines(path: &std::path::Path, count: usize) -> Vec<u32> {
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.matches('\n').count() >= count {
                return text.lines().map(|line| line.parse().unwrap()).collect();
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{text}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_child_that_dies_is_started_again_and_all_end_with_their_children() {
        let dir = tempfile::tempdir().unwrap();
        let spec = script(dir.path(), "sleep 1000 &\necho $!\nread line");
        let log = spec.log.clone();
        let children = Children::start(vec![spec]).unwrap();
        let mut states = children.states();
        let limit = Duration::from_secs(30);
        let first = tokio::time::timeout(limit, states.wait_for(|s| s[0].pid.is_some())).await.unwrap().unwrap()[0].pid;
        wait_for_lines(&log, 1).await;
        kill(as_pid(first.unwrap()), Signal::SIGKILL).unwrap();
        let again = states.wait_for(|s| s[0].pid.is_some() && s[0].pid != first);
        let again = tokio::time::timeout(limit, again).await.unwrap().unwrap()[0].clone();
        assert_eq!(again.deaths, 1);
        // Both wrote their sleeping child's number; neither it nor they are left.
        let sleepers = wait_for_lines(&log, 2).await;
        tokio::time::timeout(limit, children.stop()).await.unwrap();
        for pid in [first.unwrap(), again.pid.unwrap()].into_iter().chain(sleepers) {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    #[test]
    fn ends_are_described() {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(describe(ExitStatus::from_raw(9)), "killed by SIGKILL");
        assert_eq!(describe(ExitStatus::from_raw(1 << 8)), "exit status 1");
    }
}
