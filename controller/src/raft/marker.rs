//! Whose data a directory holds: `izar.json`, written before anything else and checked before anything is opened.
//!
//! A directory of another node, site or cluster, or of a newer version, is refused and left as it is.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use izar_common::id::{ClusterId, NodeId, SiteId};
use serde::{Deserialize, Serialize};

use super::Options;

/// The marker's name; the other files of Raft and the state are named in `raft`.
const MARKER: &str = "izar.json";
/// Version of the layout of a data directory.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: u32,
    cluster: ClusterId,
    site: SiteId,
    node: NodeId,
    /// Log and state were created. From then on a directory without them has lost its memory, and a node without
    /// memory must not vote under its old id.
    ready: bool,
    /// The group's memory is on its way here (`controller/rejoin`): what lies here is part of it, and nothing was begun.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    joining: bool,
}

/// What a member has of what it once knew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// It has begun: a log and a state are here, or have been.
    Begun,
    /// It has not begun.
    None,
    /// It was given the group's, which broke off. It must not begin without it.
    Joining,
}

/// Of a newer format only this is sure to be there.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// Takes the directory for this node, creating it if need be; refuses one that belongs to somebody else.
pub fn claim(options: &Options) -> anyhow::Result<()> {
    let dir = &options.data_dir;
    let path = dir.join(MARKER);
    match fs::read(&path) {
        Ok(bytes) => {
            check(&bytes, options).with_context(|| format!("data directory {}", dir.display()))?;
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            for file in [super::LOG_FILE, super::STATE_FILE] {
                let file = dir.join(file);
                ensure!(!file.exists(), "{} exists, but {} is missing: whose is it?", file.display(), path.display());
            }
            create_dir(dir)?;
            write(options, false, false)
        }
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Whether log and state must already be there.
pub fn is_ready(options: &Options) -> anyhow::Result<bool> {
    let path = options.data_dir.join(MARKER);
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(check(&bytes, options)?.ready)
}

/// What the directory holds; one of somebody else is refused.
pub fn memory(options: &Options) -> anyhow::Result<Memory> {
    let path = options.data_dir.join(MARKER);
    match fs::read(&path) {
        Ok(bytes) => {
            let dir = options.data_dir.display();
            let marker = check(&bytes, options).with_context(|| format!("data directory {dir}"))?;
            Ok(match marker {
                Marker { joining: true, .. } => Memory::Joining,
                Marker { ready: true, .. } => Memory::Begun,
                Marker { .. } => Memory::None,
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Memory::None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Notes that the group's memory is on its way here.
pub fn set_joining(options: &Options) -> anyhow::Result<()> {
    write(options, false, true)
}

/// The node that a directory belongs to, if it is one of this cluster's site.
pub fn owner(options: &Options) -> anyhow::Result<NodeId> {
    let path = options.data_dir.join(MARKER);
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let marker: Marker = serde_json::from_slice(&bytes).context("izar.json is damaged")?;
    let options = Options { node: marker.node.clone(), ..options.clone() };
    check(&bytes, &options).with_context(|| format!("data directory {}", options.data_dir.display()))?;
    Ok(marker.node)
}

/// Notes that log and state were created.
pub fn set_ready(options: &Options) -> anyhow::Result<()> {
    write(options, true, false)
}

fn check(bytes: &[u8], options: &Options) -> anyhow::Result<Marker> {
    let Version { format } = serde_json::from_slice(bytes).context("izar.json is damaged")?;
    ensure!(format <= FORMAT, "it has format {format}, this version knows up to {FORMAT}: install a newer izar");
    let marker: Marker = serde_json::from_slice(bytes).context("izar.json is damaged")?;
    let is = |what, have: &str, want: &str| -> anyhow::Result<()> {
        if have == want { Ok(()) } else { bail!("it belongs to {what} {have}, but this is {what} {want}") }
    };
    is("cluster", marker.cluster.as_str(), options.cluster.as_str())?;
    is("site", marker.site.as_str(), options.site.as_str())?;
    is("node", marker.node.as_str(), options.node.as_str())?;
    Ok(marker)
}

fn write(options: &Options, ready: bool, joining: bool) -> anyhow::Result<()> {
    let marker = Marker {
        format: FORMAT,
        cluster: options.cluster.clone(),
        site: options.site.clone(),
        node: options.node.clone(),
        ready,
        joining,
    };
    let path = options.data_dir.join(MARKER);
    let whole = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&options.data_dir)?;
        file.write_all(&serde_json::to_vec_pretty(&marker)?)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        sync_dir(&options.data_dir)
    };
    whole().with_context(|| format!("write {}", path.display()))
}

/// Creates a directory that only this user may enter, if it is missing.
fn create_dir(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("create data directory {}", dir.display()))
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> std::io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn options(dir: &Path) -> Options {
        Options {
            data_dir: dir.join("data"),
            cluster: "bank".parse().unwrap(),
            site: "east".parse().unwrap(),
            node: "c1".parse().unwrap(),
            members: Vec::new(),
            tick: Duration::from_millis(20),
            election_ticks: 10,
            heartbeat_ticks: 2,
        }
    }

    #[test]
    fn a_directory_keeps_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let mine = options(dir.path());
        claim(&mine).unwrap();
        assert!(!is_ready(&mine).unwrap());
        set_ready(&mine).unwrap();
        claim(&mine).unwrap();
        assert!(is_ready(&mine).unwrap());
        let before = fs::read(mine.data_dir.join(MARKER)).unwrap();
        let others = [
            Options { cluster: "shop".parse().unwrap(), ..mine.clone() },
            Options { site: "west".parse().unwrap(), ..mine.clone() },
            Options { node: "c2".parse().unwrap(), ..mine.clone() },
        ];
        for other in others {
            let error = format!("{:#}", claim(&other).unwrap_err());
            assert!(error.contains("it belongs to"), "{error}");
        }
        assert_eq!(fs::read(mine.data_dir.join(MARKER)).unwrap(), before);
    }

    #[test]
    fn a_newer_format_and_unmarked_data_are_refused_and_left_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let mine = options(dir.path());
        fs::create_dir(&mine.data_dir).unwrap();
        fs::write(mine.data_dir.join(super::super::LOG_FILE), b"log").unwrap();
        assert!(claim(&mine).is_err());
        assert_eq!(fs::read_dir(&mine.data_dir).unwrap().count(), 1);
        fs::write(mine.data_dir.join(MARKER), br#"{"format":2,"future":true}"#).unwrap();
        let error = format!("{:#}", claim(&mine).unwrap_err());
        assert!(error.contains("format 2"), "{error}");
        assert_eq!(fs::read_dir(&mine.data_dir).unwrap().count(), 2);
    }
}
