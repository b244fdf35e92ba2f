//! What an agent says of its GPUs: what each measures, how it is, and what that means for the server.
//!
//! The agent judges, for it is nearest and must be fast; controllers remember what must outlive it (`Hold`). Counters are
//! as the driver gives them, absent where it does not know them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::GpuId;

/// GPUs of one server that are reported at most: reports must fit their frame, and no server has more.
pub const GPUS: usize = 64;

/// Bytes of a reason at most: with it 64 GPUs fit a report.
pub const REASON: usize = 240;

/// Cuts a reason to what a report carries.
pub fn reason(mut text: String) -> String {
    if text.len() > REASON {
        let end = (0..=REASON).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Where a GPU is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It has not been read yet.
    Unknown,
    Healthy,
    /// Something is not as it should be: it gets less work.
    Degraded,
    /// It gets no work, and what ran on it goes on elsewhere.
    Cordoned,
    /// Cordoned, and being reset.
    Resetting,
    /// Cordoned, and its server is being restarted.
    Rebooting,
    /// It is back after a fault, and gets a quarter of the work until it has been well for a while.
    Probation,
    /// Broken, as far as anybody knows: only an operator lets it work again.
    Quarantined,
}

impl State {
    pub const ALL: [Self; 8] = [
        Self::Unknown,
        Self::Healthy,
        Self::Degraded,
        Self::Cordoned,
        Self::Resetting,
        Self::Rebooting,
        Self::Probation,
        Self::Quarantined,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Cordoned => "cordoned",
            Self::Resetting => "resetting",
            Self::Rebooting => "rebooting",
            Self::Probation => "probation",
            Self::Quarantined => "quarantined",
        }
    }

    /// Percent of the work that it should get, compared with a healthy one.
    pub fn share(self) -> u8 {
        match self {
            Self::Healthy => 100,
            Self::Degraded => 50,
            Self::Probation => 25,
            Self::Unknown | Self::Cordoned | Self::Resetting | Self::Rebooting | Self::Quarantined => 0,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What would mend a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    None,
    /// A reset of the GPU.
    Reset,
    /// A restart of the server.
    Restart,
    /// Another GPU.
    Replace,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "nothing",
            Self::Reset => "reset the GPU",
            Self::Restart => "restart the server",
            Self::Replace => "replace the GPU",
        })
    }
}

/// What follows from GPUs' health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing: it is told, and that is all.
    Observe,
    /// What is not sound gets no work, and operators are told what would mend it.
    #[default]
    Advise,
    /// Besides, what would mend it is done, when the leader orders it.
    Act,
}

/// What is done to mend GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Each of them is reset.
    Reset,
    /// Their server is restarted.
    Restart,
}

impl Action {
    pub const ALL: [Self; 2] = [Self::Reset, Self::Restart];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Restart => "restart",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What an agent shall do to its GPUs, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Index of the entry that ordered it: no two have the same, and a later one's is higher.
    pub id: u64,
    pub action: Action,
    pub gpus: Vec<GpuId>,
    /// It is not begun after this, Unix milliseconds: whoever ordered it counts it as failed then.
    pub begin_by_ms: u64,
}

/// How an order ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done, and its GPUs are as they should be.
    Done,
    /// It was not done, or has not helped.
    Failed,
    /// The process that began it is gone: readings will tell.
    Unknown,
    /// It was done, and a GPU computes wrongly.
    Wrong,
    /// Nothing was heard of it in time.
    Late,
}

