//! What is done with sessions as a whole: `list`, `show`, `fork`, `export`, `delete` and `repair`.

use crate::files;
use crate::reading::grouped;
use anyhow::{Context, bail};
use landmark_data::Tokenizer;
use landmark_inference::About;
use landmark_memory::session::{self, Session, Status};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Flags of `landmark session list`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct List {
    /// The folder that the sessions are in
    #[arg(value_name = "DIR", default_value = ".")]
    folder: PathBuf,
    /// Print JSON, one line a session
    #[arg(long)]
    json: bool,
}

/// Flags of `landmark session show`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Show {
    /// The session's folder
    #[arg(value_name = "DIR")]
    session: PathBuf,
    /// Print the text of these tokens, such as 100..200, too
    #[arg(long, value_name = "FROM..TO", value_parser = range)]
    text: Option<std::ops::Range<usize>>,
    /// Read everything and compare it with its checksums
    #[arg(long)]
    verify: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Flags of `landmark session fork`.
#[derive(clap::Args)]
pub struct Fork {
    /// The session's folder
    #[arg(value_name = "DIR")]
    session: PathBuf,
    /// The new session's, which is made
    #[arg(value_name = "NEW")]
    new: PathBuf,
}

/// Flags of `landmark session export`.
#[derive(clap::Args)]
pub struct Export {
    /// The session's folder
    #[arg(value_name = "DIR")]
    session: PathBuf,
    /// Where to: text, or with the ending .jsonl one line of JSON a block, with its tokens' ids; - is standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Flags of `landmark session delete`.
#[derive(clap::Args)]
pub struct Delete {
    /// The session's folder
    #[arg(value_name = "DIR")]
    session: PathBuf,
}

/// Flags of `landmark session repair`.
#[derive(clap::Args)]
pub struct Repair {
    /// The session's folder
    #[arg(value_name = "DIR")]
    session: PathBuf,
}

fn range(text: &str) -> Result<std::ops::Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    ends.filter(|range| range.start <= range.end).ok_or_else(|| "expected two numbers, such as 100..200".into())
}

