//! Weights by their canonical names, as f32 rows, whatever file they lie in.
//!
//! Canonical names and row orders are those of Hugging Face checkpoints. Each tensor is read when it is asked for, so
//! that loading never holds the file and the model at once; shapes are the caller's claim and are checked; a value
//! that is not finite is refused, for it would poison every answer.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use izar_common::chat::Token;
use izar_common::{gguf, text};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;

use super::config::{self, Config, Family};
use super::{Error, gguf as ggml};

/// Largest header of a safetensors file, the same limit as the format's own library has.
const HEADER_LIMIT: u64 = 100_000_000;

/// Largest JSON file of a model folder that is read here; real ones have a few kilobytes.
const JSON_LIMIT: u64 = 4 << 20;

/// Where a model's weights and configuration lie.
pub enum Source {
    Gguf { name: String, file: gguf::File },
    Safetensors(Folder),
}

/// A checkpoint in Hugging Face form: JSON files, and tensors in one or more files.
pub struct Folder {
    json: HashMap<String, Vec<u8>>,
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    by_name: HashMap<String, usize>,
}

/// One safetensors file whose header is read and checked.
struct TensorFile {
    name: String,
    file: File,
    metadata: Metadata,
    /// Where tensor data begins.
    data: u64,
}

/// A tensor as `inspect` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub kind: String,
    pub elements: u64,
    pub bytes: u64,
}

impl Source {
    /// Opens a GGUF file. `name` is what errors call it.
    pub fn gguf(name: &str, path: &Path) -> Result<Self, Error> {
        let file = gguf::File::open(path).map_err(|source| Error::Gguf { file: name.to_owned(), source })?;
        Ok(Self::Gguf { name: name.to_owned(), file })
    }

    /// Opens the files of a checkpoint, each with the name it has in its folder.
    pub fn safetensors(files: &[(&str, &Path)]) -> Result<Self, Error> {
        let mut folder = Folder { json: HashMap::new(), files: Vec::new(), by_name: HashMap::new() };
        for (name, path) in files {
            if name.ends_with(".safetensors") {
                folder.add(TensorFile::open(name, path)?)?;
            } else if ["config.json", "generation_config.json"].contains(name) {
                folder.json.insert((*name).to_owned(), read_json(name, path)?);
            }
        }
        if folder.files.is_empty() {
            return Err(Error::NoFile("*.safetensors".into()));
        }
        Ok(Self::Safetensors(folder))
    }

    /// Opens a GGUF file or a folder.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        if !path.is_dir() {
            return Self::gguf(&name, path);
        }
        let read = |source| Error::Read { file: name.clone(), source };
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(path).map_err(read)? {
            paths.push(entry.map_err(read)?.path());
        }
        paths.sort();
        let named: Vec<(&str, &Path)> =
            paths.iter().filter_map(|p| Some((p.file_name()?.to_str()?, p.as_path()))).collect();
        Self::safetensors(&named)
    }

    /// Reads the model's shape.
    pub fn config(&self) -> Result<Config, Error> {
        match self {
            Self::Gguf { name, file } => Config::from_gguf(name, file),
            Self::Safetensors(folder) => {
                let text = folder.json.get("config.json").ok_or_else(|| Error::NoFile("config.json".into()))?;
                Config::from_json("config.json", text)
            }
        }
    }

    /// The tokens that end an answer.
    pub fn eos(&self) -> Result<Vec<Token>, Error> {
        let mut eos = match self {
            Self::Gguf { name, file } => {
                let bundle = text::Bundle::from_gguf(file);
                bundle.map_err(|source| Error::Text { file: name.clone(), source })?.eos
            }
            Self::Safetensors(folder) => folder.eos()?,
        };
        eos.sort_unstable();
        eos.dedup();
        Ok(eos)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Gguf { file, .. } => ggml::name(name).is_some_and(|name| file.tensor(&name).is_some()),
            Self::Safetensors(folder) => folder.by_name.contains_key(name),
        }
    }

    /// Reads a tensor of this name and shape, row after row.
    pub fn rows(&self, config: &Config, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let values = match self {
            Self::Gguf { name: file_name, file } => gguf_rows(config, file_name, file, name, shape)?,
            Self::Safetensors(folder) => folder.rows(name, shape)?,
        };
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(self.bad(name, format!("holds {} at element {at}", values[at]))),
            None => Ok(values),
        }
    }

    /// Reads the divisors of rotary frequencies that some GGUF files carry (Llama 3.1), if there are any.
    pub fn rope_divisors(&self, pairs: usize) -> Result<Option<Vec<f32>>, Error> {
        let Self::Gguf { name, file } = self else { return Ok(None) };
        if file.tensor("rope_freqs.weight").is_none() {
            return Ok(None);
        }
        let values = ggml_values(name, file, "rope_freqs.weight", &[pairs])?;
        let good = values.iter().all(|v| v.is_finite() && *v > 0.0);
        if good { Ok(Some(values)) } else { Err(self.bad("rope_freqs.weight", "holds what is not positive".into())) }
    }

    /// Every tensor, as it lies in the file.
    pub fn entries(&self) -> Vec<Entry> {
        match self {
            Self::Gguf { file, .. } => {
                let entry = |t: &gguf::Tensor| {
                    let (name, kind) = (t.name.clone(), t.ggml_type.to_string());
                    Entry { name, kind, elements: t.elements(), bytes: t.bytes }
                };
                file.tensors().map(entry).collect()
            }
            Self::Safetensors(folder) => folder.files.iter().flat_map(TensorFile::entries).collect(),
        }
    }

    fn bad(&self, tensor: &str, reason: String) -> Error {
        let file = match self {
            Self::Gguf { name, .. } => name.clone(),
            Self::Safetensors(folder) => folder.file_of(tensor).map(|f| f.name.clone()).unwrap_or_default(),
        };
        Error::Tensor { file, tensor: tensor.to_owned(), reason }
    }
}

