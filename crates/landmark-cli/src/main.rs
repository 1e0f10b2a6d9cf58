//! The `landmark` binary.

mod args;
mod commands;
mod curves;
mod files;
mod interrupt;
mod kept;
mod plot;
mod reading;
mod text_pieces;

use clap::Parser;
use std::process::ExitCode;

/// Training allocates large buffers in every step; the system's allocator gives them back each time, and the page faults of
/// getting them again cost a third of the speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Landmark attention: language models that read far outside their window.
#[derive(Parser)]
#[command(name = "landmark", version, max_term_width = 110, arg_required_else_help = false, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<commands::Command>,
}

fn main() -> ExitCode {
    let run = match Cli::parse().command {
        Some(command) => command.run(),
        None => commands::default(),
    };
    // One line, whatever the depth of the error, and the only place where an exit code is decided.
    run.unwrap_or_else(|error| {
        eprintln!("landmark: error: {}", format!("{error:#}").replace('\n', " "));
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
