//! The decoder against a reference implementation: small random checkpoints of eight families with its logits, its best
//! token at each position, and its greedy continuations, in float32.
//!
//! Each case is computed alone, in chunks, and in a ragged batch with all the others, by our kernels and by Burn's own
//! operations; continuations also through the engine. `IZAR_GOLDEN` names another folder of such checkpoints, `IZAR_DEVICE`
//! a device that computes the reference operations instead, as in `cuda:0`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use izar_agent::engine::executor::Executor;
use izar_agent::engine::sampler::Grammars;
use izar_agent::engine::{Engine, Lm, State};
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, CausalLm, Loaded, Options, Wants};
use izar_agent::ops::cpu::isa::Isa;
use izar_agent::ops::cpu::pool::Threads;
use izar_agent::ops::{self, CacheFormat, Format};
use izar_common::chat::{Class, Job, JobEvent, Sampling, Token};
use izar_common::id::{DeploymentId, Hash, TurnId};
use izar_common::wire::agent::Device;
use serde::Deserialize;

/// Largest difference of a logit, relative to the largest logit of its row.
const TOLERANCE: f32 = 1e-4;

/// What the engine may take for all continuations of a checkpoint.
const LIMIT: Duration = Duration::from_secs(60);

/// Blocks that a sequence of these tests gets.
const BLOCKS: u32 = 12;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<Token>,
    last_logits: Vec<f32>,
    argmax_per_position: Vec<Token>,
    greedy: Vec<Token>,
}

/// Every checkpoint that there is: its folder and what the reference says.
fn checkpoints() -> Vec<(PathBuf, Golden)> {
    let given = std::env::var_os("IZAR_GOLDEN").map(PathBuf::from);
    let root = given.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden").into());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&root).expect("the folder of checkpoints") {
        let folder = entry.unwrap().path();
        let Ok(text) = std::fs::read(folder.join("golden.json")) else { continue };
        found.push((folder, serde_json::from_slice(&text).expect("a golden.json")));
    }
    assert!(!found.is_empty(), "no checkpoint in {}", root.display());
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found
}

/// What computes: `IZAR_DEVICE`, as in `cuda:0`, or the CPU.
fn device() -> Device {
    std::env::var("IZAR_DEVICE").map_or(Device::Cpu, |word| word.parse().expect("IZAR_DEVICE names a device"))
}

/// Everything in f32, on a path.
fn exact(path: ops::Path) -> Options {
    Options {
        device: device(),
        format: Format::F32,
        cache: CacheFormat::F32,
        path,
        cache_bytes: 64 << 20,
        ..Options::default()
    }
}

fn paths() -> Vec<ops::Path> {
    if device() != Device::Cpu {
        return vec![ops::Path::Reference];
    }
    let kernels = Isa::ALL.into_iter().filter(|isa| isa.available()).map(ops::Path::Kernels);
    kernels.chain([ops::Path::Reference]).collect()
}

fn load(folder: &Path, options: &Options) -> Loaded {
    let source = Source::open(folder).unwrap();
    model::build(&source.config().unwrap(), &source, options).unwrap()
}

fn argmax(row: &[f32]) -> Token {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as Token
}

