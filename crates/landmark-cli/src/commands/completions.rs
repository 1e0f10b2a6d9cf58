//! `landmark completions`: what a shell needs to complete commands and flags.

use clap::CommandFactory;
use std::io::Write;
use std::process::ExitCode;

/// Flags of `landmark completions`.
#[derive(clap::Args)]
pub struct Args {
    /// The shell; for bash: landmark completions bash > ~/.local/share/bash-completion/completions/landmark
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// Prints the completions.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "landmark", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
