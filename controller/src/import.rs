//! Import: checks a model's files, proves that its tokenizer and template work, and puts everything into the blob store.
//!
//! A model is refused here, with the file and the reason, rather than later by a worker that cannot load it. Nothing is
//! stored before everything is checked. Blocks on the disk: callers use `spawn_blocking`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use izar_common::chat::{Message, Role};
use izar_common::id::{self, DeploymentId, Hash};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::safetensors::{self, Checkpoint, Fault, INDEX};
use izar_common::text::{self, Bundle, Text};
use izar_common::{blob, gguf};
use serde_json::Value;

/// The name of the text bundle in a manifest.
const TEXT_FILE: &str = "text.json";
/// Tokens of context that the echo model takes; it needs no memory for them.
const ECHO_CONTEXT: u32 = 32_768;
/// Bytes of `config.json` and of the index of weights; the largest known index has 12 MB.
const CONFIG_LIMIT: u64 = 64 << 20;
/// The tensor whose rows are the vocabulary.
const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// Why a model cannot be imported. Names the file; what lies beneath is in the chain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the model's name is not usable")]
    Name(#[from] id::Error),
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} has the SHA-256 {found}, not {expected}", path.display())]
    Checksum { path: PathBuf, expected: Hash, found: Hash },
    #[error("{} is a folder; a checksum goes with a single file", .0.display())]
    ChecksumOfFolder(PathBuf),
    #[error("{} is not a usable GGUF model", path.display())]
    Gguf { path: PathBuf, source: gguf::Error },
    #[error("{} is not a usable part of a checkpoint", path.display())]
    Safetensors { path: PathBuf, source: safetensors::Error },
    #[error("{} has no usable tokenizer or chat template", path.display())]
    Text { path: PathBuf, source: text::Error },
    #[error("{} is missing in {}", name, folder.display())]
    Missing { folder: PathBuf, name: String },
    #[error("{} is not usable: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("{} has {tokenizer} tokens in its tokenizer, but only {rows} rows of embeddings", path.display())]
    Vocabulary { path: PathBuf, tokenizer: u32, rows: u32 },
    #[error("{} changed while it was imported", .0.display())]
    Changed(PathBuf),
    #[error("cannot store {}", path.display())]
    Store { path: PathBuf, source: anyhow::Error },
}

