//! The stream of tokens that a model sees: a corpus with a landmark after every `mem_freq` tokens.
//!
//! The authors write a second copy of the corpus for each block size. Here the landmarks are virtual: with blocks of
//! `L = mem_freq + 1`, position `p` of the stream is a landmark exactly where `p % L == mem_freq`, and otherwise it is token
//! `p - p / L` of the corpus (there are `p / L` landmarks before it). The count runs over the whole corpus, not over
//! documents. Access is O(1) and takes no memory.
//!
//! At the [borders](crate::borders) of the text they are virtual too; a small index made when the corpus is opened gives access
//! to any place in microseconds.
//!
//! ```
//! use landmark_data::{Landmarks, Stream, Tokens};
//!
//! let stream = Stream::new(Tokens::Memory(vec![1, 2, 3, 4, 5]), Landmarks::Insert { id: 9, mem_freq: 2 }).unwrap();
//! let all: Vec<u32> = (0..stream.len()).filter_map(|p| stream.get(p)).collect();
//! assert_eq!(all, [1, 2, 9, 3, 4, 9, 5]);
//! ```

use std::sync::Arc;

use crate::borders::Index;
use crate::{BorderRule, Error, Result, TokenFile};

/// A corpus: a file, or ids in memory.
#[derive(Debug)]
pub enum Tokens {
    /// A memory-mapped file.
    File(TokenFile),
    /// Ids in memory.
    Memory(Vec<u32>),
}

impl Tokens {
    /// The number of tokens.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(file) => file.len(),
            Self::Memory(ids) => ids.len() as u64,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token at `index`. O(1).
    pub fn get(&self, index: u64) -> Option<u32> {
        match self {
            Self::File(file) => file.get(index),
            Self::Memory(ids) => ids.get(usize::try_from(index).ok()?).copied(),
        }
    }
}

impl From<TokenFile> for Tokens {
    fn from(file: TokenFile) -> Self {
        Self::File(file)
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(ids: Vec<u32>) -> Self {
        Self::Memory(ids)
    }
}

/// Where a stream's landmarks come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Landmarks {
    /// There are none: a plain corpus for a model without landmarks.
    None,
    /// They are inserted on the fly after every `mem_freq` tokens.
    Insert {
        /// The landmark's token id.
        id: u32,
        /// Ordinary tokens of a block; at least 1.
        mem_freq: u32,
    },
    /// They are inserted on the fly at the text's borders.
    AtBorders {
        /// The landmark's token id.
        id: u32,
        /// Where.
        rule: BorderRule,
    },
    /// The corpus has them already, as the files that the authors' code prepares for training.
    Present {
        /// The landmark's token id.
        id: u32,
    },
}

impl Landmarks {
    /// The landmark's token id, if there are landmarks.
    pub fn id(&self) -> Option<u32> {
        match *self {
            Self::None => None,
            Self::Insert { id, .. } | Self::AtBorders { id, .. } | Self::Present { id } => Some(id),
        }
    }
}

/// A corpus with its landmarks in place. Cheap to clone: clones share the corpus.
#[derive(Clone, Debug)]
pub struct Stream {
    tokens: Arc<Tokens>,
    landmarks: Landmarks,
    /// Where landmarks are at borders.
    index: Option<Arc<Index>>,
    len: u64,
}

impl Stream {
    /// The stream of `tokens` with `landmarks`. Takes constant time, but for landmarks at borders one pass over the tokens.
    pub fn new(tokens: impl Into<Tokens>, landmarks: Landmarks) -> Result<Self> {
        let tokens = tokens.into();
        let (index, inserted) = match &landmarks {
            Landmarks::Insert { mem_freq: 0, .. } => {
                return Err(Error::Param { name: "mem_freq", got: "0".into(), expected: "at least 1" });
            }
            Landmarks::Insert { mem_freq, .. } => (None, tokens.len() / u64::from(*mem_freq)),
            Landmarks::AtBorders { rule, .. } => {
                let index = Index::new(&tokens, rule);
                let inserted = index.landmarks();
                (Some(Arc::new(index)), inserted)
            }
            Landmarks::None | Landmarks::Present { .. } => (None, 0),
        };
        Ok(Self { len: tokens.len() + inserted, tokens: Arc::new(tokens), landmarks, index })
    }

    /// The number of positions, landmarks included.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no positions.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The landmarks of this stream.
    pub fn landmarks(&self) -> &Landmarks {
        &self.landmarks
    }

