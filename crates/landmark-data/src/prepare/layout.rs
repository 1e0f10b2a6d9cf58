//! Which files a data set is made of, how each is read, and which set its documents belong to.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cut::cut_after;
use crate::{Error, Result};

/// A layout of text on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataset {
    /// `train/`, `validation/` and perhaps `test/`, a `.txt` file for each book.
    Pg19,
    /// JSON lines whose files, or their folders, are named for their set, as those of the arXiv part of proof-pile.
    ArxivMath,
    /// Shards of JSON lines that are in no set yet.
    RedPajama,
    /// Any text.
    Text,
}

/// The part that a document plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Set {
    Train,
    Validation,
    Test,
}

/// How the set of an input's documents is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Division {
    /// All are in this one.
    Fixed(Set),
    /// By a hash of the text: those below this are for validation. Equal documents are never on both sides.
    Hashed(u64),
}

/// How an input is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The file is one document.
    Text,
    /// Each line is a JSON object.
    Lines,
    /// Parquet.
    Table,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What the ending of a file's name says.
    pub(super) fn of(path: &Path) -> Self {
        match path.extension().map(|ending| ending.to_ascii_lowercase()) {
            Some(ending) if ending == "gz" => Self::Gzip,
            Some(ending) if ending == "zst" => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// A file to read, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) compression: Compression,
    /// In bytes of the file. Only plain text is ever read in part.
    pub(super) range: Range<u64>,
    pub(super) division: Division,
}

impl Input {
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub(super) fn may_hold(&self, set: Set) -> bool {
        match self.division {
            Division::Fixed(fixed) => fixed == set,
            Division::Hashed(_) => set != Set::Test,
        }
    }
}

impl Dataset {
    /// The share of documents for validation where nobody says otherwise; `None` where the data set is divided already.
    pub fn default_val_fraction(self) -> Option<f64> {
        match self {
            Self::Pg19 | Self::ArxivMath => None,
            // Of shards of gigabytes, a tenth would be more than any evaluation reads.
            Self::RedPajama => Some(0.01),
            Self::Text => Some(0.1),
        }
    }

    pub(super) fn files(self) -> &'static str {
        match self {
            Self::Pg19 => "train/*.txt and validation/*.txt",
            Self::ArxivMath | Self::RedPajama => ".jsonl, .jsonl.gz, .jsonl.zst or .parquet files",
            Self::Text => ".txt files (also .gz, .zst) or .parquet files",
        }
    }

    /// Why a file is none of [`Dataset::files`].
    fn refusal(self) -> &'static str {
        match self {
            Self::Pg19 => "expected a .txt file",
            Self::ArxivMath | Self::RedPajama => {
                "expected a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file; use --dataset text for plain text"
            }
            Self::Text => "records are read with --dataset redpajama (or arxivmath)",
        }
    }

    /// Whether a file is one of [`Dataset::files`].
    fn wants(self, path: &Path) -> bool {
        match (self, Kind::of(path)) {
            (_, None) => false,
            (Self::Pg19, Some(kind)) => kind.format == Format::Text,
            (Self::ArxivMath | Self::RedPajama, Some(kind)) => kind.format != Format::Text,
            (Self::Text, Some(kind)) => kind.format != Format::Lines,
        }
    }
}

/// What a file's name says about its contents.
struct Kind {
    format: Format,
    compression: Compression,
}

impl Kind {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let compression = Compression::of(path);
        let name = if compression == Compression::None { &name } else { name.rsplit_once('.')?.0 };
        let format = match name.rsplit_once('.')?.1 {
            "txt" => Format::Text,
            "jsonl" | "json" => Format::Lines,
            // It has its own compression inside.
            "parquet" if compression == Compression::None => Format::Table,
            _ => return None,
        };
        Some(Self { format, compression })
    }
}

/// The inputs of `dataset` at `places`, in order.
pub(super) fn find(places: &[PathBuf], dataset: Dataset, val_fraction: Option<f64>) -> Result<Vec<Input>> {
    let val_fraction = share(dataset, val_fraction)?;
    let mut inputs = Vec::new();
    for place in places {
        match dataset {
            Dataset::Pg19 => {
                let expected =
                    "--dataset pg19 needs folders train and validation in it; use --dataset text for other text";
                let found = divided(place, dataset)?;
                inputs.extend(found.ok_or_else(|| Error::Layout { path: place.clone(), expected })?);
            }
            Dataset::ArxivMath => {
                for path in files(place, dataset)? {
                    let found = input(path, dataset, Division::Fixed(Set::Train))?;
                    let expected = "the name says neither train nor validation nor test; use --dataset redpajama for other records";
                    let unnamed = || Error::Layout { path: found.path.clone(), expected };
                    let division = Division::Fixed(set_of(&found.path, place).ok_or_else(unnamed)?);
                    inputs.push(Input { division, ..found });
                }
            }
            Dataset::RedPajama => {
                for path in files(place, dataset)? {
                    inputs.push(input(path, dataset, Division::Hashed(threshold(val_fraction)))?);
                }
            }
            Dataset::Text => match divided(place, dataset)? {
                Some(found) => inputs.extend(found),
                None => {
                    for path in files(place, dataset)? {
                        inputs.push(input(path, dataset, Division::Hashed(threshold(val_fraction)))?);
                    }
                }
            },
        }
    }
    if dataset == Dataset::Text {
        inputs = cut(inputs, val_fraction)?;
    }
    if inputs.is_empty() {
        return Err(Error::NoText { inputs: places.to_vec(), expected: dataset.files() });
    }
    Ok(inputs)
}

