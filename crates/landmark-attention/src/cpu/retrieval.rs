//! Retrieval on the CPU: scoring and choosing blocks, and attention over chosen blocks without gathering them.
//!
//! Both are the forward pass's products with queries as lanes. Attention goes block by block: the queries that chose a block are
//! brought to it, so that a block is read once for all of them.

use candle_core::{DType, Storage, Tensor, WithDType};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::column::{Column, each};
use super::forward::{QUERIES_PER_TILE, Steps, pack_transposed};
use super::lanes::Real;
use super::product::Product;
use super::single::{self, FEW};
use crate::retrieval::{Blocks, Frames, Kept, RetrievalShape, Retrieved, Selection, SlotQueries};

/// Landmarks scored at once.
const LANDMARKS_PER_TILE: usize = 256;

/// The operands as slices.
struct Operands<'a, T> {
    shape: &'a RetrievalShape,
    /// `[slots, batch, heads, time, head_dim]`
    queries: &'a [T],
    kept: Slices<'a, T>,
    landmarks: &'a [T],
    first: usize,
    len: usize,
    lengths: Option<&'a [u32]>,
    newest: usize,
    /// `scale * log2(e)`.
    scale: f64,
}

/// [`Kept`] as slices.
enum Slices<'a, T> {
    Ring {
        keys: &'a [T],
        values: &'a [T],
    },
    Frames(&'a dyn Frames),
    /// The frame of each chosen block.
    Pool {
        keys: &'a [T],
        values: &'a [T],
        frames: &'a [u32],
    },
}

impl<'a, T: Real> Operands<'a, T> {
    fn queries(&self, slot: usize, bh: usize) -> &'a [T] {
        let per_head = self.shape.time * self.shape.head_dim;
        &self.queries[(slot * self.shape.batch * self.shape.heads + bh) * per_head..][..per_head]
    }

    fn place(&self, block: usize) -> usize {
        (self.first + block) % self.shape.capacity
    }

    /// Ordinary tokens of a block and its landmark.
    fn size(&self, block: usize) -> usize {
        self.lengths.map_or(self.shape.block, |lengths| lengths[block] as usize + 1)
    }

    /// Keys and values of a block, `[size, head_dim]`: what is before them in its place is left out. It is the chosen block of this number, over
    /// heads, queries and ranks.
    fn block(&self, bh: usize, block: usize, chosen: usize) -> [&'a [T]; 2] {
        let (kv, full) = (self.shape.kv(bh), self.shape.block * self.shape.head_dim);
        let unused = full - self.size(block) * self.shape.head_dim;
        let places = match self.kept {
            Slices::Ring { keys, values } => {
                let at = (kv * self.shape.capacity + self.place(block)) * full;
                [&keys[at..], &values[at..]]
            }
            // `attend` looked for all of them.
            Slices::Frames(frames) => {
                frames.frame(kv, block).expect("a chosen block in a frame").map(bytemuck::cast_slice)
            }
            Slices::Pool { keys, values, frames } => {
                let at = frames[chosen] as usize * full;
                [&keys[at..], &values[at..]]
            }
        };
        places.map(|place| &place[unused..full])
    }

    /// Base-2 scores of blocks for queries `from..from + n` of head `bh`: calls `visit(block, scores of n queries)` for all
    /// blocks in text order.
    #[inline(always)]
    fn scores<S: Simd>(&self, s: S, bh: usize, from: usize, n: usize, mut visit: impl FnMut(usize, &[T])) {
        let (d, lanes) = (self.shape.head_dim, T::lanes::<S>());
        if n <= FEW && single::fits::<S, T>(d) {
            return self.scores_one_by_one(s, bh, from, n, visit);
        }
        let nv = n.div_ceil(lanes);
        let landmarks = &self.landmarks[self.shape.kv(bh) * self.shape.capacity * d..][..self.shape.capacity * d];
        let (mut packed, mut scores) = (Vec::new(), vec![T::splat(s, T::default()); LANDMARKS_PER_TILE * nv]);
        let mut run = |slot: usize, blocks: std::ops::Range<usize>| {
            let steps = Steps { data: &self.queries(slot, bh)[from * d..], stride: d };
            pack_transposed::<S, T>(s, &mut packed, steps, n, d, self.scale);
            let mut block = blocks.start;
            while block < blocks.end {
                let place = self.place(block);
                let m = (blocks.end - block).min(LANDMARKS_PER_TILE).min(self.shape.capacity - place);
                Product {
                    s,
                    m,
                    n: nv,
                    k: d,
                    a: &landmarks[place * d..],
                    a_row: d,
                    a_col: 1,
                    b: &packed,
                    b_row: nv,
                    c: &mut scores,
                    c_row: nv,
                    accumulate: false,
                }
                .run();
                for (i, row) in bytemuck::cast_slice::<_, T>(&scores).chunks_exact(nv * lanes).take(m).enumerate() {
                    visit(block + i, &row[..n]);
                }
                block += m;
            }
        };
        let older = self.len - self.newest;
        run(0, 0..older);
        for i in 0..self.newest {
            run(i + 1, older + i..older + i + 1);
        }
    }

    /// The same for few queries.
    #[inline(always)]
    fn scores_one_by_one<S: Simd>(&self, s: S, bh: usize, from: usize, n: usize, mut visit: impl FnMut(usize, &[T])) {
        let d = self.shape.head_dim;
        let landmarks = &self.landmarks[self.shape.kv(bh) * self.shape.capacity * d..][..self.shape.capacity * d];
        let (scale, older) = (T::cast(self.scale), self.len - self.newest);
        let (mut q, mut scores) = (Vec::with_capacity(n * d), [T::default(); FEW]);
        for slot in 0..=self.newest {
            q.clear();
            q.extend(self.queries(slot, bh)[from * d..][..n * d].iter().map(|&x| x * scale));
            let blocks = if slot == 0 { 0..older } else { older + slot - 1..older + slot };
            for block in blocks {
                let landmark = &landmarks[self.place(block) * d..][..d];
                for (score, q) in scores.iter_mut().zip(q.chunks_exact(d)) {
                    *score = single::dot(s, q, landmark);
                }
                visit(block, &scores[..n]);
            }
        }
    }
}

