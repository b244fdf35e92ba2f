//! A card that is throttled makes no error. A worker that is a twentieth as fast as its peer is noticed by comparison: its
//! streams go on with the peer to the token, and it gets no more jobs for a while.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::ensure;
use izar_tests::nodes::Site;
use izar_tests::waiting::{SOON, until, until_true};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const STREAMS: usize = 6;

fn body(stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "Count with me." }]);
    json!({ "model": "slow", "messages": messages, "max_tokens": 40, "stream": stream })
}

/// Requests that run on an agent.
fn running(site: &Site, agent: &str) -> usize {
    let requests = site.admin(1).json(&["requests", "list"]).unwrap();
    requests["requests"].as_array().into_iter().flatten().filter(|request| request["agent"] == agent).count()
}

#[test]
fn a_worker_far_slower_than_its_peer_is_taken_out_though_nothing_tells_of_an_error() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    // A fortieth of the other's speed.
    site.write_agent("a1");
    site.start_with("izar-agent", "a1", "IZAR_ECHO_SLOWDOWN", "40");
    site.start_agent("a2");
    let admin = site.admin(1);
    admin.deploy_echo("slow", 2, 5, 20);
    admin.wait_ready("slow", 2);
    let key = admin.create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));
    let (over, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let texts: Vec<String> = std::thread::scope(|scope| {
        let ask = || {
            let mut texts = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let transcript = client.stream(CHAT, &body(true)).unwrap().transcript().unwrap();
                assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
                texts.push(transcript.text);
                answers.fetch_add(1, Ordering::Relaxed);
            }
            texts
        };
        let asking: Vec<_> = (0..STREAMS).map(|_| scope.spawn(ask)).collect();
        let end = End(&over);
        until_true("streams on the slow server", SOON, || running(&site, "a1") > 0);
        until("the slow worker to be noticed", 2 * SOON, || {
            let agents = admin.json(&["agents", "list"])?;
            let worker = &agents["agents"][0]["workers"][0];
            ensure!(worker["detail"].as_str().is_some_and(|why| why.starts_with("slow: ")), "{agents}");
            Ok(())
        });
        until_true("its streams to have gone on elsewhere", SOON, || running(&site, "a1") == 0);
        let before = answers.load(Ordering::Relaxed);
        until("the others to answer all", SOON, || {
            assert_eq!(running(&site, "a1"), 0, "nothing is begun there while the other has room");
            ensure!(answers.load(Ordering::Relaxed) > before + 2 * STREAMS, "not yet");
            Ok(())
        });
        drop(end);
        asking.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let expected = client.post(CHAT, &body(false)).unwrap().content();
    assert!(texts.iter().all(|text| *text == expected), "every answer is as if nothing had happened");
    let page = client.get("/metrics").unwrap().text();
    assert!(page.lines().any(|line| line.starts_with("izar_worker_slow") && line.ends_with(" 1")), "{page}");
    site.finish(&["a worker is far slower than its peers"]);
}

/// Ends the streams, also when a step of the story fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
