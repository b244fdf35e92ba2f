//! Backups in a bucket of an S3-compatible store.
//!
//! Where it is and who asks stand in the environment under the names that every such tool reads (`AWS_…`), so that no
//! secret is in a command line. A backup goes up in parts and gets its name when the last one is there; one that breaks
//! off is taken back. Prompts, answers and keys are not in it, and what is, is sealed: a store needs no trust, and is
//! still spoken to over TLS, for the access key's sake.

use std::io::{self, Read};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use hyper::body::Bytes;
use izar_controller::backup::{ENDING, HEADER_LIMIT, Header};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{BackoffConfig, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};
use tokio::sync::mpsc;

use super::place::Stored;
use super::transport::{Failure, Transport};
use crate::http::Endpoint;

/// Bytes of a part, of which two are held at a time; a backup has `PARTS` of them at most: 160 GB, or 1.2 TB with weights.
const PART_BYTES: usize = 16 << 20;
const LARGE_PART_BYTES: usize = 128 << 20;
/// More than these no store takes.
const PARTS: usize = 10_000;
/// Headers that are read at a time when backups are listed.
const READERS: usize = 8;
/// Pieces that wait for whoever reads a backup; each is what came in one go, some 100 KB.
const PIECES: usize = 16;
/// A store that refuses or sheds load is asked again for about this long; the next hour's backup makes up for this one.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRIES: usize = 5;

/// Where systems keep the CAs that they trust: Debian's file, then Red Hat's.
const SYSTEM_CAS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Where the store is, and who asks.
struct Access {
    endpoint: String,
    region: String,
    key_id: String,
    secret: String,
    token: Option<String>,
    ca: Option<PathBuf>,
}

impl Access {
    /// Reads the variables; an empty one is none, for a line of an environment file may be left empty.
    fn read(variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let need = |name: &str| {
            get(name)
                .with_context(|| format!("{name} is not set: the access key of the store stands in the environment"))
        };
        let region = get("AWS_REGION").or_else(|| get("AWS_DEFAULT_REGION")).unwrap_or_else(|| "us-east-1".to_owned());
        let endpoint = get("AWS_ENDPOINT_URL_S3").or_else(|| get("AWS_ENDPOINT_URL"));
        let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let plain = get("AWS_ALLOW_HTTP").is_some_and(|value| value == "true") || on_this_machine(&endpoint);
        ensure!(
            endpoint.starts_with("https://") || plain && endpoint.starts_with("http://"),
            "AWS_ENDPOINT_URL: {endpoint} is not https; AWS_ALLOW_HTTP=true lets backups travel without TLS, sealed as they \
             are, and anybody on the way change or withhold them"
        );
        Ok(Self {
            region,
            key_id: need("AWS_ACCESS_KEY_ID")?,
            secret: need("AWS_SECRET_ACCESS_KEY")?,
            token: get("AWS_SESSION_TOKEN"),
            ca: get("SSL_CERT_FILE").map(PathBuf::from),
            endpoint,
        })
    }
}

