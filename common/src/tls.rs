//! Who may speak to whom: certificates of a private CA whose one URI says what their holder is.
//!
//! TLS 1.3 only, cryptography by `ring`, named explicitly and never through a process default. Between nodes both sides
//! show a certificate: the chain, the dates and the signature are checked by webpki, and in place of a DNS name the
//! identity `izar://<cluster>/<site>/<role>/<node>`. The API's listener has an ordinary server certificate. Files are
//! looked at again now and then, so that a renewed certificate or CA takes effect without a restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;
use serde::Deserialize;

use crate::id::{ClusterId, Identity, NodeId, Role};

pub mod dates;
mod files;
pub mod pki;
mod renewal;
mod verify;

use files::{Held, Renewed, Trust};
pub use renewal::Certificates;
use verify::{PeerVerifier, check_own};

/// The application protocol of connections between nodes.
pub const ALPN: &[u8] = b"izar/1";

/// Where a node finds its own certificate and the CA it trusts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// PEM of the CA that signs every node of the cluster; several while one CA replaces another.
    pub ca: PathBuf,
    /// PEM of this node's certificate, then of intermediates if there are any.
    pub cert: PathBuf,
    /// PEM of this node's private key; only its owner may read it. Default: the credential `node.key`.
    #[serde(default = "Files::credential")]
    pub key: PathBuf,
}

impl Files {
    fn credential() -> PathBuf {
        "credential:node.key".into()
    }
}

/// Why a certificate does not say who its holder is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnIdentity {
    #[error("the peer showed no certificate")]
    Absent,
    #[error("the certificate does not parse")]
    Malformed,
    #[error("the certificate has {0} URIs, one is needed")]
    Uris(usize),
    #[error("the certificate's URI `{0}` is not izar://<cluster>/<site>/<role>/<node>")]
    Uri(String),
}

/// Reads the identity out of a certificate. Says nothing about whether the certificate is genuine.
pub fn identity_of(cert: &CertificateDer<'_>) -> Result<Identity, NotAnIdentity> {
    use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
    let (_, parsed) = X509Certificate::from_der(cert).map_err(|_| NotAnIdentity::Malformed)?;
    let names = parsed.subject_alternative_name().map_err(|_| NotAnIdentity::Malformed)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [uri] => uri.parse().map_err(|_| NotAnIdentity::Uri(uri.chars().take(200).collect())),
        _ => Err(NotAnIdentity::Uris(uris.len())),
    }
}

/// Reads the identity of a connection's peer out of what the QUIC library gives: a certificate chain, or nothing.
pub(crate) fn identity_of_peer(chain: Option<Box<dyn std::any::Any>>) -> Result<Identity, NotAnIdentity> {
    let chain = chain.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let own = chain.as_ref().and_then(|chain| chain.first()).ok_or(NotAnIdentity::Absent)?;
    identity_of(own)
}

/// Reads a node's certificate and CA, whose key somebody else has, and checks that they belong together.
pub fn without_key(files: &Files) -> anyhow::Result<Identity> {
    let (chain, roots) = (files::read_certs(&files.cert)?, files::read_roots(&files.ca)?);
    check_chain_of(&files.cert, &chain, &files.ca, &roots)?;
    identity_of(&chain[0]).with_context(|| format!("use {}", files.cert.display()))
}

fn check_chain_of(cert: &Path, chain: &[CertificateDer<'_>], ca: &Path, roots: &RootCertStore) -> anyhow::Result<()> {
    use rustls::{CertificateError, Error};
    check_own(chain, roots).map_err(|error| match error {
        // Said first, and by its name: whoever reads it at night shall renew it, and not look for another CA.
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            let ended = files::first_expiry(chain);
            anyhow::anyhow!("the certificate {} has expired (on {})", cert.display(), dates::day(ended))
        }
        error => {
            let what = format!("the certificate {} is not one of the CA {}", cert.display(), ca.display());
            anyhow::Error::from(error).context(what)
        }
    })
}

/// What a dialling node expects of the node that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    pub cluster: ClusterId,
    /// `None`: any role.
    pub role: Option<Role>,
    /// `None`: any node.
    pub node: Option<NodeId>,
}

