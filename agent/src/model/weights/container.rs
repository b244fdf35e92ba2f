//! Canonical tensors out of a GGUF file, which names, orders and stacks some of them in its own way.

use half::f16;
use izar_common::gguf::{self, GgmlType};

use super::Blocks;
use crate::model::Error;
use crate::model::config::{Attention, Config, Family};
use crate::model::gguf::blocks::dequantize;
use crate::model::gguf::{Place, place, uninterleave};

/// A GGUF file, and what errors call it.
pub(super) struct Container<'a> {
    pub name: &'a str,
    pub file: &'a gguf::File,
}

impl Container<'_> {
    fn bad(&self, tensor: &str, reason: String) -> Error {
        Error::Tensor { file: self.name.to_owned(), tensor: tensor.to_owned(), reason }
    }

    pub fn has(&self, canonical: &str) -> bool {
        place(canonical).is_some_and(|place| self.file.tensor(&place.name).is_some())
            || split_name(canonical, "attn_k_b").is_some_and(|name| self.file.tensor(&name).is_some())
    }

    pub fn rows(&self, config: &Config, canonical: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        if let (Some(k), Some(v)) = (split_name(canonical, "attn_k_b"), split_name(canonical, "attn_v_b"))
            && self.file.tensor(&k).is_some()
        {
            return self.joined(config, &k, &v, shape);
        }
        let (kind, bytes) = self.stored(config, canonical, shape)?;
        Ok(dequantize(kind, &bytes))
    }

    pub fn blocks(&self, config: &Config, canonical: &str, shape: &[usize]) -> Result<Option<Blocks>, Error> {
        let Some(tensor) = place(canonical).and_then(|place| self.file.tensor(&place.name)) else {
            return Ok(None);
        };
        // Where the halves lie that every value of a block is multiplied by, or added to.
        let halves: &[usize] = match tensor.ggml_type {
            GgmlType::Q4_0 | GgmlType::Q8_0 => &[0],
            GgmlType::Q4_1 => &[0, 2],
            _ => return Ok(None),
        };
        let (kind, bytes) = self.stored(config, canonical, shape)?;
        let good = |block: &[u8]| halves.iter().all(|at| f16::from_le_bytes([block[*at], block[at + 1]]).is_finite());
        match bytes.chunks_exact(kind.block_bytes() as usize).position(|block| !good(block)) {
            Some(block) => Err(self.bad(canonical, format!("has a scale that is not finite in block {block}"))),
            None => Ok(Some(Blocks { kind, bytes })),
        }
    }

    /// Reads a tensor by ggml's own name.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let (kind, bytes) = self.read(&Place { name: name.to_owned(), expert: None }, shape, 0)?;
        Ok(dequantize(kind, &bytes))
    }

    /// Reads a tensor as it is stored, its rows in canonical order.
    fn stored(&self, config: &Config, canonical: &str, shape: &[usize]) -> Result<(GgmlType, Vec<u8>), Error> {
        let place = place(canonical).unwrap_or_else(|| Place { name: canonical.to_owned(), expert: None });
        let (kind, bytes) = self.read(&place, shape, config.mixture().map_or(0, |experts| experts.count))?;
        let heads = match canonical {
            _ if config.family != Family::Llama => return Ok((kind, bytes)),
            _ if canonical.contains("self_attn.q_proj.") => config.heads,
            _ if canonical.contains("self_attn.k_proj.") => config.kv_heads(),
            _ => return Ok((kind, bytes)),
        };
        let columns = shape.get(1).copied().unwrap_or(1);
        if !columns.is_multiple_of(kind.block_elements() as usize) {
            return Err(self.bad(canonical, format!("is stored as {kind}, which cannot be put in order row by row")));
        }
        let row = columns / kind.block_elements() as usize * kind.block_bytes() as usize;
        Ok((kind, uninterleave(&bytes, heads, row)))
    }

    /// Reads a tensor or an expert's part of it; `shape` is ours, outermost axis first.
    fn read(&self, place: &Place, shape: &[usize], experts: usize) -> Result<(GgmlType, Vec<u8>), Error> {
        let tensor = self.file.tensor(&place.name).ok_or_else(|| self.bad(&place.name, "is missing".into()))?;
        let found: Vec<usize> = tensor.dims.iter().rev().map(|d| *d as usize).collect();
        let wanted = if place.expert.is_some() { [&[experts], shape].concat() } else { shape.to_vec() };
        if found != wanted {
            let reason = format!("has shape {found:?}, the configuration asks for {wanted:?}");
            return Err(self.bad(&place.name, reason));
        }
        let read = match place.expert {
            Some(expert) if expert >= experts => {
                return Err(self.bad(&place.name, format!("has no expert {expert}")));
            }
            Some(expert) => self.file.part(&place.name, expert as u64, experts as u64),
            None => self.file.data(&place.name),
        };
        let (tensor, bytes) = read.map_err(|source| Error::Gguf { file: self.name.to_owned(), source })?;
        Ok((tensor.ggml_type, bytes))
    }

    /// Joins what newer files keep apart: the projections from the latent vector to keys and to values.
    ///
    /// The keys' lie transposed, for they are used the other way round there; a head's rows are first keys, then values.
    fn joined(&self, config: &Config, k: &str, v: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let Attention::Latent(latent) = config.attention else {
            return Err(self.bad(k, "belongs to latent attention, which the model does not have".into()));
        };
        let (heads, rank, nope, value) = (config.heads, latent.kv_rank, latent.nope_dim, latent.value_dim);
        if shape != [heads * (nope + value), rank] {
            return Err(self.bad(k, format!("makes no matrix of shape {shape:?}")));
        }
        let keys = self.values(k, &[heads, rank, nope])?;
        let values = self.values(v, &[heads, value, rank])?;
        let mut out = Vec::with_capacity(keys.len() + values.len());
        for (keys, values) in keys.chunks_exact(rank * nope).zip(values.chunks_exact(value * rank)) {
            for row in 0..nope {
                out.extend((0..rank).map(|column| keys[column * nope + row]));
            }
            out.extend_from_slice(values);
        }
        Ok(out)
    }
}

/// The name of a half of what the canonical name means whole.
fn split_name(canonical: &str, half: &str) -> Option<String> {
    let layer = canonical.strip_prefix("model.layers.")?.strip_suffix(".self_attn.kv_b_proj.weight")?;
    Some(format!("blk.{layer}.{half}.weight"))
}
