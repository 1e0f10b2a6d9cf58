//! The reference GPT: pre-norm layers, GELU, rotary positions, one table for embedding and head. By configuration also with RMSNorm,
//! SwiGLU and normalised queries and keys.

mod attention;
mod config;
mod load;
mod model;
mod negatives;
mod parameters;

pub use attention::WindowAttention;
pub use config::{GptConfig, MlpKind, Norm, Placement, PositionalEncoder, SoftmaxFunc, Variant};
pub use model::Gpt;
pub(crate) use negatives::Distances;
pub use negatives::NegativeRows;
