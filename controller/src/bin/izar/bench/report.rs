//! What a run tells, for people and as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::cpu::Used;
use super::load::Measured;
use super::stats::{Percentiles, ReadOn};
use crate::show;

/// Share of its threads' time above which the generator itself may be the limit.
const BUSY: f64 = 0.9;

/// What was asked for.
#[derive(Debug, Serialize)]
pub struct About {
    pub endpoints: Vec<String>,
    pub model: String,
    pub prompt_tokens: usize,
    /// Beginnings that requests share, and their length.
    pub prefixes: Option<usize>,
    pub prefix_tokens: Option<usize>,
    pub max_tokens: u32,
    pub stream: bool,
    pub connections: usize,
    /// Open loop: requests a second; closed loop: none.
    pub rate: Option<f64>,
    pub seed: Option<u64>,
    pub warmup_s: f64,
    pub threads: usize,
    pub subtract_ms: Option<f64>,
    /// The generator alone, against canned answers.
    pub ceiling: bool,
}

/// What came of it. Times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub about: About,
    pub seconds: f64,
    /// Whole answers with status 200; the others are in `errors`, by status or kind.
    pub requests: u64,
    pub requests_per_s: f64,
    pub tokens: u64,
    pub tokens_per_s: f64,
    /// Tokens of all prompts as the server counts them, if it says so, and the share of them that came from caches.
    pub prompt_tokens_total: u64,
    pub cached_share: Option<f64>,
    pub latency_ms: Option<Percentiles>,
    /// Latency less `subtract_ms`.
    pub added_ms: Option<Percentiles>,
    pub ttft_ms: Option<Percentiles>,
    pub between_tokens_ms: Option<Percentiles>,
    pub from_schedule_ms: Option<Percentiles>,
    pub errors: BTreeMap<String, u64>,
    pub reconnects: u64,
    /// Streams that broke off and were read on.
    pub read_on: ReadOn,
    pub pause_ms: Option<Percentiles>,
    pub cpu: Vec<Used>,
    pub generator_cpu_s: f64,
    /// What one core of the generator could send at this cost: its ceiling.
    pub generator_requests_per_core_s: Option<f64>,
}

impl Report {
    pub fn new(about: About, measured: Measured) -> Self {
        let Measured { stats, seconds, cpu, generator_cpu_s } = measured;
        let latency = stats.latency.percentiles();
        let cost = generator_cpu_s / stats.requests.max(1) as f64;
        Self {
            requests_per_s: stats.requests as f64 / seconds,
            tokens_per_s: stats.tokens as f64 / seconds,
            prompt_tokens_total: stats.prompt_tokens,
            cached_share: (stats.prompt_tokens > 0).then(|| stats.cached_tokens as f64 / stats.prompt_tokens as f64),
            added_ms: latency.zip(about.subtract_ms).map(|(latency, ms)| latency.less(ms)),
            latency_ms: latency,
            ttft_ms: stats.ttft.percentiles().filter(|_| about.stream),
            between_tokens_ms: stats.between.percentiles().filter(|_| about.stream),
            from_schedule_ms: stats.from_schedule.percentiles(),
            generator_requests_per_core_s: (stats.requests > 0 && cost > 0.0).then(|| 1.0 / cost),
            about,
            seconds,
            requests: stats.requests,
            tokens: stats.tokens,
            errors: stats.errors,
            reconnects: stats.reconnects,
            read_on: stats.read_on,
            pause_ms: stats.pauses.percentiles(),
            cpu,
            generator_cpu_s,
        }
    }

