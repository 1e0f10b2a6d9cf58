//! `landmark prepare`: text to token files.

mod progress;

use crate::interrupt;
use anyhow::Context;
use clap::ValueEnum;
use landmark_data::prepare::{self, Options, Preparation, Vocabulary, WORK_FOLDER};
use landmark_data::{Error, Tokenizer};
use landmark_train::Tuning;
use progress::Bar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  Any book, a byte a token:
    landmark prepare --dataset text --data_dir book.txt --out data/book
  PG19 with GPT-2's tokenizer, as in the paper; landmark train --dataset pg19 finds it:
    landmark prepare --dataset pg19 --data_dir ~/pg19 --tokenizer gpt2
  The arXiv part of proof-pile, with a tokenizer of 8192 entries trained on it:
    landmark prepare --dataset arxivmath --data_dir ~/proof-pile --train_tokenizer 8192
  Some shards of RedPajama for a LLaMA model, without their bad lines:
    landmark prepare --dataset redpajama --data_dir arxiv_*.jsonl.zst --tokenizer llama/tokenizer.json \\
      --out data/arxiv --on_error skip

Writes train.tokens, validation.tokens, test.tokens (if the data set has such a part) and tokenizer.json. They
appear at the end, whole; until then everything is in the hidden folder .prepare beside them. Ctrl-C or a crash
loses little: the same command goes on from where it was. The files are the same bytes whatever the number of
threads (RAYON_NUM_THREADS).

Landmarks are not in these files: landmark train and landmark eval insert them.";

/// Flags of `landmark prepare`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    /// How the text is laid out
    #[arg(long, value_enum)]
    dataset: Dataset,
    /// The text: files, or folders that hold some
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    data_dir: Vec<PathBuf>,
    /// gpt2, bytes, or the path of a tokenizer.json, of a model's folder or of its GGUF file
    #[arg(long, value_name = "NAME", default_value = "bytes", conflicts_with = "train_tokenizer")]
    tokenizer: String,
    /// Train a byte-level BPE of N entries on the training text, end-of-text and the landmark among them
    #[arg(long, value_name = "N")]
    train_tokenizer: Option<usize>,
    /// With --train_tokenizer: each digit is a token of its own, so that a model reads numbers digit by digit
    #[arg(long, requires = "train_tokenizer")]
    split_digits: bool,
    /// The folder to write [default: data/DATASET]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The field or column that holds a record's text
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_field: String,
    /// The share for validation, where the data set is not divided already [default: 0.1 of text, 0.01 of redpajama]
    #[arg(long, value_name = "SHARE")]
    val_fraction: Option<f64>,
    /// What becomes of bad input: not UTF-8, a broken line, no text, a damaged archive, an empty file
    #[arg(long, value_enum, default_value = "stop")]
    on_error: OnError,
    /// How often the work is made safe against a crash
    #[arg(long, value_name = "SECONDS", default_value_t = 10.)]
    save_every: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dataset {
    /// A folder with train/, validation/ and perhaps test/, a .txt file for each book
    Pg19,
    /// proof-pile's JSON lines or Parquet, whose names say train, validation or test; records of other parts than arXiv are left out
    #[value(name = "arxivmath")]
    ArxivMath,
    /// JSON lines or Parquet, a document a record; a hash of the text decides what is for validation
    #[value(name = "redpajama")]
    RedPajama,
    /// .txt files, a document each (the end of them is for validation, unless they lie as PG19's do), or Parquet
    Text,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnError {
    /// Name it and end, with no output
    Stop,
    /// Leave it out, and say how often
    Skip,
}

/// The tokenizer of that name; a GGUF file has its own in it.
fn tokenizer_named(name: &str) -> anyhow::Result<Tokenizer> {
    match name.ends_with(".gguf") {
        true => Ok(Tuning::tokenizer(Path::new(name))?.tokenizer),
        false => Ok(Tokenizer::named(name)?),
    }
}

/// Prepares.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args {
        dataset,
        data_dir,
        tokenizer,
        train_tokenizer,
        split_digits,
        out,
        text_field,
        val_fraction,
        on_error,
        save_every,
    } = args;
    let out = out
        .unwrap_or_else(|| PathBuf::from("data").join(dataset.to_possible_value().expect("none is hidden").get_name()));
    let save_every = Duration::try_from_secs_f64(save_every).context("--save_every")?;
    let vocabulary = match train_tokenizer {
        Some(entries) => Vocabulary::Train { entries, split_digits },
        None => Vocabulary::Given(tokenizer_named(&tokenizer).context("--tokenizer")?),
    };
    let options = Options {
        dataset: dataset.into(),
        places: data_dir,
        field: text_field,
        val_fraction,
        on_error: on_error.into(),
        save_every,
    };
    let preparation = Preparation::find(options).map_err(named).context("cannot prepare")?;
    interrupt::watch()?;
    let mut bar = Bar::new()?;
    let done = preparation.run(&vocabulary, &out, &mut |event| {
        bar.show(event);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let seconds = bar.finish();
    match done {
        Ok(done) => {
            println!("{}: {}", out.display(), progress::summary(&done, seconds));
            Ok(ExitCode::SUCCESS)
        }
        Err(Error::Interrupted) => {
            println!("Stopped. The same command goes on from here.");
            Ok(ExitCode::from(interrupt::EXIT_CODE))
        }
        Err(error) => {
            let kept = out.join(WORK_FOLDER);
            let error = anyhow::Error::from(named(error));
            Err(match kept.is_dir() {
                true => error.context(format!(
                    "cannot prepare (what is done is kept in {}, the same command goes on)",
                    kept.display()
                )),
                false => error.context("cannot prepare"),
            })
        }
    }
}

/// An error about an option, with its flag.
fn named(error: Error) -> Error {
    match error {
        Error::Param { name: "val_fraction", got, expected } => Error::Param { name: "--val_fraction", got, expected },
        Error::Param { name: "train_tokenizer", got, expected } => {
            Error::Param { name: "--train_tokenizer", got, expected }
        }
        other => other,
    }
}

impl From<Dataset> for prepare::Dataset {
    fn from(dataset: Dataset) -> Self {
        match dataset {
            Dataset::Pg19 => Self::Pg19,
            Dataset::ArxivMath => Self::ArxivMath,
            Dataset::RedPajama => Self::RedPajama,
            Dataset::Text => Self::Text,
        }
    }
}

impl From<OnError> for prepare::OnError {
    fn from(on_error: OnError) -> Self {
        match on_error {
            OnError::Stop => Self::Stop,
            OnError::Skip => Self::Skip,
        }
    }
}
