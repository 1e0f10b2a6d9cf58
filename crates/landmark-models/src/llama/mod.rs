//! The LLaMA family: LLaMA 1 to 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3, dense or quantized, with landmarks or without.
//!
//! One model: RMSNorm, rotary positions on halves, grouped-query heads, SwiGLU. What tells the families apart (biases, norms of queries and
//! keys, tied heads, how positions are stretched) is in [`LlamaConfig`], read from a Hugging Face `config.json`.

mod config;
mod gguf;
mod load;
mod lora;
mod matrix;
mod model;
mod parameters;
mod rope;

pub use config::{Architecture, LandmarkConfig, LlamaConfig};
pub use gguf::Gguf;
pub use load::weight_files;
pub use lora::{ADAPTER_FILES, LORA_MODULES, LoraConfig, copy_adapter};
pub use matrix::Matrix;
pub use model::Llama;
pub use rope::RopeScaling;
