//! Good, bad and mutated safetensors files, and checkpoints whose files and index do not agree.

use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{TensorView, serialize};
use serde_json::{Value, json};

use super::*;

/// A file of any header and data.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let text = header.to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), data].concat()
}

fn entry(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

fn refused(bytes: Vec<u8>, words: &str) {
    let error = File::from_bytes(bytes).expect_err("this file is wrong").to_string();
    assert!(error.contains(words), "`{error}` does not say `{words}`");
}

#[test]
fn what_the_formats_own_library_writes_is_read() {
    let (a, b): (Vec<u8>, Vec<u8>) = ((0..16).collect(), (0..6).collect());
    let view = |kind, shape, bytes| TensorView::new(kind, shape, bytes).unwrap();
    let tensors = [
        ("a", view(safetensors::Dtype::F32, vec![2, 2], &a)),
        ("b", view(safetensors::Dtype::BF16, vec![3], &b)),
        ("empty", view(safetensors::Dtype::I64, vec![0, 4], &[])),
    ];
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = serialize(tensors, Some(metadata)).unwrap();
    let file = File::from_bytes(bytes.clone()).unwrap();
    let tensor = file.tensor("a").unwrap();
    assert_eq!((tensor.dtype, &tensor.shape[..], tensor.elements()), (Dtype::F32, &[2, 2][..], 4));
    assert_eq!((file.data("a").unwrap(), file.data("b").unwrap(), file.data("empty").unwrap()), (a, b, vec![]));
    assert_eq!((file.tensors().len(), file.tensor("__metadata__")), (3, None));
    assert_eq!(file.data("c").unwrap_err().to_string(), "there is no tensor `c`");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(File::open(&path).unwrap().data("b").unwrap(), file.data("b").unwrap());
}

#[test]
fn ranges_that_cannot_be_are_refused_by_tensor() {
    let one = |e: Value, data: usize| file(&json!({"t": e}), &vec![0; data]);
    refused(one(entry("F32", &[4], 0, 16), 12), "tensor `t` reaches past the end");
    refused(one(entry("F32", &[4], 0, 12), 12), "tensor `t` has a range of 12 bytes; [4] of F32 take 16");
    refused(one(entry("F32", &[4], 16, 0), 16), "tensor `t` ends at 0, before it begins at 16");
    refused(one(entry("F32", &[1 << 40, 1 << 40], 0, 16), 16), "tensor `t` has the impossible shape");
    refused(one(entry("F32", &[u64::MAX], 0, 16), 16), "tensor `t` has the impossible shape");
    refused(one(entry("F32", &[1], u64::MAX - 3, u64::MAX), 16), "tensor `t`");
    refused(one(entry("F32", &[1; 9], 0, 4), 4), "tensor `t` has 9 axes");
    refused(one(entry("F32", &[4], 0, 16), 17), "1 bytes at the end belong to no tensor");
    refused(one(entry("F32", &[4], 4, 20), 20), "4 bytes before tensor `t` belong to none");
    refused(one(entry("F5", &[4], 0, 16), 16), "tensor `t`: unknown variant `F5`");
    refused(one(json!({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}), 4), "tensor `t`");
    refused(one(json!({"dtype": "F32", "shape": [1]}), 4), "tensor `t`: missing field `data_offsets`");
    let two = |begin: u64| json!({"a": entry("F32", &[4], 0, 16), "b": entry("F32", &[4], begin, begin + 16)});
    refused(file(&two(12), &[0; 28]), "tensors `a` and `b` overlap");
    assert!(File::from_bytes(file(&two(16), &[0; 32])).is_ok());
}

#[test]
fn headers_that_are_none_are_refused() {
    refused(Vec::new(), "ends within the length of its header");
    refused(vec![0xff; 64], "not a safetensors file");
    refused(file(&json!({}), &[])[..9].to_vec(), "ends within its header");
    refused(file(&json!([]), &[]), "its header");
    let twice =
        r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    refused([&(twice.len() as u64).to_le_bytes()[..], twice.as_bytes(), &[0]].concat(), "tensor `t` is there twice");
    let nested = "[".repeat(100_000);
    let deep = format!(r#"{{"__metadata__":{nested}"#);
    refused([&(deep.len() as u64).to_le_bytes()[..], deep.as_bytes()].concat(), "its header");
}

/// A folder with two shards, `a` and `b` in the first, `c` in the second.
struct Shards {
    dir: tempfile::TempDir,
}

impl Shards {
    fn new() -> Self {
        let shards = Self { dir: tempfile::tempdir().unwrap() };
        let two = json!({"a": entry("U8", &[2], 0, 2), "b": entry("U8", &[1], 2, 3)});
        shards.put("one.safetensors", &file(&two, &[1, 2, 3]));
        shards.put("two.safetensors", &file(&json!({"c": entry("U8", &[1], 0, 1)}), &[4]));
        shards
    }
    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).unwrap();
    }
    fn open(&self, names: &[&str], map: Option<Value>) -> Result<Checkpoint, String> {
        let paths: Vec<_> = names.iter().map(|name| self.dir.path().join(name)).collect();
        let files: Vec<_> = names.iter().copied().zip(paths.iter().map(|p| p.as_path())).collect();
        let index = map.map(|map| json!({"metadata": {"total_size": 4}, "weight_map": map}).to_string());
        Checkpoint::open(&files, index.as_ref().map(String::as_bytes))
            .map_err(|fault| format!("{fault}: {}", fault.source))
    }
    fn refused(&self, names: &[&str], map: Option<Value>, words: &str) {
        let error = self.open(names, map).expect_err("these files do not agree");
        assert!(error.contains(words), "`{error}` does not say `{words}`");
    }
}

