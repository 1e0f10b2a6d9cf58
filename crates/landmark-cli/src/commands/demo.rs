//! `landmark` without arguments: a small model learns most of a novel, then reads the rest of it, far outside its window.

mod lines;
mod training;

use crate::files;
use crate::interrupt;
use crate::machine::peak_memory;
use crate::reader::{CacheFlags, Reader};
use crate::reading::{ReadingBar, grouped, most_read, rate};
use crate::sampling::Sampler;
use anyhow::Context;
use landmark_data::Tokenizer;
use landmark_models::gpt::Gpt;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Northanger Abbey, by Jane Austen; assets/README.md says more.
const BOOK: &str = include_str!("../../../../assets/book.txt");
/// The share of the book that the model learns from.
const LEARNED: f64 = 0.88;
/// What the model goes on with after it has read the rest.
const PROMPT: &str = "\n\nCatherine ";
/// The length of what it writes.
const WRITTEN: usize = 240;
/// Low enough for mostly words, in a model this small.
const TEMPERATURE: f64 = 0.6;
/// Blocks that each token reads.
const TOP_K: usize = 3;

/// Flags of `landmark demo`.
#[derive(clap::Args, Debug)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Training steps; fewer are quicker, and the model is worse
    #[arg(long, value_name = "N", default_value_t = training::ITERATIONS)]
    iterations: usize,
    /// On a machine that would need longer for the training, make it that much shorter
    #[arg(long, value_name = "SECONDS", default_value_t = 150.)]
    time_limit: f64,
    /// Decides the first weights, the order of the text and what is written
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the model is kept; an earlier demonstration's is replaced
    #[arg(long, value_name = "DIR", default_value = "exps/demo")]
    out: PathBuf,
}

impl Default for Args {
    /// What `landmark` without arguments does.
    fn default() -> Self {
        Self { iterations: training::ITERATIONS, time_limit: 150., seed: 1, out: "exps/demo".into() }
    }
}

/// Shows it all.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let limit = Duration::try_from_secs_f64(args.time_limit).context("--time_limit")?;
    interrupt::watch()?;
    let mut out = std::io::stdout();
    match demonstrate(&args, limit, &mut out) {
        // Whoever reads has read enough, as `head` does.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
        Ok(()) if interrupt::requested() => {
            eprintln!("Stopped.");
            Ok(ExitCode::from(interrupt::EXIT_CODE))
        }
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

fn demonstrate(args: &Args, limit: Duration, out: &mut impl Write) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (learned, unseen) = divided();
    let tokenizer = Tokenizer::bytes();
    let settings = training::settings(args.iterations, args.seed);
    let config = &settings.model;
    writeln!(out, "Landmark attention in one run: a small model learns most of a novel, then reads the rest")?;
    writeln!(out, "of it, which is {} times as long as its window.", unseen.len() / config.sequence_length)?;
    writeln!(out, "\n1. Learning: Northanger Abbey, by Jane Austen (its first {} bytes)", grouped(learned.len()))?;
    writeln!(
        out,
        "   {} layers, {} wide, {} heads; a window of {} tokens, a landmark after every {}; tokens are bytes",
        config.n_layer,
        config.n_embd,
        config.n_head,
        config.sequence_length,
        config.mem_freq.unwrap_or_default()
    )?;
    let Some(model) = training::train(&settings, learned, unseen, limit, out)? else {
        return Ok(());
    };
    save(&args.out, &model, &tokenizer, unseen)?;

    let tokens = tokenizer.encode(unseen)?;
    let model = model.detached();
    let Some((reader, tokens)) = read(&model, &tokenizer, tokens, out)? else {
        return Ok(());
    };
    write_on(reader, tokens, args.seed, out)?;
    if interrupt::requested() {
        return Ok(());
    }
    let memory = peak_memory().map_or(String::new(), |bytes| format!(", at most {} MB of memory", bytes >> 20));
    writeln!(
        out,
        "\nDone in {:.0} s{memory}. The model is in {}. To go on:",
        begun.elapsed().as_secs_f64(),
        args.out.display()
    )?;
    for command in next_commands(&args.out) {
        writeln!(out, "  {command}")?;
    }
    Ok(())
}

/// What is learned, and what is not seen in training: it begins with a line.
fn divided() -> (&'static str, &'static str) {
    let from = (BOOK.len() as f64 * LEARNED) as usize;
    // The book is ASCII: every place is between two characters.
    let line = BOOK[from..].find('\n').map_or(BOOK.len(), |end| from + end + 1);
    BOOK.split_at(line)
}

