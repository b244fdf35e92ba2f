//! How a benchmark's engine runs its model: the options of a deployment as words of the command line.

use clap::Args;
use izar_common::wire::agent::{Activations, CacheType, Device, EngineOptions, Kernels, Quant};

use crate::ops::cpu::isa::Isa;

/// Megabytes (2^20 bytes) of cache at most: what no machine has.
const CACHE_MB_LIMIT: u64 = 1 << 24;

/// How an engine runs its model, whatever the form of its weights.
#[derive(Debug, Clone, Args)]
pub struct EngineArguments {
    /// Threads that compute [default: all cores]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub threads: u32,
    /// What holds the model and computes it: cpu, or cuda:0 for the first card
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// How finely activations are rounded before a product with integer weights: auto, int8 or int16
    #[arg(long, default_value = "auto")]
    pub activations: Activations,
    /// What computes: auto, reference, portable, avx2 or avx512
    #[arg(long, default_value = "auto")]
    pub kernels: Kernels,
    /// How keys and values are kept: f16 or f32
    #[arg(long, default_value = "f16")]
    pub cache_type: CacheType,
    /// Memory for keys and values in MiB [default: 512]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(u64).range(..=CACHE_MB_LIMIT))]
    pub cache_mb: u64,
    /// Most tokens of prompt and answer together [default: what the model was made for, if the cache holds as much]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub max_context: u32,
}

impl EngineArguments {
    /// The options of an engine for so many streams.
    pub fn options(&self, quant: Quant, streams: usize) -> EngineOptions {
        EngineOptions {
            max_batch: streams as u32,
            max_context: self.max_context,
            threads: self.threads,
            device: self.device,
            quant,
            activations: self.activations,
            kernels: self.kernels,
            cache: self.cache_type,
            cache_bytes: self.cache_mb << 20,
        }
    }
    /// Threads that compute.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads as usize,
        }
    }
    /// What computes, by name.
    pub fn kernels(&self) -> &'static str {
        match self.kernels {
            _ if self.device != Device::Cpu => Kernels::Reference.as_str(),
            Kernels::Auto => Isa::best().name(),
            forced => forced.as_str(),
        }
    }
}
