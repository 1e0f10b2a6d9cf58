//! Dropout whose draw is a function of a seed and of each element's place, so that the backward pass draws it again and
//! nothing is stored.

use std::mem::MaybeUninit;

use candle_core::Tensor;

use super::elements::{Elements, rows_and_width};
use super::math::Real;
use super::record::{Output, Tape};
use super::vectorised::vectorised;
use super::{by_dtype, rows};
use crate::{Error, Result};

/// Which elements to drop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped, in `[0, 1)`. The others grow by `1 / (1 - p)`.
    pub p: f64,
    /// Names the draw.
    pub seed: u64,
}

impl Dropout {
    fn check(self, op: &'static str) -> Result<()> {
        if (0. ..1.).contains(&self.p) {
            return Ok(());
        }
        Err(Error::Value { op, name: "dropout.p", got: self.p.to_string(), expected: "a probability in [0, 1)".into() })
    }

    /// `f(i, factor)` for the elements of one row: a factor is 0 or `1 / (1 - p)`.
    #[inline(always)]
    fn row<T: Real>(self, row: usize, width: usize, mut f: impl FnMut(usize, T)) {
        let (key, below) = (mix64(self.seed ^ mix64(row as u64)) as u32, (self.p * 4_294_967_296.) as u32);
        let keep = T::from_f64(1. / (1. - self.p));
        for i in 0..width {
            f(i, if mix32(key ^ (i as u32)) < below { T::zero() } else { keep });
        }
    }
}

/// Drops elements of `x` `[.., width]`.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    by_dtype!("dropout", "x", x, typed(x, dropout))
}

fn typed<T: Real>(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    const OP: &str = "dropout";
    dropout.check(OP)?;
    let (_, width) = rows_and_width(OP, "x", x)?;
    let x = x.contiguous()?;
    let tape = Tape::new(OP, &[&x])?;
    let y = masked(&Elements::<T>::of(OP, "x", &x)?, width, dropout);
    let shape = x.shape().clone();
    tape.finish_one(Output::new(y, shape), move |dy| {
        let dx = masked(&Elements::<T>::of(OP, "dy", &dy)?, width, dropout);
        Ok(vec![Tensor::from_vec(dx, dy.dims(), dy.device())?])
    })
}

/// `x` times the factors: forward and backward alike.
pub(super) fn masked<T: Real>(x: &[T], width: usize, dropout: Dropout) -> Vec<T> {
    // SAFETY: `mask_rows` writes every element, `x` being as long as the result.
    unsafe { rows::fresh(x.len() / width, width, |first, out| mask_rows(x, width, dropout, first, out)) }
}

/// `y = residual + dropout(y)`.
pub(super) fn add_residual<T: Real>(y: &mut [T], residual: &[T], width: usize, dropout: Option<Dropout>) -> Result<()> {
    if let Some(dropout) = dropout {
        dropout.check("dropout")?;
        rows::update(y, width, |first, y| mask_and_add_rows(residual, width, dropout, first, y));
    } else {
        rows::update(y, width, |first, y| rows::add(&residual[first * width..][..y.len()], y));
    }
    Ok(())
}

vectorised! {
    fn mask_rows<T: Real>(x: &[T], width: usize, dropout: Dropout, first: usize, out: &mut [MaybeUninit<T>]) {
        for (row, out) in (first..).zip(out.chunks_exact_mut(width)) {
            let x = &x[row * width..][..width];
            dropout.row::<T>(row, width, |i, factor| _ = out[i].write(x[i] * factor));
        }
    }
}

vectorised! {
    fn mask_and_add_rows<T: Real>(residual: &[T], width: usize, dropout: Dropout, first: usize, y: &mut [T]) {
        for (row, y) in (first..).zip(y.chunks_exact_mut(width)) {
            let residual = &residual[row * width..][..width];
            dropout.row::<T>(row, width, |i, factor| y[i] = y[i].mul_add(factor, residual[i]));
        }
    }
}

/// A hash of 32 bits in which every bit of the input reaches every bit of the output (Chris Wellons' lowbias32).
#[inline(always)]
fn mix32(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The same for 64 bits (SplitMix64's finaliser, one step on).
pub(crate) fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
