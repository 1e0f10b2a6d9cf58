//! `landmark bench prepare`: from text files to token files.

use super::peer;
use super::report::{self, Machine, Row};
use anyhow::Context;
use landmark_data::Tokenizer;
use landmark_data::prepare::{Dataset, OnError, Options, Preparation, Vocabulary};
use serde_json::json;
use std::fs;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PEER: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/tokenizers_peer.py"));
/// What is prepared where nothing is named.
const BOOK: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/book.txt"));
/// Documents that it makes.
const COPIES: usize = 16;

/// Flags of `landmark bench prepare`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Args {
    /// A text file, or a folder of .txt files; without it, a novel that is built in, sixteen times
    #[arg(long, value_name = "PATH")]
    data_dir: Option<PathBuf>,
    /// gpt2, or the path of a tokenizer.json
    #[arg(long, value_name = "NAME", default_value = "gpt2")]
    tokenizer: String,
    /// Turns of each side
    #[arg(long, value_name = "N", default_value = "3")]
    repeats: NonZeroUsize,
    #[command(flatten)]
    peer: peer::Flags,
    #[command(flatten)]
    report: report::Flags,
}

/// Measures preparation.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let text = match &args.data_dir {
        Some(path) => path.clone(),
        None => novel(folder.path())?,
    };
    let tokenizer = Tokenizer::named(&args.tokenizer).context("--tokenizer")?;
    tokenizer.save(folder.path())?;
    let json = folder.path().join(landmark_data::TOKENIZER_FILE);
    let mut peer = args.peer.start("tokenizers", PEER, &[json.display().to_string(), text.display().to_string()])?;
    let machine = Machine::measure()?;
    let out = folder.path().join("out");
    let (mut ours, mut peers, mut bytes) = (Vec::new(), Vec::new(), 0);
    for turn in 0..=args.repeats.get() {
        eprintln!("measuring turn {turn} of {}{}", args.repeats, if turn == 0 { " (warm-up)" } else { "" });
        let begun = Instant::now();
        bytes = prepare(&text, &tokenizer, &out)?;
        let seconds = begun.elapsed().as_secs_f64();
        let peer_seconds = peer.seconds(&json!({"calls": 1}))?;
        if turn > 0 {
            ours.push(seconds);
            peers.extend(peer_seconds);
        }
    }
    let megabytes = bytes as f64 / 1e6;
    let case = format!("{megabytes:.1} MB {}", args.tokenizer);
    let row = Row::timed(case, "prepare MB/s", [ours, peers], peer.name(), 0., |seconds| megabytes / seconds);
    let note = "ratio: ours / peer, above 1 is better. Ours reads the files, encodes and writes token files; the peer's encode_batch \
                has the text in memory and keeps the ids there.";
    // Its time counts as ours once it has ended.
    drop(peer);
    args.report.report(&[Row { gflops: None, ..row }], &machine, note)
}

/// A folder of documents.
fn novel(folder: &Path) -> anyhow::Result<PathBuf> {
    let text = folder.join("text");
    fs::create_dir(&text)?;
    for number in 0..COPIES {
        fs::write(text.join(format!("{number:02}.txt")), BOOK)?;
    }
    Ok(text)
}

/// Prepares all of it; the bytes of text.
fn prepare(text: &Path, tokenizer: &Tokenizer, out: &Path) -> anyhow::Result<u64> {
    let options = Options {
        dataset: Dataset::Text,
        places: vec![text.to_path_buf()],
        field: "text".into(),
        val_fraction: None,
        on_error: OnError::Stop,
        save_every: Duration::from_secs(10),
    };
    let vocabulary = Vocabulary::Given(tokenizer.clone());
    let done = Preparation::find(options)?.run(&vocabulary, out, &mut |_| ControlFlow::Continue(()));
    Ok(done.context("--data_dir")?.text_bytes)
}
