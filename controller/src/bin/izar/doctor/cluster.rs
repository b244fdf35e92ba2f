//! What a running controller says of the cluster: who leads, who is away, whose clock is ahead, which versions run, how old
//! the newest backup is, which agents and deployments are not as they should be.

use std::io::ErrorKind;

use izar_common::clock::wall_ms;
use izar_common::health::gpu::State;
use izar_common::id::NodeId;
use izar_controller::config::Config;
use izar_controller::control::gpus::{Gpu, Gpus};
use izar_controller::control::view::{AgentDetail, Agents, Peer, Peers, Status};
use izar_controller::state::Standing;
use tokio::net::UnixStream;

use super::machine::{CERTIFICATE_MEND, DAYS_WARNING};
use super::unit::Unit;
use super::{Daemon, Finding};
use crate::{Common, show};

/// Hybrid time follows the fastest clock of the group. One that is so far ahead makes times in records wrong, and
/// certificates and deadlines uncertain.
const AHEAD_MS: u64 = 500;
/// Backups are taken every hour; after this long that has failed several times.
const BACKUP_OLD_MS: u64 = 4 * 60 * 60 * 1000;

/// Asks the controller on this machine; also returns what is known of its process.
pub async fn examine(common: &Common, config: &Config) -> (Vec<Finding>, Daemon) {
    let admin = common.admin_of(&config.admin.socket);
    let unit = Unit::behind(admin.socket());
    if unit.stopped {
        let mend = "systemctl start izar-controller.socket izar-controller.service, if nobody restores a backup here; \
                    journalctl -u izar-controller says why it ended";
        let found = "is stopped, and was not asked, for that would start it";
        return (vec![Finding::warning("controller", found, mend)], Daemon::Stopped);
    }
    let daemon = match UnixStream::connect(admin.socket()).await {
        Ok(stream) => process(&stream, unit.pid).map_or(Daemon::Unseen, Daemon::Runs),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let mend = "ask as root, or as a member of the socket's group (izar-admin): much else is not seen, too";
            let found = format!("was not asked: {}: {error}", admin.socket().display());
            let daemon = unit.pid.map_or(Daemon::Unseen, Daemon::Runs);
            return (vec![Finding::warning("controller", found, mend)], daemon);
        }
        Err(_) => Daemon::Stopped,
    };
    let status: Status = match admin.get("/v1/status").await {
        Ok(status) => status,
        Err(error) => {
            let mend = "start it (systemctl start izar-controller), or see why it ended: journalctl -u izar-controller";
            return (vec![Finding::warning("controller", format!("does not answer: {error:#}"), mend)], daemon);
        }
    };
    let mut findings = judge(&status, wall_ms());
    match admin.get::<Peers>("/v1/peers").await {
        Ok(peers) => findings.extend(peers.peers.iter().map(|peer| judge_peer(peer, &status.version))),
        Err(error) => {
            let mend = "restart the daemon after an upgrade, or use the tool of its version";
            findings.push(Finding::warning("peer", format!("{error:#}"), mend));
        }
    }
    // What this node knows; the quorum is judged above.
    let gpus = match admin.get::<Gpus>("/v1/gpus").await {
        Ok(gpus) => gpus,
        Err(error) => {
            findings.push(Finding::warning("gpu", format!("{error:#}"), "ask again: izar gpus"));
            Gpus { gpus: vec![], agents: vec![], remembered: vec![], remedies: vec![] }
        }
    };
    match admin.get::<Agents>("/v1/agents?stale=true").await {
        Ok(agents) => findings.extend(judge_agents(&agents.agents, &gpus, wall_ms())),
        Err(error) => findings.push(Finding::warning("agents", format!("{error:#}"), "ask again: izar agents list")),
    }
    (findings, daemon)
}

/// The process at the other end of the socket, as the kernel says; of one that systemd made it says systemd.
fn process(stream: &UnixStream, of_unit: Option<u32>) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid().and_then(|pid| pid.try_into().ok())?;
    if pid == 1 { of_unit } else { Some(pid) }
}

