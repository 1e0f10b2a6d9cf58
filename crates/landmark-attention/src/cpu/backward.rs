//! The fused backward pass: one tile of queries against all the keys that it saw.
//!
//! Scores are computed again and become weights through the log-sum-exp that the forward pass kept. With `dP_j = dout . v_j`,
//! `D_c = sum_c e_j dP_j / l_c` and `Delta = dout . out`:
//!
//! - own block: `dS_j = P_j (dP_j - Delta)`;
//! - earlier block c: `dS_j = P_j (dP_j - D_c)`, and its landmark gets `w_c (D_c - Delta)`.
//!
//! Then `dQ = dS K`, `dK += dS^T Q`, `dV += P^T dout`. A worker adds into gradients of keys and values of its own.

use pulp::{Simd, WithSimd};

use super::column::{Column, Registers, each, lane_numbers, load};
use super::forward::{KEYS_PER_TILE, Steps, TileInput, pack_transposed};
use super::lanes::Real;
use super::product::Product;
use super::tiles::{Block, KeyTile, key_range, key_tiles};

/// Buffers of one worker, reused from tile to tile.
pub struct Scratch<S: Simd, T: Real> {
    /// Queries (times `scale * log2(e)`) and output gradients, `[head_dim, n]`.
    q_t: Vec<T::Lanes<S>>,
    dout_t: Vec<T::Lanes<S>>,
    /// The same, `[n, head_dim]`, queries times `scale`.
    q: Vec<T::Lanes<S>>,
    dout: Vec<T::Lanes<S>>,
    /// Scores, then weights, and gradients of weights, then of scores: `[keys, n]`.
    weights: Vec<T::Lanes<S>>,
    grads: Vec<T::Lanes<S>>,
    /// Gradient of the queries, `[head_dim, n]`.
    dq: Vec<T::Lanes<S>>,
    /// Per query: the outer log-sum-exp in base 2, and Delta.
    lse: Vec<T::Lanes<S>>,
    delta: Vec<T::Lanes<S>>,
    blocks: Vec<Block>,
}

impl<S: Simd, T: Real> Default for Scratch<S, T> {
    fn default() -> Self {
        Self {
            q_t: vec![],
            dout_t: vec![],
            q: vec![],
            dout: vec![],
            weights: vec![],
            grads: vec![],
            dq: vec![],
            lse: vec![],
            delta: vec![],
            blocks: vec![],
        }
    }
}

/// One tile: writes `dq` `[n, head_dim]`, adds to `dk` and `dv` `[kv_len, head_dim in registers]`.
pub struct BackwardTile<'a, S: Simd, T: Real> {
    pub s: S,
    pub input: TileInput<'a, T>,
    pub scratch: &'a mut Scratch<S, T>,
    /// Results of the forward pass for the tile, `[n, head_dim]` and `[n]`.
    pub out: &'a [T],
    pub lse: &'a [T],
    pub dout: Steps<'a, T>,
    pub dq: &'a mut [T],
    pub dk: &'a mut [T::Lanes<S>],
    pub dv: &'a mut [T::Lanes<S>],
}

