//! One job's stream: the submission goes to its worker, events go back as they come, a cancellation goes through. And the
//! stream of a controller that reads a job which another one began.

use std::time::{Duration, Instant};

use izar_common::chat::JobEvent;
use izar_common::quic::{self, Connection, Receiver, Sender};
use izar_common::wire::agent::{Recall, Recalled, Resume, Resumed, Submit};

use super::kept::{GRACE, Kept};
use crate::worker::{RunningJob, Workers};

/// How long a submission may take to arrive after its stream was opened; the longest are a few megabytes.
const SUBMIT_LIMIT: Duration = Duration::from_secs(30);

/// How long the end of an answer may take to arrive, so that a stopping agent does not close the connection before.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Bytes put together before they are sent, when several events are ready at once.
const FLUSH_BYTES: usize = 64 << 10;

/// Serves a stream until the job has ended or the controller has cancelled it. A controller that is lost leaves the job
/// running for a grace time: another one may take its turn over.
pub(super) async fn serve(workers: Workers, kept: Kept, connection: Connection, mut tx: Sender, mut rx: Receiver) {
    let Submit { worker, mut job } = match tokio::time::timeout(SUBMIT_LIMIT, rx.expect::<Submit>()).await {
        Ok(Ok(submit)) => submit,
        Ok(Err(error)) => {
            connection.refuse_frame(&error);
            return quic::reset(&mut tx);
        }
        Err(_) => return quic::reset(&mut tx),
    };
    let entry = kept.begin(&mut job, &worker, workers.numerics(&worker), Instant::now());
    let job = match workers.submit(&worker, job) {
        Ok(job) => job,
        Err(reason) => {
            let failed = JobEvent::Failed { reason, retryable: true };
            kept.push(&entry, &failed, Instant::now());
            if tx.send(&failed).await.is_ok() {
                quic::finish(&mut tx);
            }
            return;
        }
    };
    let passed = pass_events(&job, &mut tx, &mut rx, |event| kept.push(&entry, event, Instant::now())).await;
    match passed {
        Ok(true) => drop(tokio::time::timeout(LAST_WORDS, quic::stopped(&mut tx)).await),
        // It was cancelled; dropping the job tells the worker.
        Ok(false) if connection.close_reason().is_none() => kept.forget(&entry, Instant::now()),
        _ => {
            let rest = async {
                loop {
                    let event = job.next().await;
                    kept.push(&entry, &event, Instant::now());
                    if !matches!(event, JobEvent::Tokens { .. }) {
                        return;
                    }
                }
            };
            if tokio::time::timeout(GRACE, rest).await.is_err() {
                kept.forget(&entry, Instant::now());
            }
        }
    }
}

/// Writes events until the last, and tells each before. Whatever is ready goes out together. Returns whether the job came
/// to its end; if not, the controller left it.
async fn pass_events(
    job: &RunningJob,
    tx: &mut Sender,
    rx: &mut Receiver,
    tell: impl Fn(&JobEvent),
) -> std::io::Result<bool> {
    loop {
        let mut next = Some(tokio::select! {
            biased;
            event = job.next() => event,
            () = left(tx, rx) => return Ok(false),
        });
        let mut last = false;
        while let Some(event) = next {
            last = !matches!(event, JobEvent::Tokens { .. });
            tell(&event);
            tx.put(&event);
            next = if last || tx.buffered() >= FLUSH_BYTES { None } else { job.ready() };
        }
        let flushed = tx.flush().await;
        if last {
            if flushed.is_ok() {
                quic::finish(tx);
            }
            return Ok(true);
        }
        flushed?;
    }
}

/// Gives another controller what a job gave and gives, from its beginning.
pub(super) async fn resume(kept: Kept, connection: Connection, mut tx: Sender, mut rx: Receiver) {
    let Resume { turn, choice } = match tokio::time::timeout(SUBMIT_LIMIT, rx.expect::<Resume>()).await {
        Ok(Ok(resume)) => resume,
        Ok(Err(error)) => {
            connection.refuse_frame(&error);
            return quic::reset(&mut tx);
        }
        Err(_) => return quic::reset(&mut tx),
    };
    let Some(entry) = kept.find(turn, choice) else {
        if tx.send(&Resumed::Missing).await.is_ok() {
            quic::finish(&mut tx);
        }
        return;
    };
    tx.put(&Resumed::Found { worker: entry.worker.clone(), numerics: entry.numerics });
    let reading = async {
        let (mut growth, mut position) = (entry.growth(), 0);
        loop {
            growth.mark_unchanged();
            while let Some(event) = entry.after(position) {
                tx.put(&event);
                let JobEvent::Tokens { tokens, .. } = &event else {
                    tx.flush().await?;
                    quic::finish(&mut tx);
                    return Ok(());
                };
                position += tokens.len();
                if tx.buffered() >= FLUSH_BYTES {
                    tx.flush().await?;
                }
            }
            tx.flush().await?;
            if growth.changed().await.is_err() {
                return Ok::<(), std::io::Error>(());
            }
        }
    };
    // An error means that this controller is gone, too.
    let _ = reading.await;
}

/// Gives another controller the request of a turn, which this agent cannot open.
pub(super) async fn recall(kept: Kept, connection: Connection, mut tx: Sender, mut rx: Receiver) {
    let Recall { turn } = match tokio::time::timeout(SUBMIT_LIMIT, rx.expect::<Recall>()).await {
        Ok(Ok(recall)) => recall,
        Ok(Err(error)) => {
            connection.refuse_frame(&error);
            return quic::reset(&mut tx);
        }
        Err(_) => return quic::reset(&mut tx),
    };
    if tx.send(&Recalled { capsule: kept.recall(turn) }).await.is_ok() {
        quic::finish(&mut tx);
    }
}

/// Resolves when the controller no longer wants the job: it stopped our stream or reset its own, or is gone. A
/// controller that merely finishes its own stream still waits.
async fn left(tx: &mut Sender, rx: &mut Receiver) {
    let reset = async {
        if let Ok(None) = rx.next::<Submit>().await {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = quic::stopped(tx) => {}
        () = reset => {}
    }
}
