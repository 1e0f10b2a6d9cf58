//! The affine map `x w^T + b`, alone and onto the residual stream.

use candle_core::Tensor;

use super::dropout::add_residual;
use super::elements::{Elements, check_shape, rows_and_width};
use super::math::Real;
use super::product::{Matrix, product};
use super::record::{Output, Tape};
use super::{by_dtype, on_gpu, rows, scaled};
use crate::{Error, Result};

/// `x w^T + b` for `x` `[.., in]`, `w` `[out, in]`, `b` `[out]`; returns `[.., out]`. No gradient is computed of a `w` that is no variable.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    on_gpu!(x, super::cuda::linear(x, w, b, None));
    by_dtype!("linear", "x", x, typed(x, w, b, None))
}

/// `residual + x w^T + b`, arguments as for [`linear`], `residual` `[.., out]`.
pub fn linear_onto(x: &Tensor, w: &Tensor, b: Option<&Tensor>, residual: &Tensor) -> Result<Tensor> {
    on_gpu!(x, super::cuda::linear(x, w, b, Some(residual)));
    by_dtype!("linear_onto", "x", x, typed(x, w, b, Some(residual)))
}

/// An affine map, with a change of low rank or without.
#[derive(Clone, Copy)]
pub(crate) struct Map<'t> {
    /// `[out, in]`.
    pub w: &'t Tensor,
    /// `[out]`.
    pub b: Option<&'t Tensor>,
    /// What is added to it.
    pub low: Option<LowRank<'t>>,
}

/// `scale * b a`, for `a` `[r, in]` and `b` `[out, r]`.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'t> {
    pub a: &'t Tensor,
    pub b: &'t Tensor,
    pub scale: f64,
}

/// What each map makes of x, as [`linear`]; of one map alone also added to a residual, as [`linear_onto`].
pub(crate) fn linears<const N: usize>(
    x: &Tensor,
    maps: [Map<'_>; N],
    residual: Option<&Tensor>,
) -> Result<[Tensor; N]> {
    on_gpu!(x, super::cuda::linears(x, maps, residual));
    let one = |Map { w, b, low }: Map<'_>| {
        let y = match residual {
            Some(residual) => linear_onto(x, w, b, residual)?,
            None => linear(x, w, b)?,
        };
        match low {
            Some(low) => low.onto(x, &y),
            None => Ok(y),
        }
    };
    let ys = maps.into_iter().map(one).collect::<Result<Vec<_>>>()?;
    Ok(ys.try_into().expect("one for each map"))
}

impl LowRank<'_> {
    /// `y` and what this makes of x.
    pub fn onto(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let low = scaled(&linear(x, self.a, None)?, self.scale)?;
        linear_onto(&low, self.b, None, y)
    }
}

fn typed<T: Real>(x: &Tensor, w: &Tensor, b: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (n, n_in) = rows_and_width(OP, "x", x)?;
    let n_out = check_weight(OP, "w", w, b, n_in)?;
    let shape = [&x.dims()[..x.rank() - 1], &[n_out]].concat();
    let x = x.contiguous()?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let inputs = [Some(&x), Some(w), b, residual.as_ref()];
    let tape = Tape::new(OP, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let mut y = affine::<T>(OP, &Elements::of(OP, "x", &x)?, n, w, b)?;
    if let Some(residual) = &residual {
        check_shape(OP, "residual", residual, &shape)?;
        add_residual(&mut y, &Elements::of(OP, "residual", residual)?, n_out, None)?;
    }
    let (biased, adds, learns) = (b.is_some(), residual.is_some(), tape.wants(w));
    let w = w.clone();
    tape.finish_one(Output::new(y, shape), move |dy| {
        let dy_no = Elements::<T>::of(OP, "dy", &dy)?;
        let dx = input_gradient(OP, &dy_no, n, &w)?;
        let dw = if learns {
            let dw = weight_gradient(&dy_no, &Elements::of(OP, "x", &x)?, n, &w)?;
            Tensor::from_vec(dw, w.dims(), w.device())?
        } else {
            w.clone()
        };
        let mut grads = vec![Tensor::from_vec(dx, x.dims(), x.device())?, dw];
        if biased {
            grads.push(Tensor::from_vec(rows::column_sums(&dy_no, n_out), n_out, w.device())?);
        }
        if adds {
            grads.push(dy.clone());
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
    let dx = input_gradient(op, dy, n, w)?;
    Ok((dx, weight_gradient(dy, x, n, w)?, biased.then(|| rows::column_sums(dy, w.dims()[0]))))
}

/// `dx = dy w`.
fn input_gradient<T: Real>(op: &'static str, dy: &[T], n: usize, w: &Tensor) -> Result<Vec<T>> {
    let (n_out, n_in) = w.dims2()?;
    Ok(product(Matrix::new(dy, n, n_out), Matrix::new(&Elements::of(op, "w", w)?, n_out, n_in)))
}

/// `dw = dy^T x`.
fn weight_gradient<T: Real>(dy: &[T], x: &[T], n: usize, w: &Tensor) -> Result<Vec<T>> {
    let (n_out, n_in) = w.dims2()?;
    Ok(product(Matrix::new(dy, n, n_out).t(), Matrix::new(x, n, n_in)))
}