/// Whether a URL leads to a loopback address.
fn on_this_machine(url: &str) -> bool {
    let host = url.parse::<hyper::Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Backups under one prefix of a bucket.
#[derive(Debug, Clone)]
pub struct Bucket {
    store: Arc<AmazonS3>,
    name: String,
    prefix: Path,
    endpoint: String,
    region: String,
}

impl Bucket {
    /// Understands `s3://bucket/prefix`; asks nobody yet.
    pub fn parse(url: &str) -> anyhow::Result<Self> {
        let (name, prefix) = split(url)?;
        let Access { endpoint, region, key_id, secret, token, ca } = Access::read(|name| std::env::var(name).ok())?;
        let ca = ca.or_else(|| SYSTEM_CAS.map(PathBuf::from).into_iter().find(|path| path.exists()));
        let route =
            Endpoint::new(&endpoint, ca.as_deref()).context("AWS_ENDPOINT_URL, and SSL_CERT_FILE for its CA")?;
        let backoff = BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() };
        let retry = RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_TIMEOUT };
        let mut builder = AmazonS3Builder::new()
            .with_endpoint(&endpoint)
            .with_region(&region)
            .with_bucket_name(name)
            .with_access_key_id(key_id)
            .with_secret_access_key(secret)
            .with_retry(retry)
            // Some stores have no bulk form.
            .with_disable_bulk_delete(true)
            .with_http_connector(Transport(route));
        if let Some(token) = token {
            builder = builder.with_token(token);
        }
        let store = Arc::new(builder.build().with_context(|| url.to_owned())?);
        Ok(Self { store, name: name.to_owned(), prefix: Path::parse(prefix)?, endpoint, region })
    }

    fn path(&self, name: &str) -> Path {
        self.prefix.clone().join(name)
    }

    fn shown(&self, name: &str) -> String {
        format!("s3://{}/{}", self.name, self.path(name))
    }

    /// Begins to keep a backup; `large` if it will have weights.
    ///
    /// An object of the same name would be replaced, which no two backups have: it holds their second, entry and node.
    pub async fn begin(&self, name: &str, large: bool) -> anyhow::Result<Upload> {
        let parts = self.store.put_multipart(&self.path(name)).await.map_err(|error| self.explain(error))?;
        let part_bytes = if large { LARGE_PART_BYTES } else { PART_BYTES };
        let shown = self.shown(name);
        Ok(Upload { bucket: self.clone(), shown, sent: 0, bytes: 0, part_bytes, part: Vec::new(), filled: 0, parts })
    }

    /// The backups under the prefix, in no order.
    pub async fn list(&self) -> anyhow::Result<Vec<Stored>> {
        let prefix = Some(&self.prefix).filter(|prefix| !prefix.as_ref().is_empty());
        let found = self.store.list_with_delimiter(prefix).await.map_err(|error| self.explain(error))?;
        let backups = found.objects.into_iter().filter(|object| object.location.as_ref().ends_with(ENDING));
        stream::iter(backups).map(|object| self.look(object)).buffered(READERS).try_collect().await
    }

    async fn look(&self, object: ObjectMeta) -> anyhow::Result<Stored> {
        let name = object.location.filename().unwrap_or_default().to_owned();
        let begin = match object.size.min(12 + HEADER_LIMIT as u64) {
            0 => Bytes::new(),
            some => self.store.get_range(&object.location, 0..some).await.map_err(|error| self.explain(error))?,
        };
        let header = Header::read(&mut &begin[..]).ok().map(|(header, _)| header);
        Ok(Stored { name, bytes: object.size, header })
    }

    /// Removes a backup.
    pub async fn remove(&self, name: &str) -> anyhow::Result<()> {
        let removed = self.store.delete(&self.path(name)).await;
        removed.map_err(|error| self.explain(error)).with_context(|| format!("remove {}", self.shown(name)))
    }

    /// Opens a backup for a thread that may block: what is read is fetched by a task of this runtime.
    pub async fn open(&self, name: &str) -> anyhow::Result<Fetched> {
        let found = self.store.get(&self.path(name)).await.map_err(|error| self.explain(error))?;
        let (mut came, bucket) = (found.into_stream(), self.clone());
        let (sender, pieces) = mpsc::channel(PIECES);
        tokio::spawn(async move {
            while let Some(piece) = came.next().await {
                let piece = piece.map_err(|error| io::Error::other(format!("{:#}", bucket.explain(error))));
                let last = piece.is_err();
                if sender.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Fetched { pieces, piece: Bytes::new() })
    }

    /// Puts an error of the store in words that say what to do. Answers of stores hold what was signed, and the access
    /// key, so the ones that are understood are not shown.
    fn explain(&self, error: object_store::Error) -> anyhow::Error {
        if let Some(Failure(said)) = found_in(&error) {
            return anyhow!(
                "{said}: see whether AWS_ENDPOINT_URL ({}) is right, and SSL_CERT_FILE names its CA",
                self.endpoint
            );
        }
        let text = error.to_string();
        let code =
            text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map_or("", |(code, _)| code);
        let kind = match (&error, code) {
            (_, known) if self.advice(known).is_some() => known,
            (object_store::Error::NotFound { .. }, _) => "NoSuchKey",
            (object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }, _) => {
                "AccessDenied"
            }
            _ if text.contains("configured region") => "PermanentRedirect",
            _ => "",
        };
        match self.advice(kind) {
            Some(advice) => anyhow!(advice),
            None => anyhow!("the store at {} cannot do it now: {text}", self.endpoint),
        }
    }

    /// What to do about an error, by the code that S3 gives it.
    fn advice(&self, code: &str) -> Option<String> {
        let Self { name, endpoint, region, .. } = self;
        Some(match code {
            "NoSuchBucket" => format!("there is no bucket {name} at {endpoint}: create it, or name another one"),
            "NoSuchKey" => {
                format!("bucket {name} has no such backup: izar backup list --to s3://{name}/… says which it has")
            }
            "InvalidAccessKeyId" => {
                format!("the store at {endpoint} does not know this access key: see AWS_ACCESS_KEY_ID")
            }
            "SignatureDoesNotMatch" => {
                "the secret does not fit the access key: see AWS_SECRET_ACCESS_KEY, and AWS_REGION".to_owned()
            }
            "RequestTimeTooSkewed" => "this machine's clock is not the store's: let NTP set both".to_owned(),
            "AccessDenied" => format!(
                "the access key may not do this in bucket {name}: it must be allowed to put, list, get and delete objects, \
                 and to abort uploads"
            ),
            "PermanentRedirect" | "AuthorizationHeaderMalformed" => {
                format!("bucket {name} is not in region {region}: see AWS_REGION")
            }
            _ => return None,
        })
    }
}

