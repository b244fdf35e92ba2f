//! What the leader orders to mend GPUs, and when an order has ended: the configuration and agents' reports -> commands.
//! Pure.
//!
//! An order needs an agent that may act, a GPU that is cordoned and would be mended by it, room in the budget, and room
//! elsewhere for all that serves on that agent. Nothing is ordered of an agent that an operator has cordoned or drained:
//! somebody is at it. An order ends by its agent's word, or by the time, after which a human must look; an agent that
//! has not begun by then does not begin any more, so the budget's next place is free indeed.

use izar_common::health::gpu::{Action, Mode, Outcome, Remedy as Mend, State};
use izar_common::health::{Generation, Report};
use izar_common::id::NodeId;

use crate::fleet::Fleet;
use crate::planner;
use crate::state::command::Command;
use crate::state::remedies::{BEGIN_MS, ORDERS, Remedy, Target, too_often};
use crate::state::{Config, GpuRecord};

/// How long an order may take. A reset: five minutes to begin, three for the helper, and its program's last ninety
/// seconds. A server with much memory tests it for a quarter of an hour before it starts.
const RESET_LIMIT_MS: u64 = BEGIN_MS + 5 * 60 * 1_000;
const RESTART_LIMIT_MS: u64 = BEGIN_MS + 25 * 60 * 1_000;

/// How long after an order the next about the same GPU may come: others have their turn meanwhile.
const AGAIN_MS: u64 = 15 * 60 * 1_000;

/// Returns the commands of now: first what has ended, then what is for a human, and one new order at most. `open_ms`: for
/// how long this leader has seen an order. Clocks may be apart, and a new leader may not have heard of its agent yet: an
/// order is late only where one leader has waited for it all the time.
pub fn commands(config: &Config, fleet: &Fleet, now_ms: u64, open_ms: impl Fn(u64) -> u64) -> Vec<Command> {
    let end = |remedy: &Remedy| end(fleet, remedy, open_ms(remedy.id));
    let mut commands: Vec<Command> = config.remedies.values().filter_map(end).collect();
    let mut wanted = Vec::new();
    for (agent, view) in fleet.agents.iter().filter(|(_, view)| view.connected) {
        let Some(report) = view.report.as_ref().filter(|report| report.health.mode == Mode::Act) else { continue };
        if config.standing(agent).is_some() {
            continue;
        }
        let (hopeless, sick): (Vec<_>, Vec<_>) =
            sick(config, agent, report).into_iter().partition(|(record, _)| too_often(&record.ordered_ms, now_ms));
        commands.extend(hopeless.into_iter().filter_map(|(record, _)| give_up(record)));
        wanted.extend(order(agent, &sick, now_ms));
    }
    if config.has_budget() {
        // Who has waited longest comes first, then by name.
        wanted.sort_by_key(|(last_ms, _, _)| *last_ms);
        let next = wanted.into_iter().find(|(_, agent, _)| planner::can_be_emptied(config, fleet, agent));
        commands.extend(next.map(|(_, _, command)| command));
    }
    commands
}

fn end(fleet: &Fleet, remedy: &Remedy, open_ms: u64) -> Option<Command> {
    let view = fleet.agents.get(&remedy.agent).filter(|view| view.connected);
    let said = view.and_then(|view| view.report.as_ref()?.health.ended.as_ref());
    if let Some(ended) = said.filter(|ended| ended.id == remedy.id) {
        let (outcome, reason) = (ended.outcome, ended.reason.clone());
        return Some(Command::EndRemedy { id: remedy.id, outcome, reason });
    }
    let limit_ms = match remedy.action {
        Action::Reset => RESET_LIMIT_MS,
        Action::Restart => RESTART_LIMIT_MS,
    };
    let reason = || format!("nothing was heard of its {} within {} minutes", remedy.action, limit_ms / 60_000);
    (open_ms >= limit_ms).then(|| Command::EndRemedy { id: remedy.id, outcome: Outcome::Late, reason: reason() })
}

/// The GPUs of an agent that would be mended by something that may be ordered.
fn sick<'a>(config: &'a Config, agent: &NodeId, report: &Report) -> Vec<(&'a GpuRecord, Action)> {
    let of_agent = config.gpus.values().filter(|record| record.agent == *agent);
    let sick = of_agent.filter_map(|record| {
        let hold = record.hold.as_ref().filter(|hold| !hold.quarantined)?;
        // What its agent does not know of yet may be mended already.
        let known = Generation { incarnation: config.incarnation, applied: record.index };
        if report.generation < known {
            return None;
        }
        let mend = match report.health.gpus.iter().find(|gpu| gpu.id == record.gpu) {
            Some(gpu) if gpu.state == State::Cordoned => hold.remedy.max(gpu.remedy),
            Some(_) => return None,
            // An agent that began after it was lost has never seen it.
            None if hold.boot == report.health.boot => hold.remedy,
            None => return None,
        };
        match mend {
            Mend::Reset => Some((record, Action::Reset)),
            Mend::Restart => Some((record, Action::Restart)),
            Mend::None | Mend::Replace => None,
        }
    });
    sick.collect()
}

