//! The landmarks of a layer and the index of them, which is brought up to date while the reader does something else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use landmark_attention::retrieval::Keys;

use crate::index::Index;
use crate::landmarks::Landmarks;

/// Landmarks, and an index that has all of them when it is asked.
#[derive(Debug)]
pub struct Indexed {
    landmarks: RwLock<Landmarks>,
    index: Mutex<Index>,
}

impl Indexed {
    /// Both are empty.
    pub fn new(index: Index, landmarks: Landmarks) -> Self {
        Self { landmarks: RwLock::new(landmarks), index: Mutex::new(index) }
    }

    /// The landmarks.
    pub fn landmarks(&self) -> RwLockReadGuard<'_, Landmarks> {
        self.landmarks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The landmarks, to take in more; waits while the index takes in those that there are.
    pub fn landmarks_mut(&self) -> RwLockWriteGuard<'_, Landmarks> {
        self.landmarks.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index as far as it has come.
    pub fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index of all landmarks that there are.
    pub fn whole_index(&self) -> MutexGuard<'_, Index> {
        let mut index = self.index();
        extend(&mut index, &self.landmarks());
        index
    }

    /// Has the index take in the landmarks that there are when a thread has nothing else to do. What an index is depends on its keys alone and not on when
    /// they come.
    pub fn extend_soon(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // Nothing is waited for here: a thread may come to this while it holds the index, and who holds it has seen to it.
        rayon::spawn(move || {
            if let (Ok(mut index), Ok(landmarks)) = (this.index.try_lock(), this.landmarks.try_read()) {
                extend(&mut index, &landmarks);
            }
        });
    }
}

fn extend(index: &mut Index, landmarks: &Landmarks) {
    index.extend(landmarks.len(), |head, block, into| landmarks.key(head, block, into));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{BlockType, Codec};
    use crate::index::encode;

    /// Whether it is brought up to date in between, at the end or by both, the index is the same.
    #[test]
    fn an_index_is_the_same_whenever_keys_come() {
        let (heads, d) = (2, 8);
        let made = |soon: bool, now: bool| {
            let codec = Codec { of: BlockType::F32, block: 4, head_dim: d };
            let indexed = Arc::new(Indexed::new(Index::new(heads, d, 2), Landmarks::new(codec, heads)));
            for block in 0..3000u32 {
                let key = |i: usize| (block.wrapping_mul(2654435761) >> (i % 16)) as u16 as f32 + i as f32;
                indexed.landmarks_mut().push(&(0..heads * d).map(key).collect::<Vec<_>>());
                if soon && block.is_multiple_of(7) {
                    indexed.extend_soon();
                }
                if now && block.is_multiple_of(50) {
                    assert_eq!(indexed.whole_index().len(), block as usize + 1);
                }
            }
            let index = indexed.whole_index();
            assert_eq!(index.len(), 3000);
            encode(&[&*index])
        };
        let at_once = made(false, false);
        for (soon, now) in [(true, false), (false, true), (true, true)] {
            assert_eq!(made(soon, now), at_once, "{soon} {now}");
        }
    }
}
