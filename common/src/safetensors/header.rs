//! The header of a safetensors file: its length in eight bytes, then JSON that says of each tensor what it is and where.

use std::fmt;
use std::io::Read;
use std::marker::PhantomData;

use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Error, Tensor};

/// Longest header that is read, the same limit as the format's own library has.
const HEADER_LIMIT: u64 = 100_000_000;
/// Axes of a tensor; models have four at most.
const AXIS_LIMIT: usize = 8;
/// The entry that is no tensor.
const METADATA: &str = "__metadata__";

macro_rules! dtypes {
    ($($name:ident = $text:literal, $bytes:literal;)*) => {
        /// How numbers are stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
        #[allow(non_camel_case_types, reason = "the format's own names")]
        pub enum Dtype {
            $($name,)*
        }

        impl Dtype {
            /// Bytes of one number.
            pub fn bytes(self) -> u64 {
                match self {
                    $(Self::$name => $bytes,)*
                }
            }
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

dtypes! {
    BOOL = "BOOL", 1;
    U8 = "U8", 1;
    I8 = "I8", 1;
    F8_E5M2 = "F8_E5M2", 1;
    F8_E4M3 = "F8_E4M3", 1;
    F8_E8M0 = "F8_E8M0", 1;
    U16 = "U16", 2;
    I16 = "I16", 2;
    F16 = "F16", 2;
    BF16 = "BF16", 2;
    U32 = "U32", 4;
    I32 = "I32", 4;
    F32 = "F32", 4;
    U64 = "U64", 8;
    I64 = "I64", 8;
    F64 = "F64", 8;
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reads and checks the header of a file that is `length` bytes long; the tensors come in the order of their data.
pub(super) fn read(mut input: impl Read, length: u64) -> Result<Vec<Tensor>, Error> {
    let mut size = [0; 8];
    if length < 8 {
        return Err(corrupt("the file ends within the length of its header"));
    }
    input.read_exact(&mut size).map_err(Error::Read)?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_LIMIT {
        return Err(corrupt(format!("not a safetensors file, or a header of {size} bytes (limit {HEADER_LIMIT})")));
    }
    if size > length - 8 {
        return Err(corrupt(format!("the file ends within its header of {size} bytes")));
    }
    let mut text = vec![0; size as usize];
    input.read_exact(&mut text).map_err(Error::Read)?;
    let directory: Unique<Entry> = serde_json::from_slice(&text).map_err(|e| corrupt(format!("its header: {e}")))?;
    let data = 8 + size;
    let mut tensors = Vec::with_capacity(directory.0.len());
    for (name, entry) in directory.0 {
        tensors.push(entry.check(name, data, length)?);
    }
    tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    side_by_side(&tensors, data, length)?;
    Ok(tensors)
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::Corrupt(what.into())
}

/// What the header says of a tensor.
#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<u64>,
    /// Begin and end within the data.
    data_offsets: (u64, u64),
}

impl Entry {
    fn check(self, name: String, data: u64, length: u64) -> Result<Tensor, Error> {
        let bad = |what: String| corrupt(format!("tensor `{name}` {what}"));
        if self.shape.len() > AXIS_LIMIT {
            return Err(bad(format!("has {} axes; up to {AXIS_LIMIT} are possible", self.shape.len())));
        }
        let (begin, end) = self.data_offsets;
        let range = end.checked_sub(begin).ok_or_else(|| bad(format!("ends at {end}, before it begins at {begin}")))?;
        let bytes = self.shape.iter().try_fold(self.dtype.bytes(), |product, n| product.checked_mul(*n));
        let bytes = bytes.ok_or_else(|| bad(format!("has the impossible shape {:?}", self.shape)))?;
        if range != bytes {
            let (dtype, shape) = (self.dtype, &self.shape);
            return Err(bad(format!("has a range of {range} bytes; {shape:?} of {dtype} take {bytes}")));
        }
        if end > length - data {
            return Err(bad(format!("reaches past the end of the file ({length} bytes)")));
        }
        Ok(Tensor { name, dtype: self.dtype, shape: self.shape, offset: data + begin, bytes })
    }
}

/// The data is all tensors and nothing else: the format forbids gaps, for what they could hide.
fn side_by_side(tensors: &[Tensor], data: u64, length: u64) -> Result<(), Error> {
    let mut end = data;
    let mut before = "the header";
    for tensor in tensors {
        if tensor.offset < end {
            return Err(corrupt(format!("tensors `{before}` and `{}` overlap", tensor.name)));
        }
        if tensor.offset > end {
            let gap = tensor.offset - end;
            return Err(corrupt(format!("{gap} bytes before tensor `{}` belong to none", tensor.name)));
        }
        (end, before) = (end + tensor.bytes, &tensor.name);
    }
    match length - end {
        0 => Ok(()),
        rest => Err(corrupt(format!("{rest} bytes at the end belong to no tensor"))),
    }
}

/// A JSON object as pairs; a key that is there twice is an error, not the last of the two. `__metadata__` is left out.
pub(super) struct Unique<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = Unique<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique<V>, A::Error> {
                let mut names = std::collections::HashSet::new();
                let mut pairs = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
                    }
                    let value = map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                    pairs.push((name, value));
                }
                Ok(Unique(pairs))
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}
