//! The inside of a worker process: frames from the agent in, an engine's events out.
//!
//! Three threads: this one plans and writes, one reads the socket, one computes. All that happens arrives in one
//! channel, where an idle worker sleeps. The worker keeps nothing: when the agent goes, its end of the socket closes
//! and the worker returns at once, whatever is being computed. One `Step` frame carries what a step gave to all jobs.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::{Buf, BytesMut};
use izar_common::chat::Token;
use izar_common::health::Load;
use izar_common::id::NumericsId;
use izar_common::manifest::{Kind, Manifest};
use izar_common::wire::agent::{Device, EngineOptions, Kernels};
use izar_common::wire::worker::{FromWorker, REASON, ToWorker};
use izar_common::wire::{self, encode};

use crate::engine::executor::Executor;
use crate::engine::sampler::Grammars;
use crate::engine::{Engine, Events, Lm, State};
use crate::model;
use crate::model::echo::Echo;
use crate::ops;
use crate::ops::cpu::pool::Threads;

/// Happenings that wait for the planner. When it is full the reader stops, and with it, in time, the agent.
const HAPPENINGS: usize = 64;

/// Bytes read from the socket at once: some hundred usual jobs.
const READ_BYTES: usize = 64 << 10;

/// Events in a frame at most: with all their alternatives they take 210 bytes each, and a frame stays below its 4 MiB.
const FRAME_EVENTS: usize = 16_384;

/// Time between two notes of what the cache holds. Under load that changes with every step; for this long, controllers
/// remember themselves what they have sent where.
const SKETCH_EVERY: Duration = Duration::from_secs(1);

/// What can happen to a worker.
enum Happening {
    Frames(Vec<ToWorker>),
    /// The executor has an outcome.
    Wake,
    /// The agent closed its end, or sent what is not a frame.
    Gone(Result<(), wire::Error>),
}

/// Serves one model on the socket until the agent goes (`Ok`), or the engine breaks (`Err`: start a new process).
pub fn run(stream: UnixStream) -> anyhow::Result<()> {
    let (say, happenings) = sync_channel(HAPPENINGS);
    let input = stream.try_clone().context("duplicate the worker's socket")?;
    let reader = say.clone();
    std::thread::Builder::new().name("reader".into()).spawn(move || read(input, &reader))?;
    let mut frames = match happenings.recv().context("wait for the load")? {
        Happening::Frames(frames) => frames.into_iter(),
        Happening::Gone(end) => return end.context("read the load"),
        Happening::Wake => unreachable!("nothing runs before the load"),
    };
    let Some(ToWorker::Load { manifest, files, text, engine, cpus }) = frames.next() else {
        bail!("the first frame is not a load")
    };
    let numerics = numerics(&manifest, &engine);
    let wake = move || {
        // A planner that is gone needs no waking.
        let _ = say.send(Happening::Wake);
    };
    let engine = start(manifest, files, text, &engine, cpus, wake)?;
    let mut worker = Worker { engine, numerics, told: State::Loading, told_held: 0, sketch_due: Instant::now() };
    let mut output = Output { stream, buffer: BytesMut::new(), busy: 0, steps: 0 };
    frames.try_for_each(|frame| worker.take(frame))?;
    let end = worker.serve(&happenings, &mut output);
    match end {
        // The agent went while something was written to it.
        Err(error) if broken_pipe(&error) => Ok(()),
        end => end,
    }
}

/// What an echo worker's times are multiplied by, from 1 to 1000: so it plays a card that is throttled. Where it is not
/// set, or says nothing of the kind, nothing changes; models with weights do not look.
const SLOWDOWN: &str = "IZAR_ECHO_SLOWDOWN";

fn slowdown(said: Option<&str>) -> u64 {
    said.and_then(|said| said.parse().ok()).map_or(1, |times: u64| times.clamp(1, 1_000))
}

