//! GPUs on the metrics page: our names, and beside them those of NVIDIA's DCGM exporter, so that dashboards and alerts
//! that were made for it work here.
//!
//! Only what agents of this controller's sessions say; a number that a driver does not give has no sample.

use izar_common::health::gpu::{Action, Health, Outcome, State, View};

use crate::agents::Agents;
use crate::fleet::Fleet;
use crate::metrics::{Kind, Metrics, Samples};

type Number = fn(&View) -> Option<f64>;

/// Name, help, kind, and where it stands in a report.
const NUMBERS: [(&str, &str, Kind, Number); 17] = [
    ("izar_gpu_share", "Percent of its work that a GPU's health lets it get.", Kind::Gauge, |gpu| {
        Some(gpu.state.share().into())
    }),
    ("izar_gpu_temperature_celsius", "A GPU's temperature.", Kind::Gauge, |gpu| gpu.temperature_c.map(f64::from)),
    ("izar_gpu_memory_used_bytes", "A GPU's memory in use.", Kind::Gauge, |gpu| float(gpu.memory_used_bytes)),
    ("izar_gpu_memory_bytes", "A GPU's memory.", Kind::Gauge, |gpu| float(gpu.memory_bytes)),
    ("izar_gpu_power_watts", "What a GPU draws.", Kind::Gauge, |gpu| gpu.power_mw.map(|mw| f64::from(mw) / 1000.0)),
    ("izar_gpu_utilization_ratio", "How busy a GPU is.", Kind::Gauge, |gpu| {
        gpu.utilization_percent.map(|percent| f64::from(percent) / 100.0)
    }),
    ("izar_gpu_xids_total", "Xids since the agent began.", Kind::Counter, |gpu| Some(gpu.xids as f64)),
    ("izar_gpu_recovery_action", "What the driver asks for: 0 nothing.", Kind::Gauge, |gpu| {
        gpu.recovery_action.map(f64::from)
    }),
    ("DCGM_FI_DEV_GPU_TEMP", "GPU temperature (in C).", Kind::Gauge, |gpu| gpu.temperature_c.map(f64::from)),
    ("DCGM_FI_DEV_POWER_USAGE", "Power draw (in W).", Kind::Gauge, |gpu| gpu.power_mw.map(|mw| f64::from(mw) / 1000.0)),
    ("DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", Kind::Gauge, |gpu| gpu.utilization_percent.map(f64::from)),
    ("DCGM_FI_DEV_FB_USED", "Framebuffer memory used (in MiB).", Kind::Gauge, |gpu| mib(gpu.memory_used_bytes)),
    ("DCGM_FI_DEV_FB_FREE", "Framebuffer memory free (in MiB).", Kind::Gauge, |gpu| {
        mib(Some(gpu.memory_bytes?.saturating_sub(gpu.memory_used_bytes?)))
    }),
    ("DCGM_FI_DEV_XID_ERRORS", "Value of the last XID error encountered.", Kind::Gauge, |gpu| {
        Some(gpu.last_xid.unwrap_or(0).into())
    }),
    ("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "Total number of single-bit volatile ECC errors.", Kind::Counter, |gpu| {
        float(gpu.corrected_errors)
    }),
    ("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "Total number of double-bit volatile ECC errors.", Kind::Counter, |gpu| {
        float(gpu.uncorrected_errors)
    }),
    ("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "Total number of PCIe retries.", Kind::Counter, |gpu| float(gpu.pcie_replays)),
];

fn float(value: Option<u64>) -> Option<f64> {
    value.map(|value| value as f64)
}

fn mib(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| (bytes >> 20) as f64)
}

fn servers(fleet: &Fleet) -> impl Iterator<Item = (&str, &Health)> {
    let connected = fleet.agents.iter().filter(|(_, view)| view.connected);
    connected.filter_map(|(agent, view)| Some((agent.as_str(), &view.report.as_ref()?.health)))
}

