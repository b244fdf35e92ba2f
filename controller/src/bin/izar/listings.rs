//! `izar agents list`, `izar requests list`, `izar turns list`: what computes, what runs, what was recorded.

use clap::Subcommand;
use izar_common::clock::wall_ms;
use izar_controller::control::view;

use crate::{Common, show};

#[derive(Debug, Subcommand)]
pub enum Agents {
    /// List agents and their workers
    List,
}

#[derive(Debug, Subcommand)]
pub enum Requests {
    /// List what runs on this controller now
    List,
}

#[derive(Debug, Subcommand)]
pub enum Turns {
    /// List turns, the newest first
    List {
        /// How many at most
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Only those that are still open
        #[arg(long)]
        open: bool,
    },
}

pub async fn agents(command: Agents, common: &Common) -> anyhow::Result<()> {
    let Agents::List = command;
    let agents: view::Agents = common.admin().get("/v1/agents").await?;
    show::print(common.json, &agents, human_agents)
}

fn human_agents(agents: &view::Agents) -> String {
    let now = wall_ms();
    let mut rows = Vec::new();
    for a in &agents.agents {
        let heard = format!("heard {} ago", show::duration(now.saturating_sub(a.last_report_ms)));
        rows.push(vec![
            a.agent.to_string(),
            if a.connected { "connected" } else { "away" }.to_owned(),
            show::or_dash(a.pid),
            a.jobs.to_string(),
            match (a.cores, a.memory_bytes) {
                (Some(cores), Some(memory)) => format!("{cores} cores, {}, {heard}", show::bytes(memory)),
                _ => heard,
            },
        ]);
        for w in &a.workers {
            let state = view::ReplicaState::from(w.state).to_string();
            let restarts = if w.restarts > 0 { format!(" ({} restarts)", w.restarts) } else { String::new() };
            let jobs = format!("{} + {} waiting", w.load.running, w.load.waiting);
            rows.push(vec![format!("  {}", w.worker), state + &restarts, show::or_dash(w.pid), jobs, w.detail.clone()]);
        }
    }
    show::table(&["AGENT / WORKER", "STATE", "PID", "JOBS", "DETAIL"], &rows)
}

pub async fn requests(command: Requests, common: &Common) -> anyhow::Result<()> {
    let Requests::List = command;
    let requests: view::Requests = common.admin().get("/v1/requests").await?;
    show::print(common.json, &requests, |requests| {
        let now = wall_ms();
        let rows: Vec<Vec<String>> = requests
            .requests
            .iter()
            .map(|r| {
                vec![
                    r.turn.to_string(),
                    r.deployment.to_string(),
                    r.key.to_string(),
                    if r.stream { "yes" } else { "no" }.to_owned(),
                    show::duration(now.saturating_sub(r.started_ms)),
                ]
            })
            .collect();
        show::table(&["TURN", "DEPLOYMENT", "KEY", "STREAM", "RUNS FOR"], &rows)
    })
}

pub async fn turns(command: Turns, common: &Common) -> anyhow::Result<()> {
    let Turns::List { limit, open } = command;
    let path = common.listing(&format!("/v1/turns?limit={limit}&open={open}"));
    let turns: view::Turns = common.admin().get(&path).await?;
    show::print(common.json, &turns, |turns| {
        let rows: Vec<Vec<String>> = turns
            .turns
            .iter()
            .map(|t| {
                vec![
                    t.turn.to_string(),
                    show::time(t.opened_ms),
                    t.deployment.to_string(),
                    t.key.to_string(),
                    t.node.to_string(),
                    t.outcome.clone(),
                    t.prompt_tokens.to_string(),
                    t.completion_tokens.to_string(),
                    show::or_dash(t.closed_ms.map(|at| at.saturating_sub(t.opened_ms))),
                ]
            })
            .collect();
        let headers = ["TURN", "OPENED (UTC)", "DEPLOYMENT", "KEY", "NODE", "OUTCOME", "IN", "OUT", "MS"];
        show::table(&headers, &rows)
    })
}
