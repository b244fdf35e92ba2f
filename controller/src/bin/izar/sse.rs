//! Finds the data lines of a `text/event-stream` that arrives in pieces. Pure, and cheap enough for a load generator.

/// The longest line kept while its end has not come: far above any event of a chat, far below what hurts.
const LINE_LIMIT: usize = 1 << 20;

/// A line without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a line of the event stream is longer than {LINE_LIMIT} bytes")]
pub struct TooLong;

/// Holds back the half line at the end of a piece.
#[derive(Debug, Default)]
pub struct Scanner {
    half: Vec<u8>,
    /// If ids are kept.
    ids: Option<Ids>,
}

/// The id of the last event, and one whose event has not come yet: until it has, a client must ask for it again.
#[derive(Debug, Default)]
struct Ids {
    last: Vec<u8>,
    next: Vec<u8>,
}

impl Scanner {
    /// One that keeps the id of the last event.
    pub fn with_ids() -> Self {
        Self { ids: Some(Ids::default()), ..Self::default() }
    }

    /// The id of the last event that had one, if ids are kept.
    pub fn last_id(&self) -> Option<&str> {
        let last = self.ids.as_ref().map(|ids| ids.last.as_slice());
        last.filter(|id| !id.is_empty()).and_then(|id| std::str::from_utf8(id).ok())
    }

    /// Calls `event` with what follows `data:` in each line that `bytes` completes. Comments and other fields are
    /// passed over.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), TooLong> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            if self.half.is_empty() {
                line(&rest[..end], &mut self.ids, &mut event);
            } else {
                self.half.extend_from_slice(&rest[..end]);
                line(&self.half, &mut self.ids, &mut event);
                self.half.clear();
            }
            rest = &rest[end + 1..];
        }
        if self.half.len() + rest.len() > LINE_LIMIT {
            return Err(TooLong);
        }
        self.half.extend_from_slice(rest);
        Ok(())
    }

    /// Makes it ready for the next stream of the same answer.
    pub fn clear(&mut self) {
        self.half.clear();
        if let Some(ids) = &mut self.ids {
            ids.next.clear();
        }
    }

    /// Makes it ready for another answer.
    pub fn reset(&mut self) {
        self.clear();
        if let Some(ids) = &mut self.ids {
            ids.last.clear();
        }
    }
}

fn line(line: &[u8], ids: &mut Option<Ids>, event: &mut impl FnMut(&[u8])) {
    if let (Some(ids), Some(id)) = (&mut *ids, line.strip_prefix(b"id: ")) {
        ids.next.clear();
        ids.next.extend_from_slice(id.trim_ascii_end());
        return;
    }
    if let Some(data) = line.strip_prefix(b"data:") {
        let data = data.strip_prefix(b" ").unwrap_or(data);
        event(data.strip_suffix(b"\r").unwrap_or(data));
        if let Some(ids) = ids.as_mut().filter(|ids| !ids.next.is_empty()) {
            std::mem::swap(&mut ids.last, &mut ids.next);
            ids.next.clear();
        }
    }
}

/// What stands after `"key":` in a JSON text, blanks skipped; `None` if the key does not occur. A scan, not a parser:
/// good for counting what a server that we know sends.
pub fn after_key<'a>(json: &'a [u8], quoted_key_and_colon: &[u8]) -> Option<&'a [u8]> {
    let first = *quoted_key_and_colon.first()?;
    let mut rest = json;
    while let Some(at) = rest.iter().position(|&b| b == first) {
        if let Some(value) = rest[at..].strip_prefix(quoted_key_and_colon) {
            return Some(value.trim_ascii_start());
        }
        rest = &rest[at + 1..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(pieces: &[&str]) -> Vec<String> {
        let (mut scanner, mut seen) = (Scanner::default(), Vec::new());
        for piece in pieces {
            scanner.push(piece.as_bytes(), |e| seen.push(String::from_utf8_lossy(e).into_owned())).unwrap();
        }
        seen
    }

    #[test]
    fn events_are_found_wherever_the_pieces_are_cut() {
        let text = ": keep-alive\n\ndata: {\"a\":1}\r\n\r\nid: 7\ndata:[DONE]\n\n";
        let expected = ["{\"a\":1}", "[DONE]"];
        for cut in 0..=text.len() {
            assert_eq!(scan(&[&text[..cut], &text[cut..]]), expected, "cut at {cut}");
        }
        let bytes: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(scan(&bytes.iter().map(String::as_str).collect::<Vec<_>>()), expected);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.push(&vec![b'x'; LINE_LIMIT + 1], |_| ()), Err(TooLong));
    }

    #[test]
    fn keys_are_found_with_and_without_blanks() {
        let key = b"\"content\":";
        assert_eq!(after_key(br#"{"delta":{"content":"a"}}"#, key), Some(&br#""a"}}"#[..]));
        assert_eq!(after_key(br#"{"delta":{"content": "a"}}"#, key), Some(&br#""a"}}"#[..]));
        assert_eq!(after_key(br#"{"delta":{}}"#, key), None);
    }

    #[test]
    fn ids_are_kept_for_who_wants_to_go_on() {
        let mut scanner = Scanner::with_ids();
        assert_eq!(scanner.last_id(), None);
        scanner.push(b"id: 1-a\ndata: x\n\nid: 2", |_| ()).unwrap();
        assert_eq!(scanner.last_id(), Some("1-a"));
        scanner.push(b"-b\r\ndata: y\n\n", |_| ()).unwrap();
        assert_eq!(scanner.last_id(), Some("2-b"));
        scanner.push(b"id: 3-c\nda", |_| ()).unwrap();
        assert_eq!(scanner.last_id(), Some("2-b"), "half an event is none");
        scanner.clear();
        assert_eq!(scanner.last_id(), Some("2-b"), "the answer goes on in another stream");
        scanner.reset();
        assert_eq!(scanner.last_id(), None);
        let mut plain = Scanner::default();
        plain.push(b"id: 1\n", |_| ()).unwrap();
        assert_eq!(plain.last_id(), None);
    }
}
