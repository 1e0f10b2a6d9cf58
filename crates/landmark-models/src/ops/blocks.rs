//! The blocks of 32 weights that ggml's simple types are made of, in the registers of the machine.
//!
//! By hand, because the compiler vectorises across blocks, which it must gather byte by byte: some ten times slower.

/// Weights of a block.
pub(super) const BLOCK: usize = 32;

/// Bytes that are asked for before they are needed.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

/// A type of blocks as ggml lays it out: halves first, then whole numbers q. A weight is `scale q + minimum`.
pub(super) trait Block {
    /// Bytes of the halves: the scale, and for some types a minimum.
    const HALVES: usize;
    /// Bytes of the q: 16 of two each, those of the lower halves first; or 32 with signs.
    const QUANTS: usize;
    const BYTES: usize = Self::HALVES + Self::QUANTS;

    /// The minimum, of the two numbers that a block may begin with.
    fn minimum(scale: f32, second: f32) -> f32;
}

/// 4 bits and a scale.
pub(super) struct Q4_0;

/// 4 bits, a scale and a minimum.
pub(super) struct Q4_1;

/// 8 bits and a scale.
pub(super) struct Q8_0;

impl Block for Q4_0 {
    const HALVES: usize = 2;
    const QUANTS: usize = 16;

    #[inline(always)]
    fn minimum(scale: f32, _: f32) -> f32 {
        -8. * scale
    }
}

impl Block for Q4_1 {
    const HALVES: usize = 4;
    const QUANTS: usize = 16;

    #[inline(always)]
    fn minimum(_: f32, second: f32) -> f32 {
        second
    }
}

impl Block for Q8_0 {
    const HALVES: usize = 2;
    const QUANTS: usize = 32;

    #[inline(always)]
    fn minimum(_: f32, _: f32) -> f32 {
        0.
    }
}

/// A row of x, and the sums of its elements block by block.
#[derive(Clone, Copy)]
pub(super) struct Summed<'a> {
    pub x: &'a [f32],
    pub sums: &'a [f32],
}

/// The weights of whole blocks.
pub(super) fn floats<B: Block>(w: &[u8], out: &mut [f32]) {
    assert_eq!(w.len() / B::BYTES * BLOCK, out.len(), "a weight for each place");
    #[cfg(target_arch = "x86_64")]
    {
        if avx512::is_here() {
            // SAFETY: the machine has the features.
            return unsafe { avx512::floats::<B>(w, out) };
        }
        if avx2::is_here() {
            // SAFETY: as above.
            return unsafe { avx2::floats::<B>(w, out) };
        }
    }
    portable::floats::<B>(w, out)
}

/// Adds the products of the rows of `w` with x: of a block, `scale (q . x) + minimum (sum of x)`.
pub(super) fn add_dots<B: Block>(w: &[u8], x: Summed, y: &mut [f32]) {
    assert_eq!(x.x.len(), x.sums.len() * BLOCK, "a sum for each block");
    assert_eq!(w.len(), x.sums.len() * B::BYTES * y.len(), "rows as long as x");
    #[cfg(target_arch = "x86_64")]
    {
        if avx512::is_here() {
            // SAFETY: the machine has the features.
            return unsafe { avx512::add_dots::<B>(w, x, y) };
        }
        if avx2::is_here() {
            // SAFETY: as above.
            return unsafe { avx2::add_dots::<B>(w, x, y) };
        }
    }
    portable::add_dots::<B>(w, x, y)
}

mod portable {
    use super::{BLOCK, Block, Summed};

    fn scale_and_minimum<B: Block>(block: &[u8]) -> (f32, f32) {
        let scale = half(block);
        (scale, B::minimum(scale, half(&block[B::HALVES - 2..])))
    }

    fn quants<B: Block>(block: &[u8]) -> [f32; BLOCK] {
        let bytes = &block[B::HALVES..B::BYTES];
        std::array::from_fn(|i| match B::QUANTS {
            BLOCK => f32::from(bytes[i] as i8),
            _ if i < 16 => f32::from(bytes[i] & 15),
            _ => f32::from(bytes[i - 16] >> 4),
        })
    }

