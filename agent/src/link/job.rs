//! One job's stream: the submission goes to its worker, events go back as they come, a cancellation goes through.

use std::time::Duration;

use izar_common::chat::JobEvent;
use izar_common::quic::{self, Connection, Receiver, Sender};
use izar_common::wire::agent::Submit;

use crate::worker::{RunningJob, Workers};

/// How long a submission may take to arrive after its stream was opened; the longest are a few megabytes.
const SUBMIT_LIMIT: Duration = Duration::from_secs(30);

/// Bytes put together before they are sent, when several events are ready at once.
const FLUSH_BYTES: usize = 64 << 10;

/// Serves a stream until the job has ended or the controller has left; the job is then cancelled.
pub(super) async fn serve(workers: Workers, connection: Connection, mut tx: Sender, mut rx: Receiver) {
    let submit = match tokio::time::timeout(SUBMIT_LIMIT, rx.expect::<Submit>()).await {
        Ok(Ok(submit)) => submit,
        Ok(Err(error)) => {
            connection.refuse_frame(&error);
            return quic::reset(&mut tx);
        }
        Err(_) => return quic::reset(&mut tx),
    };
    match workers.submit(&submit.worker, submit.job) {
        Ok(job) => {
            // An error means that the controller has left: dropping the job cancels it.
            let _ = pass_events(&job, &mut tx, &mut rx).await;
        }
        Err(reason) => {
            if tx.send(&JobEvent::Failed { reason, retryable: true }).await.is_ok() {
                quic::finish(&mut tx);
            }
        }
    }
}

/// Writes events until the last. Whatever is ready goes out together.
async fn pass_events(job: &RunningJob, tx: &mut Sender, rx: &mut Receiver) -> std::io::Result<()> {
    loop {
        let mut next = Some(tokio::select! {
            biased;
            event = job.next() => event,
            () = left(tx, rx) => return Ok(()),
        });
        let mut last = false;
        while let Some(event) = next {
            last = !matches!(event, JobEvent::Tokens { .. });
            tx.put(&event);
            next = if last || tx.buffered() >= FLUSH_BYTES { None } else { job.ready() };
        }
        tx.flush().await?;
        if last {
            quic::finish(tx);
            return Ok(());
        }
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
