//! Masks of structured answers, computed while the model computes: the next mask is begun as soon as a token is taken,
//! and waited for only where the next one is drawn.
//!
//! Two threads of a worker do it, started by the first structured job: one compiles grammars (and, once, the model's
//! vocabulary), the other computes masks, so that a large schema holds up no running answer. What they cost is bounded
//! in `common/grammar`, so whoever waits for them waits for a short time.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use izar_common::chat::{Grammar, Token};
use izar_common::grammar::{Compiler, Mask, Matcher};
use izar_common::text::{Bundle, Text};

use super::Failure;

/// Work that waits for a thread. Every sequence has one piece at most, and there are 4096 in a batch and 512 waiting at
/// most: so there is always room.
const WORK: usize = 8192;

/// Compiles the grammars of one model. Cheap to clone.
#[derive(Clone)]
pub struct Grammars {
    /// Where the model's text bundle lies; `None` if there is none.
    text: Option<PathBuf>,
    threads: Arc<OnceLock<Threads>>,
}

struct Threads {
    compile: SyncSender<Work>,
    mask: SyncSender<Work>,
}

enum Work {
    Compile { grammar: Grammar, delivered: Vec<Token>, promise: Promise },
    Mask { matcher: Matcher, token: Token, promise: Promise },
}

type Made = Result<(Matcher, Mask), Failure>;

/// Where a mask will be.
#[derive(Clone, Default)]
struct Slot(Arc<(Mutex<Option<Made>>, Condvar)>);

/// The duty to fill a slot. Dropped, it fills it with a failure, so that nobody waits for ever.
struct Promise(Slot);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Made>> {
        self.0.0.lock().expect("no panic while a slot is held")
    }
    fn fill(&self, made: Made) {
        self.lock().get_or_insert(made);
        self.0.1.notify_all();
    }
    fn wait(&self) -> Made {
        let mut made = self.lock();
        loop {
            match made.take() {
                Some(made) => return made,
                None => made = self.0.1.wait(made).expect("no panic while a slot is held"),
            }
        }
    }
}

impl Promise {
    /// Nobody waits for it any more.
    fn idle(&self) -> bool {
        Arc::strong_count(&self.0.0) == 1
    }
    fn keep(self, made: Made) {
        self.0.fill(made);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.0.fill(Err(Failure { reason: "the grammar's thread broke".into(), retryable: true }));
    }
}

impl Grammars {
    /// `text`: where the model's text bundle lies. Nothing is read before the first structured job.
    pub fn new(text: Option<PathBuf>) -> Self {
        Self { text, threads: Arc::default() }
    }

    fn threads(&self) -> Result<&Threads, String> {
        if let Some(threads) = self.threads.get() {
            return Ok(threads);
        }
        let text = self.text.clone().ok_or("this model has no tokenizer, so it cannot follow a grammar")?;
        let start = |name: &str, run: Box<dyn FnOnce(Receiver<Work>) + Send>| {
            let (work, waiting) = sync_channel(WORK);
            std::thread::Builder::new().name(name.into()).spawn(move || run(waiting)).map(|_| work)
        };
        let failed = |error| format!("cannot start a thread for grammars: {error}");
        let compile = start("grammars", Box::new(move |work| compile(&text, &work))).map_err(failed)?;
        let mask = start("masks", Box::new(|work| masks(&work))).map_err(failed)?;
        Ok(self.threads.get_or_init(|| Threads { compile, mask }))
    }
}

fn failed(error: &dyn std::error::Error, retryable: bool) -> Failure {
    Failure { reason: format!("the grammar cannot be followed: {error}"), retryable }
}

fn compile(text: &Path, work: &Receiver<Work>) {
    let mut compiler = None;
    while let Ok(Work::Compile { grammar, delivered, promise }) = work.recv() {
        if promise.idle() {
            continue;
        }
        let compiler: &Result<Compiler, Failure> = compiler.get_or_insert_with(|| load(text));
        let made = match compiler {
            Ok(compiler) => begin(compiler, &grammar, &delivered),
            Err(failure) => Err(failure.clone()),
        };
        promise.keep(made);
    }
}

fn begin(compiler: &Compiler, grammar: &Grammar, delivered: &[Token]) -> Made {
    let make = || {
        let mut matcher = compiler.compile(grammar)?;
        matcher.accept(delivered)?;
        matcher.mask().map(|mask| (matcher, mask))
    };
    make().map_err(|error: izar_common::grammar::Error| failed(&error, false))
}

