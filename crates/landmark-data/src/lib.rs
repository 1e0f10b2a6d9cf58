//! From text to training batches.
//!
//! The path of a corpus through this crate:
//!
//! ```text
//! text --prepare--> train.tokens, validation.tokens, test.tokens, tokenizer.json    (a data folder, written once)
//! data folder --DataFolder::open--> TokenFile    (memory-mapped; a corpus may be larger than memory)
//! TokenFile --Stream--> the same tokens with landmarks at their places        (virtual; nothing is copied)
//! Stream --Batches--> Batch { inputs, targets }  (a pure function of seed and index)
//! ```
//!
//! Two choices shape it. Landmarks are *not* stored: a [`Stream`] inserts them on the fly, so that one data folder serves
//! every block size, and blocks that follow the text's own [`borders`]. And a batch is a *pure function* of `(seed, index)`,
//! so that a training run resumes with the very batches that it would have seen, from two integers.
//!
//! What is absent, on purpose: tensors and devices (a [`Batch`] is plain vectors), models, and the network.
//!
//! # Example
//! ```
//! use landmark_data::{Batches, Landmarks, Stream, Tokenizer, Tokens};
//!
//! # fn main() -> Result<(), landmark_data::Error> {
//! let tokenizer = Tokenizer::bytes();
//! let corpus = Tokens::Memory(tokenizer.encode(&"It was a dark and stormy night. ".repeat(20))?);
//! let stream = Stream::new(corpus, Landmarks::Insert { id: 257, mem_freq: 7 })?;
//! assert_eq!(stream.get(7), Some(257));
//!
//! let batches = Batches::new(stream, 4, 32, tokenizer.end_of_text())?;
//! assert_eq!(batches.batch(1, 0), batches.batch(1, 0));
//! assert_ne!(batches.batch(1, 0), batches.batch(1, 1));
//! # Ok(())
//! # }
//! ```

pub mod batches;
pub mod borders;
mod error;
pub mod exercise;
pub mod folder;
mod output;
pub mod prepare;
pub mod pretrained;
pub mod stream;
pub mod token_file;
pub mod tokenizer;

pub use batches::{Batch, Batches, IGNORE};
pub use borders::{Border, BorderRule, Placer};
pub use error::Error;
pub use exercise::{ExerciseOptions, Exercises};
pub use folder::{DataFolder, TEST_FILE, TOKENIZER_FILE, TRAIN_FILE, VALIDATION_FILE};
pub use pretrained::{Pretrained, Sampling};
pub use stream::{Landmarks, Stream, Tokens};
pub use token_file::{TokenFile, TokenFileInfo, TokenWriter};
pub use tokenizer::{BpeTraining, Decoder, Fingerprint, Tokenizer};

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;
