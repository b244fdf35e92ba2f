//! A server's GPUs over hours, minutes and restarts.

use izar_common::health::Generation;
use izar_common::health::gpu::{Action, Hold, Mode, Order, Remedy, State};
use proptest::prelude::*;

use super::*;

const BOOT: &str = "second";
const SOFT_MS: u64 = 15 * 60_000;
const PROBATION_MS: u64 = 30 * 60_000;

fn terms() -> Terms {
    Terms { mode: Mode::Advise, guards: Guards::Own, expected: None, boot: BOOT.into(), limits: Limits::default() }
}

fn identity(index: u32) -> Identity {
    Identity {
        id: format!("gpu-{index}").parse().unwrap(),
        index,
        cuda: Some(index as u16),
        name: "H100".into(),
        bus: format!("00000000:0{index}:00.0"),
    }
}

fn well() -> Reading {
    Reading { temperature_c: Some(40), recovery_action: Some(0), ..Reading::default() }
}

/// A judge and its time, in milliseconds.
struct Server {
    judge: Judge,
    now_ms: u64,
    applied: u64,
}

impl Server {
    fn new(terms: Terms) -> Self {
        let mut server = Self::untold(terms);
        server.judge.hold(Generation::default(), &[], 1_000, 1_000);
        server
    }
    /// No controller has said anything yet.
    fn untold(terms: Terms) -> Self {
        Self { judge: Judge::new(terms), now_ms: 1_000, applied: 0 }
    }
    /// Reads two GPUs, the second of which gives `second`, once a second.
    fn read(&mut self, times: u64, second: &Reading) {
        for _ in 0..times {
            self.now_ms += 1_000;
            let readings = vec![(identity(0), well()), (identity(1), second.clone())];
            self.judge.read(readings, self.now_ms, self.now_ms);
        }
    }
    fn xid(&mut self, code: u32) {
        self.judge.xid(&"gpu-1".parse().unwrap(), code, self.now_ms, self.now_ms);
    }
    /// An assignment with a hold, or with none.
    fn assign(&mut self, hold: Option<(bool, &str)>) {
        self.assign_what(hold.map(|(quarantined, boot)| (quarantined, boot, Remedy::Reset, false)));
    }
    fn assign_what(&mut self, hold: Option<(bool, &str, Remedy, bool)>) {
        self.applied += 1;
        let generation = Generation { incarnation: 1, applied: self.applied };
        let hold = hold.map(|(quarantined, boot, remedy, standing)| Hold {
            gpu: "gpu-1".parse().unwrap(),
            quarantined,
            reason: "Xid 95".into(),
            remedy,
            standing,
            boot: boot.into(),
        });
        self.judge.hold(generation, hold.as_slice(), self.now_ms, self.now_ms);
    }
    fn second(&self) -> View {
        self.judge.health(self.now_ms).gpus[1].clone()
    }
    fn state(&self) -> State {
        self.second().state
    }
    fn fault(&self) -> String {
        self.judge.health(self.now_ms).fault
    }
}

#[test]
fn a_server_is_not_sound_before_its_gpus_were_read() {
    let mut server = Server::new(terms());
    assert_eq!(server.fault(), "its GPUs have not been read yet");
    server.read(1, &well());
    assert_eq!((server.fault().as_str(), server.state()), ("", State::Healthy));
    let mut without = Server::new(terms());
    without.judge.absent();
    assert_eq!(without.fault(), "", "a server without GPUs is sound");
}

#[test]
fn fewer_gpus_than_expected_are_a_fault_of_the_server() {
    let mut server = Server::new(Terms { expected: Some(3), ..terms() });
    server.read(1, &well());
    assert_eq!(server.fault(), "2 GPUs of 3 that are expected");
    server.judge.absent();
    assert_eq!(server.fault(), "3 GPUs are expected, and there is no GPU library");
    let mut server = Server::new(Terms { expected: Some(2), ..terms() });
    server.read(1, &well());
    assert_eq!(server.fault(), "");
    server.judge.read(vec![(identity(0), well())], 3_000, 3_000);
    assert_eq!(server.fault(), "1 GPUs of 2 that are expected");
    assert_eq!((server.state(), server.second().remedy), (State::Cordoned, Remedy::Restart));
}

