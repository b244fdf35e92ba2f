//! Plays NVIDIA's management library: the C functions that an agent calls, with the GPUs of a scenario.
//!
//! The agent loads it as it would load the real one, so everything on its side of the library's interface is the real
//! thing. C functions with pointers cannot be had without unsafe code; it is all here. `IZAR_FAKE_NVML` names the
//! scenario's file (see `scenario`). It resets nothing and knows no GPU of this machine.
#![allow(non_snake_case)]
#![deny(unsafe_op_in_unsafe_fn)]

use std::ffi::{c_char, c_int, c_uint, c_ulonglong};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlEventData_t, nvmlEventSet_t, nvmlFieldValue_t, nvmlMemory_t, nvmlPciInfo_t, nvmlProcessInfo_t,
    nvmlUtilization_t, nvmlValue_t,
};

pub mod scenario;

use scenario::{Clock, Event, Now};

/// What a call returns: NVML's numbers.
type Code = c_uint;
const SUCCESS: Code = 0;
const INVALID: Code = 2;
const NOT_SUPPORTED: Code = 3;
const INSUFFICIENT_SIZE: Code = 7;
const TIMEOUT: Code = 10;
const LOST: Code = 15;

const UNSIGNED_INT: c_uint = 1;
const XID_EVENT: c_ulonglong = 8;
const DOUBLE_BIT_EVENT: c_ulonglong = 2;
const HW_SLOWDOWN: c_ulonglong = 8;

/// How often a scenario is looked at while an event is waited for.
const LOOK: Duration = Duration::from_millis(20);

static CLOCK: Mutex<Option<Clock>> = Mutex::new(None);

/// What the scenario says now.
fn now() -> Now {
    let path = std::env::var_os("IZAR_FAKE_NVML").expect("IZAR_FAKE_NVML names the scenario's file");
    let text = std::fs::read_to_string(&path).expect("the scenario can be read");
    let mut clock = CLOCK.lock().expect("no panic while the clock is held");
    clock.get_or_insert_with(|| Clock::new(Instant::now())).read(&text, Instant::now())
}

/// Begins a call: hangs if it shall.
fn call(function: &str) -> Now {
    let now = now();
    if let Some(time) = now.hangs.get(function).filter(|time| !time.is_zero()) {
        std::thread::sleep(*time);
    }
    now
}

/// A device's handle is its number plus one, so that none is null.
fn number(device: nvmlDevice_t) -> u32 {
    (device as usize as u32).wrapping_sub(1)
}

fn handle(index: u32) -> nvmlDevice_t {
    (index as usize + 1) as nvmlDevice_t
}

/// Writes what a call gives.
///
/// # Safety
/// `out` is null or points to a `T` that may be written.
unsafe fn give<T>(out: *mut T, value: T) -> Code {
    if out.is_null() {
        return INVALID;
    }
    // SAFETY: not null, and the caller says that it may be written.
    unsafe { out.write(value) };
    SUCCESS
}

/// Gives a number of a device, if the driver knows it.
///
/// # Safety
/// As for `give`.
unsafe fn number_of<T>(
    device: nvmlDevice_t,
    name: &str,
    otherwise: Option<u64>,
    out: *mut T,
    make: impl FnOnce(u64) -> T,
) -> Code {
    let (now, gpu) = (call(name), number(device));
    if now.lost.get(&gpu) == Some(&true) {
        return LOST;
    }
    match now.get(gpu, name, otherwise) {
        // SAFETY: the caller's promise.
        Some(value) => unsafe { give(out, make(value)) },
        None => NOT_SUPPORTED,
    }
}

/// Writes a text with its end.
///
/// # Safety
/// `out` points to `length` bytes that may be written.
unsafe fn text(value: &str, out: *mut c_char, length: c_uint) -> Code {
    if out.is_null() || value.len() >= length as usize {
        return INSUFFICIENT_SIZE;
    }
    for (at, byte) in value.bytes().chain([0]).enumerate() {
        // SAFETY: `at` is at most the text's length, which is below `length`.
        unsafe { out.add(at).write(byte as c_char) };
    }
    SUCCESS
}

fn characters<const N: usize>(value: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, byte) in out.iter_mut().take(N - 1).zip(value.bytes()) {
        *to = byte as c_char;
    }
    out
}

/// How often the library is open. While it is, the scenario's file has one beside it that ends in `.open`: a reset is
/// refused as long as anybody has a GPU open.
static OPEN: Mutex<u32> = Mutex::new(0);

