//! What a controller says of the group it is in: a line for the service manager, and a record when nobody leads for long.
//!
//! An election without a leader lasts a moment and is no news; a site without one refuses changes, so it is told once when
//! that lasts, and once when it is over.

use std::time::Duration;

use izar_common::{events, service};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::raft::Leadership;

/// Elections take less than a second, a controller that starts anew some seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells until whoever leads is no longer known to anybody here.
pub async fn leadership(mut leadership: watch::Receiver<Leadership>) {
    let (mut since, mut told) = (None, false);
    loop {
        let now = leadership.borrow_and_update().clone();
        service::status(&in_words(&now, told));
        if now.leader.is_some() {
            if told {
                log::info!(term = now.term; "a controller leads again");
            }
            (since, told) = (None, false);
        } else {
            since.get_or_insert_with(Instant::now);
        }
        let alarm = since.filter(|_| !told).map(|since| since + PATIENCE);
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            () = sleep_until(alarm.unwrap_or_else(Instant::now)), if alarm.is_some() => {
                told = true;
                log::error!(message_id = events::NO_QUORUM, seconds = PATIENCE.as_secs(); "no controller leads, nothing can be decided");
            }
        }
    }
}

fn in_words(now: &Leadership, no_quorum: bool) -> String {
    match &now.leader {
        Some(_) if now.here => format!("leads (term {})", now.term),
        Some(leader) => format!("follows {leader} (term {})", now.term),
        None if no_quorum => "no quorum: a majority of the controllers is away".to_owned(),
        None => "waits for a leader".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_leads() {
        let mut lead = Leadership { leader: Some("c1".parse().unwrap()), term: 4, here: true };
        assert_eq!(in_words(&lead, false), "leads (term 4)");
        lead.here = false;
        assert_eq!(in_words(&lead, false), "follows c1 (term 4)");
        lead.leader = None;
        assert_eq!(in_words(&lead, false), "waits for a leader");
        assert!(in_words(&lead, true).starts_with("no quorum"));
    }
}