fn judge(status: &Status, now_ms: u64) -> Vec<Finding> {
    let own = env!("CARGO_PKG_VERSION");
    let mut findings = vec![if status.version == own {
        Finding::ok("controller", format!("{} runs, version {own}", status.node))
    } else {
        let found = format!("{} runs version {}, this tool is {own}", status.node, status.version);
        Finding::warning("controller", found, "restart the daemon after an upgrade, or use the tool of its version")
    }];
    findings.push(match &status.leader {
        Some(leader) => Finding::ok("quorum", format!("{leader} leads in term {}", status.term)),
        None => {
            let mend = "a majority of the members must run and reach each other; start those that are down, and see \
                        docs/backup.md if they are lost for good";
            Finding::failure("quorum", "no leader: nothing can be changed or recorded", mend)
        }
    });
    for away in &status.away {
        let found = format!("{} cannot be reached from here since {}", away.node, show::duration(away.for_ms));
        let mend = "see whether it runs, and whether UDP passes between the two";
        findings.push(Finding::warning("member", found, mend));
    }
    let ahead = status.latest_ms.saturating_sub(now_ms);
    findings.push(if ahead > AHEAD_MS {
        let found = format!("a controller's clock is {} ahead of this machine's", show::duration(ahead));
        Finding::warning("clock offset", found, "compare date on every controller, and let NTP keep them together")
    } else {
        Finding::ok("clock offset", "no controller's clock is ahead of this one's")
    });
    findings.push(backup(status, now_ms));
    if status.draining {
        findings.push(Finding::warning("drain", "this controller sends clients away", "izar undrain takes it back"));
    }
    for deployment in status.deployments.iter().filter(|d| d.ready < d.wanted) {
        let found = format!("{} has {} of {} replicas", deployment.name, deployment.ready, deployment.wanted);
        findings.push(Finding::warning("deployment", found, "see izar agents list for workers that failed, and why"));
    }
    findings
}

fn backup(status: &Status, now_ms: u64) -> Finding {
    const CHECK: &str = "backup";
    const MEND: &str = "izar backup --to PLACE takes one; see journalctl --namespace=izar -u izar-backup on every \
                        controller, and docs/backup.md for the timer";
    let Some(last) = &status.last_backup else {
        return Finding::warning(CHECK, "none was ever kept", MEND);
    };
    let age_ms = now_ms.saturating_sub(last.taken_ms);
    let found = format!("the newest is {} old: {}", show::duration(age_ms), last.kept_as);
    if age_ms > BACKUP_OLD_MS { Finding::warning(CHECK, found, MEND) } else { Finding::ok(CHECK, found) }
}

/// Compares another controller with the asked one, of version `own`.
fn judge_peer(peer: &Peer, own: &str) -> Finding {
    const CHECK: &str = "peer";
    let node = &peer.node;
    let (Some(version), Some(ahead_ms)) = (&peer.version, peer.ahead_ms) else {
        let mend = "see whether it runs, whether UDP passes between the two, and whether its version is as old as this \
                    question is new";
        return Finding::warning(CHECK, format!("{node} does not say which version it is and what time it has"), mend);
    };
    let apart = show::duration(ahead_ms.unsigned_abs());
    let clock = if ahead_ms < 0 { format!("{apart} behind") } else { format!("{apart} ahead") };
    if ahead_ms.unsigned_abs() > AHEAD_MS {
        let mend = "compare date on every controller, and let NTP keep them together";
        return Finding::warning(CHECK, format!("{node}: its clock is {clock} of this controller's"), mend);
    }
    if version != own {
        let mend = "an upgrade is under way, or broke off: playbooks/upgrade.yml goes on with it; or restart the one that \
                    is old (docs/bare-metal.md)";
        return Finding::warning(CHECK, format!("{node} runs version {version}, this controller {own}"), mend);
    }
    Finding::ok(CHECK, format!("{node} runs version {version}, its clock is {clock}"))
}

