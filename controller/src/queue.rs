//! What waits for a place in a worker's batch: one queue for each deployment in each controller.
//!
//! The most urgent class first, and of every `BATCH_EVERY` dispatches one of class `Batch`, so that it does not starve.
//! Within a class tenants share by weight, by virtual time over tokens (start-time fair queueing, Goyal et al. 1996): a
//! tenant that was idle begins where the others are and gains nothing by it. Within a tenant the earliest deadline comes
//! first. What cannot be in time is refused when it comes, rather than computed for nobody.
//!
//! Pure: times come in as arguments. Soft state: a controller that dies loses no more than who waited. Never knows what
//! a request says.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use izar_common::chat::Class;
use izar_common::id::TenantId;

pub mod estimate;
mod lane;
mod outlook;
#[cfg(test)]
mod tests;

use estimate::{Estimate, Guess, Lesson, Size};
use lane::{Entry, Key, Lane, Line, Sum};
use outlook::{Other, Outlook, Sight};

/// Entries that wait for one deployment at most. Half of the turns that a controller has by default (`limits.turns`),
/// so that one deployment cannot take them all; at a few KiB each they hold some megabytes.
pub const ENTRIES: usize = 2048;
/// Those of one tenant at most: a tenant alone leaves half of the room to others, who then displace nobody.
pub const TENANT_ENTRIES: usize = ENTRIES / 2;

/// Of so many dispatches one is of class `Batch` while any of it waits.
pub const BATCH_EVERY: u32 = 10;

/// The whole answer of an urgent request: the class is for what is of no use later.
pub const URGENT_WITHIN: Duration = Duration::from_millis(200);
/// How long others wait at most. Somebody reads along: after two minutes nobody does. Batches have time, but a
/// connection without a byte lives no longer than that.
pub const INTERACTIVE_WAIT: Duration = Duration::from_secs(120);
pub const BATCH_WAIT: Duration = Duration::from_secs(600);

/// What is kept of a deadline for the way back to the client.
pub const WAY_BACK: Duration = Duration::from_millis(5);
/// Expected waiting is taken so many times: what comes later may pass who waits, and jobs are longer than expected.
const CAUTION: f64 = 1.25;
/// A job that has run for longer than expected is expected to take this part of the time that it has run more.
const OVERDUE: f64 = 0.1;
/// A tenant counts as sharing so long after it has asked for the last time.
const SHARES: Duration = Duration::from_secs(1);
/// The longest time after which anybody is told to try again; what is further away is not known.
const RETRY_MOST: Duration = Duration::from_secs(600);

/// Names what waits or runs.
pub type Ticket = u64;

/// What is known of a newcomer.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    pub class: Class,
    pub tenant: TenantId,
    /// The tenant's share against others'; at least 1.
    pub weight: u32,
    /// When the whole answer must be there.
    pub deadline: Option<Instant>,
    pub size: Size,
}

/// What the workers of a deployment have room for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Ready ones.
    pub replicas: u32,
    /// Jobs that may be sent: to places in batches, and a few more, so that no worker waits for the next.
    pub free: u32,
    /// Jobs more, for urgent requests alone.
    pub reserve: u32,
    /// Urgent jobs that may run at once.
    pub urgent: u32,
}

/// What becomes of a newcomer.
#[derive(Debug, Clone, PartialEq)]
pub enum Offer {
    Dispatched(Ticket),
    /// A verdict will follow. `ahead`: entries of its class and of more urgent ones.
    Waits {
        ticket: Ticket,
        ahead: u32,
    },
    Refused(Refusal),
}

/// What becomes of who waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Dispatched,
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The queue is full.
    Full,
    /// The tenant's part of it is.
    TenantFull,
    /// Another tenant, which has less than its share, needed the room.
    Displaced,
    /// It would wait, or has waited, longer than anybody shall.
    Wait,
    /// The answer would not be whole by the deadline.
    Deadline,
    /// No worker is left to compute it.
    Nobody,
}