fn share(dataset: Dataset, val_fraction: Option<f64>) -> Result<f64> {
    let bad = |got: f64, expected| Error::Param { name: "val_fraction", got: got.to_string(), expected };
    match (val_fraction, dataset.default_val_fraction()) {
        (Some(got), None) => Err(bad(got, "none: this data set is divided already")),
        (Some(got), Some(_)) if !(0.0..1.0).contains(&got) => Err(bad(got, "at least 0 and below 1")),
        (given, default) => Ok(given.or(default).unwrap_or(0.0)),
    }
}

fn threshold(val_fraction: f64) -> u64 {
    // Exact for the shares that people write; the cast saturates.
    (val_fraction * 2f64.powi(64)) as u64
}

/// The inputs of a folder that holds `train/` and `validation/`; `None` for any other.
fn divided(place: &Path, dataset: Dataset) -> Result<Option<Vec<Input>>> {
    let folders = [("train", Set::Train), ("validation", Set::Validation), ("test", Set::Test)];
    if !folders[..2].iter().all(|(name, _)| place.join(name).is_dir()) {
        return Ok(None);
    }
    let mut inputs = Vec::new();
    for (name, set) in folders {
        let folder = place.join(name);
        if folder.is_dir() {
            for path in files(&folder, dataset)? {
                inputs.push(input(path, dataset, Division::Fixed(set))?);
            }
        }
    }
    Ok(Some(inputs))
}

/// The file `place`, or the files in and below the folder `place`, by name.
fn files(place: &Path, dataset: Dataset) -> Result<Vec<PathBuf>> {
    if !fs::metadata(place).map_err(Error::io(place))?.is_dir() {
        return Ok(vec![place.to_path_buf()]);
    }
    let entries = fs::read_dir(place).map_err(Error::io(place))?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<_>>().map_err(Error::io(place))?;
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && (path.is_dir() || dataset.wants(&path)) {
            found.extend(files(&path, dataset)?);
        }
    }
    Ok(found)
}

fn input(path: PathBuf, dataset: Dataset, division: Division) -> Result<Input> {
    let Kind { format, compression } = match Kind::of(&path) {
        Some(kind) if dataset.wants(&path) => kind,
        // Given by name, so it is meant.
        None if dataset == Dataset::Text => Kind { format: Format::Text, compression: Compression::None },
        _ => return Err(Error::Layout { path, expected: dataset.refusal() }),
    };
    let len = fs::metadata(&path).map_err(Error::io(&path))?.len();
    Ok(Input { path, format, compression, range: 0..len, division })
}

/// The set that a file's name speaks of, or else the nearest folder's below (and including) `place`; of a file that is itself
/// the place, its folder's.
fn set_of(path: &Path, place: &Path) -> Option<Set> {
    let top = if path == place { place.parent().unwrap_or(place) } else { place };
    let mut names = path.ancestors().take_while(|path| path.starts_with(top)).filter_map(Path::file_name);
    names.find_map(|name| {
        name.to_string_lossy().to_ascii_lowercase().split(|c: char| !c.is_ascii_alphanumeric()).find_map(|word| {
            // train2 is another of them.
            match word.trim_end_matches(|c: char| c.is_ascii_digit()) {
                "train" => Some(Set::Train),
                "validation" | "valid" | "val" | "dev" => Some(Set::Validation),
                "test" => Some(Set::Test),
                _ => None,
            }
        })
    })
}

/// Puts the last `val_fraction` of the plain text, by bytes, into the validation set; the rest into the training set.
fn cut(mut inputs: Vec<Input>, val_fraction: f64) -> Result<Vec<Input>> {
    let plain = |input: &Input| {
        input.format == Format::Text
            && input.compression == Compression::None
            && matches!(input.division, Division::Hashed(_))
    };
    let total: u64 = inputs.iter().filter(|input| plain(input)).map(Input::len).sum();
    let mut train = total - (total as f64 * val_fraction) as u64;
    let mut i = 0;
    while i < inputs.len() {
        if plain(&inputs[i]) {
            let len = inputs[i].len();
            let here = train.min(len);
            train -= here;
            let at = if here < len { cut_after(&inputs[i].path, here, len)? } else { len };
            if at > 0 && at < len {
                let rest = Input { range: at..len, division: Division::Fixed(Set::Validation), ..inputs[i].clone() };
                inputs[i].range.end = at;
                inputs.insert(i + 1, rest);
            }
            inputs[i].division = Division::Fixed(if at > 0 || len == 0 { Set::Train } else { Set::Validation });
            if here < len {
                // Whatever the cut took beyond its ideal place, all further text is for validation.
                train = 0;
            }
        }
        i += 1;
    }
    Ok(inputs)
}
