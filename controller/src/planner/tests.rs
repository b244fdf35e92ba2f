//! What the planner decides, from words; and that no change takes a ready worker away before another is there.

use izar_common::id::Hash;

use super::*;
use crate::agents::fixture::{config, empty_report, fleet, gpu};

const NOW: u64 = 1_000_000;
const TIMES: Times = Times { now_ms: NOW, leader_since_ms: 0 };

/// `worker@agent`, with `!` if it retires.
fn words(workers: &BTreeMap<WorkerId, Placement>) -> String {
    let word = |(id, place): (&WorkerId, &Placement)| {
        format!("{id}@{}{}", place.agent, if place.retiring_ms.is_some() { "!" } else { "" })
    };
    workers.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn next(config: &Config, fleet: &Fleet, times: Times) -> String {
    let mut config = config.clone();
    let Some(next) = plan(&config, fleet, times) else { return "same".into() };
    assert_eq!(next.version, config.plan.version + 1);
    config.plan = next;
    let text = words(&config.plan.workers);
    if let Some(again) = plan(&config, fleet, times) {
        panic!("{text} is not stable, then came {}", words(&again.workers));
    }
    text
}

/// `agents`: names, `-name` for one that has been away for long, `~name` for one that just left.
fn agents(names: &str) -> Fleet {
    let mut fleet = Fleet::new(0);
    for name in names.split_whitespace() {
        let id: NodeId = name.trim_start_matches(['-', '~']).parse().unwrap();
        let seen = if name.starts_with('-') { NOW - LOST_MS } else { NOW - 1 };
        fleet.connect(&id, seen);
        fleet.report(&id, empty_report(), seen);
        if name.starts_with(['-', '~']) {
            fleet.disconnect(&id);
        }
    }
    fleet
}

fn check(wanted: &str, current: &str, names: &str, expected: &str) {
    let text = next(&config(wanted, current), &agents(names), TIMES);
    assert_eq!(text, expected, "{wanted} | {current} | {names}");
}

/// Like `check`, with agents that say what their workers do.
fn check_said(wanted: &str, current: &str, said: &str, expected: &str) {
    let text = next(&config(wanted, current), &fleet(said, NOW), TIMES);
    assert_eq!(text, expected, "{wanted} | {current} | {said}");
}

#[test]
fn missing_replicas_go_to_distinct_agents_with_the_fewest_workers() {
    check("m 1", "", "a1 a2", "m.0@a1");
    check("m 2", "", "a1 a2", "m.0@a1 m.1@a2");
    check("m 3", "", "a1 a2", "m.0@a1 m.1@a2 m.2@a1");
    check("m 1, n 1", "m.0@a1", "a1 a2", "m.0@a1 n.0@a2");
    check("m 2", "", "", "same");
    check("m 2", "", "~a1", "same");
    check("m 2", "m.1@a1", "a1 a2", "m.0@a2 m.1@a1");
}

#[test]
fn a_name_must_leave_room_for_the_numbers_of_its_workers() {
    let fits = |length: usize| can_be_named(&DeploymentId::new(&"m".repeat(length)).unwrap());
    assert_eq!((fits(58), fits(59)), (true, false));
}

#[test]
fn what_is_right_stays() {
    check("m 2", "m.0@a1 m.1@a2", "a1 a2", "same");
    check("m 2", "m.0@a1 m.1@a2", "a1 a2 a0 a3", "same");
    check("m 2", "m.0@a1 m.1@a2", "a1 ~a2 a3", "same");
    check("m 2", "m.0@a1 m.1@a1", "a1", "same");
}

#[test]
fn surplus_retires_from_the_highest_number_also_beyond_nine() {
    check("m 1", "m.0@a1 m.1@a2", "a1 a2", "m.0@a1 m.1@a2!");
    check("m 2", "m.0@a1 m.1@a1 m.2@a2", "a1 a2", "m.0@a1 m.1@a1! m.2@a2");
    let eleven: Vec<_> = (0..11).map(|i| format!("m.{i}@a1")).collect();
    // Ids sort by their letters: m.10 stands before m.2.
    let expected = "m.0@a1 m.1@a1 m.10@a1! m.2@a1 m.3@a1 m.4@a1 m.5@a1 m.6@a1 m.7@a1 m.8@a1 m.9@a1";
    check("m 10", &eleven.join(" "), "a1", expected);
    check("m 0", "m.0@a1", "a1", "m.0@a1!");
    check("", "m.0@a1", "a1", "m.0@a1!");
}

#[test]
fn one_that_retires_goes_when_it_is_idle_and_everybody_knows() {
    let at = |age_ms: u64, said: &str| {
        let mut config = config("m 1", "m.0@a1 m.1@a2!");
        config.plan.workers.get_mut("m.1").unwrap().retiring_ms = Some(NOW - age_ms);
        next(&config, &fleet(said, NOW), TIMES)
    };
    let (idle, busy) = ("a1 m.0 ready 0 0 0\na2 m.1 ready 0 0 0", "a1 m.0 ready 0 0 0\na2 m.1 ready 1 0 0");
    assert_eq!(at(RETIRE_MS - 1, idle), "same");
    assert_eq!(at(RETIRE_MS, idle), "m.0@a1");
    assert_eq!(at(RETIRE_LIMIT_MS - 1, busy), "same");
    assert_eq!(at(RETIRE_LIMIT_MS, busy), "m.0@a1");
    assert_eq!(at(RETIRE_MS, "a1 m.0 ready 0 0 0\na2 m.1 ready 0 0 1"), "same", "a job of ours");
}

#[test]
fn a_lost_agent_loses_its_workers_only_if_another_can_take_them() {
    check("m 2", "m.0@a1 m.1@a2", "a1 -a2 a3", "m.0@a1 m.1@a3");
    check("m 2", "m.0@a1 m.1@a2", "a1 -a2", "m.0@a1 m.1@a1");
    check("m 2", "m.0@a1 m.1@a2", "-a1 -a2", "same");
    check("m 1", "m.0@never", "a1", "m.0@a1");
    check("m 1", "m.0@a1 m.1@a2!", "a1 -a2", "m.0@a1");
    check("m 1", "m.0@a1 m.1@a2!", "a1 ~a2", "same");
}

#[test]
fn nobody_is_lost_while_the_leader_or_the_controller_is_new() {
    let times = Times { now_ms: NOW, leader_since_ms: NOW - NEW_LEADER_MS + 1 };
    assert_eq!(next(&config("m 1", "m.0@a2"), &agents("a1 -a2"), times), "same");
    let mut fleet = agents("a1 -a2");
    fleet.since_ms = NOW - LOST_MS + 1;
    assert_eq!(next(&config("m 1", "m.0@a2"), &fleet, TIMES), "same");
    assert_eq!(next(&config("m 1", "m.0@never"), &fleet, TIMES), "same");
}

#[test]
fn doubled_replicas_spread_at_once_while_they_do_not_serve() {
    check("m 2", "m.0@a1 m.1@a1", "a1 a2", "m.0@a1 m.1@a2");
    check("m 3", "m.0@a1 m.1@a1 m.2@a1", "a1 a2 a3", "m.0@a1 m.1@a3 m.2@a2");
    check("m 3", "m.0@a1 m.1@a1 m.2@a2", "a1 a2", "same");
}

#[test]
fn doubled_replicas_that_serve_get_a_companion_before_one_of_them_retires() {
    let said = |third: &str| format!("a1 m.0 ready 1 0 0\na1 m.1 ready 1 0 0\na2 m.2 {third} 0 0 0");
    let before = "a1 m.0 ready 1 0 0\na1 m.1 ready 1 0 0\na2 n.0 ready 0 0 0";
    check_said("m 2", "m.0@a1 m.1@a1", before, "m.0@a1 m.1@a1 m.2@a2");
    check_said("m 2", "m.0@a1 m.1@a1 m.2@a2", &said("loading"), "same");
    check_said("m 2", "m.0@a1 m.1@a1 m.2@a2", &said("ready"), "m.0@a1 m.1@a1! m.2@a2");
}

#[test]
fn another_revision_comes_before_the_old_one_goes() {
    // `-9` at a worker's place means another revision than the wanted one.
    let said = |new: &str| format!("a1 m.0 ready 1 0 0 x\na2 m.1 {new} 0 0 0");
    check_said("m 1", "m.0@a1-9", "a1 m.0 ready 1 0 0 x\na2 n.0 ready 0 0 0", "m.0@a1 m.1@a2");
    check_said("m 1", "m.0@a1-9 m.1@a2", &said("loading"), "same");
    check_said("m 1", "m.0@a1-9 m.1@a2", &said("ready"), "m.0@a1! m.1@a2");
    let both = "a1 m.0 ready 0 0 0 x\na2 m.1 ready 0 0 0 x\na1 m.2 ready 0 0 0";
    let old = "a1 m.0 ready 0 0 0 x\na2 m.1 ready 0 0 0 x";
    check_said("m 2", "m.0@a1-9 m.1@a2-9", old, "m.0@a1 m.1@a2 m.2@a1");
    check_said("m 2", "m.0@a1-9 m.1@a2-9 m.2@a1", both, "m.0@a1! m.1@a2 m.2@a1 m.3@a2");
    check_said("m 1", "m.0@a1-9", "a1 m.0 backoff 0 0 0 x", "m.0@a1! m.1@a1");
}

#[test]
fn where_nobody_has_room_for_both_the_old_one_goes_first() {
    let mut config = config("m 1", "m.0@a1-9");
    config.deployments.get_mut("m").unwrap().constraints.gpus = 1;
    let mut fleet = fleet("a1 m.0 ready 0 0 0 x", NOW);
    fleet.agents.get_mut("a1").unwrap().report.as_mut().unwrap().gpus = 1;
    assert_eq!(next(&config, &fleet, TIMES), "m.0@a1!");
}

#[test]
fn a_draining_agent_keeps_its_workers_until_others_stand_in() {
    let drained = |current: &str, said: &str, age_ms: u64| {
        let mut config = config("m 1", current);
        config.standings.insert("a1".parse().unwrap(), Standing::Draining { within_ms: 5_000 });
        config.plan.workers.values_mut().filter_map(|p| p.retiring_ms.as_mut()).for_each(|ms| *ms = NOW - age_ms);
        next(&config, &fleet(said, NOW), TIMES)
    };
    let alone = "a1 m.0 ready 1 0 0";
    assert_eq!(drained("m.0@a1", alone, 0), "same", "nobody can take it");
    let said = |new: &str| format!("{alone}\na2 m.1 {new} 0 0 0");
    assert_eq!(drained("m.0@a1", &format!("{alone}\na2 n.0 ready 0 0 0"), 0), "m.0@a1 m.1@a2");
    assert_eq!(drained("m.0@a1 m.1@a2", &said("loading"), 0), "same");
    assert_eq!(drained("m.0@a1 m.1@a2", &said("ready"), 0), "m.0@a1! m.1@a2");
    assert_eq!(drained("m.0@a1! m.1@a2", &said("ready"), 4_999), "same", "it ends its job");
    assert_eq!(drained("m.0@a1! m.1@a2", &said("ready"), 5_000), "m.1@a2", "its job moves");
    assert_eq!(drained("m.0@a1! m.1@a2", &said("backoff"), 5_000), "same", "its job cannot move");
}

#[test]
fn constraints_are_kept_and_what_they_leave_unmet_is_said() {
    let mut fleet = agents("a1 a2");
    let report = |fleet: &mut Fleet, agent: &str, label: &str, gpus: u32, memory_bytes: u64| {
        let mut report = empty_report();
        (report.gpus, report.memory_bytes) = (gpus, memory_bytes);
        report.labels.insert("rack".into(), label.into());
        fleet.report(&agent.parse().unwrap(), report, NOW);
    };
    report(&mut fleet, "a1", "r1", 0, 4 << 30);
    report(&mut fleet, "a2", "r2", 2, 1 << 30);
    let check = |constrain: &dyn Fn(&mut crate::state::Constraints), expected: &str, unmet_part: &str| {
        let mut config = config("m 2", "");
        constrain(&mut config.deployments.get_mut("m").unwrap().constraints);
        assert_eq!(next(&config, &fleet, TIMES), expected);
        if let Some(plan) = plan(&config, &fleet, TIMES) {
            config.plan = plan;
        }
        let unmet = unmet(&config, &fleet, &config.deployments["m"]).unwrap_or_default();
        assert!(unmet.contains(unmet_part) && unmet.is_empty() == unmet_part.is_empty(), "{unmet}");
    };
    check(&|_| {}, "m.0@a1 m.1@a2", "");
    check(&|c| c.gpus = 1, "m.0@a2 m.1@a2", "");
    check(&|c| c.gpus = 2, "m.0@a2", "1 without a place: a1: has 0 free GPUs of 2 needed; a2: has 0 free GPUs");
    check(&|c| drop(c.labels.insert("rack".into(), "r2".into())), "m.0@a2 m.1@a2", "");
    check(&|c| drop(c.labels.insert("rack".into(), "r9".into())), "same", "a1: has no label rack=r9");
    check(&|c| c.memory_bytes = 3 << 30, "m.0@a1", "a2: has 921 MiB of free memory of 3072 MiB needed");
    check(&|c| (c.apart, c.gpus) = (true, 1), "m.0@a2", "a2: has one already");
}

#[test]
fn a_cordoned_agent_keeps_what_it_has_and_gets_nothing_new() {
    let mut config = config("m 2", "m.0@a1");
    config.standings.insert("a1".parse().unwrap(), Standing::Cordoned);
    assert_eq!(next(&config, &agents("a1 a2"), TIMES), "m.0@a1 m.1@a2");
    assert_eq!(next(&config, &agents("a1"), TIMES), "same");
    let unmet = unmet(&config, &agents("a1"), &config.deployments["m"]).unwrap();
    assert_eq!(unmet, "1 without a place: a1: is cordoned");
}

#[test]
fn an_agent_has_a_limit_of_workers() {
    let text = next(&config("m 100", ""), &agents("a1"), TIMES);
    assert_eq!(text.split(' ').count(), WORKERS_PER_AGENT);
}

/// Whatever is wanted, and whatever happens on the way, as many are ready as are wanted, or as there were before.
#[test]
fn a_change_never_leaves_fewer_ready_workers() {
    let mut random = 7u64;
    let mut draw = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for _ in 0..200 {
        let mut config = config("m 3", "");
        let mut fleet = agents("a1 a2 a3");
        let (mut now_ms, mut begun) = (NOW, false);
        for step in 0..60 {
            now_ms += 500;
            if begun && step % 20 == 10 {
                let deployment = config.deployments.get_mut("m").unwrap();
                match draw(3) {
                    0 => deployment.revision = Hash([draw(5) as u8 + 1; 32]),
                    1 => deployment.engine.max_batch = draw(8) as u32 + 1,
                    _ => {
                        let agent = format!("a{}", draw(3) + 1).parse().unwrap();
                        config.standings.clear();
                        config.standings.insert(agent, Standing::Draining { within_ms: 2_000 });
                    }
                }
            }
            if let Some(plan) = plan(&config, &fleet, Times { now_ms, leader_since_ms: 0 }) {
                config.plan = plan;
            }
            // Workers come up in their own time; those that are gone from the plan are gone.
            for agent in ["a1", "a2", "a3"] {
                let id: NodeId = agent.parse().unwrap();
                let mut report = empty_report();
                for (worker, place) in config.plan.workers.iter().filter(|(_, place)| place.agent == id) {
                    let was = fleet.agents[&id]
                        .workers()
                        .iter()
                        .find(|w| w.worker == *worker && w.revision == place.revision);
                    let ready = was.is_some_and(|was| was.state == WorkerState::Ready) || draw(3) == 0;
                    let said = format!("{agent} {worker} {} 0 0 0", if ready { "ready" } else { "loading" });
                    let mut one = super::tests::fleet(&said, now_ms).agents[&id].workers()[0].clone();
                    one.revision = place.revision;
                    report.workers.push(one);
                }
                fleet.report(&id, report, now_ms);
            }
            let serving = config.plan.workers.iter().filter(|(id, place)| {
                place.retiring_ms.is_none() && fleet.agents.get(&place.agent).is_some_and(|view| is_ready(view, id))
            });
            let serving = serving.count();
            assert!(!begun || serving >= 3, "{}", words(&config.plan.workers));
            begun |= serving >= 3;
        }
    }
}

#[test]
fn a_worker_on_a_gpu_that_is_not_sound_is_replaced_where_there_is_room_and_stays_where_there_is_none() {
    check_said("m 2", "m.0@a1 m.1@a2", "a1 m.0 fenced 0 0 0\na2 m.1 ready 0 0 0", "m.0@a1! m.1@a2 m.2@a1");
    let mut fleet = fleet("a1 m.0 fenced 0 0 0\na2 m.1 ready 0 0 0", NOW);
    let fault = |fleet: &mut Fleet, agent: &str, fault: &str| {
        fleet.agents.get_mut(agent).unwrap().report.as_mut().unwrap().health.fault = fault.into();
    };
    fault(&mut fleet, "a1", "1 GPUs of 2 that are expected");
    assert_eq!(next(&config("m 2", "m.0@a1 m.1@a2"), &fleet, TIMES), "m.0@a1! m.1@a2 m.2@a2");
    fault(&mut fleet, "a2", "it hangs");
    let config = config("m 2", "m.0@a1 m.1@a2");
    assert_eq!(next(&config, &fleet, TIMES), "same");
    let unmet = unmet(&config, &fleet, &config.deployments["m"]).unwrap();
    assert!(unmet.contains("a1: is not sound (1 GPUs of 2 that are expected); a2: is not sound (it hangs)"), "{unmet}");
}

#[test]
fn a_worker_that_died_of_its_gpu_is_replaced_and_one_that_died_or_loads_otherwise_is_not() {
    let says = |state: &str| format!("a1 m.0 {state} 0 0 0\na2 m.1 ready 0 0 0");
    check_said("m 2", "m.0@a1 m.1@a2", &says("backoff!"), "m.0@a1! m.1@a2 m.2@a1");
    for state in ["backoff", "fetching!", "loading!", "ready"] {
        check_said("m 2", "m.0@a1 m.1@a2", &says(state), "same");
    }
    // The one that came for it stays.
    let later = "a1 m.0 backoff! 0 0 0\na2 m.1 ready 0 0 0\na3 m.2 loading 0 0 0";
    check_said("m 2", "m.0@a1! m.1@a2 m.2@a3", later, "m.1@a2 m.2@a3");
}

#[test]
fn a_card_that_is_cordoned_gets_no_worker_and_is_not_counted() {
    use izar_common::health::gpu::{Mode, State};
    let mut fleet = agents("a1");
    let mut report = empty_report();
    (report.gpus, report.memory_bytes) = (2, 1 << 40);
    report.health.gpus = vec![gpu("gpu-1", State::Cordoned), gpu("gpu-2", State::Healthy)];
    report.health.gpus[1].cuda = Some(1);
    let mut check = |mode, change: &dyn Fn(&mut Deployment), expected: &str| {
        report.health.mode = mode;
        fleet.report(&"a1".parse().unwrap(), report.clone(), NOW);
        let mut config = config("m 1", "");
        change(config.deployments.get_mut("m").unwrap());
        assert_eq!(next(&config, &fleet, TIMES), expected);
    };
    check(Mode::Advise, &|m| m.engine.device = Device::Cuda(0), "same");
    check(Mode::Advise, &|m| m.engine.device = Device::Cuda(1), "m.0@a1");
    check(Mode::Observe, &|m| m.engine.device = Device::Cuda(0), "m.0@a1");
    check(Mode::Advise, &|m| m.constraints.gpus = 2, "same");
    check(Mode::Advise, &|m| m.constraints.gpus = 1, "m.0@a1");
}

#[test]
fn an_agent_whose_gpus_are_mended_counts_as_drained_and_only_as_long() {
    use crate::state::remedies::Remedy;
    use izar_common::health::gpu::Action;
    let both = "a1 m.0 ready 0 0 0\na2 n.0 ready 0 0 0";
    let mut config = config("m 1, n 1", "m.0@a1 n.0@a2");
    let remedy = Remedy { id: 9, agent: "a1".parse().unwrap(), action: Action::Reset, gpus: vec![], ordered_ms: NOW };
    config.remedies.insert(9, remedy);
    assert_eq!(next(&config, &fleet(both, NOW), TIMES), "m.0@a1 m.1@a2 n.0@a2");
    config.remedies.clear();
    assert_eq!(next(&config, &fleet(both, NOW), TIMES), "same");
    // An operator's own word stays what it is.
    config.standings.insert("a1".parse().unwrap(), Standing::Draining { within_ms: 7 });
    assert_eq!(config.standing(&"a1".parse().unwrap()), Some(Standing::Draining { within_ms: 7 }));
}

#[test]
fn an_agent_can_be_emptied_if_all_that_serves_there_has_room_elsewhere() {
    let check = |said: &str, change: &dyn Fn(&mut Config), expected: bool| {
        let mut config = config("m 2, n 1", "m.0@a1 m.1@a2 n.0@a1");
        change(&mut config);
        assert_eq!(can_be_emptied(&config, &fleet(said, NOW), &"a1".parse().unwrap()), expected, "{said}");
    };
    let serve = "a1 m.0 ready 0 0 0\na1 n.0 ready 0 0 0\na2 m.1 ready 0 0 0";
    let apart = |config: &mut Config| config.deployments.get_mut("m").unwrap().constraints.apart = true;
    check(serve, &|_| (), true);
    check(serve, &apart, false);
    check(&format!("{serve}\na3 x.0 ready 0 0 0"), &apart, true);
    check("a1 m.0 fenced 0 0 0\na1 n.0 loading 0 0 0\na2 m.1 ready 0 0 0", &apart, true);
    check("a1 m.0 ready 0 0 0", &|_| (), false);
    let cordoned = |config: &mut Config| _ = config.standings.insert("a2".parse().unwrap(), Standing::Cordoned);
    check(serve, &cordoned, false);
}
