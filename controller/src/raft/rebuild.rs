//! A data directory outside the life of a process: what an ended member leaves, and what a member begins with that goes
//! on from a state without its log, in a new life or, because it lost its memory, in the same one (`controller/rejoin`).
//!
//! A new life has terms and indices of its own, above all that the old one can have had, and a term tells its life. Members
//! of different lives do not hear each other (`message::strike_other_lives`): so one that is left over from the old life,
//! or comes back, decides nothing in the new one, and a member of the new one acknowledges nothing to the old.
//! Nothing here runs beside a daemon: redb locks its files.

use std::path::Path;

use anyhow::{Context, ensure};
use izar_common::id::NodeId;

use super::applier::{batch_of, encode_audit};
use super::log::{self, Position};
use super::marker::{self, Memory};
use super::{AUDIT_DIR, LOG_FILE, Options, STATE_FILE};
use crate::state::State;
use crate::state::rebirth::Rebirth;
use crate::state::store::{self, Segment, Store};

/// What an ended member had, all of its log applied.
#[derive(Debug)]
pub struct Remains {
    pub state: State,
    /// The audit trail on its disk, in order.
    pub segments: Vec<Segment>,
    /// What follows it, from entries that the state on disk had not yet.
    pub tail: Vec<u8>,
    pub reach: Reach,
}

/// How far an ended member got.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Reach {
    pub node: NodeId,
    /// What its state on disk had applied.
    pub applied: u64,
    /// What it knew to be decided.
    pub committed: u64,
    /// Its last entry. Of several members the one with the highest term, then the highest index, has the most.
    pub last: u64,
    pub last_term: u64,
    /// Time of the last entry, in Unix milliseconds.
    pub latest_ms: u64,
}

/// Reads an ended member's data directory and applies the whole log, also what it did not know to be decided: it may
/// have been, and acknowledged. What was not decided takes effect late, as any proposal may.
pub fn remains(options: &Options) -> anyhow::Result<Remains> {
    let dir = &options.data_dir;
    let node = marker::owner(options)?;
    let kept = log::read(&dir.join(LOG_FILE))?;
    let path = dir.join(STATE_FILE);
    ensure!(path.exists(), "{} is missing: take another member's data directory", path.display());
    let opened = Store::open(&path, &dir.join(AUDIT_DIR), &options.site, &[])?;
    let (mut state, segments) = (opened.state, opened.store.reader().cut()?.segments);
    let (applied, last) = (state.applied(), kept.last());
    let (first, committed) = (kept.truncated.index, kept.hard_state.commit);
    ensure!(
        first <= applied && applied <= last.index,
        "log and state in {} do not fit together: the log holds {}..={}, applied are {applied}",
        dir.display(),
        first + 1,
        last.index
    );
    let mut tail = Vec::new();
    for entry in &kept.entries[(applied - first) as usize..] {
        match batch_of(entry)? {
            Some(batch) => encode_audit(state.apply(entry.index, &batch).changes, &mut tail),
            None => state.pass(entry.index),
        }
    }
    let latest_ms = state.latest().ms();
    let reach = Reach { node, applied, committed, last: last.index, last_term: last.term, latest_ms };
    Ok(Remains { state, segments, tail, reach })
}

/// Takes an empty directory for a member of a new life. From here on a daemon refuses it until `finish` was called.
///
/// Model files and answers that wait to be recorded may lie there already.
pub fn claim(options: &Options) -> anyhow::Result<()> {
    let dir = &options.data_dir;
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let name = entry.with_context(|| format!("list {}", dir.display()))?.file_name();
        let welcome = MAY_BE_THERE.iter().any(|may| name == *may);
        ensure!(
            welcome,
            "{} is not empty: it holds {}; move what is there away (a restore that broke off is to be deleted whole)",
            dir.display(),
            name.to_string_lossy()
        );
        refuse_links(&dir.join(name))?;
    }
    marker::claim(options)?;
    // A ready directory without log and state is one that lost its memory, and no daemon starts on it.
    marker::set_ready(options)?;
    create_audit(dir)
}

/// Takes a directory for a member that is given the group's memory, and clears away what an earlier try left. From here
/// on a daemon does not begin without that memory.
pub fn claim_to_join(options: &Options) -> anyhow::Result<()> {
    let dir = &options.data_dir;
    ensure!(marker::memory(options)? != Memory::Begun, "{} holds a member's memory", dir.display());
    marker::claim(options)?;
    marker::set_joining(options)?;
    for file in [LOG_FILE, STATE_FILE] {
        absent(std::fs::remove_file(dir.join(file))).with_context(|| format!("remove {file}"))?;
    }
    absent(std::fs::remove_dir_all(dir.join(AUDIT_DIR))).with_context(|| format!("remove {AUDIT_DIR}"))?;
    create_audit(dir)
}

fn absent(removed: std::io::Result<()>) -> std::io::Result<()> {
    removed.or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn create_audit(dir: &Path) -> anyhow::Result<()> {
    let audit = dir.join(AUDIT_DIR);
    std::fs::create_dir(&audit).with_context(|| format!("create {}", audit.display()))
}

/// Refuses all but real directories and regular files, at every depth: whoever restores may be root, and the directory
/// another user's, who must not be able to name what root writes to or gives away.
pub fn refuse_links(path: &Path) -> anyhow::Result<()> {
    let kind = std::fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?.file_type();
    ensure!(kind.is_dir() || kind.is_file(), "{} is neither a file nor a directory: remove it", path.display());
    if kind.is_dir() {
        for entry in std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
            refuse_links(&entry.with_context(|| format!("list {}", path.display()))?.path())?;
        }
    }
    Ok(())
}

