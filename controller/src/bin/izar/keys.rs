//! `izar keys`: who may ask.

use clap::Subcommand;
use izar_controller::control::view::{CreatedKey, KeyView, Keys};
use izar_controller::state::KeyStatus;
use serde_json::json;

use crate::admin::escape;
use crate::{Common, show};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a key; it is shown this once
    Create {
        /// What it is for
        #[arg(long, default_value = "")]
        note: String,
        /// Requests that may run at once through one controller
        #[arg(long, default_value_t = 256)]
        max_concurrent: u32,
        /// The project it belongs to
        #[arg(long, default_value = "default")]
        project: String,
    },
    /// List keys, without their secrets
    List,
    /// Make a key invalid, for ever
    Revoke {
        /// As `izar keys list` shows it
        id: String,
    },
}

pub async fn run(command: Command, common: &Common) -> anyhow::Result<()> {
    let admin = common.admin();
    match command {
        Command::Create { note, max_concurrent, project } => {
            let body = json!({ "note": note, "max_concurrent": max_concurrent, "project": project });
            let created: CreatedKey = admin.post("/v1/keys", &body).await?;
            show::print(common.json, &created, |c| {
                format!("{}\n\nThis is key {}. It is not stored and cannot be shown again.\n", c.key, c.view.id)
            })
        }
        Command::List => show::print(common.json, &admin.get::<Keys>(&common.listing("/v1/keys")).await?, human),
        Command::Revoke { id } => {
            let view: KeyView = admin.post(&format!("/v1/keys/{}/revoke", escape(&id)), &json!({})).await?;
            show::print(common.json, &view, |v| format!("key {} is revoked\n", v.id))
        }
    }
}

fn human(keys: &Keys) -> String {
    let rows: Vec<Vec<String>> = keys
        .keys
        .iter()
        .map(|k| {
            let status = match k.status {
                KeyStatus::Active => "active",
                KeyStatus::Revoked => "revoked",
            };
            vec![
                k.id.to_string(),
                k.project.to_string(),
                status.to_owned(),
                k.max_concurrent.to_string(),
                show::time(k.created_ms),
                k.note.clone(),
            ]
        })
        .collect();
    show::table(&["KEY", "PROJECT", "STATUS", "AT ONCE", "CREATED (UTC)", "NOTE"], &rows)
}
