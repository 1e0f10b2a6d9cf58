//! The errors of this crate.

use std::path::PathBuf;

use candle_core::DType;

/// What can go wrong with a model or one of its operations.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a model's configuration is outside its range, or contradicts another.
    #[error("config: {field} is {got}, expected {expected}")]
    Config {
        /// The field's name.
        field: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: String,
    },
    /// An argument has a shape that the operation does not take.
    #[error("{op}: {tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// The operation that was called.
        op: &'static str,
        /// The name of the offending argument.
        tensor: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What it should have been.
        expected: String,
    },
    /// An argument has an element type that the operation does not take.
    #[error("{op}: {tensor} has dtype {got:?}, expected {expected}")]
    DType {
        /// The operation that was called.
        op: &'static str,
        /// The name of the offending argument.
        tensor: &'static str,
        /// Its element type.
        got: DType,
        /// What it should have been.
        expected: String,
    },
    /// An argument is not on the CPU, where the fused operations run.
    #[error("{op}: {tensor} is on {got}, expected the CPU")]
    Device {
        /// The operation that was called.
        op: &'static str,
        /// The name of the offending argument.
        tensor: &'static str,
        /// Where it is.
        got: String,
    },
    /// An argument holds a value outside its range.
    #[error("{op}: {name} is {got}, expected {expected}")]
    Value {
        /// The operation that was called.
        op: &'static str,
        /// The argument's name.
        name: &'static str,
        /// The offending value.
        got: String,
        /// The range.
        expected: String,
    },
    /// A set of weights lacks a parameter that the configuration asks for.
    #[error("weights: {name} is missing")]
    MissingTensor {
        /// The parameter's name.
        name: String,
    },
    /// A set of weights has a tensor that the model has no parameter for.
    #[error("weights: {name} is no parameter of this model")]
    UnknownTensor {
        /// The tensor's name.
        name: String,
    },
    /// A tensor among the weights does not have the shape or element type of its parameter.
    #[error("weights: {name} is {got}, expected {expected}")]
    WrongTensor {
        /// The tensor's name.
        name: String,
        /// What it is.
        got: String,
        /// What the parameter is.
        expected: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A `config.json` is not one: no JSON, an unknown or missing field, or a value of another type.
    #[error("{path}: {source}")]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A folder or a file does not hold a model that can be read.
    #[error("{path}: {reason}")]
    NoModel {
        /// The folder or the file.
        path: PathBuf,
        /// What is missing or wrong, and what to do.
        reason: String,
    },
    /// A text that should be JSON is none.
    #[error("{what}: {source}")]
    Json {
        /// What the text is.
        what: &'static str,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A weights file is not readable safetensors: corrupt, or cut short.
    #[error("{path}: {source}")]
    WeightsFile {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: candle_core::Error,
    },
    /// An error of the attention operation.
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
