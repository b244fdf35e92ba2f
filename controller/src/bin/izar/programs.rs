//! Finds the other programs of Izar beside this one, so that a build folder and an installation work alike.

use std::path::PathBuf;

use anyhow::{Context, ensure};

/// The path of `izar-controller` or `izar-agent`.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find this program")?;
    let path = own.with_file_name(name);
    ensure!(path.is_file(), "{} is not there; build everything first: cargo build --release", path.display());
    Ok(path)
}