const BOTH: [&str; 2] = ["one.safetensors", "two.safetensors"];

#[test]
fn shards_are_one_checkpoint() {
    let shards = Shards::new();
    let map = json!({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"});
    for map in [None, Some(map.clone())] {
        let checkpoint = shards.open(&BOTH, map).unwrap();
        assert_eq!(checkpoint.tensors().count(), 3);
        assert_eq!((checkpoint.data("a").unwrap(), checkpoint.data("c").unwrap()), (vec![1, 2], vec![4]));
        assert_eq!(checkpoint.tensor("c").unwrap().0, "two.safetensors");
        assert!(checkpoint.data("d").is_err());
    }
    // What the index does not name is not part of it, even if it repeats everything.
    std::fs::copy(shards.dir.path().join(BOTH[0]), shards.dir.path().join("all.safetensors")).unwrap();
    assert!(shards.open(&[BOTH[0], BOTH[1], "all.safetensors"], Some(map)).is_ok());
}

#[test]
fn what_the_index_promises_must_be_so() {
    let shards = Shards::new();
    let map = |c: &str| Some(json!({"a": "one.safetensors", "b": "one.safetensors", "c": c}));
    shards.refused(&BOTH[..1], map(BOTH[1]), "tensor `c` is promised in two.safetensors, which is missing");
    shards.refused(&BOTH, map(BOTH[0]), "tensor `c` is promised in one.safetensors, which does not hold it");
    let swapped = json!({"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"});
    shards.refused(&BOTH, Some(swapped), "tensor `a` is promised in two.safetensors, but lies in one.safetensors");
    let more = json!({"a": "one.safetensors", "d": "two.safetensors"});
    shards.refused(&BOTH, Some(more), "tensor `d` is promised in two.safetensors, which does not hold it");
    shards.refused(&BOTH, map("../two.safetensors"), "`../two.safetensors` is not the name of a safetensors file");
    shards.refused(&BOTH, Some(json!([1])), "not an index of tensors");
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let shards = Shards::new();
    std::fs::copy(shards.dir.path().join(BOTH[1]), shards.dir.path().join("three.safetensors")).unwrap();
    let all = [BOTH[0], BOTH[1], "three.safetensors"];
    shards.refused(&all, None, "three.safetensors cannot be used: tensor `c` is in two.safetensors too");
    let twice = br#"{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}"#;
    assert!(Checkpoint::open(&[], Some(twice)).unwrap_err().source.to_string().contains("`a` is there twice"));
}

proptest! {
    /// Whatever is done to a file, it never panics; and what is taken here is what the format's own library takes.
    #[test]
    fn mutated_files_never_panic_and_are_judged_as_by_the_library(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        shorten in any::<bool>(),
    ) {
        let two = json!({"a": entry("F32", &[2, 2], 0, 16), "b": entry("BF16", &[3], 16, 22)});
        let mut bytes = file(&two, &[7; 22]);
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(file) = File::from_bytes(bytes.clone()) {
            for tensor in file.tensors() {
                file.data(&tensor.name).expect("its range was checked");
            }
            prop_assert!(SafeTensors::deserialize(&bytes).is_ok(), "ours takes more than the library");
        }
    }
}
