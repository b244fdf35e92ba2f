//! Imports of the golden checkpoint, of small GGUF files, and of everything that can be wrong with them.

use super::*;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama")
}

struct Case {
    dir: tempfile::TempDir,
    store: blob::Store,
}

impl Case {
    /// A copy of the golden folder and an empty store.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = blob::Store::open(dir.path().join("blobs")).unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        for entry in std::fs::read_dir(golden()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        Self { dir, store }
    }
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("model").join(name)
    }
    fn replace(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.file(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        std::fs::write(self.file(name), text.replace(from, to)).unwrap();
    }
    fn import(&self) -> Result<Manifest, Error> {
        import(&self.dir.path().join("model"), "tiny", None, &self.store)
    }
    /// Expects a refusal whose chain says all of `words`, and an untouched store.
    fn refused(&self, words: &[&str]) {
        let chain = format!("{:#}", anyhow::Error::from(self.import().unwrap_err()));
        assert!(words.iter().all(|word| chain.contains(word)), "`{chain}` does not say all of {words:?}");
        assert_eq!(std::fs::read_dir(self.dir.path().join("blobs")).unwrap().count(), 0, "nothing is stored");
    }
}

#[test]
fn a_folder_is_stored_whole_and_twice_gives_the_same_revision() {
    let case = Case::new();
    let manifest = case.import().unwrap();
    assert_eq!((manifest.context, manifest.vocabulary, manifest.architecture.as_str()), (512, 512, "llama"));
    assert_eq!(
        manifest.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(),
        ["config.json", "model.safetensors"]
    );
    assert!(manifest.all_files().all(|file| case.store.has(&file.hash)));
    assert_eq!(case.import().unwrap().revision(), manifest.revision());
    let json = std::fs::read(case.store.path(&manifest.text.hash)).unwrap();
    assert!(Text::new(&serde_json::from_slice(&json).unwrap()).is_ok());
}

#[test]
fn a_missing_file_is_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let case = Case::new();
        std::fs::remove_file(case.file(name)).unwrap();
        case.refused(&[name, "is missing in"]);
    }
}

#[test]
fn a_truncated_or_corrupt_weight_file_is_named() {
    let case = Case::new();
    let weights = std::fs::read(case.file("model.safetensors")).unwrap();
    for length in [0, 7, 100, weights.len() - 1] {
        std::fs::write(case.file("model.safetensors"), &weights[..length]).unwrap();
        case.refused(&["model.safetensors", "truncated or corrupt"]);
    }
    let mut corrupt = weights;
    corrupt[8] = b'!';
    std::fs::write(case.file("model.safetensors"), &corrupt).unwrap();
    case.refused(&["model.safetensors", "truncated or corrupt: its header"]);
}

