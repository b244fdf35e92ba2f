//! A model that lies on this machine, described as an agent would be told of it. Files are not hashed: nobody else
//! sees this description.

use std::path::{Path, PathBuf};

use anyhow::Context;
use izar_common::chat::Token;
use izar_common::id::Hash;
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::text::{Bundle, Text};

use crate::model::config::Config;
use crate::model::weights::Source;

/// A GGUF file or a folder in Hugging Face form.
#[derive(Debug, Clone)]
pub struct Local {
    pub path: PathBuf,
    pub manifest: Manifest,
    /// Where each of the manifest's files lies.
    pub files: Vec<PathBuf>,
    pub config: Config,
    /// Weights in all.
    pub parameters: u64,
    /// Weights that computing one token reads: a table of embeddings that is not the head as well is left out.
    pub read_parameters: u64,
    /// Bytes of the weights as they lie in the files.
    pub stored_bytes: u64,
}

impl Local {
    /// Reads a model's headers.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let context = || format!("open the model {}", path.display());
        let source = Source::open(path).with_context(context)?;
        let config = source.config().with_context(context)?;
        let kind = if path.is_dir() { Kind::Safetensors } else { Kind::Gguf };
        let files = if path.is_dir() { folder(path).with_context(context)? } else { vec![path.to_owned()] };
        let file = |path: &PathBuf| File {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            hash: Hash([0; 32]),
            bytes: 0,
        };
        let manifest = Manifest {
            name: "bench".into(),
            kind,
            files: files.iter().map(file).collect(),
            text: File { name: "text".into(), hash: Hash([0; 32]), bytes: 0 },
            context: config.context as u32,
            vocabulary: config.vocabulary as u32,
            architecture: if path.is_dir() { config.family.name() } else { config.family.ggml_name() }.to_owned(),
        };
        let (mut parameters, mut stored_bytes, mut embeddings, mut head) = (0, 0, 0, false);
        for entry in source.entries() {
            parameters += entry.elements;
            stored_bytes += entry.bytes;
            match entry.name.as_str() {
                "model.embed_tokens.weight" | "token_embd.weight" => embeddings = entry.elements,
                "lm_head.weight" | "output.weight" => head = true,
                _ => {}
            }
        }
        let read_parameters = if head { parameters - embeddings } else { parameters };
        Ok(Self { path: path.to_owned(), manifest, files, config, parameters, read_parameters, stored_bytes })
    }

    /// What reports call it.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// The model's language.
    pub fn text(&self) -> anyhow::Result<Text> {
        let context = || format!("read the tokenizer of {}", self.path.display());
        let bundle = match Source::open(&self.path).with_context(context)? {
            Source::Gguf { file, .. } => Bundle::from_gguf(&file),
            Source::Safetensors(_) => Bundle::from_folder(&self.path),
        };
        bundle.and_then(|bundle| Text::new(&bundle)).with_context(context)
    }

    /// Tokens that look random and are the same every time: those of one `stream` share no beginning with another's.
    pub fn prompt(&self, stream: u64, tokens: usize) -> Vec<Token> {
        let vocabulary = self.config.vocabulary as u64;
        (0..tokens as u64).map(|at| (mix(stream << 32 | at) % vocabulary) as Token).collect()
    }
}

/// Spreads a counter over all numbers. Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators".
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn folder(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json" || e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_described_and_its_prompts_differ() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama");
        let local = Local::open(Path::new(folder)).unwrap();
        assert_eq!((local.manifest.kind.clone(), local.manifest.vocabulary), (Kind::Safetensors, 512));
        assert_eq!(local.stored_bytes, local.parameters * 4);
        assert!(local.files.iter().any(|f| f.ends_with("model.safetensors")));
        let (one, two) = (local.prompt(1, 20), local.prompt(2, 20));
        assert_eq!(one, local.prompt(1, 20));
        assert!(one[0] != two[0] && one.iter().all(|t| *t < 512));
        assert!(Local::open(Path::new("/nonexistent/m.gguf")).is_err());
    }
}
