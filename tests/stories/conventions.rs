//! The conventions that matter, checked on the source: arrows, homes, headers, bounds.
//!
//! A plain reading of lines, without comments and string literals; it needs no compiler and finds what a reviewer may
//! overlook.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use izar_tests::binaries::repository;

/// A file longer than this has more than one idea.
const LINES: usize = 800;

/// A source file: where it is, from the repository's root, and its text.
struct Source {
    path: String,
    text: String,
    /// Lines without comments and the insides of strings.
    code: Vec<String>,
}

fn sources() -> Vec<Source> {
    let root = repository();
    let mut paths = Vec::new();
    for member in ["common", "controller", "agent", "tests"] {
        rust_files(&root.join(member), &mut paths);
    }
    assert!(paths.len() > 50, "the sources are found: {}", paths.len());
    paths.sort();
    paths.iter().map(|path| source(&root, path)).collect()
}

fn rust_files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the repository").flatten() {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "target" {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn source(root: &Path, path: &Path) -> Source {
    let text = std::fs::read_to_string(path).expect("a source file is UTF-8");
    let path = path.strip_prefix(root).expect("it lies in the repository").display().to_string();
    let code = text.lines().map(strip).collect();
    Source { path, text, code }
}

/// Blanks the insides of string literals and cuts a line comment off.
fn strip(line: &str) -> String {
    let (mut out, mut in_string) = (String::new(), false);
    let mut characters = line.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\\' if in_string => {
                characters.next();
            }
            // A quote as a character is no string's border.
            '\'' if !in_string && characters.peek() == Some(&'"') => {
                characters.next();
            }
            '"' => {
                in_string = !in_string;
                out.push('"');
            }
            '/' if !in_string && characters.peek() == Some(&'/') => break,
            _ if in_string => {}
            _ => out.push(c),
        }
    }
    out
}

/// Says whether code names `library` at the root of a path: `library::x`, `use library;`, `use library as`.
fn names(line: &str, library: &str) -> bool {
    line.match_indices(library).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = &line[at + library.len()..];
        let root = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':' && c != '.');
        let used = line.trim_start().trim_start_matches("pub ").starts_with("use ");
        root && (after.starts_with("::") || used && (after.starts_with(';') || after.starts_with(" as ")))
    })
}

