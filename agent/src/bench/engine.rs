//! `bench engine`: how fast the engine fills a cache and goes on from it, against what the machine can read.
//!
//! A figure is the median of some rounds, and each round measures everything once, so that a disturbance does not fall
//! on one figure alone. Decoding is counted from the moment in which every stream has its first token, and until each
//! has had its number on average; then the streams are cancelled. Prompts look random and differ in every round, so
//! that nothing is found in the cache unless it is meant to be.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use crate::engine::pace;
use anyhow::{Context, ensure};
use clap::Args;
use izar_common::chat::{JobEvent, Token};
use izar_common::wire::agent::{CacheType, Quant};
use serde::Serialize;

use super::arguments::EngineArguments;
use super::drive::{Drive, Ends};
use super::local::Local;
use super::logits::Plain;
use super::{machine, median};

/// Tokens of a prompt, and tokens that each stream decodes, when nobody says how many.
const DEFAULT_PROMPT: usize = 128;
const DEFAULT_TOKENS: usize = 64;

/// Streams at most: more than any deployment's batch.
const MAX_STREAMS: usize = 1024;

/// Rounds at most: more take hours.
const MAX_ROUNDS: usize = 1000;

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A .gguf file, or a folder in Hugging Face form
    #[arg(long)]
    pub model: PathBuf,
    /// Tokens of a prompt
    #[arg(long, default_value_t = DEFAULT_PROMPT)]
    pub prompt: usize,
    /// Numbers of streams that decode at once
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    pub batch: Vec<usize>,
    /// Tokens that each stream decodes
    #[arg(long, default_value_t = DEFAULT_TOKENS)]
    pub tokens: usize,
    /// Rounds; the median counts
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// 0 takes the likeliest token, as most benchmarks do; above it tokens are drawn
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// All streams have the same prompt, which the cache may share
    #[arg(long)]
    pub shared_prefix: bool,
    /// How weights are kept: f32, f16, int8 or int4
    #[arg(long, default_value = "int4")]
    pub quant: Quant,
    #[command(flatten)]
    pub engine: EngineArguments,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What was found. Rates in tokens a second, sizes in bytes.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub architecture: String,
    pub instruction_sets: String,
    pub quant: Quant,
    pub device: String,
    pub kernels: String,
    pub cache: CacheType,
    pub threads: usize,
    pub prompt: usize,
    pub tokens: usize,
    pub rounds: usize,
    pub temperature: f32,
    pub shared_prefix: bool,
    /// From nothing to ready, warm-up included.
    pub load_s: f64,
    pub resident_loaded_bytes: u64,
    /// The most that was ever held, while loading or while computing.
    pub resident_peak_bytes: u64,
    pub parameters: u64,
    pub stored_bytes: u64,
    /// What the weights take in memory.
    pub weights_bytes: u64,
    /// What computing one token reads of them; with experts, what it would read of all.
    pub read_bytes: u64,
    pub prefill_tokens_per_s: f64,
    pub ttft_ms: f64,
    /// The same prompt a second time.
    pub ttft_again_ms: f64,
    pub decode: Vec<Decode>,
    pub bandwidth_bytes_per_s: f64,
    /// Weights read by one stream that decodes, as a share of the bandwidth.
    pub bandwidth_share: Option<f64>,
    /// Every round's figures.
    pub all_rounds: Vec<Round>,
}

/// Streams that decode at once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decode {
    pub streams: usize,
    pub tokens_per_s: f64,
}

/// Everything once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Round {
    pub ttft_s: f64,
    pub ttft_again_s: f64,
    pub decode: Vec<Decode>,
}

