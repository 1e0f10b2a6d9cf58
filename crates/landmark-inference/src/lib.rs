//! Reading with a model: a text of any length goes into a cache, and the model goes on with it.
//!
//! - [`Reader`] puts a model, its tokenizer and a [`Memory`] of what was read together; [`open_session`] does so with a text that is kept on disk;
//! - [`Sampler`] draws tokens, [`Template`] writes a conversation as the model was trained on it;
//! - [`ModelFlags`], [`CacheFlags`], [`SamplingFlags`] and [`SessionFlags`] are what can be chosen. They are flags of a command line (clap) and
//!   plain structs at once, so that whatever reads is told the same by the same names.

mod device;
mod flags;
mod hash;
pub mod machine;
mod memory;
mod reader;
mod sampling;
mod session;
mod setting;
mod template;
mod values;

pub use device::DeviceChoice;
pub use flags::{CacheFlags, DeviceFlags, Dtype, LmCache, ModelFlags, SelectionMethod};
pub use hash::{hash_of_model, hex};
pub use memory::{Memory, fitting};
pub use reader::{
    Mark, Opened, Reader, adapted, check_vocabulary, checkpoint, drawable, load, model_path, pretrained, tokenizer,
};
pub use sampling::{Sampler, SamplingFlags};
pub use session::{About, Room, SessionFlags, open_session};
pub use setting::{Reading, Setting};
pub use template::{Message, Role, Template};
pub use values::{NoneOr, bytes, none_or};
