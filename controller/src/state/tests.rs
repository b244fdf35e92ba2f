//! What commands do, seen from outside; and pieces for the tests of the store.

use super::command::Origin;
use super::last_backup::PLACE_BYTES;
use super::rows::Row;
use super::store::Write;
use super::*;
use izar_common::chat::{Finish, Usage};
use izar_common::id::NodeId;
use izar_common::manifest::{File, Kind};
use proptest::prelude::*;

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn key(id: &str) -> Command {
    let secret_hash = izar_common::blob::hash(id.as_bytes());
    let (project, note) = (name("default"), String::new());
    let (status, created) = (KeyStatus::Active, Hlc::from_ms(1));
    Command::CreateKey(Key { id: name(id), project, secret_hash, max_concurrent: 8, status, created, note })
}

fn open(turn: u128, key: &str, incarnation: u64) -> Command {
    Command::OpenTurn(Opening {
        turn: TurnId(turn),
        tenant: name("default"),
        project: name("default"),
        key: name(key),
        deployment: name("m"),
        revision: Hash([7; 32]),
        prompt_tokens: 3,
        max_tokens: 4,
        stream: true,
        origin: origin(incarnation),
        once: None,
        provisional: false,
    })
}

fn close(turn: u128) -> Command {
    let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 2 };
    Command::CloseTurn {
        turn: TurnId(turn),
        outcome: Outcome::Finished { finish: Finish::Stop, usage, inexact: false, numerics: None },
    }
}

fn manifest() -> Manifest {
    let text = File { name: "text.json".into(), hash: Hash([1; 32]), bytes: 10 };
    let kind = Kind::Echo { first_token_us: 0, next_token_us: 0 };
    let (files, architecture) = (Vec::new(), "echo".to_owned());
    Manifest { name: "echo".into(), kind, files, text, context: 64, vocabulary: 300, architecture }
}

fn deployment(replicas: u32) -> Deployment {
    let (engine, constraints) = Default::default();
    Deployment { id: name("m"), revision: manifest().revision(), replicas, engine, constraints }
}

fn origin(incarnation: u64) -> Origin {
    Origin { node: name::<NodeId>("c1"), incarnation }
}

/// Applies commands as the next batch of incarnation 1 of `c1`.
pub(crate) fn apply(state: &mut State, commands: Vec<Command>) -> Applied {
    let index = state.applied() + 1;
    let batch = Batch { origin: origin(1), seq: index, floor: index, at: Hlc::from_ms(index), commands };
    state.apply(index, &batch)
}

fn check(state: &mut State, command: Command, expected: Result<(), Refusal>) {
    let reply = expected.map_or_else(Reply::Refused, |()| Reply::Done);
    assert_eq!(apply(state, vec![command.clone()]).replies, [reply], "{command:?}");
}

pub(crate) fn state() -> State {
    let mut state = State::new(name("east"));
    check(&mut state, key("k"), Ok(()));
    state
}

fn backup(taken_ms: u64, kept_as: &str) -> LastBackup {
    LastBackup { node: name("c1"), taken_ms, applied: u64::MAX, kept_as: kept_as.to_owned() }
}

/// What the applier would store of a batch.
fn write(state: &State, applied: Applied) -> Write {
    let mut audit = Vec::new();
    for change in applied.changes {
        if let What::Audited(what) = change.what {
            audit::encode(&audit::Record { site: change.site, seq: change.seq, at: change.at, what }, &mut audit);
        }
    }
    let rows = applied.touched.iter().map(|row: &Row| (row.key(), state.row(row))).collect();
    Write { applied: state.applied(), rows, audit }
}

/// A key, a turn that is closed and one that stays open, as three writes.
pub(crate) fn two_turns(state: &mut State) -> Vec<Write> {
    [vec![key("k")], vec![open(1, "k", 1), open(2, "k", 1)], vec![close(1)]]
        .into_iter()
        .map(|commands| {
            let applied = apply(state, commands);
            write(state, applied)
        })
        .collect()
}

/// A model of these files, as a write.
pub(crate) fn registered(state: &mut State, text: Hash, file: Hash) -> Write {
    let mut manifest = manifest();
    manifest.text.hash = text;
    manifest.files.push(File { name: "weights".into(), hash: file, bytes: 7 });
    let applied = apply(state, vec![Command::RegisterModel(manifest)]);
    write(state, applied)
}

/// One more open turn, as a write.
pub(super) fn opened(state: &mut State, turn: u128) -> Write {
    let applied = apply(state, vec![open(turn, "k", 1)]);
    write(state, applied)
}

