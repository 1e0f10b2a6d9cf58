//! The fused forward pass: one tile of queries against all the keys that it sees, flash-attention style.
//!
//! The lanes of a register are queries, so every step of both softmaxes is plain vertical arithmetic, whatever the blocks'
//! sizes. Scores are kept transposed, `[keys, queries]`, in base 2 (queries are scaled by `scale * log2(e)`). With `m`, `sum` the
//! running maximum and sum of the outer softmax, a tile of keys goes through
//!
//! 1. `S = K Q^T`;
//! 2. per block: `m_c = max S_j`, `e_j = 2^(S_j - m_c)`, `l_c = sum e_j`: the inner softmax is `e_j / l_c`;
//! 3. the outer softmax takes in the blocks' landmarks: `m' = max(m, S_landmark)`, `w_c = 2^(S_landmark - m')`; a block that
//!    the query is in enters with its own tokens instead, `m' = max(m, m_c)`, as if `w_c = l_c 2^(m_c - m')`;
//! 4. `P_j = e_j w_c / l_c`, landmarks 0, and `O^T = O^T 2^(m - m') + V^T P`.
//!
//! At the end `O / sum` is the output, and the outer log-sum-exp `m + log2(sum)` is all that the backward pass needs.

use bytemuck::Zeroable;
use pulp::{Simd, WithSimd};

use super::dropout::Draw;
use super::lanes::Real;
use super::product::Product;
use super::tiles::{Block, KeyTile, key_range, key_tiles};

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

/// Keys a tile aims at: scores of a tile stay in the second-level cache together with the keys and values.
pub const KEYS_PER_TILE: usize = 128;
/// Queries a tile aims at.
pub const QUERIES_PER_TILE: usize = 64;

/// Time steps of one head: step `t` is `data[t * stride..][..head_dim]`.
#[derive(Clone, Copy)]
pub struct Steps<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
}

impl<'a, T> Steps<'a, T> {
    pub fn from(&self, t: usize) -> &'a [T] {
        &self.data[t * self.stride..]
    }
}

/// What a tile of queries is computed from.
#[derive(Clone, Copy)]
pub struct TileInput<'a, T> {
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
    pub k: Steps<'a, T>,
    pub v: Steps<'a, T>,
    /// Ascending places of the landmarks that bound blocks.
    pub landmarks: &'a [usize],
    /// From which query position on each key is visible, if not from its own (the two plain-softmax ablations).
    pub visible_from: Option<&'a [usize]>,
    /// The queries, `n` of them from position `first` on.
    pub q: Steps<'a, T>,
    pub first: usize,
    pub n: usize,
    pub draw: Option<Draw>,
}

impl<T: Real> TileInput<'_, T> {
    /// First query position that sees key `j`, relative to the tile, as a number to compare lanes with.
    #[inline(always)]
    pub fn visible(&self, j: usize) -> T {
        let from = self.visible_from.map_or(j, |from| from[j]);
        T::cast(from as f64 - self.first as f64)
    }
}

/// Buffers of one worker, reused from tile to tile.
pub struct Scratch<S: Simd, T: Real> {
    /// Scaled queries, `[head_dim, n]`.
    q: Vec<T::Lanes<S>>,
    /// Scores, then weights, `[keys, n]`.
    weights: Vec<T::Lanes<S>>,
    /// Unnormalised output, `[head_dim, n]`.
    out: Vec<T::Lanes<S>>,
    max: Vec<T::Lanes<S>>,
    sum: Vec<T::Lanes<S>>,
    blocks: Vec<Block>,
    /// Inner sums of the blocks of a tile.
    inner: Vec<[T::Lanes<S>; 2]>,
}

impl<S: Simd, T: Real> Default for Scratch<S, T> {
    fn default() -> Self {
        let none = Vec::new;
        Self { q: none(), weights: none(), out: none(), max: none(), sum: none(), blocks: vec![], inner: vec![] }
    }
}

/// One tile: outputs `[n, head_dim]` and natural log-sum-exps `[n]` of the outer softmax.
pub struct ForwardTile<'a, S: Simd, T: Real> {
    pub s: S,
    pub input: TileInput<'a, T>,
    pub scratch: &'a mut Scratch<S, T>,
    pub out: &'a mut [T],
    pub lse: &'a mut [T],
}