impl<S: Simd, T: Real> WithSimd for BackwardTile<'_, S, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        let Self { s, input, scratch, out, lse, dout, dq, dk, dv } = self;
        let (d, n, lanes) = (input.head_dim, input.n, T::lanes::<S>());
        let (nv, channels) = (n.div_ceil(lanes), d.div_ceil(lanes));
        pack_transposed::<S, T>(s, &mut scratch.q_t, input.q, n, d, input.scale * std::f64::consts::LOG2_E);
        pack_transposed::<S, T>(s, &mut scratch.dout_t, dout, n, d, 1.);
        pack_rows::<S, T>(s, &mut scratch.q, input.q, n, d, input.scale);
        pack_rows::<S, T>(s, &mut scratch.dout, dout, n, d, 1.);
        let reset = |buffer: &mut Vec<T::Lanes<S>>, n, x| {
            buffer.clear();
            buffer.resize(n, T::splat(s, x));
        };
        reset(&mut scratch.dq, d * nv, T::default());
        // Lanes without a query, and queries without a candidate, weigh nothing.
        reset(&mut scratch.lse, nv, T::HIGH);
        reset(&mut scratch.delta, nv, T::default());
        for i in 0..n {
            if lse[i].widen() > f64::NEG_INFINITY {
                bytemuck::cast_slice_mut::<_, T>(&mut scratch.lse)[i] = lse[i] * T::cast(std::f64::consts::LOG2_E);
            }
            let mut delta = T::default();
            for (&out, &dout) in out[i * d..(i + 1) * d].iter().zip(dout.from(i)) {
                delta += out * dout;
            }
            bytemuck::cast_slice_mut::<_, T>(&mut scratch.delta)[i] = delta;
        }
        let tiles = key_tiles(input.landmarks, input.first, input.first + n - 1, KEYS_PER_TILE, &mut scratch.blocks);
        for tile in &tiles {
            let keys = key_range(tile, &scratch.blocks);
            if scratch.weights.len() < keys.len() * nv {
                reset(&mut scratch.weights, keys.len() * nv, T::default());
                reset(&mut scratch.grads, keys.len() * nv, T::default());
            }
            for (rows, queries, result) in
                [(input.k, &scratch.q_t, &mut scratch.weights), (input.v, &scratch.dout_t, &mut scratch.grads)]
            {
                Product {
                    s,
                    m: keys.len(),
                    n: nv,
                    k: d,
                    a: rows.from(keys.start),
                    a_row: rows.stride,
                    a_col: 1,
                    b: queries,
                    b_row: nv,
                    c: result,
                    c_row: nv,
                    accumulate: false,
                }
                .run();
            }
            if let Some(draw) = &input.draw {
                let grads: &mut [T] = bytemuck::cast_slice_mut(&mut scratch.grads[..keys.len() * nv]);
                draw.weights(grads, nv * lanes, input.first, keys.clone());
            }
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
            Product {
                s,
                m: d,
                n: nv,
                k: keys.len(),
                a: input.k.from(keys.start),
                a_row: 1,
                a_col: input.k.stride,
                b: &scratch.grads,
                b_row: nv,
                c: &mut scratch.dq,
                c_row: nv,
                accumulate: true,
            }
            .run();
            let queries = [(&scratch.grads, &scratch.q, &mut *dk), (&scratch.weights, &scratch.dout, &mut *dv)];
            for (by_key, rows, result) in queries {
                Product {
                    s,
                    m: keys.len(),
                    n: channels,
                    k: n,
                    a: bytemuck::cast_slice::<_, T>(by_key),
                    a_row: nv * lanes,
                    a_col: 1,
                    b: rows,
                    b_row: channels,
                    c: &mut result[keys.start * channels..],
                    c_row: channels,
                    accumulate: true,
                }
                .run();
            }
        }
        let (result, scale): (&[T], T) = (bytemuck::cast_slice(&scratch.dq), T::cast(input.scale));
        for (i, dq) in dq.chunks_exact_mut(d).enumerate() {
            for (channel, dq) in dq.iter_mut().enumerate() {
                *dq = result[channel * nv * lanes + i] * scale;
            }
        }
    }
}

