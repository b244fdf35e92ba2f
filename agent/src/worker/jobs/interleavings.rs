//! Jobs of a worker under every order of tokens, repeated and lost ones, double ends, cancellations and deaths, held
//! against a model that knows what a reader may see.

use proptest::prelude::*;

use super::*;
use crate::engine::sequence::tests::job;
use izar_common::chat::{Finish, Usage};

#[derive(Debug, Clone, Copy)]
enum Act {
    Submit {
        delivered: usize,
        max_tokens: u32,
        scored: bool,
    },
    /// The worker gives tokens of a job (which may have ended): so many, from its next position plus an offset.
    /// A confused one forgets their probabilities, or sends some that nobody asked for.
    Give {
        job: usize,
        offset: i32,
        count: usize,
        confused: bool,
    },
    End {
        job: usize,
        well: bool,
    },
    /// Somebody reads one event.
    Read {
        job: usize,
    },
    /// Nobody wants the job any more.
    Leave {
        job: usize,
    },
    /// Frames go to the worker.
    Send,
    /// The worker dies.
    Die,
}

/// A job as it must look.
struct Model {
    id: u64,
    running: Option<RunningJob>,
    scored: bool,
    next: u32,
    limit: u32,
    /// What no reader has taken yet.
    waiting: Vec<Token>,
    end: Option<End>,
    /// The end was read.
    over: bool,
}

#[derive(Debug, PartialEq)]
enum End {
    Well,
    Failed,
}

impl Model {
    fn lives(&self) -> bool {
        self.end.is_none() && self.running.is_some()
    }

    /// Reads one event and compares.
    fn read(&mut self) {
        let Some(running) = &self.running else { return };
        match running.ready() {
            Some(JobEvent::Tokens { position, tokens, logprobs }) => {
                assert!(!tokens.is_empty());
                assert_eq!(position, self.next - self.waiting.len() as u32);
                let came: Vec<Token> = self.waiting.drain(..tokens.len()).collect();
                assert_eq!(tokens, came, "every token once, in order");
                let expected = if self.scored { scores(&came) } else { Vec::new() };
                assert_eq!(logprobs, expected);
                assert!(tokens.len() <= if self.scored { LOGPROBS_PER_EVENT } else { TOKENS_PER_EVENT });
            }
            Some(end) => {
                assert!(self.waiting.is_empty(), "tokens come before the end");
                let end = match end {
                    JobEvent::Done { .. } => End::Well,
                    _ => End::Failed,
                };
                assert!(Some(end) == self.end && !self.over, "one end, once");
                self.over = true;
            }
            None => assert!(self.waiting.is_empty() && (self.end.is_none() || self.over), "nothing is lost"),
        }
    }
}

fn scores(tokens: &[Token]) -> Vec<Logprobs> {
    tokens.iter().map(|token| Logprobs { logprob: -(*token as f32), top: Vec::new() }).collect()
}