    /// The corpus without its landmarks.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// The id at position `p`.
    pub fn get(&self, p: u64) -> Option<u32> {
        let mut id = None;
        self.visit(p, |found| {
            id = Some(found);
            false
        });
        id
    }

    /// The `len` ids from position `start` on.
    pub fn read(&self, start: u64, len: usize) -> Result<Vec<u32>> {
        let end = start.saturating_add(len as u64);
        if end > self.len {
            return Err(Error::OutOfRange { start, end, len: self.len });
        }
        let mut ids = Vec::with_capacity(len);
        self.read_into(&mut ids, start, len);
        Ok(ids)
    }

    /// Replaces `ids` by the ids from position `start` on, `len` or as many as there are.
    pub(crate) fn read_into(&self, ids: &mut Vec<u32>, start: u64, len: usize) {
        ids.clear();
        if len > 0 {
            self.visit(start, |id| {
                ids.push(id);
                ids.len() < len
            });
        }
    }

    /// Calls `visit` with the ids from position `start` on while it returns true.
    fn visit(&self, start: u64, mut visit: impl FnMut(u32) -> bool) {
        match (&self.landmarks, &self.index) {
            (&Landmarks::Insert { id, mem_freq }, _) => {
                let block = u64::from(mem_freq) + 1;
                let (mut token, mut place) = (start - start / block, start % block);
                for _ in start..self.len {
                    let next = if place == block - 1 { Some(id) } else { self.tokens.get(token) };
                    if !next.is_some_and(&mut visit) {
                        return;
                    }
                    if place == block - 1 {
                        place = 0;
                    } else {
                        (token, place) = (token + 1, place + 1);
                    }
                }
            }
            (Landmarks::AtBorders { id, rule }, Some(index)) => {
                index.visit(&self.tokens, rule, start, |token| visit(token.unwrap_or(*id)));
            }
            _ => {
                for token in start..self.len {
                    if !self.tokens.get(token).is_some_and(&mut visit) {
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The authors' `apply_add_mem_tokens`, line by line.
    fn add_mem_tokens(mem_id: u32, tokens: &[u32], freq: usize) -> Vec<u32> {
        let mut tokens_with_mem = Vec::new();
        for (t_idx, &t) in tokens.iter().enumerate() {
            tokens_with_mem.push(t);
            if t_idx % freq == freq - 1 {
                tokens_with_mem.push(mem_id);
            }
        }
        tokens_with_mem
    }

    proptest! {
        #[test]
        fn is_the_authors_copy_of_the_corpus(tokens in prop::collection::vec(0u32..50, 0..300), freq in 1u32..70) {
            let expected = add_mem_tokens(1000, &tokens, freq as usize);
            let stream = Stream::new(tokens, Landmarks::Insert { id: 1000, mem_freq: freq }).unwrap();
            prop_assert_eq!(stream.len(), expected.len() as u64);
            prop_assert_eq!(&stream.read(0, expected.len()).unwrap(), &expected);
            for (p, &id) in expected.iter().enumerate() {
                prop_assert_eq!(stream.get(p as u64), Some(id));
                prop_assert_eq!(id == 1000, p as u32 % (freq + 1) == freq);
            }
            prop_assert_eq!(stream.get(stream.len()), None);
        }
    }

    #[test]
    fn without_landmarks_it_is_the_corpus() {
        for landmarks in [Landmarks::None, Landmarks::Present { id: 2 }] {
            let stream = Stream::new(vec![1, 2, 3], landmarks).unwrap();
            assert_eq!(stream.read(0, 3).unwrap(), [1, 2, 3]);
            assert!(stream.read(3, 0).unwrap().is_empty());
        }
    }

    #[test]
    fn bad_arguments_are_errors() {
        let empty_blocks = Stream::new(vec![1], Landmarks::Insert { id: 9, mem_freq: 0 });
        assert!(matches!(empty_blocks, Err(Error::Param { name: "mem_freq", .. })));
        let stream = Stream::new(vec![1, 2, 3], Landmarks::Insert { id: 9, mem_freq: 3 }).unwrap();
        assert!(matches!(stream.read(2, 3), Err(Error::OutOfRange { start: 2, end: 5, len: 4 })));
        assert!(matches!(stream.read(u64::MAX, 2), Err(Error::OutOfRange { .. })));
    }
}
