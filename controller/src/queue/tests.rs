//! The queue alone: its order, its bounds, its promises; and under an overload that is played with virtual time.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn size(prompt_tokens: u32, max_tokens: u32) -> Size {
    Size { prompt_tokens, max_tokens, choices: 1 }
}

fn ask(class: Class, tenant: &str) -> Ask {
    let tenant = TenantId::new(tenant).unwrap();
    Ask { class, tenant, weight: 1, deadline: None, size: size(10, 10) }
}

fn room(free: u32) -> Room {
    Room { replicas: 1, free, reserve: 1, urgent: 2 }
}

/// A queue that knows that every job takes 100 ms: 10 for its prompt, 10 for each token.
fn taught(now: Instant) -> Queue {
    let mut queue = Queue::default();
    for load in [1.0, 2.0, 4.0, 8.0].repeat(30) {
        let raw = queue.estimate.guess(size(10, 10), load).raw;
        let lesson = Lesson { answer_tokens: 10, first: 10 * MS, whole: 100 * MS };
        queue.estimate.learn(size(10, 10), load, raw, &lesson, now);
    }
    queue
}

fn waits(queue: &mut Queue, ask: Ask, now: Instant) -> Ticket {
    match queue.offer(ask, room(0), now) {
        Offer::Waits { ticket, .. } => ticket,
        other => panic!("{other:?}"),
    }
}

fn many(queue: &mut Queue, ask: &Ask, count: usize, now: Instant) -> Vec<Ticket> {
    (0..count).map(|_| waits(queue, ask.clone(), now)).collect()
}

fn refused(offer: Offer) -> Refusal {
    match offer {
        Offer::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

/// Dispatches one after the other until nobody waits.
fn drain(queue: &mut Queue, now: Instant) -> Vec<Ticket> {
    let mut order = Vec::new();
    while !queue.is_empty() {
        queue.turn(room(1), now);
        for (ticket, verdict) in queue.verdicts() {
            assert_eq!(verdict, Verdict::Dispatched);
            queue.ended(ticket, None, now);
            order.push(ticket);
        }
    }
    order
}

#[test]
fn who_finds_room_is_dispatched_at_once_and_others_wait() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let offer = queue.offer(ask(Class::Interactive, "a"), room(1), now);
    let Offer::Dispatched(first) = offer else { panic!("{offer:?}") };
    // No worker counts it yet, so the room that is seen is no longer there.
    let second = queue.offer(ask(Class::Interactive, "a"), room(1), now);
    assert_eq!(second, Offer::Waits { ticket: 2, ahead: 0 });
    queue.turn(room(1), now);
    assert_eq!(queue.verdicts(), []);
    queue.placed(first);
    queue.turn(room(1), now);
    assert_eq!(queue.verdicts(), [(2, Verdict::Dispatched)]);
    queue.ended(first, None, now);
    queue.ended(2, None, now);
    assert!(queue.is_idle());
}

#[test]
fn the_most_urgent_class_comes_first_and_a_batch_does_not_starve() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let batches = many(&mut queue, &ask(Class::Batch, "a"), 3, now);
    let others = many(&mut queue, &ask(Class::Interactive, "a"), 25, now);
    let order = drain(&mut queue, now);
    let at = |ticket: &Ticket| order.iter().position(|found| found == ticket).unwrap() + 1;
    assert_eq!(batches.iter().map(at).collect::<Vec<_>>(), [10, 20, 28]);
    assert!(others.is_sorted_by_key(at), "who came first: {order:?}");
}

#[test]
fn of_one_tenant_the_earliest_deadline_comes_first() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let by = |seconds: u64| Ask { deadline: Some(now + 1000 * seconds as u32 * MS), ..ask(Class::Interactive, "a") };
    let [late, soon, none, middle] =
        [by(50), by(2), ask(Class::Interactive, "a"), by(7)].map(|ask| waits(&mut queue, ask, now));
    assert_eq!(drain(&mut queue, now), [soon, middle, none, late]);
}

