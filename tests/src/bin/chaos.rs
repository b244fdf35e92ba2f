//! `chaos`: kills workers, agents and controllers under running streams and compares every answer with an undisturbed one.
//!
//! Streams of many kinds (greedy and seeded, penalties, log-probabilities, two choices, stop strings, a schema, long
//! prompts) run all the time against a real cluster, while a worker or an agent is killed or stopped again and again,
//! until so many streams were moved. With several controllers these are killed, too, half of the times with an agent;
//! their clients repeat the request on another one and read on. Every stream must say event by event what it said when
//! nothing was killed. The
//! exit status is 1 if one does not. Everything random comes from the seed; what the processor makes of it does not.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options, Process};
use izar_tests::process;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// Kills workers, agents and controllers under running streams and compares every answer with an undisturbed one.
#[derive(Debug, Parser)]
struct Arguments {
    /// Streams that shall be moved, or read on elsewhere.
    #[arg(long, default_value_t = 100)]
    moves: usize,
    /// What is asked when, and what is killed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// echo, or a model with weights that `izar dev` knows.
    #[arg(long, default_value = "echo")]
    model: String,
    #[arg(long, default_value_t = 3)]
    agents: usize,
    /// Three or more are killed as well.
    #[arg(long, default_value_t = 1)]
    controllers: usize,
    /// Streams at once.
    #[arg(long, default_value_t = 12)]
    streams: usize,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// How long a client tries to go on, and its pause between two tries.
const PATIENCE: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A kind of request: what is asked, and what an undisturbed run answered.
struct Kind {
    name: &'static str,
    body: Value,
    expected: Vec<Value>,
}

/// The kinds, without their answers.
fn kinds(model: &str) -> Vec<(&'static str, Value)> {
    let ask = |text: &str, more: Value| {
        let mut body = json!({
            "model": model, "messages": [{ "role": "user", "content": text }], "stream": true,
            "stream_options": { "include_usage": true }, "max_tokens": 80, "temperature": 0,
        });
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        body
    };
    let story = "Tell me a long story about a river and a mill.";
    let long = "The sea is calm and far from here. ".repeat(40);
    let city = json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 60},
        "people": {"type": "integer"}}, "required": ["city", "people"], "additionalProperties": false});
    let schema = json!({"type": "json_schema", "json_schema": {"name": "city", "schema": city}});
    let mut kinds = vec![
        ("greedy", ask(story, json!({}))),
        ("seeded", ask(story, json!({"temperature": 1.0, "seed": 7, "top_p": 0.95, "top_k": 50}))),
        (
            "penalties",
            ask(
                story,
                json!({"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "presence_penalty": 0.4,
                "repetition_penalty": 1.1}),
            ),
        ),
        ("logprobs", ask(story, json!({"logprobs": true, "top_logprobs": 3, "temperature": 0.7, "seed": 5}))),
        ("two choices", ask(story, json!({"n": 2, "temperature": 1.0, "seed": 11}))),
        ("stop strings", ask(story, json!({"stop": ["the mill stood", "zzz", "river and the"]}))),
        ("long prompt", ask(&long, json!({"max_tokens": 40}))),
    ];
    if model != "slow" {
        kinds.push(("schema", ask("Name a city as JSON.", json!({"response_format": schema, "seed": 2}))));
    }
    kinds
}

/// A stream that came to its end.
struct Told {
    turn: String,
    events: Vec<Value>,
    at: Vec<Instant>,
}

