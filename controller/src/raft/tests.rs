//! Members of a group in one process, over real QUIC on loopback and real files.

use std::time::{Duration, Instant};

use super::*;
use crate::state::turns::Opening;
use crate::state::{Digest, Key, KeyStatus};
use izar_common::clock::Hlc;
use izar_common::id::{Hash, Identity, Role, TurnId};
use izar_common::tls::{Files, NodeTls, pki};

/// Elections and restarts on a busy machine take seconds at worst.
const LIMIT: Duration = Duration::from_secs(30);

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// A group's certificates, directories and addresses.
struct Group {
    dir: tempfile::TempDir,
    members: Vec<Member>,
}

/// A running member.
struct Running {
    raft: Raft,
    driver: Arc<Driver>,
    endpoint: Arc<Endpoint>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Group {
    /// Binds each member once to learn a free port.
    async fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), &name("bank")).unwrap();
        let mut group = Self { dir, members: Vec::new() };
        let mut bound = Vec::new();
        for id in 1..=size {
            let node: NodeId = name(&format!("c{id}"));
            let identity =
                Identity { cluster: name("bank"), site: name("east"), role: Role::Controller, node: node.clone() };
            pki::issue(group.dir.path(), &identity, &["127.0.0.1".into()], group.dir.path()).unwrap();
            let endpoint = Endpoint::bind(name("127.0.0.1:0"), &group.tls(&node)).unwrap();
            group.members.push(Member { id, node, address: endpoint.local_addr() });
            bound.push(endpoint);
        }
        for endpoint in bound {
            endpoint.close().await;
        }
        group
    }

    fn tls(&self, node: &NodeId) -> NodeTls {
        let path = |file: String| self.dir.path().join(file);
        let (ca, cert, key) = (path("ca.pem".into()), path(format!("{node}.pem")), path(format!("{node}.key")));
        NodeTls::load(&Files { ca, cert, key }).unwrap()
    }

    fn options(&self, index: usize) -> Options {
        Options {
            data_dir: self.dir.path().join(format!("data{index}")),
            cluster: name("bank"),
            site: name("east"),
            node: self.members[index].node.clone(),
            members: self.members.clone(),
            tick: Duration::from_millis(20),
            election_ticks: 10,
            heartbeat_ticks: 2,
        }
    }

    async fn start(&self, index: usize) -> Running {
        let Member { node, address, .. } = &self.members[index];
        let tls = self.tls(node);
        let bind = async || Endpoint::bind(*address, &tls).ok();
        let endpoint = Arc::new(until("the address is free", bind).await);
        let (raft, driver) = Raft::start(self.options(index), endpoint.clone(), Arc::default()).unwrap();
        let driver = Arc::new(driver);
        let accepting = tokio::spawn(accept(endpoint.clone(), driver.clone()));
        Running { raft, driver, endpoint, accepting }
    }

    async fn start_all(&self) -> Vec<Running> {
        let mut all = Vec::new();
        for index in 0..self.members.len() {
            all.push(self.start(index).await);
        }
        all
    }
}

async fn accept(endpoint: Arc<Endpoint>, driver: Arc<Driver>) {
    while let Some(connection) = endpoint.accept().await {
        let driver = driver.clone();
        tokio::spawn(async move {
            while let Ok((open, stream)) = connection.accept_uni().await {
                let (driver, peer) = (driver.clone(), connection.peer().node.clone());
                tokio::spawn(async move { driver.on_stream(peer, open, stream).await });
            }
        });
    }
}

impl Running {
    async fn stop(self) {
        self.driver.shutdown().await;
        self.endpoint.close().await;
        self.accepting.await.unwrap();
    }
    async fn done(&self, command: Command) {
        let proposed = async || self.raft.propose(command.clone()).await.ok();
        assert_eq!(until("the command is decided", proposed).await, Reply::Done, "{command:?}");
    }
}

/// Asks again and again until there is an answer; there must be one in time.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| panic!("in {LIMIT:?} it did not happen that {what}"))
}

/// Waits until all members see one of them lead; returns its place.
async fn leader(members: &[&Running]) -> usize {
    until("all see one leader", async || {
        let seen: Vec<_> = members.iter().map(|member| member.raft.leadership().borrow().clone()).collect();
        let agreed = seen.iter().all(|one| one.leader.is_some() && one.leader == seen[0].leader);
        seen.iter().position(|one| one.here).filter(|_| agreed)
    })
    .await
}