#[test]
fn tenants_share_by_weight_and_who_was_idle_gains_nothing() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    many(&mut queue, &ask(Class::Interactive, "a"), 60, now);
    let heavy = Ask { weight: 2, ..ask(Class::Interactive, "b") };
    let mut order = Vec::new();
    for round in 0..60 {
        if round == 30 {
            // It was idle while 30 of the other's were dispatched.
            many(&mut queue, &heavy, 60, now);
        }
        queue.turn(room(1), now);
        for (ticket, _) in queue.verdicts() {
            queue.ended(ticket, None, now);
            order.push(ticket);
        }
    }
    let of_b = order[30..].iter().filter(|ticket| **ticket > 60).count();
    assert_eq!((of_b, order.len()), (20, 60), "two of three: {order:?}");
}

#[test]
fn a_tenant_is_charged_what_its_answers_came_to() {
    let (mut queue, now) = (taught(Instant::now()), Instant::now());
    for _ in 0..40 {
        waits(&mut queue, ask(Class::Interactive, "a"), now);
        waits(&mut queue, ask(Class::Interactive, "b"), now);
    }
    let mut of_a = 0;
    for _ in 0..30 {
        queue.turn(room(1), now);
        for (ticket, _) in queue.verdicts() {
            let a = ticket % 2 == 1;
            of_a += u32::from(a);
            // Those of `a` turn out twice as long.
            let lesson = Lesson { answer_tokens: if a { 30 } else { 10 }, first: 10 * MS, whole: 100 * MS };
            queue.ended(ticket, Some(lesson), now);
        }
    }
    assert!((9..=11).contains(&of_a), "40 tokens each against 20: {of_a} of 30");
}

#[test]
fn a_full_queue_refuses_and_says_when_there_is_room() {
    let now = Instant::now();
    let mut queue = taught(now);
    for tenant in ["a", "b"] {
        many(&mut queue, &ask(Class::Batch, tenant), TENANT_ENTRIES, now);
        let full = refused(queue.offer(ask(Class::Batch, tenant), room(0), now));
        assert_eq!(full.why, Why::TenantFull);
        assert!(full.retry_after >= Duration::from_secs(1), "{full:?}");
    }
    assert_eq!(queue.len(), ENTRIES);
    // Both have half; a third one has less than either.
    let third = queue.offer(ask(Class::Batch, "c"), room(0), now);
    assert!(matches!(third, Offer::Waits { .. }), "{third:?}");
    let [(displaced, Verdict::Refused(refusal))] = queue.verdicts()[..] else { panic!("one is displaced") };
    assert_eq!(refusal.why, Why::Displaced);
    assert!([TENANT_ENTRIES, ENTRIES].contains(&(displaced as usize)), "the newest of a tenant: {displaced}");
    assert_eq!(queue.len(), ENTRIES);
}

#[test]
fn a_more_urgent_request_displaces_the_same_tenants_newest_batch() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let tickets = many(&mut queue, &ask(Class::Batch, "a"), TENANT_ENTRIES, now);
    waits(&mut queue, ask(Class::Interactive, "a"), now);
    let [(displaced, Verdict::Refused(refusal))] = queue.verdicts()[..] else { panic!("one is displaced") };
    assert_eq!((displaced, refusal.why), (*tickets.last().unwrap(), Why::Displaced));
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused_at_once() {
    let now = Instant::now();
    let mut queue = taught(now);
    let by = |ms: u32| Ask { deadline: Some(now + ms * MS), ..ask(Class::Interactive, "a") };
    let alone = refused(queue.offer(by(50), room(4), now));
    assert_eq!((alone.why, alone.retry_after), (Why::Deadline, Duration::from_secs(1)));
    assert!(alone.expected >= 90 * MS && alone.expected <= 110 * MS, "{alone:?}");
    assert!(matches!(queue.offer(by(150), room(4), now), Offer::Dispatched(_)));
    // 40 jobs of 100 ms wait for the one place: four seconds, and some caution.
    many(&mut queue, &ask(Class::Interactive, "a"), 40, now);
    let behind = refused(queue.offer(Ask { deadline: Some(now + 11_000 * MS), ..by(0) }, room(0), now + 9_000 * MS));
    assert_eq!(behind.why, Why::Deadline);
    assert!((2..=5).contains(&behind.retry_after.as_secs()), "{behind:?}");
    assert!(matches!(queue.offer(by(9_000), room(0), now), Offer::Waits { .. }));
}

