//! What shall run, compared with what does: the actions that make them equal. Pure.
//!
//! Assignments are whole, so there is nothing to miss: comparing again after any loss gives the right actions.

use std::collections::BTreeMap;

use izar_common::id::WorkerId;
use izar_common::wire::agent::WorkerSpec;

/// A step from the actual to the wanted.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Stop(WorkerId),
    /// Stop the worker of this name, then start the new one: the old one holds the memory that the new one needs.
    Replace(WorkerSpec),
    Start(WorkerSpec),
}

/// Returns what to do, in order: first what gives memory back. Nothing to do means that all is as wanted.
pub fn reconcile(wanted: &[WorkerSpec], actual: &BTreeMap<WorkerId, WorkerSpec>) -> Vec<Action> {
    // Of two specs with one name the first counts; a controller sends none such.
    let mut by_id = BTreeMap::new();
    for spec in wanted {
        by_id.entry(&spec.worker).or_insert(spec);
    }
    let stops = actual.keys().filter(|id| !by_id.contains_key(id)).cloned().map(Action::Stop);
    let changed = by_id.values().filter(|spec| actual.get(&spec.worker).is_some_and(|running| running != **spec));
    let missing = by_id.values().filter(|spec| !actual.contains_key(&spec.worker));
    stops
        .chain(changed.map(|spec| Action::Replace((*spec).clone())))
        .chain(missing.map(|spec| Action::Start((*spec).clone())))
        .collect()
}

/// Threads for a worker's engine: what its deployment says, else what the agent's file says, else an equal share of
/// the cores. A worker keeps its share when others come or go, until it is started again for another reason.
pub fn threads(of_deployment: u32, of_agent: u32, cores: u32, workers: usize) -> u32 {
    match (of_deployment, of_agent) {
        (0, 0) => (cores / u32::try_from(workers.max(1)).unwrap_or(u32::MAX)).max(1),
        (0, threads) | (threads, _) => threads,
    }
}

/// CPUs for a worker's threads: the first of the agent's that no other worker has; none if there are too few, since
/// two threads bound to one CPU would wait for each other.
pub fn cpus(of_agent: &[u32], taken: &[u32], threads: u32) -> Vec<u32> {
    let free = of_agent.iter().filter(|cpu| !taken.contains(cpu));
    let cpus: Vec<u32> = free.copied().take(threads as usize).collect();
    if cpus.len() == threads as usize { cpus } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::id::Hash;
    use izar_common::manifest::{File, Kind, Manifest};
    use izar_common::wire::agent::EngineOptions;

    /// A word is `worker` or `worker/revision`.
    fn specs(words: &str) -> Vec<WorkerSpec> {
        let spec = |word: &str| {
            let (worker, revision) = word.split_once('/').unwrap_or((word, "1"));
            WorkerSpec {
                worker: worker.parse().unwrap(),
                deployment: "m".parse().unwrap(),
                revision: Hash([revision.parse().unwrap(); 32]),
                manifest: Manifest {
                    name: "m".into(),
                    kind: Kind::Echo { first_token_us: 0, next_token_us: 0 },
                    files: Vec::new(),
                    text: File { name: "text".into(), hash: Hash([0; 32]), bytes: 0 },
                    context: 1,
                    vocabulary: 1,
                    architecture: "echo".into(),
                },
                engine: EngineOptions::default(),
            }
        };
        words.split_whitespace().map(spec).collect()
    }

    fn check(wanted: &str, actual: &str, expected: &str) {
        let wanted = specs(wanted);
        let mut running: BTreeMap<_, _> = specs(actual).into_iter().map(|spec| (spec.worker.clone(), spec)).collect();
        let actions = reconcile(&wanted, &running);
        let words = actions.iter().map(|action| match action {
            Action::Stop(id) => format!("-{id}"),
            Action::Replace(spec) => format!("~{}/{}", spec.worker, spec.revision.0[0]),
            Action::Start(spec) => format!("+{}", spec.worker),
        });
        assert_eq!(words.collect::<Vec<_>>().join(" "), expected);
        for action in actions {
            match action {
                Action::Stop(id) => drop(running.remove(&id)),
                Action::Replace(spec) | Action::Start(spec) => drop(running.insert(spec.worker.clone(), spec)),
            }
        }
        assert_eq!(reconcile(&wanted, &running), [], "a second look finds nothing to do");
    }

    #[test]
    fn the_difference_becomes_actions_and_what_is_right_stays() {
        check("", "", "");
        check("a b", "", "+a +b");
        check("a b", "a b", "");
        check("", "a b", "-a -b");
        check("b c", "a b", "-a +c");
        check("a/2 c", "a/1 b", "-b ~a/2 +c");
        check("a a/2", "", "+a");
    }

    #[test]
    fn threads_come_from_the_deployment_then_the_agent_then_the_cores() {
        assert_eq!(threads(3, 5, 16, 4), 3);
        assert_eq!(threads(0, 5, 16, 4), 5);
        assert_eq!(threads(0, 0, 16, 4), 4);
        assert_eq!(threads(0, 0, 2, 3), 1);
        assert_eq!(threads(0, 0, 2, 0), 2);
    }

    #[test]
    fn a_worker_is_bound_to_cpus_of_its_own_or_to_none() {
        assert_eq!(cpus(&[0, 1, 4, 5], &[], 2), [0, 1]);
        assert_eq!(cpus(&[0, 1, 4, 5], &[0, 1], 2), [4, 5]);
        assert_eq!(cpus(&[0, 1, 4, 5], &[0, 4], 3), [0u32; 0]);
        assert_eq!(cpus(&[], &[], 1), [0u32; 0]);
    }
}
