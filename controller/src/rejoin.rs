//! A member that lost its memory is given the group's: its disk was wiped, or its server replaced.
//!
//! Votes and acknowledgements are promises. A member that began anew under its old number, not knowing of them, could
//! help to elect a second leader of a term, or to lose an entry that it had acknowledged. So a member without a log asks
//! every other one before it begins:
//!
//! - All answer, and none has a memory: the group begins for the first time. A majority would not do: the one that is away
//!   may be all that is left of a group. Or the leader never heard of this member: it begins, too, with an empty log.
//! - Otherwise each of the others must answer, with the newest term that it knows or that it has no memory either. Who
//!   asks for votes has written the term down before, so this member has voted in none above the newest, and from then on
//!   it votes for nobody up to there.
//! - The leader decides one entry more without it (`Command::Readmit`), and gives the state as of that entry or a later
//!   one of the same term. Whatever this member had acknowledged, to this leader or one before, is below that entry.
//!
//! This is the recovery of Viewstamped Replication (Liskov and Cowling 2012, section 4.3) in Raft's terms. The log begins
//! after what was given, so nothing is replayed. Until then the member neither votes nor acknowledges: it has not begun.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::future;
use izar_common::id::{ClusterId, Identity, NodeId, Role};
use izar_common::quic::{self, Connection, Endpoint, Profile, Receiver, Sender};
use izar_common::seal::MasterKey;
use izar_common::wire::handshake::Open;
use izar_common::wire::peer::{RejoinAnswer, RejoinRequest};
use izar_common::{blob, events};
use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::backup::restore;
use crate::backup::take::{Given, Taking};
use crate::raft::{self, Member, Memory, Raft};
use crate::state::command::{Command, Reply};

/// How long each dial of another member may take: one whose daemon starts in the same moment is asked again soon, one
/// that is busy is waited for. After the last, three seconds in all, it counts as not there.
const DIALS_MS: [u64; 5] = [100, 200, 400, 800, 1_600];

/// Pause before all are asked again, and before a leader decides and reads once more for one that could not take it.
const AGAIN: Duration = Duration::from_millis(500);
const TAKE_AGAIN: Duration = Duration::from_secs(10);

/// How long the leader may take to decide an entry and to read its state; and how long nothing may come afterwards.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(90);
const STALL: Duration = Duration::from_secs(30);

/// How long a request may take to come.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// Bytes of one read.
const PIECE_BYTES: usize = 256 << 10;

/// What a member that has begun says of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Standing {
    /// The newest term that it knows.
    term: u64,
    leader: Option<NodeId>,
    /// The member that asks has a memory to be given: the state there knows a process of it, or is not of the first life.
    known: bool,
}

/// What another member answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Begun(Standing),
    /// It has no memory, too.
    None,
    /// Nothing.
    Away,
}

/// What a member without memory does next.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// Begins with an empty log.
    Begin,
    /// Asks again later: why.
    Wait(String),
    /// Takes the group's memory from its leader. `newest`: the newest term that it can have voted in.
    Join { leader: NodeId, newest: u64 },
}

fn decide(memory: Memory, answers: &[(NodeId, Answer)]) -> Next {
    let begun = answers.iter().filter_map(|(node, answer)| match answer {
        Answer::Begun(standing) => Some((node, standing)),
        _ => None,
    });
    let away: Vec<&str> = answers.iter().filter(|(_, a)| *a == Answer::Away).map(|(node, _)| node.as_str()).collect();
    let away = away.join(", ");
    let Some((_, newest)) = begun.clone().max_by_key(|(_, standing)| standing.term) else {
        return match away.as_str() {
            "" if memory == Memory::None => Next::Begin,
            "" => Next::Wait("no member has one".into()),
            away => Next::Wait(format!("{away} does not answer, and may have the group's")),
        };
    };
    // Who leads says so itself: it alone is sure to know who has ever been there.
    let leads = |(node, standing): &(&NodeId, &Standing)| {
        standing.term == newest.term && standing.leader.as_ref() == Some(*node)
    };
    let led = begun.clone().find(leads);
    if memory == Memory::None && led.is_some_and(|(_, standing)| !standing.known) {
        return Next::Begin;
    }
    if !away.is_empty() {
        return Next::Wait(format!("every other member must say how far the group is, and {away} does not"));
    }
    let Some((leader, _)) = led else { return Next::Wait("nobody leads the group".into()) };
    Next::Join { leader: leader.clone(), newest: newest.term }
}