/// Measures.
pub fn measure(options: &Options) -> anyhow::Result<Report> {
    let model = Local::open(&options.model)?;
    check(options, &model)?;
    let streams = options.batch.iter().copied().max().context("--batch: no number of streams")?;
    let begun = Instant::now();
    let mut drive = Drive::start(&model, &options.engine.options(options.quant, streams))?;
    let load_s = begun.elapsed().as_secs_f64();
    let (resident_loaded_bytes, _) = machine::resident()?;
    let mut bench = Bench { options, model: &model, drive: &mut drive, prompts: 0 };
    bench.warm_up()?;
    let rounds = (0..options.rounds).map(|_| bench.round()).collect::<anyhow::Result<Vec<_>>>()?;
    let (_, resident_peak_bytes) = machine::resident()?;
    drop(drive);
    let threads = options.engine.threads();
    let bandwidth = machine::read_bandwidth(threads);
    let middle = |of: &dyn Fn(&Round) -> f64| {
        let values: Vec<f64> = rounds.iter().map(of).collect();
        median(&values).context("--rounds 0: nothing would be measured")
    };
    let ttft = middle(&|r| r.ttft_s)?;
    let mut decode = Vec::new();
    for (i, streams) in options.batch.iter().enumerate() {
        decode.push(Decode { streams: *streams, tokens_per_s: middle(&|r| r.decode[i].tokens_per_s)? });
    }
    // The engine does not tell; the same weights without it do.
    let weights_bytes = Plain::load(&model, &options.engine.options(options.quant, 1))?.weights_bytes();
    let read_bytes = (weights_bytes as f64 * model.read_parameters as f64 / model.parameters as f64) as u64;
    let single = decode.iter().find(|d| d.streams == 1);
    Ok(Report {
        model: model.name(),
        architecture: model.manifest.architecture.clone(),
        instruction_sets: machine::instruction_sets(),
        quant: options.quant,
        device: options.engine.device.to_string(),
        kernels: options.engine.kernels().to_owned(),
        cache: options.engine.cache_type,
        threads,
        prompt: options.prompt,
        tokens: options.tokens,
        rounds: options.rounds,
        temperature: options.temperature,
        shared_prefix: options.shared_prefix,
        load_s,
        resident_loaded_bytes,
        resident_peak_bytes,
        parameters: model.parameters,
        stored_bytes: model.stored_bytes,
        weights_bytes,
        read_bytes,
        prefill_tokens_per_s: options.prompt as f64 / ttft,
        ttft_ms: ttft * 1e3,
        ttft_again_ms: middle(&|r| r.ttft_again_s)? * 1e3,
        bandwidth_share: single.map(|d| d.tokens_per_s * read_bytes as f64 / bandwidth),
        decode,
        bandwidth_bytes_per_s: bandwidth,
        all_rounds: rounds,
    })
}

/// Measures decoding alone, once.
pub fn decode_alone(
    model: &Local,
    batch: &[usize],
    engine: &EngineArguments,
    quant: Quant,
) -> anyhow::Result<Vec<Decode>> {
    let (prompt, tokens, batch) = (DEFAULT_PROMPT, DEFAULT_TOKENS, batch.to_vec());
    let options = Options {
        model: model.path.clone(),
        prompt,
        batch,
        tokens,
        rounds: 1,
        temperature: 0.0,
        shared_prefix: false,
        quant,
        engine: engine.clone(),
        json: false,
    };
    check(&options, model)?;
    let streams = options.batch.iter().copied().max().context("no number of streams")?;
    let mut drive = Drive::start(model, &engine.options(quant, streams))?;
    let mut bench = Bench { options: &options, model, drive: &mut drive, prompts: 0 };
    bench.warm_up()?;
    Ok(bench.round()?.decode)
}

fn check(options: &Options, model: &Local) -> anyhow::Result<()> {
    ensure!((1..=MAX_ROUNDS).contains(&options.rounds), "--rounds {}: use 1 to {MAX_ROUNDS}", options.rounds);
    ensure!(options.prompt >= 1, "--prompt 0: a prompt has at least one token");
    ensure!(options.tokens >= 1, "--tokens 0: nothing would be measured");
    for streams in &options.batch {
        ensure!((1..=MAX_STREAMS).contains(streams), "--batch {streams}: use 1 to {MAX_STREAMS} streams");
        let (longest, context) = (options.prompt + answer(options, *streams), context(options, model));
        ensure!(
            longest <= context,
            "--batch {streams}: prompts of {} and answers of up to {} tokens do not fit the context of {context}",
            options.prompt,
            answer(options, *streams)
        );
    }
    Ok(())
}

fn context(options: &Options, model: &Local) -> usize {
    match options.engine.max_context as usize {
        0 => model.config.context,
        asked => asked.min(model.config.context),
    }
}

/// Tokens that the answer of one of some streams may have: what is counted, and what it has while others still begin.
fn answer(options: &Options, streams: usize) -> usize {
    let ahead = (streams - 1) * options.prompt.div_ceil(pace::LEAST);
    options.tokens + 2 + ahead
}

struct Bench<'a> {
    options: &'a Options,
    model: &'a Local,
    drive: &'a mut Drive,
    /// Prompts that were made.
    prompts: u64,
}

