//! Turns of projects that are answered although the cluster cannot record: noted on this controller's disk before the
//! first byte, and recorded when there is a quorum again.
//!
//! The notes are one file of frames, each fsynced. A process that ended finds its notes again: turns whose end is not among
//! them were broken off with it. Recording is by turn id and so takes effect once, however often it is tried; when nothing
//! is left to record, the file is emptied. Both the number of notes and the time without a quorum are bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Context;
use izar_common::id::TurnId;
use izar_common::wire::{self, Wire};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::raft::{Raft, Unavailable};
use crate::state::command::{Command, Refusal, Reply};
use crate::state::turns::{Opening, Outcome};

/// The file in the data directory.
const FILE: &str = "provisional.log";
/// Turns that may be noted until all of them are recorded: the file stays below 10 MiB.
const TURNS: usize = 10_000;
/// How long after the loss of the quorum requests are still answered: beyond that it is no hiccup, and nobody decides any
/// more who may ask.
const ANSWER_FOR: Duration = Duration::from_secs(300);
/// Pause between attempts to record.
const RECORD_AGAIN: Duration = Duration::from_millis(500);

/// One note.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Note {
    Opened(Opening),
    Closed { turn: TurnId, outcome: Outcome },
}

impl Wire for Note {
    const TYPE: u16 = 71;
    const LIMIT: usize = 16 << 10;
}

/// Why a request is not answered without a quorum.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{TURNS} turns wait to be recorded, which is the limit")]
    Full,
    #[error("there has been no quorum for {} s, and requests are answered for so long at most", ANSWER_FOR.as_secs())]
    TooLong,
    #[error("this controller cannot note it for later")]
    Write,
}

/// A turn that is to be recorded.
#[derive(Debug, Clone, PartialEq)]
struct Noted {
    opening: Opening,
    /// `None` while it runs.
    outcome: Option<Outcome>,
    /// Its opening is recorded.
    opened: bool,
}

/// What is noted, and what may be.
#[derive(Debug, Default)]
struct Book {
    turns: BTreeMap<TurnId, Noted>,
    /// Turns in the file, recorded ones included.
    written: usize,
    /// Since when there is no quorum.
    lost: Option<Instant>,
}

impl Book {
    /// Takes up the notes of a process that has ended; turns without an end were broken off with it.
    fn restore(notes: Vec<Note>) -> Self {
        let mut book = Self::default();
        for note in notes {
            match note {
                Note::Opened(opening) => book.open(opening),
                Note::Closed { turn, outcome } => book.close(turn, outcome),
            }
        }
        for noted in book.turns.values_mut() {
            noted.outcome.get_or_insert(Outcome::Abandoned);
        }
        book
    }

    fn admits(&self, now: Instant) -> Result<(), Refused> {
        if self.lost.is_some_and(|lost| lost + ANSWER_FOR <= now) {
            return Err(Refused::TooLong);
        }
        if self.written >= TURNS { Err(Refused::Full) } else { Ok(()) }
    }

    fn open(&mut self, opening: Opening) {
        self.written += 1;
        self.turns.insert(opening.turn, Noted { opening, outcome: None, opened: false });
    }

    fn close(&mut self, turn: TurnId, outcome: Outcome) {
        if let Some(noted) = self.turns.get_mut(&turn) {
            noted.outcome = Some(outcome);
        }
    }
}

/// Reads notes up to the first that is not whole: one that was being written when the machine went down, which nobody was
/// told of. Returns where that begins, too.
fn parse(bytes: &[u8]) -> (Vec<Note>, usize) {
    let (mut notes, mut end) = (Vec::new(), 0);
    while let Ok((note, length)) = wire::decode::<Note>(&bytes[end..]) {
        notes.push(note);
        end += length;
    }
    if end < bytes.len() {
        log::warn!(bytes = bytes.len() - end; "the last provisional record is not whole and is left out");
    }
    (notes, end)
}

/// A handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Provisional(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    book: Mutex<Book>,
    /// Held while a note is written, and while the file is emptied.
    file: Mutex<File>,
    /// There is something new to record.
    noted: Notify,
}

