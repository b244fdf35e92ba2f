//! Keeps the ready file true: which processes run now, children as this program knows them, workers as agents report
//! them.

use std::path::Path;
use std::time::Duration;

use izar_controller::control::view;

use super::children::{Children, State};
use super::layout::{Controller, Layout};
use crate::admin::Admin;
use crate::ready::{Process, Ready, Role};

/// Between two looks at the workers; one small request a look, so that an idle cluster stays idle.
const INTERVAL: Duration = Duration::from_millis(500);

/// The longest wait for one controller's listing, before the next one is asked.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// Writes the file, calls `written` once, then follows every change. Ends only by an error.
pub async fn follow(
    layout: &Layout,
    children: &Children,
    mut ready: Ready,
    file: &Path,
    written: impl FnOnce(),
) -> anyhow::Result<()> {
    let mut states = children.states();
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut written = Some(written);
    let mut agents = view::Agents { agents: Vec::new() };
    loop {
        // A controller that cannot be asked now leaves the last listing; dead workers drop out of it all the same.
        if let Some(listed) = ask(layout).await {
            agents = listed;
        }
        let now = states.borrow_and_update().clone();
        let processes =
            processes(&layout.controllers, &now, &agents, |pid| Path::new("/proc").join(pid.to_string()).exists());
        if written.is_some() || processes != ready.processes {
            ready.processes = processes;
            ready.write(file)?;
        }
        if let Some(written) = written.take() {
            written();
        }
        tokio::select! {
            _ = interval.tick() => {}
            _ = states.changed() => {}
        }
    }
}

/// What the first controller that answers says of the agents.
async fn ask(layout: &Layout) -> Option<view::Agents> {
    for controller in &layout.controllers {
        let admin = Admin::new(controller.socket.clone());
        if let Ok(Ok(agents)) = tokio::time::timeout(ASK_LIMIT, admin.get("/v1/agents")).await {
            return Some(agents);
        }
    }
    None
}

/// Puts together what runs. A worker counts while its agent's process is the one that reported it, and it lives.
fn processes(
    controllers: &[Controller],
    states: &[State],
    agents: &view::Agents,
    lives: impl Fn(u32) -> bool,
) -> Vec<Process> {
    let mut out = Vec::new();
    for state in states {
        let Some(pid) = state.pid else { continue };
        let controller = controllers.iter().find(|c| c.id == state.id);
        out.push(Process {
            role: state.role,
            id: state.id.clone(),
            pid,
            agent: None,
            admin_socket: controller.map(|c| c.socket.clone()),
            endpoint: controller.map(|c| c.endpoint()),
            plaintext_endpoint: controller.and_then(|c| c.plaintext_endpoint()),
        });
        let report = agents.agents.iter().find(|a| a.agent.as_str() == state.id && a.pid == Some(pid));
        for worker in report.iter().flat_map(|a| &a.workers) {
            if let Some(pid) = worker.pid.filter(|&pid| lives(pid)) {
                out.push(Process {
                    role: Role::Worker,
                    id: worker.worker.to_string(),
                    pid,
                    agent: Some(state.id.clone()),
                    admin_socket: None,
                    endpoint: None,
                    plaintext_endpoint: None,
                });
            }
        }
    }
    out.sort_by(|a, b| (a.role, &a.id).cmp(&(b.role, &b.id)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn state(id: &str, role: Role, pid: Option<u32>) -> State {
        State { id: id.into(), role, pid, deaths: 0 }
    }

    #[test]
    fn the_file_lists_what_runs_and_nothing_that_does_not() {
        let controller =
            Controller { id: "c1".into(), quic: 1, api: 2, plaintext: Some(3), socket: "/d/c1/admin.sock".into() };
        let worker = |name: &str, pid: u32| {
            json!({
                "worker": name, "deployment": "echo", "revision": "0".repeat(64), "state": "ready", "pid": pid,
                "load": { "running": 0, "waiting": 0, "blocks_used": 0, "blocks": 0 }, "max_batch": 32, "restarts": 0, "detail": "",
                "share": 100,
            })
        };
        let agent = |name: &str, pid: u32, workers: serde_json::Value| {
            json!({
                "agent": name, "connected": true, "last_report_ms": 1, "pid": pid, "version": null, "cores": null,
                "memory_bytes": null, "gpus": null, "labels": {}, "standing": null, "planned": 2, "generation": null, "jobs": 0, "workers": workers,
            })
        };
        let agents = json!({ "agents": [
            agent("a1", 20, json!([worker("echo.0", 30), worker("echo.1", 31)])),
            // What an agent said that has since been started again.
            agent("a2", 21, json!([worker("echo.2", 32)])),
        ]});
        let agents: view::Agents = serde_json::from_value(agents).unwrap();
        let states = [
            state("a1", Role::Agent, Some(20)),
            state("a2", Role::Agent, Some(22)),
            state("c1", Role::Controller, Some(10)),
            state("c2", Role::Controller, None),
        ];
        let seen = processes(&[controller], &states, &agents, |pid| pid != 31);
        let ids: Vec<(&str, u32)> = seen.iter().map(|p| (p.id.as_str(), p.pid)).collect();
        assert_eq!(ids, [("c1", 10), ("a1", 20), ("a2", 22), ("echo.0", 30)]);
        assert_eq!(seen[0].endpoint.as_deref(), Some("https://127.0.0.1:2"));
        assert_eq!(seen[3].agent.as_deref(), Some("a1"));
    }
}
