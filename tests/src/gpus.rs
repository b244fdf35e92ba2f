//! Servers with GPUs that are not there: the agent loads a library that plays a scenario, and the story goes on telling.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::sys::stat::Mode;
use nix::unistd::{User, getuid};
use serde_json::Value;

use crate::cli::Admin;
use crate::nodes::Site;

/// What cargo names the library that plays.
const LIBRARY: &str = "libizar_fake_nvml.so";

/// The GPUs of one agent's server.
#[derive(Debug)]
pub struct Server {
    scenario: PathBuf,
    /// Held open, so that the agent's end never ends.
    kernel: File,
}

impl Server {
    /// Writes an agent's certificate and configuration with a `[gpu]` table of the story's, and starts it.
    pub fn start(site: &mut Site, agent: &str, scenario: &str, gpu: &str) -> Self {
        Self::start_with(site, agent, scenario, gpu, crate::binaries::path(LIBRARY))
    }

    /// Like [`Server::start`], with a library that has no functions of those names.
    pub fn start_without(site: &mut Site, agent: &str, scenario: &str, gpu: &str, functions: &[&str]) -> Self {
        let mut bytes = std::fs::read(crate::binaries::path(LIBRARY)).expect("the library can be read");
        for function in functions {
            let name: Vec<u8> = [&[0], function.as_bytes(), &[0]].concat();
            let mut found = 0;
            while let Some(at) = bytes.windows(name.len()).position(|window| window == name) {
                bytes[at + 1] = b'x';
                found += 1;
            }
            assert!(found > 0, "the library has no {function}");
        }
        let library = site.path(&format!("{agent}-nvml.so"));
        std::fs::write(&library, bytes).expect("the folder is ours");
        Self::start_with(site, agent, scenario, gpu, library)
    }

    fn start_with(site: &mut Site, agent: &str, scenario: &str, gpu: &str, library: PathBuf) -> Self {
        let server = Self::write(site, agent, scenario, gpu, library);
        site.start("izar-agent", agent);
        server
    }

    /// Like [`Server::start`], but the agent is the story's to start.
    pub fn prepare(site: &Site, agent: &str, scenario: &str, gpu: &str) -> Self {
        Self::write(site, agent, scenario, gpu, crate::binaries::path(LIBRARY))
    }

    fn write(site: &Site, agent: &str, scenario: &str, gpu: &str, library: PathBuf) -> Self {
        let scenario_file = site.path(&format!("{agent}.gpus"));
        std::fs::write(&scenario_file, format!("host {agent}\n{scenario}\n")).expect("the folder is ours");
        let kernel = site.path(&format!("{agent}.kernel"));
        nix::unistd::mkfifo(&kernel, Mode::from_bits_truncate(0o600)).expect("the folder is ours");
        site.write_agent(agent);
        let mut text = std::fs::read_to_string(site.config(agent)).expect("it was just written");
        text += &format!("\n[gpu]\nnvml = {library:?}\nkernel_log = {kernel:?}\n{gpu}\n");
        std::fs::write(site.config(agent), text).expect("the folder is ours");
        let kernel = File::options().read(true).write(true).open(&kernel).expect("a pipe can be opened at both ends");
        Self { scenario: scenario_file, kernel }
    }

    /// Goes on with the scenario.
    pub fn say(&self, line: &str) {
        let mut file = File::options().append(true).open(&self.scenario).expect("the folder is ours");
        file.write_all(format!("{line}\n").as_bytes()).expect("a line can be written");
    }

    /// Says something as the kernel would.
    pub fn log(&mut self, line: &str) {
        self.kernel.write_all(format!("{line}\n").as_bytes()).expect("a line fits a pipe");
    }
}

/// Root's hand on an agent's server: what listens where systemd would, and starts `izar-agent remediate` for each request,
/// as systemd does. The programs below it play: they note what they do, and wait while the story holds them.
#[derive(Debug)]
pub struct Hand {
    socket: PathBuf,
    deeds: PathBuf,
    held: PathBuf,
    stop: Arc<AtomicBool>,
}

