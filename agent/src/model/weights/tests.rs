//! Small checkpoints, right and wrong ones, written for the purpose.

use half::{bf16, f16};
use izar_common::gguf::Writer;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

use super::*;

/// Writes a folder with one tensor `t` of shape `[2, 2]`.
fn folder(kind: Dtype, bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let view = TensorView::new(kind, vec![2, 2], bytes).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), serialize([("t", view)], None).unwrap()).unwrap();
    dir
}

fn config() -> Config {
    let text = r#"{"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 8, "num_hidden_layers": 1,
        "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "rms_norm_eps": 1e-5}"#;
    Config::from_json("config.json", text.as_bytes()).unwrap()
}

fn f32s(values: [f32; 4]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn chain(error: Error) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

fn read(dir: &tempfile::TempDir, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
    let source = Source::open(dir.path()).map_err(chain)?;
    source.rows(&config(), name, shape).map_err(chain)
}

#[test]
fn three_kinds_of_numbers_are_read() {
    assert_eq!(read(&folder(Dtype::F32, &f32s([1.0, 2.0, 3.0, 4.0])), "t", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    let halves: Vec<u8> = [1.0, -2.0, 0.5, 8.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    assert_eq!(read(&folder(Dtype::F16, &halves), "t", &[2, 2]).unwrap(), [1.0, -2.0, 0.5, 8.0]);
    let brains: Vec<u8> = [1.0, -2.0, 0.5, 8.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    assert_eq!(read(&folder(Dtype::BF16, &brains), "t", &[2, 2]).unwrap(), [1.0, -2.0, 0.5, 8.0]);
    let error = read(&folder(Dtype::I8, &[0; 4]), "t", &[2, 2]).unwrap_err();
    assert!(error.contains("`t` is stored as I8"), "{error}");
}

#[test]
fn a_missing_tensor_and_a_wrong_shape_are_named() {
    let dir = folder(Dtype::F32, &f32s([0.0; 4]));
    assert_eq!(read(&dir, "u", &[2, 2]).unwrap_err(), "*.safetensors: tensor `u` is missing");
    let error = read(&dir, "t", &[4]).unwrap_err();
    assert!(error.contains("model.safetensors: tensor `t` has shape [2, 2]"), "{error}");
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = read(&folder(Dtype::F32, &f32s([0.0, bad, 0.0, 0.0])), "t", &[2, 2]).unwrap_err();
        assert!(error.contains("tensor `t` holds") && error.contains("element 1"), "{error}");
    }
}

#[test]
fn truncated_and_foreign_files_are_refused_by_name() {
    let dir = folder(Dtype::F32, &f32s([0.0; 4]));
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 20, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = read(&dir, "t", &[2, 2]).unwrap_err();
        assert!(error.starts_with("model.safetensors cannot be used: truncated or corrupt: "), "{error}");
    }
    std::fs::write(&path, [0xff; 64]).unwrap();
    assert!(read(&dir, "t", &[2, 2]).unwrap_err().contains("not a safetensors file"));
    std::fs::remove_file(&path).unwrap();
    assert!(read(&dir, "t", &[2, 2]).unwrap_err().contains("no file `*.safetensors`"));
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let dir = folder(Dtype::F32, &f32s([0.0; 4]));
    std::fs::copy(dir.path().join("model.safetensors"), dir.path().join("more.safetensors")).unwrap();
    assert!(
        read(&dir, "t", &[2, 2])
            .unwrap_err()
            .contains("more.safetensors cannot be used: tensor `t` is in model.safetensors too")
    );
}

#[test]
fn ends_come_from_both_json_files() {
    let dir = folder(Dtype::F32, &f32s([0.0; 4]));
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 5}"#).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [7, 5]}"#).unwrap();
    assert_eq!(Source::open(dir.path()).unwrap().eos().unwrap(), [5, 7]);
}

#[test]
fn the_first_value_that_is_not_finite_is_found_wherever_it_is() {
    let mut values = vec![f32::MAX; 10_000];
    assert_eq!(not_finite(&values), None);
    (values[9000], values[4097]) = (f32::NAN, f32::NEG_INFINITY);
    assert_eq!(not_finite(&values), Some(4097));
}

#[test]
fn shards_are_read_as_their_index_says() {
    let dir = folder(Dtype::F32, &f32s([1.0, 2.0, 3.0, 4.0]));
    let index = |map: &str| {
        let text = format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#);
        std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    };
    index(r#"{"t": "model.safetensors"}"#);
    assert_eq!(read(&dir, "t", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    // What a folder holds besides is not part of the model.
    std::fs::copy(dir.path().join("model.safetensors"), dir.path().join("consolidated.safetensors")).unwrap();
    assert_eq!(read(&dir, "t", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    index(r#"{"t": "model.safetensors", "u": "model.safetensors"}"#);
    let error = read(&dir, "t", &[2, 2]).unwrap_err();
    assert!(error.starts_with("model.safetensors.index.json cannot be used: tensor `u` is promised"), "{error}");
}

/// A GGUF file on disk, and a source of it.
fn gguf(writer: Writer) -> (tempfile::TempDir, Source) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, writer.finish()).unwrap();
    let source = Source::open(&path).unwrap();
    (dir, source)
}

/// Blocks of Q4_0, one a row: the row's number is its scale.
fn q4_0(rows: u16) -> Vec<u8> {
    (0..rows).flat_map(|row| [&f16::from_f32(row.into()).to_le_bytes()[..], &[0x99; 16]].concat()).collect()
}

#[test]
fn blocks_come_with_their_rows_in_canonical_order() {
    let name = "model.layers.0.self_attn.q_proj.weight";
    let (_dir, source) = gguf(Writer::default().tensor("blk.0.attn_q.weight", &[32, 8], GgmlType::Q4_0, &q4_0(8)));
    let blocks = source.blocks(&config(), name, &[8, 32]).unwrap().unwrap();
    let scale = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).to_f32();
    // Two heads of four rows, that ggml keeps with their halves interleaved.
    let scales: Vec<f32> = blocks.bytes.chunks_exact(18).map(scale).collect();
    assert_eq!((blocks.kind, &scales[..]), (GgmlType::Q4_0, &[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0][..]));
    let rows = source.rows(&config(), name, &[8, 32]).unwrap();
    assert_eq!(rows.chunks_exact(32).map(|row| row[0]).collect::<Vec<_>>(), scales, "one is nine less eight");
    let error = chain(source.blocks(&config(), name, &[4, 32]).unwrap_err());
    assert!(error.contains("m.gguf: tensor `blk.0.attn_q.weight` has shape [8, 32]"), "{error}");
}

#[test]
fn only_some_types_are_given_in_blocks() {
    let halves = f16::from_f32(1.0).to_le_bytes().repeat(64);
    let (_dir, source) =
        gguf(Writer::default().tensor("blk.0.ffn_up.weight", &[32, 2], GgmlType::F16, &halves).tensor(
            "blk.0.ffn_gate.weight",
            &[32, 1],
            GgmlType::Q4_1,
            &[0x3c; 20],
        ));
    assert_eq!(source.blocks(&config(), "model.layers.0.mlp.up_proj.weight", &[2, 32]).unwrap(), None);
    assert_eq!(source.blocks(&config(), "model.layers.0.mlp.down_proj.weight", &[2, 32]).unwrap(), None);
    let blocks = source.blocks(&config(), "model.layers.0.mlp.gate_proj.weight", &[1, 32]).unwrap();
    assert_eq!(blocks, Some(Blocks { kind: GgmlType::Q4_1, bytes: vec![0x3c; 20] }));
}

#[test]
fn scales_that_are_not_finite_are_refused_by_tensor() {
    let mut bytes = q4_0(4);
    bytes[2 * 18..2 * 18 + 2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let (_dir, source) = gguf(Writer::default().tensor("blk.0.ffn_up.weight", &[32, 4], GgmlType::Q4_0, &bytes));
    let name = "model.layers.0.mlp.up_proj.weight";
    let error = chain(source.blocks(&config(), name, &[4, 32]).unwrap_err());
    assert!(
        error.contains("tensor `model.layers.0.mlp.up_proj.weight` has a scale that is not finite in block 2"),
        "{error}"
    );
    let error = chain(source.rows(&config(), name, &[4, 32]).unwrap_err());
    assert!(error.contains("holds inf at element 64"), "{error}");
}

/// A small DeepSeek: two heads, three experts in its one layer.
fn deepseek() -> Config {
    let text = r#"{"model_type": "deepseek_v2", "vocab_size": 8, "max_position_embeddings": 8, "num_hidden_layers": 1,
        "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "kv_lora_rank": 3,
        "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 1, "first_k_dense_replace": 0,
        "n_routed_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 2}"#;
    Config::from_json("config.json", text.as_bytes()).unwrap()
}

#[test]
fn experts_are_parts_of_one_tensor() {
    let all: Vec<f32> = (0..24).map(|n| n as f32).collect();
    let (_dir, source) = gguf(Writer::default().f32s("blk.0.ffn_up_exps.weight", &[3, 2, 4], &all));
    let name = |expert: usize| format!("model.layers.0.mlp.experts.{expert}.up_proj.weight");
    for expert in 0..3 {
        assert!(source.has(&name(expert)));
        let rows = source.rows(&deepseek(), &name(expert), &[2, 4]).unwrap();
        assert_eq!(rows, all[8 * expert..8 * (expert + 1)]);
    }
    let error = chain(source.rows(&deepseek(), &name(3), &[2, 4]).unwrap_err());
    assert!(error.contains("`blk.0.ffn_up_exps.weight` has no expert 3"), "{error}");
    let error = chain(source.rows(&deepseek(), &name(0), &[4, 2]).unwrap_err());
    assert!(error.contains("asks for [3, 4, 2]"), "{error}");
}

#[test]
fn keys_and_values_of_latents_are_joined_head_by_head() {
    // Canonical: two heads of two rows of keys and one of values, three columns.
    let canonical: Vec<f32> = (0..18).map(|n| n as f32).collect();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for head in canonical.chunks_exact(9) {
        keys.extend((0..3).flat_map(|column| [head[column], head[3 + column]]));
        values.extend_from_slice(&head[6..]);
    }
    let name = "model.layers.0.self_attn.kv_b_proj.weight";
    let apart = Writer::default().f32s("blk.0.attn_k_b.weight", &[2, 3, 2], &keys).f32s(
        "blk.0.attn_v_b.weight",
        &[2, 1, 3],
        &values,
    );
    for writer in [apart, Writer::default().f32s("blk.0.attn_kv_b.weight", &[6, 3], &canonical)] {
        let (_dir, source) = gguf(writer);
        assert!(source.has(name));
        assert_eq!(source.rows(&deepseek(), name, &[6, 3]).unwrap(), canonical);
    }
    let (_dir, half) = gguf(Writer::default().f32s("blk.0.attn_k_b.weight", &[2, 3, 2], &keys));
    let error = chain(half.rows(&deepseek(), name, &[6, 3]).unwrap_err());
    assert!(error.contains("tensor `blk.0.attn_v_b.weight` is missing"), "{error}");
}
