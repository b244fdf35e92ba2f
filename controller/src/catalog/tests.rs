//! A catalog and a peer on real sockets of the loopback interface.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use izar_common::clock::Hlc;
use izar_common::id::Identity;
use izar_common::tls::{Files, NodeTls, pki};

use super::*;
use crate::import;
use crate::state::Model;

/// No test waits longer for what must come.
const LIMIT: Duration = Duration::from_secs(20);

struct Site {
    dir: tempfile::TempDir,
    /// The peer's store.
    source: blob::Store,
    /// The catalog's store.
    store: blob::Store,
    config: watch::Sender<Arc<Config>>,
    tasks: TaskTracker,
    end: CancellationToken,
}

fn node(dir: &Path, name: &str) -> NodeTls {
    let identity: Identity = format!("izar://dev/local/controller/{name}").parse().unwrap();
    pki::issue(dir, &identity, &["127.0.0.1".to_owned()], dir).unwrap();
    let at = |file: String| dir.join(file);
    NodeTls::load(&Files { ca: at("ca.pem".into()), cert: at(format!("{name}.pem")), key: at(format!("{name}.key")) })
        .unwrap()
}

fn endpoint(tls: &NodeTls) -> Arc<Endpoint> {
    Arc::new(Endpoint::bind("127.0.0.1:0".parse().unwrap(), tls).unwrap())
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), &"dev".parse().unwrap()).unwrap();
        Self {
            source: blob::Store::open(dir.path().join("source")).unwrap(),
            store: blob::Store::open(dir.path().join("store")).unwrap(),
            config: watch::Sender::new(Arc::new(Config::default())),
            tasks: TaskTracker::new(),
            end: CancellationToken::new(),
            dir,
        }
    }
    /// Starts a catalog that knows one peer, `source`, which serves its store, or none.
    fn start(&self, with_peer: bool) -> Catalog {
        let mut peers = Vec::new();
        if with_peer {
            let peer = endpoint(&node(self.dir.path(), "c1"));
            peers.push(("c1".parse().unwrap(), peer.local_addr()));
            let (store, end) = (self.source.clone(), self.end.clone());
            self.tasks.spawn(async move { end.run_until_cancelled(serve(peer, store)).await });
        }
        let endpoint = endpoint(&node(self.dir.path(), "c2"));
        let config = self.config.subscribe();
        Catalog::start(config, self.store.clone(), endpoint, peers, &self.tasks, self.end.clone())
    }
    fn register(&self, manifest: izar_common::manifest::Manifest) -> Hash {
        let revision = manifest.revision();
        self.config.send_modify(|config| {
            let model = Model { revision, manifest, registered: Hlc::default() };
            Arc::make_mut(config).models.insert(revision, model);
        });
        revision
    }
    async fn stop(self) {
        self.end.cancel();
        self.tasks.close();
        tokio::time::timeout(LIMIT, self.tasks.wait()).await.expect("the tasks end when they are told");
    }
}

async fn serve(endpoint: Arc<Endpoint>, store: blob::Store) {
    while let Some(connection) = endpoint.accept().await {
        let store = store.clone();
        tokio::spawn(async move {
            while let Ok((_, sender, receiver)) = connection.accept_bi().await {
                let _ = blob::serve(&store, sender, receiver).await;
            }
        });
    }
}

async fn until(what: &str, mut met: impl FnMut() -> bool) {
    let wait = async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("{what} did not come in time"));
}

fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_model_comes_from_the_peer_that_has_it() {
    let site = Site::new();
    let catalog = site.start(true);
    let manifest = import::import(&golden(), "tiny", None, &site.source).unwrap();
    let revision = site.register(manifest.clone());
    until("the text", || catalog.text(&revision).is_some()).await;
    let here = BTreeMap::from([(revision, Holding { text: Part::Here, files: Part::Here })]);
    until("the files", || catalog.holdings() == here).await;
    assert!(manifest.all_files().all(|file| site.store.has(&file.hash)));
    site.config.send_replace(Arc::default());
    until("forgetting", || catalog.text(&revision).is_none() && catalog.holdings().is_empty()).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_peer_gets_later_is_fetched_later() {
    let site = Site::new();
    let catalog = site.start(true);
    let elsewhere = blob::Store::open(site.dir.path().join("elsewhere")).unwrap();
    let manifest = import::echo("echo", 1, 1, &elsewhere).unwrap();
    let revision = site.register(manifest.clone());
    let text = || catalog.holdings().get(&revision).map(|holding| holding.text.clone());
    until("a failed attempt", || matches!(text(), Some(Part::Failed(why)) if why.starts_with("c1: "))).await;
    site.source.add_file(&elsewhere.path(&manifest.text.hash)).unwrap();
    until("the text", || catalog.text(&revision).is_some()).await;
    assert_eq!(text(), Some(Part::Here));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_here_is_used_without_a_peer_and_what_is_unusable_is_reported() {
    let site = Site::new();
    let good = site.register(import::echo("echo", 1, 1, &site.store).unwrap());
    let mut broken = import::echo("broken", 1, 1, &site.store).unwrap();
    broken.text.hash = site.store.add_bytes(b"not a bundle").unwrap();
    let broken = site.register(broken);
    let catalog = site.start(false);
    until("the text", || catalog.text(&good).is_some()).await;
    until("the report", || matches!(catalog.holdings()[&broken].text, Part::Failed(_))).await;
    assert!(catalog.text(&broken).is_none());
    site.stop().await;
}
