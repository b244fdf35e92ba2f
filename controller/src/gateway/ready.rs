//! Whether this controller can really generate: for `/readyz`, and for whoever asks why not.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::catalog::Catalog;
use crate::fleet::Fleet;
use crate::prefixes::Prefixes;
use crate::raft::Leadership;
use crate::scheduler;
use crate::state::Config;

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    pub ready: bool,
    /// Requests of projects that are `available` are answered; without a quorum only these are.
    pub available: bool,
    /// Deployments that can generate now.
    pub deployments: Vec<String>,
    /// What is missing; a ready controller may still miss some deployments.
    pub reasons: Vec<String>,
}

impl Readiness {
    /// Adds what is possible without a quorum; `admits`: whether turns may be noted until there is one.
    pub fn without_record(mut self, config: &Config, admits: bool) -> Self {
        let any = config.projects.values().any(|project| project.available);
        if !self.ready && admits && any && !self.deployments.is_empty() {
            self.available = true;
            self.reasons.push("only requests of projects that are `available` are answered".to_owned());
        }
        self
    }

    /// What a controller says that clients shall leave.
    pub fn draining(mut self) -> Self {
        (self.ready, self.available) = (false, false);
        self.reasons.insert(0, "this controller is draining; use another one".to_owned());
        self
    }
}

/// Asks the scheduler about every deployment. `has_text`: whether the tokenizer of a deployment's revision is here.
pub fn readiness(
    config: &Config,
    fleet: &Fleet,
    leadership: &Leadership,
    has_text: impl Fn(&izar_common::id::Hash) -> bool,
    now_ms: u64,
) -> Readiness {
    let (mut deployments, mut reasons) = (Vec::new(), Vec::new());
    if leadership.leader.is_none() {
        reasons.push("no leader is known".to_owned());
    }
    if config.deployments.is_empty() {
        reasons.push("no model is deployed".to_owned());
    }
    for deployment in config.deployments.values() {
        let revision = scheduler::revision(fleet, config, deployment);
        if !has_text(&revision) {
            reasons.push(format!("{}: its tokenizer is not here yet", deployment.id));
            continue;
        }
        let ask = scheduler::Ask::any(&deployment.id, revision, now_ms);
        // What caches hold makes no worker more or less ready.
        match scheduler::place(fleet, &Prefixes::default(), config, &ask) {
            // Full is busy, not broken.
            Ok(_) | Err(scheduler::NoPlace::AllFull { .. }) => deployments.push(deployment.id.to_string()),
            Err(no_place) => reasons.push(no_place.to_string()),
        }
    }
    let ready = leadership.leader.is_some() && !deployments.is_empty();
    Readiness { ready, available: ready, deployments, reasons }
}

/// Whether a controller that has just started knows all that it will know in a moment: a leader, and a replica of each
/// deployment that the plan has a worker for.
pub fn has_settled(config: &Config, readiness: &Readiness, leadership: &Leadership) -> bool {
    let mut planned = config.plan.workers.values().map(|placement| placement.deployment.as_str());
    let ready = |name| readiness.deployments.iter().any(|deployment| deployment == name);
    config.plan.workers.is_empty() || (leadership.leader.is_some() && planned.all(ready))
}

/// How long a leader may be missing before new requests are refused at once: an election takes less, and one that is
/// handed over takes a moment.
const LEADERLESS: Duration = Duration::from_secs(1);

/// Since when no leader has been known, as far as requests have looked.
#[derive(Debug, Default)]
pub struct Leaderless(Mutex<Option<Instant>>);

impl Leaderless {
    /// Returns whether a leader is known, now or in a moment.
    pub async fn ends(&self, leadership: &watch::Receiver<Leadership>) -> bool {
        let mut leadership = leadership.clone();
        if leadership.borrow_and_update().leader.is_some() {
            *self.since() = None;
            return true;
        }
        let limit = *self.since().get_or_insert_with(Instant::now) + LEADERLESS;
        let known = tokio::time::timeout_at(limit, leadership.wait_for(|known| known.leader.is_some())).await;
        matches!(known, Ok(Ok(_)))
    }

    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().expect("no panic while a time is held")
    }
}

/// Whether a tokenizer is here.
pub fn has_text(catalog: &Catalog) -> impl Fn(&izar_common::id::Hash) -> bool + '_ {
    |revision| catalog.text(revision).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::id::NodeId;

    fn led() -> Leadership {
        Leadership { leader: Some(NodeId::new("c1").unwrap()), term: 1, here: true }
    }

    #[test]
    fn a_controller_has_settled_when_what_is_planned_can_be_asked_for() {
        use crate::agents::fixture;
        let planned = fixture::config("m 1", "m.0@a1");
        let knows = |fleet: &Fleet, leadership: &Leadership| {
            has_settled(&planned, &readiness(&planned, fleet, leadership, |_| true, 0), leadership)
        };
        let connected = fixture::fleet("a1 m.0 ready 0 0 0", 0);
        assert!(knows(&connected, &led()));
        assert!(!knows(&Fleet::default(), &led()), "its agent is on its way");
        assert!(!knows(&connected, &Leadership::default()));
        let none = Config::default();
        let readiness = readiness(&none, &Fleet::default(), &led(), |_| true, 0);
        assert!(has_settled(&none, &readiness, &Leadership::default()), "there is nothing to wait for");
    }

    #[test]
    fn a_cluster_without_a_model_or_a_leader_is_not_ready_and_says_so() {
        let (config, fleet) = (Config::default(), Fleet::default());
        let readiness = readiness(&config, &fleet, &Leadership::default(), |_| true, 0);
        assert!(!readiness.ready);
        assert_eq!(readiness.reasons, ["no leader is known", "no model is deployed"]);
        assert!(!super::readiness(&config, &fleet, &led(), |_| true, 0).ready);
        let well = Readiness { ready: true, available: true, deployments: vec!["m".into()], reasons: Vec::new() };
        assert!(!well.clone().draining().ready && well.clone().draining().reasons[0].contains("draining"));
        let lost = Readiness { ready: false, available: false, ..well };
        let mut config = Config::default();
        assert!(!lost.clone().without_record(&config, true).available, "no project wants it");
        let mut project = crate::state::Project::new("p".parse().unwrap(), "t".parse().unwrap());
        project.available = true;
        config.projects.insert(project.id.clone(), project);
        let without = lost.clone().without_record(&config, true);
        assert!(without.available && !without.ready && !lost.without_record(&config, false).available);
    }
}
