//! Writes GGUF files, version 3: small models for tests and benchmarks, and wrong files for the reader's tests.
//!
//! All in memory. What is written is taken as it is given, so that a test can lie about anything.

use super::{GgmlType, Value};

/// Where tensors begin, and each one after another.
const ALIGNMENT: usize = 32;

/// A GGUF file in the making.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    directory: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Writer {
    /// Adds a metadata key.
    pub fn key(self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        let mut bytes = Vec::new();
        put(&mut bytes, &value);
        self.raw_key(key, id(&value), &bytes)
    }
    /// Adds a metadata key of any type id and bytes.
    pub fn raw_key(mut self, key: &str, id: u32, value: &[u8]) -> Self {
        put_string(&mut self.keys, key);
        self.keys.extend(id.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }
    /// Adds a tensor; `dims` begin with the innermost axis, as ggml's do.
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: GgmlType, bytes: &[u8]) -> Self {
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.raw_tensor(name, dims, kind.id(), offset)
    }
    /// Adds a tensor of f32; `shape` begins with the outermost axis.
    pub fn f32s(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let dims: Vec<u64> = shape.iter().rev().map(|n| *n as u64).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, &dims, GgmlType::F32, &bytes)
    }
    /// Adds a tensor to the directory alone, of any type id and place.
    pub fn raw_tensor(mut self, name: &str, dims: &[u64], id: u32, offset: u64) -> Self {
        put_string(&mut self.directory, name);
        self.directory.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| self.directory.extend(d.to_le_bytes()));
        self.directory.extend(id.to_le_bytes());
        self.directory.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }
    /// The whole file.
    pub fn finish(self) -> Vec<u8> {
        self.finish_as(3, &[])
    }
    /// The whole file in another version, with more data behind that of the tensors.
    pub fn finish_as(self, version: u32, more: &[u8]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(version.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(self.keys);
        out.extend(self.directory);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(self.data);
        out.extend(more);
        out
    }
}

/// The type id of a value: integers as wide as they can be, but 32 bits where they fit, as converters write them.
fn id(value: &Value) -> u32 {
    match value {
        Value::Unsigned(n) if u32::try_from(*n).is_ok() => 4,
        Value::Signed(n) if i32::try_from(*n).is_ok() => 5,
        Value::Float(n) if n.is_nan() || f64::from(*n as f32) == *n => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::Unsigned(_) => 10,
        Value::Signed(_) => 11,
        Value::Float(_) => 12,
    }
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match (value, id(value)) {
        (Value::Unsigned(n), 4) => out.extend((*n as u32).to_le_bytes()),
        (Value::Unsigned(n), _) => out.extend(n.to_le_bytes()),
        (Value::Signed(n), 5) => out.extend((*n as i32).to_le_bytes()),
        (Value::Signed(n), _) => out.extend(n.to_le_bytes()),
        (Value::Float(n), 6) => out.extend((*n as f32).to_le_bytes()),
        (Value::Float(n), _) => out.extend(n.to_le_bytes()),
        (Value::Bool(b), _) => out.push((*b).into()),
        (Value::String(s), _) => put_string(out, s),
        (Value::Array(list), _) => {
            // A list has one type; the callers' lists of numbers fit the width of their first.
            let of = list.first().map_or(4, id);
            out.extend(of.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            for item in list {
                assert_eq!(id(item), of, "the items of a list are of one type");
                put(out, item);
            }
        }
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

macro_rules! from {
    ($($of:ty => $variant:ident),*) => {
        $(impl From<$of> for Value {
            fn from(value: $of) -> Self {
                Self::$variant(value.into())
            }
        })*
    };
}

from! { u32 => Unsigned, u64 => Unsigned, i32 => Signed, f32 => Float, bool => Bool, &str => String }

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Unsigned(value as u64)
    }
}

impl<T: Into<Value>> FromIterator<T> for Value {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self::Array(items.into_iter().map(Into::into).collect())
    }
}

impl<T: Copy + Into<Value>, const N: usize> From<[T; N]> for Value {
    fn from(items: [T; N]) -> Self {
        items.into_iter().collect()
    }
}
