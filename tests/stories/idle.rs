//! A cluster that nobody asks anything costs next to nothing, and Ctrl-C leaves nothing behind.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use izar_tests::cluster::Options;
use izar_tests::{process, waiting};

/// How long the idle cluster is watched.
const WATCH: Duration = Duration::from_secs(10);
/// Share of one core that a process of an idle cluster may use: it is 1 to 3 % where this was measured, 5 % while the
/// machine around that virtual one was busy, and a loop that turns for nothing takes tens.
const SHARE: f64 = 0.08;

#[test]
fn an_idle_cluster_uses_next_to_no_processor_and_ends_on_ctrl_c() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::echo(3, 2).start();
    cluster.wait_serving(3, "echo", 2);
    let processes = cluster.ready().processes;
    let count = |role: &str| processes.iter().filter(|p| p.role == role).count();
    assert_eq!((count("controller"), count("agent"), count("worker")), (3, 2, 2));

    // A window right after the start may hold the last of the starting; one of a few windows must be quiet.
    waiting::until("a quiet window", 4 * WATCH, || {
        let used = watch(&processes.iter().map(|p| (p.id.clone(), p.pid)).collect());
        let busy: Vec<_> = used.iter().filter(|(_, share)| **share > SHARE).collect();
        anyhow::ensure!(busy.is_empty(), "share of a core by process: {busy:?}");
        Ok(())
    });
    // `finish` checks that no process stays, workers included.
    cluster.finish(&[]);
}

/// Returns each process's share of a core over the watch. Here time is what is measured, so time must pass.
fn watch(processes: &BTreeMap<String, u32>) -> BTreeMap<String, f64> {
    let used = || -> BTreeMap<String, Duration> {
        let time = |pid: u32| process::cpu_time(pid).expect("the process runs");
        processes.iter().map(|(id, pid)| (id.clone(), time(*pid))).collect()
    };
    let (begin, before) = (Instant::now(), used());
    std::thread::sleep(WATCH);
    let (seconds, after) = (begin.elapsed().as_secs_f64(), used());
    after.iter().map(|(id, time)| (id.clone(), (*time - before[id]).as_secs_f64() / seconds)).collect()
}