impl<S: Simd, T: Real> WithSimd for ForwardTile<'_, S, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        let Self { s, input, scratch, out, lse } = self;
        let (d, lanes) = (input.head_dim, T::lanes::<S>());
        let nv = input.n.div_ceil(lanes);
        let reset = |buffer: &mut Vec<T::Lanes<S>>, n, x| {
            buffer.clear();
            buffer.resize(n, T::splat(s, x));
        };
        pack_transposed::<S, T>(s, &mut scratch.q, input.q, input.n, d, input.scale * std::f64::consts::LOG2_E);
        reset(&mut scratch.out, d * nv, T::default());
        reset(&mut scratch.max, nv, T::LOW);
        reset(&mut scratch.sum, nv, T::default());
        let tiles =
            key_tiles(input.landmarks, input.first, input.first + input.n - 1, KEYS_PER_TILE, &mut scratch.blocks);
        for tile in &tiles {
            let keys = key_range(tile, &scratch.blocks);
            if scratch.weights.len() < keys.len() * nv {
                reset(&mut scratch.weights, keys.len() * nv, T::default());
            }
            let k = input.k.from(keys.start);
            Product {
                s,
                m: keys.len(),
                n: nv,
                k: d,
                a: k,
                a_row: input.k.stride,
                a_col: 1,
                b: &scratch.q,
                b_row: nv,
                c: &mut scratch.weights,
                c_row: nv,
                accumulate: false,
            }
            .run();
            let mut x = 0;
            while x + 2 <= nv {
                scratch.softmax::<2>(s, &input, tile, keys.start, nv, x);
                x += 2;
            }
            if x < nv {
                scratch.softmax::<1>(s, &input, tile, keys.start, nv, x);
            }
            if let Some(draw) = &input.draw {
                let weights: &mut [T] = bytemuck::cast_slice_mut(&mut scratch.weights[..keys.len() * nv]);
                draw.weights(weights, nv * lanes, input.first, keys.clone());
            }
            let v = input.v.from(keys.start);
            Product {
                s,
                m: d,
                n: nv,
                k: keys.len(),
                a: v,
                a_row: 1,
                a_col: input.v.stride,
                b: &scratch.weights,
                b_row: nv,
                c: &mut scratch.out,
                c_row: nv,
                accumulate: true,
            }
            .run();
        }
        let (sum, max): (&[T], &[T]) = (bytemuck::cast_slice(&scratch.sum), bytemuck::cast_slice(&scratch.max));
        let result: &[T] = bytemuck::cast_slice(&scratch.out);
        for i in 0..input.n {
            // A query without a candidate (a landmark that opens the text) has sum 0: its output is 0.
            let total = sum[i].widen();
            let inverse = T::cast(if total > 0. { 1. / total } else { 0. });
            lse[i] = T::cast((max[i].widen() + total.log2()) * std::f64::consts::LN_2);
            for (channel, out) in out[i * d..(i + 1) * d].iter_mut().enumerate() {
                *out = result[channel * nv * lanes + i] * inverse;
            }
        }
    }
}

