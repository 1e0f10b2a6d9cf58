//! Normalisation over the last dimension.

use std::mem::MaybeUninit;

use candle_core::{DType, Tensor};

use super::elements::{Elements, check_shape, rows_and_width};
use super::math::{Real, sum_of};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use super::{by_dtype, on_gpu, rows};
use crate::{Error, Result};

const OP: &str = "norm";

/// What is normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `(x - mean) / sqrt(variance + 1e-5)`.
    Layer,
    /// `x / sqrt(mean of squares + eps)`.
    Rms {
        /// Keeps a row of zeros finite.
        eps: f64,
    },
}

impl NormKind {
    /// What is added to the variance.
    pub(super) fn eps(self) -> f64 {
        match self {
            Self::Layer => 1e-5,
            Self::Rms { eps } => eps,
        }
    }
}

/// `w xhat + b` over the last dimension of `x` `[.., C]`, with `w` and `b` `[C]` and `xhat` as `kind` says. The result is of type `dtype`,
/// which on the CPU is that of `x`.
pub fn norm(x: &Tensor, kind: NormKind, w: &Tensor, b: Option<&Tensor>, dtype: DType) -> Result<Tensor> {
    on_gpu!(x, super::cuda::norm(x, kind, w, b, dtype));
    if dtype != x.dtype() {
        return Err(Error::DType { op: OP, tensor: "dtype", got: dtype, expected: "that of x on the CPU".into() });
    }
    by_dtype!(OP, "x", x, typed(x, kind, w, b))
}

fn typed<T: Real>(x: &Tensor, kind: NormKind, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (n, width) = rows_and_width(OP, "x", x)?;
    check_shape(OP, "w", w, &[width])?;
    if let Some(b) = b {
        check_shape(OP, "bias", b, &[width])?;
    }
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[Some(&x), Some(w), b].into_iter().flatten().collect::<Vec<_>>())?;
    let mut y = {
        let (x, w) = (Elements::<T>::of(OP, "x", &x)?, Elements::<T>::of(OP, "w", w)?);
        let (x, w): (&[T], &[T]) = (&x, &w);
        // SAFETY: `normalise_rows` writes every element, `x` being as long as the result.
        unsafe { rows::fresh(n, width, |first, out| normalise_rows(&x[first * width..], kind, w, out)) }
    };
    if let Some(b) = b {
        rows::add_bias(&mut y, &Elements::<T>::of(OP, "bias", b)?);
    }
    let (w, biased, shape) = (w.clone(), b.is_some(), x.shape().clone());
    tape.finish_one(Output::new(y, shape), move |dy| {
        let (dx, dw, db) = {
            let (dy, x) = (Elements::<T>::of(OP, "dy", &dy)?, Elements::<T>::of(OP, "x", &x)?);
            let dx = input_gradient(&dy, &x, kind, &Elements::<T>::of(OP, "w", &w)?, n);
            (dx, weight_gradient(&dy, &x, kind, width), biased.then(|| rows::column_sums(&dy, width)))
        };
        let mut grads = vec![Tensor::from_vec(dx, x.dims(), x.device())?, Tensor::from_vec(dw, width, x.device())?];
        if let Some(db) = db {
            grads.push(Tensor::from_vec(db, width, x.device())?);
        }
        Ok(grads)
    })
}

/// Mean and `1 / sqrt(variance + eps)` of a row, the mean 0 if nothing is subtracted: two passes, since the row is in the nearest cache and the sum of squares
/// less the square of the sum loses digits. Cheap enough to take again in the backward pass.
#[inline(always)]
fn moments<T: Real>(x: &[T], kind: NormKind) -> (T, T) {
    let per = T::one() / T::from_f64(x.len() as f64);
    let mean = match kind {
        NormKind::Layer => sum_of(x.len(), |i| x[i]) * per,
        NormKind::Rms { .. } => T::zero(),
    };
    let variance = sum_of(x.len(), |i| (x[i] - mean) * (x[i] - mean)) * per;
    (mean, T::one() / (variance + T::from_f64(kind.eps())).sqrt())
}

fn input_gradient<T: Real>(dy: &[T], x: &[T], kind: NormKind, w: &[T], n: usize) -> Vec<T> {
    let width = w.len();
    let rows = |first: usize, out: &mut [MaybeUninit<T>]| {
        input_gradient_rows(&dy[first * width..], &x[first * width..], kind, w, out);
    };
    // SAFETY: `input_gradient_rows` writes every element, `dy` and `x` being as long as the result.
    unsafe { rows::fresh(n, width, rows) }
}

fn weight_gradient<T: Real>(dy: &[T], x: &[T], kind: NormKind, width: usize) -> Vec<T> {
    rows::sum(x.len() / width, width, |rows, dw| {
        let elements = rows.start * width..rows.end * width;
        weight_gradient_rows(&dy[elements.clone()], &x[elements], kind, dw);
    })
}

vectorised! {
    fn normalise_rows<T: Real>(x: &[T], kind: NormKind, w: &[T], out: &mut [MaybeUninit<T>]) {
        for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
            let (mean, scale) = moments(x, kind);
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(w) {
                out.write((x - mean) * scale * w);
            }
        }
    }
}

vectorised! {
    /// With `xhat = (x - mean) scale` and `g = dy w`: `dx = scale (g - mean(g) - xhat mean(g xhat))`; without a mean of x there is none of g.
    fn input_gradient_rows<T: Real>(dy: &[T], x: &[T], kind: NormKind, w: &[T], out: &mut [MaybeUninit<T>]) {
        let width = w.len();
        let per = T::one() / T::from_f64(width as f64);
        for ((x, dy), out) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(out.chunks_exact_mut(width)) {
            let (mean, scale) = moments(x, kind);
            let mean_g = match kind {
                NormKind::Layer => sum_of(width, |i| dy[i] * w[i]) * per,
                NormKind::Rms { .. } => T::zero(),
            };
            let mean_gx = sum_of(width, |i| dy[i] * w[i] * (x[i] - mean)) * scale * per;
            for (((out, &x), &dy), &w) in out.iter_mut().zip(x).zip(dy).zip(w) {
                out.write(scale * (dy * w - mean_g - (x - mean) * scale * mean_gx));
            }
        }
    }
}

vectorised! {
    /// `dw += sum over rows of dy xhat`.
    fn weight_gradient_rows<T: Real>(dy: &[T], x: &[T], kind: NormKind, dw: &mut [T]) {
        for (x, dy) in x.chunks_exact(dw.len()).zip(dy.chunks_exact(dw.len())) {
            let (mean, scale) = moments(x, kind);
            for ((dw, &x), &dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * ((x - mean) * scale);
            }
        }
    }
}
