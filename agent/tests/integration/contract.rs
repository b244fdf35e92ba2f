//! The numerics contract: what a sequence gives depends on its own tokens alone. The same bits come out whatever else is in
//! the batch, in any class, however a prompt is cut, after a prefix was shared, after blocks ran out and everything was computed
//! again, and when an answer goes on from its delivered tokens.
//!
//! Random, with seeds in the messages; for every decoder of `tests/golden` and every kernel set of this processor.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use izar_agent::engine::executor::Executor;
use izar_agent::engine::sampler::Grammars;
use izar_agent::engine::{Engine, Events, Lm, State};
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, CausalLm, Options, Wants};
use izar_agent::ops::cpu::isa::Isa;
use izar_agent::ops::cpu::pool::Threads;
use izar_agent::ops::{self, Format, TOKENS};
use izar_common::chat::{Class, Job, JobEvent, Sampling, Token};
use izar_common::id::{DeploymentId, Hash, TurnId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What the engine may take until its next outcome.
const LIMIT: Duration = Duration::from_secs(60);

/// Tokens of the checkpoints' vocabulary.
const VOCABULARY: Token = 512;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden"));
    let entries = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|folder| folder.join("golden.json").exists()).collect();
    folders.sort();
    assert_eq!(folders.len(), 8);
    folders
}

fn kernels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

fn options(isa: Isa, format: Format) -> Options {
    Options { format, path: ops::Path::Kernels(isa), cache_bytes: 16 << 20, ..Options::default() }
}

fn build(folder: &Path, options: &Options) -> model::Loaded {
    let source = Source::open(folder).unwrap();
    model::build(&source.config().unwrap(), &source, options).unwrap()
}

fn tokens(rng: &mut StdRng, count: usize) -> Vec<Token> {
    (0..count).map(|_| rng.random_range(3..VOCABULARY)).collect()
}

fn bits(rows: impl Iterator<Item = impl AsRef<[f32]>>) -> Vec<Vec<u32>> {
    rows.map(|row| row.as_ref().iter().map(|x| x.to_bits()).collect()).collect()
}

/// Logits of every position, computed alone and at once.
fn alone(model: &mut dyn CausalLm, tokens: &[Token]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(TOKENS) as u32).collect();
    let mut batch = Batch { cleared: blocks.clone(), ..Batch::default() };
    batch.push(0, tokens, Wants::All, &blocks);
    bits(model.forward(&batch).rows())
}

#[test]
fn logits_are_the_same_bits_in_any_company_and_any_cut() {
    for folder in folders() {
        for format in [Format::Int4, Format::Int8, Format::F16] {
            let mut expected: Option<Vec<Vec<Vec<u32>>>> = None;
            for isa in kernels() {
                let mut model = build(&folder, &options(isa, format)).model;
                for seed in 0..2 {
                    let name = format!("{} {format:?} {isa:?} seed {seed}", folder.display());
                    check_logits(&name, model.as_mut(), seed, &mut expected);
                }
            }
        }
    }
}

/// Three sequences, computed alone; then in one batch, cut at random; and once more from a copied block.
fn check_logits(name: &str, model: &mut dyn CausalLm, seed: u64, expected: &mut Option<Vec<Vec<Vec<u32>>>>) {
    let mut sequences_rng = StdRng::seed_from_u64(1);
    let sequences: Vec<Vec<Token>> = [45, 7, 33].iter().map(|n| tokens(&mut sequences_rng, *n)).collect();
    let each: Vec<_> = sequences.iter().map(|tokens| alone(model, tokens)).collect();
    let expected = expected.get_or_insert_with(|| each.clone());
    assert!(*expected == each, "{name}: another kernel set gave other bits");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut done = [0; 3];
    let mut got = vec![Vec::new(); 3];
    while done.iter().zip(&sequences).any(|(done, tokens)| *done < tokens.len()) {
        let mut batch = Batch::default();
        let mut order = Vec::new();
        for (i, tokens) in sequences.iter().enumerate() {
            let count = rng.random_range(0..12).min(tokens.len() - done[i]);
            if count > 0 {
                let blocks: Vec<u32> = (0..4).map(|block| 30 - block * 3 - i as u32).collect();
                batch.push(done[i], &tokens[done[i]..done[i] + count], Wants::All, &blocks);
                done[i] += count;
                order.extend(std::iter::repeat_n(i, count));
            }
        }
        let logits = model.forward(&batch);
        bits(logits.rows()).into_iter().zip(order).for_each(|(row, i)| got[i].push(row));
    }
    assert!(got == *expected, "{name}");
    // Going on in a copy of the second block after 9 of its tokens: what stands behind them is not looked at.
    let mut batch = Batch { copied: vec![(27, 40)], ..Batch::default() };
    batch.push(16 + 9, &sequences[0][16 + 9..], Wants::All, &[30, 40, 41]);
    let logits = bits(model.forward(&batch).rows());
    assert!(logits == expected[0][16 + 9..], "{name}: from a copied block");
}

