//! `bench quality`: what each form of the weights costs and gives, on a text that the model has not seen.
//!
//! Perplexity says how surprised the model is by each next token; agreement, how often its likeliest token is that of
//! f32, weights and cache. Both come from the model itself, the cache kept as the engine keeps it; the speed comes from
//! the engine.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use izar_common::chat::Token;
use izar_common::wire::agent::Quant;
use serde::Serialize;

use super::arguments::EngineArguments;
use super::engine;
use super::local::Local;
use super::logits::{Plain, best, surprise};

/// Read when no other text is given; written for this purpose.
const PROSE: &str = include_str!("prose.txt");

/// Bytes of a text: what is read here takes minutes already.
const TEXT_LIMIT: u64 = 1 << 20;

/// What is compared.
#[derive(Debug, Args)]
pub struct Options {
    /// A .gguf file, or a folder in Hugging Face form
    #[arg(long)]
    pub model: PathBuf,
    /// A text in a file [default: a page of prose]
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Forms of the weights: f32, f16, int8, int4
    #[arg(long, value_delimiter = ',', default_value = "f32,f16,int8,int4")]
    pub quant: Vec<Quant>,
    /// Numbers of streams whose speed is measured; 0 measures none
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    pub batch: Vec<usize>,
    #[command(flatten)]
    pub engine: EngineArguments,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// All forms, the first of them what the others are compared with.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub tokens: usize,
    pub threads: usize,
    pub forms: Vec<Form>,
}

/// One form of the weights.
#[derive(Debug, Serialize)]
pub struct Form {
    pub quant: Quant,
    pub weights_bytes: u64,
    pub load_s: f64,
    pub perplexity: f64,
    /// How much higher the perplexity is than that of f32, as a share.
    pub perplexity_change: f64,
    /// Share of the positions whose likeliest token is that of f32.
    pub agreement: f64,
    pub decode: Vec<engine::Decode>,
}

/// What a form says of a text.
struct Reading {
    load_s: f64,
    weights_bytes: u64,
    perplexity: f64,
    best: Vec<Token>,
}

/// Compares.
pub fn measure(options: &Options) -> anyhow::Result<Report> {
    let model = Local::open(&options.model)?;
    let tokens = model.text()?.encode(&text(options)?).context("encode the text")?;
    ensure!(tokens.len() >= 2, "the text has {} tokens: nothing can be predicted", tokens.len());
    let context = model.config.context;
    ensure!(tokens.len() <= context, "the text has {} tokens, the context holds {context}", tokens.len());
    let exact = read(|| Plain::exact(&model, &options.engine), &tokens)?;
    let mut forms = Vec::new();
    for quant in &options.quant {
        let reading = read(|| Plain::load(&model, &options.engine.options(*quant, 1)), &tokens)?;
        let alike = reading.best.iter().zip(&exact.best).filter(|(a, b)| a == b).count();
        forms.push(Form {
            quant: *quant,
            weights_bytes: reading.weights_bytes,
            load_s: reading.load_s,
            perplexity: reading.perplexity,
            perplexity_change: reading.perplexity / exact.perplexity - 1.0,
            agreement: alike as f64 / exact.best.len() as f64,
            decode: speed(&model, options, *quant)?,
        });
    }
    Ok(Report { model: model.name(), tokens: tokens.len(), threads: options.engine.threads(), forms })
}

fn text(options: &Options) -> anyhow::Result<String> {
    let Some(path) = &options.text else { return Ok(PROSE.to_owned()) };
    let context = || format!("read the text {}", path.display());
    let bytes = std::fs::metadata(path).with_context(context)?.len();
    ensure!(bytes <= TEXT_LIMIT, "{} has {bytes} bytes; use up to {TEXT_LIMIT}", path.display());
    std::fs::read_to_string(path).with_context(context)
}

fn read(load: impl FnOnce() -> anyhow::Result<Plain>, tokens: &[Token]) -> anyhow::Result<Reading> {
    let begun = Instant::now();
    let mut plain = load()?;
    let load_s = begun.elapsed().as_secs_f64();
    let (mut surprises, mut likeliest) = (0.0, Vec::with_capacity(tokens.len()));
    plain.read(tokens, |at, logits| {
        likeliest.push(best(logits));
        surprises += tokens.get(at + 1).map_or(0.0, |next| surprise(logits, *next));
    })?;
    let perplexity = (surprises / (tokens.len() - 1) as f64).exp();
    Ok(Reading { load_s, weights_bytes: plain.weights_bytes(), perplexity, best: likeliest })
}

fn speed(model: &Local, options: &Options, quant: Quant) -> anyhow::Result<Vec<engine::Decode>> {
    if options.batch.contains(&0) {
        return Ok(Vec::new());
    }
    engine::decode_alone(model, &options.batch, &options.engine, quant)
}

impl Report {
    /// A table for people, in Markdown as the documentation shows it.
    pub fn text(&self) -> String {
        let mut out = format!("{}, {} tokens of text, {} threads\n\n", self.model, self.tokens, self.threads);
        let mut line = |cells: &[String]| writeln!(out, "| {} |", cells.join(" | ")).expect("a string takes all");
        let streams = self.forms.first().map_or(&[][..], |form| &form.decode);
        let mut head =
            vec!["weights".into(), "memory".into(), "perplexity".into(), "change".into(), "best token".into()];
        head.extend(streams.iter().map(|d| format!("decode {}", d.streams)));
        line(&head);
        line(&vec!["---".to_owned(); head.len()]);
        for form in &self.forms {
            let mut cells = vec![
                form.quant.to_string(),
                format!("{:.1} MB", form.weights_bytes as f64 / 1e6),
                format!("{:.3}", form.perplexity),
                format!("{:+.2} %", form.perplexity_change * 100.0),
                format!("{:.1} %", form.agreement * 100.0),
            ];
            cells.extend(form.decode.iter().map(|d| format!("{:.0}", d.tokens_per_s)));
            line(&cells);
        }
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

    fn report(more: &[&str]) -> anyhow::Result<Report> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama");
        let line = ["bench", "--model", folder, "--batch", "0", "--threads", "1"];
        measure(&Line::try_parse_from(line.iter().chain(more)).unwrap().options)
    }

    #[test]
    fn a_text_is_read_as_f32_reads_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "the sea is calm and far from here").unwrap();
        let path = file.path().to_str().unwrap();
        let report = report(&["--text", path, "--quant", "f32"]).unwrap();
        let form = &report.forms[0];
        assert!(report.tokens >= 2 && form.perplexity.is_finite() && form.perplexity > 1.0, "{form:?}");
        assert!(form.agreement > 0.9 && form.perplexity_change.abs() < 1e-3, "{form:?}");
        assert!(report.text().contains("| f32 | 0.7 MB |"), "{}", report.text());
        std::fs::write(file.path(), "a").unwrap();
        assert!(super::tests::report(&["--text", path]).unwrap_err().to_string().contains("nothing can be predicted"));
    }

    #[test]
    fn a_text_longer_than_the_context_is_refused() {
        let said = report(&["--quant", "f32"]).unwrap_err().to_string();
        assert!(said.contains("the context holds 512"), "{said}");
    }
}
