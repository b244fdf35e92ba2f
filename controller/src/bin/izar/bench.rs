//! `izar bench api`: drives any OpenAI endpoint and tells rates, times and errors; the others become `izar-agent bench`.
//!
//! The generator is lean (own HTTP/1.1 on kept connections, scanning instead of parsing JSON) and says what it costs
//! itself, so that a figure is not the generator's: `--ceiling` measures it alone, against canned answers.

mod agent;
mod ceiling;
mod client;
mod cpu;
mod load;
mod overload;
mod parser;
mod report;
mod schedule;
mod stats;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::http::Endpoint;
use crate::ready::Ready;
use crate::show;
use client::{Requests, Targets};
use load::{Load, Loop, Until};
use report::{About, Report};
use schedule::Arrivals;

/// More generator threads than this measure the machine.
const MAX_THREADS: usize = 16;

/// Different requests of a mixed load; after them it begins anew, when a cache of usual size has long forgotten the first.
const MIXED: usize = 2_000;

/// Different beginnings of requests; more fit no cache.
const MAX_PREFIXES: usize = 1_000;

/// Connections of one run; each costs two file descriptors and some tens of KiB on both sides.
const MAX_CONCURRENCY: usize = 10_000;

/// Connections when nobody says how many: in the closed loop, and at most in the open one.
const CLOSED_CONNECTIONS: usize = 32;
const OPEN_CONNECTIONS: usize = 256;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Drive an OpenAI endpoint: closed loop (--concurrency) or open loop (--rate)
    Api(Box<Options>),
    /// Ask for more than an endpoint can do, with deadlines and several keys, and see what it makes of it
    Overload(Box<overload::Options>),
    /// Measure the engine alone, on this machine: rates, time to first token, memory
    #[command(disable_help_flag = true)]
    Engine(agent::Options),
    /// Compare the forms of a model's weights: memory, perplexity, speed
    #[command(disable_help_flag = true)]
    Quality(agent::Options),
    /// Compare greedy answers with those of another program for the same weights
    #[command(disable_help_flag = true)]
    Greedy(agent::Options),
    /// Measure urgent jobs beside a full load of batch jobs
    #[command(disable_help_flag = true)]
    Urgent(agent::Options),
}

#[derive(Debug, Args)]
pub struct Options {
    /// The API, https://host:port or http://host:port; several (also separated by commas) are used in turn, and a stream
    /// that breaks off at one is read on at the next [default: the ready file's, its others for reading on]
    #[arg(long = "endpoint", value_name = "URL", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// The CA's file, for https [default: the ready file's]
    #[arg(long)]
    ca: Option<PathBuf>,
    /// The key [default: $IZAR_KEY, else the ready file's]
    #[arg(long)]
    key: Option<String>,
    /// What `izar dev --ready-file` wrote: endpoint, CA, key, model and the processes whose CPU time is shown
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// The model [default: the ready file's, else echo]
    #[arg(long)]
    model: Option<String>,
    /// Length of the prompt: bytes for the model `echo` (one is one token), short words for others
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 16)]
    max_tokens: u32,
    /// Ask for streamed answers
    #[arg(long)]
    stream: bool,
    /// Connections: each asks again as soon as it is answered [default: 32; with --rate 256, as many as are needed]
    #[arg(long)]
    concurrency: Option<usize>,
    /// Requests begun each second, whether or not earlier ones are answered
    #[arg(long)]
    rate: Option<f64>,
    /// With --rate: how arrivals are spread
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
    arrivals: Arrivals,
    /// Ask requests of all sizes, hardly two alike: prompts and answers of 1 to twice as many tokens as said
    #[arg(long)]
    mixed: bool,
    /// Begin each request with one of so many long texts (a system message), to see what caches of prefixes do
    #[arg(long, conflicts_with_all = ["mixed", "ceiling"])]
    prefixes: Option<usize>,
    /// With --prefixes: their length, counted like --prompt-tokens
    #[arg(long, default_value_t = 1_000)]
    prefix_tokens: usize,
    /// The seed of the arrivals with --rate, and of the requests with --mixed or --prefixes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Measure this many requests
    #[arg(long, conflicts_with = "duration")]
    requests: Option<u64>,
    /// Measure this many seconds [default: 10]
    #[arg(long)]
    duration: Option<f64>,
    /// Seconds before measuring begins
    #[arg(long, default_value_t = 2.0)]
    warmup: f64,
    /// Seconds after which a request is given up
    #[arg(long, default_value_t = 60.0)]
    timeout: f64,
    /// Also show latency less this: what the worker itself takes, in milliseconds
    #[arg(long, value_name = "MS")]
    subtract_ms: Option<f64>,
    /// Write the request ids of the answers that were counted into this file, a line each: what `izar turns list` must have
    #[arg(long, value_name = "FILE", conflicts_with = "ceiling")]
    ids: Option<PathBuf>,
    /// Threads of the generator
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Show CPU seconds of these processes [default: the ready file's]
    #[arg(long, value_delimiter = ',')]
    pids: Vec<u32>,
    /// Measure the generator alone, against canned answers over TLS in this process
    #[arg(long, conflicts_with_all = ["endpoints", "ready_file", "pids"])]
    ceiling: bool,
}

