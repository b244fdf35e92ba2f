//! Models: what a decoder must be able to do, and which decoder runs which architecture.
//!
//! A step is ragged: chunks of prompts and single tokens of running answers travel together, each chunk belonging to
//! one sequence whose cache the model keeps under a [`SequenceId`] that the planner chose. When caches become blocks,
//! a chunk gains its block table and nothing else changes. Adding a family is one file and a line of [`FAMILIES`].

pub mod config;
pub mod decoder;
pub mod echo;
pub mod gguf;
pub mod weights;

use std::path::{Path, PathBuf};

use izar_common::chat::Token;
use izar_common::manifest::{Kind, Manifest};

use config::{Config, Family};
use decoder::Decoder;
use weights::Source;

/// Names a sequence's cache within one model; chosen by the planner, never used again after `close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// For which of a chunk's tokens the logits of the next token are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// None: the middle of a prompt.
    Nothing,
    /// The last one: the next token will be drawn.
    Last,
    /// All of them: tests, and later the log-probabilities of a prompt.
    All,
}

/// One sequence's share of a step: the next tokens that its cache does not hold yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub sequence: SequenceId,
    /// How many tokens the sequence's cache holds already; 0 opens the sequence.
    pub start: usize,
    /// How many of the batch's tokens are this chunk's, at least 1.
    pub tokens: usize,
    pub wants: Wants,
}

/// The tokens of a step, chunk after chunk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    pub tokens: Vec<Token>,
    pub chunks: Vec<Chunk>,
}

impl Batch {
    /// Adds a sequence's next tokens.
    pub fn push(&mut self, sequence: SequenceId, start: usize, tokens: &[Token], wants: Wants) {
        assert!(!tokens.is_empty(), "a chunk has tokens");
        self.tokens.extend_from_slice(tokens);
        self.chunks.push(Chunk { sequence, start, tokens: tokens.len(), wants });
    }
    /// The indices, among the batch's tokens, whose logits are wanted, in order.
    pub fn wanted(&self) -> Vec<usize> {
        let mut wanted = Vec::new();
        let mut end = 0;
        for chunk in &self.chunks {
            let start = end;
            end += chunk.tokens;
            match chunk.wants {
                Wants::Nothing => {}
                Wants::Last => wanted.push(end - 1),
                Wants::All => wanted.extend(start..end),
            }
        }
        wanted
    }
}

/// Logits `[rows, vocabulary]`, one row for each wanted token, in the batch's order.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    values: Vec<f32>,
    vocabulary: usize,
}

impl Logits {
    pub fn new(values: Vec<f32>, vocabulary: usize) -> Self {
        assert!(vocabulary > 0 && values.len().is_multiple_of(vocabulary), "logits are whole rows");
        Self { values, vocabulary }
    }
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocabulary)
    }
}

/// A causal language model with the caches of its running sequences. Owned by one thread.
///
/// The dense decoder implements it; the latent-attention family of DeepSeek is the other one that the design names.
pub trait CausalLm: Send {
    /// Computes a step: extends each chunk's cache by its tokens and returns the wanted logits.
    ///
    /// A chunk that does not start where its sequence's cache ends is a bug of the planner and panics.
    fn forward(&mut self, batch: &Batch) -> Logits;
    /// Forgets a sequence. One that was never opened is no error: it was cancelled before its first step.
    fn close(&mut self, sequence: SequenceId);
}

/// A model that is loaded, and what a planner must know of it.
pub struct Loaded {
    pub model: Box<dyn CausalLm>,
    /// Tokens of prompt and answer together that the model was made for.
    pub context: usize,
    pub vocabulary: usize,
    /// Tokens that end an answer.
    pub eos: Vec<Token>,
}

