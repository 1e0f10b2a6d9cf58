//! A few registers' worth of queries in a tile of scores, and the steps of a softmax down the keys.

use std::ops::Range;

use bytemuck::Zeroable;
use pulp::Simd;

use super::lanes::Real;

/// The array of an expression for each register `v` of `NV`. (`array::from_fn` is not always inlined, and what is not inlined
/// does not see the instruction set.)
macro_rules! each {
    ($v:ident: $value:expr) => {{
        let mut all = [<T::Lanes<S> as bytemuck::Zeroable>::zeroed(); NV];
        for $v in 0..NV {
            all[$v] = $value;
        }
        all
    }};
}
pub(super) use each;

/// `NV` registers of queries.
pub type Registers<S, T, const NV: usize> = [<T as Real>::Lanes<S>; NV];

/// Registers `at..at + NV` of each row of `cells`, whose first row is key `base`.
pub struct Column<'a, S: Simd, T: Real, const NV: usize> {
    pub cells: &'a mut [T::Lanes<S>],
    /// Registers of a row.
    pub row: usize,
    pub at: usize,
    pub base: usize,
}

impl<S: Simd, T: Real, const NV: usize> Column<'_, S, T, NV> {
    #[inline(always)]
    fn place(&self, key: usize) -> Range<usize> {
        let start = (key - self.base) * self.row + self.at;
        start..start + NV
    }

    #[inline(always)]
    pub fn load(&self, key: usize) -> Registers<S, T, NV> {
        load::<S, T, NV>(self.cells, self.place(key).start)
    }

    #[inline(always)]
    pub fn store(&mut self, key: usize, x: Registers<S, T, NV>) {
        let place = self.place(key);
        self.cells[place].copy_from_slice(&x);
    }

    /// Sets the scores of keys that a query does not see to minus infinity: key `j` is seen from position `visible(j)` on.
    #[inline(always)]
    pub fn hide(&mut self, s: S, keys: Range<usize>, positions: Registers<S, T, NV>, visible: impl Fn(usize) -> T) {
        let hidden = T::splat(s, T::cast(f64::NEG_INFINITY));
        for j in keys {
            let from = T::splat(s, visible(j));
            let score = self.load(j);
            self.store(j, each!(v: T::select_le(s, from, positions[v], score[v], hidden)));
        }
    }

    /// The inner softmax but for its division: turns scores into `2^(score - max)`; returns the maximum ([`Real::LOW`] where
    /// nothing is seen) and the sum.
    #[inline(always)]
    pub fn inner_softmax(&mut self, s: S, keys: Range<usize>) -> (Registers<S, T, NV>, Registers<S, T, NV>) {
        let mut max = [T::splat(s, T::LOW); NV];
        for j in keys.clone() {
            let score = self.load(j);
            max = each!(v: T::vmax(s, max[v], score[v]));
        }
        let mut sum = [T::splat(s, T::default()); NV];
        for j in keys {
            let score = self.load(j);
            let e = each!(v: T::exp2(s, T::vsub(s, score[v], max[v])));
            sum = each!(v: T::vadd(s, sum[v], e[v]));
            self.store(j, e);
        }
        (max, sum)
    }

    /// Multiplies rows by `factor`.
    #[inline(always)]
    pub fn scale(&mut self, s: S, keys: Range<usize>, factor: Registers<S, T, NV>) {
        for j in keys {
            let e = self.load(j);
            self.store(j, each!(v: T::vmul(s, e[v], factor[v])));
        }
    }
}

/// Registers `at..at + NV`.
#[inline(always)]
pub fn load<S: Simd, T: Real, const NV: usize>(registers: &[T::Lanes<S>], at: usize) -> Registers<S, T, NV> {
    let registers = &registers[at..at + NV];
    each!(v: registers[v])
}

/// Numbers of the queries in registers `x..x + NV` of a tile: 0, 1, 2, ...
#[inline(always)]
pub fn lane_numbers<S: Simd, T: Real, const NV: usize>(x: usize) -> Registers<S, T, NV> {
    each!(v: {
        let mut lanes = [T::Lanes::<S>::zeroed()];
        for (i, lane) in bytemuck::cast_slice_mut::<_, T>(&mut lanes).iter_mut().enumerate() {
            *lane = T::cast(((x + v) * T::lanes::<S>() + i) as f64);
        }
        lanes[0]
    })
}
