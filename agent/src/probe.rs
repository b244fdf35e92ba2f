//! Questions with known answers, asked of a device in a process of its own: a card may compute wrongly without any error,
//! and one that hangs must not take the agent along.
//!
//! `izar-agent probe --device cuda:0` prints `ok`, or `skipped: why` where this build cannot compute there, or what came
//! out wrong and fails. The numbers are `ops::probe`'s.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use izar_common::wire::agent::Device;
use tokio::process::Command;
use tokio::time::timeout;

use crate::gpu::Gpus;
use crate::ops;

/// How long an answer may take: kernels are compiled first, which takes seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// Characters of what a process said that are passed on.
const WORDS: usize = 160;

/// What a device answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Right,
    /// It could not be asked.
    Skipped(String),
    /// Another answer than the known one, or none.
    Wrong(String),
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
        Answer::Skipped(why) => println!("skipped: {why}"),
        Answer::Wrong(why) => anyhow::bail!("{why}"),
    }
    Ok(())
}

/// Asks in a process of its own. `exe`: this program.
pub async fn ask(exe: &Path, device: Device) -> Answer {
    let mut command = Command::new(exe);
    // As workers count cards.
    command.args(["probe", "--device", &device.to_string()]).env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Answer::Skipped(format!("{} cannot be started: {error}", exe.display())),
        Err(_) => return Answer::Wrong(format!("no known answer within {} s", LIMIT.as_secs())),
    };
    let last = |bytes: &[u8]| -> String {
        let said = String::from_utf8_lossy(bytes);
        said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(WORDS).collect()
    };
    match (output.status.success(), last(&output.stdout).strip_prefix("skipped: ")) {
        (true, Some(why)) => Answer::Skipped(why.to_owned()),
        (true, None) => Answer::Right,
        (false, _) => Answer::Wrong(format!("a known answer came out wrong: {}", last(&output.stderr))),
    }
}

/// Asks every GPU that comes back from a fault, until the agent ends; one that answers wrongly is cordoned.
pub async fn watch(gpus: Gpus, exe: std::path::PathBuf) {
    let mut changes = gpus.changes();
    loop {
        changes.mark_unchanged();
        for (gpu, cuda) in gpus.unproven() {
            let Some(cuda) = cuda else { continue };
            match ask(&exe, Device::Cuda(cuda)).await {
                Answer::Right => log::info!(gpu:%; "a GPU that is back gave the known answer"),
                Answer::Skipped(reason) => log::info!(gpu:%, reason; "a GPU is not asked for an answer that is known"),
                Answer::Wrong(why) => gpus.disproven(&gpu, &why),
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

    /// What is made of a program that runs `script`.
    async fn said(script: &str) -> Answer {
        let dir = tempfile::tempdir().unwrap();
        let exe = dir.path().join("probe");
        std::fs::write(&exe, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&exe, PermissionsExt::from_mode(0o700)).unwrap();
        ask(&exe, Device::Cuda(3)).await
    }

    #[tokio::test]
    async fn a_process_says_what_a_device_answered() {
        assert_eq!(said("echo ok").await, Answer::Right);
        assert_eq!(said("echo skipped: no card").await, Answer::Skipped("no card".into()));
        assert_eq!(said(r#"test "$*" = "probe --device cuda:3" && echo ok"#).await, Answer::Right);
        let wrong = "a known answer came out wrong: 5 for 4".to_owned();
        assert_eq!(said("echo 5 for 4 >&2; exit 1").await, Answer::Wrong(wrong));
        let crashed = said("kill -9 $$").await;
        assert!(matches!(crashed, Answer::Wrong(_)), "{crashed:?}");
        let missing = ask(Path::new("/nowhere/probe"), Device::Cpu).await;
        assert!(matches!(missing, Answer::Skipped(_)), "{missing:?}");
    }
}
