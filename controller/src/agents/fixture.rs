//! Small configurations and fleets from words, for the tests of the pure modules.

use izar_common::clock::Hlc;
use izar_common::health::gpu::{Health, State, View};
use izar_common::health::{Generation, Load, Report, WorkerReport, WorkerState};
use izar_common::id::{DeploymentId, Hash, NodeId, NumericsId, WorkerId};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::wire::agent::EngineOptions;

use crate::fleet::Fleet;
use crate::state::{Config, Constraints, Deployment, Model, Placement};

/// `wanted`: `deployment replicas`, separated by commas; `plan`: `worker@agent`, separated by spaces, with `!` behind it
/// if it retires and `-9` if it has revision 0909…; every deployment has revision 0101…
pub fn config(wanted: &str, plan: &str) -> Config {
    let mut config = Config { applied: 7, incarnation: 3, ..Config::default() };
    let revision = Hash([1; 32]);
    let text = File { name: "text.json".into(), hash: Hash([2; 32]), bytes: 2 };
    let manifest = Manifest {
        name: "echo".into(),
        kind: Kind::Echo { first_token_us: 0, next_token_us: 0 },
        files: Vec::new(),
        text,
        context: 4096,
        vocabulary: 1024,
        architecture: "echo".into(),
    };
    config.models.insert(revision, Model { revision, manifest, registered: Hlc::default() });
    for part in wanted.split(',').filter(|part| !part.trim().is_empty()) {
        let (id, replicas) = part.trim().split_once(' ').unwrap();
        let id: DeploymentId = id.parse().unwrap();
        let engine = EngineOptions { max_batch: 4, ..EngineOptions::default() };
        let (replicas, constraints) = (replicas.parse().unwrap(), Constraints::default());
        let deployment = Deployment { id: id.clone(), revision, replicas, engine, constraints };
        config.deployments.insert(id, deployment);
    }
    for part in plan.split_whitespace() {
        let (worker, agent) = part.split_once('@').unwrap();
        let deployment = worker.rsplit_once('.').unwrap().0.parse().unwrap();
        let retiring_ms = agent.ends_with('!').then_some(0);
        let revision = if agent.trim_end_matches('!').ends_with("-9") { Hash([9; 32]) } else { revision };
        let agent = agent.trim_end_matches('!').trim_end_matches("-9").parse().unwrap();
        let engine = EngineOptions { max_batch: 4, ..EngineOptions::default() };
        let placement = Placement { deployment, agent, revision, engine, retiring_ms };
        config.plan.workers.insert(worker.parse().unwrap(), placement);
    }
    config
}

/// One line for each worker: `agent worker state running waiting in_flight`, and `x` for another revision,
/// `other` for other numerics. A state with `!` behind it is one on a GPU that is not sound.
pub fn fleet(said: &str, now_ms: u64) -> Fleet {
    let mut fleet = Fleet::new(0);
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let agent: NodeId = words[0].parse().unwrap();
        let worker: WorkerId = words[1].parse().unwrap();
        let number = |i: usize| words[i].parse::<u32>().unwrap();
        if !fleet.agents.contains_key(&agent) {
            fleet.connect(&agent, now_ms);
        }
        let mut report = fleet.agents[&agent].report.clone().unwrap_or_else(empty_report);
        report.workers.push(WorkerReport {
            worker: worker.clone(),
            deployment: words[1].rsplit_once('.').unwrap().0.parse().unwrap(),
            revision: Hash([if words.get(6) == Some(&"x") { 9 } else { 1 }; 32]),
            state: match words[2].trim_end_matches('!') {
                "ready" => WorkerState::Ready,
                "loading" => WorkerState::Loading,
                "fetching" => WorkerState::Fetching,
                "fenced" => WorkerState::Fenced,
                _ => WorkerState::Backoff,
            },
            pid: None,
            load: Load { running: number(3), waiting: number(4), ..Load::default() },
            max_batch: 4,
            restarts: 0,
            numerics: Some(NumericsId(if words.get(6) == Some(&"other") { 2 } else { 1 })),
            detail: String::new(),
            share: if words[2].ends_with('!') { 0 } else { 100 },
        });
        fleet.report(&agent, report, now_ms);
        (0..number(5)).for_each(|_| fleet.begin(&agent, &worker));
    }
    fleet
}

/// A report without workers.
pub fn empty_report() -> Report {
    Report {
        generation: Generation::default(),
        pid: 1,
        version: "0".into(),
        cores: 1,
        memory_bytes: 1,
        gpus: 0,
        labels: Default::default(),
        workers: Vec::new(),
        health: Health::default(),
    }
}

/// A GPU with nothing to say.
pub fn gpu(id: &str, state: State) -> View {
    View { cuda: Some(0), reason: "Xid 95".into(), ..View::new(id.parse().unwrap(), 0, state) }
}
