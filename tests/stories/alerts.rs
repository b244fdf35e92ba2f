//! The alerts, what to do about each, and what they measure, held against each other: an alert that fires at night has a
//! section in both languages and a case that shows when it fires; what it asks for is a number that a controller has.

use std::collections::BTreeSet;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

const RULES: &str = "ansible/roles/monitoring/files/alerts.yml";

/// What stands behind a word in a text, to the end of its name.
fn after<'a>(text: &'a str, word: &str) -> BTreeSet<&'a str> {
    let name = |at: usize| {
        let rest = &text[at..];
        &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())]
    };
    text.match_indices(word).map(|(at, word)| name(at + word.len())).collect()
}

#[test]
fn every_alert_has_a_runbook_in_both_languages_and_a_case_that_makes_it_fire() {
    let rules = read(RULES);
    let alerts = after(&rules, "- alert: ");
    assert!(alerts.len() >= 17 && alerts.contains("IzarNoLeader"), "{alerts:?}");
    for file in ["docs/operating.md", "docs/operating.zh-CN.md"] {
        let text = read(file);
        let told: BTreeSet<&str> = after(&text, "\n| `Izar").into_iter().collect();
        let expected: BTreeSet<&str> = alerts.iter().map(|alert| alert.strip_prefix("Izar").unwrap()).collect();
        assert_eq!(told, expected, "{file}");
    }
    assert_eq!(after(&read("tests/alerts.yml"), "alertname: "), alerts, "without a case, or a case without an alert");
}

#[test]
fn every_number_in_an_alert_is_one_that_a_controller_has() {
    let rules = read(RULES);
    let named = after(&rules, "izar_");
    assert!(named.len() >= 12, "{named:?}");
    let mut sources = String::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../controller/src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.extension().is_some_and(|end| end == "rs") {
                true => sources += &std::fs::read_to_string(&entry).unwrap(),
                false if entry.is_dir() => folders.push(entry),
                false => {}
            }
        }
    }
    let known = |name: &&str| sources.contains(&format!("\"izar_{name}\""));
    let unknown: Vec<_> = named.iter().filter(|name| !known(name)).collect();
    assert!(unknown.is_empty(), "nobody counts {unknown:?}");
}
