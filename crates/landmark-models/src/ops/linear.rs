//! The affine map `x w^T + b`.

use candle_core::Tensor;

use super::elements::{Elements, check_shape, rows_and_width};
use super::math::Real;
use super::product::{Matrix, product};
use super::record::{Output, Tape};
use super::{by_dtype, on_gpu, rows};
use crate::{Error, Result};

/// `x w^T + b` for `x` `[.., in]`, `w` `[out, in]`, `b` `[out]`; returns `[.., out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    on_gpu!(x, super::cuda::linear(x, w, b));
    by_dtype!("linear", "x", x, typed(x, w, b))
}

fn typed<T: Real>(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (n, n_in) = rows_and_width(OP, "x", x)?;
    let n_out = check_weight(OP, "w", w, b, n_in)?;
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[Some(&x), Some(w), b].into_iter().flatten().collect::<Vec<_>>())?;
    let y = affine::<T>(OP, &Elements::of(OP, "x", &x)?, n, w, b)?;
    let shape = [&x.dims()[..x.rank() - 1], &[n_out]].concat();
    let (w, biased) = (w.clone(), b.is_some());
    tape.finish_one(Output::new(y, shape), move |dy| {
        let dy = Elements::<T>::of(OP, "dy", &dy)?;
        let x_ni = Elements::of(OP, "x", &x)?;
        let (dx, dw, db) = affine_backward(OP, &dy, &x_ni, n, &w, biased)?;
        let mut grads = vec![Tensor::from_vec(dx, x.dims(), x.device())?, Tensor::from_vec(dw, w.dims(), w.device())?];
        if let Some(db) = db {
            grads.push(Tensor::from_vec(db, n_out, w.device())?);
        }
        Ok(grads)
    })
}

/// Checks a weight `[out, n_in]` and its bias `[out]`; returns out.
pub(super) fn check_weight(
    op: &'static str,
    tensor: &'static str,
    w: &Tensor,
    b: Option<&Tensor>,
    n_in: usize,
) -> Result<usize> {
    let n_out = match *w.dims() {
        [n_out, width] if width == n_in && n_out > 0 => n_out,
        _ => {
            return Err(Error::Shape { op, tensor, got: w.dims().to_vec(), expected: format!("[out, {n_in}]") });
        }
    };
    if let Some(b) = b {
        check_shape(op, "bias", b, &[n_out])?;
    }
    Ok(n_out)
}

/// `y [n, out] = x [n, in] w^T + b`.
pub(super) fn affine<T: Real>(op: &'static str, x: &[T], n: usize, w: &Tensor, b: Option<&Tensor>) -> Result<Vec<T>> {
    let (n_out, n_in) = w.dims2()?;
    let mut y = product(Matrix::new(x, n, n_in), Matrix::new(&Elements::of(op, "w", w)?, n_out, n_in).t());
    if let Some(b) = b {
        rows::add_bias(&mut y, &Elements::of(op, "bias", b)?);
    }
    Ok(y)
}

/// `dx = dy w`, `dw = dy^T x`, `db = sum of the rows of dy`.
#[allow(clippy::type_complexity)]
pub(super) fn affine_backward<T: Real>(
    op: &'static str,
    dy: &[T],
    x: &[T],
    n: usize,
    w: &Tensor,
    biased: bool,
) -> Result<(Vec<T>, Vec<T>, Option<Vec<T>>)> {
    let (n_out, n_in) = w.dims2()?;
    let dy_no = Matrix::new(dy, n, n_out);
    let dx = product(dy_no, Matrix::new(&Elements::of(op, "w", w)?, n_out, n_in));
    let dw = product(dy_no.t(), Matrix::new(x, n, n_in));
    Ok((dx, dw, biased.then(|| rows::column_sums(dy, n_out))))
}
