//! The agent: computes and reports.
//!
//! `daemon` builds and stops the parts of the agent process: `link` keeps a session with every controller, `reconcile`
//! compares what shall run with what does, `worker` supervises one process per replica, `gpu` knows whether the cards
//! that they compute on are sound, `remedies` what is ordered to mend them. Inside a worker process `serve` speaks with the agent, `engine` batches, `model` computes
//! on `ops`; `bench` measures them, `probe` asks a card for known answers. `remediate` runs as root, in a process of its own, and does three things to a GPU or the
//! machine. An agent holds nothing that must survive: a controller tells it everything again.
#![deny(unsafe_code)]

pub mod backoff;
pub mod bench;
pub mod checked;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod gpu;
pub mod inspect;
pub mod link;
pub mod model;
pub mod ops;
pub mod probe;
pub mod reconcile;
pub mod remediate;
pub mod remedies;
pub mod serve;
pub mod worker;