/// An engine in this process, its answers by job.
struct Running {
    engine: Lm,
    woken: Receiver<()>,
    tokens: HashMap<u64, Vec<Token>>,
    ended: usize,
}

impl Running {
    fn start(folder: &Path, options: Options, max_batch: usize) -> Self {
        let (say, woken) = sync_channel(16);
        let folder = folder.to_owned();
        let load = move || Ok(build(&folder, &options));
        let executor = Executor::start(Threads::any(2), load, move || say.send(()).expect("the test waits")).unwrap();
        let engine = Lm::new(executor, Grammars::new(None), max_batch);
        let mut running = Self { engine, woken, tokens: HashMap::new(), ended: 0 };
        running.step();
        assert_eq!(*running.engine.state(), State::Ready);
        running
    }
    fn submit(&mut self, number: u64, job: Job) {
        self.engine.submit(Instant::now(), number, job);
        self.poll();
    }
    fn poll(&mut self) {
        let events = self.engine.poll(Instant::now());
        self.take(events);
    }
    /// Waits for an outcome.
    fn step(&mut self) {
        self.woken.recv_timeout(LIMIT).expect("an outcome in time");
        self.poll();
    }
    fn take(&mut self, events: Events) {
        for (number, event) in events {
            match event {
                JobEvent::Tokens { tokens, .. } => self.tokens.entry(number).or_default().extend(tokens),
                JobEvent::Done { .. } => self.ended += 1,
                JobEvent::Failed { reason, .. } => panic!("job {number} failed: {reason}"),
            }
        }
    }
}

/// A job at temperature 1.
fn job(prompt: Vec<Token>, delivered: &[Token], seed: u64, max_tokens: u32) -> Job {
    Job {
        turn: TurnId(1),
        choice: 0,
        attempt: 0,
        deployment: DeploymentId::new("contract").unwrap(),
        revision: Hash([0; 32]),
        prompt,
        delivered: delivered.to_vec(),
        sampling: Sampling { temperature: 1.0, seed, max_tokens, ignore_eos: true, ..Sampling::default() },
        cache_salt: [(seed % 2) as u8; 16],
        numerics: None,
        // Urgent ones give up steps of the others, which wait for them.
        class: Class::ALL[seed as usize % 3],
        capsule: Vec::new(),
    }
}

#[test]
fn sampled_text_is_the_same_in_any_company_after_preemption_and_continued() {
    for folder in folders() {
        for isa in kernels() {
            check_text(&folder, isa);
        }
    }
}

fn check_text(folder: &Path, isa: Isa) {
    let name = format!("{} {isa:?}", folder.display());
    let mut rng = StdRng::seed_from_u64(7);
    let system = tokens(&mut rng, 37);
    let jobs: Vec<(Vec<Token>, u64, u32)> = (0..10_u64)
        .map(|seed| {
            let own = rng.random_range(1..30);
            let begin = if seed % 3 == 0 { Vec::new() } else { system.clone() };
            ([begin, tokens(&mut rng, own)].concat(), seed, rng.random_range(5..40))
        })
        .collect();
    // One after the other, where there is room for everything and nothing to share.
    let expected: Vec<Vec<Token>> = jobs
        .iter()
        .map(|(prompt, seed, count)| {
            let mut running = Running::start(folder, options(isa, Format::Int4), 1);
            running.submit(0, job(prompt.clone(), &[], *seed, *count));
            while running.ended == 0 {
                running.step();
            }
            running.tokens.remove(&0).unwrap()
        })
        .collect();
    // All together in a cache that is too small, some cancelled on the way, some continued.
    let small = build(folder, &options(isa, Format::Int4));
    let bytes = (16_u64 << 20) / small.blocks as u64 * 20;
    drop(small);
    let small = Options { cache_bytes: bytes, max_context: 160, ..options(isa, Format::Int4) };
    let mut running = Running::start(folder, small, 6);
    for (number, (prompt, seed, count)) in jobs.iter().enumerate() {
        running.submit(number as u64, job(prompt.clone(), &[], *seed, *count));
        // The same again: cancelled, or going on from what was delivered.
        let twin = 100 + number as u64;
        let delivered = &expected[number][..rng.random_range(0..*count as usize)];
        running.submit(twin, job(prompt.clone(), delivered, *seed, *count));
        if number % 2 == 0 {
            (0..rng.random_range(0..4)).for_each(|_| running.step());
            running.engine.cancel(twin);
        } else {
            running.tokens.entry(twin).or_default().extend(delivered);
        }
    }
    while running.engine.load().jobs() > 0 {
        running.step();
    }
    for (number, expected) in expected.iter().enumerate() {
        assert_eq!(running.tokens[&(number as u64)], *expected, "{name} job {number}");
        if number % 2 == 1 {
            assert_eq!(running.tokens[&(100 + number as u64)], *expected, "{name} job {number}, continued");
        }
    }
    assert_eq!(running.engine.load().blocks_used, 0, "{name}: no block is lost");
}