/// Sees to it that a member has a memory before it begins, or may begin without one. Waits as long as it takes.
pub async fn remember(options: &raft::Options, endpoint: &Arc<Endpoint>, key: &Arc<MasterKey>) -> anyhow::Result<()> {
    // What is somebody else's is refused before anybody is asked.
    raft::claim_data_dir(options)?;
    let memory = raft::memory(options)?;
    if memory == Memory::Begun || options.members.len() == 1 {
        return Ok(());
    }
    tokio::select! {
        joined = join(options, memory, endpoint, key) => joined,
        never = answer_without_memory(endpoint) => match never {},
    }
}

async fn join(
    options: &raft::Options,
    mut memory: Memory,
    endpoint: &Arc<Endpoint>,
    key: &Arc<MasterKey>,
) -> anyhow::Result<()> {
    let others: Vec<&Member> = options.members.iter().filter(|member| member.node != options.node).collect();
    let (mut last, mut told) = (String::new(), String::new());
    loop {
        let answers = future::join_all(others.iter().map(|member| ask(options, endpoint, member))).await;
        let answers: Vec<_> = others.iter().map(|member| member.node.clone()).zip(answers).collect();
        let reason = match decide(memory, &answers) {
            Next::Begin => return Ok(()),
            Next::Wait(reason) => reason,
            Next::Join { leader, newest } => {
                let member = others.iter().find(|member| member.node == leader).expect("it has answered");
                match take(options, endpoint, key, member, newest).await? {
                    Ok(applied) => {
                        log::warn!(leader:%, applied; "this member had lost its memory and was given the group's");
                        return Ok(());
                    }
                    Err(reason) => {
                        sleep(TAKE_AGAIN).await;
                        format!("{leader} did not give its own: {reason}")
                    }
                }
            }
        };
        memory = raft::memory(options)?;
        // What a group is like that is just beginning is not worth a word.
        if reason == last && reason != told {
            log::warn!(message_id = events::JOIN_WAITS, reason; "this member has no memory and does not begin without the group's");
            told.clone_from(&reason);
        }
        last = reason;
        sleep(AGAIN).await;
    }
}

/// Asks a member how far the group is.
async fn ask(options: &raft::Options, endpoint: &Endpoint, member: &Member) -> Answer {
    for limit_ms in DIALS_MS {
        let asking = async {
            let (_connection, _, mut rx) = request(options, endpoint, member, RejoinRequest::Standing).await?;
            anyhow::Ok(rx.expect::<RejoinAnswer>().await?)
        };
        let limit = Instant::now() + Duration::from_millis(limit_ms);
        match timeout_at(limit, asking).await {
            Ok(Ok(RejoinAnswer::Standing { term: 0, .. })) => return Answer::None,
            Ok(Ok(RejoinAnswer::Standing { term, leader, known })) => {
                return Answer::Begun(Standing { term, leader, known });
            }
            Ok(Ok(other)) => log::warn!(node:% = member.node, answer:? = other; "a member answers something else"),
            Ok(Err(error)) => {
                log::debug!(node:% = member.node, reason = format!("{error:#}"); "a member does not answer")
            }
            Err(_) => {}
        }
        // One that refuses at once may be about to start.
        sleep_until(limit).await;
    }
    Answer::Away
}

async fn request(
    options: &raft::Options,
    endpoint: &Endpoint,
    member: &Member,
    request: RejoinRequest,
) -> anyhow::Result<(Connection, Sender, Receiver)> {
    let connecting = endpoint.connect(member.address, Role::Controller, Some(&member.node), Profile::Requests);
    let connection = connecting.await?;
    let site = &connection.peer().site;
    ensure!(*site == options.site, "{} at {} is of site {site}", member.node, member.address);
    let (mut tx, rx) = connection.open_bi(Open::Rejoin).await?;
    tx.send(&request).await?;
    quic::finish(&mut tx);
    Ok((connection, tx, rx))
}

