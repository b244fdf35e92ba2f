//! Xids in the kernel's log: the library keeps only the last one between two looks, the log has them all.
//!
//! The log is read through `journalctl`, a child, and not from `/dev/kmsg`: for the journal the group `systemd-journal`
//! is enough, the device takes a capability that an agent has no other use for. Where there is no journal the agent's
//! file may name what to read instead (`/dev/kmsg`, or a pipe). What is read is text from outside: a line that is not an
//! Xid is passed over, however it looks.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Bytes of a line that are looked at: the kernel's own lines are shorter.
const LINE: u64 = 4096;

/// An Xid that the kernel told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The GPU's address on the PCI bus, in lower case, without a function: `0000:3b:00`.
    pub bus: String,
    pub code: u32,
}

/// Finds the Xid in a line like `NVRM: Xid (PCI:0000:3b:00): 79, pid=…, GPU has fallen off the bus.`
pub fn parse(line: &str) -> Option<Line> {
    let rest = line.split_once("NVRM: Xid (PCI:")?.1;
    let (bus, rest) = rest.split_once("): ")?;
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let code = rest[..digits].parse().ok()?;
    // What follows the number is a comma; `Xid (…): 31something` is no Xid.
    if !rest[digits..].is_empty() && !rest[digits..].starts_with([',', ' ']) {
        return None;
    }
    Some(Line { bus: slot(bus)?, code })
}

/// Brings a PCI address to the form that is compared: lower case, a domain of four digits, no function. The library
/// writes the domain with eight digits, the kernel with four.
pub fn slot(bus: &str) -> Option<String> {
    let whole = bus.split_once('.').map_or(bus, |(slot, _)| slot).to_ascii_lowercase();
    let parts: Vec<&str> = whole.split(':').collect();
    let [domain, bus, device] = parts[..] else { return None };
    let hexadecimal = |part: &str| !part.is_empty() && part.len() <= 8 && part.bytes().all(|b| b.is_ascii_hexdigit());
    if ![domain, bus, device].into_iter().all(hexadecimal) {
        return None;
    }
    let domain = u32::from_str_radix(domain, 16).ok()?;
    Some(format!("{domain:04x}:{bus}:{device}"))
}

/// Where to begin in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    Now,
    /// With this start of the server.
    Boot,
    /// In Unix seconds.
    Time(u64),
}

/// How far the log was followed, in a file: what came while no agent ran is read by the next.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
    /// Which start of the server this is.
    boot: String,
}

impl Mark {
    pub fn at(data_dir: &Path, boot: String) -> Self {
        Self { path: data_dir.join("kernel-log"), boot }
    }

    /// Notes that it was followed up to here.
    pub fn set(&self, seconds: u64) -> std::io::Result<()> {
        std::fs::write(&self.path, format!("{} {seconds}\n", self.boot))
    }

    /// Where to go on. A start of the server that no agent saw is read from its beginning; before the first agent's nothing
    /// is: what was wrong then may have been mended by hand.
    pub fn since(&self) -> Since {
        let noted = std::fs::read_to_string(&self.path).unwrap_or_default();
        match noted.trim().split_once(' ').and_then(|(boot, seconds)| Some((boot, seconds.parse().ok()?))) {
            Some((boot, seconds)) if boot == self.boot => Since::Time(seconds),
            Some(_) => Since::Boot,
            None => Since::Now,
        }
    }
}

/// The end of the log that is being written.
pub struct Tail {
    lines: Box<dyn BufRead + Send>,
}

impl Tail {
    /// Opens the journal's kernel messages of this start of the server, with the child that brings them; or what `path` names
    /// instead.
    pub fn open(path: Option<&Path>, since: Since) -> std::io::Result<(Self, Option<Child>)> {
        if let Some(path) = path {
            let file = std::fs::File::open(path)?;
            return Ok((Self { lines: Box::new(BufReader::new(file)) }, None));
        }
        let mut command = Command::new("journalctl");
        command.args(["--dmesg", "--follow", "--output=cat", "--quiet"]);
        match since {
            Since::Now => command.arg("--lines=0"),
            Since::Boot => command.arg("--no-tail"),
            Since::Time(seconds) => command.args(["--no-tail", &format!("--since=@{seconds}")]),
        };
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let output = child.stdout.take().expect("standard output is a pipe");
        Ok((Self { lines: Box::new(BufReader::new(output)) }, Some(child)))
    }

