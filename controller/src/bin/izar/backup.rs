//! `izar backup`: takes, lists and verifies backups.
//!
//! The controller seals and streams; this tool only keeps what comes, under a name that appears when all of it is
//! there. So credentials of a store stay out of the controller, and a timer is a timer of systemd that runs this
//! (`systemd/izar-backup.timer`), on every controller alike: `--if-leader` lets one of them do it.

mod bucket;
pub mod place;
mod transport;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use izar_common::id::Hash;
use izar_common::seal::MasterKey;
use izar_controller::backup::Header;
use izar_controller::backup::archive::Reader;
use izar_controller::backup::load::{NeededModel, load};
use izar_controller::config::Config;
use izar_controller::control::backup::Kept;
use izar_controller::control::view::Status;
use izar_controller::state::last_backup::LastBackup;
use serde::Serialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::IMPORT_TIMEOUT;
use crate::{Common, show};
use place::{Place, Stored, Upload};

/// The longest wait for the next piece; a controller reads from its disk meanwhile.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest wait for the first piece with weights: all of them are read before, to see that none is damaged.
const WEIGHTS_TIMEOUT: Duration = IMPORT_TIMEOUT;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Backup {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    take: Option<Take>,
}

/// Takes a backup through the admin socket of any controller.
#[derive(Debug, Args)]
struct Take {
    /// The folder to keep it in, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "PLACE")]
    to: String,
    /// With the weights of models, not only the list of what is needed
    #[arg(long)]
    with_models: bool,
    /// Afterwards remove all but the newest N of this cluster and site, of those with weights or of those without, as this
    /// one is [default: keep all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Do nothing unless the controller leads: for timers that run on every controller
    #[arg(long)]
    if_leader: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the backups in a place; needs no key
    List {
        /// A folder, or s3://BUCKET/PREFIX
        #[arg(long, value_name = "PLACE")]
        to: String,
    },
    /// Read a backup whole, check every byte of it, and say what is in it
    Verify {
        /// The backup's file, or s3://BUCKET/PREFIX/NAME
        file: String,
        #[command(flatten)]
        key: KeySource,
    },
}

/// Where the master key is found.
#[derive(Debug, Args)]
pub struct KeySource {
    /// The controller's configuration
    #[arg(long, default_value = "/etc/izar/controller.toml")]
    pub config: PathBuf,
    /// The master key's file [default: the configuration's]
    #[arg(long)]
    pub master_key: Option<PathBuf>,
}

impl KeySource {
    pub fn load(&self) -> anyhow::Result<MasterKey> {
        let path = match &self.master_key {
            Some(path) => path.clone(),
            None => Config::load(&self.config).context("or name the key with --master-key")?.secrets.master_key,
        };
        Ok(MasterKey::load(path)?)
    }
}

pub async fn run(backup: Backup, common: &Common) -> anyhow::Result<()> {
    match (backup.command, backup.take) {
        (Some(Command::List { to }), _) => list(&Place::parse(&to)?, common).await,
        (Some(Command::Verify { file, key }), _) => verify(&file, &key, common).await,
        (None, Some(take)) => self::take(take, common).await,
        (None, None) => anyhow::bail!("--to: say where the backup shall be kept"),
    }
}

/// What was taken.
#[derive(Debug, Serialize)]
struct Taken {
    kept_as: String,
    bytes: u64,
    #[serde(flatten)]
    header: Header,
    removed: Vec<String>,
}

async fn take(take: Take, common: &Common) -> anyhow::Result<()> {
    let (place, admin) = (Place::parse(&take.to)?, common.admin());
    if take.if_leader {
        let status: Status = admin.get("/v1/status").await?;
        if !leads(&status)? {
            let nothing = json!({ "taken": false, "role": status.role });
            return show::print(common.json, &nothing, |_| format!("{} does not lead: nothing to do\n", status.node));
        }
    }
    let path = if take.with_models { "/v1/backup?models=true" } else { "/v1/backup" };
    let mut coming =
        Coming { body: admin.open(path).await?, wait: if take.with_models { WEIGHTS_TIMEOUT } else { PIECE_TIMEOUT } };
    let (header, begin) = coming.begin().await?;
    let mut upload = place.begin(&header.file_name(), header.models).await?;
    let poured = tokio::select! {
        poured = pour(begin, &mut coming, &mut upload) => poured,
        why = told_to_end() => why.and_then(|()| Err(anyhow!("broken off by a signal"))),
    };
    let (kept_as, bytes) = match poured {
        Ok(()) => upload.finish().await?,
        Err(error) => return Err(upload.abort(error).await),
    };
    let noted = Kept { taken_ms: header.taken_ms, applied: header.applied, kept_as: kept_as.clone() };
    let _: LastBackup = admin
        .post("/v1/backup", &noted)
        .await
        .with_context(|| format!("{kept_as} is kept, and whole; the cluster could not be told of it"))?;
    let removed = match take.keep {
        // The older ones may have what this one lacks.
        Some(_) if header.damaged_files > 0 => Vec::new(),
        Some(keep) => prune(&place, &header, keep as usize)
            .await
            .context("the backup is kept, older ones could not be removed")?,
        None => Vec::new(),
    };
    show::print(common.json, &Taken { kept_as, bytes, header, removed }, |t| {
        let removed = if t.removed.is_empty() { String::new() } else { format!("; removed {}", t.removed.join(", ")) };
        let size = show::bytes(t.bytes);
        let kept =
            format!("{} ({size}): all that was acknowledged up to entry {}{removed}\n", t.kept_as, t.header.applied);
        kept + &damaged(&t.header)
    })
}

