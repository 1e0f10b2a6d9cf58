//! Keys outside the window, which have no values: all they do is to enlarge the sum of a query's outer softmax. In training they are the
//! landmarks of other texts, which a query must learn not to prefer to those of its own.
//!
//! With `n` the log-sum-exp of a query's scores for them, `out` and `lse` what [attention](crate::landmark_attention_with_lse) gives without them:
//!
//! ```text
//! lse' = log(e^lse + e^n)      out' = out e^(lse - lse')      dn = -e^(n - lse') (dout . out')
//! ```
//!
//! and the gradients of `q`, `k` and `v` are what the kernels make of `out'` and `lse'` in place of `out` and `lse`: they recompute the
//! weights from the one and `dout . out'` from the other. So this is a second node behind the operation's own, and the two are one
//! operation: going back, this one hands on `dout` as it is, and its `out'` and `lse'`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::call::Call;
use crate::{Error, Result};

pub(crate) const OP: &str = "landmark_attention_with_outside";
const LSE: &str = "log_sum_exp";

/// `out'` and `lse'` on their way from one node to the other.
#[derive(Clone, Default)]
pub(crate) struct Joined(Arc<Mutex<Option<[Tensor; 2]>>>);

impl Joined {
    fn put(&self, out: &Tensor, lse: &Tensor) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some([out.clone(), lse.clone()]);
    }

    /// What is to stand for the operation's own output and log-sum-exps, if anything.
    pub fn take(&self) -> Option<[Tensor; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Refuses log-sum-exps that do not fit a call.
pub(crate) fn check(call: &Call, q: &Tensor, outside: &Tensor) -> Result<()> {
    let expected = [call.batch, call.heads, call.q_len];
    if outside.dims() != expected {
        let (got, expected) = (outside.dims().to_vec(), format!("[batch, heads, q_len] = {expected:?}"));
        return Err(Error::Shape { op: OP, tensor: "outside", got, expected });
    }
    let dtype = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    if outside.dtype() != dtype {
        let expected = format!("{dtype:?}, which log-sum-exps are in for q in {:?}", q.dtype());
        return Err(Error::DType { op: OP, tensor: "outside", got: outside.dtype(), expected });
    }
    if !outside.device().same_device(q.device()) {
        let expected = format!("{:?}, as q", q.device().location());
        return Err(Error::Device { op: OP, tensor: "outside", got: outside.device().location(), expected });
    }
    Ok(())
}

/// `out'` and `lse'` of the operation's `out` `[batch, heads, q_len, head_dim]` and `lse` `[batch, heads, q_len]`.
pub(crate) fn join(out: &Tensor, lse: &Tensor, outside: &Tensor, joined: Joined) -> candle_core::Result<[Tensor; 2]> {
    let outside = outside.contiguous()?;
    let total = match out.device().is_cpu() {
        true => log_add_exp(lse, &outside.detach())?,
        // SAFETY: the kernel writes every element before anything reads it.
        false => unsafe { Tensor::empty(lse.shape(), DType::F32, lse.device())? },
    };
    let out = out.contiguous()?.apply_op2(&outside, Join { lse: lse.clone(), total: total.clone(), joined })?;
    Ok([out, total])
}

/// `log(e^a + e^b)`.
fn log_add_exp(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    // Far below any score: where both are minus infinity, so is the result, and nothing is subtracted from itself.
    let high = a.maximum(b)?.maximum(-1e30)?;
    ((a - &high)?.exp()? + (b - &high)?.exp()?)?.log()? + high
}

/// The second node.
pub(crate) struct Join {
    pub lse: Tensor,
    pub total: Tensor,
    joined: Joined,
}

impl Join {
    fn forward<T: WithDType>(&self, out: &[T], layout: &Layout) -> candle_core::Result<Vec<T>> {
        let shape = layout.shape().dims4()?;
        let channels = shape.3;
        let numbers = |x: &Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (lse, total) = (numbers(&self.lse)?, numbers(&self.total)?);
        let out = &out[layout.start_offset()..][..lse.len() * channels];
        let mut joined = vec![T::zero(); out.len()];
        let rows = joined.par_chunks_mut(channels).zip(out.par_chunks(channels)).zip(lse.par_iter().zip(&total));
        rows.for_each(|((joined, out), (&lse, &total))| {
            let share = if lse == f64::NEG_INFINITY { 0. } else { (lse - total).exp() };
            let share = T::from_f64(share);
            joined.iter_mut().zip(out).for_each(|(joined, &out)| *joined = share * out);
        });
        Ok(joined)
    }
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        out: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let joined = match out {
            CpuStorage::F32(out) => CpuStorage::F32(self.forward(out, layout)?),
            CpuStorage::F64(out) => CpuStorage::F64(self.forward(out, layout)?),
            other => candle_core::bail!("{OP}: dtype {:?} has no kernel", other.dtype()),
        };
        Ok((joined, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        out: &candle_core::CudaStorage,
        layout: &Layout,
        outside: &candle_core::CudaStorage,
        outside_layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let joined = crate::cuda::outside::join(self, (out, layout), (outside, outside_layout))?;
        Ok((joined, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        outside: &Tensor,
        joined: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.joined.put(joined, &self.total);
        if !outside.track_op() {
            return Ok((Some(dout.clone()), None));
        }
        #[cfg(feature = "cuda")]
        if outside.device().is_cuda() {
            let gradient = crate::cuda::outside::join_backward(self, joined, outside, dout)?;
            return Ok((Some(dout.clone()), Some(gradient)));
        }
        let delta = (dout * joined)?.sum(D::Minus1)?;
        let share = (outside.detach() - self.total.maximum(-1e30)?)?.exp()?;
        Ok((Some(dout.clone()), Some((delta * share)?.neg()?)))
    }
}

/// The log-sum-exp of `scale * scores` over the last dimension, `[.., n]` to `[..]`, in f32 (f64 for f64); differentiable. On the CPU f32
/// and f64, on a GPU f32, f16 and bf16.
///
/// # Errors
/// Scores without a last dimension of at least 1, and dtypes and devices without a kernel.
pub fn log_sum_exp(scores: &Tensor, scale: f64) -> Result<Tensor> {
    if scores.elem_count() == 0 || scores.rank() < 2 {
        let (got, expected) = (scores.dims().to_vec(), "[.., n], n at least 1".to_string());
        return Err(Error::Shape { op: LSE, tensor: "scores", got, expected });
    }
    Ok(scores.contiguous()?.apply_op1(LogSumExp { scale })?)
}

struct LogSumExp {
    scale: f64,
}

impl LogSumExp {
    fn forward<T: WithDType>(&self, scores: &[T], layout: &Layout, n: usize) -> Vec<T> {
        let scores = &scores[layout.start_offset()..][..layout.shape().elem_count()];
        let row = |scores: &[T]| {
            let scaled = || scores.iter().map(|x| x.to_f64() * self.scale);
            let high = scaled().fold(f64::NEG_INFINITY, f64::max);
            if high == f64::NEG_INFINITY {
                return T::from_f64(high);
            }
            T::from_f64(high + scaled().map(|x| (x - high).exp()).sum::<f64>().ln())
        };
        scores.par_chunks(n).map(row).collect()
    }
}

impl CustomOp1 for LogSumExp {
    fn name(&self) -> &'static str {
        LSE
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, n) = rows(layout.shape());
        let lse = match scores {
            CpuStorage::F32(scores) => CpuStorage::F32(self.forward(scores, layout, n)),
            CpuStorage::F64(scores) => CpuStorage::F64(self.forward(scores, layout, n)),
            other => candle_core::bail!("{LSE}: dtype {:?} has no kernel", other.dtype()),
        };
        Ok((lse, rows))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let (rows, n) = rows(layout.shape());
        Ok((crate::cuda::outside::log_sum_exp(scores, layout, n, self.scale)?, rows))
    }

    fn bwd(&self, scores: &Tensor, lse: &Tensor, dlse: &Tensor) -> candle_core::Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if scores.device().is_cuda() {
            return Ok(Some(crate::cuda::outside::log_sum_exp_backward(scores, lse, dlse, self.scale)?));
        }
        let weights = (scores.detach() * self.scale)?.broadcast_sub(&lse.detach().unsqueeze(D::Minus1)?)?.exp()?;
        Ok(Some((weights.broadcast_mul(&dlse.unsqueeze(D::Minus1)?)? * self.scale)?))
    }
}

/// A shape without its last dimension, and that.
fn rows(shape: &Shape) -> (Shape, usize) {
    let (n, rows) = shape.dims().split_last().expect("checked by log_sum_exp");
    (Shape::from(rows), *n)
}
