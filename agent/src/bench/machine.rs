//! What the machine itself can do, and what this process holds of it.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;

/// Bytes that are read for the bandwidth: far more than any cache holds.
const STREAM_BYTES: usize = 768 << 20;

/// How often they are read; the best counts, because a guest of a virtual machine is disturbed often.
const STREAM_ROUNDS: usize = 7;

/// Independent sums of one thread, so that additions do not wait for each other.
const LANES: usize = 32;

/// Bytes a second that `threads` threads read from memory, each its own part of a buffer, one after another.
///
/// The sum of all words is what they compute: it costs less than the reading.
pub fn read_bandwidth(threads: usize) -> f64 {
    let words = STREAM_BYTES / 8 / threads / LANES * LANES;
    let bytes = (words * 8 * threads) as f64;
    let barrier = std::sync::Barrier::new(threads);
    let reader = |_: usize| {
        // Each thread writes its part first: the kernel gives memory to who touches it.
        let part = vec![black_box(3_u64); words];
        let mut rounds = Vec::with_capacity(STREAM_ROUNDS);
        for _ in 0..STREAM_ROUNDS {
            barrier.wait();
            let begun = Instant::now();
            black_box(sum(black_box(&part)));
            rounds.push((begun, Instant::now()));
        }
        rounds
    };
    let all: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|i| scope.spawn(move || reader(i))).collect();
        running.into_iter().map(|thread| thread.join().expect("reading memory does not panic")).collect()
    });
    let round = |i: usize| {
        let begun = all.iter().map(|rounds| rounds[i].0).min().expect("there is a thread");
        let ended = all.iter().map(|rounds| rounds[i].1).max().expect("there is a thread");
        bytes / (ended - begun).as_secs_f64()
    };
    (0..STREAM_ROUNDS).map(round).fold(0.0, f64::max)
}

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; LANES];
    for chunk in words.chunks_exact(LANES) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
}

/// Bytes of memory that this process holds now, and the most that it ever held.
pub fn resident() -> anyhow::Result<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kilobytes = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kilobytes.map(|kilobytes| kilobytes << 10).with_context(|| format!("/proc/self/status has no {name}"))
    };
    Ok((field("VmRSS")?, field("VmHWM")?))
}

/// Instruction sets of this processor that kernels may use.
pub fn instruction_sets() -> String {
    #[cfg(target_arch = "x86_64")]
    let found = {
        let has = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
        ];
        has.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect::<Vec<_>>().join(" ")
    };
    #[cfg(not(target_arch = "x86_64"))]
    let found = std::env::consts::ARCH.to_owned();
    if found.is_empty() { "none".into() } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_memory() {
        let (now, most) = resident().unwrap();
        assert!(now > 1 << 20 && most >= now, "{now} {most}");
    }

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> = (0..LANES as u64 * 3).collect();
        assert_eq!(sum(&words), words.iter().sum::<u64>());
    }
}
