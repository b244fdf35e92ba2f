//! The life of a GPU: which state follows from which, and from what. Pure.
//!
//! There is one way out of quarantine, and it is an operator's word. A GPU that was cordoned never works again without
//! having been mended and without probation.

use izar_common::health::gpu::State;

use super::limits::Limits;

/// What happens to a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It was read, and nothing is wrong.
    Sound,
    /// Something is not as it should be.
    Soft,
    /// It must not be used.
    Hard,
    /// It is broken, or was too often.
    Broken,
    /// What was wrong is gone, seen in its readings or because the server was started anew.
    Mended,
    /// It is being reset, or its server restarted.
    Resetting,
    Rebooting,
    /// That has not helped.
    Failed,
    /// An operator lets it work again.
    Released,
}

/// Returns the state that follows. `quiet_ms`: for how long nothing has been wrong with it.
pub fn next(state: State, event: Event, quiet_ms: u64, limits: &Limits) -> State {
    use State::*;
    match (state, event) {
        (Quarantined, Event::Released) => Probation,
        (Quarantined, _) | (_, Event::Broken) => Quarantined,

        (Resetting | Rebooting, Event::Mended | Event::Released) => Probation,
        (Resetting | Rebooting, Event::Failed) => Cordoned,
        // What is seen of it meanwhile is part of being reset.
        (Resetting | Rebooting, _) => state,

        (Cordoned, Event::Mended | Event::Released) => Probation,
        (Cordoned, Event::Resetting) => Resetting,
        (Cordoned, Event::Rebooting) => Rebooting,
        (Cordoned, _) | (_, Event::Hard) => Cordoned,

        (Probation, Event::Sound) if quiet_ms >= limits.probation_ms() => Healthy,
        // Degraded would give it more than it has.
        (Probation, _) => Probation,

        (Degraded, Event::Sound) if quiet_ms < limits.degraded_ms() => Degraded,
        (Unknown | Healthy | Degraded, Event::Sound) => Healthy,
        (Unknown | Healthy | Degraded, Event::Soft) => Degraded,
        (Unknown | Healthy | Degraded, _) => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOFT_MS: u64 = 15 * 60_000;
    const PROBATION_MS: u64 = 30 * 60_000;

    fn next(state: State, event: Event, quiet_ms: u64) -> State {
        super::next(state, event, quiet_ms, &Limits::default())
    }

    const EVENTS: [Event; 9] = [
        Event::Sound,
        Event::Soft,
        Event::Hard,
        Event::Broken,
        Event::Mended,
        Event::Resetting,
        Event::Rebooting,
        Event::Failed,
        Event::Released,
    ];

    fn any_event() -> impl Strategy<Value = (Event, u64)> {
        (prop::sample::select(EVENTS.to_vec()), prop_oneof![Just(0), 0..2 * PROBATION_MS])
    }

    proptest! {
        #[test]
        fn nothing_leads_out_of_quarantine_but_an_operator(events in prop::collection::vec(any_event(), 0..60)) {
            let mut state = State::Quarantined;
            for (event, quiet_ms) in events.into_iter().filter(|(event, _)| *event != Event::Released) {
                state = next(state, event, quiet_ms);
                prop_assert_eq!(state, State::Quarantined);
            }
        }

        #[test]
        fn what_was_cordoned_works_again_only_through_probation_and_at_a_quarter(
            start in prop::sample::select(State::ALL.to_vec()),
            events in prop::collection::vec(any_event(), 0..60),
        ) {
            let mut state = start;
            for (event, quiet_ms) in events {
                let after = next(state, event, quiet_ms);
                if state != State::Unknown && state.share() == 0 && after.share() > 0 {
                    prop_assert_eq!(after, State::Probation);
                    prop_assert!(matches!(event, Event::Mended | Event::Released), "{:?} by {:?}", state, event);
                }
                if state == State::Probation && after.share() > 25 {
                    prop_assert!(event == Event::Sound && quiet_ms >= PROBATION_MS);
                }
                state = after;
            }
        }

        #[test]
        fn what_must_not_be_used_is_not_used(state in prop::sample::select(State::ALL.to_vec()), quiet_ms in any::<u64>()) {
            for event in [Event::Hard, Event::Broken] {
                prop_assert_eq!(next(state, event, quiet_ms).share(), 0);
            }
        }
    }

    #[test]
    fn a_gpu_is_degraded_for_a_quarter_of_an_hour_after_the_last_sign() {
        assert_eq!(next(State::Healthy, Event::Soft, 0), State::Degraded);
        assert_eq!(next(State::Degraded, Event::Sound, SOFT_MS - 1), State::Degraded);
        assert_eq!(next(State::Degraded, Event::Sound, SOFT_MS), State::Healthy);
    }

    #[test]
    fn a_reset_leads_to_probation_or_back() {
        let resetting = next(State::Cordoned, Event::Resetting, 0);
        assert_eq!(resetting, State::Resetting);
        assert_eq!(next(resetting, Event::Hard, 0), State::Resetting);
        assert_eq!(next(resetting, Event::Failed, 0), State::Cordoned);
        assert_eq!(next(next(State::Cordoned, Event::Rebooting, 0), Event::Mended, 0), State::Probation);
    }
}
