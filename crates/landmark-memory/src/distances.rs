//! How far away the blocks are that are read.

use candle_core::{Result, Tensor};

/// Retrievals by distance in blocks. Grows with the text's number of blocks.
#[derive(Debug, Default)]
pub struct Distances {
    counts: Vec<u64>,
}

impl Distances {
    /// Counts what queries read, `chosen` u32 `[batch, heads, time, k]`; `distance` of a query's place in time and a chosen block is that in
    /// blocks.
    pub fn add(&mut self, chosen: &Tensor, distance: impl Fn(usize, usize) -> usize) -> Result<()> {
        let (_, _, time, k) = chosen.dims4()?;
        for (row, blocks) in chosen.flatten_all()?.to_vec1::<u32>()?.chunks_exact(k.max(1)).enumerate() {
            for &block in blocks {
                let distance = distance(row % time, block as usize);
                if distance >= self.counts.len() {
                    self.counts.resize(distance + 1, 0);
                }
                self.counts[distance] += 1;
            }
        }
        Ok(())
    }

    /// Entry `d`: retrievals of blocks `d` before the query's own.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }
}
