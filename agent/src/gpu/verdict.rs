//! What is wrong with a GPU: readings of several polls, and Xids, become findings. Pure.
//!
//! A finding says whether the GPU may still be used and what would mend it. It does not know the GPU's state: that
//! follows in `life`.

use std::collections::VecDeque;

use izar_common::health::gpu::Remedy;

use super::counters::{Counter, Window};
use super::limits::{self, Limits};
use super::xid::{self, Class};

/// What one poll gave of one GPU. What the driver does not know is absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reading {
    /// It has fallen off the bus, or cannot be reached any longer.
    pub lost: bool,
    /// The driver refuses it until it is reset.
    pub reset_required: bool,
    pub temperature_c: Option<u32>,
    pub memory_used_bytes: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub utilization_percent: Option<u32>,
    pub power_mw: Option<u32>,
    pub corrected: Option<u64>,
    pub uncorrected: Option<u64>,
    pub pcie_replays: Option<u64>,
    /// Checksum errors of all its links together.
    pub nvlink_crc: Option<u64>,
    /// The hardware slows itself down now.
    pub slowdown: Option<bool>,
    pub remap_pending: Option<bool>,
    pub remap_failed: Option<bool>,
    /// What the driver asks for, see `recovery_action` of the report.
    pub recovery_action: Option<u32>,
    pub ecc: Option<bool>,
    pub persistence: Option<bool>,
    /// A process that computes on it and is none of ours.
    pub foreign: Option<u32>,
}

impl Reading {
    /// Whether the driver gave nothing, and not why.
    pub fn is_silent(&self) -> bool {
        *self == Self::default()
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Not as it should be.
    Soft(String),
    /// It must not be used. `standing`: later readings show whether it still is so.
    Hard { reason: String, remedy: Remedy, standing: bool },
    /// It is broken.
    Broken(String),
    /// Nothing follows, but an operator should know.
    Note(String),
}

fn hard(reason: impl Into<String>, remedy: Remedy) -> Finding {
    Finding::Hard { reason: reason.into(), remedy, standing: false }
}

fn standing(reason: impl Into<String>, remedy: Remedy) -> Finding {
    Finding::Hard { reason: reason.into(), remedy, standing: true }
}

/// What is remembered of a GPU's readings.
#[derive(Debug)]
pub struct History {
    limits: Limits,
    corrected: Counter,
    uncorrected: Counter,
    replays: Counter,
    crc: Counter,
    corrected_lately: Window,
    replays_lately: Window,
    crc_lately: Window,
    slowdowns_lately: Window,
    application_lately: Window,
    many_corrected_lately: Window,
    slow_lately: Window,
    slow: bool,
    /// What the driver said last: that it says nothing does not unsay it.
    recovery_action: Option<u32>,
    remap_failed: Option<bool>,
    /// When it was read last.
    read_ms: Option<u64>,
    hot_since_ms: Option<u64>,
    /// What has happened within the last seconds, each code once, the oldest first.
    incidents: VecDeque<Incident>,
    /// When NVLink failed last, and whether the GPU was mended since.
    nvlink_ms: Option<u64>,
    mended: bool,
    /// An Xid 45 that may be the echo of another.
    cleanup_ms: Option<u64>,
}

/// An Xid, however often it was told of: the library and the kernel's log both do, and the driver logs some of them once
/// for each link, or for each processor of the GPU.
#[derive(Debug, Clone, Copy)]
struct Incident {
    code: u32,
    first_ms: u64,
    last_ms: u64,
}

impl History {
    pub fn new(limits: Limits) -> Self {
        Self {
            corrected: Counter::default(),
            uncorrected: Counter::default(),
            replays: Counter::default(),
            crc: Counter::default(),
            corrected_lately: Window::new(limits.corrected()),
            replays_lately: Window::new(limits.pcie_replays()),
            crc_lately: Window::new(limits.nvlink_errors()),
            slowdowns_lately: Window::new(limits.slowdowns()),
            application_lately: Window::new(limits.program_errors()),
            many_corrected_lately: Window::new(limits.many_corrected()),
            slow_lately: Window::new(limits.slow()),
            slow: false,
            recovery_action: None,
            remap_failed: None,
            read_ms: None,
            hot_since_ms: None,
            incidents: VecDeque::new(),
            nvlink_ms: None,
            mended: false,
            cleanup_ms: None,
            limits,
        }
    }

