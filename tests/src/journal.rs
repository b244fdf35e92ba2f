//! Stands in for journald: the socket that daemons send their records to, and what they sent, field by field.
//!
//! The socket has a fixed name, so a daemon is started in a mount namespace of its own where that name is ours. A kernel
//! that lets nobody make one cannot run such a story: [`Journal::new`] says so.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::ensure;

use crate::waiting::{SOON, until};

/// A record of ours has some kilobytes; larger ones would come as files.
const DATAGRAM: usize = 256 << 10;

/// Puts the socket in its place, a small disk under a folder where one is wanted, says that standard error goes to the
/// journal, and becomes the daemon.
const BECOME: &str = r#"
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal
mount --bind "$STORY_JOURNAL" /run/systemd/journal
if [ -n "$STORY_DISK" ]; then
    mkdir -p "$STORY_DISK"
    mount -t tmpfs -o size=64m,mode=0700 tmpfs "$STORY_DISK"
    head -c 62000000 /dev/zero >"$STORY_DISK/filler"
fi
export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)
exec "$@"
"#;

/// The fields of one record.
pub type Record = BTreeMap<String, String>;

/// The journal of one story.
#[derive(Debug)]
pub struct Journal {
    folder: tempfile::TempDir,
    records: Arc<Mutex<Vec<Record>>>,
}

impl Journal {
    /// `None`: this kernel gives nobody a mount namespace.
    pub fn new() -> Option<Self> {
        let unshare =
            Command::new("unshare").args(["--mount", "--map-root-user", "true"]).stderr(Stdio::null()).status();
        if !unshare.is_ok_and(|status| status.success()) {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("izar-").tempdir().expect("a temporary folder can be made");
        let socket = UnixDatagram::bind(folder.path().join("socket")).expect("a socket can be bound");
        let records = Arc::new(Mutex::new(Vec::new()));
        let heard = records.clone();
        // Ends with the process of the story: a datagram socket has no end to be seen.
        std::thread::spawn(move || {
            let mut buffer = vec![0; DATAGRAM];
            while let Ok(length) = socket.recv(&mut buffer) {
                heard.lock().expect("no panic here").push(fields(&buffer[..length]));
            }
        });
        Some(Self { folder, records })
    }

    /// The beginning of a command that starts a program which logs here; with `disk`, that folder is a nearly full disk.
    pub fn command(&self, program: &Path, disk: Option<&Path>) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c", BECOME, "sh"]).arg(program).stdin(Stdio::null());
        command.env("STORY_JOURNAL", self.folder.path());
        command.env("STORY_DISK", disk.unwrap_or(Path::new("")));
        command
    }

    /// Waits for a record with this MESSAGE_ID that `is` the one, and returns it.
    pub fn wait(&self, id: &str, is: impl Fn(&Record) -> bool) -> Record {
        let mut found = None;
        until(&format!("MESSAGE_ID={id}"), SOON, || {
            let records = self.records.lock().expect("no panic here");
            found =
                records.iter().find(|record| record.get("MESSAGE_ID").is_some_and(|i| i == id) && is(record)).cloned();
            ensure!(found.is_some(), "{} records without it; the last: {:?}", records.len(), records.last());
            Ok(())
        });
        found.expect("it was waited for")
    }
}

/// Reads journald's native protocol: `NAME=value`, or the name on a line, the value's length as 8 bytes, the value.
fn fields(mut bytes: &[u8]) -> Record {
    let mut record = Record::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
        if let Some(at) = line.iter().position(|byte| *byte == b'=') {
            record.insert(text(&line[..at]), text(&line[at + 1..]));
            bytes = rest;
            continue;
        }
        let Some((length, rest)) = rest.split_first_chunk::<8>() else { break };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX).min(rest.len());
        record.insert(text(line), text(&rest[..length]));
        bytes = rest[length..].strip_prefix(b"\n").unwrap_or(&[]);
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_field_are_read() {
        let record = fields(b"A=1\nMESSAGE\n\x03\0\0\0\0\0\0\0a\nb\nC=d=e\n");
        let record: Vec<_> = record.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(record, [("A", "1"), ("C", "d=e"), ("MESSAGE", "a\nb")]);
    }
}
