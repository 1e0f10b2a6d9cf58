//! A table of the paper: every cell evaluated once, kept, and not computed again.

use super::flags::Args;
pub use super::paper::GridName;
use super::paper::{Method, Row};
use super::report::{self, Report};
use super::text::Text;
use super::{Model, evaluate, plot, table};
use crate::interrupt;
use crate::kept::Folder;
use crate::reading::grouped;
use anyhow::{Context, bail};
use landmark_inference::{Reading, Setting};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::ExitCode;

/// What is known of a row on a data set.
pub enum Cell {
    /// Evaluated, now or before.
    Done(Box<Report>),
    /// The model or the text cannot do it, and why.
    Refused(String),
    /// No model was given for the row.
    NoModel,
    /// Not yet evaluated.
    Pending,
}

/// All rows, and a cell for each data set.
pub struct Table {
    /// Which one.
    pub name: GridName,
    /// The data sets, in columns.
    pub datasets: Vec<String>,
    /// The part of them.
    pub split: &'static str,
    /// Heads of the landmark model, and ordinary tokens of its blocks.
    pub landmark: Option<(usize, usize)>,
    /// The rows.
    pub rows: Vec<(Row, Vec<Cell>)>,
}

/// All that decides the figures of a cell.
#[derive(Serialize, Deserialize, PartialEq)]
struct Key {
    version: u32,
    setting: Setting,
    bins: usize,
    /// SHA-256 of the model's files, and of the tokens that are read.
    model: String,
    tokens: String,
}

/// The meaning of a cell's figures: raised when the evaluation changes.
const VERSION: u32 = 1;

/// Evaluates the grid.
pub fn run(name: GridName, args: &Args) -> anyhow::Result<ExitCode> {
    if args.text.dataset.is_empty() {
        bail!(
            "--grid {}: there is nothing to evaluate on: name prepared data with --dataset, once or several times",
            name.name()
        );
    }
    let models = [
        (Method::Dense, "--dense_checkpoint", &args.grid.dense_checkpoint),
        (Method::Xl, "--xl_checkpoint", &args.grid.xl_checkpoint),
        (Method::Landmark, "--landmark_checkpoint", &args.grid.landmark_checkpoint),
    ];
    let rows = name.rows();
    for (method, flag, given) in models {
        if given.is_some() && rows.iter().all(|row| row.method != method) {
            bail!("{flag} is refused: {} has no rows of such a model", name.name());
        }
    }
    if models.iter().all(|(.., given)| given.is_none()) {
        bail!(
            "--grid {}: there is no model; give --landmark_checkpoint, --dense_checkpoint, --xl_checkpoint",
            name.name()
        );
    }
    let texts = args.text.dataset.iter().map(|dataset| Text::prepared(&args.text, dataset));
    let texts = texts.collect::<anyhow::Result<Vec<_>>>()?;
    let out = args.grid.out.clone().unwrap_or_else(|| "exps/eval".into());
    let cells = Folder::new(&out);
    let mut table = Table {
        name,
        datasets: args.text.dataset.clone(),
        split: args.text.split.name(),
        landmark: None,
        rows: rows.iter().map(|row| (*row, texts.iter().map(|_| Cell::Pending).collect())).collect(),
    };
    let count = rows.len() * texts.len();
    let mut number = 0;
    // One model in memory at a time.
    for (method, flag, given) in models {
        let model = given.as_deref().map(|named| Model::open(named, args)).transpose().context(flag)?;
        let hash = model.as_ref().map(|model| landmark_inference::hash_of_model(&model.folder, None)).transpose()?;
        if let (Method::Landmark, Some(model)) = (method, &model) {
            let outline = model.weights.outline();
            table.landmark = Some((outline.heads, outline.mem_freq.unwrap_or(0)));
        }
        for (row, found) in table.rows.iter_mut().filter(|(row, _)| row.method == method) {
            for (text, cell) in texts.iter().zip(found) {
                number += 1;
                let (Some(model), Some(hash)) = (&model, &hash) else {
                    *cell = Cell::NoModel;
                    continue;
                };
                let what = format!("[{number}/{count}] {}: {}", text.name, row.label());
                if interrupt::requested() {
                    continue;
                }
                *cell = compute(row, model, hash, text, args, &cells, &what)?;
                match cell {
                    Cell::Done(report) => {
                        let (perplexity, rate) = (report.measured.perplexity, report.measured.tok_per_s as usize);
                        println!("{what}: perplexity {perplexity:.3}, {} tok/s", grouped(rate));
                    }
                    Cell::Refused(reason) => println!("{what}: refused: {reason}"),
                    Cell::NoModel | Cell::Pending => {}
                }
            }
        }
    }
    finish(&table, &out)
}

/// Writes the table as far as it is known, and prints it.
fn finish(table: &Table, out: &Path) -> anyhow::Result<ExitCode> {
    let markdown = table::markdown(table);
    let name = table.name.name();
    report::write(&out.join(format!("{name}.md")), "--out", &markdown)?;
    report::write(&out.join(format!("{name}.csv")), "--out", &table::csv(table))?;
    for (column, dataset) in table.datasets.iter().enumerate() {
        plot::grid(&out.join(format!("{name}-{dataset}.svg")), table, column).context("--out")?;
    }
    println!("\n{markdown}");
    let cells = || table.rows.iter().flat_map(|(_, cells)| cells);
    let pending = cells().filter(|cell| matches!(cell, Cell::Pending)).count();
    println!("{name}.md, {name}.csv and the plots are in {}", out.display());
    if pending > 0 {
        let done = cells().filter(|cell| matches!(cell, Cell::Done(_))).count();
        eprintln!("Stopped: {done} cells are finished and kept, {pending} are not. The same command goes on.");
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    Ok(ExitCode::SUCCESS)
}

/// The cell of a row on a text: kept, or evaluated and kept from now on.
fn compute(
    row: &Row,
    model: &Model,
    hash: &str,
    text: &Text,
    args: &Args,
    cells: &Folder,
    what: &str,
) -> anyhow::Result<Cell> {
    // What a model or a text cannot do is a finding; what goes wrong later is an error.
    let resolve = || -> anyhow::Result<_> {
        text.check_model(&model.weights, model.tokenizer.as_ref())?;
        let reading = Reading::resolve(
            &row.flags(),
            false,
            Some(row.eval_seq_length),
            None,
            &model.weights,
            model.tokenizer.as_ref(),
        )?;
        // Rows of all lengths are to be compared: their samples are of the same text.
        let passage = GridName::Table1.rows().iter().map(|row| row.eval_seq_length).max().unwrap_or(0);
        let sequences = text.sequences(row.eval_seq_length, passage, args.text.eval_sample_size, args.text.seed)?;
        Ok((reading, sequences))
    };
    let (reading, sequences) = match resolve() {
        Ok(resolved) => resolved,
        Err(error) => return Ok(Cell::Refused(format!("{error:#}"))),
    };
    let tokens = sequences.fingerprint()?;
    let setting = reading.setting.clone();
    let key = Key { version: VERSION, setting, bins: args.results.bins, model: hash.into(), tokens };
    // The tokens may have had another name then.
    if let Some(report) = cells.get::<_, Report>(&key)? {
        return Ok(Cell::Done(Box::new(Report { dataset: text.name.clone(), ..report })));
    }
    let Some(report) = evaluate(model, text, &reading, &sequences, args, what)? else { return Ok(Cell::Pending) };
    cells.put(&key, &report)?;
    Ok(Cell::Done(Box::new(report)))
}
