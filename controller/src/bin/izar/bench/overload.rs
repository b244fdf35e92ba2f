//! `izar bench overload`: asks for a multiple of what an endpoint can do, with several keys, classes and deadlines, and
//! tells what became of it: whether what was accepted met its deadline, how soon the rest was refused, and whether every
//! key got its share.
//!
//! Open loop: requests arrive at their times, whatever becomes of the others. What the endpoint can do is measured before,
//! in a closed loop of the same requests, unless it is given.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::json;

use super::client::{Client, Requests, Sample, Targets};
use super::load::{self, Load, Loop, Until};
use super::schedule::{Arrivals, Schedule};
use super::stats::{Percentiles, Times};
use crate::http::Endpoint;
use crate::ready::Ready;
use crate::show;

/// Requests under way at most: what is due beyond them is not sent, and said.
const AT_ONCE: usize = 8_000;

/// What a refusal may take.
const REFUSAL: Duration = Duration::from_millis(50);

/// An urgent request as the class is meant: a long question, a short answer, 200 ms.
const URGENT_PROMPT: usize = 128;
const URGENT_TOKENS: u32 = 8;
const URGENT_MS: u64 = 200;

#[derive(Debug, Args)]
pub struct Options {
    /// The API [default: the ready file's]
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The CA's file, for https [default: the ready file's]
    #[arg(long)]
    ca: Option<PathBuf>,
    /// What `izar dev --ready-file` wrote
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// The model [default: the ready file's, else echo]
    #[arg(long)]
    model: Option<String>,
    /// A key, and its tenant's weight after a colon; give it for each tenant [default: the ready file's key]
    #[arg(long = "key", value_name = "KEY[:WEIGHT]")]
    keys: Vec<String>,
    /// How many times as much the first key asks as each other one
    #[arg(long, default_value_t = 1.0)]
    greed: f64,
    /// A key of a project of class urgent; its requests (128 tokens in, 8 out, 200 ms) come on top
    #[arg(long, value_name = "KEY")]
    urgent: Option<String>,
    /// Urgent requests a second
    #[arg(long, default_value_t = 5.0)]
    urgent_rate: f64,
    /// How many times what it can do is asked of it
    #[arg(long, default_value_t = 2.0)]
    times: f64,
    /// What it can do, in requests a second [default: measured]
    #[arg(long)]
    capacity: Option<f64>,
    /// Part of the requests that is of class batch, without a deadline
    #[arg(long, default_value_t = 0.1)]
    batch: f64,
    /// Deadlines in milliseconds that the other requests have in any order; 0 is none
    #[arg(long, value_delimiter = ',', default_value = "0,300,600,1000,2000,4000")]
    deadlines: Vec<u64>,
    /// Prompts of 1 to twice as many tokens
    #[arg(long, default_value_t = 64)]
    prompt_tokens: usize,
    /// Answers of 1 to twice as many tokens
    #[arg(long, default_value_t = 16)]
    max_tokens: u32,
    /// Seconds of overload that are measured
    #[arg(long, default_value_t = 20.0)]
    duration: f64,
    /// Seconds of overload before that
    #[arg(long, default_value_t = 5.0)]
    warmup: f64,
    /// Connections of the closed loop that measures what it can do
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One request, before it is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    kind: Kind,
    prompt_tokens: usize,
    max_tokens: u32,
    deadline_ms: u64,
}

/// Whose request it is, and how urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Interactive(usize),
    Batch(usize),
    Urgent,
}

/// What became of a request.
#[derive(Debug, Clone, Copy)]
struct Seen {
    plan: Plan,
    /// `None`: there was no answer.
    status: Option<u16>,
    took: Duration,
    tokens: u32,
}

/// Requests of one kind.
#[derive(Debug, Default, Serialize)]
pub struct Group {
    pub name: String,
    pub sent: u64,
    pub accepted: u64,
    pub refused: u64,
    pub failed: u64,
    /// Accepted ones with a deadline, and those of them that met it.
    pub hurried: u64,
    pub met: u64,
    /// Of accepted ones, in milliseconds.
    pub latency_ms: Option<Percentiles>,
}

/// What a key got.
#[derive(Debug, Serialize)]
pub struct Share {
    pub key: String,
    /// Tokens of prompts and answers.
    pub tokens: u64,
    pub got: f64,
    pub fair: f64,
}