/// A backup on its way from the controller.
struct Coming {
    body: Incoming,
    /// How long the next piece may take.
    wait: Duration,
}

impl Coming {
    /// The next piece; `None` when all has come.
    async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        loop {
            let frame = tokio::time::timeout(self.wait, self.body.frame()).await.context("the controller is silent")?;
            self.wait = PIECE_TIMEOUT;
            let Some(frame) = frame else { return Ok(None) };
            // Whatever else there may be between pieces is passed over.
            if let Ok(piece) = frame.context("the controller broke off; see its log")?.into_data() {
                return Ok(Some(piece));
            }
        }
    }

    /// Waits for the header, with which a backup gets its name; also returns all that has come by then.
    async fn begin(&mut self) -> anyhow::Result<(Header, Bytes)> {
        let mut begin = Vec::new();
        loop {
            begin.extend(self.next().await?.context("the controller sent no backup")?);
            if let Some(header) = Header::of_prefix(&begin)? {
                return Ok((header, begin.into()));
            }
        }
    }
}

async fn pour(begin: Bytes, coming: &mut Coming, upload: &mut Upload) -> anyhow::Result<()> {
    upload.write(begin).await?;
    while let Some(piece) = coming.next().await? {
        upload.write(piece).await?;
    }
    Ok(())
}

/// Waits for an operator's Ctrl-C, or for systemd that has waited long enough.
async fn told_to_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        told = tokio::signal::ctrl_c() => told.context("listen for Ctrl-C"),
        _ = terminate.recv() => Ok(()),
    }
}

/// A warning, if model files had to be left out.
pub fn damaged(header: &Header) -> String {
    match header.damaged_files {
        0 => String::new(),
        count => format!(
            "WARNING: {count} model files of {} are damaged and not in it: import the models again (its journal names \
             the files); no older backup is removed meanwhile\n",
            header.node
        ),
    }
}

/// Whether the controller leads. Another one that leads takes the backup; where nobody is known to lead, nobody does.
fn leads(status: &Status) -> anyhow::Result<bool> {
    let known = status.role == "leader" || status.leader.is_some();
    anyhow::ensure!(known, "{} knows no leader, so no backup is taken: see izar doctor", status.node);
    Ok(status.role == "leader")
}

/// Removes all but the newest backups that are like the one that was just taken; returns their names.
async fn prune(place: &Place, like: &Header, keep: usize) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in outdated(place.list().await?, like, keep) {
        place.remove(&name).await?;
        removed.push(name);
    }
    Ok(removed)
}

/// Names of the backups that are older than the newest `keep` of one cluster and site, under one master key, with or
/// without weights, as `like` is, which is one of those that stay. Older by what is in them: a clock may have run ahead.
fn outdated(stored: Vec<Stored>, like: &Header, keep: usize) -> Vec<String> {
    let kind = |h: &Header| (h.cluster.clone(), h.site.clone(), h.master_key.clone(), h.models);
    let of_kind = stored.into_iter().filter_map(|s| Some((s.header?, s.name)));
    let mut others: Vec<(Header, String)> = of_kind.filter(|(h, _)| h != like && kind(h) == kind(like)).collect();
    others.sort_by_key(|(h, _)| std::cmp::Reverse((h.incarnation, h.applied)));
    others.into_iter().skip(keep.saturating_sub(1)).map(|(_, name)| name).collect()
}

async fn list(place: &Place, common: &Common) -> anyhow::Result<()> {
    let mut stored = place.list().await?;
    stored.sort_by_key(|s| s.header.as_ref().map_or(0, |h| h.taken_ms));
    show::print(common.json, &json!({ "backups": stored }), |_| {
        let row = |s: &Stored| {
            let size = show::bytes(s.bytes);
            match &s.header {
                Some(h) => {
                    let models = if h.models { "with weights" } else { "-" };
                    let life = h.incarnation.to_string();
                    let (time, applied) = (show::time(h.taken_ms), h.applied.to_string());
                    vec![s.name.clone(), time, format!("{}/{}", h.cluster, h.site), life, applied, size, models.into()]
                }
                None => vec![s.name.clone(), "DAMAGED".into(), "-".into(), "-".into(), "-".into(), size, "-".into()],
            }
        };
        let rows: Vec<_> = stored.iter().map(row).collect();
        show::table(&["BACKUP", "TAKEN (UTC)", "OF", "LIFE", "APPLIED", "SIZE", "MODELS"], &rows)
    })
}

