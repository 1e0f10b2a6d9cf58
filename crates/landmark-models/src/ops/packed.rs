//! `x w^T` for a `w` whose rows are made on the way, a few at a time.
//!
//! Why not the `gemm` crate on parts of `w`: it packs `x` anew for each part, and its result is the transpose. Here `x` is packed once, so that the
//! lanes of a register are rows of `x`; each worker makes 16 rows of `w`, which stay in the nearest cache while all of `x` streams past, and
//! writes whole cache lines of the result.

use bytemuck::Zeroable;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::Result;

/// Rows of `w` that a worker makes at a time: of f32, a cache line of each row of the result.
const ROWS: usize = 16;

/// Registers of a strip of `x`.
const STRIP: usize = 2;

/// `y += x w^T` for `x` `[n, n_in]` and `y` `[n, n_out]`: `make(first, rows)` writes the rows of `w` from `first` on, `[.., n_in]`.
pub(super) fn add_times_rows(
    y: &mut [f32],
    x: &[f32],
    n: usize,
    make: impl Fn(usize, &mut [f32]) -> Result<()> + Sync + Send,
) -> Result<()> {
    assert!(x.len().is_multiple_of(n) && y.len().is_multiple_of(n), "matrices of {n} rows");
    Arch::new().dispatch(AddTimesRows { y, x, n, make })
}

struct AddTimesRows<'a, F> {
    y: &'a mut [f32],
    x: &'a [f32],
    n: usize,
    make: F,
}

impl<F: Fn(usize, &mut [f32]) -> Result<()> + Sync + Send> WithSimd for AddTimesRows<'_, F> {
    type Output = Result<()>;

    fn with_simd<S: Simd>(self, s: S) -> Result<()> {
        let Self { y, x, n, make } = self;
        let (n_in, n_out, wide) = (x.len() / n, y.len() / n, STRIP * S::F32_LANES);
        // Strips `[n_in, wide]`; what is past the last row is 0.
        let mut packed = vec![[S::f32s::zeroed(); STRIP]; n.div_ceil(wide) * n_in];
        packed.par_chunks_mut(n_in).zip(x.par_chunks(wide * n_in)).for_each(|(strip, x)| {
            let strip: &mut [f32] = bytemuck::cast_slice_mut(strip);
            // Squares of which both sides stay in the nearest cache.
            const SIDE: usize = 16;
            for first in (0..n_in).step_by(SIDE) {
                for (i, x) in x.chunks_exact(n_in).enumerate() {
                    for (l, &x) in (first..).zip(&x[first..n_in.min(first + SIDE)]) {
                        strip[l * wide + i] = x;
                    }
                }
            }
        });
        let whole = Whole { y: y.as_mut_ptr(), n, n_out };
        let tasks = (0..n_out.div_ceil(ROWS)).into_par_iter();
        tasks.try_for_each_init(Vec::new, |w, task| {
            let first = task * ROWS;
            let rows = ROWS.min(n_out - first);
            w.resize(rows * n_in, 0.);
            make(first, w)?;
            for (strip, x) in packed.chunks_exact(n_in).enumerate() {
                s.vectorize(Strip { s, x, w, first_row: strip * wide, first_column: first, y: &whole });
            }
            Ok(())
        })
    }
}

/// The result, of which each worker has columns of its own.
struct Whole {
    y: *mut f32,
    n: usize,
    n_out: usize,
}

// SAFETY: `Strip` writes no other columns than its own, and no two workers have the same.
unsafe impl Sync for Whole {}

/// The product of a strip of `x` with some rows of `w`.
struct Strip<'a, S: Simd> {
    s: S,
    x: &'a [[S::f32s; STRIP]],
    w: &'a [f32],
    first_row: usize,
    first_column: usize,
    y: &'a Whole,
}

impl<S: Simd> WithSimd for Strip<'_, S> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        let rows = self.w.len() / self.x.len();
        let mut row = 0;
        // 32 registers (AVX-512, NEON) hold 8 x 2 sums with room to spare; 16 (AVX2) hold 4 x 2.
        if S::REGISTER_COUNT >= 32 {
            while row + 8 <= rows {
                self.tile::<8>(row);
                row += 8;
            }
        }
        while row + 4 <= rows {
            self.tile::<4>(row);
            row += 4;
        }
        while row < rows {
            self.tile::<1>(row);
            row += 1;
        }
    }
}

impl<S: Simd> Strip<'_, S> {
    /// With `R` rows of `w` from `row` on.
    #[inline(always)]
    fn tile<const R: usize>(&self, row: usize) {
        let (s, n_in) = (self.s, self.x.len());
        let mut sums = [[s.splat_f32s(0.); STRIP]; R];
        let w = &self.w[row * n_in..][..R * n_in];
        for (l, x) in self.x.iter().enumerate() {
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `w` has R rows of as many columns as `x` has elements.
                let w = s.splat_f32s(unsafe { *w.get_unchecked(r * n_in + l) });
                for (sum, &x) in sums.iter_mut().zip(x) {
                    *sum = s.mul_add_e_f32s(w, x, *sum);
                }
            }
        }
        let sums: &[[S::f32s; STRIP]] = &sums;
        let sums: &[f32] = bytemuck::cast_slice(sums);
        let wide = STRIP * S::F32_LANES;
        let &Whole { y, n, n_out } = self.y;
        for i in 0..wide.min(n - self.first_row) {
            // SAFETY: row and column are of the result, and these columns are this worker's.
            let y = unsafe {
                std::slice::from_raw_parts_mut(y.add((self.first_row + i) * n_out + self.first_column + row), R)
            };
            for (r, y) in y.iter_mut().enumerate() {
                *y += sums[r * wide + i];
            }
        }
    }
}
