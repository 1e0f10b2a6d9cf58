//! The most memory of a forward and backward pass, measured in a process of its own.

use super::op::{Call, Shape, Sizes};
use super::report::Row;
use anyhow::{Context, bail};
use landmark_inference::machine::peak_memory;
use std::num::NonZeroUsize;
use std::process::{Command, Stdio};

const LENGTH: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();
/// What q, k, v, their gradients, the output and its gradient may be exceeded by.
const LIMIT_MIB: f64 = 1024.;
const MIB: f64 = (1 << 20) as f64;

/// Measures it in a child.
pub fn row(shape: Shape) -> anyhow::Result<Row> {
    let sizes = Sizes { length: LENGTH, shape };
    eprintln!("measuring {} memory", sizes.name());
    let mut child = Command::new(std::env::current_exe()?);
    child.args(["bench", "op_memory", "--length", &sizes.length.to_string()]);
    child.args(["--heads", &shape.heads.to_string(), "--head_dim", &shape.head_dim.to_string()]);
    child.args(["--block", &shape.block.to_string()]);
    let output = child.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("the process that measures memory ended with {}", output.status);
    }
    let peak: f64 = text.trim().parse().with_context(|| format!("the process that measures memory said {text:?}"))?;
    let tensors = (8 * sizes.length.get() * shape.heads.get() * shape.head_dim.get() * size_of::<f32>()) as f64;
    let ours = (peak - tensors) / MIB;
    Ok(Row::new(sizes.name(), "memory over tensors MiB", ours, "limit".into(), Some(LIMIT_MIB)))
}

/// Runs the operation and prints the most bytes that this process ever had in memory.
pub fn run(sizes: &Sizes) -> anyhow::Result<()> {
    Call::new(sizes)?.time(true)?;
    println!("{}", peak_memory().context("this system does not tell the peak memory of a process; Linux does")?);
    Ok(())
}
