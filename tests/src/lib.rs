//! The harness of the stories: starts the whole system as real processes and looks at it from outside.
//!
//! `cluster` runs `izar dev`; `far` adds an agent to it whose link can be cut; `nodes` runs daemons without it, on certificates and configurations of its own; `gpus` gives
//! agents cards that a library plays; `client` speaks HTTPS as a user's program does; `cli` runs the operator's tool; `relay` stands in a path and records it;
//! `manager` stands in for systemd; `store` plays an S3-compatible store;
//! `logs` makes every warning that a story did not name a failure; `waiting` waits for a level, never for a time.
//! Nothing here knows the inside of a daemon.
#![forbid(unsafe_code)]

pub mod binaries;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod far;
pub mod gpus;
pub mod journal;
pub mod logs;
pub mod manager;
pub mod nodes;
pub mod process;
pub mod python;
pub mod relay;
pub mod store;
pub mod waiting;

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static MACHINE: RwLock<()> = RwLock::new(());

/// Takes the machine for one story alone: one that measures time or load, or computes for seconds.
pub fn exclusive() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a share of the machine, for a story that mostly waits; as many run at once as the test runner has threads.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(PoisonError::into_inner)
}
