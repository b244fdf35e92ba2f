//! A checkpoint and the GGUF file that ggml's converter would make of it are the same model.

use std::path::Path;

use izar_agent::model::config::Config;
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, Options, Wants, gguf};
use izar_agent::ops::{CacheFormat, Format};
use izar_common::chat::Token;
use izar_common::gguf::{Value, Writer};

fn metadata(config: &Config) -> Writer {
    Writer::default()
        .key("general.architecture", "llama")
        .key("llama.context_length", config.context)
        .key("llama.block_count", config.layers)
        .key("llama.embedding_length", config.hidden)
        .key("llama.feed_forward_length", config.intermediate)
        .key("llama.attention.head_count", config.heads)
        .key("llama.attention.head_count_kv", config.kv_heads())
        .key("llama.rope.dimension_count", config.head_dim())
        .key("llama.attention.layer_norm_rms_epsilon", config.norm_epsilon)
        .key("llama.rope.freq_base", config.rope_theta)
        .key("tokenizer.ggml.tokens", (0..config.vocabulary).map(|i| Value::String(format!("t{i}"))).collect::<Value>())
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
    let (q, kv) = (config.heads * config.head_dim(), config.kv_heads() * config.head_dim());
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
    let mut writer = metadata(config);
    for (name, shape) in names(config) {
        let rows = source.rows(config, &name, &shape).unwrap();
        let rows = match &name {
            n if n.contains("q_proj") => interleave(&rows, config.heads, config.hidden),
            n if n.contains("k_proj") => interleave(&rows, config.kv_heads(), config.hidden),
            _ => rows,
        };
        writer = writer.f32s(&gguf::place(&name).unwrap().name, &shape, &rows);
    }
    writer
}

fn logits(config: &Config, source: &Source, prompt: &[Token]) -> Vec<f32> {
    let options = Options { format: Format::F32, cache: CacheFormat::F32, cache_bytes: 1 << 24, ..Options::default() };
    let mut model = model::build(config, source, &options).unwrap().model;
    let mut batch = Batch::default();
    batch.push(0, prompt, Wants::Last, &[0, 1, 2, 3]);
    model.forward(&batch).rows().next().unwrap().to_vec()
}

#[test]
fn a_converted_checkpoint_gives_the_same_logits() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama"));
    let checkpoint = Source::open(folder).unwrap();
    let config = checkpoint.config().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama.gguf");
    std::fs::write(&path, convert(&checkpoint, &config).finish()).unwrap();
    let converted = Source::open(&path).unwrap();
    assert_eq!(converted.config().unwrap(), config);
    let prompt = [413, 5, 77, 500, 2, 3, 4];
    assert_eq!(logits(&config, &converted, &prompt), logits(&config, &checkpoint, &prompt));
}
