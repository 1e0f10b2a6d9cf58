//! The feed-forward half of a layer: up, exact GELU, down, onto the residual stream. One operation, because its inner
//! activations are four times as wide as the stream and each edge of the graph would cost them a pass over memory.

use std::mem::MaybeUninit;

use candle_core::Tensor;

use super::dropout::{Dropout, add_residual, masked};
use super::elements::{Elements, check_shape, rows_and_width};
use super::linear::{affine, affine_backward, check_weight};
use super::math::Real;
use super::product::{Matrix, product};
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use super::{by_dtype, rows};
use crate::Result;

/// The parameters of [`mlp`].
#[derive(Debug, Clone)]
pub struct Mlp {
    /// Up, `[hidden, C]`.
    pub up: Tensor,
    /// Its bias, `[hidden]`.
    pub up_bias: Option<Tensor>,
    /// Down, `[C, hidden]`.
    pub down: Tensor,
    /// Its bias, `[C]`.
    pub down_bias: Option<Tensor>,
}

/// `residual + dropout(GELU(x up^T) down^T)` for `x` and `residual` `[.., C]`; returns `[.., C]`.
pub fn mlp(x: &Tensor, mlp: &Mlp, residual: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    by_dtype!("mlp", "x", x, typed(x, mlp, residual, dropout))
}

fn typed<T: Real>(x: &Tensor, mlp: &Mlp, residual: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    const OP: &str = "mlp";
    let (n, width) = rows_and_width(OP, "x", x)?;
    let hidden = check_weight(OP, "up", &mlp.up, mlp.up_bias.as_ref(), width)?;
    check_shape(OP, "down", &mlp.down, &[width, hidden])?;
    check_weight(OP, "down", &mlp.down, mlp.down_bias.as_ref(), hidden)?;
    check_shape(OP, "residual", residual, x.dims())?;
    let (x, residual, mlp) = (x.contiguous()?, residual.contiguous()?, mlp.clone());
    let inputs =
        [Some(&x), Some(&residual), Some(&mlp.up), Some(&mlp.down), mlp.up_bias.as_ref(), mlp.down_bias.as_ref()];
    let tape = Tape::new(OP, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let mut up_nh = affine::<T>(OP, &Elements::of(OP, "x", &x)?, n, &mlp.up, mlp.up_bias.as_ref())?;
    let mut y;
    if tape.tracked() {
        // The backward pass needs the GELU's input; its output is cheaper to take again than to keep.
        y = affine(OP, &gelu(&up_nh, hidden), n, &mlp.down, mlp.down_bias.as_ref())?;
    } else {
        rows::update(&mut up_nh, hidden, |_, x| gelu_in_place(x));
        y = affine(OP, &std::mem::take(&mut up_nh), n, &mlp.down, mlp.down_bias.as_ref())?;
    }
    add_residual(&mut y, &Elements::of(OP, "residual", &residual)?, width, dropout)?;
    let shape = x.shape().clone();
    tape.finish_one(Output::new(y, shape), move |dy| {
        let dy_nc = Elements::<T>::of(OP, "dy", &dy)?;
        let dropped = dropout.map(|dropout| masked(&dy_nc, width, dropout));
        let dz_nc: &[T] = dropped.as_deref().unwrap_or(&dy_nc);
        let dz = Matrix::new(dz_nc, n, width);
        let d_act = product(dz, Matrix::new(&Elements::of(OP, "down", &mlp.down)?, width, hidden));
        let (act_nh, d_up_nh) = gelu_backward(&up_nh, d_act, hidden);
        let d_down = product(dz.t(), Matrix::new(&act_nh, n, hidden));
        drop(act_nh);
        let (dx, d_up, d_up_bias) =
            affine_backward(OP, &d_up_nh, &Elements::of(OP, "x", &x)?, n, &mlp.up, mlp.up_bias.is_some())?;
        let mut grads = vec![
            Tensor::from_vec(dx, x.dims(), x.device())?,
            dy.clone(),
            Tensor::from_vec(d_up, mlp.up.dims(), x.device())?,
            Tensor::from_vec(d_down, mlp.down.dims(), x.device())?,
        ];
        if let Some(bias) = d_up_bias {
            grads.push(Tensor::from_vec(bias, hidden, x.device())?);
        }
        if mlp.down_bias.is_some() {
            grads.push(Tensor::from_vec(rows::column_sums(dz_nc, width), width, x.device())?);
        }
        Ok(grads)
    })
}

fn gelu<T: Real>(x: &[T], width: usize) -> Vec<T> {
    // SAFETY: `gelu_rows` writes every element, `x` being as long as the result.
    unsafe { rows::fresh(x.len() / width, width, |first, out| gelu_rows(&x[first * width..], out)) }
}

/// `(GELU(x), dy GELU'(x))`; the latter takes the place of `dy`.
fn gelu_backward<T: Real>(x: &[T], mut dy: Vec<T>, width: usize) -> (Vec<T>, Vec<T>) {
    assert_eq!(x.len(), dy.len());
    let rows = |first: usize, out: &mut [MaybeUninit<T>], dy: &mut [T]| {
        gelu_backward_rows(&x[first * width..], out, dy);
    };
    // SAFETY: `gelu_backward_rows` writes every element, `x` and `dy` being as long as the result.
    let act = unsafe { rows::fresh_beside(&mut dy, width, rows) };
    (act, dy)
}

vectorised! {
    fn gelu_rows<T: Real>(x: &[T], out: &mut [MaybeUninit<T>]) {
        out.iter_mut().zip(x).for_each(|(out, &x)| _ = out.write(x.gelu()))
    }
}

vectorised! {
    fn gelu_in_place<T: Real>(x: &mut [T]) {
        x.iter_mut().for_each(|x| *x = x.gelu())
    }
}

vectorised! {
    fn gelu_backward_rows<T: Real>(x: &[T], out: &mut [MaybeUninit<T>], dy: &mut [T]) {
        for ((out, dy), &x) in out.iter_mut().zip(dy).zip(x) {
            let (gelu, slope) = x.gelu_and_slope();
            out.write(gelu);
            *dy *= slope;
        }
    }
}
