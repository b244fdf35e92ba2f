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
    case.refused(&["model.safetensors", "corrupt header"]);
}

#[test]
fn a_shard_that_the_index_names_must_be_there() {
    let case = Case::new();
    let index = |name: &str| {
        let json = serde_json::json!({"weight_map": {"a": "model.safetensors", "b": name}});
        std::fs::write(case.file(INDEX), json.to_string()).unwrap();
    };
    index("model-2.safetensors");
    case.refused(&["model-2.safetensors is missing"]);
    index("../model.safetensors");
    case.refused(&[INDEX, "is not the name"]);
    index("model.safetensors");
    assert_eq!(case.import().unwrap().files.len(), 3);
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

/// The smallest GGUF that is a model to us: two tokens and their embeddings.
fn tiny_gguf(tokenizer: bool, rows: u64) -> Vec<u8> {
    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }
    fn list(id: u32, items: &[Vec<u8>]) -> Vec<u8> {
        [&id.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
    }
    let strings = |texts: &[&str]| list(8, &texts.iter().map(|t| string(t)).collect::<Vec<_>>());
    let mut keys = vec![
        ("general.architecture", 8_u32, string("llama")),
        ("llama.context_length", 4, 64_u32.to_le_bytes().to_vec()),
    ];
    if tokenizer {
        keys.push(("tokenizer.ggml.model", 8, string("gpt2")));
        keys.push(("tokenizer.ggml.pre", 8, string("smollm")));
        keys.push(("tokenizer.ggml.tokens", 9, strings(&["H", "e", "l", "o", "He", "<|im_end|>"])));
        keys.push(("tokenizer.ggml.merges", 9, strings(&["H e"])));
        let types: Vec<Vec<u8>> = [1_i32, 1, 1, 1, 1, 3].iter().map(|t| t.to_le_bytes().to_vec()).collect();
        keys.push(("tokenizer.ggml.token_type", 9, list(5, &types)));
        keys.push(("tokenizer.ggml.eos_token_id", 4, 5_u32.to_le_bytes().to_vec()));
        keys.push(("tokenizer.chat_template", 8, string("{{ messages[0].content }}")));
    }
    let mut out =
        [&b"GGUF"[..], &3_u32.to_le_bytes(), &1_u64.to_le_bytes(), &(keys.len() as u64).to_le_bytes()].concat();
    for (key, id, value) in keys {
        out.extend([string(key), id.to_le_bytes().to_vec(), value].concat());
    }
    out.extend([string("token_embd.weight"), 2_u32.to_le_bytes().to_vec()].concat());
    out.extend([1_u64.to_le_bytes(), rows.to_le_bytes()].concat());
    out.extend([&0_u32.to_le_bytes()[..], &0_u64.to_le_bytes()].concat());
    out.resize(out.len().next_multiple_of(32), 0);
    out.resize(out.len() + 4 * rows as usize, 0);
    out
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
    let manifest = import_bytes(&tiny_gguf(true, 8)).unwrap();
    assert_eq!((manifest.kind, manifest.context, manifest.vocabulary), (Kind::Gguf, 64, 8));
    assert_eq!(manifest.files[0].name, "m.gguf");
}

#[test]
fn a_gguf_that_is_not_whole_is_refused() {
    let whole = tiny_gguf(true, 8);
    let check = |bytes: &[u8], words: &[&str]| {
        let error = import_bytes(bytes).unwrap_err();
        assert!(words.iter().all(|w| error.contains(w)), "`{error}` does not say all of {words:?}");
    };
    check(&whole[..whole.len() - 1], &["m.gguf", "tensor `token_embd.weight` reaches past the end"]);
    check(&whole[..60], &["m.gguf", "truncated or corrupt"]);
    check(&tiny_gguf(false, 8), &["m.gguf", "tokenizer.ggml.model", "missing"]);
    check(&tiny_gguf(true, 5), &["m.gguf", "6 tokens", "5 rows"]);
}

#[test]
fn echo_needs_no_files() {
    let case = Case::new();
    let manifest = echo("echo", 5000, 100, &case.store).unwrap();
    assert_eq!(manifest.kind, Kind::Echo { first_token_us: 5000, next_token_us: 100 });
    assert!(manifest.files.is_empty() && case.store.has(&manifest.text.hash));
}
