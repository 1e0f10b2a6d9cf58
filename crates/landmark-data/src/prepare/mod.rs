//! Text files to a [data folder](crate::DataFolder).
//!
//! Every text file is a document, taken byte for byte. A folder given as input stands for the `.txt` files in it and below
//! it, in the order of their names; a folder that holds `train/` and `validation/` (the layout of PG19) keeps that division,
//! and anything else in it, such as `test/`, is left out. Hidden files are never read.
//!
//! Of all other inputs, taken in order as one long text, the last `val_fraction` (by bytes) becomes the validation set. The
//! cut falls at the end of a line, so that also a single book gives both. A document on the cut becomes two, one in each set.
//!
//! Memory is bounded whatever the size of a file: text is read and encoded in pieces, see `pieces.rs` for where they end.
//! The output appears whole at the end, or not at all.

mod pieces;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::folder::{TRAIN_FILE, VALIDATION_FILE};
use crate::{Error, Result, TokenFileInfo, TokenWriter, Tokenizer};
use pieces::Pieces;

/// Text that is encoded at once, on all cores. An encoder needs some hundred times a text's size while it works.
const BATCH_BYTES: usize = 4 << 20;
/// Pieces that are encoded at once: bounds the overhead of very short documents.
const BATCH_PIECES: usize = 1 << 12;
/// How far after its ideal place the cut between the sets is looked for.
const CUT_WINDOW: u64 = 64 << 10;

/// How far a preparation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of text that are encoded.
    pub bytes_done: u64,
    /// Bytes of text there are.
    pub bytes_total: u64,
    /// Documents that are encoded.
    pub documents: u64,
    /// Tokens to train on so far.
    pub train_tokens: u64,
    /// Tokens to evaluate on so far.
    pub validation_tokens: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Train,
    Validation,
}

/// A document: a range of a file, and the set that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Document {
    path: PathBuf,
    range: Range<u64>,
    set: Set,
}

/// Encodes the text of `inputs` with `tokenizer` into the data folder `out_dir`, which is made if it is missing. See the
/// [module documentation](self) for what is read and how it is divided. Each document ends with the tokenizer's end-of-text,
/// if it has one. `progress` is called every few megabytes, and at the end.
pub fn prepare_text(
    inputs: &[PathBuf],
    tokenizer: &Tokenizer,
    out_dir: impl AsRef<Path>,
    val_fraction: f64,
    mut progress: impl FnMut(&Progress),
) -> Result<Progress> {
    let out_dir = out_dir.as_ref();
    if !(0.0..1.0).contains(&val_fraction) {
        let expected = "at least 0 and below 1";
        return Err(Error::Param { name: "val_fraction", got: val_fraction.to_string(), expected });
    }
    let documents = plan(inputs, val_fraction)?;
    fs::create_dir_all(out_dir).map_err(Error::io(out_dir))?;

    let info = TokenFileInfo::of(tokenizer);
    let mut encoder = Encoder {
        tokenizer,
        train: TokenWriter::create(out_dir.join(TRAIN_FILE), &info)?,
        validation: TokenWriter::create(out_dir.join(VALIDATION_FILE), &info)?,
        texts: Vec::new(),
        marks: VecDeque::new(),
        waiting: 0,
        state: Progress {
            bytes_total: documents.iter().map(|d| d.range.end - d.range.start).sum(),
            ..Default::default()
        },
    };
    for document in documents {
        let mut pieces = Pieces::open(&document.path, document.range)?;
        while let Some(text) = pieces.next()? {
            encoder.add(text, Mark { set: document.set, ends_document: false }, &mut progress)?;
        }
        encoder.add(String::new(), Mark { set: document.set, ends_document: true }, &mut progress)?;
    }
    encoder.finish(out_dir, &mut progress)
}

/// What becomes of a piece of text.
#[derive(Clone, Copy)]
struct Mark {
    set: Set,
    ends_document: bool,
}

/// Gathers pieces of text until there are enough for all cores, then encodes and writes them in order.
struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    train: TokenWriter,
    validation: TokenWriter,
    texts: Vec<String>,
    /// One for each of `texts`.
    marks: VecDeque<Mark>,
    /// Bytes of `texts`.
    waiting: usize,
    state: Progress,
}

