//! `landmark bench`: how fast this is here, next to PyTorch, or to Hugging Face tokenizers, in the same run.

#[cfg(feature = "cuda")]
mod gpu;
mod memory;
mod op;
mod peer;
mod prepare;
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
    /// The attention operation, next to PyTorch's dense scaled_dot_product_attention
    Op(op::Args),
    /// Training a small GPT on the CPU, next to PyTorch's with dense attention
    Train(train::Args),
    /// Preparing text, next to the encode_batch of Hugging Face tokenizers from Python
    Prepare(prepare::Args),
    /// Prints the most memory that this process had after a forward and backward pass of the operation
    #[command(hide = true, name = "op_memory")]
    OpMemory(op::Sizes),
}

/// Measures.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Op(args) => op::run(&args)?,
        What::Train(args) => train::run(&args)?,
        What::Prepare(args) => prepare::run(&args)?,
        What::OpMemory(sizes) => memory::run(&sizes)?,
    }
    Ok(ExitCode::SUCCESS)
}
