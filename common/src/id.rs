//! Identities: every id is a type of its own, so that a tenant is never passed where a project is meant.
//!
//! Names are chosen by people (`[a-z0-9][a-z0-9._-]*`, at most 63 characters), hashes by content, turn ids by chance.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name of a node, site, tenant, project or deployment; a DNS label's length, so that names fit anywhere.
pub const NAME_LIMIT: usize = 63;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("`{0}` is not a name: use 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit")]
    Name(String),
    #[error("`{0}` is not a hash: 64 hexadecimal digits are needed")]
    Hash(String),
    #[error("`{0}` is not a turn id: `turn_` and 32 hexadecimal digits are needed")]
    Turn(String),
    #[error("`{0}` is not a numerics id: 16 hexadecimal digits are needed")]
    Numerics(String),
}

fn check_name(text: &str) -> Result<(), Error> {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
    if first && rest && text.len() <= NAME_LIMIT { Ok(()) } else { Err(Error::Name(text.to_owned())) }
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Checks and takes a name.
            pub fn new(text: &str) -> Result<Self, Error> {
                check_name(text)?;
                Ok(Self(text.into()))
            }
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                Self::new(text)
            }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                Self::new(&text)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )*};
}

names! {
    /// One deployment of Izar: one private CA, one set of sites.
    ClusterId;
    /// A place with a Raft group of its own.
    SiteId;
    /// A controller or an agent.
    NodeId;
    /// An organisation or department whose data is kept apart.
    TenantId;
    /// A part of a tenant that has keys, scopes and quotas.
    ProjectId;
    /// Names a key without revealing it.
    KeyId;
    /// A model that is served under a name.
    DeploymentId;
    /// One replica of a deployment on an agent, `<deployment>.<number>`.
    WorkerId;
    /// A GPU, by the identity that its driver gives it, in lower case: `gpu-8a5b…`. It stays the same in another slot.
    GpuId;
}

/// SHA-256 of some content: names files and model revisions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for Hash {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Hash(text.to_owned());
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}
impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}
impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

/// A request to a model and its answer. Also the `X-Request-Id` of the API.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TurnId(pub u128);

impl TurnId {
    /// Makes an id that sorts by time: 48 bits of `now_ms`, 80 random bits.
    pub fn random(now_ms: u64) -> Self {
        Self(u128::from(now_ms) << 80 | rand::random::<u128>() >> 48)
    }
    /// When it was made, Unix milliseconds.
    pub fn ms(self) -> u64 {
        (self.0 >> 80) as u64
    }
    /// A random number that belongs to it: 64 of its random bits.
    pub fn seed(self) -> u64 {
        self.0 as u64
    }
}
impl fmt::Display for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "turn_{:032x}", self.0)
    }
}
impl fmt::Debug for TurnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for TurnId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Turn(text.to_owned());
        let digits = text.strip_prefix("turn_").filter(|d| d.len() == 32).ok_or_else(bad)?;
        u128::from_str_radix(digits, 16).map(Self).map_err(|_| bad())
    }
}
impl Serialize for TurnId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}
impl<'de> Deserialize<'de> for TurnId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            u128::deserialize(deserializer).map(Self)
        }
    }
}

/// Names all that decides the bits of a worker's numbers: model revision, quantization, kernels, instruction set. Two
/// workers with one id give the same logits for the same tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NumericsId(pub u64);

impl NumericsId {
    /// Stands for several that had a part in one answer: no worker has it, and nothing is computed again by it.
    pub const SEVERAL: Self = Self(u64::MAX);

    /// Names a combination; each part counts, and so does their order.
    pub fn of(parts: &[&str]) -> Self {
        let mut all = Vec::new();
        for part in parts {
            all.extend_from_slice(&(part.len() as u64).to_be_bytes());
            all.extend_from_slice(part.as_bytes());
        }
        let Hash(hash) = crate::blob::hash(&all);
        Self(u64::from_be_bytes(*hash.first_chunk().expect("a hash has 32 bytes")))
    }
}
impl fmt::Display for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl fmt::Debug for NumericsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for NumericsId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let digits = Some(text).filter(|t| t.len() == 16 && t.bytes().all(|b| b.is_ascii_hexdigit()));
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(Self).ok_or_else(|| Error::Numerics(text.to_owned()))
    }
}
impl Serialize for NumericsId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}
impl<'de> Deserialize<'de> for NumericsId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            u64::deserialize(deserializer).map(Self)
        }
    }
}

/// What a certificate says its holder may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Controller,
    Agent,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Controller => "controller",
            Role::Agent => "agent",
        })
    }
}
impl FromStr for Role {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "controller" => Ok(Role::Controller),
            "agent" => Ok(Role::Agent),
            _ => Err(Error::Name(text.to_owned())),
        }
    }
}

/// Who a node is, as its certificate says: `izar://<cluster>/<site>/<role>/<node>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub cluster: ClusterId,
    pub site: SiteId,
    pub role: Role,
    pub node: NodeId,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "izar://{}/{}/{}/{}", self.cluster, self.site, self.role, self.node)
    }
}
impl FromStr for Identity {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Name(text.to_owned());
        let mut parts = text.strip_prefix("izar://").ok_or_else(bad)?.split('/');
        let mut next = || parts.next().ok_or_else(bad);
        let identity =
            Self { cluster: next()?.parse()?, site: next()?.parse()?, role: next()?.parse()?, node: next()?.parse()? };
        if parts.next().is_some() { Err(bad()) } else { Ok(identity) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "n1", "smollm2-135m", "a.b_c-d", &"x".repeat(63)] {
            assert!(NodeId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "-a", "a/b", "a b", "é", &"x".repeat(64)] {
            assert!(NodeId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn identities_round_trip_and_refuse_what_is_not_one() {
        let text = "izar://bank/east/agent/a1";
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        for bad in ["izar://bank/east/agent", "izar://bank/east/king/a1", "http://a/b/agent/c", "izar://a/b/agent/c/d"]
        {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_numerics_id_depends_on_every_part_and_round_trips() {
        let id = NumericsId::of(&["r", "int4", "avx2"]);
        assert_eq!(id.to_string().parse::<NumericsId>().unwrap(), id);
        for other in [&["r", "int4avx2"][..], &["r", "avx2", "int4"], &["", "r", "int4", "avx2"]] {
            assert_ne!(NumericsId::of(other), id);
        }
        for bad in ["", "12", "+123456789012345", "00000000000000000"] {
            assert!(bad.parse::<NumericsId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn turn_ids_sort_by_time_and_round_trip() {
        let (a, b) = (TurnId::random(1), TurnId::random(2));
        assert!(a < b && (a.ms(), b.ms()) == (1, 2) && a.seed() != b.seed());
        assert_eq!(a.to_string().parse::<TurnId>().unwrap(), a);
        assert!("turn_12".parse::<TurnId>().is_err());
    }
}
