//! The seam between a model and the attention it runs on.

use candle_core::{Result, Tensor};

/// What the layers of a transformer ask of attention. A model is written once against this trait; training, evaluation
/// inside the window, and the landmark cache are implementations of it.
pub trait Attend {
    /// The attention output of `layer`, `[batch, heads, time, head_dim]`.
    ///
    /// `q` is `[batch, heads, time, head_dim]`, `k` and `v` `[batch, kv_heads, time, head_dim]`, all as projected: positions
    /// are the implementation's business, since a cache keeps keys before rotation. Any strides, last dimension contiguous.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// The same with a way back that needs no graph of candle's, for a caller that keeps a list of such ways; `None` from an implementation that has
    /// only candle's.
    fn attend_with_backward(
        &mut self,
        _layer: usize,
        _q: &Tensor,
        _k: &Tensor,
        _v: &Tensor,
    ) -> Result<Option<(Tensor, AttendBackward)>> {
        Ok(None)
    }

    /// What gives for each layer again what this gives for it now, to a caller that computes layers twice. `None` from an implementation whose
    /// layers leave something behind, as a cache's do.
    fn again(&self) -> Option<Box<dyn Attend + Send>> {
        None
    }
}

/// Turns the gradient of an attention's output into those of q, k and v.
pub type AttendBackward = Box<dyn Fn(&Tensor) -> Result<[Tensor; 3]> + Send + Sync>;
