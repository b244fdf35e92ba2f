//! What is tried with bytes from outside: each must be taken or refused, never panic, and keep its promises if taken.
//!
//! Shared by the fuzz targets and by the test that replays their corpus.

use std::sync::Arc;

use izar_common::chat::{Message, Role};
use izar_common::text::{self, Bundle, Text};
use izar_common::{gguf, safetensors};

/// Bytes that the tokenizer target takes; more would only make it slow.
const TOKENIZER_BYTES: usize = 64 << 10;

/// A GGUF file: its directory, its metadata and every tensor's bytes.
pub fn gguf(bytes: &[u8]) {
    let Ok(file) = gguf::File::from_bytes(bytes.to_vec()) else { return };
    for tensor in file.tensors() {
        let (same, data) = file.data(&tensor.name).expect("a tensor of the directory can be read");
        assert_eq!((same, data.len() as u64), (tensor, tensor.bytes));
        let blocks = tensor.elements() / tensor.ggml_type.block_elements();
        assert_eq!(blocks * tensor.ggml_type.block_bytes(), tensor.bytes);
    }
    for (key, value) in file.metadata() {
        // The same value, not an equal one: a number that is none equals nothing.
        assert!(file.meta(key).is_some_and(|found| std::ptr::eq(found, value)));
        // Whatever the type, asking for another one is an error and nothing worse.
        let _ = (file.str(key).is_ok(), file.u32(key).is_ok(), file.f32(key).is_ok(), file.bool(key).is_ok());
        let _ = (file.strings(key).is_ok(), file.u32s(key).is_ok(), file.f32s(key).is_ok());
    }
}

/// A safetensors file, or the index of a checkpoint.
pub fn safetensors(bytes: &[u8]) {
    let _ = safetensors::Checkpoint::shards(bytes);
    let Ok(file) = safetensors::File::from_bytes(bytes.to_vec()) else { return };
    let mut total = 0;
    for tensor in file.tensors() {
        let data = file.data(&tensor.name).expect("a tensor of the directory can be read");
        assert_eq!(data.len() as u64, tensor.bytes);
        assert_eq!(tensor.elements() * tensor.dtype.bytes(), tensor.bytes);
        total += tensor.bytes;
    }
    assert!(total <= bytes.len() as u64, "tensors do not share bytes");
}

/// The tokenizer and the template in a GGUF file's metadata, or a `tokenizer.json`; made, and used once.
pub fn tokenizer(bytes: &[u8]) {
    if bytes.len() > TOKENIZER_BYTES {
        return;
    }
    let bundle = if bytes.starts_with(b"GGUF") {
        let Ok(file) = gguf::File::from_bytes(bytes.to_vec()) else { return };
        let Ok(bundle) = Bundle::from_gguf(&file) else { return };
        bundle
    } else {
        let Ok(json) = serde_json::from_slice(bytes) else { return };
        Bundle { tokenizer: Some(json), ..Bundle::echo() }
    };
    let Ok(text) = Text::new(&bundle).map(Arc::new) else { return };
    for sample in ["Hello, world 123", " \n\t", "早上好 ▁Ġ😀", "<s>"] {
        let Ok(tokens) = text.encode(sample) else { continue };
        let mut decoder = text.decoder();
        tokens.iter().for_each(|token| drop(decoder.push(*token)));
        decoder.finish();
        assert!(tokens.iter().all(|token| *token < text.vocabulary()), "tokens are of the vocabulary");
    }
    let message = |role, content: &str| Message { role, content: content.to_owned() };
    let chat = [message(Role::System, "Be brief."), message(Role::User, "<s>Hi</s>")];
    match text.encode_chat_at(&chat, 1_700_000_000_000) {
        Ok(tokens) => assert!(tokens.iter().all(|token| *token < text.vocabulary())),
        Err(text::Error::NoTemplate) => assert!(!text.has_chat()),
        Err(_) => assert!(text.has_chat()),
    }
}
