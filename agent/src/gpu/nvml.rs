//! NVIDIA's management library: the only place that speaks with it.
//!
//! Every call may hang on a sick GPU, so all of this runs on threads of its own and nobody waits for them. What a driver
//! does not know, or a library has no function for, is absent and not an error: one missing number makes no GPU sick. It
//! changes nothing on a GPU.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use izar_common::id::GpuId;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enum_wrappers::nv_link::ErrorCounter;
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::{Device, EventSet, Nvml};

use super::verdict::Reading;

/// NVIDIA's own name for it, which the dynamic linker finds.
const SYSTEM: &str = "libnvidia-ml.so.1";

/// Fields that the wrapper has no function for.
const REMAP_PENDING: u32 = 144;
const REMAP_FAILED: u32 = 145;
const RECOVERY_ACTION: u32 = 230;

/// Links of a GPU at most.
const LINKS: u32 = 18;

/// The library, ready to be asked.
pub struct Library {
    nvml: Nvml,
    /// What it was opened as.
    name: OsString,
    /// Who was seen at each number: a lost GPU does not say who it is.
    known: Vec<Option<Who>>,
}

/// Who a GPU is, as the library says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    pub id: GpuId,
    pub index: u32,
    pub name: String,
    pub bus: String,
}

/// Why there is no library.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None is installed, or no driver runs that it could ask.
    #[error("{0}")]
    Absent(String),
    #[error("{0}")]
    Broken(String),
}

/// Opens the system's library, or the one at `path`.
pub fn open(path: Option<&Path>) -> Result<Nvml, Error> {
    let name = path.map_or(OsStr::new(SYSTEM), Path::as_os_str);
    match Nvml::builder().lib_path(name).init() {
        Ok(nvml) => Ok(nvml),
        // A file that was named is expected to be there.
        // Nor is one without a driver that runs: it may lie there with some other package.
        Err(error @ (NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded)) if path.is_none() => {
            Err(Error::Absent(explain(name, &error)))
        }
        Err(error) => Err(Error::Broken(explain(name, &error))),
    }
}

/// What is wrong with the library as a whole, and what mends it.
fn explain(name: &OsStr, error: &NvmlError) -> String {
    let name = name.display();
    match error {
        NvmlError::LibloadingError(why) => {
            format!("{name} cannot be loaded ({why}): install the driver's library, or mend gpu.nvml")
        }
        NvmlError::FailedToLoadSymbol(symbol) => {
            format!("{name} is of another version, or no NVML ({symbol}): install the one that belongs to the driver")
        }
        NvmlError::LibRmVersionMismatch => {
            format!(
                "{name} is of another version than the driver that runs: load the driver anew, or restart the server"
            )
        }
        error => format!("{name}: {error}"),
    }
}

/// The version of the driver.
pub fn driver(nvml: &Nvml) -> String {
    nvml.sys_driver_version().unwrap_or_default()
}

/// Takes what a call gave; notes what it says of the whole GPU.
struct Asked {
    reading: Reading,
}

impl Asked {
    fn take<T>(&mut self, answer: Result<T, NvmlError>) -> Option<T> {
        match answer {
            Ok(value) => return Some(value),
            Err(NvmlError::GpuLost) => self.reading.lost = true,
            Err(NvmlError::ResetRequired) => self.reading.reset_required = true,
            Err(_) => {}
        }
        None
    }
}

impl Library {
    /// `path`: what it was opened by.
    pub fn new(nvml: Nvml, path: Option<&Path>) -> Self {
        let name = path.map_or(OsStr::new(SYSTEM), Path::as_os_str).to_owned();
        Self { nvml, name, known: Vec::new() }
    }

    /// Fails where the library has no function that nothing goes without: GPUs that are not seen are not sound ones.
    fn has<T>(&self, what: &str, answer: Result<T, NvmlError>) -> Result<Result<T, NvmlError>, String> {
        match answer {
            Err(error @ NvmlError::FailedToLoadSymbol(_)) => Err(format!("{what}: {}", explain(&self.name, &error))),
            answer => Ok(answer),
        }
    }