/// Takes the group's memory from its leader into the data directory; returns the index that it ends with, or why there is
/// none now. What this machine's disk refuses is an error.
async fn take(
    options: &raft::Options,
    endpoint: &Endpoint,
    key: &Arc<MasterKey>,
    leader: &Member,
    newest: u64,
) -> anyhow::Result<Result<u64, String>> {
    let asking = async {
        let (connection, _, mut rx) = request(options, endpoint, leader, RejoinRequest::Snapshot).await?;
        let answer = rx.expect::<RejoinAnswer>().await?;
        anyhow::Ok((connection, rx, answer))
    };
    let (_connection, rx, term) = match timeout(SNAPSHOT_WITHIN, asking).await {
        Ok(Ok((connection, rx, RejoinAnswer::Snapshot { term }))) if term >= newest => (connection, rx, term),
        Ok(Ok((_, _, RejoinAnswer::Snapshot { term }))) => return Ok(Err(format!("term {term} is not the newest"))),
        Ok(Ok((_, _, RejoinAnswer::Refused { reason }))) => return Ok(Err(reason)),
        Ok(Ok((_, _, other))) => return Ok(Err(format!("it answers {other:?}"))),
        Ok(Err(error)) => return Ok(Err(format!("{error:#}"))),
        Err(_) => return Ok(Err("it takes too long".into())),
    };
    let (put, given) = Given::queue();
    let (options, key) = (options.clone(), key.clone());
    let joining = tokio::task::spawn_blocking(move || restore::join(given, &key, &options, term));
    let came = receive(rx, put).await;
    let joined = joining.await.context("take the group's memory")?;
    match (came, joined) {
        (Err(reason), Err(_)) => Ok(Err(format!("{reason:#}"))),
        // All of it came; it or the disk here is of no use.
        (Ok(()), Err(error)) => Err(error.context(format!("take the group's memory from {}", leader.node))),
        (_, Ok(applied)) => Ok(Ok(applied)),
    }
}

/// Passes on what follows on a stream. A reader that takes no more ends it without an error: it knows why.
async fn receive(rx: Receiver, put: mpsc::Sender<Bytes>) -> anyhow::Result<()> {
    let (mut stream, mut piece) = rx.into_parts();
    loop {
        if !piece.is_empty() && put.send(piece.split().freeze()).await.is_err() {
            return Ok(());
        }
        piece.reserve(PIECE_BYTES);
        if timeout(STALL, stream.read_buf(&mut piece)).await.context("nothing came for too long")?? == 0 {
            return Ok(());
        }
    }
}

/// Answers other members that begin at the same time, until this one has what it needs; then the connections end, and
/// whoever wants something else dials again.
async fn answer_without_memory(endpoint: &Endpoint) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        let Some(connection) = endpoint.accept().await else { pending().await };
        if connection.peer().role == Role::Controller {
            connections.spawn(async move {
                while let Ok((open, mut tx, _rx)) = connection.accept_bi().await {
                    if open == Open::Rejoin {
                        let none = RejoinAnswer::Standing { term: 0, leader: None, known: false };
                        let _ = tx.send(&none).await;
                        quic::finish(&mut tx);
                        quic::stopped(&mut tx).await;
                    }
                }
            });
        }
    }
}

/// What a member that has begun needs to answer one that has not.
#[derive(Clone)]
pub struct Giver {
    pub raft: Raft,
    pub store: blob::Store,
    pub key: Arc<MasterKey>,
    pub cluster: ClusterId,
    /// One at a time: all that is on the disk is read.
    pub one: Arc<Semaphore>,
}

impl Giver {
    /// Answers on a stream that `peer` opened with `Open::Rejoin`.
    pub async fn serve(&self, peer: &Identity, mut tx: Sender, mut rx: Receiver) -> anyhow::Result<()> {
        let site = self.raft.state().read(|state| state.site().clone());
        ensure!(peer.site == site && self.raft.is_peer(&peer.node), "{peer} is no member of this group");
        let peer = &peer.node;
        match timeout(REQUEST_LIMIT, rx.expect()).await?? {
            RejoinRequest::Standing => {
                let lead = self.raft.leadership().borrow().clone();
                // Of one that leads all is believed, so it makes sure that it does, and that it has applied what was decided.
                let sure = !lead.here || self.raft.read_index().await.is_ok();
                // A later life begins with a state that no log leads to: who has none must be given it.
                let known = self.raft.state().read(|state| state.starts_of(peer) > 0 || state.incarnation() > 1);
                let same = *self.raft.leadership().borrow() == lead;
                let leader = lead.leader.filter(|_| sure && same);
                tx.send(&RejoinAnswer::Standing { term: lead.term, leader, known }).await?;
            }
            RejoinRequest::Snapshot => match self.snapshot(peer).await {
                Ok((term, taking, place)) => {
                    tx.send(&RejoinAnswer::Snapshot { term }).await?;
                    let store = self.store.clone();
                    let pieces = taking.start(move |hash| store.path(hash), place);
                    if let Err(error) = give(pieces, &mut tx).await {
                        // What was cut off must not look whole.
                        quic::reset(&mut tx);
                        return Err(error);
                    }
                    log::info!(peer:%; "a member that had lost its memory was given this one's");
                }
                Err(reason) => tx.send(&RejoinAnswer::Refused { reason: format!("{reason:#}") }).await?,
            },
        }
        quic::finish(&mut tx);
        quic::stopped(&mut tx).await;
        Ok(())
    }

