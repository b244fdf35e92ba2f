//! `izar-agent inspect PATH`: what a model file or folder holds, in words or as JSON, without loading its weights.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::Path;

use anyhow::Context;
use izar_common::text::{Bundle, Text};
use serde::Serialize;

use crate::model::weights::Source;

/// What a model is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub architecture: String,
    /// Tokens of prompt and answer together that the model was made for.
    pub context: usize,
    pub vocabulary: usize,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// What a token keeps in the cache in one layer.
    pub cache_values: usize,
    /// Experts of a layer, and how many of them a token uses; both 0 without.
    pub experts: usize,
    pub experts_per_token: usize,
    pub parameters: u64,
    /// How most of the weights are stored.
    pub quantization: String,
    pub bytes: u64,
    /// By how they are stored.
    pub tensors: BTreeMap<String, Tensors>,
    pub tokenizer: Tokenizer,
}

/// Tensors that are stored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Tensors {
    pub count: u64,
    pub parameters: u64,
    pub bytes: u64,
}

/// Whether the model's language can be spoken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tokenizer {
    Usable { vocabulary: u32, chat_template: bool, eos: Vec<u32> },
    Unusable { reason: String },
}

/// Prints the summary of a GGUF file or a folder.
pub fn run(path: &Path, json: bool) -> anyhow::Result<()> {
    let summary = summarize(path)?;
    let text = if json { serde_json::to_string_pretty(&summary)? + "\n" } else { describe(&summary) };
    match std::io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("print the summary"),
    }
}

/// Reads the headers of a GGUF file or a folder.
pub fn summarize(path: &Path) -> anyhow::Result<Summary> {
    let context = || format!("inspect {}", path.display());
    let source = Source::open(path).with_context(context)?;
    let config = source.config().with_context(context)?;
    let mut tensors = BTreeMap::<String, Tensors>::new();
    let mut total = Tensors::default();
    for entry in source.entries() {
        for sum in [tensors.entry(entry.kind).or_default(), &mut total] {
            sum.count += 1;
            sum.parameters += entry.elements;
            sum.bytes += entry.bytes;
        }
    }
    let most = tensors.iter().max_by_key(|(_, t)| t.parameters).map(|(kind, _)| kind.clone());
    Ok(Summary {
        architecture: config.family.name().to_owned(),
        context: config.context,
        vocabulary: config.vocabulary,
        layers: config.layers,
        hidden: config.hidden,
        heads: config.heads,
        kv_heads: config.kv_heads(),
        cache_values: config.cache_values(),
        experts: config.mixture().map_or(0, |experts| experts.count),
        experts_per_token: config.mixture().map_or(0, |experts| experts.per_token),
        parameters: total.parameters,
        quantization: most.context("there are no tensors").with_context(context)?,
        bytes: total.bytes,
        tensors,
        tokenizer: tokenizer(&source, path),
    })
}

fn tokenizer(source: &Source, path: &Path) -> Tokenizer {
    let bundle = match source {
        Source::Gguf { file, .. } => Bundle::from_gguf(file),
        Source::Safetensors(_) => Bundle::from_folder(path),
    };
    match bundle.and_then(|bundle| Text::new(&bundle)) {
        Ok(text) => {
            let (vocabulary, chat_template) = (text.vocabulary(), text.has_chat());
            Tokenizer::Usable { vocabulary, chat_template, eos: text.eos().to_vec() }
        }
        Err(error) => Tokenizer::Unusable { reason: format!("{:#}", anyhow::Error::new(error)) },
    }
}

fn describe(s: &Summary) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<14}{value}").expect("a string takes all");
    line("architecture", s.architecture.clone());
    line("context", format!("{} tokens", s.context));
    line("vocabulary", format!("{} tokens", s.vocabulary));
    line("shape", format!("{} layers of {}, {} heads, {} of keys", s.layers, s.hidden, s.heads, s.kv_heads));
    line("cache", format!("{} values a token and layer", s.cache_values));
    if s.experts > 0 {
        line("experts", format!("{}, of which a token uses {}", s.experts, s.experts_per_token));
    }
    line("parameters", millions(s.parameters));
    line("quantization", s.quantization.clone());
    line("size", megabytes(s.bytes));
    for (kind, t) in &s.tensors {
        let what = format!("{kind}: {} tensors, {}, {}", t.count, millions(t.parameters), megabytes(t.bytes));
        line("tensors", what);
    }
    line(
        "tokenizer",
        match &s.tokenizer {
            Tokenizer::Usable { vocabulary, chat_template, eos } => {
                let chat = if *chat_template { "a chat template" } else { "no chat template" };
                format!("{vocabulary} tokens, {chat}, answers end at {eos:?}")
            }
            Tokenizer::Unusable { reason } => format!("not usable: {reason}"),
        },
    );
    out
}

fn millions(parameters: u64) -> String {
    format!("{:.2} million parameters", parameters as f64 / 1e6)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_summed_up() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama");
        let summary = summarize(Path::new(folder)).unwrap();
        assert_eq!((summary.architecture.as_str(), summary.context, summary.vocabulary), ("llama", 512, 512));
        assert_eq!((summary.quantization.as_str(), summary.bytes), ("F32", summary.parameters * 4));
        assert!(matches!(&summary.tokenizer, Tokenizer::Usable { chat_template: true, eos, .. } if *eos == [1]));
        assert_eq!((summary.cache_values, summary.experts), (64, 0));
        let described = describe(&summary);
        assert!(described.contains("vocabulary    512 tokens\n") && !described.contains("experts"), "{described}");
    }

    #[test]
    fn what_is_no_model_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.gguf");
        std::fs::write(&path, "hello").unwrap();
        let said = |path: &Path| format!("{:#}", summarize(path).unwrap_err());
        assert!(said(&path).contains("notes.gguf cannot be used: not a GGUF file"), "{}", said(&path));
        assert!(said(dir.path()).contains("no file `*.safetensors`"));
        assert!(said(Path::new("/nonexistent/m.gguf")).contains("m.gguf"));
    }
}
