//! Raft's messages over QUIC: to each peer one connection that this node dials, with three long-lived streams.
//!
//! Heartbeats and votes have a stream of their own, so that no append can delay them; of heartbeats (and of answers
//! to them) only the newest waits, for it says all that the older ones said. Appends wait in a bounded queue; when it
//! is full, or the peer is away, they are dropped and Raft is told, which it is made for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use izar_common::id::{NodeId, Role};
use izar_common::quic::{Connection, Endpoint, Profile};
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::{Proposal, RaftBatch};
use raft::eraftpb::{Message, MessageType};
use tokio::sync::Notify;

use super::inbox::Inbox;
use super::{Member, message};

/// Votes and questions that wait for a peer; a few are sent in an election. The oldest gives way.
const VOTES: usize = 64;
/// Bytes of appends and their answers that wait for a peer: twice what Raft keeps in flight.
const BULK_BYTES: usize = 64 << 20;
/// Bytes in one frame of appends, unless a single message is larger.
const FRAME_BYTES: usize = 1 << 20;
/// Batches that wait for the leader; a controller has a handful unsettled. The oldest gives way, and comes again.
const PROPOSALS: usize = 64;
/// Pauses between dials: from the first to the last, doubling, each with half of it random.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The ways to all peers. Sending never waits.
#[derive(Debug, Default)]
pub struct Net {
    peers: BTreeMap<u64, Arc<Peer>>,
}

#[derive(Debug)]
struct Peer {
    id: u64,
    member: Member,
    up: AtomicBool,
    /// Since when there is no connection.
    away_since: Mutex<Option<Instant>>,
    urgent: Mutex<Urgent>,
    urgent_filled: Notify,
    bulk: Mutex<Bulk>,
    bulk_filled: Notify,
    proposals: Mutex<VecDeque<Bytes>>,
    proposals_filled: Notify,
}

#[derive(Debug, Default)]
struct Urgent {
    heartbeat: Option<Message>,
    heartbeat_answer: Option<Message>,
    votes: VecDeque<Message>,
}

#[derive(Debug, Default)]
struct Bulk {
    messages: VecDeque<Message>,
    bytes: usize,
}

impl Net {
    /// Knows the way to every member but this node.
    pub fn new(members: &[Member], me: u64) -> Self {
        let peer = |member: &Member| {
            let peer = Peer {
                id: member.id,
                member: member.clone(),
                up: AtomicBool::new(false),
                away_since: Mutex::new(Some(Instant::now())),
                urgent: Mutex::default(),
                urgent_filled: Notify::new(),
                bulk: Mutex::default(),
                bulk_filled: Notify::new(),
                proposals: Mutex::default(),
                proposals_filled: Notify::new(),
            };
            (member.id, Arc::new(peer))
        };
        Self { peers: members.iter().filter(|member| member.id != me).map(peer).collect() }
    }

    /// The peers that cannot be reached, and for how long.
    pub fn away(&self) -> Vec<(NodeId, Duration)> {
        let away = |peer: &Arc<Peer>| Some((peer.member.node.clone(), (*lock(&peer.away_since))?.elapsed()));
        self.peers.values().filter_map(away).collect()
    }

    /// Whether there is no other member.
    pub fn is_alone(&self) -> bool {
        self.peers.is_empty()
    }

    /// Raft's number of a peer.
    pub fn id_of(&self, node: &NodeId) -> Option<u64> {
        self.peers.values().find(|peer| peer.member.node == *node).map(|peer| peer.id)
    }

    /// Puts messages on their way; what cannot go is dropped and reported to `inbox`.
    pub fn send(&self, messages: Vec<Message>, inbox: &Inbox) {
        for message in messages {
            let Some(peer) = self.peers.get(&message.to) else { continue };
            let delivered = match message.msg_type {
                MessageType::MsgAppend | MessageType::MsgAppendResponse => peer.put_bulk(message),
                _ => {
                    peer.put_urgent(message);
                    true
                }
            };
            if !delivered {
                inbox.unreachable(peer.id);
            }
        }
    }

