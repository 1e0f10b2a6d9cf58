//! The cross entropy, a chunk of positions at a time.

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};

use super::gemm::{Matrix, product};
use super::{Address, CudaStream_, ElementType, Fresh, address, run};
use crate::Result;
use crate::ops::cross_entropy::{check, shares};
use crate::ops::record::{Tape, in_type};
use crate::ops::{IGNORE, TokenScore};

const OP: &str = "cross_entropy";

/// Bytes of logits in memory at once.
const CHUNK: usize = 1 << 30;

/// See [`crate::ops::cross_entropy`]. Its gradient can be taken once.
pub fn cross_entropy(
    x: &Tensor,
    w: &Tensor,
    row: Option<(&Tensor, usize)>,
    targets: &Tensor,
    weights: Option<&Tensor>,
) -> Result<Tensor> {
    let (_, _, _, ids) = check(x, w, targets)?;
    let shares = shares(&ids, weights, targets.dims())?;
    let x = x.contiguous()?;
    let learner = row.map_or(w, |(row, _)| row);
    let tape = Tape::new(OP, &[&x, learner])?;
    let gradients = match row {
        _ if !tape.tracked() => Wanted::None,
        _ if !tape.wants(learner) => Wanted::OfX,
        Some((_, row)) => Wanted::OfXAndRow(row),
        None => Wanted::OfBoth,
    };
    let (chunks, learner) = (Chunks::run(&x, w, &ids, &shares, gradients, false)?, learner.detach());
    let device = x.device().as_cuda_device()?.clone();
    let total = Fresh::new(&device, (), DType::F32)?;
    let losses = address(OP, "losses", &chunks.losses)?;
    run(OP, &device, |stream| {
        // SAFETY: one loss for each id.
        unsafe { landmark_sum(losses, total.address, ids.len() as c_int, stream) }
    })?;
    let grads = Mutex::new(chunks.grads);
    tape.finish_one(total.output(), move |grad| {
        let Some((dx, dw)) = grads.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Err(candle_core::Error::Msg(format!("{OP}: its gradient was taken before")).into());
        };
        let grad = grad.to_dtype(DType::F32)?;
        let factor = address(OP, "grad", &grad)?;
        for x in std::iter::once(&dx).chain(&dw) {
            let (at, dtype, n) = (address(OP, "x", x)?, ElementType::of(OP, "x", x.dtype())?, x.elem_count());
            run(OP, &device, |stream| {
                // SAFETY: n elements that nobody else has, and a number.
                unsafe { landmark_scale(at, dtype, factor, n as i64, stream) }
            })?;
        }
        Ok(vec![dx, dw.unwrap_or_else(|| learner.clone())])
    })
}

/// See [`crate::ops::token_scores`].
pub fn token_scores(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
    let (_, _, _, ids) = check(x, w, targets)?;
    // Of weight 1, so that what comes back are the losses themselves.
    let shares: Vec<f64> = ids.iter().map(|&id| if id == IGNORE { 0. } else { 1. }).collect();
    let chunks = Chunks::run(&x.contiguous()?, w, &ids, &shares, Wanted::None, true)?;
    let (losses, correct) = (chunks.losses.to_vec1::<f32>()?, chunks.correct.expect("asked for").to_vec1::<u8>()?);
    let scores = ids.iter().zip(losses).zip(correct);
    Ok(scores
        .map(|((&id, loss), correct)| (id != IGNORE).then_some(TokenScore { loss: loss as f64, correct: correct != 0 }))
        .collect())
}

/// What comes of all positions, chunk by chunk.
struct Chunks {
    /// The share of each position in the loss.
    losses: Tensor,
    /// Whether each position's target is the likeliest.
    correct: Option<Tensor>,
    /// Gradients of x, in its type, and of what learns of w, in f32.
    grads: Option<(Tensor, Option<Tensor>)>,
}

/// The gradients that are computed while the logits are at hand.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    None,
    OfX,
    OfXAndRow(usize),
    OfBoth,
}

