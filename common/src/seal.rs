//! Secrets at rest: the pepper that hides bearer keys and the master key that seals what must be read again.
//!
//! Both come from key files of 64 hexadecimal digits that only their owner may read, are the same on every controller,
//! and never travel through Raft. An envelope is `version u8 | nonce 12 | ciphertext | tag 16`, AES-256-GCM; its
//! version and the caller's context are authenticated, so that a sealed value does not open in another place. What is
//! too long for one envelope is a `stream` of them.

use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rand::TryRngCore as _;
use ring::{aead, hmac};

use crate::id::{Hash, TenantId};
use crate::{config, service};

pub mod stream;

const KEY_BYTES: usize = 32;
/// The form of an envelope; a new cipher is a new number.
const VERSION: u8 = 1;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// Largest key or certificate file that is read; a PEM chain with a key has some kilobytes.
const FILE_LIMIT: u64 = 1 << 20;

/// Why a key cannot be used or an envelope not opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the key file {path}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write the key file {path}", path = path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("the key file {path} may be read by others (mode {mode:03o}): use chmod 600", path = path.display())]
    Permissions { path: PathBuf, mode: u32 },
    /// The service manager did not hand it over.
    #[error(
        "the credential {name} is missing: make it with `systemd-creds encrypt --name={name}` where the unit looks for \
         it (LoadCredentialEncrypted= in `systemctl cat`) and start the unit again, or name a file in the configuration"
    )]
    Credential { name: String },
    #[error("the key file {path} is not 64 hexadecimal digits", path = path.display())]
    Malformed { path: PathBuf },
    #[error("the sealed value has version {0}, this build knows {VERSION}")]
    Version(u8),
    #[error("the sealed value is damaged, or was sealed with another key or for another place")]
    Damaged,
}

/// Reads a file that only its owner may read.
pub(crate) fn read_private(path: &Path) -> Result<Vec<u8>, Error> {
    let credentials = service::credentials();
    let read = |source: std::io::Error| match missing_credential(path, credentials.as_deref()) {
        Some(name) if source.kind() == std::io::ErrorKind::NotFound => Error::Credential { name },
        _ => Error::Read { path: path.to_owned(), source },
    };
    let meta = std::fs::metadata(path).map_err(read)?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & forbidden_bits(path, credentials.as_deref()) != 0 {
        return Err(Error::Permissions { path: path.to_owned(), mode });
    }
    if meta.len() > FILE_LIMIT {
        return Err(Error::Malformed { path: path.to_owned() });
    }
    std::fs::read(path).map_err(read)
}

/// The credential that a path which is not there would have been.
fn missing_credential(path: &Path, credentials: Option<&Path>) -> Option<String> {
    let found = credentials.and_then(|dir| path.strip_prefix(dir).ok()?.to_str());
    config::credential_name(path).or(found).map(str::to_owned)
}

/// Permission bits that a key file must not have.
///
/// systemd gives a service its credentials through an access list, whose mask shows as group-readable though no group
/// can read: below that directory only the bits of others count.
fn forbidden_bits(path: &Path, credentials: Option<&Path>) -> u32 {
    if credentials.is_some_and(|dir| path.starts_with(dir)) { 0o007 } else { 0o077 }
}

/// Writes a new file that only its owner may read; refuses to overwrite one.
pub(crate) fn create_private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn load_key(path: &Path) -> Result<[u8; KEY_BYTES], Error> {
    let bytes = read_private(path)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    text.parse::<Hash>().map(|digits| digits.0).map_err(|_| Error::Malformed { path: path.to_owned() })
}

fn store_key(path: &Path, key: &[u8; KEY_BYTES]) -> Result<(), Error> {
    create_private(path, format!("{}\n", Hash(*key)).as_bytes())
        .map_err(|source| Error::Write { path: path.to_owned(), source })
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rngs::OsRng.try_fill_bytes(&mut bytes).expect("the operating system has randomness once it runs");
    bytes
}

/// The secret that turns bearer keys into hashes, so that the state alone does not allow guessing at them.
#[derive(Clone)]
pub struct Pepper {
    bytes: [u8; KEY_BYTES],
    key: hmac::Key,
}

/// Names things by what they hold, for those alone who know the key: HMAC-SHA256, cut to 16 bytes.
#[derive(Debug, Clone)]
pub struct Namer(hmac::Key);

impl Namer {
    pub fn new(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }
    pub fn name(&self, text: &[u8]) -> [u8; 16] {
        *hmac::sign(&self.0, text).as_ref().first_chunk().expect("HMAC-SHA256 has 32 bytes")
    }
}