/// Fails with every place where `wrong` says so.
fn check(rule: &str, mut wrong: impl FnMut(&Source, &str) -> bool) {
    let mut places = Vec::new();
    for source in sources() {
        for (i, line) in source.code.iter().enumerate() {
            if wrong(&source, line) {
                places.push(format!("{}:{}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    assert!(places.is_empty(), "{rule}:\n{}", places.join("\n"));
}

#[test]
fn each_library_has_one_home() {
    let homes: &[(&str, &[&str])] = &[
        ("quinn", &["common/src/quic"]),
        ("rustls", &["common/src/tls", "common/src/quic", "tests/src/client"]),
        // The listener and the clients wrap a stream; what they trust comes from `common/tls`.
        ("tokio_rustls", &["common/src/tls", "controller/src/gateway", "controller/src/bin/izar", "tests/src/client"]),
        ("rcgen", &["common/src/tls"]),
        ("x509_parser", &["common/src/tls"]),
        ("bincode", &["common/src/wire"]),
        ("crc32fast", &["common/src/wire"]),
        ("tokenizers", &["common/src/text"]),
        ("minijinja", &["common/src/text"]),
        ("minijinja_contrib", &["common/src/text"]),
        ("ring", &["common/src/seal", "common/src/blob", "common/src/tls", "common/src/quic"]),
        ("toml", &["common/src/config"]),
        ("systemd_journal_logger", &["common/src/logging"]),
        ("sd_notify", &["common/src/service"]),
        ("listenfd", &["common/src/service"]),
        ("axum", &["controller/src/gateway", "controller/src/control"]),
        ("redb", &["controller/src/raft/log", "controller/src/state/store"]),
        ("raft", &["controller/src/raft"]),
        ("protobuf", &["controller/src/raft"]),
        ("slog", &["controller/src/raft"]),
        ("object_store", &["controller/src/bin/izar/backup"]),
        ("hdrhistogram", &["controller/src/bin/izar/bench"]),
        ("burn", &["agent/src/model", "agent/src/ops"]),
        ("burn_flex", &["agent/src/ops"]),
        ("cubecl_cuda", &["agent/src/ops/cuda"]),
        ("cudarc", &["agent/src/ops/cuda"]),
        ("nvml_wrapper", &["agent/src/gpu/nvml"]),
        ("nvml_wrapper_sys", &["tests/nvml/src"]),
        // The format's own library is what ours is tested against.
        ("safetensors", &["common/src/safetensors", "agent/src/model/weights"]),
    ];
    let own_module_named_raft =
        |path: &str, line: &str| path.starts_with("controller/") && line.contains("crate::raft");
    for (library, allowed) in homes {
        check(&format!("{library} is named outside {allowed:?}"), |source, line| {
            let home = allowed.iter().any(|home| in_home(&source.path, home));
            !home
                && names(line, library)
                && !own_module_named_raft(&source.path, line)
                && !is_own_module(source, library)
        });
    }
}

/// `home` is a module: its file, or any file in its folder.
fn in_home(path: &str, home: &str) -> bool {
    path.strip_prefix(home).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// In a file that declares or imports a module of ours with the library's name, the name means the module.
fn is_own_module(source: &Source, library: &str) -> bool {
    let module = |line: &str| line.trim_start_matches("pub ") == format!("mod {library};");
    let import = |line: &str| {
        let ours = ["use crate::", "use super::", "use izar_common::"].iter().any(|start| line.starts_with(start));
        let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let item = !line.contains(&format!("{library}::")) || line.contains(&format!("{library}::{{self"));
        ours && item && words.any(|word| word == library)
    };
    source.code.iter().any(|line| module(line.trim()) || import(line.trim()))
}

#[test]
fn arrows_run_one_way() {
    check("common knows no daemon", |source, line| {
        let daemon = ["izar_controller", "izar_agent", "izar_tests"].iter().any(|name| names(line, name));
        source.path.starts_with("common/") && daemon
    });
    check("controller and agent never import each other", |source, line| {
        source.path.starts_with("controller/") && (names(line, "izar_agent") || names(line, "izar_tests"))
            || source.path.starts_with("agent/") && (names(line, "izar_controller") || names(line, "izar_tests"))
    });
    let root = repository();
    let forbidden = [
        ("common", vec!["izar-controller", "izar-agent", "izar-tests"]),
        ("controller", vec!["izar-agent", "izar-tests", "quinn", "rustls", "bincode", "burn", "tokenizers"]),
        ("agent", vec!["izar-controller", "izar-tests", "quinn", "rustls", "bincode", "axum", "raft", "redb"]),
    ];
    for (member, libraries) in forbidden {
        let manifest = std::fs::read_to_string(root.join(member).join("Cargo.toml")).expect("a member has a manifest");
        for library in libraries {
            let depends = manifest
                .lines()
                .any(|line| line.strip_prefix(library).is_some_and(|rest| rest.starts_with([' ', '.', '='])));
            assert!(!depends, "{member} depends on {library}");
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_holds_one_idea() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        let head = source.text.lines().next().unwrap_or_default();
        if !head.starts_with("//! ") || head.len() < 20 {
            wrong.push(format!("{} does not open with `//!` and what it is", source.path));
        }
        if lines > LINES {
            wrong.push(format!("{} has {lines} lines, the limit is {LINES}", source.path));
        }
        if source.path.ends_with("/mod.rs") {
            wrong.push(format!("{} is named mod.rs", source.path));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_channel_is_bounded() {
    check("an unbounded channel", |_, line| {
        let empty = |name: &str| {
            line.match_indices(name).any(|(at, _)| {
                let rest = line[at + name.len()..].trim_start();
                let rest = if let Some(generic) = rest.strip_prefix("::<") {
                    generic.rsplit_once('>').map_or(rest, |(_, rest)| rest)
                } else {
                    rest
                };
                rest.starts_with("()")
            })
        };
        line.contains("unbounded_channel")
            || line.contains("mpsc::unbounded")
            || empty("mpsc::channel")
            || empty("unbounded")
    });
}

#[test]
fn nothing_is_left_for_later() {
    check("a test that does not run, or code that is not there", |_, line| {
        ["#[ignore", "todo!(", "unimplemented!(", "dbg!("].iter().any(|word| line.contains(word))
    });
}

#[test]
fn unsafe_code_is_forbidden_outside_the_agents_kernels_and_the_library_that_plays() {
    let heads: BTreeMap<String, String> = sources().into_iter().map(|source| (source.path, source.text)).collect();
    for root in [
        "common/src/lib.rs",
        "controller/src/lib.rs",
        "controller/src/main.rs",
        "controller/src/bin/izar/main.rs",
        "tests/src/lib.rs",
        "tests/stories.rs",
    ] {
        assert!(heads[root].contains("#![forbid(unsafe_code)]"), "{root} does not forbid unsafe code");
    }
    // Where it is allowed at all: kernels, the mapping of their memory, and C functions that a library must have.
    let allowed = ["agent/src/ops/", "agent/src/engine/sampler/row.rs", "tests/nvml/src/"];
    check("unsafe code outside its homes", |source, line| {
        let used = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
        used && !allowed.iter().any(|home| source.path.starts_with(home))
    });
}

#[test]
fn replicated_state_has_no_clock_and_no_chance() {
    check("state reads a clock, draws at random or counts in floats", |source, line| {
        let pure =
            source.path.starts_with("controller/src/state") && !in_home(&source.path, "controller/src/state/store");
        let impure = ["SystemTime", "Instant::now", "wall_ms", "rand::", "HashMap::new().iter"];
        let float = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "f32" || word == "f64");
        pure && (float || impure.iter().any(|word| line.contains(word)))
    });
}

#[test]
fn every_event_is_told_somewhere_and_by_its_name() {
    let events: Vec<&str> = izar_common::events::ALL.iter().map(|(name, _)| *name).collect();
    let mut told = BTreeMap::new();
    check("a message_id that is no event", |source, line| {
        for (at, _) in line.match_indices("message_id = ") {
            let rest = &line[at + "message_id = ".len()..];
            let name: String = rest
                .trim_start_matches("events::")
                .chars()
                .take_while(|c| *c == '_' || c.is_ascii_uppercase())
                .collect();
            if !rest.starts_with("events::") || !events.contains(&name.as_str()) {
                return true;
            }
            told.insert(name, source.path.clone());
        }
        false
    });
    let silent: Vec<_> = events.iter().filter(|name| !told.contains_key(**name)).collect();
    assert!(silent.is_empty(), "nobody tells of {silent:?}");
}

#[test]
fn the_reader_of_these_rules_sees_what_it_should() {
    assert!(names("use quinn::Connection;", "quinn") && names("    quinn::Endpoint::new()", "quinn"));
    assert!(names("use rustls as tls;", "rustls") && names("pub use redb;", "redb"));
    assert!(!names("let quinn_like = 1;", "quinn") && !names("quinn::crypto::rustls::X", "rustls"));
    assert!(!names("use tokio_rustls::TlsStream;", "rustls") && !names("self.redb::<u8>()", "redb"));
    assert_eq!(strip(r#"let a = "x // todo!()"; // quinn::"#), r#"let a = ""; "#);
    assert!(in_home("common/src/quic.rs", "common/src/quic") && in_home("common/src/quic/a.rs", "common/src/quic"));
    assert!(!in_home("common/src/quickly.rs", "common/src/quic"));
}