impl Chunks {
    fn run(x: &Tensor, w: &Tensor, ids: &[u32], shares: &[f64], wanted: Wanted, correct: bool) -> Result<Self> {
        let (n, (vocab, width)) = (ids.len(), w.dims2()?);
        let device = x.device().as_cuda_device()?;
        let dtype = ElementType::of(OP, "x", x.dtype())?;
        // A position without a target names no logit; its share is 0.
        let targets: Vec<u32> = ids.iter().map(|&id| if id == IGNORE { 0 } else { id }).collect();
        let targets = Tensor::from_vec(targets, n, x.device())?;
        let shares = Tensor::from_vec(shares.iter().map(|&share| share as f32).collect::<Vec<_>>(), n, x.device())?;
        let (losses, correct) =
            (Fresh::new(device, n, DType::F32)?, if correct { Some(Fresh::new(device, n, DType::U8)?) } else { None });
        let learn = match wanted {
            Wanted::None | Wanted::OfX => 0,
            Wanted::OfXAndRow(_) => 1,
            Wanted::OfBoth => vocab,
        };
        let dx = match wanted {
            Wanted::None => None,
            _ => Some(Fresh::new(device, x.shape(), x.dtype())?),
        };
        let dw = if learn > 0 { Some(Fresh::new(device, (learn, width), DType::F32)?) } else { None };
        let size = x.dtype().size_in_bytes();
        let step = (CHUNK / (vocab * size)).clamp(1, n).next_multiple_of(128).min(n);
        // Whatever the size of the vocabulary, products have sizes for which cuBLASLt has kernels of this decade: with one entry too many a product takes
        // seven times as long. Entries that are none have rows of zeros in w, so logits and gradients of zero, which nobody looks at.
        let pitch = vocab.next_multiple_of(8);
        let logits = Fresh::new(device, (step, pitch), x.dtype())?;
        let (logits_at, logits) = (logits.address, logits.tensor());
        let mut weight = in_type(w, x.dtype())?;
        if pitch > vocab {
            weight = Tensor::cat(&[&weight, &Tensor::zeros((pitch - vocab, width), x.dtype(), x.device())?], 0)?;
        }
        let w_pc = Matrix::new(address(OP, "w", &weight)?, dtype, pitch, width);
        let (x_at, targets_at, shares_at) =
            (address(OP, "x", x)?, address(OP, "targets", &targets)?, address(OP, "shares", &shares)?);
        for from in (0..n).step_by(step) {
            let rows = step.min(n - from);
            let row_bytes = (from * width * size) as u64;
            let x_nc = Matrix::new(x_at + row_bytes, dtype, rows, width);
            let logits_np = Matrix::new(logits_at, dtype, rows, pitch);
            // SAFETY: live contiguous allocations of the sizes that `check` made sure of; `from + rows` is at most n.
            unsafe { product(device, x_nc, w_pc.t(), logits_np, None)? };
            run(OP, device, |stream| {
                let (targets, shares) = (targets_at + 4 * from as u64, shares_at + 4 * from as u64);
                let losses = losses.address + 4 * from as u64;
                let correct = correct.as_ref().map_or(0, |correct| correct.address + from as u64);
                let (rows, vocab, pitch) = (rows as c_int, vocab as c_int, pitch as c_int);
                // SAFETY: as above, and all targets are below vocab.
                unsafe {
                    landmark_cross_entropy(
                        logits_at,
                        dtype,
                        targets,
                        shares,
                        losses,
                        correct,
                        rows,
                        vocab,
                        pitch,
                        (wanted != Wanted::None).into(),
                        stream,
                    )
                }
            })?;
            if let Some(dx) = &dx {
                let dx_nc = Matrix::new(dx.address + row_bytes, dtype, rows, width);
                // SAFETY: as above.
                unsafe { product(device, logits_np, w_pc, dx_nc, None)? };
            }
            if let Some(dw) = &dw {
                let dw_lc = Matrix::new(dw.address, ElementType::F32, learn, width);
                let added = (from > 0).then_some(dw.address);
                let column = match wanted {
                    Wanted::OfXAndRow(row) => Some(logits.narrow(0, 0, rows)?.narrow(1, row, 1)?.contiguous()?),
                    _ => None,
                };
                let d_logits = match &column {
                    Some(column) => Matrix::new(address(OP, "logits", column)?, dtype, rows, 1),
                    None => Matrix::new(logits_at, dtype, rows, vocab).with_pitch(pitch),
                };
                // SAFETY: as above; the first chunk writes all of dw, the others add to it.
                unsafe { product(device, d_logits.t(), x_nc, dw_lc, added)? };
            }
        }
        Ok(Self {
            losses: losses.tensor(),
            correct: correct.map(Fresh::tensor),
            grads: dx.map(|dx| (dx.tensor(), dw.map(Fresh::tensor))),
        })
    }
}

unsafe extern "C" {
    fn landmark_cross_entropy(
        logits: Address,
        dtype: ElementType,
        targets: Address,
        shares: Address,
        losses: Address,
        correct: Address,
        rows: c_int,
        vocab: c_int,
        pitch: c_int,
        gradients: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_scale(x: Address, dtype: ElementType, factor: Address, n: i64, stream: *mut CudaStream_) -> c_int;
    fn landmark_sum(x: Address, out: Address, n: c_int, stream: *mut CudaStream_) -> c_int;
}
