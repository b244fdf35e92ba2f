//! All GPUs of the server: what is known of each, its state, and whether the server as a whole is sound. Pure.
//!
//! It takes readings, Xids and what controllers remember, with the time, and gives the report's health. A GPU that was
//! seen once is never forgotten: one that is missing from a reading is lost. What must outlive the agent (quarantine, a
//! cordon until a restart, how often a GPU fell off the bus) controllers remember and tell it with each assignment.

use std::collections::BTreeMap;

use izar_common::health::Generation;
use izar_common::health::gpu::{Action, Ended, GPUS, Health, Hold, Mode, Order, Remedy, State, View, reason};
use izar_common::id::GpuId;

use super::life::{Event, next};
use super::limits::{Limits, MENDED, STUCK_MS};
use super::verdict::{Finding, History, Reading};
use super::{Guards, kernel};

/// Who a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub id: GpuId,
    pub index: u32,
    pub cuda: Option<u16>,
    pub name: String,
    pub bus: String,
}

/// Why a server gets no work whose GPUs are not read, and what that says in [`Judge::health`].
pub const OPENING: &str = "its GPUs have not been read yet";
pub const CLOSED: &str = "its GPUs are being mended";

/// Why a GPU is unknown that has been read.
const AWAITED: &str = "controllers have not said yet what they remember of it";

/// Why a GPU is put away that is there and says nothing.
const SILENT: &str = "the driver says nothing of it any more";

/// What came of mending a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mended {
    Yes,
    /// Why not.
    No(String),
    /// It computes wrongly.
    Wrong(String),
}

/// What the judge is told at its beginning.
#[derive(Debug, Clone)]
pub struct Terms {
    pub mode: Mode,
    pub guards: Guards,
    /// GPUs that the server must have; `None`: as many as it has.
    pub expected: Option<u32>,
    /// Which start of the server this is.
    pub boot: String,
    pub limits: Limits,
}

/// Something that the log should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub gpu: GpuId,
    pub index: u32,
    /// From which state to which; `None`: it is only a note.
    pub moved: Option<(State, State)>,
    pub reason: String,
}

#[derive(Debug)]
struct Gpu {
    identity: Identity,
    reading: Reading,
    history: History,
    state: State,
    /// Controllers have not said yet what they remember of it: until then it gets no work, whatever readings show.
    awaited: bool,
    reason: String,
    remedy: Remedy,
    /// It needed a restart of the server since it was put away, whatever else was found then: the bus is not trusted
    /// before.
    restart: bool,
    since_ms: u64,
    /// When something was wrong last.
    wrong_ms: u64,
    /// Its cordon is seen in readings: so many of them in a row have not shown it.
    standing: bool,
    clean: u32,
    last_xid: Option<u32>,
    xids: u64,
    fell_ms: Option<u64>,
    /// It is back, and has not shown yet that it computes rightly.
    unproven: bool,
    /// It was put away, or got worse, and controllers have not said since that they remember that: what they let go of
    /// meanwhile is something older.
    unheard: bool,
    /// So many readings in a row have said nothing at all of it.
    silent: u32,
}

/// What is known of the server's GPUs.
#[derive(Debug)]
pub struct Judge {
    terms: Terms,
    driver: String,
    gpus: BTreeMap<GpuId, Gpu>,
    /// What has been found out so far of the library.
    library: Library,
    /// Since when a call of the library has not returned.
    busy_since_ms: Option<u64>,
    /// Calls that must return in time before it counts as one that answers: one that is late each time would have the
    /// server's workers fenced and let go in turns.
    owed: u32,
    /// Of the assignment whose holds these are; `None` before the first.
    generation: Option<Generation>,
    holds: BTreeMap<GpuId, Hold>,
    ended: Option<Ended>,
}

#[derive(Debug, PartialEq, Eq)]
enum Library {
    Opening,
    /// It was let go of, so that GPUs can be reset.
    Closed,
    /// There is none: a server without GPUs.
    Absent,
    Broken(String),
    Works,
}

