//! What a client may cost before and after it is known. Every queue and wait of the gateway has its bound here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The `[limits]` of a controller's configuration. Nothing may be 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections of the API; one more is accepted and closed at once. Default 8192; the limit of open files
    /// must leave room for it.
    pub connections: usize,
    /// TLS handshakes that run at once; others wait within their `handshake_ms`. Default 64.
    pub handshakes: usize,
    /// Milliseconds from accepting a connection to the end of its TLS handshake. Default 5000.
    pub handshake_ms: u64,
    /// Milliseconds until the whole head of an HTTP/1.1 request must be there, counted from the opening of the
    /// connection or the end of the last answer: so it is also how long an idle HTTP/1.1 connection is kept.
    /// Default 15000.
    pub header_ms: u64,
    /// Bytes of a request's head; more gives 431. Default 32768, at least 8192.
    pub header_bytes: usize,
    /// Bytes of a request's body; more gives 413. Default 4194304.
    pub body_bytes: usize,
    /// Milliseconds until the whole body of a request must be there; later gives 408. Default 30000.
    pub body_ms: u64,
    /// Requests that run at once on one HTTP/2 connection. Default 128.
    pub http2_streams: u32,
    /// Milliseconds after which an HTTP/2 connection without a request is closed. Default 60000.
    pub idle_ms: u64,
    /// Milliseconds that a client may take no byte at all while some wait for it; then it is cut. Default 60000.
    pub write_stall_ms: u64,
    /// Turns of all clients that run, or wait to be recorded as closed; more gives 503. Default 8192.
    pub turns: usize,
    /// Bytes that requests may hold together: bodies while they are read (three times their size), turns (24 KiB each,
    /// 8 bytes for a token of the prompt, 4 for one that may come), and what clients are slow to take of their answers.
    /// One more request gives 503, and a client that is behind is cut. Default 1073741824, at least 67108864.
    pub memory_bytes: usize,
    /// Milliseconds that a worker may give nothing for a job before the turn fails. Default 300000, for long prompts
    /// on slow processors.
    pub worker_silence_ms: u64,
    /// Milliseconds that a turn whose worker failed waits for a replica that can go on with it. Default 60000: a worker is
    /// started again and loads its model meanwhile.
    pub replica_wait_ms: u64,
    /// Milliseconds that connections which clients hold are served on when the daemon stops, each until its next answer: closing
    /// an idle one could cross with a request. A part of `shutdown_ms`. Default 1000.
    pub drain_ms: u64,
    /// Milliseconds that running requests get to end when the daemon stops; it must stay below the 10 s that
    /// the daemon gives all of its parts. Default 8000.
    pub shutdown_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            handshakes: 64,
            handshake_ms: 5_000,
            header_ms: 15_000,
            header_bytes: 32 << 10,
            body_bytes: 4 << 20,
            body_ms: 30_000,
            http2_streams: 128,
            idle_ms: 60_000,
            write_stall_ms: 60_000,
            turns: 8192,
            memory_bytes: 1 << 30,
            worker_silence_ms: 300_000,
            replica_wait_ms: 60_000,
            drain_ms: 1_000,
            shutdown_ms: 8_000,
        }
    }
}

impl Limits {
    /// Returns what is wrong with them, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let zero = [
            ("connections", self.connections as u64),
            ("handshakes", self.handshakes as u64),
            ("handshake_ms", self.handshake_ms),
            ("header_ms", self.header_ms),
            ("body_bytes", self.body_bytes as u64),
            ("body_ms", self.body_ms),
            ("http2_streams", self.http2_streams.into()),
            ("idle_ms", self.idle_ms),
            ("write_stall_ms", self.write_stall_ms),
            ("turns", self.turns as u64),
            ("worker_silence_ms", self.worker_silence_ms),
            ("shutdown_ms", self.shutdown_ms),
        ];
        if let Some((name, _)) = zero.iter().find(|(_, value)| *value == 0) {
            return Err(format!("limits.{name}: 0 would refuse everything"));
        }
        if self.memory_bytes < 64 << 20 {
            return Err(format!("limits.memory_bytes: {} is less than 67108864", self.memory_bytes));
        }
        if !(8192..=1 << 20).contains(&self.header_bytes) {
            return Err(format!("limits.header_bytes: {} is not in 8192..=1048576", self.header_bytes));
        }
        Ok(())
    }

    pub(super) fn handshake(&self) -> Duration {
        Duration::from_millis(self.handshake_ms)
    }
    pub(super) fn header(&self) -> Duration {
        Duration::from_millis(self.header_ms)
    }
    pub(super) fn body(&self) -> Duration {
        Duration::from_millis(self.body_ms)
    }
    pub(super) fn idle(&self) -> Duration {
        Duration::from_millis(self.idle_ms)
    }
    pub(super) fn write_stall(&self) -> Duration {
        Duration::from_millis(self.write_stall_ms)
    }
    pub(super) fn worker_silence(&self) -> Duration {
        Duration::from_millis(self.worker_silence_ms)
    }
    pub(super) fn replica_wait(&self) -> Duration {
        Duration::from_millis(self.replica_wait_ms)
    }
    pub(super) fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms.min(self.shutdown_ms))
    }
    pub(super) fn shutdown(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_sound_and_zero_is_named() {
        assert_eq!(Limits::default().check(), Ok(()));
        let none = Limits { body_ms: 0, ..Limits::default() };
        assert!(none.check().unwrap_err().contains("limits.body_ms"));
    }

    #[test]
    fn a_misspelt_limit_is_an_error() {
        let error = serde_json::from_str::<Limits>(r#"{"body_byte": 5}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `body_byte`"));
    }
}
