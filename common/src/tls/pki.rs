//! The private CA of a cluster, for `izar pki` and `izar dev`: made once, then it issues certificates for nodes and API
//! servers. The CA's key lies in a folder of the operator's; no daemon ever reads it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::id::{ClusterId, Identity};
use crate::logging::date_of;
use crate::seal::{create_private, read_private};

const CA_DAYS: i64 = 3650;
/// A node's certificate outlives a year of neglect; renewing takes effect without a restart.
const LEAF_DAYS: i64 = 825;
/// What stands before the cluster's name in the CA's common name.
const CA_NAME: &str = "izar ca ";

/// Makes a CA for a cluster: `ca.pem`, and `ca.key` that only its owner may read. Refuses to overwrite either.
pub fn init(dir: &Path, cluster: &ClusterId) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("create the folder {}", dir.display()))?;
    let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
    for path in [&cert_path, &key_path] {
        ensure!(!path.exists(), "{} exists: a CA is never overwritten", path.display());
    }
    let mut params = params(&format!("{CA_NAME}{cluster}"), CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().context("make the CA's key")?;
    let cert = params.self_signed(&key).context("sign the CA's certificate")?;
    create_private(&key_path, key.serialize_pem().as_bytes())
        .with_context(|| format!("write {}", key_path.display()))?;
    std::fs::write(&cert_path, cert.pem()).with_context(|| format!("write {}", cert_path.display()))
}

/// Issues a node's certificate: `<out>/<node>.pem` and `<node>.key`, with the identity as URI and `hosts` as names.
/// Replaces an earlier one of the same node.
pub fn issue(dir: &Path, identity: &Identity, hosts: &[String], out: &Path) -> anyhow::Result<()> {
    issue_until(dir, identity, hosts, out, LEAF_DAYS)
}

/// Like [`issue`], until the beginning of the day in so many days; 0: it has expired.
pub fn issue_until(dir: &Path, identity: &Identity, hosts: &[String], out: &Path, days: i64) -> anyhow::Result<()> {
    let mut params = params(identity.node.as_str(), days);
    params.subject_alt_names = sans(hosts)?;
    params.subject_alt_names.push(SanType::URI(identity.to_string().try_into()?));
    // Nodes dial and answer with one certificate.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let ca = Ca::load(dir)?;
    ensure!(
        ca.cluster == identity.cluster.as_str(),
        "the CA in {} is that of cluster {}, not of {}",
        dir.display(),
        ca.cluster,
        identity.cluster
    );
    ca.sign(params, identity.node.as_str(), out)
}

/// Issues a certificate for an API server, without an identity, so that it cannot pass as a node's:
/// `<out>/<name>.pem` and `<name>.key`.
pub fn issue_server(dir: &Path, name: &str, hosts: &[String], out: &Path) -> anyhow::Result<()> {
    ensure!(!name.is_empty() && !name.contains('/'), "`{name}` is not the name of a file");
    ensure!(!hosts.is_empty(), "a server's certificate needs at least one host");
    let mut params = params(name, LEAF_DAYS);
    params.subject_alt_names = sans(hosts)?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ca::load(dir)?.sign(params, name, out)
}

/// Parameters common to all: valid from yesterday on, since clocks differ.
fn params(common_name: &str, days: i64) -> CertificateParams {
    let today = (crate::clock::wall_ms() / 86_400_000) as i64;
    let date = |day: i64| {
        let (year, month, day) = date_of(day);
        rcgen::date_time_ymd(year, month, day)
    };
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (date(today - 1), date(today + days));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn sans(hosts: &[String]) -> anyhow::Result<Vec<SanType>> {
    let one = |host: &String| match host.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) if rustls_pki_types::DnsName::try_from(host.as_str()).is_ok() => {
            Ok(SanType::DnsName(host.clone().try_into()?))
        }
        Err(_) => bail!("`{host}` is neither a host name nor an address"),
    };
    hosts.iter().map(one).collect()
}

struct Ca {
    cluster: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn load(dir: &Path) -> anyhow::Result<Self> {
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let pem = std::fs::read_to_string(&cert_path)
            .with_context(|| format!("read the CA's certificate {}", cert_path.display()))?;
        let key_pem = String::from_utf8(read_private(&key_path)?).context("the CA's key is not PEM")?;
        let key = KeyPair::from_pem(&key_pem).with_context(|| format!("use the CA's key {}", key_path.display()))?;
        let cluster = cluster_of(&pem).with_context(|| format!("{} is not a CA of izar", cert_path.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key)
            .with_context(|| format!("use the CA's certificate {}", cert_path.display()))?;
        Ok(Self { cluster, issuer })
    }

    fn sign(&self, mut params: CertificateParams, name: &str, out: &Path) -> anyhow::Result<()> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("make a key")?;
        let cert = params.signed_by(&key, &self.issuer).context("sign a certificate")?;
        std::fs::create_dir_all(out).with_context(|| format!("create the folder {}", out.display()))?;
        // The key first: a daemon that looks in between finds files that do not match and looks again.
        replace(&out.join(format!("{name}.key")), key.serialize_pem().as_bytes())?;
        replace(&out.join(format!("{name}.pem")), cert.pem().as_bytes())
    }
}

fn cluster_of(pem: &str) -> Option<String> {
    use x509_parser::prelude::{FromDer as _, X509Certificate};
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, cert) = X509Certificate::from_der(&der).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.strip_prefix(CA_NAME)?.to_owned())
}

/// Replaces a file in one step; a key stays readable by its owner alone.
fn replace(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let temporary = PathBuf::from(format!("{}.new", path.display()));
    let write = || {
        let _ = std::fs::remove_file(&temporary);
        if path.extension().is_some_and(|e| e == "key") {
            create_private(&temporary, content)?;
        } else {
            std::fs::write(&temporary, content)?;
        }
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}
