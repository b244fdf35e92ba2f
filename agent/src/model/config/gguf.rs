//! GGUF metadata: keys under the architecture's name.

use std::cell::RefCell;
use std::collections::BTreeSet;

use izar_common::gguf;

use super::{Config, Family, SIZE_LIMIT, Scaling};
use crate::model::Error;

/// Keys of GGUF metadata, after the architecture's name, that do not change what is computed here.
const HARMLESS: &[&str] = &["vocab_size", "rope.dimension_count", "attention.value_length"];

impl Config {
    /// Reads GGUF metadata.
    pub fn from_gguf(name: &str, file: &gguf::File) -> Result<Self, Error> {
        let keys = Keys { name, file, used: RefCell::default() };
        let family = keys.family()?;
        let hidden = keys.size("embedding_length")?;
        let heads = keys.size("attention.head_count")?;
        let vocabulary = file.meta("tokenizer.ggml.tokens").and_then(|v| v.as_array()).map(<[_]>::len);
        let config = Self {
            family,
            vocabulary: vocabulary.ok_or_else(|| keys.bad("tokenizer.ggml.tokens", "is missing"))?,
            context: keys.size("context_length")?,
            layers: keys.size("block_count")?,
            hidden,
            intermediate: keys.size("feed_forward_length")?,
            heads,
            kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: keys.optional_size("attention.key_length")?.unwrap_or(hidden / heads),
            norm_epsilon: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
            rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: keys.scaling()?,
            tied: file.tensor("output.weight").is_none(),
        };
        for key in ["rope.dimension_count", "attention.value_length"] {
            if keys.optional_size(key)?.is_some_and(|n| n != config.head_dim) {
                return Err(keys.bad(&keys.full(key), "differs from the size of a head, which is not supported"));
            }
        }
        keys.refuse_unknown()?;
        config.check(|key, reason| keys.bad(key, reason))?;
        Ok(config)
    }
}

/// The metadata keys of one architecture, that remember which were read.
struct Keys<'a> {
    name: &'a str,
    file: &'a gguf::File,
    used: RefCell<BTreeSet<String>>,
}

impl Keys<'_> {
    fn bad(&self, key: &str, reason: &str) -> Error {
        Error::Key { file: self.name.to_owned(), key: key.to_owned(), reason: reason.to_owned() }
    }
    fn family(&self) -> Result<Family, Error> {
        let key = "general.architecture";
        let name = self.file.str(key).map_err(|e| self.gguf(e))?;
        Family::from_name(name).map_err(|reason| self.bad(key, &reason))
    }
    fn gguf(&self, source: gguf::Error) -> Error {
        Error::Gguf { file: self.name.to_owned(), source }
    }
    /// The whole key, with the architecture before it.
    fn full(&self, key: &str) -> String {
        let architecture = self.file.str("general.architecture").unwrap_or_default();
        format!("{architecture}.{key}")
    }
    fn find(&self, key: &str) -> Option<String> {
        let full = self.full(key);
        self.used.borrow_mut().insert(full.clone());
        self.file.meta(&full).is_some().then_some(full)
    }
    fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(full) = self.find(key) else { return Ok(None) };
        let size = self.file.u64(&full).map_err(|e| self.gguf(e))?;
        let size = usize::try_from(size).ok().filter(|n| (1..=SIZE_LIMIT).contains(n));
        size.map(Some).ok_or_else(|| self.bad(&full, &format!("is not a number from 1 to {SIZE_LIMIT}")))
    }
    fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.bad(&self.full(key), "is missing"))
    }
    fn number(&self, key: &str) -> Result<Option<f32>, Error> {
        self.find(key).map(|full| self.file.f32(&full).map_err(|e| self.gguf(e))).transpose()
    }
    fn scaling(&self) -> Result<Scaling, Error> {
        let factor = self.number("rope.scaling.factor")?;
        let Some(full) = self.find("rope.scaling.type") else { return Ok(Scaling::None) };
        match (self.file.str(&full).map_err(|e| self.gguf(e))?, factor) {
            ("none", _) => Ok(Scaling::None),
            ("linear", Some(factor)) if factor > 0.0 => Ok(Scaling::Linear { factor }),
            ("linear", _) => Err(self.bad(&self.full("rope.scaling.factor"), "is missing or not positive")),
            (other, _) => Err(self.bad(&full, &format!("is \"{other}\"; supported are none, linear"))),
        }
    }
    fn refuse_unknown(&self) -> Result<(), Error> {
        let used = self.used.borrow();
        let prefix = self.full("");
        let neutral = |value: &gguf::Value| value.as_f64() == Some(0.0) || value.as_bool() == Some(false);
        let mut unknown = self.file.metadata().filter(|(key, value)| {
            let ours = key.strip_prefix(&prefix);
            ours.is_some_and(|key| !HARMLESS.contains(&key)) && !used.contains(*key) && !neutral(value)
        });
        match unknown.next() {
            Some((key, _)) => Err(self.bad(key, "is not supported")),
            None => Ok(()),
        }
    }
}
