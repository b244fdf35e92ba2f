//! Models: what a decoder must be able to do, and how one is loaded.
//!
//! A step is ragged: chunks of prompts and single tokens of running answers travel together, each chunk with the table
//! of the cache's blocks in which its sequence lies. The planner owns the tables; a model knows blocks, not sequences.
//! Adding a family is a line of `config::Family`, its keys in `config/{json,gguf}`, and, if it computes what no other
//! does, a file beside `attention` and `experts`.

pub mod attention;
pub mod config;
pub mod decoder;
pub mod echo;
pub mod experts;
pub mod gguf;
pub mod layers;
pub mod weights;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use izar_common::chat::Token;
use izar_common::manifest::{Kind, Manifest};
use izar_common::wire::agent::{Activations, CACHE_BYTES, CacheType, Device, EngineOptions, Kernels, Quant};

use crate::ops::cpu::isa::Isa;
use crate::ops::{self, CacheFormat, Format, Ops, TOKENS};
use config::Config;
use decoder::Decoder;
use weights::Source;

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
    /// How many tokens the sequence's cache holds already.
    pub start: usize,
    /// How many of the batch's tokens are this chunk's, at least 1.
    pub tokens: usize,
    pub wants: Wants,
    /// The blocks of positions 0, 16, 32, … as far as the last token; no other chunk's tokens lie in those that this
    /// one writes.
    pub blocks: Vec<u32>,
}

/// The tokens of a step, chunk after chunk, and what happens to the cache before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Blocks that change hands between tenants.
    pub cleared: Vec<u32>,
    /// Blocks that are copied, `(from, to)`, after the clearing.
    pub copied: Vec<(u32, u32)>,
    pub tokens: Vec<Token>,
    pub chunks: Vec<Chunk>,
}

impl Batch {
    /// Adds a sequence's next tokens.
    pub fn push(&mut self, start: usize, tokens: &[Token], wants: Wants, blocks: &[u32]) {
        assert!(!tokens.is_empty(), "a chunk has tokens");
        let blocks = blocks[..(start + tokens.len()).div_ceil(TOKENS)].to_vec();
        self.tokens.extend_from_slice(tokens);
        self.chunks.push(Chunk { start, tokens: tokens.len(), wants, blocks });
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

impl Drop for Logits {
    fn drop(&mut self) {
        ops::cpu::memory::spare(std::mem::take(&mut self.values));
    }
}

/// A causal language model with its cache. Owned by one thread.
pub trait CausalLm: Send {
    /// Computes a step: changes the cache as the batch says, adds each chunk's tokens to it, and returns the wanted logits.
    ///
    /// A table with blocks that the cache does not have is a bug of the planner and panics.
    fn forward(&mut self, batch: &Batch) -> Logits;
    /// Like `forward`, but gives the step up soon after `stop` is set (`None`). Blocks are cleared and copied all the same;
    /// what else it has written, whoever computes the same tokens writes again. One that cannot stop need not.
    fn forward_unless(&mut self, batch: &Batch, stop: &AtomicBool) -> Option<Logits> {
        let _ = stop;
        Some(self.forward(batch))
    }
    /// Memory that the weights take.
    fn weight_bytes(&self) -> usize;
}

/// How a model is kept and computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub device: Device,
    /// How weights are kept.
    pub format: Format,
    /// How finely activations are rounded for integer weights, on the path of kernels.
    pub activations: Activations,
    pub path: ops::Path,
    /// How keys and values are kept.
    pub cache: CacheFormat,
    /// Memory for keys and values.
    pub cache_bytes: u64,
    /// Tokens of prompt and answer together at most; 0: what the model was made for, if the cache holds as much.
    pub max_context: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            format: Format::Int4,
            activations: Activations::Auto,
            path: ops::Path::Kernels(Isa::best()),
            cache: CacheFormat::F16,
            cache_bytes: CACHE_BYTES,
            max_context: 0,
        }
    }
}