impl Hand {
    /// Listens for an agent. A reset is refused while the agent has the library open, and mends what the driver asks for.
    pub fn start(site: &Site, agent: &str) -> Self {
        let (socket, deeds, held) = (site.path(&format!("{agent}.hand")), site.path("deeds"), site.path("held"));
        let (scenario, open) = (site.path(&format!("{agent}.gpus")), site.path(&format!("{agent}.gpus.open")));
        let deed = |what: &str| {
            let (deeds, held) = (deeds.display(), held.display());
            format!(
                "echo begin {what} {agent} >>{deeds}\nwhile [ -e {held} ]; do sleep 0.02; done\necho end {what} {agent} >>{deeds}\n"
            )
        };
        let smi = format!(
            "[ \"$1\" = --gpu-reset ] || exit 0\nif [ -e {open} ]; then echo in use by another client; exit 1; fi\n{}echo gpu0 field 230 0 >>{scenario}\n",
            deed("reset"),
            open = open.display(),
            scenario = scenario.display(),
        );
        let nvidia_smi = program(&site.path(&format!("{agent}.nvidia-smi")), &smi);
        let restart = format!("if [ \"$1\" = show ]; then echo inactive; exit 0; fi\n{}", deed("restart"));
        let systemctl = program(&site.path(&format!("{agent}.systemctl")), &restart);
        let user = User::from_uid(getuid()).expect("users can be asked for").expect("this user has a name").name;
        let listener = UnixListener::bind(&socket).expect("the folder is ours");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let folder = site.path(&format!("{agent}.run"));
        std::fs::create_dir(&folder).expect("the folder is ours");
        std::thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let mut hand = Command::new(crate::binaries::path("izar-agent"));
                hand.args(["remediate", "--user", &user]);
                hand.arg("--nvidia-smi")
                    .arg(&nvidia_smi)
                    .arg("--systemctl")
                    .arg(&systemctl)
                    .arg("--folder")
                    .arg(&folder);
                hand.stdin(Stdio::from(OwnedFd::from(caller))).stdout(Stdio::null()).stderr(Stdio::null());
                let mut hand = hand.spawn().expect("our programs run");
                std::thread::spawn(move || hand.wait());
            }
        });
        Self { socket, deeds, held, stop }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Keeps every deed of the site from ending until [`Hand::let_go`].
    pub fn hold(&self) {
        std::fs::write(&self.held, "").expect("the folder is ours");
    }

    pub fn let_go(&self) {
        std::fs::remove_file(&self.held).expect("it was held");
    }

    /// What the hands of the whole site did, in order.
    pub fn deeds(&self) -> Vec<String> {
        std::fs::read_to_string(&self.deeds).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread, if it still listens.
        let _ = UnixStream::connect(&self.socket);
    }
}

/// The program that an agent asks for answers that are known: it says what the story lets it, `ok` at first.
#[derive(Debug)]
pub struct Prober {
    program: PathBuf,
    answer: PathBuf,
}

impl Prober {
    pub fn new(site: &Site, agent: &str) -> Self {
        let (answer, program) = (site.path(&format!("{agent}.answer")), site.path(&format!("{agent}.probe")));
        let text = format!("read -r said <{0}\necho \"$said\"\n[ \"$said\" = ok ]\n", answer.display());
        let prober = Self { program: self::program(&program, &text), answer };
        prober.say("ok");
        prober
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Answers so from now on.
    pub fn say(&self, answer: &str) {
        std::fs::write(&self.answer, format!("{answer}\n")).expect("the folder is ours");
    }
}

fn program(path: &Path, text: &str) -> PathBuf {
    std::fs::write(path, format!("#!/bin/sh\n{text}")).expect("the folder is ours");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)).expect("the file is ours");
    path.to_owned()
}

/// A GPU as `izar gpus` shows it.
pub fn gpu(admin: &Admin, agent: &str, index: u64) -> Result<Value> {
    let all = admin.json(&["gpus"])?;
    let found = all["gpus"].as_array().into_iter().flatten().find(|gpu| gpu["agent"] == agent && gpu["index"] == index);
    found.cloned().with_context(|| format!("no GPU {index} of {agent} in {all}"))
}

/// Why an agent's server as a whole is not in order; empty if it is.
pub fn fault(admin: &Admin, agent: &str) -> Result<String> {
    let all = admin.json(&["gpus"])?;
    let found = all["agents"].as_array().into_iter().flatten().find(|server| server["agent"] == agent);
    let found = found.with_context(|| format!("no server {agent} in {all}"))?;
    Ok(found["fault"].as_str().context("a fault is a text")?.to_owned())
}
