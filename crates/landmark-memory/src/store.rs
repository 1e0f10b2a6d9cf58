//! The finished blocks of one layer, in memory: a ring that drops the oldest block, or a list that grows.

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::Blocks;

use crate::Result;

/// Blocks that a store without a limit makes room for at first.
const FIRST_CAPACITY: usize = 16;

/// Finished blocks, oldest first. Appending is O(blocks appended), amortised; nothing is moved when a block is dropped.
#[derive(Debug)]
pub struct BlockStore {
    /// Keys and values `[batch, kv_heads, capacity, block, head_dim]`, landmark keys `[batch, kv_heads, capacity, head_dim]`.
    keys: Tensor,
    values: Tensor,
    landmarks: Tensor,
    first: usize,
    len: usize,
    max_blocks: Option<usize>,
}

impl BlockStore {
    /// An empty store for blocks `[batch, kv_heads, _, block, head_dim]`.
    pub fn new(
        [batch, kv_heads, block, head_dim]: [usize; 4],
        max_blocks: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let capacity = max_blocks.map_or(FIRST_CAPACITY, |max| max.min(FIRST_CAPACITY));
        let blocks = (batch, kv_heads, capacity, block, head_dim);
        Ok(Self {
            keys: Tensor::zeros(blocks, dtype, device)?,
            values: Tensor::zeros(blocks, dtype, device)?,
            landmarks: Tensor::zeros((batch, kv_heads, capacity, head_dim), dtype, device)?,
            first: 0,
            len: 0,
            max_blocks,
        })
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory set aside.
    pub fn bytes(&self) -> usize {
        [&self.keys, &self.values, &self.landmarks].iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Bytes of memory that so many blocks take.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        (self.bytes() / self.keys.dims()[2]).saturating_mul(blocks)
    }

    /// The blocks, as retrieval reads them; `lengths` as it expects them.
    pub fn blocks<'a>(&'a self, lengths: Option<&'a [u32]>) -> Blocks<'a> {
        let Self { keys, values, landmarks, first, len, .. } = self;
        Blocks { keys, values, landmarks, first: *first, len: *len, lengths }
    }

    /// Appends blocks `[batch, kv_heads, n, block, head_dim]`, the oldest first; drops the oldest over the limit.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (n, block) = (keys.dims()[2], keys.dims()[3]);
        // Of more blocks than the ring holds, only the newest are ever seen.
        let kept = self.max_blocks.map_or(n, |max| max.min(n));
        let (keys, values) = (keys.narrow(2, n - kept, kept)?, values.narrow(2, n - kept, kept)?);
        let landmarks = keys.narrow(3, block - 1, 1)?.squeeze(3)?;
        self.reserve(self.len + kept)?;
        let capacity = self.keys.dims()[2];
        let mut done = 0;
        while done < kept {
            let place = (self.first + self.len) % capacity;
            let run = (kept - done).min(capacity - place);
            for (ring, new) in [(&self.keys, &keys), (&self.values, &values), (&self.landmarks, &landmarks)] {
                ring.slice_set(&new.narrow(2, done, run)?.contiguous()?, 2, place)?;
            }
            done += run;
            let dropped = (self.len + run).saturating_sub(capacity);
            self.len = self.len + run - dropped;
            self.first = (self.first + dropped) % capacity;
        }
        Ok(())
    }

    /// Forgets all blocks; keeps the memory.
    pub fn clear(&mut self) {
        (self.first, self.len) = (0, 0);
    }

    /// Makes room for `blocks`, at most the limit, by doubling. A ring grows only before it first wraps.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        let capacity = self.keys.dims()[2];
        let wanted = self.max_blocks.map_or(blocks, |max| max.min(blocks));
        if wanted <= capacity {
            return Ok(());
        }
        let doubled = wanted.max(2 * capacity);
        let grown = self.max_blocks.map_or(doubled, |max| max.min(doubled));
        for tensor in [&mut self.keys, &mut self.values, &mut self.landmarks] {
            let mut dims = tensor.dims().to_vec();
            dims[2] = grown;
            let larger = Tensor::zeros(dims, tensor.dtype(), tensor.device())?;
            larger.slice_set(tensor, 2, 0)?;
            *tensor = larger;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is appended, the store holds the newest blocks in order, as a plain list would.
        #[test]
        fn equals_a_list(max in proptest::option::of(1usize..40), runs in proptest::collection::vec(1usize..50, 1..12)) {
            let mut store = BlockStore::new([2, 1, 3, 2], max, DType::F32, &Device::Cpu).unwrap();
            let (mut list, mut next) = (Vec::<f32>::new(), 0f32);
            for n in runs {
                let ids: Vec<f32> = (0..n).map(|i| next + i as f32).collect();
                next += n as f32;
                list.extend_from_slice(&ids);
                let keys = Tensor::from_vec(ids, (1, 1, n, 1, 1), &Device::Cpu).unwrap().broadcast_as((2, 1, n, 3, 2)).unwrap();
                store.append(&keys, &(&keys * -1.).unwrap()).unwrap();
                let kept = &list[list.len().saturating_sub(max.unwrap_or(usize::MAX))..];
                let blocks = store.blocks(None);
                prop_assert_eq!(blocks.len, kept.len());
                for (i, &id) in kept.iter().enumerate() {
                    let place = (blocks.first + i) % blocks.keys.dims()[2];
                    let row = |t: &Tensor| t.get(1).unwrap().get(0).unwrap().get(place).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    prop_assert_eq!(row(blocks.keys), vec![id; 6]);
                    prop_assert_eq!(row(blocks.values), vec![-id; 6]);
                    prop_assert_eq!(row(blocks.landmarks), vec![id; 2]);
                }
            }
        }
    }
}
