//! Golden bytes of every wire message: what one build wrote, every later build reads.
//!
//! `tests/golden/wire/<message>-<variant>.bin` holds a whole frame. A file is written once, by `IZAR_BLESS=1`, when a
//! message or a variant is new, and is never changed or deleted: a changed form is a new variant. The `match` in each
//! `variants` function makes a new variant without golden bytes a failure to compile.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::PathBuf;

use izar_common::chat::{Class, Finish, Grammar, Job, JobEvent, Logprobs, Sampling, Usage};
use izar_common::clock::Hlc;
use izar_common::health::gpu::{
    Action, Ended, Health, Hold, Mode, Order, Outcome as OrderOutcome, Remedy, State, View,
};
use izar_common::health::{Generation, Load, Machine, Report, WorkerReport, WorkerState};
use izar_common::id::{
    ClusterId, DeploymentId, Hash, KeyId, NodeId, NumericsId, ProjectId, TenantId, TurnId, WorkerId,
};
use izar_common::manifest::{File, Kind, Manifest};
use izar_common::prefix::Sketch;
use izar_common::wire::agent::{
    Activations, Assignment, CacheType, Device, Down, EngineOptions, Kernels, Quant, Recall, Recalled, Resume, Resumed,
    Submit, Up, WorkerSpec,
};
use izar_common::wire::handshake::{Hello, Open, Welcome};
use izar_common::wire::peer::{
    About, BlobAnswer, BlobRequest, ExplainAnswer, ExplainRequest, Proposal, RaftBatch, RaftEntry, RaftMessage,
    RejoinAnswer, RejoinRequest,
};
use izar_common::wire::worker::{FromWorker, ToWorker};
use izar_common::wire::{self, Wire};
use izar_controller::state::command::{Batch, Command, Origin};
use izar_controller::state::last_backup::LastBackup;
use izar_controller::state::remedies::Target;
use izar_controller::state::turns::{Once, Opening, Outcome};
use izar_controller::state::{Constraints, Deployment, Key, KeyStatus, Placement, Plan, Project, Standing, Tenant};
use izar_tests::binaries::repository;

fn folder() -> PathBuf {
    repository().join("tests/golden/wire")
}

/// The frames of this build, by file name.
#[derive(Default)]
struct Frames {
    seen: BTreeSet<String>,
    types: BTreeMap<u16, &'static str>,
    problems: Vec<String>,
}

impl Frames {
    /// Compares one message with its golden bytes, both ways.
    fn check<M: Wire + PartialEq + Debug>(&mut self, name: &'static str, variant: &str, message: &M) {
        let other = self.types.insert(M::TYPE, name).filter(|other| *other != name);
        if let Some(other) = other {
            self.problems.push(format!("{name} and {other} have the same type {}", M::TYPE));
        }
        let file = format!("{name}-{variant}.bin");
        let path = folder().join(&file);
        let bytes = wire::to_bytes(message).to_vec();
        assert!(self.seen.insert(file.clone()), "{file} stands twice");
        if !path.exists() && std::env::var("IZAR_BLESS").is_ok_and(|v| v == "1") {
            std::fs::create_dir_all(folder()).expect("the folder can be made");
            std::fs::write(&path, &bytes).expect("a golden file can be written");
        }
        let Ok(golden) = std::fs::read(&path) else {
            self.problems.push(format!("{file} is missing; if the variant is new, run once with IZAR_BLESS=1"));
            return;
        };
        if golden != bytes {
            self.problems.push(format!("{file}: this build writes other bytes: {}", hex(&bytes)));
        }
        match wire::decode::<M>(&golden) {
            Ok((decoded, length)) if decoded == *message && length == golden.len() => {}
            Ok((decoded, _)) => self.problems.push(format!("{file}: decodes to {decoded:?}")),
            Err(error) => self.problems.push(format!("{file}: {error}")),
        }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn name<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} is a name"))
}

pub fn hash(byte: u8) -> Hash {
    Hash(std::array::from_fn(|i| byte.wrapping_add(i as u8)))
}

