//! Workers on one end of a socket pair, the agent's part played on the other.

use std::time::Duration;

use super::*;
use crate::engine::sequence::tests::job;
use izar_common::chat::{Finish, Grammar, JobEvent, Token, Usage};
use izar_common::id::Hash;
use izar_common::manifest;
use izar_common::prefix::Namer;
use izar_common::wire::agent::{CacheType, Device, Quant};

/// What a test waits for anything at most.
const LIMIT: Duration = Duration::from_secs(20);

/// The agent's end of a worker that runs on a thread.
struct Agent {
    stream: UnixStream,
    buffer: BytesMut,
    worker: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    fn start() -> Self {
        let (stream, worker) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self { stream, buffer: BytesMut::new(), worker: std::thread::spawn(move || run(worker)) }
    }
    /// A worker that runs echo and is ready.
    fn echo(first_token_us: u64, next_token_us: u64) -> Self {
        let mut agent = Self::start();
        let manifest = manifest(Kind::Echo { first_token_us, next_token_us }, "echo", &[]);
        agent.send(&ToWorker::Load {
            manifest,
            files: Vec::new(),
            text: None,
            engine: EngineOptions::default(),
            cpus: Vec::new(),
        });
        assert!(matches!(agent.next(), FromWorker::Ready { .. }));
        agent
    }
    fn send(&mut self, message: &ToWorker) {
        self.stream.write_all(&wire::to_bytes(message)).unwrap();
    }
    fn submit(&mut self, id: u64, prompt: &[Token], max_tokens: u32) {
        self.send(&ToWorker::Submit { id, job: job(prompt, &[], max_tokens) });
    }
    fn next(&mut self) -> FromWorker {
        loop {
            if let Ok((frame, length)) = wire::decode(&self.buffer) {
                self.buffer.advance(length);
                return frame;
            }
            let mut chunk = [0; 4096];
            let bytes = self.stream.read(&mut chunk).expect("a frame within the limit");
            assert!(bytes > 0, "the worker closed");
            self.buffer.extend_from_slice(&chunk[..bytes]);
        }
    }
    /// All events of a job up to its end.
    fn answer(&mut self, id: u64) -> Vec<JobEvent> {
        let mut all = Vec::new();
        loop {
            let events = match self.next() {
                FromWorker::Step { events, .. } => events,
                FromWorker::Sketch(_) => continue,
                other => panic!("not a step: {other:?}"),
            };
            all.extend(events.into_iter().filter(|(n, _)| *n == id).map(|(_, e)| e));
            if matches!(all.last(), Some(JobEvent::Done { .. } | JobEvent::Failed { .. })) {
                return all;
            }
        }
    }
    /// Closes the agent's end and returns how the worker took it.
    fn leave(self) -> anyhow::Result<()> {
        drop(self.stream);
        self.worker.join().unwrap()
    }
}

fn manifest(kind: Kind, architecture: &str, files: &[&str]) -> Manifest {
    let file = |name: &str| manifest::File { name: name.into(), hash: Hash([0; 32]), bytes: 0 };
    Manifest {
        name: "m".into(),
        kind,
        files: files.iter().map(|name| file(name)).collect(),
        text: file("text"),
        context: 512,
        vocabulary: 512,
        architecture: architecture.into(),
    }
}

/// Loads `golden/llama`.
fn load_llama() -> ToWorker {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama"));
    let names = ["config.json", "generation_config.json", "model.safetensors"];
    ToWorker::Load {
        manifest: manifest(Kind::Safetensors, "llama", &names),
        files: names.iter().map(|name| folder.join(name)).collect(),
        text: None,
        // As the golden answers were computed.
        engine: EngineOptions {
            max_batch: 2,
            threads: 1,
            quant: Quant::F32,
            cache: CacheType::F32,
            ..EngineOptions::default()
        },
        cpus: Vec::new(),
    }
}

#[test]
fn a_job_is_answered_token_by_token_and_ends() {
    let mut agent = Agent::echo(0, 0);
    agent.submit(7, &[1, 2], 3);
    let events = agent.answer(7);
    for (at, event) in (0..).zip(&events[..3]) {
        assert!(matches!(event, JobEvent::Tokens { position, tokens, .. } if *position == at && tokens.len() == 1));
    }
    let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 3 };
    assert_eq!(events[3], JobEvent::Done { finish: Finish::Length, usage });
    agent.leave().unwrap();
}