impl<S: Simd, T: Real> Scratch<S, T> {
    /// Scores to weights and gradients of weights to gradients of scores, for registers `x..x + NV` of queries.
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
        let (lse, delta) = (load::<S, T, NV>(&self.lse, x), load::<S, T, NV>(&self.delta, x));
        let mut weights = Column::<S, T, NV> { cells: &mut self.weights, row, at: x, base };
        let mut grads = Column::<S, T, NV> { cells: &mut self.grads, row, at: x, base };
        let (zero, one) = ([T::splat(s, T::default()); NV], [T::splat(s, T::cast(1.)); NV]);
        match tile {
            KeyTile::Past(range) => {
                for block in &self.blocks[range.clone()] {
                    let (_, l_c) = weights.inner_softmax(s, block.tokens());
                    let d_c = inner_gradient(s, &weights, &grads, block, l_c);
                    let landmark = weights.load(block.end);
                    let w_c = each!(v: T::exp2(s, T::vsub(s, landmark[v], lse[v])));
                    let mut kept = one;
                    input.drop_block::<S>(&mut kept, x, block);
                    let factor = each!(v: T::vmul(s, kept[v], T::vdiv(s, w_c[v], l_c[v])));
                    finish(s, &mut weights, &mut grads, block, factor, d_c);
                    let d_landmark = each!(v: T::vmul(s, w_c[v], T::vsub(s, T::vmul(s, kept[v], d_c[v]), delta[v])));
                    weights.store(block.end, zero);
                    grads.store(block.end, d_landmark);
                }
            }
            KeyTile::Mixed(block) => {
                let position = lane_numbers::<S, T, NV>(x);
                weights.hide(s, block.tokens(), position, |j| input.visible(j));
                let (m_c, l_c) = weights.inner_softmax(s, block.tokens());
                let d_c = inner_gradient(s, &weights, &grads, block, l_c);
                let landmark = weights.load(block.end);
                let past = T::splat(s, input.past(block));
                let w_c = each!(v: T::exp2(s, T::vsub(s, landmark[v], lse[v])));
                let mut kept = one;
                input.drop_block::<S>(&mut kept, x, block);
                let factor = each!(v: {
                    let share = T::vmul(s, kept[v], T::vdiv(s, w_c[v], l_c[v]));
                    T::select_le(s, past, position[v], share, T::exp2(s, T::vsub(s, m_c[v], lse[v])))
                });
                let centre = each!(v: T::select_le(s, past, position[v], d_c[v], delta[v]));
                finish(s, &mut weights, &mut grads, block, factor, centre);
                let d_landmark = each!(v: {
                    let grad = T::vmul(s, w_c[v], T::vsub(s, T::vmul(s, kept[v], d_c[v]), delta[v]));
                    T::select_le(s, past, position[v], grad, zero[v])
                });
                weights.store(block.end, zero);
                grads.store(block.end, d_landmark);
            }
            KeyTile::Own(block) => {
                weights.hide(s, block.tokens(), lane_numbers::<S, T, NV>(x), |j| input.visible(j));
                for j in block.tokens() {
                    let (score, grad) = (weights.load(j), grads.load(j));
                    let weight = each!(v: T::exp2(s, T::vsub(s, score[v], lse[v])));
                    weights.store(j, weight);
                    grads.store(j, each!(v: T::vmul(s, weight[v], T::vsub(s, grad[v], delta[v]))));
                }
            }
        }
    }
}

/// `D_c`: the mean of a block's gradients under its inner softmax.
#[inline(always)]
fn inner_gradient<S: Simd, T: Real, const NV: usize>(
    s: S,
    weights: &Column<S, T, NV>,
    grads: &Column<S, T, NV>,
    block: &Block,
    l_c: Registers<S, T, NV>,
) -> Registers<S, T, NV> {
    let mut sum = [T::splat(s, T::default()); NV];
    for j in block.tokens() {
        let (e, grad) = (weights.load(j), grads.load(j));
        sum = each!(v: T::mul_add(s, e[v], grad[v], sum[v]));
    }
    // A block without tokens, or one that the query is not past, may have an empty sum: its gradient is 0, not 0 / 0.
    let half = T::splat(s, T::cast(0.5));
    each!(v: T::vdiv(s, sum[v], T::vmax(s, l_c[v], half)))
}

/// `P_j = e_j factor` and `dS_j = P_j (dP_j - centre)`.
#[inline(always)]
fn finish<S: Simd, T: Real, const NV: usize>(
    s: S,
    weights: &mut Column<S, T, NV>,
    grads: &mut Column<S, T, NV>,
    block: &Block,
    factor: Registers<S, T, NV>,
    centre: Registers<S, T, NV>,
) {
    for j in block.tokens() {
        let (e, grad) = (weights.load(j), grads.load(j));
        let weight = each!(v: T::vmul(s, e[v], factor[v]));
        weights.store(j, weight);
        grads.store(j, each!(v: T::vmul(s, weight[v], T::vsub(s, grad[v], centre[v]))));
    }
}

/// Packs `n` steps as `[n, head_dim]` in whole registers, times `scale`.
#[inline(always)]
fn pack_rows<S: Simd, T: Real>(
    s: S,
    packed: &mut Vec<T::Lanes<S>>,
    steps: Steps<T>,
    n: usize,
    head_dim: usize,
    scale: f64,
) {
    let channels = head_dim.div_ceil(T::lanes::<S>());
    packed.clear();
    packed.resize(n * channels, T::splat(s, T::default()));
    let (packed, scale) = (bytemuck::cast_slice_mut::<_, T>(packed), T::cast(scale));
    for (i, row) in packed.chunks_exact_mut(channels * T::lanes::<S>()).enumerate() {
        for (packed, &x) in row.iter_mut().zip(&steps.from(i)[..head_dim]) {
            *packed = x * scale;
        }
    }
}
