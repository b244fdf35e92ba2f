//! Batches under every mix of prompts, classes and room: what is planned, put off, given up and taken up again.

use super::super::sequence::tests::job;
use super::*;
use izar_common::chat::{Finish, Token, Usage};
use proptest::prelude::*;

/// Jobs in the batch, and jobs waiting.
fn jobs(b: &Batcher) -> (u32, u32) {
    (b.load().running, b.load().waiting)
}
fn batcher(max_batch: usize) -> Batcher {
    with_blocks(max_batch, 640)
}
fn with_blocks(max_batch: usize, blocks: usize) -> Batcher {
    let limits = Limits { context: 1000, vocabulary: 100, eos: vec![2] };
    Batcher::new(limits, max_batch, blocks, Grammars::new(None))
}
fn drawn(token: Token) -> sampler::Drawn {
    sampler::Drawn { token, logprobs: None }
}
/// Answers every draw of a step with one token.
fn answer(batcher: &mut Batcher, step: &Step, token: Token) -> Vec<(u64, JobEvent)> {
    batcher.finish(step.draws.iter().map(|id| (*id, Ok(drawn(token)))).collect(), 0.0)
}
/// Chunks as (start, tokens, wants).
fn chunks(step: &Step) -> Vec<(usize, usize, Wants)> {
    step.batch.chunks.iter().map(|c| (c.start, c.tokens, c.wants)).collect()
}

#[test]
fn nothing_to_do_is_no_step() {
    assert!(batcher(4).plan().is_none());
}

#[test]
fn jobs_join_while_there_are_places_and_the_others_wait() {
    let mut b = batcher(2);
    (0..3).for_each(|i| assert_eq!(b.submit(i, job(&[1, 3], &[], 1)), None));
    assert_eq!(jobs(&b), (0, 3));
    let step = b.plan().unwrap();
    assert_eq!((chunks(&step), jobs(&b)), (vec![(0, 2, Wants::Last); 2], (2, 1)));
    let events = answer(&mut b, &step, 9);
    let done = JobEvent::Done {
        finish: Finish::Length,
        usage: Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 1 },
    };
    assert_eq!(events.iter().filter(|(_, e)| *e == done).count(), 2);
    let next = b.plan().unwrap();
    assert_eq!((next.closed, next.draws.len(), jobs(&b)), (vec![SequenceId(0), SequenceId(1)], 1, (1, 0)));
}

#[test]
fn running_answers_go_first_and_long_prompts_come_in_chunks() {
    let mut b = batcher(4);
    b.submit(0, job(&[1], &[], 10));
    let step = b.plan().unwrap();
    answer(&mut b, &step, 9);
    b.submit(1, job(&[1; 40], &[], 10));
    b.submit(2, job(&[3; 40], &[], 10));
    let mut steps = Vec::new();
    for _ in 0..3 {
        let step = b.plan().unwrap();
        answer(&mut b, &step, 9);
        steps.push(chunks(&step));
    }
    assert_eq!(steps[0], [(1, 1, Wants::Last), (0, 32, Wants::Nothing)]);
    assert_eq!(steps[1], [(2, 1, Wants::Last), (32, 8, Wants::Last), (0, 24, Wants::Nothing)]);
    assert_eq!(steps[2], [(3, 1, Wants::Last), (40, 1, Wants::Last), (24, 16, Wants::Last)]);
}

#[test]
fn a_prompt_alone_is_computed_in_large_chunks() {
    let mut b = batcher(4);
    b.submit(0, job(&[1; 600], &[], 10));
    assert_eq!(chunks(&b.plan().unwrap()), [(0, 512, Wants::Nothing)]);
}

/// Runs until all jobs have ended; returns the chunks of each step.
fn run(b: &mut Batcher) -> Vec<Vec<(usize, usize, Wants)>> {
    let mut steps = Vec::new();
    while let Some(step) = b.plan() {
        steps.push(chunks(&step));
        answer(b, &step, 9);
        assert!(steps.len() < 1000, "no progress");
    }
    assert_eq!((b.load().jobs(), b.load().blocks_used), (0, 0), "no block is lost");
    steps
}