#[test]
fn what_is_known_becomes_stale_and_one_is_let_through() {
    let now = Instant::now();
    let mut queue = taught(now);
    let later = now + Duration::from_secs(11);
    let hasty = Ask { deadline: Some(later + 50 * MS), ..ask(Class::Interactive, "a") };
    assert!(matches!(queue.offer(hasty.clone(), room(4), later), Offer::Dispatched(_)));
    assert_eq!(refused(queue.offer(hasty, room(4), later)).why, Why::Deadline);
}

#[test]
fn who_can_no_longer_be_in_time_is_refused_then() {
    let now = Instant::now();
    let mut queue = taught(now);
    let ticket = waits(&mut queue, Ask { deadline: Some(now + 500 * MS), ..ask(Class::Interactive, "a") }, now);
    let due = queue.due().unwrap();
    assert!(due > now + 300 * MS && due < now + 420 * MS, "a job takes 100 ms: {:?}", due - now);
    queue.turn(room(0), due);
    assert_eq!(queue.verdicts(), []);
    queue.turn(room(1), due + MS);
    let verdicts = queue.verdicts();
    assert!(
        matches!(&verdicts[..], [(found, Verdict::Refused(Refusal { why: Why::Deadline, .. }))] if *found == ticket),
        "{verdicts:?}"
    );
    assert_eq!((queue.len(), queue.due()), (0, None));
}

#[test]
fn nobody_makes_an_accepted_one_of_its_tenant_late() {
    let now = Instant::now();
    let mut queue = taught(now);
    let by = |ms: u32| Ask { deadline: Some(now + ms * MS), ..ask(Class::Interactive, "a") };
    let Offer::Dispatched(_) = queue.offer(by(10_000), room(1), now) else { panic!("there is room") };
    let mut accepted = Vec::new();
    for deadline in [900, 800, 700, 600, 500] {
        if let Offer::Waits { ticket, .. } = queue.offer(by(deadline), room(0), now) {
            accepted.push((ticket, deadline));
        }
    }
    let latest = accepted.iter().map(|(_, deadline)| *deadline).max().unwrap();
    assert!(accepted.len() >= 3 && accepted.len() as u32 * 100 + 200 <= latest, "{accepted:?}");
}

#[test]
fn an_urgent_request_uses_the_reserve_or_is_refused_at_once() {
    let now = Instant::now();
    let mut queue = taught(now);
    many(&mut queue, &ask(Class::Interactive, "a"), 3, now);
    let urgent = || ask(Class::Urgent, "b");
    let first = queue.offer(urgent(), room(0), now);
    assert!(matches!(first, Offer::Dispatched(_)), "the reserve is there for it: {first:?}");
    // The reserve has one place, and no worker counts the first one yet.
    let Offer::Dispatched(ticket) = first else { unreachable!() };
    queue.placed(ticket);
    let second = queue.offer(urgent(), room(0), now);
    let Offer::Dispatched(other) = second else { panic!("{second:?}") };
    queue.placed(other);
    let third = refused(queue.offer(urgent(), room(0), now));
    assert_eq!((third.why, third.retry_after), (Why::Wait, Duration::from_secs(1)), "two run at once at most");
    queue.ended(ticket, None, now);
    assert!(matches!(queue.offer(urgent(), room(0), now), Offer::Dispatched(_)));
}

#[test]
fn who_leaves_frees_its_place_and_gets_no_verdict() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let first = waits(&mut queue, ask(Class::Interactive, "a"), now);
    let second = waits(&mut queue, ask(Class::Interactive, "a"), now);
    queue.leave(first);
    queue.leave(first);
    assert_eq!(queue.len(), 1);
    assert_eq!(drain(&mut queue, now), [second]);
}