    /// The limits by which it judges.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Judges a reading, in the light of those before it.
    pub fn read(&mut self, reading: &Reading, now_ms: u64) -> Vec<Finding> {
        let mut findings = Vec::new();
        self.hard_rules(reading, now_ms, &mut findings);
        self.soft_rules(reading, now_ms, &mut findings);
        if self.cleanup_ms.is_some_and(|at| now_ms.saturating_sub(at) >= limits::CLEANUP_MS) {
            // Nothing else came: some program was ended while it computed.
            self.cleanup_ms = None;
            self.application_lately.add(now_ms, 1);
        }
        if let Some(count) = self.application_lately.excess(now_ms) {
            findings.push(Finding::Soft(format!("{count} errors of programs within an hour")));
        }
        if self.many_corrected_lately.excess(now_ms).is_some() {
            findings.push(Finding::Soft("a high rate of corrected errors (Xid 92) twice within a day".into()));
        }
        findings
    }

    fn hard_rules(&mut self, reading: &Reading, now_ms: u64, findings: &mut Vec<Finding>) {
        if reading.lost {
            findings.push(standing("it cannot be reached", Remedy::Restart));
        }
        if reading.reset_required {
            findings.push(standing("the driver refuses it until it is reset", Remedy::Reset));
        }
        self.recovery_action = reading.recovery_action.or(self.recovery_action);
        self.remap_failed = reading.remap_failed.or(self.remap_failed);
        match self.recovery_action {
            None | Some(0) => {}
            Some(2) => findings.push(standing("the driver asks for a restart of the server", Remedy::Restart)),
            Some(action @ (1 | 3 | 4)) => {
                findings
                    .push(standing(format!("the driver asks for a reset (recovery action {action})"), Remedy::Reset));
            }
            Some(other) => {
                findings.push(standing(format!("the driver asks for recovery action {other}"), Remedy::Restart));
            }
        }
        if self.remap_failed == Some(true) {
            findings.push(standing("its memory has no spare rows left for a bad one", Remedy::Replace));
        }
        let uncorrected = self.uncorrected.grown(reading.uncorrected);
        if uncorrected > 0 {
            let what = format!("{uncorrected} memory errors that were not corrected");
            findings.push(if self.is_contained(now_ms) {
                Finding::Soft(format!("{what}, and were contained (Xid 94)"))
            } else {
                hard(what, Remedy::Reset)
            });
        }
    }

    fn soft_rules(&mut self, reading: &Reading, now_ms: u64, findings: &mut Vec<Finding>) {
        let mut soft = |reason: String| findings.push(Finding::Soft(reason));
        if reading.remap_pending == Some(true) {
            soft("a bad row of its memory waits for a reset; reset it within a day".into());
        }
        self.corrected_lately.add(now_ms, self.corrected.grown(reading.corrected));
        if let Some(count) = self.corrected_lately.excess(now_ms) {
            soft(format!("{count} corrected memory errors within an hour"));
        }
        self.replays_lately.add(now_ms, self.replays.grown(reading.pcie_replays));
        if let Some(count) = self.replays_lately.excess(now_ms) {
            soft(format!("{count} replays on the PCI bus within a minute"));
        }
        self.crc_lately.add(now_ms, self.crc.grown(reading.nvlink_crc));
        if let Some(count) = self.crc_lately.excess(now_ms) {
            soft(format!("{count} checksum errors on NVLink within 10 s"));
        }
        // One reading that does not say has not ended it.
        let slow = reading.slowdown.unwrap_or(self.slow);
        let before_ms = self.read_ms.replace(now_ms).filter(|_| slow && self.slow);
        // What lies between two readings that hung is not known.
        let slow_ms = before_ms.map_or(0, |before| now_ms.saturating_sub(before).min(limits::STUCK_MS));
        self.slow_lately.add(now_ms, slow_ms);
        self.slowdowns_lately.add(now_ms, u64::from(slow && !self.slow));
        self.slow = slow;
        if let Some(count) = self.slowdowns_lately.excess(now_ms) {
            soft(format!("its hardware slowed itself down {count} times within 10 minutes"));
        } else if let Some(slow_ms) = self.slow_lately.excess(now_ms) {
            soft(format!("its hardware slowed itself down for {} of 10 minutes", slow_ms / 60_000));
        }
        self.hot_since_ms = match reading.temperature_c {
            Some(celsius) if celsius >= self.limits.hot_celsius => self.hot_since_ms.or(Some(now_ms)),
            // One poll without a temperature is no cooler one.
            None => self.hot_since_ms,
            Some(_) => None,
        };
        if self.hot_since_ms.is_some_and(|since| now_ms.saturating_sub(since) >= self.limits.hot_ms()) {
            soft(format!("at least {} °C for {} minutes", self.limits.hot_celsius, self.limits.hot_minutes));
        }
        if let Some(pid) = reading.foreign {
            soft(format!("process {pid} computes on it and is none of ours"));
        }
        if reading.ecc == Some(false) {
            soft("its memory is not checked (ECC is off)".into());
        }
        if reading.persistence == Some(false) {
            soft("persistence mode is off".into());
        }
    }