/// Waits until all members have applied as much, and returns what they have.
async fn same_digest(members: &[&Running]) -> Digest {
    until("all have the same state", async || {
        let digests: Vec<Digest> = members.iter().map(|member| member.raft.state().digest()).collect();
        let level = digests.iter().all(|digest| digest.applied == digests[0].applied);
        level.then(|| {
            assert!(digests.iter().all(|digest| *digest == digests[0]), "states differ: {digests:?}");
            digests[0]
        })
    })
    .await
}

fn key(id: &str) -> Command {
    let (status, created) = (KeyStatus::Active, Hlc::from_ms(1));
    let secret_hash = izar_common::blob::hash(id.as_bytes());
    let (project, note) = (name("default"), String::new());
    Command::CreateKey(Key { id: name(id), project, secret_hash, max_concurrent: 8, status, created, note })
}

fn turn(id: u128, origin: &Origin) -> Command {
    Command::OpenTurn(Opening {
        turn: TurnId(id),
        tenant: name("default"),
        project: name("default"),
        key: name("k"),
        deployment: name("m"),
        revision: Hash([7; 32]),
        prompt_tokens: 3,
        max_tokens: 4,
        stream: true,
        origin: origin.clone(),
        once: None,
        provisional: false,
    })
}

/// Opens many turns at once; all must be decided, each once.
async fn open_turns(member: &Running, ids: std::ops::Range<u128>) {
    let mut opening = tokio::task::JoinSet::new();
    for id in ids {
        let raft = member.raft.clone();
        opening.spawn(async move { raft.propose(turn(id, raft.origin())).await });
    }
    while let Some(reply) = opening.join_next().await {
        assert_eq!(reply.unwrap(), Ok(Reply::Done));
    }
}

