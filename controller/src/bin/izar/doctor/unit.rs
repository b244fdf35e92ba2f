//! What systemd says of the controller's units. Its socket listens while the daemon is stopped, and whoever connects
//! starts the daemon, perhaps in the middle of a restore: so systemd is asked before a look that shall change nothing.

use std::path::Path;
use std::process::Command;

/// The units, as far as they have to do with one admin socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unit {
    /// systemd listens on the socket, and the daemon does not run.
    pub stopped: bool,
    /// The daemon's process; the kernel calls systemd the peer of its sockets.
    pub pid: Option<u32>,
}

impl Unit {
    /// Asks systemd; where there is none, or it has no such units, nothing is stopped.
    pub fn behind(socket: &Path) -> Self {
        let show = |unit: &str, properties: &str| {
            let asked = Command::new("systemctl").args(["show", "--property", properties, unit]).output();
            asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        };
        let listener = show("izar-controller.socket", "ActiveState,Listen");
        judge(socket, &listener, &show("izar-controller.service", "ActiveState,MainPID"))
    }
}

fn judge(socket: &Path, listener: &str, service: &str) -> Unit {
    let value = |said: &str, key: &str| {
        said.lines().find_map(|line| line.split_once('=').filter(|(k, _)| *k == key).map(|(_, v)| v.to_owned()))
    };
    let listen = value(listener, "Listen").and_then(|listen| Some(listen.strip_suffix(" (Stream)")?.to_owned()));
    if value(listener, "ActiveState").as_deref() != Some("active") || listen.as_deref() != socket.to_str() {
        return Unit::default();
    }
    let state = value(service, "ActiveState").unwrap_or_default();
    let pid = value(service, "MainPID").and_then(|pid| pid.parse().ok()).filter(|pid| *pid != 0);
    Unit { stopped: ["inactive", "failed", "deactivating"].contains(&state.as_str()), pid }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_stopped_only_where_systemd_listens_for_it() {
        let listens = "ActiveState=active\nListen=/run/izar/admin.sock (Stream)\n";
        let judged = |path: &str, listener: &str, service: &str| judge(Path::new(path), listener, service);
        let socket = "/run/izar/admin.sock";
        let stopped = Unit { stopped: true, pid: None };
        assert_eq!(judged(socket, listens, "ActiveState=inactive\nMainPID=0\n"), stopped);
        assert_eq!(judged(socket, listens, "MainPID=0\nActiveState=failed\n"), stopped);
        let runs = Unit { stopped: false, pid: Some(7) };
        assert_eq!(judged(socket, listens, "MainPID=7\nActiveState=active\n"), runs);
        for (path, listener) in [
            ("/tmp/a", listens),
            (socket, "ActiveState=inactive\nListen=/run/izar/admin.sock (Stream)\n"),
            (socket, ""),
        ] {
            assert_eq!(judged(path, listener, "ActiveState=inactive\nMainPID=0\n"), Unit::default());
        }
    }
}
