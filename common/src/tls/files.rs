//! Certificates and keys in files, and their renewal while the process runs.
//!
//! Nobody watches the files: they are looked at when a handshake needs them, at most once in a while, so that an idle
//! node does nothing; or at once, when the daemon is told to (`renewal`). A renewal that does not load is reported once and
//! the old certificate stays in use.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, ensure};
use arc_swap::ArcSwap;
use rustls::RootCertStore;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::{Roots, identity_of, provider};
use crate::seal::read_private;

/// How often files are looked at: an operator who replaced a certificate does not wait long, and a storm of
/// handshakes costs one `stat` in this time.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Files younger than this are left for the next look: a certificate and its key are not written in one step.
const SETTLED: Duration = Duration::from_secs(2);

/// A value made of files, made again when these change.
pub(super) struct Renewed<T> {
    paths: Vec<PathBuf>,
    make: fn(&[PathBuf], Option<&T>) -> anyhow::Result<T>,
    value: ArcSwap<T>,
    looked: Mutex<Looked>,
}

struct Looked {
    at: Instant,
    /// Of the files in use, or of those that failed to load.
    stamp: Vec<Option<(SystemTime, u64)>>,
}

impl<T> Renewed<T> {
    /// Reads the files; an error here is the operator's to mend before the start.
    pub(super) fn new(
        paths: Vec<PathBuf>,
        make: fn(&[PathBuf], Option<&T>) -> anyhow::Result<T>,
    ) -> anyhow::Result<Self> {
        let looked = Looked { at: Instant::now(), stamp: stamp(&paths) };
        let value = ArcSwap::from_pointee(make(&paths, None)?);
        Ok(Self { paths, make, value, looked: Mutex::new(looked) })
    }

    /// Returns the value, after a look at the files if the last one is long ago.
    pub(super) fn get(&self) -> Arc<T> {
        // Whoever finds another looking takes what there is.
        if let Ok(mut looked) = self.looked.try_lock()
            && looked.at.elapsed() >= LOOK_EVERY
        {
            looked.at = Instant::now();
            self.look(&mut looked, SETTLED);
        }
        self.value.load_full()
    }

    /// Makes the value of the files as they are now, without using it. Until they change again, nobody else tries them.
    pub(super) fn make_now(&self) -> anyhow::Result<T> {
        // Nothing in here is left half done.
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        *looked = Looked { at: Instant::now(), stamp: stamp(&self.paths) };
        (self.make)(&self.paths, Some(&self.value.load()))
    }

    /// Uses a value from now on.
    pub(super) fn put(&self, value: T) {
        self.value.store(Arc::new(value));
    }

    /// The file that gives the value its name.
    pub(super) fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// Looks at the files now, whatever the time of the last look.
    #[cfg(test)]
    pub(super) fn look_now(&self) {
        self.look(&mut self.looked.lock().unwrap(), Duration::ZERO);
    }

    fn look(&self, looked: &mut Looked, settled: Duration) {
        let stamp = stamp(&self.paths);
        let newest = stamp.iter().flatten().map(|(modified, _)| *modified).max();
        // A time in the future has no age; whoever wrote it meant no delay.
        let young = newest.and_then(|time| time.elapsed().ok()).is_some_and(|age| age < settled);
        if stamp == looked.stamp || young {
            return;
        }
        looked.stamp = stamp;
        let file = self.paths[0].display();
        match (self.make)(&self.paths, Some(&self.value.load())) {
            Ok(value) => {
                self.value.store(Arc::new(value));
                log::info!(file:% = file; "certificate renewed");
            }
            Err(error) => log::warn!(file:% = file, reason:% = format!("{error:#}"); "renewed certificate is unusable"),
        }
    }
}

impl<T> std::fmt::Debug for Renewed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Renewed").field(&self.paths).finish()
    }
}

fn stamp(paths: &[PathBuf]) -> Vec<Option<(SystemTime, u64)>> {
    let one = |path: &PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    };
    paths.iter().map(one).collect()
}

/// A certificate chain and its private key.
pub(super) struct Held {
    pub(super) key: Arc<CertifiedKey>,
    /// The private key's own bytes, from which other secrets are derived.
    pub(super) secret: Vec<u8>,
    /// When the first certificate of the chain expires, in Unix seconds.
    pub(super) expires: i64,
}

impl Held {
    /// `paths`: the certificate and the key. A renewal must keep the identity that the node started with.
    pub(super) fn load(paths: &[PathBuf], old: Option<&Self>) -> anyhow::Result<Self> {
        let [cert, key] = paths else { unreachable!("a certificate and a key make two paths") };
        let chain = read_certs(cert)?;
        let private = PrivateKeyDer::from_pem_slice(&read_private(key)?)
            .map_err(|error| anyhow::anyhow!("the key {} does not parse: {error}", key.display()))?;
        if let Some(old) = old
            && let Ok(before) = identity_of(&old.key.cert[0])
        {
            let now = identity_of(&chain[0])?;
            ensure!(now == before, "the new certificate names {now}, this node is {before}");
        }
        let secret = private.secret_der().to_vec();
        let expires = first_expiry(&chain);
        let certified = CertifiedKey::from_der(chain, private, &provider())
            .with_context(|| format!("the certificate {} and the key {}", cert.display(), key.display()))?;
        Ok(Self { key: Arc::new(certified), secret, expires })
    }
}

impl ResolvesServerCert for Renewed<Held> {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get().key.clone())
    }
}

impl ResolvesClientCert for Renewed<Held> {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get().key.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// The CAs that are trusted.
pub(super) struct Trust {
    pub(super) roots: Roots,
    /// When the first of them expires, in Unix seconds.
    pub(super) expires: i64,
}

impl Trust {
    pub(super) fn load(paths: &[PathBuf], _old: Option<&Self>) -> anyhow::Result<Self> {
        let [ca] = paths else { unreachable!("trust has one path") };
        Ok(Self { roots: Arc::new(read_roots(ca)?), expires: first_expiry(&read_certs(ca)?) })
    }
}

/// Reads the CAs of a PEM file.
pub(super) fn read_roots(path: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for cert in read_certs(path)? {
        roots.add(cert).with_context(|| format!("use the CA {}", path.display()))?;
    }
    Ok(roots)
}

/// Reads the certificates of a PEM file, at least one.
pub(super) fn read_certs(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).with_context(|| format!("read the certificate {}", path.display()))?;
    let certs: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| anyhow::anyhow!("the certificate {} does not parse: {error}", path.display()))?;
    ensure!(!certs.is_empty(), "{} holds no certificate", path.display());
    Ok(certs)
}

/// When the first of these certificates expires, in Unix seconds. One that does not parse is refused elsewhere.
pub(super) fn first_expiry(certs: &[CertificateDer<'_>]) -> i64 {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let parsed = certs.iter().filter_map(|cert| X509Certificate::from_der(cert).ok());
    parsed.map(|(_, cert)| cert.validity().not_after.timestamp()).min().unwrap_or(i64::MAX)
}