/// Why a model cannot be loaded. Each names the file or the tensor or the key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{file} cannot be used")]
    Gguf { file: String, source: izar_common::gguf::Error },
    #[error("cannot read {file}")]
    Read { file: String, source: std::io::Error },
    #[error("the tokenizer of {file} cannot be used")]
    Text { file: String, source: izar_common::text::Error },
    #[error("{file}: {reason}")]
    Format { file: String, reason: String },
    #[error("{file}: key `{key}` {reason}")]
    Key { file: String, key: String, reason: String },
    #[error("{file}: tensor `{tensor}` {reason}")]
    Tensor { file: String, tensor: String, reason: String },
    #[error("the model has no file `{0}`")]
    NoFile(String),
    #[error("there is no decoder for the architecture {0} yet")]
    NoDecoder(&'static str),
    #[error("the model's manifest says {what} {manifest}, its files say {files}")]
    Manifest { what: &'static str, manifest: String, files: String },
}

/// Makes a model from its configuration and its weights.
type Loader = fn(&Config, &Source) -> Result<Box<dyn CausalLm>, Error>;

/// Which decoder runs a family.
const FAMILIES: &[(Family, Loader)] = &[(Family::Llama, dense), (Family::Qwen2, dense), (Family::Qwen3, dense)];

fn dense(config: &Config, source: &Source) -> Result<Box<dyn CausalLm>, Error> {
    Ok(Box::new(Decoder::load(config, source)?))
}

/// Loads a model's weights. `files` are where the manifest's files lie, in its order. Not for echo, which has none.
pub fn load(manifest: &Manifest, files: &[PathBuf]) -> Result<Loaded, Error> {
    let named: Vec<(&str, &Path)> =
        manifest.files.iter().map(|f| f.name.as_str()).zip(files.iter().map(PathBuf::as_path)).collect();
    let source = match manifest.kind {
        Kind::Gguf => {
            let &(name, path) = named.first().ok_or_else(|| Error::NoFile("*.gguf".into()))?;
            Source::gguf(name, path)?
        }
        Kind::Safetensors | Kind::Echo { .. } => Source::safetensors(&named)?,
    };
    let config = source.config()?;
    let refused = |what, manifest: &dyn ToString, files: &dyn ToString| {
        Err(Error::Manifest { what, manifest: manifest.to_string(), files: files.to_string() })
    };
    let architecture = match manifest.kind {
        Kind::Gguf => config.family.ggml_name(),
        Kind::Safetensors | Kind::Echo { .. } => config.family.name(),
    };
    if manifest.architecture != architecture {
        return refused("architecture", &manifest.architecture, &architecture);
    }
    // Models often have more rows than their tokenizer has tokens; the other way round, a token would have no row.
    if manifest.vocabulary as usize > config.vocabulary {
        return refused("vocabulary", &manifest.vocabulary, &config.vocabulary);
    }
    let (context, vocabulary, eos) = (config.context, config.vocabulary, source.eos()?);
    Ok(Loaded { model: build(&config, &source)?, context, vocabulary, eos })
}

/// Builds the decoder that the configuration asks for.
pub fn build(config: &Config, source: &Source) -> Result<Box<dyn CausalLm>, Error> {
    loader(config.family)?(config, source)
}

fn loader(family: Family) -> Result<Loader, Error> {
    let line = FAMILIES.iter().find(|(of, _)| *of == family);
    line.map(|(_, loader)| *loader).ok_or(Error::NoDecoder(family.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_one_decoder_or_is_refused_by_name() {
        for family in Family::ALL {
            match (FAMILIES.iter().filter(|(f, _)| f == family).count(), loader(*family)) {
                (1, Ok(_)) => {}
                (0, Err(error)) => assert!(error.to_string().contains(family.name()), "{error}"),
                (lines, found) => panic!("{family:?} has {lines} lines and a loader: {}", found.is_ok()),
            }
        }
    }

    #[test]
    fn wanted_rows_are_counted_over_chunks() {
        let mut batch = Batch::default();
        batch.push(SequenceId(0), 0, &[1, 2, 3], Wants::Nothing);
        batch.push(SequenceId(1), 5, &[4], Wants::Last);
        batch.push(SequenceId(2), 0, &[5, 6], Wants::All);
        batch.push(SequenceId(3), 0, &[7, 8], Wants::Last);
        assert_eq!(batch.wanted(), [3, 4, 5, 7]);
    }
}
