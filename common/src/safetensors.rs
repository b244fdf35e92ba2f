//! safetensors, the many-file form of a model: reads a file's directory of tensors, and gives tensors as raw bytes.
//!
//! A model file is input from outside: every count, shape and range is checked against the file, errors name the
//! tensor, and no bytes make this panic. What the format's own library checks is checked here too, but it does not say
//! which tensor is wrong; tests hold the two against each other.
//! Source: the description at huggingface/safetensors, `README.md`, "Format".

mod checkpoint;
mod header;

use std::collections::HashMap;
use std::path::Path;

use crate::source::Source;
pub use checkpoint::{Checkpoint, Fault, INDEX};
pub use header::Dtype;

/// Why a file cannot be used. Names the tensor, not the file: that is the caller's to add.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read")]
    Read(#[source] std::io::Error),
    #[error("truncated or corrupt: {0}")]
    Corrupt(String),
    #[error("there is no tensor `{0}`")]
    NoTensor(String),
    /// The files contradict each other or their index.
    #[error("{0}")]
    Contradiction(String),
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    /// Elements along each axis, the outermost first.
    pub shape: Vec<u64>,
    /// Where its bytes begin, counted from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

impl Tensor {
    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        self.bytes / self.dtype.bytes()
    }
}

/// A file whose directory is read and checked.
#[derive(Debug)]
pub struct File {
    source: Source,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl File {
    /// Opens a file and reads all but the tensors' data.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = std::fs::File::open(path).map_err(Error::Read)?;
        let length = file.metadata().map_err(Error::Read)?.len();
        let tensors = header::read(&file, length)?;
        Ok(Self::new(Source::Disk(file), tensors))
    }
    /// Takes a file that is in memory already (tests).
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        let tensors = header::read(&bytes[..], bytes.len() as u64)?;
        Ok(Self::new(Source::Memory(bytes), tensors))
    }
    fn new(source: Source, tensors: Vec<Tensor>) -> Self {
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Self { source, tensors, by_name }
    }

    /// The directory, in the order of the data.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &Tensor> {
        self.tensors.iter()
    }
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }
    /// Reads one tensor's bytes.
    pub fn data(&self, name: &str) -> Result<Vec<u8>, Error> {
        let tensor = self.tensor(name).ok_or_else(|| Error::NoTensor(name.to_owned()))?;
        self.source.read(tensor.offset, tensor.bytes).map_err(Error::Read)
    }
}

#[cfg(test)]
mod tests;