/// An order for an agent, and when one about any of those GPUs was given last.
fn order(agent: &NodeId, sick: &[(&GpuRecord, Action)], now_ms: u64) -> Option<(u64, NodeId, Command)> {
    let last_ms = |record: &GpuRecord| record.ordered_ms.last().copied();
    let due = |(record, _): &&(&GpuRecord, Action)| {
        last_ms(record).is_none_or(|last_ms| now_ms.saturating_sub(last_ms) >= AGAIN_MS)
    };
    let due: Vec<&(&GpuRecord, Action)> = sick.iter().filter(due).collect();
    // A restart of the server resets all of them.
    let action = due.iter().map(|(_, action)| *action).max()?;
    let gpus = due.iter().map(|(record, _)| Target { gpu: record.gpu.clone(), index: record.index }).collect();
    let last_ms = due.iter().filter_map(|(record, _)| last_ms(record)).max().unwrap_or(0);
    Some((last_ms, agent.clone(), Command::OrderRemedy { agent: agent.clone(), action, gpus }))
}

/// What was ordered as often as it may be, and is not well.
fn give_up(record: &GpuRecord) -> Option<Command> {
    let mut hold = record.hold.clone()?;
    hold.quarantined = true;
    hold.reason = format!("{ORDERS} orders within a day have not mended it; {}", hold.reason);
    Some(Command::HoldGpu { agent: record.agent.clone(), hold, fell_ms: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{config, fleet, gpu};
    use crate::state::Standing;
    use izar_common::health::gpu::{Ended, Hold};

    const NOW: u64 = 100 * 60 * 60 * 1_000;

    /// Two agents with a worker each, of which `sick` have a cordoned GPU with the agent's number.
    struct Site {
        config: Config,
        fleet: Fleet,
    }

    impl Site {
        fn new(sick: &[&str]) -> Self {
            let mut site = Self {
                config: config("m 2", "m.0@a1 m.1@a2"),
                fleet: fleet("a1 m.0 ready 0 0 0\na2 m.1 ready 0 0 0", NOW),
            };
            for agent in ["a1", "a2"] {
                site.report(agent, |report| report.health.mode = Mode::Act);
            }
            sick.iter().for_each(|agent| site.fall_sick(agent, &format!("gpu-{agent}"), Mend::Reset));
            site
        }
        fn report(&mut self, agent: &str, change: impl FnOnce(&mut Report)) {
            change(self.fleet.agents.get_mut(agent).unwrap().report.as_mut().unwrap());
        }
        fn record(&mut self, gpu: &str) -> &mut GpuRecord {
            self.config.gpus.get_mut(gpu).unwrap()
        }
        fn fall_sick(&mut self, agent: &str, id: &str, remedy: Mend) {
            let (reason, boot) = ("Xid 95".to_owned(), String::new());
            let gpu_id: izar_common::id::GpuId = id.parse().unwrap();
            let hold = Some(Hold { gpu: gpu_id.clone(), quarantined: false, reason, remedy, standing: false, boot });
            let (agent_id, falls_ms, ordered_ms) = (agent.parse().unwrap(), vec![], vec![]);
            let record = GpuRecord { gpu: gpu_id.clone(), agent: agent_id, hold, index: 5, falls_ms, ordered_ms };
            self.config.gpus.insert(gpu_id, record);
            let known = Generation { incarnation: self.config.incarnation, applied: 5 };
            self.report(agent, |report| {
                report.generation = known;
                report.health.gpus.push(gpu(id, State::Cordoned));
            });
        }
        /// An order that was given so long ago.
        fn ordered(&mut self, agent: &str, action: Action, ago_ms: u64) {
            let gpus = vec![Target { gpu: format!("gpu-{agent}").parse().unwrap(), index: 5 }];
            let remedy = Remedy { id: 9, agent: agent.parse().unwrap(), action, gpus, ordered_ms: NOW - ago_ms };
            self.config.remedies.insert(9, remedy);
        }
        fn said(&self) -> String {
            let word = |command: &Command| match command {
                Command::OrderRemedy { agent, action, gpus } => {
                    let gpus: Vec<&str> = gpus.iter().map(|target| target.gpu.as_str()).collect();
                    format!("{action} {} of {agent}", gpus.join(" "))
                }
                Command::EndRemedy { id, outcome, reason } => format!("end {id} {outcome} {reason}").trim().to_owned(),
                Command::HoldGpu { hold, .. } if hold.quarantined => {
                    format!("quarantine {}: {}", hold.gpu, hold.reason)
                }
                other => panic!("{other:?}"),
            };
            let open_ms = |id| NOW - self.config.remedies[&id].ordered_ms;
            commands(&self.config, &self.fleet, NOW, open_ms).iter().map(word).collect::<Vec<_>>().join(", ")
        }
    }

    #[test]
    fn a_cordoned_gpu_is_reset_where_its_agent_may_act() {
        assert_eq!(Site::new(&[]).said(), "");
        assert_eq!(Site::new(&["a2"]).said(), "reset gpu-a2 of a2");
        for mode in [Mode::Observe, Mode::Advise] {
            let mut site = Site::new(&["a2"]);
            site.report("a2", |report| report.health.mode = mode);
            assert_eq!(site.said(), "", "{mode:?}");
        }
    }

    #[test]
    fn two_servers_come_one_after_the_other() {
        let mut site = Site::new(&["a1", "a2"]);
        assert_eq!(site.said(), "reset gpu-a1 of a1");
        site.ordered("a1", Action::Reset, 1_000);
        assert_eq!(site.said(), "");
        site.config.remedies.clear();
        // It has had its turn.
        site.record("gpu-a1").ordered_ms = vec![NOW - AGAIN_MS];
        assert_eq!(site.said(), "reset gpu-a2 of a2");
    }

    #[test]
    fn nothing_is_ordered_below_what_the_models_need() {
        let mut site = Site::new(&["a1"]);
        site.config.deployments.get_mut("m").unwrap().constraints.apart = true;
        assert_eq!(site.said(), "", "its worker serves and has no room elsewhere");
        site.report("a1", |report| report.workers[0].state = izar_common::health::WorkerState::Fenced);
        assert_eq!(site.said(), "reset gpu-a1 of a1", "it does not serve");
    }

    #[test]
    fn nothing_is_ordered_of_what_an_operator_is_at_or_what_is_quarantined_or_not_known() {
        let mut site = Site::new(&["a1"]);
        site.config.standings.insert("a1".parse().unwrap(), Standing::Cordoned);
        assert_eq!(site.said(), "");
        let mut site = Site::new(&["a1"]);
        site.record("gpu-a1").hold.as_mut().unwrap().quarantined = true;
        assert_eq!(site.said(), "");
        let mut site = Site::new(&["a1"]);
        site.record("gpu-a1").index = 6;
        assert_eq!(site.said(), "", "its agent has not heard of the hold");
        let mut site = Site::new(&["a1"]);
        site.report("a1", |report| report.health.gpus[0].state = State::Probation);
        assert_eq!(site.said(), "", "it is back");
        let mut site = Site::new(&["a1"]);
        site.report("a1", |report| report.health.gpus[0].remedy = Mend::Replace);
        assert_eq!(site.said(), "", "nothing that can be ordered mends it");
    }

    #[test]
    fn a_restart_of_the_server_mends_all_of_its_gpus() {
        let mut site = Site::new(&["a1"]);
        site.fall_sick("a1", "gpu-b", Mend::Restart);
        assert_eq!(site.said(), "restart gpu-a1 gpu-b of a1");
        // One that was lost before its agent began is in no report.
        site.report("a1", |report| drop(report.health.gpus.pop()));
        assert_eq!(site.said(), "restart gpu-a1 gpu-b of a1");
        site.report("a1", |report| report.health.boot = "later".into());
        assert_eq!(site.said(), "reset gpu-a1 of a1", "the server was restarted since");
    }

    #[test]
    fn what_was_ordered_lately_waits_and_what_was_ordered_twice_is_for_a_human() {
        let mut site = Site::new(&["a1"]);
        site.record("gpu-a1").ordered_ms = vec![NOW - AGAIN_MS + 1];
        assert_eq!(site.said(), "");
        site.record("gpu-a1").ordered_ms = vec![NOW - AGAIN_MS];
        assert_eq!(site.said(), "reset gpu-a1 of a1");
        site.record("gpu-a1").ordered_ms = vec![NOW - 2 * AGAIN_MS, NOW - AGAIN_MS];
        assert_eq!(site.said(), "quarantine gpu-a1: 2 orders within a day have not mended it; Xid 95");
    }

    #[test]
    fn an_order_ends_by_its_agents_word_or_by_the_time() {
        let mut site = Site::new(&["a1"]);
        site.ordered("a1", Action::Reset, RESET_LIMIT_MS - 1);
        let ended = |id| Some(Ended { id, outcome: Outcome::Failed, reason: "in use".into() });
        site.report("a1", |report| report.health.ended = ended(8));
        assert_eq!(site.said(), "", "that was another one");
        site.report("a1", |report| report.health.ended = ended(9));
        assert_eq!(site.said(), "end 9 failed in use");
        site.report("a1", |report| report.health.ended = None);
        for (action, limit_ms, minutes) in
            [(Action::Reset, RESET_LIMIT_MS, 10), (Action::Restart, RESTART_LIMIT_MS, 30)]
        {
            site.ordered("a1", action, limit_ms);
            let expected = format!("end 9 late nothing was heard of its {action} within {minutes} minutes");
            assert_eq!(site.said(), expected);
        }
    }
}
