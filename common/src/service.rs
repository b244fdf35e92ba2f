//! The daemon's side of systemd: that it is ready, well, reloading or stopping; the sockets and credentials it gets.
//!
//! Without systemd (`izar dev`, a terminal) all of it does nothing. What is said is an opinion for the service manager;
//! nothing here decides anything. A word that cannot be sent is dropped: who does not hear is no reason to stop serving.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::task::JoinSet;

use crate::tls::Certificates;
use crate::{events, vitals};

/// How much time is asked for at once, and how often, while a start or a stop takes long.
const EXTENSION: Duration = Duration::from_secs(15);
const EXTEND_EVERY: Duration = Duration::from_secs(5);

/// How long more time is asked for: a large state is read in minutes, and the longest drain is shorter. What takes longer
/// hangs, and the service manager shall end it.
const EXTEND_MOST: Duration = Duration::from_secs(600);

/// Whether a service manager listens.
pub fn is_managed() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The start is done.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// A line for `systemctl status`.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// Reads certificates anew, as the service manager asked for by SIGHUP; tells it when that is done, and the journal how
/// it went.
pub fn reload(certificates: &Certificates) {
    // `Type=notify-reload` wants to know when; older versions ignore it.
    let mut words = vec![NotifyState::Reloading];
    words.extend(NotifyState::monotonic_usec_now().ok());
    tell(&words);
    match certificates.reload() {
        Ok(()) => log::info!("certificates are read anew"),
        Err(error) => {
            log::error!(message_id = events::RELOAD_REFUSED, reason = format!("{error:#}"); "a reload is refused, the old certificates stay");
        }
    }
    tell(&[NotifyState::Ready]);
}

/// The daemon stops, and this is what it does meanwhile.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Runs a start or a stop that may take long, and asks for more time as long as it does. Asking is a task of its own,
/// since a start reads from disks without giving its thread away; it ends with the work.
pub async fn extending<T>(work: impl Future<Output = T>) -> T {
    let mut asking = JoinSet::new();
    if is_managed() {
        asking.spawn(async {
            for _ in 0..EXTEND_MOST.as_secs() / EXTEND_EVERY.as_secs() {
                tell(&[NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32)]);
                tokio::time::sleep(EXTEND_EVERY).await;
            }
        });
    }
    let done = work.await;
    asking.abort_all();
    done
}

/// Feeds the service manager's watchdog, if it has one, while the loops of this process turn. Must be called within a
/// tokio runtime.
pub fn watch() {
    let mut limit_us = 0;
    if sd_notify::watchdog_enabled(false, &mut limit_us) && limit_us > 0 {
        vitals::watch(Duration::from_micros(limit_us), || tell(&[NotifyState::Watchdog]));
        tokio::spawn(vitals::runtime_turns());
    }
}

/// Takes the Unix socket that systemd bound for this process, if it did; more than one is a mistake in the unit. Must be
/// called once, before any thread is started: it changes the environment, so that no child takes the socket for its own.
pub fn inherited_socket() -> anyhow::Result<Option<UnixListener>> {
    let mut inherited = ListenFd::from_env();
    anyhow::ensure!(inherited.len() <= 1, "systemd passed {} sockets, one is expected", inherited.len());
    inherited.take_unix_listener(0).context("take the socket that systemd passed: it must be a Unix stream socket")
}

/// The folder of this process's credentials, if it was given any.
pub fn credentials() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

fn tell(words: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, words) {
        log::debug!(error:%; "the service manager does not hear");
    }
}
