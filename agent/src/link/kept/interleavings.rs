//! What is kept, under every order of jobs that begin, grow, end, are cancelled, begun again and forgotten, held against a
//! plain list of what each job gave.

use izar_common::chat::{Finish, Usage};
use proptest::prelude::*;

use super::*;
use crate::engine::sequence::tests::job;

/// Tokens of a piece that fills memory after a few.
const BIG: usize = 3 << 20;

#[derive(Debug, Clone, Copy)]
enum Act {
    /// A job of a turn begins here, perhaps as a later attempt that has some tokens already.
    Begin {
        turn: u128,
        delivered: usize,
        scored: bool,
    },
    /// One of the jobs gives so many tokens.
    Give {
        job: usize,
        count: usize,
    },
    End {
        job: usize,
        well: bool,
    },
    Cancel {
        job: usize,
    },
    /// Seconds pass.
    Wait(u64),
}

/// What one job gave.
struct Given {
    turn: u128,
    scored: bool,
    entry: Arc<Entry>,
    tokens: Vec<Token>,
    end: Option<JobEvent>,
    ended: Option<Instant>,
    cancelled: bool,
}

fn begin(kept: &Kept, turn: u128, delivered: &[Token], scored: bool, now: Instant) -> Arc<Entry> {
    let mut job = Job { turn: TurnId(turn), ..job(&[1], delivered, 100) };
    job.sampling.logprobs = scored.then_some(1);
    kept.begin(&mut job, &"m.0".parse().unwrap(), None, now)
}

fn logprobs(tokens: &[Token]) -> Vec<Logprobs> {
    tokens.iter().map(|token| Logprobs { logprob: -(*token as f32), top: vec![(*token, 0.0)] }).collect()
}

impl Given {
    fn forgotten(&self) -> bool {
        self.entry.log().forgotten
    }

    /// What a reader finds at a position, by the list.
    fn after(&self, position: usize) -> Option<JobEvent> {
        let tokens = &self.tokens[position..self.tokens.len().min(position + TOKENS_PER_EVENT)];
        if tokens.is_empty() {
            return self.end.clone();
        }
        let logprobs = if self.scored { logprobs(tokens) } else { Vec::new() };
        Some(JobEvent::Tokens { position: position as u32, tokens: tokens.to_vec(), logprobs })
    }

    /// Whether readers see what was given, or are told that they must look elsewhere.
    fn check(&self) {
        for position in [0, self.tokens.len() / 2, self.tokens.len()] {
            let found = self.entry.after(position);
            if self.forgotten() || (self.cancelled && position == self.tokens.len()) {
                let told = matches!(found, Some(JobEvent::Failed { retryable: true, .. })) || found == self.end;
                assert!(told && found.is_some(), "{found:?}");
            } else if !self.cancelled {
                assert_eq!(found, self.after(position));
            }
        }
    }
}

/// Does everything in order, and compares after each act.
fn check(acts: &[Act]) {
    let (kept, mut now) = (Kept::default(), Instant::now());
    let mut all: Vec<Given> = Vec::new();
    for act in acts {
        let before: Vec<bool> = all.iter().map(Given::forgotten).collect();
        match *act {
            Act::Begin { turn, delivered, scored } => {
                let tokens: Vec<Token> = (0..if scored { 0 } else { delivered as Token }).collect();
                let entry = begin(&kept, turn, &tokens, scored, now);
                all.push(Given { turn, scored, entry, tokens, end: None, ended: None, cancelled: false });
            }
            Act::Wait(seconds) => now += Duration::from_secs(seconds),
            Act::Give { job, count } => {
                let Some(given) = pick(&mut all, job) else { continue };
                let position = given.tokens.len() as u32;
                let count = if given.scored { count.min(1000) } else { count };
                let tokens: Vec<Token> = (position..).take(count).collect();
                given.tokens.extend_from_slice(&tokens);
                let logprobs = if given.scored { logprobs(&tokens) } else { Vec::new() };
                kept.push(&given.entry, &JobEvent::Tokens { position, tokens, logprobs }, now);
            }
            Act::End { job, well } => {
                let Some(given) = pick(&mut all, job) else { continue };
                let end = match well {
                    true => JobEvent::Done { finish: Finish::Stop, usage: Usage::default() },
                    false => JobEvent::Failed { reason: "lost".into(), retryable: true },
                };
                kept.push(&given.entry, &end, now);
                (given.end, given.ended) = (Some(end), Some(now));
            }
            Act::Cancel { job } => {
                let Some(given) = pick(&mut all, job) else { continue };
                kept.forget(&given.entry, now);
                given.cancelled = true;
            }
        }
        compare(&kept, &all, &before, now);
    }
}

/// One of the jobs that still run.
fn pick(all: &mut [Given], job: usize) -> Option<&mut Given> {
    let mut running: Vec<&mut Given> = all.iter_mut().filter(|given| given.end.is_none() && !given.cancelled).collect();
    (!running.is_empty()).then(|| running.swap_remove(job % running.len()))
}

fn compare(kept: &Kept, all: &[Given], before: &[bool], now: Instant) {
    all.iter().for_each(Given::check);
    let counted: usize = all.iter().map(|given| given.entry.log().bytes).sum();
    assert_eq!(kept.all().bytes, counted, "what is counted is what is held");
    assert!(counted <= BYTES);
    let holding = |(_, given): &(usize, &Given)| !given.cancelled;
    let gone = all.iter().enumerate().filter(holding).map(|(_, given)| given.forgotten());
    assert!(gone.is_sorted_by(|a, b| a >= b), "the oldest is forgotten first");
    let mut pressed = 0;
    for (at, given) in all.iter().enumerate().filter(holding) {
        let later = all[at + 1..].iter().any(|later| later.turn == given.turn);
        let over = given.ended.is_some_and(|ended| ended + GRACE <= now);
        if given.forgotten() && !before.get(at).copied().unwrap_or(false) && !later && !over {
            pressed += ENTRY_BYTES + 4 * given.tokens.len() * if given.scored { 11 } else { 1 };
        }
    }
    assert!(pressed == 0 || pressed + counted > BYTES, "nothing is forgotten that is wanted and has room");
    for turn in 0..4 {
        let newest = all.iter().rfind(|given| given.turn == turn);
        let good = |given: &&Given| {
            !given.forgotten() && !given.cancelled && !matches!(given.end, Some(JobEvent::Failed { .. }))
        };
        let found = kept.find(TurnId(turn), 0);
        assert_eq!(found.is_some(), newest.filter(good).is_some(), "turn {turn}");
        if let (Some(found), Some(newest)) = (found, newest) {
            assert!(Arc::ptr_eq(&found, &newest.entry), "the latest attempt speaks for the turn");
        }
    }
}

fn acts() -> impl Strategy<Value = Act> {
    let job = 0..8_usize;
    prop_oneof![
        3 => (0..4_u128, 0..4_usize, any::<bool>()).prop_map(|(turn, delivered, scored)| Act::Begin { turn, delivered, scored }),
        6 => (job.clone(), prop_oneof![6 => 0..700_usize, 1 => Just(BIG)]).prop_map(|(job, count)| Act::Give { job, count }),
        2 => (job.clone(), prop::bool::weighted(0.8)).prop_map(|(job, well)| Act::End { job, well }),
        1 => job.prop_map(|job| Act::Cancel { job }),
        2 => (1..20_u64).prop_map(Act::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn what_is_kept_is_what_was_given_whatever_happens_in_between(acts in prop::collection::vec(acts(), 0..80)) {
        check(&acts);
    }
}