/// Reads the model's vocabulary.
fn load(text: &Path) -> Result<Compiler, Failure> {
    let unreadable = |error: String| Failure { reason: format!("the tokenizer is unusable: {error}"), retryable: true };
    let json = std::fs::read(text).map_err(|e| unreadable(e.to_string()))?;
    let bundle: Bundle = serde_json::from_slice(&json).map_err(|e| unreadable(e.to_string()))?;
    let text = Text::new(&bundle).map_err(|e| unreadable(e.to_string()))?;
    Compiler::new(&text).map_err(|error| failed(&error, false))
}

fn masks(work: &Receiver<Work>) {
    while let Ok(Work::Mask { mut matcher, token, promise }) = work.recv() {
        if promise.idle() {
            continue;
        }
        let made = matcher.accept(&[token]).and_then(|()| matcher.mask());
        promise.keep(made.map(|mask| (matcher, mask)).map_err(|error| failed(&error, false)));
    }
}

/// The grammar of one answer.
pub struct Constraint {
    grammars: Grammars,
    slot: Slot,
    /// Here between the drawing of a token and its taking.
    matcher: Option<Matcher>,
}

impl Constraint {
    /// Begins to compile; `delivered` is what the answer has already.
    pub fn new(grammar: &Grammar, delivered: &[Token], grammars: &Grammars) -> Result<Self, String> {
        let slot = Slot::default();
        let (grammar, delivered, promise) = (grammar.clone(), delivered.to_vec(), Promise(slot.clone()));
        // A thread that is gone has dropped the promise, which says so.
        let _ = grammars.threads()?.compile.send(Work::Compile { grammar, delivered, promise });
        Ok(Self { grammars: grammars.clone(), slot, matcher: None })
    }

    /// Waits for the mask of the next token.
    pub fn mask(&mut self) -> Result<Mask, Failure> {
        let (matcher, mask) = self.slot.wait()?;
        self.matcher = Some(matcher);
        Ok(mask)
    }

    /// Takes the token that was drawn under the mask, and begins the next mask.
    pub fn take(&mut self, token: Token) {
        let (Some(matcher), Ok(threads)) = (self.matcher.take(), self.grammars.threads()) else { return };
        self.slot = Slot::default();
        let promise = Promise(self.slot.clone());
        let _ = threads.mask.send(Work::Mask { matcher, token, promise });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn golden() -> (tempfile::TempDir, Grammars) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama");
        let bundle = Bundle::from_folder(&folder).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.json");
        std::fs::write(&path, serde_json::to_vec(&bundle).unwrap()).unwrap();
        (dir, Grammars::new(Some(path)))
    }

    /// The tokens of the mask, of the small vocabulary's 512.
    fn allowed(mask: &Mask) -> Vec<Token> {
        (0..512).filter(|token| mask.has(*token)).collect()
    }

    #[test]
    fn masks_follow_the_tokens_and_a_continued_answer_goes_on() {
        let (_dir, grammars) = golden();
        let grammar = Grammar::Regex("[a-c]{3}".into());
        let mut whole = Constraint::new(&grammar, &[], &grammars).unwrap();
        let mut taken = Vec::new();
        loop {
            let mask = whole.mask().unwrap();
            let mut continued = Constraint::new(&grammar, &taken, &grammars).unwrap();
            assert_eq!(allowed(&continued.mask().unwrap()), allowed(&mask), "{taken:?}");
            let token = allowed(&mask)[0];
            // 1 is the end.
            if token == 1 {
                break;
            }
            whole.take(token);
            taken.push(token);
        }
        assert!((1..=3).contains(&taken.len()), "{taken:?}");
    }

    #[test]
    fn a_grammar_that_cannot_be_followed_is_said_where_the_mask_is_needed() {
        let (_dir, grammars) = golden();
        let mut broken = Constraint::new(&Grammar::Regex("(".into()), &[], &grammars).unwrap();
        let failure = broken.mask().unwrap_err();
        assert!(!failure.retryable && failure.reason.contains("grammar"), "{failure:?}");
        let mut wrong = Constraint::new(&Grammar::Regex("a".into()), &[1, 1], &grammars).unwrap();
        assert!(!wrong.mask().unwrap_err().retryable, "what was delivered does not follow it");
    }

    #[test]
    fn a_model_whose_tokenizer_is_missing_refuses_or_fails_and_nobody_waits_for_ever() {
        assert!(Constraint::new(&Grammar::JsonObject, &[], &Grammars::new(None)).is_err());
        let gone = Grammars::new(Some("/nonexistent/text.json".into()));
        let failure = Constraint::new(&Grammar::JsonObject, &[], &gone).unwrap().mask().unwrap_err();
        assert!(failure.retryable && failure.reason.contains("tokenizer"), "{failure:?}");
        let slot = Slot::default();
        drop(Promise(slot.clone()));
        assert!(slot.wait().is_err());
    }
}