#[test]
fn a_library_that_does_not_answer_is_a_fault_until_it_does() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    server.judge.asks(server.now_ms);
    server.now_ms += STUCK_MS - 1;
    assert_eq!(server.fault(), "");
    server.now_ms += 1;
    assert_eq!(server.fault(), "the GPU library has not answered for 10 s");
    server.judge.answered(server.now_ms);
    for _ in 0..MENDED {
        assert_eq!(server.fault(), "the GPU library has not answered for 10 s", "one answer is no proof");
        server.judge.asks(server.now_ms);
        server.judge.answered(server.now_ms + STUCK_MS - 1);
    }
    assert_eq!(server.fault(), "");
}

#[test]
fn a_library_whose_every_answer_is_late_is_a_fault_without_a_break() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    for round in 0..20 {
        server.judge.asks(server.now_ms);
        assert_eq!(server.fault().is_empty(), round == 0, "{round}");
        server.now_ms += STUCK_MS;
        assert!(!server.fault().is_empty());
        server.judge.answered(server.now_ms);
        assert!(!server.fault().is_empty());
        // One answer in time between them changes nothing.
        server.judge.asks(server.now_ms);
        server.judge.answered(server.now_ms);
        assert!(!server.fault().is_empty());
    }
}

#[test]
fn what_readings_show_is_mended_when_they_do_not_show_it_any_more() {
    let mut server = Server::new(terms());
    server.read(2, &well());
    server.read(5, &Reading { recovery_action: Some(1), ..well() });
    assert_eq!((server.state(), server.second().remedy), (State::Cordoned, Remedy::Reset));
    assert_eq!(server.fault(), "", "the other GPU works");
    server.read(2, &well());
    assert_eq!(server.state(), State::Cordoned, "one good reading is no proof");
    server.read(1, &well());
    assert_eq!(server.state(), State::Probation);
    server.read(PROBATION_MS / 1000 - 1, &well());
    assert_eq!(server.state(), State::Probation);
    server.read(2, &well());
    assert_eq!((server.state(), server.second().reason.as_str()), (State::Healthy, ""));
}

#[test]
fn a_probation_ends_when_the_agents_file_says() {
    let limits = Limits { probation_minutes: 1, ..Limits::default() };
    let mut server = Server::new(Terms { limits, ..terms() });
    server.read(1, &Reading { recovery_action: Some(1), ..well() });
    server.read(3, &well());
    assert_eq!(server.state(), State::Probation);
    server.read(59, &well());
    assert_eq!(server.state(), State::Probation);
    server.read(2, &well());
    assert_eq!(server.state(), State::Healthy);
}

#[test]
fn an_xid_stays_a_cordon_whatever_readings_say() {
    let mut server = Server::new(terms());
    server.read(2, &well());
    server.xid(95);
    server.read(1, &Reading { lost: true, ..Reading::default() });
    server.read(5_000, &well());
    assert_eq!((server.state(), server.second().reason.as_str()), (State::Cordoned, "Xid 95"));
    assert_eq!((server.second().last_xid, server.second().xids), (Some(95), 1));
}

#[test]
fn a_gpu_that_falls_off_the_bus_takes_its_server_along_and_falls_once() {
    let mut server = Server::new(terms());
    server.read(2, &well());
    server.xid(79);
    let fell = server.second().fell_ms;
    assert_eq!(fell, Some(server.now_ms));
    assert_eq!(server.fault(), "GPU 1 is cordoned: Xid 79: it fell off the bus");
    server.read(3, &Reading { lost: true, ..Reading::default() });
    assert_eq!(server.second().fell_ms, fell);
}

#[test]
fn a_gpu_that_falls_off_the_bus_too_often_leaves_its_server_away() {
    let mut server = Server::new(terms());
    server.read(2, &well());
    server.xid(79);
    // Controllers count falls: the second is a quarantine, and what it needs is told with it.
    server.assign_what(Some((true, BOOT, Remedy::Restart, false)));
    assert_eq!((server.state(), server.second().remedy), (State::Quarantined, Remedy::Replace));
    assert_eq!(server.fault(), "GPU 1 is quarantined: Xid 95");
    // An agent that began since heeds it as well; another start of the server has it behind.
    for (boot, fault) in [(BOOT, "GPU 1 is quarantined: Xid 95"), ("first", "")] {
        let mut next = Server::new(terms());
        next.assign_what(Some((true, boot, Remedy::Restart, false)));
        next.read(2, &well());
        assert_eq!((next.state(), next.fault().as_str()), (State::Quarantined, fault));
    }
    server.assign(None);
    assert_eq!((server.state(), server.fault().as_str()), (State::Probation, ""), "it was released");
    server.xid(54);
    assert_eq!((server.state(), server.fault().as_str()), (State::Quarantined, ""), "that is behind it");
}

