//! A checkpoint and the GGUF file that ggml's converter would make of it are the same model.

use std::path::Path;

use izar_agent::model::config::Config;
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, SequenceId, Wants, gguf};
use izar_common::chat::Token;

/// Where tensors begin, and each one after another.
const ALIGNMENT: usize = 32;

/// Writes GGUF files, version 3.
#[derive(Default)]
struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    directory: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Writer {
    fn key(&mut self, name: &str, kind: u32, value: &[u8]) {
        put_text(&mut self.keys, name);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
    }
    fn size(&mut self, name: &str, value: usize) {
        self.key(name, 4, &(value as u32).to_le_bytes());
    }
    fn text(&mut self, name: &str, value: &str) {
        let mut bytes = Vec::new();
        put_text(&mut bytes, value);
        self.key(name, 8, &bytes);
    }
    /// Adds a tensor of f32; `shape` has the outermost axis first.
    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        put_text(&mut self.directory, name);
        self.directory.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| self.directory.extend((*n as u64).to_le_bytes()));
        self.directory.extend(0_u32.to_le_bytes());
        self.directory.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensor_count += 1;
    }
    fn write(self, path: &Path) {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(self.keys);
        out.extend(self.directory);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(self.data);
        std::fs::write(path, out).unwrap();
    }
}

fn metadata(writer: &mut Writer, config: &Config) {
    writer.text("general.architecture", "llama");
    writer.size("llama.context_length", config.context);
    writer.size("llama.block_count", config.layers);
    writer.size("llama.embedding_length", config.hidden);
    writer.size("llama.feed_forward_length", config.intermediate);
    writer.size("llama.attention.head_count", config.heads);
    writer.size("llama.attention.head_count_kv", config.kv_heads);
    writer.size("llama.rope.dimension_count", config.head_dim);
    writer.key("llama.attention.layer_norm_rms_epsilon", 6, &config.norm_epsilon.to_le_bytes());
    writer.key("llama.rope.freq_base", 6, &config.rope_theta.to_le_bytes());
    let mut tokens = 8_u32.to_le_bytes().to_vec();
    tokens.extend((config.vocabulary as u64).to_le_bytes());
    (0..config.vocabulary).for_each(|i| put_text(&mut tokens, &format!("t{i}")));
    writer.key("tokenizer.ggml.tokens", 9, &tokens);
}

/// What ggml's converter does to query and key rows: the halves of each head interleaved.
fn interleave(rows: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let head_dim = rows.len() / columns / heads;
    let mut out = Vec::new();
    for head in rows.chunks_exact(head_dim * columns) {
        for pair in 0..head_dim / 2 {
            for row in [pair, pair + head_dim / 2] {
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

fn names(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (hidden, wide) = (config.hidden, config.intermediate);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut all = vec![
        ("model.embed_tokens".to_owned(), vec![config.vocabulary, hidden]),
        ("model.norm".to_owned(), vec![hidden]),
        ("lm_head".to_owned(), vec![config.vocabulary, hidden]),
    ];
    for layer in 0..config.layers {
        for (part, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("mlp.gate_proj", vec![wide, hidden]),
            ("mlp.up_proj", vec![wide, hidden]),
            ("mlp.down_proj", vec![hidden, wide]),
        ] {
            all.push((format!("model.layers.{layer}.{part}"), shape));
        }
    }
    all.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape)).collect()
}

/// Converts a llama checkpoint.
fn convert(source: &Source, config: &Config) -> Writer {
    let mut writer = Writer::default();
    metadata(&mut writer, config);
    for (name, shape) in names(config) {
        let rows = source.rows(config, &name, &shape).unwrap();
        let rows = match &name {
            n if n.contains("q_proj") => interleave(&rows, config.heads, config.hidden),
            n if n.contains("k_proj") => interleave(&rows, config.kv_heads, config.hidden),
            _ => rows,
        };
        writer.tensor(&gguf::name(&name).unwrap(), &shape, &rows);
    }
    writer
}

fn logits(config: &Config, source: &Source, prompt: &[Token]) -> Vec<f32> {
    let mut model = model::build(config, source).unwrap();
    let mut batch = Batch::default();
    batch.push(SequenceId(0), 0, prompt, Wants::Last);
    model.forward(&batch).rows().next().unwrap().to_vec()
}

#[test]
fn a_converted_checkpoint_gives_the_same_logits() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama"));
    let checkpoint = Source::open(folder).unwrap();
    let config = checkpoint.config().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama.gguf");
    convert(&checkpoint, &config).write(&path);
    let converted = Source::open(&path).unwrap();
    assert_eq!(converted.config().unwrap(), config);
    let prompt = [413, 5, 77, 500, 2, 3, 4];
    assert_eq!(logits(&config, &converted, &prompt), logits(&config, &checkpoint, &prompt));
}

#[test]
fn metadata_that_changes_the_computation_is_refused_by_its_key() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama"));
    let config = Source::open(folder).unwrap().config().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let said = |change: &dyn Fn(&mut Writer)| {
        let mut writer = Writer::default();
        metadata(&mut writer, &config);
        change(&mut writer);
        writer.write(&path);
        Source::open(&path).unwrap().config().map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(said(&|w| w.size("llama.expert_count", 0)), Ok(()));
    assert_eq!(
        said(&|w| w.size("llama.expert_count", 8)),
        Err("m.gguf: key `llama.expert_count` is not supported".into())
    );
    let yarn = said(&|w| w.text("llama.rope.scaling.type", "yarn")).unwrap_err();
    assert!(yarn.contains("`llama.rope.scaling.type` is \"yarn\""), "{yarn}");
    let width = said(&|w| w.size("llama.attention.value_length", 8)).unwrap_err();
    assert!(width.contains("`llama.attention.value_length` differs"), "{width}");
}
