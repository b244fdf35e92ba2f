//! Replays what the fuzz targets have found worth keeping: seeds, and inputs that once broke something.

#[path = "../../tests/fuzz/src/targets.rs"]
mod targets;

use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", folder.display());
    for file in files {
        println!("{}", file.display());
        run(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn gguf_files_are_taken_or_refused() {
    replay("gguf", targets::gguf);
}

#[test]
fn safetensors_files_are_taken_or_refused() {
    replay("safetensors", targets::safetensors);
}

#[test]
fn tokenizers_are_taken_or_refused() {
    replay("tokenizer", targets::tokenizer);
}
