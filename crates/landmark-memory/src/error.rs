//! The errors of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong with a cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is outside its range.
    #[error("landmark cache: {name} is {got}, expected {expected}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: String,
    },
    /// A chunk does not fit the cache.
    #[error("landmark cache: a chunk of shape {got:?}, expected {expected}")]
    Chunk {
        /// The chunk's shape.
        got: Vec<usize>,
        /// What it should have been.
        expected: String,
    },
    /// Landmarks do not cut a chunk into blocks that the cache can hold.
    #[error("landmark cache: {got}, expected {expected}")]
    Landmarks {
        /// What is wrong.
        got: String,
        /// What it should have been.
        expected: String,
    },
    /// A model did not ask for the attention of each layer once, in order.
    #[error("landmark cache: the model asked for attention of layer {got}, expected layer {expected} of {layers}")]
    Layer {
        /// The layer it asked for, or the number of layers where it stopped.
        got: usize,
        /// The layer that was due.
        expected: usize,
        /// Layers that the cache was made for.
        layers: usize,
    },
    /// A pool cannot be set up on the device that computes.
    #[error("a pool of {bytes} bytes for blocks (--gpu_memory) cannot be set up: {source}")]
    Pool {
        /// Its size.
        bytes: usize,
        /// Why not.
        source: landmark_attention::Error,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A disk, or what a session may take of it, is full.
    #[error("{}: no room: {reason}; the session is as it was before", path.display())]
    Full {
        /// The file that was written.
        path: PathBuf,
        /// What the limit is.
        reason: String,
    },
    /// A file of a session does not hold what it should.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A session cannot be opened for what is asked of it.
    #[error("{}: {reason}", path.display())]
    Session {
        /// The session's folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// An error of the attention's.
    #[error(transparent)]
    Attention(#[from] landmark_attention::Error),
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Of a file that is read or written.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded | std::io::ErrorKind::FileTooLarge => {
                Self::Full { path: path.to_path_buf(), reason: source.to_string() }
            }
            _ => Self::Io { action, path: path.to_path_buf(), source },
        }
    }

    /// Of a file that does not hold what it should.
    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), what: what.into() }
    }
}

/// The result of a call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            Error::Attention(error) => error.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}
