//! `landmark passkey`: does the model find a number that was told once, somewhere in a long text?

mod ask;
mod prompt;
mod results;
mod sessions;

use crate::interrupt;
use crate::kept::{self, Folder};
use crate::reading::{ReadingBar, grouped};
use anyhow::{Context, bail};
use landmark_data::{Pretrained, Tokenizer};
use landmark_inference::machine::peak_memory;
use landmark_inference::{CacheFlags, LmCache, Memory, ModelFlags, Opened, Reading, SelectionMethod, Setting, fitting};
use landmark_models::Model;
use landmark_models::gpt::Placement;
use prompt::{Filler, MOST_KEYS, Prompts};
pub use prompt::{number, question, told};
use results::{Cell, Results, Trial};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark passkey --checkpoint models/landmark-12m --filler assets/persuasion.txt.zst --lengths 2048,8192,32768 --trials 20
  landmark passkey --checkpoint models/landmark-12m --filler data/books/test.tokens --keys 5 --all_selection_methods \\
    --without_retrieval --batch_size 64 --max_cache_gb 40 --json passkey.json --plot passkey.svg

A prompt is a task, filler, \"The pass key is N. Remember it. N is the pass key.\", filler, and the
question. With --keys each key has a name (\"the silver key\") and one of them is asked for. An answer
is right if its first number is N; it is drawn greedily. Trial i hides the same keys at the same
depths in every length.

Exit codes: 0 done (right or wrong), 1 error, 2 wrong command line, 130 Ctrl-C (what is finished is kept).";

/// Flags of `landmark passkey`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Lengths of the prompts in tokens, the question included
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values_t = [512, 2048, 8192], help_heading = "Test")]
    lengths: Vec<usize>,
    /// Prompts of each length
    #[arg(long, value_name = "N", default_value_t = 10, help_heading = "Test")]
    trials: u64,
    /// Keys that are told, each by a name of its own; one of them is asked for
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Test")]
    keys: usize,
    /// Hide the keys in this text (.txt, .gz, .zst, or prepared .tokens), each time from another place on (again from its start
    /// at its end), instead of the usual sentences
    #[arg(long, value_name = "FILE", help_heading = "Test")]
    filler: Option<PathBuf>,
    /// Begin at the same place in --filler each time. With --sessions, what prompts have in common before their keys is read once
    #[arg(long, requires = "filler", help_heading = "Test")]
    same_filler: bool,
    /// Decides the keys, how deep they are hidden, and where in the filler a prompt begins
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Test")]
    seed: u64,
    /// Ask the same without retrieval, for comparison: of each prompt the last window alone is read, all of it visible
    #[arg(long, help_heading = "Test")]
    without_retrieval: bool,
    /// Ask with each --cache_selection_method, for comparison
    #[arg(long, conflicts_with = "cache_selection_method", help_heading = "Test")]
    all_selection_methods: bool,
    /// Prompts that are read side by side; changes speed and memory, not the results
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Test")]
    batch_size: usize,
    /// Fewer side by side where their blocks together would need more memory than this
    #[arg(long, value_name = "GB", help_heading = "Test")]
    max_cache_gb: Option<f64>,
    /// Where every finished prompt is kept, from which the same command goes on after it was stopped. Left out: ./exps/passkey
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    out: Option<PathBuf>,
    /// Write all figures here: how each prompt was read and answered
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    json: Option<PathBuf>,
    /// Write a line for each prompt here
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    csv: Option<PathBuf>,
    /// Draw the share of right answers by length here, as SVG
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    sessions: sessions::Flags,
    #[command(flatten)]
    cache: CacheFlags,
}

/// All that decides the answers of a cell, but for the number of its prompts.
#[derive(Clone, Serialize, Deserialize, PartialEq)]
struct Key {
    version: u32,
    setting: Setting,
    length: usize,
    keys: usize,
    seed: u64,
    /// Whether on the CPU or a GPU, and what activations are there.
    device: String,
    dtype: String,
    /// SHA-256 of the model's files and of the filler's tokens; the tokenizer's fingerprint.
    model: String,
    filler: String,
    tokenizer: String,
    /// What begins a text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    begin: Vec<u32>,
    /// How a session kept its blocks, and which landmarks were scored when it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<(String, String)>,
    /// Whether all prompts begin at the same place in the filler.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    same_filler: bool,
}

