//! GGUF, the one-file form of a model: reads its metadata and its directory of tensors, and gives tensors as raw bytes.
//!
//! A model file is input from outside: every count, length and range is checked against the file before memory is
//! taken for it, and no bytes make this panic. Nothing is dequantized here.
//! Source: ggml's `docs/gguf.md`, versions 2 and 3 (little-endian).

mod parse;
mod types;
mod write;

use std::collections::HashMap;
use std::io::{BufReader, Cursor};
use std::path::Path;

use crate::source::Source;
pub use types::{GgmlType, Value};
pub use write::Writer;

/// Why a GGUF file cannot be used. Names the key or the tensor, not the file: that is the caller's to add.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read")]
    Read(#[source] std::io::Error),
    #[error("not a GGUF file: it does not begin with `GGUF`")]
    NotGguf,
    #[error("GGUF version {0} is not supported: 2 and 3 are")]
    Version(u32),
    #[error("truncated or corrupt: {0}")]
    Corrupt(String),
    #[error("metadata key `{0}` is missing")]
    Missing(String),
    #[error("metadata key `{key}` is not {wanted}")]
    WrongType { key: String, wanted: &'static str },
    #[error("there is no tensor `{0}`")]
    NoTensor(String),
}

/// One tensor of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    /// Elements along each axis in ggml's order: the innermost, contiguous axis first. One to four axes.
    pub dims: Vec<u64>,
    pub ggml_type: GgmlType,
    /// Where its bytes begin, counted from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

impl Tensor {
    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }
}

/// A GGUF file whose directory is read and checked.
#[derive(Debug)]
pub struct File {
    source: Source,
    meta: HashMap<String, Value>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl File {
    /// Opens a file and reads all but the tensors' data.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = std::fs::File::open(path).map_err(Error::Read)?;
        let length = file.metadata().map_err(Error::Read)?.len();
        let header = parse::header(BufReader::new(&file), length)?;
        Ok(Self::new(Source::Disk(file), header))
    }
    /// Takes a file that is in memory already (tests).
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        let header = parse::header(Cursor::new(&bytes), bytes.len() as u64)?;
        Ok(Self::new(Source::Memory(bytes), header))
    }
    fn new(source: Source, header: parse::Header) -> Self {
        let by_name = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Self { source, meta: header.meta, tensors: header.tensors, by_name }
    }

    /// Every metadata key with its value, in no order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.meta.iter().map(|(key, value)| (key.as_str(), value))
    }
    pub fn meta(&self, key: &str) -> Option<&Value> {
        self.meta.get(key)
    }
    fn get<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, Error> {
        let value = self.meta.get(key).ok_or_else(|| Error::Missing(key.to_owned()))?;
        read(value).ok_or_else(|| Error::WrongType { key: key.to_owned(), wanted })
    }
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.get(key, "a string", Value::as_str)
    }
    /// An integer of any width and sign that fits.
    pub fn u32(&self, key: &str) -> Result<u32, Error> {
        self.get(key, "an integer of 32 bits", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }
    pub fn u64(&self, key: &str) -> Result<u64, Error> {
        self.get(key, "an integer", Value::as_u64)
    }
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        self.get(key, "a number", |v| v.as_f64().map(|n| n as f32))
    }
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        self.get(key, "true or false", Value::as_bool)
    }
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, Error> {
        self.get(key, "a list of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }
    pub fn u32s(&self, key: &str) -> Result<Vec<u32>, Error> {
        let integer = |v: &Value| v.as_u64().and_then(|n| n.try_into().ok());
        self.get(key, "a list of integers", |v| v.as_array()?.iter().map(integer).collect())
    }
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, Error> {
        self.get(key, "a list of numbers", |v| v.as_array()?.iter().map(|n| n.as_f64().map(|n| n as f32)).collect())
    }

    /// The directory, in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &Tensor> {
        self.tensors.iter()
    }
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }
    /// Reads one tensor's bytes, as they lie in the file. Callers hold one tensor at a time, never the whole file.
    pub fn data(&self, name: &str) -> Result<(&Tensor, Vec<u8>), Error> {
        let tensor = self.tensor(name).ok_or_else(|| Error::NoTensor(name.to_owned()))?;
        Ok((tensor, self.read(tensor.offset, tensor.bytes)?))
    }
    /// Reads one of `parts` equal parts of a tensor: an expert of all.
    ///
    /// Panics if there is no such part, or the tensor cannot be divided so: callers have compared shapes.
    pub fn part(&self, name: &str, part: u64, parts: u64) -> Result<(&Tensor, Vec<u8>), Error> {
        let tensor = self.tensor(name).ok_or_else(|| Error::NoTensor(name.to_owned()))?;
        assert!(part < parts && tensor.bytes.is_multiple_of(parts), "part {part} of {parts} of `{name}`");
        let bytes = tensor.bytes / parts;
        Ok((tensor, self.read(tensor.offset + part * bytes, bytes)?))
    }
    fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        self.source.read(offset, bytes).map_err(Error::Read)
    }
}

#[cfg(test)]
mod tests;
