//! The errors of this crate.

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
    /// An error of the attention's.
    #[error(transparent)]
    Attention(#[from] landmark_attention::Error),
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
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