impl Judge {
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            driver: String::new(),
            gpus: BTreeMap::new(),
            library: Library::Opening,
            busy_since_ms: None,
            owed: 0,
            generation: None,
            holds: BTreeMap::new(),
            ended: None,
        }
    }

    /// Notes that the library is there.
    pub fn opened(&mut self, driver: String) {
        self.driver = driver;
    }

    /// Notes that there is no library.
    pub fn absent(&mut self) {
        self.library = Library::Absent;
    }

    /// Notes that the library cannot be used, or gave no reading at all.
    pub fn broken(&mut self, why: String) {
        self.library = Library::Broken(why);
    }

    /// Notes that the library is let go of; or that it will be opened anew.
    pub fn close(&mut self, closed: bool) {
        self.library = if closed { Library::Closed } else { Library::Opening };
        // What readings have shown before says nothing of afterwards.
        self.gpus.values_mut().for_each(|gpu| gpu.clean = 0);
    }

    /// Notes how an order has ended.
    pub fn tell(&mut self, ended: Option<Ended>) {
        self.ended = ended.map(|ended| Ended { reason: reason(ended.reason), ..ended });
    }

    /// Notes that an order is being carried out.
    pub fn mend(&mut self, order: &Order, now_ms: u64, wall_ms: u64) -> Vec<Told> {
        let event = match order.action {
            Action::Reset => Event::Resetting,
            Action::Restart => Event::Rebooting,
        };
        let mut told = Vec::new();
        for gpu in self.gpus.values_mut().filter(|gpu| order.gpus.contains(&gpu.identity.id)) {
            let why = gpu.reason.clone();
            gpu.step(event, &why, now_ms, wall_ms, &mut told);
        }
        told
    }

    /// Whether readings have shown nothing wrong with a GPU often enough since the library was opened.
    pub fn is_clean(&self, id: &GpuId) -> bool {
        self.gpus.get(id).is_some_and(|gpu| gpu.clean >= MENDED)
    }

    /// Notes what came of mending a GPU.
    pub fn mended(&mut self, id: &GpuId, how: Mended, now_ms: u64, wall_ms: u64) -> Vec<Told> {
        let mut told = Vec::new();
        let Some(gpu) = self.gpus.get_mut(id) else { return told };
        match how {
            Mended::Yes => {
                gpu.step(Event::Mended, "it was reset", now_ms, wall_ms, &mut told);
                // Whoever mended it has asked for an answer that is known.
                gpu.unproven = false;
            }
            Mended::No(why) => {
                let why = format!("{why}; before: {}", gpu.reason);
                gpu.step(Event::Failed, &why, now_ms, wall_ms, &mut told);
            }
            Mended::Wrong(why) => gpu.take(vec![Finding::Broken(why)], now_ms, wall_ms, &mut told),
        }
        told
    }

    /// GPUs that are back and were not asked yet for an answer that is known; each is named once.
    pub fn unproven(&mut self) -> Vec<(GpuId, Option<u16>)> {
        let take = |gpu: &mut Gpu| std::mem::take(&mut gpu.unproven).then(|| gpu.identity.clone());
        self.gpus.values_mut().filter_map(take).map(|identity| (identity.id, identity.cuda)).collect()
    }

    /// Notes that a GPU gave a wrong answer, or none.
    pub fn disproven(&mut self, id: &GpuId, why: &str, now_ms: u64, wall_ms: u64) -> Vec<Told> {
        let mut told = Vec::new();
        if let Some(gpu) = self.gpus.get_mut(id) {
            let finding = Finding::Hard { reason: why.to_owned(), remedy: Remedy::Reset, standing: false };
            gpu.take(vec![finding], now_ms, wall_ms, &mut told);
        }
        told
    }

    /// Notes that a call of the library begins.
    pub fn asks(&mut self, now_ms: u64) {
        self.busy_since_ms = Some(now_ms);
    }

    /// Notes that it has returned.
    pub fn answered(&mut self, now_ms: u64) {
        let Some(since_ms) = self.busy_since_ms.take() else { return };
        let late = now_ms.saturating_sub(since_ms) >= STUCK_MS;
        self.owed = if late { MENDED } else { self.owed.saturating_sub(1) };
    }

    /// Takes a poll's readings of all GPUs.
    pub fn read(&mut self, readings: Vec<(Identity, Reading)>, now_ms: u64, wall_ms: u64) -> Vec<Told> {
        self.library = Library::Works;
        let (mut told, mut seen) = (Vec::new(), Vec::new());
        for (identity, reading) in readings.into_iter().take(GPUS) {
            let id = identity.id.clone();
            let awaited = self.generation.is_none();
            let new = || Gpu::new(identity.clone(), awaited, &self.terms.limits, wall_ms);
            let gpu = self.gpus.entry(id.clone()).or_insert_with(new);
            gpu.identity = identity;
            // The assignment that speaks of it may have come before its first reading.
            if let Some(hold) = self.holds.get(&id).filter(|_| gpu.state == State::Unknown) {
                gpu.hold(hold, &self.terms.boot, now_ms, wall_ms, &mut told);
            }
            gpu.read(reading, now_ms, wall_ms, &mut told);
            seen.push(id);
        }
        for (_, gpu) in self.gpus.iter_mut().filter(|(id, _)| !seen.contains(id)) {
            gpu.read(Reading { lost: true, ..Reading::default() }, now_ms, wall_ms, &mut told);
        }
        told
    }

    /// Takes an Xid.
    pub fn xid(&mut self, id: &GpuId, code: u32, now_ms: u64, wall_ms: u64) -> Vec<Told> {
        let mut told = Vec::new();
        if let Some(gpu) = self.gpus.get_mut(id) {
            gpu.xid(code, now_ms, wall_ms, &mut told);
        }
        told
    }

    /// The GPU in a slot of the PCI bus.
    pub fn in_slot(&self, slot: &str) -> Option<GpuId> {
        let here = |gpu: &&Gpu| kernel::slot(&gpu.identity.bus).as_deref() == Some(slot);
        self.gpus.values().find(here).map(|gpu| gpu.identity.id.clone())
    }

    /// The GPU of a number.
    pub fn numbered(&self, index: u32) -> Option<GpuId> {
        self.gpus.values().find(|gpu| gpu.identity.index == index).map(|gpu| gpu.identity.id.clone())
    }

    /// Takes what controllers remember, as an assignment says it. A hold that is new counts; one that is gone was lifted;
    /// an older assignment is passed over.
    pub fn hold(&mut self, generation: Generation, holds: &[Hold], now_ms: u64, wall_ms: u64) -> Vec<Told> {
        let mut told = Vec::new();
        if Some(generation) < self.generation {
            return told;
        }
        self.generation = Some(generation);
        self.gpus.values_mut().for_each(|gpu| gpu.awaited = false);
        let new: BTreeMap<GpuId, Hold> = holds.iter().map(|hold| (hold.gpu.clone(), hold.clone())).collect();
        let old = std::mem::replace(&mut self.holds, new);
        for id in old.keys().filter(|id| !self.holds.contains_key(*id)) {
            if let Some(gpu) = self.gpus.get_mut(id).filter(|gpu| gpu.state.share() == 0)
                // Once: whatever they let go of next is about this.
                && !std::mem::take(&mut gpu.unheard)
            {
                gpu.step(Event::Released, "released", now_ms, wall_ms, &mut told);
            }
        }
        let fresh = self.holds.values().filter(|hold| old.get(&hold.gpu) != Some(hold)).cloned().collect::<Vec<_>>();
        for hold in fresh {
            let boot = self.terms.boot.clone();
            if let Some(gpu) = self.gpus.get_mut(&hold.gpu) {
                gpu.hold(&hold, &boot, now_ms, wall_ms, &mut told);
            }
        }
        // Those that were read before the first assignment, and that nothing is held against.
        for gpu in self.gpus.values_mut().filter(|gpu| gpu.state == State::Unknown && gpu.clean > 0) {
            gpu.step(Event::Sound, "", now_ms, wall_ms, &mut told);
        }
        told
    }

    /// Why the server as a whole is not sound.
    fn fault(&self, now_ms: u64) -> Option<String> {
        if self.owed > 0 || self.busy_since_ms.is_some_and(|since| now_ms.saturating_sub(since) >= STUCK_MS) {
            return Some(format!("the GPU library has not answered for {} s", STUCK_MS / 1000));
        }
        let there = self.gpus.values().filter(|gpu| !gpu.reading.lost).count() as u32;
        let few = self.terms.expected.filter(|expected| there < *expected);
        match (&self.library, few) {
            (Library::Opening, _) => return Some(OPENING.into()),
            (Library::Closed, _) => return Some(CLOSED.into()),
            (Library::Broken(why), _) => return Some(format!("its GPUs cannot be read: {why}")),
            (Library::Absent, Some(expected)) => {
                return Some(format!("{expected} GPUs are expected, and there is no GPU library"));
            }
            (Library::Works, Some(expected)) => return Some(format!("{there} GPUs of {expected} that are expected")),
            (_, None) => {}
        }
        // A driver may come later than the agent; workers would use what it brings.
        if let (Library::Absent, Some(hold)) = (&self.library, self.holds.values().next()) {
            return Some(format!("GPU {} is remembered ({}), and there is no GPU library", hold.gpu, hold.reason));
        }
        // One of which controllers have not spoken yet gets nothing, and is no fault.
        let stopped = |gpu: &&Gpu| gpu.state.share() == 0 && !(gpu.awaited && gpu.state == State::Unknown);
        let whole = |gpu: &&Gpu| self.terms.guards == Guards::All || gpu.restart;
        if let Some(gpu) = self.gpus.values().find(|gpu| stopped(gpu) && whole(gpu)) {
            return Some(format!("GPU {} is {}: {}", gpu.identity.index, gpu.state, gpu.reason));
        }
        // An agent that began after a GPU was lost never sees it.
        let missing = |hold: &&Hold| {
            let needs_restart = hold.remedy == Remedy::Restart && hold.boot == self.terms.boot;
            needs_restart && !self.gpus.contains_key(&hold.gpu)
        };
        let hold = self.holds.values().find(missing)?;
        Some(format!("GPU {} is missing: {}", hold.gpu, hold.reason))
    }

    /// The health that a report carries.
    pub fn health(&self, now_ms: u64) -> Health {
        let mut gpus: Vec<View> = self.gpus.values().map(Gpu::view).collect();
        gpus.sort_by_key(|gpu| gpu.index);
        Health {
            mode: self.terms.mode,
            fault: reason(self.fault(now_ms).unwrap_or_default()),
            boot: self.terms.boot.clone(),
            driver: self.driver.clone(),
            gpus,
            ended: self.ended.clone(),
        }
    }
}

