//! Prepares text files and shows one training window: `cargo run --example prepare_and_sample -- book.txt`.

use std::path::PathBuf;

use landmark_data::prepare::prepare_text;
use landmark_data::{Batches, DataFolder, IGNORE, Landmarks, Stream, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let inputs: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let tokenizer = Tokenizer::bytes();
    let out = std::env::temp_dir().join("landmark-data-example");
    let summary = prepare_text(&inputs, &tokenizer, &out, 0.05, |progress| {
        eprintln!("{} of {} bytes", progress.bytes_done, progress.bytes_total);
    })?;
    println!(
        "{}: {} tokens to train on, {} to validate",
        out.display(),
        summary.train_tokens,
        summary.validation_tokens
    );

    let data = DataFolder::open(&out)?;
    let landmarks = Landmarks::Insert { id: 257, mem_freq: 15 };
    let batches = Batches::new(Stream::new(data.train, landmarks)?, 1, 64, tokenizer.end_of_text())?;
    let batch = batches.batch(0, 0);
    println!("{:?}", tokenizer.decode(&batch.inputs)?);
    println!("{} of {} positions have a loss", batch.targets.iter().filter(|&&id| id != IGNORE).count(), 64);
    Ok(())
}
