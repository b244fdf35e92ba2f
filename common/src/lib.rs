//! Words that both daemons share: bytes that leave a process, identities, text. No policy lives here.
//!
//! `id` and `clock` name things and order them; `chat` and `health` are the nouns of a request and of a report;
//! `prefix` names what prompts begin with; `wire` turns messages into bytes, `quic` and `tls` carry them between nodes
//! that know each other's role;
//! `seal` and `blob` keep secrets and files; `gguf`, `safetensors` and `text` read model files far enough to check them
//! and to speak their language; `grammar` says which tokens may come next in an answer that must have a form; `config`
//! and `logging` are how a daemon is told things and how it tells; `service`, `vitals`, `events` and `disk` are its life
//! under systemd: what it says of itself, whether its loops turn, what an operator acts on, whether there is room.
#![forbid(unsafe_code)]

pub mod blob;
pub mod chat;
pub mod checked;
pub mod clock;
pub mod config;
pub mod disk;
pub mod events;
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
pub mod service;
mod source;
pub mod text;
pub mod tls;
pub mod vitals;
pub mod wire;