impl Gpu {
    fn new(identity: Identity, awaited: bool, limits: &Limits, wall_ms: u64) -> Self {
        Self {
            identity,
            reading: Reading::default(),
            history: History::new(limits.clone()),
            state: State::Unknown,
            awaited,
            reason: if awaited { AWAITED.into() } else { String::new() },
            remedy: Remedy::None,
            restart: false,
            since_ms: wall_ms,
            wrong_ms: 0,
            standing: false,
            clean: 0,
            last_xid: None,
            xids: 0,
            fell_ms: None,
            unproven: false,
            unheard: false,
            silent: 0,
        }
    }

    fn read(&mut self, reading: Reading, now_ms: u64, wall_ms: u64, told: &mut Vec<Told>) {
        if reading.lost && !self.reading.lost {
            self.fell(wall_ms);
        }
        self.silent = if reading.is_silent() { self.silent.saturating_add(1) } else { 0 };
        let mut findings = self.history.read(&reading, now_ms);
        self.reading = reading;
        if self.silent >= MENDED {
            findings.push(Finding::Hard { reason: SILENT.into(), remedy: Remedy::Reset, standing: true });
        } else if self.silent > 0 && findings.is_empty() {
            // It shows neither that something is wrong nor that nothing is.
            return;
        }
        let hard = findings.iter().any(|finding| matches!(finding, Finding::Hard { .. } | Finding::Broken(_)));
        if findings.is_empty() {
            self.step(Event::Sound, "", now_ms, wall_ms, told);
        }
        self.take(findings, now_ms, wall_ms, told);
        self.clean = if hard { 0 } else { self.clean.saturating_add(u32::from(self.silent == 0)) };
        if self.state == State::Cordoned && self.standing && self.clean >= MENDED {
            self.step(Event::Mended, "what was wrong is gone", now_ms, wall_ms, told);
        }
    }