/// GPUs that get no work, or less; the worst is the one that only an operator's word brings back.
fn judge_gpus(agent: &NodeId, gpus: &Gpus) -> Vec<Finding> {
    const MEND: &str = "izar gpus says what would mend it (docs/gpus.md)";
    let mut findings = Vec::new();
    for Gpu { view, .. } in gpus.gpus.iter().filter(|gpu| gpu.agent == *agent) {
        let found = format!("GPU {} of {agent} is {}: {}", view.index, view.state, view.reason);
        match view.state {
            State::Quarantined => findings.push(Finding::failure("gpu", found, MEND)),
            State::Unknown | State::Healthy | State::Probation => {}
            _ => findings.push(Finding::warning("gpu", found, MEND)),
        }
    }
    findings
}

/// Whole days until a time in Unix seconds; below zero when it has passed.
fn days_left(until: i64, now_ms: u64) -> i64 {
    until.saturating_sub((now_ms / 1000) as i64).div_euclid(86_400)
}

fn judge_agents(agents: &[AgentDetail], gpus: &Gpus, now_ms: u64) -> Vec<Finding> {
    if agents.is_empty() {
        return vec![Finding::warning("agents", "none was ever here", "start one: izar-agent --config agent.toml")];
    }
    let judge = |agent: &AgentDetail| {
        let (name, own) = (&agent.agent, env!("CARGO_PKG_VERSION"));
        match &agent.version {
            _ if !agent.connected => {
                let found = format!("{name} is away since {}", show::time(agent.last_report_ms));
                Finding::warning("agent", found, "see its journal, and whether it reaches this controller over UDP")
            }
            Some(version) if version != own => {
                Finding::warning("agent", format!("{name} runs version {version}, not {own}"), "upgrade it")
            }
            _ => match gpus.agents.iter().find(|server| server.agent == *name && !server.fault.is_empty()) {
                Some(server) => {
                    let mend =
                        "izar gpus says what would mend it (docs/gpus.md); izar doctor on that server looks closer";
                    Finding::failure("agent", format!("{name} gets no work: {}", server.fault), mend)
                }
                None => match agent.machine.map(|machine| days_left(machine.certificate_expires, now_ms)) {
                    Some(days) if days < DAYS_WARNING => {
                        let found = format!("{name} has a certificate that is good for {days} days");
                        Finding::warning("agent", found, CERTIFICATE_MEND)
                    }
                    _ => match agent.standing {
                        Some(standing) => {
                            let word = match standing {
                                Standing::Cordoned => "cordoned",
                                Standing::Draining { .. } => "drained",
                            };
                            let found = format!("{name} is {word}, so it gets no new work");
                            let mend = format!("izar agents uncordon {name}, if nobody works on it");
                            Finding::warning("agent", found, mend)
                        }
                        None => Finding::ok("agent", format!("{name} is connected")),
                    },
                },
            },
        }
    };
    agents.iter().flat_map(|agent| [vec![judge(agent)], judge_gpus(&agent.agent, gpus)].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use izar_common::health::Machine;
    use izar_controller::control::view;
    use izar_controller::fleet::AgentView;

    fn status(leader: Option<&str>) -> Status {
        serde_json::from_value(serde_json::json!({
            "node": "c1", "version": env!("CARGO_PKG_VERSION"), "role": "follower", "leader": leader, "term": 3,
            "applied": 9, "members": [], "api": {"endpoint": "https://127.0.0.1:8443", "plaintext_endpoint": null},
            "agents": [], "deployments": [], "running": 0, "refused": {}, "latest_ms": 10_000,
            "last_backup": {"node": "c2", "taken_ms": 9_000, "applied": 5, "kept_as": "/srv/x.izarbak"},
        }))
        .unwrap()
    }

    fn bad(findings: &[Finding]) -> Vec<(&str, Verdict)> {
        let bad = findings.iter().filter(|f| f.verdict != Verdict::Ok);
        bad.map(|f| (f.check.as_str(), f.verdict)).collect()
    }

    #[test]
    fn a_cluster_that_is_well_has_nothing_to_say() {
        assert_eq!(bad(&judge(&status(Some("c2")), 10_000)), []);
    }

    #[test]
    fn a_lost_quorum_is_a_failure_and_a_fast_clock_or_an_old_version_a_warning() {
        assert_eq!(bad(&judge(&status(None), 10_000)), [("quorum", Verdict::Failure)]);
        assert_eq!(bad(&judge(&status(Some("c2")), 9_000)), [("clock offset", Verdict::Warning)]);
        let old = Status { version: "0.0.1".into(), draining: true, ..status(Some("c2")) };
        assert_eq!(bad(&judge(&old, 10_000)), [("controller", Verdict::Warning), ("drain", Verdict::Warning)]);
    }

    #[test]
    fn an_old_backup_is_a_warning_and_none_is_one_too() {
        let late = 10_000 + BACKUP_OLD_MS;
        let well = Status { latest_ms: late, ..status(Some("c2")) };
        assert_eq!(bad(&judge(&well, late)), [("backup", Verdict::Warning)]);
        assert_eq!(bad(&judge(&Status { last_backup: None, ..well }, late)), [("backup", Verdict::Warning)]);
    }

    #[test]
    fn another_clock_and_another_version_are_warnings() {
        let judged = |version: Option<&str>, ahead_ms: Option<i64>| {
            let peer = Peer { node: "c2".parse().unwrap(), version: version.map(str::to_owned), ahead_ms };
            let finding = judge_peer(&peer, "0.2.0");
            (finding.verdict, finding.found)
        };
        assert_eq!(judged(Some("0.2.0"), Some(-3)).0, Verdict::Ok);
        let (verdict, found) = judged(Some("0.2.0"), Some(-3_000));
        assert!(verdict == Verdict::Warning && found.contains("3 s behind"), "{found}");
        let (verdict, found) = judged(Some("0.1.0"), Some(3));
        assert!(verdict == Verdict::Warning && found.contains("c2 runs version 0.1.0"), "{found}");
        assert_eq!(judged(None, None).0, Verdict::Warning);
    }

    #[test]
    fn no_agent_at_all_is_said() {
        let none = Gpus { gpus: vec![], agents: vec![], remembered: vec![], remedies: vec![] };
        assert_eq!(bad(&judge_agents(&[], &none, 0)), [("agents", Verdict::Warning)]);
    }

    #[test]
    fn an_agent_that_an_operator_has_put_aside_is_not_forgotten() {
        let none = Gpus { gpus: vec![], agents: vec![], remembered: vec![], remedies: vec![] };
        let view = AgentView { connected: true, ..AgentView::default() };
        let mut agent = view::agent(&"a1".parse().unwrap(), &view, &Default::default());
        agent.standing = Some(Standing::Draining { within_ms: 1 });
        let finding = judge_agents(&[agent], &none, 0).remove(0);
        assert_eq!(
            (finding.verdict, finding.mend.unwrap().contains("izar agents uncordon a1")),
            (Verdict::Warning, true)
        );
    }

    #[test]
    fn an_agents_certificate_is_told_of_a_month_before() {
        let none = Gpus { gpus: vec![], agents: vec![], remembered: vec![], remedies: vec![] };
        let judged = |days: i64| {
            let machine = Machine { certificate_expires: days * 86_400 + 60, disk_free_bytes: 0, disk_bytes: 0 };
            let view = AgentView { connected: true, machine: Some(machine), ..AgentView::default() };
            let agent = view::agent(&"a1".parse().unwrap(), &view, &Default::default());
            judge_agents(&[agent], &none, 0).remove(0)
        };
        assert_eq!(judged(30).verdict, Verdict::Ok);
        assert_eq!(judged(29).found, "a1 has a certificate that is good for 29 days");
        assert_eq!(judged(-1).verdict, Verdict::Warning);
    }
}
