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
    /// The same of the first, the middle and the last third of the layers; 0 where a model has no layer in one.
    pub by_layers: [f64; GROUPS],
}

/// Groups of layers that are told apart.
const GROUPS: usize = 3;

/// A block's tokens, and its weights summed in each group.
type Sums = (Range<usize>, [f64; GROUPS]);

/// Weights of blocks summed over layers, heads and tokens, for each row of the batch.
#[derive(Debug, Default)]
pub struct Reads {
    rows: Vec<HashMap<usize, Sums>>,
    /// Layers, heads and tokens that went into each row, by group.
    attentions: [usize; GROUPS],
}

impl Reads {
    /// Adds what queries of a layer, of so many, read: `chosen` u32 `[batch, heads, time, k]` counts from the oldest block that is cached, `block_at`
    /// tells a block's number in the text and its tokens; `lse` `[batch, heads, time]` is that of the whole attention.
    pub fn add(
        &mut self,
        (layer, layers): (usize, usize),
        retrieved: &Retrieved,
        chosen: &Tensor,
        lse: &Tensor,
        block_at: impl Fn(usize) -> (usize, Range<usize>),
    ) -> candle_core::Result<()> {
        let (batch, heads, time, _) = chosen.dims4()?;
        let group = layer * GROUPS / layers;
        let shares = retrieved.scores.broadcast_sub(&lse.unsqueeze(3)?)?.exp()?.to_dtype(DType::F64)?;
        self.rows.resize_with(batch, Default::default);
        for (b, row) in self.rows.iter_mut().enumerate() {
            let (chosen, shares) = (chosen.get(b)?.flatten_all()?, shares.get(b)?.flatten_all()?);
            for (block, share) in chosen.to_vec1::<u32>()?.into_iter().zip(shares.to_vec1::<f64>()?) {
                let (number, tokens) = block_at(block as usize);
                row.entry(number).or_insert_with(|| (tokens, [0.; GROUPS])).1[group] += share;
            }
        }
        self.attentions[group] += heads * time;
        Ok(())
    }

    /// The blocks that row `b` read, the most read first.
    pub fn ranked(&self, b: usize) -> Vec<BlockRead> {
        let mut reads: Vec<BlockRead> = self.rows.get(b).map_or(vec![], |row| {
            let all: usize = self.attentions.iter().sum();
            let read = |(&block, (tokens, sums)): (&usize, &Sums)| BlockRead {
                block,
                tokens: tokens.clone(),
                weight: sums.iter().sum::<f64>() / all as f64,
                by_layers: std::array::from_fn(|group| sums[group] / self.attentions[group].max(1) as f64),
            };
            row.iter().map(read).collect()
        });
        reads.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.block.cmp(&b.block)));
        reads
    }
}
