//! Whatever leaders propose, in whatever order, the budget holds and an agent has one order at a time.

use izar_common::clock::Hlc;
use izar_common::health::gpu::Remedy as Mend;
use izar_common::id::Hash;
use izar_common::wire::agent::EngineOptions;
use proptest::prelude::*;

use super::super::command::{Batch, Command, Origin, Reply};
use super::super::models::Placement;
use super::*;

const HOUR_MS: u64 = 60 * 60 * 1_000;

/// A state, the index of its last entry, the hour, and how often each of two leaders has proposed.
struct Site {
    state: State,
    index: u64,
    now_ms: u64,
    proposed: [u64; 2],
}

fn agent(number: usize) -> NodeId {
    format!("a{number}").parse().unwrap()
}

/// Each agent has one GPU.
fn gpu(number: usize) -> GpuId {
    format!("gpu-{number}").parse().unwrap()
}

impl Site {
    fn new(agents: usize) -> Self {
        let mut site =
            Self { state: State::new("east".parse().unwrap()), index: 0, now_ms: 100 * HOUR_MS, proposed: [0; 2] };
        site.plan(agents);
        site
    }
    fn propose(&mut self, leader: usize, command: Command) -> Reply {
        (self.index, self.proposed[leader]) = (self.index + 1, self.proposed[leader] + 1);
        let origin = Origin { node: format!("c{leader}").parse().unwrap(), incarnation: 1 };
        let (seq, at) = (self.proposed[leader], Hlc::from_ms(self.now_ms));
        let batch = Batch { origin, seq, floor: 0, at, commands: vec![command] };
        self.state.apply(self.index, &batch).replies.remove(0)
    }
    /// A worker on each of so many agents.
    fn plan(&mut self, agents: usize) {
        let place = |number| Placement {
            deployment: "m".parse().unwrap(),
            agent: agent(number),
            revision: Hash([1; 32]),
            engine: EngineOptions::default(),
            retiring_ms: None,
        };
        let workers = (0..agents).map(|number| (format!("m.{number}").parse().unwrap(), place(number))).collect();
        let based_on = self.state.plan.version;
        assert_eq!(self.propose(0, Command::SetPlan { based_on, plan: Plan { version: 0, workers } }), Reply::Done);
    }
    fn hold(&mut self, number: usize, quarantined: bool) {
        let (reason, boot, remedy) = ("Xid 95".into(), "b".into(), Mend::Reset);
        let hold = Hold { gpu: gpu(number), quarantined, reason, remedy, standing: false, boot };
        self.propose(0, Command::HoldGpu { agent: agent(number), hold, fell_ms: None });
    }
    fn order(&mut self, leader: usize, number: usize) -> Reply {
        let index = self.state.gpus.get(&gpu(number)).map_or(0, |record| record.index);
        let gpus = vec![Target { gpu: gpu(number), index }];
        self.propose(leader, Command::OrderRemedy { agent: agent(number), action: Action::Reset, gpus })
    }
    fn end(&mut self, id: u64, outcome: Outcome) -> Reply {
        self.propose(0, Command::EndRemedy { id, outcome, reason: "so it was".into() })
    }
    fn held(&self, number: usize) -> Option<bool> {
        Some(self.state.gpus.get(&gpu(number))?.hold.as_ref()?.quarantined)
    }
    fn open(&self) -> Vec<u64> {
        self.state.remedies.keys().copied().collect()
    }
}

proptest! {
    #[test]
    fn the_budget_holds_whoever_proposes_and_an_agent_has_one_order_at_a_time(
        agents in 1..40_usize,
        steps in prop::collection::vec((0..6_u8, 0..40_usize, 0..2_usize), 1..200),
    ) {
        let mut site = Site::new(agents);
        let mut last = 0;
        for (what, number, leader) in steps {
            let outcome = Outcome::ALL[number % Outcome::ALL.len()];
            match what {
                // Leaders change, and each orders what it thinks is right, again and again.
                0 | 1 => if site.order(leader, number) == Reply::Done {
                    let id = *site.open().last().unwrap();
                    prop_assert!(id > last, "ids grow");
                    last = id;
                },
                2 => site.hold(number, false),
                3 => {
                    let open = site.open();
                    if let Some(id) = open.get(number % open.len().max(1)) {
                        prop_assert_eq!(site.end(*id, outcome), Reply::Done);
                    }
                }
                4 => drop(site.propose(leader, Command::ReleaseGpu { gpu: gpu(number), reason: "r".into(), operator: true })),
                _ => site.now_ms += HOUR_MS,
            }
            let under: BTreeSet<NodeId> = site.state.remedies.values().map(|remedy| remedy.agent.clone()).collect();
            prop_assert_eq!(under.len(), site.open().len(), "one order an agent");
            let all = (0..agents).map(agent).chain(under.iter().cloned()).collect::<BTreeSet<_>>().len();
            prop_assert!(under.len() <= (all / 10).max(1), "{} of {}", under.len(), all);
            let lately = |record: &super::super::GpuRecord| {
                record.ordered_ms.iter().filter(|at| site.now_ms - **at < ORDERS_WITHIN_MS).count()
            };
            prop_assert!(site.state.gpus.values().all(|record| lately(record) <= ORDERS));
        }
    }
}

