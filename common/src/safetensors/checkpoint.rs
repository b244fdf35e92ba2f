//! A checkpoint in one file or in shards, held against its index.
//!
//! The index says which shard holds which tensor. A shard from another download, or a half-renamed folder, would give a
//! model of mixed weights: so each promise of the index is checked, and no tensor may be in two files.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde::Deserialize;

use super::header::Unique;
use super::{Error, File, Tensor};

/// The index's name in a folder.
pub const INDEX: &str = "model.safetensors.index.json";

/// A file of a checkpoint that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{file} cannot be used")]
pub struct Fault {
    pub file: String,
    pub source: Error,
}

/// The files of a checkpoint, opened and checked.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(String, File)>,
    /// Which file holds a tensor.
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    /// From tensor to file.
    weight_map: Unique<String>,
}

impl Checkpoint {
    /// The files that an index names, each once.
    ///
    /// A name that is not that of a file beside the index is refused: it could lead out of the folder.
    pub fn shards(index: &[u8]) -> Result<BTreeSet<String>, Fault> {
        let names: BTreeSet<String> = read_index(index)?.weight_map.0.into_iter().map(|(_, file)| file).collect();
        for name in &names {
            if Path::new(name).file_name() != Some(name.as_ref()) || !name.ends_with(".safetensors") {
                return Err(contradiction(INDEX, format!("`{name}` is not the name of a safetensors file")));
            }
        }
        Ok(names)
    }

    /// Opens files, each with the name that it has in its folder, and holds them against the index if there is one.
    /// With an index, files that it does not name are left alone.
    pub fn open(files: &[(&str, &Path)], index: Option<&[u8]>) -> Result<Self, Fault> {
        let named = index.map(Self::shards).transpose()?;
        let mut checkpoint = Self { files: Vec::new(), by_name: HashMap::new() };
        for (name, path) in files.iter().filter(|(name, _)| named.as_ref().is_none_or(|named| named.contains(*name))) {
            let file = File::open(path).map_err(|source| Fault { file: (*name).to_owned(), source })?;
            checkpoint.add(name, file)?;
        }
        if let Some(index) = index {
            checkpoint.keep_promises(read_index(index)?)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, name: &str, file: File) -> Result<(), Fault> {
        for tensor in file.tensors() {
            if let Some(other) = self.by_name.insert(tensor.name.clone(), self.files.len()) {
                let what = format!("tensor `{}` is in {} too", tensor.name, self.files[other].0);
                return Err(contradiction(name, what));
            }
        }
        self.files.push((name.to_owned(), file));
        Ok(())
    }

    fn keep_promises(&self, index: Index) -> Result<(), Fault> {
        for (tensor, promised) in index.weight_map.0 {
            let found = self.by_name.get(&tensor).map(|&i| self.files[i].0.as_str());
            if found == Some(&promised) {
                continue;
            }
            let wrong = |what: String| Err(contradiction(INDEX, format!("tensor `{tensor}` {what}")));
            return match found {
                _ if !self.files.iter().any(|(name, _)| *name == promised) => {
                    wrong(format!("is promised in {promised}, which is missing"))
                }
                Some(found) => wrong(format!("is promised in {promised}, but lies in {found}")),
                None => wrong(format!("is promised in {promised}, which does not hold it")),
            };
        }
        Ok(())
    }

    /// A tensor, and the name of the file that holds it.
    pub fn tensor(&self, name: &str) -> Option<(&str, &Tensor)> {
        let (file_name, file) = &self.files[*self.by_name.get(name)?];
        file.tensor(name).map(|tensor| (file_name.as_str(), tensor))
    }
    /// Every tensor, file after file.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.files.iter().flat_map(|(_, file)| file.tensors())
    }
    /// Reads one tensor's bytes.
    pub fn data(&self, name: &str) -> Result<Vec<u8>, Fault> {
        let Some(&index) = self.by_name.get(name) else {
            return Err(Fault { file: "*.safetensors".into(), source: Error::NoTensor(name.to_owned()) });
        };
        let (file_name, file) = &self.files[index];
        file.data(name).map_err(|source| Fault { file: file_name.clone(), source })
    }
}

fn read_index(index: &[u8]) -> Result<Index, Fault> {
    serde_json::from_slice(index).map_err(|e| contradiction(INDEX, format!("not an index of tensors: {e}")))
}

fn contradiction(file: &str, what: String) -> Fault {
    Fault { file: file.to_owned(), source: Error::Contradiction(what) }
}