    /// Decides an entry and reads the state as of it or a later one, all of the term that is returned.
    async fn snapshot(&self, peer: &NodeId) -> anyhow::Result<(u64, Taking, impl Send + use<>)> {
        let place = self.one.clone().try_acquire_owned().context("another member is given it just now")?;
        let lead = self.raft.leadership().borrow().clone();
        ensure!(lead.here, "it does not lead");
        let reply = self.raft.propose(Command::Readmit { node: peer.clone() }).await?;
        ensure!(reply == Reply::Done, "it decided nothing: {reply:?}");
        let disk = self.raft.durable().await?;
        let taking = Taking::of(&self.raft, disk, &self.cluster, &self.key, false).await?;
        // Entries of a leader are of its term: of this one if it has led all the time.
        ensure!(*self.raft.leadership().borrow() == lead, "it does not lead any longer");
        Ok((lead.term, taking, place))
    }
}

/// Sends a backup to its end, which is an empty piece.
async fn give(mut pieces: mpsc::Receiver<io::Result<Bytes>>, tx: &mut Sender) -> anyhow::Result<()> {
    loop {
        let piece = pieces.recv().await.context("the backup broke off")??;
        if piece.is_empty() {
            return Ok(());
        }
        timeout(STALL, tx.get_mut().write_chunk(piece)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of c1, c2, …: `-` away, `0` no memory, or a term, with the number of who leads, and `!` if it knows who asks.
    fn answers(of: &[&str]) -> Vec<(NodeId, Answer)> {
        let node = |i: &str| NodeId::new(&format!("c{i}")).unwrap();
        let read = |text: &str| match text {
            "-" => Answer::Away,
            "0" => Answer::None,
            _ => {
                let (numbers, known) = (text.trim_end_matches('!'), text.ends_with('!'));
                let (term, leader) = numbers.split_once('/').unwrap();
                let leader = (!leader.is_empty()).then(|| node(leader));
                Answer::Begun(Standing { term: term.parse().unwrap(), leader, known })
            }
        };
        (1..).zip(of).map(|(i, text)| (node(&i.to_string()), read(text))).collect()
    }

    fn check(memory: Memory, of: &[&str], expected: &str) {
        let said = match decide(memory, &answers(of)) {
            Next::Begin => "begin".to_owned(),
            Next::Wait(reason) => format!("wait: {reason}"),
            Next::Join { leader, newest } => format!("join {leader} {newest}"),
        };
        assert!(said.starts_with(expected), "{of:?}: {said}, expected {expected}");
    }

    #[test]
    fn a_group_begins_when_all_are_there_and_none_has_a_memory() {
        check(Memory::None, &["0", "0"], "begin");
        check(Memory::Joining, &["0", "0"], "wait: no member has one");
        // Two that were replaced at once do not begin without the third, which has everything.
        check(Memory::None, &["-", "0"], "wait: c1 does not answer");
        check(Memory::None, &["-", "-", "0", "-"], "wait: c1, c2, c4 does not answer");
        check(Memory::None, &["5/!", "0"], "wait: nobody leads");
    }

    #[test]
    fn a_member_that_the_group_never_heard_of_begins() {
        check(Memory::None, &["7/1", "7/1"], "begin");
        check(Memory::None, &["7/1", "-"], "begin");
        check(Memory::None, &["7/1", "7/1!"], "begin");
        check(Memory::None, &["7/2", "-"], "wait: every other member");
        check(Memory::Joining, &["7/1", "7/1"], "join c1 7");
    }

    #[test]
    fn a_member_that_lost_its_memory_needs_everybody_and_a_leader() {
        check(Memory::None, &["7/1!", "7/1!"], "join c1 7");
        check(Memory::None, &["7/1!", "7/1"], "join c1 7");
        check(Memory::None, &["7/1!", "-"], "wait: every other member must say how far the group is, and c2 does not");
        check(Memory::None, &["7/!", "7/!"], "wait: nobody leads");
        check(Memory::None, &["8/!", "7/1!"], "wait: nobody leads");
        check(Memory::None, &["7/1!", "8/1!"], "wait: nobody leads");
        check(Memory::None, &["7/1", "8/2!"], "join c2 8");
        check(Memory::None, &["7/1!", "7/1!", "0", "7/1!"], "join c1 7");
    }
}
