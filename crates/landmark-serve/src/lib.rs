//! A landmark model behind OpenAI's HTTP interface. Prompts of any length go into the landmark cache, or are refused by a limit that is told; sessions are texts that
//! stay read, on disk.
//!
//! ```text
//! http ─► request ─► engine: one thread has the model
//!   ▲                  ├─ generation: a prompt is read, a chunk a step; text is written, a token a step
//!   │                  ├─ append: a text goes into a session, a chunk a step
//!   └──── reply ◄──────┴─ kept: prompts that were read; sessions: on disk
//! ```
//!
//! The thread takes steps of all requests that are worked on in turn. What happens to a request comes back as events, which `reply` writes as
//! one JSON object or as a stream.

mod documents;
mod engine;
mod error;
mod fields;
mod http;
mod keys;
mod logprobs;
mod metrics;
mod reply;
mod request;
mod server;
mod settings;
mod stop;

pub use documents::convert;
pub use error::{ApiError, Error};
pub use keys::{Keys, Owner};
pub use server::{routes, serve};
pub use settings::{Limits, Settings};
