//! TOML files of the daemons: read whole, once, at start; a mistake is named with its file, line, column and key.
//!
//! What the keys mean is the business of each daemon's struct, which carries `deny_unknown_fields`, so that a typo is an
//! error and never a silent default. A file of a key may be named as `credential:NAME`, one that the service manager hands
//! over at the start. Nothing here reads the environment.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Largest configuration file. A daemon's file has some hundred lines; more means that the wrong file was named.
const FILE_LIMIT: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration {path}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path} has {bytes} bytes, the limit is {FILE_LIMIT}", path = path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    /// The text does not fit; `key` is empty where the mistake is in no key.
    #[error("{path}:{line}:{column}: {key}{message}", path = path.display(), key = prefix(key))]
    Wrong { path: PathBuf, line: usize, column: usize, key: String, message: String },
}

fn prefix(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("`{key}`: ") }
}

/// Reads a configuration file.
pub fn load<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<T, Error> {
    let path = path.as_ref();
    let read = |source| Error::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(read)?.len();
    if bytes > FILE_LIMIT {
        return Err(Error::TooLarge { path: path.to_owned(), bytes });
    }
    parse(path, &std::fs::read_to_string(path).map_err(read)?)
}

/// Reads a configuration from `text`; `path` is what errors call it.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        let (line, column) = position(text, span.start);
        // A parser's message may have several lines; an error has one.
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Wrong { path: path.to_owned(), line, column, key: key_at(text, span), message }
    })
}

/// What stands before the name of a credential where a file of a key is named.
const CREDENTIAL: &str = "credential:";

/// Finds a file that a configuration names: relative paths count from the configuration's own folder, `credential:NAME`
/// from the folder of credentials. Where there is none, the name stays, and whoever reads it says so.
pub fn locate(base: &Path, file: &Path, credentials: Option<&Path>) -> PathBuf {
    match (credential_name(file), credentials) {
        (Some(name), Some(credentials)) => credentials.join(name),
        (Some(_), None) => file.to_owned(),
        (None, _) => base.join(file),
    }
}

/// The credential that a path stands for, if it does.
pub fn credential_name(file: &Path) -> Option<&str> {
    file.to_str()?.strip_prefix(CREDENTIAL).filter(|name| !name.is_empty() && !name.contains('/'))
}

/// Line and column, both from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Names the key around a span, with its table: `tls.ca`.
///
/// Works on lines, since a parser's error has no path: good enough for the files that people write.
fn key_at(text: &str, span: Range<usize>) -> String {
    let (line, _) = position(text, span.start);
    let lines: Vec<&str> = text.lines().take(line).collect();
    let here = lines.last().copied().unwrap_or_default().trim();
    let table = lines.iter().rev().map(|l| l.trim()).find(|l| l.starts_with('['));
    let table = table.map(|l| l.split(']').next().unwrap_or(l).trim_matches(['[', ' '])).unwrap_or_default();
    match here.split_once('=') {
        Some((key, _)) if table.is_empty() => key.trim().to_owned(),
        Some((key, _)) => format!("{table}.{}", key.trim()),
        None => table.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Daemon {
        node: String,
        tls: Tls,
        #[serde(default)]
        members: Vec<Member>,
    }
    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Tls {
        ca: PathBuf,
    }
    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Member {
        id: u64,
    }

    fn check(text: &str, expected: &str) {
        let error = parse::<Daemon>(Path::new("/etc/izar/c.toml"), text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}\nshould start with\n{expected}");
    }

    #[test]
    fn a_right_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "node = \"n\"\n[tls]\nca = \"ca.pem\"\n[[members]]\nid = 1\n").unwrap();
        let daemon: Daemon = load(&path).unwrap();
        assert_eq!(daemon.members, [Member { id: 1 }]);
    }

    #[test]
    fn mistakes_name_file_line_column_and_key() {
        check("node = \"n\"\n[tls]\nca = \"x\"\ncert = 1\n", "/etc/izar/c.toml:4:1: `tls.cert`: unknown field `cert`");
        check("nod = \"n\"\n", "/etc/izar/c.toml:1:1: `nod`: unknown field `nod`");
        check("node = 5\n[tls]\nca = \"x\"\n", "/etc/izar/c.toml:1:8: `node`: invalid type: integer");
        check("node = \"n\"\n[tls]\n", "/etc/izar/c.toml:2:1: `tls`: missing field `ca`");
        check("node = \"n\"\ntls.ca = \n", "/etc/izar/c.toml:2:");
        check(
            "node = \"n\"\n[tls]\nca = \"x\"\n[[members]]\nid = 1\n[[members]]\nid = \"b\"\n",
            "/etc/izar/c.toml:7:6: `members.id`: invalid type",
        );
    }

    #[test]
    fn files_are_found_beside_the_configuration_and_credentials_in_their_folder() {
        let check = |file: &str, credentials: Option<&str>, expected: &str| {
            let found = locate(Path::new("/etc/izar"), Path::new(file), credentials.map(Path::new));
            assert_eq!(found, Path::new(expected));
        };
        check("pki/node.key", Some("/run/c"), "/etc/izar/pki/node.key");
        check("/srv/node.key", None, "/srv/node.key");
        check("credential:node.key", Some("/run/c"), "/run/c/node.key");
        check("credential:node.key", None, "credential:node.key");
        check("credential:../shadow", Some("/run/c"), "/etc/izar/credential:../shadow");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load::<Daemon>("/no/such/file.toml").unwrap_err();
        assert_eq!(error.to_string(), "cannot read the configuration /no/such/file.toml");
    }
}