/// The `k` best of a stream of scores for each of `n` queries; of equals the first.
struct Best {
    k: usize,
    /// Per query, best first.
    found: Vec<Vec<(f32, u32)>>,
    /// Per query, what a score must exceed.
    bar: Vec<f32>,
}

impl Best {
    fn new(n: usize, k: usize) -> Self {
        Self { k, found: vec![Vec::with_capacity(k + 1); n], bar: vec![f32::NEG_INFINITY; n] }
    }

    /// Scores of one block. They are compared in f32: nearer ones are ties.
    #[inline(always)]
    fn offer<T: Real>(&mut self, block: usize, scores: &[T]) {
        let mut any = false;
        for (score, &bar) in scores.iter().zip(&self.bar) {
            any |= score.widen() as f32 > bar;
        }
        if !any {
            return;
        }
        for (i, score) in scores.iter().enumerate() {
            let score = score.widen() as f32;
            if score > self.bar[i] {
                let found = &mut self.found[i];
                let place = found.partition_point(|&(better, _)| better >= score);
                found.insert(place, (score, block as u32));
                found.truncate(self.k);
                if found.len() == self.k {
                    self.bar[i] = found[self.k - 1].0;
                }
            }
        }
    }

    /// The blocks of query `i` in text order.
    fn ascending(&self, i: usize) -> impl Iterator<Item = u32> {
        let mut blocks: Vec<u32> = self.found[i].iter().map(|&(_, block)| block).collect();
        blocks.sort_unstable();
        blocks.into_iter()
    }
}

struct Select<'a, T> {
    operands: Operands<'a, T>,
    k: usize,
    selection: Selection,
}

