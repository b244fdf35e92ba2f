//! All certificates of a daemon: read anew together when it is told to, and told of before they expire.
//!
//! A reload is whole or nothing: what would not work with the rest is refused, and the old ones stay. Connections that
//! are there keep what they began with, so no stream is cut; new handshakes use the new ones.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use tokio::sync::Notify;

use super::{ApiTls, NodeTls};
use crate::{clock, events};

/// How often the dates are looked at, and how many days before the end they are told: renewing takes people, who take
/// holidays.
const LOOK_EVERY: Duration = Duration::from_secs(24 * 3600);
const TOLD_DAYS: i64 = 30;

/// So few days before the end somebody must look.
const URGENT_DAYS: i64 = 7;

const DAY_SECONDS: i64 = 24 * 3600;

/// The certificates of this daemon.
#[derive(Debug)]
pub struct Certificates {
    node: NodeTls,
    api: Option<ApiTls>,
    renewed: Notify,
}

impl Certificates {
    pub fn new(node: NodeTls, api: Option<ApiTls>) -> Self {
        Self { node, api, renewed: Notify::new() }
    }

    /// Reads every file anew and uses all of them from now on, or none.
    pub fn reload(&self) -> anyhow::Result<()> {
        let (own, trust) = (self.node.own.make_now()?, self.node.trust.make_now()?);
        self.node.check(&own, &trust)?;
        let mut renewed_api = None;
        if let Some(api) = &self.api {
            let own = api.own.make_now()?;
            ensure!(own.expires > now(), "the certificate {} has expired", api.own.path().display());
            renewed_api = Some((api, own));
        }
        self.node.own.put(own);
        self.node.trust.put(trust);
        if let Some((api, own)) = renewed_api {
            api.own.put(own);
        }
        self.renewed.notify_one();
        Ok(())
    }

    /// Tells of certificates that expire soon: at once, every day, and after a reload. Runs until it is dropped.
    pub async fn watch_dates(&self) {
        loop {
            for (file, expires) in self.expiries() {
                let days = expires.saturating_sub(now()).div_euclid(DAY_SECONDS);
                if days < 0 {
                    log::error!(message_id = events::CERTIFICATE_EXPIRES, file:% = file.display(), days; "a certificate has expired");
                } else if let Some(level) = urgency(days) {
                    log::log!(level, message_id = events::CERTIFICATE_EXPIRES, file:% = file.display(), days; "a certificate expires soon");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.renewed.notified() => {}
            }
        }
    }

    /// Each file of certificates, and when the first of those in use expires, in Unix seconds.
    pub fn expiries(&self) -> Vec<(PathBuf, i64)> {
        let (own, trust) = (&self.node.own, &self.node.trust);
        let mut expiries =
            vec![(own.path().to_owned(), own.get().expires), (trust.path().to_owned(), trust.get().expires)];
        expiries.extend(self.api.iter().map(|api| (api.own.path().to_owned(), api.own.get().expires)));
        expiries
    }
}

/// Unix seconds.
fn now() -> i64 {
    i64::try_from(clock::wall_ms() / 1000).unwrap_or(i64::MAX)
}

/// How loudly the rest of a certificate's life is told, if at all.
fn urgency(days: i64) -> Option<log::Level> {
    match days {
        ..URGENT_DAYS => Some(log::Level::Error),
        URGENT_DAYS..TOLD_DAYS => Some(log::Level::Warn),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Pki;
    use super::*;

    #[test]
    fn the_end_is_told_a_month_before_and_loudly_in_the_last_week() {
        let told = |days| urgency(days);
        assert_eq!((told(30), told(29), told(7)), (None, Some(log::Level::Warn), Some(log::Level::Warn)));
        assert_eq!((told(6), told(-1)), (Some(log::Level::Error), Some(log::Level::Error)));
    }

    #[test]
    fn the_dates_of_every_file_are_known() {
        let pki = Pki::new("dev");
        let node = pki.node("izar://dev/local/controller/c1");
        let certificates = Certificates::new(node, Some(pki.api()));
        let days: Vec<_> = certificates.expiries().iter().map(|(_, end)| (end - now()) / DAY_SECONDS).collect();
        assert!(days[0] > 800 && days[1] > 3_600 && days[2] > 800, "{days:?}");
    }

    #[test]
    fn a_reload_is_whole_or_nothing() {
        let pki = Pki::new("dev");
        let uri = "izar://dev/local/controller/c1";
        let certificates = Certificates::new(pki.node(uri), Some(pki.api()));
        let used = |certificates: &Certificates| {
            let api = certificates.api.as_ref().unwrap().own.get().key.cert[0].clone();
            (certificates.node.own.get().key.cert[0].clone(), api)
        };
        let first = used(&certificates);
        // The node's is new and good, the API's is rubbish.
        pki.node(uri);
        std::fs::write(pki.path("api.pem"), "rubbish").unwrap();
        let refused = format!("{:#}", certificates.reload().unwrap_err());
        assert!(refused.contains("api.pem"), "{refused}");
        assert_eq!(used(&certificates), first, "neither has changed");
        // Another CA than the one that signed this node's certificate.
        pki.api();
        std::fs::copy(Pki::new("dev").path("ca.pem"), pki.path("ca.pem")).unwrap();
        let refused = format!("{:#}", certificates.reload().unwrap_err());
        assert!(refused.contains("is not one of the CA"), "{refused}");
        assert_eq!(used(&certificates), first);
    }

    #[test]
    fn a_good_reload_changes_all_at_once() {
        let pki = Pki::new("dev");
        let uri = "izar://dev/local/controller/c1";
        let certificates = Certificates::new(pki.node(uri), Some(pki.api()));
        let node = certificates.node.own.get().key.cert[0].clone();
        let api = certificates.api.as_ref().unwrap().own.get().key.cert[0].clone();
        pki.node(uri);
        pki.api();
        certificates.reload().unwrap();
        assert_ne!(certificates.node.own.get().key.cert[0], node);
        assert_ne!(certificates.api.as_ref().unwrap().own.get().key.cert[0], api);
    }
}
