//! `landmark` without arguments: the model that ships with the project reads a whole novel through the landmark cache, and answers two
//! questions about what was told once in it.

mod hidden;
mod next;

use crate::commands::passkey::{number, question, told};
use crate::interrupt;
use crate::reading::{ReadingBar, grouped, most_read, rate};
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use clap::{Args as _, FromArgMatches};
use hidden::{Fact, hide};
use landmark_inference::machine::peak_memory;
use landmark_inference::{CacheFlags, DeviceFlags, LmCache, Reader, Sampler, fitting};
use landmark_models::Model;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// The model that ships with the project.
const MODEL: &str = "models/landmark-12m";
/// A book that it has not seen in training; assets/README.md says more.
const BOOK: &str = "assets/persuasion.txt.zst";
const TITLE: &str = "Persuasion, by Jane Austen";
/// How many tokens, at the end of the text, have their perplexity measured with retrieval and without.
const SCORED: usize = 32_768;
/// Tokens of an answer, as `landmark passkey` has them.
const ANSWER: usize = 8;
/// How far into the text the plain fact is told, of 1.
const EARLY: f64 = 0.05;

/// Flags of `landmark demo`.
#[derive(clap::Args, Debug)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// Another model than the one that ships with the project: a checkpoint's folder, or an experiment's
    #[arg(long, alias = "model", value_name = "DIR", help_heading = "Model")]
    checkpoint: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlags,
    /// Read this text (.txt, .gz, .zst) instead of the book that ships with the project
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    file: Option<PathBuf>,
    /// Read so many tokens: the beginning of the text, or the text again and again. Left out: all of it, once
    #[arg(long, value_name = "N", help_heading = "Text")]
    tokens: Option<usize>,
    /// Decides the numbers that are hidden
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Text")]
    seed: u64,
    /// The pass key, instead of one that is drawn
    #[arg(long, value_name = "N", help_heading = "Text")]
    key: Option<u64>,
    /// How far into the text it is told, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.35, help_heading = "Text")]
    depth: f64,
    #[command(flatten)]
    cache: CacheFlags,
}

impl Default for Args {
    /// What `landmark` without arguments does.
    fn default() -> Self {
        let matches = Self::augment_args(clap::Command::new("demo")).get_matches_from(["demo"]);
        Self::from_arg_matches(&matches).expect("every flag may be left out")
    }
}

