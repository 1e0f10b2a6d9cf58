//! The projections around attention: into heads, and back out of them onto the residual stream.
//!
//! Legend: B batch, T time, C model width, H heads, D head_dim; `N = B T`, and heads are laid out `[B, H, T, D]`, the layout that
//! attention reads in runs.

use std::mem::MaybeUninit;

use candle_core::Tensor;

use super::dropout::{Dropout, add_residual, masked};
use super::elements::{Elements, check_shape};
use super::linear::{affine, affine_backward, check_weight};
use super::math::Real;
use super::record::{Output, Tape};
use super::{by_dtype, on_gpu, rows};
use crate::{Error, Result};

/// Queries, keys and values `[B, H, T, D]` of `x` `[B, T, C]`: the rows of `w` `[3 H D, C]` and `b` `[3 H D]` are q, then k,
/// then v, each head by head.
pub fn project_heads(x: &Tensor, w: &Tensor, b: Option<&Tensor>, heads: usize) -> Result<[Tensor; 3]> {
    on_gpu!(x, super::cuda::project_heads(x, w, b, heads));
    by_dtype!("project_heads", "x", x, project(x, w, b, heads))
}

fn project<T: Real>(x: &Tensor, w: &Tensor, b: Option<&Tensor>, heads: usize) -> Result<[Tensor; 3]> {
    const OP: &str = "project_heads";
    let layout = Layout::of_projection(OP, x, w, b, heads)?;
    let Layout { batch, time, dim, .. } = layout;
    let n_out = 3 * heads * dim;
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[Some(&x), Some(w), b].into_iter().flatten().collect::<Vec<_>>())?;
    let y_no = affine::<T>(OP, &Elements::of(OP, "x", &x)?, batch * time, w, b)?;
    let part = |i| Output::new(layout.split(&y_no, n_out, i * n_out / 3), &layout.dims());
    let outputs = [part(0), part(1), part(2)];
    let (w, biased) = (w.clone(), b.is_some());
    tape.finish(outputs, move |grads| {
        let parts = grads.iter().map(|g| g.as_ref().map(|g| Elements::<T>::of(OP, "grad", g)).transpose());
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let dy_no = layout.merge(&parts.iter().map(|p| p.as_deref()).collect::<Vec<_>>());
        let (dx, dw, db) = affine_backward(OP, &dy_no, &Elements::of(OP, "x", &x)?, batch * time, &w, biased)?;
        let mut grads = vec![Tensor::from_vec(dx, x.dims(), x.device())?, Tensor::from_vec(dw, w.dims(), w.device())?];
        if let Some(db) = db {
            grads.push(Tensor::from_vec(db, n_out, w.device())?);
        }
        Ok(grads)
    })
}

/// `residual + dropout(o w^T + b)` for the heads' outputs `o` `[B, H, T, D]`, `w` `[C, H D]`, `residual` `[B, T, C]`; returns
/// `[B, T, C]`.
pub fn merge_heads(
    o: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    residual: &Tensor,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    on_gpu!(o, super::cuda::merge_heads(o, w, b, residual, dropout));
    by_dtype!("merge_heads", "o", o, merge(o, w, b, residual, dropout))
}

fn merge<T: Real>(
    o: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    residual: &Tensor,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    const OP: &str = "merge_heads";
    let layout = Layout::of_heads(OP, o)?;
    let Layout { batch, heads, time, dim } = layout;
    let (n, n_in) = (batch * time, heads * dim);
    let n_out = check_weight(OP, "w", w, b, n_in)?;
    check_shape(OP, "residual", residual, &[batch, time, n_out])?;
    let (o, residual) = (o.contiguous()?, residual.contiguous()?);
    let tape = Tape::new(OP, &[Some(&o), Some(&residual), Some(w), b].into_iter().flatten().collect::<Vec<_>>())?;
    let x_ni = layout.merge(&[Some(&*Elements::<T>::of(OP, "o", &o)?)]);
    let mut y = affine(OP, &x_ni, n, w, b)?;
    add_residual(&mut y, &Elements::of(OP, "residual", &residual)?, n_out, dropout)?;
    let (w, biased) = (w.clone(), b.is_some());
    let x_ni = if tape.tracked() { x_ni } else { Vec::new() };
    tape.finish_one(Output::new(y, (batch, time, n_out)), move |dy| {
        let dy_no = Elements::<T>::of(OP, "dy", &dy)?;
        let (dx, dw, db) = match dropout {
            Some(dropout) => affine_backward(OP, &masked(&dy_no, n_out, dropout), &x_ni, n, &w, biased)?,
            None => affine_backward(OP, &dy_no, &x_ni, n, &w, biased)?,
        };
        let d_o = layout.split(&dx, n_in, 0);
        let d_o = Tensor::from_vec(d_o, &layout.dims(), o.device())?;
        let mut grads = vec![d_o, dy.clone(), Tensor::from_vec(dw, w.dims(), w.device())?];
        if let Some(db) = db {
            grads.push(Tensor::from_vec(db, n_out, w.device())?);
        }
        Ok(grads)
    })
}

/// `x` `[B, T, H D]` as heads `[B, H, T, D]`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    const OP: &str = "split_heads";
    let layout = match *x.dims() {
        [batch, time, width] if heads > 0 && width % heads == 0 && x.elem_count() > 0 => {
            Layout { batch, heads, time, dim: width / heads }
        }
        _ => {
            let expected = format!("[batch, time, a multiple of {heads} heads]");
            return Err(Error::Shape { op: OP, tensor: "x", got: x.dims().to_vec(), expected });
        }
    };
    on_gpu!(x, super::cuda::split_heads(x, layout));
    by_dtype!(OP, "x", x, split(x, layout))
}

