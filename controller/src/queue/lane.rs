//! The entries of one class: by tenant, and of a tenant the earliest deadline first, then who came first. Knows nothing
//! of time or shares.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use izar_common::id::TenantId;

use super::estimate::Guess;
use super::{Ask, Ticket};

/// Where entries without a deadline stand among those with one: as if they had this much time. It decides the order
/// alone; without it they would wait for ever behind newer ones that have a deadline.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who waits.
#[derive(Debug, Clone)]
pub struct Entry {
    pub ticket: Ticket,
    pub ask: Ask,
    pub guess: Guess,
    pub arrived: Instant,
    /// When it must be dispatched at the latest.
    pub start_by: Instant,
}

/// The order of a tenant's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    deadline: Instant,
    ticket: Ticket,
}

impl Entry {
    pub fn key(&self) -> Key {
        Key { deadline: self.ask.deadline.unwrap_or(self.arrived + PATIENCE), ticket: self.ticket }
    }
}

/// What entries come to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sum {
    pub entries: u32,
    /// Jobs: an entry has one for each choice.
    pub jobs: u32,
    pub tokens: f64,
    /// Expected seconds, of all jobs.
    pub seconds: f64,
}

impl Sum {
    pub fn of(ask: &Ask, guess: &Guess) -> Self {
        let jobs = ask.size.choices;
        Self { entries: 1, jobs, tokens: guess.tokens, seconds: guess.seconds * f64::from(jobs) }
    }
    pub fn add(&mut self, other: Self) {
        self.entries += other.entries;
        self.jobs += other.jobs;
        self.tokens += other.tokens;
        self.seconds += other.seconds;
    }
    fn take(&mut self, other: Self) {
        self.entries -= other.entries;
        self.jobs -= other.jobs;
        self.tokens -= other.tokens;
        self.seconds -= other.seconds;
        if self.entries == 0 {
            // No crumbs of rounding stay.
            *self = Self::default();
        }
    }
}

/// A tenant's entries of one class.
#[derive(Debug, Default)]
pub struct Line {
    entries: BTreeMap<Key, Entry>,
    sum: Sum,
}

impl Line {
    /// In the order in which they are dispatched.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }
    pub fn first(&self) -> Option<&Entry> {
        self.entries.values().next()
    }
    /// Who came last, whatever its deadline.
    pub fn newest(&self) -> Option<&Entry> {
        self.entries.values().max_by_key(|entry| entry.ticket)
    }
    /// What stands before a key.
    pub fn ahead(&self, key: &Key) -> Sum {
        // Most come last; then nothing needs to be added up.
        if self.entries.last_key_value().is_none_or(|(last, _)| last < key) {
            return self.sum;
        }
        let mut ahead = Sum::default();
        self.entries.range(..*key).for_each(|(_, entry)| ahead.add(Sum::of(&entry.ask, &entry.guess)));
        ahead
    }
}

/// All entries of one class.
#[derive(Debug, Default)]
pub struct Lane {
    lines: BTreeMap<TenantId, Line>,
    sum: Sum,
}

impl Lane {
    pub fn sum(&self) -> Sum {
        self.sum
    }
    pub fn is_empty(&self) -> bool {
        self.sum.entries == 0
    }
    /// Tenants that have entries here.
    pub fn lines(&self) -> impl Iterator<Item = (&TenantId, &Line)> {
        self.lines.iter()
    }
    pub fn line(&self, tenant: &TenantId) -> Option<&Line> {
        self.lines.get(tenant)
    }

    pub fn put(&mut self, entry: Entry) {
        let sum = Sum::of(&entry.ask, &entry.guess);
        self.sum.add(sum);
        let line = self.lines.entry(entry.ask.tenant.clone()).or_default();
        line.sum.add(sum);
        line.entries.insert(entry.key(), entry);
    }

    /// Panics if there is no such entry.
    pub fn take(&mut self, tenant: &TenantId, key: &Key) -> Entry {
        let line = self.lines.get_mut(tenant).expect("a tenant with an entry has a line");
        let entry = line.entries.remove(key).expect("the entry is in its tenant's line");
        let sum = Sum::of(&entry.ask, &entry.guess);
        line.sum.take(sum);
        self.sum.take(sum);
        if line.entries.is_empty() {
            self.lines.remove(tenant);
        }
        entry
    }
}
