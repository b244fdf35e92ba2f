//! Relays stand in a path between two processes and keep every byte that passes, in both directions; or keep nothing,
//! and can be cut as a network is.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A relay that recorded more has a story that should ask less.
const RECORD_LIMIT: usize = 256 << 20;
/// How often a relay looks whether it shall end.
const LOOK: Duration = Duration::from_millis(50);
/// Larger than any UDP datagram.
const DATAGRAM: usize = 65_536;

/// What passed, and where a relay listens.
#[derive(Debug)]
pub struct Relay {
    pub name: String,
    pub address: SocketAddr,
    record: Arc<Record>,
}

#[derive(Debug, Default)]
struct Record {
    bytes: Mutex<Vec<u8>>,
    forgets: bool,
    cut: AtomicBool,
    lost: AtomicUsize,
    stopped: AtomicBool,
}

impl Record {
    fn keep(&self, bytes: &[u8]) {
        if self.forgets {
            return;
        }
        let mut kept = self.bytes.lock().expect("no panic while the record is held");
        assert!(kept.len() + bytes.len() <= RECORD_LIMIT, "a relay passed more than {RECORD_LIMIT} bytes");
        kept.extend_from_slice(bytes);
    }
    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
    /// Whether a datagram is lost.
    fn loses(&self) -> bool {
        let cut = self.cut.load(Ordering::Relaxed);
        if cut {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        cut
    }
}

impl Relay {
    /// Passes TCP connections on to `target`.
    pub fn tcp(name: &str, target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let record = Arc::new(Record::default());
        let shared = record.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.stopped() {
                    return;
                }
                let Ok(server) = TcpStream::connect(target) else { continue };
                pass_tcp(&client, &server, &shared);
                pass_tcp(&server, &client, &shared);
            }
        });
        Self { name: name.to_owned(), address, record }
    }

    /// Passes datagrams on to `target`, with a socket of its own for each client, so that answers find their way.
    pub fn udp(name: &str, target: SocketAddr) -> Self {
        Self::datagrams(name, target, Record::default())
    }

    /// Like [`Relay::udp`], for as long as one likes: it keeps nothing.
    pub fn link(name: &str, target: SocketAddr) -> Self {
        Self::datagrams(name, target, Record { forgets: true, ..Record::default() })
    }

    fn datagrams(name: &str, target: SocketAddr, record: Record) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        let record = Arc::new(record);
        let shared = record.clone();
        std::thread::spawn(move || pass_udp(&socket, target, &shared));
        Self { name: name.to_owned(), address, record }
    }

    /// From now on every datagram is lost, in both directions; neither side is told.
    pub fn cut(&self) {
        self.record.cut.store(true, Ordering::Relaxed);
    }
    /// Lets datagrams pass again.
    pub fn mend(&self) {
        self.record.cut.store(false, Ordering::Relaxed);
    }

    /// How many datagrams were lost.
    pub fn lost(&self) -> usize {
        self.record.lost.load(Ordering::Relaxed)
    }

    /// How many bytes passed, if they are kept.
    pub fn len(&self) -> usize {
        self.record.bytes.lock().expect("no panic while the record is held").len()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Says whether `needle` passed in the clear.
    pub fn saw(&self, needle: &[u8]) -> bool {
        contains(&self.record.bytes.lock().expect("no panic while the record is held"), needle)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.record.stopped.store(true, Ordering::Relaxed);
        // Wakes a relay that waits for a connection.
        let _ = TcpStream::connect(self.address);
    }
}

/// Says whether `needle` occurs in `bytes`.
pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// Starts a thread that passes one direction on until it ends.
fn pass_tcp(from: &TcpStream, to: &TcpStream, record: &Arc<Record>) {
    let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
    let record = record.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            record.keep(&buffer[..n]);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Passes datagrams until the relay is dropped.
fn pass_udp(socket: &UdpSocket, target: SocketAddr, record: &Arc<Record>) {
    socket.set_read_timeout(Some(LOOK)).expect("a time above zero is allowed");
    let mut clients: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM];
    while !record.stopped() {
        let Ok((n, client)) = socket.recv_from(&mut buffer) else { continue };
        if record.loses() {
            continue;
        }
        record.keep(&buffer[..n]);
        let upstream = clients.entry(client).or_insert_with(|| {
            let upstream = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
            upstream.connect(target).expect("a local address can be connected to");
            let answers = upstream.try_clone().expect("a socket has two ends");
            let back = socket.try_clone().expect("a socket has two ends");
            let record = record.clone();
            std::thread::spawn(move || pass_answers(&answers, &back, client, &record));
            upstream
        });
        // A datagram that the target does not take is lost, as on any network.
        let _ = upstream.send(&buffer[..n]);
    }
}

fn pass_answers(upstream: &UdpSocket, back: &UdpSocket, client: SocketAddr, record: &Record) {
    upstream.set_read_timeout(Some(LOOK)).expect("a time above zero is allowed");
    let mut buffer = vec![0; DATAGRAM];
    while !record.stopped() {
        let Ok(n) = upstream.recv(&mut buffer) else { continue };
        if record.loses() {
            continue;
        }
        record.keep(&buffer[..n]);
        let _ = back.send_to(&buffer[..n], client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcp_relay_passes_and_keeps_both_directions() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::tcp("test", server.local_addr().unwrap());
        let mut client = TcpStream::connect(relay.address).unwrap();
        client.write_all(b"question").unwrap();
        let (mut inner, _) = server.accept().unwrap();
        let mut question = [0; 8];
        inner.read_exact(&mut question).unwrap();
        inner.write_all(b"answer").unwrap();
        drop(inner);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!((&question[..], answer.as_str()), (&b"question"[..], "answer"));
        assert!(relay.saw(b"question") && relay.saw(b"answer") && !relay.saw(b"secret"));
    }

    #[test]
    fn a_udp_relay_brings_answers_back_to_the_right_client() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let relay = Relay::udp("test", server.local_addr().unwrap());
        let clients = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut buffer = [0; 64];
        for (i, client) in clients.iter().enumerate() {
            client.set_read_timeout(Some(crate::waiting::SOON)).unwrap();
            client.send_to(format!("hello {i}").as_bytes(), relay.address).unwrap();
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..n], from).unwrap();
            let (n, _) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], format!("hello {i}").as_bytes());
        }
        assert!(relay.saw(b"hello 1"));
    }

    #[test]
    fn a_link_that_is_cut_loses_everything_until_it_is_mended() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(crate::waiting::SOON)).unwrap();
        let relay = Relay::link("test", server.local_addr().unwrap());
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut buffer = [0; 64];
        relay.cut();
        client.send_to(b"lost", relay.address).unwrap();
        // The relay takes datagrams in order, so that what comes after the mending proves what was lost.
        crate::waiting::until_true("the relay to take it", crate::waiting::SOON, || relay.lost() == 1);
        relay.mend();
        client.send_to(b"heard", relay.address).unwrap();
        let (n, _) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..n], relay.len()), (&b"heard"[..], 0));
    }
}