impl Pepper {
    /// Makes a pepper from bytes.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self { bytes, key: hmac::Key::new(hmac::HMAC_SHA256, &bytes) }
    }
    /// Makes a new random pepper.
    pub fn generate() -> Self {
        Self::from_bytes(random())
    }
    /// Reads a key file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        load_key(path.as_ref()).map(Self::from_bytes)
    }
    /// Writes a new key file with mode 0600; refuses to overwrite one.
    pub fn store(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        store_key(path.as_ref(), &self.bytes)
    }
    /// Returns HMAC-SHA256 of a bearer key.
    pub fn keyed_hash(&self, text: &str) -> Hash {
        let tag = hmac::sign(&self.key, text.as_bytes());
        Hash(tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes"))
    }
    /// Returns HMAC-SHA256 of several parts, each with its length, so that no two lists have the same bytes.
    pub fn keyed_hash_of(&self, parts: &[&[u8]]) -> Hash {
        let mut context = hmac::Context::with_key(&self.key);
        // No bearer key begins with such a byte.
        context.update(&[0]);
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        Hash(context.sign().as_ref().try_into().expect("HMAC-SHA256 has 32 bytes"))
    }
    /// Returns the key that seals the requests of streams: the same on every controller.
    pub fn capsule_key(&self) -> MasterKey {
        MasterKey::from_bytes(self.keyed_hash_of(&[b"capsules of streams"]).0)
    }
    /// Returns the salt of a tenant's prefix blocks: the same on every controller, and for nobody without the pepper.
    pub fn cache_salt(&self, tenant: &TenantId) -> [u8; 16] {
        // No bearer key begins like this, so a salt is never the beginning of a key's hash.
        let Hash(hash) = self.keyed_hash(&format!("prefix cache of tenant {tenant}"));
        *hash.first_chunk().expect("a hash has 32 bytes")
    }
}

impl std::fmt::Debug for Pepper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pepper(..)")
    }
}

/// The key that seals secrets and content, mostly by wrapping a tenant's data key.
///
/// Nonces are random: seal fewer than 2^32 values with one key.
#[derive(Clone)]
pub struct MasterKey {
    bytes: [u8; KEY_BYTES],
    key: aead::LessSafeKey,
}

impl MasterKey {
    /// Makes a key from bytes, for example a tenant's data key that another key had sealed.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        let key = aead::UnboundKey::new(&aead::AES_256_GCM, &bytes).expect("AES-256 takes 32 bytes");
        Self { bytes, key: aead::LessSafeKey::new(key) }
    }
    /// Makes a new random key.
    pub fn generate() -> Self {
        Self::from_bytes(random())
    }
    /// Reads a key file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        load_key(path.as_ref()).map(Self::from_bytes)
    }
    /// Writes a new key file with mode 0600; refuses to overwrite one.
    pub fn store(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        store_key(path.as_ref(), &self.bytes)
    }
    /// Encrypts `plain`. `aad` says where the value belongs; it is needed to open it and is not stored.
    pub fn seal(&self, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce = random::<NONCE_BYTES>();
        let mut out = Vec::with_capacity(1 + NONCE_BYTES + plain.len() + TAG_BYTES);
        out.push(VERSION);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(plain);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce_of(nonce), context(aad), &mut out[1 + NONCE_BYTES..])
            .expect("a value in memory is shorter than AES-GCM's 64 GiB");
        out.extend_from_slice(tag.as_ref());
        out
    }
    /// Decrypts what `seal` made with the same key and `aad`.
    pub fn open(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let (&version, rest) = sealed.split_first().ok_or(Error::Damaged)?;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(Error::Damaged)?;
        let mut plain = rest.to_vec();
        let length =
            self.key.open_in_place(nonce_of(*nonce), context(aad), &mut plain).map_err(|_| Error::Damaged)?.len();
        plain.truncate(length);
        Ok(plain)
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(..)")
    }
}

fn nonce_of(bytes: [u8; NONCE_BYTES]) -> aead::Nonce {
    aead::Nonce::assume_unique_for_key(bytes)
}

