//! Counters, gauges and histograms, and their Prometheus text.
//!
//! A registry of our own: every metric is a field, so that a name cannot be misspelt where it is counted, and counting
//! is one atomic addition. Names stay once they are published. What other parts know (Raft, agents) is read by
//! callbacks when the page is asked for. No metric carries a label that a client can choose freely.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

/// Most label sets of one metric; more are counted together as `other`. Deployments are the only label that grows, and
/// an operator makes them; this only keeps a mistake from eating memory.
const SERIES_LIMIT: usize = 1024;

/// Upper bounds in seconds of what lasts as long as a request.
const LONG: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Upper bounds in seconds of what lasts as long as a token or a commit.
const SHORT: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Counts one up until the guard is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.0.fetch_add(1, Relaxed);
        Held(self.clone())
    }
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// One of what a gauge counts.
#[derive(Debug)]
pub struct Held(Arc<Gauge>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

/// Counts durations by upper bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One for each bound and one for what is longer than all.
    counts: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum_ns: AtomicU64::new(0) }
    }
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let at = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(duration.as_nanos() as u64, Relaxed);
    }
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Relaxed)).sum()
    }
}

/// One metric, told apart by labels.
#[derive(Debug)]
pub struct Family<T> {
    labels: &'static [&'static str],
    make: fn() -> T,
    /// By the labels as they stand in the text: `code="200",route="/v1/models"`.
    series: RwLock<BTreeMap<String, Arc<T>>>,
}

impl<T> Family<T> {
    fn new(labels: &'static [&'static str], make: fn() -> T) -> Self {
        Self { labels, make, series: RwLock::default() }
    }

    /// Returns the series of these label values, given in the order of the labels.
    pub fn with(&self, values: &[&str]) -> Arc<T> {
        assert_eq!(values.len(), self.labels.len(), "one value for each of {:?}", self.labels);
        let key = label_text(self.labels.iter().copied().zip(values.iter().copied()));
        if let Some(found) = self.series.read().expect("no panic while series are held").get(&key) {
            return found.clone();
        }
        let mut series = self.series.write().expect("no panic while series are held");
        let full = series.len() >= SERIES_LIMIT && !series.contains_key(&key);
        let key = if full { label_text(self.labels.iter().map(|label| (*label, "other"))) } else { key };
        series.entry(key).or_insert_with(|| Arc::new((self.make)())).clone()
    }
}

fn label_text<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    // Looked up several times for each request: one allocation, and no copies of values that need no escapes.
    let mut text = String::with_capacity(96);
    for (label, value) in pairs {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(label);
        text.push_str("=\"");
        let mut rest = value;
        while let Some(at) = rest.find(['\\', '"', '\n']) {
            text.push_str(&rest[..at]);
            text.push_str(match rest.as_bytes()[at] {
                b'\\' => "\\\\",
                b'"' => "\\\"",
                _ => "\\n",
            });
            rest = &rest[at + 1..];
        }
        text.push_str(rest);
        text.push('"');
    }
    text
}

/// Whether a number that is read only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
}

/// Where a callback puts its numbers: labels and value.
pub type Samples<'a> = &'a mut dyn FnMut(&[(&str, &str)], f64);