pub fn run(command: Command, as_json: bool) -> anyhow::Result<()> {
    let options = match command {
        Command::Api(options) => options,
        Command::Overload(options) => return overload::run(&options, as_json),
        Command::Engine(options) => return agent::run("engine", options, as_json),
        Command::Quality(options) => return agent::run("quality", options, as_json),
        Command::Greedy(options) => return agent::run("greedy", options, as_json),
        Command::Urgent(options) => return agent::run("urgent", options, as_json),
    };
    options.check()?;
    let report = if options.ceiling { ceiling(&options)? } else { measure(&options)? };
    show::print(as_json, &report, Report::text)
}

impl Options {
    fn check(&self) -> anyhow::Result<()> {
        ensure!((1..=MAX_THREADS).contains(&self.threads), "--threads {}: use 1 to {MAX_THREADS}", self.threads);
        let connections = self.connections();
        ensure!(
            (1..=MAX_CONCURRENCY).contains(&connections),
            "--concurrency {connections}: use 1 to {MAX_CONCURRENCY}"
        );
        if let Some(rate) = self.rate {
            ensure!(rate > 0.0 && rate <= 1e6, "--rate {rate}: use more than 0, and at most 1000000");
        }
        ensure!(self.requests != Some(0), "--requests 0: nothing would be measured");
        let seconds = |flag: &str, value: f64, least: f64| {
            ensure!((least..=86_400.0).contains(&value), "{flag} {value}: use {least} to 86400 seconds");
            Ok(())
        };
        seconds("--duration", self.duration.unwrap_or(10.0), 0.1)?;
        seconds("--warmup", self.warmup, 0.0)?;
        seconds("--timeout", self.timeout, 0.01)?;
        ensure!(self.prompt_tokens >= 1 && self.prompt_tokens <= 1 << 20, "--prompt-tokens: use 1 to {}", 1 << 20);
        let prefixes = self.prefixes.unwrap_or(1);
        ensure!((1..=MAX_PREFIXES).contains(&prefixes), "--prefixes {prefixes}: use 1 to {MAX_PREFIXES}");
        ensure!(self.prefix_tokens >= 1 && self.prefix_tokens <= 1 << 20, "--prefix-tokens: use 1 to {}", 1 << 20);
        ensure!(self.max_tokens >= 1, "--max-tokens 0: an answer has at least one token");
        Ok(())
    }

    fn connections(&self) -> usize {
        let default = if self.rate.is_some() { OPEN_CONNECTIONS } else { CLOSED_CONNECTIONS };
        self.concurrency.unwrap_or(default)
    }

    /// `spread`: so many of the endpoints are used in turn.
    fn load(&self, endpoints: Vec<Endpoint>, spread: usize, model: &str, key: &str) -> Load {
        let until = match self.requests {
            Some(requests) => Until::Requests(requests),
            None => Until::Elapsed(Duration::from_secs_f64(self.duration.unwrap_or(10.0))),
        };
        let how = match self.rate {
            Some(rate) => Loop::Open { rate, arrivals: self.arrivals, seed: self.seed },
            None => Loop::Closed,
        };
        let target = |endpoint: Endpoint| {
            let requests = Requests::new(self.requests(&endpoint, model, key));
            (endpoint, requests)
        };
        Load {
            targets: Targets::new(endpoints.into_iter().map(target).collect()).into(),
            spread,
            connections: self.connections(),
            threads: self.threads.min(self.connections()),
            how,
            until,
            warmup: Duration::from_secs_f64(self.warmup),
            timeout: Duration::from_secs_f64(self.timeout),
            keep_ids: self.ids.is_some(),
        }
    }

