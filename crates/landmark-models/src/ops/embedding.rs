//! Rows of a table by token id.

use candle_core::Tensor;
use rayon::prelude::*;

use super::elements::{Elements, ids, rows_and_width};
use super::math::Real;
use super::record::{Output, Tape};
use super::{by_dtype, on_gpu, rows};
use crate::{Error, Result};

const OP: &str = "embedding";

/// The rows of `w` `[V, C]` that `tokens`, u32 of any shape, name; returns `[.., C]`.
pub fn embedding(w: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    on_gpu!(w, super::cuda::embedding(w, tokens));
    by_dtype!(OP, "w", w, typed(w, tokens))
}

fn typed<T: Real>(w: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    let (vocab, width) = rows_and_width(OP, "w", w)?;
    if w.rank() != 2 {
        return Err(Error::Shape { op: OP, tensor: "w", got: w.dims().to_vec(), expected: "[vocab, width]".into() });
    }
    let ids = ids(OP, "tokens", tokens)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Value {
            op: OP,
            name: "tokens",
            got: id.to_string(),
            expected: format!("ids below {vocab}"),
        });
    }
    let tape = Tape::new(OP, &[w])?;
    let out = {
        let w = Elements::<T>::of(OP, "w", w)?;
        let w: &[T] = &w;
        let copy = |start: usize, out: &mut [std::mem::MaybeUninit<T>]| {
            for (&id, out) in ids[start..].iter().zip(out.chunks_exact_mut(width)) {
                out.iter_mut().zip(&w[id as usize * width..]).for_each(|(out, &w)| _ = out.write(w));
            }
        };
        // SAFETY: `copy` writes `width` elements for each of its rows; there is an id for each.
        unsafe { rows::fresh(ids.len(), width, copy) }
    };
    let shape = [tokens.dims(), &[width]].concat();
    let device = w.device().clone();
    tape.finish_one(Output::new(out, shape), move |dy| {
        let dw = scatter(&Elements::<T>::of(OP, "dy", &dy)?, &ids, vocab, width);
        Ok(vec![Tensor::from_vec(dw, (vocab, width), &device)?])
    })
}

/// Adds each row of `dy` to the row of its token: tokens sorted by id, then place, so that ranges of the table are
/// independent and every sum is in the order of the text.
fn scatter<T: Real>(dy: &[T], ids: &[u32], vocab: usize, width: usize) -> Vec<T> {
    let mut places: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, place)| (id as u64) << 32 | place).collect();
    places.sort_unstable();
    let mut dw = vec![T::zero(); vocab * width];
    const ROWS: usize = 64;
    dw.par_chunks_mut(ROWS * width).enumerate().for_each(|(task, dw)| {
        let from = places.partition_point(|p| p >> 32 < (task * ROWS) as u64);
        let to = places.partition_point(|p| p >> 32 < ((task + 1) * ROWS) as u64);
        for place in &places[from..to] {
            let (row, place) = ((place >> 32) as usize - task * ROWS, *place as u32 as usize);
            let dy = &dy[place * width..][..width];
            dw[row * width..][..width].iter_mut().zip(dy).for_each(|(dw, &dy)| *dw += dy);
        }
    });
    dw
}
