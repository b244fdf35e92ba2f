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
/// Errors of programs (Xids of their class): whoever has three an hour has them for another reason than the programs.
pub const APPLICATION: Rate = Rate { count: 3, within_ms: HOUR };
/// Xid 92, a high rate of corrected errors.
pub const MANY_CORRECTED: Rate = Rate { count: 2, within_ms: DAY };
/// Errors of NVLink (Xid 74): the first is reset, a second is the hardware.
pub const NVLINK: Rate = Rate { count: 2, within_ms: DAY };

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

/// An Xid is told twice, by the library and by the kernel's log: the same number within this is one.
pub const TWICE_MS: u64 = 2 * SECOND;

/// A call of the library that has not returned for so long is a fault of the server.
pub const STUCK_MS: u64 = 10 * SECOND;

/// Time between two readings.
pub const READ_EVERY_MS: u64 = SECOND;