impl<T: Real> WithSimd for Select<'_, T> {
    /// `[batch, heads, time, k]`.
    type Output = Vec<u32>;

    fn with_simd<S: Simd>(self, s: S) -> Vec<u32> {
        let Self { operands, k, selection } = &self;
        let (operands, k) = (operands, *k);
        let &RetrievalShape { batch, heads, time, .. } = operands.shape;
        let mut chosen = vec![0u32; batch * heads * time * k];
        let per_tile = QUERIES_PER_TILE.min(time);
        match selection {
            Selection::PerTokenAndHead => {
                let tiles = chosen.par_chunks_mut(time * k).enumerate().flat_map(|(bh, chosen)| {
                    chosen.par_chunks_mut(per_tile * k).enumerate().map(move |(i, chosen)| (bh, i * per_tile, chosen))
                });
                tiles.for_each(|(bh, from, chosen)| {
                    let mut best = Best::new(chosen.len() / k, k);
                    let n = chosen.len() / k;
                    s.vectorize(Score {
                        s,
                        operands,
                        bh,
                        from,
                        n,
                        visit: |block, scores: &[T]| best.offer(block, scores),
                    });
                    write(chosen, k, |i| best.ascending(i));
                });
            }
            Selection::MaxOverTokens => chosen.par_chunks_mut(time * k).enumerate().for_each(|(bh, chosen)| {
                let mut largest = vec![T::cast(f64::NEG_INFINITY); operands.len];
                for from in (0..time).step_by(per_tile) {
                    let n = per_tile.min(time - from);
                    let lse = log_sum_exp(s, operands, bh, from, n);
                    let visit = |block: usize, scores: &[T]| {
                        for (score, &lse) in scores.iter().zip(&lse) {
                            largest[block] = larger(largest[block], T::cast(score.widen() - lse));
                        }
                    };
                    s.vectorize(Score { s, operands, bh, from, n, visit });
                }
                let mut best = Best::new(1, k);
                for (block, score) in largest.iter().enumerate() {
                    best.offer(block, std::slice::from_ref(score));
                }
                write(chosen, k, |_| best.ascending(0));
            }),
            Selection::MaxOverHeads => {
                let rows: Vec<(usize, usize)> =
                    (0..batch).flat_map(|b| (0..time).step_by(per_tile).map(move |from| (b, from))).collect();
                let choices: Vec<(usize, usize, Best)> = rows
                    .into_par_iter()
                    .map(|(b, from)| {
                        let n = per_tile.min(time - from);
                        let mut largest = vec![T::cast(f64::NEG_INFINITY); operands.len * n];
                        for h in 0..heads {
                            let lse = log_sum_exp(s, operands, b * heads + h, from, n);
                            let visit = |block: usize, scores: &[T]| {
                                let largest = &mut largest[block * n..][..n];
                                for ((largest, score), &lse) in largest.iter_mut().zip(scores).zip(&lse) {
                                    *largest = larger(*largest, T::cast(score.widen() - lse));
                                }
                            };
                            s.vectorize(Score { s, operands, bh: b * heads + h, from, n, visit });
                        }
                        let mut best = Best::new(n, k);
                        for (block, scores) in largest.chunks_exact(n).enumerate() {
                            best.offer(block, scores);
                        }
                        (b, from, best)
                    })
                    .collect();
                for (b, from, best) in choices {
                    for h in 0..heads {
                        let n = best.found.len();
                        write(&mut chosen[((b * heads + h) * time + from) * k..][..n * k], k, |i| best.ascending(i));
                    }
                }
            }
        }
        chosen
    }
}

fn larger<T: Real>(a: T, b: T) -> T {
    if b > a { b } else { a }
}

fn write<I: Iterator<Item = u32>>(chosen: &mut [u32], k: usize, blocks: impl Fn(usize) -> I) {
    for (i, chosen) in chosen.chunks_exact_mut(k).enumerate() {
        for (slot, block) in chosen.iter_mut().zip(blocks(i)) {
            *slot = block;
        }
    }
}

/// Base-2 log-sum-exps over all landmarks.
fn log_sum_exp<S: Simd, T: Real>(s: S, operands: &Operands<T>, bh: usize, from: usize, n: usize) -> Vec<f64> {
    let mut running = vec![(f64::NEG_INFINITY, 0f64); n];
    let visit = |_, scores: &[T]| {
        for ((max, sum), score) in running.iter_mut().zip(scores) {
            let score = score.widen();
            if score > *max {
                *sum = *sum * (*max - score).exp2() + 1.;
                *max = score;
            } else {
                *sum += (score - *max).exp2();
            }
        }
    };
    s.vectorize(Score { s, operands, bh, from, n, visit });
    running.into_iter().map(|(max, sum)| max + sum.log2()).collect()
}

/// [`Operands::scores`], compiled for the instruction set.
struct Score<'a, S, T, F> {
    s: S,
    operands: &'a Operands<'a, T>,
    bh: usize,
    from: usize,
    n: usize,
    visit: F,
}

impl<S: Simd, T: Real, F: FnMut(usize, &[T])> WithSimd for Score<'_, S, T, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        self.operands.scores(self.s, self.bh, self.from, self.n, self.visit);
    }
}

struct Attend<'a, T> {
    operands: Operands<'a, T>,
    /// `[batch, heads, time, k]`
    chosen: &'a [u32],
    k: usize,
}