    /// Reads every GPU once. `ours`: whether a process is one of this agent's.
    pub fn read(&mut self, ours: impl Fn(u32) -> bool) -> Result<Vec<(Who, Reading)>, String> {
        let count = self.has("count the GPUs", self.nvml.device_count())?;
        let count = count.map_err(|error| format!("count the GPUs: {error}"))?;
        self.known.resize(count as usize, None);
        let mut all = Vec::new();
        for index in 0..count {
            match self.has("find a GPU", self.nvml.device_by_index(index))? {
                Ok(device) => {
                    if let Ok(who) =
                        self.has("ask a GPU who it is", device.uuid())?.map(|uuid| who(&device, index, &uuid))
                    {
                        self.known[index as usize] = who.or(self.known[index as usize].take());
                    }
                    if let Some(who) = &self.known[index as usize] {
                        all.push((who.clone(), read(&device, &ours)));
                    }
                }
                // One that was never seen is nobody's loss: whoever expects it counts.
                Err(error) => {
                    if let Some(who) = &self.known[index as usize] {
                        let reset_required = matches!(error, NvmlError::ResetRequired);
                        all.push((
                            who.clone(),
                            Reading { lost: !reset_required, reset_required, ..Reading::default() },
                        ));
                    }
                }
            }
        }
        Ok(all)
    }
}

fn who(device: &Device<'_>, index: u32, uuid: &str) -> Option<Who> {
    let id = GpuId::new(&uuid.to_ascii_lowercase()).ok()?;
    let name = device.name().unwrap_or_default();
    let bus = device.pci_info().map(|pci| pci.bus_id.to_ascii_lowercase()).unwrap_or_default();
    Some(Who { id, index, name, bus })
}

fn read(device: &Device<'_>, ours: &impl Fn(u32) -> bool) -> Reading {
    let mut asked = Asked { reading: Reading::default() };
    let temperature_c = asked.take(device.temperature(TemperatureSensor::Gpu));
    let memory = asked.take(device.memory_info());
    let utilization = asked.take(device.utilization_rates());
    let power_mw = asked.take(device.power_usage());
    let corrected = asked.take(device.total_ecc_errors(MemoryError::Corrected, EccCounter::Volatile));
    let uncorrected = asked.take(device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile));
    let pcie_replays = asked.take(device.pcie_replay_counter()).map(u64::from);
    let throttle = asked.take(device.current_throttle_reasons());
    let ecc = asked.take(device.is_ecc_enabled()).map(|mode| mode.currently_enabled);
    let persistence = asked.take(device.is_in_persistent_mode());
    let processes = asked.take(device.running_compute_processes()).unwrap_or_default();
    let nvlink_crc = crc(device, &mut asked);
    let [pending, failed, recovery_action] = fields(device, &mut asked, [REMAP_PENDING, REMAP_FAILED, RECOVERY_ACTION]);
    let slowing =
        ThrottleReasons::HW_SLOWDOWN | ThrottleReasons::HW_THERMAL_SLOWDOWN | ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN;
    Reading {
        temperature_c,
        memory_used_bytes: memory.as_ref().map(|memory| memory.used),
        memory_bytes: memory.map(|memory| memory.total),
        utilization_percent: utilization.map(|rates| rates.gpu),
        power_mw,
        corrected,
        uncorrected,
        pcie_replays,
        nvlink_crc,
        slowdown: throttle.map(|reasons| reasons.intersects(slowing)),
        remap_pending: pending.map(|value| value != 0),
        remap_failed: failed.map(|value| value != 0),
        recovery_action: recovery_action.and_then(|value| u32::try_from(value).ok()),
        ecc,
        persistence,
        foreign: processes.iter().map(|process| process.pid).find(|pid| !ours(*pid)),
        ..asked.reading
    }
}

/// Checksum errors of all links; `None` where there is no link.
fn crc(device: &Device<'_>, asked: &mut Asked) -> Option<u64> {
    let mut total = None;
    for link in 0..LINKS {
        let link = device.link_wrapper_for(link);
        if asked.take(link.is_active()) != Some(true) {
            break;
        }
        if let Some(errors) = asked.take(link.error_counter(ErrorCounter::DlCrcFlit)) {
            total = Some(total.unwrap_or(0_u64).saturating_add(errors));
        }
    }
    total
}

