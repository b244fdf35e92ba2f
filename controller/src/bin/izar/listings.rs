//! `izar agents list`, `izar requests list`, `izar turns list`: what computes, what runs, what was recorded.

use std::time::Duration;

use anyhow::Context;
use clap::Subcommand;
use izar_common::clock::wall_ms;
use izar_controller::control::view;
use izar_controller::gateway::trace::What;
use izar_controller::state::Standing;
use serde_json::{Value, json};

use crate::admin::escape;
use crate::{Common, show};

#[derive(Debug, Subcommand)]
pub enum Agents {
    /// List agents and their workers
    List,
    /// Give an agent no new workers, and jobs only if no other can take them
    Cordon { agent: String },
    /// Let it work like any other again
    Uncordon { agent: String },
    /// Forget an agent that was taken away for good; each controller keeps a list of its own
    Forget { agent: String },
    /// Cordon an agent and move its workers and what they compute elsewhere, before it is taken down
    Drain {
        agent: String,
        /// Seconds that running answers have to end by themselves, once others stand in; then they move
        #[arg(long, default_value_t = 30)]
        within: u64,
        /// Say it and return, without waiting until the agent is empty
        #[arg(long)]
        no_wait: bool,
    },
}

/// How often a drain is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

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
    let (agent, standing, words) = match command {
        Agents::List => {
            let agents: view::Agents = common.admin().get("/v1/agents").await?;
            return show::print(common.json, &agents, human_agents);
        }
        Agents::Forget { agent } => {
            let said: Value = common.admin().delete(&format!("/v1/agents/{}", escape(&agent))).await?;
            return show::print(common.json, &said, |_| format!("agent {agent} is forgotten here\n"));
        }
        Agents::Cordon { agent } => (agent, Some(Standing::Cordoned), "is cordoned"),
        Agents::Uncordon { agent } => (agent, None, "works like any other"),
        Agents::Drain { agent, within, no_wait } => {
            let standing = Standing::Draining { within_ms: within.saturating_mul(1_000) };
            if !no_wait {
                return drain(&agent, standing, common).await;
            }
            (agent, Some(standing), "is being drained")
        }
    };
    let detail = set_standing(&agent, standing, common).await?;
    show::print(common.json, &detail, |_| format!("agent {agent} {words}\n"))
}

async fn set_standing(agent: &str, standing: Option<Standing>, common: &Common) -> anyhow::Result<view::AgentDetail> {
    let path = format!("/v1/agents/{}/standing", escape(agent));
    common.admin().put(&path, &json!({ "standing": standing })).await
}

/// Drains an agent and tells how it goes until nothing is left on it.
async fn drain(agent: &str, standing: Standing, common: &Common) -> anyhow::Result<()> {
    let mut detail = set_standing(agent, Some(standing), common).await?;
    let mut told = String::new();
    while detail.planned > 0 {
        let deployments: view::Deployments = common.admin().get(&common.listing("/v1/deployments")).await?;
        let mut waits: Vec<String> = Vec::new();
        for deployment in &deployments.deployments {
            let here = deployment.workers.iter().filter(|worker| worker.agent.as_str() == agent);
            waits.extend(here.map(|worker| match (worker.retiring, deployment.unmet.is_empty()) {
                (true, _) => format!("{} ends its answers", worker.worker),
                (false, true) => format!("{} waits for its replacement", worker.worker),
                (false, false) => format!("{} cannot be replaced ({})", worker.worker, deployment.unmet),
            }));
        }
        let line = waits.join("; ");
        if line != told && !line.is_empty() && !common.json {
            eprintln!("agent {agent}: {line}");
        }
        told = line;
        tokio::time::sleep(LOOK_EVERY).await;
        let agents: view::Agents = common.admin().get("/v1/agents").await?;
        let found = agents.agents.into_iter().find(|detail| detail.agent.as_str() == agent);
        detail = found.with_context(|| format!("agent {agent} is not known any longer"))?;
        anyhow::ensure!(detail.standing == Some(standing), "the drain of agent {agent} was called off");
    }
    show::print(common.json, &detail, |_| {
        format!("agent {agent} is empty; stop it, or give it work again with: izar agents uncordon {agent}\n")
    })
}

