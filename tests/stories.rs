//! The stories: the whole system from outside, one story a file, one binary.
//!
//! Stories with a cluster share the machine (`izar_tests::shared`), unless one measures or computes for long and takes it
//! alone (`izar_tests::exclusive`). Each names the warnings that it provokes; any other warning or error in a log fails it.
#![forbid(unsafe_code)]

#[path = "stories/alerts.rs"]
mod alerts;
#[path = "stories/answers.rs"]
mod answers;
#[path = "stories/asked_twice.rs"]
mod asked_twice;
#[path = "stories/backup.rs"]
mod backup;
#[path = "stories/backup_in_a_store.rs"]
mod backup_in_a_store;
#[path = "stories/controllers_drained.rs"]
mod controllers_drained;
#[path = "stories/controllers_killed.rs"]
mod controllers_killed;
#[path = "stories/controllers_replaced.rs"]
mod controllers_replaced;
#[path = "stories/conventions.rs"]
mod conventions;
#[path = "stories/doctor.rs"]
mod doctor;
#[path = "stories/events.rs"]
mod events;
#[path = "stories/golden_bytes.rs"]
mod golden_bytes;
#[path = "stories/golden_rows.rs"]
mod golden_rows;
#[path = "stories/gpu_health.rs"]
mod gpu_health;
#[path = "stories/gpus_mended.rs"]
mod gpus_mended;
#[path = "stories/idle.rs"]
mod idle;
#[path = "stories/openai_client.rs"]
mod openai_client;
#[path = "stories/overload.rs"]
mod overload;
#[path = "stories/planned_work.rs"]
mod planned_work;
#[path = "stories/quorum_lost.rs"]
mod quorum_lost;
#[path = "stories/real_model.rs"]
mod real_model;
#[path = "stories/refusals.rs"]
mod refusals;
#[path = "stories/sampling.rs"]
mod sampling;
#[path = "stories/secrets.rs"]
mod secrets;
#[path = "stories/shared_prefixes.rs"]
mod shared_prefixes;
#[path = "stories/slow_workers.rs"]
mod slow_workers;
#[path = "stories/strangers.rs"]
mod strangers;
#[path = "stories/streams_resumed.rs"]
mod streams_resumed;
#[path = "stories/under_systemd.rs"]
mod under_systemd;
#[path = "stories/workers_killed.rs"]
mod workers_killed;
