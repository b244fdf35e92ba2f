//! The header of a GGUF file as it is read from a stream, with a limit on everything that takes memory.

use std::collections::{HashMap, HashSet};
use std::io::Read;

use super::{Error, GgmlType, Tensor, Value};

/// Metadata values of a file, elements of arrays counted. The largest vocabularies have 260,000 tokens and need about
/// 800,000 values; a value takes up to 32 bytes of memory while an element may take one in the file.
const VALUE_LIMIT: u64 = 4 << 20;
/// Bytes of one string. Chat templates reach 20 KB.
const STRING_LIMIT: u64 = 16 << 20;
/// Bytes of a key or a tensor's name; ggml itself allows 64 for names.
const NAME_LIMIT: u64 = 1 << 10;
/// Arrays in arrays. Nothing known nests; ggml itself refuses it.
const DEPTH_LIMIT: u32 = 4;
/// Tensors of a file; the largest mixtures of experts have some thousands.
const TENSOR_LIMIT: u64 = 1 << 18;
/// Axes of a tensor (`GGML_MAX_DIMS`).
const AXIS_LIMIT: u32 = 4;
/// Alignment of tensor data when the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest alignment believed.
const ALIGNMENT_LIMIT: u64 = 1 << 20;

/// All of a file but the tensors' data.
#[derive(Debug)]
pub(super) struct Header {
    pub meta: HashMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

/// Reads and checks the header of a file that is `length` bytes long.
pub(super) fn header(input: impl Read, length: u64) -> Result<Header, Error> {
    let mut reader = Reader { input, at: 0, length, values: 0 };
    let mut magic = [0; 4];
    reader.take(&mut magic, "the magic").map_err(|_| Error::NotGguf)?;
    if &magic != b"GGUF" {
        return Err(Error::NotGguf);
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(Error::Version(version));
    }
    let tensors = reader.u64("the number of tensors")?;
    let keys = reader.u64("the number of metadata keys")?;
    let mut meta = HashMap::new();
    for _ in 0..keys {
        let key = reader.string("a metadata key", NAME_LIMIT)?;
        let id = reader.u32(&key)?;
        let value = reader.value(id, &key, 0)?;
        if meta.contains_key(&key) {
            return Err(corrupt(format!("metadata key `{key}` is there twice")));
        }
        meta.insert(key, value);
    }
    if tensors > TENSOR_LIMIT {
        return Err(corrupt(format!("{tensors} tensors are more than the limit of {TENSOR_LIMIT}")));
    }
    let mut directory = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let tensor = reader.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(corrupt(format!("tensor `{}` is there twice", tensor.name)));
        }
        directory.push(tensor);
    }
    place(&mut directory, alignment(&meta)?, reader.at, length)?;
    Ok(Header { meta, tensors: directory })
}

fn corrupt(what: String) -> Error {
    Error::Corrupt(what)
}

fn alignment(meta: &HashMap<String, Value>) -> Result<u64, Error> {
    let key = "general.alignment";
    let Some(value) = meta.get(key) else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(n) if n.is_power_of_two() && n <= ALIGNMENT_LIMIT => Ok(n),
        _ => Err(corrupt(format!("`{key}` is not a power of two up to {ALIGNMENT_LIMIT}"))),
    }
}

/// Turns offsets within the data into offsets within the file, and checks that tensors lie in it side by side.
fn place(tensors: &mut [Tensor], alignment: u64, header_end: u64, length: u64) -> Result<(), Error> {
    let data = header_end.next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(corrupt(format!("tensor `{}` is not aligned to {alignment} bytes", tensor.name)));
        }
        let start = tensor.offset.checked_add(data);
        let end = start.and_then(|s| s.checked_add(tensor.bytes)).filter(|end| *end <= length);
        let (Some(start), Some(_)) = (start, end) else {
            return Err(corrupt(format!("tensor `{}` reaches past the end of the file ({length} bytes)", tensor.name)));
        };
        tensor.offset = start;
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    match order.windows(2).find(|pair| pair[0].offset + pair[0].bytes > pair[1].offset) {
        Some(pair) => Err(corrupt(format!("tensors `{}` and `{}` overlap", pair[0].name, pair[1].name))),
        None => Ok(()),
    }
}

