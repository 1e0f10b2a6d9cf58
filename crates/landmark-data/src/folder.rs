//! The data folder: a prepared corpus, ready to train on.
//!
//! | file | what |
//! | --- | --- |
//! | `train.tokens` | the [token file](crate::token_file) to train on |
//! | `validation.tokens` | the one to evaluate on; empty where none was asked for |
//! | `tokenizer.json` | the tokenizer that made both |
//!
//! A folder of the authors' raw files is read too: `train.bin`, and `validation.bin` or `val.bin`. It may lack the tokenizer.
//! Where a name exists in both forms, `.tokens` wins.

use std::path::Path;

use crate::{Error, Result, TokenFile, Tokenizer};

/// The name of the token file to train on.
pub const TRAIN_FILE: &str = "train.tokens";
/// The name of the token file to evaluate on.
pub const VALIDATION_FILE: &str = "validation.tokens";
/// The name of the tokenizer's file.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

const TRAIN_NAMES: &[&str] = &[TRAIN_FILE, "train.bin"];
const VALIDATION_NAMES: &[&str] = &[VALIDATION_FILE, "validation.bin", "val.bin"];

/// A prepared corpus.
#[derive(Debug)]
pub struct DataFolder {
    /// The tokens to train on.
    pub train: TokenFile,
    /// The tokens to evaluate on.
    pub validation: TokenFile,
    /// The tokenizer that made them; a folder of raw files may lack it.
    pub tokenizer: Option<Tokenizer>,
}

impl DataFolder {
    /// Opens the folder `dir`. Token files that another tokenizer made than the one beside them are refused.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let train = open_first(dir, TRAIN_NAMES)?;
        let validation = open_first(dir, VALIDATION_NAMES)?;
        let path = dir.join(TOKENIZER_FILE);
        let raw = train.info().is_none() && validation.info().is_none();
        let tokenizer = if raw && !path.exists() { None } else { Some(Tokenizer::from_file(path)?) };
        if let Some(tokenizer) = &tokenizer {
            train.check_tokenizer(tokenizer)?;
            validation.check_tokenizer(tokenizer)?;
        }
        Ok(Self { train, validation, tokenizer })
    }
}

fn open_first(dir: &Path, names: &'static [&'static str]) -> Result<TokenFile> {
    match names.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        Some(path) => TokenFile::open_by_extension(path),
        None => Err(Error::MissingFile { path: dir.to_path_buf(), expected: names }),
    }
}
