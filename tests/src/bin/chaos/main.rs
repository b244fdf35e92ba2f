//! `chaos`: does harm to a cluster under running streams and compares every answer with an undisturbed one.
//!
//! Streams of many kinds (greedy and seeded, penalties, log-probabilities, two choices, stop strings that are met or only
//! half, a schema, long prompts, all of it mixed) run all the time against a real cluster, while workers and agents are
//! killed, workers stopped and an agent's link cut, until so many streams were moved. With several controllers these are
//! killed, too, half of the times with an agent; their clients repeat the request on another one and read on. Every
//! stream must say event by event what it said when nothing was harmed. The exit status is 1 if one does not. Everything
//! random comes from the seed; what the processor makes of it does not.
#![forbid(unsafe_code)]

mod kinds;
mod reader;
mod tally;
mod villain;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use izar_tests::client::Client;
use izar_tests::cluster::{Cluster, Options};
use izar_tests::far::Far;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use kinds::Kind;
use tally::Tally;
use villain::Villain;

/// A run that failed so often is over: it has shown enough.
const FAILURES: usize = 20;

/// Kills, stops and cuts off what serves running streams, and compares every answer with an undisturbed one.
#[derive(Debug, Parser)]
struct Arguments {
    /// Go on until so many streams were moved, or read on elsewhere [default: 100, unless --kills or --minutes says when
    /// it ends]
    #[arg(long)]
    moves: Option<usize>,
    /// Go on until so many controllers were killed, every second one with the agent that computes most of its streams;
    /// nothing else is harmed
    #[arg(long)]
    kills: Option<u64>,
    /// End after so many minutes at the latest
    #[arg(long)]
    minutes: Option<f64>,
    /// What is done: kill (workers, agents and, of three or more, controllers), stop (SIGSTOP to workers), sever (one
    /// agent's link loses everything for seconds); none counts what is taken for dead without reason
    #[arg(long, value_enum, value_delimiter = ',', default_value = "kill,stop")]
    faults: Vec<Fault>,
    /// Keep every core busy besides
    #[arg(long)]
    full_load: bool,
    /// What is asked when, and what is harmed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// echo, or a model with weights that `izar dev` knows
    #[arg(long, default_value = "echo")]
    model: String,
    #[arg(long, default_value_t = 3)]
    agents: usize,
    /// Three or more are killed as well
    #[arg(long, default_value_t = 1)]
    controllers: usize,
    /// Streams at once
    #[arg(long, default_value_t = 12)]
    streams: usize,
    /// As JSON on one line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fault {
    None,
    Kill,
    Stop,
    Sever,
}

impl Arguments {
    fn check(&mut self) -> Result<()> {
        if self.moves.is_none() && self.kills.is_none() && self.minutes.is_none() {
            self.moves = Some(100);
        }
        let none = self.faults.contains(&Fault::None);
        ensure!(!none || self.faults.len() == 1, "--faults: none stands alone");
        let endless = "--faults none: nothing is moved or killed; say with --minutes when it ends";
        ensure!(!none || (self.minutes.is_some() && self.moves.is_none() && self.kills.is_none()), endless);
        let controllers = self.controllers;
        ensure!(
            self.kills.is_none() || controllers >= 3,
            "--kills: {controllers} controllers have no quorum to spare; use --controllers 3"
        );
        ensure!(self.kills.is_none() || self.faults.contains(&Fault::Kill), "--kills needs kill among --faults");
        ensure!(
            !self.faults.contains(&Fault::Sever) || self.agents >= 2,
            "--faults sever: use --agents 2 or more, one is cut off"
        );
        ensure!(self.minutes.is_none_or(|minutes| minutes > 0.0), "--minutes: use more than 0");
        Ok(())
    }
}

struct Run<'a> {
    arguments: &'a Arguments,
    /// The deployment's name.
    served: &'a str,
    kinds: Vec<Kind>,
    tally: Mutex<Tally>,
    begun: Instant,
    stop: AtomicBool,
}