pub fn manifest(kind: Kind) -> Manifest {
    let file = |name: &str, byte, bytes| File { name: name.into(), hash: hash(byte), bytes };
    Manifest {
        name: "smollm2-135m".into(),
        kind,
        files: vec![file("model.gguf", 1, 98_000_000), file("more.gguf", 2, 5)],
        text: file("text.json", 3, 2_000_000),
        context: 8192,
        vocabulary: 49_152,
        architecture: "llama".into(),
    }
}

pub fn engine() -> EngineOptions {
    EngineOptions {
        max_batch: 32,
        max_context: 4096,
        threads: 2,
        device: Device::Cpu,
        quant: Quant::Int8,
        activations: Activations::Int16,
        kernels: Kernels::Avx512,
        cache: CacheType::F32,
        cache_bytes: 1 << 30,
    }
}

pub fn job() -> Job {
    Job {
        turn: TurnId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        choice: 1,
        attempt: 2,
        deployment: name("smollm2-135m"),
        revision: hash(4),
        prompt: vec![1, 250, 251, 65_535, 65_536],
        delivered: vec![7, 8],
        sampling: Sampling {
            temperature: 0.7,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.05,
            repetition_penalty: 1.1,
            frequency_penalty: 0.5,
            presence_penalty: -0.5,
            logit_bias: vec![(7, -100.0), (70_000, 2.5)],
            logprobs: Some(20),
            grammar: Some(Grammar::JsonSchema(r#"{"type":"object"}"#.into())),
            seed: u64::MAX - 1,
            max_tokens: 100,
            ignore_eos: true,
        },
        cache_salt: std::array::from_fn(|i| 200 + i as u8),
        numerics: Some(NumericsId(0x0123_4567_89ab_cdef)),
        class: Class::Batch,
        capsule: b"sealed".to_vec(),
    }
}

pub fn usage() -> Usage {
    Usage { prompt_tokens: 300, cached_tokens: 256, completion_tokens: 70_000 }
}

fn sketch() -> Sketch {
    Sketch::of([[7; 16], std::array::from_fn(|i| i as u8)].iter())
}

#[test]
fn every_message_has_golden_bytes_that_read_and_write_the_same() {
    let mut frames = Frames::default();
    handshake(&mut frames);
    agent(&mut frames);
    job_events(&mut frames);
    worker(&mut frames);
    peer(&mut frames);
    commands(&mut frames);
    for entry in std::fs::read_dir(folder()).expect("the golden folder").flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if !frames.seen.contains(&file) {
            frames.problems.push(format!("{file} is read by nothing: golden bytes are kept for ever"));
        }
    }
    assert!(frames.problems.is_empty(), "{}", frames.problems.join("\n"));
}

/// Every `impl Wire` in the sources of daemons, tests apart, is among those checked above. Frames that lie on a
/// controller's own disk and never leave it are named apart: rows have golden bytes in `golden_rows`.
#[test]
fn no_message_is_without_golden_bytes() {
    let known = [
        "Hello",
        "Welcome",
        "Open",
        "Up",
        "Down",
        "Submit",
        "JobEvent",
        "Resume",
        "Resumed",
        "Recall",
        "Recalled",
        "ToWorker",
        "FromWorker",
        "RaftBatch",
        "Proposal",
        "BlobRequest",
        "ExplainRequest",
        "ExplainAnswer",
        "RejoinRequest",
        "RejoinAnswer",
        "About",
        "BlobAnswer",
        "Batch",
        // On disk: rows of the state, the store's head, and Raft's log.
        "Value",
        "Head",
        "StoredEntry",
        "StoredHardState",
        "Position",
        "StoredIncarnation",
        // On disk: turns that wait for a quorum to be recorded.
        "Note",
    ];
    let mut unknown = Vec::new();
    let mut folders: Vec<PathBuf> = ["common/src", "controller/src", "agent/src"].map(|f| repository().join(f)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a source folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            for line in text.lines().filter(|_| path.file_name().is_some_and(|name| name != "tests.rs")) {
                let Some(rest) = line.strip_prefix("impl Wire for ") else { continue };
                let message = rest.split([' ', '{']).next().unwrap_or_default();
                if !known.contains(&message) {
                    unknown.push(format!("{message} in {}", path.display()));
                }
            }
        }
    }
    assert!(unknown.is_empty(), "messages without golden bytes: {unknown:?}");
}