/// What came of the overload.
#[derive(Debug, Serialize)]
pub struct Report {
    pub endpoint: String,
    pub model: String,
    pub capacity_per_s: f64,
    pub asked_per_s: f64,
    pub seconds: f64,
    pub seed: u64,
    pub not_sent: u64,
    pub groups: Vec<Group>,
    pub shares: Vec<Share>,
    /// Times of refusals, in milliseconds, and how many took longer than 50.
    pub refusal_ms: Option<Percentiles>,
    pub late_refusals: u64,
}

impl Options {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.times > 0.0 && self.times <= 100.0, "--times {}: use more than 0, and at most 100", self.times);
        ensure!((0.0..=1.0).contains(&self.batch), "--batch {}: use 0 to 1", self.batch);
        ensure!(self.greed >= 1.0, "--greed {}: use 1 or more", self.greed);
        ensure!(self.duration >= 1.0 && self.warmup >= 0.0, "--duration: use at least 1, --warmup: at least 0");
        ensure!(self.capacity.is_none_or(|rate| rate > 0.0 && rate <= 1e5), "--capacity: use more than 0");
        ensure!(self.urgent_rate > 0.0 && self.urgent_rate <= 1e4, "--urgent-rate: use more than 0");
        ensure!(self.prompt_tokens >= 1 && self.max_tokens >= 1, "--prompt-tokens and --max-tokens: use at least 1");
        ensure!((1..=10_000).contains(&self.concurrency), "--concurrency {}: use 1 to 10000", self.concurrency);
        ensure!(!self.deadlines.is_empty(), "--deadlines: give at least one");
        Ok(())
    }
}

/// Where to ask, as whom.
struct Target {
    endpoint: Endpoint,
    model: String,
    keys: Vec<(String, u32)>,
    urgent: Option<String>,
}

impl Target {
    /// For a client that is given its requests one by one.
    fn alone(&self) -> Arc<Targets> {
        Targets::new(vec![(self.endpoint.clone(), Requests::new(vec![Vec::new()]))]).into()
    }

    fn key(&self, kind: Kind) -> &str {
        match kind {
            Kind::Interactive(tenant) | Kind::Batch(tenant) => &self.keys[tenant].0,
            Kind::Urgent => self.urgent.as_deref().expect("urgent requests have a key"),
        }
    }

    fn request(&self, plan: &Plan) -> Vec<u8> {
        let body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": super::prompt(&self.model, plan.prompt_tokens, None) }],
            "max_tokens": plan.max_tokens,
            "temperature": 0,
        })
        .to_string();
        let deadline = match plan.deadline_ms {
            0 => String::new(),
            ms => format!("x-izar-deadline-ms: {ms}\r\n"),
        };
        let class = if matches!(plan.kind, Kind::Batch(_)) { "x-izar-class: batch\r\n" } else { "" };
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n{deadline}{class}\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.endpoint.authority(),
            self.key(plan.kind),
            body.len()
        );
        (head + &body).into_bytes()
    }
}

/// Draws requests.
struct Draw<'a> {
    options: &'a Options,
    tenants: usize,
    random: StdRng,
}

impl Draw<'_> {
    fn next(&mut self) -> Plan {
        let (options, random) = (self.options, &mut self.random);
        // The first counts as many times as it is greedy.
        let pick = random.random_range(0.0..options.greed + (self.tenants - 1) as f64);
        let tenant = if pick < options.greed { 0 } else { 1 + (pick - options.greed) as usize };
        let batch = random.random::<f64>() < options.batch;
        let deadline = options.deadlines[random.random_range(0..options.deadlines.len())];
        Plan {
            kind: if batch { Kind::Batch(tenant) } else { Kind::Interactive(tenant) },
            prompt_tokens: random.random_range(1..=2 * options.prompt_tokens),
            max_tokens: random.random_range(1..=2 * options.max_tokens),
            deadline_ms: if batch { 0 } else { deadline },
        }
    }
}

const URGENT: Plan =
    Plan { kind: Kind::Urgent, prompt_tokens: URGENT_PROMPT, max_tokens: URGENT_TOKENS, deadline_ms: URGENT_MS };

