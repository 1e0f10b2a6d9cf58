//! The loss of a language model straight from the last hidden states: logits, softmax and their gradients, a chunk of
//! positions at a time, so that the logits of a batch never exist at once.

use candle_core::Tensor;
use rayon::prelude::*;

use super::elements::{Elements, check_shape, ids, rows_and_width};
use super::linear::check_weight;
use super::math::{Real, max_of, sum_of};
use super::product::{Matrix, add_product, product, product_into};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use super::{by_dtype, on_gpu};
use crate::{Error, Result};

const OP: &str = "cross_entropy";

/// The target of a position that has no loss.
pub const IGNORE: u32 = u32::MAX;

/// Logits in memory at once: few enough to stay in the last cache, many enough for the products to run at full speed.
const CHUNK: usize = 1 << 22;

/// What a model made of one target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Minus the logarithm of the target's probability.
    pub loss: f64,
    /// Whether the target has the largest logit.
    pub correct: bool,
}

/// The mean, over the positions whose target is not [`IGNORE`], of the cross entropy of `x w^T`, for `x` `[.., C]`, `w` `[V, C]` and
/// `targets` `[..]` of u32. A scalar. `weights` `[..]` of f32, none negative, weigh the positions in that mean.
///
/// When a gradient can be asked for it is computed here, while the logits of a chunk are at hand; the backward pass
/// only scales it; none is computed of a `w` that is no variable.
pub fn cross_entropy(x: &Tensor, w: &Tensor, targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
    on_gpu!(x, super::cuda::cross_entropy(x, w, None, targets, weights));
    by_dtype!(OP, "x", x, loss(x, w, None, targets, weights))
}

/// The same for a `w` that does not learn but for one row, which stands in it and is given too: a variable `[1, C]`, and which row it is.
pub(crate) fn cross_entropy_with_row(
    x: &Tensor,
    w: &Tensor,
    row: (&Tensor, usize),
    targets: &Tensor,
    weights: Option<&Tensor>,
) -> Result<Tensor> {
    let &[vocab, width] = w.dims() else {
        return Err(Error::Shape { op: OP, tensor: "w", got: w.dims().to_vec(), expected: "[vocab, width]".into() });
    };
    check_shape(OP, "row", row.0, &[1, width])?;
    if row.1 >= vocab {
        let expected = format!("a row of {vocab}");
        return Err(Error::Value { op: OP, name: "row", got: row.1.to_string(), expected });
    }
    on_gpu!(x, super::cuda::cross_entropy(x, w, Some(row), targets, weights));
    by_dtype!(OP, "x", x, loss(x, w, Some(row), targets, weights))
}

/// The score of each position of `x w^T`, `None` where the target is [`IGNORE`]; arguments as for [`cross_entropy`], positions
/// in row-major order. No gradient.
pub fn token_scores(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
    on_gpu!(x, super::cuda::token_scores(x, w, targets));
    by_dtype!(OP, "x", x, scores(x, w, targets))
}

