//! The feed-forward half of a layer: up, activation, down, onto the residual stream. One operation, because its inner
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
use super::{by_dtype, on_gpu, rows};
use crate::Result;

const OP: &str = "mlp";

/// What is between up and down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The exact GELU.
    Gelu,
    /// `SiLU(g) u`, of which `g` are the first half of the rows of up and `u` the second (Shazeer, 2020).
    Swiglu,
}

impl Activation {
    /// Rows of up for each column of down.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Gelu => 1,
            Self::Swiglu => 2,
        }
    }
}

/// The parameters of [`mlp`].
#[derive(Debug, Clone)]
pub struct Mlp {
    /// What is between up and down.
    pub activation: Activation,
    /// Up, `[hidden, C]`, or `[2 hidden, C]` for SwiGLU.
    pub up: Tensor,
    /// Its bias, `[hidden]` or `[2 hidden]`.
    pub up_bias: Option<Tensor>,
    /// Down, `[C, hidden]`.
    pub down: Tensor,
    /// Its bias, `[C]`.
    pub down_bias: Option<Tensor>,
}

/// `residual + dropout(activation(x up^T) down^T)` for `x` and `residual` `[.., C]`; returns `[.., C]`.
pub fn mlp(x: &Tensor, mlp: &Mlp, residual: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    on_gpu!(x, super::cuda::mlp(x, mlp, residual, dropout));
    by_dtype!("mlp", "x", x, typed(x, mlp, residual, dropout))
}

/// `SiLU(gate) up`, element by element, for gate and up of a shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on_gpu!(gate, super::cuda::swiglu(gate, up));
    by_dtype!("swiglu", "gate", gate, swiglu_of_two(gate, up))
}

fn swiglu_of_two<T: Real>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    let (n, width) = rows_and_width(OP, "gate", gate)?;
    check_shape(OP, "up", up, gate.dims())?;
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let tape = Tape::new(OP, &[&gate, &up])?;
    let y = {
        let (gate, up) = (Elements::<T>::of(OP, "gate", &gate)?, Elements::<T>::of(OP, "up", &up)?);
        let (gate, up): (&[T], &[T]) = (&gate, &up);
        // SAFETY: `swiglu_elements` writes every element, gate and up being as long as the result.
        unsafe { rows::fresh(n, width, |first, y| swiglu_elements(&gate[first * width..], &up[first * width..], y)) }
    };
    let shape = gate.shape().clone();
    tape.finish_one(Output::new(y, shape), move |dy| {
        let (d_gate, d_up) = {
            let (gate, up) = (Elements::<T>::of(OP, "gate", &gate)?, Elements::<T>::of(OP, "up", &up)?);
            let (gate, up): (&[T], &[T]) = (&gate, &up);
            let mut d_up = Elements::<T>::of(OP, "dy", &dy)?.to_vec();
            let rows = |first: usize, d_gate: &mut [MaybeUninit<T>], d_up: &mut [T]| {
                swiglu_gradient_elements(&gate[first * width..], &up[first * width..], d_gate, d_up);
            };
            // SAFETY: `swiglu_gradient_elements` writes every element of d_gate, all being of one length.
            let d_gate = unsafe { rows::fresh_beside(&mut d_up, width, rows) };
            (d_gate, d_up)
        };
        let tensor = |x: Vec<T>| Tensor::from_vec(x, gate.dims(), gate.device());
        Ok(vec![tensor(d_gate)?, tensor(d_up)?])
    })
}

vectorised! {
    fn swiglu_elements<T: Real>(gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            out.write(gate * gate.sigmoid() * up);
        }
    }
}

vectorised! {
    /// As [`swiglu_gradient_rows`]; the gradient of up takes the place of `dy`.
    fn swiglu_gradient_elements<T: Real>(gate: &[T], up: &[T], d_gate: &mut [MaybeUninit<T>], dy: &mut [T]) {
        for (((d_gate, dy), &gate), &up) in d_gate.iter_mut().zip(dy).zip(gate).zip(up) {
            let s = gate.sigmoid();
            d_gate.write(*dy * up * s * (T::one() + gate * (T::one() - s)));
            *dy = *dy * gate * s;
        }
    }
}

impl Mlp {
    /// Checks the shapes for `x` of this width; returns the rows of up and the columns of down.
    pub(super) fn check(&self, width: usize) -> Result<(usize, usize)> {
        let up_rows = check_weight(OP, "up", &self.up, self.up_bias.as_ref(), width)?;
        let hidden = up_rows / self.activation.rows();
        check_shape(OP, "up", &self.up, &[hidden * self.activation.rows(), width])?;
        check_shape(OP, "down", &self.down, &[width, hidden])?;
        check_weight(OP, "down", &self.down, self.down_bias.as_ref(), hidden)?;
        Ok((up_rows, hidden))
    }
}

