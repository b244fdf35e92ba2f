//! What GPUs' health means for workers: how much each may be given, and why not more. Pure.

use std::sync::Arc;

use izar_common::health::gpu::{Health, Mode};
use izar_common::wire::agent::Device;

use super::Guards;

/// The health of the moment, asked for each worker.
#[derive(Debug, Clone)]
pub struct Fitness {
    health: Arc<Health>,
    guards: Guards,
}

/// What a worker may be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// Percent of the work; 0: nothing, and what it has goes elsewhere.
    pub share: u8,
    /// Why not all; empty at 100.
    pub reason: String,
}

impl Fit {
    /// Nothing is known against it.
    pub const WHOLE: Self = Self { share: 100, reason: String::new() };
}

impl Fitness {
    pub fn new(health: Arc<Health>, guards: Guards) -> Self {
        Self { health, guards }
    }

    /// What a worker on a device may be given.
    pub fn of(&self, device: Device) -> Fit {
        let health = &self.health;
        if health.mode == Mode::Observe {
            return Fit::WHOLE;
        }
        if !health.fault.is_empty() {
            return Fit { share: 0, reason: health.fault.clone() };
        }
        let guards = |cuda: Option<u16>| match self.guards {
            Guards::All => true,
            Guards::Own => matches!(device, Device::Cuda(number) if cuda == Some(number)),
        };
        let worst = health.gpus.iter().filter(|gpu| guards(gpu.cuda)).min_by_key(|gpu| gpu.state.share());
        match worst {
            Some(gpu) if gpu.state.share() < 100 => {
                Fit { share: gpu.state.share(), reason: format!("GPU {} is {}: {}", gpu.index, gpu.state, gpu.reason) }
            }
            // A device that no GPU answers for: the worker itself will say that it does not open.
            _ => Fit::WHOLE,
        }
    }
}

/// The number by which workers name a GPU: CUDA's, which `CUDA_VISIBLE_DEVICES` changes. Workers count by the PCI bus,
/// as the library does.
pub fn cuda_number(visible: Option<&str>, index: u32, uuid: &str) -> Option<u16> {
    let Some(visible) = visible else { return u16::try_from(index).ok() };
    let mine = |word: &str| match word.parse::<u32>() {
        Ok(number) => number == index,
        // A prefix of the identity is enough for CUDA.
        Err(_) => !word.is_empty() && uuid.to_ascii_lowercase().starts_with(&word.to_ascii_lowercase()),
    };
    let at = visible.split(',').map(str::trim).position(mine)?;
    u16::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use izar_common::health::gpu::{State, View};

    fn view(index: u32, state: State) -> View {
        let id = format!("gpu-{index}").parse().unwrap();
        View { cuda: Some(index as u16), reason: "Xid 95".into(), ..View::new(id, index, state) }
    }

    fn fit(mode: Mode, guards: Guards, fault: &str, states: [State; 2], device: Device) -> (u8, String) {
        let gpus = vec![view(0, states[0]), view(1, states[1])];
        let health = Health { mode, fault: fault.into(), gpus, ..Health::default() };
        let Fit { share, reason } = Fitness::new(health.into(), guards).of(device);
        (share, reason)
    }

    #[test]
    fn a_gpu_speaks_for_the_workers_on_it() {
        let states = [State::Cordoned, State::Degraded];
        let of = |device| fit(Mode::Advise, Guards::Own, "", states, device);
        assert_eq!(of(Device::Cuda(0)), (0, "GPU 0 is cordoned: Xid 95".into()));
        assert_eq!(of(Device::Cuda(1)).0, 50);
        assert_eq!(of(Device::Cpu), (100, String::new()));
        assert_eq!(of(Device::Cuda(7)), (100, String::new()));
    }

    #[test]
    fn or_for_all_if_it_shall() {
        let states = [State::Probation, State::Degraded];
        assert_eq!(fit(Mode::Advise, Guards::All, "", states, Device::Cpu).0, 25);
    }

    #[test]
    fn a_fault_of_the_server_speaks_for_every_worker_and_nothing_does_where_it_is_only_observed() {
        let states = [State::Healthy, State::Cordoned];
        assert_eq!(fit(Mode::Advise, Guards::Own, "hangs", states, Device::Cpu), (0, "hangs".into()));
        assert_eq!(fit(Mode::Observe, Guards::All, "hangs", states, Device::Cuda(1)).0, 100);
    }

    #[test]
    fn cudas_numbers_are_those_of_what_is_visible() {
        assert_eq!(cuda_number(None, 3, "GPU-aa"), Some(3));
        assert_eq!(cuda_number(Some("2,0"), 0, "GPU-aa"), Some(1));
        assert_eq!(cuda_number(Some("2,0"), 1, "GPU-aa"), None);
        assert_eq!(cuda_number(Some("GPU-bb, GPU-aa"), 5, "gpu-aa12"), Some(1));
        assert_eq!(cuda_number(Some(""), 0, "GPU-aa"), None);
    }
}
