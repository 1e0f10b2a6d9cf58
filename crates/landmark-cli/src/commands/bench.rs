//! `landmark bench`: how fast this is here, next to PyTorch in the same run.

mod memory;
mod op;
mod peer;
mod report;
mod train;

use clap::Subcommand;
use std::process::ExitCode;

/// Flags of `landmark bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

/// What is measured.
#[derive(Subcommand)]
enum What {
    /// The attention operation on the CPU, next to PyTorch's dense scaled_dot_product_attention
    Op(op::Args),
    /// Training a small GPT on the CPU, next to PyTorch's with dense attention
    Train(train::Args),
    /// Prints the most memory that this process had after a forward and backward pass of the operation
    #[command(hide = true, name = "op_memory")]
    OpMemory(op::Sizes),
}

/// Measures.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Op(args) => op::run(&args)?,
        What::Train(args) => train::run(&args)?,
        What::OpMemory(sizes) => memory::run(&sizes)?,
    }
    Ok(ExitCode::SUCCESS)
}
