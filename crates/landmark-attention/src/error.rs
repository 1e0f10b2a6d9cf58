//! The errors of this crate.

use candle_core::{DType, DeviceLocation};

/// What can be wrong with a call of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor has a shape that the operation does not take.
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
    /// A tensor has an element type that the operation does not take.
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
    /// A tensor lies on a device that has no kernel for the operation, or not where the others lie.
    #[error("{op}: {tensor} is on {got:?}, expected {expected}")]
    Device {
        /// The operation that was called.
        op: &'static str,
        /// The name of the offending argument.
        tensor: &'static str,
        /// Where it is.
        got: DeviceLocation,
        /// Where it should have been.
        expected: String,
    },
    /// A parameter is outside its range.
    #[error("{op}: {name} is {got}, expected {expected}")]
    Param {
        /// The operation that was called.
        op: &'static str,
        /// The parameter's name.
        name: &'static str,
        /// Its value.
        got: String,
        /// Its range.
        expected: &'static str,
    },
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
            other => candle_core::Error::wrap(other),
        }
    }
}
