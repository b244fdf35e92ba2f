//! GPUs are mended without a human: the leader orders, one server at a time, the server is emptied first, each order is
//! carried out once whoever is killed meanwhile, and a GPU comes back on probation or is left to an operator. Controllers,
//! agents and root's hand are the real ones; the library and the programs below them play.

use anyhow::ensure;
use izar_tests::cli::{self, Admin};
use izar_tests::gpus::{Hand, Prober, Server, gpu};
use izar_tests::logs;
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until, until_true};

use crate::gpu_health::{ALL, FAULT, FENCED, WORSE, client, serving, wait_state, while_streams_run};

/// What an agent says when it begins, a leader when it was in vain, and a controller when somebody lets a GPU work again.
const MENDS: &str = "GPUs are being mended";
const IN_VAIN: &str = "a remedy of GPUs has not helped";
const RELEASED: &str = "an operator released a GPU";

/// An error that a reset mends, with the driver's own word.
const SICK: &str = "gpu0 field 230 1\ngpu0 xid 95";

/// A site whose agents may act, each with two GPUs and a hand.
fn site(controllers: usize, agents: &[&str], guards: &str) -> (Site, Vec<(Server, Hand)>) {
    let mut site = Site::new(controllers, false);
    site.start_controllers();
    let start = |agent: &&str| {
        let hand = Hand::start(&site, agent);
        let settings = format!("mode = \"act\"\nhelper = {:?}\n{guards}", hand.socket());
        (Server::start(&mut site, agent, "gpus 2\nuuids", &settings), hand)
    };
    let servers = agents.iter().map(start).collect();
    agents.iter().for_each(|agent| wait_state(&site, agent, 0, "healthy"));
    (site, servers)
}

/// Waits until a controller sees a GPU in a state.
fn wait_seen(admin: &Admin, agent: &str, expected: &str) {
    until(expected, 2 * SOON, || {
        let gpu = gpu(admin, agent, 0)?;
        ensure!(gpu["state"] == expected, "{gpu}");
        Ok(())
    });
}

/// Waits until no order is open.
fn wait_ended(admin: &Admin) {
    until("every order to end", SOON, || {
        let open = admin.json(&["gpus"])?["remedies"].clone();
        ensure!(open.as_array().is_some_and(Vec::is_empty), "{open}");
        Ok(())
    });
}

