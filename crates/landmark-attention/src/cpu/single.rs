//! One query: the lanes of a register are channels. Where a register of queries would be almost empty this reads keys and values once, in the
//! order of memory, and computes nothing that nobody asked for.

use pulp::Simd;

use super::lanes::Real;

/// Queries that are better taken one by one than side by side.
pub const FEW: usize = 4;

/// Registers of channels that are summed side by side.
const CHANNELS: usize = 4;

/// Whether the channels of a head fill registers.
pub fn fits<S: Simd, T: Real>(head_dim: usize) -> bool {
    head_dim.is_multiple_of(T::lanes::<S>())
}

/// The product of a query with a key. Equal keys give equal products, bit for bit, which retrieval's rule for ties relies on.
#[inline(always)]
pub fn dot<S: Simd, T: Real>(s: S, q: &[T], k: &[T]) -> T {
    let mut sum = T::splat(s, T::default());
    let q = bytemuck::cast_slice::<_, T::Lanes<S>>(q);
    for (&q, &k) in q.iter().zip(bytemuck::cast_slice::<_, T::Lanes<S>>(k)) {
        sum = T::mul_add(s, q, k, sum);
    }
    T::total(s, sum)
}

/// The inner attention of a query, times `scale * log2(e)`, to a block whose landmark is the last row of `keys`: adds nothing, overwrites
/// `out`; returns the landmark's score, in base 2. `weights` is memory to work in.
#[inline(always)]
pub fn attend_block<S: Simd, T: Real>(
    s: S,
    q: &[T],
    [keys, values]: [&[T]; 2],
    weights: &mut Vec<T::Lanes<S>>,
    out: &mut [T],
) -> T {
    let (d, lanes) = (q.len(), T::lanes::<S>());
    let tokens = keys.len() / d - 1;
    weights.clear();
    weights.resize(tokens.div_ceil(lanes), T::splat(s, T::LOW));
    for (score, k) in bytemuck::cast_slice_mut::<_, T>(weights).iter_mut().zip(keys.chunks_exact(d)).take(tokens) {
        *score = dot(s, q, k);
    }
    let landmark = dot(s, q, &keys[tokens * d..]);
    let mut max = T::splat(s, T::LOW);
    for &score in weights.iter() {
        max = T::vmax(s, max, score);
    }
    let largest =
        bytemuck::cast_slice::<_, T>(std::slice::from_ref(&max)).iter().fold(T::LOW, |a, &b| if b > a { b } else { a });
    let (largest, mut sum) = (T::splat(s, largest), T::splat(s, T::default()));
    // Lanes past the last token are far below all others, and come to exactly 0.
    for weight in weights.iter_mut() {
        *weight = T::exp2(s, T::vsub(s, *weight, largest));
        sum = T::vadd(s, sum, *weight);
    }
    let inverse = T::splat(s, T::cast(1. / T::total(s, sum).widen()));
    let weights: &[T] = bytemuck::cast_slice(weights);
    let values: &[T::Lanes<S>] = bytemuck::cast_slice(values);
    let out: &mut [T::Lanes<S>] = bytemuck::cast_slice_mut(out);
    let row = out.len();
    let mut channel = 0;
    while channel + CHANNELS <= row {
        let sums = weighted::<S, T, CHANNELS>(s, &weights[..tokens], values, row, channel);
        for (out, sum) in out[channel..].iter_mut().zip(sums) {
            *out = T::vmul(s, sum, inverse);
        }
        channel += CHANNELS;
    }
    while channel < row {
        let [sum] = weighted::<S, T, 1>(s, &weights[..tokens], values, row, channel);
        out[channel] = T::vmul(s, sum, inverse);
        channel += 1;
    }
    landmark
}

/// The sum of rows of values by their weights, of the registers from `channel` on.
#[inline(always)]
fn weighted<S: Simd, T: Real, const N: usize>(
    s: S,
    weights: &[T],
    values: &[T::Lanes<S>],
    row: usize,
    channel: usize,
) -> [T::Lanes<S>; N] {
    let mut sums = [T::splat(s, T::default()); N];
    for (&weight, values) in weights.iter().zip(values.chunks_exact(row)) {
        let (weight, values) = (T::splat(s, weight), &values[channel..channel + N]);
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum = T::mul_add(s, weight, value, *sum);
        }
    }
    sums
}
