//! Small checkpoints, right and wrong ones, written for the purpose.

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

fn read(dir: &tempfile::TempDir, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
    let source = Source::open(dir.path()).map_err(|e| e.to_string())?;
    source.rows(&config(), name, shape).map_err(|e| e.to_string())
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
    for bad in [f32::NAN, f32::INFINITY] {
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
        assert!(error.starts_with("model.safetensors: "), "{error}");
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
    assert!(read(&dir, "t", &[2, 2]).unwrap_err().contains("`t` is in another file too"));
}

#[test]
fn ends_come_from_both_json_files() {
    let dir = folder(Dtype::F32, &f32s([0.0; 4]));
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 5}"#).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [7, 5]}"#).unwrap();
    assert_eq!(Source::open(dir.path()).unwrap().eos().unwrap(), [5, 7]);
}
