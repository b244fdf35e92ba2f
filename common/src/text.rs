//! A model's language: prompts to tokens, tokens to text that never splits a character, chat templates, stop strings.
//!
//! The one home of `tokenizers` and `minijinja`. A controller needs nothing of a model but its [`Bundle`], a few
//! megabytes of JSON; weights stay with the agents. Tokens leave through a table of bytes that is built once, because
//! every token of every stream passes it.

mod bpe;
mod bundle;
mod decode;
pub mod echo;
mod ggml;
mod special;
mod spm;
mod stop;
mod template;

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

pub use bundle::{Bundle, Defaults};
pub use decode::Detokenizer;
pub use stop::{Released, StopMatcher};

use crate::chat::{Message, Token};
use decode::Table;
use special::Specials;
use template::Template;

/// Why a model's text cannot be used, or a prompt not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {name}")]
    Read { name: String, source: std::io::Error },
    #[error("{name} is missing")]
    Missing { name: &'static str },
    #[error("{name} is not as it should be: {reason}")]
    Malformed { name: String, reason: String },
    #[error("the GGUF metadata has no usable tokenizer")]
    Gguf(#[from] crate::gguf::Error),
    #[error("{0} is not supported")]
    Unsupported(String),
    #[error("the tokenizer is not usable: {0}")]
    Tokenizer(String),
    #[error("the model has no chat template; it takes plain completions only")]
    NoTemplate,
    /// The template is broken, or does not go with these messages.
    #[error("the chat template failed: {0}")]
    Template(String),
    /// The template itself says that it cannot show these messages (`raise_exception`): the caller's mistake.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
}

/// Speaks a model's language. Immutable, shared by all requests; about 20 MB for a vocabulary of 50,000.
pub struct Text {
    language: Language,
    table: Table,
    eos: Vec<Token>,
    defaults: Defaults,
}

enum Language {
    /// Bytes in, words out.
    Echo,
    Model(Box<Model>),
}

struct Model {
    tokenizer: tokenizers::Tokenizer,
    template: Option<Template>,
    specials: Specials,
    /// The token that begins every plain prompt, if the model wants one.
    bos: Option<Token>,
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Text").field("vocabulary", &self.vocabulary()).field("eos", &self.eos).finish_non_exhaustive()
    }
}

impl Text {
    /// Builds the tokenizer, its table of bytes and the template; takes up to some hundred milliseconds.
    pub fn new(bundle: &Bundle) -> Result<Self, Error> {
        let Some(json) = &bundle.tokenizer else {
            return Ok(Self {
                language: Language::Echo,
                table: echo::table(),
                eos: Vec::new(),
                defaults: bundle.defaults,
            });
        };
        let mut tokenizer = tokenizers::Tokenizer::deserialize(json).map_err(|e| Error::Tokenizer(e.to_string()))?;
        // Left over from training in some files; a prompt is never cut short or filled up in silence.
        tokenizer.with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        tokenizer.with_padding(None);
        check_added(&tokenizer, json)?;
        let table = Table::new(&tokenizer, &json["decoder"], &bundle.eos)?;
        if let Some(token) = bundle.eos.iter().find(|t| **t >= table.len()) {
            return Err(Error::Tokenizer(format!("end token {token} is outside the vocabulary of {}", table.len())));
        }
        let bos = match &bundle.bos {
            Some(text) if bundle.add_bos => Some(
                tokenizer
                    .token_to_id(text)
                    .ok_or_else(|| Error::Tokenizer(format!("the first token `{text}` is not in the vocabulary")))?,
            ),
            _ => None,
        };
        let template = match &bundle.chat_template {
            Some(source) => Some(Template::new(source, bundle.bos.as_deref(), bundle.eos_text.as_deref())?),
            None => None,
        };
        let specials =
            Specials::new(tokenizer.get_added_tokens_decoder().into_values().filter(|t| t.special).map(|t| t.content));
        let language = Language::Model(Box::new(Model { tokenizer, template, specials, bos }));
        Ok(Self { language, table, eos: bundle.eos.clone(), defaults: bundle.defaults })
    }