struct Read {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    read: Box<dyn Fn(Samples<'_>) + Send + Sync>,
}

/// Every metric of a controller.
pub struct Metrics {
    /// Answers by dialect, route and status code.
    pub requests: Family<Counter>,
    /// From the head of a request to the end of its answer, by dialect and route.
    pub request_seconds: Family<Histogram>,
    /// From the head of a request to its first token, by deployment.
    pub first_token_seconds: Family<Histogram>,
    /// Between two events with tokens of one answer, by deployment.
    pub between_tokens_seconds: Family<Histogram>,
    /// Tokens by kind (`prompt`, `completion`) and deployment.
    pub tokens: Family<Counter>,
    /// Prompt tokens that workers found in their caches, by deployment.
    pub cached_prompt_tokens: Family<Counter>,
    /// Turns by how they ended.
    pub turns: Family<Counter>,
    /// Jobs that were placed again after a worker or an agent failed.
    pub placed_again: Counter,
    /// Those of them that went on with other numerics.
    pub inexact_moves: Counter,
    pub running_requests: Arc<Gauge>,
    /// From the head of a request until its jobs are on their way to agents.
    pub admission_seconds: Histogram,
    /// From proposing to open a turn until it is committed and applied here.
    pub commit_seconds: Histogram,
    /// From sending a request's first job to the first token of any of them.
    pub worker_first_token_seconds: Histogram,
    /// From the last event of a request's workers until its answer is handed to the connection.
    pub ending_seconds: Histogram,
    pub connections: Arc<Gauge>,
    /// Connections and requests refused, by reason.
    pub refused: Family<Counter>,
    /// From asking for a turn to its dispatch, by deployment and class.
    pub queue_wait_seconds: Family<Histogram>,
    /// Requests that a queue refused, by deployment, class and reason.
    pub queue_refused: Family<Counter>,
    /// Ends of turns that had a deadline, by deployment, class and outcome (`met`, `missed`).
    pub deadlines: Family<Counter>,
    read: Mutex<Vec<Read>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::new(&["dialect", "route", "code"], Counter::default),
            request_seconds: Family::new(&["dialect", "route"], || Histogram::new(LONG)),
            first_token_seconds: Family::new(&["deployment"], || Histogram::new(LONG)),
            between_tokens_seconds: Family::new(&["deployment"], || Histogram::new(SHORT)),
            tokens: Family::new(&["kind", "deployment"], Counter::default),
            cached_prompt_tokens: Family::new(&["deployment"], Counter::default),
            turns: Family::new(&["outcome"], Counter::default),
            placed_again: Counter::default(),
            inexact_moves: Counter::default(),
            running_requests: Arc::default(),
            admission_seconds: Histogram::new(SHORT),
            commit_seconds: Histogram::new(SHORT),
            worker_first_token_seconds: Histogram::new(LONG),
            ending_seconds: Histogram::new(SHORT),
            connections: Arc::default(),
            refused: Family::new(&["reason"], Counter::default),
            queue_wait_seconds: Family::new(&["deployment", "class"], || Histogram::new(LONG)),
            queue_refused: Family::new(&["deployment", "class", "reason"], Counter::default),
            deadlines: Family::new(&["deployment", "class", "outcome"], Counter::default),
            read: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Adds a number that `read` gives when the page is asked for.
    pub fn number(
        &self,
        name: &'static str,
        help: &'static str,
        kind: Kind,
        read: impl Fn() -> f64 + Send + Sync + 'static,
    ) {
        self.numbers(name, help, kind, move |samples| samples(&[], read()));
    }