/// Makes the engine for a model. Loading happens on the engine's own thread, which calls `wake` when there is something
/// to poll. `cpus`: see [`Threads`].
pub fn start(
    manifest: Manifest,
    files: Vec<PathBuf>,
    text: Option<PathBuf>,
    options: &EngineOptions,
    cpus: Vec<u32>,
    wake: impl Fn() + Send + 'static,
) -> anyhow::Result<Box<dyn Engine>> {
    if let Kind::Echo { first_token_us, next_token_us } = manifest.kind {
        let context = match options.max_context as usize {
            0 => manifest.context as usize,
            asked => asked.min(manifest.context as usize),
        };
        let slower = slowdown(std::env::var(SLOWDOWN).ok().as_deref());
        return Ok(Box::new(Echo::new(first_token_us * slower, next_token_us * slower, context)));
    }
    let grammars = Grammars::new(text.clone());
    let how = model::Options::of(options);
    let load = move || {
        let mut loaded = model::load(&manifest, &files, &how?)?;
        loaded.eos.extend(text.as_deref().map(ends).transpose()?.unwrap_or_default());
        Ok(loaded)
    };
    let executor =
        Executor::start(Threads { count: options.threads as usize, cpus }, load, wake).context("start the executor")?;
    Ok(Box::new(Lm::new(executor, grammars, options.max_batch as usize)))
}

/// Reads the end tokens of a text bundle, past its vocabulary: a folder's own files often name fewer.
fn ends(text: &Path) -> Result<Vec<Token>, model::Error> {
    #[derive(serde::Deserialize)]
    struct Ends {
        eos: Vec<Token>,
    }
    let file = text.display().to_string();
    let bytes = std::fs::read(text).map_err(|source| model::Error::Read { file: file.clone(), source })?;
    let ends: Ends = serde_json::from_slice(&bytes)
        .map_err(|error| model::Error::Format { file, reason: format!("not a text bundle: {error}") })?;
    Ok(ends.eos)
}

/// Names what computes here: the revision, how weights and cache are kept, and the operations. Our kernels give the same
/// bits on every processor; what the reference operations give depends on its instructions.
fn numerics(manifest: &Manifest, options: &EngineOptions) -> NumericsId {
    let (quant, cache) = (options.quant.as_str(), options.cache.as_str());
    let operations = match (options.device, options.kernels) {
        // What cannot be opened cannot be loaded either.
        (Device::Cuda(index), _) => format!("cuda {}", ops::cuda::name(index).unwrap_or_default()),
        (Device::Cpu, Kernels::Reference) => format!("reference {}", instructions()),
        (Device::Cpu, _) => format!("kernels {} {}", ops::KERNELS, options.activations),
    };
    NumericsId::of(&[&manifest.revision().to_string(), quant, cache, &operations])
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    let (avx512, avx2) = (is_x86_feature_detected!("avx512f"), is_x86_feature_detected!("avx2"));
    match (avx512, avx2 && is_x86_feature_detected!("fma")) {
        (true, _) => "x86-64 avx512f",
        (_, true) => "x86-64 avx2 fma",
        _ => "x86-64",
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> &'static str {
    std::env::consts::ARCH
}

struct Worker {
    engine: Box<dyn Engine>,
    numerics: NumericsId,
    /// The state that the agent knows.
    told: State,
    /// The state of the cache that the agent knows, and when it may hear of another one.
    told_held: u64,
    sketch_due: Instant,
}

impl Worker {
    fn serve(&mut self, happenings: &Receiver<Happening>, output: &mut Output) -> anyhow::Result<()> {
        loop {
            let events = self.engine.poll(Instant::now());
            output.events(events, self.engine.load(), self.engine.steps())?;
            if !self.tell(output)? {
                return Ok(());
            }
            let due = [self.engine.due(), self.tell_held(output)?].into_iter().flatten().min();
            let Some(first) = wait(happenings, due)? else { continue };
            // Whatever else has come is taken before the next step, so that it can be part of it.
            for happening in std::iter::once(first).chain(happenings.try_iter()) {
                match happening {
                    Happening::Frames(frames) => frames.into_iter().try_for_each(|frame| self.take(frame))?,
                    Happening::Wake => {}
                    Happening::Gone(end) => return end.context("read from the agent"),
                }
            }
        }
    }
    fn take(&mut self, frame: ToWorker) -> anyhow::Result<()> {
        match frame {
            ToWorker::Submit { id, job } => self.engine.submit(Instant::now(), id, job),
            ToWorker::Cancel { id } => self.engine.cancel(id),
            ToWorker::Load { .. } => bail!("a second load"),
        }
        Ok(())
    }
    /// Tells the agent of a change of state; returns whether to go on.
    fn tell(&mut self, output: &mut Output) -> anyhow::Result<bool> {
        let state = self.engine.state();
        if *state == self.told {
            return Ok(true);
        }
        self.told = state.clone();
        match &self.told {
            State::Loading => {}
            State::Ready => output.send(&FromWorker::Ready { numerics: self.numerics })?,
            State::Unloadable(reason) => {
                // It may hold what a file says.
                output.send(&FromWorker::Unloadable { reason: reason.chars().take(REASON).collect() })?;
                return Ok(false);
            }
            State::Broken(reason) => bail!("the engine broke: {reason}"),
        }
        Ok(true)
    }

    /// Tells the agent what the cache holds, if that has changed; returns when to try again if it is too soon.
    fn tell_held(&mut self, output: &mut Output) -> anyhow::Result<Option<Instant>> {
        let (held, now) = (self.engine.held(), Instant::now());
        if held == self.told_held || now < self.sketch_due {
            return Ok((held != self.told_held).then_some(self.sketch_due));
        }
        (self.told_held, self.sketch_due) = (held, now + SKETCH_EVERY);
        output.send(&FromWorker::Sketch(self.engine.sketch()))?;
        Ok(None)
    }
}

/// Waits for a happening until the engine is due; `None` is that time.
fn wait(happenings: &Receiver<Happening>, due: Option<Instant>) -> anyhow::Result<Option<Happening>> {
    let Some(due) = due else { return Ok(Some(happenings.recv().context("the reader ended")?)) };
    match happenings.recv_timeout(due.saturating_duration_since(Instant::now())) {
        Ok(happening) => Ok(Some(happening)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => bail!("the reader ended"),
    }
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset))
}

