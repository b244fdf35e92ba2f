//! Reads what daemons logged: any warning or error that a story did not name is a failure.

use std::fmt;
use std::path::{Path, PathBuf};

/// A line of a daemon's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// `controller-c1.log`: whose it is.
    pub file: String,
    pub level: String,
    /// Target, message and values.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.file, self.level, self.text)
    }
}

/// Returns the log files of a folder, sorted.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.retain(|path| path.extension().is_some_and(|e| e == "log"));
    files.sort();
    files
}

/// Reads every line of every log in a folder. A line that no logger wrote (a panic's text) is an error.
pub fn read(folder: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    for path in files(folder) {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()).into_owned();
        lines.extend(text.lines().filter(|line| !line.trim().is_empty()).map(|line| parse(&file, line)));
    }
    lines
}

fn parse(file: &str, line: &str) -> Line {
    let mut words = line.splitn(2, ' ');
    let (time, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().trim_start());
    let (level, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let logged = time.ends_with('Z') && ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level);
    if logged {
        Line { file: file.to_owned(), level: level.to_owned(), text: text.trim().to_owned() }
    } else {
        Line { file: file.to_owned(), level: "ERROR".to_owned(), text: format!("not a log line: {line}") }
    }
}

/// Returns the warnings and errors that hold none of the `expected` texts.
pub fn surprises(folder: &Path, expected: &[&str]) -> Vec<Line> {
    let mut lines = read(folder);
    lines.retain(|line| line.level == "WARN" || line.level == "ERROR");
    lines.retain(|line| !expected.iter().any(|text| line.text.contains(text)));
    lines
}

/// Panics if the logs hold a warning or an error that the story did not name.
pub fn check(folder: &Path, expected: &[&str]) {
    assert!(!files(folder).is_empty(), "there are no logs in {}", folder.display());
    // Shown by `cargo test -- --nocapture`, to keep the list of what a story expects short and true.
    for line in surprises(folder, &[]) {
        eprintln!("provoked: {line}");
    }
    let surprises = surprises(folder, expected);
    let shown: Vec<String> = surprises.iter().take(20).map(Line::to_string).collect();
    assert!(surprises.is_empty(), "{} lines that this story did not expect:\n{}", surprises.len(), shown.join("\n"));
}

/// Returns what to show of the logs of a story that failed: its warnings and errors, and each file's end.
pub fn excerpt(folder: &Path) -> String {
    const ENDS: usize = 8;
    let mut out = String::new();
    for line in surprises(folder, &[]).iter().take(40) {
        out += &format!("  {line}\n");
    }
    for path in files(folder) {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        out += &format!("  end of {}:\n", path.display());
        for line in &lines[lines.len().saturating_sub(ENDS)..] {
            out += &format!("    {line}\n");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_and_strangers_are_errors() {
        let line = parse("c1.log", "2026-11-24T12:00:00.000Z WARN  izar::agents report is late agent=a1");
        assert_eq!((line.level.as_str(), line.text.as_str()), ("WARN", "izar::agents report is late agent=a1"));
        assert_eq!(parse("c1.log", "thread 'main' panicked at src/main.rs").level, "ERROR");
    }

    #[test]
    fn named_warnings_are_no_surprise() {
        let folder = tempfile::tempdir().unwrap();
        let text = "2026-11-24T12:00:00.000Z WARN  a report is late\n2026-11-24T12:00:00.000Z INFO  b fine\n";
        std::fs::write(folder.path().join("c1.log"), text).unwrap();
        assert_eq!(surprises(folder.path(), &[]).len(), 1);
        assert_eq!(surprises(folder.path(), &["report is late"]), []);
    }
}