impl<T: Real> WithSimd for Attend<'_, T> {
    /// Outputs, log-sum-exps and scores, as in [`Retrieved`].
    type Output = (Vec<T>, Vec<T>, Vec<T>);

    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let &RetrievalShape { batch, heads, time, head_dim: d, .. } = self.operands.shape;
        let mut out = vec![T::default(); batch * heads * time * d];
        let mut lse = vec![T::default(); batch * heads * time];
        let mut scores = vec![T::default(); batch * heads * time * self.k];
        out.par_chunks_mut(time * d)
            .zip(lse.par_chunks_mut(time).zip(scores.par_chunks_mut(time * self.k)))
            .enumerate()
            .for_each(|(bh, (out, (lse, scores)))| {
                s.vectorize(AttendHead { s, all: &self, bh, out, lse, scores });
            });
        (out, lse, scores)
    }
}

struct AttendHead<'a, 'b, S, T> {
    s: S,
    all: &'a Attend<'b, T>,
    bh: usize,
    out: &'a mut [T],
    lse: &'a mut [T],
    scores: &'a mut [T],
}

impl<S: Simd, T: Real> WithSimd for AttendHead<'_, '_, S, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        let Self { s, all, bh, out, lse, scores } = self;
        let (operands, k) = (&all.operands, all.k);
        let &RetrievalShape { time, head_dim: d, .. } = operands.shape;
        let lanes = T::lanes::<S>();
        // Readings of a block lie side by side: (block, query, rank).
        let chosen = &all.chosen[bh * time * k..][..time * k];
        let mut readings: Vec<u32> = (0..chosen.len() as u32).collect();
        readings.sort_by_key(|&reading| chosen[reading as usize]);
        let mut read = vec![T::default(); time * k * d];
        let mut packed = Vec::new();
        let (mut weights, mut result, mut query) = (Vec::new(), Vec::new(), Vec::new());
        for group in readings.chunk_by(|&a, &b| chosen[a as usize] == chosen[b as usize]) {
            let block = chosen[group[0] as usize] as usize;
            let is_newest = block >= operands.len - operands.newest;
            let size = operands.size(block);
            let [keys, values] = operands.block(bh, block, bh * time * k + group[0] as usize);
            if group.len() <= FEW && single::fits::<S, T>(d) {
                for &reading in group {
                    let (t, rank) = (reading as usize / k, reading as usize % k);
                    let q = &operands.queries(rank + usize::from(is_newest), bh)[t * d..][..d];
                    query.clear();
                    query.extend(q.iter().map(|&x| x * T::cast(operands.scale)));
                    let read = &mut read[reading as usize * d..][..d];
                    let landmark = single::attend_block(s, &query, [keys, values], &mut weights, read);
                    scores[reading as usize] = T::cast(landmark.widen() * std::f64::consts::LN_2);
                }
                continue;
            }
            for group in group.chunks(QUERIES_PER_TILE) {
                let nv = group.len().div_ceil(lanes);
                packed.clear();
                packed.resize(d * nv, T::splat(s, T::default()));
                let lanes_of = bytemuck::cast_slice_mut::<_, T>(&mut packed);
                for (i, &reading) in group.iter().enumerate() {
                    let (t, rank) = (reading as usize / k, reading as usize % k);
                    let slot = rank + usize::from(is_newest);
                    for (channel, &x) in operands.queries(slot, bh)[t * d..][..d].iter().enumerate() {
                        lanes_of[channel * nv * lanes + i] = x * T::cast(operands.scale);
                    }
                }
                weights.resize(size * nv, T::splat(s, T::default()));
                result.resize(d * nv, T::splat(s, T::default()));
                Product {
                    s,
                    m: size,
                    n: nv,
                    k: d,
                    a: keys,
                    a_row: d,
                    a_col: 1,
                    b: &packed,
                    b_row: nv,
                    c: &mut weights,
                    c_row: nv,
                    accumulate: false,
                }
                .run();
                for at in 0..nv {
                    divide_by_sum(s, Column::<S, T, 1> { cells: &mut weights, row: nv, at, base: 0 }, size - 1);
                }
                Product {
                    s,
                    m: d,
                    n: nv,
                    k: size - 1,
                    a: values,
                    a_row: 1,
                    a_col: d,
                    b: &weights,
                    b_row: nv,
                    c: &mut result,
                    c_row: nv,
                    accumulate: false,
                }
                .run();
                let landmark = &bytemuck::cast_slice::<_, T>(&weights)[(size - 1) * nv * lanes..];
                let result = bytemuck::cast_slice::<_, T>(&result);
                for (i, &reading) in group.iter().enumerate() {
                    scores[reading as usize] = T::cast(landmark[i].widen() * std::f64::consts::LN_2);
                    for (channel, x) in read[reading as usize * d..][..d].iter_mut().enumerate() {
                        *x = result[channel * nv * lanes + i];
                    }
                }
            }
        }
        for t in 0..time {
            let scores = &scores[t * k..][..k];
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, score| max.max(score.widen()));
            let sum: f64 = scores.iter().map(|score| (score.widen() - max).exp()).sum();
            lse[t] = T::cast(max + sum.ln());
            let out = &mut out[t * d..][..d];
            for (rank, score) in scores.iter().enumerate() {
                let share = T::cast((score.widen() - max).exp() / sum);
                for (out, &x) in out.iter_mut().zip(&read[(t * k + rank) * d..][..d]) {
                    *out += x * share;
                }
            }
        }
    }
}