    pub fn floats<B: Block>(w: &[u8], out: &mut [f32]) {
        for (block, out) in w.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(BLOCK)) {
            let (scale, minimum) = scale_and_minimum::<B>(block);
            out.iter_mut().zip(quants::<B>(block)).for_each(|(out, q)| *out = scale * q + minimum);
        }
    }

    pub fn add_dots<B: Block>(w: &[u8], x: Summed, y: &mut [f32]) {
        for (w, y) in w.chunks_exact(x.sums.len() * B::BYTES).zip(y) {
            for ((block, x), &sum) in w.chunks_exact(B::BYTES).zip(x.x.chunks_exact(BLOCK)).zip(x.sums) {
                let (scale, minimum) = scale_and_minimum::<B>(block);
                let dot: f32 = quants::<B>(block).iter().zip(x).map(|(q, x)| q * x).sum();
                *y += scale * dot + minimum * sum;
            }
        }
    }

    /// A finite half as f32: its bits in their places, and the difference of the exponents' biases.
    pub fn half(bytes: &[u8]) -> f32 {
        let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }
}

/// [`floats`] and [`add_dots`] with the registers of the module in which this is called: `V` and its arithmetic, and `quants`.
#[cfg(target_arch = "x86_64")]
macro_rules! kernels {
    ($features:literal) => {
        /// Scale and minimum.
        #[target_feature(enable = $features)]
        fn scale_and_minimum<B: Block>(block: &[u8]) -> (f32, f32) {
            let half = |at: usize| i32::from(u16::from_le_bytes([block[at], block[at + 1]]));
            let scale = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half(0))));
            let second = if B::HALVES == 4 { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half(2)))) } else { 0. };
            (scale, B::minimum(scale, second))
        }

        #[target_feature(enable = $features)]
        pub fn floats<B: Block>(w: &[u8], out: &mut [f32]) {
            for (block, out) in w.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(BLOCK)) {
                let (scale, minimum) = scale_and_minimum::<B>(block);
                let (scale, minimum) = (splat(scale), splat(minimum));
                for (q, out) in quants::<B>(block).into_iter().zip(out.chunks_exact_mut(LANES)) {
                    store(out, fma(scale, q, minimum));
                }
            }
        }

        #[target_feature(enable = $features)]
        pub fn add_dots<B: Block>(w: &[u8], x: Summed, y: &mut [f32]) {
            for (w, y) in w.chunks_exact(x.sums.len() * B::BYTES).zip(y) {
                let (mut sums, mut minima) = (splat(0.), 0f32);
                for ((block, x), &sum) in w.chunks_exact(B::BYTES).zip(x.x.chunks_exact(BLOCK)).zip(x.sums) {
                    // Rows follow each other in memory, across the pages at which the processor's own looking ahead stops.
                    _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD).cast());
                    let (scale, minimum) = scale_and_minimum::<B>(block);
                    let mut dot = splat(0.);
                    for (q, x) in quants::<B>(block).into_iter().zip(x.chunks_exact(LANES)) {
                        dot = fma(q, load(x), dot);
                    }
                    sums = fma(splat(scale), dot, sums);
                    minima = minimum.mul_add(sum, minima);
                }
                *y += total(sums) + minima;
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{AHEAD, BLOCK, Block, Summed};

    type V = __m512;
    const LANES: usize = 16;

    pub fn is_here() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx512f")]
    fn splat(x: f32) -> V {
        _mm512_set1_ps(x)
    }

    #[target_feature(enable = "avx512f")]
    fn load(x: &[f32]) -> V {
        let x: &[f32; LANES] = x.try_into().expect("a register's worth");
        // SAFETY: 16 numbers.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[target_feature(enable = "avx512f")]
    fn store(out: &mut [f32], x: V) {
        let out: &mut [f32; LANES] = out.try_into().expect("a register's worth");
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[target_feature(enable = "avx512f")]
    fn fma(a: V, b: V, c: V) -> V {
        _mm512_fmadd_ps(a, b, c)
    }

    #[target_feature(enable = "avx512f")]
    fn total(x: V) -> f32 {
        _mm512_reduce_add_ps(x)
    }

    #[target_feature(enable = "avx512f")]
    fn quants<B: Block>(block: &[u8]) -> [V; BLOCK / LANES] {
        let bytes = block[B::HALVES..B::BYTES].as_ptr();
        // SAFETY: a block has 16 bytes from its first q on, and 32 if each has its own.
        unsafe {
            if B::QUANTS == BLOCK {
                [0, 1].map(|i| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(16 * i).cast()))))
            } else {
                // The lower 4 bits of each number choose from a table: no need to take the others off.
                let table = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
                let pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
                [pairs, _mm512_srli_epi32::<4>(pairs)].map(|q| _mm512_permutexvar_ps(q, table))
            }
        }
    }

    kernels!("avx512f,fma,f16c");
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{AHEAD, BLOCK, Block, Summed};

    type V = __m256;
    const LANES: usize = 8;

    pub fn is_here() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx2")]
    fn splat(x: f32) -> V {
        _mm256_set1_ps(x)
    }

    #[target_feature(enable = "avx2")]
    fn load(x: &[f32]) -> V {
        let x: &[f32; LANES] = x.try_into().expect("a register's worth");
        // SAFETY: 8 numbers.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    #[target_feature(enable = "avx2")]
    fn store(out: &mut [f32], x: V) {
        let out: &mut [f32; LANES] = out.try_into().expect("a register's worth");
        // SAFETY: 8 numbers.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[target_feature(enable = "avx2,fma")]
    fn fma(a: V, b: V, c: V) -> V {
        _mm256_fmadd_ps(a, b, c)
    }

    #[target_feature(enable = "avx2")]
    fn total(x: V) -> f32 {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }

    #[target_feature(enable = "avx2")]
    fn quants<B: Block>(block: &[u8]) -> [V; BLOCK / LANES] {
        let bytes = block[B::HALVES..B::BYTES].as_ptr();
        // SAFETY: a block has 16 bytes from its first q on, and 32 if each has its own.
        unsafe {
            if B::QUANTS == BLOCK {
                [0, 1, 2, 3].map(|i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes.add(8 * i).cast()))))
            } else {
                let low = _mm_set1_epi8(15);
                let pairs = _mm_loadu_si128(bytes.cast());
                let lower = _mm_and_si128(pairs, low);
                let upper = _mm_and_si128(_mm_srli_epi16::<4>(pairs), low);
                [lower, _mm_srli_si128::<8>(lower), upper, _mm_srli_si128::<8>(upper)]
                    .map(|q| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)))
            }
        }
    }

    kernels!("avx2,fma,f16c");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_exact() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            let float = portable::half(&bits.to_le_bytes());
            // 1.m 2^(e - 15), or 0.m 2^-14.
            let (e, m) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.);
            let magnitude = if e == 0 { m * 2f64.powi(-14) } else { (1. + m) * 2f64.powi(e - 15) };
            let expected = if bits & 0x8000 != 0 { -magnitude } else { magnitude };
            assert_eq!((f64::from(float), float.is_sign_negative()), (expected, expected.is_sign_negative()));
        }
    }

    /// All instruction sets that the machine has give what the plain loops give.
    #[test]
    fn registers_hold_what_plain_loops_compute() {
        fn check<B: Block>() {
            let (rows, blocks) = (5, 7);
            let w: Vec<u8> = (0..rows * blocks * B::BYTES)
                // Halves around 1, of both signs.
                .map(|i| {
                    if i % B::BYTES < B::HALVES && i % 2 == 1 {
                        0x3c ^ ((i % 3) << 7) as u8
                    } else {
                        (i * i * 31 % 251) as u8
                    }
                })
                .collect();
            let x: Vec<f32> = (0..blocks * BLOCK).map(|i| (i * 37 % 101) as f32 / 50. - 1.).collect();
            let sums: Vec<f32> = x.chunks_exact(BLOCK).map(|x| x.iter().sum()).collect();
            let x = Summed { x: &x, sums: &sums };
            let (mut expected, mut dots) = (vec![0.; rows * blocks * BLOCK], vec![1.; rows]);
            portable::floats::<B>(&w, &mut expected);
            portable::add_dots::<B>(&w, x, &mut dots);
            for (row, dot) in expected.chunks_exact(blocks * BLOCK).zip(&dots) {
                let sum: f64 = row.iter().zip(x.x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                assert!((sum + 1. - f64::from(*dot)).abs() < 0.02, "{sum} {dot}");
            }
            #[cfg(target_arch = "x86_64")]
            for (is_here, floats, add_dots) in [
                (
                    avx512::is_here(),
                    avx512::floats::<B> as unsafe fn(&[u8], &mut [f32]),
                    avx512::add_dots::<B> as unsafe fn(&[u8], Summed, &mut [f32]),
                ),
                (avx2::is_here(), avx2::floats::<B>, avx2::add_dots::<B>),
            ] {
                if !is_here {
                    continue;
                }
                let (mut got, mut got_dots) = (vec![0.; expected.len()], vec![1.; rows]);
                // SAFETY: the machine has the features.
                unsafe {
                    floats(&w, &mut got);
                    add_dots(&w, x, &mut got_dots);
                }
                for (got, expected) in got.iter().zip(&expected).chain(got_dots.iter().zip(&dots)) {
                    assert!((got - expected).abs() <= 1e-4 * expected.abs().max(10.), "{got}, expected {expected}");
                }
            }
        }
        check::<Q4_0>();
        check::<Q4_1>();
        check::<Q8_0>();
    }
}
