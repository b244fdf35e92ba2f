//! The nouns of a request: messages, sampling, the job that a worker is given and the events that come back.

use serde::{Deserialize, Serialize};

use crate::id::{DeploymentId, Hash, TurnId};

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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// Share of probability kept, (0, 1].
    pub top_p: f32,
    /// Number of candidates kept; 0 keeps all.
    pub top_k: u32,
    pub seed: u64,
    /// Tokens to give at most, those already delivered included.
    pub max_tokens: u32,
    /// Go on past the model's end-of-text tokens (benchmarks).
    pub ignore_eos: bool,
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
}

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
    pub completion_tokens: u32,
}

/// What comes back for a job, in this order: any number of `Tokens`, then one of the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum JobEvent {
    /// The next tokens; `position` is the index of the first one in the answer (delivered tokens counted).
    Tokens {
        position: u32,
        tokens: Vec<Token>,
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