/// The meaning of kept answers: raised when the test changes.
const VERSION: u32 = 1;

/// Tests.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    check(&args)?;
    let Opened { model, pretrained, path, adapter, .. } = Opened::open(&args.model)?;
    let Pretrained { tokenizer, begin, .. } = pretrained;
    if args.sessions.gpu_memory.is_some() && model.device().is_cpu() {
        bail!("--gpu_memory is refused: prompts are read on the CPU; see --device");
    }
    let ways = ways(&args, &model)?;
    let filler = match &args.filler {
        None => Filler::garbage(&tokenizer)?,
        Some(path) => Filler::open(path, &tokenizer).with_context(|| format!("--filler {}", path.display()))?,
    };
    let (keys, seed, same_filler) = (args.keys, args.seed, args.same_filler);
    let prompts = Prompts { tokenizer: &tokenizer, begin: &begin, filler: &filler, keys, seed, same_filler };
    // What is too short or impossible is known before hours of reading.
    let mut plan = Vec::with_capacity(args.lengths.len() * ways.len());
    for &length in &args.lengths {
        prompts.prompt(length, 0)?;
        for flags in &ways {
            plan.push((length, resolve(flags, length, &model, &tokenizer)?));
        }
    }
    interrupt::watch()?;
    let device = if model.device().is_cpu() { "cpu" } else { "cuda" };
    let dtype = model.activations().as_str();
    let model_hash = landmark_inference::hash_of_model(&path, adapter.as_deref())?;
    let filler_hash = kept::hash_of_tokens([Ok(filler.tokens().to_vec())])?;
    let kept = Folder::new(args.out.as_deref().unwrap_or("exps/passkey".as_ref()));
    let mut results = Results::new(&path, device, dtype, args.filler.as_deref(), args.keys, args.seed);
    print!("{}", Results::header());
    let count = plan.len();
    for (number, (length, reading)) in plan.into_iter().enumerate() {
        let key = Key {
            version: VERSION,
            setting: reading.setting.clone(),
            length,
            keys: args.keys,
            seed: args.seed,
            device: device.into(),
            dtype: dtype.into(),
            model: model_hash.clone(),
            filler: filler_hash.clone(),
            tokenizer: tokenizer.fingerprint().to_string(),
            begin: begin.clone(),
            session: None,
            same_filler,
        };
        let what = format!("[{}/{count}] {} tokens", number + 1, grouped(length));
        let cells = match args.sessions.sessions {
            Some(_) => compute_sessions(&key, &reading, &args, &prompts, &kept, &what)?,
            None => vec![compute(&key, reading, &args, &model, &prompts, &kept, &what)?],
        };
        for (way, cell) in cells.into_iter().enumerate() {
            print!("{}", cell.line(way == 0 && number.is_multiple_of(ways.len())));
            results.cells.push(cell);
        }
        if interrupt::requested() {
            break;
        }
    }
    if let Some(bytes) = peak_memory() {
        println!("at most {} MB of memory", grouped((bytes >> 20) as usize));
    }
    for (path, flag, text) in [(&args.json, "--json", results.json()? as String), (&args.csv, "--csv", results.csv())] {
        if let Some(path) = path {
            let cannot = || format!("{flag} {}: cannot write it", path.display());
            crate::files::write(path, text.as_bytes()).with_context(cannot)?;
        }
    }
    if let Some(path) = &args.plot {
        results.draw(path).context("--plot")?;
    }
    if interrupt::requested() {
        eprintln!("Stopped: the finished prompts are kept. The same command goes on.");
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    Ok(ExitCode::SUCCESS)
}

