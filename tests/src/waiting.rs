//! Waits for a level with a limit: a story never sleeps for a time that somebody guessed.

use std::time::{Duration, Instant};

/// Between two looks; short beside everything that is waited for, long beside the cost of a look.
const PAUSE: Duration = Duration::from_millis(20);

/// Most things happen within a second; the limit only bounds a failing story on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// Looks until there is something, and returns it. Panics with the last reason when `limit` has passed.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> anyhow::Result<T>) -> T {
    let begin = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(reason) if begin.elapsed() > limit => panic!("waited {limit:?} for {what}: {reason:#}"),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Like [`until`], for a condition.
pub fn until_true(what: &str, limit: Duration, mut look: impl FnMut() -> bool) {
    until(what, limit, || if look() { Ok(()) } else { anyhow::bail!("not yet") });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_when_the_level_is_reached() {
        let mut looks = 0;
        until_true("three looks", SOON, || {
            looks += 1;
            looks == 3
        });
        assert_eq!(looks, 3);
    }

    #[test]
    #[should_panic(expected = "waited 1ms for the moon: not yet")]
    fn waiting_gives_up_with_the_reason() {
        until_true("the moon", Duration::from_millis(1), || false);
    }
}
