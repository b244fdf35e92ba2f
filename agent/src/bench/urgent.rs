//! `bench urgent`: how long urgent jobs take beside a full load of batch jobs, from their arrival to their last token.
//!
//! Batch jobs of all sizes are kept waiting, so that the batch is always full and some of them are always at their
//! prompts. Urgent ones arrive at random, whatever is computed just then.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Args;
use izar_common::chat::{Class, JobEvent};
use izar_common::wire::agent::Quant;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::arguments::EngineArguments;
use super::drive::{Drive, Ends};
use super::local::Local;

/// Jobs that are measured at most: more take hours.
const MAX_JOBS: usize = 100_000;

/// Jobs of the load, in batches: one runs, one waits.
const LOAD_BATCHES: usize = 2;

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A .gguf file, or a folder in Hugging Face form
    #[arg(long)]
    pub model: PathBuf,
    /// Jobs that are measured
    #[arg(long, default_value_t = 200)]
    pub jobs: usize,
    /// Their class: urgent, interactive or batch
    #[arg(long, default_value = "urgent")]
    pub class: Class,
    /// Tokens of their prompts
    #[arg(long, default_value_t = 128)]
    pub prompt: usize,
    /// Tokens of their answers
    #[arg(long, default_value_t = 8)]
    pub tokens: usize,
    /// Milliseconds between two arrivals: half of it to one and a half times
    #[arg(long, default_value_t = 500)]
    pub gap_ms: u64,
    /// Places in the batch, all taken by batch jobs
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Most tokens of a batch job's prompt, and of its answer; each has 1 to so many
    #[arg(long, default_value_t = 256)]
    pub load_prompt: usize,
    #[arg(long, default_value_t = 128)]
    pub load_tokens: usize,
    /// Seed of arrivals and sizes
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How weights are kept: f32, f16, int8 or int4
    #[arg(long, default_value = "int4")]
    pub quant: Quant,
    #[command(flatten)]
    pub engine: EngineArguments,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What was found. Times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub threads: usize,
    pub class: Class,
    pub jobs: usize,
    pub prompt: usize,
    pub tokens: usize,
    pub batch: usize,
    pub seed: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
    /// Tokens of batch jobs' answers a second, meanwhile.
    pub load_tokens_per_s: f64,
}