#[test]
fn many_jobs_run_at_once_and_every_one_ends() {
    let mut agent = Agent::echo(2000, 100);
    (0..500).for_each(|id| agent.submit(id, &[id as Token % 250], 5));
    let (mut tokens, mut ends) = (0, 0);
    while ends < 500 {
        let FromWorker::Step { events, .. } = agent.next() else { panic!("not a step") };
        tokens += events.iter().filter(|(_, e)| matches!(e, JobEvent::Tokens { .. })).count();
        ends += events.iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).count();
    }
    assert_eq!(tokens, 2500);
    agent.leave().unwrap();
}

#[test]
fn a_cancelled_job_falls_silent_and_the_load_says_so() {
    let mut agent = Agent::echo(0, 1_000_000);
    agent.submit(1, &[1], 100);
    assert!(matches!(agent.next(), FromWorker::Step { load: Load { running: 1, .. }, .. }));
    agent.send(&ToWorker::Cancel { id: 1 });
    assert_eq!(agent.next(), FromWorker::Step { events: Vec::new(), load: Load::default() });
    agent.leave().unwrap();
}

#[test]
fn an_agent_that_goes_ends_the_worker_whatever_it_does() {
    Agent::start().leave().unwrap();
    let mut agent = Agent::echo(0, 1_000_000);
    agent.submit(1, &[1], 100);
    agent.leave().unwrap();
    let mut agent = Agent::start();
    agent.send(&load_llama());
    agent.leave().unwrap();
}

#[test]
fn a_stream_that_is_not_of_frames_ends_the_worker_with_an_error() {
    let mut agent = Agent::start();
    agent.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(agent.leave().is_err());
    let mut agent = Agent::start();
    agent.submit(1, &[1], 1);
    assert_eq!(agent.leave().unwrap_err().to_string(), "the first frame is not a load");
}

#[test]
fn a_model_that_cannot_be_loaded_is_said_so_and_the_worker_ends() {
    let mut agent = Agent::start();
    let manifest = manifest(Kind::Gguf, "llama", &["gone.gguf"]);
    let engine = EngineOptions::default();
    agent.send(&ToWorker::Load { manifest, files: vec!["/nonexistent".into()], text: None, engine, cpus: Vec::new() });
    let FromWorker::Unloadable { reason } = agent.next() else { panic!("it was loaded") };
    assert!(reason.contains("gone.gguf"), "{reason}");
    agent.worker.join().unwrap().unwrap();
}

#[test]
fn a_card_that_cannot_be_used_is_refused_before_anything_is_read() {
    let mut agent = Agent::start();
    let mut load = load_llama();
    let ToWorker::Load { files, engine, .. } = &mut load else { unreachable!() };
    // No machine has that many cards.
    (engine.device, files[2]) = (Device::Cuda(999), "/nonexistent".into());
    agent.send(&load);
    let FromWorker::Unloadable { reason } = agent.next() else { panic!("it was loaded") };
    assert!(reason.starts_with("device cuda:999: "), "{reason}");
    agent.worker.join().unwrap().unwrap();
}

#[test]
fn a_reason_of_any_length_fits_its_frame() {
    let mut agent = Agent::start();
    let name = "x".repeat(5 << 20);
    let manifest = manifest(Kind::Gguf, "llama", &[&name]);
    let (files, text, engine) = (vec!["/nonexistent".into()], None, EngineOptions::default());
    agent.send(&ToWorker::Load { manifest, files, text, engine, cpus: Vec::new() });
    let FromWorker::Unloadable { reason } = agent.next() else { panic!("it was loaded") };
    assert_eq!(reason.len(), REASON);
    agent.worker.join().unwrap().unwrap();
}

