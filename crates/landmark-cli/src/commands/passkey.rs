//! `landmark passkey`: does the model find a number that was told once, somewhere in a long text?

mod prompt;

use crate::interrupt;
use crate::plot::{self, Axes, Curve};
use crate::reader::{CacheFlags, ModelFlags, Reader, SelectionMethod};
use crate::reading::{ReadingBar, grouped, rate};
use crate::sampling::Sampler;
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use clap::ValueEnum;
use prompt::{Filler, Prompt, number};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  landmark passkey --checkpoint exps/demo --lengths 500,2000,8000 --trials 10
  landmark passkey --checkpoint exps/demo --filler book.txt --cache_topk 4 --without_retrieval \\
    --csv passkey.csv --plot passkey.svg

A prompt is a task, filler, \"The pass key is N. Remember it. N is the pass key.\", filler, and the
question. An answer is right if its first number is N; it is drawn greedily. Trial i hides the same
key at the same depth in every length.

Exit codes: 0 done (right or wrong), 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Tokens of an answer: a number of five digits, with a space, in tokens as short as bytes.
const ANSWER: usize = 8;

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
    /// Hide the key in this text, each time from another place on (again from its start at its end), instead of the usual sentences
    #[arg(long, value_name = "FILE", help_heading = "Test")]
    filler: Option<PathBuf>,
    /// Decides the keys, how deep they are hidden, and where in the filler a prompt begins
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Test")]
    seed: u64,
    /// Read each prompt a second time without retrieval (--cache_topk 0), for comparison
    #[arg(long, help_heading = "Test")]
    without_retrieval: bool,
    /// Write a line for each prompt here
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    csv: Option<PathBuf>,
    /// Draw the share of right answers by length here, as SVG
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    cache: CacheFlags,
}

/// A way of reading, and the results of its trials.
struct Way {
    name: String,
    reader: Reader,
    trials: Vec<Trial>,
}

struct Trial {
    length: usize,
    trial: u64,
    /// How far into the prompt the key was told, of 1.
    depth: f64,
    key: u64,
    answer: String,
    time: Duration,
}

impl Trial {
    fn is_right(&self) -> bool {
        number(&self.answer) == Some(self.key)
    }
}

