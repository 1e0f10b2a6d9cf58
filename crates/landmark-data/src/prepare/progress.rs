//! What a preparation says about itself.

use serde::{Deserialize, Serialize};

use super::layout::Set;
use crate::Error;

/// How far a preparation is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of the files that are done. Of compressed ones, as they lie on the disk.
    pub bytes_done: u64,
    /// Bytes of the files that there are.
    pub bytes_total: u64,
    /// Bytes of text that are encoded.
    pub text_bytes: u64,
    /// Documents that are encoded.
    pub documents: u64,
    /// Tokens to train on so far.
    pub train_tokens: u64,
    /// Tokens to evaluate on so far.
    pub validation_tokens: u64,
    /// Tokens to test on so far; `None` where the data set has none.
    pub test_tokens: Option<u64>,
    /// Records that belong to another part of the data set.
    pub other_records: u64,
    /// Bad input that was left out.
    pub skipped: Skipped,
}

/// How much bad input was left out, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Documents and records that are not UTF-8.
    pub invalid_utf8: u64,
    /// Lines (or rows) that are no records.
    pub bad_records: u64,
    /// Records without text.
    pub missing_fields: u64,
    /// Compressed files that end early or are damaged, from there on.
    pub archives: u64,
    /// Files with nothing in them.
    pub empty_files: u64,
}

/// Something that happens in a preparation.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Text is read to train a tokenizer on.
    Reading {
        /// Bytes of the files that are done.
        bytes_done: u64,
        /// Bytes of the files that there are.
        bytes_total: u64,
    },
    /// The tokenizer is computed from what was read.
    Training,
    /// Text is encoded.
    Encoding(&'a Progress),
    /// Bad input is left out.
    Skipped(&'a Error),
}

impl Progress {
    pub(super) fn set_tokens(&mut self, set: Set, tokens: u64) {
        match set {
            Set::Train => self.train_tokens = tokens,
            Set::Validation => self.validation_tokens = tokens,
            Set::Test => self.test_tokens = Some(tokens),
        }
    }
}

impl Skipped {
    /// All of it.
    pub fn total(&self) -> u64 {
        let Self { invalid_utf8, bad_records, missing_fields, archives, empty_files } = self;
        invalid_utf8 + bad_records + missing_fields + archives + empty_files
    }

    pub(super) fn count(&mut self, error: &Error) {
        if let Some(count) = self.of(error) {
            *count += 1;
        }
    }

    /// Where an error is counted that is about the input; `None` for any other.
    fn of(&mut self, error: &Error) -> Option<&mut u64> {
        match error {
            Error::InvalidUtf8 { .. } => Some(&mut self.invalid_utf8),
            Error::BadRecord { .. } => Some(&mut self.bad_records),
            Error::MissingField { .. } => Some(&mut self.missing_fields),
            Error::Archive { .. } => Some(&mut self.archives),
            Error::EmptyFile { .. } => Some(&mut self.empty_files),
            _ => None,
        }
    }
}

/// Whether an error is about the input, so that it can be left out.
pub(super) fn is_bad_input(error: &Error) -> bool {
    Skipped::default().of(error).is_some()
}