/// What is authenticated beside the value: the version, so that it cannot be changed, and the caller's context.
fn context(aad: &[u8]) -> aead::Aad<Vec<u8>> {
    aead::Aad::from([&[VERSION], aad].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn what_is_sealed_opens_only_with_its_key_and_place() {
        let key = MasterKey::generate();
        let sealed = key.seal(b"tenant/a", b"secret");
        assert_eq!(key.open(b"tenant/a", &sealed).unwrap(), b"secret");
        assert!(matches!(key.open(b"tenant/b", &sealed), Err(Error::Damaged)));
        assert!(matches!(MasterKey::generate().open(b"tenant/a", &sealed), Err(Error::Damaged)));
        assert_ne!(sealed, key.seal(b"tenant/a", b"secret"), "nonces differ");
        assert!(!sealed.windows(6).any(|w| w == b"secret"));
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let key = MasterKey::from_bytes([7; 32]);
        let sealed = key.seal(b"", b"x");
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(key.open(b"", &bad).is_err(), "byte {at}");
            assert!(key.open(b"", &sealed[..at]).is_err(), "cut at {at}");
        }
        assert!(matches!(key.open(b"", &[2; 40]), Err(Error::Version(2))));
    }

    #[test]
    fn an_envelope_of_the_first_version_still_opens() {
        // Made with another implementation (Python's cryptography): key 01.., nonce 02.., context "t".
        let golden = "010202020202020202020202026eaca83b845e10ec8517204cdeafb2d4b41767f6";
        let sealed: Vec<u8> =
            (0..golden.len() / 2).map(|i| u8::from_str_radix(&golden[2 * i..2 * i + 2], 16).unwrap()).collect();
        assert_eq!(MasterKey::from_bytes([1; 32]).open(b"t", &sealed).unwrap(), b"izar");
    }

    #[test]
    fn cache_salts_differ_by_tenant_and_by_pepper_alone() {
        let (pepper, tenant) = (Pepper::from_bytes([1; 32]), |name| TenantId::new(name).unwrap());
        assert_eq!(pepper.cache_salt(&tenant("bank")), Pepper::from_bytes([1; 32]).cache_salt(&tenant("bank")));
        assert_ne!(pepper.cache_salt(&tenant("bank")), pepper.cache_salt(&tenant("shop")));
        assert_ne!(pepper.cache_salt(&tenant("bank")), Pepper::from_bytes([2; 32]).cache_salt(&tenant("bank")));
    }

    #[test]
    fn parts_are_hashed_apart_and_never_as_a_bearer_key() {
        let pepper = Pepper::from_bytes([1; 32]);
        let hash = |parts: &[&[u8]]| pepper.keyed_hash_of(parts);
        assert_eq!(hash(&[b"a", b"bc"]), hash(&[b"a", b"bc"]));
        assert_ne!(hash(&[b"a", b"bc"]), hash(&[b"ab", b"c"]));
        assert_ne!(hash(&[b"a"]), pepper.keyed_hash("a"));
        let sealed = pepper.capsule_key().seal(b"t", b"x");
        assert_eq!(Pepper::from_bytes([1; 32]).capsule_key().open(b"t", &sealed).unwrap(), b"x");
        assert!(Pepper::from_bytes([2; 32]).capsule_key().open(b"t", &sealed).is_err());
    }

    #[test]
    fn a_pepper_is_hmac_sha256() {
        // RFC 4231 has no 32-byte key; computed with Python's hmac module.
        let hash = Pepper::from_bytes([0x0b; 32]).keyed_hash("Hi There");
        assert_eq!(hash.to_string(), PEPPER_GOLDEN);
        assert_ne!(hash, Pepper::generate().keyed_hash("Hi There"));
    }
    const PEPPER_GOLDEN: &str = "198a607eb44bfbc69903a0f1cf2bbdc5ba0aa3f3d9ae3c1c7a3b1696a0b68cf7";

    #[test]
    fn a_stored_key_comes_back_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pepper");
        let pepper = Pepper::generate();
        pepper.store(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Pepper::load(&path).unwrap().keyed_hash("a"), pepper.keyed_hash("a"));
        assert!(matches!(Pepper::generate().store(&path), Err(Error::Write { .. })));
    }

    #[test]
    fn key_files_that_others_may_read_are_refused() {
        let digits = "ab".repeat(32);
        for mode in [0o640, 0o604, 0o660, 0o644] {
            let (_dir, path) = file(&digits, mode);
            assert!(matches!(MasterKey::load(&path), Err(Error::Permissions { .. })), "{mode:o}");
        }
        for mode in [0o600, 0o400] {
            let (_dir, path) = file(&digits, mode);
            assert!(MasterKey::load(&path).is_ok(), "{mode:o}");
        }
        let credentials = Path::new("/run/credentials/izar");
        assert_eq!(forbidden_bits(Path::new("/run/credentials/izar/pepper"), Some(credentials)), 0o007);
        assert_eq!(forbidden_bits(Path::new("/etc/izar/pepper"), Some(credentials)), 0o077);
    }

    #[test]
    fn key_files_of_another_length_are_refused_by_name() {
        for content in ["", "abcd", &"ab".repeat(33), &"zz".repeat(32)] {
            let (_dir, path) = file(content, 0o600);
            let error = Pepper::load(&path).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }) && error.to_string().contains("/key"), "{error}");
        }
    }
}
