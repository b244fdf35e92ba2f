//! Between a controller and an agent: reports up, whole assignments down, and a stream for each job.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Wire;
use crate::chat::{CAPSULE_BYTES, Job, JobEvent};
use crate::health::gpu::{Hold, Order};
use crate::health::{Generation, Machine, Report};
use crate::id::{DeploymentId, Hash, NumericsId, TurnId, WorkerId};
use crate::manifest::Manifest;
use crate::prefix::Sketch;

/// From an agent, on its session stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Up {
    /// In a box, for it is much larger than the other.
    Report(Box<Report>),
    /// What a worker of the last report holds for later prompts. Apart from reports, which are repeated many times a
    /// second: it is sent once, and again when it has changed.
    Sketch { worker: WorkerId, sketch: Sketch },
    /// Of its machine: at the beginning, and when that has changed, which is once a minute at most.
    Machine(Machine),
}
impl Wire for Up {
    const TYPE: u16 = 16;
    const LIMIT: usize = 1 << 20;
}

/// From a controller, on an agent's session stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Down {
    Assignment(Assignment),
    /// The words with which the agent shall open its tripwire: a TCP connection to the port of this session's, which
    /// falls at once when the agent's process does.
    Tripwire([u8; 16]),
}
impl Wire for Down {
    const TYPE: u16 = 17;
    const LIMIT: usize = 4 << 20;
}

/// All that an agent shall run. Never a difference: the agent compares it with what runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    pub generation: Generation,
    pub workers: Vec<WorkerSpec>,
    /// What is remembered against its GPUs.
    pub holds: Vec<Hold>,
    /// What it shall do to them.
    pub order: Option<Order>,
}

/// One worker that an agent shall run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    pub worker: WorkerId,
    pub deployment: DeploymentId,
    pub revision: Hash,
    pub manifest: Manifest,
    pub engine: EngineOptions,
}

/// How a worker's engine runs its model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineOptions {
    /// Most sequences in a step. Default 32.
    pub max_batch: u32,
    /// Most tokens of prompt and answer together; 0 means what the model was made for.
    pub max_context: u32,
    /// Threads of the engine; 0 leaves it to the agent.
    pub threads: u32,
    /// What holds the model and computes it. Default the CPU.
    pub device: Device,
    /// How the weights are kept in memory. Default int4.
    pub quant: Quant,
    /// How finely what flows between layers is rounded before a product with integer weights. Default auto.
    pub activations: Activations,
    /// Which kernels compute. Default auto.
    pub kernels: Kernels,
    /// How keys and values are kept. Default f16.
    pub cache: CacheType,
    /// Memory for keys and values; 0 means [`CACHE_BYTES`].
    pub cache_bytes: u64,
}

/// What `cache_bytes` 0 means: 512 MiB.
pub const CACHE_BYTES: u64 = 512 << 20;

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_batch: 32,
            max_context: 0,
            threads: 0,
            device: Device::Cpu,
            quant: Quant::Int4,
            activations: Activations::Auto,
            kernels: Kernels::Auto,
            cache: CacheType::F16,
            cache_bytes: 0,
        }
    }
}

impl EngineOptions {
    /// Memory for keys and values, the default put in.
    pub fn cache_budget(&self) -> u64 {
        if self.cache_bytes == 0 { CACHE_BYTES } else { self.cache_bytes }
    }
}

/// Makes an enum that is written as one of some words, in JSON and on command lines.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)*
        }
        impl $name {
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl FromStr for $name {
            type Err = UnknownWord;
            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(UnknownWord { word: word.to_owned(), known: [$($word),*].join(", ") }),
                }
            }
        }
    };
}

/// What holds a model and computes it: `cpu`, or `cuda:0` for the first NVIDIA card that the worker sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    Cpu,
    Cuda(u16),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        let cuda = || word.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda);
        match word {
            "cpu" => Some(Self::Cpu),
            _ => cuda(),
        }
        .ok_or_else(|| UnknownWord { word: word.to_owned(), known: "cpu, cuda:0, cuda:1, …".to_owned() })
    }
}

