//! GPUs fall off the bus, hang, are missing, make errors: what runs on them goes on elsewhere to the bit, `izar gpus` says
//! what is wrong and what would mend it, and a GPU that was put away comes back only by an operator's word or by having
//! been mended. The agents are the real ones; the library below them plays.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use izar_tests::client::Client;
use izar_tests::gpus::{Server, fault, gpu};
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: u64 = 60;
const STREAMS: usize = 6;

/// What agents say when a GPU gets worse.
pub const WORSE: &str = "a GPU's state changed for the worse";
pub const FAULT: &str = "the server's GPUs are not in order";
pub const FENCED: &str = "worker is fenced";

/// From an event to the moment when nothing is computed there any more and an operator sees why.
const FENCE: Duration = Duration::from_secs(1);

/// Every GPU speaks for every worker, so that the echo model is under their guard.
pub const ALL: &str = "guards = \"all\"";

fn body(tokens: u64, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": tokens, "stream": stream })
}

pub fn client(site: &Site) -> Client {
    let key = site.admin(1).create_key(&[]).unwrap();
    site.client(1, Some(&key))
}

fn state(site: &Site, agent: &str, index: u64) -> String {
    let gpu = gpu(&site.admin(1), agent, index);
    gpu.map_or_else(|error| error.to_string(), |gpu| format!("{}: {}", gpu["state"], gpu["reason"]).replace('"', ""))
}

pub fn wait_state(site: &Site, agent: &str, index: u64, expected: &str) {
    until(expected, SOON, || {
        let state = state(site, agent, index);
        ensure!(state.starts_with(expected), "GPU {index} of {agent} is {state}");
        Ok(())
    });
}

fn wait_fault(site: &Site, agent: &str, expected: &str) {
    until(expected, SOON, || {
        let fault = fault(&site.admin(1), agent)?;
        ensure!(fault.contains(expected) && fault.is_empty() == expected.is_empty(), "agent {agent}: `{fault}`");
        Ok(())
    });
}

/// The workers of `slow` that serve, and on which agents.
pub fn serving(site: &Site) -> Vec<String> {
    let agents = site.admin(1).json(&["agents", "list"]).unwrap();
    let mut serving = Vec::new();
    for agent in agents["agents"].as_array().into_iter().flatten() {
        for worker in agent["workers"].as_array().into_iter().flatten().filter(|worker| worker["state"] == "ready") {
            serving.push(format!("{} on {}", worker["worker"], agent["agent"]).replace('"', ""));
        }
    }
    serving
}

/// Streams run; `during` happens; every answer is whole and as if nothing had.
pub fn while_streams_run(site: &Site, client: &Client, tokens: u64, during: impl FnOnce()) {
    let expected = client.post(CHAT, &body(tokens, false)).unwrap().content();
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let answers: Vec<_> = (0..STREAMS)
            .map(|_| {
                scope.spawn(|| {
                    let answer = client.stream(CHAT, &body(tokens, true)).unwrap();
                    begun.fetch_add(1, Ordering::Relaxed);
                    answer.transcript().unwrap()
                })
            })
            .collect();
        until_true("every stream to have begun, on both servers", SOON, || {
            let requests = site.admin(1).json(&["requests", "list"]).unwrap();
            let requests = requests["requests"].as_array().cloned().unwrap_or_default();
            let on = |agent: &str| requests.iter().any(|r| r["agent"] == agent && r["tokens"] != 0);
            begun.load(Ordering::Relaxed) == STREAMS && on("a1") && on("a2")
        });
        during();
        for answer in answers {
            let transcript = answer.join().unwrap();
            assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
            assert_eq!(transcript.text, expected, "as if nothing had happened");
        }
    });
}

/// Two servers of two GPUs, and a model with a worker on each.
fn two_servers(gpu: &str) -> (Site, [Server; 2], Client) {
    let mut site = Site::new(1, false);
    site.start_controllers();
    let servers = ["a1", "a2"].map(|agent| Server::start(&mut site, agent, "gpus 2", gpu));
    for agent in ["a1", "a2"] {
        wait_state(&site, agent, 1, "healthy");
    }
    site.admin(1).deploy_echo("slow", 2, 5, 50);
    site.admin(1).wait_ready("slow", 2);
    let client = client(&site);
    (site, servers, client)
}