/// What a verified backup holds.
#[derive(Debug, Serialize)]
struct Verified {
    #[serde(flatten)]
    header: Header,
    digest: Hash,
    keys: usize,
    turns: usize,
    open_turns: usize,
    audit_records: u64,
    deployments: Vec<String>,
    models: Vec<NeededModel>,
}

async fn verify(file: &str, key: &KeySource, common: &Common) -> anyhow::Result<()> {
    let key = key.load()?;
    let input = place::open(file).await?;
    let load = move || Reader::open(input, &key).and_then(|reader| load(reader, |_| Ok(())));
    // A thread of its own: what it reads may have to be fetched meanwhile.
    let loaded = tokio::task::spawn_blocking(load).await?.with_context(|| file.to_owned())?;
    let (config, models) = (loaded.state.config_snapshot(), loaded.models());
    let verified = Verified {
        digest: loaded.summary.digest,
        keys: config.keys.len(),
        turns: loaded.state.turns().count(),
        open_turns: loaded.state.open_turns(),
        audit_records: loaded.records,
        deployments: config.deployments.keys().map(ToString::to_string).collect(),
        models,
        header: loaded.header,
    };
    show::print(common.json, &verified, human)
}

fn human(v: &Verified) -> String {
    let h = &v.header;
    let mut out = format!(
        "whole: cluster {}, site {}, life {}, applied {}, taken {} by {} (version {})\n\
         {} keys, {} turns ({} open), {} audit records, deployments: {}\n",
        h.cluster,
        h.site,
        h.incarnation,
        h.applied,
        show::time(h.taken_ms),
        h.node,
        h.version,
        v.keys,
        v.turns,
        v.open_turns,
        v.audit_records,
        if v.deployments.is_empty() { "none".to_owned() } else { v.deployments.join(", ") },
    );
    out += &models(&v.models);
    out
}

/// A line for each model: what of it is in the backup.
pub fn models(models: &[NeededModel]) -> String {
    let line = |m: &NeededModel| {
        let here = match (m.text, m.weights) {
            (true, true) => "whole in the backup",
            (true, false) => "its weights are not in the backup: agents that have them go on, else import it again",
            (false, _) => "not in the backup: import it again",
        };
        format!("model {} {} ({}): {here}\n", m.name, show::short(&m.revision), show::bytes(m.bytes))
    };
    models.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(site: &str, applied: u64) -> Stored {
        let header = Header {
            format: 1,
            cluster: "bank".parse().unwrap(),
            site: site.parse().unwrap(),
            node: "c1".parse().unwrap(),
            incarnation: 1,
            applied,
            taken_ms: 1,
            version: "0".into(),
            master_key: "0".into(),
            models: false,
            damaged_files: 0,
            nonce: "0".into(),
        };
        Stored { name: format!("{site}{applied}"), bytes: 1, header: Some(header) }
    }

    #[test]
    fn where_nobody_is_known_to_lead_a_timer_fails_and_where_another_leads_it_has_nothing_to_do() {
        let leads = |role: &str, leader: Option<&str>| {
            let status = json!({
                "node": "c1", "version": "0", "role": role, "leader": leader, "term": 3, "applied": 9, "members": [],
                "api": {"endpoint": "https://127.0.0.1:8443", "plaintext_endpoint": null}, "agents": [],
                "deployments": [], "running": 0, "refused": {}, "latest_ms": 1,
            });
            super::leads(&serde_json::from_value(status).unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!((leads("leader", Some("c1")), leads("follower", Some("c2"))), (Ok(true), Ok(false)));
        assert!(leads("candidate", None).unwrap_err().contains("knows no leader"));
    }

    #[test]
    fn only_older_backups_of_the_same_site_are_outdated() {
        let damaged = Stored { name: "damaged".into(), bytes: 1, header: None };
        let all = || vec![stored("east", 3), stored("west", 1), stored("east", 1), stored("east", 2), damaged.clone()];
        let like = stored("east", 3).header.unwrap();
        assert_eq!(outdated(all(), &like, 2), ["east1"]);
        assert_eq!(outdated(all(), &like, 1), ["east2", "east1"]);
        assert!(outdated(all(), &like, 3).is_empty());
    }

    #[test]
    fn the_one_that_was_just_taken_stays_whatever_the_others_say_of_themselves() {
        let change = |change: &dyn Fn(&mut Header)| {
            let mut other = stored("east", 1);
            change(other.header.as_mut().unwrap());
            other
        };
        let like = stored("east", 2).header.unwrap();
        // A clock ran ahead when it was taken; it has the weights as well; it is under another key; it is of a later life.
        let future = change(&|h| h.taken_ms = u64::MAX);
        assert_eq!(outdated(vec![stored("east", 2), future], &like, 1), ["east1"]);
        for other in [change(&|h| h.models = true), change(&|h| h.master_key = "1".into())] {
            assert!(outdated(vec![stored("east", 2), other], &like, 1).is_empty());
        }
        let later = change(&|h| h.incarnation = 2);
        assert_eq!(outdated(vec![stored("east", 2), later], &like, 1), ["east1"]);
    }
}
