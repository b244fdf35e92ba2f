//! How long a certificate is good for: for those who look after it, before a peer refuses it.

use std::path::Path;

use anyhow::Context as _;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::clock;

/// Between which Unix times, in milliseconds, a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub from_ms: i64,
    pub until_ms: i64,
}

/// Reads the validity of every certificate in a PEM file; at least one must be there.
pub fn validities(path: &Path) -> anyhow::Result<Vec<Validity>> {
    let read = || -> anyhow::Result<Vec<Validity>> {
        let mut all = Vec::new();
        for der in CertificateDer::pem_file_iter(path)? {
            let der = der?;
            let (_, cert) =
                X509Certificate::from_der(&der).map_err(|_| anyhow::anyhow!("a certificate does not parse"))?;
            let validity = cert.validity();
            let ms = |time: &x509_parser::time::ASN1Time| time.timestamp() * 1000;
            all.push(Validity { from_ms: ms(&validity.not_before), until_ms: ms(&validity.not_after) });
        }
        anyhow::ensure!(!all.is_empty(), "it holds no certificate");
        Ok(all)
    };
    read().with_context(|| format!("read the certificates in {}", path.display()))
}

/// The day of a Unix time in seconds, as in `2026-11-28`.
pub fn day(seconds: i64) -> String {
    let (year, month, day) = clock::civil(seconds.div_euclid(86_400));
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_says_until_when_it_is_good() {
        let dir = tempfile::tempdir().unwrap();
        super::super::pki::init(dir.path(), &"bank".parse().unwrap()).unwrap();
        let [ca] = validities(&dir.path().join("ca.pem")).unwrap()[..] else { panic!("one certificate") };
        let now = crate::clock::wall_ms() as i64;
        assert!(ca.from_ms < now && ca.until_ms > now + 86_400_000);
        let path = dir.path().join("empty.pem");
        std::fs::write(&path, "").unwrap();
        assert!(validities(&path).unwrap_err().to_string().contains("empty.pem"));
    }
}
