//! The decoder against a reference implementation: small random checkpoints with its logits, its best token at each
//! position, and its greedy continuations, in float32.
//!
//! Each case is computed alone, in chunks, and in a ragged batch with all the others; continuations also through the
//! engine. `IZAR_GOLDEN` names another folder of such checkpoints; families that are not supported are passed over
//! only there.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use izar_agent::engine::executor::Executor;
use izar_agent::engine::{Engine, Lm, State};
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, CausalLm, Error, Loaded, SequenceId, Wants};
use izar_common::chat::{Job, JobEvent, Sampling, Token};
use izar_common::id::{DeploymentId, Hash, TurnId};
use serde::Deserialize;

/// Largest difference of a logit, relative to the largest logit of its row.
const TOLERANCE: f32 = 1e-4;

/// What the engine may take for all continuations of a checkpoint.
const LIMIT: Duration = Duration::from_secs(60);

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

fn load(folder: &std::path::Path) -> Option<Loaded> {
    let source = Source::open(folder).unwrap();
    let config = source.config().unwrap();
    let model = match model::build(&config, &source) {
        Ok(model) => model,
        Err(error @ Error::NoDecoder(_)) if std::env::var_os("IZAR_GOLDEN").is_some() => {
            println!("passed over: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    Some(Loaded { model, context: config.context, vocabulary: config.vocabulary, eos: source.eos().unwrap() })
}

fn argmax(row: &[f32]) -> Token {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as Token
}

fn check_logits(name: &str, got: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(expected).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    assert_eq!(got.len(), expected.len());
    assert!(worst <= TOLERANCE * largest, "{name}: logits differ by {worst}, the largest is {largest}");
}

/// Runs chunks of several sequences in one step and returns each one's rows.
fn step(model: &mut dyn CausalLm, chunks: &[(u64, usize, &[Token])]) -> Vec<Vec<Vec<f32>>> {
    let mut batch = Batch::default();
    chunks.iter().for_each(|(id, start, tokens)| batch.push(SequenceId(*id), *start, tokens, Wants::All));
    let logits = model.forward(&batch);
    let mut rows = logits.rows().map(<[f32]>::to_vec);
    chunks.iter().map(|(_, _, tokens)| rows.by_ref().take(tokens.len()).collect()).collect()
}

fn check_rows(name: &str, case: &Case, rows: &[Vec<f32>]) {
    let best: Vec<Token> = rows.iter().map(|row| argmax(row)).collect();
    assert_eq!(best, case.argmax_per_position, "{name}: best token at each position");
    check_logits(name, rows.last().unwrap(), &case.last_logits);
}

#[test]
fn logits_and_best_tokens_agree_alone() {
    for (folder, golden) in checkpoints() {
        let Some(Loaded { mut model, .. }) = load(&folder) else { continue };
        for (i, case) in golden.cases.iter().enumerate() {
            let name = format!("{} case {i}", folder.display());
            let rows = step(model.as_mut(), &[(i as u64, 0, &case.prompt)]);
            check_rows(&name, case, &rows[0]);
        }
    }
}

#[test]
fn logits_and_best_tokens_agree_in_a_ragged_batch_and_in_chunks() {
    for (folder, golden) in checkpoints() {
        let Some(Loaded { mut model, .. }) = load(&folder) else { continue };
        // Every prompt in two chunks, cut where it hurts: some begin with one token, some end with one.
        let cut = |case: &Case| (case.prompt.len() / 3).max(1);
        let cases: Vec<(u64, &Case)> = (0..).zip(&golden.cases).collect();
        let first: Vec<(u64, usize, &[Token])> = cases.iter().map(|(id, c)| (*id, 0, &c.prompt[..cut(c)])).collect();
        let mut rows = step(model.as_mut(), &first);
        let rest = cases.iter().filter(|(_, c)| c.prompt.len() > cut(c));
        let second: Vec<(u64, usize, &[Token])> = rest.map(|(id, c)| (*id, cut(c), &c.prompt[cut(c)..])).collect();
        for ((id, ..), more) in second.iter().zip(step(model.as_mut(), &second)) {
            rows[*id as usize].extend(more);
        }
        for (id, case) in cases {
            check_rows(&format!("{} case {id}", folder.display()), case, &rows[id as usize]);
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
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            max_tokens: case.greedy.len() as u32,
            ignore_eos: true,
        },
    }
}

/// Runs jobs through an engine until all have ended; returns each one's tokens.
fn answers(folder: PathBuf, max_batch: usize, jobs: Vec<Job>) -> Option<Vec<Vec<Token>>> {
    load(&folder)?;
    let (say, woken) = std::sync::mpsc::sync_channel(16);
    let load = move || Ok(load(&folder).expect("it was loaded before"));
    let wake = move || say.send(()).expect("the test waits");
    let executor = Executor::start(1, load, wake).unwrap();
    let mut engine = Lm::new(executor, max_batch, 0);
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
    Some(tokens)
}

#[test]
fn greedy_continuations_agree_alone_and_in_a_batch() {
    for (folder, golden) in checkpoints() {
        for max_batch in [1, 3, 8] {
            let jobs = golden.cases.iter().map(|case| job(case, 0)).collect();
            let Some(answers) = answers(folder.clone(), max_batch, jobs) else { continue };
            for (case, answer) in golden.cases.iter().zip(answers) {
                assert_eq!(answer, case.greedy, "{} in batches of {max_batch}", folder.display());
            }
        }
    }
}

#[test]
fn a_continued_answer_goes_on_where_it_was() {
    for (folder, golden) in checkpoints() {
        let jobs = golden.cases.iter().enumerate().map(|(i, case)| job(case, 5 + i)).collect();
        let Some(answers) = answers(folder.clone(), 4, jobs) else { continue };
        for (i, (case, answer)) in golden.cases.iter().zip(answers).enumerate() {
            assert_eq!(answer, case.greedy[5 + i..], "{} case {i}", folder.display());
        }
    }
}