#[test]
fn a_new_site_has_a_tenant_and_a_project() {
    let config = State::new(name("east")).config_snapshot();
    assert!(config.tenants.contains_key("default") && config.projects.contains_key("default"));
    assert_eq!((config.applied, config.incarnation, config.plan.version), (0, 1, 0));
}

#[test]
fn turns_open_once_and_close_once() {
    let state = &mut state();
    check(state, open(1, "k", 1), Ok(()));
    check(state, open(1, "k", 1), Err(Refusal::TurnExists(TurnId(1))));
    check(state, close(1), Ok(()));
    check(state, close(1), Err(Refusal::UnknownTurn(TurnId(1))));
    check(state, open(1, "k", 1), Err(Refusal::TurnExists(TurnId(1))));
    check(state, close(2), Err(Refusal::UnknownTurn(TurnId(2))));
    assert_eq!(state.turn(&TurnId(1)).unwrap().opened, Hlc::from_ms(2));
    assert_eq!((state.turns().count(), state.open_turns()), (1, 0));
}

#[test]
fn only_an_active_key_opens_a_turn() {
    let state = &mut state();
    check(state, open(1, "x", 1), Err(Refusal::UnknownKey(name("x"))));
    check(state, open(1, "k", 1), Ok(()));
    check(state, Command::RevokeKey(name("k")), Ok(()));
    check(state, open(2, "k", 1), Err(Refusal::KeyRevoked(name("k"))));
    let Command::OpenTurn(opening) = open(3, "k", 1) else { unreachable!("it opens a turn") };
    check(state, Command::OpenTurn(Opening { provisional: true, ..opening }), Ok(()));
    check(state, close(3), Ok(()));
    check(state, close(1), Ok(()));
    check(state, Command::RevokeKey(name("k")), Ok(()));
    check(state, Command::RevokeKey(name("x")), Err(Refusal::UnknownKey(name("x"))));
    check(state, key("k"), Err(Refusal::KeyExists(name("k"))));
}

#[test]
fn models_are_deployed_and_planned_in_order() {
    let state = &mut state();
    let unknown = Refusal::UnknownModel(manifest().revision());
    check(state, Command::Deploy(deployment(1)), Err(unknown));
    check(state, Command::RegisterModel(manifest()), Ok(()));
    let before = state.config_index();
    check(state, Command::RegisterModel(manifest()), Ok(()));
    assert_eq!(state.config_index(), before, "a model that is registered already changes nothing");
    check(state, Command::Deploy(deployment(1)), Ok(()));
    check(state, Command::Deploy(deployment(2)), Ok(()));
    let full = Refusal::Full { what: "replicas of a deployment".into(), limit: 1000 };
    check(state, Command::Deploy(deployment(1001)), Err(full));
    check(state, Command::SetPlan { based_on: 0, plan: Plan::default() }, Ok(()));
    check(state, Command::SetPlan { based_on: 0, plan: Plan::default() }, Err(Refusal::OutdatedPlan));
    check(state, Command::SetPlan { based_on: 1, plan: Plan::default() }, Ok(()));
    let config = state.config_snapshot();
    assert_eq!((config.plan.version, config.deployments["m"].replicas), (2, 2));
    assert_eq!(config.applied, state.config_index());
    check(state, Command::Undeploy(name("m")), Ok(()));
    check(state, Command::Undeploy(name("m")), Err(Refusal::UnknownDeployment(name("m"))));
}

#[test]
fn a_batch_that_comes_twice_changes_nothing_the_second_time() {
    let state = &mut state();
    let batch = Batch { origin: origin(1), seq: 9, floor: 9, at: Hlc::from_ms(5), commands: vec![open(1, "k", 1)] };
    assert_eq!(state.apply(2, &batch).replies, [Reply::Done]);
    let before = state.digest();
    let again = state.apply(3, &batch);
    assert!(again.ignored && again.replies.is_empty() && again.changes.is_empty());
    assert_eq!((state.digest().hash, state.applied()), (before.hash, 3));
}

