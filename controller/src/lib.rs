//! The controller: decides and remembers.
//!
//! `gateway` answers users, `control` answers operators, `agents` talks to agents; `scheduler` and `planner` decide as
//! pure functions over `fleet` and `prefixes` (what agents last said) and `state` (what is replicated by `raft`);
//! `daemon` builds all of it, starts it, and stops it in reverse.
#![forbid(unsafe_code)]

pub mod agents;
pub mod backup;
pub mod catalog;
pub mod config;
pub mod control;
pub mod daemon;
pub mod fleet;
pub mod gateway;
pub mod gpus;
pub mod import;
pub mod metrics;
pub mod paces;
pub mod planner;
pub mod prefixes;
pub mod queue;
pub mod raft;
pub mod rejoin;
pub mod room;
pub mod scheduler;
pub mod state;
