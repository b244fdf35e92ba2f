//! A scenario: lines of a file that say how many GPUs there are and what happens to them.
//!
//! The file is read again at every call, so that a story may add lines while the library is in use; what stands there is
//! true from when it was first seen, `at 3s …` three seconds after the library was loaded. Later lines win.
//!
//! ```text
//! gpus 2                      two of them
//! host a1                     part of their identities, so that two servers have different ones
//! uuids                       those identities look like real ones, which root's hand insists on
//! gpu0 temperature 91         any number that the library tells: temperature, power, utilization, used, total,
//!                             corrected, uncorrected, replays, slowdown, ecc, persistence, process, field 230
//! gpu0 temperature none       the driver does not know it
//! gpu1 lost                   and `gpu1 found`
//! at 3s gpu1 xid 79           an event
//! gpu1 double_bit             another one: a memory error that was not corrected
//! gpu1 events 8               the events that it has, as NVML's bits (else 10: Xids and double-bit errors)
//! wait lost                   waiting for events says that a GPU is lost, and `wait well`
//! hang temperature 20s        calls of a function do not return for so long
//! ```

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// What is known of a scenario file's lines.
#[derive(Debug)]
pub struct Clock {
    loaded: Instant,
    /// When each line was first seen, by its number and text.
    seen: HashMap<(usize, String), Instant>,
}

/// What is true now.
#[derive(Debug, Default, PartialEq)]
pub struct Now {
    pub gpus: u32,
    pub host: String,
    /// Identities look like real ones.
    pub uuids: bool,
    /// Numbers by GPU and name; `None` is what the driver does not know.
    pub numbers: BTreeMap<(u32, String), Option<u64>>,
    pub lost: BTreeMap<u32, bool>,
    /// GPU and what happened to it, of every event so far, in order.
    pub events: Vec<(u32, Event)>,
    /// Waiting for events fails, since a GPU is lost.
    pub waits_lost: bool,
    /// For how long calls of a function hang yet.
    pub hangs: BTreeMap<String, Duration>,
}

/// What NVML tells of by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Xid(u64),
    DoubleBit,
}

impl Clock {
    pub fn new(now: Instant) -> Self {
        Self { loaded: now, seen: HashMap::new() }
    }

    /// Reads the lines. Panics at one that is none: a story with a mistake must not pass.
    pub fn read(&mut self, text: &str, now: Instant) -> Now {
        let mut state = Now { host: "fake".into(), ..Now::default() };
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let first = *self.seen.entry((number, line.to_owned())).or_insert(now);
            let (due, what) = match line.strip_prefix("at ").and_then(|rest| rest.split_once(' ')) {
                Some((time, what)) => (self.loaded + seconds(time), what),
                None => (first, line),
            };
            if due <= now {
                state.take(what, now - due).unwrap_or_else(|| panic!("the scenario's line `{line}` is none"));
            }
        }
        state
    }
}

fn seconds(text: &str) -> Duration {
    let number = text.strip_suffix('s').and_then(|number| number.parse::<f64>().ok());
    Duration::from_secs_f64(number.unwrap_or_else(|| panic!("`{text}` is not a time like 3s")))
}

impl Now {
    fn take(&mut self, line: &str, age: Duration) -> Option<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["gpus", count] => self.gpus = count.parse().ok()?,
            ["host", name] => self.host = name.to_owned(),
            ["uuids"] => self.uuids = true,
            ["wait", "lost"] => self.waits_lost = true,
            ["wait", "well"] => self.waits_lost = false,
            ["hang", function, time] => {
                self.hangs.insert(function.to_owned(), seconds(time).saturating_sub(age));
            }
            [gpu, ref rest @ ..] => {
                let gpu: u32 = gpu.strip_prefix("gpu")?.parse().ok()?;
                match *rest {
                    ["lost"] => drop(self.lost.insert(gpu, true)),
                    ["found"] => drop(self.lost.insert(gpu, false)),
                    ["xid", code] => self.events.push((gpu, Event::Xid(code.parse().ok()?))),
                    ["double_bit"] => self.events.push((gpu, Event::DoubleBit)),
                    ["field", id, value] => self.number(gpu, format!("field {id}"), value)?,
                    [name, value] => self.number(gpu, name.to_owned(), value)?,
                    _ => return None,
                }
            }
            [] => return None,
        }
        Some(())
    }

    fn number(&mut self, gpu: u32, name: String, value: &str) -> Option<()> {
        let value = if value == "none" { None } else { Some(value.parse().ok()?) };
        self.numbers.insert((gpu, name), value);
        Some(())
    }

    /// A number of a GPU; `otherwise` where the scenario does not speak of it.
    pub fn get(&self, gpu: u32, name: &str, otherwise: Option<u64>) -> Option<u64> {
        self.numbers.get(&(gpu, name.to_owned())).copied().unwrap_or(otherwise)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_lines_win_and_times_count_from_the_loading() {
        let begun = Instant::now();
        let mut clock = Clock::new(begun);
        let text =
            "gpus 2 # two\n\ngpu0 temperature 40\nat 3s gpu1 xid 79\nat 5s gpu0 temperature none\ngpu0 field 230 1";
        let at = |clock: &mut Clock, seconds| clock.read(text, begun + Duration::from_secs(seconds));
        let now = at(&mut clock, 0);
        assert_eq!((now.gpus, now.get(0, "temperature", None), now.events.len()), (2, Some(40), 0));
        assert_eq!(now.get(0, "field 230", None), Some(1));
        assert_eq!(at(&mut clock, 3).events, [(1, Event::Xid(79))]);
        assert_eq!(at(&mut clock, 5).get(0, "temperature", Some(7)), None);
    }

    #[test]
    fn a_call_hangs_for_so_long_from_when_it_was_said() {
        let begun = Instant::now();
        let mut clock = Clock::new(begun);
        clock.read("gpus 1", begun);
        let hang = |clock: &mut Clock, s| {
            clock.read("gpus 1\nhang temperature 20s", begun + Duration::from_secs(s)).hangs["temperature"]
        };
        assert_eq!(hang(&mut clock, 100), Duration::from_secs(20));
        assert_eq!(hang(&mut clock, 115), Duration::from_secs(5));
        assert_eq!(hang(&mut clock, 130), Duration::ZERO);
    }

    #[test]
    #[should_panic(expected = "the scenario's line `gpu0 sings` is none")]
    fn a_line_that_is_none_is_a_mistake() {
        Clock::new(Instant::now()).read("gpu0 sings", Instant::now());
    }
}
