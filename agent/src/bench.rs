//! `izar-agent bench`: measures the engine in this process, without a cluster around it.
//!
//! What a worker runs is what is measured: the same engine behind the same trait, jobs in and events out, so that
//! batching, paging and sampling are in every figure. It asserts nothing and keeps nothing.

mod arguments;
mod drive;
mod engine;
mod greedy;
mod local;
mod logits;
mod machine;
mod quality;
mod urgent;

use std::io::{ErrorKind, Write as _};

use anyhow::{Context, ensure};
use clap::Subcommand;
use serde::Serialize;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prefill and decode rates, time to first token and memory of the engine with a model
    Engine(engine::Options),
    /// Memory, perplexity and speed of each form of the weights
    Quality(quality::Options),
    /// Greedy answers beside those of another program for the same weights
    Greedy(greedy::Options),
    /// How long urgent jobs take beside a full load of batch jobs
    Urgent(urgent::Options),
}

/// Measures and prints.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Engine(options) => print(options.json, &engine::measure(&options)?, engine::Report::text),
        Command::Quality(options) => print(options.json, &quality::measure(&options)?, quality::Report::text),
        Command::Urgent(options) => print(options.json, &urgent::measure(&options)?, urgent::Report::text),
        Command::Greedy(options) => {
            let report = greedy::measure(&options)?;
            print(options.json, &report, greedy::Report::text)?;
            ensure!(report.holds(), "{} of {} answers do not pass", report.failed(), report.answers.len());
            Ok(())
        }
    }
}

fn print<T: Serialize>(json: bool, value: &T, human: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(value)? + "\n" } else { human(value) };
    match std::io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("print the figures"),
    }
}

/// The middle value; of an even number, the mean of the two in the middle. None of none.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(subcommand)]
        _command: Command,
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Line as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 9.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 9.0, 2.0]), Some(3.0));
    }
}