/// Cuts the checkpoint into two shards, and writes an index with `change`.
fn shard(case: &Case, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let whole = std::fs::read(case.file("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let directory: Value = serde_json::from_slice(&whole[8..8 + header]).unwrap();
    let mut map = serde_json::Map::new();
    for (shard, wanted) in ["one.safetensors", "two.safetensors"].into_iter().zip([true, false]) {
        let (mut entries, mut data) = (serde_json::Map::new(), Vec::new());
        let all = directory.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
        for (name, entry) in all.filter(|(name, _)| name.contains("layers") == wanted) {
            let at = |i: usize| 8 + header + entry["data_offsets"][i].as_u64().unwrap() as usize;
            let mut entry = entry.clone();
            entry["data_offsets"] = serde_json::json!([data.len(), data.len() + at(1) - at(0)]);
            data.extend_from_slice(&whole[at(0)..at(1)]);
            entries.insert(name.clone(), entry);
            map.insert(name.clone(), shard.into());
        }
        let text = Value::Object(entries).to_string();
        let bytes = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat();
        std::fs::write(case.file(shard), bytes).unwrap();
    }
    std::fs::remove_file(case.file("model.safetensors")).unwrap();
    change(&mut map);
    std::fs::write(case.file(INDEX), serde_json::json!({"weight_map": map}).to_string()).unwrap();
}

#[test]
fn shards_and_their_index_are_imported() {
    let case = Case::new();
    shard(&case, |_| {});
    let manifest = case.import().unwrap();
    let names: Vec<&str> = manifest.files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["config.json", INDEX, "one.safetensors", "two.safetensors"]);
}

#[test]
fn shards_that_are_not_as_their_index_says_are_refused() {
    let refused = |change: &dyn Fn(&mut serde_json::Map<String, Value>), words: &[&str]| {
        let case = Case::new();
        shard(&case, change);
        case.refused(words);
    };
    let promise = |tensor: &'static str, file: &'static str| {
        move |map: &mut serde_json::Map<String, Value>| drop(map.insert(tensor.to_owned(), file.into()))
    };
    refused(&promise("model.norm.weight", "three.safetensors"), &["three.safetensors is missing"]);
    refused(&promise("x", "../one.safetensors"), &[INDEX, "is not the name"]);
    refused(&promise("x", "one.safetensors"), &[INDEX, "tensor `x` is promised in one.safetensors"]);
    refused(&promise("model.norm.weight", "one.safetensors"), &[INDEX, "but lies in two.safetensors"]);
    let case = Case::new();
    shard(&case, |_| {});
    std::fs::copy(case.file("one.safetensors"), case.file("two.safetensors")).unwrap();
    case.refused(&["two.safetensors", "is in one.safetensors too"]);
}

#[test]
fn what_is_wrong_in_a_config_is_named() {
    let check = |name: &str, from: &str, to: &str, words: &[&str]| {
        let case = Case::new();
        case.replace(name, from, to);
        case.refused(words);
    };
    check("config.json", "\"max_position_embeddings\"", "\"max\"", &["config.json", "max_position_embeddings"]);
    check("config.json", "{", "", &["config.json", "not JSON"]);
    check("config.json", "\"model_type\"", "\"type\"", &["config.json", "model_type"]);
    check("config.json", "\"vocab_size\": 512", "\"vocab_size\": 511", &["model.safetensors", "512 rows"]);
    check("tokenizer.json", "\"model\"", "\"mode\"", &["no usable tokenizer"]);
    check("chat_template.jinja", "{% for", "{% four", &["chat template failed", "chat_template:1"]);
    check("chat_template.jinja", "m['content']", "m.no.such", &["chat template failed"]);
    check("generation_config.json", "1", "9999", &["end token 9999 is outside"]);
}

#[test]
fn a_tokenizer_larger_than_the_embeddings_is_refused() {
    let case = Case::new();
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(case.file("tokenizer.json")).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    // Its own tokens end at 460.
    for id in 461..513 {
        let mut extra = added[3].clone();
        (extra["id"], extra["content"]) = (id.into(), format!("<|extra {id}|>").into());
        added.push(extra);
    }
    std::fs::write(case.file("tokenizer.json"), tokenizer.to_string()).unwrap();
    case.refused(&["513 tokens", "512 rows"]);
}

#[test]
fn checksums_are_for_files() {
    let case = Case::new();
    let hash = Some(Hash([7; 32]));
    let folder = import(&case.dir.path().join("model"), "tiny", hash, &case.store).unwrap_err();
    assert!(matches!(folder, Error::ChecksumOfFolder(_)));
    let file = import(&case.file("config.json"), "tiny", hash, &case.store).unwrap_err();
    assert!(matches!(file, Error::Checksum { expected, .. } if Some(expected) == hash));
}

#[test]
fn other_paths_and_names_are_refused() {
    let case = Case::new();
    let check = |path: &Path, name: &str, words: &str| {
        let chain = format!("{:#}", anyhow::Error::from(import(path, name, None, &case.store).unwrap_err()));
        assert!(chain.contains(words), "`{chain}` does not say `{words}`");
    };
    check(&case.file("nothing.gguf"), "tiny", "cannot read");
    check(&case.file("config.json"), "tiny", "not a GGUF file");
    check(&case.file("config.json"), "No Name", "No Name");
}

/// The smallest GGUF that is a model to us: some tokens and their embeddings.
fn tiny_gguf(tokenizer: bool, rows: usize) -> Vec<u8> {
    let mut writer = gguf::Writer::default().key("general.architecture", "llama").key("llama.context_length", 64_u32);
    if tokenizer {
        writer = writer
            .key("tokenizer.ggml.model", "gpt2")
            .key("tokenizer.ggml.pre", "smollm")
            .key("tokenizer.ggml.tokens", ["H", "e", "l", "o", "He", "<|im_end|>"])
            .key("tokenizer.ggml.merges", ["H e"])
            .key("tokenizer.ggml.token_type", [1_i32, 1, 1, 1, 1, 3])
            .key("tokenizer.ggml.eos_token_id", 5_u32)
            .key("tokenizer.chat_template", "{{ messages[0].content }}");
    }
    writer.f32s("token_embd.weight", &[rows, 8], &vec![0.0; 8 * rows]).finish()
}

fn import_bytes(bytes: &[u8]) -> Result<Manifest, String> {
    let dir = tempfile::tempdir().unwrap();
    let store = blob::Store::open(dir.path().join("blobs")).unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    import(&path, "tiny", None, &store).map_err(|e| format!("{:#}", anyhow::Error::from(e)))
}

#[test]
fn a_gguf_is_imported_with_its_metadata() {
    let manifest = import_bytes(&tiny_gguf(true, 6)).unwrap();
    assert_eq!((manifest.kind, manifest.context, manifest.vocabulary), (Kind::Gguf, 64, 6));
    assert_eq!(manifest.files[0].name, "m.gguf");
}

#[test]
fn a_gguf_that_is_not_whole_is_refused() {
    let whole = tiny_gguf(true, 6);
    let check = |bytes: &[u8], words: &[&str]| {
        let error = import_bytes(bytes).unwrap_err();
        assert!(words.iter().all(|w| error.contains(w)), "`{error}` does not say all of {words:?}");
    };
    check(&whole[..whole.len() - 1], &["m.gguf", "tensor `token_embd.weight` reaches past the end"]);
    check(&whole[..60], &["m.gguf", "truncated or corrupt"]);
    check(&tiny_gguf(false, 6), &["m.gguf", "tokenizer.ggml.model", "missing"]);
    check(&tiny_gguf(true, 5), &["m.gguf", "`tokenizer.ggml.tokens` names 6 tokens", "5 rows"]);
    check(&tiny_gguf(true, 8), &["m.gguf", "`tokenizer.ggml.tokens` names 6 tokens", "8 rows"]);
}

#[test]
fn echo_needs_no_files() {
    let case = Case::new();
    let manifest = echo("echo", 5000, 100, &case.store).unwrap();
    assert_eq!(manifest.kind, Kind::Echo { first_token_us: 5000, next_token_us: 100 });
    assert!(manifest.files.is_empty() && case.store.has(&manifest.text.hash));
}
