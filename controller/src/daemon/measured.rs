//! What machines add to the metrics page, a controller's own and those of its agents: how long certificates are good, the
//! room on disks, and whose clock runs fast.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use izar_common::clock::wall_ms;
use izar_common::disk;
use izar_common::health::Machine;
use izar_common::tls::Certificates;

use crate::agents::Agents;
use crate::metrics::{Kind, Metrics};
use crate::state;

/// Adds what its own machine has.
pub fn machine(metrics: &Metrics, certificates: Arc<Certificates>, disk: Arc<disk::Seen>) {
    let help = "When the first certificate of a file that is in use expires, in Unix seconds.";
    metrics.numbers("izar_certificate_expiry_timestamp_seconds", help, Kind::Gauge, move |samples| {
        for (file, expires) in certificates.expiries() {
            samples(&[("file", &file.to_string_lossy())], expires as f64);
        }
    });
    let free = disk.clone();
    let help = "Room on the disk of the data directory, as seen within the last minute.";
    metrics.numbers("izar_disk_free_bytes", help, Kind::Gauge, move |samples| one(free.bytes().0, &free, samples));
    let help = "What the disk of the data directory holds.";
    metrics.numbers("izar_disk_bytes", help, Kind::Gauge, move |samples| one(disk.bytes().1, &disk, samples));
}

/// Adds how fast other controllers' clocks are: as last asked, or as a record shows that was made since.
pub fn clock(metrics: &Metrics, state: state::Shared, ahead_ms: Arc<AtomicU64>) {
    let help = "How far another controller's clock is ahead of this one's, as asked within the last minute or seen in records.";
    metrics.number("izar_clock_ahead_seconds", help, Kind::Gauge, move || {
        let recorded = state.read(|state| state.latest().ms()).saturating_sub(wall_ms());
        recorded.max(ahead_ms.load(Relaxed)) as f64 / 1000.0
    });
}

/// Adds what the agents of its sessions say of theirs.
pub fn agents(metrics: &Metrics, agents: &Agents) {
    let add = |name, help, number: fn(&Machine) -> Option<f64>| {
        let agents = agents.clone();
        metrics.numbers(name, help, Kind::Gauge, move |samples| {
            for (agent, view) in agents.fleet().agents.iter().filter(|(_, view)| view.connected) {
                if let Some(value) = view.machine.as_ref().and_then(number) {
                    samples(&[("agent", agent.as_str())], value);
                }
            }
        });
    };
    let help = "When the first certificate that an agent uses expires, in Unix seconds.";
    add("izar_agent_certificate_expiry_timestamp_seconds", help, |machine| Some(machine.certificate_expires as f64));
    add("izar_agent_disk_free_bytes", "Room on the disk of an agent's data directory.", |machine| {
        (machine.disk_bytes > 0).then_some(machine.disk_free_bytes as f64)
    });
    add("izar_agent_disk_bytes", "What that disk holds.", |machine| {
        (machine.disk_bytes > 0).then_some(machine.disk_bytes as f64)
    });
}

/// No sample before the first look: an empty disk and an unknown one are two things.
fn one(bytes: u64, disk: &disk::Seen, samples: crate::metrics::Samples<'_>) {
    if disk.bytes().1 > 0 {
        samples(&[], bytes as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_was_not_looked_at_has_no_sample() {
        one(0, &disk::Seen::default(), &mut |_, value| panic!("{value}"));
    }
}