impl Provisional {
    /// Opens the notes in the data directory.
    pub fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        let read = || -> std::io::Result<(File, Vec<Note>)> {
            let mut file = File::options().read(true).append(true).create(true).open(&path)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let (notes, end) = parse(&bytes);
            file.set_len(end as u64)?;
            Ok((file, notes))
        };
        let (file, notes) = read().with_context(|| format!("open {}", path.display()))?;
        let book = Book::restore(notes);
        if !book.turns.is_empty() {
            log::info!(turns = book.turns.len(); "turns that were answered without a quorum wait to be recorded");
        }
        Ok(Self(Arc::new(Inner { book: Mutex::new(book), file: Mutex::new(file), noted: Notify::new() })))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().expect("no panic while the book is held")
    }

    /// Whether another request would be taken now.
    pub fn admits(&self) -> bool {
        self.book().admits(Instant::now()).is_ok()
    }

    /// Whether a turn's end belongs here.
    pub fn holds(&self, turn: TurnId) -> bool {
        self.book().turns.contains_key(&turn)
    }

    /// Notes that a turn begins; returns when that is on the disk.
    pub async fn begin(&self, opening: Opening) -> Result<(), Refused> {
        self.book().admits(Instant::now())?;
        self.write(Note::Opened(opening)).await.map_err(|error| {
            log::error!(error = format!("{error:#}"); "the beginning of a turn could not be noted");
            Refused::Write
        })
    }

    /// Notes how a turn ended.
    pub async fn end(&self, turn: TurnId, outcome: Outcome) {
        if let Err(error) = self.write(Note::Closed { turn, outcome }).await {
            log::error!(turn:%, error = format!("{error:#}"); "the end of a turn could not be noted");
        }
        self.0.noted.notify_one();
    }

    async fn write(&self, note: Note) -> anyhow::Result<()> {
        let this = self.clone();
        let write = move || {
            let mut file = this.0.file.lock().expect("no panic while the file is held");
            let before = file.metadata().context("look at the provisional records")?.len();
            let written = file.write_all(&wire::to_bytes(&note)).and_then(|()| file.sync_data());
            if written.is_err() {
                // Half a note would hide what follows.
                let _ = file.set_len(before);
            }
            // Under the file's lock, so that the book says what is in the file. An end is remembered in any case.
            match note {
                Note::Opened(opening) if written.is_ok() => this.book().open(opening),
                Note::Closed { turn, outcome } => this.book().close(turn, outcome),
                Note::Opened(_) => {}
            }
            written.context("write the provisional records")
        };
        tokio::task::spawn_blocking(write).await.context("write on a thread")?
    }

    /// Records what is noted whenever there is a quorum, until the end.
    pub async fn run(self, raft: Raft, end: CancellationToken) {
        let mut leadership = raft.leadership();
        let recording = async {
            loop {
                let led = leadership.borrow_and_update().leader.is_some();
                self.follow(led);
                let left = led && self.record(&raft).await.is_err();
                tokio::select! {
                    changed = leadership.changed() => if changed.is_err() { return },
                    () = self.0.noted.notified() => {}
                    () = tokio::time::sleep(RECORD_AGAIN), if left => {}
                }
            }
        };
        end.run_until_cancelled(recording).await;
    }

    fn follow(&self, led: bool) {
        let mut book = self.book();
        book.lost = if led { None } else { book.lost.or_else(|| Some(Instant::now())) };
    }

    /// Records every turn as far as it has come; an error means that there is no quorum after all.
    async fn record(&self, raft: &Raft) -> Result<(), Unavailable> {
        let noted: Vec<Noted> = self.book().turns.values().cloned().collect();
        for Noted { opening, outcome, opened } in noted {
            let turn = opening.turn;
            if !opened {
                // An earlier process may have noted it, or recorded its opening: then it is this one's from now on.
                let (key, origin) = (opening.key.clone(), raft.origin().clone());
                let opening = Opening { origin: origin.clone(), ..opening };
                let mut reply = raft.propose(Command::OpenTurn(opening)).await?;
                if reply == Reply::Refused(Refusal::TurnExists(turn)) {
                    reply = raft.propose(Command::ResumeTurn { turn, key, origin }).await?;
                }
                match reply {
                    Reply::Done => {}
                    Reply::Refused(refusal) => {
                        log::error!(turn:%, refusal:%; "a turn that was answered without a quorum is refused");
                        self.book().turns.remove(&turn);
                        continue;
                    }
                }
                if let Some(noted) = self.book().turns.get_mut(&turn) {
                    noted.opened = true;
                }
            }
            let Some(outcome) = outcome else { continue };
            match raft.propose(Command::CloseTurn { turn, outcome }).await? {
                Reply::Done => log::debug!(turn:%; "a turn that was answered without a quorum is recorded"),
                Reply::Refused(refusal) => log::debug!(turn:%, refusal:%; "a turn is recorded already"),
            }
            self.book().turns.remove(&turn);
        }
        self.clear().await;
        Ok(())
    }

    /// Empties the file when all that is in it is recorded.
    async fn clear(&self) {
        let this = self.clone();
        let clear = move || {
            let mut file = this.0.file.lock().expect("no panic while the file is held");
            let mut book = this.book();
            if book.written == 0 || !book.turns.is_empty() {
                return;
            }
            let cleared = file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).and_then(|_| file.sync_all());
            match cleared {
                Ok(()) => book.written = 0,
                // What is in there is recorded again, which changes nothing.
                Err(error) => log::warn!(error:%; "the provisional records could not be cleared"),
            }
        };
        let _ = tokio::task::spawn_blocking(clear).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::Origin;
    use izar_common::chat::Usage;
    use izar_common::id::Hash;

    fn opening(turn: u128) -> Opening {
        Opening {
            turn: TurnId(turn),
            tenant: "default".parse().unwrap(),
            project: "default".parse().unwrap(),
            key: "k".parse().unwrap(),
            deployment: "m".parse().unwrap(),
            revision: Hash([1; 32]),
            prompt_tokens: 1,
            max_tokens: 2,
            stream: true,
            origin: Origin { node: "c1".parse().unwrap(), incarnation: 1 },
            once: None,
            provisional: true,
        }
    }

    fn cancelled() -> Outcome {
        Outcome::Cancelled { usage: Usage::default() }
    }

    #[tokio::test]
    async fn notes_outlive_the_process_and_a_torn_one_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = Provisional::open(dir.path()).unwrap();
        for turn in 1..=3 {
            first.begin(opening(turn)).await.unwrap();
        }
        first.end(TurnId(1), cancelled()).await;
        assert!(first.holds(TurnId(3)) && !first.holds(TurnId(4)));
        drop(first);
        let path = dir.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(&wire::to_bytes(&Note::Opened(opening(4)))[..20]);
        std::fs::write(&path, bytes).unwrap();
        let second = Provisional::open(dir.path()).unwrap();
        let ends: Vec<_> = second.book().turns.values().map(|noted| noted.outcome.clone().unwrap()).collect();
        assert_eq!(ends, [cancelled(), Outcome::Abandoned, Outcome::Abandoned]);
        second.begin(opening(6)).await.unwrap();
        assert!(Provisional::open(dir.path()).unwrap().holds(TurnId(6)), "what is torn hides nothing that follows");
        second.book().turns.clear();
        second.clear().await;
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        second.begin(opening(5)).await.unwrap();
        assert!(Provisional::open(dir.path()).unwrap().holds(TurnId(5)), "what follows is read again");
    }

    #[test]
    fn both_the_number_and_the_time_are_bounded() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.lost = Some(now);
        assert!(book.admits(now + ANSWER_FOR / 2).is_ok());
        assert!(matches!(book.admits(now + ANSWER_FOR), Err(Refused::TooLong)));
        (0..TURNS as u128).for_each(|turn| book.open(opening(turn)));
        assert!(matches!(book.admits(now), Err(Refused::Full)));
        book.turns.clear();
        assert!(book.admits(now).is_err(), "what is recorded still lies in the file");
    }
}
