//! The data folder: a prepared corpus, ready to train on.
//!
//! | file | what |
//! | --- | --- |
//! | `train.tokens` | the [token file](crate::token_file) to train on |
//! | `validation.tokens` | the one to evaluate on; empty where none was asked for |
//! | `test.tokens` | the one to test on; only of data sets that have such a part |
//! | `tokenizer.json` | the tokenizer that made them |
//!
//! A folder of the authors' raw files is read too: `train.bin`, and `validation.bin` or `val.bin`, and perhaps `test.bin`. It
//! may lack the tokenizer. Where a name exists in both forms, `.tokens` wins.

use std::path::{Path, PathBuf};

use crate::{Error, Result, TokenFile, Tokenizer};

/// The name of the token file to train on.
pub const TRAIN_FILE: &str = "train.tokens";
/// The name of the token file to evaluate on.
pub const VALIDATION_FILE: &str = "validation.tokens";
/// The name of the token file to test on.
pub const TEST_FILE: &str = "test.tokens";
/// The name of the tokenizer's file.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

const TRAIN_NAMES: &[&str] = &[TRAIN_FILE, "train.bin"];
const VALIDATION_NAMES: &[&str] = &[VALIDATION_FILE, "validation.bin", "val.bin"];
const TEST_NAMES: &[&str] = &[TEST_FILE, "test.bin"];

/// A prepared corpus.
#[derive(Debug)]
pub struct DataFolder {
    /// The tokens to train on.
    pub train: TokenFile,
    /// The tokens to evaluate on.
    pub validation: TokenFile,
    /// The tokens to test on, where the data set has such a part.
    pub test: Option<TokenFile>,
    /// The tokenizer that made them; a folder of raw files may lack it.
    pub tokenizer: Option<Tokenizer>,
}

impl DataFolder {
    /// Opens the folder `dir`. Token files that another tokenizer made than the one beside them are refused.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let train = open_first(dir, TRAIN_NAMES)?;
        let validation = open_first(dir, VALIDATION_NAMES)?;
        let test = first(dir, TEST_NAMES).map(TokenFile::open_by_extension).transpose()?;
        let path = dir.join(TOKENIZER_FILE);
        let raw =
            [Some(&train), Some(&validation), test.as_ref()].into_iter().flatten().all(|file| file.info().is_none());
        let tokenizer = if raw && !path.exists() { None } else { Some(Tokenizer::from_file(path)?) };
        if let Some(tokenizer) = &tokenizer {
            train.check_tokenizer(tokenizer)?;
            validation.check_tokenizer(tokenizer)?;
            test.iter().try_for_each(|test| test.check_tokenizer(tokenizer))?;
        }
        Ok(Self { train, validation, test, tokenizer })
    }
}

fn first(dir: &Path, names: &[&str]) -> Option<PathBuf> {
    names.iter().map(|name| dir.join(name)).find(|path| path.exists())
}

fn open_first(dir: &Path, names: &'static [&'static str]) -> Result<TokenFile> {
    let missing = || Error::MissingFile { path: dir.to_path_buf(), expected: names };
    TokenFile::open_by_extension(first(dir, names).ok_or_else(missing)?)
}