impl Run<'_> {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().expect("no panic while the tally is held")
    }

    /// Whether everything that was asked for has been done.
    fn is_over(&self) -> bool {
        let Arguments { moves, kills, minutes, .. } = self.arguments;
        let tally = self.tally();
        let killed = tally.by_fault.get("controller killed").copied().unwrap_or_default();
        let late = minutes.is_some_and(|minutes| self.begun.elapsed() >= Duration::from_secs_f64(60.0 * minutes));
        let goal = moves.is_some() || kills.is_some();
        let reached = moves.is_none_or(|moves| tally.moved.len() >= moves) && kills.is_none_or(|kills| killed >= kills);
        late || tally.failed.len() >= FAILURES || (goal && reached)
    }

    /// One client: asks one thing after the other.
    fn client(&self, number: usize, clients: &[Client]) {
        let clients: Vec<&Client> = (0..clients.len()).map(|i| &clients[(number + i) % clients.len()]).collect();
        let mut random = StdRng::seed_from_u64(self.arguments.seed * 1000 + number as u64);
        while !self.stop.load(Relaxed) {
            let kind = &self.kinds[random.random_range(0..self.kinds.len())];
            let told = reader::listen(&clients, &kind.body);
            let mut tally = self.tally();
            tally.streams += 1;
            match told {
                Ok(told) => tally.judge(kind, told),
                Err(error) => tally.failed.push(format!("{}: {error:#}", kind.name)),
            }
        }
    }

    /// Keeps a core busy.
    fn burn(&self) {
        let mut x = 1_u64;
        while !self.stop.load(Relaxed) {
            for _ in 0..100_000 {
                x = std::hint::black_box(x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
            }
        }
    }

    /// Runs the clients until the villain has done everything.
    fn clash(&self, cluster: &Cluster, far: Option<&Far>, clients: &[Client]) -> Result<()> {
        let burners = if self.arguments.full_load { std::thread::available_parallelism()?.get() } else { 0 };
        std::thread::scope(|scope| {
            for number in 0..self.arguments.streams {
                scope.spawn(move || self.client(number, clients));
            }
            (0..burners).for_each(|_| drop(scope.spawn(|| self.burn())));
            let random = StdRng::seed_from_u64(self.arguments.seed);
            // Also if it panics: the others would go on for ever.
            let _stop = StopAll(&self.stop);
            Villain { run: self, cluster, far, random, queue: Vec::new() }.rage()
        })
    }
}

/// Makes clients and burners end when it is dropped.
struct StopAll<'a>(&'a AtomicBool);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Starts the cluster; with links to cut, one of its agents is far away. Returns what is served there.
fn start(arguments: &Arguments) -> Result<(Cluster, Option<Far>, String)> {
    let severs = arguments.faults.contains(&Fault::Sever);
    let near = arguments.agents - usize::from(severs);
    let options = match arguments.model.as_str() {
        "echo" => Options::echo(arguments.controllers, near),
        model => Options::model(model, arguments.controllers, near),
    };
    let cluster = options.start();
    let far = severs.then(|| Far::start(&cluster, "far"));
    let replicas = arguments.agents;
    let served = if arguments.model == "echo" {
        // Slow enough to be hit in the middle.
        cluster.admin().deploy_echo("slow", replicas, 50, 20);
        "slow"
    } else {
        cluster.admin().json(&["models", "deploy", &arguments.model, "--replicas", &replicas.to_string()])?;
        &arguments.model
    };
    cluster.wait_serving(arguments.controllers, served, replicas as u64);
    Ok((cluster, far, served.to_owned()))
}

fn run(arguments: &Arguments) -> Result<bool> {
    let (cluster, far, served) = start(arguments)?;
    let clients: Vec<Client> = cluster.clients().into_iter().map(|(_, client)| client).collect();
    let kinds = kinds::undisturbed(&clients[0], &served, arguments.model != "echo")?;
    let (tally, stop, begun) = (Mutex::default(), AtomicBool::new(false), Instant::now());
    let run = Run { arguments, served: &served, kinds, tally, begun, stop };
    run.clash(&cluster, far.as_ref(), &clients)?;
    let mut tally = run.tally();
    let mut report = json!({
        "model": arguments.model, "seed": arguments.seed, "seconds": begun.elapsed().as_secs(),
        "controllers": arguments.controllers, "agents": arguments.agents, "clients": arguments.streams,
    });
    report.as_object_mut().expect("an object").extend(tally.report().as_object().expect("an object").clone());
    let mut good = tally.different.is_empty() && tally.failed.is_empty();
    if arguments.faults == [Fault::None] {
        let alarms = villain::alarms(&cluster, &clients)?;
        good &= alarms.iter().all(|(_, count)| *count == 0);
        report["false_alarms"] = json!(alarms.into_iter().collect::<std::collections::BTreeMap<_, _>>());
    }
    if arguments.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    for what in tally.different.iter().chain(&tally.failed).take(5) {
        eprintln!("{}", what.chars().take(600).collect::<String>());
    }
    Ok(good)
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    match arguments.check().and_then(|()| run(&arguments)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(line: &str) -> Result<Arguments> {
        let mut arguments = Arguments::try_parse_from(["chaos"].into_iter().chain(line.split_whitespace()))?;
        arguments.check().map(|()| arguments)
    }

    #[test]
    fn what_has_no_end_or_no_sense_is_refused_by_name() {
        assert_eq!(checked("").unwrap().moves, Some(100));
        assert_eq!(checked("--kills 5 --controllers 3").unwrap().moves, None);
        assert_eq!(checked("--faults none --minutes 1").unwrap().faults, [Fault::None]);
        for (line, part) in [
            ("--faults none", "--minutes"),
            ("--faults none,kill --minutes 1", "none stands alone"),
            ("--faults none --minutes 1 --moves 3", "--minutes"),
            ("--kills 5", "--controllers 3"),
            ("--kills 5 --controllers 3 --faults stop", "--kills needs kill"),
            ("--faults sever --agents 1", "--agents 2"),
            ("--minutes 0", "--minutes"),
        ] {
            let error = checked(line).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
