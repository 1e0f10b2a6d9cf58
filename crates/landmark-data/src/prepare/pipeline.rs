//! A thread that reads, and all cores that work on what it has read.

use std::ops::ControlFlow;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::layout::{Input, Set};
use super::progress::Event;
use super::reader::{Action, Place, Rules, Step, read};
use super::work::Work;
use crate::{BpeTraining, Error, Result, Tokenizer};

/// Text that is worked on at once.
const BATCH_BYTES: usize = 8 << 20;
/// Steps that are worked on at once: bounds the overhead of very short documents.
const BATCH_STEPS: usize = 1 << 14;
/// The most bytes on the disk that a tokenizer is trained on: far more change nothing.
const TRAINING_BYTES: u64 = 512 << 20;

type Watch<'a> = &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>;

/// Steps that follow one another.
#[derive(Default)]
struct Batch {
    texts: Vec<String>,
    /// What is done, in order. The texts are apart, as they are encoded at once.
    actions: Vec<(Set, Done)>,
    /// The place after them.
    place: Place,
    bytes: usize,
}

enum Done {
    /// The next of the texts belongs to the current document.
    Text,
    End,
    Skip(Error),
    Other,
}

/// Encodes what is left of the inputs into `work`.
pub(super) fn encode(
    inputs: &[Input],
    rules: Rules<'_>,
    tokenizer: &Tokenizer,
    work: &mut Work,
    save_every: Duration,
    watch: Watch<'_>,
) -> Result<()> {
    let mut saved = Instant::now();
    let start = work.place();
    for_each_batch(inputs, rules, start, |batch| {
        let mut ids = tokenizer.encode_batch(&batch.texts)?.into_iter();
        for (set, done) in batch.actions {
            match done {
                Done::Text => work.push(set, &ids.next().unwrap_or_default())?,
                Done::End => work.end_document(set)?,
                Done::Skip(error) => {
                    work.skip(set, &error)?;
                    // Whether to stop is asked below, where the work can be saved.
                    let _ = watch(Event::Skipped(&error));
                }
                Done::Other => work.pass_over(),
            }
        }
        work.advance(batch.place, batch.bytes);
        let stop = watch(Event::Encoding(work.progress())).is_break();
        if stop || saved.elapsed() >= save_every {
            work.save()?;
            saved = Instant::now();
        }
        if stop { Err(Error::Interrupted) } else { Ok(()) }
    })
}

/// Trains a tokenizer on the training set of the inputs, or on a sample of it.
pub(super) fn train(
    inputs: &[Input],
    rules: Rules<'_>,
    mut training: BpeTraining,
    watch: Watch<'_>,
) -> Result<Tokenizer> {
    let bytes_total: u64 = inputs.iter().map(Input::len).sum();
    for_each_batch(inputs, rules, Place::default(), |batch| {
        let of_texts = batch.actions.iter().filter(|(_, done)| matches!(done, Done::Text));
        let texts =
            of_texts.zip(&batch.texts).filter(|((set, _), _)| *set == Set::Train).map(|(_, text)| text.as_str());
        // From everywhere in the text, and the same texts in each run.
        let sample: Vec<&str> = texts.filter(|text| is_in_sample(text, bytes_total)).collect();
        // When it is full, the rest is still looked at for errors.
        training.add(&sample);
        match watch(Event::Reading { bytes_done: batch.place.disk, bytes_total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    })?;
    if watch(Event::Training).is_break() {
        return Err(Error::Interrupted);
    }
    training.finish()
}

fn is_in_sample(text: &str, bytes_total: u64) -> bool {
    if bytes_total <= TRAINING_BYTES {
        return true;
    }
    // Not the bytes of the hash that decide on validation, which are the first 8.
    let mut tail = [0; 8];
    tail.copy_from_slice(&Sha256::digest(text)[8..16]);
    let share = TRAINING_BYTES as f64 / bytes_total as f64;
    (u64::from_be_bytes(tail) as f64) < share * 2f64.powi(64)
}

/// Reads the inputs from `place` on in a thread of its own, and calls `work` with what it has read.
fn for_each_batch(
    inputs: &[Input],
    rules: Rules<'_>,
    place: Place,
    mut work: impl FnMut(Batch) -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        // One waits, one is worked on, one is read.
        let (sender, receiver) = sync_channel(1);
        let reader = scope.spawn(move || read_batches(inputs, rules, place, |batch| sender.send(batch).is_ok()));
        let worked = receiver.iter().try_for_each(&mut work);
        // A reader that waits to send is told that nobody listens.
        drop(receiver);
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        worked.and(read)
    })
}

/// Calls `send` with batches that end where reading can start again, until it says no.
fn read_batches(inputs: &[Input], rules: Rules<'_>, place: Place, mut send: impl FnMut(Batch) -> bool) -> Result<()> {
    let mut batch = Batch::default();
    read(inputs, rules, place, &mut |Step { set, action, place }| {
        let done = match action {
            Action::Text(text) => {
                batch.bytes += text.len();
                batch.texts.push(text);
                Done::Text
            }
            Action::End => Done::End,
            Action::Skip(error) => Done::Skip(error),
            Action::Other => Done::Other,
        };
        batch.actions.push((set, done));
        match place {
            Some(place) if batch.bytes >= BATCH_BYTES || batch.actions.len() >= BATCH_STEPS => {
                batch.place = place;
                send(std::mem::take(&mut batch))
            }
            Some(place) => {
                batch.place = place;
                true
            }
            None => true,
        }
    })?;
    // The last step has a place, the end.
    if !batch.actions.is_empty() {
        send(batch);
    }
    Ok(())
}
