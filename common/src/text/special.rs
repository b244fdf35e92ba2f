//! Keeps special tokens out of what users say.
//!
//! A user who writes `<|im_end|>` must not end their own message and speak as the system. Before the template is
//! rendered, an invisible mark is put after the first character of each special token in a message; afterwards the text
//! is cut at the marks and each piece is encoded by itself, so that no piece holds a whole special token of the user's.
//! A conversation without such text is encoded in one piece, exactly as the reference does it.

use std::borrow::Cow;

use super::Error;
use crate::chat::Message;

/// The texts of all special tokens, by their first byte.
#[derive(Debug)]
pub(super) struct Specials {
    by_first: Vec<Vec<String>>,
}

impl Specials {
    /// Tokens of a single character cannot be cut and are passed over; no known model has one.
    pub(super) fn new(texts: impl Iterator<Item = String>) -> Self {
        let mut by_first = vec![Vec::new(); 256];
        for text in texts.filter(|t| t.chars().nth(1).is_some()) {
            by_first[text.as_bytes()[0] as usize].push(text);
        }
        Self { by_first }
    }

    /// Where to cut `text`: after the first character of every special token in it, overlapping ones too.
    fn places(&self, text: &str) -> Vec<usize> {
        let begins = |at: &usize| {
            let rest = &text.as_bytes()[*at..];
            self.by_first[rest[0] as usize].iter().any(|special| rest.starts_with(special.as_bytes()))
        };
        let first_char = |at: usize| text[at..].chars().next().map_or(0, char::len_utf8);
        (0..text.len()).filter(begins).map(|at| at + first_char(at)).collect()
    }

    /// Finds the special tokens in messages and, if there are any, a mark that occurs in none of the messages.
    pub(super) fn cut(&self, messages: &[Message]) -> Result<Cuts, Error> {
        let places: Vec<Vec<usize>> = messages.iter().map(|m| self.places(&m.content)).collect();
        if places.iter().all(Vec::is_empty) {
            return Ok(Cuts { mark: None, places });
        }
        // Private characters of planes 15 and 16: templates do not use them and do not strip them.
        let mark = ('\u{f0000}'..='\u{10fffd}').find(|c| !messages.iter().any(|m| m.content.contains(*c)));
        let mark = mark.ok_or_else(|| Error::Encode("the messages use every private character".to_owned()))?;
        Ok(Cuts { mark: Some(mark), places })
    }
}

/// Where messages are to be cut, and the mark that shows it.
#[derive(Debug)]
pub(super) struct Cuts {
    mark: Option<char>,
    places: Vec<Vec<usize>>,
}

impl Cuts {
    /// The contents with their marks, in the order of the messages.
    pub(super) fn messages<'a>(&'a self, messages: &'a [Message]) -> impl Iterator<Item = (&'a Message, Cow<'a, str>)> {
        messages.iter().zip(&self.places).map(|(message, places)| {
            let Some(mark) = self.mark.filter(|_| !places.is_empty()) else {
                return (message, Cow::Borrowed(message.content.as_str()));
            };
            let mut marked = message.content.clone();
            places.iter().rev().for_each(|at| marked.insert(*at, mark));
            (message, Cow::Owned(marked))
        })
    }
    /// The rendered text in pieces that are to be encoded apart; an empty text is one empty piece.
    pub(super) fn pieces<'a>(&self, rendered: &'a str) -> Vec<&'a str> {
        match self.mark {
            Some(mark) => rendered.split(mark).filter(|piece| !piece.is_empty()).collect(),
            None => vec![rendered],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Role;

    fn user(content: &str) -> Message {
        Message { role: Role::User, content: content.to_owned() }
    }
    fn check(specials: &[&str], content: &str, expected: &[&str]) {
        let messages = [user(content)];
        let cuts = Specials::new(specials.iter().map(|s| (*s).to_owned())).cut(&messages).unwrap();
        let marked = cuts.messages(&messages).next().unwrap().1.into_owned();
        let pieces = cuts.pieces(&marked);
        assert_eq!(pieces, expected);
        assert!(pieces.iter().all(|p| specials.iter().all(|s| !p.contains(s))));
        assert_eq!(pieces.concat(), content);
    }

    #[test]
    fn special_tokens_in_messages_are_cut() {
        check(&["<|im_end|>"], "a < b", &["a < b"]);
        check(&["<|im_end|>"], "hi<|im_end|>x", &["hi<", "|im_end|>x"]);
        check(&["<|im_end|>"], "<|im_<|im_end|>end|>", &["<|im_<", "|im_end|>end|>"]);
        check(&["ab", "bc"], "abc", &["a", "b", "c"]);
        check(&["<｜User｜>", "｜U"], "<｜User｜>", &["<", "｜", "User｜>"]);
    }

    #[test]
    fn a_mark_that_a_user_writes_is_not_used() {
        check(&["<s>"], "\u{f0000}<s>", &["\u{f0000}<", "s>"]);
    }
}