    /// Puts a batch on its way to the leader. If it is lost, its origin sends it again.
    pub fn propose(&self, leader: &NodeId, batch: Bytes) {
        let Some(peer) = self.peers.values().find(|peer| peer.member.node == *leader) else { return };
        if !peer.up.load(Ordering::Acquire) {
            return;
        }
        let mut proposals = lock(&peer.proposals);
        if proposals.len() == PROPOSALS {
            proposals.pop_front();
        }
        proposals.push_back(batch);
        peer.proposals_filled.notify_one();
    }

    /// The tasks that keep a connection to each peer.
    pub fn dialers(&self, endpoint: &Arc<Endpoint>, inbox: &Arc<Inbox>) -> Vec<impl Future<Output = ()> + use<>> {
        let dial = |peer: &Arc<Peer>| peer.clone().dial(endpoint.clone(), inbox.clone());
        self.peers.values().map(dial).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no panic while a queue is held")
}

impl Peer {
    fn put_urgent(&self, message: Message) {
        let mut urgent = lock(&self.urgent);
        match message.msg_type {
            MessageType::MsgHeartbeat => urgent.heartbeat = Some(message),
            MessageType::MsgHeartbeatResponse => urgent.heartbeat_answer = Some(message),
            _ => {
                if urgent.votes.len() == VOTES {
                    urgent.votes.pop_front();
                }
                urgent.votes.push_back(message);
            }
        }
        drop(urgent);
        self.urgent_filled.notify_one();
    }

    /// Returns false if something had to be dropped: this message because the peer is away, or the oldest ones.
    fn put_bulk(&self, message: Message) -> bool {
        if !self.up.load(Ordering::Acquire) {
            return false;
        }
        let mut bulk = lock(&self.bulk);
        bulk.bytes += message::size(&message);
        bulk.messages.push_back(message);
        let mut whole = true;
        while bulk.bytes > BULK_BYTES && bulk.messages.len() > 1 {
            let oldest = bulk.messages.pop_front().expect("more than one");
            bulk.bytes -= message::size(&oldest);
            whole = false;
        }
        drop(bulk);
        self.bulk_filled.notify_one();
        whole
    }

    fn take_urgent(&self) -> Vec<Message> {
        let Urgent { heartbeat, heartbeat_answer, votes } = std::mem::take(&mut *lock(&self.urgent));
        votes.into_iter().chain(heartbeat).chain(heartbeat_answer).collect()
    }

    /// Takes a frame's worth.
    fn take_bulk(&self) -> Vec<Message> {
        let mut bulk = lock(&self.bulk);
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(message) = bulk.messages.front() {
            let size = message::size(message);
            if !taken.is_empty() && bytes + size > FRAME_BYTES {
                break;
            }
            bytes += size;
            bulk.bytes -= size;
            taken.extend(bulk.messages.pop_front());
        }
        taken
    }

    fn forget(&self) {
        drop(self.take_urgent());
        *lock(&self.bulk) = Bulk::default();
        lock(&self.proposals).clear();
    }