/// How far logits are from others, relative to the largest.
fn distance(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    got.iter().zip(expected).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

/// Runs chunks of several sequences in one step and returns each one's rows.
fn step(model: &mut dyn CausalLm, chunks: &[(u64, usize, &[Token])]) -> Vec<Vec<Vec<f32>>> {
    let mut batch = Batch::default();
    for (id, start, tokens) in chunks {
        // Blocks of different sequences lie mixed, and none in order.
        let blocks: Vec<u32> = (0..BLOCKS).rev().map(|i| i * 8 + *id as u32).collect();
        batch.push(*start, tokens, Wants::All, &blocks);
    }
    let logits = model.forward(&batch);
    let mut rows = logits.rows().map(<[f32]>::to_vec);
    chunks.iter().map(|(_, _, tokens)| rows.by_ref().take(tokens.len()).collect()).collect()
}

fn check_rows(name: &str, case: &Case, rows: &[Vec<f32>]) {
    let best: Vec<Token> = rows.iter().map(|row| argmax(row)).collect();
    assert_eq!(best, case.argmax_per_position, "{name}: best token at each position");
    let off = distance(rows.last().unwrap(), &case.last_logits);
    assert!(off <= TOLERANCE, "{name}: logits differ by {off} of the largest");
}

/// Checks every case of every checkpoint on every path.
fn each_model(check: impl Fn(&str, &mut dyn CausalLm, &[Case])) {
    for (folder, golden) in checkpoints() {
        for path in paths() {
            let mut loaded = load(&folder, &exact(path));
            check(&format!("{} {path:?}", folder.display()), loaded.model.as_mut(), &golden.cases);
        }
    }
}

#[test]
fn logits_and_best_tokens_agree_alone() {
    each_model(|name, model, cases| {
        for (i, case) in cases.iter().enumerate() {
            let rows = step(model, &[(i as u64, 0, &case.prompt)]);
            check_rows(&format!("{name} case {i}"), case, &rows[0]);
        }
    });
}

#[test]
fn logits_and_best_tokens_agree_in_a_ragged_batch_and_in_chunks() {
    each_model(|name, model, cases| {
        // Every prompt in two chunks, cut where it hurts: some begin with one token, some end with one.
        let cut = |case: &Case| (case.prompt.len() / 3).max(1);
        let cases: Vec<(u64, &Case)> = (0..).zip(cases).collect();
        let first: Vec<(u64, usize, &[Token])> = cases.iter().map(|(id, c)| (*id, 0, &c.prompt[..cut(c)])).collect();
        let mut rows = step(model, &first);
        let rest = cases.iter().filter(|(_, c)| c.prompt.len() > cut(c));
        let second: Vec<(u64, usize, &[Token])> = rest.map(|(id, c)| (*id, cut(c), &c.prompt[cut(c)..])).collect();
        for ((id, ..), more) in second.iter().zip(step(model, &second)) {
            rows[*id as usize].extend(more);
        }
        for (id, case) in cases {
            check_rows(&format!("{name} case {id}"), case, &rows[id as usize]);
        }
    });
}

/// Random weights have no structure, and small models amplify every error: the bounds are wide, and int4 is held against
/// Burn's operations on the same int4 weights, where no expert is chosen: another choice is another answer.
#[test]
fn quantized_forms_stay_within_their_bounds() {
    if device() != Device::Cpu {
        eprintln!("skipped: a card computes the reference operations, in f32");
        return;
    }
    for (folder, golden) in checkpoints() {
        let last = |options: &Options, case: &Case| {
            let mut loaded = load(&folder, options);
            step(loaded.model.as_mut(), &[(0, 0, &case.prompt)]).remove(0).pop().unwrap()
        };
        let kernels = |format, cache| Options { format, cache, ..exact(ops::Path::Kernels(Isa::best())) };
        for case in &golden.cases {
            let name = folder.display();
            for (format, bound) in [(Format::F32, 5e-3), (Format::F16, 5e-3), (Format::Int8, 0.4)] {
                let off = distance(&last(&kernels(format, CacheFormat::F16), case), &case.last_logits);
                assert!(off < bound, "{name} {format:?}: {off}");
            }
            let config = Source::open(&folder).unwrap().config().unwrap();
            if (0..config.layers).any(|layer| config.experts(layer).is_some()) {
                continue;
            }
            let int4 = Options { format: Format::Int4, ..exact(ops::Path::Reference) };
            let off = distance(&last(&kernels(Format::Int4, CacheFormat::F32), case), &last(&int4, case));
            assert!(off < 0.4, "{name} int4: {off}");
        }
    }
}

fn job(case: &Case, delivered: usize) -> Job {
    Job {
        turn: TurnId(1),
        choice: 0,
        attempt: 0,
        deployment: DeploymentId::new("golden").unwrap(),
        revision: Hash([0; 32]),
        prompt: case.prompt.clone(),
        delivered: case.greedy[..delivered].to_vec(),
        sampling: Sampling {
            temperature: 0.0,
            max_tokens: case.greedy.len() as u32,
            ignore_eos: true,
            ..Sampling::default()
        },
        cache_salt: [0; 16],
        numerics: None,
        class: Class::default(),
        capsule: Vec::new(),
    }
}

/// Runs jobs through an engine until all have ended; returns each one's tokens.
fn answers(folder: PathBuf, max_batch: usize, jobs: Vec<Job>) -> Vec<Vec<Token>> {
    let (say, woken) = std::sync::mpsc::sync_channel(16);
    let load = move || Ok(load(&folder, &exact(ops::Path::Kernels(Isa::best()))));
    let wake = move || say.send(()).expect("the test waits");
    let executor = Executor::start(Threads::any(1), load, wake).unwrap();
    let mut engine = Lm::new(executor, Grammars::new(None), max_batch);
    let until = Instant::now() + LIMIT;
    let wait = |engine: &mut Lm| {
        woken.recv_timeout(until.saturating_duration_since(Instant::now())).expect("an outcome in time");
        engine.poll(Instant::now())
    };
    while *engine.state() == State::Loading {
        wait(&mut engine);
    }
    assert_eq!(*engine.state(), State::Ready);
    let mut tokens = vec![Vec::new(); jobs.len()];
    let mut left = jobs.len();
    (0..).zip(jobs).for_each(|(number, job)| engine.submit(Instant::now(), number, job));
    let mut events = engine.poll(Instant::now());
    while left > 0 {
        for (number, event) in events {
            match event {
                JobEvent::Tokens { tokens: more, .. } => tokens[number as usize].extend(more),
                JobEvent::Done { .. } => left -= 1,
                JobEvent::Failed { reason, .. } => panic!("job {number} failed: {reason}"),
            }
        }
        events = if left > 0 { wait(&mut engine) } else { Vec::new() };
    }
    tokens
}

#[test]
fn greedy_continuations_agree_alone_and_in_a_batch() {
    for (folder, golden) in checkpoints() {
        for max_batch in [1, 3, 8] {
            // Twice the same: the second one shares what the first one has computed.
            let twice = golden.cases.iter().chain(&golden.cases);
            let jobs = twice.clone().map(|case| job(case, 0)).collect();
            for (case, answer) in twice.zip(answers(folder.clone(), max_batch, jobs)) {
                assert_eq!(answer, case.greedy, "{} in batches of {max_batch}", folder.display());
            }
        }
    }
}

#[test]
fn a_continued_answer_goes_on_where_it_was() {
    for (folder, golden) in checkpoints() {
        let jobs = golden.cases.iter().enumerate().map(|(i, case)| job(case, 5 + i)).collect();
        let answers = answers(folder.clone(), 4, jobs);
        for (i, (case, answer)) in golden.cases.iter().zip(answers).enumerate() {
            assert_eq!(answer, case.greedy[5 + i..], "{} case {i}", folder.display());
        }
    }
}
