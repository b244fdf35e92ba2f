//! The echo model's vocabulary: prompts are bytes, answers are words. It needs no files, so tests and benchmarks run
//! anywhere.

use super::decode::{Leading, Table};
use crate::chat::{Message, Role, Token};

/// The first token that is a word; those below are bytes.
pub const FIRST_WORD: Token = 256;

/// The words of answers; token `FIRST_WORD + i` decodes to a space and `WORDS[i]`.
#[rustfmt::skip]
pub const WORDS: [&str; 256] = [
    "the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with",
    "his", "they", "at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all",
    "were", "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if",
    "will", "up", "other", "about", "out", "many", "then", "them", "these", "so", "some", "her", "would", "make", "like", "him",
    "into", "time", "has", "look", "two", "more", "write", "go", "see", "number", "no", "way", "could", "people", "my", "than",
    "first", "water", "been", "call", "who", "oil", "its", "now", "find", "long", "down", "day", "did", "get", "come", "made",
    "may", "part", "over", "new", "sound", "take", "only", "little", "work", "know", "place", "year", "live", "me", "back", "give",
    "most", "very", "after", "thing", "our", "just", "name", "good", "sentence", "man", "think", "say", "great", "where", "help", "through",
    "much", "before", "line", "right", "too", "mean", "old", "any", "same", "tell", "boy", "follow", "came", "want", "show", "also",
    "around", "form", "three", "small", "set", "put", "end", "does", "another", "well", "large", "must", "big", "even", "such", "because",
    "turn", "here", "why", "ask", "went", "men", "read", "need", "land", "different", "home", "us", "move", "try", "kind", "hand",
    "picture", "again", "change", "off", "play", "spell", "air", "away", "animal", "house", "point", "page", "letter", "mother", "answer", "found",
    "study", "still", "learn", "should", "world", "high", "every", "near", "add", "food", "between", "own", "below", "country", "plant", "last",
    "school", "father", "keep", "tree", "never", "start", "city", "earth", "eye", "light", "thought", "head", "under", "story", "saw", "left",
    "few", "while", "along", "might", "close", "something", "seem", "next", "hard", "open", "example", "begin", "life", "always", "those", "both",
    "paper", "together", "got", "group", "often", "run", "important", "until", "children", "side", "feet", "car", "mile", "night", "walk", "white",
];

/// Tokens in all.
pub const VOCABULARY: u32 = FIRST_WORD + WORDS.len() as u32;

/// A prompt's bytes.
pub fn encode(text: &str) -> Vec<Token> {
    text.bytes().map(Token::from).collect()
}

/// The bytes of `role: content` lines.
pub fn encode_chat(messages: &[Message]) -> Vec<Token> {
    messages.iter().flat_map(|m| encode(&format!("{}: {}\n", role(m.role), m.content))).collect()
}

fn role(role: Role) -> &'static str {
    match role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

pub(super) fn table() -> Table {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    Table::from_pieces(bytes.chain(WORDS.iter().map(|word| format!(" {word}").into_bytes())), Leading::Keep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Arc;

    #[test]
    fn words_are_distinct_and_plain() {
        assert_eq!(WORDS.iter().collect::<HashSet<_>>().len(), WORDS.len());
        assert!(WORDS.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase())));
    }

    #[test]
    fn bytes_and_words_decode() {
        let text = Arc::new(super::super::Text::new(&super::super::Bundle::echo()).unwrap());
        let mut decoder = text.decoder();
        let tokens = text.encode("é").unwrap().into_iter().chain([FIRST_WORD, FIRST_WORD + 255, VOCABULARY]);
        assert_eq!(tokens.map(|t| decoder.push(t)).collect::<String>(), "é the white");
        assert_eq!((text.vocabulary(), text.eos().len(), text.has_chat()), (VOCABULARY, 0, true));
        let chat = [Message { role: Role::User, content: "hi".into() }];
        assert_eq!(text.encode_chat(&chat).unwrap(), encode("user: hi\n"));
    }
}
