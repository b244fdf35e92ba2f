//! The nouns of a request: messages, sampling, the job that a worker is given and the events that come back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{DeploymentId, Hash, NumericsId, TurnId};

/// A token's id in its model's vocabulary.
pub type Token = u32;

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    /// OpenAI's newer word for `system`; templates see `system`.
    Developer,
    User,
    Assistant,
    Tool,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

/// How tokens are drawn. The same seed, choice and position give the same draw wherever it happens.
///
/// The order is fixed: grammar, `logit_bias`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`,
/// `temperature`, `top_k`, `min_p`, `top_p`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// Share of probability kept, (0, 1].
    pub top_p: f32,
    /// Number of candidates kept; 0 keeps all.
    pub top_k: u32,
    /// Candidates less probable than this times the most probable one are dropped; 0 (none) to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token of prompt and answer; above 0 to 2, 1 does
    /// nothing.
    pub repetition_penalty: f32,
    /// Taken from a token's logit for each time it stands in the answer; -2 to 2, 0 does nothing.
    pub frequency_penalty: f32,
    /// Taken from a token's logit once if it stands in the answer; -2 to 2, 0 does nothing.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, each named once, in the order of the tokens; -100 to 100.
    pub logit_bias: Vec<(Token, f32)>,
    /// Gives each token's log-probability and those of so many of the most probable ones (0 to 20), by the model's own
    /// distribution: before grammar, bias, penalties and temperature.
    pub logprobs: Option<u8>,
    /// What the whole answer must be.
    pub grammar: Option<Grammar>,
    pub seed: u64,
    /// Tokens to give at most, those already delivered included.
    pub max_tokens: u32,
    /// Go on past the model's end-of-text tokens (benchmarks).
    pub ignore_eos: bool,
}

/// Asks for nothing: the model's own distribution, 16 tokens of it.
impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            grammar: None,
            seed: 0,
            max_tokens: 16,
            ignore_eos: false,
        }
    }
}

/// Most alternatives that come with a log-probability.
pub const TOP_LOGPROBS: u8 = 20;

/// What a whole answer must be. Compiled by [`crate::grammar`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes; the schema as JSON text.
    JsonSchema(String),
    /// Text that a regular expression matches from its beginning to its end (Rust's syntax, no look-around).
    Regex(String),
}

/// How much a request's time counts against that of others; from most to least urgent.
///
/// It decides when an answer is computed, never what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Somebody's payment hangs on it: it passes everybody, and others pause while it is computed. For short prompts and
    /// answers.
    Urgent,
    /// Somebody reads along.
    #[default]
    Interactive,
    /// Nobody waits: it takes what others leave.
    Batch,
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Urgent, Self::Interactive, Self::Batch];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Urgent => "urgent",
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no class.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not one of urgent, interactive, batch")]
pub struct UnknownClass(pub String);

impl FromStr for Class {
    type Err = UnknownClass;
    fn from_str(word: &str) -> Result<Self, UnknownClass> {
        Self::ALL.into_iter().find(|class| class.as_str() == word).ok_or_else(|| UnknownClass(word.to_owned()))
    }
}

/// What a worker needs to begin or to continue an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub turn: TurnId,
    /// Which of the answers of a turn (`n` > 1), from 0.
    pub choice: u32,
    /// Counts placements of this choice; events of an older attempt are fenced off.
    pub attempt: u32,
    pub deployment: DeploymentId,
    /// The model revision that the prompt was tokenized for.
    pub revision: Hash,
    pub prompt: Vec<Token>,
    /// What the client already has of the answer: never sent again, and counted into `max_tokens`.
    pub delivered: Vec<Token>,
    pub sampling: Sampling,
    /// Names the prefix blocks of one tenant: who does not know it can neither find nor time what another has asked.
    pub cache_salt: [u8; 16],
    /// What computed the delivered tokens; `None` for a new answer. A worker with another id goes on all the same: what
    /// was delivered stays, the rest is a valid answer and not the very one.
    pub numerics: Option<NumericsId>,
    /// When it is computed, beside others.
    pub class: Class,
    /// The request of a streamed answer, sealed by the controller for another one to go on with; at most
    /// [`CAPSULE_BYTES`]. Agents keep it beside the answer and cannot open it. Empty if there is none.
    pub capsule: Vec<u8>,
}

/// Longest capsule: a request of about 16,000 tokens of English. Agents keep some hundred jobs' in their bounded memory.
pub const CAPSULE_BYTES: usize = 64 << 10;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a stop string was met.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// Tokens that a request used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Those of them that were not computed, because the worker's cache held them. Known once a worker has ended an answer
    /// itself: 0 for one that was cut off at a stop string or that a client left.
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

/// How probable a token was, by the model's own distribution. Natural logarithms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    pub logprob: f32,
    /// The most probable tokens, best first; the given one may be missing among them.
    pub top: Vec<(Token, f32)>,
}

/// What comes back for a job, in this order: any number of `Tokens`, then one of the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum JobEvent {
    /// The next tokens; `position` is the index of the first one in the answer (delivered tokens counted).
    Tokens {
        position: u32,
        tokens: Vec<Token>,
        /// One for each token if they were asked for, else none.
        logprobs: Vec<Logprobs>,
    },
    Done {
        finish: Finish,
        usage: Usage,
    },
    /// The job did not run or did not end. `retryable`: another worker, or a later time, may do it.
    Failed {
        reason: String,
        retryable: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_the_same_words_everywhere_and_the_most_urgent_comes_first() {
        for class in Class::ALL {
            assert_eq!(class.to_string().parse(), Ok(class));
            assert_eq!(serde_json::to_value(class).unwrap(), class.as_str());
        }
        assert!(Class::ALL.is_sorted() && Class::Urgent < Class::default() && Class::default() < Class::Batch);
        let unknown = "Urgent".parse::<Class>().unwrap_err().to_string();
        assert_eq!(unknown, "`Urgent` is not one of urgent, interactive, batch");
    }
}
