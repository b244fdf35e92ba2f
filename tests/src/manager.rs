//! Stands in for systemd: the socket that a daemon tells it is ready, well or stopping, a watchdog's limit, a socket that
//! it bound before, and credentials.
//!
//! It only listens: what a service manager would do about it, a story does itself.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::waiting;

/// A datagram has a few words.
const DATAGRAM: usize = 4096;

/// Sets what names a process by its own id, moves the bound socket where systemd puts it, and becomes the daemon.
const BECOME: &str = r#"
export WATCHDOG_PID=$$
if [ -n "$LISTEN_FDS" ]; then export LISTEN_PID=$$; exec 3<&0 0</dev/null; fi
exec "$@"
"#;

/// The service manager of one daemon.
#[derive(Debug)]
pub struct Manager {
    folder: tempfile::TempDir,
    said: Arc<Mutex<Vec<(Instant, String)>>>,
    watchdog: Option<Duration>,
    admin: Option<UnixListener>,
}

impl Manager {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("izar-").tempdir().expect("a temporary folder can be made");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket can be bound");
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        // Ends with the process of the story: a datagram socket has no end to be seen.
        std::thread::spawn(move || {
            let mut buffer = [0; DATAGRAM];
            while let Ok(length) = socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let now = Instant::now();
                let mut said: MutexGuard<'_, Vec<_>> = heard.lock().expect("no panic here");
                said.extend(text.lines().map(|word| (now, word.to_owned())));
            }
        });
        Self { folder, said, watchdog: None, admin: None }
    }

    /// Wants to hear from the daemon within this time, again and again.
    pub fn with_watchdog(mut self, limit: Duration) -> Self {
        self.watchdog = Some(limit);
        self
    }

    /// Binds the admin socket before the daemon is there.
    pub fn with_admin_socket(mut self, path: &Path, mode: u32) -> Self {
        let socket = UnixListener::bind(path).expect("a socket can be bound");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
        self.admin = Some(socket);
        self
    }

    /// The folder of the daemon's credentials; files in it are those that were put there.
    pub fn credentials(&self) -> PathBuf {
        let folder = self.folder.path().join("credentials");
        std::fs::create_dir_all(&folder).expect("the folder is ours");
        folder
    }

    /// Takes a file as a credential, with the mode that systemd gives it.
    pub fn put_credential(&self, name: &str, file: &Path) {
        let path = self.credentials().join(name);
        std::fs::copy(file, &path).expect("a small file can be copied");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).expect("it is ours");
    }

    /// A command that starts a program as systemd would; arguments and the rest come after.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", BECOME, "sh"]).arg(program).stdin(Stdio::null());
        command.env("NOTIFY_SOCKET", self.folder.path().join("notify"));
        command.env("CREDENTIALS_DIRECTORY", self.credentials());
        if let Some(limit) = self.watchdog {
            command.env("WATCHDOG_USEC", limit.as_micros().to_string());
        }
        if let Some(socket) = &self.admin {
            let socket = socket.try_clone().expect("a socket has as many ends as one likes");
            command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "admin").stdin(Stdio::from(OwnedFd::from(socket)));
        }
        command
    }

    /// Everything that it was told, in order.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().expect("no panic here").iter().map(|(_, word)| word.clone()).collect()
    }

    /// For how long it has not been told something that it was told before.
    pub fn silence(&self, word: &str) -> Duration {
        let said = self.said.lock().expect("no panic here");
        said.iter().rfind(|(_, other)| other == word).map_or(Duration::ZERO, |(at, _)| at.elapsed())
    }

    /// How often it was told something.
    pub fn count(&self, word: &str) -> usize {
        self.said().iter().filter(|said| *said == word).count()
    }

    /// Waits until it was told something that begins so.
    pub fn wait(&self, begins: &str) {
        self.wait_count(begins, 1);
    }

    /// Waits until it was told so many times.
    pub fn wait_count(&self, begins: &str, count: usize) {
        waiting::until(begins, waiting::SOON, || {
            let said = self.said();
            let heard = said.iter().filter(|said| said.starts_with(begins)).count();
            anyhow::ensure!(heard >= count, "{heard} of {count} times: {said:?}");
            Ok(())
        });
    }
}

impl Default for Manager {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_is_heard_and_it_finds_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let manager = Manager::new().with_admin_socket(&folder.path().join("s"), 0o600);
        let word = UnixDatagram::unbound().unwrap();
        word.send_to(b"READY=1\nSTATUS=here", manager.folder.path().join("notify")).unwrap();
        manager.wait("STATUS=here");
        assert_eq!(manager.count("READY=1"), 1);
        let mut command = manager.command(Path::new("/bin/sh"));
        let output = command.args(["-c", "test \"$LISTEN_PID\" = $$ && readlink /proc/self/fd/3"]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).starts_with("socket:"), "{output:?}");
    }
}
