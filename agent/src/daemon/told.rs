//! What an agent says of itself to the service manager: whom it hears and what runs, in a line of `systemctl status`.

use std::time::Duration;

use izar_common::health::{WorkerReport, WorkerState};
use izar_common::service;
use tokio::sync::watch;

use crate::worker::Workers;

/// A line changes at most this often: workers change with every step, and who reads it is a person.
const GAP: Duration = Duration::from_secs(1);

/// Tells until nothing can change any more.
pub async fn state(mut sessions: watch::Receiver<usize>, controllers: usize, workers: Workers) {
    let (mut changes, mut told) = (workers.changes(), String::new());
    loop {
        changes.mark_unchanged();
        let line = in_words(*sessions.borrow_and_update(), controllers, &workers.report());
        if line != told {
            service::status(&line);
            told = line;
        }
        tokio::time::sleep(GAP).await;
        let changed = tokio::select! {
            changed = sessions.changed() => changed,
            changed = changes.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn in_words(sessions: usize, controllers: usize, workers: &[WorkerReport]) -> String {
    let ready = workers.iter().filter(|worker| worker.state == WorkerState::Ready).count();
    format!("hears {sessions} of {controllers} controllers; {ready} of {} workers are ready", workers.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whom_it_hears_and_what_is_ready() {
        assert_eq!(in_words(2, 3, &[]), "hears 2 of 3 controllers; 0 of 0 workers are ready");
    }
}