impl<S: Simd, T: Real> Scratch<S, T> {
    /// Steps 2 to 4 for registers `x..x + NV` of queries: scores to weights, and the running sums.
    #[inline(always)]
    fn softmax<const NV: usize>(
        &mut self,
        s: S,
        input: &TileInput<T>,
        tile: &KeyTile,
        base: usize,
        nv: usize,
        x: usize,
    ) {
        let low = [T::splat(s, T::LOW); NV];
        let zero = [T::splat(s, T::default()); NV];
        let old_max = load::<S, T, NV>(&self.max, x);
        let mut max = old_max;
        let mut sum = load::<S, T, NV>(&self.sum, x);
        let weights = &mut self.weights;
        let at = |j: usize| (j - base) * nv + x;
        match tile {
            KeyTile::Past(range) => {
                self.inner.clear();
                for block in &self.blocks[range.clone()] {
                    let l_c = inner_softmax::<S, T, NV>(s, weights, at(block.start), nv, block.end - block.start, low);
                    let landmark = load::<S, T, NV>(weights, at(block.end));
                    let mut kept = [zero[0]; 2];
                    kept[..NV].copy_from_slice(&l_c);
                    self.inner.push(kept);
                    max = each!(v: T::vmax(s, max[v], landmark[v]));
                }
                let fade = each!(v: T::exp2(s, T::vsub(s, old_max[v], max[v])));
                sum = each!(v: T::vmul(s, sum[v], fade[v]));
                for (block, l_c) in self.blocks[range.clone()].iter().zip(&self.inner) {
                    let landmark = load::<S, T, NV>(weights, at(block.end));
                    let w_c = each!(v: T::exp2(s, T::vsub(s, landmark[v], max[v])));
                    sum = each!(v: T::vadd(s, sum[v], w_c[v]));
                    let mut factor = each!(v: T::vdiv(s, w_c[v], l_c[v]));
                    if let Some(draw) = &input.draw {
                        draw.block(
                            bytemuck::cast_slice_mut::<_, T>(&mut factor),
                            input.first + x * T::lanes::<S>(),
                            block.end,
                        );
                    }
                    scale_rows::<S, T, NV>(s, weights, at(block.start), nv, block.end - block.start, factor);
                    store(weights, at(block.end), zero);
                }
            }
            KeyTile::Mixed(block) => {
                let position = lane_positions::<S, T, NV>(x);
                causal::<S, T, NV>(s, weights, at(block.start), nv, block.start..block.end, input, position);
                let (m_c, l_c) =
                    inner_softmax_max::<S, T, NV>(s, weights, at(block.start), nv, block.end - block.start, low);
                let landmark = load::<S, T, NV>(weights, at(block.end));
                // Past the block is a query behind the landmark: landmark + 1 <= position.
                let behind = T::splat(s, T::cast((block.end + 1) as f64 - input.first as f64));
                max = each!(v: T::vmax(s, max[v], T::select_le(s, behind, position[v], landmark[v], m_c[v])));
                let fade = each!(v: T::exp2(s, T::vsub(s, old_max[v], max[v])));
                let by_landmark = each!(v: T::exp2(s, T::vsub(s, landmark[v], max[v])));
                let by_tokens = each!(v: T::exp2(s, T::vsub(s, m_c[v], max[v])));
                sum = each!(v: {
                    let entered = T::select_le(s, behind, position[v], by_landmark[v], T::vmul(s, l_c[v], by_tokens[v]));
                    T::mul_add(s, sum[v], fade[v], entered)
                });
                let mut share: [_; NV] = each!(v: T::vdiv(s, by_landmark[v], l_c[v]));
                if let Some(draw) = &input.draw {
                    draw.block(
                        bytemuck::cast_slice_mut::<_, T>(&mut share),
                        input.first + x * T::lanes::<S>(),
                        block.end,
                    );
                }
                let factor = each!(v: T::select_le(s, behind, position[v], share[v], by_tokens[v]));
                scale_rows::<S, T, NV>(s, weights, at(block.start), nv, block.end - block.start, factor);
                store(weights, at(block.end), zero);
            }
            KeyTile::Own(block) => {
                let position = lane_positions::<S, T, NV>(x);
                causal::<S, T, NV>(s, weights, at(block.start), nv, block.start..block.end, input, position);
                for row in 0..block.end - block.start {
                    let score = load::<S, T, NV>(weights, at(block.start) + row * nv);
                    max = each!(v: T::vmax(s, max[v], score[v]));
                }
                let fade = each!(v: T::exp2(s, T::vsub(s, old_max[v], max[v])));
                sum = each!(v: T::vmul(s, sum[v], fade[v]));
                for row in 0..block.end - block.start {
                    let index = at(block.start) + row * nv;
                    let score = load::<S, T, NV>(weights, index);
                    let weight = each!(v: T::exp2(s, T::vsub(s, score[v], max[v])));
                    sum = each!(v: T::vadd(s, sum[v], weight[v]));
                    store(weights, index, weight);
                }
            }
        }
        let fade = each!(v: T::exp2(s, T::vsub(s, old_max[v], max[v])));
        for channel in 0..input.head_dim {
            let out = load::<S, T, NV>(&self.out, channel * nv + x);
            store(&mut self.out, channel * nv + x, each!(v: T::vmul(s, out[v], fade[v])));
        }
        store(&mut self.max, x, max);
        store(&mut self.sum, x, sum);
    }
}

/// Turns `n` rows of scores into `2^(score - max)`, and returns their sum: the inner softmax but for its division.
#[inline(always)]
fn inner_softmax<S: Simd, T: Real, const NV: usize>(
    s: S,
    rows: &mut [T::Lanes<S>],
    at: usize,
    nv: usize,
    n: usize,
    low: [T::Lanes<S>; NV],
) -> [T::Lanes<S>; NV] {
    inner_softmax_max::<S, T, NV>(s, rows, at, nv, n, low).1
}