fn check(args: &Args) -> anyhow::Result<()> {
    if args.trials == 0 {
        bail!("--trials 0: expected at least 1");
    }
    if args.batch_size == 0 {
        bail!("--batch_size 0: expected at least 1");
    }
    if !(1..=MOST_KEYS).contains(&args.keys) {
        bail!("--keys {}: expected 1 to {MOST_KEYS}", args.keys);
    }
    if args.max_cache_gb.is_some_and(|gb| gb.is_nan() || gb <= 0.) {
        bail!("--max_cache_gb: expected a number above 0");
    }
    Ok(())
}

/// The ways of reading that are compared.
fn ways(args: &Args, model: &Model) -> anyhow::Result<Vec<CacheFlags>> {
    let kind = args.cache.kind(&model.outline())?;
    for (flag, given) in
        [("without_retrieval", args.without_retrieval), ("all_selection_methods", args.all_selection_methods)]
    {
        if given && kind != LmCache::Mem {
            bail!("--{flag} is refused: this model is not read through the landmark cache in any case");
        }
    }
    let mut ways = vec![CacheFlags { lm_cache: Some(kind), ..args.cache.clone() }];
    if args.all_selection_methods {
        let methods = [SelectionMethod::PerTokenAndHead, SelectionMethod::MaxOverHeads, SelectionMethod::MaxOverTokens];
        let with = |method| CacheFlags { cache_selection_method: Some(method), ..ways[0].clone() };
        ways = methods.map(with).to_vec();
    }
    if args.without_retrieval {
        ways.push(CacheFlags { lm_cache: Some(LmCache::None), ..CacheFlags::default() });
    }
    Ok(ways)
}

/// A way of reading prompts of `length` tokens. What the window alone is read of, its end, is all that an answer depends on.
fn resolve(flags: &CacheFlags, length: usize, model: &Model, tokenizer: &Tokenizer) -> anyhow::Result<Reading> {
    let outline = model.outline();
    let mut seen = length;
    if flags.lm_cache == Some(LmCache::None) {
        seen = length.min(fitting(outline.window, &outline));
        // From the beginning of a block, as training has it.
        if let (Some(mem_freq), Placement::Regular) = (outline.mem_freq, outline.placement) {
            seen -= ((mem_freq - (length - seen) % mem_freq) % mem_freq).min(seen - 1);
        }
    }
    Reading::resolve(flags, false, Some(seen), None, model, Some(tokenizer))
}

/// The answers of a cell: those that are kept, and the others, which are kept from now on.
fn compute(
    key: &Key,
    reading: Reading,
    args: &Args,
    model: &Model,
    prompts: &Prompts,
    kept: &Folder,
    what: &str,
) -> anyhow::Result<Cell> {
    let (length, seen) = (key.length, reading.setting.eval_seq_length);
    let mut trials: Vec<Trial> = kept.get(key)?.unwrap_or_default();
    let missing: Vec<u64> = (0..args.trials).filter(|trial| trials.iter().all(|known| known.trial != *trial)).collect();
    let mut bar = ReadingBar::new(what, Some((missing.len() * seen) as u64));
    let mut memory: Option<(Memory, usize)> = None;
    let mut read = 0;
    for batch in missing.chunks(side_by_side(args, &reading.setting, model)) {
        let asked = batch.iter().map(|&trial| prompts.prompt(length, trial)).collect::<anyhow::Result<Vec<_>>>()?;
        let texts: Vec<&[u32]> = asked.iter().map(|prompt| &prompt.tokens[length - seen..]).collect();
        let mut here = match memory.take() {
            Some((memory, rows)) if rows == texts.len() => memory,
            _ => Memory::new(&reading.flags, model, Some(prompts.tokenizer), texts.len())?.0,
        };
        here.clear();
        here.reserve(seen + ask::ANSWER)?;
        let answers =
            ask::answers(model, prompts.tokenizer, &mut here, reading.setting.mid_length, &texts, |tokens| {
                bar.set((read + tokens) as u64, read + tokens);
                !interrupt::requested()
            })?;
        let Some((answers, time)) = answers else { break };
        read += seen * texts.len();
        let seconds = time.as_secs_f64() / texts.len() as f64;
        for ((&trial, prompt), answer) in batch.iter().zip(&asked).zip(answers) {
            let depth = prompt.told_at as f64 / length as f64;
            trials.push(Trial { trial, depth, key: prompt.key, answer, seconds, tokens: None });
        }
        kept.put(key, &trials)?;
        memory = Some((here, texts.len()));
    }
    bar.finish();
    Ok(cell(key, reading.setting, None, trials, args.trials))
}

