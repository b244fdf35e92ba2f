//! Reads the body of a request: never more of it than the limit, never longer than its time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::error::Error;
use super::limits::Limits;
use super::memory::{BODY_COPIES, Charge, Memory};

/// Bytes set aside for a body before any of it is there, whatever its head promises.
const FIRST_BYTES: usize = 16 << 10;
/// How long, and how many bytes, a refused client may go on sending before the connection is closed. Closing at once
/// would reset the connection, and many clients lose the answer then.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 << 20;

/// Refuses a body whose head says that it is too large, before any of it is read.
pub fn check_length(headers: &HeaderMap, limits: &Limits) -> Result<(), Error> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match length {
        Some(length) if length > limits.body_bytes as u64 => Err(Error::LargeBody { limit: limits.body_bytes }),
        _ => Ok(()),
    }
}

/// Reads a body whole; the charge is for what is made of it, and is kept as long as that. On an error the caller still has
/// the rest of the body, to `linger` on.
pub async fn read(body: &mut Body, limits: &Limits, memory: &Arc<Memory>) -> Result<(Bytes, Charge), Error> {
    let mut charge = memory.charge(0).ok_or(Error::Overloaded)?;
    let bytes = tokio::time::timeout(limits.body(), collect(body, limits.body_bytes, &mut charge))
        .await
        .unwrap_or(Err(Error::SlowBody { limit_ms: limits.body_ms }))?;
    Ok((bytes, charge))
}

async fn collect(body: &mut Body, limit: usize, charge: &mut Charge) -> Result<Bytes, Error> {
    let (mut first, mut all) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Error::Invalid { field: None, message: "the body broke off".into() })?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + all.len() + data.len() > limit {
            return Err(Error::LargeBody { limit });
        }
        if !charge.grow(BODY_COPIES * data.len()) {
            return Err(Error::Overloaded);
        }
        // Most bodies are one piece, which is used as it came.
        if all.is_empty() && first.is_empty() {
            first = data;
            continue;
        }
        if all.is_empty() {
            all.reserve(FIRST_BYTES);
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&data);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Reads and drops what a refused client still sends, for a short while.
pub async fn linger(mut body: Body) {
    let drain = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > LINGER_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// Parses a body; an error names the field.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    // An array would fill a struct's fields in their order.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(not_json("the body is not the expected object: it is an array"));
    }
    // The first pass is twice as fast; only a mistake is worth tracking the path.
    if let Ok(value) = serde_json::from_slice(body) {
        return Ok(value);
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let error = match serde_path_to_error::deserialize::<_, T>(&mut json) {
        Ok(_) => return Err(not_json("the body goes on after its JSON object")),
        Err(error) => error,
    };
    let path = error.path().to_string();
    let cause = error.into_inner();
    match cause.classify() {
        serde_json::error::Category::Data if path != "." => Err(Error::invalid(&path, format!("`{path}`: {cause}"))),
        serde_json::error::Category::Data => Err(not_json(&format!("the body is not the expected object: {cause}"))),
        _ => Err(not_json(&format!("the body is not valid JSON: {cause}"))),
    }
}

fn not_json(message: &str) -> Error {
    Error::Invalid { field: None, message: message.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Sheet {
        rows: Vec<Row>,
    }
    #[derive(Debug, Deserialize)]
    struct Row {
        height: u8,
    }

    fn check(body: &str, field: Option<&str>, words: &str) {
        let error = parse::<Sheet>(body.as_bytes()).unwrap_err();
        assert_eq!(error.field(), field, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    #[test]
    fn a_mistake_is_named_by_its_path() {
        check(r#"{"rows":[{"height":1},{"height":"x"}]}"#, Some("rows[1].height"), "invalid type");
        check(r#"{"rows":[{"height":300}]}"#, Some("rows[0].height"), "300");
        check(r#"{"rows":[{"height":1}"#, None, "not valid JSON");
        check("", None, "not valid JSON");
        check("[]", None, "not the expected object");
        check(r#"{"rows":[]} tail"#, None, "goes on");
        assert_eq!(parse::<Sheet>(br#"{"rows":[{"height":7}]}"#).unwrap().rows[0].height, 7);
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_its_limit_and_not_beyond() {
        let limits = Limits { body_bytes: 10, ..Limits::default() };
        let pieces = |n: usize| {
            let pieces = (0..n).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(b"abc")));
            Body::from_stream(futures_util::stream::iter(pieces))
        };
        let memory = &Memory::new(100);
        assert_eq!(read(&mut pieces(3), &limits, memory).await.unwrap().0, "abcabcabc");
        assert_eq!(read(&mut pieces(4), &limits, memory).await.unwrap_err(), Error::LargeBody { limit: 10 });
        assert_eq!(read(&mut Body::empty(), &limits, memory).await.unwrap().0, "");
        let (_, _held) = read(&mut pieces(3), &limits, memory).await.unwrap();
        let _other = memory.charge(70).unwrap();
        assert_eq!(read(&mut pieces(1), &limits, memory).await.unwrap_err(), Error::Overloaded);
    }

    #[tokio::test]
    async fn a_body_that_never_comes_is_given_up() {
        let never = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let limits = Limits { body_ms: 10, ..Limits::default() };
        let read = read(&mut Body::from_stream(never), &limits, &Memory::new(100)).await;
        assert_eq!(read.unwrap_err(), Error::SlowBody { limit_ms: 10 });
    }

    #[test]
    fn a_length_over_the_limit_is_refused_from_the_head() {
        let limits = Limits { body_bytes: 10, ..Limits::default() };
        let with = |length: &str| HeaderMap::from_iter([(header::CONTENT_LENGTH, length.parse().unwrap())]);
        assert_eq!(check_length(&with("10"), &limits), Ok(()));
        assert_eq!(check_length(&with("11"), &limits), Err(Error::LargeBody { limit: 10 }));
        assert_eq!(check_length(&HeaderMap::new(), &limits), Ok(()));
    }
}