#[test]
fn a_link_that_fails_again_after_a_reset_is_the_hardware() {
    let mut server = Server::new(terms());
    server.read(4, &well());
    server.xid(74);
    server.xid(74);
    assert_eq!((server.state(), server.second().xids), (State::Cordoned, 1), "one incident");
    let order = Order { id: 7, action: Action::Reset, gpus: vec![second()], begin_by_ms: 0 };
    server.judge.mend(&order, server.now_ms, server.now_ms);
    server.judge.mended(&second(), Mended::Yes, server.now_ms, server.now_ms);
    assert_eq!(server.state(), State::Probation);
    server.xid(74);
    assert_eq!(server.state(), State::Quarantined);
}

#[test]
fn where_every_gpu_guards_every_worker_one_is_enough() {
    let mut server = Server::new(Terms { guards: Guards::All, ..terms() });
    server.read(2, &well());
    server.xid(48);
    assert_eq!(server.fault(), "GPU 1 is cordoned: Xid 48: a memory error that was not corrected");
}

#[test]
fn a_degraded_gpu_is_well_again_after_a_while() {
    let mut server = Server::new(terms());
    server.read(2, &well());
    server.read(1, &Reading { persistence: Some(false), ..well() });
    assert_eq!((server.state(), server.second().reason.as_str()), (State::Degraded, "persistence mode is off"));
    server.read(SOFT_MS / 1000 - 1, &well());
    assert_eq!(server.state(), State::Degraded);
    server.read(1, &well());
    assert_eq!(server.state(), State::Healthy);
}

#[test]
fn a_cordon_outlives_the_agent_until_its_server_is_restarted() {
    for (boot, expected) in [(BOOT, State::Cordoned), ("first", State::Probation)] {
        // The assignment may come before the first reading, or after it.
        for early in [true, false] {
            let mut server = Server::new(terms());
            if early {
                server.assign(Some((false, boot)));
                server.read(1, &well());
            } else {
                server.read(1, &well());
                server.assign(Some((false, boot)));
            }
            server.read(10, &well());
            assert_eq!(server.state(), expected, "{boot} {early}");
        }
    }
}

#[test]
fn what_a_cordon_needs_outlives_the_agent() {
    for early in [true, false] {
        for (remedy, standing) in [(Remedy::Restart, false), (Remedy::Reset, true)] {
            let mut server = Server::new(terms());
            if early {
                server.assign_what(Some((false, BOOT, remedy, standing)));
                server.read(1, &well());
            } else {
                server.read(1, &well());
                server.assign_what(Some((false, BOOT, remedy, standing)));
            }
            let fault = if remedy == Remedy::Restart { "GPU 1 is cordoned: Xid 95" } else { "" };
            assert_eq!((server.second().remedy, server.fault().as_str()), (remedy, fault));
            server.read(5, &well());
            assert_eq!(server.state(), if standing { State::Probation } else { State::Cordoned });
        }
    }
}

#[test]
fn a_reading_that_ends_does_not_end_what_else_is_remembered_of_a_cordon() {
    let mut server = Server::new(terms());
    server.read(1, &Reading { recovery_action: Some(1), ..well() });
    assert!(server.second().standing);
    server.assign_what(Some((false, BOOT, Remedy::Restart, false)));
    server.read(5, &well());
    assert_eq!((server.state(), server.second().remedy), (State::Cordoned, Remedy::Restart));
}

