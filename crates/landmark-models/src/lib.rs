//! Transformers that attend through landmarks.
//!
//! [`gpt`] is the reference GPT of Mohtashami and Jaggi (2023): its configuration, the model, its attention inside the
//! window, and its files. [`llama`] is the LLaMA family, from Hugging Face's folders and from GGUF files. [`ops`] are the fused operations
//! that they are made of, each with its gradient.
//!
//! A model asks for attention through [`landmark_attention::Attend`] and knows no implementation of it: the same layers
//! train inside a window and read a text of any length through a cache.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use landmark_models::gpt::{Gpt, GptConfig, WindowAttention};
//!
//! # fn main() -> landmark_models::Result<()> {
//! let config = GptConfig { vocab_size: 96, landmark_id: 90, n_embd: 32, n_head: 2, n_layer: 2, ..GptConfig::default() };
//! let model = Gpt::init(&config, 0, DType::F32, &Device::Cpu)?;
//! let ids = Tensor::new(&[[1u32, 2, 3, 90, 4, 5]], &Device::Cpu)?;
//! let targets = Tensor::new(&[[2u32, 3, 4, landmark_models::IGNORE, 5, 6]], &Device::Cpu)?;
//! let mut attention = WindowAttention::new(&config, &ids, None)?;
//! let hidden = model.hidden(&ids, &mut attention, None)?;
//! let gradients = model.loss(&hidden, &targets, None)?.backward()?;
//! assert!(model.parameters().values().all(|p| gradients.get(p).is_some()));
//! # Ok(())
//! # }
//! ```

mod error;
mod files;
pub mod gpt;
pub mod hub;
pub mod llama;
mod model;
pub mod ops;

pub use error::{Error, Result};
pub use model::{Attention, Model, Outline};
pub use ops::IGNORE;
