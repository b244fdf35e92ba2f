//! GPUs fall off the bus, hang, are missing, make errors: what runs on them goes on elsewhere to the bit, `izar gpus` says
//! what is wrong and what would mend it, and a GPU that was put away comes back only by an operator's word or by having
//! been mended. The agents are the real ones; the library below them plays.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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

/// When an Xid 45 has been alone.
const ALONE: Duration = Duration::from_secs(6);

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
    let _machine = izar_tests::shared();
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
    wait_fault(&site, "a1", "GPU 1 is quarantined");
    admin.json(&["gpus", "release", "a1", "1", "--reason", "another card"]).unwrap();
    wait_state(&site, "a1", 1, "probation");
    let none = admin.run(&["gpus", "release", "a1", "0", "--reason", "no reason"]);
    assert!(!none.success && none.stderr.contains("nothing is held against GPU gpu-a1-0"), "{}", none.stderr);
    site.finish(&[WORSE, FAULT, FENCED, "an operator released a GPU"]);
}

#[test]
fn a_library_that_hangs_puts_its_server_away_until_it_answers() {
    let _machine = izar_tests::shared();
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
    let _machine = izar_tests::shared();
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
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    site.write_agent("a1");
    let text = std::fs::read_to_string(site.config("a1")).unwrap();
    std::fs::write(site.config("a1"), text + "\n[gpu]\nnvml = \"nowhere.so\"\nkernel_log = \"/dev/null\"\n").unwrap();
    site.start("izar-agent", "a1");
    wait_fault(&site, "a1", "nowhere.so cannot be loaded");
    // One that cannot say which GPUs there are is none of a server without GPUs.
    let _other = Server::start_without(&mut site, "a2", "gpus 2", "", &["nvmlDeviceGetUUID"]);
    wait_fault(&site, "a2", "is of another version");
    site.finish(&[FAULT]);
}

#[test]
fn errors_of_programs_fence_nothing_and_those_of_the_gpu_do() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    // A driver that has no functions for fields, throttling and events is an old one, not a sick GPU.
    let missing = [
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetSupportedEventTypes",
        "nvmlEventSetWait_v2",
    ];
    let mut old = Server::start_without(&mut site, "a1", "gpus 2", ALL, &missing);
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

/// An error of a GPU that must not be used any more: what happens, what is seen, and what makes its readings well again.
const FENCING: [(&str, &str, &str); 9] = [
    ("gpu1 xid 48", "cordoned: Xid 48", ""),
    ("gpu1 uncorrected 1\ngpu1 double_bit", "cordoned: 1 memory errors", ""),
    ("gpu1 field 145 1\ngpu1 xid 64", "cordoned", "gpu1 field 145 0"),
    // A line for each link: one incident.
    ("gpu1 xid 74\ngpu1 xid 74\ngpu1 xid 74", "cordoned: Xid 74", ""),
    ("gpu1 xid 95", "cordoned: Xid 95", ""),
    ("gpu1 xid 119", "cordoned: Xid 119", ""),
    ("gpu1 field 230 1\ngpu1 xid 154", "cordoned: the driver asks for a reset", "gpu1 field 230 0"),
    ("gpu1 lost\nwait lost", "cordoned: it cannot be reached", "gpu1 found\nwait well"),
    ("gpu2 xid 62", "cordoned: Xid 62", ""),
];

#[test]
fn every_fault_fences_within_a_second_while_streams_run_and_no_client_notices() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    // Of the first server's GPUs one knows of no double-bit errors, one of no events at all, and one was lost before
    // anybody asked: the others' events are none the worse for it.
    let first = "gpus 5\ngpu2 events 8\ngpu3 events 0\ngpu4 lost";
    let mut first = Server::start(&mut site, "a1", first, ALL);
    let _second = Server::start(&mut site, "a2", "gpus 1", ALL);
    wait_state(&site, "a1", 3, "healthy");
    wait_state(&site, "a2", 0, "healthy");
    let admin = site.admin(1);
    admin.deploy_echo("slow", 2, 5, 20);
    admin.wait_ready("slow", 2);
    let client = client(&site);
    let expected = client.post(CHAT, &body(TOKENS, false)).unwrap().content();
    let (over, streams) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..STREAMS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let transcript = client.stream(CHAT, &body(TOKENS, true)).unwrap().transcript().unwrap();
                    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
                    assert_eq!(transcript.text, expected, "as if nothing had happened");
                    streams.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Dropped when a step below fails, so that the streams end then as well.
        let _end = End(&over);
        what_fences_nothing(&site, &first);
        for (what, state, well) in FENCING {
            fences(&site, &first, what, state);
            if !well.is_empty() {
                first.say(well);
            }
            let index = u64::from(what.starts_with("gpu2")) + 1;
            let _ = admin.run(&["gpus", "release", "a1", &index.to_string(), "--reason", "looked at"]);
            wait_state(&site, "a1", index, "probation");
        }
        // While the library hangs in its wait, the kernel's log tells.
        first.say("hang wait 60s");
        wait_streams(&site);
        let told = Instant::now();
        first.log("NVRM: Xid (PCI:0000:11:00): 46, pid=7, name=python, GPU stopped processing");
        is_fenced(&site, 1, "cordoned: Xid 46", told);
    });
    println!("{} streams", streams.load(Ordering::Relaxed));
    site.finish(&[WORSE, FAULT, FENCED, "an operator released a GPU", "a GPU tells of no events"]);
}

