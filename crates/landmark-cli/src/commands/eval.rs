//! `landmark eval`: perplexity and accuracy of a model over texts of any length, and the tables of the paper.

mod flags;
mod grid;
mod measure;
mod paper;
mod plot;
mod report;
mod table;
mod text;

use crate::interrupt;
use crate::reading::ReadingBar;
use anyhow::{Context, bail};
pub use flags::Args;
use landmark_data::{TOKENIZER_FILE, Tokenizer};
use landmark_inference::Reading;
use report::Report;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use text::{Sequences, Text};

const EXAMPLES: &str = "\
Examples:
  landmark eval --checkpoint exps/books/landmark/run --dataset books
  landmark eval --checkpoint exps/books/landmark/run --dataset books --use_cache --eval_seq_length 4096 \\
    --mid_length 250 --mem_cache_size 80 --cache_topk 4 --plot eval.svg
  landmark eval --checkpoint models/landmark-12m --file assets/persuasion.txt.zst --use_cache
  landmark eval --grid table1 --landmark_checkpoint exps/books/landmark/run \\
    --dense_checkpoint exps/books/base_rotary/run --dataset books --dataset math

The text is cut into sequences of --eval_seq_length tokens; each is read from an empty cache, chunk by chunk.
Landmarks are put in while reading and are not counted. Every token but the first of the text is a target,
except those that follow an end of text.

Exit codes: 0 done, 1 error, 2 wrong command line, 130 Ctrl-C (what a grid has finished is kept).";

/// A model to evaluate.
pub struct Model {
    /// The folder of the checkpoint itself.
    pub folder: PathBuf,
    /// The model.
    pub weights: landmark_models::Model,
    /// Its tokenizer, if it has one or one was given.
    pub tokenizer: Option<Tokenizer>,
}

impl Model {
    fn open(named: &Path, args: &Args) -> anyhow::Result<Self> {
        let folder = landmark_inference::checkpoint(named)?;
        let adapter = args.adapter.as_deref();
        let weights = landmark_inference::load(&folder, adapter, args.device)?;
        // Prepared tokens can do without one.
        let tokenizer = match args.tokenizer.is_some() || folder.is_file() || folder.join(TOKENIZER_FILE).exists() {
            true => Some(landmark_inference::tokenizer(&folder, adapter, args.tokenizer.as_deref())?),
            false => None,
        };
        Ok(Self { folder, weights, tokenizer })
    }
}

/// Evaluates.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.accepted.check()?;
    args.grid.check()?;
    for (flag, number) in [("batch_size", args.batch_size), ("bins", args.results.bins)] {
        if number == 0 {
            bail!("--{flag} 0: expected at least 1");
        }
    }
    interrupt::watch()?;
    match (args.grid.grid, &args.checkpoint) {
        (Some(grid), _) => grid::run(grid, &args),
        (None, Some(checkpoint)) => one(checkpoint, &args),
        (None, None) => bail!("--checkpoint DIR is missing: the model to evaluate"),
    }
}

/// One evaluation.
fn one(checkpoint: &Path, args: &Args) -> anyhow::Result<ExitCode> {
    let model = Model::open(checkpoint, args)?;
    let text = match (&args.text.file, args.text.dataset.as_slice()) {
        (Some(file), _) => {
            // Reports what is wrong with the tokenizer.
            let tokenizer =
                landmark_inference::tokenizer(&model.folder, args.adapter.as_deref(), args.tokenizer.as_deref())?;
            Text::plain(file, tokenizer)?
        }
        (None, [dataset]) => Text::prepared(&args.text, dataset)?,
        (None, []) => {
            bail!("there is no text to evaluate on: name prepared data with --dataset, or a text with --file")
        }
        (None, _) => bail!("--dataset: one at a time, several with --grid only"),
    };
    text.check_model(&model.weights, model.tokenizer.as_ref())?;
    let whole = text.split.is_none().then(|| text.targets());
    let tokenizer = model.tokenizer.as_ref();
    let length = args.text.eval_seq_length;
    let reading = Reading::resolve(&args.cache, args.use_cache, length, whole, &model.weights, tokenizer)?;
    if args.results.plot_distances.is_some() && reading.setting.cache_topk.unwrap_or(0) == 0 {
        bail!("--plot_distances is refused: no blocks are read; add --use_cache, with --cache_topk of at least 1");
    }
    let length = reading.setting.eval_seq_length;
    let sequences = text.sequences(length, length, args.text.eval_sample_size, args.text.seed)?;
    let Some(report) = evaluate(&model, &text, &reading, &sequences, args, "evaluating")? else {
        eprintln!("Stopped.");
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    };
    // Whoever reads the table may have read enough, as `head` does.
    let _ = std::io::stdout().write_all(report.table().as_bytes());
    if let Some(path) = &args.results.json {
        report::write(path, "--json", &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    if let Some(path) = &args.results.csv {
        report::write(path, "--csv", &report::csv([&report]))?;
    }
    if let Some(path) = &args.results.plot {
        plot::positions(path, &report).context("--plot")?;
    }
    if let Some(path) = &args.results.plot_distances {
        plot::distances(path, &report).context("--plot_distances")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Evaluates a model on sequences of a text, or gives nothing if that was interrupted.
fn evaluate(
    model: &Model,
    text: &Text,
    reading: &Reading,
    sequences: &Sequences,
    args: &Args,
    what: &str,
) -> anyhow::Result<Option<Report>> {
    let mut bar = ReadingBar::new(what, Some((sequences.len() * sequences.length) as u64));
    let measured =
        measure::evaluate(&model.weights, reading, sequences, args.batch_size, args.results.bins, |tokens| {
            bar.set(tokens as u64, tokens);
            !interrupt::requested()
        });
    bar.finish();
    Ok(measured?.map(|measured| Report::new(model, text, measured)))
}
