//! TCP connections that agents hold, each of which falls the moment its agent's process dies.
//!
//! QUIC notices a dead peer only by its silence. A tripwire carries nothing but the random words that name it, and is no
//! more than a hint: an agent whose wire fell and that says a word right afterwards is well. So nobody gains anything by
//! cutting one, and one that cannot be had (a firewall) costs a second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What names a wire.
pub type Words = [u8; 16];

/// Connections at once: one for each agent that can be remembered, and as many that come and go.
const CONNECTIONS: usize = 2048;

/// How long a connection may take to say its words.
const WORDS_LIMIT: Duration = Duration::from_secs(5);

/// All wires of this controller.
#[derive(Debug, Default)]
pub struct Tripwires {
    armed: Mutex<HashMap<Words, Arc<Notify>>>,
}

/// A wire of one session, until it is dropped.
#[derive(Debug)]
pub struct Tripwire {
    pub words: Words,
    fell: Arc<Notify>,
    all: Arc<Tripwires>,
}

impl Tripwires {
    fn armed(&self) -> MutexGuard<'_, HashMap<Words, Arc<Notify>>> {
        self.armed.lock().expect("no panic while the wires are held")
    }

    /// Makes a wire that an agent can be told of.
    pub fn arm(self: &Arc<Self>) -> Tripwire {
        let (words, fell) = (rand::random(), Arc::new(Notify::new()));
        self.armed().insert(words, fell.clone());
        Tripwire { words, fell, all: self.clone() }
    }

    /// Takes connections until `stop`.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken, tasks: TaskTracker) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
            // Without a place, or a connection (no file descriptors), agents are watched by their reports alone.
            let (Ok((stream, _)), Ok(place)) = (accepted, places.clone().try_acquire_owned()) else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let (wires, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                stop.run_until_cancelled(wires.hold(stream)).await;
                drop(place);
            });
        }
    }

    /// Waits until a connection falls, and tells the session that it names.
    async fn hold(&self, mut stream: TcpStream) {
        let mut words = Words::default();
        match tokio::time::timeout(WORDS_LIMIT, stream.read_exact(&mut words)).await {
            Ok(Ok(_)) => {}
            _ => return,
        }
        let Some(fell) = self.armed().get(&words).cloned() else { return };
        // Nothing is said on it; a byte more is not one of ours.
        let _ = stream.read(&mut [0]).await;
        fell.notify_one();
    }
}

impl Tripwire {
    /// Waits until a connection with these words falls. Cancellation-safe.
    pub async fn fell(&self) {
        self.fell.notified().await;
    }
}

impl Drop for Tripwire {
    fn drop(&mut self) {
        self.all.armed().remove(&self.words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_wire_that_falls_is_told_to_its_session_and_a_strangers_to_nobody() {
        let (wires, stop, tasks) = (Arc::new(Tripwires::default()), CancellationToken::new(), TaskTracker::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(wires.clone().serve(listener, stop.clone(), tasks.clone()));
        let (ours, other) = (wires.arm(), wires.arm());
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(&[7; 16]).await.unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&ours.words).await.unwrap();
        assert_eq!(stranger.read(&mut [0]).await.unwrap(), 0, "unknown words are shown the door");
        assert!(tokio::time::timeout(Duration::from_millis(50), ours.fell()).await.is_err(), "it stands");
        drop(stream);
        tokio::time::timeout(Duration::from_secs(10), ours.fell()).await.expect("its fall is told");
        assert!(tokio::time::timeout(Duration::from_millis(10), other.fell()).await.is_err());
        drop((ours, other));
        assert!(wires.armed().is_empty());
        stop.cancel();
        serving.await.unwrap();
        tasks.close();
        tasks.wait().await;
    }
}