fn handshake(frames: &mut Frames) {
    let hello = Hello { schema_min: 1, schema_max: 300, cluster: name::<ClusterId>("bank"), version: "0.1.0".into() };
    frames.check("hello", "plain", &hello);
    let welcome = |message: &Welcome| match message {
        Welcome::Accepted { .. } => "accepted",
        Welcome::Refused { .. } => "refused",
    };
    for message in
        [Welcome::Accepted { schema: 1, version: "0.1.0".into() }, Welcome::Refused { reason: "cluster lab".into() }]
    {
        frames.check("welcome", welcome(&message), &message);
    }
    let open = |message: &Open| match message {
        Open::Session => "session",
        Open::Job => "job",
        Open::Blob => "blob",
        Open::RaftUrgent => "raft-urgent",
        Open::RaftBulk => "raft-bulk",
        Open::Propose => "propose",
        Open::Resume => "resume",
        Open::Recall => "recall",
        Open::Explain => "explain",
        Open::Rejoin => "rejoin",
        Open::About => "about",
    };
    let (jobs, peers) = ([Open::Job, Open::Resume, Open::Recall], [Open::RaftUrgent, Open::RaftBulk, Open::Propose]);
    for message in
        [Open::Session, Open::Blob, Open::Explain, Open::Rejoin, Open::About].into_iter().chain(jobs).chain(peers)
    {
        frames.check("open", open(&message), &message);
    }
}

fn agent(frames: &mut Frames) {
    let state = |state: WorkerState| match state {
        WorkerState::Fetching => "fetching",
        WorkerState::Loading => "loading",
        WorkerState::Ready => "ready",
        WorkerState::Backoff => "backoff",
        WorkerState::Fenced => "fenced",
    };
    let worker = |state: WorkerState| WorkerReport {
        worker: name::<WorkerId>("echo.0"),
        deployment: name("echo"),
        revision: hash(5),
        state,
        pid: (state == WorkerState::Ready).then_some(70_000),
        load: Load { running: 3, waiting: 300, blocks_used: 1000, blocks: 70_000 },
        max_batch: 32,
        restarts: 1,
        numerics: (state == WorkerState::Ready).then_some(NumericsId(17)),
        detail: "why not, ä".into(),
        share: 50,
    };
    let generation = Generation { incarnation: 2, applied: 1 << 40 };
    for s in
        [WorkerState::Fetching, WorkerState::Loading, WorkerState::Ready, WorkerState::Backoff, WorkerState::Fenced]
    {
        let version = "0.1.0".to_owned();
        let report = Report {
            generation,
            pid: 9,
            version,
            cores: 128,
            memory_bytes: 1 << 37,
            gpus: 8,
            labels: [("rack".to_owned(), "r7".to_owned())].into(),
            workers: vec![worker(s)],
            health: health(),
        };
        let up = Up::Report(Box::new(report));
        frames.check("up", &format!("report-{}", state(s)), &up);
    }
    let up = |message: &Up| match message {
        Up::Report(_) => "report",
        Up::Sketch { .. } => "sketch",
        Up::Machine(_) => "machine",
    };
    let machine = Machine { certificate_expires: 1_800_000_000, disk_free_bytes: 1 << 38, disk_bytes: 1 << 40 };
    for message in [Up::Sketch { worker: name("echo.1"), sketch: sketch() }, Up::Machine(machine)] {
        frames.check("up", up(&message), &message);
    }
    let kinds = [Kind::Echo { first_token_us: 5000, next_token_us: 1 }, Kind::Gguf, Kind::Safetensors];
    let workers = kinds.map(|kind| WorkerSpec {
        worker: name("echo.1"),
        deployment: name("echo"),
        revision: hash(6),
        manifest: manifest(kind),
        engine: engine(),
    });
    let down = |down: &Down| match down {
        Down::Assignment(_) => "assignment",
        Down::Tripwire(_) => "tripwire",
    };
    let assignment = Down::Assignment(Assignment {
        generation,
        workers: workers.into(),
        holds: vec![hold()],
        order: Some(Order { id: 300, action: Action::Restart, gpus: vec![hold().gpu], begin_by_ms: 1 << 40 }),
    });
    for message in [assignment, Down::Tripwire(std::array::from_fn(|i| i as u8))] {
        frames.check("down", down(&message), &message);
    }
    frames.check("resume", "plain", &Resume { turn: job().turn, choice: 7 });
    let resumed = |resumed: &Resumed| match resumed {
        Resumed::Found { .. } => "found",
        Resumed::Missing => "missing",
    };
    let found = Resumed::Found { worker: name("echo.1"), numerics: Some(NumericsId(7)) };
    for message in [found, Resumed::Missing] {
        frames.check("resumed", resumed(&message), &message);
    }
    frames.check("recall", "plain", &Recall { turn: job().turn });
    for (variant, capsule) in [("found", Some(b"sealed".to_vec())), ("missing", None)] {
        frames.check("recalled", variant, &Recalled { capsule });
    }
    frames.check("submit", "plain", &Submit { worker: name("echo.1"), job: job() });
    let variant = |grammar: &Grammar| match grammar {
        Grammar::JsonObject => "json-object",
        Grammar::JsonSchema(_) => "json-schema",
        Grammar::Regex(_) => "regex",
    };
    for grammar in [Grammar::JsonObject, Grammar::JsonSchema("{}".into()), Grammar::Regex("ä+".into())] {
        let (variant, mut job) = (variant(&grammar), job());
        job.sampling.grammar = Some(grammar);
        frames.check("submit", variant, &Submit { worker: name("echo.1"), job });
    }
    let plain = Job { sampling: Sampling::default(), numerics: None, capsule: Vec::new(), ..job() };
    frames.check("submit", "default", &Submit { worker: name("echo.1"), job: plain });
    options(frames);
}