/// The way back to the agent. Writing blocks: an agent that does not read stops its worker, and nothing piles up.
struct Output {
    stream: UnixStream,
    buffer: BytesMut,
    /// Running and waiting jobs, and the steps that were computed, as the agent knows them.
    busy: u32,
    steps: u64,
}

impl Output {
    /// Sends events, the load when it fell without one (a cancelled job), and that a step came to an end without any (a
    /// part of a prompt).
    fn events(&mut self, mut events: Events, load: Load, steps: u64) -> anyhow::Result<()> {
        if events.is_empty() && load.jobs() >= self.busy && steps == self.steps {
            return Ok(());
        }
        (self.busy, self.steps) = (load.jobs(), steps);
        loop {
            let later = events.split_off(events.len().min(FRAME_EVENTS));
            encode(&FromWorker::Step { events, load }, &mut self.buffer);
            events = later;
            if events.is_empty() {
                return self.flush();
            }
        }
    }
    fn send(&mut self, message: &FromWorker) -> anyhow::Result<()> {
        encode(message, &mut self.buffer);
        self.flush()
    }
    fn flush(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Reads frames until the end, and passes on as many at once as have come.
fn read(mut input: UnixStream, say: &SyncSender<Happening>) {
    let end = read_frames(&mut input, say);
    // A planner that is gone needs no word of the end.
    let _ = say.send(Happening::Gone(end));
}

fn read_frames(input: &mut UnixStream, say: &SyncSender<Happening>) -> Result<(), wire::Error> {
    let mut buffer = BytesMut::new();
    let mut chunk = vec![0; READ_BYTES];
    loop {
        let bytes = match input.read(&mut chunk) {
            Ok(0) if buffer.is_empty() => return Ok(()),
            Ok(0) => return Err(wire::Error::Truncated),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        buffer.extend_from_slice(&chunk[..bytes]);
        let mut frames = Vec::new();
        loop {
            match wire::decode(&buffer) {
                Ok((frame, length)) => {
                    frames.push(frame);
                    buffer.advance(length);
                }
                Err(wire::Error::Truncated) => break,
                Err(error) => return Err(error),
            }
        }
        if !frames.is_empty() && say.send(Happening::Frames(frames)).is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