/// Shows it all.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if !(0. ..=1.).contains(&args.depth) {
        bail!("--depth {}: expected a share from 0 to 1", args.depth);
    }
    interrupt::watch()?;
    let mut out = std::io::stdout();
    match demonstrate(&args, &mut out) {
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

fn demonstrate(args: &Args, out: &mut impl Write) -> anyhow::Result<()> {
    let begun = Instant::now();
    let folder = match &args.checkpoint {
        Some(folder) => landmark_inference::checkpoint(folder)?,
        None => shipped(MODEL).with_context(|| missing(MODEL, "a model with --checkpoint DIR"))?,
    };
    let model = landmark_inference::load(&folder, None, args.device)?;
    let tokenizer = landmark_inference::tokenizer(&folder, None, None)?;
    let mut reader = Reader::new(model.detached(), tokenizer.clone(), &args.cache)?;
    let Some(top_k) = reader.top_k().filter(|&k| k > 0) else {
        bail!("the demonstration is about retrieval: it needs a model with landmarks, and --cache_topk of at least 1");
    };
    let file = match &args.file {
        Some(file) => file.clone(),
        None => shipped(BOOK).with_context(|| missing(BOOK, "a text with --file FILE"))?,
    };
    let text = tokenizer.encode(&TextPieces::open(&file)?.rest()?)?;
    let mut facts = facts(args);
    let tokens = hide(&text, args.tokens.unwrap_or(text.len()), &mut facts, &tokenizer)?;
    introduce(&model, &folder, args, &tokens, &facts, out)?;

    let chunk = reader.chunk();
    writeln!(
        out,
        "\nReading, {chunk} tokens at a time; each token and head chooses {top_k} blocks by their landmarks"
    )?;
    // A whole number of chunks: then retrieval is all that differs from the reading without it.
    let scored = tokens.len().saturating_sub(SCORED).max(tokens.len() / 2) / chunk * chunk;
    reader.reserve(tokens.len() + 1000)?;
    let Some(with) = read(&mut reader, &tokens, scored, "reading")? else { return Ok(()) };
    writeln!(
        out,
        "  {} tokens in {:.1} s, {} tok/s; {} blocks in {} MB, no position beyond the window's {}",
        grouped(tokens.len()),
        with.seconds,
        grouped((tokens.len() as f64 / with.seconds) as usize),
        grouped(reader.blocks()),
        grouped(reader.cache_bytes() >> 20),
        model.outline().window
    )?;

    let mut asked = tokens;
    for fact in &facts {
        if interrupt::requested() {
            return Ok(());
        }
        ask(&mut reader, &model, fact, &mut asked, out)?;
    }
    drop(reader);

    let flags = CacheFlags { cache_topk: Some(0), mid_length: Some(chunk), ..args.cache.clone() };
    let mut window = Reader::new(model.detached(), tokenizer, &flags)?;
    let end = &asked[scored..scored + with.losses];
    let Some(without) = read(&mut window, end, 0, "without retrieval")? else { return Ok(()) };
    writeln!(out, "\nPerplexity of the last {} tokens of the text", grouped(without.losses))?;
    writeln!(out, "  {:>8.2}  with retrieval", with.perplexity)?;
    writeln!(out, "  {:>8.2}  without, the same {chunk} tokens at a time", without.perplexity)?;

    let memory = peak_memory().map_or(String::new(), |bytes| format!(", at most {} MB of memory", bytes >> 20));
    writeln!(out, "\nDone in {:.0} s{memory}. To go on:", begun.elapsed().as_secs_f64())?;
    for command in next::commands(&folder, &file) {
        writeln!(out, "  {command}")?;
    }
    Ok(())
}

/// What is told, and asked for in this order.
fn facts(args: &Args) -> [Fact; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut number = |from: u64, to: u64| from + rng.next_u64() % (to - from);
    let (key, plain) = (number(10_000, 50_000), number(1000, 10_000));
    let key = args.key.unwrap_or(key);
    let statement = format!("\nKeep this in mind: Martha's number is {plain}.\n");
    [
        Fact::new(args.depth, told("pass key", key), &question("pass key"), key),
        Fact::new(EARLY, statement, "\nWhat is Martha's number? Martha's number is", plain),
    ]
}

/// Says what there is.
fn introduce(
    model: &Model,
    folder: &Path,
    args: &Args,
    tokens: &[u32],
    facts: &[Fact],
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let outline = model.outline();
    let window = outline.window;
    writeln!(
        out,
        "Landmark attention: a model whose window is {window} tokens reads {} and answers from them.\n",
        grouped(tokens.len())
    )?;
    writeln!(
        out,
        "Model   {}: {:.1} million parameters, {} layers, {} wide, {} heads; a landmark after every {} tokens",
        folder.display(),
        model.parameters() as f64 / 1e6,
        outline.layers,
        outline.width,
        outline.heads,
        outline.mem_freq.unwrap_or_default()
    )?;
    let text = match &args.file {
        None if args.checkpoint.is_none() => format!("{TITLE}, which the model has never seen"),
        None => TITLE.into(),
        Some(file) => file.display().to_string(),
    };
    let windows = tokens.len() / window;
    writeln!(out, "Text    {text}: {} tokens, {} windows; told once in it:", grouped(tokens.len()), grouped(windows))?;
    for fact in facts {
        let share = 100. * fact.at.start as f64 / tokens.len() as f64;
        writeln!(out, "        {:?} at token {} ({share:.0} %)", fact.told.trim(), grouped(fact.at.start))?;
    }
    Ok(())
}

/// How a text was read.
struct Read {
    seconds: f64,
    /// Tokens at its end that have a loss, and their perplexity.
    losses: usize,
    perplexity: f64,
}

/// Reads a text, and scores it from token `scored` on, but for that one: without a text before it, it has no loss.
fn read(reader: &mut Reader, tokens: &[u32], scored: usize, what: &str) -> anyhow::Result<Option<Read>> {
    let mut bar = ReadingBar::new(&format!("  {what}"), Some(tokens.len() as u64));
    let mut show = |done: usize| {
        bar.set(done as u64, done);
        !interrupt::requested()
    };
    let begun = Instant::now();
    reader.read(&tokens[..scored], &mut show)?;
    let mut losses = Vec::new();
    if !interrupt::requested() {
        losses = reader.read_with_losses(&tokens[scored..], |done, _| show(scored + done))?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    bar.finish();
    if interrupt::requested() {
        return Ok(None);
    }
    let first = if scored > 0 { 1 } else { 0 };
    let mean = losses[first..].iter().sum::<f64>() / (losses.len() - first) as f64;
    Ok(Some(Read { seconds, losses: tokens.len() - scored, perplexity: mean.exp() }))
}

/// Asks for a fact, shows the answer and what was read for it, and what the window alone makes of the question. `tokens` is the text so
/// far, and goes on with the question and the answer.
fn ask(
    reader: &mut Reader,
    model: &Model,
    fact: &Fact,
    tokens: &mut Vec<u32>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let tokenizer = reader.tokenizer().clone();
    let question = tokenizer.encode(&fact.question)?;
    tokens.extend(&question);
    // What the window alone sees.
    let flags = CacheFlags { lm_cache: Some(LmCache::None), ..CacheFlags::default() };
    let mut window = Reader::new(model.detached(), tokenizer.clone(), &flags)?;
    let seen = fitting(model.outline().window, &model.outline()).min(tokens.len());
    window.read(&tokens[tokens.len() - seen..], |_| true)?;
    let without = tokenizer.decode(&answer(&mut window)?)?;

    reader.read(&question, |_| true)?;
    reader.trace_reads();
    let begun = Instant::now();
    let answer = answer(reader)?;
    let took = begun.elapsed();
    tokens.extend(&answer);
    let text = tokenizer.decode(&answer)?;
    let verdict = |answer: &str| match number(answer) {
        Some(number) if number == fact.number => "right",
        _ => "wrong",
    };
    writeln!(out, "\n{}", fact.question.trim())?;
    writeln!(
        out,
        "  {:<24}  {}: told {} tokens ago",
        shown(&text),
        verdict(&text),
        grouped(tokens.len() - fact.at.end)
    )?;
    writeln!(out, "  {:<24}  {}: the same model, its window alone", shown(&without), verdict(&without))?;
    let mut told = Vec::new();
    for line in most_read(reader, tokens, 3, &fact.at)?.lines() {
        told.push(format!("  {line}"));
    }
    writeln!(out, "{}", told.join("\n"))?;
    writeln!(out, "  {} tokens written at {} tok/s", answer.len(), grouped(rate(answer.len(), took)))?;
    Ok(())
}

/// What the model says next.
fn answer(reader: &mut Reader) -> anyhow::Result<Vec<u32>> {
    let mut answer = Vec::new();
    reader.generate(ANSWER, &mut Sampler::greedy(), |token| {
        answer.push(token);
        Ok(true)
    })?;
    Ok(answer)
}

/// On one line, in quotes.
fn shown(answer: &str) -> String {
    format!("{:?}", answer.trim())
}

/// What ships with the project, which is looked for where the program is, then where it was started, and above.
fn shipped(path: &str) -> Option<PathBuf> {
    let places = [std::env::current_exe(), std::env::current_dir()];
    let places = places.into_iter().flatten();
    let here = |place: PathBuf| place.ancestors().map(|folder| folder.join(path)).find(|path| path.exists());
    let found = places.filter_map(here).next()?;
    // As short as can be where it is below the current folder.
    let relative = std::env::current_dir().ok().and_then(|here| Some(found.strip_prefix(here).ok()?.to_path_buf()));
    Some(relative.unwrap_or(found))
}

fn missing(path: &str, instead: &str) -> String {
    format!(
        "{path} is not there: it ships with the project, and was looked for in the folders of the program and of this shell, and \
         above them; run in the project's folder, or name {instead}"
    )
}
