//! Text of a data set to a [data folder](crate::DataFolder).
//!
//! | layout | files | which set a document is in |
//! | --- | --- | --- |
//! | [`Dataset::Pg19`] | `train/*.txt`, `validation/*.txt` and perhaps `test/*.txt`, a document each | the folder says it |
//! | [`Dataset::ArxivMath`] | JSON lines or Parquet, a document a record, as proof-pile | the name of the file or of its folder says it |
//! | [`Dataset::RedPajama`] | JSON lines or Parquet, a document a record | a hash of its text |
//! | [`Dataset::Text`] | `.txt` files, a document each; Parquet, a document a row | as PG19 if there are such folders; else the last share of the text |
//!
//! Text and JSON lines may be compressed (`.gz`, `.zst`). A folder stands for the files of these kinds in it and below it, in the
//! order of their names; hidden ones are never read. A file is taken byte for byte, and each document ends with the tokenizer's
//! end-of-text, if it has one.
//!
//! With [`Dataset::Text`], the plain files, in order, are one long text whose last `val_fraction` (by bytes) becomes the
//! validation set. The cut falls at the end of a line, so that also a single book gives both; a document on the cut becomes
//! two. Documents that are compressed or in tables are divided by the hash of their beginning instead, as RedPajama's are.
//!
//! Of proof-pile, [`Dataset::ArxivMath`] takes the records whose `meta` names no other `config` than `arxiv`, as the reference does.
//!
//! # How
//!
//! One thread reads, all cores encode, and the order of the input is that of the output, so the files are the same bytes
//! whatever the number of threads. Memory is bounded whatever the size of a file: text is encoded in pieces, see `pieces.rs`
//! for where they end.
//!
//! Until all is done, everything is in the hidden folder `.prepare` in the output folder; then the finished files are renamed to
//! their places. Every [`Options::save_every`] the work is made safe, so that the same call goes on from there after it
//! was stopped or killed. A preparation that fails before that leaves nothing.

mod cut;
mod layout;
mod pieces;
mod pipeline;
mod progress;
mod reader;
mod records;
mod source;
mod table;
mod work;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{BpeTraining, Error, Result, Tokenizer};
pub use cut::border;
pub use layout::Dataset;
use layout::{Input, Set};
pub use progress::{Event, Progress, Skipped};
use reader::Rules;
pub use source::open;
pub use work::WORK_FOLDER;
use work::Work;

/// What to prepare.
#[derive(Clone, Debug)]
pub struct Options {
    /// How it is laid out.
    pub dataset: Dataset,
    /// Where it is: files and folders.
    pub places: Vec<PathBuf>,
    /// The field, or the column, with the text of a record.
    pub field: String,
    /// The share of the text for validation, at least 0 and below 1; `None` for [`Dataset::default_val_fraction`]. A data set
    /// that is divided already takes none.
    pub val_fraction: Option<f64>,
    /// What becomes of bad input.
    pub on_error: OnError,
    /// How often the work is made safe.
    pub save_every: Duration,
}

/// What becomes of bad input: bytes that are not UTF-8, a line that is no record, a record without text, a damaged archive, an
/// empty file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The preparation fails.
    Stop,
    /// The document, or what is left of the archive, is left out and counted.
    Skip,
}

/// What makes tokens of the text.
#[derive(Clone, Debug)]
pub enum Vocabulary {
    /// This tokenizer.
    Given(Tokenizer),
    /// A byte-level BPE of so many entries, trained on the text of the training set. Of more than 512 MiB on the disk it sees a
    /// sample.
    Train {
        /// The ids, end-of-text and the landmark included.
        entries: usize,
        /// Whether each digit is a token of its own.
        split_digits: bool,
    },
}

/// A data set that was found on the disk.
#[derive(Debug)]
pub struct Preparation {
    options: Options,
    inputs: Vec<Input>,
}

impl Preparation {
    /// Looks for the files of the data set. See the [module documentation](self) for which ones.
    pub fn find(options: Options) -> Result<Self> {
        let inputs = layout::find(&options.places, options.dataset, options.val_fraction)?;
        Ok(Self { options, inputs })
    }

    /// Writes the data folder `out_dir`, which is made if it is missing; goes on with the same preparation if it was begun. `watch`
    /// is called every few megabytes and can end it, with [`Error::Interrupted`].
    pub fn run(
        &self,
        vocabulary: &Vocabulary,
        out_dir: impl AsRef<Path>,
        watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Progress> {
        if let &Vocabulary::Train { entries, .. } = vocabulary {
            // For its error, before anything is read.
            BpeTraining::new(entries)?;
        }
        let mut work = Work::open(out_dir.as_ref(), self.key(vocabulary)?, self.options.on_error)?;
        if work.is_finished() {
            return work.publish();
        }
        let tokenizer = match vocabulary {
            Vocabulary::Given(tokenizer) => tokenizer.clone(),
            &Vocabulary::Train { entries, split_digits } => match work.tokenizer() {
                Some(tokenizer) => tokenizer,
                None => {
                    let tokenizer = {
                        let training = BpeTraining::new(entries)?.split_digits(split_digits);
                        pipeline::train(&self.inputs, self.rules(), training, watch)?
                    };
                    work.keep_tokenizer(&tokenizer)?;
                    tokenizer
                }
            },
        };
        let sets = [Set::Train, Set::Validation, Set::Test].into_iter();
        let sets = sets.filter(|&set| set != Set::Test || self.inputs.iter().any(|input| input.may_hold(set)));
        work.start(&tokenizer, sets, self.inputs.iter().map(Input::len).sum())?;
        pipeline::encode(&self.inputs, self.rules(), &tokenizer, &mut work, self.options.save_every, watch)?;
        work.finish(&tokenizer)?;
        work.publish()
    }

    fn rules(&self) -> Rules<'_> {
        Rules {
            field: &self.options.field,
            config: (self.options.dataset == Dataset::ArxivMath).then_some("arxiv"),
            on_error: self.options.on_error,
        }
    }

    /// What tells this preparation from every other one. Not what becomes of errors: so far, there was none.
    fn key(&self, vocabulary: &Vocabulary) -> Result<String> {
        let mut hasher = Sha256::new();
        for input in &self.inputs {
            let modified = fs::metadata(&input.path).and_then(|metadata| metadata.modified());
            let modified = modified.map_err(Error::io(&input.path))?;
            hasher.update(format!("{input:?} {modified:?}\n"));
        }
        let vocabulary = match vocabulary {
            Vocabulary::Given(tokenizer) => format!("{:02x?}", tokenizer.fingerprint().0),
            Vocabulary::Train { entries, split_digits: false } => format!("train {entries}"),
            Vocabulary::Train { entries, split_digits: true } => format!("train {entries}, single digits"),
        };
        let Rules { field, config, .. } = self.rules();
        hasher.update(format!("{vocabulary} {field:?} {config:?}"));
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests;
