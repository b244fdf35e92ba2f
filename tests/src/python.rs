//! Runs Python programs with real packages from the package index, kept under `target/` between runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::cli::Output;

/// Returns a Python interpreter that has the `openai` package. Installs it on first use.
pub fn with_openai() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| interpreter("python", &["openai>=2,<3"], "openai"))
}

/// Returns a Python interpreter that has `moto`, which plays an S3-compatible store. Installs it on first use.
pub fn with_moto() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    // Of its server only what S3 and its access keys need.
    PYTHON.get_or_init(|| interpreter("python-moto", &["moto[s3]>=5,<6", "flask", "flask-cors"], "moto.server"))
}

/// An interpreter in a folder of its own under `target/`, with packages, of which `module` must come.
fn interpreter(folder: &str, packages: &[&str], module: &str) -> PathBuf {
    let install = || -> Result<PathBuf> {
        let folder = crate::binaries::target_folder().join(folder);
        let python = folder.join("bin/python");
        if !works(&python, module) {
            command(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
            command(Command::new(&python).args(["-m", "pip", "install", "--quiet"]).args(packages))?;
            ensure!(works(&python, module), "installed, but it cannot be imported");
        }
        Ok(python)
    };
    install().unwrap_or_else(|error| panic!("{packages:?} is needed: {error:#}"))
}

fn works(python: &Path, module: &str) -> bool {
    let import = format!("import {module}");
    Command::new(python).args(["-c", &import]).output().is_ok_and(|output| output.status.success())
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