#[test]
fn what_was_computed_before_is_not_computed_again() {
    let mut b = batcher(4);
    let prompt: Vec<Token> = (10..60).collect();
    b.submit(0, job(&prompt, &[], 1));
    assert_eq!(run(&mut b)[0], [(0, 50, Wants::Last)]);
    b.submit(1, job(&prompt, &[], 1));
    assert_eq!(run(&mut b)[0], [(48, 2, Wants::Last)], "full blocks are shared");
    b.submit(2, job(&prompt[..48], &[], 1));
    assert_eq!(run(&mut b)[0], [(47, 1, Wants::Last)], "a token is left, in a copy of its block");
    b.submit(3, job(&[&prompt[..37], &[5; 9]].concat(), &[], 1));
    let step = b.plan().unwrap();
    assert_eq!((chunks(&step), step.batch.copied.len()), (vec![(37, 9, Wants::Last)], 1));
    answer(&mut b, &step, 9);
    run(&mut b);
    let mut other = job(&prompt, &[], 1);
    other.cache_salt = [7; 16];
    b.submit(4, other);
    assert_eq!(run(&mut b)[0], [(0, 50, Wants::Last)], "another tenant finds nothing");
}

#[test]
fn an_answer_says_how_much_of_its_prompt_came_from_the_cache() {
    let mut b = batcher(4);
    let mut cached = |prompt: &[Token], delivered: &[Token]| {
        b.submit(0, job(prompt, delivered, 1 + delivered.len() as u32));
        let step = b.plan().unwrap();
        let last = answer(&mut b, &step, 9).pop();
        let Some((_, JobEvent::Done { usage, .. })) = last else { panic!("{last:?}") };
        (usage.prompt_tokens, usage.cached_tokens)
    };
    let prompt: Vec<Token> = (10..60).collect();
    assert_eq!(cached(&prompt, &[]), (50, 0));
    assert_eq!(cached(&prompt, &[]), (50, 48));
    assert_eq!(cached(&prompt[..37], &[5; 4]), (37, 37), "what was delivered is no prompt");
}

#[test]
fn a_prompt_that_begins_like_a_running_one_waits_for_it() {
    let mut b = batcher(4);
    let prompt: Vec<Token> = (10..90).collect();
    (0..3).for_each(|number| assert_eq!(b.submit(number, job(&prompt, &[], 2)), None));
    let steps = run(&mut b);
    assert_eq!(steps[0], [(0, 80, Wants::Last)]);
    assert_eq!(steps[1], [(80, 1, Wants::Last), (79, 1, Wants::Last), (79, 1, Wants::Last)]);
}

#[test]
fn the_youngest_gives_way_when_blocks_run_out_and_comes_back() {
    // Two answers of up to 64 tokens in a cache of 96.
    let mut b = with_blocks(4, 6);
    b.submit(0, job(&[1; 20], &[], 40));
    b.submit(1, job(&[3; 20], &[], 40));
    let steps = run(&mut b);
    let together = steps.iter().filter(|chunks| chunks.len() == 2).count();
    assert!((20..40).contains(&together), "{together}");
    let tokens: usize = steps.iter().flatten().map(|chunk| chunk.1).sum();
    assert!(tokens > 2 * 59, "something was computed twice: {tokens}");
}

#[test]
fn jobs_join_only_if_there_are_blocks_for_their_prompt() {
    let mut b = with_blocks(4, 6);
    b.submit(0, job(&[1; 60], &[], 3));
    b.submit(1, job(&[3; 60], &[], 3));
    b.plan().unwrap();
    assert_eq!(jobs(&b), (1, 1));
}

#[test]
fn a_cancelled_job_frees_its_cache_and_its_late_token_is_dropped() {
    let mut b = batcher(1);
    b.submit(0, job(&[1], &[], 10));
    b.submit(1, job(&[1], &[], 10));
    let step = b.plan().unwrap();
    b.cancel(0);
    b.cancel(1);
    assert_eq!(answer(&mut b, &step, 9), []);
    assert_eq!(jobs(&b), (0, 0));
    let last = b.plan().unwrap();
    assert_eq!((last.closed, last.batch.chunks.len()), (vec![SequenceId(0)], 0));
    assert!(b.plan().is_none());
}

#[test]
fn a_full_queue_refuses_instead_of_waiting() {
    let mut b = batcher(1);
    (0..WAITING_LIMIT as u64).for_each(|i| assert_eq!(b.submit(i, job(&[1], &[], 1)), None));
    assert!(matches!(b.submit(9999, job(&[1], &[], 1)), Some(JobEvent::Failed { retryable: true, .. })));
}

#[test]
fn impossible_jobs_fail_for_good_and_finished_ones_end_at_once() {
    let mut b = batcher(1);
    assert!(matches!(b.submit(0, job(&[], &[], 1)), Some(JobEvent::Failed { retryable: false, .. })));
    assert!(matches!(b.submit(1, job(&[1], &[5], 1)), Some(JobEvent::Done { .. })));
    assert!(b.plan().is_none());
}