/// Imports a GGUF file, or a folder in Hugging Face form, under a name. Returns what to register.
pub fn import(path: &Path, name: &str, expected_sha256: Option<Hash>, store: &blob::Store) -> Result<Manifest, Error> {
    DeploymentId::new(name)?;
    let attributes = std::fs::metadata(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    if attributes.is_dir() {
        if expected_sha256.is_some() {
            return Err(Error::ChecksumOfFolder(path.to_owned()));
        }
        import_folder(path, name, store)
    } else {
        import_gguf(path, name, expected_sha256, store)
    }
}

/// Makes the echo model: deterministic words after the given times, without files.
pub fn echo(name: &str, first_token_us: u64, next_token_us: u64, store: &blob::Store) -> Result<Manifest, Error> {
    DeploymentId::new(name)?;
    Ok(Manifest {
        name: name.to_owned(),
        kind: Kind::Echo { first_token_us, next_token_us },
        files: Vec::new(),
        text: store_text(Path::new("the echo model"), &Bundle::echo(), store)?,
        context: ECHO_CONTEXT,
        vocabulary: text::echo::VOCABULARY,
        architecture: "echo".to_owned(),
    })
}

fn import_gguf(path: &Path, name: &str, expected: Option<Hash>, store: &blob::Store) -> Result<Manifest, Error> {
    let wrong = |source| Error::Gguf { path: path.to_owned(), source };
    let (found, _) = blob::hash_file(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        return Err(Error::Checksum { path: path.to_owned(), expected, found });
    }
    let file = gguf::File::open(path).map_err(wrong)?;
    let architecture = file.str("general.architecture").map_err(wrong)?.to_owned();
    let context = file.u32(&format!("{architecture}.context_length")).map_err(wrong)?;
    let embeddings = "token_embd.weight";
    let tensor = file.tensor(embeddings).ok_or_else(|| wrong(gguf::Error::NoTensor(embeddings.to_owned())))?;
    // ggml's order: the width first, then the rows.
    let rows = tensor.dims.get(1).copied().unwrap_or(0).try_into().unwrap_or(u32::MAX);
    let bundle = Bundle::from_gguf(&file).map_err(|source| Error::Text { path: path.to_owned(), source })?;
    let tokens = file.strings("tokenizer.ggml.tokens").map_err(wrong)?.len();
    if tokens != rows as usize {
        let reason = format!("`tokenizer.ggml.tokens` names {tokens} tokens, but there are {rows} rows of embeddings");
        return Err(Error::Malformed { path: path.to_owned(), reason });
    }
    prove(path, &bundle, context, rows)?;
    let stored = store_file(path, store)?;
    if stored.hash != found {
        return Err(Error::Changed(path.to_owned()));
    }
    Ok(Manifest {
        name: name.to_owned(),
        kind: Kind::Gguf,
        files: vec![stored],
        text: store_text(path, &bundle, store)?,
        context,
        vocabulary: rows,
        architecture,
    })
}

fn import_folder(folder: &Path, name: &str, store: &blob::Store) -> Result<Manifest, Error> {
    let config_path = folder.join("config.json");
    let config = read_json(folder, "config.json")?;
    let number = |key: &str| {
        let value = config[key].as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        let reason = || format!("`{key}` is missing or not a number");
        value.ok_or_else(|| Error::Malformed { path: config_path.clone(), reason: reason() })
    };
    let (context, vocabulary) = (number("max_position_embeddings")?, number("vocab_size")?);
    let architecture = config["model_type"]
        .as_str()
        .ok_or_else(|| Error::Malformed { path: config_path.clone(), reason: "`model_type` is missing".to_owned() })?;
    let mut names = vec!["config.json".to_owned()];
    names.extend(weights(folder)?);
    check_weights(folder, &names, vocabulary)?;
    let bundle = Bundle::from_folder(folder).map_err(|source| match source {
        text::Error::Missing { name } => Error::Missing { folder: folder.to_owned(), name: name.to_owned() },
        source => Error::Text { path: folder.to_owned(), source },
    })?;
    prove(folder, &bundle, context, vocabulary)?;
    let files = names.iter().map(|name| store_file(&folder.join(name), store)).collect::<Result<_, _>>()?;
    Ok(Manifest {
        name: name.to_owned(),
        kind: Kind::Safetensors,
        files,
        text: store_text(folder, &bundle, store)?,
        context,
        vocabulary,
        architecture: architecture.to_owned(),
    })
}

/// The names of the files that hold weights, and of their index if there is one.
fn weights(folder: &Path) -> Result<Vec<String>, Error> {
    if folder.join(INDEX).exists() {
        let index = read_file(folder, INDEX)?;
        let shards = Checkpoint::shards(&index).map_err(|fault| unusable(folder, fault))?;
        if let Some(missing) = shards.iter().find(|name| !folder.join(name).exists()) {
            return Err(Error::Missing { folder: folder.to_owned(), name: missing.clone() });
        }
        return Ok(std::iter::once(INDEX.to_owned()).chain(shards).collect());
    }
    let unreadable = |source| Error::Read { path: folder.to_owned(), source };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        names.extend(name.to_str().filter(|n| n.ends_with(".safetensors")).map(str::to_owned));
    }
    if names.is_empty() {
        return Err(Error::Missing { folder: folder.to_owned(), name: "model.safetensors".to_owned() });
    }
    Ok(names.into_iter().collect())
}

