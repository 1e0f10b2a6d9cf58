//! `landmark session ask`: goes on with the text of a session.

use crate::interrupt;
use crate::reading::most_read;
use anyhow::bail;
use landmark_inference::{Sampler, SamplingFlags, SessionFlags, open_session};
use serde_json::json;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Instant;

/// Flags of `landmark session ask`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// What comes after the session's text, to be gone on with
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Stop after so many tokens
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_new_tokens: usize,
    /// Append the prompt and what was generated to the session's text
    #[arg(long)]
    keep: bool,
    /// Print which blocks the generated text read most, with their words
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "5")]
    show_blocks: Option<usize>,
    /// Score all landmarks, and none through an index
    #[arg(long)]
    exact: bool,
    /// Print the answer, and the blocks with --show_blocks, as one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    how: SessionFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
}

/// Asks.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.show_blocks == Some(0) {
        bail!("--show_blocks 0: expected at least 1");
    }
    let begun = Instant::now();
    args.sampling.check()?;
    let (mut session, mut reader) = open_session(&args.how, args.exact)?;
    let mut sampler = Sampler::new(&args.sampling, reader.sampling())?;
    if args.keep && session.append_from().is_some() {
        bail!("--keep is refused: a text was cut short in its appending; append it to its end first");
    }
    interrupt::watch()?;
    let tokenizer = reader.tokenizer().clone();
    let mut new = tokenizer.encode(&args.prompt)?;
    if session.tokens().is_empty() {
        new.splice(0..0, reader.begin().iter().copied());
    }
    if new.is_empty() {
        bail!("--prompt is empty");
    }
    reader.read(&new, |_| !interrupt::requested())?;
    // It takes its time: what was read has to come from the device for it.
    if args.show_blocks.is_some() {
        reader.trace_reads();
    }
    let prompt = new.len();
    let (mut decoder, mut text, mut first) = (tokenizer.decoder(), String::new(), None);
    let mut out = std::io::stdout().lock();
    let generated = match interrupt::requested() {
        true => Ok(0),
        false => reader.generate(args.max_new_tokens, &mut sampler, |token| {
            first.get_or_insert_with(|| begun.elapsed());
            new.push(token);
            let piece = decoder.push(token)?;
            if args.json {
                text.push_str(&piece);
            } else {
                out.write_all(piece.as_bytes())?;
                out.flush()?;
            }
            Ok(!interrupt::requested())
        }),
    };
    match generated {
        // Whoever reads the text has read enough, as `head` does.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            return Ok(ExitCode::SUCCESS);
        }
        other => other?,
    };
    // From the first to the last.
    let others = (new.len() - prompt).saturating_sub(1);
    let per_token = first.filter(|_| others > 0).map(|first| (begun.elapsed() - first).as_secs_f64() / others as f64);
    let rest = decoder.finish()?;
    let all = [session.tokens(), &new].concat();
    if args.keep {
        reader.commit(&mut session, &new, None, true)?;
    }
    if args.json {
        let blocks = reader.reads().into_iter().take(args.show_blocks.unwrap_or(0)).map(|read| {
            let words = all.get(read.tokens.clone()).map_or(Ok(String::new()), |tokens| tokenizer.decode(tokens))?;
            Ok(json!({
                "block": read.block, "first_token": read.tokens.start, "last_token": read.tokens.end - 1,
                "weight": read.weight, "weight_by_layers": read.by_layers, "text": words,
            }))
        });
        let (loaded, found) = reader.loads();
        let mut answer = json!({
            "answer": text + &rest, "tokens": new.len() - prompt, "session_tokens": session.tokens().len(),
            "seconds_to_first_token": first.map(|time| time.as_secs_f64()), "kept": args.keep,
            "milliseconds_per_token": per_token.map(|time| 1e3 * time),
            "units_loaded": loaded, "units_found": found,
        });
        if args.show_blocks.is_some() {
            answer["blocks"] = blocks.collect::<anyhow::Result<_>>()?;
        }
        writeln!(out, "{answer}")?;
    } else {
        writeln!(out, "{rest}")?;
        if let Some(count) = args.show_blocks {
            write!(out, "\n{}", most_read(&reader, &all, count, &(0..0))?)?;
        }
    }
    if let Some(line) = reader.recall_line() {
        eprintln!("{line}");
    }
    Ok(if interrupt::requested() { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}
