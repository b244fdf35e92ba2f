//! Peers that were refused: each is counted, and logged once for each reason and address.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::events;
use crate::id::NodeId;

/// Reasons and addresses that are remembered as logged. When it is full it begins anew, so that a flood from many
/// addresses costs this many lines and new trouble is still seen.
const REMEMBERED: usize = 1024;

/// What was wrong with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// No certificate of our CA, or not one of a node.
    Certificate,
    /// It did not finish the handshake in time.
    Slow,
    /// Its first words are not ours.
    Hello,
    Cluster,
    Schema,
    /// A role that has nothing to ask here, or a stream that its role may not open.
    Role,
    /// A frame that does not decode or is too large.
    Frame,
    /// Too many handshakes at once.
    Crowd,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Certificate => "certificate",
            Kind::Slow => "slow",
            Kind::Hello => "hello",
            Kind::Cluster => "cluster",
            Kind::Schema => "schema",
            Kind::Role => "role",
            Kind::Frame => "frame",
            Kind::Crowd => "crowd",
        }
    }
}

/// Counts refusals and logs the first of each sort.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    count: AtomicU64,
    seen: Mutex<HashSet<(Kind, IpAddr, Option<NodeId>)>>,
}

impl Refusals {
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts a refusal whose reason the caller gets as an error.
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a refusal, and logs it if it is the first of its kind from this address and node.
    pub(super) fn report(&self, kind: Kind, from: SocketAddr, node: Option<&NodeId>, reason: &str) {
        self.add();
        if self.is_new(kind, from.ip(), node) {
            // A slow peer may be one that died or a machine under load; what the others tried is wrong.
            let level = if kind == Kind::Slow { log::Level::Info } else { log::Level::Warn };
            let (node, kind_name) = (node.map_or("unknown", NodeId::as_str), kind.name());
            if matches!(kind, Kind::Certificate | Kind::Cluster) {
                log::log!(level, message_id = events::FOREIGN_PEER, kind = kind_name, from:% = from, node, reason; "refused a peer");
            } else {
                log::log!(level, kind = kind_name, from:% = from, node, reason; "refused a peer");
            }
        }
    }

    fn is_new(&self, kind: Kind, from: IpAddr, node: Option<&NodeId>) -> bool {
        let mut seen = self.seen.lock().expect("no panic while the set is held");
        if seen.len() >= REMEMBERED {
            seen.clear();
        }
        seen.insert((kind, from, node.cloned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_counts_and_the_first_of_its_sort_is_logged() {
        let refusals = Refusals::default();
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let node = "n1".parse().unwrap();
        assert!(refusals.is_new(Kind::Schema, ip, None) && !refusals.is_new(Kind::Schema, ip, None));
        assert!(refusals.is_new(Kind::Schema, ip, Some(&node)) && refusals.is_new(Kind::Role, ip, None));
        for _ in 0..3 {
            refusals.report(Kind::Frame, SocketAddr::new(ip, 9), None, "too large");
        }
        assert_eq!(refusals.count(), 3);
    }

    #[test]
    fn what_is_remembered_stays_bounded() {
        let refusals = Refusals::default();
        for i in 0..3 * REMEMBERED as u32 {
            assert!(refusals.is_new(Kind::Slow, IpAddr::V4(i.into()), None));
        }
        assert!(refusals.seen.lock().unwrap().len() <= REMEMBERED);
    }
}
