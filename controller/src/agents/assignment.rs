//! What an agent is told to run, derived from replicated state alone. Pure.

use izar_common::health::Generation;
use izar_common::health::gpu::GPUS;
use izar_common::id::NodeId;
use izar_common::wire::agent::{Assignment, WorkerSpec};

use crate::planner::WORKERS_PER_AGENT;
use crate::state::Config;
use crate::state::remedies::Remedy;

/// Files in one assignment at most: with their names they stay below the frame's 4 MiB. The largest models published
/// so far have fewer than 200.
const FILES: usize = 8 * 1024;

/// Returns the whole assignment of an agent.
///
/// A plan that exceeds what a frame can carry is cut at the limit, last workers first; the planner makes none such.
pub fn assignment(config: &Config, agent: &NodeId) -> Assignment {
    let mut files = 0;
    let placed = config.plan.workers.iter().filter(|(_, placement)| placement.agent == *agent);
    let specs = placed.filter_map(|(worker, placement)| {
        let model = config.models.get(&placement.revision)?;
        Some(WorkerSpec {
            worker: worker.clone(),
            deployment: placement.deployment.clone(),
            revision: placement.revision,
            manifest: model.manifest.clone(),
            engine: placement.engine.clone(),
        })
    });
    let workers = specs.take(WORKERS_PER_AGENT).take_while(|spec| {
        files += 1 + spec.manifest.files.len();
        files <= FILES
    });
    let workers = workers.collect();
    let held = config.gpus.values().filter(|record| record.agent == *agent);
    let holds = held.filter_map(|record| record.hold.clone()).take(GPUS).collect();
    let order = config.remedy_of(agent).map(Remedy::order);
    let generation = Generation { incarnation: config.incarnation, applied: config.applied };
    Assignment { generation, workers, holds, order }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::config;
    use izar_common::health::gpu::{Hold, Remedy};

    fn check(agent: &str, expected: &str) {
        let config = config("m 2, n 1", "m.0@a1 m.1@a2 n.0@a2 gone.0@a3!");
        let assignment = assignment(&config, &agent.parse().unwrap());
        let names: Vec<_> = assignment.workers.iter().map(|spec| spec.worker.as_str()).collect();
        assert_eq!(names.join(" "), expected);
        assert_eq!(assignment.generation, Generation { incarnation: config.incarnation, applied: config.applied });
    }

    #[test]
    fn an_agent_is_told_what_is_held_against_its_gpus() {
        let mut config = config("m 1", "m.0@a1");
        for (gpu, agent, held) in [("gpu-1", "a1", true), ("gpu-2", "a1", false), ("gpu-3", "a2", true)] {
            let (gpu, agent): (izar_common::id::GpuId, _) = (gpu.parse().unwrap(), agent.parse().unwrap());
            let (reason, boot) = ("Xid 54".to_owned(), String::new());
            let (remedy, standing) = (Remedy::Replace, false);
            let hold = held.then(|| Hold { gpu: gpu.clone(), quarantined: true, reason, remedy, standing, boot });
            let record = crate::state::GpuRecord {
                gpu: gpu.clone(),
                agent,
                hold,
                index: 1,
                falls_ms: vec![],
                ordered_ms: vec![],
            };
            config.gpus.insert(gpu, record);
        }
        let holds = assignment(&config, &"a1".parse().unwrap()).holds;
        assert_eq!(holds.iter().map(|hold| hold.gpu.as_str()).collect::<Vec<_>>(), ["gpu-1"]);
    }

    #[test]
    fn an_agent_gets_its_own_workers_until_the_plan_lets_them_go() {
        check("a1", "m.0");
        check("a2", "m.1 n.0");
        check("a3", "gone.0");
        check("a4", "");
    }
}
