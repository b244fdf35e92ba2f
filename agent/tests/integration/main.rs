//! The agent's parts together, one subject a file, one binary: engine and models against references, the worker, the link
//! and the daemon as real processes.
#![forbid(unsafe_code)]

mod contract;
mod daemon;
mod gguf;
mod golden;
mod link;
mod remediate;
mod worker;