/// [`inner_softmax`] with the maximum, which is the one that it was given where there are no rows.
#[inline(always)]
pub fn inner_softmax_max<S: Simd, T: Real, const NV: usize>(
    s: S,
    rows: &mut [T::Lanes<S>],
    at: usize,
    nv: usize,
    n: usize,
    mut max: [T::Lanes<S>; NV],
) -> ([T::Lanes<S>; NV], [T::Lanes<S>; NV]) {
    let mut sum = [T::splat(s, T::default()); NV];
    for row in 0..n {
        let score = load::<S, T, NV>(rows, at + row * nv);
        max = each!(v: T::vmax(s, max[v], score[v]));
    }
    for row in 0..n {
        let score = load::<S, T, NV>(rows, at + row * nv);
        let e = each!(v: T::exp2(s, T::vsub(s, score[v], max[v])));
        sum = each!(v: T::vadd(s, sum[v], e[v]));
        store(rows, at + row * nv, e);
    }
    (max, sum)
}

/// Multiplies `n` rows by `factor`.
#[inline(always)]
fn scale_rows<S: Simd, T: Real, const NV: usize>(
    s: S,
    rows: &mut [T::Lanes<S>],
    at: usize,
    nv: usize,
    n: usize,
    factor: [T::Lanes<S>; NV],
) {
    for row in 0..n {
        let e = load::<S, T, NV>(rows, at + row * nv);
        store(rows, at + row * nv, each!(v: T::vmul(s, e[v], factor[v])));
    }
}

/// Sets the scores of keys that a query does not see to minus infinity.
#[inline(always)]
pub fn causal<S: Simd, T: Real, const NV: usize>(
    s: S,
    rows: &mut [T::Lanes<S>],
    at: usize,
    nv: usize,
    keys: std::ops::Range<usize>,
    input: &TileInput<T>,
    position: [T::Lanes<S>; NV],
) {
    let hidden = T::splat(s, T::cast(f64::NEG_INFINITY));
    for (row, j) in keys.enumerate() {
        let from = T::splat(s, input.visible(j));
        let score = load::<S, T, NV>(rows, at + row * nv);
        store(rows, at + row * nv, each!(v: T::select_le(s, from, position[v], score[v], hidden)));
    }
}

/// Positions of the queries in registers `x..x + NV`, relative to the tile.
#[inline(always)]
pub fn lane_positions<S: Simd, T: Real, const NV: usize>(x: usize) -> [T::Lanes<S>; NV] {
    each!(v: {
        let mut lanes = [T::Lanes::<S>::zeroed()];
        for (i, lane) in bytemuck::cast_slice_mut::<_, T>(&mut lanes).iter_mut().enumerate() {
            *lane = T::cast(((x + v) * T::lanes::<S>() + i) as f64);
        }
        lanes[0]
    })
}

/// Packs `n` steps as `[head_dim, n]`, times `scale`; lanes past `n` are 0.
#[inline(always)]
pub fn pack_transposed<S: Simd, T: Real>(
    s: S,
    packed: &mut Vec<T::Lanes<S>>,
    steps: Steps<T>,
    n: usize,
    head_dim: usize,
    scale: f64,
) {
    let lanes = T::lanes::<S>();
    let nv = n.div_ceil(lanes);
    packed.clear();
    packed.resize(head_dim * nv, T::splat(s, T::default()));
    let (packed, scale) = (bytemuck::cast_slice_mut::<_, T>(packed), T::cast(scale));
    for i in 0..n {
        for (channel, &x) in steps.from(i)[..head_dim].iter().enumerate() {
            packed[channel * nv * lanes + i] = x * scale;
        }
    }
}

#[inline(always)]
pub fn load<S: Simd, T: Real, const NV: usize>(rows: &[T::Lanes<S>], at: usize) -> [T::Lanes<S>; NV] {
    let rows = &rows[at..at + NV];
    each!(v: rows[v])
}

#[inline(always)]
pub fn store<L: Copy, const NV: usize>(rows: &mut [L], at: usize, x: [L; NV]) {
    rows[at..at + NV].copy_from_slice(&x);
}
