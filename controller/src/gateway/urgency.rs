//! How soon an answer is wanted: what the headers of a request say, within what its project may.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName};
use izar_common::chat::Class;
use tokio::time::Instant;

use super::error::Error;
use crate::state::tenants::DEADLINE_LIMIT_MS;

/// The whole answer must be there so many milliseconds after the request's head.
const DEADLINE: HeaderName = HeaderName::from_static("x-izar-deadline-ms");
/// `urgent`, `interactive` or `batch`: no more urgent than the project is.
const CLASS: HeaderName = HeaderName::from_static("x-izar-class");

/// How soon an answer is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Urgency {
    pub class: Class,
    /// When the whole answer must be there.
    pub deadline: Option<Instant>,
}

/// Reads what a request says. `class` and `deadline_ms` (0: none) are the project's; `at`: when the request arrived.
pub fn read(headers: &HeaderMap, class: Class, deadline_ms: u32, at: Instant) -> Result<Urgency, Error> {
    let deadline_ms = match headers.get(DEADLINE) {
        None => u64::from(deadline_ms),
        Some(value) => {
            let ms = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            ms.filter(|ms| (1..=u64::from(DEADLINE_LIMIT_MS)).contains(ms)).ok_or_else(|| {
                let said = String::from_utf8_lossy(value.as_bytes()).chars().take(50).collect::<String>();
                let range = format!("use whole milliseconds from now, 1 to {DEADLINE_LIMIT_MS}");
                Error::invalid("X-Izar-Deadline-Ms", format!("X-Izar-Deadline-Ms: `{said}` is no deadline: {range}"))
            })?
        }
    };
    let asked = match headers.get(CLASS) {
        None => class,
        Some(value) => {
            let said = String::from_utf8_lossy(value.as_bytes()).chars().take(50).collect::<String>();
            let parsed = said.trim().parse::<Class>();
            parsed.map_err(|error| Error::invalid("X-Izar-Class", format!("X-Izar-Class: {error}")))?
        }
    };
    if asked < class {
        return Err(Error::ClassNotAllowed { asked, most: class });
    }
    let deadline = (deadline_ms > 0).then(|| at + Duration::from_millis(deadline_ms));
    Ok(Urgency { class: asked, deadline })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&'static str, &str)], class: Class, deadline_ms: u32) -> Result<(Class, u64), Error> {
        let headers = pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        let at = Instant::now();
        let urgency = read(&headers.collect(), class, deadline_ms, at)?;
        Ok((urgency.class, urgency.deadline.map_or(0, |deadline| (deadline - at).as_millis() as u64)))
    }

    #[test]
    fn a_request_that_says_nothing_is_as_urgent_as_its_project() {
        assert_eq!(check(&[], Class::Interactive, 0), Ok((Class::Interactive, 0)));
        assert_eq!(check(&[], Class::Batch, 700), Ok((Class::Batch, 700)));
    }

    #[test]
    fn a_request_may_be_less_urgent_than_its_project_and_never_more() {
        let class = |said, most| check(&[("x-izar-class", said)], most, 0);
        assert_eq!(class("batch", Class::Interactive), Ok((Class::Batch, 0)));
        assert_eq!(class("interactive", Class::Urgent), Ok((Class::Interactive, 0)));
        assert_eq!(class("urgent", Class::Urgent), Ok((Class::Urgent, 0)));
        let refused = class("urgent", Class::Interactive).unwrap_err();
        assert_eq!(refused.row().status, 403);
        assert!(refused.to_string().contains("interactive"), "{refused}");
        let unknown = class("Fast", Class::Urgent).unwrap_err();
        assert_eq!((unknown.row().status.as_u16(), unknown.field()), (400, Some("X-Izar-Class")));
        assert!(unknown.to_string().contains("urgent, interactive, batch"), "{unknown}");
    }

    #[test]
    fn a_deadline_is_a_whole_number_of_milliseconds_in_the_future() {
        let deadline = |said| check(&[("x-izar-deadline-ms", said)], Class::Interactive, 5000);
        assert_eq!(deadline("1"), Ok((Class::Interactive, 1)));
        assert_eq!(deadline(" 250 "), Ok((Class::Interactive, 250)));
        assert_eq!(deadline("86400000"), Ok((Class::Interactive, u64::from(DEADLINE_LIMIT_MS))));
        for bad in ["0", "-5", "", "soon", "1.5", "86400001", "1e3", "99999999999999999999"] {
            let error = deadline(bad).unwrap_err();
            assert_eq!((error.row().status.as_u16(), error.field()), (400, Some("X-Izar-Deadline-Ms")), "{bad}");
            assert!(error.to_string().contains("1 to 86400000"), "{error}");
        }
    }
}
