//! The commands, one file each: its flags, and a `run` that does the work and gives the exit code.

pub mod bench;
pub mod chat;
pub mod completions;
pub mod demo;
pub mod document;
pub mod eval;
pub mod export;
pub mod finetune;
pub mod generate;
pub mod merge;
pub mod passkey;
pub mod plot;
pub mod prepare;
pub mod serve;
pub mod session;
pub mod train;
pub mod weight_diff;

use clap::Subcommand;
use std::process::ExitCode;

/// What the binary can do.
#[derive(Subcommand)]
pub enum Command {
    /// Make token files out of text
    Prepare(prepare::Args),
    /// Train a model
    Train(Box<train::Args>),
    /// Make a landmark model of a LLaMA
    Finetune(Box<finetune::Args>),
    /// Perplexity and accuracy over texts of any length, and the paper's tables
    Eval(Box<eval::Args>),
    /// Draw the curves of training runs
    Plot(plot::Args),
    /// Measure speed and memory, next to PyTorch
    Bench(bench::Args),
    /// Read a whole novel with the model that ships with the project, and ask about it: what `landmark` alone does
    Demo(Box<demo::Args>),
    /// Write a trained model without what training needs, to be handed on
    Export(export::Args),
    /// Make one model of a LLaMA and the adapter that was trained beside it
    Merge(merge::Args),
    /// Go on with a text of any length
    Generate(Box<generate::Args>),
    /// Talk with a model, about a text of any length
    Chat(Box<chat::Args>),
    /// Keep a text that was read on disk, to be read on and asked at any time
    Session(session::Args),
    /// Serve a model to every client of OpenAI's interface, with prompts of any length and texts that stay read
    Serve(Box<serve::Args>),
    /// Test whether the model finds a number that was told once, somewhere in a long text
    Passkey(Box<passkey::Args>),
    /// Write a fine-tuned LLaMA as its difference from what it was made of, and back
    #[command(name = "weight_diff")]
    WeightDiff(weight_diff::Args),
    /// Write the text of a document: what `serve` starts for each that it is given
    #[command(hide = true)]
    Document(document::Args),
    /// Print completions for a shell
    Completions(completions::Args),
}

impl Command {
    /// Does it.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Prepare(args) => prepare::run(args),
            Self::Train(args) => train::run(*args),
            Self::Finetune(args) => finetune::run(*args),
            Self::Eval(args) => eval::run(*args),
            Self::Plot(args) => plot::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Demo(args) => demo::run(*args),
            Self::Export(args) => export::run(args),
            Self::Merge(args) => merge::run(args),
            Self::Generate(args) => generate::run(*args),
            Self::Chat(args) => chat::run(*args),
            Self::Session(args) => session::run(args),
            Self::Serve(args) => serve::run(*args),
            Self::Passkey(args) => passkey::run(*args),
            Self::WeightDiff(args) => weight_diff::run(args),
            Self::Document(args) => document::run(args),
            Self::Completions(args) => completions::run(args),
        }
    }
}

/// What happens without a command: the demonstration.
pub fn default() -> anyhow::Result<ExitCode> {
    demo::run(demo::Args::default())
}