    fn xid(&mut self, code: u32, now_ms: u64, wall_ms: u64, told: &mut Vec<Told>) {
        let Some(findings) = self.history.xid(code, now_ms) else { return };
        (self.last_xid, self.xids) = (Some(code), self.xids + 1);
        if code == super::xid::FELL_OFF {
            self.fell(wall_ms);
        }
        self.take(findings, now_ms, wall_ms, told);
    }

    /// A GPU that falls tells of it in several ways: they are one fall.
    fn fell(&mut self, wall_ms: u64) {
        if self.remedy != Remedy::Restart {
            self.fell_ms = Some(wall_ms);
        }
    }

    fn take(&mut self, findings: Vec<Finding>, now_ms: u64, wall_ms: u64, told: &mut Vec<Told>) {
        let before = self.state;
        for finding in findings {
            match finding {
                Finding::Soft(why) => {
                    self.wrong_ms = now_ms;
                    self.step(Event::Soft, &why, now_ms, wall_ms, told);
                }
                Finding::Hard { reason, remedy, standing } => {
                    self.wrong_ms = now_ms;
                    // A cordon that some reading will lift stays one only while nothing else speaks against the GPU.
                    let first = self.state.share() > 0 || self.state == State::Unknown;
                    self.standing = standing && (first || self.standing);
                    self.clean = 0;
                    self.remedy = if first { remedy } else { self.remedy.max(remedy) };
                    self.restart = remedy == Remedy::Restart || (self.restart && !first);
                    self.step(Event::Hard, &reason, now_ms, wall_ms, told);
                }
                Finding::Broken(why) => {
                    self.wrong_ms = now_ms;
                    self.remedy = Remedy::Replace;
                    self.step(Event::Broken, &why, now_ms, wall_ms, told);
                }
                Finding::Note(why) => told.push(self.tell(None, why)),
            }
        }
        let away = before.share() > 0 && self.state.share() == 0;
        self.unheard |= away || (self.state == State::Quarantined && before != State::Quarantined);
    }

