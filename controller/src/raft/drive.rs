//! The raft loop's thread: brings inputs and ticks to the node, and its effects to those who act on them.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use ::raft::eraftpb::Entry;
use izar_common::events;
use izar_common::vitals::Vital;
use tokio::sync::watch;

use super::inbox::Inbox;
use super::net::Net;
use super::node::{Effects, Lead, Node};
use super::reads::{self, Answer};
use super::writer::Job;
use super::{Leadership, Member};

/// What the loop works with.
pub struct Loop {
    pub me: u64,
    pub tick: Duration,
    pub members: Vec<Member>,
    pub inbox: Arc<Inbox>,
    pub net: Arc<Net>,
    pub jobs: SyncSender<Job>,
    pub committed: SyncSender<Vec<Entry>>,
    pub leadership: watch::Sender<Leadership>,
    pub answers: watch::Sender<Answer>,
    pub compactable: watch::Sender<u64>,
}

impl Loop {
    /// Runs until the inbox says to stop; what must still be written is then with the writer.
    pub fn run(self, mut node: Node) {
        let vital = Vital::new("raft");
        let mut last = Instant::now();
        loop {
            let wait = node.ticks_to_wait();
            vital.promise(self.tick * wait as u32);
            let inputs = self.inbox.take(last + self.tick * wait as u32);
            let stop = inputs.shutdown;
            let passed = last.elapsed().as_nanos() / self.tick.as_nanos();
            let ticks = passed.min(wait as u128) as u32;
            // After a pause ticks are not made up for: it is enough to be slow once.
            last = if passed > u128::from(ticks) { Instant::now() } else { last + self.tick * ticks };
            let effects = node.step(inputs, ticks as usize);
            self.act(effects);
            if stop {
                if let Some(job) = node.last_job() {
                    self.submit(job);
                }
                return;
            }
        }
    }

    fn act(&self, effects: Effects) {
        self.net.send(effects.messages, &self.inbox);
        for job in effects.jobs {
            self.submit(job);
        }
        if !effects.committed.is_empty() {
            self.committed.send(effects.committed).expect("the applier ends after this loop");
        }
        if let Some(answer) = reads::newest(self.me, &effects.reads) {
            self.answers.send_replace(answer);
        }
        if let Some(lead) = effects.lead {
            self.tell(lead);
        }
        if let Some(through) = effects.compactable {
            self.compactable.send_replace(through);
        }
    }

    fn submit(&self, job: Job) {
        self.jobs.send(job).expect("the writer ends after this loop");
    }

    fn tell(&self, lead: Lead) {
        let member = self.members.iter().find(|member| member.id == lead.leader);
        let leader = member.map(|member| member.node.clone());
        log::info!(message_id = events::LEADER_CHANGED, leader = leader.as_ref().map_or("none", |node| node.as_str()), term = lead.term; "the leader changed");
        self.leadership.send_replace(Leadership { leader, term: lead.term, here: lead.here });
    }
}