/// Values of fields; each that the driver does not know is absent.
fn fields<const N: usize>(device: &Device<'_>, asked: &mut Asked, ids: [u32; N]) -> [Option<u64>; N] {
    let samples = asked.take(device.field_values_for(&ids.map(FieldId))).unwrap_or_default();
    ids.map(|id| {
        let sample = samples.iter().flatten().find(|sample| sample.field.0 == id)?;
        match sample.value.as_ref().ok()? {
            SampleValue::U32(value) => Some(u64::from(*value)),
            SampleValue::U64(value) => Some(*value),
            SampleValue::I64(value) => u64::try_from(*value).ok(),
            SampleValue::F64(_) => None,
        }
    })
}

/// Something that happened on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    Xid {
        id: GpuId,
        code: u32,
    },
    /// Something else, or on a GPU that does not say who it is: the next reading will tell.
    Look,
    /// A GPU is lost: it tells so at once, as long as it is.
    Lost,
    Nothing,
}

/// The set of events of all GPUs.
pub struct Events<'a> {
    set: EventSet<'a>,
    /// GPUs that tell of none, and why.
    pub silent: Vec<(u32, String)>,
}

impl<'a> Events<'a> {
    /// Asks for the events of every GPU that has some; fails where none has.
    pub fn of(nvml: &'a Nvml) -> Result<Self, String> {
        let count = nvml.device_count().map_err(|error| error.to_string())?;
        let mut silent: Vec<(u32, String)> = Vec::new();
        // A set is gone when a GPU refuses it, so it is made anew without that one: as often as there are GPUs, at most.
        loop {
            let left_out: BTreeSet<u32> = silent.iter().map(|(index, _)| *index).collect();
            if left_out.len() as u32 == count {
                return Err(silent.pop().map_or_else(|| "there is no GPU".to_owned(), |(_, why)| why));
            }
            let set = nvml.create_event_set().map_err(|error| error.to_string())?;
            let mut asked = (0..count).filter(|index| !left_out.contains(index));
            match asked.try_fold(set, |set, index| register(nvml, index, set).map_err(|why| (index, why))) {
                Ok(set) => return Ok(Self { set, silent }),
                Err(refused) => silent.push(refused),
            }
        }
    }

    /// Waits for the next event, so long at most.
    pub fn wait(&self, ms: u32) -> Result<Happened, String> {
        let event = match self.set.wait(ms) {
            Ok(event) => event,
            Err(NvmlError::Timeout) => return Ok(Happened::Nothing),
            Err(NvmlError::GpuLost) => return Ok(Happened::Lost),
            Err(error) => return Err(error.to_string()),
        };
        let id = event.device.uuid().ok().and_then(|uuid| GpuId::new(&uuid.to_ascii_lowercase()).ok());
        Ok(match (event.event_data, id) {
            (Some(XidError::Value(code)), Some(id)) => {
                Happened::Xid { id, code: u32::try_from(code).unwrap_or(u32::MAX) }
            }
            _ => Happened::Look,
        })
    }
}

/// Adds a GPU's events to a set: those that we want and it has.
fn register<'a>(nvml: &'a Nvml, index: u32, set: EventSet<'a>) -> Result<EventSet<'a>, String> {
    let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
    let device = nvml.device_by_index(index).map_err(|error| error.to_string())?;
    let events = match device.supported_event_types() {
        Ok(supported) => wanted & supported,
        Err(NvmlError::FailedToLoadSymbol(_) | NvmlError::NotSupported) => wanted,
        Err(error) => return Err(error.to_string()),
    };
    if events.is_empty() {
        return Err("it has none".to_owned());
    }
    device.register_events(events, set).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_does_not_fit_says_which_it_is_and_what_mends_it() {
        let check = |error: NvmlError, expected: &str| {
            let told = explain(OsStr::new("libnvidia-ml.so.1"), &error);
            assert!(told.starts_with("libnvidia-ml.so.1 ") && told.contains(expected), "{told}");
        };
        check(NvmlError::FailedToLoadSymbol("undefined symbol: nvmlInit_v2".into()), "undefined symbol: nvmlInit_v2");
        check(NvmlError::FailedToLoadSymbol(String::new()), "install the one that belongs to the driver");
        check(NvmlError::LibRmVersionMismatch, "another version than the driver that runs: load the driver anew");
        let Err(Error::Broken(told)) = open(Some(Path::new("/nowhere.so"))) else { panic!("it is not there") };
        assert!(told.starts_with("/nowhere.so cannot be loaded (") && told.ends_with("or mend gpu.nvml"), "{told}");
    }
}