    /// Notes that the GPU was reset, or is let work again: what comes now is not what was.
    pub fn mended(&mut self) {
        self.incidents.clear();
        (self.recovery_action, self.remap_failed) = (None, None);
        self.mended = true;
    }

    /// Whether the driver has just said that a memory error hit one program alone, which it ended, and nothing worse.
    fn is_contained(&self, now_ms: u64) -> bool {
        let lately = |incident: &&Incident| now_ms.saturating_sub(incident.last_ms) < limits::CLEANUP_MS;
        let mut contained = false;
        for incident in self.incidents.iter().filter(lately) {
            match incident.code {
                xid::CONTAINED => contained = true,
                xid::DOUBLE_BIT | xid::UNCONTAINED => return false,
                _ => {}
            }
        }
        contained
    }

    /// Judges an Xid; `None` if it was told of already.
    pub fn xid(&mut self, code: u32, now_ms: u64) -> Option<Vec<Finding>> {
        if !self.is_new(code, now_ms) {
            return None;
        }
        let others = |incident: &&Incident| incident.code != xid::CLEANUP;
        let near =
            self.incidents.iter().filter(others).any(|other| now_ms.saturating_sub(other.last_ms) < limits::CLEANUP_MS);
        if code != xid::CLEANUP {
            self.cleanup_ms = None;
        }
        Some(match xid::class(code) {
            Class::Application => self.application(now_ms),
            Class::Reset => vec![hard(format!("Xid {code}"), Remedy::Reset)],
            Class::Restart => vec![hard(format!("Xid {code}: it fell off the bus"), Remedy::Restart)],
            Class::Hardware => vec![Finding::Broken(format!("Xid {code}"))],
            Class::Software => vec![Finding::Note(format!("Xid {code}: the driver's own error"))],
            Class::Unknown => vec![Finding::Note(format!("Xid {code} is in no table"))],
            Class::Record => {
                if code == xid::MANY_CORRECTED {
                    self.many_corrected_lately.add(now_ms, 1);
                }
                Vec::new()
            }
            Class::Rule => match code {
                xid::DOUBLE_BIT => vec![hard("Xid 48: a memory error that was not corrected", Remedy::Reset)],
                xid::NVLINK => {
                    let before_ms = self.nvlink_ms.replace(now_ms);
                    let lately = before_ms.is_some_and(|at| now_ms.saturating_sub(at) < limits::NVLINK_MS);
                    if lately && std::mem::take(&mut self.mended) {
                        vec![Finding::Broken("Xid 74: an NVLink error again, within a day of a reset".into())]
                    } else {
                        self.mended = false;
                        vec![hard("Xid 74: an NVLink error", Remedy::Reset)]
                    }
                }
                xid::CLEANUP => {
                    self.cleanup_ms = (!near).then_some(now_ms);
                    Vec::new()
                }
                // 154: the recovery action has changed, and the next reading says to what.
                _ => Vec::new(),
            },
        })
    }

    /// Notes an Xid among what has happened lately; says whether it is a new incident.
    fn is_new(&mut self, code: u32, now_ms: u64) -> bool {
        let is_one = |incident: &Incident| now_ms.saturating_sub(incident.first_ms) < limits::INCIDENT_MS;
        self.incidents.retain(|old| is_one(old) || now_ms.saturating_sub(old.last_ms) < limits::CLEANUP_MS);
        match self.incidents.iter_mut().find(|incident| incident.code == code) {
            Some(incident) if is_one(incident) => {
                incident.last_ms = now_ms;
                false
            }
            Some(incident) => {
                *incident = Incident { code, first_ms: now_ms, last_ms: now_ms };
                true
            }
            None => {
                if self.incidents.len() == limits::INCIDENTS {
                    self.incidents.pop_front();
                }
                self.incidents.push_back(Incident { code, first_ms: now_ms, last_ms: now_ms });
                true
            }
        }
    }

