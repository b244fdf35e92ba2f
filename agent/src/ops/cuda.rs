//! NVIDIA cards, through burn-cuda; only in builds with the feature `cuda`.
//!
//! A card that cannot be used is refused here, before the first tensor goes there: Burn panics where a library is
//! missing. Kernels are written by CubeCL as CUDA C++ when they are first used and compiled by NVRTC, which takes
//! seconds for all of them; an executor therefore computes a few steps of every size before it is ready. CubeCL's
//! autotuning stays off: it may choose another algorithm, which rounds differently, at every start. So does its cache
//! on disk, which brings a database of its own.

/// Why a card cannot be used. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "device cuda:{0}: this izar-agent is built without CUDA: build it with `--features cuda`, or deploy with the \
         device cpu"
    )]
    NotBuilt(u16),
    #[error(
        "device cuda:{0}: no card answers: install NVIDIA's driver until `nvidia-smi` lists the card (and look at \
         CUDA_VISIBLE_DEVICES), or deploy with the device cpu"
    )]
    NoDriver(u16),
    #[error("device cuda:{index}: there are {count} cards, cuda:0 to cuda:{}", count - 1)]
    NoCard { index: u16, count: usize },
    #[error(
        "device cuda:{0}: libnvrtc.so cannot be loaded, which compiles the kernels: install CUDA's runtime compiler \
         (PyPI has it as nvidia-cuda-nvrtc-cu12), and name the library's folder in LD_LIBRARY_PATH"
    )]
    NoCompiler(u16),
    #[error(
        "device cuda:{index}: {looked} has no cuda_fp16.h, which kernels include: install CUDA's headers (PyPI has them \
         in nvidia-cuda-runtime-cu12), and name the folder above their `include` in CUDA_PATH"
    )]
    NoHeaders { index: u16, looked: String },
}

#[cfg(feature = "cuda")]
pub use built::{name, open};

/// Opens a card.
#[cfg(not(feature = "cuda"))]
pub fn open(index: u16) -> Result<burn::tensor::Device, Error> {
    Err(Error::NotBuilt(index))
}
/// Names a card and what its kernels are compiled for.
#[cfg(not(feature = "cuda"))]
pub fn name(index: u16) -> Result<String, Error> {
    Err(Error::NotBuilt(index))
}

#[cfg(feature = "cuda")]
mod built {
    use burn::tensor::{Device, DeviceType};

    use super::Error;

    #[allow(unsafe_code)]
    pub fn open(index: u16) -> Result<Device, Error> {
        // An empty list is what a machine without a driver gives.
        let count = Device::enumerate(DeviceType::Cuda).len();
        if count == 0 {
            return Err(Error::NoDriver(index));
        }
        if usize::from(index) >= count {
            return Err(Error::NoCard { index, count });
        }
        // SAFETY: loads a library that the first kernel would load a moment later, and whose initialization has no
        // preconditions.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            return Err(Error::NoCompiler(index));
        }
        headers(index)?;
        Ok(Device::cuda(usize::from(index)))
    }

    pub fn name(index: u16) -> Result<String, Error> {
        let identity = open(index)?.identity();
        Ok(identity.map_or_else(|| "a card".to_owned(), |card| format!("{} {}", card.name, card.fingerprint)))
    }

    fn headers(index: u16) -> Result<(), Error> {
        let missing = |looked: String| Error::NoHeaders { index, looked };
        let root = cubecl_cuda::install::cuda_path().ok_or_else(|| missing("/usr/local/cuda/include".to_owned()))?;
        let include = root.join("include");
        if include.join("cuda_fp16.h").is_file() { Ok(()) } else { Err(missing(include.display().to_string())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_cannot_be_used_is_refused_with_the_mend() {
        // No machine has that many; without a driver or the feature the refusal is another one.
        let error = open(999).unwrap_err();
        let expected = match &error {
            Error::NotBuilt(_) => "--features cuda",
            Error::NoDriver(_) => "nvidia-smi",
            _ => "there are",
        };
        assert!(error.to_string().starts_with("device cuda:999: ") && error.to_string().contains(expected), "{error}");
        assert_eq!(cfg!(feature = "cuda"), !matches!(error, Error::NotBuilt(_)));
        assert_eq!(name(999).unwrap_err(), error);
    }
}
