//! `izar status`: is it well, and if not, where to look.

use izar_controller::control::view::Status;

use crate::{Common, show};

pub async fn run(common: &Common) -> anyhow::Result<()> {
    let status: Status = common.admin().get("/v1/status").await?;
    show::print(common.json, &status, human)
}

fn human(status: &Status) -> String {
    let leader = match &status.leader {
        Some(leader) if *leader == status.node => "leads".to_owned(),
        Some(leader) => format!("follows {leader}"),
        None => "sees NO LEADER (no quorum: nothing can be changed or recorded)".to_owned(),
    };
    let members: Vec<&str> = status.members.iter().map(|m| m.node.as_str()).collect();
    let mut out = format!(
        "{} {leader}; life {}, term {}, applied {}; members {}; version {}\napi {}",
        status.node,
        status.incarnation,
        status.term,
        status.applied,
        members.join(" "),
        status.version,
        status.api.endpoint,
    );
    if let Some(plain) = &status.api.plaintext_endpoint {
        out += &format!(" and {plain}");
    }
    out += &format!("; {} requests run here", status.running);
    if status.draining {
        out += "; DRAINING: clients are told to move on (izar undrain takes it back)";
    }
    out += &match &status.last_backup {
        Some(backup) => format!("; last backup {}", show::time(backup.taken_ms)),
        None => "; no backup yet".to_owned(),
    };
    let refused: Vec<String> =
        status.refused.iter().filter(|(_, n)| **n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    if !refused.is_empty() {
        out += &format!("; refused since the start: {}", refused.join(", "));
    }
    out += "\n\n";
    let rows: Vec<Vec<String>> = status
        .deployments
        .iter()
        .map(|d| vec![d.name.to_string(), show::short(&d.revision), d.wanted.to_string(), d.ready.to_string()])
        .collect();
    out += &show::table(&["DEPLOYMENT", "REVISION", "WANTED", "READY"], &rows);
    out += "\n";
    let rows: Vec<Vec<String>> = status
        .agents
        .iter()
        .map(|a| {
            let state = if a.connected { "connected" } else { "away" };
            vec![a.agent.to_string(), state.to_owned(), a.workers.to_string(), a.ready.to_string()]
        })
        .collect();
    out += &show::table(&["AGENT", "STATE", "WORKERS", "READY"], &rows);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_quorum_is_said_first() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "node": "c1", "version": "0.1.0", "role": "alone", "leader": null, "term": 3, "applied": 9,
            "members": [{"node": "c1", "address": "127.0.0.1:1"}, {"node": "c2", "address": "127.0.0.1:2"}],
            "api": {"endpoint": "https://127.0.0.1:8443", "plaintext_endpoint": null},
            "agents": [], "deployments": [], "running": 0, "refused": {"peers": 2, "admin": 0},
        }))
        .unwrap();
        let text = human(&status);
        assert!(text.starts_with("c1 sees NO LEADER"), "{text}");
        assert!(text.contains("refused since the start: 2 peers\n"), "{text}");
    }
}
