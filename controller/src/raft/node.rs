//! The ready loop as a plain struct: inputs and ticks in, effects out. No thread, socket, disk or clock.
//!
//! The order that everything hangs on: a ready's entries and hard state become one job for the disk; messages that
//! promise something wait for that job; the leader's own messages promise nothing and leave at once; entries are
//! given to the applier only when they are committed and on this node's disk.
//!
//! Two things differ from the crate's examples. A hard state in which only the commit index moved is not written for
//! itself (so an idle node writes nothing); it goes along with the next entries, or when the state asks for it. And an
//! answer to a heartbeat does not wait behind entries on their way to the disk, unless the term it speaks of is among
//! them: it promises nothing but the term, and a slow fsync must not look like a dead follower.

use std::collections::HashSet;

use bytes::Bytes;
use raft::eraftpb::{Entry, HardState, Message, MessageType};
use raft::{ReadOnlyOption, ReadState, StateRole};

use super::inbox::Inputs;
use super::log::Log;
use super::writer::Job;

/// Most bytes of entries in one append, except for a single larger entry.
const APPEND_BYTES: u64 = 256 << 10;
/// Appends on their way to one follower; with the above at most 32 MiB, half of what its queue holds.
const APPENDS_IN_FLIGHT: usize = 128;
/// Proposals beyond this many uncommitted bytes are dropped until the followers keep up; their origins send them again.
const UNCOMMITTED_BYTES: u64 = 64 << 20;
/// Bytes of committed entries given to the applier at once.
const COMMITTED_BYTES: u64 = 4 << 20;
/// Entries that stay in the log behind the slowest voter.
pub const KEEP: u64 = 10_000;
/// Entries that are dropped at once; fewer are not worth an entry of their own.
const COMPACT_STEP: u64 = 10_000;
/// Ticks without anything but heartbeats after which a group is quiet: 5 s at 20 ms. Then every other heartbeat is
/// left out, which spares an idle node half of its work; the group is not quiet while it has anything to lose.
const QUIET_TICKS: usize = 250;
/// A quiet group must still have this many heartbeats in the shortest election time.
const QUIET_BEATS: usize = 2;

/// How the group keeps time.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub election_ticks: usize,
    pub heartbeat_ticks: usize,
}

/// Who leads, by Raft's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lead {
    /// 0: nobody that this node knows.
    pub leader: u64,
    pub term: u64,
    pub here: bool,
}

/// What a step asks of the shell, in this order.
#[derive(Debug, Default)]
pub struct Effects {
    /// Leave now.
    pub messages: Vec<Message>,
    /// For the disk, in order.
    pub jobs: Vec<Job>,
    /// For the applier, in order.
    pub committed: Vec<Entry>,
    /// Answers to questions for a read index.
    pub reads: Vec<ReadState>,
    /// Only when it changed.
    pub lead: Option<Lead>,
    /// The log up to here is on every voter's disk, with the reserve subtracted: worth a `CompactLog`.
    pub compactable: Option<u64>,
}

/// One member of the group.
pub struct Node {
    raw: raft::RawNode<Log>,
    hard_state: HardState,
    /// The hard state moved since it was last given to the disk.
    unlogged: bool,
    /// Number of the last ready that was given to the disk.
    submitted: u64,
    /// Number of the last ready that is on it.
    persisted: u64,
    /// Number of the last ready that changed term or vote.
    term_changed: u64,
    applied: u64,
    lead: Lead,
    proposed_compaction: u64,
    times: Times,
    /// Ticks since something other than a heartbeat happened.
    quiet: usize,
    /// The last heartbeat was left out.
    left_out: bool,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("lead", &self.lead).field("applied", &self.applied).finish_non_exhaustive()
    }
}

impl Node {
    /// Begins from an opened log. `applied` is what the state holds durably.
    pub fn new(id: u64, log: Log, applied: u64, times: Times) -> anyhow::Result<Self> {
        let config = raft::Config {
            id,
            election_tick: times.election_ticks,
            heartbeat_tick: times.heartbeat_ticks,
            applied,
            max_size_per_msg: APPEND_BYTES,
            max_inflight_msgs: APPENDS_IN_FLIGHT,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            // Proposals are batched before they come here. The crate's own batching of appends has no bound: it makes
            // one message of all that a lagging follower misses.
            batch_append: false,
            max_uncommitted_size: UNCOMMITTED_BYTES,
            max_committed_size_per_ready: COMMITTED_BYTES,
            ..raft::Config::default()
        };
        let mut raw = raft::RawNode::new(&config, log, &super::logger::logger())?;
        if raw.raft.prs().is_singleton() {
            // Nobody else could lead: there is no one to wait for.
            raw.campaign()?;
        }
        let hard_state = raw.raft.hard_state();
        Ok(Self {
            raw,
            hard_state,
            unlogged: false,
            submitted: 0,
            persisted: 0,
            term_changed: 0,
            applied,
            lead: Lead::default(),
            proposed_compaction: 0,
            times,
            quiet: 0,
            left_out: false,
        })
    }

