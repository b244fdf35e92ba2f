//! What the raft crate says of itself, passed on to `log`.
//!
//! Its levels are a library's: what it calls information is detail to an operator, and elections are reported by
//! `node` in our own words.

use slog::{Drain, KV, Level, Never, OwnedKVList, Record};

/// Makes the logger that `RawNode` wants.
pub fn logger() -> slog::Logger {
    slog::Logger::root(Forward, slog::o!())
}

struct Forward;

impl Drain for Forward {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let level = match record.level() {
            Level::Critical | Level::Error => log::Level::Error,
            Level::Warning | Level::Info => log::Level::Debug,
            Level::Debug | Level::Trace => log::Level::Trace,
        };
        // Entries appear in the crate's trace records; they hold names of users' keys and projects.
        if record.level() == Level::Trace || level > log::max_level() {
            return Ok(());
        }
        let mut fields = Fields(String::new());
        let _ = record.kv().serialize(record, &mut fields);
        let _ = values.serialize(record, &mut fields);
        log::log!(target: "raft", level, "{}{}", record.msg(), fields.0);
        Ok(())
    }
}

/// Fields as text, `key=value` each.
struct Fields(String);

impl slog::Serializer for Fields {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        use std::fmt::Write;
        write!(self.0, " {key}={value}").map_err(|_| slog::Error::Other)
    }
}
