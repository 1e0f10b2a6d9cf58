//! Training of landmark attention models.
//!
//! [`train()`] runs the loop: batches by number, gradient accumulation, [`Schedule`], [`Optimizer`], evaluation, metrics,
//! and checkpoints from which a run goes on bit for bit, whenever and however it was stopped. It shows nothing itself: it
//! tells an observer what happens.
//!
//! Everything random is a function of the seed and the number of the iteration, and every sum is made in an order that
//! threads do not change. So the same seed on the same device makes the same weights, and the state of a run is its
//! weights, the optimizer's moments and one number.
//!
//! ```
//! use candle_core::Device;
//! use landmark_data::Tokenizer;
//! use landmark_models::gpt::GptConfig;
//! use landmark_train::{Corpus, Event, Limits, Outcome, Settings, train};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tokenizer = Tokenizer::bytes();
//! let tokens = tokenizer.encode(&"It was a dark and stormy night; the rain fell in torrents. ".repeat(40))?;
//! let corpus = Corpus { train: tokens.clone().into(), validation: tokens.into(), tokenizer: Some(tokenizer) };
//! let vocabulary = corpus.vocabulary(None)?;
//! let model = GptConfig {
//!     vocab_size: vocabulary.size,
//!     landmark_id: vocabulary.landmark_id,
//!     n_embd: 32,
//!     n_head: 2,
//!     n_layer: 1,
//!     sequence_length: 34,
//!     mem_freq: Some(16),
//!     ..GptConfig::default()
//! };
//! let settings = Settings { batch_size: 4, acc_steps: 1, iterations: 20, lr: 1e-2, ..Settings::of(model) };
//! let data = corpus.batches(&settings)?;
//! let mut losses = Vec::new();
//! let outcome = train(&settings, &data, &Device::Cpu, &Limits::default(), &mut |event| {
//!     if let Event::Step(_, step, _) = event {
//!         losses.push(step.loss);
//!     }
//! })?;
//! assert!(matches!(outcome, Outcome::Finished { .. }));
//! assert!(losses[19] < losses[0]);
//! # Ok(())
//! # }
//! ```

mod adafactor;
pub mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod data;
mod error;
mod experiment;
mod files;
mod gpt;
mod logs;
mod model;
mod optimizer;
mod process;
mod run;
mod schedule;
mod settings;
mod trainer;
mod tuning;
mod update;

pub use data::{Corpus, Data, Vocabulary, border_rule};
pub use error::{Error, Result};
pub use experiment::{History, is_finished};
pub use logs::Wandb;
pub use model::{Model, Read, Recipe, Rows, Training};
pub use optimizer::{Gradients, Method, Optimizer};
pub use process::Process;
pub use run::{Event, Limits, Outcome, Resume, Sample, Writing, train};
pub use schedule::{Anneal, Decay, Schedule};
pub use settings::{Precision, Settings};
pub use trainer::{Evaluation, Step, Trainer, evaluate};
pub use tuning::{Tuned, Tuning};