    /// Waits for the next Xid; `None` when the log has ended.
    pub fn next_xid(&mut self) -> Option<Line> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            match (&mut self.lines).take(LINE).read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Ok(_) => {}
                // The kernel's buffer ran over before it was read: the next line is the oldest that it has.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => continue,
                Err(_) => return None,
            }
            if let Some(line) = parse(&String::from_utf8_lossy(&bytes)) {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(line: &str, expected: Option<(&str, u32)>) {
        let found = parse(line);
        assert_eq!(found.as_ref().map(|line| (line.bus.as_str(), line.code)), expected, "{line}");
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        check(
            "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, name=python, Row Remapper: New row marked",
            Some(("0000:10:1c", 63)),
        );
        check("[ 12.3] NVRM: Xid (PCI:0000:3B:00): 79, GPU has fallen off the bus.", Some(("0000:3b:00", 79)));
        check("3,1234,9,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=7", Some(("0000:3b:00", 31)));
        check("NVRM: Xid (PCI:0000:3b:00): 154", Some(("0000:3b:00", 154)));
        for line in [
            "",
            "NVRM: loading NVIDIA UNIX driver",
            "NVRM: Xid (PCI:0000:3b:00): ",
            "NVRM: Xid (PCI:0000:3b:00): 31x",
            "NVRM: Xid (PCI:here): 31, pid=7",
            "NVRM: Xid (PCI:0000:3b:00 31, pid=7",
            "NVRM: Xid (PCI:0000:3b:00): 99999999999, pid=7",
        ] {
            check(line, None);
        }
    }

    #[test]
    fn the_library_and_the_kernel_name_one_slot() {
        assert_eq!(slot("00000000:3B:00.0").as_deref(), Some("0000:3b:00"));
        assert_eq!(slot("0000:3b:00").as_deref(), Some("0000:3b:00"));
        assert_eq!(slot("00010000:3b:00.0").as_deref(), Some("10000:3b:00"));
        assert_eq!(slot("3b:00"), None);
    }

    #[test]
    fn a_tail_gives_the_xids_and_ends_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let long = "x".repeat(3 * LINE as usize);
        std::fs::write(&path, format!("a\n{long}\nNVRM: Xid (PCI:0000:01:00): 13, pid=1\n\u{fffd}")).unwrap();
        let (mut tail, _) = Tail::open(Some(&path), Since::Now).unwrap();
        assert_eq!(tail.next_xid(), Some(Line { bus: "0000:01:00".into(), code: 13 }));
        assert_eq!(tail.next_xid(), None);
    }

    #[test]
    fn the_next_process_goes_on_where_the_one_before_was() {
        let dir = tempfile::tempdir().unwrap();
        let since = |boot: &str| Mark::at(dir.path(), boot.into()).since();
        assert_eq!(since("b1"), Since::Now, "there was none before");
        Mark::at(dir.path(), "b1".into()).set(77).unwrap();
        assert_eq!((since("b1"), since("b2")), (Since::Time(77), Since::Boot));
        std::fs::write(dir.path().join("kernel-log"), "b1 7x").unwrap();
        assert_eq!(since("b1"), Since::Now);
    }

    proptest! {
        #[test]
        fn no_line_is_too_odd(line in "\\PC{0,40}(NVRM: Xid \\(PCI:)?\\PC{0,40}(\\): )?\\PC{0,20}") {
            if let Some(found) = parse(&line) {
                prop_assert!(line.contains("NVRM: Xid (PCI:") && found.bus.is_ascii());
            }
        }
    }
}