    /// Adds a metric whose label sets and numbers `read` gives when the page is asked for.
    pub fn numbers(
        &self,
        name: &'static str,
        help: &'static str,
        kind: Kind,
        read: impl Fn(Samples<'_>) + Send + Sync + 'static,
    ) {
        self.read.lock().expect("no panic while callbacks are held").push(Read {
            name,
            help,
            kind,
            read: Box::new(read),
        });
    }

    /// Writes all of it in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut page = Page(String::with_capacity(16 << 10));
        page.counters("izar_requests_total", "Answers by dialect, route and status code.", &self.requests);
        page.histograms(
            "izar_request_seconds",
            "From the head of a request to the end of its answer.",
            &self.request_seconds,
        );
        page.histograms(
            "izar_time_to_first_token_seconds",
            "From the head of a request to its first token.",
            &self.first_token_seconds,
        );
        page.histograms(
            "izar_time_between_tokens_seconds",
            "Between two events with tokens of one answer.",
            &self.between_tokens_seconds,
        );
        page.counters("izar_tokens_total", "Tokens of prompts and of answers.", &self.tokens);
        page.counters(
            "izar_prompt_tokens_cached_total",
            "Prompt tokens that workers found in their caches.",
            &self.cached_prompt_tokens,
        );
        page.counters("izar_turns_total", "Turns by how they ended.", &self.turns);
        page.counters("izar_refused_total", "Connections and requests refused, by reason.", &self.refused);
        page.histograms(
            "izar_queue_wait_seconds",
            "From asking for a place in a worker's batch to being sent there.",
            &self.queue_wait_seconds,
        );
        page.counters("izar_queue_refused_total", "Requests that a queue refused, by reason.", &self.queue_refused);
        page.counters("izar_deadlines_total", "Turns with a deadline, by whether they met it.", &self.deadlines);
        page.head("izar_placed_again_total", "Jobs placed again after a worker or an agent failed.", "counter");
        page.sample("izar_placed_again_total", "", self.placed_again.get());
        page.head("izar_inexact_moves_total", "Answers that went on with other numerics.", "counter");
        page.sample("izar_inexact_moves_total", "", self.inexact_moves.get());
        page.head("izar_running_requests", "Turns that run here.", "gauge");
        page.sample("izar_running_requests", "", self.running_requests.get());
        page.head("izar_connections", "Open connections of the API.", "gauge");
        page.sample("izar_connections", "", self.connections.get());
        for (name, help, histogram) in [
            (
                "izar_admission_seconds",
                "From the head of a request until its jobs are on their way to agents.",
                &self.admission_seconds,
            ),
            ("izar_commit_seconds", "From proposing to open a turn until it is applied here.", &self.commit_seconds),
            (
                "izar_worker_first_token_seconds",
                "From sending a request's first job to the first token of any of them.",
                &self.worker_first_token_seconds,
            ),
            (
                "izar_ending_seconds",
                "From the last event of a request's workers until its answer is handed to the connection.",
                &self.ending_seconds,
            ),
        ] {
            page.head(name, help, "histogram");
            page.histogram(name, "", histogram);
        }
        for Read { name, help, kind, read } in self.read.lock().expect("no panic while callbacks are held").iter() {
            page.head(name, help, if *kind == Kind::Counter { "counter" } else { "gauge" });
            read(&mut |labels, value| page.sample(name, &label_text(labels.iter().copied()), value));
        }
        page.0
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }
    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }
    fn counters(&mut self, name: &str, help: &str, family: &Family<Counter>) {
        self.head(name, help, "counter");
        for (labels, counter) in family.series.read().expect("no panic while series are held").iter() {
            self.sample(name, labels, counter.get());
        }
    }
    fn histograms(&mut self, name: &str, help: &str, family: &Family<Histogram>) {
        self.head(name, help, "histogram");
        for (labels, histogram) in family.series.read().expect("no panic while series are held").iter() {
            self.histogram(name, labels, histogram);
        }
    }
    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        let (bucket, mut total) = (format!("{name}_bucket"), 0);
        for (i, count) in histogram.counts.iter().enumerate() {
            total += count.load(Relaxed);
            let bound = histogram.bounds.get(i).map_or("+Inf".to_owned(), f64::to_string);
            self.sample(&bucket, &format!("{labels}{comma}le=\"{bound}\""), total);
        }
        self.sample(&format!("{name}_sum"), labels, histogram.sum_ns.load(Relaxed) as f64 / 1e9);
        self.sample(&format!("{name}_count"), labels, total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_the_same_labels_are_one_series() {
        let metrics = Metrics::default();
        metrics.requests.with(&["openai", "/v1/models", "200"]).add(1);
        metrics.requests.with(&["openai", "/v1/models", "200"]).add(2);
        let line = r#"izar_requests_total{dialect="openai",route="/v1/models",code="200"} 3"#;
        assert!(metrics.render().lines().any(|l| l == line));
    }

    #[test]
    fn histogram_buckets_are_cumulative_and_bounds_inclusive() {
        let metrics = Metrics::default();
        for us in [100, 101, 2_000, 9_000_000] {
            metrics.commit_seconds.observe(Duration::from_micros(us));
        }
        let page = metrics.render();
        for line in [
            r#"izar_commit_seconds_bucket{le="0.0001"} 1"#,
            r#"izar_commit_seconds_bucket{le="0.00025"} 2"#,
            r#"izar_commit_seconds_bucket{le="5"} 3"#,
            r#"izar_commit_seconds_bucket{le="+Inf"} 4"#,
            "izar_commit_seconds_count 4",
            "izar_commit_seconds_sum 9.002201",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
        }
    }

    #[test]
    fn label_sets_beyond_the_limit_are_counted_together() {
        let metrics = Metrics::default();
        for i in 0..SERIES_LIMIT + 5 {
            metrics.refused.with(&[&i.to_string()]).add(1);
        }
        assert_eq!(metrics.refused.with(&["other"]).get(), 5);
    }

    #[test]
    fn label_values_are_escaped_and_callbacks_are_read() {
        let metrics = Metrics::default();
        metrics.numbers("izar_test", "Test.", Kind::Gauge, |samples| samples(&[("a", "x\"y\\z\n")], 1.5));
        assert!(metrics.render().contains("# TYPE izar_test gauge\nizar_test{a=\"x\\\"y\\\\z\\n\"} 1.5\n"));
    }

    #[test]
    fn a_held_gauge_counts_down_when_dropped() {
        let gauge = Arc::new(Gauge::default());
        let held = gauge.hold();
        assert_eq!(gauge.get(), 1);
        drop(held);
        assert_eq!(gauge.get(), 0);
    }
}