fn human_agents(agents: &view::Agents) -> String {
    let now = wall_ms();
    let mut rows = Vec::new();
    for a in &agents.agents {
        let heard = format!("heard {} ago", show::duration(now.saturating_sub(a.last_report_ms)));
        rows.push(vec![
            a.agent.to_string(),
            match (a.connected, a.standing) {
                (false, _) => "away",
                (true, None) if a.remedy.is_some() => "mended",
                (true, None) => "connected",
                (true, Some(Standing::Cordoned)) => "cordoned",
                (true, Some(Standing::Draining { .. })) => "draining",
            }
            .to_owned(),
            show::or_dash(a.pid),
            a.jobs.to_string(),
            match (a.cores, a.memory_bytes) {
                (Some(cores), Some(memory)) => {
                    let gpus = a.gpus.filter(|gpus| *gpus > 0).map_or(String::new(), |gpus| format!("{gpus} GPUs, "));
                    let labels: String = a.labels.iter().map(|(key, value)| format!("{key}={value}, ")).collect();
                    format!("{cores} cores, {}, {gpus}{labels}{heard}", show::bytes(memory))
                }
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
                    show::or_dash(
                        r.worker.as_ref().zip(r.agent.as_ref()).map(|(worker, agent)| format!("{worker} on {agent}")),
                    ),
                    format!("{:?}", r.state).to_lowercase(),
                    r.prompt_tokens.to_string(),
                    r.tokens.to_string(),
                    r.moves.to_string(),
                    show::duration(now.saturating_sub(r.started_ms)),
                ]
            })
            .collect();
        let headers = ["REQUEST", "DEPLOYMENT", "KEY", "WORKER", "STATE", "IN", "OUT", "MOVES", "RUNS FOR"];
        show::table(&headers, &rows)
    })
}

/// `izar explain`: one request's story, from every controller that knows a part of it.
pub async fn explain(request: &str, common: &Common) -> anyhow::Result<()> {
    let explained: view::Explained = common.admin().get(&format!("/v1/requests/{}", escape(request))).await?;
    show::print(common.json, &explained, human_story)
}

fn human_story(explained: &view::Explained) -> String {
    let mut lines = vec![format!("request {}", explained.turn)];
    match &explained.record {
        None => lines.push("  no record: it was refused before it became one, or is long forgotten".into()),
        Some(turn) => {
            let reason = turn.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
            let exact = if turn.inexact { ", partly by other numerics" } else { "" };
            lines.push(format!(
                "  record: {} by key {} of project {}, {} tokens in, {} out, {}{reason}{exact}",
                turn.deployment, turn.key, turn.project, turn.prompt_tokens, turn.completion_tokens, turn.outcome
            ));
        }
    }
    for story in &explained.stories {
        let trace = &story.trace;
        let state = if trace.running { ", still runs" } else { "" };
        lines.push(format!("  on {} since {} (UTC){state}", story.node, show::time(trace.started_ms)));
        lines.extend(trace.events.iter().map(|event| format!("    {:>8} ms  {}", event.at_ms, told(&event.what))));
        if trace.more > 0 {
            lines.push(format!("    and {} more events", trace.more));
        }
    }
    if !explained.unreachable.is_empty() {
        let nodes: Vec<&str> = explained.unreachable.iter().map(|node| node.as_str()).collect();
        lines.push(format!("  not asked, for they cannot be reached: {}", nodes.join(", ")));
    }
    lines.join("\n") + "\n"
}

fn told(what: &What) -> String {
    match what {
        What::Resumed => "a client came back for the rest of its stream".into(),
        What::Placed { choice, agent, worker, why } => {
            format!("answer {choice} placed on {worker} of agent {agent}: {why}")
        }
        What::Attached { choice, agent, worker } => {
            format!("answer {choice} read from what agent {agent} keeps of {worker}")
        }
        What::Waited { class, ahead, waited_ms } => {
            format!("waited {waited_ms} ms for a place, class {class}, {ahead} ahead of it")
        }
        What::FirstToken => "first token".into(),
        What::Lost { choice, worker, reason } => {
            format!("answer {choice} lost {worker} and goes on elsewhere: {reason}")
        }
        What::Refused { code, reason } => format!("refused ({code}): {reason}"),
        What::Ended { outcome, tokens } => format!("{outcome} after {tokens} tokens"),
    }
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
