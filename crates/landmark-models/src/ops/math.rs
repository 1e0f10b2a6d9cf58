//! The element types and their elementary functions, written so that loops over them vectorise.

use candle_core::WithDType;
use num_traits::Float;

/// f32 or f64.
pub(crate) trait Real: WithDType + Float {
    /// `e^x`: f32 to 2 units in the last place, without a call that would stop vectorisation.
    fn fast_exp(self) -> Self;

    /// The error function: f32 to 5e-7.
    fn erf(self) -> Self;

    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).fast_exp())
    }

    /// `x Phi(x)`, the exact GELU.
    #[inline(always)]
    fn gelu(self) -> Self {
        self * self.normal_cdf()
    }

    /// GELU and its derivative `Phi(x) + x phi(x)`.
    #[inline(always)]
    fn gelu_and_slope(self) -> (Self, Self) {
        let cdf = self.normal_cdf();
        let density = (self * self * Self::from_f64(-0.5)).fast_exp() * Self::from_f64(0.398_942_280_401_432_7);
        (self * cdf, self.mul_add(density, cdf))
    }

    #[inline(always)]
    fn normal_cdf(self) -> Self {
        let half = Self::from_f64(0.5);
        (self * Self::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf().mul_add(half, half)
    }

    /// The larger of two numbers. `Float::max` asks about NaN first.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

impl Real for f32 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        // 2^n e^r with n = round(x / ln 2): adding 1.5 * 2^23 rounds, and leaves n in the low bits.
        const ROUND: f32 = 12_582_912.;
        // Below the lower end the result is the smallest normal number or so: as good as 0 in a softmax. NaN stays NaN.
        let x = if self < -87. { -87. } else { self };
        let x = if x > 88. { 88. } else { x };
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        // ln 2 in two parts: the first has so few bits that n times it is exact.
        let r = n.mul_add(-0.693_359_4, x);
        let r = n.mul_add(2.121_944_4e-4, r);
        let mut p = 1.987_569_2e-4f32;
        p = p.mul_add(r, 1.398_2e-3);
        p = p.mul_add(r, 8.333_452e-3);
        p = p.mul_add(r, 4.166_579_6e-2);
        p = p.mul_add(r, 1.666_666_5e-1);
        p = p.mul_add(r, 0.5);
        let e = (r * r).mul_add(p, r) + 1.;
        f32::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 23))
    }

    #[inline(always)]
    fn erf(self) -> Self {
        // A rational approximation on [-4, 4]; beyond, erf is 1 in f32. The one of Eigen and XLA.
        let x = if self < -4. { -4. } else { self };
        let x = if x > 4. { 4. } else { x };
        let s = x * x;
        let mut p = -2.726_142_3e-10f32;
        p = p.mul_add(s, 2.770_681_5e-8);
        p = p.mul_add(s, -2.101_024e-6);
        p = p.mul_add(s, -5.692_506_4e-5);
        p = p.mul_add(s, -7.349_906_5e-4);
        p = p.mul_add(s, -2.954_6e-3);
        p = p.mul_add(s, -1.609_603_3e-2);
        let mut q = -1.456_607_2e-5f32;
        q = q.mul_add(s, -2.133_740_6e-4);
        q = q.mul_add(s, -1.682_827e-3);
        q = q.mul_add(s, -7.373_329e-3);
        q = q.mul_add(s, -1.426_473_9e-2);
        x * p / q
    }
}

impl Real for f64 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
}

/// Partial sums that run side by side: a sum in one accumulator cannot vectorise, since float addition does not commute.
const LANES: usize = 32;

/// Sum of `f(i)` for `i < n`, in a fixed order.
#[inline(always)]
pub(crate) fn sum_of<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let whole = n - n % LANES;
    for i in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(i + lane);
        }
    }
    let mut total = T::zero();
    for sum in lanes {
        total += sum;
    }
    for i in whole..n {
        total += f(i);
    }
    total
}

/// The largest of `x`, which is not empty.
#[inline(always)]
pub(crate) fn max_of<T: Real>(x: &[T]) -> T {
    let mut lanes = [x[0]; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (max, &x) in lanes.iter_mut().zip(chunk) {
            *max = x.larger(*max);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(x[0], |a, b| b.larger(a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_in_f32_is_exact_to_a_few_units() {
        for i in -86_000..88_000 {
            let x = i as f32 * 1e-3;
            let (got, expected) = (x.fast_exp() as f64, (x as f64).exp());
            assert!((got / expected - 1.).abs() < 3e-7, "exp({x}) = {got}, expected {expected}");
        }
        assert!(f32::NEG_INFINITY.fast_exp() < 1e-37);
        assert!(f32::NAN.fast_exp().is_nan());
    }

    #[test]
    fn gelu_in_f32_is_exact_to_its_precision() {
        for i in -12_000..12_000 {
            let x = i as f32 * 1e-3;
            let (gelu, slope) = x.gelu_and_slope();
            let (gelu64, slope64) = (x as f64).gelu_and_slope();
            assert!((Real::erf(x) as f64 - libm::erf(x as f64)).abs() < 5e-7, "erf({x})");
            assert!((gelu as f64 - gelu64).abs() < 1e-6, "gelu({x}) = {gelu}, expected {gelu64}");
            assert!((slope as f64 - slope64).abs() < 1e-6, "gelu'({x}) = {slope}, expected {slope64}");
        }
        assert!(f32::NAN.gelu().is_nan());
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for n in [1, 31, 32, 33, 100] {
            let x: Vec<f64> = (0..n).map(|i| ((i * 7) % n) as f64).collect();
            assert_eq!(sum_of(n, |i| x[i]), x.iter().sum::<f64>());
            assert_eq!(max_of(&x), x.iter().copied().fold(0., f64::max));
        }
    }
}