impl Expected {
    /// Returns why `peer` is not the expected one, or nothing.
    pub(crate) fn mismatch(&self, peer: &Identity) -> Option<String> {
        if peer.cluster != self.cluster {
            return Some(format!("the peer is of cluster {}, expected {}", peer.cluster, self.cluster));
        }
        if let Some(role) = self.role.filter(|role| *role != peer.role) {
            return Some(format!("the peer is {} {}, expected role {role}", peer.role, peer.node));
        }
        let node = self.node.as_ref().filter(|node| **node != peer.node)?;
        Some(format!("the peer is node {}, expected {node}", peer.node))
    }
}

/// A node's certificate, key and trust, ready to make connections. Cheap to clone.
#[derive(Clone)]
pub struct NodeTls {
    identity: Identity,
    own: Arc<Renewed<Held>>,
    trust: Arc<Renewed<Trust>>,
}

impl NodeTls {
    /// Reads the files and checks that they belong together and name an identity.
    pub fn load(files: &Files) -> anyhow::Result<Self> {
        let own = Renewed::new(vec![files.cert.clone(), files.key.clone()], Held::load)?;
        let identity = identity_of(&own.get().key.cert[0]).with_context(|| format!("use {}", files.cert.display()))?;
        let trust = Renewed::new(vec![files.ca.clone()], Trust::load)?;
        let tls = Self { identity, own: Arc::new(own), trust: Arc::new(trust) };
        // A node that its own CA does not accept could reach nobody: better to say so at once.
        tls.check(&tls.own.get(), &tls.trust.get())?;
        Ok(tls)
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn check(&self, own: &Held, trust: &Trust) -> anyhow::Result<()> {
        check_chain_of(self.own.path(), &own.key.cert, self.trust.path(), &trust.roots)
    }

    fn verifier(&self, role: Option<Role>, node: Option<&NodeId>) -> PeerVerifier {
        let cluster = self.identity.cluster.clone();
        PeerVerifier::new(self.trust.clone(), Expected { cluster, role, node: node.cloned() })
    }

    /// Settings of the accepting side: a client must show a certificate of this cluster.
    pub fn quic_server(&self) -> anyhow::Result<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(self.verifier(None, None)))
            .with_cert_resolver(self.own.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would skip the check of a certificate that may have expired or been replaced.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(config)
    }

    /// Settings of the dialling side, for any node of this cluster.
    pub fn quic_client(&self) -> anyhow::Result<ClientConfig> {
        self.quic_client_to(None, None)
    }

    /// Settings of the dialling side, for a node with this role and, if given, this name.
    pub fn quic_client_to(&self, role: Option<Role>, node: Option<&NodeId>) -> anyhow::Result<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.verifier(role, node)))
            .with_client_cert_resolver(self.own.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    /// Derives a key that stays the same while the private key does; `label` says what for.
    pub(crate) fn derived_key(&self, label: &str) -> ring::hmac::Key {
        let own = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &self.own.get().secret);
        ring::hmac::Key::new(ring::hmac::HMAC_SHA256, ring::hmac::sign(&own, label.as_bytes()).as_ref())
    }
}

impl std::fmt::Debug for NodeTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeTls({})", self.identity)
    }
}

/// The certificate and key of the API's listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ApiTls {
    own: Arc<Renewed<Held>>,
}

impl ApiTls {
    /// Reads the files and checks that they belong together.
    pub fn load(cert: &Path, key: &Path) -> anyhow::Result<Self> {
        let own = Renewed::new(vec![cert.to_owned(), key.to_owned()], Held::load)?;
        Ok(Self { own: Arc::new(own) })
    }

    /// Settings of the listener: TLS 1.3, HTTP/2 or HTTP/1.1. Follows the files when these are renewed.
    pub fn server(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.own.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // Stateless tickets: a client that comes back spares both sides a signature, and the server keeps nothing.
        config.ticketer = rustls::crypto::ring::Ticketer::new()?;
        Ok(Arc::new(config))
    }
}

/// Settings of an API's listener on these files.
pub fn https_server(cert: &Path, key: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    ApiTls::load(cert, key)?.server()
}

/// Settings of a client of the API that trusts the CA in `ca` alone. Offers no ALPN: HTTP/1.1 is spoken unless the
/// caller adds another.
pub fn https_client(ca: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(files::read_roots(ca)?)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

type Roots = Arc<RootCertStore>;

#[cfg(test)]
pub(crate) mod tests;