    /// Keeps a connection for ever; ends only by being dropped.
    async fn dial(self: Arc<Self>, endpoint: Arc<Endpoint>, inbox: Arc<Inbox>) {
        let mut pause = BACK_OFF.0;
        let mut told = false;
        loop {
            let Member { node, address, .. } = &self.member;
            match endpoint.connect(*address, Role::Controller, Some(node), Profile::Raft).await {
                Ok(connection) => {
                    log::info!(peer:% = node; "connected to a peer");
                    (pause, told) = (BACK_OFF.0, false);
                    self.up.store(true, Ordering::Release);
                    *lock(&self.away_since) = None;
                    let error = self.serve(&connection).await;
                    self.up.store(false, Ordering::Release);
                    *lock(&self.away_since) = Some(Instant::now());
                    connection.close("the stream broke");
                    self.forget();
                    inbox.unreachable(self.id);
                    log::info!(peer:% = node, reason = format!("{error:#}"); "lost a peer");
                }
                Err(error) if !told => {
                    told = true;
                    log::info!(peer:% = node, address:% = address, reason = format!("{error:#}"); "a peer cannot be reached");
                }
                Err(_) => {}
            }
            let jitter = 0.5 + rand::random::<f64>() / 2.0;
            tokio::time::sleep(pause.mul_f64(jitter)).await;
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }

    /// Sends what there is until the connection ends; returns why.
    async fn serve(&self, connection: &Connection) -> anyhow::Error {
        let ended = tokio::select! {
            ended = self.serve_urgent(connection) => ended,
            ended = self.serve_bulk(connection) => ended,
            ended = self.serve_proposals(connection) => ended,
            () = connection.closed() => Err(anyhow::anyhow!("the connection is closed")),
        };
        match ended {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn serve_urgent(&self, connection: &Connection) -> anyhow::Result<std::convert::Infallible> {
        let mut stream = connection.open_uni(Open::RaftUrgent).await?;
        stream.get_mut().set_priority(1)?;
        loop {
            let messages = self.take_urgent();
            if messages.is_empty() {
                self.urgent_filled.notified().await;
            } else {
                stream.send(&RaftBatch(messages.into_iter().map(message::to_wire).collect())).await?;
            }
        }
    }

    async fn serve_bulk(&self, connection: &Connection) -> anyhow::Result<std::convert::Infallible> {
        let mut stream = connection.open_uni(Open::RaftBulk).await?;
        loop {
            let messages = self.take_bulk();
            if messages.is_empty() {
                self.bulk_filled.notified().await;
            } else {
                stream.send(&RaftBatch(messages.into_iter().map(message::to_wire).collect())).await?;
            }
        }
    }

    async fn serve_proposals(&self, connection: &Connection) -> anyhow::Result<std::convert::Infallible> {
        let mut stream = connection.open_uni(Open::Propose).await?;
        loop {
            let batch = lock(&self.proposals).pop_front();
            match batch {
                None => self.proposals_filled.notified().await,
                Some(batch) => stream.send(&Proposal(batch.to_vec())).await?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(up: bool) -> Net {
        let member = |id: u64| Member {
            id,
            node: NodeId::new(&format!("c{id}")).unwrap(),
            address: "127.0.0.1:1".parse().unwrap(),
        };
        let net = Net::new(&[member(1), member(2)], 1);
        net.peers[&2].up.store(up, Ordering::Release);
        net
    }

    fn message(kind: MessageType, commit: u64, bytes: usize) -> Message {
        let mut entry = raft::eraftpb::Entry::default();
        entry.data = vec![0; bytes].into();
        let entries = vec![entry].into();
        Message { msg_type: kind, to: 2, commit, entries, ..Message::default() }
    }

    #[test]
    fn only_the_newest_heartbeat_waits() {
        let (net, inbox) = (net(true), Inbox::default());
        net.send((1..=3).map(|i| message(MessageType::MsgHeartbeat, i, 0)).collect(), &inbox);
        let waiting = net.peers[&2].take_urgent();
        assert_eq!(waiting.iter().map(|m| m.commit).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_full_queue_drops_the_oldest_appends_and_tells_raft() {
        let (net, inbox) = (net(true), Inbox::default());
        let append = |i| message(MessageType::MsgAppend, i, BULK_BYTES / 3);
        net.send((1..=2).map(append).collect(), &inbox);
        assert!(inbox.take(std::time::Instant::now()).unreachable.is_empty());
        net.send(vec![append(3)], &inbox);
        assert!(inbox.take(std::time::Instant::now()).unreachable.contains(&2));
        let frames: Vec<_> =
            std::iter::repeat_with(|| net.peers[&2].take_bulk()).take_while(|f| !f.is_empty()).collect();
        assert_eq!(frames.iter().map(|f| f[0].commit).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(lock(&net.peers[&2].bulk).bytes, 0);
    }

    #[test]
    fn appends_to_a_peer_that_is_away_are_dropped_and_raft_is_told() {
        let (net, inbox) = (net(false), Inbox::default());
        net.send(vec![message(MessageType::MsgAppend, 1, 0)], &inbox);
        assert!(inbox.take(std::time::Instant::now()).unreachable.contains(&2));
        assert!(net.peers[&2].take_bulk().is_empty());
    }
}