impl Outcome {
    pub const ALL: [Self; 5] = [Self::Done, Self::Failed, Self::Unknown, Self::Wrong, Self::Late];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Wrong => "wrong",
            Self::Late => "late",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What an agent says of an order, from its end until it is not ordered any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub id: u64,
    pub outcome: Outcome,
    /// In words, what stood in the way; empty if nothing did.
    pub reason: String,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    pub id: GpuId,
    /// Its number on the server, as `nvidia-smi` counts.
    pub index: u32,
    /// The number by which deployments name it (`cuda:0`); `None` if workers cannot see it.
    pub cuda: Option<u16>,
    pub name: String,
    /// Its address on the PCI bus, as in `0000:3b:00.0`.
    pub bus: String,
    pub state: State,
    /// Why it is in that state; empty while it is healthy.
    pub reason: String,
    pub remedy: Remedy,
    /// What it is cordoned for is seen in its readings, and ends when they do not show it any more.
    pub standing: bool,
    /// Since when it has been in that state, Unix milliseconds.
    pub since_ms: u64,
    pub temperature_c: Option<u32>,
    pub memory_used_bytes: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub utilization_percent: Option<u32>,
    pub power_mw: Option<u32>,
    /// Errors of the memory since the driver was loaded: corrected ones, and others.
    pub corrected_errors: Option<u64>,
    pub uncorrected_errors: Option<u64>,
    pub pcie_replays: Option<u64>,
    /// What the driver itself asks for (its field 230): 0 nothing, 1 a reset, 2 a restart, 3 a drain, 4 drain and reset.
    pub recovery_action: Option<u32>,
    /// The last Xid, and how many there were since the agent began.
    pub last_xid: Option<u32>,
    pub xids: u64,
    /// When it fell off the bus last, Unix milliseconds: twice within a week is once too often.
    pub fell_ms: Option<u64>,
}

impl View {
    /// A GPU of which nothing but its state is known.
    pub fn new(id: GpuId, index: u32, state: State) -> Self {
        Self {
            id,
            index,
            cuda: None,
            name: String::new(),
            bus: String::new(),
            state,
            reason: String::new(),
            remedy: Remedy::None,
            standing: false,
            since_ms: 0,
            temperature_c: None,
            memory_used_bytes: None,
            memory_bytes: None,
            utilization_percent: None,
            power_mw: None,
            corrected_errors: None,
            uncorrected_errors: None,
            pcie_replays: None,
            recovery_action: None,
            last_xid: None,
            xids: 0,
            fell_ms: None,
        }
    }
}

/// All GPUs of a server.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Health {
    pub mode: Mode,
    /// Why the server as a whole is not sound; empty if it is.
    pub fault: String,
    /// Which start of the server this is: a GPU that was cordoned before the last one has been reset since.
    pub boot: String,
    pub driver: String,
    pub gpus: Vec<View>,
    /// How the order that it was given has ended.
    pub ended: Option<Ended>,
}

impl Health {
    /// Why the server shall get no work at all, if it shall not.
    pub fn blocked(&self) -> Option<&str> {
        (self.mode != Mode::Observe && !self.fault.is_empty()).then_some(self.fault.as_str())
    }

    /// The GPU that deployments name by a number.
    pub fn cuda(&self, number: u16) -> Option<&View> {
        self.gpus.iter().find(|gpu| gpu.cuda == Some(number))
    }
}

/// What controllers remember against a GPU, and tell its agent with every assignment: it outlives the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub gpu: GpuId,
    /// Only an operator ends it; else a restart of the server does as well.
    pub quarantined: bool,
    pub reason: String,
    /// What would mend it.
    pub remedy: Remedy,
    /// Readings that do not show it any more end it.
    pub standing: bool,
    /// The start of the server in which it began.
    pub boot: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_be_used_has_a_share() {
        let used: Vec<State> = State::ALL.into_iter().filter(|state| state.share() > 0).collect();
        assert_eq!(used, [State::Healthy, State::Degraded, State::Probation]);
    }

    #[test]
    fn nothing_is_blocked_where_health_is_only_observed() {
        let mut health = Health { fault: "2 GPUs of 4".into(), ..Health::default() };
        assert_eq!(health.blocked(), Some("2 GPUs of 4"));
        health.mode = Mode::Observe;
        assert_eq!(health.blocked(), None);
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let cut = reason("ä".repeat(REASON));
        assert!(cut.len() <= REASON && cut.chars().all(|c| c == 'ä'), "{cut}");
        assert_eq!(reason("short".into()), "short");
    }
}
