//! The reference GPT: pre-norm layers, GELU, rotary positions, one table for embedding and head.

mod attention;
mod config;
mod load;
mod model;
mod parameters;

pub use attention::WindowAttention;
pub use config::{GptConfig, Placement, PositionalEncoder, SoftmaxFunc, Variant};
pub use model::Gpt;
