//! What is kept of each finished block of a layer, in memory: a ring that drops the oldest block, or a list that grows.

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Blocks that a ring without a limit makes room for at first.
const FIRST_CAPACITY: usize = 16;

/// Tensors `[batch, kv_heads, capacity, ..]` with a row for each block, oldest first. Appending is O(blocks appended), amortised; nothing is
/// moved when a block is dropped.
#[derive(Debug)]
pub struct Ring<const N: usize> {
    tensors: [Tensor; N],
    first: usize,
    len: usize,
    max_blocks: Option<usize>,
}

impl<const N: usize> Ring<N> {
    /// An empty ring of rows of these shapes, the same for each batch row and head.
    pub fn new(
        [batch, kv_heads]: [usize; 2],
        rows: [&[usize]; N],
        max_blocks: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let capacity = max_blocks.map_or(FIRST_CAPACITY, |max| max.min(FIRST_CAPACITY));
        let zeros = |row: &[usize]| Tensor::zeros([&[batch, kv_heads, capacity], row].concat(), dtype, device);
        let tensors: Vec<Tensor> = rows.into_iter().map(zeros).collect::<candle_core::Result<_>>()?;
        let tensors = tensors.try_into().expect("as many tensors as rows");
        Ok(Self { tensors, first: 0, len: 0, max_blocks })
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the oldest block is.
    pub fn first(&self) -> usize {
        self.first
    }

    /// The tensors.
    pub fn tensors(&self) -> &[Tensor; N] {
        &self.tensors
    }

    /// Bytes of memory set aside.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Bytes of memory that so many blocks take.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        (self.bytes() / self.capacity()).saturating_mul(blocks)
    }

    fn capacity(&self) -> usize {
        self.tensors[0].dims()[2]
    }

    /// Appends rows `[batch, kv_heads, n, ..]`, the oldest first; drops the oldest over the limit.
    pub fn append(&mut self, rows: [&Tensor; N]) -> Result<()> {
        let n = rows[0].dims()[2];
        // Of more blocks than the ring holds, only the newest are ever seen.
        let kept = self.max_blocks.map_or(n, |max| max.min(n));
        self.reserve(self.len + kept)?;
        let capacity = self.capacity();
        let mut done = 0;
        while done < kept {
            let place = (self.first + self.len) % capacity;
            let run = (kept - done).min(capacity - place);
            for (ring, new) in self.tensors.iter().zip(rows) {
                ring.slice_set(&new.narrow(2, n - kept + done, run)?.contiguous()?, 2, place)?;
            }
            done += run;
            let dropped = (self.len + run).saturating_sub(capacity);
            self.len = self.len + run - dropped;
            self.first = (self.first + dropped) % capacity;
        }
        Ok(())
    }

    /// Forgets all but the oldest `blocks`; keeps the memory.
    pub fn truncate(&mut self, blocks: usize) {
        self.len = self.len.min(blocks);
    }

    /// Forgets all blocks; keeps the memory.
    pub fn clear(&mut self) {
        (self.first, self.len) = (0, 0);
    }

    /// Forgets all blocks, and gives the memory back.
    pub fn release(&mut self) -> Result<()> {
        self.clear();
        if self.capacity() > FIRST_CAPACITY {
            for tensor in &mut self.tensors {
                let small = tensor.narrow(2, 0, FIRST_CAPACITY)?.zeros_like()?;
                *tensor = small;
            }
        }
        Ok(())
    }

    /// Makes room for `blocks`, at most the limit, by doubling. A ring grows only before it first wraps.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        let capacity = self.capacity();
        let wanted = self.max_blocks.map_or(blocks, |max| max.min(blocks));
        if wanted <= capacity {
            return Ok(());
        }
        let doubled = wanted.max(2 * capacity);
        let grown = self.max_blocks.map_or(doubled, |max| max.min(doubled));
        for tensor in &mut self.tensors {
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
        /// Whatever is appended, the ring holds the newest blocks in order, as a plain list would.
        #[test]
        fn equals_a_list(max in proptest::option::of(1usize..40), runs in proptest::collection::vec(1usize..50, 1..12)) {
            let mut ring = Ring::new([2, 1], [&[3, 2], &[2]], max, DType::F32, &Device::Cpu).unwrap();
            let (mut list, mut next) = (Vec::<f32>::new(), 0f32);
            for n in runs {
                let ids: Vec<f32> = (0..n).map(|i| next + i as f32).collect();
                next += n as f32;
                list.extend_from_slice(&ids);
                let keys = Tensor::from_vec(ids, (1, 1, n, 1, 1), &Device::Cpu).unwrap().broadcast_as((2, 1, n, 3, 2)).unwrap();
                ring.append([&keys, &keys.narrow(3, 2, 1).unwrap().squeeze(3).unwrap()]).unwrap();
                let kept = &list[list.len().saturating_sub(max.unwrap_or(usize::MAX))..];
                let [rows, ends] = ring.tensors();
                prop_assert_eq!(ring.len(), kept.len());
                for (i, &id) in kept.iter().enumerate() {
                    let place = (ring.first() + i) % rows.dims()[2];
                    let row = |t: &Tensor| t.get(1).unwrap().get(0).unwrap().get(place).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    prop_assert_eq!(row(rows), vec![id; 6]);
                    prop_assert_eq!(row(ends), vec![id; 2]);
                }
            }
        }
    }
}
