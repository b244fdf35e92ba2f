//! Linearizable reads: one question to the group answers all who wait.
//!
//! Those who come while a question is on its way share the next one. A question may be lost (a fresh leader drops it
//! until its first commit), so it is asked again on a timer; any answer to a question that was asked after somebody
//! came is good for them.

use std::sync::Arc;
use std::time::Duration;

use raft::ReadState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Unavailable;
use super::inbox::Inbox;

/// Readers that may wait for the next question. Beyond that a read is refused at once.
pub const QUEUE: usize = 16_384;
/// A question without an answer is asked again after this long.
const RETRY: Duration = Duration::from_millis(100);
/// How long a reader waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// An answer: the question's number and the index that a reader must see applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answer {
    pub number: u64,
    pub index: u64,
}

/// Returns the newest answer among what Raft said, for this asker (questions are unique in the group).
pub fn newest(asker: u64, states: &[ReadState]) -> Option<Answer> {
    let answer = |state: &ReadState| {
        let (by, number) = state.request_ctx.split_first_chunk::<8>()?;
        let number = u64::from_be_bytes(number.try_into().ok()?);
        (u64::from_be_bytes(*by) == asker).then_some(Answer { number, index: state.index })
    };
    states.iter().filter_map(answer).max_by_key(|answer| answer.number)
}

/// The task behind `Raft::read_index`.
#[derive(Debug)]
pub struct Reads {
    /// Raft's number of this node.
    pub asker: u64,
    /// Numbers of questions begin here, so that no restart repeats one.
    pub first: u64,
    pub readers: mpsc::Receiver<oneshot::Sender<()>>,
    pub answers: watch::Receiver<Answer>,
    pub applied: watch::Receiver<u64>,
    pub inbox: Arc<Inbox>,
    pub end: CancellationToken,
}

impl Reads {
    /// Runs until the end; those who wait then get no answer.
    pub async fn run(mut self) {
        let end = self.end.clone();
        let mut number = self.first;
        let mut round = Vec::new();
        let rounds = async {
            while self.readers.recv_many(&mut round, QUEUE).await > 0 {
                if let Some(index) = self.ask(&mut number).await
                    && self.applied.wait_for(|applied| *applied >= index).await.is_ok()
                {
                    for reader in round.drain(..) {
                        // Who does not wait any more does not want to know.
                        let _ = reader.send(());
                    }
                }
                round.clear();
            }
        };
        end.run_until_cancelled(rounds).await;
    }

    /// Asks until there is an answer, or nobody can be waiting any more.
    async fn ask(&mut self, number: &mut u64) -> Option<u64> {
        let oldest = *number + 1;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            *number += 1;
            self.inbox.read([self.asker.to_be_bytes(), number.to_be_bytes()].concat());
            let answer = self.answers.wait_for(|answer| answer.number >= oldest);
            match tokio::time::timeout(RETRY, answer).await {
                Ok(Ok(answer)) => return Some(answer.index),
                Ok(Err(_)) => return None,
                Err(_) => {}
            }
        }
        None
    }
}

/// Waits for its turn in a question.
pub async fn read_index(readers: &mpsc::Sender<oneshot::Sender<()>>) -> Result<(), Unavailable> {
    let unavailable = |reason: &str| Unavailable { reason: reason.to_owned() };
    let (reader, answered) = oneshot::channel();
    readers.try_send(reader).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => unavailable("too many reads wait"),
        mpsc::error::TrySendError::Closed(_) => unavailable("this controller stops"),
    })?;
    match tokio::time::timeout(PATIENCE, answered).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(unavailable("no quorum confirmed a leader in time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_answers_count_and_the_newest_wins() {
        let state = |asker: u64, number: u64, index| ReadState {
            index,
            request_ctx: [asker.to_be_bytes(), number.to_be_bytes()].concat(),
        };
        let odd = ReadState { index: 9, request_ctx: b"odd".to_vec() };
        assert_eq!(
            newest(1, &[state(1, 3, 7), state(1, 4, 8), state(2, 9, 9), odd]),
            Some(Answer { number: 4, index: 8 })
        );
        assert_eq!(newest(1, &[state(2, 9, 9)]), None);
    }
}