fn deeds(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn a_gpu_is_reset_once_while_its_streams_go_on_elsewhere_and_comes_back_on_probation() {
    let _machine = izar_tests::shared();
    let (site, servers) = site(3, &["a1", "a2"], ALL);
    let (admin, (server, hand)) = (site.admin(1), &servers[0]);
    admin.deploy_echo("slow", 2, 5, 50);
    admin.wait_ready("slow", 2);
    let client = client(&site);
    while_streams_run(&site, &client, 60, || {
        server.say(SICK);
        until_true("the reset", SOON, || !hand.deeds().is_empty());
    });
    wait_seen(&admin, "a1", "probation");
    wait_ended(&admin);
    let back = gpu(&admin, "a1", 0).unwrap();
    assert!(back["reason"].as_str().unwrap().starts_with("it was reset; before: "), "{back}");
    assert_eq!(back["held"], false, "{back}");
    until("a worker on each server", SOON, || {
        let serving = serving(&site);
        ensure!(serving.len() == 2 && serving.iter().any(|worker| worker.ends_with("on a1")), "{serving:?}");
        Ok(())
    });
    assert_eq!(hand.deeds(), deeds(&["begin reset a1", "end reset a1"]));
    // Whoever led when it ended has counted it.
    let done = |controller| {
        let page = site.client(controller, None).get("/metrics").unwrap().text();
        page.lines().any(|line| line == "izar_gpu_remedies_total{verb=\"reset\",outcome=\"done\"} 1")
    };
    assert!((1..=3).any(done));
    site.finish(&[WORSE, FAULT, FENCED, MENDS]);
}

#[test]
fn an_order_outlives_its_leader_and_is_carried_out_once() {
    let _machine = izar_tests::shared();
    // A GPU speaks for nobody here: the worker on its server is moved because of the order alone.
    let (mut site, servers) = site(3, &["a1", "a2"], "");
    let (server, hand) = &servers[0];
    site.admin(1).deploy_echo("slow", 2, 5, 5);
    site.admin(1).wait_ready("slow", 2);
    hand.hold();
    server.say(SICK);
    until_true("the reset to have begun", SOON, || !hand.deeds().is_empty());
    let led = site.admin(1).status().unwrap()["leader"].as_str().expect("there is a leader").to_owned();
    let shown = gpu(&site.admin(1), "a1", 0).unwrap();
    assert_eq!(shown["state"], "resetting", "{shown}");
    assert!(serving(&site).iter().all(|worker| worker.ends_with("on a2")), "{:?}", serving(&site));
    site.kill(&led);
    let other = (1..=3).find(|number| format!("c{number}") != led).unwrap();
    let admin = site.admin(other);
    until("another leader", SOON, || {
        let leader = admin.status()?["leader"].clone();
        ensure!(leader.is_string() && leader != led.as_str(), "{leader}");
        Ok(())
    });
    let open = admin.json(&["gpus"]).unwrap()["remedies"].clone();
    assert_eq!((open[0]["agent"].as_str(), open[0]["action"].as_str()), (Some("a1"), Some("reset")), "{open}");
    let told = admin.run(&["gpus"]).stdout;
    assert!(told.contains("agent a1 was ordered") && told.contains("to mend 1 of its GPUs: reset"), "{told}");
    let listed = admin.json(&["agents", "list"]).unwrap()["agents"][0].clone();
    assert_eq!((&listed["remedy"], &listed["standing"]), (&open[0], &serde_json::Value::Null), "{listed}");
    hand.let_go();
    wait_seen(&admin, "a1", "probation");
    wait_ended(&admin);
    admin.wait_ready("slow", 2);
    assert_eq!(hand.deeds(), deeds(&["begin reset a1", "end reset a1"]));
    site.start("izar-controller", &led);
    site.finish(&[WORSE, FAULT, FENCED, MENDS]);
}

#[test]
fn of_two_sick_servers_one_is_mended_after_the_other() {
    let _machine = izar_tests::shared();
    let (site, servers) = site(1, &["a1", "a2"], "");
    servers.iter().for_each(|(server, _)| server.say(SICK));
    ["a1", "a2"].iter().for_each(|agent| wait_seen(&site.admin(1), agent, "probation"));
    wait_ended(&site.admin(1));
    let done = servers[0].1.deeds();
    let of = |agent: &str| deeds(&[&format!("begin reset {agent}"), &format!("end reset {agent}")]);
    assert!(done == [of("a1"), of("a2")].concat() || done == [of("a2"), of("a1")].concat(), "{done:?}");
    site.finish(&[WORSE, FAULT, FENCED, MENDS]);
}

#[test]
fn what_an_agent_has_begun_the_next_process_does_not_begin_again() {
    let _machine = izar_tests::shared();
    let (mut site, servers) = site(1, &["a1"], "");
    let ((server, hand), admin) = (&servers[0], site.admin(1));
    hand.hold();
    server.say("gpu1 xid 79");
    // The server does not go down, whatever is asked of it; the agent dies, as it would.
    until_true("the restart to have been asked for", SOON, || hand.deeds().len() == 1);
    site.kill("a1");
    let connected = || admin.json(&["agents", "list"]).is_ok_and(|said| said["agents"][0]["connected"] == true);
    until_true("the agent to be missed", SOON, || !connected());
    site.start("izar-agent", "a1");
    until_true("the next one to be there", SOON, connected);
    wait_state(&site, "a1", 1, "cordoned");
    let open = admin.json(&["gpus"]).unwrap()["remedies"].clone();
    assert_eq!(open.as_array().map(Vec::len), Some(1), "root's hand is still at it: {open}");
    hand.let_go();
    until("the order to end without anybody knowing how", SOON, || {
        let lines = logs::read(&site.logs());
        let said = |line: &logs::Line| line.text.contains(IN_VAIN) && line.text.contains("outcome=unknown");
        ensure!(lines.iter().any(said), "not yet");
        Ok(())
    });
    wait_ended(&site.admin(1));
    wait_state(&site, "a1", 1, "cordoned");
    assert_eq!(hand.deeds(), deeds(&["begin restart a1", "end restart a1"]));
    site.finish(&[WORSE, FAULT, FENCED, MENDS, IN_VAIN, "agent is given up"]);
}

#[test]
fn a_device_gives_the_known_answers_or_says_that_it_cannot_be_asked() {
    let asked = |device: &str| cli::run("izar-agent", &["probe", "--device", device]);
    let cpu = asked("cpu");
    assert!(cpu.success && cpu.stdout == "ok\n", "{cpu:?}");
    // No machine has that many cards; a build without CUDA does not even look.
    let card = asked("cuda:999");
    assert!(card.stdout.starts_with("skipped: device cuda:999") || !card.success, "{card:?}");
}

#[test]
fn a_gpu_that_computes_wrongly_after_its_reset_is_an_operators_and_a_sound_one_gets_its_whole_share_back() {
    // It waits for more than a minute and measures nothing, so other stories may run meanwhile.
    let mut site = Site::new(1, false);
    site.start_controllers();
    let (hand, prober) = (Hand::start(&site, "a1"), Prober::new(&site, "a1"));
    let settings = format!(
        "mode = \"act\"\n{ALL}\nhelper = {:?}\nprobe = {:?}\nlimits.probation_minutes = 1",
        hand.socket(),
        prober.program()
    );
    let server = Server::start(&mut site, "a1", "gpus 2\nuuids", &settings);
    let admin = site.admin(1);
    wait_state(&site, "a1", 0, "healthy");
    admin.deploy_echo("slow", 1, 5, 5);
    admin.wait_ready("slow", 1);
    prober.say("wrong: product: element 7 is 5 for 4, and 0 more are wrong");
    server.say(SICK);
    wait_state(&site, "a1", 0, "quarantined: a known answer came out wrong: product: element 7 is 5 for 4");
    wait_ended(&admin);
    let page = || site.client(1, None).get("/metrics").unwrap().text();
    let counted = |verb: &str, outcome: &str| {
        let line = format!("izar_gpu_remedies_total{{verb=\"{verb}\",outcome=\"{outcome}\"}} 1");
        page().lines().any(|found| found == line)
    };
    assert!(counted("reset", "wrong"), "{}", page());
    assert_eq!(serving(&site), [""; 0], "nothing computes beside a GPU that nobody can trust");

    // An operator's word lets it back, but not past the question: this time a cordon, which a reset may mend.
    let release = |reason: &str| {
        let released = admin.run(&["gpus", "release", "a1", "0", "--reason", reason]);
        assert!(released.success, "{released:?}");
    };
    release("seated anew");
    wait_state(&site, "a1", 0, "cordoned: a known answer came out wrong");
    prober.say("ok");
    release("its memory was replaced");
    wait_state(&site, "a1", 0, "probation: released");
    admin.wait_ready("slow", 1);
    let share = || {
        let agents = admin.json(&["agents", "list"]).unwrap();
        agents["agents"][0]["workers"][0]["share"].clone()
    };
    assert_eq!(share(), 25);
    until("probation to end", 4 * SOON, || {
        let gpu = gpu(&admin, "a1", 0)?;
        ensure!(gpu["state"] == "healthy" && gpu["held"] == false && gpu["reason"] == "", "{gpu}");
        Ok(())
    });
    until("its whole share", SOON, || {
        ensure!(share() == 100, "{}", share());
        Ok(())
    });
    assert_eq!(hand.deeds(), deeds(&["begin reset a1", "end reset a1"]));
    site.finish(&[WORSE, FAULT, FENCED, MENDS, IN_VAIN, RELEASED]);
}

#[test]
fn a_gpu_that_cannot_be_reset_stays_cordoned_and_says_why() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let server = Server::start(&mut site, "a1", "gpus 1\nuuids", "mode = \"act\"\nhelper = \"nobody.sock\"");
    wait_state(&site, "a1", 0, "healthy");
    server.say("gpu0 xid 95");
    until("the reason", 2 * SOON, || {
        let gpu = gpu(&site.admin(1), "a1", 0)?;
        let reason = gpu["reason"].as_str().unwrap_or_default();
        ensure!(gpu["state"] == "cordoned" && reason.contains("nobody.sock") && reason.contains("Xid 95"), "{gpu}");
        Ok(())
    });
    wait_ended(&site.admin(1));
    assert_eq!(gpu(&site.admin(1), "a1", 0).unwrap()["held"], true);
    site.finish(&[WORSE, IN_VAIN]);
}