pub fn hold() -> Hold {
    let (gpu, reason, boot) = (name("gpu-8a5b"), "Xid 54".into(), "b7".into());
    Hold { gpu, quarantined: true, reason, remedy: Remedy::Replace, standing: true, boot }
}

/// One GPU in every state, with every remedy.
fn health() -> Health {
    let remedies = [Remedy::None, Remedy::Reset, Remedy::Restart, Remedy::Replace];
    let gpu = |(index, state): (u32, State)| View {
        id: name(&format!("gpu-{index}")),
        index,
        cuda: (index > 0).then_some(index as u16),
        name: "H100".into(),
        bus: "00000000:3b:00.0".into(),
        state,
        reason: "why, ä".into(),
        remedy: remedies[index as usize % remedies.len()],
        standing: index % 2 == 1,
        since_ms: 1 << 40,
        temperature_c: Some(91),
        memory_used_bytes: Some(1 << 35),
        memory_bytes: Some(1 << 36),
        utilization_percent: Some(50),
        power_mw: Some(300_000),
        corrected_errors: Some(7),
        uncorrected_errors: None,
        pcie_replays: Some(300),
        recovery_action: Some(1),
        last_xid: Some(95),
        xids: 2,
        fell_ms: Some(1 << 41),
    };
    Health {
        mode: Mode::Advise,
        fault: "2 GPUs of 4".into(),
        boot: "b7".into(),
        driver: "570.1".into(),
        gpus: (0..).zip(State::ALL).map(gpu).collect(),
        ended: Some(Ended { id: 300, outcome: OrderOutcome::Unknown, reason: "begun, ä".into() }),
    }
}