fn check(acts: &[Act]) {
    let jobs = Arc::new(Jobs::new(1));
    let mut all: Vec<Model> = Vec::new();
    let (mut dead, mut expected) = (false, Vec::new());
    for act in acts {
        match *act {
            Act::Submit { delivered, max_tokens, scored } => {
                let mut job = job(&[1], &vec![9; delivered], max_tokens);
                job.sampling.logprobs = scored.then_some(0);
                let Ok(running) = jobs.submit(job) else {
                    assert!(
                        dead || all.iter().filter(|model| model.lives()).count() >= BATCHES_PER_WORKER,
                        "there is room"
                    );
                    continue;
                };
                assert!(!dead, "a dead worker takes nothing");
                let (id, next) = (running.id, delivered as u32);
                expected.push((id, false));
                let running = Some(running);
                all.push(Model {
                    id,
                    running,
                    scored,
                    next,
                    limit: max_tokens,
                    waiting: Vec::new(),
                    end: None,
                    over: false,
                });
            }
            Act::Give { job, offset, count, confused } => {
                let Some(model) = pick(&mut all, job) else { continue };
                let scored = model.scored ^ confused;
                let position = model.next.saturating_add_signed(offset);
                let tokens: Vec<Token> = (position..).take(count).collect();
                let logprobs = if scored { scores(&tokens) } else { Vec::new() };
                let fits = position == model.next && position as usize + count <= model.limit as usize;
                let complete = count == 0 || !confused;
                if model.lives() && fits && complete {
                    model.next += count as u32;
                    model.waiting.extend(&tokens);
                } else if model.lives() {
                    model.end = Some(End::Failed);
                }
                jobs.deliver(vec![(model.id, JobEvent::Tokens { position, tokens, logprobs })]);
            }
            Act::End { job, well } => {
                let Some(model) = pick(&mut all, job) else { continue };
                let (end, event) = match well {
                    true => (End::Well, JobEvent::Done { finish: Finish::Stop, usage: Usage::default() }),
                    false => (End::Failed, JobEvent::Failed { reason: "x".into(), retryable: true }),
                };
                if model.lives() {
                    model.end = Some(end);
                }
                jobs.deliver(vec![
                    (model.id, event),
                    (u64::MAX, JobEvent::Failed { reason: String::new(), retryable: true }),
                ]);
            }
            Act::Read { job } => {
                if let Some(model) = pick(&mut all, job) {
                    model.read();
                }
            }
            Act::Leave { job } => {
                let Some(model) = pick(&mut all, job) else { continue };
                if model.lives() {
                    expected.push((model.id, true));
                }
                model.running = None;
            }
            Act::Send => compare(&jobs, &mut expected),
            Act::Die => {
                jobs.close("it died");
                (dead, expected) = (true, Vec::new());
                all.iter_mut().filter(|model| model.lives()).for_each(|model| model.end = Some(End::Failed));
            }
        }
        assert_eq!(jobs.busy(), all.iter().any(Model::lives));
    }
    compare(&jobs, &mut expected);
    // Whoever still listens hears the rest.
    for model in &mut all {
        while model.running.is_some() && !(model.waiting.is_empty() && (model.end.is_none() || model.over)) {
            model.read();
        }
        model.read();
    }
}

/// What goes to the worker: each job once, and its cancellation once if nobody wanted it before its end.
fn compare(jobs: &Jobs, expected: &mut Vec<(u64, bool)>) {
    let frames = std::mem::take(&mut jobs.table().outbox);
    let sent = frames.iter().map(|frame| match frame {
        ToWorker::Submit { id, .. } => (*id, false),
        ToWorker::Cancel { id } => (*id, true),
        other => panic!("{other:?}"),
    });
    assert_eq!(sent.collect::<Vec<_>>(), std::mem::take(expected));
}

fn pick(all: &mut [Model], job: usize) -> Option<&mut Model> {
    let count = all.len();
    (count > 0).then(|| &mut all[job % count])
}

fn acts() -> impl Strategy<Value = Act> {
    let job = 0..6_usize;
    let offset = prop_oneof![12 => Just(0), 1 => -3..4_i32];
    prop_oneof![
        3 => (0..3_usize, 3..5000_u32, any::<bool>())
            .prop_map(|(delivered, max_tokens, scored)| Act::Submit { delivered, max_tokens, scored }),
        9 => (job.clone(), offset, prop_oneof![6 => 0..20_usize, 1 => 0..5000_usize], prop::bool::weighted(0.03))
            .prop_map(|(job, offset, count, confused)| Act::Give { job, offset, count, confused }),
        2 => (job.clone(), any::<bool>()).prop_map(|(job, well)| Act::End { job, well }),
        5 => job.clone().prop_map(|job| Act::Read { job }),
        2 => job.prop_map(|job| Act::Leave { job }),
        2 => Just(Act::Send),
        1 => prop_oneof![4 => Just(Act::Send), 1 => Just(Act::Die)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_reader_sees_every_token_once_and_one_end_whatever_the_worker_does(acts in prop::collection::vec(acts(), 0..100)) {
        check(&acts);
    }
}