    pub fn text(&self) -> String {
        let about = &self.about;
        let how = match about.rate {
            Some(rate) => format!("open loop, {rate} requests/s"),
            None => format!("closed loop, {} connections", about.connections),
        };
        let what = if about.stream { "streamed" } else { "unstreamed" };
        let mut out = format!(
            "{how}, {what}, {}{} in, {} out, {} at {}; {:.1} s after {} s of warm-up\n\n",
            about
                .prefixes
                .zip(about.prefix_tokens)
                .map_or(String::new(), |(n, each)| format!("{each} shared ({n} kinds) + ")),
            about.prompt_tokens,
            about.max_tokens,
            about.model,
            about.endpoints.join(" "),
            self.seconds,
            about.warmup_s
        );
        let errors: u64 = self.errors.values().sum();
        let row = |what: &str, count: u64, rate: f64| vec![what.to_owned(), count.to_string(), format!("{rate:.1}")];
        let rows = vec![
            row("requests", self.requests, self.requests_per_s),
            row("tokens", self.tokens, self.tokens_per_s),
            row("errors", errors, errors as f64 / self.seconds),
        ];
        out += &show::table(&["", "COUNT", "PER SECOND"], &rows);
        if let Some(share) = self.cached_share {
            out += &format!("prompts: {} tokens, {:.1} % from caches\n", self.prompt_tokens_total, 100.0 * share);
        }
        for (what, count) in &self.errors {
            out += &format!("  {count} x {what}\n");
        }
        if self.read_on.sum() > 0 {
            let ReadOn { exact, different, unknown } = self.read_on;
            out += &format!(
                "{} streams broke off and were read on: {exact} exact, {different} different",
                self.read_on.sum()
            );
            out += &if unknown > 0 { format!(", {unknown} without one to compare\n") } else { "\n".to_owned() };
        }
        out += "\n";
        out += &self.times();
        out += "\n";
        out += &self.costs();
        out
    }

    fn times(&self) -> String {
        let kinds = [
            ("latency", self.latency_ms),
            ("latency less worker", self.added_ms),
            ("first token", self.ttft_ms),
            ("between tokens", self.between_tokens_ms),
            ("from schedule", self.from_schedule_ms),
            ("until read on", self.pause_ms),
        ];
        let rows: Vec<Vec<String>> = kinds
            .iter()
            .filter_map(|(name, times)| times.map(|t| (name, t)))
            .map(|(name, t)| {
                let values = [t.p50, t.p90, t.p99, t.p999, t.max, t.mean].map(|ms| format!("{ms:.2}"));
                std::iter::once((*name).to_owned()).chain(values).collect()
            })
            .collect();
        show::table(&["MILLISECONDS", "P50", "P90", "P99", "P99.9", "MAX", "MEAN"], &rows)
    }

    fn costs(&self) -> String {
        let mut rows: Vec<Vec<String>> = self
            .cpu
            .iter()
            .map(|used| {
                let seconds = used.cpu_s.map(|s| format!("{s:.2}"));
                let share = used.cpu_s.map(|s| format!("{:.0}", 100.0 * s / self.seconds));
                vec![used.name.clone(), show::or_dash(seconds), show::or_dash(share)]
            })
            .collect();
        let share = self.generator_cpu_s / self.seconds;
        rows.push(vec![
            "generator".to_owned(),
            format!("{:.2}", self.generator_cpu_s),
            format!("{:.0}", 100.0 * share),
        ]);
        let mut out = show::table(&["PROCESS", "CPU SECONDS", "% OF A CORE"], &rows);
        if let Some(ceiling) = self.generator_requests_per_core_s {
            out += &format!("\none core of the generator reaches {ceiling:.0} requests/s of this kind\n");
        }
        if !self.about.ceiling && share > BUSY * self.about.threads as f64 {
            out += "the generator was busy all the time: it may be the limit, try --threads 2\n";
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Stats;
    use std::time::Duration;

    #[test]
    fn a_report_tells_rates_times_and_what_the_generator_cost() {
        let mut stats =
            Stats { requests: 100, tokens: 1600, prompt_tokens: 3200, cached_tokens: 2400, ..Stats::default() };
        stats.latency.record(Duration::from_millis(6));
        stats.errors.insert("429".into(), 2);
        stats.read_on.exact = 3;
        let about = About {
            endpoints: vec!["https://h:1".into()],
            model: "echo".into(),
            prompt_tokens: 32,
            prefixes: Some(2),
            prefix_tokens: Some(16),
            max_tokens: 16,
            stream: false,
            connections: 4,
            rate: None,
            seed: None,
            warmup_s: 0.0,
            threads: 1,
            subtract_ms: Some(5.0),
            ceiling: false,
        };
        let cpu = vec![Used { name: "c1".into(), pid: 7, cpu_s: Some(1.5) }];
        let report = Report::new(about, Measured { stats, seconds: 2.0, cpu, generator_cpu_s: 1.9 });
        assert_eq!((report.requests_per_s, report.tokens_per_s), (50.0, 800.0));
        assert!((report.added_ms.unwrap().p50 - 1.0).abs() < 0.01);
        let text = report.text();
        let parts = ["2 x 429", "c1", "1.50", "may be the limit", "latency less worker", "3200 tokens, 75.0 % from"];
        for part in parts.into_iter().chain(["3 exact, 0 different"]) {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(serde_json::to_value(&report).unwrap()["model"], "echo");
    }
}
