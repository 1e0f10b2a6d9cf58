//! Several texts read at once, each with a cache of its own: one pass of the model over the next tokens of all.
//!
//! Rows of a pass need not be of one text: all that a model does but attention is done for each position by itself. The texts' chunks stand one behind
//! the other in one row, so they may have different lengths, and some may decode while others are read; attention cuts the row, and each part is its
//! cache's business.

use candle_core::Tensor;
use landmark_attention::Attend;

use crate::cache::{Chunk, LandmarkCache};
use crate::{CacheConfig, Error, Result};

/// The next tokens of a text.
pub struct Next<'a> {
    /// Its cache, of one row.
    pub cache: &'a mut LandmarkCache,
    /// u32 `[1, time]`
    pub tokens: &'a Tensor,
    /// Whether a landmark follows each of them, as for [`LandmarkCache::forward_with_landmarks`].
    pub follows: &'a [bool],
}

/// As [`LandmarkCache::forward_with_landmarks`] for each of the texts, with one pass of `model`: u32 `[1, time']` in, `[1, time', ...]` out. Each text gets
/// its `[1, time, ...]`. Matrix products have other sizes than for one text alone, so the last bits may differ.
///
/// # Errors
/// Those of one text; a cache with a context-miss token, which stands before a text that is alone; no texts. If the model fails, all caches are as they were; if one
/// cannot store its blocks, those before it have theirs.
pub fn forward_together(
    texts: &mut [Next],
    model: impl FnOnce(&Tensor, &mut dyn Attend) -> candle_core::Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let (mut ids, mut places, mut parts) = (Vec::new(), Vec::new(), Vec::new());
    for Next { cache, tokens, follows } in texts {
        let CacheConfig { batch, context_miss, .. } = *cache.config();
        for (name, got, only) in [("batch", batch, 1), ("context_miss", context_miss.iter().count(), 0)] {
            if got != only {
                let expected = format!("{only} in a cache that is read together with others");
                return Err(Error::Config { name, got: got.to_string(), expected });
            }
        }
        let (with_landmarks, ordinary, chunk) = cache.begin(tokens, follows)?;
        let length = with_landmarks.dims()[1];
        ids.push(with_landmarks);
        places.push(ordinary);
        parts.push((chunk, length));
    }
    if ids.is_empty() {
        return Err(Error::Chunk { got: vec![0], expected: "at least one text".into() });
    }
    let mut attention = Together(parts);
    let out = model(&Tensor::cat(&ids, 1)?, &mut attention)?.contiguous()?;
    let mut from = 0;
    let mut outs = Vec::with_capacity(ids.len());
    for ((chunk, length), ordinary) in attention.0.into_iter().zip(places) {
        outs.push(out.narrow(1, from, length)?.contiguous()?.index_select(&ordinary, 1)?);
        from += length;
        chunk.end()?;
    }
    Ok(outs)
}

/// The texts' chunks, and the positions of each.
struct Together<'a>(Vec<(Chunk<'a>, usize)>);

impl Attend for Together<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let mut from = 0;
        let mut outs = Vec::with_capacity(self.0.len());
        for (chunk, length) in &mut self.0 {
            let part = |x: &Tensor| x.narrow(2, from, *length);
            outs.push(chunk.attend(layer, &part(q)?, &part(k)?, &part(v)?)?);
            from += *length;
        }
        Tensor::cat(&outs, 2)
    }
}
