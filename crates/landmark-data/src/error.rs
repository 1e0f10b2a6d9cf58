//! The errors of this crate.

use std::path::{Path, PathBuf};

use crate::Fingerprint;

/// What can go wrong between a text file and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A text file holds bytes that are not UTF-8.
    #[error("{}: line {line} is not valid UTF-8 (byte {offset} of the file)", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The line of the first bad byte, counted from 1.
        line: u64,
        /// The place of the first bad byte, counted from 0.
        offset: u64,
    },
    /// The inputs of a preparation hold no text.
    #[error("no text in {inputs:?}: expected {expected}, or folders that hold some")]
    NoText {
        /// What was given.
        inputs: Vec<PathBuf>,
        /// The files that are read.
        expected: &'static str,
    },
    /// An input has nothing in it.
    #[error("{}: the file is empty (line 1)", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// An input is not laid out as its data set is.
    #[error("{}: {expected}", path.display())]
    Layout {
        /// The file or folder.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// A line is not the JSON object that a record is.
    #[error("{}: line {line} is no record: {message}", path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong with it.
        message: String,
    },
    /// A record lacks its text.
    #[error("{}: line {line} has no text in the field {field:?}", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The line (in a table, the row), counted from 1.
        line: u64,
        /// The field.
        field: String,
    },
    /// A compressed file ends early or is damaged.
    #[error("{}: damaged or cut short after line {line}: {source}", path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// The last line (in a table, the last row) that is whole; 0 where there is none.
        line: u64,
        /// What the decoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The caller asked a preparation to stop; the same one goes on from there.
    #[error("stopped; the same preparation goes on from here")]
    Interrupted,
    /// Another process prepares into the same folder.
    #[error("{}: another process is preparing into this folder", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },

    /// A `tokenizer.json` could not be read as one.
    #[error("{}: not a usable tokenizer.json: {source}", path.display())]
    TokenizerFile {
        /// The file, or `<memory>`.
        path: PathBuf,
        /// What the tokenizer library said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The tokenizer failed on a text or on token ids.
    #[error("tokenizer: {operation} failed: {source}")]
    Tokenizer {
        /// `encode` or `decode`.
        operation: &'static str,
        /// What the tokenizer library said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A token id lies outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The number of ids there are.
        vocab_size: u32,
    },

    /// The file does not start with the magic bytes of a token file.
    #[error("{}: not a token file: it starts with {got:02x?}", path.display())]
    BadMagic {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        got: [u8; 8],
    },
    /// The token file has a layout that this version does not know.
    #[error("{}: token file version {got}, expected {expected}", path.display())]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The version it claims.
        got: u32,
        /// The version that is read here.
        expected: u32,
    },
    /// The header's checksum does not match its bytes.
    #[error("{}: damaged header: checksum {got:08x}, expected {expected:08x}", path.display())]
    HeaderChecksum {
        /// The file.
        path: PathBuf,
        /// The checksum of the bytes.
        got: u32,
        /// The checksum that the header states.
        expected: u32,
    },
    /// A header field has a value that no token file can have.
    #[error("{}: header field {field} is {got}, expected {expected}", path.display())]
    HeaderField {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// What is possible.
        expected: &'static str,
    },
    /// The file's length is not what its header implies (or, for a raw file, not a whole number of tokens).
    #[error("{}: {got} bytes, expected {expected}", path.display())]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// The length it has.
        got: u64,
        /// The length it should have.
        expected: u64,
    },
    /// The body's checksum does not match its bytes.
    #[error("{}: damaged contents: checksum {got:08x}, expected {expected:08x}", path.display())]
    BodyChecksum {
        /// The file.
        path: PathBuf,
        /// The checksum of the bytes.
        got: u32,
        /// The checksum that the header states.
        expected: u32,
    },
    /// The document borders do not rise to the number of tokens.
    #[error("{}: document {document} ends at token {got}, which is out of order", path.display())]
    DocumentBorder {
        /// The file.
        path: PathBuf,
        /// The document, counted from 0.
        document: u64,
        /// Its border.
        got: u64,
    },
    /// A folder holds none of the files that were looked for.
    #[error("{}: none of {expected:?} is there", path.display())]
    MissingFile {
        /// The folder.
        path: PathBuf,
        /// The names that would do.
        expected: &'static [&'static str],
    },
    /// A token file was written with another tokenizer than the one at hand.
    #[error("{}: written with tokenizer {got}, but the one at hand is {expected}", path.display())]
    OtherTokenizer {
        /// The token file.
        path: PathBuf,
        /// The fingerprint it was written with.
        got: Fingerprint,
        /// The fingerprint at hand.
        expected: Fingerprint,
    },

    /// The corpus is too short for even one window.
    #[error("the corpus has {got} tokens (landmarks included), a window needs {expected}")]
    TooShort {
        /// The stream's length.
        got: u64,
        /// The least that is needed.
        expected: u64,
    },
    /// A window is too short for an exercise.
    #[error("a window has {got} tokens, an exercise needs up to {expected}")]
    ShortWindow {
        /// The tokens of a window, and the one after it.
        got: usize,
        /// The least that is needed.
        expected: usize,
    },
    /// A range reaches past the end of a stream.
    #[error("tokens {start}..{end} of a stream of {len}")]
    OutOfRange {
        /// First position asked for.
        start: u64,
        /// One past the last position asked for.
        end: u64,
        /// The stream's length.
        len: u64,
    },
    /// An argument is outside its range.
    #[error("{name} is {got}, expected {expected}")]
    Param {
        /// The argument.
        name: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: &'static str,
    },
}

impl Error {
    /// For `map_err`: ties what the operating system said to the path it said it about.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }
}