fn typed<T: Real>(x: &Tensor, mlp: &Mlp, residual: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let (n, width) = rows_and_width(OP, "x", x)?;
    let (up_rows, hidden) = mlp.check(width)?;
    check_shape(OP, "residual", residual, x.dims())?;
    let (x, residual, mlp) = (x.contiguous()?, residual.contiguous()?, mlp.clone());
    let inputs =
        [Some(&x), Some(&residual), Some(&mlp.up), Some(&mlp.down), mlp.up_bias.as_ref(), mlp.down_bias.as_ref()];
    let tape = Tape::new(OP, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let mut up_nh = affine::<T>(OP, &Elements::of(OP, "x", &x)?, n, &mlp.up, mlp.up_bias.as_ref())?;
    let mut y;
    if tape.tracked() || mlp.activation == Activation::Swiglu {
        // The backward pass needs the activation's input; its output is cheaper to take again than to keep.
        y = affine(OP, &activate(mlp.activation, &up_nh, hidden), n, &mlp.down, mlp.down_bias.as_ref())?;
    } else {
        rows::update(&mut up_nh, hidden, |_, x| gelu_in_place(x));
        y = affine(OP, &std::mem::take(&mut up_nh), n, &mlp.down, mlp.down_bias.as_ref())?;
    }
    if !tape.tracked() {
        up_nh = Vec::new();
    }
    add_residual(&mut y, &Elements::of(OP, "residual", &residual)?, width, dropout)?;
    let shape = x.shape().clone();
    tape.finish_one(Output::new(y, shape), move |dy| {
        let dy_nc = Elements::<T>::of(OP, "dy", &dy)?;
        let dropped = dropout.map(|dropout| masked(&dy_nc, width, dropout));
        let dz_nc: &[T] = dropped.as_deref().unwrap_or(&dy_nc);
        let dz = Matrix::new(dz_nc, n, width);
        let d_act = product(dz, Matrix::new(&Elements::of(OP, "down", &mlp.down)?, width, hidden));
        let (act_nh, d_up_nh) = match mlp.activation {
            Activation::Gelu => gelu_backward(&up_nh, d_act, hidden),
            Activation::Swiglu => swiglu_backward(&up_nh, d_act, hidden),
        };
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
            grads.push(Tensor::from_vec(bias, up_rows, x.device())?);
        }
        if mlp.down_bias.is_some() {
            grads.push(Tensor::from_vec(rows::column_sums(dz_nc, width), width, x.device())?);
        }
        Ok(grads)
    })
}

fn activate<T: Real>(activation: Activation, up: &[T], width: usize) -> Vec<T> {
    let n = up.len() / (activation.rows() * width);
    // SAFETY: the functions write every element, `up` being as long as the result, or twice as long.
    unsafe {
        match activation {
            Activation::Gelu => rows::fresh(n, width, |first, out| gelu_rows(&up[first * width..], out)),
            Activation::Swiglu => rows::fresh(n, width, |first, out| swiglu_rows(&up[2 * first * width..], width, out)),
        }
    }
}

/// `SiLU(g) u`, and the gradient of `[g, u]`; `dy` is used up.
fn swiglu_backward<T: Real>(up: &[T], mut dy: Vec<T>, width: usize) -> (Vec<T>, Vec<T>) {
    // SAFETY: `swiglu_gradient_rows` writes every element, `up` being as long as the result and `dy` half as long.
    let d_up = unsafe {
        rows::fresh(dy.len() / width, 2 * width, |first, out| {
            swiglu_gradient_rows(&up[2 * first * width..], &dy[first * width..], width, out)
        })
    };
    // The activations take the place of their gradient.
    rows::update(&mut dy, width, |first, act| swiglu_rows_over(&up[2 * first * width..], width, act));
    (dy, d_up)
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

vectorised! {
    fn swiglu_rows<T: Real>(up: &[T], width: usize, out: &mut [MaybeUninit<T>]) {
        for (up, out) in up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = up.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                out.write(gate * gate.sigmoid() * up);
            }
        }
    }
}

vectorised! {
    fn swiglu_rows_over<T: Real>(up: &[T], width: usize, out: &mut [T]) {
        for (up, out) in up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = up.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * gate.sigmoid() * up;
            }
        }
    }
}

vectorised! {
    /// With `s` the sigmoid of the gate `g`: `dg = dy u s (1 + g (1 - s))`, `du = dy g s`.
    fn swiglu_gradient_rows<T: Real>(up: &[T], dy: &[T], width: usize, out: &mut [MaybeUninit<T>]) {
        for ((up, dy), out) in up.chunks_exact(2 * width).zip(dy.chunks_exact(width)).zip(out.chunks_exact_mut(2 * width)) {
            let ((gate, up), (d_gate, d_up)) = (up.split_at(width), out.split_at_mut(width));
            for i in 0..width {
                let s = gate[i].sigmoid();
                d_gate[i].write(dy[i] * up[i] * s * (T::one() + gate[i] * (T::one() - s)));
                d_up[i].write(dy[i] * gate[i] * s);
            }
        }
    }
}
