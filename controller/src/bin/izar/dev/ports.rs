//! Picks free ports on loopback, below the range from which the kernel gives ports to outgoing connections, so that a
//! port is still free when the daemon binds it, and when it binds it again after a restart. Another `izar dev` that looks
//! at the same moment sees what this one took: a name in the kernel's abstract namespace, gone when the process is.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use anyhow::{Context, ensure};
use rand::Rng;

/// Where ports are looked for; Linux's own begin at 32768.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// Tries before giving up: fewer than one in ten ports of the range is in use on any machine that still works.
const TRIES: usize = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Udp,
}

/// Holds what was given out, until it is dropped.
#[derive(Debug, Default)]
pub struct Ports {
    given: Vec<UnixListener>,
}

impl Ports {
    /// Takes `port` if nothing uses it, and no other run is about to.
    pub fn claim(&mut self, kind: Kind, port: u16) -> bool {
        let taken = mark(port).ok().filter(|_| is_free(kind, port));
        let free = taken.is_some();
        self.given.extend(taken);
        free
    }

    /// Takes any free port.
    pub fn any(&mut self, kind: Kind) -> anyhow::Result<u16> {
        let mut random = rand::rng();
        (0..TRIES)
            .map(|_| random.random_range(RANGE))
            .find(|&port| self.claim(kind, port))
            .with_context(|| format!("no free port between {} and {}", RANGE.start, RANGE.end))
    }

    /// Takes the port of an earlier run if it is still free, else any.
    pub fn again(&mut self, kind: Kind, earlier: Option<u16>) -> anyhow::Result<u16> {
        match earlier {
            Some(port) if self.claim(kind, port) => Ok(port),
            _ => self.any(kind),
        }
    }

    /// Takes exactly this port, or says that it is in use.
    pub fn exactly(&mut self, kind: Kind, port: u16) -> anyhow::Result<u16> {
        ensure!(self.claim(kind, port), "port {port} is in use; choose another with --api-port, or 0 for any");
        Ok(port)
    }
}

/// Says to other runs that this port is given; an error if one of them said so before.
fn mark(port: u16) -> std::io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("izar-dev-port-{port}"))?)
}

fn is_free(kind: Kind, port: u16) -> bool {
    let address = (Ipv4Addr::LOCALHOST, port);
    match kind {
        Kind::Tcp => TcpListener::bind(address).is_ok(),
        Kind::Udp => UdpSocket::bind(address).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_or_given_before_is_not_given() {
        let mut ports = Ports::default();
        let first = ports.any(Kind::Tcp).unwrap();
        assert!(RANGE.contains(&first));
        assert!(!ports.claim(Kind::Tcp, first));
        assert!(!Ports::default().claim(Kind::Tcp, first), "nor by another run, though nothing listens there yet");
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        assert!(ports.exactly(Kind::Tcp, port).unwrap_err().to_string().contains("in use"));
        assert_ne!(ports.again(Kind::Tcp, Some(port)).unwrap(), port);
        drop(ports);
        assert!(Ports::default().claim(Kind::Tcp, first), "free again once who took it is gone");
    }
}
