//! Whether the disk under a folder is nearly full, told before writes fail.
//!
//! A log that cannot grow ends its controller, so an operator must hear of it while there is time. It never deletes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::statvfs::statvfs;

use crate::events;

/// How often the disk is asked; a full one does not come in a minute unless it was nearly so.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Always too little; and a fiftieth of the disk, though not more than is plenty on any disk.
const LEAST_MIB: u64 = 1 << 10;
const PART: u64 = 50;
const PLENTY_MIB: u64 = 20 << 10;

/// Free and all bytes of a disk, as last seen; both 0 before the first look.
#[derive(Debug, Default)]
pub struct Seen {
    free: AtomicU64,
    total: AtomicU64,
}

impl Seen {
    /// Free bytes, and all.
    pub fn bytes(&self) -> (u64, u64) {
        (self.free.load(Relaxed) << 20, self.total.load(Relaxed) << 20)
    }
}

/// Tells whenever the disk of `folder` becomes nearly full, and when it no longer is; notes what it sees. Runs until it is
/// dropped.
pub async fn watch(folder: &Path, seen: &Seen) {
    let mut told = false;
    loop {
        // A disk that hangs must not take a thread of the runtime with it.
        let asked = folder.to_owned();
        let room = tokio::task::spawn_blocking(move || room(&asked)).await;
        if let Ok(Some((free_mib, total_mib))) = room {
            seen.free.store(free_mib, Relaxed);
            seen.total.store(total_mib, Relaxed);
            let full = is_nearly_full(free_mib, total_mib);
            if full && !told {
                log::error!(message_id = events::DISK_NEARLY_FULL, path:% = folder.display(), free_mib, total_mib; "the disk is nearly full");
            } else if told && !full {
                log::info!(path:% = folder.display(), free_mib, total_mib; "the disk has room again");
            }
            told = full;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Room for an unprivileged process, and all that the disk holds, in MiB.
fn room(folder: &Path) -> Option<(u64, u64)> {
    let stat = statvfs(folder).ok()?;
    let mib = |blocks: u64| ((u128::from(blocks) * u128::from(stat.fragment_size())) >> 20) as u64;
    Some((mib(stat.blocks_available()), mib(stat.blocks())))
}

fn is_nearly_full(free_mib: u64, total_mib: u64) -> bool {
    // A small disk may be smaller than what is always too little.
    free_mib < LEAST_MIB.min(total_mib / 10) || free_mib < (total_mib / PART).min(PLENTY_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_nearly_full_by_its_size() {
        let gib = |n: u64| n << 10;
        assert!(is_nearly_full(gib(1) - 1, gib(100)) && !is_nearly_full(gib(3), gib(100)));
        assert!(is_nearly_full(gib(3), gib(200)) && !is_nearly_full(gib(5), gib(200)));
        assert!(is_nearly_full(gib(19), gib(10_000)) && !is_nearly_full(gib(20), gib(10_000)));
        assert!(is_nearly_full(99, 1_000) && !is_nearly_full(101, 1_000), "a disk of 1,000 MiB");
    }

    #[test]
    fn the_kernel_knows_the_disk_of_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let (free, total) = room(dir.path()).unwrap();
        assert!(free <= total && total > 0);
        assert_eq!(room(&dir.path().join("not/there")), None);
    }
}