/// Measures.
pub fn measure(options: &Options) -> anyhow::Result<Report> {
    let model = Local::open(&options.model)?;
    check(options, &model)?;
    let mut drive = Drive::start(&model, &options.engine.options(options.quant, options.batch))?;
    let mut load = Load { options, model: &model, random: StdRng::seed_from_u64(options.seed), prompts: 0, running: 0 };
    load.fill(&mut drive);
    // Only a full batch is what shall be measured.
    let mut measured: Vec<Asked> = Vec::new();
    while drive.running() < options.batch as u32 {
        load.take(drive.events()?, &mut measured);
        load.fill(&mut drive);
    }
    let (begun, mut tokens) = (Instant::now(), 0);
    let mut next = begun + load.gap();
    let ended =
        |measured: &[Asked]| measured.len() == options.jobs && measured.iter().all(|asked| asked.took.is_some());
    while !ended(&measured) {
        let events = drive.events_until((measured.len() < options.jobs).then_some(next))?;
        tokens += load.take(events, &mut measured);
        load.fill(&mut drive);
        let now = Instant::now();
        if now >= next && measured.len() < options.jobs {
            let prompt = load.prompt(options.prompt);
            let job = drive.submit_as(options.class, &prompt, options.tokens, 0.0, Ends::Ignored);
            // It counts from the time at which it was due.
            measured.push(Asked { job, due: next, took: None });
            next += load.gap();
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let mut took: Vec<f64> = measured.iter().filter_map(|asked| Some(asked.took?.as_secs_f64() * 1e3)).collect();
    took.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| took[((share * took.len() as f64).ceil() as usize).max(1) - 1];
    Ok(Report {
        model: model.name(),
        threads: options.engine.threads(),
        class: options.class,
        jobs: options.jobs,
        prompt: options.prompt,
        tokens: options.tokens,
        batch: options.batch,
        seed: options.seed,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        p999_ms: at(0.999),
        max_ms: at(1.0),
        load_tokens_per_s: tokens as f64 / seconds,
    })
}

fn check(options: &Options, model: &Local) -> anyhow::Result<()> {
    ensure!((1..=MAX_JOBS).contains(&options.jobs), "--jobs {}: use 1 to {MAX_JOBS}", options.jobs);
    ensure!((1..=1024).contains(&options.batch), "--batch {}: use 1 to 1024", options.batch);
    ensure!((1..=60_000).contains(&options.gap_ms), "--gap-ms {}: use 1 to 60000", options.gap_ms);
    for (flag, value) in [
        ("--prompt", options.prompt),
        ("--tokens", options.tokens),
        ("--load-prompt", options.load_prompt),
        ("--load-tokens", options.load_tokens),
    ] {
        ensure!(value >= 1, "{flag} 0: a prompt and an answer have at least one token");
    }
    let context = match options.engine.max_context as usize {
        0 => model.config.context,
        asked => asked.min(model.config.context),
    };
    let longest = (options.prompt + options.tokens).max(options.load_prompt + options.load_tokens);
    ensure!(longest <= context, "{longest} tokens of prompt and answer do not fit the context of {context}");
    Ok(())
}

/// A job that is measured.
#[derive(Debug)]
struct Asked {
    job: u64,
    due: Instant,
    took: Option<Duration>,
}

/// The batch jobs, and whatever is random.
struct Load<'a> {
    options: &'a Options,
    model: &'a Local,
    random: StdRng,
    /// Prompts that were made.
    prompts: u64,
    /// Batch jobs that have not ended.
    running: usize,
}

impl Load<'_> {
    fn gap(&mut self) -> Duration {
        let gap = self.options.gap_ms as f64 / 1e3;
        Duration::from_secs_f64(gap * self.random.random_range(0.5..1.5))
    }
    /// A prompt that was never there.
    fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        self.prompts += 1;
        self.model.prompt(self.prompts, tokens)
    }
    /// Submits jobs until there are enough.
    fn fill(&mut self, drive: &mut Drive) {
        while self.running < LOAD_BATCHES * self.options.batch {
            let length = self.random.random_range(1..=self.options.load_prompt);
            let prompt = self.prompt(length);
            let tokens = self.random.random_range(1..=self.options.load_tokens);
            drive.submit_as(Class::Batch, &prompt, tokens, 0.0, Ends::Ignored);
            self.running += 1;
        }
    }
    /// Takes events; returns how many tokens of the load they gave.
    fn take(&mut self, events: crate::engine::Events, measured: &mut [Asked]) -> usize {
        let (now, mut given) = (Instant::now(), 0);
        for (job, event) in events {
            let asked = measured.iter_mut().rev().find(|asked| asked.job == job);
            match (event, asked) {
                (JobEvent::Tokens { tokens, .. }, None) => given += tokens.len(),
                (JobEvent::Tokens { .. }, Some(_)) => {}
                (_, None) => self.running -= 1,
                (_, Some(asked)) => asked.took = Some(now - asked.due),
            }
        }
        given
    }
}

impl Report {
    /// A table for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| writeln!(out, "{name:<16}{value}").expect("a string takes all");
        line("model", format!("{}, {} threads", self.model, self.threads));
        line("load", format!("{} places of batch jobs, {:.1} tokens/s meanwhile", self.batch, self.load_tokens_per_s));
        line("measured", format!("{} {} jobs, {} tokens in, {} out", self.jobs, self.class, self.prompt, self.tokens));
        line("p50", format!("{:.1} ms", self.p50_ms));
        line("p99", format!("{:.1} ms", self.p99_ms));
        line("p99.9", format!("{:.1} ms", self.p999_ms));
        line("at most", format!("{:.1} ms", self.max_ms));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(more: &[&str]) -> Options {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama");
        let line = ["bench", "--model", folder, "--jobs", "3", "--gap-ms", "5", "--threads", "1", "--batch", "3"];
        let small = ["--prompt", "20", "--load-prompt", "40", "--load-tokens", "9"];
        Line::try_parse_from(line.iter().chain(&small).chain(more)).unwrap().options
    }

    #[test]
    fn jobs_of_every_class_are_measured_beside_the_load() {
        for class in ["urgent", "batch"] {
            let report = measure(&options(&["--class", class])).unwrap();
            assert!(report.p50_ms > 0.0 && report.p50_ms <= report.p99_ms && report.p999_ms <= report.max_ms);
            assert!(report.text().contains(&format!("3 {class} jobs")), "{}", report.text());
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let said = |flag: &str, value: &str| measure(&options(&[flag, value])).unwrap_err().to_string();
        assert!(said("--tokens", "0").contains("--tokens 0"));
        assert!(said("--max-context", "21").contains("the context of 21"));
        assert!(Line::try_parse_from(["bench", "--model", "m", "--class", "slow"]).is_err());
    }
}
