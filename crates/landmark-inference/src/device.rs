//! Where tensors live: the value of `--device`.

use candle_core::Device;
use std::fmt::Display;
use std::str::FromStr;

/// The value of `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, where this build and this machine have one; otherwise the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU of NVIDIA's, by number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = |number: &str| number.parse().map(Self::Cuda).ok();
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(cuda).ok_or_else(|| "expected auto, cpu, cuda or cuda:N".into()),
        }
    }
}

impl Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl DeviceChoice {
    /// The device, for what computes on GPUs too.
    ///
    /// # Errors
    /// A GPU that was asked for and is not there, or cannot be used: never the processor in its place.
    pub fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto if cuda::count().is_ok_and(|count| count > 0) => cuda::open(0),
            Self::Auto => Ok(Device::Cpu),
            Self::Cuda(number) => cuda::open(number),
        }
        .map_err(|error| error.context(format!("--device {self}")))
    }

    /// What `auto` turned out to be, and why, for people.
    pub fn note(self, device: &Device) -> Option<String> {
        if self != Self::Auto {
            return None;
        }
        let chosen = match device {
            Device::Cpu => match cuda::count() {
                Ok(0) => "the CPU (this machine has no NVIDIA GPU)".into(),
                Ok(_) => "the CPU".into(),
                Err(why) => format!("the CPU ({why})"),
            },
            device => cuda::name(device).unwrap_or_else(|_| "the GPU".into()),
        };
        Some(format!("--device auto: {chosen}"))
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! With CUDA.

    use anyhow::{Context, anyhow, bail, ensure};
    use candle_core::Device;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};

    /// The kernels need its instructions (Ampere).
    const OLDEST: (i32, i32) = (8, 0);

    /// How many GPUs the driver lists.
    pub fn count() -> anyhow::Result<usize> {
        use sys::cudaError_enum::CUDA_ERROR_NO_DEVICE;
        match CudaContext::device_count() {
            Ok(count) => Ok(count.max(0) as usize),
            Err(DriverError(CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(DriverError(code)) => {
                bail!("NVIDIA's driver does not start ({code:?}, {}): see whether nvidia-smi works", code as u32)
            }
        }
    }

    pub fn open(number: usize) -> anyhow::Result<Device> {
        match count().map_err(|why| anyhow!("{why}, or use --device cpu"))? {
            0 => bail!("this machine has no NVIDIA GPU, or hides it (CUDA_VISIBLE_DEVICES); use --device cpu"),
            count if number >= count => {
                bail!(
                    "this machine has {count} GPU{}; name one from cuda:0 to cuda:{}",
                    if count > 1 { "s" } else { "" },
                    count - 1
                )
            }
            _ => {}
        }
        let device = Device::new_cuda(number).context("the GPU cannot be opened")?;
        let context = device.as_cuda_device()?.cuda_stream().context().clone();
        let capability = context.compute_capability()?;
        ensure!(
            capability >= OLDEST,
            "{} has compute capability {}.{}, and the kernels need {}.{} or newer; use --device cpu",
            context.name()?,
            capability.0,
            capability.1,
            OLDEST.0,
            OLDEST.1
        );
        if context.has_async_alloc() {
            keep_freed_memory(context.cu_device())?;
        }
        Ok(device)
    }

    /// What is freed stays in the pool: by default the driver takes it all back whenever the stream is waited for, in training
    /// once a step.
    fn keep_freed_memory(device: sys::CUdevice) -> anyhow::Result<()> {
        let mut all = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the device was opened, and this attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(device)?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut all).cast())?;
        }
        Ok(())
    }

    /// What the driver calls it.
    pub fn name(device: &Device) -> anyhow::Result<String> {
        let context = device.as_cuda_device()?.cuda_stream().context().clone();
        Ok(format!("cuda:{}, {}", context.ordinal(), context.name()?))
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    //! Without CUDA.

    use anyhow::bail;
    use candle_core::Device;

    pub fn count() -> anyhow::Result<usize> {
        bail!("this build has no CUDA")
    }

    pub fn open(_: usize) -> anyhow::Result<Device> {
        bail!(
            "this build has no CUDA; build it with `cargo build --release -p landmark-cli --features cuda`, which needs nvcc, \
             or use --device cpu"
        )
    }

    pub fn name(_: &Device) -> anyhow::Result<String> {
        bail!("this build has no CUDA")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:12"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:-1", "cuda0", ""] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        let error = format!("{:#}", DeviceChoice::Cuda(1000).open().unwrap_err());
        assert!(error.starts_with("--device cuda:1000: ") && !error.contains('\n'), "{error}");
    }
}