/// Adds all of it to the page.
pub fn measure(metrics: &Metrics, agents: &Agents) {
    for (name, help, kind, number) in NUMBERS {
        let agents = agents.clone();
        metrics.numbers(name, help, kind, move |samples| each(&agents.fleet(), number, samples));
    }
    let told = agents.clone();
    metrics.numbers("izar_gpu_state", "1 for the state that a GPU is in.", Kind::Gauge, move |samples| {
        states(&told.fleet(), samples);
    });
    let told = agents.clone();
    let help = "1 for an agent whose GPUs, or one that it cannot do without, are not in order.";
    metrics.numbers("izar_gpu_agent_fault", help, Kind::Gauge, move |samples| {
        for (agent, health) in servers(&told.fleet()) {
            samples(&[("agent", agent)], f64::from(u8::from(!health.fault.is_empty())));
        }
    });
    remedies(metrics, agents);
}

/// Remedies: what came of them, and what is under way.
fn remedies(metrics: &Metrics, agents: &Agents) {
    let told = agents.clone();
    let help = "Remedies of GPUs that have ended while this controller led.";
    metrics.numbers("izar_gpu_remedies_total", help, Kind::Counter, move |samples| {
        let ended = told.remedies();
        for action in Action::ALL {
            for outcome in Outcome::ALL {
                let count = ended.get(&(action, outcome)).copied().unwrap_or(0);
                samples(&[("verb", action.as_str()), ("outcome", outcome.as_str())], count as f64);
            }
        }
    });
    let told = agents.clone();
    metrics.numbers("izar_gpu_remedies_open", "Remedies of GPUs under way.", Kind::Gauge, move |samples| {
        let open = told.open_remedies();
        for action in Action::ALL {
            let count = open.iter().filter(|remedy| remedy.action == action).count();
            samples(&[("verb", action.as_str())], count as f64);
        }
    });
}

fn each(fleet: &Fleet, number: Number, samples: Samples<'_>) {
    for (agent, health) in servers(fleet) {
        for gpu in &health.gpus {
            let index = gpu.index.to_string();
            let labels =
                [("Hostname", agent), ("gpu", &index), ("UUID", gpu.id.as_str()), ("modelName", gpu.name.as_str())];
            if let Some(value) = number(gpu) {
                samples(&labels, value);
            }
        }
    }
}

fn states(fleet: &Fleet, samples: Samples<'_>) {
    for (agent, health) in servers(fleet) {
        for gpu in &health.gpus {
            let index = gpu.index.to_string();
            for state in State::ALL {
                let labels =
                    [("Hostname", agent), ("gpu", &index), ("UUID", gpu.id.as_str()), ("state", state.as_str())];
                samples(&labels, f64::from(u8::from(gpu.state == state)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::fixture::{empty_report, gpu};

    #[test]
    fn a_gpu_has_our_names_and_dcgms_and_no_sample_of_what_is_not_known() {
        let mut fleet = Fleet::new(0);
        let agent = "a1".parse().unwrap();
        fleet.connect(&agent, 1);
        let mut report = empty_report();
        let mut card = gpu("gpu-1", State::Cordoned);
        (card.temperature_c, card.last_xid) = (Some(91), Some(79));
        report.health.gpus = vec![card];
        fleet.report(&agent, report, 1);
        let read = |name: &str| {
            let number = NUMBERS.iter().find(|(other, ..)| *other == name).unwrap().3;
            let mut values = Vec::new();
            each(&fleet, number, &mut |labels, value| {
                assert!(labels.contains(&("UUID", "gpu-1")) && labels.contains(&("Hostname", "a1")));
                values.push(value);
            });
            values
        };
        assert_eq!(read("DCGM_FI_DEV_GPU_TEMP"), [91.0]);
        assert_eq!(read("DCGM_FI_DEV_XID_ERRORS"), [79.0]);
        assert_eq!(read("izar_gpu_share"), [0.0]);
        assert!(read("DCGM_FI_DEV_POWER_USAGE").is_empty());
        let mut ones = Vec::new();
        states(&fleet, &mut |labels, value| {
            if value > 0.0 {
                ones.push(labels[3].1.to_owned());
            }
        });
        assert_eq!(ones, ["cordoned"]);
    }
}