/// Splits `s3://bucket/prefix`.
fn split(url: &str) -> anyhow::Result<(&str, &str)> {
    let rest = url.strip_prefix(SCHEME).with_context(|| format!("`{url}` does not begin with {SCHEME}"))?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    ensure!(!bucket.is_empty(), "`{url}` names no bucket: s3://BUCKET/PREFIX");
    Ok((bucket, prefix.trim_matches('/')))
}

/// How the URL of a bucket begins.
pub const SCHEME: &str = "s3://";

/// Splits the URL of a backup into its place and its name.
pub fn split_object(url: &str) -> anyhow::Result<(&str, &str)> {
    match split(url)? {
        (_, "") => bail!("`{url}` names no backup: s3://BUCKET/PREFIX/NAME"),
        _ => Ok(url.rsplit_once('/').expect("a prefix stands after a slash")),
    }
}

/// What our own transport said, among the causes of an error.
fn found_in<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Failure> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref())
}

/// A backup that goes up.
pub struct Upload {
    bucket: Bucket,
    shown: String,
    parts: Box<dyn MultipartUpload>,
    /// Parts that are there.
    sent: usize,
    bytes: u64,
    part_bytes: usize,
    /// The next part, and how many bytes of it there are.
    part: Vec<Bytes>,
    filled: usize,
}

impl Upload {
    pub async fn write(&mut self, mut piece: Bytes) -> anyhow::Result<()> {
        self.bytes += piece.len() as u64;
        while !piece.is_empty() {
            let now = piece.split_to(piece.len().min(self.part_bytes - self.filled));
            self.filled += now.len();
            self.part.push(now);
            if self.filled == self.part_bytes {
                self.send().await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> anyhow::Result<()> {
        ensure!(self.sent < PARTS, "{} would have more than {PARTS} parts of {} bytes", self.shown, self.part_bytes);
        self.filled = 0;
        let part = PutPayload::from_iter(std::mem::take(&mut self.part));
        self.parts.put_part(part).await.map_err(|error| self.bucket.explain(error))?;
        self.sent += 1;
        Ok(())
    }

    /// Gives the backup its name; returns where it is and how large.
    pub async fn finish(&mut self) -> anyhow::Result<(String, u64)> {
        if self.filled > 0 {
            self.send().await?;
        }
        self.parts.complete().await.map_err(|error| self.bucket.explain(error))?;
        Ok((self.shown.clone(), self.bytes))
    }

    /// Takes back what went up.
    pub async fn abort(&mut self) -> anyhow::Result<()> {
        let aborted = self.parts.abort().await.map_err(|error| self.bucket.explain(error));
        aborted.with_context(|| format!("parts of {} may be left in the bucket", self.shown))
    }
}

/// Reads what a task fetches. For a thread that may block.
pub struct Fetched {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Fetched {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let now = self.piece.split_to(self.piece.len().min(out.len()));
        out[..now.len()].copy_from_slice(&now);
        Ok(now.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> anyhow::Result<Access> {
        Access::read(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    const KEY: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret")];

    #[test]
    fn without_tls_only_this_machine_is_spoken_to_unless_somebody_says_otherwise() {
        let allowed = |endpoint: &str, said: &str| {
            read(&[KEY[0], KEY[1], ("AWS_ENDPOINT_URL", endpoint), ("AWS_ALLOW_HTTP", said)]).is_ok()
        };
        for endpoint in ["https://minio.example:9000", "http://127.0.0.1:9000", "http://[::1]:9000", "http://localhost"]
        {
            assert!(allowed(endpoint, ""), "{endpoint}");
        }
        for endpoint in ["http://10.0.0.1:9000", "http://127.0.0.1.example", "http://localhost.example:1"] {
            assert!(!allowed(endpoint, "") && allowed(endpoint, "true"), "{endpoint}");
        }
        assert!(!allowed("ftp://127.0.0.1", "true"));
    }

    #[test]
    fn what_is_not_set_is_named_and_the_rest_has_defaults() {
        let error = read(&[KEY[0], ("AWS_SECRET_ACCESS_KEY", "")]).err().unwrap().to_string();
        assert!(error.contains("AWS_SECRET_ACCESS_KEY is not set"), "{error}");
        let access = read(&[KEY[0], KEY[1], ("AWS_REGION", "eu-central-1")]).unwrap();
        assert_eq!(access.endpoint, "https://s3.eu-central-1.amazonaws.com");
    }

    #[test]
    fn urls_are_split() {
        assert_eq!(split("s3://b").unwrap(), ("b", ""));
        assert_eq!(split("s3://b/izar/east/").unwrap(), ("b", "izar/east"));
        assert_eq!(split_object("s3://b/izar/x.izarbak").unwrap(), ("s3://b/izar", "x.izarbak"));
        assert_eq!(split_object("s3://b/x.izarbak").unwrap(), ("s3://b", "x.izarbak"));
        assert!(split("s3:///x").is_err() && split_object("s3://b").is_err() && split_object("s3://b/").is_err());
    }
}
