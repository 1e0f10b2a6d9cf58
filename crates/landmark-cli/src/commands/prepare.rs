//! `landmark prepare`: text to token files.

use anyhow::Context;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use landmark_data::{Tokenizer, prepare};
use std::path::PathBuf;
use std::process::ExitCode;

/// How text is divided into training and validation data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dataset {
    /// Any text: files, or folders of .txt files; the end of it is for validation
    Text,
    /// PG19 as it is distributed: a folder with train/ and validation/, a .txt file for each book
    Pg19,
}

/// Flags of `landmark prepare`.
#[derive(clap::Args)]
#[command(
    rename_all = "snake_case",
    after_help = "Example: landmark prepare --dataset text --data_dir book.txt --out data/book"
)]
pub struct Args {
    /// What kind of text it is
    #[arg(long, value_enum)]
    dataset: Dataset,
    /// The text: a file, or a folder of .txt files; may be given again
    #[arg(long, value_name = "PATH", required = true)]
    data_dir: Vec<PathBuf>,
    /// A tokenizer.json, or `bytes`
    #[arg(long, value_name = "FILE", default_value = "bytes")]
    tokenizer: String,
    /// The folder to write; landmark train finds it as --data_dir ./data --dataset NAME if it is ./data/NAME
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// With text: the share at its end that is for validation
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    val_fraction: f64,
}

/// Prepares.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { dataset, data_dir, tokenizer, out, val_fraction } = args;
    let tokenizer = match tokenizer.as_str() {
        "bytes" => Tokenizer::bytes(),
        file => Tokenizer::from_file(file).context("--tokenizer")?,
    };
    if dataset == Dataset::Pg19 {
        for folder in &data_dir {
            if !folder.join("train").is_dir() || !folder.join("validation").is_dir() {
                anyhow::bail!(
                    "--data_dir {}: --dataset pg19 needs folders train and validation in it; use --dataset text for other text",
                    folder.display()
                );
            }
        }
    }
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} ETA {eta}")?;
    // Hidden by itself where there is no terminal.
    let bar = ProgressBar::new(0).with_style(style);
    let done = prepare::prepare_text(&data_dir, &tokenizer, &out, val_fraction, |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
        bar.set_message(format!("{} tokens", progress.train_tokens + progress.validation_tokens));
    });
    bar.finish_and_clear();
    let done = done.context("cannot prepare --data_dir")?;
    println!(
        "{}: {} training tokens and {} validation tokens of {} documents ({} bytes)",
        out.display(),
        done.train_tokens,
        done.validation_tokens,
        done.documents,
        done.bytes_done
    );
    Ok(ExitCode::SUCCESS)
}