#[test]
fn each_answer_brings_its_drawer_once_and_refused_ones_bring_none() {
    let mut b = batcher(1);
    b.submit(0, job(&[1], &[], 10));
    let mut structured = job(&[1], &[], 10);
    structured.sampling.grammar = Some(izar_common::chat::Grammar::JsonObject);
    assert!(matches!(b.submit(1, structured), Some(JobEvent::Failed { retryable: false, .. })), "no tokenizer");
    let opened = |step: &Step| step.opened.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    let step = b.plan().unwrap();
    assert_eq!(opened(&step), step.draws);
    answer(&mut b, &step, 9);
    assert_eq!(opened(&b.plan().unwrap()), []);
}

#[test]
fn a_broken_row_fails_its_own_job_alone() {
    let mut b = batcher(2);
    b.submit(0, job(&[1], &[], 10));
    b.submit(1, job(&[1], &[], 10));
    let step = b.plan().unwrap();
    let events = b.finish(
        vec![
            (step.draws[0], Err(Failure { reason: "no number".into(), retryable: true })),
            (step.draws[1], Ok(drawn(9))),
        ],
        0.0,
    );
    assert!(matches!(events[0], (0, JobEvent::Failed { retryable: true, .. })));
    assert!(matches!(events[1], (1, JobEvent::Tokens { .. })));
    assert_eq!(jobs(&b), (1, 0));
}

fn of_class(class: Class, prompt: &[Token], max_tokens: u32) -> Job {
    Job { class, ..job(prompt, &[], max_tokens) }
}

#[test]
fn an_urgent_job_passes_a_full_batch_and_others_pause_for_it() {
    let mut b = batcher(2);
    (0..4).for_each(|i| drop(b.submit(i, of_class(Class::Batch, &[1, 3], 5))));
    let step = b.plan().unwrap();
    answer(&mut b, &step, 9);
    b.submit(7, of_class(Class::Urgent, &[5; 128], 3));
    let mut steps = Vec::new();
    for _ in 0..4 {
        let step = b.plan().unwrap();
        answer(&mut b, &step, 9);
        steps.push(chunks(&step));
    }
    assert_eq!(steps[0], [(0, 128, Wants::Last)], "its prompt in one go, whoever answers");
    assert_eq!((&steps[1], &steps[2]), (&vec![(128, 1, Wants::Last)], &vec![(129, 1, Wants::Last)]));
    assert_eq!(steps[3], [(2, 1, Wants::Last); 2], "the others go on where they were");
    run(&mut b);
}

#[test]
fn who_waits_is_admitted_by_class_then_by_age() {
    let mut b = batcher(1);
    b.submit(0, job(&[1], &[], 1));
    let first = b.plan().unwrap();
    let waiting = [(1, Class::Batch), (2, Class::Interactive), (3, Class::Batch), (4, Class::Interactive)];
    waiting.iter().for_each(|(i, class)| drop(b.submit(*i, of_class(*class, &[1], 1))));
    let mut ended = Vec::new();
    let mut step = Some(first);
    while let Some(now) = step {
        let events = answer(&mut b, &now, 9);
        ended.extend(events.iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).map(|(job, _)| *job));
        step = b.plan();
    }
    assert_eq!(ended, [0, 2, 4, 1, 3]);
}

#[test]
fn urgent_jobs_without_end_let_the_others_go_on_now_and_then() {
    let mut b = batcher(2);
    b.submit(0, of_class(Class::Batch, &[3; 100], 2));
    let step = b.plan().unwrap();
    answer(&mut b, &step, 9);
    b.submit(1, of_class(Class::Urgent, &[1], 300));
    b.submit(2, of_class(Class::Interactive, &[4; 100], 2));
    let (mut steps, mut held) = (Vec::new(), Vec::new());
    for _ in 0..3 * (PAUSE_STEPS as usize + 1) {
        let step = b.plan().unwrap();
        let tokens = step.batch.tokens.len();
        if tokens > 1 {
            assert!(!b.may_give_up(), "an urgent job waits for it");
            assert!(tokens <= 2 + HELD_TOKENS, "{tokens} tokens");
            held.push(steps.len());
        }
        answer(&mut b, &step, 9);
        steps.push(chunks(&step));
    }
    let every = PAUSE_STEPS as usize + 1;
    assert_eq!(held, [every - 1, 2 * every - 1, 3 * every - 1]);
    run(&mut b);
}