pub fn run(options: &Options, as_json: bool) -> anyhow::Result<()> {
    options.check()?;
    let ready = options.ready_file.as_deref().map(Ready::read).transpose()?;
    let url = options.endpoint.clone().or_else(|| ready.as_ref().map(|r| r.endpoint.clone()));
    let url = url.context("no endpoint: give --endpoint or --ready-file")?;
    let ca = options.ca.clone().or_else(|| ready.as_ref().map(|r| r.ca.clone()));
    let mut keys = options.keys.iter().map(|key| weighted(key)).collect::<anyhow::Result<Vec<_>>>()?;
    if keys.is_empty() {
        let key = ready.as_ref().map(|r| r.key.clone()).context("no key: give --key or --ready-file")?;
        keys.push((key, 1));
    }
    let model = options.model.clone().or_else(|| ready.as_ref().map(|r| r.model.clone()));
    let model = model.unwrap_or_else(|| "echo".to_owned());
    let endpoint = Endpoint::new(&url, ca.as_deref())?;
    let target = Arc::new(Target { endpoint, model, keys, urgent: options.urgent.clone() });
    let capacity = options.capacity.map_or_else(|| capacity(options, &target), Ok)?;
    let rate = options.times * capacity;
    let (seen, not_sent) = overload(options, &target, rate)?;
    let report = Report {
        endpoint: url,
        model: target.model.clone(),
        capacity_per_s: capacity,
        asked_per_s: rate,
        seconds: options.duration,
        seed: options.seed,
        not_sent,
        ..summarize(&seen, &target.keys.iter().map(|(_, weight)| *weight).collect::<Vec<_>>())
    };
    show::print(as_json, &report, Report::text)
}

fn weighted(text: &str) -> anyhow::Result<(String, u32)> {
    let (key, weight) = text.split_once(':').unwrap_or((text, "1"));
    let weight: u32 =
        weight.parse().ok().filter(|weight| *weight > 0).context("--key: a weight is a number above 0")?;
    ensure!(!key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic()), "--key: a key is one word");
    Ok((key.to_owned(), weight))
}

/// Measures how many such requests a second are answered when as many are asked as are answered.
fn capacity(options: &Options, target: &Target) -> anyhow::Result<f64> {
    let mut draw = Draw { options, tenants: target.keys.len(), random: StdRng::seed_from_u64(options.seed) };
    let patient = |mut plan: Plan| {
        (plan.kind, plan.deadline_ms) = match plan.kind {
            Kind::Batch(tenant) => (Kind::Interactive(tenant), 0),
            kind => (kind, 0),
        };
        plan
    };
    let requests = (0..2_000).map(|_| target.request(&patient(draw.next()))).collect();
    let measured = load::run(
        Load {
            targets: Targets::new(vec![(target.endpoint.clone(), Requests::new(requests))]).into(),
            spread: 1,
            connections: options.concurrency,
            threads: 1,
            how: Loop::Closed,
            until: Until::Elapsed(Duration::from_secs(5)),
            warmup: Duration::from_secs(2),
            timeout: Duration::from_secs(60),
            keep_ids: false,
        },
        &[],
    )?;
    let stats = measured.stats;
    ensure!(stats.requests > 0, "nothing was answered: {:?}", stats.errors);
    ensure!(
        stats.errors.is_empty(),
        "measuring what it can do failed ({:?}); give less --concurrency, or --capacity",
        stats.errors
    );
    Ok(stats.requests as f64 / measured.seconds)
}