impl Options {
    /// Reads a deployment's wishes.
    pub fn of(options: &EngineOptions) -> Result<Self, Error> {
        let forced = |isa: Isa| match isa.available() {
            true => Ok(ops::Path::Kernels(isa)),
            false => Err(Error::Kernels(isa.name())),
        };
        Ok(Self {
            device: options.device,
            activations: options.activations,
            format: match options.quant {
                Quant::F32 => Format::F32,
                Quant::F16 => Format::F16,
                Quant::Int8 => Format::Int8,
                Quant::Int4 => Format::Int4,
            },
            path: match options.kernels {
                _ if options.device != Device::Cpu => ops::Path::Reference,
                Kernels::Auto => ops::Path::Kernels(Isa::best()),
                Kernels::Reference => ops::Path::Reference,
                Kernels::Portable => forced(Isa::Portable)?,
                Kernels::Avx2 => forced(Isa::Avx2)?,
                Kernels::Avx512 => forced(Isa::Avx512)?,
            },
            cache: match options.cache {
                CacheType::F16 => CacheFormat::F16,
                CacheType::F32 => CacheFormat::F32,
            },
            cache_bytes: options.cache_budget(),
            max_context: options.max_context as usize,
        })
    }
    fn ops(&self) -> Result<Ops, Error> {
        match self.device {
            Device::Cpu => Ok(Ops::cpu(self.path)),
            Device::Cuda(index) => Ops::cuda(index).map_err(Error::Device),
        }
    }
    /// Rows of the steps that are computed before the first request. A card's kernels are made when they are first used.
    pub fn warm_up(&self) -> &'static [usize] {
        match self.device {
            Device::Cpu => &[2],
            Device::Cuda(_) => &[512, 32, 8, 2, 1],
        }
    }
}

/// A model that is loaded, and what a planner must know of it.
pub struct Loaded {
    pub model: Box<dyn CausalLm>,
    /// Tokens of prompt and answer together at most.
    pub context: usize,
    pub vocabulary: usize,
    /// Tokens that end an answer.
    pub eos: Vec<Token>,
    /// Blocks that the cache has.
    pub blocks: usize,
    /// Rows of the steps that must be computed before the first request.
    pub warm_up: &'static [usize],
}

/// Why a model cannot be loaded. Each names the file or the tensor or the key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{file} cannot be used")]
    Gguf { file: String, source: izar_common::gguf::Error },
    #[error("{file} cannot be used")]
    Safetensors { file: String, source: izar_common::safetensors::Error },
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
    #[error(
        "cache_bytes: {budget} bytes hold {holds} tokens of keys and values, but one sequence may have {context}: give \
         {needs} bytes, or a smaller max_context"
    )]
    Cache { budget: u64, holds: usize, context: usize, needs: u64 },
    #[error("kernels {0}: this processor does not have their instructions; say auto")]
    Kernels(&'static str),
    #[error(transparent)]
    Device(ops::cuda::Error),
    #[error("the model's manifest says {what} {manifest}, its files say {files}")]
    Manifest { what: &'static str, manifest: String, files: String },
}

/// Loads a model's weights. `files` are where the manifest's files lie, in its order. Not for echo, which has none.
pub fn load(manifest: &Manifest, files: &[PathBuf], options: &Options) -> Result<Loaded, Error> {
    let named: Vec<(&str, &Path)> =
        manifest.files.iter().map(|f| f.name.as_str()).zip(files.iter().map(PathBuf::as_path)).collect();
    // A device that cannot be used is said so before gigabytes are read.
    options.ops()?;
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
    let eos = source.eos()?;
    Ok(Loaded { eos, ..build(&config, &source, options)? })
}

/// Builds the decoder that the configuration asks for; what ends an answer is not its concern.
pub fn build(config: &Config, source: &Source, options: &Options) -> Result<Loaded, Error> {
    let ops = options.ops()?;
    let (context, blocks) = room(config, options)?;
    let model = Box::new(Decoder::load(config, source, options, ops, blocks)?);
    Ok(Loaded { model, context, vocabulary: config.vocabulary, eos: Vec::new(), blocks, warm_up: options.warm_up() })
}

/// How many tokens a sequence may have, and how many blocks the budget holds.
fn room(config: &Config, options: &Options) -> Result<(usize, usize), Error> {
    let block_bytes = (config.layers * attention::block_bytes(config, options.cache)) as u64;
    let blocks = usize::try_from(options.cache_bytes / block_bytes).unwrap_or(usize::MAX).min(u32::MAX as usize);
    let holds = blocks.saturating_mul(TOKENS);
    let context = match options.max_context {
        // Nobody asked for the model's whole context: what the budget holds will do.
        0 => config.context.min(holds),
        asked => config.context.min(asked),
    };
    if context > holds || context < TOKENS.min(config.context) {
        let context = context.max(TOKENS);
        let needs = context.div_ceil(TOKENS) as u64 * block_bytes;
        return Err(Error::Cache { budget: options.cache_bytes, holds, context, needs });
    }
    Ok((context, blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_rows_are_counted_over_chunks() {
        let mut batch = Batch::default();
        batch.push(0, &[1, 2, 3], Wants::Nothing, &[0]);
        batch.push(31, &[4], Wants::Last, &[1, 2, 9]);
        batch.push(0, &[5, 6], Wants::All, &[3]);
        batch.push(0, &[7, 8], Wants::Last, &[4]);
        assert_eq!(batch.wanted(), [3, 4, 5, 7]);
        assert_eq!(batch.chunks[1].blocks, [1, 2], "the table ends with the tokens");
    }
}
