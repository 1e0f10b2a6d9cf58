//! What a cache is made for.

use landmark_attention::retrieval::Selection;

use crate::{Error, Result};

/// What a cache is made for.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// Layers of the model.
    pub layers: usize,
    /// Rows of the batch.
    pub batch: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Ordinary tokens of a block, or the most of them; a landmark follows them.
    pub mem_freq: usize,
    /// The landmark's token id.
    pub landmark_id: u32,
    /// Blocks that a query reads, the authors' `--cache_topk`. 0: none, the window only.
    pub top_k: usize,
    /// How they are chosen.
    pub selection: Selection,
    /// Blocks that are kept, the authors' `--mem_cache_size`; `None`: all.
    pub max_blocks: Option<usize>,
    /// Positions that the model was trained on.
    pub window: usize,
    /// For a model with a context-miss token, how it is used.
    pub context_miss: Option<ContextMiss>,
}

impl CacheConfig {
    /// Refuses a setting outside its range.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |name, got: usize, expected: &str| {
            Err(Error::Config { name, got: got.to_string(), expected: expected.to_string() })
        };
        if self.mem_freq == 0 {
            return wrong("mem_freq", 0, "at least 1");
        }
        if self.layers == 0 || self.batch == 0 || self.kv_heads == 0 {
            return wrong("layers, batch or kv_heads", 0, "at least 1");
        }
        if let Some(max) = self.max_blocks
            && max < self.top_k.max(1)
        {
            return wrong("mem_cache_size", max, &format!("at least cache_topk, {}", self.top_k.max(1)));
        }
        // Whoever asks for more than there can be is told so too.
        let block = self.mem_freq.saturating_add(1);
        if self.top_k.saturating_add(1).saturating_mul(block) >= self.window {
            let expected = format!(
                "at most {}: a window of {} positions holds {} blocks of {block} and a chunk",
                (self.window / block).saturating_sub(2),
                self.window,
                self.window / block,
            );
            return wrong("cache_topk", self.top_k, &expected);
        }
        Ok(())
    }
}

/// How a context-miss token gates retrieval (paper, appendix): a query's retrieved blocks are weighted by the token's weight.
#[derive(Debug, Clone, Copy)]
pub struct ContextMiss {
    /// Queries under this weight (the authors' `--rem_cutoff`) retrieve nothing.
    pub cutoff: Option<f64>,
}