/// Counts the library as opened, or as closed.
fn count(opened: bool) {
    let mut open = OPEN.lock().expect("no panic while the count is held");
    *open = if opened { *open + 1 } else { *open - 1 };
    let mut mark = std::env::var_os("IZAR_FAKE_NVML").expect("IZAR_FAKE_NVML names the scenario's file");
    mark.push(".open");
    match *open {
        0 => std::fs::remove_file(&mark).expect("the mark was made"),
        _ => std::fs::write(&mark, "").expect("the mark can be made"),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> Code {
    call("init");
    count(true);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> Code {
    count(false);
    SUCCESS
}

/// # Safety
/// As NVML documents: `out` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { text("570.00.fake", out, length) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { give(out, call("count").gpus) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, out: *mut nvmlDevice_t) -> Code {
    let now = call("handle");
    if index >= now.gpus {
        return INVALID;
    }
    if now.lost.get(&index) == Some(&true) {
        return LOST;
    }
    // SAFETY: the caller's promise.
    unsafe { give(out, handle(index)) }
}

/// Who a GPU is.
fn identity(now: &Now, number: u32) -> String {
    if now.uuids {
        let host = now.host.bytes().fold(0_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        return format!("GPU-{host:08x}-0000-4000-8000-{number:012x}");
    }
    format!("GPU-{}-{number}", now.host)
}

/// # Safety
/// As NVML documents: `out` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: nvmlDevice_t, out: *mut c_char, length: c_uint) -> Code {
    // SAFETY: the caller's promise. It tells even when the GPU is lost, as the real one does of an event's device.
    unsafe { text(&identity(&now(), number(device)), out, length) }
}

/// # Safety
/// As NVML documents: `out` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(_: nvmlDevice_t, out: *mut c_char, length: c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { text("Fake H100", out, length) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(device: nvmlDevice_t, out: *mut nvmlPciInfo_t) -> Code {
    let bus = number(device) + 0x10;
    let info = nvmlPciInfo_t {
        busIdLegacy: characters(&format!("0000:{bus:02X}:00.0")),
        domain: 0,
        bus,
        device: 0,
        pciDeviceId: 0x2330_10de,
        pciSubSystemId: 0,
        busId: characters(&format!("00000000:{bus:02X}:00.0")),
    };
    // SAFETY: the caller's promise.
    unsafe { give(out, info) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(device: nvmlDevice_t, _sensor: c_uint, out: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "temperature", Some(40), out, |value| value as c_uint) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo(device: nvmlDevice_t, out: *mut nvmlMemory_t) -> Code {
    let (now, gpu) = (now(), number(device));
    let total = now.get(gpu, "total", Some(80 << 30)).unwrap_or(0);
    let used = now.get(gpu, "used", Some(1 << 30)).unwrap_or(0);
    let free = total.saturating_sub(used);
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "memory", Some(0), out, |_| nvmlMemory_t { total, free, used }) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(device: nvmlDevice_t, out: *mut nvmlUtilization_t) -> Code {
    let rates = |value| nvmlUtilization_t { gpu: value as c_uint, memory: 0 };
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "utilization", Some(50), out, rates) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: nvmlDevice_t, out: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "power", Some(300_000), out, |value| value as c_uint) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: nvmlDevice_t,
    kind: c_uint,
    _counter: c_uint,
    out: *mut c_ulonglong,
) -> Code {
    let name = if kind == 0 { "corrected" } else { "uncorrected" };
    // SAFETY: the caller's promise.
    unsafe { number_of(device, name, Some(0), out, |value| value) }
}

/// # Safety
/// As NVML documents: both may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetEccMode(device: nvmlDevice_t, out: *mut c_uint, pending: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe {
        match number_of(device, "ecc", Some(1), out, |value| value as c_uint) {
            SUCCESS => number_of(device, "ecc", Some(1), pending, |value| value as c_uint),
            code => code,
        }
    }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPersistenceMode(device: nvmlDevice_t, out: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "persistence", Some(1), out, |value| value as c_uint) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPcieReplayCounter(device: nvmlDevice_t, out: *mut c_uint) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "replays", Some(0), out, |value| value as c_uint) }
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(
    device: nvmlDevice_t,
    out: *mut c_ulonglong,
) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "slowdown", Some(0), out, |value| if value > 0 { HW_SLOWDOWN } else { 0 }) }
}

