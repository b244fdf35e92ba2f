//! Words that both daemons share: bytes that leave a process, identities, text. No policy lives here.
//!
//! `id` and `clock` name things and order them; `chat` and `health` are the nouns of a request and of a report;
//! `prefix` names what prompts begin with; `wire` turns messages into bytes, `quic` and `tls` carry them between nodes
//! that know each other's role;
//! `seal` and `blob` keep secrets and files; `gguf`, `safetensors` and `text` read model files far enough to check them
//! and to speak their language; `grammar` says which tokens may come next in an answer that must have a form; `config`
//! and `logging` are how a daemon is told things and how it tells.
#![forbid(unsafe_code)]

pub mod blob;
pub mod chat;
pub mod clock;
pub mod config;
pub mod gguf;
pub mod grammar;
pub mod health;
pub mod id;
pub mod logging;
pub mod manifest;
pub mod prefix;
pub mod quic;
pub mod safetensors;
pub mod seal;
mod source;
pub mod text;
pub mod tls;
pub mod wire;
