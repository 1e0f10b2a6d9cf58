//! The landmark cache: a text of any length is read in chunks, its finished blocks are kept, and every token of a later chunk
//! fetches the few blocks whose landmarks score best (paper, section 3.2).
//!
//! - [`LandmarkCache`] drives a model over a text: landmarks in, attention over retrieved blocks, landmark logits out;
//! - [`forward_together`] does so for several texts in one pass of the model;
//! - [`XlCache`] is the Transformer-XL baseline, a cache of the last tokens' keys and values.
//!
//! Both hand themselves to the model as [`landmark_attention::Attend`]; they know nothing of models or tokenizers. A [`session`] is a landmark cache in
//! a folder: its blocks are on disk, and in RAM while they are used.

mod cache;
mod codec;
mod config;
mod distances;
mod error;
mod frames;
mod index;
mod indexed;
mod landmarks;
mod layout;
mod paged;
mod pooled;
mod reads;
mod ring;
mod segments;
pub mod session;
mod store;
mod together;
mod xl;

pub use cache::{LandmarkCache, Mark, Retrievals};
pub use codec::BlockType;
pub use config::{CacheConfig, ContextMiss};
pub use error::{Error, Result};
pub use landmark_attention::retrieval::Selection;
pub use paged::{Recall, Scoring, Tiers};
pub use pooled::PoolTier;
pub use reads::BlockRead;
pub use together::{Next, forward_together};
pub use xl::XlCache;
