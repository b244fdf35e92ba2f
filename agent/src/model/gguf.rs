//! GGUF tensors as f32: dequantization, the names that ggml gives to tensors, and the order of rotary rows.
//!
//! The container is read by `izar_common::gguf`; here its blocks become numbers. Blocks hold 32 values; the nibbles of
//! a 4-bit block are split: low halves are values 0 to 15, high halves 16 to 31.
//! Source: ggml's `ggml-quants.c`, `dequantize_row_*`.

use half::{bf16, f16};
use izar_common::gguf::GgmlType;

/// Values in a quantized block.
const BLOCK: usize = 32;

/// Turns a tensor's bytes into f32, or `None` for a type that we do not read yet.
///
/// The container has checked that `bytes` is a whole number of blocks.
pub fn dequantize(kind: GgmlType, bytes: &[u8]) -> Option<Vec<f32>> {
    let mut out = Vec::with_capacity(bytes.len() / kind.block_bytes() as usize * kind.block_elements() as usize);
    let blocks = bytes.chunks_exact(kind.block_bytes() as usize);
    match kind {
        GgmlType::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        GgmlType::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
        GgmlType::BF16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        GgmlType::Q4_0 => blocks.for_each(|b| {
            let scale = half_at(b, 0);
            nibbles(&b[2..], &mut out, |n| (n as f32 - 8.0) * scale);
        }),
        GgmlType::Q4_1 => blocks.for_each(|b| {
            let (scale, minimum) = (half_at(b, 0), half_at(b, 2));
            nibbles(&b[4..], &mut out, |n| n as f32 * scale + minimum);
        }),
        GgmlType::Q8_0 => blocks.for_each(|b| {
            let scale = half_at(b, 0);
            out.extend(b[2..].iter().map(|n| *n as i8 as f32 * scale));
        }),
        _ => return None,
    }
    Some(out)
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn nibbles(packed: &[u8], out: &mut Vec<f32>, value: impl Fn(u8) -> f32) {
    debug_assert_eq!(packed.len(), BLOCK / 2);
    out.extend(packed.iter().map(|n| value(n & 15)));
    out.extend(packed.iter().map(|n| value(n >> 4)));
}

/// Puts the rows of a llama query or key projection back into the order of the original checkpoint.
///
/// ggml's converter interleaves the two halves of each head, for rotary pairs (0,1), (2,3), …; we rotate pairs
/// (i, i + head_dim/2) as the checkpoint does. `rows`: `[heads * head_dim, columns]`.
pub fn uninterleave(rows: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let head_dim = rows.len() / columns / heads;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * columns) {
        for side in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = 2 * pair + side;
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

/// Translates a canonical name (Hugging Face's, without `.weight`) into ggml's.
pub fn name(canonical: &str) -> Option<String> {
    const LAYER: &[(&str, &str)] = &[
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let (stem, suffix) = canonical.rsplit_once('.')?;
    let stem = match stem {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        _ => {
            let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
            let (_, part) = LAYER.iter().find(|(canonical, _)| *canonical == part)?;
            format!("blk.{layer}.{part}")
        }
    };
    Some(format!("{stem}.{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn plain_numbers_keep_their_value() {
        let f32s: Vec<u8> = [1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(dequantize(GgmlType::F32, &f32s).unwrap(), [1.5, -2.0]);
        let halves: Vec<u8> = [half(0.25), half(-3.0)].concat();
        assert_eq!(dequantize(GgmlType::F16, &halves).unwrap(), [0.25, -3.0]);
        assert_eq!(dequantize(GgmlType::BF16, &[0x80, 0x3f, 0x40, 0xc0]).unwrap(), [1.0, -3.0]);
    }

    #[test]
    fn q4_0_is_scale_times_nibble_less_eight_low_halves_first() {
        let mut block = half(0.5).to_vec();
        block.extend([0x80_u8; 16]); // low nibble 0, high nibble 8
        block[2] = 0xf1; // value 0: 1, value 16: 15
        let values = dequantize(GgmlType::Q4_0, &block).unwrap();
        assert_eq!(values.len(), 32);
        assert_eq!((values[0], values[1], values[16], values[17]), (-3.5, -4.0, 3.5, 0.0));
    }

    #[test]
    fn q4_1_is_scale_times_nibble_and_a_minimum() {
        let mut block = [half(0.5), half(-1.0)].concat();
        block.extend([0x20_u8; 16]);
        block[4] = 0x0f;
        let values = dequantize(GgmlType::Q4_1, &block).unwrap();
        assert_eq!((values[0], values[1], values[16], values[31]), (6.5, -1.0, -1.0, 0.0));
    }

    #[test]
    fn q8_0_is_scale_times_signed_byte() {
        let mut block = half(0.25).to_vec();
        block.extend([0_u8; 32]);
        (block[2], block[33]) = (127, 128);
        let values = dequantize(GgmlType::Q8_0, &block).unwrap();
        assert_eq!((values[0], values[1], values[31]), (31.75, 0.0, -32.0));
    }

    #[test]
    fn several_blocks_follow_each_other() {
        let block = |scale| [half(scale).to_vec(), vec![1_u8; 32]].concat();
        let values = dequantize(GgmlType::Q8_0, &[block(1.0), block(2.0)].concat()).unwrap();
        assert_eq!((values.len(), values[31], values[32]), (64, 1.0, 2.0));
    }

    #[test]
    fn types_that_are_not_read_yet_are_said_so() {
        assert_eq!(dequantize(GgmlType::Q6_K, &[0; 210]), None);
    }

    #[test]
    fn interleaved_rows_come_back_in_halves() {
        // Two heads of four rows of one column; ggml's order within a head is 0 2 1 3 of the checkpoint's.
        assert_eq!(
            uninterleave(&[0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0], 2, 1),
            [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
        );
    }

    #[test]
    fn names_are_translated() {
        let check = |canonical, ggml| assert_eq!(name(canonical).as_deref(), Some(ggml));
        check("model.embed_tokens.weight", "token_embd.weight");
        check("lm_head.weight", "output.weight");
        check("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias");
        check("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight");
        assert_eq!(name("model.layers.0.unknown.weight"), None);
    }
}