#[test]
fn answers_on_a_server_whose_gpu_falls_off_the_bus_go_on_elsewhere() {
    let _machine = izar_tests::exclusive();
    let (site, [first, _second], client) = two_servers("");
    let admin = site.admin(1);
    while_streams_run(&site, &client, TOKENS, || {
        let fell = Instant::now();
        first.say("gpu1 lost\ngpu1 xid 79");
        until("the GPU to be seen cordoned and its server empty", SOON, || {
            let gpu = gpu(&admin, "a1", 1)?;
            ensure!(gpu["state"] == "cordoned" && gpu["remedy"] == "restart", "{gpu}");
            ensure!(serving(&site).iter().all(|worker| worker.ends_with("on a2")), "{:?}", serving(&site));
            Ok(())
        });
        let took = fell.elapsed();
        println!("fenced and seen after {} ms", took.as_millis());
        assert!(took < FENCE, "{took:?}");
    });
    wait_fault(&site, "a1", "GPU 1 is cordoned");
    let told = admin.run(&["gpus"]).stdout;
    assert!(told.contains("restart the server") && told.contains("agent a1 gets no work"), "{told}");
    // What is gone from there is made up for elsewhere.
    admin.wait_ready("slow", 2);
    assert!(serving(&site).iter().all(|worker| worker.ends_with("on a2")), "{:?}", serving(&site));
    let page = client.get("/metrics").unwrap().text();
    let has = |name: &str, value: &str| {
        page.lines().any(|line| line.starts_with(name) && line.contains("gpu-a1-1") && line.ends_with(value))
    };
    assert!(has("DCGM_FI_DEV_XID_ERRORS", " 79") && has("izar_gpu_share", " 0"), "{page}");

    // Seated anew, without a restart of the server: an operator's word is needed, and it is on probation.
    first.say("gpu1 found");
    let empty = admin.run(&["gpus", "release", "a1", "1", "--reason", " "]);
    assert!(!empty.success && empty.stderr.contains("reason"), "{}", empty.stderr);
    until("the GPU to be held", SOON, || {
        ensure!(gpu(&admin, "a1", 1)?["held"] == true, "not yet");
        Ok(())
    });
    admin.json(&["gpus", "release", "a1", "1", "--reason", "seated anew"]).unwrap();
    wait_state(&site, "a1", 1, "probation");
    wait_fault(&site, "a1", "");

    // Twice in a week is once too often: that it came back does not help it.
    first.say("gpu1 xid 79");
    wait_state(&site, "a1", 1, "quarantined: it fell off the bus twice within 7 days");
    admin.json(&["gpus", "release", "a1", "1", "--reason", "another card"]).unwrap();
    wait_state(&site, "a1", 1, "probation");
    let none = admin.run(&["gpus", "release", "a1", "0", "--reason", "no reason"]);
    assert!(!none.success && none.stderr.contains("nothing is held against GPU gpu-a1-0"), "{}", none.stderr);
    site.finish(&[WORSE, FAULT, FENCED, "an operator released a GPU"]);
}

#[test]
fn a_library_that_hangs_puts_its_server_away_until_it_answers() {
    let _machine = izar_tests::exclusive();
    let (site, [first, _second], client) = two_servers("");
    // Twelve seconds each: they run when the ten have passed.
    while_streams_run(&site, &client, 240, || {
        first.say("hang temperature 13s");
        wait_fault(&site, "a1", "has not answered for 10 s");
        until("its workers to be away", SOON, || {
            ensure!(serving(&site).iter().all(|worker| worker.ends_with("on a2")), "{:?}", serving(&site));
            Ok(())
        });
    });
    assert_eq!(client.post(CHAT, &body(2, false)).unwrap().status, 200);
    wait_fault(&site, "a1", "");
    site.finish(&[FAULT, FENCED]);
}

#[test]
fn a_server_with_fewer_gpus_than_it_must_have_gets_no_work_and_says_why() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let server = Server::start(&mut site, "a1", "gpus 2", "expected = 3");
    wait_fault(&site, "a1", "2 GPUs of 3 that are expected");
    site.admin(1).deploy_echo("slow", 1, 5, 5);
    until("the reason to be said", SOON, || {
        let listed = site.admin(1).json(&["models", "list"])?;
        let unmet = listed["deployments"][0]["unmet"].as_str().unwrap_or_default();
        ensure!(unmet.contains("a1: is not sound (2 GPUs of 3 that are expected)"), "{listed}");
        Ok(())
    });
    server.say("gpus 3");
    site.admin(1).wait_ready("slow", 1);
    assert_eq!(client(&site).post(CHAT, &body(2, false)).unwrap().status, 200);
    site.finish(&[FAULT]);
}

#[test]
fn a_server_whose_library_does_not_load_says_so() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    site.write_agent("a1");
    let text = std::fs::read_to_string(site.config("a1")).unwrap();
    std::fs::write(site.config("a1"), text + "\n[gpu]\nnvml = \"nowhere.so\"\nkernel_log = \"/dev/null\"\n").unwrap();
    site.start("izar-agent", "a1");
    wait_fault(&site, "a1", "nowhere.so");
    site.finish(&[FAULT]);
}

