//! The limits by which GPUs are judged: the one table of them.
//!
//! They are NVIDIA's and what operators of large fleets use. Those of what degrades a GPU, and how long it is watched, an
//! agent's file may say otherwise (`[gpu.limits]`); what cordons one is no matter of taste and stands here. Counts are of
//! differences: what a counter stood at when the agent began is nobody's news.

use serde::Deserialize;

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

/// What an agent's file may say of them: `[gpu.limits]`. Each field's range is in [`Limits::check`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Corrected (single-bit) errors of the memory within an hour. Default: 10.
    pub corrected_per_hour: u64,
    /// Replays on the PCI bus within a minute. Default: 9, more than eight.
    pub pcie_replays_per_minute: u64,
    /// Checksum errors on NVLink within 10 s: a hundred a second, so long that one burst is none. Default: 1000.
    pub nvlink_errors_per_10_s: u64,
    /// How often the hardware began to slow itself down within 10 minutes. Default: 6.
    pub slowdowns_per_10_minutes: u64,
    /// How many of 10 minutes it was slow: a slowdown that does not end begins only once. Default: 6; at most 9.
    pub slow_minutes_of_10: u64,
    /// Errors of programs (Xids of their class) within an hour: whoever has so many has them for another reason than the
    /// programs. Default: 3.
    pub program_errors_per_hour: u64,
    /// Xid 92, a high rate of corrected errors, within a day. Default: 2.
    pub many_corrected_per_day: u64,
    /// So hot for so long. Default: 85 °C for 5 minutes.
    pub hot_celsius: u32,
    pub hot_minutes: u64,
    /// How long a GPU is degraded after it was last seen to be. Default: 15.
    pub degraded_minutes: u64,
    /// How long a GPU that came back must be well before it gets its whole share again. Default: 30.
    pub probation_minutes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            corrected_per_hour: 10,
            pcie_replays_per_minute: 9,
            nvlink_errors_per_10_s: 1_000,
            slowdowns_per_10_minutes: 6,
            slow_minutes_of_10: 6,
            program_errors_per_hour: 3,
            many_corrected_per_day: 2,
            hot_celsius: 85,
            hot_minutes: 5,
            degraded_minutes: 15,
            probation_minutes: 30,
        }
    }
}

impl Limits {
    /// Says which limit is out of its range: none is zero, for that would always be reached, and none so high that it
    /// never is.
    pub fn check(&self) -> Result<(), String> {
        const COUNT: u64 = 1_000_000;
        let ranges = [
            ("corrected_per_hour", self.corrected_per_hour, 1..=COUNT),
            ("pcie_replays_per_minute", self.pcie_replays_per_minute, 1..=COUNT),
            ("nvlink_errors_per_10_s", self.nvlink_errors_per_10_s, 1..=COUNT),
            ("slowdowns_per_10_minutes", self.slowdowns_per_10_minutes, 1..=COUNT),
            ("slow_minutes_of_10", self.slow_minutes_of_10, 1..=9),
            ("program_errors_per_hour", self.program_errors_per_hour, 1..=COUNT),
            ("many_corrected_per_day", self.many_corrected_per_day, 1..=COUNT),
            ("hot_celsius", u64::from(self.hot_celsius), 40..=120),
            ("hot_minutes", self.hot_minutes, 1..=60),
            ("degraded_minutes", self.degraded_minutes, 1..=24 * 60),
            ("probation_minutes", self.probation_minutes, 1..=24 * 60),
        ];
        let Some((name, value, range)) = ranges.into_iter().find(|(_, value, range)| !range.contains(value)) else {
            return Ok(());
        };
        Err(format!("{name}: {value} is not between {} and {}", range.start(), range.end()))
    }

    pub(super) fn corrected(&self) -> Rate {
        Rate { count: self.corrected_per_hour, within_ms: HOUR }
    }
    pub(super) fn pcie_replays(&self) -> Rate {
        Rate { count: self.pcie_replays_per_minute, within_ms: MINUTE }
    }
    pub(super) fn nvlink_errors(&self) -> Rate {
        Rate { count: self.nvlink_errors_per_10_s, within_ms: 10 * SECOND }
    }
    pub(super) fn slowdowns(&self) -> Rate {
        Rate { count: self.slowdowns_per_10_minutes, within_ms: 10 * MINUTE }
    }
    /// In milliseconds that it was slow.
    pub(super) fn slow(&self) -> Rate {
        Rate { count: self.slow_minutes_of_10 * MINUTE, within_ms: 10 * MINUTE }
    }
    pub(super) fn program_errors(&self) -> Rate {
        Rate { count: self.program_errors_per_hour, within_ms: HOUR }
    }
    pub(super) fn many_corrected(&self) -> Rate {
        Rate { count: self.many_corrected_per_day, within_ms: DAY }
    }
    pub(super) fn hot_ms(&self) -> u64 {
        self.hot_minutes * MINUTE
    }
    pub(super) fn degraded_ms(&self) -> u64 {
        self.degraded_minutes * MINUTE
    }
    pub(super) fn probation_ms(&self) -> u64 {
        self.probation_minutes * MINUTE
    }
}

/// An error of NVLink (Xid 74) is reset; one that comes again after that, within so long of the one before, is the
/// hardware.
pub const NVLINK_MS: u64 = DAY;

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
