//! The arithmetic of one step of Adafactor (Shazeer and Stern, 2018), in place on the parameters.
//!
//! It keeps, of the mean squares of a matrix's gradient, those of its rows and those of its columns alone. This is the
//! algorithm of `transformers.Adafactor` with a learning rate of its own (`scale_parameter=False`, `relative_step=False`), without a
//! first moment; the reference's own `optim/adafactor.py` was never published.

use crate::update::{Buffer, range, range_mut, typed};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, bail};
use num_traits::Float;
use rayon::prelude::*;
use std::cell::RefCell;

/// Keeps the squares of a gradient off zero.
const EPS: f64 = 1e-30;
/// The largest root mean square of a step before the learning rate.
const CLIP: f64 = 1.;
/// How fast the means forget less and less.
const DECAY_RATE: f64 = -0.8;
/// Columns that one thread takes at a time.
const COLUMNS: usize = 64;

/// One step.
pub(crate) struct Adafactor<'a> {
    /// The mean squares: of rows and of columns, or of the elements of a vector and of nothing.
    pub squares: RefCell<(&'a mut Buffer, &'a mut Buffer)>,
    /// What the gradient is multiplied by, for clipping.
    pub scale: f64,
    pub rate: f64,
    pub decay: f64,
    /// The number of this step, the first being 1.
    pub step: usize,
}

/// The shapes of what is kept for a parameter of these dimensions.
pub(crate) fn state_shapes(dims: &[usize]) -> [Vec<usize>; 2] {
    match dims {
        &[rows, columns] => [vec![rows], vec![columns]],
        other => [other.to_vec(), vec![0]],
    }
}

impl InplaceOp2 for Adafactor<'_> {
    fn name(&self) -> &'static str {
        "adafactor"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, p_layout: &Layout, g: &CpuStorage, g_layout: &Layout) -> Result<()> {
        let mut squares = self.squares.borrow_mut();
        let (first, second) = &mut *squares;
        let (first, second) = (&mut **first, &mut **second);
        let columns = if p_layout.dims().len() == 2 { p_layout.dims()[1] } else { 1 };
        typed!((p, p_layout), (g, g_layout), [first, second], "adafactor", |p, g, rows, cols| {
            self.apply(p, g, rows, cols, columns)
        });
        Ok(())
    }
}

impl Adafactor<'_> {
    /// Of a matrix with so many columns, or of a vector (one column, and nothing in `cols`).
    fn apply<T: Float + Send + Sync>(&self, p: &mut [T], g: &[T], rows: &mut [T], cols: &mut [T], columns: usize) {
        let of = |x: f64| T::from(x).expect("a float from a float");
        let real = |x: T| x.to_f64().expect("a float is a float");
        let Self { scale, rate, decay, .. } = *self;
        let keep = 1. - (self.step as f64).powf(DECAY_RATE);
        let square = |g: T| {
            let g = real(g) * scale;
            g * g + EPS
        };
        let update = |mean: &mut T, new: f64| *mean = of(real(*mean) * keep + new * (1. - keep));
        let row_count = rows.len();
        rows.par_iter_mut().zip(g.par_chunks(columns)).for_each(|(mean, g)| {
            update(mean, g.iter().map(|g| square(*g)).sum::<f64>() / columns as f64);
        });
        // Every sum is made in one order, whatever the number of threads.
        cols.par_chunks_mut(COLUMNS).enumerate().for_each(|(chunk, means)| {
            let mut sums = [0.; COLUMNS];
            for g in g.chunks(columns) {
                for (sum, g) in sums.iter_mut().zip(&g[chunk * COLUMNS..][..means.len()]) {
                    *sum += square(*g);
                }
            }
            for (mean, sum) in means.iter_mut().zip(sums) {
                update(mean, sum / row_count as f64);
            }
        });
        // The gradient is divided by the root of its approximate mean square, rows * columns / mean(rows).
        let mean = rows.iter().map(|mean| real(*mean)).sum::<f64>() / row_count as f64;
        let by_row = |row: &T| scale / if cols.is_empty() { real(*row) } else { real(*row) / mean }.sqrt();
        let by_column: Vec<f64> = match cols.is_empty() {
            true => vec![1.],
            false => cols.iter().map(|mean| 1. / real(*mean).sqrt()).collect(),
        };
        let sums: Vec<f64> = rows
            .par_iter()
            .zip(g.par_chunks(columns))
            .map(|(row, g)| {
                let row = by_row(row);
                g.iter().zip(&by_column).map(|(g, column)| (real(*g) * row * column).powi(2)).sum()
            })
            .collect();
        let rms = (sums.iter().sum::<f64>() / g.len() as f64).sqrt();
        let kept = 1. - rate * decay;
        let rate = rate / (rms / CLIP).max(1.);
        p.par_chunks_mut(columns).zip(g.par_chunks(columns)).zip(rows.par_iter()).for_each(|((p, g), row)| {
            let row = by_row(row) * rate;
            for ((p, g), column) in p.iter_mut().zip(g).zip(&by_column) {
                *p = of(real(*p) * kept - real(*g) * row * column);
            }
        });
    }
}