#[test]
fn others_pause_for_a_second_at_most_where_steps_are_long() {
    let mut b = batcher(2);
    b.submit(0, of_class(Class::Batch, &[3], 50));
    let step = b.plan().unwrap();
    answer(&mut b, &step, 9);
    b.submit(1, of_class(Class::Urgent, &[1], 50));
    let mut sizes = Vec::new();
    for _ in 0..6 {
        let step = b.plan().unwrap();
        b.finish(step.draws.iter().map(|id| (*id, Ok(drawn(9)))).collect(), 0.5 * PAUSE_SECONDS);
        sizes.push(step.draws.len());
    }
    assert_eq!(sizes, [1, 1, 2, 1, 1, 2]);
}

#[test]
fn an_urgent_job_takes_blocks_from_the_youngest_of_the_least_urgent() {
    let mut b = with_blocks(4, 12);
    b.submit(0, of_class(Class::Batch, &[1; 60], 3));
    b.submit(1, of_class(Class::Interactive, &[3; 60], 3));
    let step = b.plan().unwrap();
    answer(&mut b, &step, 9);
    assert_eq!(jobs(&b), (2, 0));
    b.submit(2, of_class(Class::Urgent, &[4; 100], 1));
    let step = b.plan().unwrap();
    assert_eq!((chunks(&step), jobs(&b)), (vec![(0, 100, Wants::Last)], (2, 1)));
    assert_eq!(b.waiting[0].0.job, 0);
    answer(&mut b, &step, 9);
    run(&mut b);
}

#[test]
fn a_flood_of_less_urgent_jobs_keeps_no_urgent_one_out() {
    let mut b = batcher(1);
    let mut flood = |class| (0..).map(|i| b.submit(i, of_class(class, &[1], 1))).take_while(Option::is_none).count();
    let (batch, interactive) = (flood(Class::Batch), flood(Class::Interactive));
    assert_eq!((batch, interactive), (WAITING_LIMIT, WAITING_LIMIT));
    assert_eq!(b.submit(9999, of_class(Class::Urgent, &[1], 1)), None);
}

#[test]
fn a_step_that_was_given_up_is_planned_again() {
    let mut b = batcher(4);
    let prompt: Vec<Token> = (10..60).collect();
    b.submit(0, job(&prompt, &[], 1));
    run(&mut b);
    // One that goes on in a copy of a block, and a new one.
    b.submit(1, job(&prompt[..37], &[], 3));
    b.submit(2, job(&[7; 20], &[], 3));
    let step = b.plan().unwrap();
    assert!(b.may_give_up() && step.batch.copied.len() == 1);
    b.give_up();
    let again = b.plan().unwrap();
    assert_eq!((chunks(&again), again.draws.len()), (chunks(&step), 2));
    assert_eq!((again.opened.len(), again.batch.copied.len()), (0, 0), "that was done");
    answer(&mut b, &again, 9);
    run(&mut b);
}

proptest! {
    #[test]
    fn whatever_happens_every_job_ends_and_no_block_is_lost(acts in proptest::collection::vec((0_u8..6, 0_usize..8), 0..300)) {
        let mut b = with_blocks(3, 70);
        let (mut number, mut ended, mut cancelled) = (0, 0, 0);
        for (act, pick) in acts {
            match act {
                0..=2 => {
                    let class = Class::ALL[usize::from(act)];
                    b.submit(number, of_class(class, &vec![pick as Token + 3; 10 + 30 * pick], 1 + 9 * pick as u32));
                    number += 1;
                }
                3 => {
                    let before = b.load().jobs();
                    b.cancel(number.saturating_sub(1 + pick as u64));
                    cancelled += before - b.load().jobs();
                }
                _ => {
                    let Some(step) = b.plan() else { continue };
                    if act == 4 && b.may_give_up() {
                        b.give_up();
                    } else {
                        ended += answer(&mut b, &step, 9).iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).count();
                    }
                }
            }
        }
        let mut steps = 0;
        while let Some(step) = b.plan() {
            ended += answer(&mut b, &step, 9).iter().filter(|(_, e)| matches!(e, JobEvent::Done { .. })).count();
            steps += 1;
            prop_assert!(steps < 20_000, "no progress");
        }
        prop_assert_eq!(ended as u64 + u64::from(cancelled), number);
        prop_assert_eq!((b.load().jobs(), b.load().blocks_used), (0, 0));
    }
}

#[test]
fn giving_up_fails_running_and_waiting_jobs_as_retryable() {
    let mut b = batcher(1);
    b.submit(0, job(&[1], &[], 10));
    b.submit(1, job(&[1], &[], 10));
    b.plan();
    let events = b.fail_all("broken");
    assert_eq!(events.len(), 2);
    assert!(events.iter().all(|(_, e)| matches!(e, JobEvent::Failed { retryable: true, .. })));
    assert_eq!(jobs(&b), (0, 0));
}
