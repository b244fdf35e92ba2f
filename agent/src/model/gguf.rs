//! GGUF tensors: the names that ggml gives to them, the order of rotary rows, and (in [`blocks`]) their numbers.
//!
//! The container is read by `izar_common::gguf`.

pub mod blocks;

/// Where ggml keeps a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub name: String,
    /// Which expert's part it is, of a tensor that holds all experts'.
    pub expert: Option<usize>,
}

/// Canonical names (Hugging Face's) within a layer, and ggml's.
const LAYER: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
];

/// Names within one expert, and ggml's for all experts together.
const EXPERT: &[(&str, &str)] =
    &[("gate_proj", "ffn_gate_exps"), ("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")];

/// Finds where ggml keeps the tensor of a canonical name.
pub fn place(canonical: &str) -> Option<Place> {
    let whole = |name: String| Some(Place { name, expert: None });
    let (stem, suffix) = canonical.rsplit_once('.')?;
    match stem {
        "model.embed_tokens" => return whole(format!("token_embd.{suffix}")),
        "model.norm" => return whole(format!("output_norm.{suffix}")),
        "lm_head" => return whole(format!("output.{suffix}")),
        _ => {}
    }
    let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    // The one tensor whose last word is not what kind of tensor it is.
    if (part, suffix) == ("mlp.gate", "e_score_correction_bias") {
        return whole(format!("blk.{layer}.exp_probs_b.bias"));
    }
    if let Some((number, part)) = part.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.')) {
        let (_, name) = EXPERT.iter().find(|(canonical, _)| *canonical == part)?;
        return Some(Place { name: format!("blk.{layer}.{name}.{suffix}"), expert: Some(number.parse().ok()?) });
    }
    let (_, name) = LAYER.iter().find(|(canonical, _)| *canonical == part)?;
    whole(format!("blk.{layer}.{name}.{suffix}"))
}

/// Puts the rows of a llama query or key projection back into the order of the original checkpoint.
///
/// ggml's converter interleaves the two halves of each head, for rotary pairs (0,1), (2,3), …; we rotate pairs
/// (i, i + head_dim/2) as the checkpoint does. `rows`: `[heads * head_dim]` rows of `row` items each, which may be
/// values or the bytes of whole blocks.
pub fn uninterleave<T: Copy>(rows: &[T], heads: usize, row: usize) -> Vec<T> {
    let head_dim = rows.len() / row / heads;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * row) {
        for side in 0..2 {
            for pair in 0..head_dim / 2 {
                let at = 2 * pair + side;
                out.extend_from_slice(&head[at * row..(at + 1) * row]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_back_in_halves() {
        // Two heads of four rows of one column; ggml's order within a head is 0 2 1 3 of the checkpoint's.
        assert_eq!(uninterleave(&[0, 2, 1, 3, 10, 12, 11, 13], 2, 1), [0, 1, 2, 3, 10, 11, 12, 13]);
    }

    #[test]
    fn names_are_translated() {
        let check = |canonical, ggml: &str, expert| {
            assert_eq!(place(canonical), Some(Place { name: ggml.to_owned(), expert }));
        };
        check("model.embed_tokens.weight", "token_embd.weight", None);
        check("lm_head.weight", "output.weight", None);
        check("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias", None);
        check("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", None);
        check("model.layers.3.mlp.experts.17.down_proj.weight", "blk.3.ffn_down_exps.weight", Some(17));
        check("model.layers.3.mlp.gate.weight", "blk.3.ffn_gate_inp.weight", None);
        check("model.layers.3.mlp.gate.e_score_correction_bias", "blk.3.exp_probs_b.bias", None);
        check("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "blk.3.attn_kv_a_mqa.weight", None);
        for unknown in ["model.layers.0.unknown.weight", "model.layers.0.mlp.experts.x.up_proj.weight", "norm"] {
            assert_eq!(place(unknown), None);
        }
    }
}