/// The inner softmax of the first `tokens` rows.
#[inline(always)]
fn divide_by_sum<S: Simd, T: Real, const NV: usize>(s: S, mut weights: Column<S, T, NV>, tokens: usize) {
    let (_, sum) = weights.inner_softmax(s, 0..tokens);
    let one = T::splat(s, T::cast(1.));
    weights.scale(s, 0..tokens, each!(v: T::vdiv(s, one, sum[v])));
}

/// Runs `f` on the operands as slices of `T`.
fn with_operands<T: Real + WithDType, R>(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    f: impl FnOnce(Operands<T>) -> R,
) -> candle_core::Result<R> {
    let mut tensors = vec![queries.queries];
    match blocks.kept {
        Kept::Ring { keys, values } => tensors.extend([keys, values]),
        Kept::Pool { pool, .. } => tensors.extend(pool.tensors()),
        Kept::Frames { .. } => {}
    }
    tensors.extend(blocks.landmarks);
    let guards: Vec<_> = tensors.into_iter().map(|t| t.storage_and_layout()).collect();
    let mut slices = Vec::with_capacity(4);
    for (storage, layout) in &guards {
        match &**storage {
            Storage::Cpu(storage) => slices.push(&storage.as_slice::<T>()?[layout.start_offset()..]),
            _ => candle_core::bail!("retrieval: expected tensors on the CPU"),
        }
    }
    Ok(f(Operands {
        shape,
        queries: slices[0],
        kept: match blocks.kept {
            Kept::Ring { .. } => Slices::Ring { keys: slices[1], values: slices[2] },
            Kept::Frames { frames, .. } => Slices::Frames(frames),
            Kept::Pool { frames, .. } => Slices::Pool { keys: slices[1], values: slices[2], frames },
        },
        landmarks: blocks.landmarks.map_or(&[], |_| slices[slices.len() - 1]),
        first: blocks.first,
        len: blocks.len,
        lengths: blocks.lengths,
        newest: queries.newest,
        scale: queries.scale * std::f64::consts::LOG2_E,
    }))
}

/// See [`crate::retrieval::select`]; arguments were checked, and there are more blocks than `k`.
pub(crate) fn select(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    k: usize,
    selection: Selection,
) -> candle_core::Result<Tensor> {
    let chosen = match queries.queries.dtype() {
        DType::F32 => with_operands::<f32, _>(shape, queries, blocks, |operands| {
            Arch::new().dispatch(Select { operands, k, selection })
        })?,
        _ => with_operands::<f64, _>(shape, queries, blocks, |operands| {
            Arch::new().dispatch(Select { operands, k, selection })
        })?,
    };
    Tensor::from_vec(chosen, (shape.batch, shape.heads, shape.time, k), queries.queries.device())
}

/// See [`crate::retrieval::attend`]; arguments were checked.
pub(crate) fn attend(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    chosen: &[u32],
    k: usize,
) -> candle_core::Result<Retrieved> {
    fn run<T: Real + WithDType>(
        shape: &RetrievalShape,
        queries: SlotQueries,
        blocks: Blocks,
        chosen: &[u32],
        k: usize,
    ) -> candle_core::Result<Retrieved> {
        let (out, lse, scores) = with_operands::<T, _>(shape, queries, blocks, |operands| {
            Arch::new().dispatch(Attend { operands, chosen, k })
        })?;
        let &RetrievalShape { batch, heads, time, head_dim, .. } = shape;
        let device = queries.queries.device();
        Ok(Retrieved {
            out: Tensor::from_vec(out, (batch, heads, time, head_dim), device)?,
            lse: Tensor::from_vec(lse, (batch, heads, time), device)?,
            scores: Tensor::from_vec(scores, (batch, heads, time, k), device)?,
        })
    }
    match queries.queries.dtype() {
        DType::F32 => run::<f32>(shape, queries, blocks, chosen, k),
        _ => run::<f64>(shape, queries, blocks, chosen, k),
    }
}