/// Asks the first of the controllers and listens to the end; goes on with the others when it dies.
fn listen(clients: &[&Client], body: &Value) -> Result<Told> {
    let mut told = Told { turn: String::new(), events: Vec::new(), at: Vec::new() };
    let (mut last_id, begun, mut tries) = (None, Instant::now(), 0);
    loop {
        let client = clients[tries % clients.len()];
        let cut = match listen_once(client, body, &mut last_id, &mut told) {
            Ok(()) => return Ok(told),
            Err(error) => error,
        };
        tries += 1;
        if clients.len() == 1 || begun.elapsed() > PATIENCE {
            return Err(cut);
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

fn listen_once(client: &Client, body: &Value, last_id: &mut Option<String>, told: &mut Told) -> Result<()> {
    let mut answer = match &last_id {
        // A request of which nothing with an id has come is simply asked again.
        None => {
            told.events.clear();
            told.at.clear();
            client.stream(CHAT, body)?
        }
        Some(id) => client.stream_after(id, CHAT, body)?,
    };
    if answer.status != 200 {
        let status = answer.status;
        anyhow::bail!("status {status}: {}", answer.finish()?.text());
    }
    told.turn = answer.header("x-request-id").unwrap_or_default().to_owned();
    let mut done = false;
    while let Some(data) = answer.event()? {
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(&data).with_context(|| format!("event {data}"))?;
        ensure!(event["error"].is_null(), "the stream broke: {event}");
        last_id.clone_from(&answer.last_id);
        // Everything but what names the request.
        told.events.push(json!({ "choices": event["choices"], "usage": event["usage"] }));
        told.at.push(Instant::now());
    }
    ensure!(done, "the stream ended without [DONE]");
    Ok(())
}

/// The events of each choice, and those of none: between choices the order is nobody's.
fn by_choice(events: &[Value]) -> BTreeMap<Option<u64>, Vec<&Value>> {
    let mut parts: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for event in events {
        parts.entry(event["choices"][0]["index"].as_u64()).or_default().push(event);
    }
    parts
}

/// What came of everything.
#[derive(Default)]
struct Tally {
    streams: u64,
    moved: Vec<Duration>,
    by_kind: BTreeMap<&'static str, u64>,
    different: Vec<String>,
    failed: Vec<String>,
    /// Turns that were on a victim, and when it was killed.
    hit: HashMap<String, Instant>,
    ended: HashSet<String>,
}

struct Run<'a> {
    arguments: &'a Arguments,
    /// The deployment's name.
    served: &'a str,
    kinds: Vec<Kind>,
    tally: Mutex<Tally>,
    stop: AtomicBool,
    kills: AtomicU64,
}

impl Run<'_> {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().expect("no panic while the tally is held")
    }

    /// One client: asks one thing after the other.
    fn client(&self, number: usize, clients: &[Client]) {
        let clients: Vec<&Client> = (0..clients.len()).map(|i| &clients[(number + i) % clients.len()]).collect();
        let mut random = StdRng::seed_from_u64(self.arguments.seed * 1000 + number as u64);
        while !self.stop.load(Relaxed) {
            let kind = &self.kinds[random.random_range(0..self.kinds.len())];
            let told = listen(&clients, &kind.body);
            let mut tally = self.tally();
            tally.streams += 1;
            match told {
                Ok(told) => self.judge(kind, &told, &mut tally),
                Err(error) => tally.failed.push(format!("{}: {error:#}", kind.name)),
            }
        }
    }

    fn judge(&self, kind: &Kind, told: &Told, tally: &mut Tally) {
        if by_choice(&told.events) != by_choice(&kind.expected) {
            let first = told.events.iter().zip(&kind.expected).find(|(got, expected)| got != expected);
            tally.different.push(format!("{} {}: {first:?}", kind.name, told.turn));
        }
        tally.ended.insert(told.turn.clone());
        let Some(killed) = tally.hit.remove(&told.turn) else { return };
        // What came after the kill may still have been on its way: the pause is the longest after it.
        let before = told.at.iter().rposition(|at| *at <= killed).map_or(killed, |i| told.at[i]);
        let later: Vec<Instant> = told.at.iter().copied().filter(|at| *at > killed).collect();
        let starts = std::iter::once(before.max(killed)).chain(later.iter().copied());
        let pause = starts.zip(&later).map(|(from, to)| *to - from).max().unwrap_or_default();
        tally.moved.push(pause);
        *tally.by_kind.entry(kind.name).or_default() += 1;
    }

    /// Kills one process after the other until enough was moved.
    fn villain(&self, cluster: &Cluster) -> Result<()> {
        let mut random = StdRng::seed_from_u64(self.arguments.seed);
        let (controllers, agents) = (self.arguments.controllers, self.arguments.agents);
        while self.tally().moved.len() < self.arguments.moves && self.tally().failed.len() < 20 {
            cluster.wait_serving(controllers, self.served, agents as u64);
            std::thread::sleep(Duration::from_millis(random.random_range(300..1500)));
            let role = match random.random_range(0..10) {
                0..4 if controllers >= 3 => "controller",
                0..8 => "worker",
                _ => "agent",
            };
            let mut pick = |role| {
                let victims = cluster.processes(role);
                (!victims.is_empty()).then(|| victims[random.random_range(0..victims.len())].clone())
            };
            let Some(victim) = pick(role) else { continue };
            let beside = pick("agent").filter(|_| role == "controller" && victim.pid % 2 == 0);
            let stopped = role == "worker" && random.random_ratio(1, 5);
            let victims: Vec<&Process> = std::iter::once(&victim).chain(&beside).collect();
            let mut hit = Vec::new();
            for (id, admin) in cluster.admins() {
                let requests = admin.json(&["requests", "list"])?;
                victims.iter().for_each(|victim| hit.extend(streams_of(&requests, &id, victim)));
            }
            let now = Instant::now();
            // It may have ended by itself, after an earlier kill.
            for victim in victims.into_iter().filter(|victim| process::runs(victim.pid)) {
                if stopped {
                    process::stop(victim.pid)
                } else {
                    process::kill_hard(victim.pid)
                }
                self.kills.fetch_add(1, Relaxed);
            }
            let mut tally = self.tally();
            for turn in hit {
                if !tally.ended.contains(&turn) {
                    tally.hit.entry(turn).or_insert(now);
                }
            }
        }
        Ok(())
    }
}

