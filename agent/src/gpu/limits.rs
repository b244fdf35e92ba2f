//! The limits by which GPUs are judged: the one table of them.
//!
//! They are NVIDIA's and what operators of large fleets use; none is a setting, so that "degraded" means the same on
//! every server. Counts are of differences: what a counter stood at when the agent began is nobody's news.

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
pub const DAY: u64 = 24 * HOUR;

/// So many within so long are too many.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    pub count: u64,
    pub within_ms: u64,
}

/// Corrected (single-bit) errors of the memory.
pub const CORRECTED: Rate = Rate { count: 10, within_ms: HOUR };
/// Replays on the PCI bus: more than eight a minute.
pub const PCIE_REPLAYS: Rate = Rate { count: 9, within_ms: MINUTE };
/// Checksum errors on NVLink: a hundred a second, over ten of them, so that one burst is none.
pub const NVLINK_CRC: Rate = Rate { count: 1_000, within_ms: 10 * SECOND };
/// How often the hardware began to slow itself down: 0.6 a minute over ten.
pub const SLOWDOWNS: Rate = Rate { count: 6, within_ms: 10 * MINUTE };
/// How long it was slow, in milliseconds: six of ten minutes, for a slowdown that does not end begins only once.
pub const SLOW_MS: Rate = Rate { count: 6 * MINUTE, within_ms: 10 * MINUTE };
/// Errors of programs (Xids of their class): whoever has three an hour has them for another reason than the programs.
pub const APPLICATION: Rate = Rate { count: 3, within_ms: HOUR };
/// Xid 92, a high rate of corrected errors.
pub const MANY_CORRECTED: Rate = Rate { count: 2, within_ms: DAY };
/// An error of NVLink (Xid 74) is reset; one that comes again after that, within so long of the one before, is the
/// hardware.
pub const NVLINK_MS: u64 = DAY;

/// So hot for so long.
pub const HOT_C: u32 = 85;
pub const HOT_MS: u64 = 5 * MINUTE;

/// How long a GPU is degraded after it was last seen to be.
pub const SOFT_MS: u64 = 15 * MINUTE;

/// How long a GPU that came back must be well before it gets its whole share again.
pub const PROBATION_MS: u64 = 30 * MINUTE;

/// Readings without a fault after which a fault that is seen in readings counts as mended.
pub const MENDED: u32 = 3;

/// Xid 45 is what the driver says when it cleans up after another Xid: alone only if none is this near.
pub const CLEANUP_MS: u64 = 5 * SECOND;

/// An Xid is told of by the library and by the kernel's log, some of them on a line for each link or processor: the same
/// number within this is one incident. The log may be a second or two behind; a worker that failed takes longer than this
/// to start again and fail anew. Counted from the first, so that what goes on and on counts again.
pub const INCIDENT_MS: u64 = 5 * SECOND;

/// Incidents of a GPU that are compared with: as many codes never come within seconds, so the oldest may be forgotten.
pub const INCIDENTS: usize = 64;

/// A call of the library that has not returned for so long is a fault of the server.
pub const STUCK_MS: u64 = 10 * SECOND;

/// Time between two readings; and when something has happened that a reading shows: errors come by the hundred, and each
/// reading asks every GPU.
pub const READ_EVERY_MS: u64 = SECOND;
pub const READ_AGAIN_MS: u64 = 100;