#[test]
fn without_anybody_to_compute_all_are_refused() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let tickets = many(&mut queue, &ask(Class::Batch, "a"), 3, now);
    queue.refuse_all(Why::Nobody);
    let verdicts = queue.verdicts();
    assert_eq!(verdicts.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), tickets);
    assert!(queue.is_idle() && queue.due().is_none());
}

mod overload {
    use super::*;

    /// Small numbers from a seed (xorshift): the same everywhere.
    struct Dice(u64);

    impl Dice {
        fn next(&mut self) -> f64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }
        fn range(&mut self, least: f64, most: f64) -> f64 {
            least + (most - least) * self.next()
        }
        /// Between arrivals of independent users.
        fn gap(&mut self, rate: f64) -> f64 {
            -(1.0 - self.next()).ln() / rate
        }
    }

    struct Tenant {
        name: &'static str,
        weight: u32,
        /// Its part of all arrivals.
        part: f64,
    }

    const RESERVE: u32 = 2;

    struct Plan {
        seed: u64,
        places: u32,
        /// Against what the places can do.
        load: f64,
        tenants: &'static [Tenant],
        /// Part of the requests that has a deadline; parts that are urgent, or of class batch.
        deadlines: f64,
        urgent: f64,
        batch: f64,
        seconds: f64,
    }

    #[derive(Default, Debug)]
    struct Seen {
        offered: u32,
        accepted: u32,
        met: u32,
        late: u32,
        refused_later: u32,
        left: u32,
        /// Tokens served after the beginning, by tenant.
        tokens: BTreeMap<&'static str, f64>,
        busy_s: f64,
        /// Dispatched, by class; urgent ones that took longer than they may.
        classes: [u32; 3],
        slow_urgent: u32,
        verdicts: HashMap<Ticket, u32>,
    }

    struct Request {
        tenant: &'static str,
        size: Size,
        deadline: Option<Instant>,
        answer: u32,
        leaves: bool,
        class: Class,
        arrived: Instant,
    }

    /// What a job takes, in seconds: 20 ms, 0.1 ms for a token of the prompt, 5 for one of the answer, a fifth more or
    /// less.
    fn service(request: &Request, noise: f64) -> (f64, f64) {
        let first = 0.020 + 0.0001 * f64::from(request.size.prompt_tokens);
        (first * noise, (first + 0.005 * f64::from(request.answer - 1)) * noise)
    }

    /// Arrivals, ends and departures in the order of their times.
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        End(Ticket),
        Leave(Ticket),
        Arrival,
        Due,
    }

    fn play(plan: &Plan) -> Seen {
        let (begin, mut dice) = (Instant::now(), Dice(plan.seed | 1));
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        let mut queue = Queue::default();
        let mut seen = Seen::default();
        let mut events: BTreeSet<(Instant, Event)> = BTreeSet::from([(begin, Event::Arrival)]);
        let mut requests: HashMap<Ticket, Request> = HashMap::new();
        let mut running: HashMap<Ticket, (Instant, f64, f64)> = HashMap::new();
        // 120 tokens in and 24 out on average.
        let rate = plan.load * f64::from(plan.places) / (0.032 + 0.005 * 23.0);
        let mut next_arrival = 0.0;
        while let Some((now, event)) = events.pop_first() {
            if now > at(plan.seconds) && requests.is_empty() {
                break;
            }
            let room = |running: usize| Room {
                replicas: 1,
                free: plan.places.saturating_sub(running as u32),
                reserve: (plan.places + RESERVE).saturating_sub(running as u32).min(RESERVE),
                urgent: RESERVE,
            };
            match event {
                Event::Arrival => {
                    if now < at(plan.seconds) {
                        next_arrival += dice.gap(rate);
                        events.insert((at(next_arrival), Event::Arrival));
                    }
                    let mut pick = dice.next();
                    let tenant = plan.tenants.iter().find(|tenant| {
                        pick -= tenant.part;
                        pick < 0.0
                    });
                    let tenant = tenant.unwrap_or(&plan.tenants[0]);
                    let class = match dice.next() {
                        part if part < plan.urgent => Class::Urgent,
                        part if part < plan.urgent + plan.batch => Class::Batch,
                        _ => Class::Interactive,
                    };
                    let urgent = class == Class::Urgent;
                    let answer = if urgent { 8 } else { dice.range(4.0, 45.0) as u32 };
                    let size = Size { prompt_tokens: dice.range(20.0, 220.0) as u32, max_tokens: answer, choices: 1 };
                    let hasty = class == Class::Interactive && dice.next() < plan.deadlines;
                    let deadline = hasty.then(|| now + Duration::from_secs_f64(dice.range(0.2, 4.0)));
                    let leaves = dice.next() < 0.02;
                    let request = Request { tenant: tenant.name, size, deadline, answer, leaves, class, arrived: now };
                    let ask = Ask {
                        class,
                        tenant: TenantId::new(tenant.name).unwrap(),
                        weight: tenant.weight,
                        deadline,
                        size,
                    };
                    seen.offered += 1;
                    let ticket = match queue.offer(ask, room(running.len()), now) {
                        Offer::Refused(refusal) => {
                            assert!(refusal.retry_after >= Duration::from_secs(1), "{refusal:?}");
                            continue;
                        }
                        Offer::Dispatched(ticket) => {
                            *seen.verdicts.entry(ticket).or_default() += 1;
                            begin_job(ticket, &request, now, &mut running, &mut events, &mut dice);
                            queue.placed(ticket);
                            ticket
                        }
                        Offer::Waits { ticket, .. } => {
                            if request.leaves {
                                events.insert((now + 50 * MS, Event::Leave(ticket)));
                            }
                            ticket
                        }
                    };
                    seen.accepted += u32::from(deadline.is_some());
                    requests.insert(ticket, request);
                }
                Event::End(ticket) => {
                    let (begun, first, whole) = running.remove(&ticket).unwrap();
                    let request = requests.remove(&ticket).unwrap();
                    let lesson = Lesson {
                        answer_tokens: request.answer,
                        first: Duration::from_secs_f64(first),
                        whole: now - begun,
                    };
                    queue.ended(ticket, Some(lesson), now);
                    seen.classes[request.class as usize] += 1;
                    let slow = now > request.arrived + URGENT_WITHIN;
                    seen.slow_urgent += u32::from(request.class == Class::Urgent && slow);
                    seen.busy_s += if now < at(plan.seconds) { whole } else { 0.0 };
                    if let Some(deadline) = request.deadline {
                        *(if now <= deadline { &mut seen.met } else { &mut seen.late }) += 1;
                    }
                    if now > at(plan.seconds / 4.0) && now < at(plan.seconds) {
                        let tokens = f64::from(request.size.prompt_tokens + request.answer);
                        *seen.tokens.entry(request.tenant).or_default() += tokens;
                    }
                }
                Event::Leave(ticket) => {
                    if requests.contains_key(&ticket) && !running.contains_key(&ticket) {
                        queue.leave(ticket);
                        let request = requests.remove(&ticket).unwrap();
                        // It did not wait for what was promised.
                        seen.accepted -= u32::from(request.deadline.is_some());
                        seen.left += 1;
                        *seen.verdicts.entry(ticket).or_default() += 1;
                    }
                }
                Event::Due => {}
            }
            queue.turn(room(running.len()), now);
            for (ticket, verdict) in queue.verdicts() {
                *seen.verdicts.entry(ticket).or_default() += 1;
                match verdict {
                    Verdict::Dispatched => {
                        begin_job(ticket, &requests[&ticket], now, &mut running, &mut events, &mut dice);
                        queue.placed(ticket);
                    }
                    Verdict::Refused(_) => {
                        let request = requests.remove(&ticket).unwrap();
                        seen.refused_later += u32::from(request.deadline.is_some());
                    }
                }
            }
            assert!(running.len() as u32 <= plan.places + RESERVE, "no more is dispatched than there are places");
            assert!(queue.len() <= ENTRIES);
            if let Some(due) = queue.due() {
                events.insert((due.max(now) + MS, Event::Due));
            }
        }
        assert!(queue.is_idle(), "everybody got a verdict: {} wait", queue.len());
        assert!(seen.verdicts.values().all(|count| *count == 1), "each exactly one");
        seen
    }

    fn begin_job(
        ticket: Ticket,
        request: &Request,
        now: Instant,
        running: &mut HashMap<Ticket, (Instant, f64, f64)>,
        events: &mut BTreeSet<(Instant, Event)>,
        dice: &mut Dice,
    ) {
        let (first, whole) = service(request, dice.range(0.8, 1.2));
        running.insert(ticket, (now, first, whole));
        events.insert((now + Duration::from_secs_f64(whole), Event::End(ticket)));
    }

    /// Plays a plan with several seeds and holds it against the targets.
    fn check(plan: Plan) {
        for seed in [11, 0x5eed, 0xfeed_beef] {
            let plan = Plan { seed, ..plan };
            let seen = play(&plan);
            let met = f64::from(seen.met) / f64::from(seen.accepted);
            let used = seen.busy_s / (plan.seconds * f64::from(plan.places));
            println!(
                "seed {seed}, {} places: {} offered, {} accepted with a deadline, {:.4} met, {} late, {} refused later, \
                 {} left, places used {used:.3}, dispatched {:?}, {} urgent ones slow, tokens {:?}",
                plan.places,
                seen.offered,
                seen.accepted,
                met,
                seen.late,
                seen.refused_later,
                seen.left,
                seen.classes,
                seen.slow_urgent,
                seen.tokens
            );
            if plan.urgent > 0.0 {
                let [urgent, interactive, batch] = seen.classes;
                assert!(urgent > 0 && seen.slow_urgent * 1000 <= urgent, "seed {seed}: {} late", seen.slow_urgent);
                assert!(batch * BATCH_EVERY * 10 >= interactive * 9, "seed {seed}: one of {BATCH_EVERY} is a batch");
            }
            assert!(met >= 0.95, "seed {seed}: {met} of the accepted meet their deadlines");
            assert!(used > 0.9, "seed {seed}: caution leaves places empty: {used}");
            let all: f64 = seen.tokens.values().sum();
            let weights: u32 = plan.tenants.iter().map(|tenant| tenant.weight).sum();
            for tenant in plan.tenants {
                let fair = f64::from(tenant.weight) / f64::from(weights);
                let got = seen.tokens[tenant.name] / all;
                assert!(got >= 0.9 * fair, "seed {seed}: {} got {got:.3}, its share is {fair:.3}", tenant.name);
            }
        }
    }

    const EQUAL: &[Tenant] = &[Tenant { name: "a", weight: 1, part: 0.5 }, Tenant { name: "b", weight: 1, part: 0.5 }];
    /// The first asks for far more than its share, the others for a little more than theirs.
    const GREEDY: &[Tenant] = &[
        Tenant { name: "a", weight: 1, part: 0.5 },
        Tenant { name: "b", weight: 1, part: 0.2 },
        Tenant { name: "c", weight: 1, part: 0.3 },
    ];
    const WEIGHTED: &[Tenant] =
        &[Tenant { name: "a", weight: 1, part: 0.5 }, Tenant { name: "b", weight: 3, part: 0.5 }];

    const TWICE: Plan =
        Plan { seed: 0, places: 0, load: 2.0, tenants: EQUAL, deadlines: 0.75, urgent: 0.0, batch: 0.0, seconds: 60.0 };

    #[test]
    fn at_twice_the_capacity_promises_hold_and_tenants_get_their_shares() {
        for (places, tenants) in [(4, EQUAL), (32, EQUAL), (16, GREEDY), (32, GREEDY), (16, WEIGHTED)] {
            check(Plan { places, tenants, ..TWICE });
        }
    }

    #[test]
    fn so_do_they_when_everybody_has_a_deadline() {
        for (places, tenants) in [(8, EQUAL), (16, GREEDY), (32, WEIGHTED)] {
            check(Plan { places, tenants, deadlines: 1.0, ..TWICE });
        }
    }

    #[test]
    fn so_do_they_beside_urgent_requests_and_batches() {
        for (places, tenants) in [(8, EQUAL), (32, GREEDY)] {
            check(Plan { places, tenants, urgent: 0.05, batch: 0.3, ..TWICE });
        }
    }
}