impl Why {
    pub fn as_str(self) -> &'static str {
        match self {
            Why::Full => "queue_full",
            Why::TenantFull => "tenant_full",
            Why::Displaced => "displaced",
            Why::Wait => "wait",
            Why::Deadline => "deadline",
            Why::Nobody => "nobody",
        }
    }
}

/// A refusal and what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub why: Why,
    /// When such a request would be taken if nobody else came.
    pub retry_after: Duration,
    /// How long the answer would have taken, waiting included.
    pub expected: Duration,
}

/// A tenant among those that share.
#[derive(Debug)]
struct Account {
    weight: f64,
    /// Virtual time: tokens by weight that it has had.
    start: f64,
    /// Entries that wait.
    waits: u32,
    seen: Instant,
}

/// What was dispatched and has not ended.
#[derive(Debug)]
struct Running {
    ask: Ask,
    guess: Guess,
    begun: Instant,
    /// Jobs on each replica when it was dispatched, its own included.
    load: f64,
    /// Its jobs are on workers, and counted there.
    placed: bool,
    /// The period in which its tenant was charged for it.
    charged: Option<u64>,
}

impl Running {
    /// Seconds until it ends, as expected.
    fn left_s(&self, now: Instant) -> f64 {
        let ran = (now - self.begun).as_secs_f64();
        (self.guess.seconds - ran).max(OVERDUE * ran)
    }
}

/// The queue of one deployment.
#[derive(Debug, Default)]
pub struct Queue {
    tickets: Ticket,
    lanes: [Lane; 3],
    spots: HashMap<Ticket, (Class, TenantId, Key)>,
    /// When each entry must have been dispatched.
    start_by: BTreeSet<(Instant, Ticket)>,
    accounts: BTreeMap<TenantId, Account>,
    /// Where tenants begin that come now.
    virtual_time: f64,
    /// When somebody waited for the last time, and how often that began anew.
    contended: Option<Instant>,
    period: u64,
    /// Dispatches since one of class `Batch`, while any of it waits.
    passed_batch: u32,
    running: HashMap<Ticket, Running>,
    /// Jobs of all that run; those of them that no worker counts yet; urgent ones.
    jobs: u32,
    unplaced: u32,
    urgent: u32,
    /// Seconds of work dispatched of late, by class.
    work: [f64; 3],
    estimate: Estimate,
    verdicts: Vec<(Ticket, Verdict)>,
}

