//! What a model is: named files with their hashes, and what a controller must know to speak for it.

use serde::{Deserialize, Serialize};

use crate::id::Hash;

/// A file of a model, named by its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    pub name: String,
    pub hash: Hash,
    pub bytes: u64,
}

/// What kind of model the files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Deterministic words without weights, for tests and benchmarks. Times in microseconds.
    Echo { first_token_us: u64, next_token_us: u64 },
    /// One GGUF file.
    Gguf,
    /// A folder in Hugging Face form: `config.json`, `*.safetensors`.
    Safetensors,
}

/// One model revision, whole and immutable. Its hash (see [`Manifest::revision`]) names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The name it was imported under; revisions of one name follow each other.
    pub name: String,
    pub kind: Kind,
    pub files: Vec<File>,
    /// Tokenizer, chat template and special tokens (`text::Bundle` as JSON): all that a controller needs of the model.
    pub text: File,
    /// Tokens of prompt and answer together that the model was made for.
    pub context: u32,
    pub vocabulary: u32,
    /// `llama`, `echo`, …: which decoder runs it.
    pub architecture: String,
}

impl Manifest {
    /// Names this revision: SHA-256 of its JSON.
    pub fn revision(&self) -> Hash {
        crate::blob::hash(&serde_json::to_vec(self).expect("a manifest has only string keys"))
    }
    /// Every file, the text bundle included.
    pub fn all_files(&self) -> impl Iterator<Item = &File> {
        std::iter::once(&self.text).chain(&self.files)
    }
}
