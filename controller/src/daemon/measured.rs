//! What a controller's machine adds to the metrics page: how long its certificates are good, and the room on its disk.

use std::sync::Arc;

use izar_common::disk;
use izar_common::tls::Certificates;

use crate::metrics::{Kind, Metrics};

/// Adds all of it to the page.
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
