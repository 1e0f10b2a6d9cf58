//! `landmark generate`: goes on with a text of any length.

use crate::interrupt;
use crate::reading::{ReadingBar, grouped, most_read};
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use landmark_inference::{CacheFlags, ModelFlags, Reader, Sampler, SamplingFlags};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark generate --checkpoint models/landmark-12m --file assets/persuasion.txt.zst --show_blocks
  landmark generate --checkpoint models/landmark-12m --prompt 'Anne was' --temperature 0
  cat chapters/*.txt | landmark generate --checkpoint models/landmark-12m --prompt 'The end of it was' --file -

The generated text alone goes to standard output, as it is drawn; the context is not repeated.
Without --file and --prompt the context is read from standard input, unless that is a terminal.
If the context is empty, the text begins as a new document does: after an end of text.

Exit codes: 0 done, 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Flags of `landmark generate`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// The text to go on with, of any length; - is standard input
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    file: Option<PathBuf>,
    /// Comes after the text of --file
    #[arg(long, value_name = "TEXT", help_heading = "Text")]
    prompt: Option<String>,
    /// Stop after so many tokens
    #[arg(long, value_name = "N", default_value_t = 200, help_heading = "Text")]
    max_new_tokens: usize,
    /// Print which blocks the generated text read most, with their words
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "5", help_heading = "Text")]
    show_blocks: Option<usize>,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    cache: CacheFlags,
}

/// Generates.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.sampling.check()?;
    let mut reader = Reader::open(&args.model, &args.cache)?;
    let mut sampler = Sampler::new(&args.sampling, reader.sampling())?;
    if args.show_blocks.is_some() && !reader.has_blocks() {
        bail!("--show_blocks is refused: this model is not read through the landmark cache, so there are no blocks");
    }
    if args.show_blocks == Some(0) {
        bail!("--show_blocks 0: expected at least 1");
    }
    interrupt::watch()?;
    let mut feed =
        Feed { reader: &mut reader, pending: Vec::new(), all: args.show_blocks.map(|_| Vec::new()), read: 0 };
    if let Some(path) = source(&args) {
        feed.read_file(&path)?;
    }
    if let Some(prompt) = &args.prompt {
        feed.push(prompt)?;
    }
    let tokens = feed.finish()?;
    match write_text(&mut reader, &mut sampler, &args, tokens) {
        // Whoever reads the text has read enough, as `head` does.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
        Ok(()) if interrupt::requested() => Ok(ExitCode::from(interrupt::EXIT_CODE)),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

/// Where the context comes from, besides the prompt.
fn source(args: &Args) -> Option<PathBuf> {
    match (&args.file, &args.prompt) {
        (Some(file), _) => Some(file.clone()),
        (None, None) if !std::io::stdin().is_terminal() => Some("-".into()),
        _ => None,
    }
}

/// Draws the text and writes it while it is drawn, then the blocks that it read. `tokens` is the context, for their words.
fn write_text(
    reader: &mut Reader,
    sampler: &mut Sampler,
    args: &Args,
    mut tokens: Option<Vec<u32>>,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    // A handle of its own: the decoder looks into it while the reader changes.
    let tokenizer = reader.tokenizer().clone();
    let mut decoder = tokenizer.decoder();
    reader.trace_reads();
    if !interrupt::requested() {
        reader.generate(args.max_new_tokens, sampler, |token| {
            out.write_all(decoder.push(token)?.as_bytes())?;
            out.flush()?;
            if let Some(tokens) = &mut tokens {
                tokens.push(token);
            }
            Ok(!interrupt::requested())
        })?;
    }
    writeln!(out, "{}", decoder.finish()?)?;
    if let (Some(count), Some(tokens)) = (args.show_blocks, &tokens) {
        write!(out, "\n{}", most_read(reader, tokens, count, &(0..0))?)?;
    }
    Ok(())
}

/// The context on its way into the model. It goes in whole chunks: in which pieces it arrives does not change what is read.
struct Feed<'r> {
    reader: &'r mut Reader,
    /// Tokens that do not fill a chunk yet.
    pending: Vec<u32>,
    /// All tokens, if somebody will ask for them.
    all: Option<Vec<u32>>,
    read: usize,
}

impl Feed<'_> {
    /// Reads a file, showing how far it is.
    fn read_file(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut pieces = TextPieces::open(path)?;
        let mut bar = ReadingBar::new("reading", pieces.length());
        while !interrupt::requested()
            && let Some(piece) = pieces.next()?
        {
            self.push(&piece)?;
            while self.pending.len() >= self.reader.chunk() && !interrupt::requested() {
                self.read_chunk()?;
                let share = self.read as f64 / (self.read + self.pending.len()) as f64;
                bar.set((pieces.offset() as f64 * share) as u64, self.read);
            }
        }
        bar.finish();
        if std::io::stderr().is_terminal() {
            eprintln!("read {} tokens at {} tok/s", grouped(self.read + self.pending.len()), grouped(bar.rate()));
        }
        Ok(())
    }

    fn push(&mut self, text: &str) -> anyhow::Result<()> {
        let mut tokens = self.reader.tokenizer().encode(text)?;
        if self.read == 0 && self.pending.is_empty() {
            tokens.splice(0..0, self.reader.begin().iter().copied());
        }
        if let Some(all) = &mut self.all {
            all.extend(&tokens);
        }
        self.pending.extend(tokens);
        Ok(())
    }

    fn read_chunk(&mut self) -> anyhow::Result<()> {
        let length = self.pending.len().min(self.reader.chunk());
        self.reader.read(&self.pending[..length], |_| true)?;
        self.pending.drain(..length);
        self.read += length;
        Ok(())
    }

    /// Reads what is left, or an end of text if there was nothing. Gives all tokens, if they were kept.
    fn finish(mut self) -> anyhow::Result<Option<Vec<u32>>> {
        if self.read == 0 && self.pending.is_empty() {
            let begin = self.reader.tokenizer().end_of_text();
            let begin = begin.context("there is no text to go on with: give some with --file or --prompt")?;
            self.pending.push(begin);
            self.all.iter_mut().for_each(|all| all.push(begin));
        }
        while !self.pending.is_empty() && !interrupt::requested() {
            self.read_chunk()?;
        }
        Ok(self.all)
    }
}
