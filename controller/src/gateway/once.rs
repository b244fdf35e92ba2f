//! `Idempotency-Key`: a client that may have to ask twice, and wants one answer.
//!
//! What the client chose is hashed at once under the cluster's pepper, together with the API key that it belongs to; so
//! is what it asks. Pure.

use axum::http::{HeaderMap, HeaderName};
use izar_common::id::KeyId;
use izar_common::seal::Pepper;

use super::error::Error;
use super::openai::sse::Kind;
use crate::state::turns::Once;

const HEADER: HeaderName = HeaderName::from_static("idempotency-key");

/// Longest key that is taken; a UUID has 36 characters.
const KEY_BYTES: usize = 255;

/// Reads what a client says of a request, if it says anything.
pub fn read(
    headers: &HeaderMap,
    pepper: &Pepper,
    owner: &KeyId,
    kind: Kind,
    body: &[u8],
) -> Result<Option<Once>, Error> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let good = (1..=KEY_BYTES).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic);
    if !good || values.next().is_some() {
        let message = format!("`Idempotency-Key` must be one value of 1 to {KEY_BYTES} visible ASCII characters");
        return Err(Error::invalid("Idempotency-Key", message));
    }
    let route: &[u8] = match kind {
        Kind::Chat => b"chat",
        Kind::Completion => b"completion",
    };
    Ok(Some(Once {
        name: pepper.keyed_hash_of(&[b"idempotency key", owner.as_str().as_bytes(), value.as_bytes()]),
        request: pepper.keyed_hash_of(&[b"idempotent request", route, body]),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(key: &str, owner: &str, kind: Kind, body: &str) -> Result<Option<Once>, Error> {
        let headers = HeaderMap::from_iter([(HEADER, key.parse().unwrap())]);
        read(&headers, &Pepper::from_bytes([1; 32]), &KeyId::new(owner).unwrap(), kind, body.as_bytes())
    }

    #[test]
    fn a_name_is_of_an_api_key_and_a_request_of_its_route_and_body() {
        let first = once("a", "k", Kind::Chat, "{}").unwrap().unwrap();
        assert_eq!(once("a", "k", Kind::Chat, "{}").unwrap(), Some(first));
        for (key, owner) in [("b", "k"), ("a", "l")] {
            let other = once(key, owner, Kind::Chat, "{}").unwrap().unwrap();
            assert!(other.name != first.name && other.request == first.request);
        }
        for (kind, body) in [(Kind::Completion, "{}"), (Kind::Chat, "{ }")] {
            let other = once("a", "k", kind, body).unwrap().unwrap();
            assert!(other.name == first.name && other.request != first.request);
        }
    }

    #[test]
    fn only_one_visible_value_is_taken() {
        assert!(once(&"x".repeat(KEY_BYTES), "k", Kind::Chat, "").is_ok());
        for bad in ["", "a b", "é", &"x".repeat(KEY_BYTES + 1)] {
            let error = once(bad, "k", Kind::Chat, "").unwrap_err();
            assert_eq!(error.field(), Some("Idempotency-Key"), "{bad}");
        }
        let mut headers = HeaderMap::new();
        let none = read(&headers, &Pepper::from_bytes([1; 32]), &KeyId::new("k").unwrap(), Kind::Chat, b"");
        assert_eq!(none, Ok(None));
        headers.append(HEADER, "a".parse().unwrap());
        headers.append(HEADER, "b".parse().unwrap());
        let two = read(&headers, &Pepper::from_bytes([1; 32]), &KeyId::new("k").unwrap(), Kind::Chat, b"");
        assert!(two.is_err());
    }
}