#[test]
fn a_structured_answer_comes_over_the_socket_and_ends_where_its_grammar_does() {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama"));
    let bundle = izar_common::text::Bundle::from_folder(&folder).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.json");
    let mut load = load_llama();
    let ToWorker::Load { text, .. } = &mut load else { unreachable!() };
    *text = Some(path.clone());
    std::fs::write(&path, serde_json::to_vec(&bundle).unwrap()).unwrap();
    let mut agent = Agent::start();
    agent.send(&load);
    assert!(matches!(agent.next(), FromWorker::Ready { .. }));
    let mut structured = job(&[413], &[], 40);
    structured.sampling.temperature = 1.0;
    structured.sampling.grammar = Some(Grammar::Regex("(yes|no), [a-c]{3}".into()));
    agent.send(&ToWorker::Submit { id: 1, job: structured });
    let events = agent.answer(1);
    let mut decoder = std::sync::Arc::new(izar_common::text::Text::new(&bundle).unwrap()).decoder();
    let mut answer = String::new();
    for event in &events {
        if let JobEvent::Tokens { tokens, .. } = event {
            tokens.iter().for_each(|token| decoder.push_to(*token, &mut answer));
        }
    }
    let (word, letters) = answer.split_once(", ").unwrap_or_else(|| panic!("{answer:?}"));
    assert!(["yes", "no"].contains(&word) && letters.len() == 3, "{answer:?}");
    assert!(letters.bytes().all(|b| (b'a'..=b'c').contains(&b)), "{answer:?}");
    assert!(matches!(events.last(), Some(JobEvent::Done { finish: Finish::Stop, .. })), "{events:?}");
    agent.leave().unwrap();
}

#[test]
fn the_end_tokens_of_the_text_bundle_count_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.json");
    // The second token of the answer of golden/llama's first case.
    let bundle = izar_common::text::Bundle { eos: vec![377], ..izar_common::text::Bundle::echo() };
    std::fs::write(&path, serde_json::to_vec(&bundle).unwrap()).unwrap();
    let load = |path: &Path| {
        let mut load = load_llama();
        let ToWorker::Load { text, .. } = &mut load else { unreachable!() };
        *text = Some(path.to_owned());
        load
    };
    let mut agent = Agent::start();
    agent.send(&load(&path));
    assert!(matches!(agent.next(), FromWorker::Ready { .. }));
    agent.submit(1, &[413], 4);
    let usage = Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: 1 };
    assert_eq!(agent.answer(1).last(), Some(&JobEvent::Done { finish: Finish::Stop, usage }));
    agent.leave().unwrap();
    let mut agent = Agent::start();
    agent.send(&load(&dir.path().join("gone.json")));
    let FromWorker::Unloadable { reason } = agent.next() else { panic!("it was loaded") };
    assert!(reason.contains("gone.json"), "{reason}");
}

#[test]
fn a_real_model_answers_over_the_socket_and_refuses_what_is_impossible() {
    let mut agent = Agent::start();
    agent.send(&load_llama());
    assert!(matches!(agent.next(), FromWorker::Ready { .. }));
    agent.submit(1, &[413], 4);
    // From golden/llama, the first case.
    let tokens: Vec<Token> = agent
        .answer(1)
        .into_iter()
        .flat_map(|e| if let JobEvent::Tokens { tokens, .. } = e { tokens } else { Vec::new() })
        .collect();
    assert_eq!(tokens, [352, 377, 498, 28]);
    agent.submit(2, &[600], 4);
    assert!(matches!(&agent.answer(2)[..], [JobEvent::Failed { retryable: false, .. }]));
    agent.leave().unwrap();
}

#[test]
fn what_the_cache_holds_is_told_when_it_changes() {
    let mut agent = Agent::start();
    agent.send(&load_llama());
    assert!(matches!(agent.next(), FromWorker::Ready { .. }));
    let prompt: Vec<Token> = (10..50).collect();
    let names = Namer::new([0; 16]).names(&prompt, usize::MAX);
    let mut held_after = |id, prompt: &[Token]| {
        agent.submit(id, prompt, 1);
        loop {
            if let FromWorker::Sketch(sketch) = agent.next() {
                return sketch;
            }
        }
    };
    assert_eq!(held_after(1, &prompt).prefix(&names), 2);
    let longer: Vec<Token> = (10..70).collect();
    assert_eq!(held_after(2, &longer).prefix(&Namer::new([0; 16]).names(&longer, usize::MAX)), 3);
    agent.leave().unwrap();
}

#[test]
fn files_that_are_another_model_than_the_manifest_says_are_refused() {
    let check = |change: fn(&mut Manifest), words: &str| {
        let mut load = load_llama();
        let ToWorker::Load { manifest, .. } = &mut load else { unreachable!() };
        change(manifest);
        let mut agent = Agent::start();
        agent.send(&load);
        let FromWorker::Unloadable { reason } = agent.next() else { panic!("it was loaded") };
        assert!(reason.contains(words), "{reason}");
    };
    check(|m| m.architecture = "qwen2".into(), "says architecture qwen2, its files say llama");
    check(|m| m.vocabulary = 513, "says vocabulary 513, its files say 512");
}