#[test]
fn errors_of_programs_fence_nothing_and_those_of_the_gpu_do() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    // A driver that has no function for fields is an old one, not a sick GPU.
    let mut old = Server::start_without(&mut site, "a1", "gpus 2", ALL, "nvmlDeviceGetFieldValues");
    let new = Server::start(&mut site, "a2", "gpus 1\ngpu0 field 145 none", ALL);
    wait_state(&site, "a1", 1, "healthy");
    wait_state(&site, "a2", 0, "healthy");
    site.admin(1).deploy_echo("slow", 2, 5, 5);
    site.admin(1).wait_ready("slow", 2);

    for (xid, count) in [(13, 1), (31, 2), (43, 3), (63, 4)] {
        new.say(&format!("gpu0 xid {xid}"));
        until("the Xid to be counted", SOON, || {
            let gpu = gpu(&site.admin(1), "a2", 0)?;
            ensure!(gpu["xids"] == count && gpu["state"] == "healthy", "{gpu}");
            Ok(())
        });
    }
    assert_eq!(serving(&site).len(), 2);
    new.say("gpu0 xid 94");
    wait_state(&site, "a2", 0, "degraded: 3 errors of programs within an hour");
    until("the worker's share", SOON, || {
        let agents = site.admin(1).json(&["agents", "list"])?;
        ensure!(agents["agents"][1]["workers"][0]["share"] == 50, "{agents}");
        Ok(())
    });

    // The driver's own word, and its taking it back.
    new.say("gpu0 field 230 1");
    wait_state(&site, "a2", 0, "cordoned: the driver asks for a reset");
    new.say("gpu0 field 230 0");
    wait_state(&site, "a2", 0, "probation");
    new.say("gpu0 uncorrected 1");
    wait_state(&site, "a2", 0, "cordoned: 1 memory errors that were not corrected");

    // The kernel tells of what the library had no time to.
    old.log("NVRM: Xid (PCI:0000:11:00): 119, pid=7, name=python, Timeout waiting for RPC from GSP!");
    wait_state(&site, "a1", 1, "cordoned: Xid 119");
    assert!(state(&site, "a1", 0).starts_with("healthy"));
    until_true("nobody to serve", SOON, || serving(&site).is_empty());
    let refused = client(&site).post(CHAT, &body(2, false)).unwrap();
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.error_message().contains("on a GPU or server that is not sound"), "{}", refused.text());
    site.finish(&[WORSE, FAULT, FENCED]);
}

#[test]
fn what_is_held_against_a_gpu_outlives_its_agent() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let server = Server::start(&mut site, "a1", "gpus 4", "");
    wait_state(&site, "a1", 2, "healthy");
    server.say("gpu0 xid 54\ngpu1 xid 95\ngpu3 xid 79");
    wait_state(&site, "a1", 0, "quarantined: Xid 54");
    wait_state(&site, "a1", 1, "cordoned: Xid 95");
    for index in [0, 1, 3] {
        until("it to be held", SOON, || {
            ensure!(gpu(&site.admin(1), "a1", index)?["held"] == true, "not yet");
            Ok(())
        });
    }
    site.stop("a1");
    site.start("izar-agent", "a1");
    until("the agent to be back", SOON, || {
        let gpu = gpu(&site.admin(1), "a1", 2)?;
        ensure!(gpu["state"] == "healthy" && gpu["xids"] == 0, "{gpu}");
        Ok(())
    });
    wait_state(&site, "a1", 0, "quarantined: Xid 54");
    wait_state(&site, "a1", 1, "cordoned: Xid 95");
    // And what it needs: a GPU that fell off the bus takes its server along.
    wait_fault(&site, "a1", "GPU 3 is cordoned: Xid 79");
    assert_eq!(gpu(&site.admin(1), "a1", 3).unwrap()["remedy"], "restart");
    site.finish(&[WORSE, FAULT]);
}

#[test]
fn where_health_is_only_observed_nothing_follows_from_it() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let server = Server::start(&mut site, "a1", "gpus 1", "mode = \"observe\"\nguards = \"all\"");
    wait_state(&site, "a1", 0, "healthy");
    site.admin(1).deploy_echo("slow", 1, 5, 5);
    site.admin(1).wait_ready("slow", 1);
    server.say("gpu0 xid 79");
    wait_state(&site, "a1", 0, "cordoned: Xid 79");
    assert_eq!(client(&site).post(CHAT, &body(2, false)).unwrap().status, 200);
    assert_eq!(serving(&site).len(), 1);
    assert_eq!(gpu(&site.admin(1), "a1", 0).unwrap()["held"], false);
    site.finish(&[WORSE, FAULT]);
}
