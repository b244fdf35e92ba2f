//! `izar restore` and `izar recover`: a new life of a cluster, from a backup or from what one member left.
//!
//! Both work on files while the daemon is stopped. `recover` makes a backup of a data directory, which it opens for
//! writing: a store cuts off what is not whole at its ends, so the directory is to be copied first. Whatever begins a new
//! life is a backup that every member restores, so that all begin alike.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use izar_common::clock::wall_ms;
use izar_controller::backup::contents::{Contents, Maker};
use izar_controller::backup::restore::{Restored, restore as restore_member};
use izar_controller::config::Config;
use izar_controller::raft::rebuild::{Reach, remains};
use serde::Serialize;

use crate::backup::place::{self, Place};
use crate::backup::{KeySource, damaged, models};
use crate::{Common, show};

/// Begin a member of a new life of the cluster from a backup; the same file on every member
#[derive(Debug, Args)]
pub struct Restore {
    /// The backup's file, or s3://BUCKET/PREFIX/NAME
    file: String,
    #[command(flatten)]
    key: KeySource,
    /// An empty directory [default: the configuration's data_dir]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Number of the new life, the same for every member; needed only if this backup was restored before
    #[arg(long, value_name = "N")]
    incarnation: Option<u64>,
}

/// Make a backup of what a stopped member has, when the quorum is lost for good; says what may be lost. Copy the data
/// directory first: it is opened for writing, and what is not whole at its ends is cut off
#[derive(Debug, Args)]
pub struct Recover {
    #[command(flatten)]
    key: KeySource,
    /// The member's data directory [default: the configuration's data_dir]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Where to keep the backup, a folder or s3://BUCKET/PREFIX [default: only say how far the member got]
    #[arg(long, value_name = "PLACE")]
    to: Option<String>,
    /// With the weights of models
    #[arg(long, requires = "to")]
    with_models: bool,
}

fn options(key: &KeySource, data_dir: Option<PathBuf>) -> anyhow::Result<izar_controller::raft::Options> {
    let mut options = Config::load(&key.config)?.raft_options();
    options.data_dir = data_dir.unwrap_or(options.data_dir);
    Ok(options)
}

pub async fn restore(command: Restore, common: &Common) -> anyhow::Result<()> {
    let (options, key) = (options(&command.key, command.data_dir)?, command.key.load()?);
    let input = place::open(&command.file).await?;
    let node = options.node.clone();
    let restore = move || restore_member(input, &key, &options, command.incarnation);
    // A thread of its own: what it reads may have to be fetched meanwhile.
    let restored = tokio::task::spawn_blocking(restore).await?.with_context(|| command.file.clone())?;
    show::print(common.json, &restored, |r| restored_text(r, node.as_str()))
}

fn restored_text(r: &Restored, node: &str) -> String {
    let mut out = format!(
        "{node} begins life {} of the cluster with the state of {} in {}\n\
         {} keys, {} turns ({} were open and are closed as abandoned), {} audit records; state {}, the same on every \
         member\n",
        r.incarnation,
        show::time(r.taken_ms),
        r.data_dir.display(),
        r.keys,
        r.turns,
        r.abandoned,
        r.records,
        show::short(&r.digest),
    );
    out += &models(&r.models);
    out += "restore the other members from this same file, then start all of them\n";
    out
}

/// What was found, and where it was put.
#[derive(Debug, Serialize)]
struct Recovered {
    #[serde(flatten)]
    reach: Reach,
    /// Entries that the member did not know to be decided; they are kept.
    undecided: u64,
    /// Bytes of answers that wait to be recorded.
    provisional_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_as: Option<String>,
    /// Of the backup's header: what had to be left out.
    #[serde(skip)]
    warning: String,
}

pub async fn recover(command: Recover, common: &Common) -> anyhow::Result<()> {
    let options = options(&command.key, command.data_dir)?;
    let shown = options.data_dir.display().to_string();
    ensure!(options.data_dir.is_dir(), "{shown} is no directory");
    let remains = remains(&options).with_context(|| {
        format!("read {shown} (stop the controller first; or take another member's data directory)")
    })?;
    let reach = remains.reach.clone();
    let provisional_bytes = options.data_dir.join("provisional.log").metadata().map_or(0, |meta| meta.len());
    let (mut kept_as, mut warning) = (None, String::new());
    if let Some(to) = &command.to {
        let key = command.key.load()?;
        let maker = Maker {
            cluster: options.cluster.clone(),
            site: options.site.clone(),
            node: reach.node.clone(),
            now_ms: wall_ms(),
            nonce: rand::random(),
        };
        let blobs = options.data_dir.join("blobs");
        let contents = Contents::of_remains(remains);
        let contents = contents.with_files(command.with_models, |hash| blobs.join(hash.to_string()));
        let header = contents.header(&maker, &key);
        warning = damaged(&header);
        // In a file first: it is sealed, and a store takes it from there.
        let (file, _) = contents.write(&header, &key, tempfile::tempfile().context("make a temporary file")?)?;
        kept_as = Some(place::keep(&Place::parse(to)?, file, &header.file_name(), header.models).await?);
    }
    let undecided = reach.last.saturating_sub(reach.committed);
    let recovered = Recovered { reach, undecided, provisional_bytes, kept_as, warning };
    show::print(common.json, &recovered, recovered_text)
}

fn recovered_text(r: &Recovered) -> String {
    let Reach { node, committed, last, last_term, latest_ms, .. } = &r.reach;
    let time = show::time(*latest_ms);
    let mut out = format!(
        "{node} has the log up to entry {last} of term {last_term}, whose time is {time} UTC; it knew {committed} to be \
         decided\n\
         of several members take the one with the highest term, then the highest entry: compare before you go on\n\
         kept: everything up to entry {last}"
    );
    if r.undecided > 0 {
        out += &format!(
            "; {} entries at its end may have been acknowledged, or never decided: they take effect",
            r.undecided
        );
    }
    out += &format!(
        "\nmay be lost: what the other members decided without {node} after entry {last}, that is after {time} UTC; \
         every turn that was open is closed as abandoned\n"
    );
    if r.provisional_bytes > 0 {
        out +=
            "answers given without a quorum wait in provisional.log: put that file into the member's new directory\n";
    }
    out += &r.warning;
    out += &match &r.kept_as {
        Some(kept) => format!("{kept}\nnow: izar restore {kept} on every member, with an empty data directory\n"),
        None => {
            "nothing was written; --to PLACE makes the backup that every member is to be restored from\n".to_owned()
        }
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_says_what_is_kept_and_what_may_be_lost() {
        let node = "c2".parse().unwrap();
        let reach = Reach { node, applied: 7, committed: 9, last: 12, last_term: 3, latest_ms: 1_795_521_600_000 };
        let text = recovered_text(&Recovered {
            reach,
            undecided: 3,
            provisional_bytes: 5,
            kept_as: None,
            warning: String::new(),
        });
        for part in
            ["up to entry 12", "3 entries at its end", "may be lost", "2026-11-24 12:00:00", "provisional.log", "--to"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