/// Every word of every option, in one assignment.
fn options(frames: &mut Frames) {
    let worker = |engine: EngineOptions| WorkerSpec {
        worker: name("echo.1"),
        deployment: name("echo"),
        revision: hash(6),
        manifest: manifest(Kind::Gguf),
        engine,
    };
    let quants = [Quant::F32, Quant::F16, Quant::Int8, Quant::Int4];
    let kernels = [Kernels::Auto, Kernels::Reference, Kernels::Portable, Kernels::Avx2, Kernels::Avx512];
    let caches = [CacheType::F16, CacheType::F32];
    let quants = quants.map(|quant| worker(EngineOptions { quant, ..engine() }));
    let kernels = kernels.map(|kernels| worker(EngineOptions { kernels, ..engine() }));
    let caches = caches.map(|cache| worker(EngineOptions { cache, ..engine() }));
    let devices = [Device::Cpu, Device::Cuda(1)].map(|device| worker(EngineOptions { device, ..engine() }));
    let activations = [Activations::Auto, Activations::Int8, Activations::Int16];
    let activations = activations.map(|activations| worker(EngineOptions { activations, ..engine() }));
    let workers = quants.into_iter().chain(kernels).chain(caches).chain(devices).chain(activations).collect();
    let generation = Generation { incarnation: 1, applied: 1 };
    frames.check(
        "down",
        "options",
        &Down::Assignment(Assignment { generation, workers, holds: Vec::new(), order: None }),
    );
}

fn job_event(event: &JobEvent) -> &'static str {
    match event {
        JobEvent::Tokens { logprobs, .. } if logprobs.is_empty() => "tokens",
        JobEvent::Tokens { .. } => "tokens-logprobs",
        JobEvent::Done { finish: Finish::Stop, .. } => "done-stop",
        JobEvent::Done { finish: Finish::Length, .. } => "done-length",
        JobEvent::Failed { .. } => "failed",
    }
}

fn all_job_events() -> [JobEvent; 5] {
    [
        JobEvent::Tokens { position: 1000, tokens: vec![0, 250, 251, 100_000], logprobs: Vec::new() },
        JobEvent::Tokens {
            position: 3,
            tokens: vec![5],
            logprobs: vec![Logprobs { logprob: -0.5, top: vec![(9, -0.25), (70_000, f32::NEG_INFINITY)] }],
        },
        JobEvent::Done { finish: Finish::Stop, usage: usage() },
        JobEvent::Done { finish: Finish::Length, usage: usage() },
        JobEvent::Failed { reason: "worker ended".into(), retryable: true },
    ]
}

fn job_events(frames: &mut Frames) {
    for event in all_job_events() {
        frames.check("job-event", job_event(&event), &event);
    }
}

fn worker(frames: &mut Frames) {
    let to = |message: &ToWorker| match message {
        ToWorker::Load { .. } => "load",
        ToWorker::Submit { .. } => "submit",
        ToWorker::Cancel { .. } => "cancel",
    };
    let files = vec![PathBuf::from("/var/lib/izar/a"), PathBuf::from("b")];
    for message in [
        ToWorker::Load {
            manifest: manifest(Kind::Gguf),
            files,
            text: Some("/t.json".into()),
            engine: engine(),
            cpus: vec![4, 5],
        },
        ToWorker::Submit { id: 300, job: job() },
        ToWorker::Cancel { id: u64::MAX },
    ] {
        frames.check("to-worker", to(&message), &message);
    }
    let from = |message: &FromWorker| match message {
        FromWorker::Ready { .. } => "ready",
        FromWorker::Unloadable { .. } => "unloadable",
        FromWorker::Step { .. } => "step",
        FromWorker::Sketch(_) => "sketch",
    };
    let events = all_job_events().into_iter().zip(1..).map(|(event, id)| (id, event)).collect();
    for message in [
        FromWorker::Ready { numerics: NumericsId(u64::MAX) },
        FromWorker::Unloadable { reason: "no tensor output.weight".into() },
        FromWorker::Step { events, load: Load { running: 4, waiting: 1, blocks_used: 6, blocks: 9 } },
        FromWorker::Sketch(sketch()),
    ] {
        frames.check("from-worker", from(&message), &message);
    }
}

