//! How the OpenAI dialect writes an error.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use serde::Serialize;

use crate::gateway::error::Error;

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: String,
    r#type: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

/// Writes an error as JSON.
pub fn json(error: &Error) -> Vec<u8> {
    let row = error.row();
    let inner = Inner { message: error.to_string(), r#type: row.kind, param: error.field(), code: row.code };
    serde_json::to_vec(&Envelope { error: inner }).expect("strings are JSON")
}

/// Answers with an error.
pub fn response(error: &Error) -> Response<Body> {
    let row = error.row();
    let mut response = Response::new(Body::from(json(error)));
    *response.status_mut() = row.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = row.retry_after_s {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if row.status == 401 {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_openais_shape() {
        let json = json(&Error::invalid("messages[0].role", "no such \"role\""));
        let expected = r#"{"error":{"message":"no such \"role\"","type":"invalid_request_error","param":"messages[0].role","code":"invalid_value"}}"#;
        assert_eq!(String::from_utf8(json).unwrap(), expected);
    }

    #[test]
    fn what_may_be_tried_again_says_when() {
        let response = response(&Error::TooManyRequests { limit: 4 });
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (429, &HeaderValue::from_static("1"))
        );
        assert!(super::response(&Error::WrongKey).headers().get("retry-after").is_none());
    }
}