#[test]
fn a_lost_gpu_that_a_new_agent_never_saw_is_a_fault_until_the_server_is_restarted() {
    for (hold, expected) in [
        ((false, BOOT, Remedy::Restart, false), "GPU gpu-1 is missing: Xid 95"),
        ((false, "first", Remedy::Restart, false), ""),
        ((false, BOOT, Remedy::Reset, false), ""),
        ((true, BOOT, Remedy::Restart, false), "GPU gpu-1 is missing: Xid 95"),
        ((true, BOOT, Remedy::Reset, false), ""),
    ] {
        let mut server = Server::new(terms());
        server.judge.read(vec![(identity(0), well())], 2_000, 2_000);
        server.assign_what(Some(hold));
        assert_eq!(server.fault(), expected, "{hold:?}");
        server.assign(None);
        assert_eq!(server.fault(), "", "it was released");
    }
}

#[test]
fn quarantine_ends_when_controllers_lift_it_and_not_before() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    server.xid(54);
    assert_eq!(server.state(), State::Quarantined);
    server.assign(None);
    assert_eq!(server.state(), State::Quarantined, "they have not heard of it yet");
    server.assign(Some((true, BOOT)));
    server.read(10_000, &well());
    assert_eq!(server.state(), State::Quarantined);
    server.assign(None);
    assert_eq!(server.state(), State::Probation);
}

#[test]
fn what_is_let_go_of_lifts_nothing_that_came_since() {
    for (code, state, quarantined) in [(95, State::Cordoned, false), (54, State::Quarantined, true)] {
        let mut server = resetting();
        server.judge.mended(&second(), Mended::Yes, server.now_ms, server.now_ms);
        assert_eq!(server.state(), State::Probation);
        server.now_ms += 60_000;
        server.xid(code);
        assert_eq!(server.state(), state);
        server.assign(None);
        assert_eq!(server.state(), state, "the reset lifted what was held before Xid {code}");
        server.assign(Some((quarantined, BOOT)));
        server.assign(None);
        assert_eq!(server.state(), State::Probation, "this is about Xid {code}");
    }
}

#[test]
fn a_gpu_of_which_the_driver_says_nothing_is_put_away_and_silence_mends_nothing() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    server.read(u64::from(MENDED) - 1, &Reading::default());
    assert_eq!(server.state(), State::Healthy, "an answer or two may be missing");
    server.read(1, &Reading::default());
    assert_eq!((server.state(), server.second().reason.as_str()), (State::Cordoned, SILENT));
    server.read(u64::from(MENDED), &well());
    assert_eq!(server.state(), State::Probation);
    // What the driver has asked for stands until it says otherwise.
    server.read(1, &Reading { recovery_action: Some(1), ..well() });
    let without = Reading { recovery_action: None, ..well() };
    server.read(10, &without);
    assert_eq!(server.state(), State::Cordoned);
    server.read(u64::from(MENDED), &well());
    assert_eq!(server.state(), State::Probation);
}

#[test]
fn a_gpu_that_is_remembered_where_there_is_no_library_is_a_fault() {
    let mut server = Server::new(terms());
    server.judge.absent();
    assert_eq!(server.fault(), "");
    server.assign(Some((true, BOOT)));
    assert_eq!(server.fault(), "GPU gpu-1 is remembered (Xid 95), and there is no GPU library");
    server.read(1, &well());
    assert_eq!((server.fault().as_str(), server.state()), ("", State::Quarantined), "its driver came later");
}

#[test]
fn what_controllers_remember_of_a_cordon_that_was_mended_meanwhile_does_not_bring_it_back() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    server.read(1, &Reading { recovery_action: Some(1), ..well() });
    server.assign_what(Some((false, BOOT, Remedy::Reset, true)));
    server.read(3, &well());
    assert_eq!(server.state(), State::Probation);
    server.assign_what(Some((false, BOOT, Remedy::Reset, true)));
    assert_eq!(server.state(), State::Probation, "it is the cordon that has just ended");
    server.assign(None);
    assert_eq!(server.state(), State::Probation);
}

/// A server whose second GPU is cordoned and being reset.
fn resetting() -> Server {
    let mut server = Server::new(terms());
    server.read(4, &well());
    server.xid(95);
    let order = Order { id: 7, action: Action::Reset, gpus: vec![second()], begin_by_ms: 0 };
    server.judge.mend(&order, server.now_ms, server.now_ms);
    assert_eq!((server.state(), server.second().reason.as_str()), (State::Resetting, "Xid 95"));
    server.judge.close(true);
    assert_eq!(server.fault(), CLOSED);
    server.judge.close(false);
    server
}

fn second() -> GpuId {
    "gpu-1".parse().unwrap()
}