/// Reads a tensor by ggml's own name; `shape` is ours, outermost axis first.
fn ggml_values(file_name: &str, file: &gguf::File, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
    let bad = |reason: String| Error::Tensor { file: file_name.to_owned(), tensor: name.to_owned(), reason };
    let tensor = file.tensor(name).ok_or_else(|| bad("is missing".into()))?;
    let found: Vec<usize> = tensor.dims.iter().rev().map(|d| *d as usize).collect();
    if found != shape {
        return Err(bad(format!("has shape {found:?}, the configuration asks for {shape:?}")));
    }
    let kind = tensor.ggml_type;
    let (_, bytes) = file.data(name).map_err(|source| Error::Gguf { file: file_name.to_owned(), source })?;
    ggml::dequantize(kind, &bytes)
        .ok_or_else(|| bad(format!("is stored as {kind}; supported are F32, F16, BF16, Q4_0, Q4_1, Q8_0")))
}

fn gguf_rows(
    config: &Config,
    file_name: &str,
    file: &gguf::File,
    canonical: &str,
    shape: &[usize],
) -> Result<Vec<f32>, Error> {
    let name = ggml::name(canonical).unwrap_or_else(|| canonical.to_owned());
    let values = ggml_values(file_name, file, &name, shape)?;
    let columns = shape.get(1).copied().unwrap_or(1);
    let heads = match canonical {
        _ if config.family != Family::Llama => return Ok(values),
        _ if canonical.contains("self_attn.q_proj.") => config.heads,
        _ if canonical.contains("self_attn.k_proj.") => config.kv_heads(),
        _ => return Ok(values),
    };
    Ok(ggml::uninterleave(&values, heads, columns))
}

impl Folder {
    fn add(&mut self, file: TensorFile) -> Result<(), Error> {
        let index = self.files.len();
        for tensor in file.metadata.offset_keys() {
            if self.by_name.insert(tensor.clone(), index).is_some() {
                return Err(Error::Tensor { file: file.name, tensor, reason: "is in another file too".into() });
            }
        }
        self.files.push(file);
        Ok(())
    }
    fn file_of(&self, tensor: &str) -> Option<&TensorFile> {
        self.by_name.get(tensor).map(|&i| &self.files[i])
    }
    fn rows(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let Some(file) = self.file_of(name) else {
            let (file, tensor) = ("*.safetensors".to_owned(), name.to_owned());
            return Err(Error::Tensor { file, tensor, reason: "is missing".into() });
        };
        let bad = |reason| Error::Tensor { file: file.name.clone(), tensor: name.to_owned(), reason };
        let info = file.metadata.info(name).expect("the index was made from the metadata");
        if info.shape != shape {
            return Err(bad(format!("has shape {:?}, the configuration asks for {shape:?}", info.shape)));
        }
        let bytes = file.data(info)?;
        floats(info.dtype, &bytes)
            .ok_or_else(|| bad(format!("is stored as {}; supported are F32, F16, BF16", info.dtype)))
    }
    fn eos(&self) -> Result<Vec<Token>, Error> {
        let mut eos = Vec::new();
        for (file, text) in &self.json {
            let value: Value = serde_json::from_slice(text)
                .map_err(|e| Error::Format { file: file.clone(), reason: format!("not JSON: {e}") })?;
            eos.extend(config::tokens(value.get("eos_token_id")));
        }
        Ok(eos)
    }
}

impl TensorFile {
    /// Reads and checks the header; the ranges that it names lie in the file, side by side.
    fn open(name: &str, path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { file: name.to_owned(), source };
        let format = |reason: String| Error::Format { file: name.to_owned(), reason };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 0).map_err(|_| format("too short for a safetensors file".into()))?;
        let header = u64::from_le_bytes(size);
        if header > HEADER_LIMIT.min(length - 8) {
            return Err(format(format!("truncated or not a safetensors file: a header of {header} bytes")));
        }
        let mut text = vec![0; header as usize];
        file.read_exact_at(&mut text, 8).map_err(read)?;
        let metadata: Metadata = serde_json::from_slice(&text).map_err(|e| format(format!("damaged header: {e}")))?;
        let (data, want) = (8 + header, metadata.data_len() as u64);
        if length - data != want {
            let has = length - data;
            return Err(format(format!("truncated or damaged: {has} bytes of tensors where the header names {want}")));
        }
        Ok(Self { name: name.to_owned(), file, metadata, data })
    }
    fn data(&self, info: &TensorInfo) -> Result<Vec<u8>, Error> {
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file
            .read_exact_at(&mut bytes, self.data + start as u64)
            .map_err(|source| Error::Read { file: self.name.clone(), source })?;
        Ok(bytes)
    }
    fn entries(&self) -> Vec<Entry> {
        let entry = |name: String| {
            let info = self.metadata.info(&name).expect("the name comes from the metadata");
            let elements = info.shape.iter().product::<usize>() as u64;
            let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
            Entry { name, kind: info.dtype.to_string(), elements, bytes }
        };
        self.metadata.offset_keys().into_iter().map(entry).collect()
    }
}

fn floats(kind: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match kind {
        Dtype::F32 => Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F16 => Some(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Dtype::BF16 => Some(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        _ => None,
    }
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

#[cfg(test)]
mod tests;
