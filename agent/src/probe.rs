//! Questions with known answers, asked of a device in a process of its own: a card may compute wrongly without any error,
//! and one that hangs must not take the agent along.
//!
//! `izar-agent probe --device cuda:0` prints `ok`, or `skipped: why` where this build cannot compute there, or `wrong: what`
//! and fails. Whatever else becomes of it (memory that is not to be had, a kernel that does not compile, a crash, time
//! over) is no answer, which says nothing of what the device computes: it is asked again a few times. The numbers are
//! `ops::probe`'s.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use izar_common::wire::agent::Device;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::gpu::Gpus;
use crate::ops;

/// How long an answer may take: kernels are compiled first, which takes seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// How often a device is asked that gives no answer, and how long it is left alone in between: memory that a worker gives
/// back, or kernels that are compiled by now, make the difference.
const ATTEMPTS: u32 = 3;
const AGAIN: Duration = Duration::from_secs(5);

/// How long all of it may take: an order about GPUs has to end in time, whatever came before.
const WHOLE: Duration = Duration::from_secs(60);

/// Characters of what a process said that are passed on.
const WORDS: usize = 160;

/// What a process that probes puts before what it has to say.
const SKIPPED: &str = "skipped: ";
const WRONG: &str = "wrong: ";

/// What a device answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Right,
    /// It could not be asked.
    Skipped(String),
    /// Another answer than the known one: it computes wrongly.
    Wrong(String),
    /// None, however often it was asked.
    Silent(String),
}

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// `cpu`, or a card: `cuda:0`.
    #[arg(long)]
    device: Device,
}

/// Asks in this process.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match ops::probe::ask(arguments.device) {
        Answer::Right => println!("ok"),
        Answer::Skipped(why) => println!("{SKIPPED}{why}"),
        Answer::Wrong(why) => {
            println!("{WRONG}{why}");
            anyhow::bail!("{why}")
        }
        Answer::Silent(why) => anyhow::bail!("{why}"),
    }
    Ok(())
}

/// Asks in a process of its own, again while there is no answer. `prober`: this program, or one that is called and answers
/// as it does.
pub async fn ask(prober: &Path, device: Device) -> Answer {
    ask_again(prober, device, AGAIN).await
}

async fn ask_again(prober: &Path, device: Device, again: Duration) -> Answer {
    let until = Instant::now() + WHOLE;
    let mut attempt = 1;
    loop {
        let within = LIMIT.min(until - Instant::now());
        match ask_once(prober, device, within).await {
            Answer::Silent(why) if attempt == ATTEMPTS || Instant::now() + again >= until => {
                return Answer::Silent(format!("no known answer, asked {attempt} times: {why}"));
            }
            Answer::Silent(reason) => {
                log::info!(device:%, attempt, reason; "a device gave no answer; it is asked again")
            }
            answer => return answer,
        }
        attempt += 1;
        sleep(again).await;
    }
}

async fn ask_once(prober: &Path, device: Device, within: Duration) -> Answer {
    let mut command = Command::new(prober);
    // As workers count cards.
    command.args(["probe", "--device", &device.to_string()]).env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(within, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Answer::Skipped(format!("{} cannot be started: {error}", prober.display())),
        Err(_) => return Answer::Silent(format!("none within {} s", within.as_secs())),
    };
    let last = |bytes: &[u8]| -> String {
        let said = String::from_utf8_lossy(bytes);
        said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(WORDS).collect()
    };
    let said = last(&output.stdout);
    match (said.strip_prefix(SKIPPED), said.strip_prefix(WRONG)) {
        (_, Some(why)) => Answer::Wrong(format!("a known answer came out wrong: {why}")),
        (Some(why), _) if output.status.success() => Answer::Skipped(why.to_owned()),
        _ if output.status.success() && said == "ok" => Answer::Right,
        _ => Answer::Silent(format!("{}: {}", output.status, last(&output.stderr))),
    }
}

/// Asks every GPU that comes back from a fault, until the agent ends; one that answers wrongly, or never, is cordoned.
pub async fn watch(gpus: Gpus, prober: std::path::PathBuf) {
    let mut changes = gpus.changes();
    loop {
        changes.mark_unchanged();
        for (gpu, cuda) in gpus.unproven() {
            let Some(cuda) = cuda else { continue };
            match ask(&prober, Device::Cuda(cuda)).await {
                Answer::Right => log::info!(gpu:%; "a GPU that is back gave the known answer"),
                Answer::Skipped(reason) => log::info!(gpu:%, reason; "a GPU is not asked for an answer that is known"),
                Answer::Wrong(why) | Answer::Silent(why) => gpus.disproven(&gpu, &why),
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// What is made of a program that runs `script`, and how often it ran.
    async fn said(script: &str) -> (Answer, usize) {
        let dir = tempfile::tempdir().unwrap();
        let (exe, runs) = (dir.path().join("probe"), dir.path().join("runs"));
        std::fs::write(&exe, format!("#!/bin/sh\ncd {}\necho >>runs\n{script}\n", dir.path().display())).unwrap();
        std::fs::set_permissions(&exe, PermissionsExt::from_mode(0o700)).unwrap();
        let answer = ask_again(&exe, Device::Cuda(3), Duration::ZERO).await;
        (answer, std::fs::read_to_string(runs).unwrap().lines().count())
    }

    #[tokio::test]
    async fn a_process_says_what_a_device_answered() {
        assert_eq!(said("echo ok").await, (Answer::Right, 1));
        assert_eq!(said("echo skipped: no card").await, (Answer::Skipped("no card".into()), 1));
        assert_eq!(said(r#"test "$*" = "probe --device cuda:3" && echo ok"#).await, (Answer::Right, 1));
        let wrong = "a known answer came out wrong: 5 for 4".to_owned();
        assert_eq!(said("echo wrong: 5 for 4; exit 1").await, (Answer::Wrong(wrong), 1));
        let missing = ask(Path::new("/nowhere/probe"), Device::Cpu).await;
        assert!(matches!(missing, Answer::Skipped(_)), "{missing:?}");
    }

    #[tokio::test]
    async fn no_answer_is_no_wrong_one_and_is_asked_for_again() {
        // Whatever ends a process before it has answered: an error, a panic, the kernel that needs its memory.
        for (script, why) in [
            ("echo out of memory >&2; exit 1", "out of memory"),
            ("echo thread main panicked >&2; exit 101", "exit status: 101"),
            ("kill -9 $$", "signal: 9"),
            ("true", "exit status: 0"),
        ] {
            let (answer, runs) = said(script).await;
            assert!(matches!(&answer, Answer::Silent(told) if told.contains(why)), "{script}: {answer:?}");
            assert_eq!(runs, ATTEMPTS as usize, "{script}");
        }
        let second = said("test -e tried && echo ok; touch tried").await;
        assert_eq!(second, (Answer::Right, 2));
    }
}
