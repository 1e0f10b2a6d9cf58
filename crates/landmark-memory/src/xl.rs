//! The Transformer-XL baseline (Dai et al., 2019): plain attention over the chunk and the last tokens before it.

use candle_core::{Result, Tensor};
use landmark_attention::{Attend, Dropout, LandmarkParams, Landmarks, Rope, landmark_attention};

/// Keys (before rotation) and values of the last `max_tokens` tokens, per layer. No gradient passes through them.
#[derive(Clone, Debug)]
pub struct XlCache {
    rope: Rope,
    max_tokens: usize,
    dropout: Option<Dropout>,
    layers: Vec<Option<(Tensor, Tensor)>>,
}

impl XlCache {
    /// An empty cache.
    pub fn new(layers: usize, max_tokens: usize, rope: Rope) -> Self {
        Self { rope, max_tokens, dropout: None, layers: vec![None; layers] }
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.layers.fill(None);
    }

    /// For the chunks that follow, dropout of attention weights, those on cached tokens among them; each layer draws its own.
    pub fn set_dropout(&mut self, dropout: Option<Dropout>) {
        self.dropout = dropout;
    }
}

impl Attend for XlCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let Some(cached) = self.layers.get_mut(layer) else {
            candle_core::bail!("transformer-xl cache: layer {layer} of a cache for {} layers", self.layers.len())
        };
        let (k, v) = match cached.take() {
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, k], 2)?, Tensor::cat(&[&old_v, v], 2)?),
            None => (k.clone(), v.clone()),
        };
        let (kv_len, q_len) = (k.dims()[2], q.dims()[2]);
        // Distances are all that rotation shows, so positions are counted from the oldest cached token.
        let positions: Vec<i64> = (0..kv_len as i64).collect();
        let rotated_q = self.rope.at(&positions[kv_len - q_len..]).apply(q)?;
        let rotated_k = self.rope.at(&positions).apply(&k)?;
        let dropout = self.dropout.map(|dropout| Dropout { seed: dropout.seed ^ (layer as u64) << 32, ..dropout });
        let params = LandmarkParams { dropout, ..LandmarkParams::new(Landmarks::None) };
        let out = landmark_attention(&rotated_q, &rotated_k, &v, &params)?;
        let kept = kv_len.min(self.max_tokens);
        if kept > 0 {
            let keep = |x: &Tensor| x.narrow(2, kv_len - kept, kept)?.detach().contiguous();
            *cached = Some((keep(&k)?, keep(&v)?));
        }
        Ok(out)
    }
}
