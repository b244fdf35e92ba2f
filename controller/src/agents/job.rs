//! A job that an agent works on: the stream of its events.
//!
//! There is no task behind it: whoever holds the stream reads the agent's QUIC stream itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use izar_common::chat::JobEvent;
use izar_common::id::{NodeId, NumericsId, WorkerId};
use izar_common::quic::{self, Receiver, Sender};

use super::roster::Roster;
use crate::scheduler::Why;

/// The events of a job, from the worker that it was placed on. Dropping it cancels the job.
pub struct JobStream {
    pub agent: NodeId,
    pub worker: WorkerId,
    /// What computes it.
    pub numerics: Option<NumericsId>,
    /// Why it was placed there; `None` for a job that another controller began.
    pub why: Option<Why>,
    /// When it was sent there.
    pub sent: Instant,
    /// `None` when the job has ended or its stream is lost.
    streams: Option<(Sender, Receiver)>,
    /// What there is to tell instead of what the worker says, once.
    told: Option<Result<JobEvent, AgentLost>>,
    /// Counts the job until it ends.
    counted: Option<Counted>,
    pace: Option<Pace>,
}

/// The job's agent is lost, or cannot be reached: why. The job may be placed again.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentLost(pub String);

/// Tokens that have come since the last look at the pace, and when that was. There is none before the first token: until
/// then the prompt is computed.
struct Pace {
    tokens: u32,
    since: Instant,
}

/// How often the pace of a job is looked at, at most.
const LOOK: Duration = Duration::from_millis(250);

/// A place in the count of a worker's jobs, given back on drop.
pub(super) struct Counted {
    pub roster: Arc<Roster>,
    pub agent: NodeId,
    pub worker: WorkerId,
    pub numerics: Option<NumericsId>,
    pub why: Option<Why>,
    pub sent: Instant,
    /// It is not moved because its worker is slow.
    pub stays: bool,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.roster.end(&self.agent, &self.worker);
    }
}

fn failed(reason: String, retryable: bool) -> JobEvent {
    JobEvent::Failed { reason, retryable }
}

impl JobStream {
    pub(super) fn running(counted: Counted, tx: Sender, rx: Receiver) -> Self {
        Self::placed(counted, Some((tx, rx)), None)
    }

    /// A job that no worker can do.
    pub(super) fn refused(counted: Counted, reason: String) -> Self {
        Self::over(counted, Ok(failed(reason, false)))
    }

    /// A job that has not reached its agent.
    pub(super) fn unreached(counted: Counted, reason: String) -> Self {
        Self::over(counted, Err(AgentLost(reason)))
    }

    fn over(counted: Counted, told: Result<JobEvent, AgentLost>) -> Self {
        let mut stream = Self::placed(counted, None, Some(told));
        stream.counted = None;
        stream
    }

    fn placed(
        mut counted: Counted,
        streams: Option<(Sender, Receiver)>,
        told: Option<Result<JobEvent, AgentLost>>,
    ) -> Self {
        let (agent, worker, numerics) = (counted.agent.clone(), counted.worker.clone(), counted.numerics);
        let why = counted.why.take();
        let sent = counted.sent;
        Self { agent, worker, numerics, why, sent, streams, told, counted: Some(counted), pace: None }
    }

    /// The streams, while the job runs.
    pub(super) fn streams(&mut self) -> Option<&mut (Sender, Receiver)> {
        self.streams.as_mut()
    }

    /// Waits for the next event. After the last event, or when the agent is lost, every call gives a `Failed` that may
    /// not be retried. Cancellation-safe.
    pub async fn next(&mut self) -> Result<JobEvent, AgentLost> {
        let Some((_, rx)) = &mut self.streams else {
            return self.told.take().unwrap_or_else(|| Ok(failed("the job has ended".into(), false)));
        };
        match rx.next::<JobEvent>().await {
            Ok(Some(event @ JobEvent::Tokens { .. })) => {
                let JobEvent::Tokens { tokens, .. } = &event else { unreachable!("it is matched above") };
                let count = tokens.len() as u32;
                if let Some(reason) = self.paced(count) {
                    self.cancel();
                    self.told = Some(Ok(failed(format!("worker {} is slow: {reason}", self.worker), true)));
                }
                Ok(event)
            }
            Ok(Some(last)) => {
                // Nothing is left to cancel: the send side was finished with the submission.
                self.streams = None;
                self.counted = None;
                Ok(last)
            }
            Ok(None) => {
                self.cancel();
                Ok(failed(format!("agent {} ended the stream early", self.agent), true))
            }
            Err(error) => {
                self.cancel();
                Err(AgentLost(format!("lost agent {}: {error}", self.agent)))
            }
        }
    }

    /// Counts tokens; says why the job should go on elsewhere, if it should.
    fn paced(&mut self, tokens: u32) -> Option<String> {
        let now = Instant::now();
        let Some(pace) = &mut self.pace else {
            self.pace = Some(Pace { tokens: 0, since: now });
            return None;
        };
        pace.tokens += tokens;
        let took = now - pace.since;
        if took < LOOK {
            return None;
        }
        let tokens = std::mem::take(&mut pace.tokens);
        pace.since = now;
        let counted = self.counted.as_ref()?;
        counted.roster.pace(counted, tokens, took)
    }

    fn cancel(&mut self) {
        if let Some((mut tx, mut rx)) = self.streams.take() {
            quic::reset(&mut tx);
            quic::stop(&mut rx);
        }
        self.counted = None;
    }
}

impl Drop for JobStream {
    fn drop(&mut self) {
        self.cancel();
    }
}
