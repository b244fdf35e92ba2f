//! Who may use the admin socket: root, the daemon's own user, and members of the configured group. The kernel says who
//! calls (SO_PEERCRED); the file's mode only keeps others from knocking.
//!
//! A socket that systemd has bound is different: its unit gives it a group and a mode, which the kernel checks at every
//! call, and the daemon sits in a user namespace where the kernel shows it nobody but root and itself. There the mode
//! decides, and a mode that lets everybody in is refused at the start.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::UnixListener;

/// The bound socket and the group that may use it.
#[derive(Debug)]
pub struct Listener {
    pub socket: UnixListener,
    pub gate: Gate,
    /// The socket's file, if it goes when this listener ends.
    pub own: Option<PathBuf>,
}

/// Decides about callers.
#[derive(Debug, Clone)]
pub struct Gate {
    own: Uid,
    group: Option<Group>,
    /// Whoever the file's mode lets in.
    by_mode: bool,
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: Option<i32>,
}

/// The longest path of a Unix socket that Linux takes.
const PATH_LIMIT: usize = 107;

/// Binds the socket with mode 0600, or 0660 for `group`. A socket that a dead controller left is replaced, one that
/// answers is not.
pub fn bind(path: &Path, group: Option<&str>) -> anyhow::Result<Listener> {
    let shown = path.display();
    ensure!(
        path.as_os_str().len() <= PATH_LIMIT,
        "admin.socket: {shown} is longer than {PATH_LIMIT} bytes, which no Unix socket's path may be"
    );
    let group = group.map(find_group).transpose()?;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("admin.socket: create {}", parent.display()))?;
    }
    remove_stale(path)?;
    let socket = UnixListener::bind(path).with_context(|| format!("admin.socket: bind {shown}"))?;
    let mode = if let Some(group) = &group {
        nix::unistd::chown(path, None, Some(group.gid))
            .with_context(|| format!("admin.socket: give {shown} to the group {}", group.name))?;
        0o660
    } else {
        0o600
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("admin.socket: set the mode of {shown}"))?;
    let gate = Gate { own: Uid::effective(), group, by_mode: false };
    Ok(Listener { socket, gate, own: Some(path.to_owned()) })
}

/// Takes a socket that somebody else has bound, and whose mode says who may use it.
pub fn inherit(socket: std::os::unix::net::UnixListener) -> anyhow::Result<Listener> {
    let address = socket.local_addr().context("admin.socket: ask for the address of the inherited socket")?;
    let path = address.as_pathname().context("admin.socket: the inherited socket has no file, so no mode")?;
    let shown = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("admin.socket: look at the mode of {shown}"))?;
    let mode = metadata.permissions().mode() & 0o777;
    ensure!(
        mode & 0o007 == 0,
        "admin.socket: everybody may use {shown} (mode {mode:03o}): use SocketMode=0660 and a SocketGroup="
    );
    socket.set_nonblocking(true).context("admin.socket: set the inherited socket non-blocking")?;
    let socket = UnixListener::from_std(socket).context("admin.socket: take the inherited socket")?;
    let gate = Gate { own: Uid::effective(), group: None, by_mode: true };
    Ok(Listener { socket, gate, own: None })
}

fn find_group(name: &str) -> anyhow::Result<Group> {
    Group::from_name(name)
        .with_context(|| format!("admin.group: look up {name}"))?
        .with_context(|| format!("admin.group: there is no group {name}"))
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    let shown = path.display();
    ensure!(metadata.file_type().is_socket(), "admin.socket: {shown} exists and is not a socket");
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("admin.socket: another process answers on {shown}"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("admin.socket: remove the stale {shown}"))
        }
        Err(error) => Err(error).with_context(|| format!("admin.socket: look whether {shown} is in use")),
    }
}

impl Gate {
    /// Whether the caller may use the socket. Looks into the user database for callers who are neither root nor the
    /// daemon's user, so that a change of the group counts at once; may block.
    pub fn admits(&self, caller: Caller) -> bool {
        if self.admits_without_lookup(caller) {
            return true;
        }
        let Some(group) = &self.group else { return false };
        let Ok(Some(user)) = User::from_uid(Uid::from_raw(caller.uid)) else { return false };
        user.gid == group.gid || matches!(Group::from_gid(group.gid), Ok(Some(now)) if now.mem.contains(&user.name))
    }

    /// The part of `admits` that needs no user database: root, the own user, the caller's effective group.
    pub fn admits_without_lookup(&self, caller: Caller) -> bool {
        self.by_mode
            || caller.uid == 0
            || caller.uid == self.own.as_raw()
            || self.group.as_ref().is_some_and(|g| g.gid == Gid::from_raw(caller.gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(group: Option<u32>) -> Gate {
        let group = group.map(|gid| Group {
            name: "izar-test-group".into(),
            passwd: c"".into(),
            gid: Gid::from_raw(gid),
            mem: Vec::new(),
        });
        Gate { own: Uid::from_raw(500), group, by_mode: false }
    }

    fn caller(uid: u32, gid: u32) -> Caller {
        Caller { uid, gid, pid: None }
    }

    #[test]
    fn root_the_own_user_and_the_group_are_admitted() {
        assert!(gate(None).admits(caller(0, 0)));
        assert!(gate(None).admits(caller(500, 1)));
        assert!(gate(Some(70)).admits(caller(4_000_000_000, 70)));
    }

    #[test]
    fn strangers_are_refused() {
        assert!(!gate(None).admits(caller(4_000_000_000, 70)));
        assert!(!gate(Some(4_000_000_001)).admits(caller(4_000_000_000, 71)));
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        let first = bind(&path, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bind(&path, None).unwrap_err().to_string().contains("another process answers"));
        drop(first);
        bind(&path, None).unwrap();
    }

    #[tokio::test]
    async fn an_inherited_socket_is_as_open_as_its_mode_and_never_open_to_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let bound = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o666);
        let refused = inherit(bound.try_clone().unwrap()).unwrap_err().to_string();
        assert!(refused.contains("everybody may use") && refused.contains("SocketMode=0660"), "{refused}");
        mode(0o660);
        let listener = inherit(bound).unwrap();
        assert!(listener.gate.admits_without_lookup(caller(65_534, 65_534)), "a member of the group, unseen from here");
        assert_eq!(listener.own, None, "its file stays");
    }

    #[tokio::test]
    async fn what_cannot_be_bound_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(bind(&file, None).unwrap_err().to_string().contains("not a socket"));
        assert!(bind(&dir.path().join("x".repeat(120)), None).unwrap_err().to_string().contains("longer than"));
        let error = bind(&dir.path().join("s"), Some("no-such-group-here")).unwrap_err();
        assert!(error.to_string().contains("no group no-such-group-here"));
    }
}