#[test]
fn orphans_of_earlier_incarnations_are_closed_as_abandoned() {
    let state = &mut state();
    apply(state, vec![open(3, "k", 1), open(1, "k", 1), open(2, "k", 2)]);
    check(state, Command::CloseOrphans { node: name("c2"), before_incarnation: 9 }, Ok(()));
    assert_eq!(state.open_turns(), 3);
    let applied = apply(state, vec![Command::CloseOrphans { node: name("c1"), before_incarnation: 2 }]);
    let closed: Vec<_> = applied
        .changes
        .iter()
        .filter_map(|change| match &change.what {
            What::TurnClosed { turn, outcome } => Some((turn.0, outcome.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(closed, [(1, Outcome::Abandoned), (3, Outcome::Abandoned)]);
    assert_eq!(state.open_turns(), 1);
}

#[test]
fn a_turn_that_another_controller_went_on_with_is_closed_by_that_one_alone() {
    let state = &mut state();
    apply(state, vec![open(1, "k", 1), open(2, "k", 1), open(3, "k", 1), close(2)]);
    let resume = |turn: u128, key: &str| Command::ResumeTurn { turn: TurnId(turn), key: name(key), origin: origin(2) };
    check(state, resume(1, "k"), Ok(()));
    check(state, close(1), Err(Refusal::UnknownTurn(TurnId(1))));
    check(state, resume(2, "k"), Ok(()));
    assert_eq!(state.open_turns(), 2, "what finished stays as it is recorded");
    check(state, resume(3, "other"), Err(Refusal::UnknownTurn(TurnId(3))));
    check(state, resume(9, "k"), Err(Refusal::UnknownTurn(TurnId(9))));
    // Closed as abandoned, then its client came back.
    check(state, Command::CloseOrphans { node: name("c1"), before_incarnation: 2 }, Ok(()));
    assert_eq!(state.open_turns(), 1);
    check(state, resume(3, "k"), Ok(()));
    assert_eq!(state.open_turns(), 2);
    let index = state.applied() + 1;
    let batch = Batch { origin: origin(2), seq: 1, floor: 1, at: Hlc::from_ms(99), commands: vec![close(1), close(3)] };
    assert_eq!(state.apply(index, &batch).replies, [Reply::Done, Reply::Done]);
    assert_eq!(state.open_turns(), 0);
}

#[test]
fn a_request_of_one_name_opens_one_turn_as_long_as_it_is_remembered() {
    let state = &mut state();
    let once = |turn: u128, name: u8, request: u8| {
        let Command::OpenTurn(opening) = open(turn, "k", 1) else { unreachable!("it opens a turn") };
        let once = turns::Once { name: Hash([name; 32]), request: Hash([request; 32]) };
        Command::OpenTurn(Opening { once: Some(once), ..opening })
    };
    check(state, once(1, 7, 1), Ok(()));
    check(state, once(1, 7, 1), Err(Refusal::TurnExists(TurnId(1))));
    check(state, once(2, 7, 1), Err(Refusal::Repeats(TurnId(1))));
    check(state, once(3, 7, 2), Err(Refusal::OtherRequest(TurnId(1))));
    check(state, once(4, 8, 2), Ok(()));
    check(state, close(1), Ok(()));
    check(state, once(5, 7, 1), Err(Refusal::Repeats(TurnId(1))));
    assert_eq!(state.named_turn(&Hash([7; 32])).unwrap().opening.turn, TurnId(1));
    // A member that starts again knows it, too.
    let rows: Vec<_> = state.all_rows().iter().map(|row| state.row(row).unwrap()).collect();
    let again = &mut State::from_rows(name("east"), state.applied(), rows).unwrap();
    check(again, once(6, 7, 1), Err(Refusal::Repeats(TurnId(1))));
    for turn in 100..100 + turns::REMEMBERED as u128 {
        apply(state, vec![open(turn, "k", 1), close(turn)]);
    }
    check(state, once(7, 7, 2), Ok(()));
}

#[test]
fn changes_are_numbered_without_a_gap_and_each_turn_is_audited() {
    let state = &mut state();
    let mut changes = apply(state, vec![open(1, "k", 1), open(1, "k", 1), open(2, "k", 1), close(2)]).changes;
    changes.extend(apply(state, vec![close(1)]).changes);
    for (stream, first) in [(Stream::Turn, 1), (Stream::Audit, 2)] {
        let seqs: Vec<_> = changes.iter().filter(|c| c.stream == stream).map(|c| c.seq).collect();
        assert_eq!(seqs, (first..first + 4).collect::<Vec<_>>(), "{stream:?}");
    }
}

#[test]
fn the_oldest_closed_turns_are_forgotten_and_open_ones_never() {
    let state = &mut state();
    apply(state, vec![open(1, "k", 1)]);
    let many = turns::REMEMBERED as u128 + 2;
    for turn in 2..2 + many {
        apply(state, vec![open(turn, "k", 1), close(turn)]);
    }
    assert_eq!(state.turns().count(), turns::REMEMBERED + 1);
    let kept: Vec<_> = (1..5).filter(|turn| state.turn(&TurnId(*turn)).is_some()).collect();
    assert_eq!(kept, [1, 4]);
}

#[test]
fn long_reasons_are_cut_at_a_character() {
    let reason = format!("a{}", "é".repeat(turns::REASON_BYTES));
    let Outcome::Failed { reason, .. } = (Outcome::Failed { reason, usage: Usage::default() }).bounded() else {
        panic!("the outcome stays what it was")
    };
    assert_eq!(reason.len(), turns::REASON_BYTES - 1);
}

#[test]
fn the_log_is_never_dropped_beyond_the_entry_that_says_so() {
    let state = &mut state();
    check(state, Command::CompactLog { through: 1 }, Ok(()));
    check(state, Command::CompactLog { through: 99 }, Ok(()));
    assert_eq!(state.compacted(), 3);
}

#[test]
fn no_command_takes_more_bytes_than_its_weight() {
    let long = "x".repeat(63);
    let worker = |i: u32| {
        let (engine, retiring_ms) = (Default::default(), Some(u64::MAX));
        let place =
            Placement { deployment: name(&long), agent: name(&long), revision: Hash([9; 32]), engine, retiring_ms };
        (name(&format!("{i:063}")), place)
    };
    let plan = Plan { version: 1, workers: (0..100).map(worker).collect() };
    let failed = Outcome::Failed { reason: "r".repeat(9000), usage: Usage::default() };
    let commands = [
        key(&long),
        open(u128::MAX, &long, u64::MAX),
        Command::CloseTurn { turn: TurnId(u128::MAX), outcome: failed },
        Command::RegisterModel(manifest()),
        Command::Deploy(deployment(9)),
        Command::SetPlan { based_on: 1, plan },
        Command::NoteBackup(backup(u64::MAX, &"p".repeat(PLACE_BYTES))),
    ];
    for command in commands {
        let weight = command.weight();
        let batch = Batch { origin: origin(1), seq: 1, floor: 1, at: Hlc(0), commands: vec![command] };
        let bytes = izar_common::wire::to_bytes(&batch).len();
        assert!(bytes <= weight, "{bytes} bytes, weight {weight}: {batch:?}");
    }
}

fn any_command() -> impl Strategy<Value = Command> {
    prop_oneof![
        (0..4u8).prop_map(|k| key(&format!("k{k}"))),
        (0..4u8).prop_map(|k| Command::RevokeKey(name(&format!("k{k}")))),
        (0..40u128, 0..4u8, 1..3u64).prop_map(|(turn, k, i)| open(turn, &format!("k{k}"), i)),
        (0..40u128).prop_map(close),
        Just(Command::RegisterModel(manifest())),
        (0..3u32).prop_map(|replicas| Command::Deploy(deployment(replicas))),
        Just(Command::Undeploy(name("m"))),
        (0..3u64).prop_map(|based_on| Command::SetPlan { based_on, plan: Plan::default() }),
        (0..3u64).prop_map(|i| Command::CloseOrphans { node: name("c1"), before_incarnation: i }),
        (0..9u64).prop_map(|through| Command::CompactLog { through }),
        (0..9u64).prop_map(|taken_ms| Command::NoteBackup(backup(taken_ms, "/srv/izar"))),
    ]
}

proptest! {
    /// Storing only the rows that were touched gives, when loaded, the state itself.
    #[test]
    fn touched_rows_are_all_that_changes(batches in prop::collection::vec(prop::collection::vec(any_command(), 0..6), 0..30)) {
        let mut state = State::new(name("east"));
        let mut rows: BTreeMap<Vec<u8>, Vec<u8>> =
            state.all_rows().iter().map(|row| (row.key(), state.row(row).unwrap())).collect();
        for commands in batches {
            let applied = apply(&mut state, commands);
            for row in &applied.touched {
                match state.row(row) {
                    Some(value) => drop(rows.insert(row.key(), value)),
                    None => drop(rows.remove(&row.key())),
                }
            }
        }
        let loaded = State::from_rows(name("east"), state.applied(), rows.values()).unwrap();
        prop_assert_eq!(loaded.digest(), state.digest());
        prop_assert_eq!(loaded.config_snapshot(), state.config_snapshot());
    }
}