    fn hold(&mut self, hold: &Hold, boot: &str, now_ms: u64, wall_ms: u64, told: &mut Vec<Told>) {
        self.unheard = false;
        self.restart |= hold.remedy == Remedy::Restart && hold.boot == boot;
        if hold.quarantined {
            self.remedy = self.remedy.max(Remedy::Replace);
            self.wrong_ms = now_ms;
            self.step(Event::Broken, &hold.reason, now_ms, wall_ms, told);
        } else if self.state.share() > 0 || self.state == State::Unknown {
            self.wrong_ms = now_ms;
            self.standing = hold.standing;
            self.clean = 0;
            self.remedy = self.remedy.max(hold.remedy).max(Remedy::Reset);
            self.step(Event::Hard, &hold.reason, now_ms, wall_ms, told);
            if hold.boot != boot {
                self.step(Event::Mended, "the server was restarted", now_ms, wall_ms, told);
            }
        } else if hold.boot == boot {
            // It is cordoned here already: for what was told to the controllers, or, after a restart of the agent, for a
            // part of it.
            self.standing &= hold.standing;
            self.remedy = self.remedy.max(hold.remedy);
        }
    }

    fn step(&mut self, event: Event, why: &str, now_ms: u64, wall_ms: u64, told: &mut Vec<Told>) {
        let after = next(self.state, event, now_ms.saturating_sub(self.wrong_ms), self.history.limits());
        if after == self.state || (self.awaited && after.share() > 0) {
            return;
        }
        let before = std::mem::replace(&mut self.state, after);
        self.since_ms = wall_ms;
        if matches!(after, State::Probation) {
            // Its time begins now.
            self.wrong_ms = now_ms;
            self.unproven = true;
            self.history.mended();
        }
        if after.share() > 0 {
            (self.remedy, self.restart) = (Remedy::None, false);
        }
        self.reason = match after {
            State::Healthy => String::new(),
            State::Probation => reason(format!("{why}; before: {}", self.reason)),
            _ => reason(why.to_owned()),
        };
        told.push(self.tell(Some((before, after)), self.reason.clone()));
    }

    fn tell(&self, moved: Option<(State, State)>, reason: String) -> Told {
        Told { gpu: self.identity.id.clone(), index: self.identity.index, moved, reason }
    }

    fn view(&self) -> View {
        let (identity, reading) = (self.identity.clone(), &self.reading);
        View {
            id: identity.id,
            index: identity.index,
            cuda: identity.cuda,
            name: identity.name,
            bus: identity.bus,
            state: self.state,
            reason: self.reason.clone(),
            remedy: self.remedy,
            standing: self.standing && self.state == State::Cordoned,
            since_ms: self.since_ms,
            temperature_c: reading.temperature_c,
            memory_used_bytes: reading.memory_used_bytes,
            memory_bytes: reading.memory_bytes,
            utilization_percent: reading.utilization_percent,
            power_mw: reading.power_mw,
            corrected_errors: reading.corrected,
            uncorrected_errors: reading.uncorrected,
            pcie_replays: reading.pcie_replays,
            recovery_action: reading.recovery_action,
            last_xid: self.last_xid,
            xids: self.xids,
            fell_ms: self.fell_ms,
        }
    }
}

#[cfg(test)]
mod tests;