/// A stream that knows how much of the file is left.
struct Reader<R> {
    input: R,
    at: u64,
    length: u64,
    /// Values read so far, against `VALUE_LIMIT`.
    values: u64,
}

impl<R: Read> Reader<R> {
    fn check_left(&self, bytes: u64, what: &str) -> Result<(), Error> {
        if bytes > self.length - self.at {
            return Err(corrupt(format!("the file ends within {what}")));
        }
        Ok(())
    }
    fn take(&mut self, into: &mut [u8], what: &str) -> Result<(), Error> {
        self.check_left(into.len() as u64, what)?;
        self.input.read_exact(into).map_err(Error::Read)?;
        self.at += into.len() as u64;
        Ok(())
    }
    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.take(&mut bytes, what)?;
        Ok(bytes)
    }
    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }
    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }
    fn string(&mut self, what: &str, limit: u64) -> Result<String, Error> {
        let length = self.u64(what)?;
        if length > limit {
            return Err(corrupt(format!("{what} has {length} bytes, over the limit of {limit}")));
        }
        self.check_left(length, what)?;
        let mut bytes = vec![0; length as usize];
        self.take(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| corrupt(format!("{what} is not UTF-8")))
    }
    fn value(&mut self, id: u32, key: &str, depth: u32) -> Result<Value, Error> {
        self.values += 1;
        if self.values > VALUE_LIMIT {
            return Err(corrupt(format!("more than {VALUE_LIMIT} metadata values, at key `{key}`")));
        }
        Ok(match id {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(corrupt(format!("metadata key `{key}` has {other} as a truth value"))),
            },
            8 => Value::String(self.string(key, STRING_LIMIT)?),
            9 => self.list(key, depth)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(corrupt(format!("metadata key `{key}` has the unknown value type {other}"))),
        })
    }
    fn list(&mut self, key: &str, depth: u32) -> Result<Value, Error> {
        if depth == DEPTH_LIMIT {
            return Err(corrupt(format!("metadata key `{key}` nests lists deeper than {DEPTH_LIMIT}")));
        }
        let id = self.u32(key)?;
        let count = self.u64(key)?;
        // An element takes at least one byte, so a count that the file cannot hold is refused before memory is taken.
        self.check_left(count, key)?;
        if count > VALUE_LIMIT - self.values {
            return Err(corrupt(format!("more than {VALUE_LIMIT} metadata values, at key `{key}`")));
        }
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.value(id, key, depth + 1)?);
        }
        Ok(Value::Array(list))
    }
    /// Reads an entry of the directory; its offset still counts from the start of the data.
    fn tensor(&mut self) -> Result<Tensor, Error> {
        let name = self.string("a tensor's name", NAME_LIMIT)?;
        let bad = |what: String| corrupt(format!("tensor `{name}` {what}"));
        let axes = self.u32(&name)?;
        if !(1..=AXIS_LIMIT).contains(&axes) {
            return Err(bad(format!("has {axes} axes; 1 to {AXIS_LIMIT} are possible")));
        }
        let mut dims = Vec::new();
        for _ in 0..axes {
            dims.push(self.u64(&name)?);
        }
        let id = self.u32(&name)?;
        let ggml_type = GgmlType::from_id(id).ok_or_else(|| bad(format!("has the unsupported ggml type {id}")))?;
        let offset = self.u64(&name)?;
        let elements = dims.iter().try_fold(1_u64, |product, d| product.checked_mul(*d)).filter(|n| *n > 0);
        let elements = elements.ok_or_else(|| bad(format!("has the impossible shape {dims:?}")))?;
        if !dims[0].is_multiple_of(ggml_type.block_elements()) {
            let block = ggml_type.block_elements();
            return Err(bad(format!("has rows of {} elements, not whole {ggml_type} blocks of {block}", dims[0])));
        }
        let bytes = (elements / ggml_type.block_elements()).checked_mul(ggml_type.block_bytes());
        let bytes = bytes.ok_or_else(|| bad(format!("has the impossible shape {dims:?}")))?;
        Ok(Tensor { name, dims, ggml_type, offset, bytes })
    }
}
