//! `landmark session`: texts that stay read.

mod append;
mod ask;
mod manage;

use clap::Subcommand;
use landmark_inference::{About, CacheFlags, ModelFlags, bytes};
use landmark_memory::BlockType;
use landmark_memory::session::Settings;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark session create austen --checkpoint models/landmark-12m
  landmark session append austen --file assets/persuasion.txt.zst
  landmark session ask austen --prompt 'Anne was' --temperature 0 --show_blocks
  landmark session fork austen austen-2

A session is a folder. A process that has it may be killed at any moment: the session is as it was after the last chunk, and the same
append goes on from there.

Exit codes: 0 done, 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Flags of `landmark session`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Make a session of a model
    Create(Box<Create>),
    /// Read a text into a session
    Append(Box<append::Args>),
    /// Go on with the text of a session, which stays as it is
    Ask(Box<ask::Args>),
    /// List the sessions in a folder
    List(manage::List),
    /// Show what a session holds
    Show(manage::Show),
    /// Make another session that goes on from here, sharing what is on disk
    Fork(manage::Fork),
    /// Write a session's text
    Export(manage::Export),
    /// Remove a session
    Delete(manage::Delete),
    /// Drop what is damaged, and say what it was
    Repair(manage::Repair),
}

/// Flags of `landmark session create`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
struct Create {
    /// The session's folder, which is made
    #[arg(value_name = "DIR")]
    session: PathBuf,
    /// How keys and values are kept: float32 (exact), bfloat16, or int8
    #[arg(long, value_name = "TYPE", default_value = "float32")]
    block_dtype: BlockType,
    /// What the session may take of the disk, such as 20GB. Left out: what there is
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    disk: Option<u64>,
    /// Score all landmarks, also of long texts, and none through an index
    #[arg(long)]
    exact: bool,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    cache: CacheFlags,
}

/// Does it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.action {
        Action::Create(args) => {
            let Create { session, model, block_dtype, disk, exact, cache } = *args;
            let settings = Settings { block_type: block_dtype, disk_limit: disk, blocks_per_segment: None };
            let about = About::create(&session, &model, &cache, exact, settings)?;
            eprintln!(
                "{}: reads with {}, {} tokens at a time, blocks in {}",
                session.display(),
                about.model.display(),
                about.mid_length,
                block_dtype.name()
            );
            Ok(ExitCode::SUCCESS)
        }
        Action::Append(args) => append::run(*args),
        Action::Ask(args) => ask::run(*args),
        Action::List(args) => manage::list(args),
        Action::Show(args) => manage::show(args),
        Action::Fork(args) => manage::fork(args),
        Action::Export(args) => manage::export(args),
        Action::Delete(args) => manage::delete(args),
        Action::Repair(args) => manage::repair(args),
    }
}