/// A cell of the first `most` prompts.
fn cell(key: &Key, setting: Setting, session: Option<&'static str>, mut trials: Vec<Trial>, most: u64) -> Cell {
    // More may be kept than are asked for.
    trials.retain(|trial| trial.trial < most);
    trials.sort_by_key(|trial| trial.trial);
    Cell { length: key.length, setting, session, trials }
}

/// The same through sessions, a cell for each way in which they are asked.
fn compute_sessions(
    key: &Key,
    reading: &Reading,
    args: &Args,
    prompts: &Prompts,
    kept: &Folder,
    what: &str,
) -> anyhow::Result<Vec<Cell>> {
    let keys = sessions::WAYS.map(|way| {
        let session = Some((args.sessions.block_dtype.name().to_string(), way.to_string()));
        Key { session, ..key.clone() }
    });
    let mut known: Vec<Vec<Trial>> =
        keys.iter().map(|key| anyhow::Ok(kept.get(key)?.unwrap_or_default())).collect::<Result<_, _>>()?;
    let has =
        |known: &[Vec<Trial>], number| known.iter().all(|trials| trials.iter().any(|trial| trial.trial == number));
    let missing = (0..args.trials).filter(|&number| !has(&known, number));
    let prompt = |number| Ok((prompts.prompt(key.length, number)?.keys_at, number));
    let mut missing = missing.map(prompt).collect::<anyhow::Result<Vec<_>>>()?;
    // What they begin with alike grows from one to the next.
    missing.sort_unstable();
    let own: usize = missing.iter().map(|(keys_at, _)| key.length - if key.same_filler { *keys_at } else { 0 }).sum();
    let alike = missing.last().map_or(0, |(keys_at, _)| if key.same_filler { *keys_at } else { 0 });
    let mut bar = ReadingBar::new(what, Some((own + alike) as u64));
    let mut sessions = sessions::Sessions::new(&args.model, &reading.flags, &args.sessions)?;
    let mut read = 0;
    for (_, number) in missing {
        let answers = sessions.answers(number, &prompts.prompt(key.length, number)?, |tokens| {
            read += tokens;
            bar.set(read as u64, read);
            !interrupt::requested()
        })?;
        let Some(answers) = answers else { break };
        for ((key, known), answer) in keys.iter().zip(&mut known).zip(answers) {
            known.retain(|trial| trial.trial != number);
            known.push(answer);
            kept.put(key, known)?;
        }
    }
    bar.finish();
    let cell_of = |(trials, way)| cell(key, reading.setting.clone(), Some(way), trials, args.trials);
    Ok(known.into_iter().zip(sessions::WAYS).map(cell_of).collect())
}

/// How many prompts may be read at once.
fn side_by_side(args: &Args, setting: &Setting, model: &Model) -> usize {
    let (Some(gb), Some(mem_freq)) = (args.max_cache_gb, setting.mem_cache_freq) else { return args.batch_size };
    let (outline, length) = (model.outline(), setting.eval_seq_length + ask::ANSWER);
    let blocks = setting.mem_cache_size.unwrap_or(usize::MAX).min(length / mem_freq + 1);
    // Keys and values of a block's tokens, and its landmark's key once more.
    let width = outline.kv_heads * outline.head_dim * outline.layers * model.activations().size_in_bytes();
    let bytes = blocks * (2 * (mem_freq + 1) + 1) * width;
    ((gb * 1e9 / bytes as f64) as usize).clamp(1, args.batch_size)
}