    /// Ticks until one of them may do something. Until then nobody need wake this node for time's sake.
    pub fn ticks_to_wait(&self) -> usize {
        let raft = &self.raw.raft;
        let due = match raft.state {
            StateRole::Leader => {
                let beat = raft.heartbeat_timeout().saturating_sub(raft.heartbeat_elapsed());
                beat.min(raft.election_timeout().saturating_sub(raft.election_elapsed))
            }
            _ => raft.randomized_election_timeout().saturating_sub(raft.election_elapsed),
        };
        due.max(1)
    }

    /// Takes what came in and the ticks that have passed (no more than `ticks_to_wait`), and says what to do.
    pub fn step(&mut self, inputs: Inputs, ticks: usize) -> Effects {
        let mut effects = Effects::default();
        // All but the last do nothing; the last comes after the messages, so that a heartbeat that lay there counts.
        for _ in 1..ticks {
            self.raw.tick();
        }
        self.quiet = if inputs.proposals.is_empty() && inputs.read.is_none() { self.quiet + ticks } else { 0 };
        // First what this node itself has done: an answer from a peer may rest on it.
        self.progress(&inputs, &mut effects);
        for message in inputs.urgent.into_iter().chain(inputs.bulk) {
            if let Err(error) = self.raw.step(message) {
                log::debug!(error:%; "raft refused a message");
            }
        }
        for peer in inputs.unreachable {
            self.raw.report_unreachable(peer);
        }
        for batch in inputs.proposals {
            self.propose(batch);
        }
        if let Some(context) = inputs.read {
            self.raw.read_index(context);
        }
        if inputs.hand_over {
            self.hand_over();
        }
        if ticks > 0 {
            self.raw.tick();
        }
        while self.raw.has_ready() {
            self.ready(&mut effects);
        }
        self.thin_heartbeats(&mut effects);
        if inputs.log_commit && self.unlogged {
            self.unlogged = false;
            effects.jobs.push(Job { hard_state: Some(self.hard_state.clone()), ..Job::default() });
        }
        self.notice_lead(&mut effects);
        if ticks > 0 {
            self.notice_compaction(&mut effects);
        }
        effects
    }

    /// What must still be written before this node stops.
    pub fn last_job(&mut self) -> Option<Job> {
        let hard_state = Some(self.hard_state.clone());
        std::mem::take(&mut self.unlogged).then(|| Job { hard_state, ..Job::default() })
    }

    fn progress(&mut self, inputs: &Inputs, effects: &mut Effects) {
        if inputs.persisted > self.persisted {
            self.persisted = inputs.persisted;
            self.raw.on_persist_ready(inputs.persisted);
            let persisted = self.raw.raft.raft_log.persisted;
            self.raw.mut_store().evict(persisted);
        }
        if inputs.applied > self.applied {
            self.applied = inputs.applied;
            self.raw.advance_apply_to(inputs.applied);
        }
        let through = inputs.compact.min(self.applied);
        if let Some(truncated) = self.raw.mut_store().compact(through) {
            effects.jobs.push(Job { truncated: Some(truncated), ..Job::default() });
        }
    }

    /// Only a leader proposes: what a follower passes on may take effect twice, or nobody knows whether at all.
    fn propose(&mut self, batch: Bytes) {
        if self.raw.raft.state != StateRole::Leader {
            log::debug!("a proposal came to a node that does not lead");
            return;
        }
        if let Err(error) = self.raw.propose(Vec::new(), batch.into()) {
            log::debug!(error:%; "a proposal was dropped");
        }
    }

