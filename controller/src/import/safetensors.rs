//! Whether a safetensors file is whole: its header parses, and its tensors fill the rest of the file exactly.
//!
//! Workers read the numbers with the `safetensors` crate; an import only wants to refuse a broken download.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::Error;

/// Longest header that the `safetensors` crate takes.
const HEADER_LIMIT: u64 = 100_000_000;
/// The tensor whose rows are the vocabulary.
const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// Checks a file; returns the rows of its embeddings if it holds them.
pub(super) fn check(path: &Path) -> Result<Option<u64>, Error> {
    let wrong = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let (header, data_bytes) = read(path)
        .map_err(|source| Error::Read { path: path.to_owned(), source })?
        .ok_or_else(|| wrong("truncated or corrupt: it ends within its header".to_owned()))?;
    let header: Value = serde_json::from_slice(&header).map_err(|e| wrong(format!("corrupt header: {e}")))?;
    let tensors = header.as_object().ok_or_else(|| wrong("corrupt header: not an object".to_owned()))?;
    let mut end = 0;
    for (name, tensor) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |at: usize| tensor["data_offsets"][at].as_u64();
        match (offset(0), offset(1)) {
            (Some(from), Some(to)) if from <= to => end = end.max(to),
            _ => return Err(wrong(format!("corrupt header: tensor `{name}` has no place"))),
        }
    }
    if end != data_bytes {
        return Err(wrong(format!("truncated or corrupt: {data_bytes} bytes of tensors, its header says {end}")));
    }
    Ok(tensors.get(EMBEDDINGS).and_then(|t| t["shape"][0].as_u64()))
}

/// The header's bytes and how many bytes follow it; `None` if the file is shorter than its header says.
fn read(path: &Path) -> std::io::Result<Option<(Vec<u8>, u64)>> {
    let mut file = File::open(path)?;
    let total = file.metadata()?.len();
    let mut length = [0; 8];
    if total < 8 {
        return Ok(None);
    }
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_LIMIT || length > total - 8 {
        return Ok(None);
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)?;
    Ok(Some((header, total - 8 - length)))
}
