//! Landmark attention as a candle operation.
//!
//! A *landmark* token closes every block of tokens. A query reaches an earlier block only through its landmark: the
//! block's share of the attention is the landmark's weight in an outer softmax, and an inner softmax over the block's own
//! tokens distributes that share (Mohtashami and Jaggi, 2023, <https://arxiv.org/abs/2305.16300>, section 3).
//! [`mod@reference`] is the definition, written with plain tensor operations; everything else answers to it.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use landmark_attention::{LandmarkParams, Landmarks, landmark_attention};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 2 sequences, 8 query heads that share 4 key-value heads, 100 tokens; every 16th token is a landmark.
//! let q = Tensor::randn(0f32, 1., (2, 8, 100, 64), &Device::Cpu)?;
//! let k = Tensor::randn(0f32, 1., (2, 4, 100, 64), &Device::Cpu)?;
//! let v = Tensor::randn(0f32, 1., (2, 4, 100, 64), &Device::Cpu)?;
//! let params = LandmarkParams::new(Landmarks::Every(16));
//! let out = landmark_attention(&q, &k, &v, &params)?;
//! assert_eq!(out.dims(), q.dims());
//! # Ok(())
//! # }
//! ```

mod attend;
mod call;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
pub mod outside;
mod params;
mod pool;
pub mod reference;
pub mod retrieval;
mod rope;

pub use attend::{Attend, AttendBackward};
pub use error::{Error, Result};
pub use params::{Dropout, LandmarkParams, Landmarks, Softmax};
pub use rope::{Pairs, Rope, Rotation};

use candle_core::{Device, Tensor};

/// Landmark attention of `q` `[batch, heads, q_len, head_dim]` over `k` and `v` `[batch, kv_heads, kv_len, head_dim]`, causal, the
/// queries being the last `q_len` of the `kv_len` positions: a drop-in for scaled-dot-product attention. Returns
/// `[batch, heads, q_len, head_dim]`; differentiable. Memory is O(kv_len), time that of dense attention.
///
/// f32, f64, and bf16 or f16 computed in f32. With the feature `cuda` also on NVIDIA GPUs of compute capability 8.0 or newer, for
/// heads of at most 256 channels, without f64; the result and the gradients are the same bits in every run.
/// Strides are free but for the last dimension, which is copied if it is not
/// contiguous. A query that has nothing to attend to (a landmark that opens the text) gets zeros.
///
/// # Errors
/// Shapes, dtypes, devices or parameters that do not fit, each by name; a device without a kernel.
pub fn landmark_attention(q: &Tensor, k: &Tensor, v: &Tensor, params: &LandmarkParams) -> Result<Tensor> {
    Ok(landmark_attention_with_lse(q, k, v, params)?.0)
}

/// [`landmark_attention`], and the natural log-sum-exp of each query's outer softmax, `[batch, heads, q_len]` in f32 (f64 for f64),
/// minus infinity where there is no candidate: with it, parts of an attention that were computed apart can be joined. Gradients
/// flow through the output only.
///
/// # Errors
/// Those of [`landmark_attention`].
pub fn landmark_attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &LandmarkParams,
) -> Result<(Tensor, Tensor)> {
    attend(q, k, v, params, None)
}

/// [`landmark_attention`] of queries that also see keys [`outside`](mod@outside) the window, which have no values: one more term in the sum of
/// the outer softmax. `outside` holds the log-sum-exp of each query's scores for them, `[batch, heads, q_len]` in f32 (f64 for f64), minus
/// infinity where there are none; gradients flow to it too.
///
/// # Errors
/// Those of [`landmark_attention`].
pub fn landmark_attention_with_outside(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &LandmarkParams,
    outside: &Tensor,
) -> Result<Tensor> {
    Ok(attend(q, k, v, params, Some(outside))?.0)
}

fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &LandmarkParams,
    outside: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let call = call::Call::check(q, k, v, params)?;
    if let Some(outside) = outside {
        outside::check(&call, q, outside)?;
    }
    match q.device() {
        Device::Cpu => Ok(cpu::attend(call, q, k, v, outside)?),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => cuda::attend(call, q, k, v, outside),
        other => Err(no_kernel(other)),
    }
}

/// The gradients `[dq, dk, dv]` of [`landmark_attention`] for `dout`, the gradient of its output, without candle's graph: for a caller
/// with a graph of its own. candle's costs a pass over each gradient more, since it adds them to zeros. `out` and `lse` are what
/// [`landmark_attention_with_lse`] gave for the same tensors and parameters; the gradients have the shapes and the dtype of q, k and v.
///
/// # Errors
/// Those of [`landmark_attention`]; an `out`, `lse` or `dout` that is not of such a call.
pub fn landmark_attention_backward(
    [q, k, v]: [&Tensor; 3],
    params: &LandmarkParams,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
) -> Result<[Tensor; 3]> {
    let call = call::Call::check(q, k, v, params)?;
    call.check_results(q, [("out", out), ("dout", dout)], lse)?;
    match q.device() {
        Device::Cpu => Ok(cpu::gradients(call, [q, k, v, out, dout], lse)?),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => cuda::gradients(call, [q, k, v, out, dout], lse),
        other => Err(no_kernel(other)),
    }
}

fn no_kernel(device: &Device) -> Error {
    let expected = if cfg!(feature = "cuda") { "the CPU or an NVIDIA GPU" } else { "the CPU" };
    let expected = format!("{expected}: no other device has kernels in this build");
    Error::Device { op: "landmark_attention", tensor: "q", got: device.location(), expected }
}
