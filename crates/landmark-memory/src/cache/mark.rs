//! Places in a text, to go back to.

use candle_core::Tensor;

use super::LandmarkCache;
use crate::{Error, Result};

/// A place in a text that was read, to go back to; see [`LandmarkCache::mark`].
#[derive(Debug, Clone)]
pub struct Mark {
    unfinished: Vec<Option<(Tensor, Tensor)>>,
    finished: usize,
    tokens: usize,
}

impl LandmarkCache {
    /// The place where the text is, to go back to; `None` if blocks are in tiers, or if the oldest are dropped. It takes the memory of the
    /// unfinished block.
    ///
    /// # Errors
    /// The device's.
    pub fn mark(&self) -> Result<Option<Mark>> {
        if self.config.max_blocks.is_some() || !self.store.is_in_memory() {
            return Ok(None);
        }
        // A copy: a part would keep the whole chunk in memory.
        let copy = |layer: &Option<(Tensor, Tensor)>| match layer {
            Some((keys, values)) => Ok(Some((keys.force_contiguous()?, values.force_contiguous()?))),
            None => Ok(None),
        };
        let unfinished = self.unfinished.iter().map(copy).collect::<Result<_>>()?;
        Ok(Some(Mark { unfinished, finished: self.finished, tokens: self.tokens }))
    }

    /// Goes back to a place in this text: what was read after it is forgotten, and what was noted of reads.
    ///
    /// # Errors
    /// A place that the text has not come to, or of another model's text; a cache in tiers. Another text's place of the same model is not noticed.
    pub fn rewind(&mut self, mark: &Mark) -> Result<()> {
        if mark.finished > self.finished || mark.unfinished.len() != self.config.layers || !self.store.is_in_memory() {
            let got = format!("back to block {} of {}", mark.finished, self.finished);
            return Err(Error::Config { name: "a place", got, expected: "one in this text, in memory".into() });
        }
        self.store.truncate(mark.finished);
        self.lengths.truncate(mark.finished);
        self.starts.truncate(mark.finished);
        self.short = self.lengths.iter().filter(|&&length| (length as usize) < self.config.mem_freq).count();
        (self.finished, self.tokens, self.unfinished) = (mark.finished, mark.tokens, mark.unfinished.clone());
        self.reads = None;
        Ok(())
    }
}