fn split<T: Real>(x: &Tensor, layout: Layout) -> Result<Tensor> {
    const OP: &str = "split_heads";
    let (x, width) = (x.contiguous()?, layout.heads * layout.dim);
    let tape = Tape::new(OP, &[&x])?;
    let heads = layout.split(&Elements::<T>::of(OP, "x", &x)?, width, 0);
    let (shape, device) = (x.shape().clone(), x.device().clone());
    tape.finish_one(Output::new(heads, &layout.dims()), move |dy| {
        let dx = layout.merge(&[Some(&*Elements::<T>::of(OP, "dy", &dy)?)]);
        Ok(vec![Tensor::from_vec(dx, &shape, &device)?])
    })
}

/// Heads `[B, H, T, D]` as `[B, T, H D]`.
pub fn join_heads(o: &Tensor) -> Result<Tensor> {
    const OP: &str = "join_heads";
    let layout = Layout::of_heads(OP, o)?;
    on_gpu!(o, super::cuda::join_heads(o, layout));
    by_dtype!(OP, "o", o, join(o, layout))
}

fn join<T: Real>(o: &Tensor, layout: Layout) -> Result<Tensor> {
    const OP: &str = "join_heads";
    let (o, width) = (o.contiguous()?, layout.heads * layout.dim);
    let tape = Tape::new(OP, &[&o])?;
    let joined = layout.merge(&[Some(&*Elements::<T>::of(OP, "o", &o)?)]);
    let device = o.device().clone();
    tape.finish_one(Output::new(joined, (layout.batch, layout.time, width)), move |dy| {
        let d_o = layout.split(&Elements::<T>::of(OP, "dy", &dy)?, width, 0);
        Ok(vec![Tensor::from_vec(d_o, &layout.dims(), &device)?])
    })
}

/// The sizes of `[B, H, T, D]`.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub batch: usize,
    pub heads: usize,
    pub time: usize,
    pub dim: usize,
}

impl Layout {
    /// That of the q, k and v of `x` `[B, T, C]` by `w` `[3 H D, C]`.
    pub fn of_projection(op: &'static str, x: &Tensor, w: &Tensor, b: Option<&Tensor>, heads: usize) -> Result<Self> {
        let &[batch, time, n_in] = x.dims() else {
            let expected = "[batch, time, width]".to_string();
            return Err(Error::Shape { op, tensor: "x", got: x.dims().to_vec(), expected });
        };
        let n_out = check_weight(op, "w", w, b, n_in)?;
        if heads == 0 || n_out % (3 * heads) != 0 || x.elem_count() == 0 {
            let expected = format!("rows for q, k and v of {heads} heads");
            return Err(Error::Shape { op, tensor: "w", got: w.dims().to_vec(), expected });
        }
        Ok(Self { batch, heads, time, dim: n_out / (3 * heads) })
    }

    /// That of the heads' outputs `o`.
    pub fn of_heads(op: &'static str, o: &Tensor) -> Result<Self> {
        let &[batch, heads, time, dim] = o.dims() else {
            let expected = "[batch, heads, time, head_dim]".to_string();
            return Err(Error::Shape { op, tensor: "o", got: o.dims().to_vec(), expected });
        };
        Ok(Self { batch, heads, time, dim })
    }

    fn dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.time, self.dim]
    }

    /// `[N, width]`, of which the columns from `first` on are heads, to `[B, H, T, D]`.
    fn split<T: Real>(self, x: &[T], width: usize, first: usize) -> Vec<T> {
        let Self { batch, heads, time, dim } = self;
        let copy = |start: usize, out: &mut [MaybeUninit<T>]| {
            for (row, out) in (start..).zip(out.chunks_exact_mut(dim)) {
                let (b, h, t) = (row / (heads * time), row / time % heads, row % time);
                let x = &x[(b * time + t) * width + first + h * dim..][..dim];
                out.iter_mut().zip(x).for_each(|(out, &x)| _ = out.write(x));
            }
        };
        // SAFETY: `copy` writes `dim` elements for each of the rows it is given.
        unsafe { rows::fresh(batch * heads * time, dim, copy) }
    }

    /// Parts `[B, H, T, D]` side by side, `[N, parts H D]`; a part that is not there is zeros.
    fn merge<T: Real>(self, parts: &[Option<&[T]>]) -> Vec<T> {
        let Self { batch, heads, time, dim } = self;
        let copy = |start: usize, out: &mut [MaybeUninit<T>]| {
            for (n, out) in (start..).zip(out.chunks_exact_mut(parts.len() * heads * dim)) {
                let (b, t) = (n / time, n % time);
                for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                    match parts[i / heads] {
                        Some(x) => {
                            let x = &x[((b * heads + i % heads) * time + t) * dim..][..dim];
                            out.iter_mut().zip(x).for_each(|(out, &x)| _ = out.write(x));
                        }
                        None => out.iter_mut().for_each(|out| _ = out.write(T::zero())),
                    }
                }
            }
        };
        // SAFETY: `copy` writes every run of `dim` elements of the rows it is given.
        unsafe { rows::fresh(batch * time, parts.len() * heads * dim, copy) }
    }
}
