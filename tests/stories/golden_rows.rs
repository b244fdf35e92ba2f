//! Golden bytes of the state's rows: what one build stored, every later build reads and fingerprints alike.
//!
//! `tests/golden/rows/<row>.bin` holds a row's frame. As with messages, a file is written once, by `IZAR_BLESS=1`, and
//! never changed: members of one cluster may run two builds for a while, and compare digests of these bytes.

use std::path::PathBuf;

use izar_common::id::SiteId;
use izar_controller::state::State;
use izar_controller::state::command::{Command, Origin, Reply};
use izar_controller::state::rows::Row;
use izar_controller::state::tenants::DEFAULT;
use izar_controller::state::turns::Outcome;
use izar_tests::binaries::repository;

use crate::golden_bytes::{all_commands, batch, hex, job, name, usage};

fn file(row: &Row) -> PathBuf {
    let kind = match row {
        Row::Head => "head",
        Row::Tenant(id) if id.as_str() == DEFAULT => "tenant",
        Row::Tenant(_) => "tenant-set",
        Row::Project(id) if id.as_str() == DEFAULT => "project",
        Row::Project(_) => "project-set",
        Row::Key(_) => "key",
        Row::Model(_) => "model",
        Row::Deployment(_) => "deployment",
        Row::Plan => "plan",
        Row::Turn(_) => "turn",
        Row::Origin(_) => "origin",
        Row::Alias(_) => "alias",
        Row::Standing(_) => "standing",
        Row::Gpu(_) => "gpu",
        Row::LastBackup => "last-backup",
        Row::Remedy(_) => "remedy",
    };
    repository().join(format!("tests/golden/rows/{kind}.bin"))
}

/// A state with one row of each kind.
fn state() -> State {
    let mut state = State::new(name::<SiteId>("east"));
    let origin = Origin { node: name("c1"), incarnation: 3 };
    let mut revision = None;
    let mut commands = Vec::new();
    for mut command in all_commands(&origin) {
        match &mut command {
            // Those that would take away again what the others brought.
            Command::RevokeKey(_)
            | Command::Undeploy(_)
            | Command::CloseOrphans { .. }
            | Command::ReleaseGpu { .. }
            | Command::Readmit { .. }
            | Command::EndRemedy { .. } => continue,
            // Nobody orders anything for one that is quarantined.
            Command::HoldGpu { hold, .. } => hold.quarantined = false,
            Command::RegisterModel(manifest) => revision = Some(manifest.revision()),
            Command::Deploy(deployment) => deployment.revision = revision.expect("the model comes first"),
            Command::OpenTurn(opening) => opening.revision = revision.expect("the model comes first"),
            Command::SetPlan { based_on, .. } => *based_on = 0,
            _ => {}
        }
        commands.push(command);
    }
    commands.push(Command::CloseTurn { turn: job().turn, outcome: Outcome::Cancelled { usage: usage() } });
    let applied = state.apply(1, &batch(&origin, commands));
    assert!(applied.replies.iter().all(|reply| *reply == Reply::Done), "{:?}", applied.replies);
    state
}

#[test]
fn every_row_of_the_state_has_golden_bytes_that_read_and_write_the_same() {
    let state = state();
    let mut golden = Vec::new();
    let mut problems = Vec::new();
    for row in state.all_rows() {
        let (path, bytes) = (file(&row), state.row(&row).expect("it was just named"));
        if !path.exists() && std::env::var("IZAR_BLESS").is_ok_and(|v| v == "1") {
            std::fs::create_dir_all(path.parent().expect("it has a folder")).expect("the folder can be made");
            std::fs::write(&path, &bytes).expect("a golden file can be written");
        }
        match std::fs::read(&path) {
            Ok(stored) if stored == bytes => golden.push(stored),
            Ok(_) => problems.push(format!("{}: this build writes other bytes: {}", path.display(), hex(&bytes))),
            Err(_) => problems.push(format!("{} is missing; if the row is new, run with IZAR_BLESS=1", path.display())),
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert_eq!(golden.len(), 16, "one row of each kind, two of tenants and of projects");
    let read = State::from_rows(name("east"), state.applied(), &golden).expect("golden rows are a state");
    assert_eq!(read.digest(), state.digest());
}