/// The turns that a controller lists and that die with the victim.
fn streams_of(requests: &Value, controller: &str, victim: &Process) -> Vec<String> {
    let requests = requests["requests"].as_array().cloned().unwrap_or_default();
    let dies = |request: &&Value| match victim.role.as_str() {
        "controller" => controller == victim.id,
        role => request[role] == victim.id.as_str(),
    };
    requests.iter().filter(dies).filter_map(|request| request["turn"].as_str().map(str::to_owned)).collect()
}

fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map_or(0.0, Duration::as_secs_f64)
}

fn run(arguments: &Arguments) -> Result<bool> {
    let options = match arguments.model.as_str() {
        "echo" => Options::echo(arguments.controllers, arguments.agents),
        model => Options::model(model, arguments.controllers, arguments.agents),
    };
    let cluster = options.start();
    let served = if arguments.model == "echo" {
        // Slow enough to be hit in the middle.
        cluster.deploy_echo("slow", arguments.agents, 50, 20);
        "slow"
    } else {
        &arguments.model
    };
    cluster.wait_serving(arguments.controllers, served, arguments.agents as u64);
    let clients: Vec<Client> = cluster.clients().into_iter().map(|(_, client)| client).collect();
    let kinds = kinds(served).into_iter().map(|(name, body)| {
        let expected = listen(&[&clients[0]], &body).with_context(|| format!("{name}, undisturbed"))?.events;
        Ok(Kind { name, body, expected })
    });
    let kinds = kinds.collect::<Result<Vec<_>>>()?;
    let run = Run {
        arguments,
        served,
        kinds,
        tally: Mutex::default(),
        stop: AtomicBool::new(false),
        kills: AtomicU64::new(0),
    };
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..arguments.streams {
            let (run, clients) = (&run, &clients);
            scope.spawn(move || run.client(number, clients));
        }
        let ended = run.villain(&cluster);
        run.stop.store(true, Relaxed);
        ended
    })?;
    let mut tally = run.tally();
    tally.moved.sort();
    let report = json!({
        "model": arguments.model, "seed": arguments.seed, "seconds": begun.elapsed().as_secs(),
        "kills": run.kills.load(Relaxed), "streams": tally.streams, "moved": tally.moved.len(),
        "moved_by_kind": tally.by_kind, "different": tally.different.len(), "failed": tally.failed.len(),
        "pause_s": { "p50": percentile(&tally.moved, 0.5), "p99": percentile(&tally.moved, 0.99),
            "max": percentile(&tally.moved, 1.0) },
    });
    if arguments.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    tally
        .different
        .iter()
        .chain(&tally.failed)
        .take(5)
        .for_each(|what| eprintln!("{}", what.chars().take(600).collect::<String>()));
    Ok(tally.different.is_empty() && tally.failed.is_empty())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}