impl Encoder<'_> {
    fn add(&mut self, text: String, mark: Mark, progress: &mut impl FnMut(&Progress)) -> Result<()> {
        self.waiting += text.len();
        self.texts.push(text);
        self.marks.push_back(mark);
        if self.waiting >= BATCH_BYTES || self.texts.len() >= BATCH_PIECES {
            self.encode()?;
            progress(&self.state);
        }
        Ok(())
    }

    fn encode(&mut self) -> Result<()> {
        for (tokens, mark) in self.tokenizer.encode_batch(&self.texts)?.iter().zip(self.marks.drain(..)) {
            let writer = match mark.set {
                Set::Train => &mut self.train,
                Set::Validation => &mut self.validation,
            };
            writer.push(tokens)?;
            if mark.ends_document {
                writer.end_document()?;
                self.state.documents += 1;
            }
        }
        self.state.bytes_done += self.waiting as u64;
        self.state.train_tokens = self.train.len();
        self.state.validation_tokens = self.validation.len();
        self.waiting = 0;
        self.texts.clear();
        Ok(())
    }

    fn finish(mut self, out_dir: &Path, progress: &mut impl FnMut(&Progress)) -> Result<Progress> {
        self.encode()?;
        progress(&self.state);
        self.train.finish()?;
        self.validation.finish()?;
        self.tokenizer.save(out_dir)?;
        Ok(self.state)
    }
}

/// The documents of `inputs`, in order, with their sets.
fn plan(inputs: &[PathBuf], val_fraction: f64) -> Result<Vec<Document>> {
    let mut divided = Vec::new();
    let mut undivided = Vec::new();
    for input in inputs {
        let (train, validation) = (input.join("train"), input.join("validation"));
        if train.is_dir() && validation.is_dir() {
            divided.extend(documents(&train, Set::Train)?);
            divided.extend(documents(&validation, Set::Validation)?);
        } else {
            undivided.extend(documents(input, Set::Train)?);
        }
    }
    divided.extend(divide(undivided, val_fraction)?);
    if divided.iter().all(|document| document.range.is_empty()) {
        return Err(Error::NoText { inputs: inputs.to_vec() });
    }
    Ok(divided)
}

/// The document `input`, or the documents in and below the folder `input`.
fn documents(input: &Path, set: Set) -> Result<Vec<Document>> {
    let metadata = fs::metadata(input).map_err(Error::io(input))?;
    if !metadata.is_dir() {
        return Ok(vec![Document { path: input.to_path_buf(), range: 0..metadata.len(), set }]);
    }
    let entries = fs::read_dir(input).map_err(Error::io(input))?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<_>>().map_err(Error::io(input))?;
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && (path.is_dir() || path.extension().is_some_and(|extension| extension == "txt")) {
            found.extend(documents(&path, set)?);
        }
    }
    Ok(found)
}

/// Moves the last `val_fraction` of the text to the validation set.
fn divide(mut documents: Vec<Document>, val_fraction: f64) -> Result<Vec<Document>> {
    let total: u64 = documents.iter().map(|document| document.range.end).sum();
    let mut train = total - (total as f64 * val_fraction) as u64;
    if train == total {
        return Ok(documents);
    }
    let mut first_validation = documents.len();
    for (i, document) in documents.iter_mut().enumerate() {
        if train < document.range.end {
            let cut = cut_after(&document.path, train, document.range.end)?;
            let rest = Document { range: cut..document.range.end, set: Set::Validation, path: document.path.clone() };
            document.range.end = cut;
            first_validation = i + 1;
            documents.insert(first_validation, rest);
            break;
        }
        train -= document.range.end;
    }
    documents.iter_mut().skip(first_validation).for_each(|document| document.set = Set::Validation);
    documents.retain(|document| !document.range.is_empty());
    Ok(documents)
}

/// A place to cut the file of length `len` at, from `at` on: after the next line, else after the next space, else between two
/// characters.
fn cut_after(path: &Path, at: u64, len: u64) -> Result<u64> {
    if at == 0 {
        return Ok(0);
    }
    let mut file = File::open(path).map_err(Error::io(path))?;
    // From one byte earlier: `at` itself may already be the start of a line.
    file.seek(SeekFrom::Start(at - 1)).map_err(Error::io(path))?;
    let mut window = Vec::new();
    file.take(CUT_WINDOW).read_to_end(&mut window).map_err(Error::io(path))?;
    let after = |wanted: u8| window.iter().position(|&byte| byte == wanted).map(|i| i + 1);
    // A continuation byte is 0b10xxxxxx: never cut before one.
    let character = || (1..window.len()).find(|&i| window[i] & 0xc0 != 0x80);
    let offset = after(b'\n').or_else(|| after(b' ')).or_else(character).unwrap_or(window.len());
    Ok((at - 1 + offset as u64).min(len))
}

#[cfg(test)]
mod tests;