/// Checks every shard, that they are as their index says, and that there is a row for every token.
fn check_weights(folder: &Path, names: &[String], vocabulary: u32) -> Result<(), Error> {
    let index = names.iter().any(|name| name == INDEX).then(|| read_file(folder, INDEX)).transpose()?;
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    let files: Vec<(&str, &Path)> = names.iter().map(String::as_str).zip(paths.iter().map(PathBuf::as_path)).collect();
    let shards: Vec<_> = files.into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect();
    let checkpoint = Checkpoint::open(&shards, index.as_deref()).map_err(|fault| unusable(folder, fault))?;
    let Some((file, tensor)) = checkpoint.tensor(EMBEDDINGS) else {
        let source = safetensors::Error::NoTensor(EMBEDDINGS.to_owned());
        return Err(Error::Safetensors { path: folder.to_owned(), source });
    };
    match tensor.shape.first() {
        Some(rows) if *rows == u64::from(vocabulary) => Ok(()),
        rows => {
            let rows = rows.copied().unwrap_or_default();
            let reason = format!("it has {rows} rows of embeddings, but config.json says `vocab_size` {vocabulary}");
            Err(Error::Malformed { path: folder.join(file), reason })
        }
    }
}

fn unusable(folder: &Path, fault: Fault) -> Error {
    Error::Safetensors { path: folder.join(fault.file), source: fault.source }
}

fn read_json(folder: &Path, name: &str) -> Result<Value, Error> {
    let malformed = |e| Error::Malformed { path: folder.join(name), reason: format!("not JSON: {e}") };
    serde_json::from_slice(&read_file(folder, name)?).map_err(malformed)
}

/// Reads a file of JSON whole.
fn read_file(folder: &Path, name: &str) -> Result<Vec<u8>, Error> {
    let path = folder.join(name);
    let read = || -> std::io::Result<Option<Vec<u8>>> {
        let long = std::fs::metadata(&path)?.len() > CONFIG_LIMIT;
        if long { Ok(None) } else { std::fs::read(&path).map(Some) }
    };
    match read() {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(Error::Malformed { path, reason: format!("it is larger than {CONFIG_LIMIT} bytes") }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::Missing { folder: folder.to_owned(), name: name.to_owned() })
        }
        Err(source) => Err(Error::Read { path, source }),
    }
}

/// Uses the tokenizer and the template once, and holds them against the model.
fn prove(path: &Path, bundle: &Bundle, context: u32, rows: u32) -> Result<(), Error> {
    let wrong = |source| Error::Text { path: path.to_owned(), source };
    let text = Text::new(bundle).map_err(wrong)?;
    if text.vocabulary() > rows {
        return Err(Error::Vocabulary { path: path.to_owned(), tokenizer: text.vocabulary(), rows });
    }
    let malformed = |reason: &str| Error::Malformed { path: path.to_owned(), reason: reason.to_owned() };
    if context == 0 {
        return Err(malformed("its context has no tokens"));
    }
    let sample = "Hello";
    if text.encode(sample).map_err(wrong)?.is_empty() {
        return Err(malformed("its tokenizer makes no tokens of `Hello`"));
    }
    if text.has_chat() {
        match text.encode_chat(&[Message { role: Role::User, content: sample.to_owned() }]) {
            // A template may want other messages; that it can say so proves that it works.
            Ok(_) | Err(text::Error::Refused(_)) => {}
            Err(error) => return Err(wrong(error)),
        }
    }
    Ok(())
}

fn store_file(path: &Path, store: &blob::Store) -> Result<File, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match store.add_file(path) {
        Ok((hash, bytes)) => Ok(File { name, hash, bytes }),
        Err(source) => Err(Error::Store { path: path.to_owned(), source }),
    }
}

fn store_text(path: &Path, bundle: &Bundle, store: &blob::Store) -> Result<File, Error> {
    let json = serde_json::to_vec(bundle).expect("a bundle has only string keys");
    match store.add_bytes(&json) {
        Ok(hash) => Ok(File { name: TEXT_FILE.to_owned(), hash, bytes: json.len() as u64 }),
        Err(source) => Err(Error::Store { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests;
