//! Processes seen through `/proc`: who is left, who used the processor, and signals to exactly one of them.

use std::path::Path;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The environment variable that marks every descendant of a story's cluster.
pub const MARK: &str = "IZAR_STORY";

/// Makes a value for [`MARK`] that no other run has.
pub fn new_mark() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// Kills a process as a power cut would. Panics if it is not there, for then the story is wrong.
pub fn kill_hard(pid: u32) {
    signal(pid, Signal::SIGKILL).unwrap_or_else(|error| panic!("kill -9 {pid}: {error}"));
}

/// Stops a process as if it hung, all its threads.
pub fn stop(pid: u32) {
    signal(pid, Signal::SIGSTOP).unwrap_or_else(|error| panic!("kill -STOP {pid}: {error}"));
}

/// Lets a stopped process go on.
pub fn cont(pid: u32) {
    signal(pid, Signal::SIGCONT).unwrap_or_else(|error| panic!("kill -CONT {pid}: {error}"));
}

/// Holds one thread of a process by its name for as long as the process lives, as a deadlock or a device that never
/// answers would; the others go on.
pub fn wedge(pid: u32, thread: &str) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs").flatten();
    let named = |id: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/task/{id}/comm"));
        name.is_ok_and(|name| name.trim_end() == thread)
    };
    let mut ids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).filter(named);
    let id = ids.next().unwrap_or_else(|| panic!("{pid} has no thread `{thread}`"));
    let id = Pid::from_raw(i32::try_from(id).expect("a thread id fits"));
    let (held, holds) = std::sync::mpsc::sync_channel(1);
    // Whoever attaches must stay, and wait for the thread's death, or the process cannot end.
    std::thread::spawn(move || {
        let wait = || waitpid(id, Some(WaitPidFlag::__WALL));
        held.send(ptrace::attach(id).and_then(|()| wait())).expect("the story waits for it");
        while wait().is_ok_and(|status| !matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {}
    });
    holds
        .recv()
        .expect("it says how it went")
        .unwrap_or_else(|error| panic!("hold thread `{thread}` of {pid}: {error}"));
}

/// Sends a signal to one process.
pub fn signal(pid: u32, signal: Signal) -> nix::Result<()> {
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid fits")), signal)
}

/// Says whether a process runs (a zombie does not).
pub fn runs(pid: u32) -> bool {
    stat_fields(pid).is_some_and(|fields| fields[0] != "Z" && fields[0] != "X")
}

/// Returns the processes, zombies apart, whose environment carries the mark.
pub fn marked(mark: &str) -> Vec<u32> {
    let needle = format!("{MARK}={mark}");
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc is readable").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|pair| pair == needle.as_bytes()) && runs(pid) {
            pids.push(pid);
        }
    }
    pids
}

/// Returns a process's command line, for messages.
pub fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned()
}

/// Returns the processor time that a process and its threads have used, to 10 ms.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    // Linux counts in units of 1/100 s for every architecture that Izar runs on.
    const TICK: Duration = Duration::from_millis(10);
    let fields = stat_fields(pid)?;
    let user: u32 = fields[11].parse().ok()?;
    let system: u32 = fields[12].parse().ok()?;
    Some(TICK * (user + system))
}

/// Returns the fields of `/proc/<pid>/stat` after the name (which may hold spaces): state first.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &stat[stat.rfind(')')? + 1..];
    let fields: Vec<String> = rest.split_whitespace().map(str::to_owned).collect();
    (fields.len() > 13).then_some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let pid = std::process::id();
        assert!(runs(pid));
        assert!(cpu_time(pid).is_some());
        assert!(!command_line(pid).is_empty());
    }

    #[test]
    fn a_wedged_thread_stands_still_and_the_process_can_still_be_killed() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        crate::waiting::until_true("the shell", crate::waiting::SOON, || command_line(child.id()).starts_with("sh "));
        wedge(child.id(), "sh");
        assert_eq!(stat_fields(child.id()).unwrap()[0], "t");
        kill_hard(child.id());
        crate::waiting::until_true("its end", crate::waiting::SOON, || !runs(child.id()));
        // Whoever held its thread may have seen the end first.
        let _ = child.wait();
    }

    #[test]
    fn marked_children_are_found_until_they_end() {
        let mark = new_mark();
        let mut child = std::process::Command::new("sleep").arg("60").env(MARK, &mark).spawn().unwrap();
        crate::waiting::until_true("the child's environment", crate::waiting::SOON, || marked(&mark) == [child.id()]);
        kill_hard(child.id());
        child.wait().unwrap();
        assert!(marked(&mark).is_empty());
    }
}