impl Bench<'_> {
    /// Does once what is set up at first use.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        let prompt = self.prompt();
        self.first(&prompt)?;
        Ok(())
    }
    fn round(&mut self) -> anyhow::Result<Round> {
        let prompt = self.prompt();
        let (ttft_s, ttft_again_s) = (self.first(&prompt)?, self.first(&prompt)?);
        let mut decode = Vec::new();
        for streams in &self.options.batch {
            decode.push(Decode { streams: *streams, tokens_per_s: self.decode(*streams)? });
        }
        Ok(Round { ttft_s, ttft_again_s, decode })
    }
    /// A prompt that was never there.
    fn prompt(&mut self) -> Vec<Token> {
        self.prompts += 1;
        self.model.prompt(self.prompts, self.options.prompt)
    }
    /// Seconds until the first token.
    fn first(&mut self, prompt: &[Token]) -> anyhow::Result<f64> {
        let begun = Instant::now();
        self.drive.submit(prompt, 1, self.options.temperature, Ends::Ignored);
        self.drive.events()?;
        let seconds = begun.elapsed().as_secs_f64();
        self.drive.settle()?;
        Ok(seconds)
    }
    /// Tokens a second of some streams together.
    fn decode(&mut self, streams: usize) -> anyhow::Result<f64> {
        let shared = self.prompt();
        let length = answer(self.options, streams);
        let mut jobs = Vec::new();
        for _ in 0..streams {
            let prompt = if self.options.shared_prefix { shared.clone() } else { self.prompt() };
            jobs.push(self.drive.submit(&prompt, length, self.options.temperature, Ends::Ignored));
        }
        let mut silent = jobs.clone();
        while !silent.is_empty() {
            let events = self.drive.events()?;
            silent.retain(|job| !events.iter().any(|(number, _)| number == job));
        }
        let (begun, wanted, mut counted) = (Instant::now(), streams * self.options.tokens, 0);
        while counted < wanted {
            for (_, event) in self.drive.events()? {
                match event {
                    JobEvent::Tokens { tokens, .. } => counted += tokens.len(),
                    _ => anyhow::bail!("a stream ended while it was measured"),
                }
            }
        }
        let rate = counted as f64 / begun.elapsed().as_secs_f64();
        jobs.into_iter().for_each(|job| self.drive.cancel(job));
        self.drive.settle()?;
        Ok(rate)
    }
}

impl Report {
    /// A table for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| writeln!(out, "{name:<16}{value}").expect("a string takes all");
        let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        line("model", format!("{}, {:.1} million parameters", self.model, self.parameters as f64 / 1e6));
        line(
            "machine",
            format!("{}, {} threads, {}, kernels {}", self.device, self.threads, self.instruction_sets, self.kernels),
        );
        line("weights", format!("{}, {}; a token reads {}", self.quant, mb(self.weights_bytes), mb(self.read_bytes)));
        line("cache", self.cache.to_string());
        line("load", format!("{:.2} s", self.load_s));
        line(
            "memory",
            format!(
                "{} when loaded, {} at most; {} in files",
                mb(self.resident_loaded_bytes),
                mb(self.resident_peak_bytes),
                mb(self.stored_bytes)
            ),
        );
        line("first token", format!("{:.2} ms after {} tokens", self.ttft_ms, self.prompt));
        line("  again", format!("{:.2} ms for the same prompt", self.ttft_again_ms));
        line("prefill", format!("{:.1} tokens/s", self.prefill_tokens_per_s));
        for decode in &self.decode {
            let each = decode.tokens_per_s / decode.streams as f64;
            line(
                &format!("decode {}", decode.streams),
                format!("{:.1} tokens/s, {each:.1} for each stream", decode.tokens_per_s),
            );
        }
        let share = self.bandwidth_share.map(|share| format!(", of which one stream uses {:.1} %", share * 100.0));
        line("memory reads", format!("{:.1} GB/s{}", self.bandwidth_bytes_per_s / 1e9, share.unwrap_or_default()));
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
        let line = ["bench", "--model", folder, "--prompt", "20", "--tokens", "4", "--rounds", "1", "--threads", "1"];
        Line::try_parse_from(line.iter().chain(more)).unwrap().options
    }

    #[test]
    fn a_small_model_is_measured_whole() {
        let report = measure(&options(&["--batch", "1,3"])).unwrap();
        assert_eq!(report.decode.iter().map(|d| d.streams).collect::<Vec<_>>(), [1, 3]);
        let rates = report.decode.iter().map(|d| d.tokens_per_s);
        assert!(rates.chain([report.prefill_tokens_per_s, report.bandwidth_bytes_per_s]).all(|r| r > 0.0));
        assert!(report.text().contains("decode 3 "), "{}", report.text());
        assert_eq!(report.all_rounds.len(), 1);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let said = |more: &[&str]| measure(&options(more)).unwrap_err().to_string();
        assert!(said(&["--batch", "0"]).contains("--batch 0"));
        assert!(said(&["--max-context", "21", "--batch", "1"]).contains("the context of 21"));
        assert!(said(&["--batch", "600"]).contains("do not fit"));
    }
}