#[test]
fn a_gpu_that_is_reset_must_be_seen_well_afterwards() {
    let mut server = resetting();
    assert!(!server.judge.is_clean(&second()), "what was read before the reset says nothing");
    server.xid(79);
    assert_eq!(server.state(), State::Resetting, "what is told meanwhile is part of it");
    server.read(2, &well());
    assert!(!server.judge.is_clean(&second()));
    server.read(1, &well());
    assert!(server.judge.is_clean(&second()));
    server.judge.mended(&second(), Mended::Yes, server.now_ms, server.now_ms);
    assert_eq!((server.state(), server.second().remedy), (State::Probation, Remedy::None));
    assert_eq!(server.second().reason, "it was reset; before: Xid 95");
    assert_eq!(server.judge.unproven(), [], "whoever mended it has asked it");
}

#[test]
fn a_reset_that_has_not_helped_leaves_a_cordon_and_a_wrong_answer_quarantine() {
    for (how, state, reason) in [
        (Mended::No("in use".into()), State::Cordoned, "in use; before: Xid 95"),
        (Mended::Wrong("5 for 4".into()), State::Quarantined, "5 for 4"),
    ] {
        let mut server = resetting();
        server.judge.mended(&second(), how, server.now_ms, server.now_ms);
        assert_eq!((server.state(), server.second().reason.as_str()), (state, reason));
    }
}

#[test]
fn a_gpu_that_is_back_is_asked_once_and_a_wrong_answer_cordons_it() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    assert_eq!(server.judge.unproven(), []);
    server.read(1, &Reading { recovery_action: Some(1), ..well() });
    server.read(3, &well());
    assert_eq!(server.state(), State::Probation);
    assert_eq!(server.judge.unproven(), [(second(), Some(1))]);
    assert_eq!(server.judge.unproven(), []);
    server.judge.disproven(&second(), "5 for 4", server.now_ms, server.now_ms);
    assert_eq!((server.state(), server.second().remedy), (State::Cordoned, Remedy::Reset));
    server.read(10, &well());
    assert_eq!(server.state(), State::Cordoned, "readings do not show what was wrong");
}

#[test]
fn before_the_first_assignment_no_gpu_works() {
    // Nor one that is not as it should be, which would be degraded.
    for reading in [well(), Reading { persistence: Some(false), ..well() }] {
        for (hold, expected) in [(None, State::Healthy), (Some((true, BOOT)), State::Quarantined)] {
            let mut server = Server::untold(terms());
            server.read(2, &reading);
            assert_eq!((server.state(), server.second().reason.as_str()), (State::Unknown, AWAITED));
            server.assign(hold);
            assert_eq!(server.state(), expected);
        }
    }
    let mut server = Server::untold(Terms { guards: Guards::All, ..terms() });
    server.read(1, &well());
    assert_eq!(server.fault(), "", "it is no fault that an agent has just begun");
    server.xid(95);
    assert_eq!(server.state(), State::Cordoned, "what speaks against it counts at once");
    server.assign(None);
    assert_eq!(server.state(), State::Cordoned);
}

#[test]
fn an_older_assignment_lifts_nothing() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    server.assign(Some((true, BOOT)));
    server.judge.hold(Generation { incarnation: 1, applied: 0 }, &[], server.now_ms, server.now_ms);
    assert_eq!(server.state(), State::Quarantined);
}

#[test]
fn the_slot_of_the_kernels_log_finds_its_gpu() {
    let mut server = Server::new(terms());
    server.read(1, &well());
    assert_eq!(server.judge.in_slot("0000:01:00"), Some("gpu-1".parse().unwrap()));
    assert_eq!(server.judge.in_slot("0000:09:00"), None);
}

proptest! {
    #[test]
    fn no_reading_and_no_xid_leads_out_of_quarantine(
        events in prop::collection::vec((0..200_u32, any::<bool>(), any::<bool>()), 0..30)
    ) {
        let mut server = Server::new(terms());
        server.read(1, &well());
        server.assign(Some((true, BOOT)));
        for (code, lost, asks) in events {
            server.xid(code);
            server.read(4, &Reading { lost, recovery_action: Some(u32::from(asks)), ..well() });
            server.assign(Some((true, BOOT)));
            prop_assert_eq!(server.state(), State::Quarantined);
        }
    }
}
