//! What happens to good, bad and mutated GGUF files.

use proptest::prelude::*;

use super::*;

fn sample(version: u32) -> Vec<u8> {
    Writer::default()
        .key("general.architecture", "llama")
        .key("llama.context_length", 77_u32)
        .key("llama.epsilon", 0.5_f32)
        .key("flag", true)
        .raw_key("small", 1, &[0xff])
        .key("words", ["a", "bc"])
        .raw_tensor("x", &[4, 2], 0, 0)
        .raw_tensor("y", &[32], 2, 32)
        .finish_as(version, &(0..32 + 18).collect::<Vec<u8>>())
}

fn refused(bytes: Vec<u8>, words: &str) {
    let error = File::from_bytes(bytes).expect_err("this file is wrong").to_string();
    assert!(error.contains(words), "`{error}` does not say `{words}`");
}

#[test]
fn both_versions_are_read_with_their_metadata_and_tensors() {
    for version in [2, 3] {
        let file = File::from_bytes(sample(version)).unwrap();
        assert_eq!(file.str("general.architecture").unwrap(), "llama");
        assert_eq!(file.u32("llama.context_length").unwrap(), 77);
        assert_eq!(file.f32("llama.epsilon").unwrap(), 0.5);
        assert!(file.bool("flag").unwrap());
        assert_eq!(file.strings("words").unwrap(), ["a", "bc"]);
        assert_eq!(file.meta("small"), Some(&Value::Signed(-1)));
        let (tensor, bytes) = file.data("y").unwrap();
        assert_eq!((tensor.ggml_type, &tensor.dims[..], tensor.bytes), (GgmlType::Q4_0, &[32][..], 18));
        assert_eq!(bytes, (32..50).collect::<Vec<u8>>());
        assert_eq!(file.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["x", "y"]);
    }
}

#[test]
fn a_file_on_disk_gives_the_same_bytes_as_one_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, sample(3)).unwrap();
    let (disk, memory) = (File::open(&path).unwrap(), File::from_bytes(sample(3)).unwrap());
    assert_eq!(disk.data("x").unwrap(), memory.data("x").unwrap());
}

#[test]
fn getters_name_the_key_that_is_missing_or_of_another_type() {
    let file = File::from_bytes(sample(3)).unwrap();
    assert_eq!(file.u32("nope").unwrap_err().to_string(), "metadata key `nope` is missing");
    assert_eq!(file.u32("flag").unwrap_err().to_string(), "metadata key `flag` is not an integer of 32 bits");
    assert!(file.u32("small").is_err(), "-1 is not an unsigned number");
    assert!(file.strings("flag").is_err());
    assert_eq!(file.data("nope").unwrap_err().to_string(), "there is no tensor `nope`");
}

#[test]
fn other_files_and_versions_are_refused() {
    refused(Vec::new(), "not a GGUF file");
    refused(b"PK\x03\x04 and more".to_vec(), "not a GGUF file");
    refused(sample(1), "version 1");
    refused(sample(3_u32.swap_bytes()), "version 50331648");
}

#[test]
fn a_tensor_outside_the_file_is_refused_by_name() {
    let mut bytes = sample(3);
    bytes.pop();
    refused(bytes, "tensor `y` reaches past the end");
    refused(Writer::default().raw_tensor("far", &[1], 0, u64::MAX - 31).finish_as(3, &[0; 64]), "`far`");
}

#[test]
fn impossible_tensors_are_refused_by_name() {
    let with = |dims: &[u64], id| Writer::default().raw_tensor("t", dims, id, 0).finish_as(3, &[0; 64]);
    refused(with(&[1 << 40, 1 << 40], 0), "tensor `t` has the impossible shape");
    refused(with(&[u64::MAX], 0), "tensor `t` has the impossible shape");
    refused(with(&[0], 0), "tensor `t` has the impossible shape");
    refused(with(&[], 0), "tensor `t` has 0 axes");
    refused(with(&[1; 5], 0), "tensor `t` has 5 axes");
    refused(with(&[33], 2), "whole Q4_0 blocks");
    refused(with(&[32], 99), "tensor `t` has the unsupported ggml type 99");
}

#[test]
fn overlapping_twofold_and_misaligned_tensors_are_refused() {
    let two =
        |a, b, at| Writer::default().raw_tensor(a, &[16], 0, 0).raw_tensor(b, &[4], 0, at).finish_as(3, &[0; 128]);
    refused(two("a", "b", 32), "tensors `a` and `b` overlap");
    refused(two("a", "a", 64), "tensor `a` is there twice");
    refused(two("a", "b", 65), "tensor `b` is not aligned");
    assert!(File::from_bytes(two("a", "b", 64)).is_ok());
}

#[test]
fn impossible_metadata_is_refused_by_key() {
    let with = |id, value: &[u8]| Writer::default().raw_key("k", id, value).finish_as(3, &[]);
    refused(with(13, &[]), "`k` has the unknown value type 13");
    refused(with(7, &[2]), "`k` has 2 as a truth value");
    refused(with(8, &u64::MAX.to_le_bytes()), "over the limit");
    refused(with(8, &(1_u64 << 20).to_le_bytes()), "the file ends within k");
    let mut many = 0_u32.to_le_bytes().to_vec();
    many.extend(u64::MAX.to_le_bytes());
    refused(with(9, &many), "the file ends within k");
    let mut deep = Vec::new();
    for _ in 0..6 {
        deep.extend(9_u32.to_le_bytes());
        deep.extend(1_u64.to_le_bytes());
    }
    deep.resize(deep.len() + 64, 0);
    refused(with(9, &deep), "nests lists deeper");
    refused(Writer::default().raw_key("k", 0, &[1]).raw_key("k", 0, &[1]).finish_as(3, &[]), "`k` is there twice");
    refused(Writer::default().key("general.alignment", 3_u32).finish_as(3, &[]), "power of two");
}

#[test]
fn what_is_written_is_read() {
    let values: [(&str, Value); 7] = [
        ("n", 7_u32.into()),
        ("wide", (1_u64 << 40).into()),
        ("less", (-3_i32).into()),
        ("half", 0.5_f32.into()),
        ("fine", Value::Float(0.1)),
        ("no", false.into()),
        ("list", Value::Array(vec![[1_u32, 2].into(), [3_u32].into()])),
    ];
    let mut writer = Writer::default().f32s("t", &[2, 3], &[1.0; 6]).tensor("u", &[32], GgmlType::Q8_0, &[9; 34]);
    for (key, value) in &values {
        writer = writer.key(key, value.clone());
    }
    let file = File::from_bytes(writer.finish()).unwrap();
    values.iter().for_each(|(key, value)| assert_eq!(file.meta(key), Some(value)));
    assert_eq!(file.tensor("t").unwrap().dims, [3, 2]);
    assert_eq!(file.data("u").unwrap().1, [9; 34]);
    let halves = [0, 1].map(|part| file.part("t", part, 2).unwrap().1);
    assert_eq!(halves.concat(), file.data("t").unwrap().1);
}

#[test]
fn ids_and_types_agree() {
    for t in GgmlType::ALL {
        assert_eq!(GgmlType::from_id(t.id()), Some(*t));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = File::from_bytes(bytes.clone());
        let mut headed = b"GGUF\x03\0\0\0".to_vec();
        headed.extend(bytes);
        let _ = File::from_bytes(headed);
    }

    #[test]
    fn mutated_files_never_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        shorten in any::<bool>(),
    ) {
        let mut bytes = sample(3);
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(file) = File::from_bytes(bytes) {
            for tensor in file.tensors() {
                file.data(&tensor.name).expect("its range was checked");
            }
        }
    }
}
