//! Weights by their canonical names, as f32 rows or as ggml's blocks, whatever file they lie in.
//!
//! Canonical names and row orders are those of Hugging Face checkpoints. Each tensor is read when it is asked for, so
//! that loading never holds the file and the model at once; shapes are the caller's claim and are checked; a value
//! that is not finite is refused, for it would poison every answer.

mod container;
mod folder;

use std::path::{Path, PathBuf};

use izar_common::chat::Token;
use izar_common::gguf::GgmlType;
use izar_common::{gguf, text};

use super::Error;
use super::config::Config;
use container::Container;
pub use folder::Folder;

/// Where a model's weights and configuration lie.
pub enum Source {
    Gguf { name: String, file: gguf::File },
    Safetensors(Folder),
}

/// A matrix in ggml's blocks, its rows in canonical order.
///
/// Each row is `columns / kind.block_elements()` blocks; every scale and minimum is finite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Q4_0, Q4_1 or Q8_0.
    pub kind: GgmlType,
    pub bytes: Vec<u8>,
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
        Folder::open(files).map(Self::Safetensors)
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
            Self::Safetensors(folder) => folder.config(),
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
            Self::Gguf { name: of, file } => Container { name: of, file }.has(name),
            Self::Safetensors(folder) => folder.has(name),
        }
    }

    /// Reads a tensor of this name and shape, row after row.
    pub fn rows(&self, config: &Config, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let values = match self {
            Self::Gguf { name: of, file } => Container { name: of, file }.rows(config, name, shape)?,
            Self::Safetensors(folder) => folder.rows(name, shape)?,
        };
        match not_finite(&values) {
            Some(at) => Err(self.bad(name, format!("holds {} at element {at}", values[at]))),
            None => Ok(values),
        }
    }

    /// Reads a matrix of this name and shape in the blocks that it is stored in, so that a packer can take over scales
    /// and integers exactly; `None` where it is not stored in Q4_0, Q4_1 or Q8_0, and [`Source::rows`] is the way.
    pub fn blocks(&self, config: &Config, name: &str, shape: &[usize]) -> Result<Option<Blocks>, Error> {
        let Self::Gguf { name: of, file } = self else { return Ok(None) };
        Container { name: of, file }.blocks(config, name, shape)
    }

    /// Reads the divisors of rotary frequencies that some GGUF files carry (Llama 3.1), if there are any.
    pub fn rope_divisors(&self, pairs: usize) -> Result<Option<Vec<f32>>, Error> {
        const DIVISORS: &str = "rope_freqs.weight";
        let Self::Gguf { name, file } = self else { return Ok(None) };
        if file.tensor(DIVISORS).is_none() {
            return Ok(None);
        }
        let values = Container { name, file }.values(DIVISORS, &[pairs])?;
        let good = values.iter().all(|v| v.is_finite() && *v > 0.0);
        if good { Ok(Some(values)) } else { Err(self.bad(DIVISORS, "holds what is not positive".into())) }
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
            Self::Safetensors(folder) => folder.entries(),
        }
    }

    fn bad(&self, tensor: &str, reason: String) -> Error {
        let file = match self {
            Self::Gguf { name, .. } => name.clone(),
            Self::Safetensors(folder) => folder.file_of(tensor).to_owned(),
        };
        Error::Tensor { file, tensor: tensor.to_owned(), reason }
    }
}

/// Where the first value lies that is not finite. Looks at whole pieces first: in a good model that is all.
fn not_finite(values: &[f32]) -> Option<usize> {
    const PIECE: usize = 4096;
    // The exponent of what is not finite is all ones, and so above every other.
    let good =
        |piece: &[f32]| piece.iter().fold(0, |most, v| most.max(v.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits();
    let piece = values.chunks(PIECE).position(|piece| !good(piece))?;
    let inside = values[piece * PIECE..].iter().position(|v| !v.is_finite())?;
    Some(piece * PIECE + inside)
}

#[cfg(test)]
mod tests;