/// Reads the unseen text twice, with retrieval and without, and says how well either predicts it.
fn read(
    model: &Gpt,
    tokenizer: &Tokenizer,
    mut tokens: Vec<u32>,
    out: &mut impl Write,
) -> anyhow::Result<Option<(Reader, Vec<u32>)>> {
    let window = model.config().sequence_length;
    // A block's worth at a time: what the model knows of the text before that is what it retrieves.
    let chunk = model.config().mem_freq;
    writeln!(
        out,
        "\n2. Reading: the unseen {} bytes, {} windows, in one go, {} at a time",
        grouped(tokens.len()),
        tokens.len() / window,
        chunk.unwrap_or_default()
    )?;
    writeln!(out, "                                        perplexity  bits a byte      tok/s")?;
    let mut last = None;
    for top_k in [TOP_K, 0] {
        let flags = CacheFlags { cache_topk: Some(top_k), mid_length: chunk, ..CacheFlags::default() };
        let mut reader = Reader::new(model.detached(), tokenizer.clone(), &flags)?;
        let (mut bar, begun) = (ReadingBar::new("   reading", Some(tokens.len() as u64)), Instant::now());
        let losses = reader.read_with_losses(&tokens, |done, _| {
            bar.set(done as u64, done);
            !interrupt::requested()
        })?;
        let took = begun.elapsed();
        bar.finish();
        if interrupt::requested() {
            return Ok(None);
        }
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        let name = match top_k {
            0 => "   without retrieval".to_string(),
            k => format!("   landmark cache: {k} blocks a token"),
        };
        let (perplexity, bits) = (loss.exp(), loss / std::f64::consts::LN_2);
        writeln!(out, "{name:38}  {perplexity:>10.3}  {bits:>11.3}  {:>9}", grouped(rate(losses.len(), took)))?;
        if top_k > 0 {
            last = Some(reader);
        }
    }
    let Some(mut reader) = last else { return Ok(None) };
    let (blocks, bytes) = (grouped(reader.blocks()), reader.cache_bytes() >> 20);
    writeln!(out, "   The cache holds {blocks} blocks in {bytes} MB; no position is beyond the window's {window}.")?;
    let prompt = tokenizer.encode(PROMPT)?;
    reader.read(&prompt, |_| true)?;
    tokens.extend(prompt);
    Ok(Some((reader, tokens)))
}

/// Goes on with the text, and shows what was read for it.
fn write_on(mut reader: Reader, mut tokens: Vec<u32>, seed: u64, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "\n3. Writing: how the model goes on, having read all that\n")?;
    let tokenizer = reader.tokenizer().clone();
    let mut decoder = tokenizer.decoder();
    let mut lines = lines::Lines::new(out, "   ");
    lines.push(PROMPT.trim_start())?;
    reader.trace_reads();
    reader.generate(WRITTEN, &mut Sampler::with(TEMPERATURE, seed), |token| {
        tokens.push(token);
        lines.push(&decoder.push(token)?)?;
        Ok(!interrupt::requested())
    })?;
    lines.push(&decoder.finish()?)?;
    lines.end_word()?;
    writeln!(out, "\n")?;
    for line in most_read(&reader, &tokens, 4)?.lines() {
        writeln!(out, "   {line}")?;
    }
    Ok(())
}

/// Keeps the model as `landmark train` keeps one, and the texts that the next commands use.
fn save(folder: &Path, model: &Gpt, tokenizer: &Tokenizer, unseen: &str) -> anyhow::Result<()> {
    let context = || format!("--out {}", folder.display());
    model.save(folder).with_context(context)?;
    tokenizer.save(folder).with_context(context)?;
    files::write(&folder.join("book.txt"), BOOK.as_bytes()).with_context(context)?;
    files::write(&folder.join("unseen.txt"), unseen.as_bytes()).with_context(context)
}

/// Commands that work as they stand, in the folder where the demonstration ran.
fn next_commands(folder: &Path) -> Vec<String> {
    let program = std::env::args().next().unwrap_or_else(|| "landmark".into());
    let (program, folder) = (quoted(&program), folder.display().to_string());
    let (model, unseen, book) =
        (quoted(&folder), quoted(&format!("{folder}/unseen.txt")), quoted(&format!("{folder}/book.txt")));
    vec![
        format!("{program} generate --checkpoint {model} --file {unseen} --show_blocks"),
        format!("{program} passkey --checkpoint {model} --lengths 500,2000,8000 --filler {book}"),
        format!("{program} prepare --dataset text --data_dir {book} --out data/book"),
        format!(
            "{program} train --dataset book --model landmark --n_layer 4 --n_embd 256 --batch_size 8 --acc_steps 1"
        ),
    ]
}

/// As a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}