/// Sends every request at its time; returns what became of those after the warm-up.
fn overload(options: &Options, target: &Arc<Target>, rate: f64) -> anyhow::Result<(Vec<Seen>, u64)> {
    let mut draw = Draw { options, tenants: target.keys.len(), random: StdRng::seed_from_u64(options.seed + 1) };
    let end = options.warmup + options.duration;
    let within = |offset: &Duration| offset.as_secs_f64() < end;
    let mut due: Vec<(Duration, Plan)> = Schedule::new(Arrivals::Poisson, rate, options.seed)
        .take_while(within)
        .map(|offset| (offset, draw.next()))
        .collect();
    if target.urgent.is_some() {
        let urgent = Schedule::new(Arrivals::Poisson, options.urgent_rate, options.seed + 2);
        due.extend(urgent.take_while(within).map(|offset| (offset, URGENT)));
    }
    due.sort_by_key(|(offset, _)| *offset);
    let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
    let warm = Duration::from_secs_f64(options.warmup);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let not_sent = runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        let (pool, start): (Arc<Mutex<Vec<Client>>>, _) = (Arc::default(), tokio::time::Instant::now());
        let mut not_sent = 0;
        for (offset, plan) in due {
            tokio::time::sleep_until(start + offset).await;
            while tasks.try_join_next().is_some() {}
            if tasks.len() >= AT_ONCE {
                not_sent += 1;
                continue;
            }
            let (target, pool, seen) = (target.clone(), pool.clone(), seen.clone());
            tasks.spawn(async move {
                let one = send(&target, &pool, plan).await;
                if offset >= warm {
                    seen.lock().expect("no panic while the list is held").push(one);
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        not_sent
    });
    let seen = std::mem::take(&mut *seen.lock().expect("all tasks have ended"));
    Ok((seen, not_sent))
}

/// Sends one request on a kept connection, or on a new one, whose making is not counted.
async fn send(target: &Target, pool: &Mutex<Vec<Client>>, plan: Plan) -> Seen {
    let request = target.request(&plan);
    let kept = pool.lock().expect("no panic while the pool is held").pop();
    let mut client = match kept {
        Some(client) => client,
        None => {
            let mut client = Client::new(target.alone(), 0);
            if client.connect().await.is_err() {
                return Seen { plan, status: None, took: Duration::ZERO, tokens: 0 };
            }
            client
        }
    };
    let (mut sample, sent) = (Sample::default(), Instant::now());
    // Longer than the server lets anybody wait who is not of class batch.
    let answered = tokio::time::timeout(Duration::from_secs(180), client.ask(&request, &mut sample)).await;
    let took = sent.elapsed();
    match answered {
        Ok(Ok(())) => {
            pool.lock().expect("no panic while the pool is held").push(client);
            Seen { plan, status: Some(sample.status), took, tokens: sample.tokens }
        }
        _ => Seen { plan, status: None, took, tokens: 0 },
    }
}

/// Puts together what was seen. Pure. What it does not know is left empty.
fn summarize(seen: &[Seen], weights: &[u32]) -> Report {
    let mut groups: Vec<(Group, Times)> = Vec::new();
    let (mut refusals, mut late_refusals) = (Times::default(), 0);
    let mut tokens = vec![0u64; weights.len()];
    for one in seen {
        let name = match one.plan.kind {
            Kind::Urgent => "urgent".to_owned(),
            Kind::Batch(_) => "batch".to_owned(),
            Kind::Interactive(_) if one.plan.deadline_ms == 0 => "interactive".to_owned(),
            Kind::Interactive(_) => format!("interactive, {} ms", one.plan.deadline_ms),
        };
        let at = groups.iter().position(|(group, _)| group.name == name).unwrap_or_else(|| {
            groups.push((Group { name, ..Group::default() }, Times::default()));
            groups.len() - 1
        });
        let (group, times) = &mut groups[at];
        group.sent += 1;
        match one.status {
            Some(200) => {
                group.accepted += 1;
                times.record(one.took);
                if one.plan.deadline_ms > 0 {
                    group.hurried += 1;
                    group.met += u64::from(one.took <= Duration::from_millis(one.plan.deadline_ms));
                }
                if let Kind::Interactive(tenant) | Kind::Batch(tenant) = one.plan.kind {
                    tokens[tenant] += one.plan.prompt_tokens as u64 + u64::from(one.tokens);
                }
            }
            Some(429 | 503) => {
                group.refused += 1;
                refusals.record(one.took);
                late_refusals += u64::from(one.took > REFUSAL);
            }
            _ => group.failed += 1,
        }
    }
    groups.sort_by(|a, b| (a.0.name.len(), &a.0.name).cmp(&(b.0.name.len(), &b.0.name)));
    let (all, weight) = (tokens.iter().sum::<u64>().max(1) as f64, weights.iter().sum::<u32>().max(1));
    let share = |(at, tokens): (usize, &u64)| Share {
        key: (at + 1).to_string(),
        tokens: *tokens,
        got: *tokens as f64 / all,
        fair: f64::from(weights[at]) / f64::from(weight),
    };
    Report {
        endpoint: String::new(),
        model: String::new(),
        capacity_per_s: 0.0,
        asked_per_s: 0.0,
        seconds: 0.0,
        seed: 0,
        not_sent: 0,
        shares: tokens.iter().enumerate().map(share).collect(),
        refusal_ms: refusals.percentiles(),
        late_refusals,
        groups: groups.into_iter().map(|(group, times)| Group { latency_ms: times.percentiles(), ..group }).collect(),
    }
}

impl Report {
    fn text(&self) -> String {
        let mut out = format!(
            "{} at {}: it can do {:.0} requests/s and was asked for {:.0}, for {} s (seed {})\n\n",
            self.model, self.endpoint, self.capacity_per_s, self.asked_per_s, self.seconds, self.seed
        );
        let ms = |times: Option<Percentiles>, at: fn(Percentiles) -> f64| {
            show::or_dash(times.map(|times| format!("{:.1}", at(times))))
        };
        let row = |group: &Group| {
            let met = (group.hurried > 0).then(|| format!("{:.1}", 100.0 * group.met as f64 / group.hurried as f64));
            let counts = [group.sent, group.accepted, group.refused, group.failed].map(|count| count.to_string());
            let times =
                [ms(group.latency_ms, |t| t.p50), ms(group.latency_ms, |t| t.p99), ms(group.latency_ms, |t| t.p999)];
            let mut cells = vec![group.name.clone()];
            cells.extend(counts);
            cells.push(show::or_dash(met));
            cells.extend(times);
            cells
        };
        let mut all = Group { name: "all".to_owned(), ..Group::default() };
        for group in &self.groups {
            all.sent += group.sent;
            all.accepted += group.accepted;
            all.refused += group.refused;
            all.failed += group.failed;
            all.hurried += group.hurried;
            all.met += group.met;
        }
        let rows: Vec<Vec<String>> = self.groups.iter().chain([&all]).map(row).collect();
        out += &show::table(
            &["REQUESTS", "SENT", "ACCEPTED", "REFUSED", "FAILED", "% MET", "P50 MS", "P99", "P99.9"],
            &rows,
        );
        let (p50, p99) = (ms(self.refusal_ms, |t| t.p50), ms(self.refusal_ms, |t| t.p99));
        out += &format!("\nrefusals: p50 {p50} ms, p99 {p99} ms; {} took longer than 50 ms\n\n", self.late_refusals);
        let percent = |part: f64| format!("{:.1}", 100.0 * part);
        let share = |share: &Share| {
            let of_fair = percent(share.got / share.fair);
            vec![share.key.clone(), share.tokens.to_string(), percent(share.got), percent(share.fair), of_fair]
        };
        let rows: Vec<Vec<String>> = self.shares.iter().map(share).collect();
        out += &show::table(&["KEY", "TOKENS", "% GOT", "% FAIR", "% OF FAIR"], &rows);
        if self.not_sent > 0 {
            out += &format!("\n{} requests were not sent: {AT_ONCE} were under way\n", self.not_sent);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(kind: Kind, deadline_ms: u64, status: u16, ms: u64) -> Seen {
        let plan = Plan { kind, prompt_tokens: 10, max_tokens: 20, deadline_ms };
        Seen { plan, status: Some(status), took: Duration::from_millis(ms), tokens: 20 }
    }

    #[test]
    fn what_was_seen_is_counted_by_kind_and_key() {
        let all = [
            seen(Kind::Interactive(0), 300, 200, 250),
            seen(Kind::Interactive(0), 300, 200, 301),
            seen(Kind::Interactive(1), 300, 503, 2),
            seen(Kind::Batch(1), 0, 429, 60),
            seen(Kind::Batch(1), 0, 200, 5000),
            seen(Kind::Urgent, 200, 200, 20),
            Seen { status: None, ..seen(Kind::Urgent, 200, 0, 0) },
        ];
        let report = summarize(&all, &[1, 3]);
        let names: Vec<_> = report.groups.iter().map(|group| group.name.as_str()).collect();
        assert_eq!(names, ["batch", "urgent", "interactive, 300 ms"]);
        let [batch, urgent, hurried] = &report.groups[..] else { unreachable!() };
        assert_eq!((batch.sent, batch.accepted, batch.refused, batch.hurried), (2, 1, 1, 0));
        assert_eq!((urgent.accepted, urgent.failed, urgent.met), (1, 1, 1));
        assert_eq!((hurried.hurried, hurried.met, hurried.refused), (2, 1, 1));
        assert_eq!(report.late_refusals, 1);
        let shares: Vec<_> = report.shares.iter().map(|share| (share.tokens, share.fair)).collect();
        assert_eq!(shares, [(60, 0.25), (30, 0.75)]);
        let text = report.text();
        assert!(["interactive, 300 ms", "50.0", "1 took longer"].iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn keys_have_weights_and_requests_their_headers() {
        assert_eq!(weighted("sk-a").unwrap(), ("sk-a".to_owned(), 1));
        assert_eq!(weighted("sk-a:3").unwrap(), ("sk-a".to_owned(), 3));
        assert!(weighted("sk-a:0").is_err() && weighted(":1").is_err() && weighted("sk a").is_err());
        let endpoint = Endpoint::new("http://h:1", None).unwrap();
        let keys = vec![("sk-a".to_owned(), 1)];
        let target = Target { endpoint, model: "echo".into(), keys, urgent: Some("sk-u".into()) };
        let text = |plan: &Plan| String::from_utf8(target.request(plan)).unwrap();
        let urgent = text(&URGENT);
        assert!(urgent.contains("x-izar-deadline-ms: 200\r\n") && urgent.contains("Bearer sk-u"), "{urgent}");
        let batch = text(&Plan { kind: Kind::Batch(0), deadline_ms: 0, ..URGENT });
        assert!(batch.contains("x-izar-class: batch\r\n") && !batch.contains("deadline"), "{batch}");
    }
}
