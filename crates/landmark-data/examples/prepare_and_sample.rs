//! Prepares text files and shows one training window: `cargo run --example prepare_and_sample -- book.txt`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use landmark_data::prepare::{Dataset, Event, OnError, Options, Preparation, Vocabulary};
use landmark_data::{Batches, DataFolder, IGNORE, Landmarks, Stream, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let places: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let tokenizer = Tokenizer::bytes();
    let out = std::env::temp_dir().join("landmark-data-example");
    let options = Options {
        dataset: Dataset::Text,
        places,
        field: "text".into(),
        val_fraction: Some(0.05),
        on_error: OnError::Stop,
        save_every: Duration::from_secs(10),
    };
    let vocabulary = Vocabulary::Given(tokenizer.clone());
    let summary = Preparation::find(options)?.run(&vocabulary, &out, &mut |event| {
        if let Event::Encoding(progress) = event {
            eprintln!("{} of {} bytes", progress.bytes_done, progress.bytes_total);
        }
        ControlFlow::Continue(())
    })?;
    let (train, validation) = (summary.train_tokens, summary.validation_tokens);
    println!("{}: {train} tokens to train on, {validation} to validate", out.display());

    let data = DataFolder::open(&out)?;
    let landmarks = Landmarks::Insert { id: 257, mem_freq: 15 };
    let batches = Batches::new(Stream::new(data.train, landmarks)?, 1, 64, tokenizer.end_of_text())?;
    let batch = batches.batch(0, 0);
    println!("{:?}", tokenizer.decode(&batch.inputs)?);
    println!("{} of {} positions have a loss", batch.targets.iter().filter(|&&id| id != IGNORE).count(), 64);
    Ok(())
}