impl TryFrom<String> for Device {
    type Error = UnknownWord;
    fn try_from(word: String) -> Result<Self, UnknownWord> {
        word.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

/// A word that is none of those that an option takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is not one of {known}")]
pub struct UnknownWord {
    word: String,
    known: String,
}

words! {
    /// How weights are kept in memory: less of it, faster, less exact.
    Quant {
        F32 = "f32",
        F16 = "f16",
        Int8 = "int8",
        Int4 = "int4",
    }
}
words! {
    /// How finely activations are rounded before a product with integer weights: 16 bits cost half of the speed of large
    /// batches and little of one stream's, and leave no error to speak of.
    Activations {
        /// 16 bits for int8 weights, else 8.
        Auto = "auto",
        Int8 = "int8",
        Int16 = "int16",
    }
}
words! {
    /// Which kernels compute a model.
    Kernels {
        /// The fastest that the processor has.
        Auto = "auto",
        /// Burn's own operations: what the others are held against.
        Reference = "reference",
        /// Plain Rust for any processor.
        Portable = "portable",
        Avx2 = "avx2",
        /// AVX-512 with VNNI.
        Avx512 = "avx512",
    }
}
words! {
    /// How keys and values are kept between steps.
    CacheType {
        F16 = "f16",
        F32 = "f32",
    }
}

/// The first frame of a job stream, after `Open::Job`. The controller cancels by resetting the stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// The worker that the scheduler chose.
    pub worker: WorkerId,
    pub job: Job,
}
impl Wire for Submit {
    const TYPE: u16 = 18;
    /// A million tokens of prompt, each of up to five bytes, and room.
    const LIMIT: usize = 8 << 20;
}

/// The first frame of a stream for the answer of a job that another controller began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    pub turn: TurnId,
    pub choice: u32,
}
impl Wire for Resume {
    const TYPE: u16 = 20;
    const LIMIT: usize = 64;
}

/// The answer; after `Found` the events of the job follow from its beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resumed {
    Found {
        worker: WorkerId,
        /// What computed the answer so far, as far as its worker said.
        numerics: Option<NumericsId>,
    },
    Missing,
}
impl Wire for Resumed {
    const TYPE: u16 = 21;
    const LIMIT: usize = 256;
}

/// The first frame of a stream for the request of a turn, which another controller began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recall {
    pub turn: TurnId,
}
impl Wire for Recall {
    const TYPE: u16 = 24;
    const LIMIT: usize = 64;
}

/// The answer, and the only frame: the capsule of the turn's jobs, if one is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recalled {
    pub capsule: Option<Vec<u8>>,
}
impl Wire for Recalled {
    const TYPE: u16 = 25;
    const LIMIT: usize = CAPSULE_BYTES + 64;
}

/// The frames that come back on a job stream; the last one is `Done` or `Failed`.
impl Wire for JobEvent {
    const TYPE: u16 = 19;
    const LIMIT: usize = 1 << 16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_the_same_words_everywhere() {
        for word in ["f32", "f16", "int8", "int4"] {
            let quant: Quant = word.parse().unwrap();
            assert_eq!((quant.to_string(), serde_json::to_value(quant).unwrap()), (word.to_owned(), word.into()));
        }
        assert_eq!("int5".parse::<Quant>().unwrap_err().to_string(), "`int5` is not one of f32, f16, int8, int4");
        assert_eq!("sse".parse::<Kernels>().unwrap_err().to_string().matches(',').count(), 4);
        assert!("F16".parse::<CacheType>().is_err());
        for (word, device) in [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:11", Device::Cuda(11))] {
            assert_eq!((word.parse(), device.to_string()), (Ok(device), word.to_owned()));
            assert_eq!(serde_json::from_value::<Device>(word.into()).unwrap(), device);
        }
        let unknown = |word: &str| word.parse::<Device>().unwrap_err().to_string();
        assert_eq!(unknown("gpu"), "`gpu` is not one of cpu, cuda:0, cuda:1, …");
        assert!(unknown("cuda:-1").contains("cuda:-1") && unknown("cuda").contains("`cuda`"));
    }

    #[test]
    fn no_cache_budget_means_the_default_one() {
        assert_eq!(EngineOptions::default().cache_budget(), CACHE_BYTES);
        assert_eq!(EngineOptions { cache_bytes: 5, ..EngineOptions::default() }.cache_budget(), 5);
    }
}
