//! Whether the loops of this process still turn: each promises when it will be heard of next, and one thread holds them
//! to it.
//!
//! The service manager ends a process that does not say in time that it is well. A timer could say so while everything
//! else hangs; here it is said only while every loop keeps its word. A loop that waits for work, or for somebody on the
//! network, owes nothing meanwhile: it rests. A process has one watchdog, as it has one log, so this is global; where
//! nobody watches, no thread runs and a promise costs one store. It never ends the process itself.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::events;

/// Parts of the watchdog's limit: looks at the loops, what a loop may be late before it counts as standing still (a
/// machine under load makes everything late), and signs of loops that otherwise come only with work.
const LOOKS: u32 = 6;
const PATIENCE: u32 = 3;
const SIGNS: u32 = 12;

/// A loop that rests.
const NEVER: u64 = u64::MAX;

static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
static LOOPS: Mutex<Vec<Weak<Promise>>> = Mutex::new(Vec::new());
/// The watchdog's limit, once there is one.
static WATCHED: OnceLock<Duration> = OnceLock::new();

#[derive(Debug)]
struct Promise {
    name: String,
    /// When the loop will be heard of at the latest, in milliseconds of this process.
    due_ms: AtomicU64,
}

/// A loop's side. When it is dropped, the loop has ended and owes nothing more.
#[derive(Debug)]
pub struct Vital(Arc<Promise>);

impl Vital {
    /// Begins at rest.
    pub fn new(name: impl Into<String>) -> Self {
        let promise = Arc::new(Promise { name: name.into(), due_ms: AtomicU64::new(NEVER) });
        loops().push(Arc::downgrade(&promise));
        Self(promise)
    }

    /// The loop will be heard of within this time, or soon after.
    pub fn promise(&self, within: Duration) {
        self.0.due_ms.store(now_ms().saturating_add(millis(within)), Relaxed);
    }

    /// The loop works on something that takes no time worth speaking of.
    pub fn work(&self) {
        self.promise(Duration::ZERO);
    }

    /// The loop waits for others.
    pub fn rest(&self) {
        self.0.due_ms.store(NEVER, Relaxed);
    }

    /// Promises a sign for when the wait that is returned is over, and waits; for ever where nobody watches. For loops
    /// that wait for work, so that even an idle one is seen to turn. Cancellation-safe.
    pub async fn sign(&self) {
        match WATCHED.get() {
            Some(limit) => {
                self.promise(*limit / SIGNS);
                tokio::time::sleep(*limit / SIGNS).await;
            }
            None => std::future::pending().await,
        }
    }
}

/// Watches all loops from now on, in a thread that lives as long as the process: says `well` several times within
/// `limit` while every loop keeps its promise. A second call does nothing.
pub fn watch(limit: Duration, well: impl Fn() + Send + 'static) {
    if WATCHED.set(limit).is_err() {
        return;
    }
    let look = move || {
        let mut standing = Vec::new();
        loop {
            let late = late(&promises(), now_ms(), millis(limit / PATIENCE));
            tell(&late, &mut standing);
            if late.is_empty() {
                well();
            }
            std::thread::sleep(limit / LOOKS);
        }
    };
    std::thread::Builder::new().name("watchdog".into()).spawn(look).expect("the system has room for a thread");
}

/// The runtime's own sign of life; runs until it is dropped. Where nobody watches it does nothing.
pub async fn runtime_turns() {
    let vital = Vital::new("runtime");
    loop {
        vital.sign().await;
    }
}

/// Logs each loop once when it begins to stand still, and once when it goes on.
fn tell(late: &[(String, u64)], standing: &mut Vec<String>) {
    standing.retain(|name| {
        let still = late.iter().any(|(other, _)| other == name);
        if !still {
            log::info!(loop_name = name.as_str(); "a loop goes on");
        }
        still
    });
    for (name, late_ms) in late {
        if !standing.contains(name) {
            log::error!(message_id = events::WATCHDOG_STARVES, loop_name = name.as_str(), late_ms = *late_ms; "a loop stands still, the watchdog is not fed");
            standing.push(name.clone());
        }
    }
}

/// The loops that are later than they may be, and by how many milliseconds.
fn late(promises: &[(String, u64)], now_ms: u64, patience_ms: u64) -> Vec<(String, u64)> {
    let overdue = |due: u64| now_ms.checked_sub(due).filter(|late| *late > patience_ms);
    promises.iter().filter_map(|(name, due)| Some((name.clone(), overdue(*due)?))).collect()
}

fn promises() -> Vec<(String, u64)> {
    let mut loops = loops();
    loops.retain(|promise| promise.strong_count() > 0);
    let there = loops.iter().filter_map(Weak::upgrade);
    there.map(|promise| (promise.name.clone(), promise.due_ms.load(Relaxed))).collect()
}

fn loops() -> MutexGuard<'static, Vec<Weak<Promise>>> {
    // Nothing in here is left half done.
    LOOPS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_ms() -> u64 {
    millis(BEGIN.elapsed())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(NEVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(promises: &[(&str, u64)], now_ms: u64, expected: &[(&str, u64)]) {
        let owned = |list: &[(&str, u64)]| -> Vec<_> { list.iter().map(|(n, ms)| ((*n).to_owned(), *ms)).collect() };
        assert_eq!(late(&owned(promises), now_ms, 100), owned(expected));
    }

    #[test]
    fn a_loop_is_late_only_when_patience_is_over_and_never_while_it_rests() {
        check(&[], 1_000, &[]);
        check(&[("raft", 950), ("link", NEVER)], 1_000, &[]);
        check(&[("raft", 900), ("link", 899), ("net", 5_000)], 1_000, &[("link", 101)]);
        check(&[("raft", NEVER)], NEVER - 1, &[]);
    }

    #[test]
    fn a_loop_that_ended_owes_nothing() {
        let vital = Vital::new("short-lived");
        vital.work();
        let of_ours = || promises().into_iter().filter(|(name, _)| name == "short-lived").count();
        assert_eq!(of_ours(), 1);
        drop(vital);
        assert_eq!(of_ours(), 0);
    }
}
