//! Files that go from store to store over loopback, whole, in parts, and wrong.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::id::Role;
use crate::manifest;
use crate::quic::{Endpoint, Profile};
use crate::tls::tests::Pki;

const LIMIT: Duration = Duration::from_secs(20);

/// A controller with files, and an agent that fetches.
struct World {
    conn: Connection,
    agent: Store,
    controller: Store,
    asked: std::sync::Arc<AtomicU64>,
    _dir: tempfile::TempDir,
    _endpoints: [Endpoint; 2],
}

async fn world() -> World {
    let pki = Pki::new("dev");
    let dir = tempfile::tempdir().unwrap();
    let bind = |uri| Endpoint::bind("127.0.0.1:0".parse().unwrap(), &pki.node(uri)).unwrap();
    let (c1, a1) = (bind("izar://dev/local/controller/c1"), bind("izar://dev/local/agent/a1"));
    let (agent, controller) =
        (Store::open(dir.path().join("agent")).unwrap(), Store::open(dir.path().join("controller")).unwrap());
    let dial = a1.connect(c1.local_addr(), Role::Controller, None, Profile::Requests);
    let (conn, answered) = tokio::join!(dial, c1.accept());
    let (answered, store, asked) = (answered.unwrap(), controller.clone(), std::sync::Arc::new(AtomicU64::new(0)));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((_, tx, rx)) = answered.accept_bi().await {
            count.fetch_add(1, Ordering::Relaxed);
            let store = store.clone();
            tokio::spawn(async move { serve(&store, tx, rx).await });
        }
    });
    World { conn: conn.unwrap(), agent, controller, asked, _dir: dir, _endpoints: [c1, a1] }
}

impl World {
    async fn fetch(&self, file: &manifest::File) -> Result<Vec<u64>, FetchError> {
        let heard = std::sync::Mutex::new(Vec::new());
        timeout(LIMIT, fetch(&self.conn, file, &self.agent, |bytes| heard.lock().unwrap().push(bytes)))
            .await
            .expect("it comes in time")?;
        Ok(heard.into_inner().unwrap())
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i / 251 + i * 7) as u8).collect()
}

fn file(content: &[u8]) -> manifest::File {
    manifest::File { name: "model.gguf".into(), hash: super::super::hash(content), bytes: content.len() as u64 }
}

#[tokio::test]
async fn a_file_comes_whole_and_progress_is_told() {
    let world = world().await;
    for length in [0, 1, PIECE_BYTES, 5 * PIECE_BYTES + 3] {
        let content = content(length);
        world.controller.add_bytes(&content).unwrap();
        let heard = world.fetch(&file(&content)).await.unwrap();
        assert!(heard.is_sorted() && heard.last() == Some(&(length as u64)), "{heard:?}");
        assert!(std::fs::read(world.agent.path(&file(&content).hash)).unwrap() == content);
    }
}

#[tokio::test]
async fn what_is_here_is_not_asked_for() {
    let world = world().await;
    let content = content(1000);
    world.agent.add_bytes(&content).unwrap();
    assert_eq!(world.fetch(&file(&content)).await.unwrap(), [1000]);
    assert_eq!(world.asked.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_fetch_goes_on_from_a_partial_file() {
    let world = world().await;
    let content = content(3 * PIECE_BYTES);
    let file = file(&content);
    world.controller.add_bytes(&content).unwrap();
    std::fs::write(world.agent.partial(&file.hash), &content[..PIECE_BYTES + 5]).unwrap();
    let heard = world.fetch(&file).await.unwrap();
    assert_eq!(heard[0], PIECE_BYTES as u64 + 5);
    assert!(std::fs::read(world.agent.path(&file.hash)).unwrap() == content);
    assert!(!world.agent.partial(&file.hash).exists());
}

#[tokio::test]
async fn a_partial_file_that_only_missed_its_check_needs_no_peer() {
    let world = world().await;
    let content = content(5000);
    let file = file(&content);
    std::fs::write(world.agent.partial(&file.hash), &content).unwrap();
    world.fetch(&file).await.unwrap();
    assert!(world.agent.has(&file.hash));
    assert_eq!(world.asked.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_wrong_hash_is_refused_and_the_next_fetch_begins_anew() {
    let world = world().await;
    let content = content(2 * PIECE_BYTES);
    let file = file(&content);
    world.controller.add_bytes(&content).unwrap();
    std::fs::write(world.agent.partial(&file.hash), vec![9; 100]).unwrap();
    assert!(matches!(world.fetch(&file).await, Err(FetchError::WrongHash(hash)) if hash == file.hash));
    assert!(!world.agent.has(&file.hash) && !world.agent.partial(&file.hash).exists());
    world.fetch(&file).await.unwrap();
    assert!(world.agent.has(&file.hash));
    // The same when the peer's own disk has gone bad.
    let content = super::tests::content(3000);
    let file = self::file(&content);
    std::fs::write(world.controller.path(&file.hash), vec![1; 3000]).unwrap();
    assert!(matches!(world.fetch(&file).await, Err(FetchError::WrongHash(_))));
}

#[tokio::test]
async fn a_missing_file_and_one_of_another_length_are_told_apart() {
    let world = world().await;
    let content = content(100);
    let mut file = file(&content);
    assert!(matches!(world.fetch(&file).await, Err(FetchError::Missing(hash)) if hash == file.hash));
    world.controller.add_bytes(&content).unwrap();
    file.bytes = 101;
    assert!(matches!(world.fetch(&file).await, Err(FetchError::WrongLength { got: 100, expected: 101, .. })));
}

#[tokio::test]
async fn a_peer_that_breaks_off_leaves_what_came() {
    let world = world().await;
    let content = content(40 * PIECE_BYTES);
    let file = file(&content);
    world.controller.add_bytes(&content).unwrap();
    let conn = world.conn.clone();
    let error = fetch(&world.conn, &file, &world.agent, |bytes| {
        if bytes > 0 {
            conn.close("enough");
        }
    })
    .await
    .unwrap_err();
    assert!(matches!(error, FetchError::Interrupted { .. }), "{error}");
    let kept = std::fs::read(world.agent.partial(&file.hash)).unwrap();
    assert!(!kept.is_empty() && content.starts_with(&kept));
}

#[tokio::test]
async fn two_fetches_of_one_file_ask_once() {
    let world = world().await;
    let content = content(4 * PIECE_BYTES);
    let file = file(&content);
    world.controller.add_bytes(&content).unwrap();
    let (first, second) = tokio::join!(world.fetch(&file), world.fetch(&file));
    first.unwrap();
    second.unwrap();
    assert_eq!(world.asked.load(Ordering::Relaxed), 1);
    assert!(std::fs::read(world.agent.path(&file.hash)).unwrap() == content);
}
