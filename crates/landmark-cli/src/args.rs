//! Types of flags that several commands share.

use candle_core::Device;
use std::fmt::Display;
use std::str::FromStr;

/// A flag that takes a value or `None`, as the reference's do. Under this name clap takes it for a value of its own and
/// not for a flag that may be left out.
pub type NoneOr<T> = Option<T>;

/// Reads a value or `None`.
pub fn none_or<T: FromStr<Err: Display>>(text: &str) -> Result<NoneOr<T>, String> {
    if text == "None" { Ok(None) } else { text.parse().map(Some).map_err(|error: T::Err| error.to_string()) }
}

/// Reads a truth value, written as in Python or in Rust.
pub fn truth(text: &str) -> Result<bool, String> {
    match text {
        "True" | "true" | "1" => Ok(true),
        "False" | "false" | "0" => Ok(false),
        _ => Err("expected True or False".into()),
    }
}

/// Where tensors live: the value of `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that this build and machine have.
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
            _ => text.strip_prefix("cuda:").and_then(cuda).ok_or_else(|| "expected auto, cpu or cuda:N".into()),
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
    /// The device itself.
    pub fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) => anyhow::bail!("--device {self}: this build has no CUDA; use --device cpu"),
        }
    }
}
