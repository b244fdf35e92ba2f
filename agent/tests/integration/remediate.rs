//! The real helper on a real socket, with programs that only write down how they were called.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const GPU: &str = "GPU-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff";
/// How it looks whether a controller works there.
const ASKED: &str = "systemctl show --property=ActiveState --value izar-controller.service\n";

/// A program that notes its arguments, prints a file if there is one, and ends as it is told to.
fn program(dir: &Path, name: &str, prints: &str, status: i32) -> PathBuf {
    let path = dir.join(name);
    let text = format!("#!/bin/sh\necho {name} \"$@\" >>{}/calls\necho '{prints}'\nexit {status}\n", dir.display());
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn ask(dir: &Path, user: &str, line: &str) -> String {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_izar-agent"))
        .args(["remediate", "--user", user, "--nvidia-smi"])
        .arg(dir.join("nvidia-smi"))
        .arg("--systemctl")
        .arg(dir.join("systemctl"))
        .arg("--folder")
        .arg(dir)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    ours.write_all(line.as_bytes()).unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = String::new();
    ours.read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    said
}

fn own_user() -> String {
    nix::unistd::User::from_uid(nix::unistd::Uid::effective()).unwrap().unwrap().name
}

fn calls(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("calls")).unwrap_or_default()
}

#[test]
fn a_request_runs_one_program_with_these_arguments_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    program(dir.path(), "nvidia-smi", "", 0);
    program(dir.path(), "systemctl", "inactive", 0);
    let user = own_user();
    assert_eq!(ask(dir.path(), &user, &format!("reset {GPU}\n")), "ok\n");
    assert_eq!(ask(dir.path(), &user, "reboot\n"), "ok\n");
    assert_eq!(calls(dir.path()), format!("nvidia-smi --gpu-reset -i {GPU}\n{ASKED}systemctl reboot\n"));
}

#[test]
fn a_server_on_which_a_controller_works_is_not_restarted() {
    let dir = tempfile::tempdir().unwrap();
    program(dir.path(), "systemctl", "active", 0);
    let said = ask(dir.path(), &own_user(), "reboot\n");
    assert!(said.starts_with("refused: a controller works on this server"), "{said}");
    assert_eq!(calls(dir.path()), ASKED);
}

#[test]
fn what_is_no_request_runs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    program(dir.path(), "nvidia-smi", "", 0);
    program(dir.path(), "systemctl", "", 0);
    for line in ["reset all\n", "reboot; true\n", "\n", "", &"x".repeat(100_000)] {
        let said = ask_in_parts(dir.path(), line);
        assert!(said.starts_with("refused: "), "{said}");
    }
    assert_eq!(calls(dir.path()), "");
}

/// A line that is too long is cut off, and the rest of it may not be taken any more.
fn ask_in_parts(dir: &Path, line: &str) -> String {
    ask(dir, &own_user(), &line[..line.len().min(4096)])
}

#[test]
fn a_caller_who_may_not_ask_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    program(dir.path(), "systemctl", "", 0);
    let said = ask(dir.path(), "no-such-user-here", "reboot\n");
    assert_eq!(said, "refused: there is no user no-such-user-here\n");
    assert_eq!(calls(dir.path()), "");
}

#[test]
fn what_a_program_says_when_it_fails_is_told() {
    let dir = tempfile::tempdir().unwrap();
    program(dir.path(), "nvidia-smi", "In use by another client", 1);
    let said = ask(dir.path(), &own_user(), &format!("reset {GPU}\n"));
    assert!(said.starts_with("failed: ") && said.contains("In use by another client"), "{said}");
    assert_eq!(said.lines().count(), 1);
}

#[test]
fn the_processes_that_hold_a_gpu_are_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = Command::new("sleep").arg("600").spawn().unwrap();
    // Deaf to being asked.
    let mut deaf =
        Command::new("sh").args(["-c", "trap '' TERM; echo; exec sleep 600"]).stdout(Stdio::piped()).spawn().unwrap();
    deaf.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    program(dir.path(), "nvidia-smi", &format!("{}\n{}", holder.id(), deaf.id()), 0);
    // Whoever started them must see their end, or they stay as zombies.
    let holding = std::thread::spawn(move || holder.wait().unwrap());
    let deaf = std::thread::spawn(move || deaf.wait().unwrap());
    let said = ask(dir.path(), &own_user(), &format!("release {GPU}\n"));
    assert_eq!(said, "ok ended=2\n");
    assert!(!holding.join().unwrap().success() && !deaf.join().unwrap().success());
    assert!(calls(dir.path()).contains("--query-compute-apps=pid"));
}
