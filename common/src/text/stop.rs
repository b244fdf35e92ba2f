//! Stop strings: ends an answer right before the first of them, wherever token borders fall.
//!
//! The first to be complete wins; of two that complete together, the longer. So the result is the same whatever pieces
//! the text comes in, and no text is held back longer than a half match lasts.

use std::fmt;

/// What may go to the client.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Released {
    pub text: String,
    /// A stop string was met: the answer ends after `text`.
    pub stopped: bool,
}

/// Looks for stop strings in a text that comes in pieces.
pub struct StopMatcher {
    stops: Vec<String>,
    /// Held back: the longest end of the text so far that a stop string begins with. Shorter than the longest of them.
    held: String,
    stopped: bool,
}

/// Shows nothing of the answer.
impl fmt::Debug for StopMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopMatcher").field("stopped", &self.stopped).finish_non_exhaustive()
    }
}

impl StopMatcher {
    /// Empty stop strings are passed over: they would end every answer before it begins.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self { stops, held: String::new(), stopped: false }
    }
    /// Takes the next piece. After a stop, everything is swallowed.
    pub fn push(&mut self, piece: &str) -> Released {
        if self.stopped {
            return Released { text: String::new(), stopped: true };
        }
        if self.stops.is_empty() {
            return Released { text: piece.to_owned(), stopped: false };
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some(start) = self.first_match(&text) {
            text.truncate(start);
            self.stopped = true;
            return Released { text, stopped: true };
        }
        self.held = text.split_off(text.len() - self.half_match(text.as_bytes()));
        Released { text, stopped: false }
    }
    /// Ends the text: gives what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop string begins that is complete first.
    fn first_match(&self, text: &str) -> Option<usize> {
        let matches = self.stops.iter().filter_map(|s| text.find(s.as_str()).map(|start| (start + s.len(), start)));
        matches.min().map(|(_, start)| start)
    }
    /// How many bytes at the end of `text` a stop string begins with. These begin at a character's border, because the
    /// stop string does.
    fn half_match(&self, text: &[u8]) -> usize {
        let longest = |stop: &String| {
            let limit = text.len().min(stop.len() - 1);
            (1..=limit).rev().find(|n| text.ends_with(&stop.as_bytes()[..*n])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = Vec::new();
        let mut stopped = false;
        for piece in pieces {
            let released = matcher.push(piece);
            out.push(released.text);
            stopped = released.stopped;
        }
        out.push(matcher.finish());
        (out, stopped)
    }
    fn check(stops: &[&str], pieces: &[&str], expected: &[&str], stopped: bool) {
        assert_eq!(run(stops, pieces), (expected.iter().map(|s| (*s).to_owned()).collect(), stopped));
    }

    #[test]
    fn a_stop_across_pieces_is_found() {
        check(&["END"], &["a E", "N", "D b", "c"], &["a ", "", "", "", ""], true);
    }

    #[test]
    fn only_a_half_match_is_held_back() {
        check(&["END"], &["xE", "Ny", "EN"], &["x", "ENy", "", "EN"], false);
        check(&["aab"], &["aaa", "ab"], &["a", "a", ""], true);
        check(&["né!"], &["n", "é", "?"], &["", "", "né?", ""], false);
    }

    #[test]
    fn of_several_the_first_complete_wins_and_then_the_longer() {
        check(&["abc", "b"], &["zabc"], &["za", ""], true);
        check(&["abc", "b"], &["za", "b", "c"], &["z", "a", "", ""], true);
        check(&["c", "abc"], &["zabc"], &["z", ""], true);
    }

    #[test]
    fn without_stops_everything_passes() {
        check(&[], &["a", "b"], &["a", "b", ""], false);
        check(&[""], &["a", "b"], &["a", "b", ""], false);
    }

    proptest! {
        #[test]
        fn the_result_is_the_text_before_the_first_stop_whatever_the_pieces(
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            pieces in proptest::collection::vec("[abcé]{0,5}", 0..12),
        ) {
            let borrowed: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (out, stopped) = run(&borrowed, &pieces.iter().map(String::as_str).collect::<Vec<_>>());
            let (whole, out) = (pieces.concat(), out.concat());
            let first = stops.iter().filter_map(|s| whole.find(s.as_str()).map(|at| (at + s.len(), at))).min();
            prop_assert_eq!(stopped, first.is_some());
            prop_assert_eq!(&out, &whole[..first.map_or(whole.len(), |(_, at)| at)]);
            prop_assert!(stops.iter().all(|s| !out.contains(s.as_str())));
        }
    }
}
