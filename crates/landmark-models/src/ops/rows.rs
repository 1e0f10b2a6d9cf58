//! Loops over the rows of a matrix: parallel, and the same order of sums every time.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::math::Real;
use super::vectorised::vectorised;

/// Rows that one task takes, so that a task is large beside its cost. A function of the width alone: sums by task are in the
/// same order however many threads there are.
fn rows_per_task(width: usize) -> usize {
    (32_768 / width).max(1)
}

/// A new vector of `rows * width`: `f(first_row, rows)` writes every element of the rows it is given.
///
/// # Safety
/// `f` must have written every element of its slice when it returns.
pub(crate) unsafe fn fresh<T: Real>(
    rows: usize,
    width: usize,
    f: impl Fn(usize, &mut [MaybeUninit<T>]) + Send + Sync,
) -> Vec<T> {
    let mut out: Vec<T> = Vec::with_capacity(rows * width);
    let step = rows_per_task(width);
    let tasks = out.spare_capacity_mut()[..rows * width].par_chunks_mut(step * width);
    tasks.enumerate().for_each(|(task, out)| f(task * step, out));
    // SAFETY: the chunks cover the first `rows * width` elements and `f` wrote them all.
    unsafe { out.set_len(rows * width) }
    out
}

/// A new vector of the size of `beside`, rows of `width`: `f(first_row, rows, rows of beside)` writes every element of the rows
/// it is given, and may change those of `beside`.
///
/// # Safety
/// `f` must have written every element of its first slice when it returns.
pub(crate) unsafe fn fresh_beside<T: Real>(
    beside: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [MaybeUninit<T>], &mut [T]) + Send + Sync,
) -> Vec<T> {
    let len = beside.len();
    let mut out: Vec<T> = Vec::with_capacity(len);
    let step = rows_per_task(width);
    let tasks = out.spare_capacity_mut()[..len].par_chunks_mut(step * width).zip(beside.par_chunks_mut(step * width));
    tasks.enumerate().for_each(|(task, (out, beside))| f(task * step, out, beside));
    // SAFETY: the chunks cover the first `len` elements and `f` wrote them all.
    unsafe { out.set_len(len) }
    out
}

/// `f(first_row, rows)` for all rows of `out`.
pub(crate) fn update<T: Real>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    let step = rows_per_task(width);
    out.par_chunks_mut(step * width).enumerate().for_each(|(task, out)| f(task * step, out));
}

/// A sum over rows, `[width]`: `f(rows, sum)` adds what a range of rows has to say.
pub(crate) fn sum<T: Real>(
    rows: usize,
    width: usize,
    f: impl Fn(std::ops::Range<usize>, &mut [T]) + Send + Sync,
) -> Vec<T> {
    let step = rows_per_task(width) * 4;
    let partial: Vec<Vec<T>> = (0..rows.div_ceil(step))
        .into_par_iter()
        .map(|task| {
            let mut sum = vec![T::zero(); width];
            f(task * step..rows.min((task + 1) * step), &mut sum);
            sum
        })
        .collect();
    let mut total = vec![T::zero(); width];
    for partial in partial {
        add(&partial, &mut total);
    }
    total
}

/// `sum over rows of x`, `[width]`: the gradient of a bias.
pub(crate) fn column_sums<T: Real>(x: &[T], width: usize) -> Vec<T> {
    sum(x.len() / width, width, |rows, sum| {
        x[rows.start * width..rows.end * width].chunks_exact(width).for_each(|row| add(row, sum))
    })
}

/// Adds `bias` to every row of `x`.
pub(crate) fn add_bias<T: Real>(x: &mut [T], bias: &[T]) {
    let width = bias.len();
    update(x, width, |_, rows| rows.chunks_exact_mut(width).for_each(|row| add(bias, row)))
}

vectorised! {
    /// `y += x`.
    pub(crate) fn add<T: Real>(x: &[T], y: &mut [T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y += x)
    }
}