    fn application(&mut self, now_ms: u64) -> Vec<Finding> {
        self.application_lately.add(now_ms, 1);
        let count = self.application_lately.excess(now_ms);
        count.map(|count| Finding::Soft(format!("{count} errors of programs within an hour"))).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Default for History {
        fn default() -> Self {
            Self::new(Limits::default())
        }
    }

    /// Reads once a second, for so many seconds from `from`; returns what the last one found.
    fn readings(history: &mut History, from: u64, seconds: u64, at: impl Fn(u64) -> Reading) -> Vec<Finding> {
        (0..seconds).map(|s| history.read(&at(s), (from + s) * 1000)).last().unwrap_or_default()
    }

    fn soft(findings: &[Finding]) -> Vec<&str> {
        findings
            .iter()
            .map(|finding| if let Finding::Soft(reason) = finding { reason.as_str() } else { "not soft" })
            .collect()
    }

    fn remedy(findings: &[Finding]) -> Option<Remedy> {
        match findings {
            [Finding::Hard { remedy, .. }] => Some(*remedy),
            [] => None,
            others => panic!("{others:?}"),
        }
    }

    #[test]
    fn a_gpu_that_does_not_say_much_is_well() {
        assert_eq!(readings(&mut History::default(), 0, 4000, |_| Reading::default()), []);
    }

    #[test]
    fn what_must_not_be_used_is_found_at_once() {
        let check = |reading: Reading, expected| {
            assert_eq!(remedy(&History::default().read(&reading, 0)), expected, "{reading:?}");
        };
        check(Reading { lost: true, ..Reading::default() }, Some(Remedy::Restart));
        check(Reading { reset_required: true, ..Reading::default() }, Some(Remedy::Reset));
        check(Reading { remap_failed: Some(true), ..Reading::default() }, Some(Remedy::Replace));
        for (action, expected) in [
            (0, None),
            (1, Remedy::Reset.into()),
            (2, Remedy::Restart.into()),
            (3, Remedy::Reset.into()),
            (4, Remedy::Reset.into()),
            (9, Remedy::Restart.into()),
        ] {
            check(Reading { recovery_action: Some(action), ..Reading::default() }, expected);
        }
    }

    #[test]
    fn memory_errors_count_from_the_agents_beginning() {
        let reading = |n| Reading { uncorrected: Some(n), ..Reading::default() };
        let mut history = History::default();
        assert_eq!(history.read(&reading(7), 0), []);
        assert_eq!(remedy(&history.read(&reading(8), 1000)), Some(Remedy::Reset));
        assert_eq!(history.read(&reading(8), 2000), []);
    }

    #[test]
    fn ten_corrected_errors_an_hour_are_too_many_and_nine_are_not() {
        let reading = |n| Reading { corrected: Some(n), ..Reading::default() };
        for (errors, found) in [(9, 0), (10, 1)] {
            let mut history = History::default();
            let last = readings(&mut history, 0, 3000, |s| reading((s / 200).min(errors)));
            assert_eq!(soft(&last).len(), found, "{errors}: {last:?}");
            assert_eq!(readings(&mut history, 8000, 2, |_| reading(errors)), [], "an hour later it is forgotten");
        }
    }

    #[test]
    fn heat_counts_when_it_lasts() {
        let mut history = History::default();
        let hot = |_| Reading { temperature_c: Some(85), ..Reading::default() };
        assert_eq!(readings(&mut history, 0, 299, hot), []);
        assert_eq!(readings(&mut history, 299, 1, |_| Reading { temperature_c: Some(84), ..Reading::default() }), []);
        assert_eq!(readings(&mut history, 300, 300, hot), []);
        assert_eq!(soft(&readings(&mut history, 600, 1, hot)), ["at least 85 °C for 5 minutes"]);
    }

    #[test]
    fn limits_of_the_agents_file_are_heeded() {
        let mut history =
            History::new(Limits { hot_celsius: 70, hot_minutes: 1, program_errors_per_hour: 1, ..Limits::default() });
        assert_eq!(soft(&history.xid(13, 0).unwrap()), ["1 errors of programs within an hour"]);
        let hot = |_| Reading { temperature_c: Some(70), ..Reading::default() };
        let found = readings(&mut history, 4_000, 61, hot);
        assert_eq!(soft(&found), ["at least 70 °C for 1 minutes"]);
    }

    #[test]
    fn slowing_down_again_and_again_counts_and_so_does_most_of_the_time() {
        let slow = |slowdown| Reading { slowdown: Some(slowdown), ..Reading::default() };
        let found = readings(&mut History::default(), 0, 560, |s| slow(s % 100 < 20));
        assert_eq!(soft(&found), ["its hardware slowed itself down 6 times within 10 minutes"]);
        assert_eq!(readings(&mut History::default(), 0, 360, |_| slow(true)), []);
        let mut history = History::default();
        let found = readings(&mut history, 0, 361, |_| slow(true));
        assert_eq!(soft(&found), ["its hardware slowed itself down for 6 of 10 minutes"]);
        // Hours of it read as they are, also where the driver does not say each time.
        let hours = |s| if s % 7 == 3 { Reading::default() } else { slow(true) };
        assert_eq!(soft(&readings(&mut history, 361, 7_200, hours)).len(), 1);
        assert_eq!(readings(&mut history, 7_561, 260, |_| slow(false)), []);
        // What a call that hung lies between is not known to have been slow.
        let mut history = History::default();
        assert_eq!([0, 3_600, 7_200].map(|at| history.read(&slow(true), at * 1_000).len()), [0; 3]);
    }

    #[test]
    fn the_other_soft_rules_name_what_they_saw() {
        let check = |reading: &dyn Fn(u64) -> Reading, expected: &str| {
            let found = readings(&mut History::default(), 0, 20, reading);
            assert!(matches!(soft(&found)[..], [reason] if reason.contains(expected)), "{expected}: {found:?}");
        };
        check(&|_| Reading { remap_pending: Some(true), ..Reading::default() }, "waits for a reset");
        check(&|_| Reading { foreign: Some(77), ..Reading::default() }, "process 77");
        check(&|_| Reading { ecc: Some(false), ..Reading::default() }, "ECC is off");
        check(&|_| Reading { persistence: Some(false), ..Reading::default() }, "persistence mode");
        check(&|s| Reading { pcie_replays: Some(s / 2), ..Reading::default() }, "9 replays");
        check(&|s| Reading { nvlink_crc: Some(s * 150), ..Reading::default() }, "checksum errors");
    }

    #[test]
    fn a_memory_error_that_was_contained_is_the_programs_and_any_other_the_gpus() {
        let errors = |count| Reading { uncorrected: Some(count), ..Reading::default() };
        let check = |before: &[u32], hard: bool| {
            let mut history = History::default();
            history.read(&errors(0), 1_000);
            for code in before {
                history.xid(*code, 2_000);
            }
            let found = history.read(&errors(1), 2_100);
            assert_eq!(matches!(found[..], [Finding::Hard { .. }]), hard, "{before:?}: {found:?}");
        };
        check(&[], true);
        check(&[94], false);
        check(&[94, 95], true);
        check(&[48, 94], true);
        check(&[13], true);
        let mut history = History::default();
        history.read(&errors(0), 1_000);
        history.xid(94, 2_000);
        let later = history.read(&errors(1), 2_000 + limits::CLEANUP_MS);
        assert!(matches!(later[..], [Finding::Hard { .. }]), "it is about another one: {later:?}");
    }

    #[test]
    fn programs_errors_fence_nothing_and_three_an_hour_degrade() {
        let mut history = History::default();
        for (code, at) in [(31, 0), (13, 600_000)] {
            assert_eq!(history.xid(code, at), Some(vec![]));
        }
        assert_eq!(soft(&history.xid(94, 1_200_000).unwrap()), ["3 errors of programs within an hour"]);
        for code in (0..200).filter(|code| xid::class(*code) == Class::Application) {
            let found = History::default().xid(code, 0).unwrap();
            assert!(found.is_empty(), "Xid {code}: {found:?}");
        }
    }

    #[test]
    fn one_incident_counts_once_however_often_it_is_told_of() {
        let mut history = History::default();
        // The library and the kernel's log tell of two codes each; of 13 there is a line for each processor.
        let told = [(31, 0), (43, 10), (31, 900), (43, 910), (13, 1_000), (13, 1_001), (13, 1_200), (13, 4_000)];
        let new = told.map(|(code, at)| history.xid(code, at).is_some());
        assert_eq!(new, [true, true, false, false, true, false, false, false]);
        assert_eq!(history.read(&Reading::default(), 5_000), [], "two errors of programs");
        // A program that fails again and again is not one incident for ever.
        assert_eq!(
            soft(&history.xid(13, 1_000 + limits::INCIDENT_MS).unwrap()),
            ["3 errors of programs within an hour"]
        );

        let mut history = History::default();
        [0, 100, 2_000].into_iter().for_each(|at| drop(history.xid(xid::MANY_CORRECTED, at)));
        assert_eq!(history.read(&Reading::default(), 3_000), []);
        history.xid(xid::MANY_CORRECTED, 3_600_000);
        assert_eq!(history.read(&Reading::default(), 3_601_000).len(), 1);
    }

    #[test]
    fn a_flood_of_codes_fills_no_memory() {
        let mut history = History::default();
        (0..10_000).for_each(|code| drop(history.xid(code, 0)));
        assert_eq!(history.incidents.len(), limits::INCIDENTS);
    }

    #[test]
    fn cleaning_up_counts_only_when_nothing_else_is_near() {
        let errors = |told: &[(u32, u64)]| {
            let mut history = History::default();
            for second in 0..60 {
                for (code, at) in told.iter().filter(|(_, at)| at / 1_000 == second) {
                    history.xid(*code, *at);
                }
                history.read(&Reading::default(), second * 1_000 + 999);
            }
            history.application_lately.total(60_000)
        };
        assert_eq!(errors(&[(31, 12_000), (45, 14_000)]), 1);
        assert_eq!(errors(&[(45, 30_000), (43, 33_000)]), 0);
        assert_eq!(errors(&[(45, 50_000)]), 1);
        assert_eq!(errors(&[(45, 50_000), (45, 50_100)]), 1, "both sources tell of it");
        // A burst: each of them is beside the first, whatever stands between.
        assert_eq!(errors(&[(31, 1_000), (45, 1_100), (45, 1_200), (45, 1_300)]), 1);
        assert_eq!(errors(&[(31, 1_000), (45, 5_900), (45, 12_000)]), 2);
    }

    #[test]
    fn nvlink_is_reset_once_and_then_it_is_the_hardware() {
        let first = |history: &mut History, at| remedy(&history.xid(74, at).unwrap()) == Some(Remedy::Reset);
        let mut history = History::default();
        // A line for each link, told by both sources, and more of them as long as nobody has reset it.
        assert!(first(&mut history, 0));
        assert!([1, 2, 900].iter().all(|at| history.xid(74, *at).is_none()));
        assert!(first(&mut history, 60_000) && first(&mut history, 3_600_000));
        history.mended();
        assert!(matches!(history.xid(74, 3_601_000).unwrap()[..], [Finding::Broken(_)]));
        // A day later it is another one.
        let mut history = History::default();
        assert!(first(&mut history, 0));
        history.mended();
        assert!(first(&mut history, limits::DAY));
        // A reset before the first says nothing.
        let mut history = History::default();
        history.mended();
        assert!(first(&mut history, 0) && first(&mut history, 60_000));
    }

    #[test]
    fn each_class_asks_for_its_remedy() {
        for code in 0..300 {
            let found = History::default().xid(code, 0).unwrap();
            let right = match xid::class(code) {
                Class::Reset => remedy(&found) == Some(Remedy::Reset),
                Class::Restart => remedy(&found) == Some(Remedy::Restart),
                Class::Hardware => matches!(found[..], [Finding::Broken(_)]),
                Class::Software | Class::Unknown => matches!(found[..], [Finding::Note(_)]),
                Class::Application | Class::Record => found.is_empty(),
                Class::Rule => match code {
                    48 | 74 => remedy(&found) == Some(Remedy::Reset),
                    _ => found.is_empty(),
                },
            };
            assert!(right, "Xid {code}: {found:?}");
        }
    }
}
