//! Runs Python programs with real packages from the package index, kept under `target/` between runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::cli::Output;

/// Returns a Python interpreter that has the `openai` package. Installs it on first use.
pub fn with_openai() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| install().unwrap_or_else(|error| panic!("the openai package is needed: {error:#}")))
}

fn install() -> Result<PathBuf> {
    let folder = crate::binaries::target_folder().join("python");
    let python = folder.join("bin/python");
    if !works(&python) {
        command(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        command(Command::new(&python).args(["-m", "pip", "install", "--quiet", "openai>=2,<3"]))?;
        ensure!(works(&python), "installed, but it cannot be imported");
    }
    Ok(python)
}

fn works(python: &Path) -> bool {
    Command::new(python).args(["-c", "import openai"]).output().is_ok_and(|output| output.status.success())
}

fn command(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Runs a program given as text. `arguments` arrive in `sys.argv`.
pub fn run(python: &Path, program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(python)
        .args(["-c", program])
        .args(arguments)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap_or_else(|error| panic!("run {}: {error}", python.display()));
    Output {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
