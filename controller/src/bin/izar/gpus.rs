//! `izar gpus`: how every GPU is and why, and the word that lets one work again.

use clap::{Args, Subcommand};
use izar_common::clock::wall_ms;
use izar_common::health::gpu::{Mode, Remedy};
use izar_controller::control::gpus::{Gpus, Released};
use serde_json::json;

use crate::{Common, show};

#[derive(Debug, Args)]
pub struct Command {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List every GPU, how it is and why (what `izar gpus` alone does)
    List,
    /// Let a GPU that is cordoned or quarantined work again, a quarter at first
    Release {
        agent: String,
        /// Its number on that agent, or its identity
        gpu: String,
        /// What was done about it; it is recorded
        #[arg(long)]
        reason: String,
    },
}

pub async fn run(command: Command, common: &Common) -> anyhow::Result<()> {
    match command.what {
        None | Some(What::List) => {
            let gpus: Gpus = common.admin().get("/v1/gpus").await?;
            show::print(common.json, &gpus, human)
        }
        Some(What::Release { agent, gpu, reason }) => {
            let order = json!({ "agent": agent, "gpu": gpu, "reason": reason });
            let released: Released = common.admin().post("/v1/gpus/release", &order).await?;
            show::print(common.json, &released, |released| {
                let was = if released.quarantined { "quarantined" } else { "cordoned" };
                format!(
                    "GPU {} of agent {} was {was} ({}) and is on probation\n",
                    released.gpu, released.agent, released.was
                )
            })
        }
    }
}

fn human(gpus: &Gpus) -> String {
    let now = wall_ms();
    let number = |value: Option<u32>, unit: &str| value.map_or("-".to_owned(), |value| format!("{value}{unit}"));
    let rows: Vec<Vec<String>> = gpus
        .gpus
        .iter()
        .map(|gpu| {
            let view = &gpu.view;
            let memory = match (view.memory_used_bytes, view.memory_bytes) {
                (Some(used), Some(all)) => format!("{} of {}", show::bytes(used), show::bytes(all)),
                _ => "-".to_owned(),
            };
            let remedy = if view.remedy == Remedy::None { String::new() } else { format!(" -> {}", view.remedy) };
            vec![
                gpu.agent.to_string(),
                view.index.to_string(),
                view.name.clone(),
                view.state.to_string(),
                show::duration(now.saturating_sub(view.since_ms)),
                number(view.temperature_c, " °C"),
                number(view.utilization_percent, " %"),
                memory,
                format!("{}{remedy}", view.reason),
            ]
        })
        .collect();
    let headers = ["AGENT", "GPU", "NAME", "STATE", "SINCE", "HEAT", "BUSY", "MEMORY", "WHY"];
    let mut text = show::table(&headers, &rows);
    for server in &gpus.agents {
        let away = if server.connected { "" } else { " (away)" };
        if !server.fault.is_empty() {
            let follows = if server.mode == Mode::Observe { "is only observed" } else { "gets no work" };
            text += &format!("agent {}{away} {follows}: {}\n", server.agent, server.fault);
        }
    }
    for remedy in &gpus.remedies {
        let (agent, id, action, count) = (&remedy.agent, remedy.id, remedy.action, remedy.gpus.len());
        let ago = show::duration(now.saturating_sub(remedy.ordered_ms));
        text += &format!("agent {agent} was ordered {ago} ago to mend {count} of its GPUs: {action} (order {id})\n");
    }
    let here = |record: &&izar_controller::state::GpuRecord| !gpus.gpus.iter().any(|gpu| gpu.view.id == record.gpu);
    for record in gpus.remembered.iter().filter(here) {
        if let Some(hold) = &record.hold {
            let what = if hold.quarantined { "quarantined" } else { "cordoned" };
            text += &format!("GPU {} of agent {} is away and {what}: {}\n", record.gpu, record.agent, hold.reason);
        }
    }
    text
}