/// The same of x `[.., C]` on the CPU, of f32, whose logits `[n, vocab]` some other function gives: a chunk of positions at a time.
pub(crate) fn token_scores_by(
    x: &Tensor,
    targets: &Tensor,
    vocab: usize,
    logits: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Option<TokenScore>>> {
    let (n, width) = rows_and_width(OP, "x", x)?;
    let targets = checked_targets(x, vocab, targets)?;
    let (x, step) = (x.reshape((n, width))?, (CHUNK / vocab).clamp(1, n));
    let mut scores = Vec::with_capacity(n);
    for (chunk, targets) in targets.chunks(step).enumerate() {
        let logits = logits(&x.narrow(0, chunk * step, targets.len())?)?;
        scores.extend(score_rows(&Elements::<f32>::of(OP, "logits", &logits)?, vocab, targets));
    }
    Ok(scores)
}

/// The targets of `x`, all below `vocab` or [`IGNORE`].
fn checked_targets(x: &Tensor, vocab: usize, targets: &Tensor) -> Result<Vec<u32>> {
    check_shape(OP, "targets", targets, &x.dims()[..x.rank() - 1])?;
    let targets = ids(OP, "targets", targets)?;
    if let Some(id) = targets.iter().find(|&&id| id != IGNORE && id as usize >= vocab) {
        let expected = format!("ids below {vocab}, or IGNORE");
        return Err(Error::Value { op: OP, name: "targets", got: id.to_string(), expected });
    }
    Ok(targets)
}

pub(super) fn check(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<(usize, usize, usize, Vec<u32>)> {
    let (n, width) = rows_and_width(OP, "x", x)?;
    let vocab = check_weight(OP, "w", w, None, width)?;
    let targets = checked_targets(x, vocab, targets)?;
    Ok((n, width, vocab, targets))
}

/// The share of each position in the mean: 0 where there is no target, 1 in all.
pub(super) fn shares(targets: &[u32], weights: Option<&Tensor>, shape: &[usize]) -> Result<Vec<f64>> {
    let mut shares = match weights {
        None => vec![1.; targets.len()],
        Some(weights) => {
            check_shape(OP, "weights", weights, shape)?;
            weights.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect()
        }
    };
    if let Some(weight) = shares.iter().find(|weight| !(0. ..f64::INFINITY).contains(*weight)) {
        let expected = "numbers from 0".to_string();
        return Err(Error::Value { op: OP, name: "weights", got: weight.to_string(), expected });
    }
    let masked = |(share, target): (&mut f64, &u32)| -> f64 {
        if *target == IGNORE {
            *share = 0.;
        }
        *share
    };
    let total: f64 = shares.iter_mut().zip(targets).map(masked).sum();
    if total == 0. {
        let expected = "a target of some weight at one position at least".to_string();
        return Err(Error::Value { op: OP, name: "targets", got: "IGNORE or weight 0 everywhere".into(), expected });
    }
    shares.iter_mut().for_each(|share| *share /= total);
    Ok(shares)
}

fn loss<T: Real>(
    x: &Tensor,
    w: &Tensor,
    row: Option<(&Tensor, usize)>,
    targets: &Tensor,
    weights: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = targets.dims();
    let (n, width, vocab, targets) = check(x, w, targets)?;
    let shares = shares(&targets, weights, shape)?;
    let x = x.contiguous()?;
    let learner = row.map_or(w, |(row, _)| row);
    let tape = Tape::new(OP, &[&x, learner])?;
    let learns = tape.tracked() && tape.wants(learner);
    let (loss, grads) = {
        let (x_nc, w_vc) = (Elements::<T>::of(OP, "x", &x)?, Elements::<T>::of(OP, "w", w)?);
        let w_vc = Matrix::new(&w_vc, vocab, width);
        let step = (CHUNK / vocab).clamp(1, n);
        let (mut dx, mut dw) = match tape.tracked() {
            true => (vec![T::zero(); n * width], vec![T::zero(); if learns { learner.elem_count() } else { 0 }]),
            false => (Vec::new(), Vec::new()),
        };
        let mut total = 0.;
        let chunks = targets.chunks(step).zip(shares.chunks(step)).zip(x_nc.chunks(step * width));
        for (chunk, ((targets, shares), x_rows)) in chunks.enumerate() {
            let x = Matrix::new(x_rows, targets.len(), width);
            let mut logits = product(x, w_vc.t());
            if !tape.tracked() {
                let scores = score_rows(&logits, vocab, targets);
                total += scores
                    .iter()
                    .zip(shares)
                    .filter_map(|(score, share)| Some(score.as_ref()?.loss * share))
                    .sum::<f64>();
                continue;
            }
            total += softmax_less_target(&mut logits, vocab, targets, shares);
            let d_logits = Matrix::new(&logits, targets.len(), vocab);
            match row {
                _ if !learns => {}
                None => add_product(&mut dw, d_logits.t(), x),
                Some((_, row)) => {
                    for (x, d_logits) in x_rows.chunks(width).zip(logits.chunks(vocab)) {
                        dw.iter_mut().zip(x).for_each(|(dw, &x)| *dw += d_logits[row] * x);
                    }
                }
            }
            product_into(&mut dx[chunk * step * width..][..targets.len() * width], d_logits, w_vc);
        }
        (total, (dx, dw))
    };
    let (x_shape, w_shape, device) = (x.shape().clone(), learner.shape().clone(), x.device().clone());
    let grads = match tape.tracked() {
        true => {
            let (dx, dw) = grads;
            let dw = if learns { Tensor::from_vec(dw, w_shape, &device)? } else { learner.detach() };
            Some((Tensor::from_vec(dx, x_shape, &device)?, dw))
        }
        false => None,
    };
    tape.finish_one(Output::new(vec![T::from_f64(loss)], ()), move |grad| {
        let (dx, dw) = grads.as_ref().expect("kept for every loss that has a gradient");
        let scale = grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        Ok(match scale {
            1. => vec![dx.clone(), dw.clone()],
            scale if !learns => vec![dx.affine(scale, 0.)?, dw.clone()],
            scale => vec![dx.affine(scale, 0.)?, dw.affine(scale, 0.)?],
        })
    })
}

fn scores<T: Real>(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
    let (n, width, vocab, targets) = check(x, w, targets)?;
    let x = x.contiguous()?;
    let (x_nc, w_vc) = (Elements::<T>::of(OP, "x", &x)?, Elements::<T>::of(OP, "w", w)?);
    let step = (CHUNK / vocab).clamp(1, n);
    let mut scores = Vec::with_capacity(n);
    for (targets, x) in targets.chunks(step).zip(x_nc.chunks(step * width)) {
        let logits = product(Matrix::new(x, targets.len(), width), Matrix::new(&w_vc, vocab, width).t());
        scores.extend(score_rows(&logits, vocab, targets));
    }
    Ok(scores)
}

fn score_rows<T: Real>(logits: &[T], vocab: usize, targets: &[u32]) -> Vec<Option<TokenScore>> {
    let score = |logits: &[T], target: u32| {
        let (max, sum) = max_and_sum(logits);
        let target = logits[target as usize];
        TokenScore { loss: real(max - target) + real(sum).ln(), correct: target >= max }
    };
    let rows = logits.par_chunks(vocab).zip(targets);
    rows.map(|(logits, &target)| (target != IGNORE).then(|| score(logits, target))).collect()
}

/// Turns logits into the gradient of the mean loss, `share (softmax - 1 at the target)`, and returns the positions' part of that loss.
fn softmax_less_target<T: Real>(logits: &mut [T], vocab: usize, targets: &[u32], shares: &[f64]) -> f64 {
    let row = |logits: &mut [T], target: u32, share: f64| -> f64 {
        let per = T::from_f64(share);
        if target == IGNORE {
            logits.fill(T::zero());
            return 0.;
        }
        let at_target = logits[target as usize];
        let (max, sum) = scaled_softmax(logits, per);
        logits[target as usize] -= per;
        share * (real(max - at_target) + real(sum).ln())
    };
    let rows = logits.par_chunks_mut(vocab).zip(targets).zip(shares);
    let losses: Vec<f64> = rows.map(|((logits, &target), &share)| row(logits, target, share)).collect();
    losses.iter().sum()
}

vectorised! {
    /// The largest logit, and the sum of all `e^(x - largest)`.
    fn max_and_sum<T: Real>(logits: &[T]) -> (T, T) {
        let max = max_of(logits);
        (max, sum_of(logits.len(), |i| (logits[i] - max).fast_exp()))
    }
}

vectorised! {
    /// Turns logits into `per softmax(logits)`; returns what [`max_and_sum`] does.
    fn scaled_softmax<T: Real>(logits: &mut [T], per: T) -> (T, T) {
        let max = max_of(logits);
        logits.iter_mut().for_each(|x| *x = (*x - max).fast_exp());
        let sum = sum_of(logits.len(), |i| logits[i]);
        let scale = per / sum;
        logits.iter_mut().for_each(|x| *x *= scale);
        (max, sum)
    }
}

fn real<T: Real>(x: T) -> f64 {
    candle_core::WithDType::to_f64(x)
}
