//! `landmark session append`: reads a text into a session, chunk by chunk, each of which stays.

use crate::interrupt;
use crate::reading::{ReadingBar, grouped, rate};
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use landmark_data::TokenFile;
use landmark_inference::machine::peak_memory;
use landmark_inference::{Reader, SessionFlags, open_session};
use landmark_memory::session::Session;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Tokens of a token file that are taken at once.
const PIECE: u64 = 1 << 16;

/// Flags of `landmark session append`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// The text, of any length; - is standard input
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    file: Option<PathBuf>,
    /// A token file of the model's tokenizer, as `landmark prepare` makes them
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Leave out the first so many tokens of it
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip_tokens: u64,
    /// Append no more than so many tokens of it
    #[arg(long, value_name = "N")]
    max_tokens: Option<u64>,
    /// Another text was cut short in its appending: take it as it is, and begin this one
    #[arg(long)]
    new_text: bool,
    #[command(flatten)]
    how: SessionFlags,
}

/// Appends.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.max_tokens == Some(0) {
        bail!("--max_tokens 0: expected at least 1");
    }
    let mut source = Source::open(&args)?;
    let (mut session, mut reader) = open_session(&args.how, false)?;
    source.check(&reader)?;
    let from = match session.append_from().filter(|_| !args.new_text) {
        Some(from) => from,
        None => session.tokens().len(),
    };
    interrupt::watch()?;
    let begin = if from == 0 { reader.begin().to_vec() } else { Vec::new() };
    let mut append = Append { from, known: session.tokens().len() - from, checked: 0, pending: Vec::new(), read: 0 };
    let begun = Instant::now();
    let mut bar = ReadingBar::new("reading", source.length());
    append.take(&session, &begin)?;
    while !interrupt::requested()
        && let Some(tokens) = source.next(&reader)?
    {
        append.take(&session, &tokens)?;
        // The last chunk is not among these: what is left of the text may be none.
        while append.pending.len() > reader.chunk() && !interrupt::requested() {
            append.read_chunk(&mut session, &mut reader, false)?;
            bar.set(source.position(append.pending.len()), append.read);
        }
    }
    let mut exit = ExitCode::SUCCESS;
    if interrupt::requested() {
        reader.commit(&mut session, &[], Some(from), true)?;
        eprintln!("{}: interrupted; the same command goes on", args.how.session.display());
        exit = ExitCode::from(interrupt::EXIT_CODE);
    } else {
        append.finish()?;
        append.read_chunk(&mut session, &mut reader, true)?;
    }
    bar.finish();
    let (loaded, found) = reader.loads();
    let memory = peak_memory().map_or(String::new(), |bytes| format!(", at most {} MB of memory", bytes >> 20));
    eprintln!(
        "{} tokens read at {} tok/s; the session has {} tokens in {} blocks; {:.0} % of blocks were found {}{memory}",
        grouped(append.read),
        grouped(rate(append.read, begun.elapsed())),
        grouped(session.tokens().len()),
        grouped(session.status().blocks as usize),
        100. * found as f64 / (loaded + found).max(1) as f64,
        reader.tier()
    );
    if let Some(line) = reader.recall_line() {
        eprintln!("{line}");
    }
    Ok(exit)
}

/// The text on its way into the session.
struct Append {
    /// The token of the session's text that it begins with.
    from: usize,
    /// Tokens of it that the session had before, and how many of them were compared.
    known: usize,
    checked: usize,
    /// Tokens that are not read yet.
    pending: Vec<u32>,
    read: usize,
}

impl Append {
    /// Takes the text's next tokens.
    fn take(&mut self, session: &Session, tokens: &[u32]) -> anyhow::Result<()> {
        let compared = tokens.len().min(self.known - self.checked);
        if session.tokens()[self.from + self.checked..][..compared] != tokens[..compared] {
            return Err(self.other_text());
        }
        self.checked += compared;
        self.pending.extend_from_slice(&tokens[compared..]);
        Ok(())
    }

    /// The text has come to its end.
    fn finish(&self) -> anyhow::Result<()> {
        if self.checked < self.known {
            return Err(self.other_text());
        }
        if self.known + self.read + self.pending.len() == 0 {
            bail!("the text is empty");
        }
        Ok(())
    }

    fn other_text(&self) -> anyhow::Error {
        anyhow::anyhow!(
            "the session stopped {} tokens into a text that is not this one: append that one again, and it goes on; or leave it as it \
             is with --new_text",
            grouped(self.known)
        )
    }

    fn read_chunk(&mut self, session: &mut Session, reader: &mut Reader, last: bool) -> anyhow::Result<()> {
        let length = self.pending.len().min(reader.chunk());
        if length > 0 {
            reader.read(&self.pending[..length], |_| true)?;
        }
        reader.commit(session, &self.pending[..length], Some(self.from).filter(|_| !last), last)?;
        self.pending.drain(..length);
        self.read += length;
        Ok(())
    }
}

/// Where the text comes from.
enum Source {
    Text { pieces: TextPieces, skip: u64, left: u64 },
    Tokens { file: Box<TokenFile>, at: u64, end: u64 },
}

impl Source {
    fn open(args: &Args) -> anyhow::Result<Self> {
        let most = args.max_tokens.unwrap_or(u64::MAX);
        if let Some(path) = &args.tokens {
            let file = TokenFile::open(path).context("--tokens")?;
            let at = args.skip_tokens.min(file.len());
            let end = file.len().min(at.saturating_add(most));
            return Ok(Self::Tokens { file: Box::new(file), at, end });
        }
        let path = args.file.as_ref().context("--file FILE is missing")?;
        Ok(Self::Text { pieces: TextPieces::open(path)?, skip: args.skip_tokens, left: most })
    }

    /// Refuses tokens of another tokenizer.
    fn check(&self, reader: &Reader) -> anyhow::Result<()> {
        match self {
            Self::Text { .. } => Ok(()),
            Self::Tokens { file, .. } => Ok(file.check_tokenizer(reader.tokenizer()).context("--tokens")?),
        }
    }

    fn next(&mut self, reader: &Reader) -> anyhow::Result<Option<Vec<u32>>> {
        match self {
            Self::Text { left: 0, .. } => Ok(None),
            Self::Text { pieces, skip, left } => {
                let Some(piece) = pieces.next()? else { return Ok(None) };
                let mut tokens = reader.tokenizer().encode(&piece)?;
                let skipped = tokens.len().min(usize::try_from(*skip).unwrap_or(usize::MAX));
                tokens.drain(..skipped);
                *skip -= skipped as u64;
                tokens.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= tokens.len() as u64;
                Ok(Some(tokens))
            }
            Self::Tokens { at, end, .. } if at == end => Ok(None),
            Self::Tokens { file, at, end } => {
                let from = *at;
                *at = (from + PIECE).min(*end);
                let token = |i| file.get(i).context("--tokens: it ends early");
                Ok(Some((from..*at).map(token).collect::<anyhow::Result<_>>()?))
            }
        }
    }

    /// In bytes, or tokens.
    fn length(&self) -> Option<u64> {
        match self {
            Self::Text { skip, left, .. } if *left < u64::MAX || *skip > 0 => None,
            Self::Text { pieces, .. } => pieces.length(),
            Self::Tokens { end, .. } => Some(*end),
        }
    }

    /// How far it is read, all but so many tokens.
    fn position(&self, pending: usize) -> u64 {
        match self {
            Self::Text { pieces, .. } => pieces.offset(),
            Self::Tokens { at, .. } => at - pending as u64,
        }
    }
}