#[test]
fn a_tenth_of_the_agents_and_one_in_any_case() {
    for (agents, expected) in [(1, 1), (19, 1), (20, 2), (39, 3)] {
        let mut site = Site::new(agents);
        (0..agents).for_each(|number| site.hold(number, false));
        let done = (0..agents).filter(|number| site.order(0, *number) == Reply::Done).count();
        assert_eq!(done, expected, "{agents} agents");
        assert!(!site.state.config_snapshot().has_budget());
        let first = site.open()[0];
        assert_eq!(site.end(first, Outcome::Failed), Reply::Done);
        assert_eq!(site.order(1, agents - 1), Reply::Done, "room again");
    }
}

#[test]
fn what_is_held_otherwise_or_not_at_all_is_not_ordered() {
    let mut site = Site::new(2);
    let refused = |refusal| Reply::Refused(refusal);
    assert_eq!(site.order(0, 0), refused(Refusal::HeldOtherwise(gpu(0))));
    site.hold(0, true);
    assert_eq!(site.order(0, 0), refused(Refusal::HeldOtherwise(gpu(0))), "quarantine is an operator's");
    site.hold(1, false);
    let old = vec![Target { gpu: gpu(1), index: 1 }];
    let order = Command::OrderRemedy { agent: agent(1), action: Action::Reset, gpus: old };
    assert_eq!(site.propose(0, order), refused(Refusal::HeldOtherwise(gpu(1))), "the hold is another one");
    assert_eq!(site.order(0, 1), Reply::Done);
    assert_eq!(site.order(1, 1), refused(Refusal::BudgetSpent), "the next leader orders it again");
    assert_eq!(site.end(7_000, Outcome::Done), refused(Refusal::UnknownRemedy(7_000)));
}

#[test]
fn what_two_orders_a_day_have_not_mended_is_not_ordered_again() {
    let mut site = Site::new(1);
    site.hold(0, false);
    for _ in 0..ORDERS {
        assert_eq!(site.order(0, 0), Reply::Done);
        let id = site.open()[0];
        site.end(id, Outcome::Unknown);
    }
    assert_eq!(site.order(0, 0), Reply::Refused(Refusal::TooOften(gpu(0))));
    site.now_ms += 25 * HOUR_MS;
    assert_eq!(site.order(0, 0), Reply::Done);
}

#[test]
fn an_end_lifts_what_was_held_keeps_it_or_asks_for_a_human() {
    for (outcome, expected) in [
        (Outcome::Done, None),
        (Outcome::Failed, Some(false)),
        (Outcome::Unknown, Some(false)),
        (Outcome::Wrong, Some(false)),
        (Outcome::Late, Some(true)),
    ] {
        let mut site = Site::new(1);
        site.hold(0, false);
        site.order(0, 0);
        let id = site.open()[0];
        assert_eq!(site.end(id, outcome), Reply::Done);
        assert_eq!(site.held(0), expected, "{outcome}");
        assert_eq!(site.end(id, outcome), Reply::Refused(Refusal::UnknownRemedy(id)), "it ends once");
    }
    // What has turned out worse meanwhile is not what was mended.
    let mut site = Site::new(1);
    site.hold(0, false);
    site.order(0, 0);
    site.hold(0, true);
    let id = site.open()[0];
    site.end(id, Outcome::Done);
    assert_eq!(site.held(0), Some(true));
}

#[test]
fn open_orders_outlive_a_restart() {
    let mut site = Site::new(1);
    site.hold(0, false);
    site.order(0, 0);
    let rows: Vec<Vec<u8>> = site.state.all_rows().iter().map(|row| site.state.row(row).unwrap()).collect();
    let read = State::from_rows("east".parse().unwrap(), site.state.applied(), rows).unwrap();
    assert_eq!((read.digest(), &read.remedies), (site.state.digest(), &site.state.remedies));
}