impl Queue {
    /// Entries that wait.
    pub fn len(&self) -> usize {
        self.spots.len()
    }
    pub fn is_empty(&self) -> bool {
        self.spots.is_empty()
    }
    /// Whether nobody waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.is_empty() && self.running.is_empty()
    }
    /// Entries of a class that wait.
    pub fn waiting(&self, class: Class) -> u32 {
        self.lanes[class as usize].sum().entries
    }
    /// What has become of those that waited, since this was asked for the last time. Each is named once.
    pub fn verdicts(&mut self) -> Vec<(Ticket, Verdict)> {
        std::mem::take(&mut self.verdicts)
    }
    /// When to call `turn` again at the latest.
    pub fn due(&self) -> Option<Instant> {
        self.start_by.first().map(|(at, _)| *at)
    }

    /// Takes a newcomer, or refuses it.
    pub fn offer(&mut self, ask: Ask, room: Room, now: Instant) -> Offer {
        let guess = self.estimate.guess(ask.size, self.load(&room));
        let free = room.free.saturating_sub(self.unplaced);
        let at_once = match ask.class {
            Class::Urgent => self.lanes[Class::Urgent as usize].is_empty() && self.urgent_fits(&ask, free, &room),
            _ => self.is_empty() && free > 0,
        };
        if at_once {
            let late = ask.deadline.is_some_and(|deadline| now + seconds(guess.most) + WAY_BACK > deadline);
            if late && !self.estimate.is_stale(now) {
                return Offer::Refused(self.refusal(Why::Deadline, &ask, &guess, 0.0, &room, now));
            }
            self.tickets += 1;
            let ticket = self.tickets;
            self.start(ticket, ask, guess, &room, now);
            return Offer::Dispatched(ticket);
        }
        self.queue_up(ask, guess, room, now)
    }

    fn queue_up(&mut self, ask: Ask, guess: Guess, room: Room, now: Instant) -> Offer {
        let entry = Entry { ticket: self.tickets + 1, arrived: now, start_by: start_by(&ask, &guess, now), ask, guess };
        let (wait_s, refused) = self.look_ahead(&entry, &room, now);
        let refused = refused.or_else(|| self.make_room(&entry, &room, now).err());
        if let Some(why) = refused {
            return Offer::Refused(self.refusal(why, &entry.ask, &guess, wait_s, &room, now));
        }
        let ticket = entry.ticket;
        self.tickets = ticket;
        self.contend(now);
        let (virtual_time, class) = (self.virtual_time, entry.ask.class);
        let account = self.account(&entry.ask, now);
        if account.waits == 0 {
            account.start = account.start.max(virtual_time);
        }
        account.waits += 1;
        self.spots.insert(ticket, (class, entry.ask.tenant.clone(), entry.key()));
        self.start_by.insert((entry.start_by, ticket));
        let ahead = Class::ALL.iter().filter(|above| **above <= class).map(|above| self.waiting(*above)).sum();
        self.lanes[class as usize].put(entry);
        Offer::Waits { ticket, ahead }
    }

    /// Lets who waits go. Who has a verdict has none to give back.
    pub fn leave(&mut self, ticket: Ticket) {
        if self.spots.contains_key(&ticket) {
            self.take(ticket);
        }
    }

    /// Says that the jobs of who was dispatched are counted by workers.
    pub fn placed(&mut self, ticket: Ticket) {
        if let Some(running) = self.running.get_mut(&ticket).filter(|running| !running.placed) {
            running.placed = true;
            self.unplaced -= running.ask.size.choices;
        }
    }

    /// Takes the end of who was dispatched; there is a lesson if it ran to its end undisturbed.
    pub fn ended(&mut self, ticket: Ticket, lesson: Option<Lesson>, now: Instant) {
        self.placed(ticket);
        let Some(running) = self.running.remove(&ticket) else { return };
        let Running { ask, guess, load, charged, .. } = running;
        self.jobs -= ask.size.choices;
        if ask.class == Class::Urgent {
            self.urgent -= ask.size.choices;
        }
        let Some(lesson) = lesson else { return };
        self.estimate.learn(ask.size, load, guess.raw, &lesson, now);
        if charged == Some(self.period)
            && let Some(account) = self.accounts.get_mut(&ask.tenant)
        {
            let tokens = f64::from(ask.size.prompt_tokens) + f64::from(lesson.answer_tokens);
            account.start += (tokens - guess.tokens) / account.weight;
        }
    }

    /// Gives verdicts: refuses who can no longer be in time, and dispatches whom there is room for.
    pub fn turn(&mut self, room: Room, now: Instant) {
        while let Some(&(at, ticket)) = self.start_by.first()
            && at < now
        {
            let entry = self.take(ticket);
            let why = if entry.start_by < entry.arrived + longest_wait(&entry.ask, &entry.guess) {
                Why::Deadline
            } else {
                Why::Wait
            };
            // What it would meet if it came anew.
            let again = Entry { arrived: now, ..entry.clone() };
            let (wait_s, _) = self.look_ahead(&again, &room, now);
            let ask =
                Ask { deadline: entry.ask.deadline.map(|deadline| now + (deadline - entry.arrived)), ..entry.ask };
            let refusal = self.refusal(why, &ask, &entry.guess, wait_s, &room, now);
            self.verdicts.push((ticket, Verdict::Refused(refusal)));
        }
        if !self.is_empty() {
            self.contend(now);
        }
        while let Some(ticket) = self.next(&room) {
            let entry = self.take(ticket);
            self.start(ticket, entry.ask, entry.guess, &room, now);
            self.verdicts.push((ticket, Verdict::Dispatched));
        }
    }

    /// Refuses everybody that waits: there is nobody to compute it.
    pub fn refuse_all(&mut self, why: Why) {
        let mut all: Vec<Ticket> = self.spots.keys().copied().collect();
        all.sort_unstable();
        for ticket in all {
            self.take(ticket);
            let refusal = Refusal { why, retry_after: Duration::from_secs(1), expected: Duration::ZERO };
            self.verdicts.push((ticket, Verdict::Refused(refusal)));
        }
    }

    /// Chooses who is dispatched next, if there is room for anybody.
    fn next(&self, room: &Room) -> Option<Ticket> {
        let free = room.free.saturating_sub(self.unplaced);
        if let Some(entry) = self.first(Class::Urgent)
            && self.urgent_fits(&entry.ask, free, room)
        {
            return Some(entry.ticket);
        }
        if free == 0 {
            return None;
        }
        let batch = self.first(Class::Batch);
        let turn_of_batch = self.passed_batch + 1 >= BATCH_EVERY;
        match self.first(Class::Interactive) {
            Some(entry) if batch.is_none() || !turn_of_batch => Some(entry.ticket),
            _ => batch.map(|entry| entry.ticket),
        }
    }

    /// The first entry of the tenant that has had the least by its weight.
    fn first(&self, class: Class) -> Option<&Entry> {
        let start = |tenant: &TenantId| self.accounts[tenant].start;
        let lines = self.lanes[class as usize].lines();
        lines.min_by(|a, b| start(a.0).total_cmp(&start(b.0)))?.1.first()
    }

    fn urgent_fits(&self, ask: &Ask, free: u32, room: &Room) -> bool {
        free + room.reserve > 0 && (self.urgent == 0 || self.urgent + ask.size.choices <= room.urgent)
    }

    /// Takes an entry out of the queue.
    fn take(&mut self, ticket: Ticket) -> Entry {
        let (class, tenant, key) = self.spots.remove(&ticket).expect("an entry that waits has a spot");
        let entry = self.lanes[class as usize].take(&tenant, &key);
        self.start_by.remove(&(entry.start_by, ticket));
        self.accounts.get_mut(&tenant).expect("who waits has an account").waits -= 1;
        entry
    }

    /// Notes a dispatch.
    fn start(&mut self, ticket: Ticket, ask: Ask, guess: Guess, room: &Room, now: Instant) {
        let load = self.load(room);
        let contended = self.contended.is_some_and(|last| last + SHARES > now);
        let charged = contended.then_some(self.period);
        if contended {
            let account = self.account(&ask, now);
            account.start += guess.tokens / account.weight;
            let waiting = self.accounts.values().filter(|account| account.waits > 0);
            let least = waiting.map(|account| account.start).min_by(f64::total_cmp);
            self.virtual_time = self.virtual_time.max(least.unwrap_or(0.0));
        }
        match ask.class {
            _ if self.lanes[Class::Batch as usize].is_empty() => self.passed_batch = 0,
            Class::Batch => self.passed_batch = 0,
            _ => self.passed_batch += 1,
        }
        if ask.class == Class::Urgent {
            self.urgent += ask.size.choices;
        }
        self.jobs += ask.size.choices;
        self.unplaced += ask.size.choices;
        for (class, work) in self.work.iter_mut().enumerate() {
            // The last hundred or so count.
            *work = 0.99 * *work + if class == ask.class as usize { guess.seconds } else { 0.0 };
        }
        self.running.insert(ticket, Running { ask, guess, begun: now, load, placed: false, charged });
    }

    /// The tenant's account, made where the others are.
    fn account(&mut self, ask: &Ask, now: Instant) -> &mut Account {
        let start = self.virtual_time;
        if !self.accounts.contains_key(&ask.tenant) {
            // Who has nothing to wait for and owes nothing need not be remembered.
            self.accounts
                .retain(|_, account| account.waits > 0 || account.start > start || account.seen + SHARES > now);
        }
        let weight = f64::from(ask.weight.max(1));
        let new = || Account { weight, start, waits: 0, seen: now };
        let account = self.accounts.entry(ask.tenant.clone()).or_insert_with(new);
        (account.weight, account.seen) = (weight, now);
        account
    }

    /// Notes that somebody waits. After a time in which nobody did all debts are forgotten: what was dispatched then took
    /// nothing from anybody.
    fn contend(&mut self, now: Instant) {
        if self.is_empty() && self.contended.is_none_or(|last| last + SHARES <= now) {
            self.accounts.clear();
            (self.virtual_time, self.period) = (0.0, self.period + 1);
        }
        self.contended = Some(now);
    }

    /// Jobs on each replica, one more included.
    fn load(&self, room: &Room) -> f64 {
        f64::from(self.jobs + 1) / f64::from(room.replicas.max(1))
    }

    /// Says how long a newcomer would wait, in seconds, and why it must not: it would be late itself, or make others of
    /// its tenant late.
    fn look_ahead(&self, entry: &Entry, room: &Room, now: Instant) -> (f64, Option<Why>) {
        let ask = &entry.ask;
        let outlook = self.outlook(entry, room, now);
        let line = self.lanes[ask.class as usize].line(&ask.tenant);
        let ahead = line.map_or(Sum::default(), |line| line.ahead(&entry.key()));
        let wait_s = outlook.wait_s(ahead);
        let by = |wait_s: f64, most: f64| now + seconds(wait_s * CAUTION + most) + WAY_BACK;
        if ask.deadline.is_some_and(|deadline| by(wait_s, entry.guess.most) > deadline) {
            return (wait_s, Some(Why::Deadline));
        }
        if seconds(wait_s) > longest_wait(ask, &entry.guess) {
            return (wait_s, Some(Why::Wait));
        }
        let Some(line) = line else { return (wait_s, None) };
        let (mut before, new) = (ahead, Sum::of(ask, &entry.guess));
        for later in line.entries().skip(ahead.entries as usize) {
            let mut with = before;
            with.add(new);
            let late = |own: Sum, deadline: Instant| by(outlook.wait_s(own), later.guess.most) > deadline;
            if later.ask.deadline.is_some_and(|deadline| late(with, deadline) && !late(before, deadline)) {
                return (wait_s, Some(Why::Deadline));
            }
            before.add(Sum::of(&later.ask, &later.guess));
        }
        (wait_s, None)
    }

    fn outlook(&self, entry: &Entry, room: &Room, now: Instant) -> Outlook {
        let (ask, class) = (&entry.ask, entry.ask.class as usize);
        let mut ends = vec![0.0; room.free.saturating_sub(self.unplaced) as usize];
        for running in self.running.values() {
            let left = running.left_s(now);
            ends.extend((0..running.ask.size.choices).map(|_| left));
        }
        let mut above = Sum::default();
        self.lanes[..class].iter().for_each(|lane| above.add(lane.sum()));
        let all: f64 = self.work.iter().sum();
        let batch = self.lanes[Class::Batch as usize].sum();
        let takes_turns = ask.class == Class::Interactive && batch.entries > 0;
        let shares = |account: &Account| account.waits > 0 || account.seen + SHARES > now;
        let others = self.accounts.iter().filter(|(tenant, account)| **tenant != ask.tenant && shares(account));
        let other = |account: &Account| Other {
            start: account.start.max(self.virtual_time),
            weight: account.weight,
            waits: account.waits > 0,
        };
        let mut of_class = self.lanes[class].sum();
        of_class.add(Sum::of(ask, &entry.guess));
        let own = self.accounts.get(&ask.tenant).map_or(0.0, |account| account.start);
        Outlook::new(Sight {
            ends,
            above_part: if all > 0.0 { self.work[..class].iter().sum::<f64>() / all } else { 0.0 },
            above,
            batch_s: takes_turns.then(|| batch.seconds / f64::from(batch.jobs)),
            start: own.max(self.virtual_time),
            weight: f64::from(ask.weight.max(1)),
            others: others.map(|(_, account)| other(account)).collect(),
            class: of_class,
        })
    }

    /// Sees to it that there is room for one more: a less urgent entry of the same tenant goes, or the newest of the
    /// tenant that is most over its share.
    fn make_room(&mut self, entry: &Entry, room: &Room, now: Instant) -> Result<(), Why> {
        let Some(displaced) = self.victim(&entry.ask)? else { return Ok(()) };
        let gone = self.take(displaced);
        let wait_s = self.look_ahead(&gone, room, now).0;
        let refusal = self.refusal(Why::Displaced, &gone.ask, &gone.guess, wait_s, room, now);
        self.verdicts.push((displaced, Verdict::Refused(refusal)));
        Ok(())
    }

    fn victim(&self, ask: &Ask) -> Result<Option<Ticket>, Why> {
        let own = self.accounts.get(&ask.tenant).map_or(0, |account| account.waits);
        let own_full = own as usize >= TENANT_ENTRIES;
        if !own_full && self.len() < ENTRIES {
            return Ok(None);
        }
        let newest = |tenant: &TenantId, least: usize| {
            let lines = self.lanes[least..].iter().rev().filter_map(|lane| lane.line(tenant));
            lines.filter_map(Line::newest).next().map(|entry| entry.ticket)
        };
        if let Some(own) = newest(&ask.tenant, ask.class as usize + 1) {
            return Ok(Some(own));
        }
        if own_full {
            return Err(Why::TenantFull);
        }
        let over = |account: &Account| f64::from(account.waits) / account.weight;
        let most = self.accounts.iter().max_by(|a, b| over(a.1).total_cmp(&over(b.1)));
        let (tenant, account) = most.expect("a full queue has tenants");
        let more = over(account) > f64::from(own + 1) / f64::from(ask.weight.max(1));
        if more { Ok(newest(tenant, 0)) } else { Err(Why::Full) }
    }

    fn refusal(&self, why: Why, ask: &Ask, guess: &Guess, wait_s: f64, room: &Room, now: Instant) -> Refusal {
        let left_s = ask.deadline.map(|deadline| deadline.saturating_duration_since(now + WAY_BACK).as_secs_f64());
        let retry_s = match (why, left_s) {
            // Once so much less is ahead.
            (Why::Deadline, Some(left_s)) if guess.most <= left_s => wait_s * CAUTION + guess.most - left_s,
            // Not as long as anything runs beside it; then it may be faster.
            (Why::Deadline, _) => self.drained_s(room, now),
            (Why::Wait, _) => wait_s - longest_wait(ask, guess).as_secs_f64(),
            // A tenth of the queue later there is room for some.
            (Why::Full | Why::TenantFull | Why::Displaced | Why::Nobody, _) => 0.1 * self.drained_s(room, now),
        };
        Refusal {
            why,
            retry_after: seconds(retry_s.max(1.0).ceil()).min(RETRY_MOST),
            expected: seconds(wait_s + guess.seconds),
        }
    }

    /// Seconds until all that runs and waits has ended.
    fn drained_s(&self, room: &Room, now: Instant) -> f64 {
        let left = |running: &Running| running.left_s(now) * f64::from(running.ask.size.choices);
        let running: f64 = self.running.values().map(left).sum();
        let waiting: f64 = self.lanes.iter().map(|lane| lane.sum().seconds).sum();
        (running + waiting) / f64::from((self.jobs + room.free).max(1))
    }
}

/// How long somebody waits at most.
fn longest_wait(ask: &Ask, guess: &Guess) -> Duration {
    match ask.class {
        Class::Urgent => URGENT_WITHIN.saturating_sub(seconds(guess.most)),
        Class::Interactive => INTERACTIVE_WAIT,
        Class::Batch => BATCH_WAIT,
    }
}

fn start_by(ask: &Ask, guess: &Guess, now: Instant) -> Instant {
    let longest = now + longest_wait(ask, guess);
    let in_time = |deadline: Instant| deadline.checked_sub(seconds(guess.seconds) + WAY_BACK).unwrap_or(now);
    ask.deadline.map_or(longest, |deadline| longest.min(in_time(deadline)))
}

fn seconds(s: f64) -> Duration {
    // Beyond a month it is never.
    Duration::from_secs_f64(s.clamp(0.0, 2_592_000.0))
}