    /// The bytes of the requests that are sent in turn.
    fn requests(&self, endpoint: &Endpoint, model: &str, key: &str) -> Vec<Vec<u8>> {
        let user = |text| json!({ "role": "user", "content": text });
        let mut random = StdRng::seed_from_u64(self.seed);
        if let Some(prefixes) = self.prefixes {
            let system = |_| prompt(model, self.prefix_tokens, Some(&mut random));
            let systems: Vec<String> = (0..prefixes).map(system).collect();
            // Each of the beginnings first, in turn; then in any order.
            let requests = (0..MIXED.max(prefixes)).map(|i| {
                let system = if i < prefixes { i } else { random.random_range(0..prefixes) };
                let text = prompt(model, self.prompt_tokens, Some(&mut random));
                let messages = json!([{ "role": "system", "content": systems[system] }, user(text)]);
                self.request(endpoint, model, key, messages, self.max_tokens)
            });
            return requests.collect();
        }
        if !self.mixed {
            let text = prompt(model, self.prompt_tokens, None);
            return vec![self.request(endpoint, model, key, json!([user(text)]), self.max_tokens)];
        }
        let requests = (0..MIXED).map(|_| {
            let text = prompt(model, random.random_range(1..=2 * self.prompt_tokens), Some(&mut random));
            self.request(endpoint, model, key, json!([user(text)]), random.random_range(1..=2 * self.max_tokens))
        });
        requests.collect()
    }
    fn request(&self, endpoint: &Endpoint, model: &str, key: &str, messages: Value, max_tokens: u32) -> Vec<u8> {
        let mut body = json!({
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": self.stream,
        });
        if self.prefixes.is_some() && self.stream {
            body["stream_options"] = json!({ "include_usage": true });
        }
        let body = body.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            endpoint.authority(),
            body.len()
        );
        (head + &body).into_bytes()
    }

    fn about(&self, endpoints: Vec<String>, model: String) -> About {
        About {
            endpoints,
            model,
            prompt_tokens: self.prompt_tokens,
            prefixes: self.prefixes,
            prefix_tokens: self.prefixes.map(|_| self.prefix_tokens),
            max_tokens: self.max_tokens,
            stream: self.stream,
            connections: self.connections(),
            rate: self.rate,
            seed: self.rate.map(|_| self.seed),
            warmup_s: self.warmup,
            threads: self.threads,
            subtract_ms: self.subtract_ms,
            ceiling: self.ceiling,
        }
    }
}

/// Text of about this many tokens, with words in the same order each time or in any.
fn prompt(model: &str, tokens: usize, random: Option<&mut StdRng>) -> String {
    const WORDS: [&str; 8] = ["the ", "sea ", "is ", "calm ", "and ", "far ", "from ", "here "];
    let words: Vec<&str> = match random {
        None => WORDS.iter().copied().cycle().take(tokens).collect(),
        Some(random) => (0..tokens).map(|_| WORDS[random.random_range(0..WORDS.len())]).collect(),
    };
    if model == "echo" { words.iter().flat_map(|w| w.chars()).take(tokens).collect() } else { words.concat() }
}

fn measure(options: &Options) -> anyhow::Result<Report> {
    let ready = options.ready_file.as_deref().map(Ready::read).transpose()?;
    let (urls, spread) = match (&ready, options.endpoints.is_empty()) {
        (Some(ready), true) => (ready.endpoints(), 1),
        _ => (options.endpoints.clone(), options.endpoints.len()),
    };
    ensure!(!urls.is_empty(), "no endpoint: give --endpoint or --ready-file");
    let ca = options.ca.clone().or_else(|| ready.as_ref().map(|r| r.ca.clone()));
    let key = options
        .key
        .clone()
        .or_else(|| std::env::var("IZAR_KEY").ok())
        .or_else(|| ready.as_ref().map(|r| r.key.clone()))
        .context("no key: give --key, IZAR_KEY or --ready-file")?;
    ensure!(key.bytes().all(|b| b.is_ascii_graphic()), "--key: a key is one word of visible characters");
    let model = options.model.clone().or_else(|| ready.as_ref().map(|r| r.model.clone()));
    let model = model.unwrap_or_else(|| "echo".to_owned());
    let endpoints: Vec<Endpoint> =
        urls.iter().map(|url| Endpoint::new(url, ca.as_deref())).collect::<anyhow::Result<_>>()?;
    let mut watched: Vec<cpu::Watched> = options.pids.iter().map(|&pid| cpu::Watched::pid(pid)).collect();
    if let (Some(ready), true) = (&ready, watched.is_empty()) {
        watched = ready.processes.iter().map(|p| cpu::Watched { name: p.id.clone(), pid: p.pid }).collect();
    }
    let write = |ids: String| match &options.ids {
        Some(path) => std::fs::write(path, ids).with_context(|| format!("--ids {}: write", path.display())),
        None => Ok(()),
    };
    // Before there is anything to lose.
    write(String::new())?;
    let measured = load::run(options.load(endpoints, spread, &model, &key), &watched)?;
    write(measured.stats.answered.iter().flatten().map(|id| id.clone() + "\n").collect())?;
    Ok(Report::new(options.about(urls[..spread].to_vec(), model), measured))
}

