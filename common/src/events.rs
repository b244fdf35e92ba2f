//! The events that an operator acts on, each with an id that never changes: the journal's MESSAGE_ID.
//!
//! A record carries one as the key-value `message_id`; `journalctl -x` then shows what `systemd/izar.catalog` says about
//! it, and a monitoring rule may ask for it (`journalctl MESSAGE_ID=…`) whatever becomes of the words. An id is never
//! reused. Never an event for what only a developer wants to know.

/// No controller leads: nothing can be decided.
pub const NO_QUORUM: &str = "19e1fd25f95d4b26ab15856ffafb4c11";
/// Another controller leads, or none does.
pub const LEADER_CHANGED: &str = "7e746aee30a347e1b5cbe1504567a7af";
/// An agent that had work fell silent.
pub const AGENT_LOST: &str = "fb8fc1b314cf42eb9a5e19647efe2e72";
/// A worker dies each time it is started.
pub const WORKER_FAILS: &str = "0d063b568509468d97536a1b2f12e9ed";
/// A certificate ends in less than 30 days.
pub const CERTIFICATE_EXPIRES: &str = "1b1444a5ce0143749788088037e0c51b";
/// The disk of the data directory has little room.
pub const DISK_NEARLY_FULL: &str = "4dece48d7592423eb70fee3182374522";
/// New certificates are unusable, the old ones stay.
pub const RELOAD_REFUSED: &str = "244d9112470f4a05b62ab1a921476d07";
/// A loop of the daemon stands still.
pub const WATCHDOG_STARVES: &str = "07368aee315944e4a5e6279e9779dbc7";
/// Requests are refused because others hold the budget of memory.
pub const MEMORY_REFUSED: &str = "e2a07aa0d8b04c18b6b0647e446677f6";
/// Somebody knocks who is not of this cluster.
pub const FOREIGN_PEER: &str = "d9fa75354dff40dca0e8063adc08b0b4";
/// A GPU is cordoned or quarantined: it gets no work.
pub const GPU_STOPPED: &str = "c0b8a2f4d0e34f6a8a5be6f0d3f7c915";
/// The GPUs of a server are not in order, and it gets no work.
pub const GPU_SERVER_FAULT: &str = "5d2f7d0b93c14b7f9b0fd0a51c8e6e37";
/// What was ordered to mend GPUs has not helped.
pub const REMEDY_IN_VAIN: &str = "6fe50d1c2db24f5d9f7f3c6ed1fd9aa2";
/// A controller that lost its memory waits for the others before it begins.
pub const JOIN_WAITS: &str = "a4c91f6e27d84d0c9c3f5b8e1d607a28";
/// A controller of another life of this cluster speaks to this one.
pub const OTHER_LIFE: &str = "bc16fb9e46584802b1d18b463cf9c045";

/// All of them, by name.
pub const ALL: [(&str, &str); 15] = [
    ("NO_QUORUM", NO_QUORUM),
    ("LEADER_CHANGED", LEADER_CHANGED),
    ("AGENT_LOST", AGENT_LOST),
    ("WORKER_FAILS", WORKER_FAILS),
    ("CERTIFICATE_EXPIRES", CERTIFICATE_EXPIRES),
    ("DISK_NEARLY_FULL", DISK_NEARLY_FULL),
    ("RELOAD_REFUSED", RELOAD_REFUSED),
    ("WATCHDOG_STARVES", WATCHDOG_STARVES),
    ("MEMORY_REFUSED", MEMORY_REFUSED),
    ("FOREIGN_PEER", FOREIGN_PEER),
    ("GPU_STOPPED", GPU_STOPPED),
    ("GPU_SERVER_FAULT", GPU_SERVER_FAULT),
    ("REMEDY_IN_VAIN", REMEDY_IN_VAIN),
    ("JOIN_WAITS", JOIN_WAITS),
    ("OTHER_LIFE", OTHER_LIFE),
];

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// The ids of the catalog, each with its text.
    fn catalog() -> BTreeMap<String, String> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/izar.catalog");
        let text = std::fs::read_to_string(path).expect("the catalog is in the repository");
        let mut entries = BTreeMap::new();
        for entry in text.split("\n-- ").skip(1) {
            let (id, rest) = entry.split_once('\n').expect("an id stands on a line of its own");
            let (head, body) = rest.split_once("\n\n").unwrap_or((rest, ""));
            assert!(head.starts_with("Subject: "), "{id} has no subject");
            assert!(entries.insert(id.to_owned(), body.to_owned()).is_none(), "{id} stands twice");
        }
        entries
    }

    #[test]
    fn every_event_is_in_the_catalog_with_what_to_do_and_nothing_else_is() {
        let catalog = catalog();
        for (name, id) in ALL {
            assert!(id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{name}: {id}");
            let text = catalog.get(id).unwrap_or_else(|| panic!("{name} is not in the catalog"));
            assert!(text.contains("What to do"), "{name} does not say what to do");
        }
        let known: BTreeSet<&str> = ALL.iter().map(|(_, id)| *id).collect();
        assert_eq!(known.len(), ALL.len(), "two events have one id");
        let unknown: Vec<_> = catalog.keys().filter(|id| !known.contains(id.as_str())).collect();
        assert!(unknown.is_empty(), "in the catalog alone: {unknown:?}");
    }
}
