//! A checkpoint in Hugging Face form: JSON files, and tensors in one or more safetensors files.

use std::collections::HashMap;
use std::path::Path;

use half::bf16;
use izar_common::chat::Token;
use izar_common::safetensors::{Checkpoint, Dtype, Fault, INDEX};
use serde_json::Value;

use super::Entry;
use crate::model::Error;
use crate::model::config::{self, Config};
use crate::model::gguf::blocks::halves;

/// Largest JSON file of a model folder that is read here; configurations have a few kilobytes, and the largest known
/// index has 12 MB.
const JSON_LIMIT: u64 = 64 << 20;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

/// A checkpoint's folder, opened and checked.
pub struct Folder {
    json: HashMap<String, Vec<u8>>,
    tensors: Checkpoint,
}

impl Folder {
    pub fn open(files: &[(&str, &Path)]) -> Result<Self, Error> {
        let mut json = HashMap::new();
        for (name, path) in files.iter().filter(|(name, _)| [CONFIG, GENERATION, INDEX].contains(name)) {
            json.insert((*name).to_owned(), read_json(name, path)?);
        }
        let tensors: Vec<_> = files.iter().copied().filter(|(name, _)| name.ends_with(".safetensors")).collect();
        if tensors.is_empty() {
            return Err(Error::NoFile("*.safetensors".into()));
        }
        let index = json.remove(INDEX);
        Ok(Self { json, tensors: Checkpoint::open(&tensors, index.as_deref()).map_err(safetensors)? })
    }

    pub fn config(&self) -> Result<Config, Error> {
        let text = self.json.get(CONFIG).ok_or_else(|| Error::NoFile(CONFIG.into()))?;
        Config::from_json(CONFIG, text)
    }
    /// The tokens that end an answer, by both JSON files.
    pub fn eos(&self) -> Result<Vec<Token>, Error> {
        let mut eos = Vec::new();
        for (file, text) in &self.json {
            let value: Value = serde_json::from_slice(text)
                .map_err(|e| Error::Format { file: file.clone(), reason: format!("not JSON: {e}") })?;
            eos.extend(config::tokens(value.get("eos_token_id")));
        }
        Ok(eos)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.tensor(name).is_some()
    }
    /// The file that holds a tensor, or any of them.
    pub fn file_of(&self, tensor: &str) -> &str {
        self.tensors.tensor(tensor).map_or("*.safetensors", |(file, _)| file)
    }
    pub fn rows(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let bad = |reason: String| {
            let (file, tensor) = (self.file_of(name).to_owned(), name.to_owned());
            Error::Tensor { file, tensor, reason }
        };
        let (_, tensor) = self.tensors.tensor(name).ok_or_else(|| bad("is missing".into()))?;
        if !tensor.shape.iter().copied().eq(shape.iter().map(|n| *n as u64)) {
            return Err(bad(format!("has shape {:?}, the configuration asks for {shape:?}", tensor.shape)));
        }
        let bytes = || self.tensors.data(name).map_err(safetensors);
        match tensor.dtype {
            Dtype::F32 => Ok(bytes()?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::F16 => Ok(halves(&bytes()?)),
            Dtype::BF16 => Ok(bytes()?.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
            other => Err(bad(format!("is stored as {other}; supported are F32, F16, BF16"))),
        }
    }
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |t: &izar_common::safetensors::Tensor| {
            let (name, kind) = (t.name.clone(), t.dtype.to_string());
            Entry { name, kind, elements: t.elements(), bytes: t.bytes }
        };
        self.tensors.tensors().map(entry).collect()
    }
}

fn safetensors(fault: Fault) -> Error {
    Error::Safetensors { file: fault.file, source: fault.source }
}

fn read_json(name: &str, path: &Path) -> Result<Vec<u8>, Error> {
    let read = |source| Error::Read { file: name.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(read)?.len();
    if bytes > JSON_LIMIT {
        let reason = format!("{bytes} bytes, over the limit of {JSON_LIMIT}");
        return Err(Error::Format { file: name.to_owned(), reason });
    }
    std::fs::read(path).map_err(read)
}