/// What a new member's directory may hold before.
const MAY_BE_THERE: [&str; 2] = [BLOBS, "provisional.log"];
/// Where model files lie.
const BLOBS: &str = "blobs";

/// The audit segment of a number in a member's directory.
pub fn audit_segment(options: &Options, number: u64) -> std::path::PathBuf {
    store::audit_segment(&options.data_dir.join(AUDIT_DIR), number)
}

/// Writes state and log of a claimed member of a new life, whose audit trail ends with segment number `segment`.
pub fn finish(options: &Options, state: &State, rebirth: &Rebirth, segment: u64) -> anyhow::Result<()> {
    let base = Position { index: rebirth.applied, term: first_term(state.incarnation()) };
    write(options, state, base, 0, rebirth.starts, segment)
}

/// Writes state and log of a member that was given the group's memory as of an entry of `term`. It has voted for itself
/// in that term, so it votes for nobody else in a term in which it may have voted before.
pub fn finish_joining(options: &Options, state: &State, term: u64, segment: u64) -> anyhow::Result<()> {
    let me = options.members.iter().find(|member| member.node == options.node);
    let me = me.with_context(|| format!("{} is not among the members", options.node))?.id;
    let base = Position { index: state.applied(), term };
    write(options, state, base, me, state.starts_of(&options.node), segment)?;
    marker::set_ready(options)
}

fn write(options: &Options, state: &State, base: Position, vote: u64, starts: u64, segment: u64) -> anyhow::Result<()> {
    let dir: &Path = &options.data_dir;
    let (audit, blobs) = (dir.join(AUDIT_DIR), dir.join(BLOBS));
    marker::sync_dir(&audit).with_context(|| format!("sync {}", audit.display()))?;
    if blobs.is_dir() {
        marker::sync_dir(&blobs).with_context(|| format!("sync {}", blobs.display()))?;
    }
    let mut voters: Vec<u64> = options.members.iter().map(|member| member.id).collect();
    voters.sort_unstable();
    store::begin(&dir.join(STATE_FILE), &audit, state, &voters, segment)?;
    log::begin(&dir.join(LOG_FILE), base, vote, starts)?;
    marker::sync_dir(dir).with_context(|| format!("sync {}", dir.display()))
}

/// Elections of one life: one every 200 ms for 27 years.
const TERMS: u64 = 1 << 32;

/// The term that a life begins with: above every term of the lives before.
fn first_term(incarnation: u64) -> u64 {
    incarnation.saturating_mul(TERMS)
}

/// Which life a term is of; 0 in the first, which begins with none.
pub fn life_of(term: u64) -> u64 {
    term / TERMS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::Member;
    use std::time::Duration;

    fn options(dir: &Path) -> Options {
        let member = |id: u64| Member {
            id,
            node: format!("c{id}").parse().unwrap(),
            address: format!("127.0.0.1:{id}").parse().unwrap(),
        };
        Options {
            data_dir: dir.join("data"),
            cluster: "bank".parse().unwrap(),
            site: "east".parse().unwrap(),
            node: "c1".parse().unwrap(),
            members: (1..=3).map(member).collect(),
            tick: Duration::from_millis(20),
            election_ticks: 10,
            heartbeat_ticks: 2,
        }
    }

    #[test]
    fn a_member_of_a_new_life_opens_and_one_that_broke_off_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        claim(&options).unwrap();
        let error = format!("{:#}", super::super::start::open(&options).err().expect("refused"));
        assert!(error.contains("is missing"), "{error}");
        let error = format!("{:#}", claim(&options).unwrap_err());
        assert!(error.contains("is not empty"), "{error}");
        let mut state = State::new(options.site.clone());
        let rebirth = state.begin_life(2);
        std::fs::write(audit_segment(&options, 1), b"").unwrap();
        finish(&options, &state, &rebirth, 1).unwrap();
        drop(super::super::start::open(&options).unwrap());
        let remains = remains(&options).unwrap();
        assert_eq!((remains.state.digest(), remains.tail.len()), (state.digest(), 0));
        assert_eq!((remains.reach.last, remains.reach.last_term), (rebirth.applied, 2 << 32));
    }

    #[test]
    fn model_files_may_lie_there_already_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        std::fs::create_dir_all(options.data_dir.join("blobs")).unwrap();
        claim(&options).unwrap();
        let other = Options { data_dir: dir.path().join("other"), ..options };
        std::fs::create_dir(&other.data_dir).unwrap();
        std::fs::write(other.data_dir.join("notes"), "").unwrap();
        let error = claim(&other).unwrap_err().to_string();
        assert!(error.contains("holds notes"), "{error}");
    }

    #[test]
    fn a_link_in_the_place_of_what_may_lie_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let refused = |options: &Options, link: &str, to: &Path| {
            std::os::unix::fs::symlink(to, options.data_dir.join(link)).unwrap();
            let error = claim(options).unwrap_err().to_string();
            assert!(error.contains(link) && error.contains("neither a file nor a directory"), "{error}");
            assert!(!options.data_dir.join("izar.json").exists(), "nothing was written");
        };
        let one = options(dir.path());
        std::fs::create_dir(&one.data_dir).unwrap();
        refused(&one, "blobs", &elsewhere);
        let other = Options { data_dir: dir.path().join("other"), ..one };
        std::fs::create_dir_all(other.data_dir.join("blobs")).unwrap();
        refused(&other, "blobs/x", Path::new("/etc/hostname"));
    }
}
