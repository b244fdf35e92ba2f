//! The ready file: what a cluster of `izar dev` consists of now, for scripts, tests, `izar chat` and `izar bench`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// The file's content. It holds a key, so it is written with mode 0600.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// HTTPS, of the first controller; `/v1` comes after it.
    pub endpoint: String,
    /// The same over plain HTTP, on loopback, if it is on.
    pub plaintext_endpoint: Option<String>,
    /// The CA that signed the API's certificate.
    pub ca: PathBuf,
    pub key: String,
    /// The deployment's name.
    pub model: String,
    /// The cluster's folder: configuration, data, `logs/`.
    pub dir: PathBuf,
    pub processes: Vec<Process>,
}

/// A process that runs now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub role: Role,
    /// The node's name, or the worker's.
    pub id: String,
    pub pid: u32,
    /// A worker's agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_socket: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Controller,
    Agent,
    Worker,
}

impl Ready {
    /// The API of every controller, the first one's first.
    pub fn endpoints(&self) -> Vec<String> {
        let others = self.processes.iter().filter_map(|process| process.endpoint.clone());
        std::iter::once(self.endpoint.clone()).chain(others.filter(|other| *other != self.endpoint)).collect()
    }

    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
    }

    /// Replaces the file: a reader sees the old content or the new, never half of one.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        write_private(path, text.as_bytes())
    }
}

/// Writes a file that its owner alone may read, atomically.
pub fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let mut name = path.file_name().context("a file name is needed")?.to_owned();
    name.push(".new");
    let part = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(content)?;
        std::fs::rename(&part, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_round_trips_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready.json");
        let process = Process {
            role: Role::Worker,
            id: "echo.0".into(),
            pid: 7,
            agent: Some("a1".into()),
            admin_socket: None,
            endpoint: None,
            plaintext_endpoint: None,
        };
        let ready = Ready {
            endpoint: "https://127.0.0.1:8443".into(),
            plaintext_endpoint: None,
            ca: "/ca.pem".into(),
            key: "sk".into(),
            model: "echo".into(),
            dir: "/d".into(),
            processes: vec![process],
        };
        ready.write(&path).unwrap();
        ready.write(&path).unwrap();
        assert_eq!(Ready::read(&path).unwrap(), ready);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
