//! Tables, sizes and times for people. Pure.

use std::fmt::Write;

/// Columns separated by two blanks, numbers to the right, no line at the end left blank.
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &'_ Vec<String>, i: usize| row.get(i).map_or(0, |c| c.chars().count());
    let mut out = String::new();
    let columns: Vec<(usize, bool)> = headers
        .iter()
        .enumerate()
        .map(|(i, header)| {
            let width = rows.iter().map(|row| cell(row, i)).max().unwrap_or(0).max(header.chars().count());
            let numbers = !rows.is_empty() && rows.iter().all(|row| row.get(i).is_some_and(|c| numeric(c)));
            (width, numbers)
        })
        .collect();
    line(&mut out, &columns, headers.iter().copied());
    for row in rows {
        line(&mut out, &columns, row.iter().map(String::as_str));
    }
    out
}

fn line<'a>(out: &mut String, columns: &[(usize, bool)], cells: impl Iterator<Item = &'a str>) {
    let mut text = String::new();
    for ((width, right), cell) in columns.iter().zip(cells) {
        let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
        let _ = if *right { write!(text, "{pad}{cell}  ") } else { write!(text, "{cell}{pad}  ") };
    }
    out.push_str(text.trim_end());
    out.push('\n');
}

fn numeric(cell: &str) -> bool {
    cell == "-" || cell.parse::<f64>().is_ok()
}

/// `98.4 MB`, in powers of ten as disks are sold.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `850 ms`, `12 s`, `3 min 12 s`, `5 h 2 min`, `3 d 4 h`.
pub fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

/// Unix milliseconds as UTC, `2026-11-24 12:00:00`.
pub fn time(ms: u64) -> String {
    let (days, second) = (ms / 86_400_000, ms / 1000 % 86_400);
    let (year, month, day) = izar_common::clock::civil(days as i64);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// The first 12 digits of a hash: enough to tell revisions apart, and to name one.
pub fn short(hash: &izar_common::id::Hash) -> String {
    hash.to_string()[..12].to_owned()
}

/// A dash for what is not there.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// Prints a value as JSON, or as `human` tells it.
pub fn print<T: serde::Serialize>(json: bool, value: &T, human: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    use std::io::Write;
    let text = if json { serde_json::to_string_pretty(value)? + "\n" } else { human(value) };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader has seen enough (`izar turns list | head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_stand_right() {
        let rows = vec![vec!["echo".into(), "2".into()], vec!["smollm2".into(), "10".into()]];
        assert_eq!(table(&["NAME", "N"], &rows), "NAME      N\necho      2\nsmollm2  10\n");
        assert_eq!(table(&["NAME", "N"], &[]), "NAME  N\n");
    }

    #[test]
    fn sizes_durations_and_times_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(duration(850), "850 ms");
        assert_eq!(duration(192_000), "3 min 12 s");
        assert_eq!(duration(90_000_000), "1 d 1 h");
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(1_709_210_096_000), "2024-02-29 12:34:56");
        assert_eq!(time(1_795_521_600_000), "2026-11-24 12:00:00");
    }
}