/// Ends the streams of a story.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until streams run on the first server.
fn wait_streams(site: &Site) {
    until("streams on the first server", SOON, || {
        let requests = site.admin(1).json(&["requests", "list"])?;
        let mut running = requests["requests"].as_array().into_iter().flatten();
        ensure!(running.any(|r| r["agent"] == "a1" && r["tokens"] != 0), "{requests}");
        Ok(())
    });
}

fn fences(site: &Site, server: &Server, what: &str, state: &str) {
    wait_streams(site);
    let told = Instant::now();
    server.say(what);
    is_fenced(site, u64::from(what.starts_with("gpu2")) + 1, state, told);
    until("it to be held", SOON, || {
        let index = u64::from(what.starts_with("gpu2")) + 1;
        ensure!(gpu(&site.admin(1), "a1", index)?["held"] == true, "not yet");
        Ok(())
    });
}

/// Waits until a GPU of the first server is in a state and nobody serves there, and says how long that took.
fn is_fenced(site: &Site, index: u64, expected: &str, told: Instant) {
    until(expected, SOON, || {
        let state = state(site, "a1", index);
        ensure!(state.starts_with(expected), "GPU {index} is {state}");
        ensure!(serving(site).iter().all(|worker| worker.ends_with("on a2")), "{:?}", serving(site));
        Ok(())
    });
    let took = told.elapsed();
    println!("{expected}: fenced and seen after {} ms", took.as_millis());
    assert!(took < FENCE, "{expected}: {took:?}");
}

/// Errors of programs, and what is only noted.
fn what_fences_nothing(site: &Site, server: &Server) {
    let begun = Instant::now();
    for (line, index, xids, state) in [
        // Alone, 45 is an error of a program; that is known when nothing has come beside it.
        ("gpu0 xid 45", 0, 1, "healthy"),
        ("gpu2 xid 92", 2, 1, "healthy"),
        ("gpu1 field 144 1\ngpu1 xid 63", 1, 1, "degraded: a bad row of its memory"),
        ("gpu2 xid 13\ngpu2 xid 13\ngpu2 xid 31\ngpu2 xid 13", 2, 3, "healthy"),
    ] {
        server.say(line);
        until(line, SOON, || {
            let gpu = gpu(&site.admin(1), "a1", index)?;
            let now = self::state(site, "a1", index);
            ensure!(gpu["xids"] == xids && now.starts_with(state), "{gpu}");
            Ok(())
        });
    }
    // Two more after the seconds in which another Xid would have explained it.
    until("the lone 45 to be an error of a program", SOON, || {
        if gpu(&site.admin(1), "a1", 0)?["xids"] == 1 && begun.elapsed() > ALONE {
            server.say("gpu0 xid 94\ngpu0 xid 31");
        }
        let state = self::state(site, "a1", 0);
        ensure!(state.starts_with("degraded: 3 errors of programs"), "{state}");
        Ok(())
    });
    let burst = gpu(&site.admin(1), "a1", 2).unwrap();
    assert!(burst["xids"] == 3 && burst["state"] == "healthy", "a line for each processor is one error: {burst}");
    server.say("gpu1 field 144 0");
    assert_eq!(serving(site).len(), 2, "{:?}", serving(site));
}

#[test]
fn what_is_held_against_a_gpu_outlives_its_agent() {
    let _machine = izar_tests::shared();
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
    until("what mends it to be said", SOON, || {
        let gpu = gpu(&site.admin(1), "a1", 3)?;
        ensure!(gpu["remedy"] == "restart", "{gpu}");
        Ok(())
    });
    site.finish(&[WORSE, FAULT]);
}

#[test]
fn where_health_is_only_observed_nothing_follows_from_it() {
    let _machine = izar_tests::shared();
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