fn peer(frames: &mut Frames) {
    let entry = RaftEntry { entry_type: 0, term: 5, index: 1 << 33, data: vec![1, 2, 255], context: vec![9] };
    let message = RaftMessage {
        msg_type: 3,
        to: 1,
        from: 2,
        term: 5,
        log_term: 4,
        index: 300,
        entries: vec![entry.clone(), RaftEntry { entry_type: 2, ..entry }],
        commit: 299,
        commit_term: 5,
        request_snapshot: 1,
        reject: true,
        reject_hint: 250,
        context: vec![8, 7],
        priority: -1,
    };
    frames.check("raft-batch", "plain", &RaftBatch(vec![RaftMessage::default(), message]));
    frames.check("proposal", "plain", &Proposal(vec![0, 1, 254, 255]));
    frames.check("about", "plain", &About { version: "0.1.0".into(), now_ms: 1 << 40 });
    frames.check("explain-request", "plain", &ExplainRequest { turn: job().turn });
    for (variant, trace) in [("known", Some("{}".to_owned())), ("unknown", None)] {
        frames.check("explain-answer", variant, &ExplainAnswer { trace });
    }
    let request = |message: &RejoinRequest| match message {
        RejoinRequest::Standing => "standing",
        RejoinRequest::Snapshot => "snapshot",
    };
    for message in [RejoinRequest::Standing, RejoinRequest::Snapshot] {
        frames.check("rejoin-request", request(&message), &message);
    }
    let answer = |message: &RejoinAnswer| match message {
        RejoinAnswer::Standing { .. } => "standing",
        RejoinAnswer::Snapshot { .. } => "snapshot",
        RejoinAnswer::Refused { .. } => "refused",
    };
    for message in [
        RejoinAnswer::Standing { term: 1 << 33, leader: Some(name("c1")), known: true },
        RejoinAnswer::Snapshot { term: 300 },
        RejoinAnswer::Refused { reason: "it does not lead".into() },
    ] {
        frames.check("rejoin-answer", answer(&message), &message);
    }
    frames.check("blob-request", "plain", &BlobRequest { hash: hash(7), offset: 1 << 34 });
    let answer = |message: &BlobAnswer| match message {
        BlobAnswer::Found { .. } => "found",
        BlobAnswer::Missing => "missing",
    };
    for message in [BlobAnswer::Found { bytes: 1 << 35 }, BlobAnswer::Missing] {
        frames.check("blob-answer", answer(&message), &message);
    }
}

fn commands(frames: &mut Frames) {
    let variant = |command: &Command| match command {
        Command::CreateKey(_) => "create-key",
        Command::RevokeKey(_) => "revoke-key",
        Command::RegisterModel(_) => "register-model",
        Command::Deploy(_) => "deploy",
        Command::Undeploy(_) => "undeploy",
        Command::SetPlan { .. } => "set-plan",
        Command::OpenTurn(_) => "open-turn",
        Command::CloseTurn { .. } => "close-turn",
        Command::ResumeTurn { .. } => "resume-turn",
        Command::CloseOrphans { .. } => "close-orphans",
        Command::CompactLog { .. } => "compact-log",
        Command::PutTenant(_) => "put-tenant",
        Command::PutProject(_) => "put-project",
        Command::SetAlias { .. } => "set-alias",
        Command::SetStanding { .. } => "set-standing",
        Command::HoldGpu { .. } => "hold-gpu",
        Command::ReleaseGpu { .. } => "release-gpu",
        Command::Readmit { .. } => "readmit",
        Command::NoteBackup(_) => "note-backup",
        Command::OrderRemedy { .. } => "order-remedy",
        Command::EndRemedy { .. } => "end-remedy",
    };
    let origin = Origin { node: name::<NodeId>("c1"), incarnation: 3 };
    let turn = job().turn;
    for command in all_commands(&origin) {
        let batch = batch(&origin, vec![command.clone()]);
        frames.check("batch", variant(&command), &batch);
    }
    let outcome = |outcome: &Outcome| match outcome {
        Outcome::Finished { .. } => "finished",
        Outcome::Cancelled { .. } => "cancelled",
        Outcome::Failed { .. } => "failed",
        Outcome::Abandoned => "abandoned",
    };
    for closed in [
        Outcome::Finished { finish: Finish::Length, usage: usage(), inexact: true, numerics: Some(NumericsId(7)) },
        Outcome::Cancelled { usage: usage() },
        Outcome::Failed { reason: "worker ended".into(), usage: usage() },
        Outcome::Abandoned,
    ] {
        let variant = format!("close-turn-{}", outcome(&closed));
        frames.check("batch", &variant, &batch(&origin, vec![Command::CloseTurn { turn, outcome: closed }]));
    }
}

