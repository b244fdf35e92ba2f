//! Does harm, one fault after the other, and knows which streams each one hits.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Process};
use izar_tests::far::Far;
use izar_tests::{logs, process, waiting};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::Value;

use crate::{Fault, Run};

/// A link stays cut until the agent is long given up.
const CUT: std::ops::Range<u64> = 2_500..4_000;

/// How long after a fault nothing is asked: until then a controller may still show what was there before.
const NOTICED: Duration = Duration::from_millis(500);

/// What may be done.
#[derive(Debug, Clone, Copy)]
enum Deed {
    KillController,
    KillWorker,
    StopWorker,
    KillAgent,
    Sever,
}

/// Everything that may be done, each as often as it is likely.
fn deeds(run: &Run<'_>) -> Vec<Deed> {
    let (faults, kills) = (&run.arguments.faults, run.arguments.kills.is_some());
    let allowed = |deed: &Deed| match deed {
        Deed::KillController => faults.contains(&Fault::Kill) && run.arguments.controllers >= 3,
        Deed::KillWorker | Deed::KillAgent => faults.contains(&Fault::Kill) && !kills,
        Deed::StopWorker => faults.contains(&Fault::Stop) && !kills,
        Deed::Sever => faults.contains(&Fault::Sever) && !kills,
    };
    let all = [
        (Deed::KillController, 8),
        (Deed::KillWorker, 5),
        (Deed::StopWorker, 2),
        (Deed::KillAgent, 3),
        (Deed::Sever, 3),
    ];
    all.into_iter().filter(|(deed, _)| allowed(deed)).flat_map(|(deed, times)| vec![deed; times]).collect()
}

pub struct Villain<'a> {
    pub run: &'a Run<'a>,
    pub cluster: &'a Cluster,
    /// The agent whose link can be cut.
    pub far: Option<&'a Far>,
    pub random: StdRng,
    /// Controllers in the order in which they are killed: each has time to become old in between.
    pub queue: Vec<String>,
}

impl Villain<'_> {
    /// One fault after the other until the run is over.
    pub fn rage(&mut self) -> Result<()> {
        let deeds = deeds(self.run);
        let arguments = self.run.arguments;
        while !self.run.is_over() {
            if deeds.is_empty() {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
            self.cluster.wait_serving(arguments.controllers, self.run.served, arguments.agents as u64);
            std::thread::sleep(Duration::from_millis(self.random.random_range(300..1500)));
            let deed = deeds[self.random.random_range(0..deeds.len())];
            self.act(deed)?;
        }
        Ok(())
    }

    fn act(&mut self, deed: Deed) -> Result<()> {
        let mut listed = Vec::new();
        for (id, admin) in self.cluster.admins() {
            let mut requests = admin.json(&["requests", "list"])?;
            listed.push((id, requests["requests"].as_array_mut().map(std::mem::take).unwrap_or_default()));
        }
        let mut victims = Vec::new();
        match deed {
            Deed::KillController => {
                let controller = self.next_controller();
                // Every second time the agent goes with it that computes most of its streams.
                if self.run.tally().by_fault.get("controller killed").unwrap_or(&0) % 2 == 1 {
                    let of = listed.iter().filter(|(id, _)| controller.as_ref().is_some_and(|c| c.id == *id));
                    let busy = |agent: &Process| {
                        of.clone().flat_map(|(_, all)| all).filter(|r| r["agent"] == *agent.id).count()
                    };
                    victims.extend(self.cluster.processes("agent").into_iter().max_by_key(busy));
                }
                victims.extend(controller);
            }
            Deed::KillWorker | Deed::StopWorker => victims.extend(self.any("worker")),
            Deed::KillAgent => victims.extend(self.any("agent")),
            Deed::Sever => {}
        }
        // One may have ended by itself, after an earlier kill.
        victims.retain(|victim| process::runs(victim.pid));
        let far = self.far.filter(|_| matches!(deed, Deed::Sever));
        let now = Instant::now();
        for victim in &victims {
            if matches!(deed, Deed::StopWorker) { process::stop(victim.pid) } else { process::kill_hard(victim.pid) }
        }
        far.inspect(|far| far.cut());
        let mut tally = self.run.tally();
        let mut dead: Vec<(&str, &str)> = victims.iter().map(|v| (v.role.as_str(), v.id.as_str())).collect();
        for role in victims.iter().map(|v| v.role.as_str()) {
            let what = match (role, deed) {
                ("controller", _) => "controller killed",
                ("agent", Deed::KillController) => "agent killed with it",
                ("agent", _) => "agent killed",
                (_, Deed::StopWorker) => "worker stopped",
                _ => "worker killed",
            };
            *tally.by_fault.entry(what).or_default() += 1;
        }
        if let Some(far) = far {
            dead.push(("agent", &far.node));
            *tally.by_fault.entry("link severed").or_default() += 1;
        }
        for (controller, requests) in &listed {
            for request in requests.iter().filter(|request| dies(controller, request, &dead)) {
                let text = |name: &str| request[name].as_str().unwrap_or_default().to_owned();
                let lost = dead.iter().any(|(role, id)| *role == "agent" && request[*role] == **id);
                tally.hit(text("turn"), text("state"), lost, now);
            }
        }
        drop(tally);
        // A second fault that comes before the first is noticed could leave no worker at all.
        waiting::until_true("a victim to end", waiting::SOON, || victims.iter().all(|v| !process::runs(v.pid)));
        std::thread::sleep(NOTICED);
        if let Some(far) = far {
            std::thread::sleep(Duration::from_millis(self.random.random_range(CUT)));
            far.mend();
        }
        Ok(())
    }

    fn any(&mut self, role: &str) -> Option<Process> {
        let mut victims = self.cluster.processes(role);
        (!victims.is_empty()).then(|| victims.swap_remove(self.random.random_range(0..victims.len())))
    }

    fn next_controller(&mut self) -> Option<Process> {
        let mut controllers = self.cluster.processes("controller");
        if self.queue.is_empty() {
            self.queue = controllers.iter().map(|c| c.id.clone()).collect();
            self.queue.shuffle(&mut self.random);
        }
        let next = self.queue.pop()?;
        controllers.retain(|c| c.id == next);
        controllers.pop()
    }
}

/// Whether a request that a controller lists dies with one of these.
fn dies(controller: &str, request: &Value, dead: &[(&str, &str)]) -> bool {
    dead.iter().any(|(role, id)| match *role {
        "controller" => controller == *id,
        role => request[role] == *id,
    })
}

/// What was taken for dead, as controllers count it and agents log it. Without a fault all of it is a false alarm.
pub fn alarms(cluster: &Cluster, clients: &[Client]) -> Result<Vec<(&'static str, u64)>> {
    let mut alarms = vec![("agents given up", 0), ("answers moved", 0), ("workers started again", 0)];
    for client in clients {
        let page = client.get("/metrics")?.text();
        for (name, (_, sum)) in ["izar_agents_given_up_total", "izar_placed_again_total"].into_iter().zip(&mut alarms) {
            let line = page.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            *sum += line.trim().parse::<f64>()? as u64;
        }
    }
    let restarts = logs::surprises(&cluster.logs(), &[]);
    alarms[2].1 = restarts.iter().filter(|line| line.text.contains("worker failed")).count() as u64;
    Ok(alarms)
}
