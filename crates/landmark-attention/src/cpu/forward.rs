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

use pulp::{Simd, WithSimd};

use super::column::{Column, each, lane_numbers, load};
use super::dropout::Draw;
use super::lanes::Real;
use super::product::Product;
use super::tiles::{Block, KeyTile, key_range, key_tiles};

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

    /// First query position behind the landmark of `block`, relative to the tile: from there on it is an earlier block.
    #[inline(always)]
    pub fn past(&self, block: &Block) -> T {
        T::cast((block.end + 1) as f64 - self.first as f64)
    }

    /// Group dropout of the shares that the queries in registers `x..` give to `block`.
    #[inline(always)]
    pub fn drop_block<S: Simd>(&self, shares: &mut [T::Lanes<S>], x: usize, block: &Block) {
        if let Some(draw) = &self.draw {
            draw.block(bytemuck::cast_slice_mut::<_, T>(shares), self.first + x * T::lanes::<S>(), block.end);
        }
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
    inner: Vec<T::Lanes<S>>,
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
        row: usize,
        x: usize,
    ) {
        let old_max = load::<S, T, NV>(&self.max, x);
        let (mut max, mut sum) = (old_max, load::<S, T, NV>(&self.sum, x));
        let mut weights = Column::<S, T, NV> { cells: &mut self.weights, row, at: x, base };
        let zero = [T::splat(s, T::default()); NV];
        match tile {
            KeyTile::Past(range) => {
                let blocks = &self.blocks[range.clone()];
                self.inner.clear();
                for block in blocks {
                    let (_, l_c) = weights.inner_softmax(s, block.tokens());
                    self.inner.extend_from_slice(&l_c);
                    let landmark = weights.load(block.end);
                    max = each!(v: T::vmax(s, max[v], landmark[v]));
                }
                sum = each!(v: T::vmul(s, sum[v], T::exp2(s, T::vsub(s, old_max[v], max[v]))));
                for (c, block) in blocks.iter().enumerate() {
                    let (landmark, l_c) = (weights.load(block.end), load::<S, T, NV>(&self.inner, c * NV));
                    let w_c = each!(v: T::exp2(s, T::vsub(s, landmark[v], max[v])));
                    sum = each!(v: T::vadd(s, sum[v], w_c[v]));
                    let mut share = each!(v: T::vdiv(s, w_c[v], l_c[v]));
                    input.drop_block::<S>(&mut share, x, block);
                    weights.scale(s, block.tokens(), share);
                    weights.store(block.end, zero);
                }
            }
            KeyTile::Mixed(block) => {
                let position = lane_numbers::<S, T, NV>(x);
                weights.hide(s, block.tokens(), position, |j| input.visible(j));
                let (m_c, l_c) = weights.inner_softmax(s, block.tokens());
                let landmark = weights.load(block.end);
                let past = T::splat(s, input.past(block));
                max = each!(v: T::vmax(s, max[v], T::select_le(s, past, position[v], landmark[v], m_c[v])));
                let w_c = each!(v: T::exp2(s, T::vsub(s, landmark[v], max[v])));
                let own = each!(v: T::exp2(s, T::vsub(s, m_c[v], max[v])));
                sum = each!(v: {
                    let entered = T::select_le(s, past, position[v], w_c[v], T::vmul(s, l_c[v], own[v]));
                    T::mul_add(s, sum[v], T::exp2(s, T::vsub(s, old_max[v], max[v])), entered)
                });
                let mut share = each!(v: T::vdiv(s, w_c[v], l_c[v]));
                input.drop_block::<S>(&mut share, x, block);
                let factor = each!(v: T::select_le(s, past, position[v], share[v], own[v]));
                weights.scale(s, block.tokens(), factor);
                weights.store(block.end, zero);
            }
            KeyTile::Own(block) => {
                weights.hide(s, block.tokens(), lane_numbers::<S, T, NV>(x), |j| input.visible(j));
                for j in block.tokens() {
                    let score = weights.load(j);
                    max = each!(v: T::vmax(s, max[v], score[v]));
                }
                sum = each!(v: T::vmul(s, sum[v], T::exp2(s, T::vsub(s, old_max[v], max[v]))));
                for j in block.tokens() {
                    let score = weights.load(j);
                    let weight = each!(v: T::exp2(s, T::vsub(s, score[v], max[v])));
                    sum = each!(v: T::vadd(s, sum[v], weight[v]));
                    weights.store(j, weight);
                }
            }
        }
        let fade = each!(v: T::exp2(s, T::vsub(s, old_max[v], max[v])));
        Column::<S, T, NV> { cells: &mut self.out, row, at: x, base: 0 }.scale(s, 0..input.head_dim, fade);
        self.max[x..x + NV].copy_from_slice(&max);
        self.sum[x..x + NV].copy_from_slice(&sum);
    }
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