/// # Safety
/// As NVML documents: `out` may be written, `processes` has as many places as it says, or is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: nvmlDevice_t,
    count: *mut c_uint,
    processes: *mut nvmlProcessInfo_t,
) -> Code {
    let Some(pid) = call("process").get(number(device), "process", None) else {
        // SAFETY: the caller's promise.
        return unsafe { give(count, 0) };
    };
    // SAFETY: the caller's promise; a null `processes` has no place at all.
    unsafe {
        if processes.is_null() || count.is_null() || *count == 0 {
            give(count, 1);
            return INSUFFICIENT_SIZE;
        }
        let mut process: nvmlProcessInfo_t = std::mem::zeroed();
        process.pid = pid as c_uint;
        processes.write(process);
        give(count, 1)
    }
}

/// # Safety
/// As NVML documents: `values` are `count`, with the field's id in each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(
    device: nvmlDevice_t,
    count: c_int,
    values: *mut nvmlFieldValue_t,
) -> Code {
    let (now, gpu) = (call("fields"), number(device));
    if now.lost.get(&gpu) == Some(&true) {
        return LOST;
    }
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's promise: there are so many.
        let field = unsafe { &mut *values.add(at) };
        match now.get(gpu, &format!("field {}", field.fieldId), Some(0)) {
            Some(value) => {
                (field.nvmlReturn, field.valueType) = (SUCCESS, UNSIGNED_INT);
                field.value = nvmlValue_t { uiVal: value as c_uint };
            }
            None => field.nvmlReturn = NOT_SUPPORTED,
        }
    }
    SUCCESS
}

/// What a set of events has given so far: events of the scenario, by their place in it.
struct Set {
    given: Mutex<usize>,
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(out: *mut nvmlEventSet_t) -> Code {
    // What happened before it was there it does not give.
    let set = Box::new(Set { given: Mutex::new(now().events.len()) });
    // SAFETY: the caller's promise; whoever frees the set makes the box again.
    unsafe { give(out, Box::into_raw(set).cast()) }
}

/// The events that a GPU has.
fn has(now: &Now, gpu: u32) -> c_ulonglong {
    now.get(gpu, "events", Some(XID_EVENT | DOUBLE_BIT_EVENT)).unwrap_or(0)
}

/// # Safety
/// As NVML documents: `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetSupportedEventTypes(device: nvmlDevice_t, out: *mut c_ulonglong) -> Code {
    // SAFETY: the caller's promise.
    unsafe { number_of(device, "events", Some(XID_EVENT | DOUBLE_BIT_EVENT), out, |value| value) }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceRegisterEvents(device: nvmlDevice_t, types: c_ulonglong, _: nvmlEventSet_t) -> Code {
    let (now, gpu) = (call("register"), number(device));
    if now.lost.get(&gpu) == Some(&true) {
        return LOST;
    }
    // As the real one: all of them or none.
    if types & !has(&now, gpu) != 0 { NOT_SUPPORTED } else { SUCCESS }
}

/// # Safety
/// As NVML documents: the set was made by `nvmlEventSetCreate` and not freed; `out` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    set: nvmlEventSet_t,
    out: *mut nvmlEventData_t,
    timeout_ms: c_uint,
) -> Code {
    // SAFETY: the caller's promise.
    let set: &Set = unsafe { &*set.cast() };
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    call("wait");
    loop {
        let now = now();
        if now.waits_lost {
            return LOST;
        }
        let mut given = set.given.lock().expect("no panic while a set is held");
        if let Some((gpu, event)) = now.events.get(*given).copied() {
            *given += 1;
            let (eventType, eventData) = match event {
                Event::Xid(code) => (XID_EVENT, code),
                Event::DoubleBit => (DOUBLE_BIT_EVENT, 0),
            };
            if has(&now, gpu) & eventType == 0 {
                continue;
            }
            let event = nvmlEventData_t {
                device: handle(gpu),
                eventType,
                eventData,
                gpuInstanceId: u32::MAX,
                computeInstanceId: u32::MAX,
            };
            // SAFETY: the caller's promise.
            return unsafe { give(out, event) };
        }
        drop(given);
        if Instant::now() >= until {
            return TIMEOUT;
        }
        std::thread::sleep(LOOK);
    }
}

/// # Safety
/// As NVML documents: the set was made by `nvmlEventSetCreate` and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetFree(set: nvmlEventSet_t) -> Code {
    if !set.is_null() {
        // SAFETY: the caller's promise: it is the box that was given away.
        drop(unsafe { Box::from_raw(set.cast::<Set>()) });
    }
    SUCCESS
}
