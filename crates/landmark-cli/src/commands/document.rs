//! `landmark document`: what `serve` starts for a document that a client sends, so that nothing else ends with it.

use std::process::ExitCode;

/// Flags of `landmark document`.
#[derive(clap::Args)]
pub struct Args {
    /// What comes on standard input: html or pdf
    kind: String,
}

/// Writes the text to standard output.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    landmark_serve::convert(&args.kind)?;
    Ok(ExitCode::SUCCESS)
}