    /// Lets the follower that is furthest lead: it is asked to begin an election at once, which nobody's patience delays.
    /// Proposals are dropped until then, and sent again to the new leader.
    fn hand_over(&mut self) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return;
        }
        let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        let best = others.max_by_key(|(_, progress)| (progress.recent_active, progress.matched)).map(|(id, _)| *id);
        if let Some(id) = best {
            self.raw.transfer_leader(id);
        }
    }

    fn ready(&mut self, effects: &mut Effects) {
        let mut ready = self.raw.ready();
        let number = ready.number();
        effects.messages.extend(ready.take_messages());
        effects.committed.extend(ready.take_committed_entries());
        effects.reads.extend(ready.take_read_states());
        let mut held = ready.take_persisted_messages();
        let entries = ready.take_entries();
        assert!(ready.snapshot().is_empty(), "snapshots are refused at the door");
        if let Some(hard_state) = ready.hs() {
            if (hard_state.term, hard_state.vote) != (self.hard_state.term, self.hard_state.vote) {
                self.term_changed = number;
            }
            self.hard_state = hard_state.clone();
            self.unlogged = true;
        }
        let must_write = ready.must_sync();
        self.raw.mut_store().append(&entries);
        self.raw.advance_append_async(ready);
        if must_write {
            let hard_state = std::mem::take(&mut self.unlogged).then(|| self.hard_state.clone());
            self.submit(effects, Job { number, entries, hard_state, messages: held, truncated: None });
        } else if self.persisted >= self.submitted {
            // Nothing is on its way to the disk, so there is nothing to wait for.
            self.submitted = number;
            self.persisted = number;
            self.raw.on_persist_ready(number);
            effects.messages.append(&mut held);
        } else if !held.is_empty() {
            let term_is_durable = self.persisted >= self.term_changed;
            let harmless = |m: &Message| term_is_durable && m.msg_type == MessageType::MsgHeartbeatResponse;
            let (now, later): (Vec<_>, Vec<_>) = held.into_iter().partition(harmless);
            effects.messages.extend(now);
            self.submit(effects, Job { number, messages: later, ..Job::default() });
        }
    }

    fn submit(&mut self, effects: &mut Effects, job: Job) {
        self.submitted = job.number;
        effects.jobs.push(job);
    }

    /// Leaves out every other heartbeat of a quiet group. One that carries a question for a read index always goes.
    fn thin_heartbeats(&mut self, effects: &mut Effects) {
        if !(effects.committed.is_empty() && effects.jobs.is_empty() && effects.reads.is_empty()) {
            self.quiet = 0;
        }
        let plain = |m: &Message| m.msg_type == MessageType::MsgHeartbeat && m.context.is_empty();
        let room = self.times.election_ticks >= (2 * QUIET_BEATS + 1) * self.times.heartbeat_ticks;
        if self.quiet < QUIET_TICKS || !room || !effects.messages.iter().any(plain) {
            return;
        }
        self.left_out = !self.left_out;
        if self.left_out {
            effects.messages.retain(|m| !plain(m));
        }
    }

    fn notice_lead(&mut self, effects: &mut Effects) {
        let raft = &self.raw.raft;
        let lead = Lead { leader: raft.leader_id, term: raft.term, here: raft.state == StateRole::Leader };
        if lead != self.lead {
            self.lead = lead;
            effects.lead = Some(lead);
        }
    }

    fn notice_compaction(&mut self, effects: &mut Effects) {
        if !self.lead.here {
            return;
        }
        let progress = self.raw.raft.prs();
        let voters: HashSet<u64> = progress.conf().voters().ids().iter().collect();
        let slowest = progress.iter().filter(|(id, _)| voters.contains(id)).map(|(_, p)| p.matched).min().unwrap_or(0);
        let through = slowest.min(self.applied).saturating_sub(KEEP);
        if through >= self.raw.store().first().max(self.proposed_compaction) + COMPACT_STEP {
            self.proposed_compaction = through;
            effects.compactable = Some(through);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::log::{Disk, Opened};

    const TIMES: Times = Times { election_ticks: 10, heartbeat_ticks: 2 };

    /// A member whose disk is driven by hand.
    struct Bench {
        node: Node,
        disk: Opened,
        jobs: Vec<Job>,
        _dir: tempfile::TempDir,
    }

    fn bench(voters: &[u64]) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(&dir.path().join("raft.redb")).unwrap();
        let node = Node::new(1, Log::new(&disk, voters.to_vec()), 0, TIMES).unwrap();
        Bench { node, disk, jobs: Vec::new(), _dir: dir }
    }

    impl Bench {
        fn step(&mut self, inputs: Inputs, ticks: usize) -> Effects {
            let inputs = Inputs { applied: self.node.applied.max(inputs.applied), ..inputs };
            let mut effects = self.node.step(inputs, ticks);
            self.jobs.append(&mut effects.jobs);
            effects
        }
        /// Lets the disk do all that waits and tells the node.
        fn persist(&mut self) -> Effects {
            let mut persisted = 0;
            for job in self.jobs.drain(..) {
                self.disk.disk.write(&job.entries, job.hard_state.as_ref(), job.truncated).unwrap();
                persisted = job.number.max(persisted);
            }
            self.step(Inputs { persisted, ..Inputs::default() }, 0)
        }
        fn hears(&mut self, message: Message) -> Effects {
            self.step(Inputs { bulk: [message].into(), ..Inputs::default() }, 0)
        }
    }

    fn message(kind: MessageType, term: u64) -> Message {
        Message { msg_type: kind, from: 2, to: 1, term, ..Message::default() }
    }

    fn append(term: u64, index: u64, commit: u64) -> Message {
        let mut entry = Entry::default();
        (entry.term, entry.index, entry.data) = (term, index, Bytes::from_static(b"batch"));
        let log_term = if index > 1 { term } else { 0 };
        let entries = vec![entry].into();
        Message { index: index - 1, log_term, commit, entries, ..message(MessageType::MsgAppend, term) }
    }

    /// Lets the others vote for this member, and commits its first entry.
    fn elect(bench: &mut Bench) {
        let wait = bench.node.ticks_to_wait();
        bench.step(Inputs::default(), wait);
        bench.persist();
        bench.hears(message(MessageType::MsgRequestPreVoteResponse, 1));
        bench.persist();
        bench.hears(message(MessageType::MsgRequestVoteResponse, 1));
        assert!(bench.node.lead.here);
        bench.persist();
        bench.hears(Message { index: 1, ..message(MessageType::MsgAppendResponse, 1) });
        bench.step(Inputs { applied: 1, ..Inputs::default() }, 0);
    }

    fn kinds(messages: &[Message]) -> Vec<MessageType> {
        messages.iter().map(|m| m.msg_type).collect()
    }

    #[test]
    fn a_single_member_leads_at_once_and_commits_what_is_on_its_disk() {
        let mut one = bench(&[1]);
        let effects = one.step(Inputs::default(), 0);
        assert!(effects.lead.unwrap().here && effects.committed.is_empty());
        assert_eq!(one.persist().committed.len(), 1, "the entry of a new leader");
        let proposals = [Bytes::from_static(b"a")].into();
        let effects = one.step(Inputs { proposals, applied: 1, ..Inputs::default() }, 0);
        assert!(effects.committed.is_empty(), "nothing is applied before it is on disk");
        assert_eq!(one.persist().committed[0].data, "a");
    }

    #[test]
    fn a_follower_acknowledges_only_what_is_on_disk() {
        let mut follower = bench(&[1, 2, 3]);
        let effects = follower.hears(append(1, 1, 1));
        assert!(effects.messages.is_empty() && effects.committed.is_empty());
        let [job] = &follower.jobs[..] else { panic!("one write, not {:?}", follower.jobs) };
        assert_eq!((job.entries.len(), job.hard_state.as_ref().unwrap().term), (1, 1), "entries and term together");
        assert_eq!(kinds(&job.messages), [MessageType::MsgAppendResponse]);
        assert_eq!(follower.persist().committed.len(), 1);
    }

    #[test]
    fn a_vote_leaves_only_after_it_is_on_disk() {
        let mut voter = bench(&[1, 2, 3]);
        let effects = voter.hears(message(MessageType::MsgRequestVote, 5));
        assert!(effects.messages.is_empty());
        assert_eq!(kinds(&voter.jobs[0].messages), [MessageType::MsgRequestVoteResponse]);
        assert_eq!(voter.jobs[0].hard_state.as_ref().unwrap().vote, 2);
    }

    #[test]
    fn a_heartbeat_is_answered_while_entries_are_on_their_way_to_disk_but_never_before_its_term_is() {
        let mut follower = bench(&[1, 2, 3]);
        let effects = follower.hears(message(MessageType::MsgHeartbeat, 1));
        assert!(effects.messages.is_empty(), "term 1 is not on disk");
        follower.persist();
        follower.hears(append(1, 1, 0));
        let effects = follower.hears(message(MessageType::MsgHeartbeat, 1));
        assert_eq!(kinds(&effects.messages), [MessageType::MsgHeartbeatResponse]);
    }

    #[test]
    fn an_idle_member_writes_nothing() {
        let mut leader = bench(&[1]);
        leader.step(Inputs::default(), 0);
        leader.persist();
        let mut follower = bench(&[1, 2, 3]);
        follower.hears(append(1, 1, 0));
        follower.persist();
        // The commit index moves with the next heartbeat, which is no reason to write either.
        follower.hears(Message { commit: 1, ..message(MessageType::MsgHeartbeat, 1) });
        for _ in 0..100 {
            leader.step(Inputs::default(), 1);
            follower.step(Inputs::default(), 1);
            follower.hears(message(MessageType::MsgHeartbeat, 1));
        }
        assert!(leader.jobs.is_empty() && follower.jobs.is_empty());
        let effects = follower.step(Inputs { log_commit: true, ..Inputs::default() }, 0);
        assert!(effects.messages.is_empty());
        assert_eq!(follower.jobs[0].hard_state.as_ref().unwrap().commit, 1, "the state asked for it");
    }

    #[test]
    fn a_quiet_leader_leaves_out_every_other_heartbeat_but_no_question() {
        let mut leader = bench(&[1, 2, 3]);
        let beats = |ticks: usize, bench: &mut Bench| {
            let mut sent = || {
                bench.hears(message(MessageType::MsgHeartbeatResponse, 1));
                kinds(&bench.step(Inputs::default(), 1).messages)
            };
            (0..ticks).filter(|_| sent().contains(&MessageType::MsgHeartbeat)).count()
        };
        elect(&mut leader);
        assert_eq!(beats(8, &mut leader), 4);
        leader.node.quiet = QUIET_TICKS;
        assert_eq!(beats(8, &mut leader), 2);
        let read = Some(b"question".to_vec());
        let effects = leader.step(Inputs { read, ..Inputs::default() }, 0);
        assert_eq!(kinds(&effects.messages), [MessageType::MsgHeartbeat; 2]);
        assert_eq!(beats(8, &mut leader), 4, "the question ended the quiet");
    }

    #[test]
    fn ticks_that_do_nothing_need_no_waking() {
        let mut follower = bench(&[1, 2, 3]);
        follower.hears(message(MessageType::MsgHeartbeat, 1));
        follower.persist();
        let wait = follower.node.ticks_to_wait();
        assert!((TIMES.election_ticks..2 * TIMES.election_ticks).contains(&wait), "{wait}");
        follower.step(Inputs::default(), wait - 1);
        assert_eq!(follower.node.ticks_to_wait(), 1);
        // A heartbeat that lies there when the last tick comes is heard first.
        let urgent = [message(MessageType::MsgHeartbeat, 1)].into();
        let effects = follower.step(Inputs { urgent, ..Inputs::default() }, 1);
        assert_eq!(kinds(&effects.messages), [MessageType::MsgHeartbeatResponse]);
        let wait = follower.node.ticks_to_wait();
        follower.step(Inputs::default(), wait);
        assert!(follower.node.lead.leader == 0, "the leader is given up on time");
    }

    #[test]
    fn a_leader_that_shall_not_lead_asks_the_furthest_follower_at_once() {
        let mut leader = bench(&[1, 2, 3]);
        elect(&mut leader);
        let last = leader.node.raw.raft.raft_log.last_index();
        let term = leader.node.raw.raft.term;
        leader.hears(Message { from: 3, index: last, ..message(MessageType::MsgAppendResponse, term) });
        let effects = leader.step(Inputs { hand_over: true, ..Inputs::default() }, 0);
        let asked: Vec<_> = effects.messages.iter().filter(|m| m.msg_type == MessageType::MsgTimeoutNow).collect();
        assert_eq!(asked.iter().map(|m| m.to).collect::<Vec<_>>(), [3]);
        let mut follower = bench(&[1, 2, 3]);
        assert!(follower.step(Inputs { hand_over: true, ..Inputs::default() }, 0).messages.is_empty());
    }

    #[test]
    fn a_follower_does_not_propose() {
        let mut follower = bench(&[1, 2, 3]);
        follower.hears(message(MessageType::MsgHeartbeat, 1));
        follower.persist();
        let proposals = [Bytes::from_static(b"a")].into();
        let effects = follower.step(Inputs { proposals, ..Inputs::default() }, 0);
        assert!(effects.messages.is_empty() && follower.jobs.is_empty());
    }
}
