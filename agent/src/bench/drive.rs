//! Drives an engine as a worker does: jobs in, events out, asleep while the executor computes.

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use izar_common::chat::{Class, Job, JobEvent, Sampling, Token};
use izar_common::id::{DeploymentId, Hash, TurnId};
use izar_common::wire::agent::EngineOptions;

use super::local::Local;
use crate::engine::{Engine, Events, State};
use crate::serve;

/// What is waited for an event at most: a step of a large model on a slow machine is far shorter, and so is its load.
const STALL: Duration = Duration::from_secs(600);

/// Without an outcome for so long, no step is under way any more.
const QUIET: Duration = Duration::from_millis(200);

/// One wake-up waits at most: whoever wakes takes all that has happened.
const WAKES: usize = 1;

/// What the model's end tokens do to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    Ignored,
    Heeded,
}

/// An engine, and numbers for its jobs.
pub struct Drive {
    engine: Box<dyn Engine>,
    woken: Receiver<()>,
    jobs: u64,
}

impl Drive {
    /// Starts an engine and waits until it is ready.
    pub fn start(model: &Local, options: &EngineOptions) -> anyhow::Result<Self> {
        let (wake, woken) = sync_channel(WAKES);
        let wake = move || {
            // If a wake-up waits already, it serves for both.
            let _ = wake.try_send(());
        };
        let engine = serve::start(model.manifest.clone(), model.files.clone(), None, options, Vec::new(), wake)?;
        let mut drive = Self { engine, woken, jobs: 0 };
        while *drive.engine.state() != State::Ready {
            drive.wait().context("wait for the model")?;
            drive.poll()?;
        }
        Ok(drive)
    }

    /// Gives the engine a job; returns its number.
    pub fn submit(&mut self, prompt: &[Token], max_tokens: usize, temperature: f32, ends: Ends) -> u64 {
        self.submit_as(Class::default(), prompt, max_tokens, temperature, ends)
    }
    /// The same for a job of another class.
    pub fn submit_as(
        &mut self,
        class: Class,
        prompt: &[Token],
        max_tokens: usize,
        temperature: f32,
        ends: Ends,
    ) -> u64 {
        self.jobs += 1;
        let sampling = Sampling {
            temperature,
            seed: self.jobs,
            max_tokens: max_tokens as u32,
            ignore_eos: ends == Ends::Ignored,
            ..Sampling::default()
        };
        let job = Job {
            turn: TurnId(self.jobs.into()),
            choice: 0,
            attempt: 0,
            deployment: DeploymentId::new("bench").expect("a plain name"),
            revision: Hash([0; 32]),
            prompt: prompt.to_vec(),
            delivered: Vec::new(),
            sampling,
            cache_salt: [0; 16],
            numerics: None,
            class,
            capsule: Vec::new(),
        };
        self.engine.submit(Instant::now(), self.jobs, job);
        self.jobs
    }
    pub fn cancel(&mut self, job: u64) {
        self.engine.cancel(job);
    }

    /// Sequences in the batch.
    pub fn running(&self) -> u32 {
        self.engine.load().running
    }

    /// The next events, or none if none has come by then.
    pub fn events_until(&mut self, limit: Option<Instant>) -> anyhow::Result<Events> {
        let Some(limit) = limit else { return self.events() };
        loop {
            let events = self.poll()?;
            let left = limit.saturating_duration_since(Instant::now());
            if !events.is_empty() || left.is_zero() {
                return Ok(events);
            }
            if let Err(RecvTimeoutError::Disconnected) = self.woken.recv_timeout(left.min(STALL)) {
                bail!("the executor ended");
            }
        }
    }

    /// The next events, at least one. A job that fails is an error: nothing here asks for what cannot be done.
    pub fn events(&mut self) -> anyhow::Result<Events> {
        loop {
            let events = self.poll()?;
            if !events.is_empty() {
                return Ok(events);
            }
            self.wait()?;
        }
    }

    /// Waits until nothing runs any more, and drops what still comes.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        self.poll()?;
        while self.engine.load().jobs() > 0 {
            self.wait()?;
            self.poll()?;
        }
        // A step of jobs that were cancelled may still be under way.
        while self.woken.recv_timeout(QUIET).is_ok() {
            self.poll()?;
        }
        Ok(())
    }

    fn poll(&mut self) -> anyhow::Result<Events> {
        let events = self.engine.poll(Instant::now());
        if let State::Unloadable(reason) | State::Broken(reason) = self.engine.state() {
            bail!("{reason}");
        }
        for (_, event) in &events {
            if let JobEvent::Failed { reason, .. } = event {
                bail!("a job failed: {reason}");
            }
        }
        Ok(events)
    }
    fn wait(&self) -> anyhow::Result<()> {
        let limit = self.engine.due().map_or(STALL, |due| due.saturating_duration_since(Instant::now()));
        match self.woken.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) if limit == STALL => bail!("nothing came for {} s", STALL.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the executor ended"),
            Ok(()) | Err(RecvTimeoutError::Timeout) => Ok(()),
        }
    }
}
