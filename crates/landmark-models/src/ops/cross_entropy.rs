//! The loss of a language model straight from the last hidden states: logits, softmax and their gradients, a chunk of
//! positions at a time, so that the logits of a batch never exist at once.

use candle_core::Tensor;
use rayon::prelude::*;

use super::by_dtype;
use super::elements::{Elements, check_shape, ids, rows_and_width};
use super::linear::check_weight;
use super::math::{Real, max_of, sum_of};
use super::product::{Matrix, add_product, product, product_into};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
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
/// `targets` `[..]` of u32. A scalar.
///
/// When a gradient can be asked for it is computed here, while the logits of a chunk are at hand; the backward pass
/// only scales it.
pub fn cross_entropy(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Tensor> {
    by_dtype!(OP, "x", x, loss(x, w, targets))
}

/// The score of each position of `x w^T`, `None` where the target is [`IGNORE`]; arguments as for [`cross_entropy`], positions
/// in row-major order. No gradient.
pub fn token_scores(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Vec<Option<TokenScore>>> {
    by_dtype!(OP, "x", x, scores(x, w, targets))
}

fn check(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<(usize, usize, usize, Vec<u32>)> {
    let (n, width) = rows_and_width(OP, "x", x)?;
    let vocab = check_weight(OP, "w", w, None, width)?;
    check_shape(OP, "targets", targets, &x.dims()[..x.rank() - 1])?;
    let targets = ids(OP, "targets", targets)?;
    if let Some(id) = targets.iter().find(|&&id| id != IGNORE && id as usize >= vocab) {
        let expected = format!("ids below {vocab}, or IGNORE");
        return Err(Error::Value { op: OP, name: "targets", got: id.to_string(), expected });
    }
    Ok((n, width, vocab, targets))
}

fn loss<T: Real>(x: &Tensor, w: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, width, vocab, targets) = check(x, w, targets)?;
    let counted = targets.iter().filter(|&&t| t != IGNORE).count();
    if counted == 0 {
        let expected = "a target at one position at least".to_string();
        return Err(Error::Value { op: OP, name: "targets", got: "IGNORE everywhere".into(), expected });
    }
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[&x, w])?;
    let (loss, grads) = {
        let (x_nc, w_vc) = (Elements::<T>::of(OP, "x", &x)?, Elements::<T>::of(OP, "w", w)?);
        let w_vc = Matrix::new(&w_vc, vocab, width);
        let step = (CHUNK / vocab).clamp(1, n);
        let (mut dx, mut dw) = match tape.tracked() {
            true => (vec![T::zero(); n * width], vec![T::zero(); vocab * width]),
            false => (Vec::new(), Vec::new()),
        };
        let mut total = 0.;
        for (chunk, (targets, x)) in targets.chunks(step).zip(x_nc.chunks(step * width)).enumerate() {
            let x = Matrix::new(x, targets.len(), width);
            let mut logits = product(x, w_vc.t());
            if !tape.tracked() {
                total += score_rows(&logits, vocab, targets).iter().flatten().map(|s| s.loss).sum::<f64>();
                continue;
            }
            total += softmax_less_target(&mut logits, vocab, targets, counted);
            let d_logits = Matrix::new(&logits, targets.len(), vocab);
            add_product(&mut dw, d_logits.t(), x);
            product_into(&mut dx[chunk * step * width..][..targets.len() * width], d_logits, w_vc);
        }
        (total / counted as f64, (dx, dw))
    };
    let (x_shape, w_shape, device) = (x.shape().clone(), w.shape().clone(), x.device().clone());
    let grads = match tape.tracked() {
        true => {
            let (dx, dw) = grads;
            Some((Tensor::from_vec(dx, x_shape, &device)?, Tensor::from_vec(dw, w_shape, &device)?))
        }
        false => None,
    };
    tape.finish_one(Output::new(vec![T::from_f64(loss)], ()), move |grad| {
        let (dx, dw) = grads.as_ref().expect("kept for every loss that has a gradient");
        let scale = grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        Ok(match scale {
            1. => vec![dx.clone(), dw.clone()],
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

/// Turns logits into the gradient of the mean loss, `(softmax - 1 at the target) / counted`, and returns the summed loss.
fn softmax_less_target<T: Real>(logits: &mut [T], vocab: usize, targets: &[u32], counted: usize) -> f64 {
    let per = T::one() / T::from_f64(counted as f64);
    let row = |logits: &mut [T], target: u32| -> f64 {
        if target == IGNORE {
            logits.fill(T::zero());
            return 0.;
        }
        let at_target = logits[target as usize];
        let (max, sum) = scaled_softmax(logits, per);
        logits[target as usize] -= per;
        real(max - at_target) + real(sum).ln()
    };
    let losses: Vec<f64> =
        logits.par_chunks_mut(vocab).zip(targets).map(|(logits, &target)| row(logits, target)).collect();
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