fn ceiling(options: &Options) -> anyhow::Result<Report> {
    let server = ceiling::Server::start(options.max_tokens, options.stream)?;
    let url = server.url();
    let endpoint = Endpoint::new(&url, Some(server.ca()))?;
    let measured = load::run(options.load(vec![endpoint], 1, "echo", "none"), &[])?;
    Ok(Report::new(options.about(vec![url], "canned".to_owned()), measured))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &[&str]) -> Options {
        Line::parse_from(["api"].iter().chain(arguments)).options
    }

    #[test]
    fn arguments_out_of_range_are_named() {
        for (arguments, part) in [
            (["--threads", "0"], "--threads 0"),
            (["--concurrency", "0"], "--concurrency 0"),
            (["--rate", "0"], "--rate 0"),
            (["--requests", "0"], "--requests 0"),
            (["--duration", "0"], "--duration 0"),
            (["--prompt-tokens", "0"], "--prompt-tokens"),
            (["--prefixes", "0"], "--prefixes 0"),
            (["--prefix-tokens", "0"], "--prefix-tokens"),
        ] {
            let error = options(&arguments).check().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        options(&[]).check().unwrap();
        assert!(Line::try_parse_from(["api", "--requests", "1", "--duration", "1"]).is_err());
    }

    #[test]
    fn an_echo_prompt_has_a_byte_for_a_token() {
        assert_eq!(prompt("echo", 32, None).len(), 32);
        assert_eq!(prompt("smollm2-135m", 9, None).split_whitespace().count(), 9);
    }

    #[test]
    fn mixed_requests_are_all_different_and_the_same_each_time() {
        let all = |seed| {
            let options = options(&["--mixed", "--prompt-tokens", "64", "--seed", seed]);
            options.requests(&Endpoint::new("http://h:1", None).unwrap(), "smollm2-135m", "k")
        };
        let (first, again) = (all("1"), all("1"));
        assert!(first == again && first != all("2"));
        let lengths: std::collections::BTreeSet<usize> = first.iter().map(Vec::len).collect();
        assert!(first.len() == MIXED && lengths.len() > 100, "{} lengths", lengths.len());
    }

    #[test]
    fn shared_beginnings_come_in_turn_and_then_in_any_order() {
        let options = options(&["--prefixes", "3", "--prefix-tokens", "50", "--prompt-tokens", "5", "--stream"]);
        let requests = options.requests(&Endpoint::new("http://h:1", None).unwrap(), "smollm2-135m", "k");
        let body = |request: &Vec<u8>| -> Value {
            let text = String::from_utf8(request.clone()).unwrap();
            serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
        };
        let bodies: Vec<Value> = requests.iter().map(body).collect();
        let message = |body: &Value, i: usize| body["messages"][i]["content"].as_str().unwrap().to_owned();
        let systems: std::collections::BTreeSet<String> = bodies.iter().map(|body| message(body, 0)).collect();
        let first: std::collections::BTreeSet<String> = bodies[..3].iter().map(|body| message(body, 0)).collect();
        assert!(systems.len() == 3 && first == systems, "{systems:?}");
        assert_eq!((message(&bodies[0], 0).split(' ').count(), message(&bodies[0], 1).split(' ').count()), (51, 6));
        assert_eq!(bodies[9]["stream_options"]["include_usage"], true);
    }

    #[test]
    fn a_request_says_its_own_length() {
        let options = options(&["--stream"]);
        let bytes = options.requests(&Endpoint::new("http://h:1", None).unwrap(), "echo", "k").remove(0);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())));
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["stream"], true);
    }

    /// Drives the generator against its own canned server: the whole path without a cluster.
    #[test]
    fn the_ceiling_counts_every_request_and_token() {
        for (stream, how) in [(false, None), (true, None), (true, Some("2000"))] {
            let mut arguments = vec!["--ceiling", "--requests", "200", "--warmup", "0", "--concurrency", "4"];
            if stream {
                arguments.push("--stream");
            }
            if let Some(rate) = how {
                arguments.extend(["--rate", rate]);
            }
            let report = ceiling(&options(&arguments)).unwrap();
            assert_eq!((report.requests, report.tokens), (200, 3200), "{arguments:?}: {report:?}");
            assert!(report.errors.is_empty(), "{:?}", report.errors);
            assert_eq!(report.ttft_ms.is_some(), stream);
            assert_eq!(report.from_schedule_ms.is_some(), how.is_some());
        }
    }
}
