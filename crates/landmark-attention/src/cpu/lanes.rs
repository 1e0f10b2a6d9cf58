//! The vector arithmetic of the kernels, once for f32 and f64, over whatever instruction set `pulp` found at run time.

use std::ops::{Add, AddAssign, Mul};

use bytemuck::Pod;
use pulp::Simd;

/// A float type that the kernels compute in.
pub trait Real:
    Pod + PartialOrd + Default + Send + Sync + std::fmt::Debug + Add<Output = Self> + Mul<Output = Self> + AddAssign
{
    /// A register of this type.
    type Lanes<S: Simd>: Pod + Send + Sync;
    /// Far below every score, yet finite: `LOW - LOW` is 0, not NaN.
    const LOW: Self;
    /// Far above every score.
    const HIGH: Self;

    fn cast(x: f64) -> Self;
    fn widen(self) -> f64;
    fn splat<S: Simd>(s: S, x: Self) -> Self::Lanes<S>;
    fn vadd<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;
    fn vsub<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;
    fn vmul<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;
    fn vdiv<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;
    fn vmax<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;
    /// `a * b + c`, fused where the machine can.
    fn mul_add<S: Simd>(s: S, a: Self::Lanes<S>, b: Self::Lanes<S>, c: Self::Lanes<S>) -> Self::Lanes<S>;
    /// Lane by lane `yes` where `a <= b`, else `no`.
    fn select_le<S: Simd>(
        s: S,
        a: Self::Lanes<S>,
        b: Self::Lanes<S>,
        yes: Self::Lanes<S>,
        no: Self::Lanes<S>,
    ) -> Self::Lanes<S>;
    /// `2^x`; exactly 0 for very small `x`, minus infinity included.
    fn exp2<S: Simd>(s: S, x: Self::Lanes<S>) -> Self::Lanes<S>;

    /// The sum of the lanes.
    fn total<S: Simd>(s: S, x: Self::Lanes<S>) -> Self;

    /// Lanes in a register.
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Lanes<S>>() / size_of::<Self>()
    }
}

macro_rules! lanewise {
    ($real:ty, $lanes:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, $max:ident, $fma:ident, $le:ident, $select:ident, $total:ident) => {
        type Lanes<S: Simd> = S::$lanes;
        const LOW: Self = -1e30;
        const HIGH: Self = 1e30;

        #[inline(always)]
        fn cast(x: f64) -> Self {
            x as $real
        }
        #[inline(always)]
        fn widen(self) -> f64 {
            self as f64
        }
        #[inline(always)]
        fn splat<S: Simd>(s: S, x: Self) -> S::$lanes {
            s.$splat(x)
        }
        #[inline(always)]
        fn vadd<S: Simd>(s: S, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            s.$add(a, b)
        }
        #[inline(always)]
        fn vsub<S: Simd>(s: S, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            s.$sub(a, b)
        }
        #[inline(always)]
        fn vmul<S: Simd>(s: S, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            s.$mul(a, b)
        }
        #[inline(always)]
        fn vdiv<S: Simd>(s: S, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            s.$div(a, b)
        }
        #[inline(always)]
        fn vmax<S: Simd>(s: S, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            s.$max(a, b)
        }
        #[inline(always)]
        fn mul_add<S: Simd>(s: S, a: S::$lanes, b: S::$lanes, c: S::$lanes) -> S::$lanes {
            s.$fma(a, b, c)
        }
        #[inline(always)]
        fn select_le<S: Simd>(s: S, a: S::$lanes, b: S::$lanes, yes: S::$lanes, no: S::$lanes) -> S::$lanes {
            s.$select(s.$le(a, b), yes, no)
        }
        #[inline(always)]
        fn total<S: Simd>(s: S, x: S::$lanes) -> Self {
            s.$total(x)
        }
    };
}

impl Real for f32 {
    lanewise!(
        f32,
        f32s,
        splat_f32s,
        add_f32s,
        sub_f32s,
        mul_f32s,
        div_f32s,
        max_f32s,
        mul_add_e_f32s,
        less_than_or_equal_f32s,
        select_f32s,
        reduce_sum_f32s
    );

    /// Cephes' polynomial on [-0.5, 0.5], relative error 2e-7; the integer part goes into the exponent bits.
    #[inline(always)]
    fn exp2<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        // Below -126 the exponent field reaches 0 at -127, and the product is exactly 0.
        let x = s.max_f32s(x, s.splat_f32s(-127.));
        // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
        let magic = s.splat_f32s(12_582_912.);
        let shifted = s.add_f32s(x, magic);
        let r = s.sub_f32s(x, s.sub_f32s(shifted, magic));
        let mut p = s.splat_f32s(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_6e-2, 2.402_264_7e-1, 6.931_472e-1, 1.] {
            p = s.mul_add_e_f32s(p, r, s.splat_f32s(c));
        }
        let n = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
        s.mul_f32s(p, s.transmute_f32s_u32s(s.add_u32s(n, s.splat_u32s(127 << 23))))
    }
}

impl Real for f64 {
    lanewise!(
        f64,
        f64s,
        splat_f64s,
        add_f64s,
        sub_f64s,
        mul_f64s,
        div_f64s,
        max_f64s,
        mul_add_e_f64s,
        less_than_or_equal_f64s,
        select_f64s,
        reduce_sum_f64s
    );

    /// The library's, lane by lane: f64 is for checking, not for speed.
    #[inline(always)]
    fn exp2<S: Simd>(_: S, mut x: S::f64s) -> S::f64s {
        for x in bytemuck::cast_slice_mut::<_, f64>(std::slice::from_mut(&mut x)) {
            *x = if *x < -1022. { 0. } else { x.exp2() };
        }
        x
    }
}
