//! `izar drain` and `izar undrain`: planned work on the controller that is asked.

use izar_controller::control::view::Drain;
use serde_json::json;

use crate::{Common, show};

pub async fn run(draining: bool, common: &Common) -> anyhow::Result<()> {
    let path = if draining { "/v1/drain" } else { "/v1/undrain" };
    let drain: Drain = common.admin().post(path, &json!({})).await?;
    show::print(common.json, &drain, human)
}

fn human(drain: &Drain) -> String {
    let leads = match &drain.leader {
        Some(leader) if *leader == drain.node => "it still leads: there is no other to take over".to_owned(),
        Some(leader) => format!("{leader} leads"),
        None => "NO controller leads".to_owned(),
    };
    let Drain { node, running, .. } = drain;
    match drain.draining {
        true => format!(
            "{node} drains: clients are told to move on, {leads}, {running} requests run here; stop it when none is left \
             (see izar status), or take it back with izar undrain\n"
        ),
        false => format!("{node} serves; {leads}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_says_who_leads_and_what_is_left() {
        let drain = |draining: bool, leader: Option<&str>| {
            let (node, leader) = ("c1".parse().unwrap(), leader.map(|leader| leader.parse().unwrap()));
            human(&Drain { node, draining, leader, running: 3 })
        };
        let text = drain(true, Some("c2"));
        assert!(text.contains("c2 leads") && text.contains("3 requests"), "{text}");
        assert!(drain(true, Some("c1")).contains("no other"));
        assert!(drain(false, None).contains("NO controller leads"));
    }
}