/// Tests.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.trials == 0 {
        bail!("--trials 0: expected at least 1");
    }
    let mut ways = ways(&args)?;
    let tokenizer = ways[0].reader.tokenizer().clone();
    let filler = match &args.filler {
        None => Filler::garbage(&tokenizer)?,
        Some(path) => {
            Filler::text(&whole(path)?, &tokenizer).with_context(|| format!("--filler {}", path.display()))?
        }
    };
    // What is too short is known before hours of reading.
    for &length in &args.lengths {
        Prompt::new(&tokenizer, &filler, length, args.seed, 0)?;
    }
    interrupt::watch()?;
    let total = args.lengths.iter().sum::<usize>() * args.trials as usize * ways.len();
    let mut progress = Progress { bar: ReadingBar::new("reading", Some(total as u64)), done: 0 };
    'all: for &length in &args.lengths {
        for trial in 0..args.trials {
            let prompt = Prompt::new(&tokenizer, &filler, length, args.seed, trial)?;
            for way in &mut ways {
                match ask(&mut way.reader, &prompt, &mut progress)? {
                    None => break 'all,
                    Some((answer, time)) => {
                        let depth = prompt.told_at as f64 / length as f64;
                        way.trials.push(Trial { length, trial, depth, key: prompt.key, answer, time });
                    }
                }
            }
        }
    }
    progress.bar.finish();
    print!("{}", table(&ways, &args.lengths));
    if let Some(path) = &args.csv {
        crate::files::write(path, csv(&ways, args.cache.cache_selection_method).as_bytes())
            .with_context(|| format!("--csv {}: cannot write it", path.display()))?;
    }
    if let Some(path) = &args.plot {
        draw(path, &ways, &args.lengths).context("--plot")?;
    }
    Ok(if interrupt::requested() { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}

/// With the flags' memory, and without retrieval if that is wanted.
fn ways(args: &Args) -> anyhow::Result<Vec<Way>> {
    let way = |name: &str, cache: &CacheFlags| -> anyhow::Result<Way> {
        Ok(Way { name: name.into(), reader: Reader::open(&args.model, cache)?, trials: Vec::new() })
    };
    let first = way("right", &args.cache)?;
    if !args.without_retrieval {
        return Ok(vec![first]);
    }
    if !first.reader.has_blocks() {
        bail!("--without_retrieval is refused: this model is not read through the landmark cache in any case");
    }
    // The same chunks, so that retrieval is all that differs.
    let cache = CacheFlags { cache_topk: Some(0), mid_length: Some(first.reader.chunk()), ..args.cache.clone() };
    Ok(vec![first, way("without retrieval", &cache)?])
}

/// The whole text of a file.
fn whole(path: &Path) -> anyhow::Result<String> {
    let mut pieces = TextPieces::open(path).context("--filler")?;
    let mut text = String::new();
    while let Some(piece) = pieces.next().context("--filler")? {
        text.push_str(&piece);
    }
    Ok(text)
}

struct Progress {
    bar: ReadingBar,
    done: usize,
}

/// The answer to a prompt and how long it was read, or nothing if that was interrupted.
fn ask(reader: &mut Reader, prompt: &Prompt, progress: &mut Progress) -> anyhow::Result<Option<(String, Duration)>> {
    reader.clear();
    let begun = Instant::now();
    reader.read(&prompt.tokens, |done| {
        progress.bar.set((progress.done + done) as u64, progress.done + done);
        !interrupt::requested()
    })?;
    let time = begun.elapsed();
    progress.done += prompt.tokens.len();
    if interrupt::requested() {
        return Ok(None);
    }
    let tokenizer = reader.tokenizer().clone();
    let mut answer = Vec::new();
    reader.generate(ANSWER, &mut Sampler::greedy(), |token| {
        answer.push(token);
        Ok(true)
    })?;
    Ok(Some((tokenizer.decode(&answer)?, time)))
}

/// A line for each length.
fn table(ways: &[Way], lengths: &[usize]) -> String {
    let mut text = format!("{:>12}", "tokens");
    for way in ways {
        write!(text, "  {:>20}  {:>10}", way.name, "tok/s").unwrap();
    }
    text.push('\n');
    for &length in lengths {
        let mut line = format!("{:>12}", grouped(length));
        for way in ways {
            let trials: Vec<&Trial> = way.trials.iter().filter(|trial| trial.length == length).collect();
            let right = trials.iter().filter(|trial| trial.is_right()).count();
            let share = match trials.len() {
                0 => "-".into(),
                n => format!("{right}/{n} = {:.0} %", 100. * right as f64 / n as f64),
            };
            let speed = grouped(rate(trials.len() * length, trials.iter().map(|trial| trial.time).sum()));
            write!(line, "  {share:>20}  {speed:>10}").unwrap();
        }
        writeln!(text, "{line}").unwrap();
    }
    text
}

/// A line for each prompt. An answer is quoted as RFC 4180 has it.
fn csv(ways: &[Way], selection: Option<SelectionMethod>) -> String {
    let mut text = String::from("length,trial,top_k,selection,depth,key,answer,right,seconds\n");
    let selection = selection.unwrap_or(SelectionMethod::PerTokenAndHead).to_possible_value();
    let selection = selection.map(|value| value.get_name().to_string()).unwrap_or_default();
    for way in ways {
        let (top_k, selection) = match way.reader.top_k() {
            Some(k) => (k.to_string(), selection.as_str()),
            None => Default::default(),
        };
        for trial in &way.trials {
            let Trial { length, trial: number, depth, key, answer, time } = trial;
            let (answer, right, seconds) = (answer.replace('"', "\"\""), trial.is_right(), time.as_secs_f64());
            writeln!(text, "{length},{number},{top_k},{selection},{depth:.4},{key},\"{answer}\",{right},{seconds:.3}")
                .unwrap();
        }
    }
    text
}

fn draw(path: &Path, ways: &[Way], lengths: &[usize]) -> anyhow::Result<()> {
    let share = |way: &Way, length: usize| {
        let trials = || way.trials.iter().filter(|trial| trial.length == length);
        trials().filter(|trial| trial.is_right()).count() as f64 / trials().count() as f64
    };
    let mut lengths = lengths.to_vec();
    lengths.sort_unstable();
    let curve = |(way, name): (&Way, &str)| Curve {
        name: name.into(),
        points: lengths.iter().map(|&length| (length as f64, share(way, length))).collect(),
    };
    let curves: Vec<Curve> = ways.iter().zip(["landmark cache", "without retrieval"]).map(curve).collect();
    let axes = Axes { title: "Pass keys found", x: ("tokens", true), y: "share", y_range: Some(-0.02..1.02) };
    plot::write(path, &axes, &curves)
}
