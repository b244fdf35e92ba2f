//! Which file to bring next: one at a time, models in order, failed ones later. Pure: the time comes in.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use izar_common::id::Hash;
use izar_common::manifest::File;
use tokio::time::Instant;

/// Wait after the first failure; it doubles up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Fetch {
        revision: Hash,
        file: File,
    },
    WaitUntil(Instant),
    /// Nothing until the models change.
    Idle,
}

#[derive(Debug)]
struct Item {
    left: VecDeque<File>,
    /// Attempts in a row that failed.
    failures: u32,
    not_before: Option<Instant>,
    given_up: bool,
}

/// The files that are still to be brought, by model.
#[derive(Debug, Default)]
pub(super) struct Lane(BTreeMap<Hash, Item>);

impl Lane {
    /// Takes up models that are new and drops those that are gone. Says whether anything changed.
    pub fn follow(&mut self, models: BTreeMap<Hash, Vec<File>>) -> bool {
        let before = self.0.len();
        self.0.retain(|revision, _| models.contains_key(revision));
        let mut changed = self.0.len() != before;
        for (revision, files) in models {
            self.0.entry(revision).or_insert_with(|| {
                changed = true;
                Item { left: files.into(), failures: 0, not_before: None, given_up: false }
            });
        }
        changed
    }
    /// Models of which nothing is left to bring.
    pub fn complete(&self) -> impl Iterator<Item = Hash> + '_ {
        self.0.iter().filter(|(_, item)| item.left.is_empty()).map(|(revision, _)| *revision)
    }
    pub fn next(&self, now: Instant) -> Next {
        let mut earliest = None;
        for (revision, item) in &self.0 {
            let Some(file) = item.left.front().filter(|_| !item.given_up) else { continue };
            match item.not_before.filter(|when| *when > now) {
                None => return Next::Fetch { revision: *revision, file: file.clone() },
                Some(when) => earliest = Some(earliest.map_or(when, |e: Instant| e.min(when))),
            }
        }
        earliest.map_or(Next::Idle, Next::WaitUntil)
    }
    /// The model's next file is here. Says whether it was the last one.
    pub fn done(&mut self, revision: &Hash) -> bool {
        let Some(item) = self.0.get_mut(revision) else { return false };
        item.left.pop_front();
        (item.failures, item.not_before) = (0, None);
        item.left.is_empty()
    }
    /// The model's next file could not be brought. Returns how often in a row that happened.
    pub fn failed(&mut self, revision: &Hash, now: Instant) -> u32 {
        let Some(item) = self.0.get_mut(revision) else { return 0 };
        let wait = FIRST_WAIT.saturating_mul(1 << item.failures.min(10)).min(LONGEST_WAIT);
        item.failures = item.failures.saturating_add(1);
        item.not_before = Some(now + wait);
        item.failures
    }
    /// The model's next file is of no use; nothing more is tried.
    pub fn give_up(&mut self, revision: &Hash) {
        if let Some(item) = self.0.get_mut(revision) {
            item.given_up = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u8) -> File {
        File { name: format!("f{n}"), hash: Hash([n; 32]), bytes: 1 }
    }
    fn lane(models: &[(u8, &[u8])]) -> Lane {
        let mut lane = Lane::default();
        assert!(lane.follow(wanted(models)));
        lane
    }
    fn wanted(models: &[(u8, &[u8])]) -> BTreeMap<Hash, Vec<File>> {
        models.iter().map(|(m, files)| (Hash([*m; 32]), files.iter().map(|f| file(*f)).collect())).collect()
    }
    fn fetch(model: u8, n: u8) -> Next {
        Next::Fetch { revision: Hash([model; 32]), file: file(n) }
    }

    #[test]
    fn files_come_one_after_the_other() {
        let mut lane = lane(&[(1, &[11, 12]), (2, &[21])]);
        let now = Instant::now();
        assert_eq!(lane.next(now), fetch(1, 11));
        assert!(!lane.done(&Hash([1; 32])));
        assert_eq!(lane.next(now), fetch(1, 12));
        assert!(lane.done(&Hash([1; 32])));
        assert_eq!(lane.next(now), fetch(2, 21));
        assert!(lane.done(&Hash([2; 32])));
        assert_eq!((lane.next(now), lane.complete().count()), (Next::Idle, 2));
    }

    #[test]
    fn a_failed_model_waits_ever_longer_and_holds_up_no_other() {
        let mut lane = lane(&[(1, &[11]), (2, &[21])]);
        let mut now = Instant::now();
        assert_eq!(lane.failed(&Hash([1; 32]), now), 1);
        assert_eq!(lane.next(now), fetch(2, 21));
        lane.done(&Hash([2; 32]));
        for wait in [200, 400, 800, 1600, 3200, 5000, 5000] {
            let when = now + Duration::from_millis(wait);
            assert_eq!(lane.next(now), Next::WaitUntil(when));
            now = when;
            assert_eq!(lane.next(now), fetch(1, 11));
            lane.failed(&Hash([1; 32]), now);
        }
    }

    #[test]
    fn a_model_given_up_is_not_tried_again() {
        let mut lane = lane(&[(1, &[11])]);
        lane.give_up(&Hash([1; 32]));
        assert_eq!((lane.next(Instant::now()), lane.complete().count()), (Next::Idle, 0));
    }

    #[test]
    fn models_come_and_go() {
        let mut lane = lane(&[(1, &[11])]);
        assert!(!lane.follow(wanted(&[(1, &[11])])), "nothing changed");
        assert!(lane.follow(wanted(&[(2, &[21])])));
        assert_eq!(lane.next(Instant::now()), fetch(2, 21));
        assert!(!lane.done(&Hash([1; 32])), "an answer for a model that is gone is passed over");
    }
}
