//! What `cubecl-cuda` names of `cubecl-llvm`, without an LLVM: types that are never made, and a compiler that refuses.
//!
//! The shapes follow cubecl-cuda 0.11.3, which picks CUDA C++ and NVRTC when its feature `cpp` is on. Nothing here
//! compiles a kernel; whoever gets here has built without that feature.

use std::ffi::c_char;
use std::fmt;

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::BufferIOAttr;

const REFUSAL: &str = "there is no LLVM in this build: kernels go through NVRTC (the feature `cpp` of cubecl-cuda)";

pub mod nvptx {
    pub mod ptx_version {
        //! The version of PTX that a driver reads.

        /// Versions of drivers from which on there is one: CUDA 10.
        const OLDEST: i32 = 10_000;

        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct PtxVersion(i32);

        impl PtxVersion {
            pub fn for_driver(driver: i32) -> Option<Self> {
                (driver >= OLDEST).then_some(Self(driver))
            }
        }

        impl std::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "driver-{}", self.0)
            }
        }
    }
}

pub mod shared {
    pub mod lowered_features {
        //! What LLVM would take away from a device's features.

        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum GpuTarget {
            Nvptx,
        }

        pub fn restrict_features(_: &mut cubecl_core::ir::DeviceProperties, _: GpuTarget) {
            panic!("{}", crate::REFUSAL);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlvmTarget {
    Nvptx,
}

#[derive(Debug, Clone)]
pub struct PlironCompiler {
    pub target: LlvmTarget,
}

#[derive(Debug, Clone, Default)]
pub struct PlironOptions {
    pub arch: Option<()>,
    pub sm_arch: Option<SmArch>,
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    pub grid_constants: bool,
    /// The real one has more fields, so that `..Default::default()` stands behind those above.
    pub more: (),
}

#[derive(Debug, Clone)]
pub struct NvptxModule {
    pub ptx: Vec<c_char>,
    pub entrypoint: String,
    pub ir: String,
    pub shared_memory_size: usize,
    pub io: Vec<BufferIOAttr>,
}

#[derive(Debug, Clone)]
pub enum PlironArtifact {
    NvptxCode(NvptxModule),
    /// The real one has other targets.
    Other,
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REFUSAL)
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(&mut self, _: KernelDefinition, _: &PlironOptions) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic { reason: REFUSAL.to_owned(), backtrace: BackTrace::capture() })
    }
    fn extension(&self) -> &'static str {
        "ll"
    }
    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
