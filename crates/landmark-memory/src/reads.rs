//! Which blocks were read, and how much they weighed.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Tensor};
use landmark_attention::retrieval::Retrieved;

/// How much attention a block got.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockRead {
    /// The block, counted from the beginning of the text.
    pub block: usize,
    /// The text's tokens that it holds.
    pub tokens: Range<usize>,
    /// Its share of a token's attention, averaged over the tokens, heads and layers that were traced.
    pub weight: f64,
}

/// Weights of blocks summed over layers, heads and tokens, for each row of the batch.
#[derive(Debug, Default)]
pub struct Reads {
    rows: Vec<HashMap<usize, (Range<usize>, f64)>>,
    /// Layers, heads and tokens that went into each row.
    attentions: usize,
}

impl Reads {
    /// Adds what queries read: `chosen` u32 `[batch, heads, time, k]` counts from the oldest block that is cached, `block_at`
    /// tells a block's number in the text and its tokens; `lse` `[batch, heads, time]` is that of the whole attention.
    pub fn add(
        &mut self,
        retrieved: &Retrieved,
        chosen: &Tensor,
        lse: &Tensor,
        block_at: impl Fn(usize) -> (usize, Range<usize>),
    ) -> candle_core::Result<()> {
        let (batch, heads, time, _) = chosen.dims4()?;
        let shares = retrieved.scores.broadcast_sub(&lse.unsqueeze(3)?)?.exp()?.to_dtype(DType::F64)?;
        self.rows.resize_with(batch, Default::default);
        for (b, row) in self.rows.iter_mut().enumerate() {
            let (chosen, shares) = (chosen.get(b)?.flatten_all()?, shares.get(b)?.flatten_all()?);
            for (block, share) in chosen.to_vec1::<u32>()?.into_iter().zip(shares.to_vec1::<f64>()?) {
                let (number, tokens) = block_at(block as usize);
                row.entry(number).or_insert_with(|| (tokens, 0.)).1 += share;
            }
        }
        self.attentions += heads * time;
        Ok(())
    }

    /// The blocks that row `b` read, the most read first.
    pub fn ranked(&self, b: usize) -> Vec<BlockRead> {
        let mut reads: Vec<BlockRead> = self.rows.get(b).map_or(vec![], |row| {
            let weight = |sum: f64| sum / self.attentions as f64;
            row.iter()
                .map(|(&block, (tokens, sum))| BlockRead { block, tokens: tokens.clone(), weight: weight(*sum) })
                .collect()
        });
        reads.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.block.cmp(&b.block)));
        reads
    }
}