fn has_turns(member: &Running, ids: std::ops::Range<u128>) -> bool {
    member.raft.state().read(|state| ids.into_iter().all(|id| state.turn(&TurnId(id)).is_some()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_member_decides_and_remembers_over_a_restart() {
    let group = Group::new(1).await;
    let one = group.start(0).await;
    one.done(key("k")).await;
    assert!(one.raft.config().borrow().keys.contains_key("k"));
    open_turns(&one, 0..100).await;
    one.raft.read_index().await.unwrap();
    let before = one.raft.state().digest();
    assert_eq!(one.raft.origin().incarnation, 1);
    one.stop().await;

    let one = group.start(0).await;
    assert_eq!(one.raft.origin().incarnation, 2);
    assert_eq!(one.raft.state().digest(), before, "a clean stop leaves nothing to replay");
    assert!(one.raft.config().borrow().keys.contains_key("k"));
    open_turns(&one, 100..110).await;
    assert!(has_turns(&one, 0..110));
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_propose_and_every_member_comes_to_the_same_state() {
    let group = Group::new(3).await;
    let all = group.start_all().await;
    let members: Vec<&Running> = all.iter().collect();
    let led = leader(&members).await;
    let (a, b) = (&all[(led + 1) % 3], &all[(led + 2) % 3]);
    a.done(key("k")).await;
    a.raft.read_index().await.unwrap();
    tokio::join!(open_turns(a, 0..300), open_turns(b, 300..600), open_turns(&all[led], 600..900));
    b.raft.read_index().await.unwrap();
    assert!(has_turns(b, 0..900), "a read sees all that was decided before it");
    let digest = same_digest(&members).await;
    let entries = digest.applied;
    assert!(entries < 900, "commands share entries: {entries} for 901 commands");
    for member in all {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_leader_is_replaced_and_catches_up_when_it_returns() {
    let group = Group::new(3).await;
    let mut all = group.start_all().await;
    let led = leader(&all.iter().collect::<Vec<_>>()).await;
    all[led].done(key("k")).await;
    open_turns(&all[(led + 1) % 3], 0..200).await;
    // Proposals are under way at a follower while the leader goes.
    let lost = all.remove(led);
    let (a, b) = (&all[0], &all[1]);
    tokio::join!(open_turns(a, 200..400), lost.stop());
    leader(&[a, b]).await;
    open_turns(b, 400..500).await;
    a.raft.read_index().await.unwrap();
    assert!(has_turns(a, 0..500), "what was acknowledged is there");

    let returned = group.start(led).await;
    returned.raft.read_index().await.unwrap();
    assert!(has_turns(&returned, 0..500));
    open_turns(&returned, 500..510).await;
    same_digest(&[a, b, &returned]).await;
    for member in all.into_iter().chain([returned]) {
        member.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_under_load_and_nothing_is_lost() {
    let group = Group::new(3).await;
    let all = group.start_all().await;
    let members: Vec<&Running> = all.iter().collect();
    let mut led = leader(&members).await;
    all[led].done(key("k")).await;
    for round in 0..5 {
        let ids = round * 200..round * 200 + 200;
        let (from, term) = (&all[led], all[led].raft.leadership().borrow().term);
        let (next, ()) = tokio::join!(from.raft.hand_over(LIMIT), open_turns(&all[(led + 1) % 3], ids));
        let next = next.expect("another one leads");
        led = leader(&members).await;
        assert_eq!(group.members[led].node, next);
        assert_eq!(all[led].raft.leadership().borrow().term, term + 1, "one election, which nobody lost");
        assert_eq!(from.raft.hand_over(LIMIT).await, Some(next), "there is nothing to hand over");
    }
    all[led].raft.read_index().await.unwrap();
    assert!(has_turns(&all[led], 0..1000));
    for member in all {
        member.stop().await;
    }
    let group = Group::new(1).await;
    let alone = group.start(0).await;
    alone.done(key("k")).await;
    assert_eq!(alone.raft.hand_over(LIMIT).await, None, "nobody else is there");
    alone.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_decided_and_all_return_after_a_stop() {
    let group = Group::new(3).await;
    let mut all = group.start_all().await;
    leader(&all.iter().collect::<Vec<_>>()).await;
    all[0].done(key("k")).await;
    open_turns(&all[0], 0..50).await;
    for _ in 0..2 {
        all.pop().unwrap().stop().await;
    }
    let alone = &all[0];
    until("the lone member sees no leader", async || alone.raft.leadership().borrow().leader.is_none().then_some(()))
        .await;
    let (proposed, read) = tokio::join!(alone.raft.propose(key("late")), alone.raft.read_index());
    assert!(proposed.is_err() && read.is_err());
    all.pop().unwrap().stop().await;

    let all = group.start_all().await;
    let members: Vec<&Running> = all.iter().collect();
    leader(&members).await;
    all[2].raft.read_index().await.unwrap();
    assert!(has_turns(&all[2], 0..50));
    all[2].done(key("k2")).await;
    same_digest(&members).await;
    for member in all {
        member.stop().await;
    }
}

#[tokio::test]
async fn a_directory_whose_memory_is_gone_or_foreign_is_refused() {
    let group = Group::new(1).await;
    let one = group.start(0).await;
    one.done(key("k")).await;
    let endpoint = one.endpoint.clone();
    one.stop().await;
    let refused = |options: Options| {
        let started = Raft::start(options, endpoint.clone(), Arc::default());
        match started {
            Err(error) => format!("{error:#}"),
            Ok(_) => panic!("the start is not refused"),
        }
    };
    let mine = group.options(0);
    assert!(refused(Options { site: name("west"), ..mine.clone() }).contains("belongs to site east"));
    let other = Member { id: 2, ..group.members[0].clone() };
    let moved = Options { members: vec![other], ..mine.clone() };
    assert!(refused(moved).contains("this version cannot change them"));
    std::fs::remove_file(mine.data_dir.join(LOG_FILE)).unwrap();
    assert!(refused(mine).contains("is given the group's memory"));
}

/// Prints how fast commands are decided, fsync on, all members on this machine; only a hang fails it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commands_are_decided_in_a_row() {
    const COMMANDS: u128 = 20_000;
    const AT_ONCE: u128 = 500;
    const ALONE: u128 = 300;
    for size in [1, 3] {
        let group = Group::new(size).await;
        let all = group.start_all().await;
        let led = leader(&all.iter().collect::<Vec<_>>()).await;
        let entry = &all[(led + 1) % all.len()];
        entry.done(key("k")).await;
        let begun = Instant::now();
        let mut lanes = tokio::task::JoinSet::new();
        for lane in 0..AT_ONCE {
            let raft = entry.raft.clone();
            lanes.spawn(async move {
                for id in (lane..COMMANDS).step_by(AT_ONCE as usize) {
                    assert_eq!(raft.propose(turn(id, raft.origin())).await, Ok(Reply::Done));
                }
            });
        }
        while let Some(done) = lanes.join_next().await {
            done.unwrap();
        }
        let rate = COMMANDS as f64 / begun.elapsed().as_secs_f64();
        let mut alone = Vec::new();
        for id in 0..ALONE {
            let begun = Instant::now();
            assert_eq!(entry.raft.propose(turn(COMMANDS + id, entry.raft.origin())).await, Ok(Reply::Done));
            alone.push(begun.elapsed());
        }
        alone.sort_unstable();
        let (p50, p99) = (alone[ALONE as usize / 2], alone[ALONE as usize * 99 / 100]);
        println!("{size} member(s): {rate:.0} commands/s with {AT_ONCE} at once; one by one p50 {p50:?}, p99 {p99:?}");
        for member in all {
            member.stop().await;
        }
    }
}
