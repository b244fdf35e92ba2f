//! How many jobs the workers of a deployment have room for, so that what must wait does so in the queue, which knows
//! classes, deadlines and tenants, and not in a worker.
//!
//! Pure. It sees what agents last said and what this controller has asked since; what other controllers ask it learns
//! of with the next report, so two of them may send a few jobs too many: these wait in the worker.

use izar_common::health::WorkerReport;
use izar_common::id::WorkerId;

use crate::fleet::{AgentView, Fleet};
use crate::queue::Room;
use crate::scheduler::{self, Ask, JOBS_PER_AGENT};
use crate::state::Config;

/// Urgent jobs on a worker at once, beside a batch that may be full. The worker keeps as many places for them; more would
/// make each other late.
pub const URGENT_PLACES: u32 = 4;

/// Jobs sent beyond the places of a batch, so that a worker begins the next one in the step after an end instead of after
/// a way to the controller and back. A few: they cannot be overtaken there by who is in a greater hurry.
fn look_ahead(max_batch: u32) -> u32 {
    (max_batch / 8).max(1)
}

/// Sums up the workers that could take a job.
pub fn room(fleet: &Fleet, config: &Config, ask: &Ask<'_>) -> Room {
    let mut room = Room::default();
    for (_, view, worker) in scheduler::candidates(fleet, config, ask) {
        let streams = JOBS_PER_AGENT.saturating_sub(view.jobs());
        room.replicas += 1;
        room.free += free(view, worker);
        room.reserve += URGENT_PLACES.min(streams);
        room.urgent += URGENT_PLACES;
    }
    room
}

/// Jobs that a worker could begin at once.
fn free(view: &AgentView, worker: &WorkerReport) -> u32 {
    let max_batch = worker.places();
    let ours = view.in_flight.get(&worker.worker).copied().unwrap_or(0);
    let places = (max_batch + look_ahead(max_batch)).saturating_sub(ours + view.others(&worker.worker));
    places.min(JOBS_PER_AGENT.saturating_sub(view.jobs()))
}

/// Whether a job that has begun could go on at once, and exactly, on a worker that is not slow.
pub fn elsewhere(fleet: &Fleet, config: &Config, ask: &Ask<'_>, slow: impl Fn(&WorkerId) -> bool) -> bool {
    scheduler::candidates(fleet, config, ask).any(|(_, view, worker)| {
        let exact = ask.numerics.is_none() || ask.numerics == worker.numerics;
        exact && !slow(&worker.worker) && free(view, worker) > 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{config, fleet};
    use izar_common::id::{Hash, NumericsId};

    /// `said` as in the scheduler's tests; batches have four places, so there are five.
    fn check(said: &str, replicas: u32, free: u32) {
        let (config, fleet) = (config("m 2", "m.0@a1 m.1@a2"), fleet(said, 1000));
        let deployment = "m".parse().unwrap();
        let ask = Ask::any(&deployment, Hash([1; 32]), 1000);
        let (reserve, urgent) = (replicas * URGENT_PLACES, replicas * URGENT_PLACES);
        assert_eq!(room(&fleet, &config, &ask), Room { replicas, free, reserve, urgent }, "{said}");
    }

    #[test]
    fn room_is_what_the_batches_of_ready_workers_have_left_and_a_little_more() {
        check("a1 m.0 ready 0 0 0\na2 m.1 ready 0 0 0", 2, 10);
        check("a1 m.0 ready 0 0 3\na2 m.1 loading 0 0 0", 1, 2);
        check("a1 m.0 ready 0 0 9\na2 m.1 ready 0 0 4", 2, 1);
        check("a1 m.0 ready 0 0 0 x\na2 n.0 ready 0 0 0", 0, 0);
    }

    #[test]
    fn a_job_leaves_a_slow_worker_only_for_one_that_has_room_and_computes_the_same() {
        let (config, deployment) = (config("m 2", "m.0@a1 m.1@a2"), "m".parse().unwrap());
        let check = |second: &str, numerics: Option<u64>, expected: bool| {
            let fleet = fleet(&format!("a1 m.0 ready 1 0 1\na2 m.1 {second}"), 1000);
            let numerics = numerics.map(NumericsId);
            let ask = Ask { numerics, ..Ask::any(&deployment, Hash([1; 32]), 1000) };
            let found = elsewhere(&fleet, &config, &ask, |worker| worker.as_str() == "m.0");
            assert_eq!(found, expected, "{second} {numerics:?}");
        };
        check("ready 0 0 0", Some(1), true);
        check("ready 4 0 4", Some(1), true);
        check("ready 5 0 5", Some(1), false);
        check("ready 0 0 0 other", Some(1), false);
        check("ready 0 0 0 other", None, true);
        check("loading 0 0 0", Some(1), false);
        check("ready 0 0 0 x", Some(1), false);
    }

    #[test]
    fn what_others_have_sent_takes_room_once_it_is_seen_twice() {
        let (config, mut fleet) = (config("m 1", "m.0@a1"), fleet("a1 m.0 ready 3 1 0", 1000));
        let (agent, deployment) = ("a1".parse().unwrap(), "m".parse().unwrap());
        let ask = Ask::any(&deployment, Hash([1; 32]), 1000);
        // Once may be ours that have just ended.
        assert_eq!(room(&fleet, &config, &ask).free, 5);
        let report = fleet.agents[&agent].report.clone().unwrap();
        fleet.begin(&agent, &"m.0".parse().unwrap());
        fleet.report(&agent, report, 1250);
        assert_eq!(room(&fleet, &config, &ask).free, 1, "three of others, one of ours");
    }
}