pub fn batch(origin: &Origin, commands: Vec<Command>) -> Batch {
    Batch { origin: origin.clone(), seq: 300, floor: 298, at: Hlc(1_795_521_600_000 << 16 | 7), commands }
}

/// One of each, but `CloseTurn`, which has a file for each outcome besides.
pub fn all_commands(origin: &Origin) -> Vec<Command> {
    let key = Key {
        id: name::<KeyId>("key-1"),
        project: name::<ProjectId>("default"),
        secret_hash: hash(8),
        max_concurrent: 256,
        status: KeyStatus::Active,
        created: Hlc(1 << 50),
        note: "für Tests".into(),
    };
    let placement = Placement {
        deployment: name::<DeploymentId>("echo"),
        agent: name("a1"),
        revision: hash(11),
        engine: engine(),
        retiring_ms: Some(1 << 40),
    };
    let plan = Plan { version: 4, workers: [(name("echo.0"), placement.clone()), (name("echo.1"), placement)].into() };
    let opening = Opening {
        turn: job().turn,
        tenant: name::<TenantId>("default"),
        project: name("default"),
        key: name("key-1"),
        deployment: name("echo"),
        revision: hash(9),
        prompt_tokens: 300,
        max_tokens: 16,
        stream: true,
        origin: origin.clone(),
        once: Some(Once { name: hash(11), request: hash(12) }),
        provisional: true,
    };
    let labels = [("rack".to_owned(), "r7".to_owned())].into();
    let constraints = Constraints { memory_bytes: 1 << 33, gpus: 1, labels, apart: true };
    let deployment = Deployment { id: name("echo"), revision: hash(10), replicas: 2, engine: engine(), constraints };
    let tenant = Tenant { id: name("bank"), weight: 3 };
    let project =
        Project { id: name("desk"), tenant: name("bank"), class: Class::Urgent, deadline_ms: 200, available: true };
    let draining = Standing::Draining { within_ms: 30_000 };
    vec![
        Command::CreateKey(key.clone()),
        Command::RevokeKey(key.id),
        Command::RegisterModel(manifest(Kind::Echo { first_token_us: 5000, next_token_us: 300 })),
        Command::Deploy(deployment),
        Command::Undeploy(name("echo")),
        Command::SetPlan { based_on: 3, plan },
        Command::OpenTurn(opening),
        Command::ResumeTurn { turn: job().turn, key: name("key-1"), origin: origin.clone() },
        Command::CloseOrphans { node: origin.node.clone(), before_incarnation: 3 },
        Command::CompactLog { through: 1 << 36 },
        Command::PutTenant(tenant),
        Command::PutProject(project),
        Command::SetAlias { alias: name("gpt-4o"), deployment: Some(name("echo")) },
        Command::SetStanding { agent: name("a1"), standing: Some(draining) },
        Command::HoldGpu { agent: name("a1"), hold: hold(), fell_ms: Some(1 << 40) },
        Command::ReleaseGpu { gpu: hold().gpu, reason: "replaced".into(), operator: true },
        Command::Readmit { node: name("c2") },
        Command::NoteBackup(LastBackup {
            node: name("c1"),
            taken_ms: 1 << 40,
            applied: 300,
            kept_as: "s3://backups/izar/x.izarbak".into(),
        }),
        Command::OrderRemedy {
            agent: name("a1"),
            action: Action::Reset,
            gpus: vec![Target { gpu: hold().gpu, index: 1 }],
        },
        Command::EndRemedy { id: 300, outcome: OrderOutcome::Late, reason: "silent".into() },
    ]
}
