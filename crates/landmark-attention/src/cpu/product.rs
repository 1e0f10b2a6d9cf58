//! The one matrix product of the kernels: `C (+)= A B`, A read one scalar at a time, B and C by registers.
//!
//! All five products of attention and its gradient have this form when the lanes of a register are queries (scores,
//! probabilities and their gradients are kept `[keys, queries]`) or channels (gradients of keys and values).

use pulp::{Simd, WithSimd};

use super::lanes::Real;

/// `C[m, n] (+)= A[m, k] B[k, n]`. `n` counts registers.
pub struct Product<'a, S: Simd, T: Real> {
    pub s: S,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// `A[i][l]` is `a[i * a_row + l * a_col]`.
    pub a: &'a [T],
    pub a_row: usize,
    pub a_col: usize,
    /// `B[l][j]` is `b[l * b_row + j]`.
    pub b: &'a [T::Lanes<S>],
    pub b_row: usize,
    /// `C[i][j]` is `c[i * c_row + j]`.
    pub c: &'a mut [T::Lanes<S>],
    pub c_row: usize,
    /// Add to C rather than overwrite it.
    pub accumulate: bool,
}

impl<S: Simd, T: Real> Product<'_, S, T> {
    /// Computes the product. Each element of C is one chain of fused multiply-adds in the order of `k`, whatever its place:
    /// equal rows of A give equal rows of C, bit for bit, which retrieval's rule for ties relies on.
    #[inline(always)]
    pub fn run(self) {
        if self.m == 0 || self.n == 0 {
            return;
        }
        assert!(self.k == 0 || self.a.len() > (self.m - 1) * self.a_row + (self.k - 1) * self.a_col);
        assert!(self.k == 0 || self.b.len() >= (self.k - 1) * self.b_row + self.n);
        assert!(self.c.len() >= (self.m - 1) * self.c_row + self.n);
        self.s.vectorize(self);
    }

    /// Registers `j..j + NV` of rows `i..i + MR`: the accumulators stay in registers over the whole of `k`.
    #[inline(always)]
    fn tile<const MR: usize, const NV: usize>(&mut self, i: usize, j: usize) {
        let s = self.s;
        let mut acc = [[T::splat(s, T::default()); NV]; MR];
        // SAFETY: `run` checked the last element that each pointer reaches; i + MR <= m and j + NV <= n by the caller's loop.
        unsafe {
            let mut a = self.a.as_ptr().add(i * self.a_row);
            let mut b = self.b.as_ptr().add(j);
            for _ in 0..self.k {
                let mut b_row = [T::splat(s, T::default()); NV];
                for (v, b_v) in b_row.iter_mut().enumerate() {
                    *b_v = *b.add(v);
                }
                for (r, acc_r) in acc.iter_mut().enumerate() {
                    let a_r = T::splat(s, *a.add(r * self.a_row));
                    for (acc_rv, b_v) in acc_r.iter_mut().zip(b_row) {
                        *acc_rv = T::mul_add(s, a_r, b_v, *acc_rv);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            for (r, acc_r) in acc.iter().enumerate() {
                let c = self.c.as_mut_ptr().add((i + r) * self.c_row + j);
                for (v, &acc_rv) in acc_r.iter().enumerate() {
                    *c.add(v) = if self.accumulate { T::vadd(s, acc_rv, *c.add(v)) } else { acc_rv };
                }
            }
        }
    }

    #[inline(always)]
    fn columns<const NV: usize>(&mut self, j: usize) {
        let mut i = 0;
        // 32 registers (AVX-512, NEON) hold 8 x 2 accumulators with room to spare; 16 (AVX2) hold 4 x 2.
        if S::REGISTER_COUNT >= 32 {
            while i + 8 <= self.m {
                self.tile::<8, NV>(i, j);
                i += 8;
            }
        }
        while i + 4 <= self.m {
            self.tile::<4, NV>(i, j);
            i += 4;
        }
        match self.m - i {
            3 => self.tile::<3, NV>(i, j),
            2 => self.tile::<2, NV>(i, j),
            1 => self.tile::<1, NV>(i, j),
            _ => {}
        }
    }
}

impl<S: Simd, T: Real> WithSimd for Product<'_, S, T> {
    type Output = ();

    /// Entered through `vectorize`, so that this compiles with the instructions of `S` (which the argument repeats).
    #[inline(always)]
    fn with_simd<S2: Simd>(mut self, _: S2) {
        let mut j = 0;
        while j + 2 <= self.n {
            self.columns::<2>(j);
            j += 2;
        }
        if j < self.n {
            self.columns::<1>(j);
        }
    }
}
