//! `izar bench engine` and its like: become `izar-agent bench`, because only agents compute. A model that has no path,
//! or none at all, is the small one, fetched as `izar dev` fetches it.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use clap::Args;

use crate::dev::{Model, SMOLLM2};
use crate::programs;

/// Whatever `izar-agent bench` understands.
#[derive(Debug, Args)]
pub struct Options {
    /// See --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs `izar-agent bench WHAT` in the place of this process.
pub fn run(what: &str, options: Options, json: bool) -> anyhow::Result<()> {
    let program = programs::beside("izar-agent")?;
    let mut command = Command::new(&program);
    command.args(["bench", what]).args(arguments(options.arguments, json, small_model)?);
    Err(command.exec()).with_context(|| format!("run {}", program.display()))
}

/// The arguments with the small model's path for its name; `small` brings it.
fn arguments(
    mut given: Vec<OsString>,
    json: bool,
    small: impl FnOnce() -> anyhow::Result<OsString>,
) -> anyhow::Result<Vec<OsString>> {
    if json && !given.iter().any(|a| a == "--json") {
        given.push("--json".into());
    }
    if given.iter().any(|a| a == "--help" || a == "-h") {
        return Ok(given);
    }
    let named = given.iter().position(|a| a == "--model").map(|at| at + 1).filter(|at| *at < given.len());
    let joined = given.iter().position(|a| a == OsStr::new(&format!("--model={SMOLLM2}")));
    match (named, joined) {
        (Some(at), _) if given[at] == SMOLLM2 => given[at] = small()?,
        (Some(_), _) => {}
        (None, Some(at)) => {
            given[at] = "--model".into();
            given.insert(at + 1, small()?);
        }
        (None, None) if given.iter().any(|a| a.to_string_lossy().starts_with("--model")) => {}
        (None, None) => given.extend(["--model".into(), small()?]),
    }
    Ok(given)
}

/// Where the small model lies, after it has come.
fn small_model() -> anyhow::Result<OsString> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    Ok(runtime.block_on(Model::Smollm2.fetch())?.path()?.into_os_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(given: &str, json: bool, expected: &str) {
        let given = given.split_whitespace().map(OsString::from).collect();
        let out = arguments(given, json, || Ok("/c/small.gguf".into())).unwrap();
        assert_eq!(out.join(OsStr::new(" ")), OsString::from(expected));
    }

    #[test]
    fn the_small_model_stands_for_its_name_and_for_none() {
        check("--batch 1", false, "--batch 1 --model /c/small.gguf");
        check("--model smollm2-135m --batch 1", false, "--model /c/small.gguf --batch 1");
        check("--model=smollm2-135m", true, "--model /c/small.gguf --json");
        check("--model /m.gguf --json", true, "--model /m.gguf --json");
        check("--model=/m.gguf", false, "--model=/m.gguf");
        check("--help", false, "--help");
        check("--model", false, "--model");
    }
}
