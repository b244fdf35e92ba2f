//! `izar tenants` and `izar projects`: whom keys belong to, and what goes for their requests.

use anyhow::ensure;
use clap::Subcommand;
use izar_common::chat::Class;
use izar_controller::control::view;
use izar_controller::state::{Project, Tenant};
use serde_json::json;

use crate::admin::escape;
use crate::{Common, show};

#[derive(Debug, Subcommand)]
pub enum Tenants {
    /// Make a tenant, or change its share
    Set {
        name: String,
        /// Its share of what is scarce, relative to other tenants': 1 to 1000 [default: as it is, else 1]
        #[arg(long)]
        weight: Option<u32>,
    },
    /// List tenants
    List,
}

#[derive(Debug, Subcommand)]
pub enum Projects {
    /// Make a project, or change it; what is not said stays as it is
    Set {
        name: String,
        /// The tenant that a new project belongs to [default: default]
        #[arg(long)]
        tenant: Option<String>,
        /// The most urgent class that its requests may have: urgent, interactive or batch [default: interactive]
        #[arg(long)]
        class: Option<String>,
        /// Milliseconds after which an answer is of no use; 0: never [default: 0]
        #[arg(long)]
        deadline_ms: Option<u32>,
        /// Answer while the cluster cannot record: records follow when it can [default: false]
        #[arg(long)]
        available: Option<bool>,
    },
    /// List projects
    List,
}

pub async fn tenants(command: Tenants, common: &Common) -> anyhow::Result<()> {
    match command {
        Tenants::Set { name, weight } => {
            let path = format!("/v1/tenants/{}", escape(&name));
            let tenant: Tenant = common.admin().put(&path, &json!({ "weight": weight })).await?;
            show::print(common.json, &tenant, |t| format!("tenant {} has weight {}\n", t.id, t.weight))
        }
        Tenants::List => {
            let tenants: view::Tenants = common.admin().get(&common.listing("/v1/tenants")).await?;
            show::print(common.json, &tenants, |tenants| {
                let row = |t: &Tenant| vec![t.id.to_string(), t.weight.to_string()];
                show::table(&["TENANT", "WEIGHT"], &tenants.tenants.iter().map(row).collect::<Vec<_>>())
            })
        }
    }
}

fn word(class: Class) -> &'static str {
    match class {
        Class::Urgent => "urgent",
        Class::Interactive => "interactive",
        Class::Batch => "batch",
    }
}

fn row(project: &Project) -> Vec<String> {
    let deadline = if project.deadline_ms == 0 { "none".to_owned() } else { format!("{} ms", project.deadline_ms) };
    vec![
        project.id.to_string(),
        project.tenant.to_string(),
        word(project.class).to_owned(),
        deadline,
        if project.available { "answer" } else { "refuse" }.to_owned(),
    ]
}

pub async fn projects(command: Projects, common: &Common) -> anyhow::Result<()> {
    const HEADERS: [&str; 5] = ["PROJECT", "TENANT", "CLASS", "DEADLINE", "WITHOUT A QUORUM"];
    match command {
        Projects::Set { name, tenant, class, deadline_ms, available } => {
            let known =
                |class: &String| [Class::Urgent, Class::Interactive, Class::Batch].map(word).contains(&&**class);
            if let Some(class) = class.as_ref().filter(|class| !known(class)) {
                ensure!(false, "--class: `{class}` is not urgent, interactive or batch");
            }
            let body = json!({
                "tenant": tenant, "class": class, "deadline_ms": deadline_ms, "available": available,
            });
            let path = format!("/v1/projects/{}", escape(&name));
            let project: Project = common.admin().put(&path, &body).await?;
            show::print(common.json, &project, |project| show::table(&HEADERS, &[row(project)]))
        }
        Projects::List => {
            let projects: view::Projects = common.admin().get(&common.listing("/v1/projects")).await?;
            let rows = |projects: &view::Projects| projects.projects.iter().map(row).collect::<Vec<_>>();
            show::print(common.json, &projects, |projects| show::table(&HEADERS, &rows(projects)))
        }
    }
}