/// Lists.
pub fn list(args: List) -> anyhow::Result<ExitCode> {
    let entries = std::fs::read_dir(&args.folder).with_context(|| format!("cannot read {}", args.folder.display()))?;
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    // Folders with a dot are being made.
    folders.retain(|path| {
        path.join("session.json").exists() && path.file_name().is_none_or(|name| name.as_encoded_bytes()[0] != b'.')
    });
    folders.sort();
    let mut out = std::io::stdout().lock();
    for folder in &folders {
        match (session::peek(folder), args.json) {
            (Ok(status), true) => writeln!(out, "{}", as_json(folder, &status))?,
            (Ok(status), false) => writeln!(
                out,
                "{:<24} {:>14} tokens {:>10} MB  {}{}",
                folder.file_name().unwrap_or_default().to_string_lossy(),
                grouped(status.tokens as usize),
                grouped((status.bytes / 1_000_000) as usize),
                status.block_type,
                if status.append_from.is_some() { ", in the middle of a text" } else { "" }
            )?,
            (Err(error), true) => {
                let line = json!({ "session": folder.to_string_lossy(), "error": error.to_string() });
                writeln!(out, "{line}")?;
            }
            (Err(error), false) => writeln!(out, "{error}")?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(folder: &Path, status: &Status) -> Value {
    json!({
        "session": folder.to_string_lossy(), "tokens": status.tokens, "blocks": status.blocks, "dropped": status.dropped,
        "block_dtype": status.block_type, "bytes": status.bytes, "disk": status.disk_limit, "changed": status.changed,
        "append_from": status.append_from, "about": status.about,
    })
}

/// Shows.
pub fn show(args: Show) -> anyhow::Result<ExitCode> {
    let session = Session::open(&args.session)?;
    let (status, about) = (session.status(), About::of(session.about())?);
    let damage = if args.verify { Some(session.verify()) } else { None };
    let text = match &args.text {
        Some(range) => {
            let tokens = session.tokens().get(range.clone());
            let tokens =
                tokens.with_context(|| format!("--text: the session has {} tokens", session.tokens().len()))?;
            Some(tokenizer(&about)?.decode(tokens)?)
        }
        None => None,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut shown = as_json(&args.session, &status);
        if let Some(damage) = &damage {
            shown["damage"] = json!(damage);
        }
        if let Some(text) = &text {
            shown["text"] = json!(text);
        }
        writeln!(out, "{shown}")?;
    } else {
        writeln!(
            out,
            "model    {} (SHA-256 {})",
            about.model.display(),
            &about.model_hash[..16.min(about.model_hash.len())]
        )?;
        if let Some(adapter) = &about.adapter {
            writeln!(out, "         with the adapter in {}", adapter.display())?;
        }
        writeln!(
            out,
            "text     {} tokens in {} blocks",
            grouped(status.tokens as usize),
            grouped(status.blocks as usize)
        )?;
        if let Some(from) = status.append_from {
            writeln!(out, "         the text from token {} on is not read to its end", grouped(from as usize))?;
        }
        if !status.dropped.is_empty() {
            writeln!(out, "         without the damaged blocks {:?}", status.dropped)?;
        }
        let limit =
            status.disk_limit.map_or(String::new(), |limit| format!(", of {} at most", grouped(limit as usize)));
        writeln!(out, "disk     {} bytes{limit}, in {}", grouped(status.bytes as usize), status.block_type)?;
        writeln!(
            out,
            "reading  {} tokens at a time, each reads {} blocks of {} ({})",
            about.mid_length, about.cache_topk, about.mem_cache_freq, about.cache_selection_method
        )?;
        match &damage {
            Some(damage) if damage.is_empty() => writeln!(out, "checked  everything is as it was written")?,
            Some(damage) => damage.iter().try_for_each(|line| writeln!(out, "damaged  {line}"))?,
            None => {}
        }
        if let Some(text) = text {
            writeln!(out, "\n{text}")?;
        }
    }
    let is_whole = damage.is_none_or(|damage| damage.is_empty());
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tokenizer that a session's text was read with.
fn tokenizer(about: &About) -> anyhow::Result<Tokenizer> {
    let tokenizer = landmark_inference::tokenizer(&about.model, about.adapter.as_deref(), about.tokenizer.as_deref())?;
    if tokenizer.fingerprint().to_string() != about.tokenizer_hash {
        bail!("the tokenizer of {} is not the one that the session's text was read with", about.model.display());
    }
    Ok(tokenizer)
}

/// Forks.
pub fn fork(args: Fork) -> anyhow::Result<ExitCode> {
    let mut session = Session::open(&args.session)?;
    session.notes().iter().for_each(|note| eprintln!("{}: {note}", args.session.display()));
    session.fork(&args.new)?;
    Ok(ExitCode::SUCCESS)
}

/// Exports.
pub fn export(args: Export) -> anyhow::Result<ExitCode> {
    let session = Session::open(&args.session)?;
    let tokenizer = tokenizer(&About::of(session.about())?)?;
    let bytes = if args.out.extension().is_some_and(|ending| ending == "jsonl") {
        let mut lines = Vec::new();
        for (block, range) in session.blocks()?.into_iter().enumerate() {
            let tokens = &session.tokens()[range.clone()];
            let line = json!({
                "block": block, "first_token": range.start, "tokens": tokens, "text": tokenizer.decode(tokens)?,
            });
            writeln!(lines, "{line}")?;
        }
        lines
    } else {
        tokenizer.decode(session.tokens())?.into_bytes()
    };
    match args.out.as_os_str() == "-" {
        true => std::io::stdout().write_all(&bytes)?,
        false => files::write(&args.out, &bytes).with_context(|| format!("cannot write {}", args.out.display()))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Deletes.
pub fn delete(args: Delete) -> anyhow::Result<ExitCode> {
    session::delete(&args.session)?;
    Ok(ExitCode::SUCCESS)
}

/// Repairs.
pub fn repair(args: Repair) -> anyhow::Result<ExitCode> {
    let repair = session::repair(&args.session)?;
    if repair.damage.is_empty() {
        println!("nothing is damaged");
    }
    for line in &repair.damage {
        println!("{line}");
    }
    if !repair.dropped.is_empty() {
        println!("dropped {} blocks", grouped(repair.dropped.len()));
    }
    Ok(ExitCode::SUCCESS)
}