    /// Encodes the prompt of a plain completion, with the token that the model wants in front. Special tokens that are
    /// written out in it count as such: whoever asks for a plain completion writes the whole prompt.
    pub fn encode(&self, text: &str) -> Result<Vec<Token>, Error> {
        match &self.language {
            Language::Echo => Ok(echo::encode(text)),
            Language::Model(model) => {
                let mut tokens = encode_piece(&model.tokenizer, text, true)?;
                if let Some(bos) = model.bos.filter(|bos| tokens.first() != Some(bos)) {
                    tokens.insert(0, bos);
                }
                Ok(tokens)
            }
        }
    }

    /// Renders the chat template for an answer to come and encodes it. The template alone decides about the first
    /// token. A special token that is written out in a message stays text: see `text/special.rs`.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<Token>, Error> {
        self.encode_chat_at(messages, crate::clock::wall_ms())
    }
    /// Like `encode_chat`, for templates that show the date: `now_ms` is Unix time.
    pub fn encode_chat_at(&self, messages: &[Message], now_ms: u64) -> Result<Vec<Token>, Error> {
        let model = match &self.language {
            Language::Echo => return Ok(echo::encode_chat(messages)),
            Language::Model(model) => model,
        };
        let template = model.template.as_ref().ok_or(Error::NoTemplate)?;
        let cuts = model.specials.cut(messages)?;
        let rendered = template.render(cuts.messages(messages), now_ms)?;
        let mut tokens = Vec::new();
        for piece in cuts.pieces(&rendered) {
            tokens.append(&mut encode_piece(&model.tokenizer, piece, false)?);
        }
        Ok(tokens)
    }

    /// Whether `encode_chat` can work.
    pub fn has_chat(&self) -> bool {
        match &self.language {
            Language::Echo => true,
            Language::Model(model) => model.template.is_some(),
        }
    }
    /// One more than the highest token that the tokenizer knows; the model may have more rows.
    pub fn vocabulary(&self) -> u32 {
        self.table.len()
    }
    /// The tokens that end an answer.
    pub fn eos(&self) -> &[Token] {
        &self.eos
    }
    /// How tokens are drawn where a request does not say.
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }
    /// The bytes that a token stands for in an answer; special tokens and those outside the vocabulary have none.
    pub fn token_bytes(&self, token: Token) -> &[u8] {
        self.table.get(token)
    }
    /// A token's name: its bytes, or what a special token is called.
    pub fn token_name(&self, token: Token) -> Vec<u8> {
        let bytes = self.table.get(token);
        match &self.language {
            Language::Model(model) if bytes.is_empty() => {
                model.tokenizer.id_to_token(token).unwrap_or_default().into_bytes()
            }
            _ => bytes.to_vec(),
        }
    }
    /// Begins to decode an answer.
    pub fn decoder(self: &Arc<Self>) -> Detokenizer {
        Detokenizer::new(self.clone())
    }
}

/// Refuses a file whose added tokens have other ids than `tokenizers` gives them: it numbers them without gaps, and the
/// model would be told other tokens than it has learned.
fn check_added(tokenizer: &tokenizers::Tokenizer, json: &serde_json::Value) -> Result<(), Error> {
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        let id = tokenizer.token_to_id(content).map(u64::from);
        if id != token["id"].as_u64() {
            return Err(Error::Tokenizer(format!("the added token `{content}` does not have the id {}", token["id"])));
        }
    }
    Ok(())
}

fn encode_piece(tokenizer: &tokenizers::Tokenizer, text: &str, whole: bool) -> Result<Vec<Token>, Error> {
    let encoding = tokenizer.encode_fast(text, whole).map_err(|e| Error::Encode(e.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests;
