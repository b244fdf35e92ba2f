//! CPU time of processes, from /proc.

use serde::Serialize;

/// Linux counts the times in /proc/PID/stat in hundredths of a second on every architecture that we run on (USER_HZ).
const TICKS: f64 = 100.0;

/// A process whose CPU time is shown.
#[derive(Debug, Clone)]
pub struct Watched {
    pub name: String,
    pub pid: u32,
}

impl Watched {
    pub fn pid(pid: u32) -> Self {
        Self { name: format!("pid {pid}"), pid }
    }
}

/// CPU seconds of a process while it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Used {
    pub name: String,
    pub pid: u32,
    /// `None` if it ended meanwhile.
    pub cpu_s: Option<f64>,
}

/// CPU seconds of a process since it began, its ended threads included.
pub fn of_process(pid: u32) -> Option<f64> {
    seconds(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// CPU seconds of this process's threads with a name.
pub fn of_own_threads(name: &str) -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let used = |task: std::fs::DirEntry| {
        let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
        if comm.trim_end() != name {
            return None;
        }
        let times = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse::<f64>().ok()
    };
    tasks.flatten().filter_map(used).sum::<f64>() / 1e9
}

/// The sum of fields 14 (utime) and 15 (stime). The command's name, field 2, may hold blanks and parentheses.
fn seconds(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) / TICKS)
}

/// What was used between two looks.
pub fn difference(watched: &[Watched], before: &[Option<f64>], after: &[Option<f64>]) -> Vec<Used> {
    let used = |((watched, before), after): ((&Watched, &Option<f64>), &Option<f64>)| Used {
        name: watched.name.clone(),
        pid: watched.pid,
        cpu_s: before.zip(*after).map(|(before, after)| after - before),
    };
    watched.iter().zip(before).zip(after).map(used).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 5 1 1";
        assert_eq!(seconds(stat), Some(3.0));
        assert_eq!(seconds("nonsense"), None);
        assert!(of_process(std::process::id()).is_some());
    }
}
