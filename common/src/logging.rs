//! How a daemon tells what it does: one line for each record, key-values behind the message.
//!
//! Under journald the key-values become fields of the journal; otherwise a line goes to standard error:
//! `2026-11-24T12:00:00.000Z WARN  izar_agent::link report is late agent=a1 late_ms=900`. A message or value never
//! breaks a line, so that a name from outside cannot forge a record. What was said, asked or shown as a key is never
//! logged; that is the caller's duty.

use std::fmt::{Display, Write as _};
use std::io::Write as _;

use log::kv::{Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Libraries that say at INFO and below what only their authors want to know.
const NOISY: [&str; 10] =
    ["rustls", "quinn", "tracing", "h2", "hyper", "mio", "tokio_util", "raft", "tokenizers", "cubecl"];

/// The key-value that gives a record its event (`events`): a field of the journal, of no use to whoever reads a line.
const MESSAGE_ID: &str = "message_id";

/// Sends the process's records to the journal or to standard error.
///
/// `level`: `off`, `error`, `warn`, `info` (the default), `debug` or `trace`; another word is reported and means
/// `info`. A second call changes nothing.
pub fn init(level: Option<&str>) {
    let wanted = level.map(|text| text.parse::<LevelFilter>().map_err(|_| text));
    let filter = match wanted {
        Some(Ok(filter)) => filter,
        Some(Err(_)) | None => LevelFilter::Info,
    };
    let out = match connected_to_journal().then(JournalLog::new) {
        Some(Ok(journal)) => Out::Journal(journal),
        Some(Err(_)) | None => Out::Stderr,
    };
    if log::set_boxed_logger(Box::new(Logger { filter, out })).is_ok() {
        log::set_max_level(filter);
    }
    if let Some(Err(text)) = wanted {
        log::warn!(level = text; "unknown log level, info is used");
    }
}

enum Out {
    Journal(JournalLog),
    Stderr,
}

struct Logger {
    filter: LevelFilter,
    out: Out,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        passes(self.filter, metadata.level(), metadata.target())
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Where logging fails there is nobody left to tell.
        match &self.out {
            Out::Journal(journal) => drop(journal.journal_send(record)),
            Out::Stderr => drop(std::io::stderr().lock().write_all(line(crate::clock::wall_ms(), record).as_bytes())),
        }
    }

    fn flush(&self) {}
}

/// Decides whether a record is shown.
fn passes(filter: LevelFilter, level: Level, target: &str) -> bool {
    let library = target.split(':').next().unwrap_or(target);
    let noisy = NOISY.iter().any(|name| library == *name || library.starts_with(&format!("{name}_")));
    // Spans of `tracing` come as records of their own; they say nothing without their events.
    level <= filter && !(noisy && level > Level::Warn) && !target.starts_with("tracing::span")
}

fn line(now_ms: u64, record: &Record<'_>) -> String {
    let mut out = String::with_capacity(160);
    let _ = write!(out, "{} {:<5} {} ", timestamp(now_ms), record.level(), record.target());
    put(&mut out, record.args(), false);
    // The visitor never fails; a value that cannot be shown is left out.
    let _ = record.key_values().visit(&mut Pairs(&mut out));
    out.push('\n');
    out
}

struct Pairs<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        if key.as_str() == MESSAGE_ID {
            return Ok(());
        }
        self.0.push(' ');
        put(self.0, &key, false);
        self.0.push('=');
        put(self.0, &value, true);
        Ok(())
    }
}

/// Appends a text on one line; a value with blanks is quoted, so that a reader knows where it ends.
fn put(out: &mut String, text: &dyn Display, quote: bool) {
    let start = out.len();
    let _ = write!(out, "{text}");
    let written = &out[start..];
    let control = written.chars().any(char::is_control);
    if control || (quote && (written.is_empty() || written.contains([' ', '"', '=']))) {
        let escaped = format!("{written:?}");
        out.truncate(start);
        // A message is escaped, but not quoted.
        out.push_str(if quote { &escaped } else { &escaped[1..escaped.len() - 1] });
    }
}

/// RFC 3339 in UTC with milliseconds.
fn timestamp(ms: u64) -> String {
    let (year, month, day) = date_of((ms / 86_400_000) as i64);
    let (hour, minute, second) = (ms / 3_600_000 % 24, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Year, month and day of a number of days since 1970-01-01.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
pub(crate) fn date_of(days: i64) -> (i32, u8, u8) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year as i32, month as u8, day as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, expected) in
            [(0, (1970, 1, 1)), (11_016, (2000, 2, 29)), (20_781, (2026, 11, 24)), (-1, (1969, 12, 31))]
        {
            assert_eq!(date_of(days), expected);
        }
        assert_eq!(timestamp(1_795_521_600_007), "2026-11-24T12:00:00.007Z");
    }

    #[test]
    fn a_record_is_one_line_whatever_its_values_are() {
        let pairs = [
            ("message_id", crate::events::AGENT_LOST),
            ("agent", "a1"),
            ("reason", "it \"broke\"\nERROR forged"),
            ("empty", ""),
        ];
        let record = Record::builder()
            .level(Level::Warn)
            .target("izar_agent::link")
            .args(format_args!("report is late"))
            .key_values(&pairs)
            .build();
        assert_eq!(
            line(1_795_521_600_000, &record),
            "2026-11-24T12:00:00.000Z WARN  izar_agent::link report is late agent=a1 \
             reason=\"it \\\"broke\\\"\\nERROR forged\" empty=\"\"\n"
        );
    }

    #[test]
    fn libraries_speak_only_when_something_is_wrong() {
        let shown = |level, target| passes(LevelFilter::Debug, level, target);
        assert!(shown(Level::Debug, "izar_common::quic") && !shown(Level::Trace, "izar_common::quic"));
        assert!(shown(Level::Warn, "quinn_proto::connection") && !shown(Level::Info, "quinn_proto::connection"));
        assert!(!shown(Level::Debug, "rustls::client::hs") && !shown(Level::Error, "tracing::span::active"));
        assert!(shown(Level::Info, "rafters::mine"));
    }
}
