//! ggml's blocks as f32: one function a type, each over blocks of fixed size, so that the compiler can unroll them.
//!
//! Blocks of 32 values have one scale, those of 256 (K-quants) have scales of 32 or 16 values that are themselves
//! quantized. Nibbles are split: low halves are the first half of a run, high halves the second.
//! Source: ggml's `ggml-quants.c`, `dequantize_row_*`; checked against `tests/golden/ggml`, bit for bit.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use izar_common::gguf::GgmlType;

/// Turns a tensor's bytes into f32.
///
/// Bytes behind the last whole block are left out; the container has checked that there are none.
pub fn dequantize(kind: GgmlType, bytes: &[u8]) -> Vec<f32> {
    match kind {
        GgmlType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        GgmlType::F16 => halves(bytes),
        GgmlType::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        GgmlType::Q4_0 => each(bytes, q4_0),
        GgmlType::Q4_1 => each(bytes, q4_1),
        GgmlType::Q5_0 => each(bytes, q5_0),
        GgmlType::Q5_1 => each(bytes, q5_1),
        GgmlType::Q8_0 => each(bytes, q8_0),
        GgmlType::Q4_K => each(bytes, q4_k),
        GgmlType::Q5_K => each(bytes, q5_k),
        GgmlType::Q6_K => each(bytes, q6_k),
    }
}

/// Turns little-endian f16 into f32, several at a time where the processor can.
pub fn halves(bytes: &[u8]) -> Vec<f32> {
    let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
    let mut out = vec![0.0; halves.len()];
    halves.convert_to_f32_slice(&mut out);
    out
}

fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) -> Vec<f32> {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let mut out = vec![0.0; blocks.len() * VALUES];
    blocks.iter().zip(out.as_chunks_mut().0).for_each(|(block, values)| decode(block, values));
    out
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(b, 0);
    for i in 0..16 {
        let byte = b[2 + i];
        out[i] = ((byte & 15) as f32 - 8.0) * scale;
        out[16 + i] = ((byte >> 4) as f32 - 8.0) * scale;
    }
}

fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(b, 0), half_at(b, 2));
    for i in 0..16 {
        let byte = b[4 + i];
        out[i] = (byte & 15) as f32 * scale + minimum;
        out[16 + i] = (byte >> 4) as f32 * scale + minimum;
    }
}

/// The fifth bits of 32 values, one in each bit, as 0 or 16.
fn fifth_bits(packed: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| (packed[i / 8] >> (i % 8) & 1) << 4)
}

fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let (scale, high) = (half_at(b, 0), fifth_bits(&b[2..6]));
    for i in 0..16 {
        let byte = b[6 + i];
        out[i] = ((byte & 15 | high[i]) as f32 - 16.0) * scale;
        out[16 + i] = ((byte >> 4 | high[16 + i]) as f32 - 16.0) * scale;
    }
}

fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum, high) = (half_at(b, 0), half_at(b, 2), fifth_bits(&b[4..8]));
    for i in 0..16 {
        let byte = b[8 + i];
        out[i] = (byte & 15 | high[i]) as f32 * scale + minimum;
        out[16 + i] = (byte >> 4 | high[16 + i]) as f32 * scale + minimum;
    }
}

fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(b, 0);
    for i in 0..32 {
        out[i] = b[2 + i] as i8 as f32 * scale;
    }
}

/// Scale and minimum of each run of 32 values, in pairs of runs whose nibbles share bytes.
///
/// They are integers of 6 bits times the block's own two: four pairs lie whole, the other four in pieces.
fn runs(block: &[u8]) -> [[(f32, f32); 2]; 4] {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let one = |run: usize| {
        let (s, m) = match run {
            0..4 => (packed[run] & 63, packed[run + 4] & 63),
            _ => {
                let (low, scale_top, minimum_top) = (packed[run + 4], packed[run - 4] >> 6, packed[run] >> 6);
                (low & 15 | scale_top << 4, low >> 4 | minimum_top << 4)
            }
        };
        (scale * f32::from(s), minimum * f32::from(m))
    };
    std::array::from_fn(|pair| [one(2 * pair), one(2 * pair + 1)])
}

fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let runs = runs(b);
    let packed = b[16..].as_chunks::<32>().0;
    for (pair, (bytes, values)) in packed.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let [(low, low_min), (high, high_min)] = runs[pair];
        for i in 0..32 {
            values[i] = low * (bytes[i] & 15) as f32 - low_min;
            values[32 + i] = high * (bytes[i] >> 4) as f32 - high_min;
        }
    }
}

fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let runs = runs(b);
    let fifths: &[u8; 32] = b[16..48].first_chunk().expect("32 bytes");
    let packed = b[48..].as_chunks::<32>().0;
    for (pair, (bytes, values)) in packed.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let [(low, low_min), (high, high_min)] = runs[pair];
        for i in 0..32 {
            let bits = fifths[i] >> (2 * pair);
            values[i] = low * (bytes[i] & 15 | (bits & 1) << 4) as f32 - low_min;
            values[32 + i] = high * (bytes[i] >> 4 | (bits >> 1 & 1) << 4) as f32 - high_min;
        }
    }
}

fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half_at(b, 208);
    for (half, values) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low: &[u8; 64] = b[64 * half..].first_chunk().expect("64 bytes");
        let high: &[u8; 32] = b[128 + 32 * half..].first_chunk().expect("32 bytes");
        // One scale for each 16 values.
        let scales: [f32; 8] = std::array::from_fn(|i| scale * b[192 + 8 * half + i] as i8 as f32);
        for i in 0..32 {
            let value = |nibble: u8, at: u32| (nibble | (high[i] >> at & 3) << 4) as f32 - 32.0;
            values[i] = scales[i / 16] * value(low[i] & 15, 0);
            values[32 + i] = scales[2 + i / 16] * value(low[32 + i] & 15, 2);
            values[64 + i] = scales[4 + i / 16] * value(low[i] >> 4, 4);
            values[96 + i] = scales[6 + i / 16] * value(low[32 + i] >> 4, 6);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    /// Blocks in hex, and what ggml's Python package makes of them.
    #[derive(Deserialize)]
    struct Golden {
        bytes: String,
        f32: String,
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn every_type_agrees_with_ggml_bit_for_bit() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/ggml/blocks.json");
        let golden: BTreeMap<String, Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for kind in GgmlType::ALL {
            let golden = golden.get(kind.name()).unwrap_or_else(|| panic!("no golden blocks of {kind}"));
            let expected: Vec<f32> = hex(&golden.f32).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let found = dequantize(*kind, &hex(&golden.bytes));
            assert_eq!(found.len(), expected.len(), "{kind}");
            for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(a.to_bits(), b.to_bits(), "{kind} value {i}: {a} and {b}");
            }
        }
    }

    #[test]
    fn a_piece_of_a_block_is_no_value() {
        assert!(GgmlType::ALL.iter().all(|kind| dequantize(*kind, &[0]).is_empty()));
    }
}
