//! A model without an engine around it: the logits of every position of a text, for comparing forms of its weights.

use anyhow::Context;
use izar_common::chat::Token;
use izar_common::wire::agent::{CacheType, EngineOptions, Quant};

use super::arguments::EngineArguments;
use super::local::Local;
use crate::model::{self, Batch, CausalLm, Wants};
use crate::ops::TOKENS;
use crate::ops::cpu::pool;

/// Positions that are computed at once: 128 rows of 150,000 logits are 77 MB.
const CHUNK: usize = 128;

/// A model, and threads to compute it.
pub struct Plain {
    model: Box<dyn CausalLm>,
    /// For Burn's own operations; kernels have the process's pool.
    threads: rayon::ThreadPool,
    context: usize,
}

impl Plain {
    /// Loads a model's weights.
    pub fn load(local: &Local, options: &EngineOptions) -> anyhow::Result<Self> {
        let context = || format!("load {}", local.path.display());
        pool::start(&pool::Threads::any(options.threads as usize));
        let threads = rayon::ThreadPoolBuilder::new().num_threads(options.threads as usize).build();
        let threads = threads.context("start threads")?;
        let how = model::Options::of(options).with_context(context)?;
        let loaded = threads.install(|| model::load(&local.manifest, &local.files, &how)).with_context(context)?;
        Ok(Self { model: loaded.model, threads, context: loaded.context })
    }
    /// Loads them as nothing is rounded: what the others are compared with.
    pub fn exact(local: &Local, engine: &EngineArguments) -> anyhow::Result<Self> {
        let options = engine.options(Quant::F32, 1);
        // Twice the bytes for as many tokens.
        let cache_bytes = options.cache_budget() * 2;
        Self::load(local, &EngineOptions { cache: CacheType::F32, cache_bytes, ..options })
    }

    /// Bytes that the weights take.
    pub fn weights_bytes(&self) -> u64 {
        self.model.weight_bytes() as u64
    }

    /// Computes a text and calls `row` with each position and the logits of the token after it.
    pub fn read(&mut self, tokens: &[Token], mut row: impl FnMut(usize, &[f32])) -> anyhow::Result<()> {
        let (length, context) = (tokens.len(), self.context);
        anyhow::ensure!(length <= context, "a text has {length} tokens, the context holds {context}");
        let blocks: Vec<u32> = (0..length.div_ceil(TOKENS) as u32).collect();
        let mut start = 0;
        for chunk in tokens.chunks(CHUNK) {
            let mut batch = Batch::default();
            batch.push(start, chunk, Wants::All, &blocks);
            let logits = self.threads.install(|| self.model.forward(&batch));
            logits.rows().enumerate().for_each(|(at, logits)| row(start + at, logits));
            start += chunk.len();
        }
        Ok(())
    }
}

/// The likeliest token, the lowest among equals.
pub fn best(logits: &[f32]) -> Token {
    let better = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (0..logits.len()).reduce(better).unwrap_or_default() as Token
}

/// The two likeliest tokens.
pub fn two_best(logits: &[f32]) -> [Token; 2] {
    let first = best(logits) as usize;
    let others = (0..logits.len()).filter(|at| *at != first);
    let second = others.reduce(|best, at| if logits[at] > logits[best] { at } else { best });
    [first as Token, second.unwrap_or(first) as Token]
}

/// How unlikely a token is: the negative logarithm of its probability.
pub fn surprise(logits: &[f32], token: Token) -> f64 {
    let largest = f64::from(logits[best(logits) as usize]);
    let sum: f64 = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
    sum.ln() + largest - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_are_those_of_a_softmax() {
        let logits = [0.0, 2.0_f32.ln(), 2.0_f32.ln(), -f32::INFINITY];
        assert_eq!((best(&logits), two_best(&logits), two_best(&[1.0, 3.0, 2.0])), (1, [1, 2], [1, 2]));
        assert!((surprise(&logits, 0) - 5.0_f64.ln()).abs() < 1e-6);
        assert!((surprise(&logits, 2) - 2.5_f64.ln()).abs() < 1e-6);
        assert_eq!(surprise(&logits, 3), f64::INFINITY);
    }
}
