//! Choosing blocks without scoring all landmarks: each query scores the centroids of lists, and the landmarks of the best lists alone.
//!
//! The queries of a tile are brought to the lists that they chose, so that a list's landmarks are gathered once for all of them. Equal keys
//! have equal scores, bit for bit, which the rule for ties relies on.

use candle_core::{Storage, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::forward::{Steps, pack_transposed};
use super::lanes::Real;
use super::product::Product;
use crate::retrieval::{Blocks, Lists, RetrievalShape, SlotQueries};

/// Queries that share what is gathered.
const TILE: usize = 256;

struct Search<'a> {
    shape: &'a RetrievalShape,
    /// `[slots, batch, heads, time, head_dim]`
    queries: &'a [f32],
    /// `[batch * kv_heads, capacity, head_dim]`
    landmarks: &'a [f32],
    first: usize,
    len: usize,
    newest: usize,
    scale: f64,
    lists: &'a [Lists<'a>],
    probes: usize,
    k: usize,
}

/// The `k` best of scores that come in any order; of equals the older.
struct Best {
    k: usize,
    /// Best first.
    found: Vec<(f32, u32)>,
}

impl Best {
    /// What a score must reach.
    fn bar(&self) -> f32 {
        if self.found.len() < self.k { f32::NEG_INFINITY } else { self.found[self.k - 1].0 }
    }

    fn offer(&mut self, score: f32, block: u32) {
        let is_before = |&(other, at): &(f32, u32)| other > score || (other == score && at < block);
        if self.found.len() == self.k && self.found.last().is_none_or(is_before) {
            return;
        }
        let place = self.found.partition_point(is_before);
        self.found.insert(place, (score, block));
        self.found.truncate(self.k);
    }
}

impl Search<'_> {
    fn queries(&self, slot: usize, bh: usize, from: usize) -> Steps<'_, f32> {
        let RetrievalShape { batch, heads, time, head_dim, .. } = *self.shape;
        let at = ((slot * batch * heads + bh) * time + from) * head_dim;
        Steps { data: &self.queries[at..], stride: head_dim }
    }

    fn landmark(&self, kv: usize, block: usize) -> &[f32] {
        let RetrievalShape { capacity, head_dim, .. } = *self.shape;
        &self.landmarks[(kv * capacity + (self.first + block) % capacity) * head_dim..][..head_dim]
    }
}

impl WithSimd for &Search<'_> {
    /// `[batch, heads, time, k]`.
    type Output = Vec<u32>;

    fn with_simd<S: Simd>(self, s: S) -> Vec<u32> {
        let &RetrievalShape { batch, heads, time, .. } = self.shape;
        let mut chosen = vec![0; batch * heads * time * self.k];
        let tiles = chosen.par_chunks_mut(time * self.k).enumerate().flat_map(|(bh, chosen)| {
            chosen.par_chunks_mut(TILE * self.k).enumerate().map(move |(i, chosen)| (bh, i * TILE, chosen))
        });
        tiles.for_each(|(bh, from, chosen)| s.vectorize(Tile { s, search: self, bh, from, chosen }));
        chosen
    }
}

struct Tile<'a, S> {
    s: S,
    search: &'a Search<'a>,
    bh: usize,
    from: usize,
    chosen: &'a mut [u32],
}

impl<S: Simd> WithSimd for Tile<'_, S> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S2: Simd>(self, _: S2) {
        let Self { s, search, bh, from, chosen } = self;
        let &Search { k, newest, scale, probes, .. } = search;
        let (d, n, kv) = (search.shape.head_dim, chosen.len() / k, search.shape.kv(bh));
        let Lists { centroids, members } = &search.lists[kv];
        let mut packed = Vec::new();
        let mut scores = Vec::new();

        // 1. The best lists of each query, as pairs (list, query).
        pack_transposed::<S, f32>(s, &mut packed, search.queries(0, bh, from), n, d, scale);
        product(s, centroids, d, &packed, n, &mut scores);
        let lanes = n.div_ceil(f32::lanes::<S>()) * f32::lanes::<S>();
        let of_centroids: &[f32] = bytemuck::cast_slice(&scores);
        let probes = probes.min(members.len());
        let mut pairs = Vec::with_capacity(n * probes);
        let mut ranked: Vec<(f32, u32)> = Vec::with_capacity(members.len());
        for query in 0..n {
            ranked.clear();
            ranked.extend((0..members.len()).map(|list| (of_centroids[list * lanes + query], list as u32)));
            if probes < ranked.len() {
                ranked.select_nth_unstable_by(probes - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            }
            pairs.extend(ranked[..probes].iter().map(|&(_, list)| (list, query as u32)));
        }
        pairs.sort_unstable();

        // 2. List by list, the landmarks for the queries that chose it.
        let older = search.len - newest;
        let mut best: Vec<Best> = (0..n).map(|_| Best { k, found: Vec::with_capacity(k + 1) }).collect();
        let mut bars = Vec::new();
        let (mut keys, mut some) = (Vec::new(), Vec::new());
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            let members = &members[group[0].0 as usize];
            // The newest are the last of a list, and have slots of their own.
            let members = &members[..members.partition_point(|&block| (block as usize) < older)];
            keys.clear();
            members.iter().for_each(|&block| keys.extend_from_slice(search.landmark(kv, block as usize)));
            some.clear();
            for &(_, query) in group {
                some.extend_from_slice(&search.queries(0, bh, from + query as usize).data[..d]);
            }
            let steps = Steps { data: &some, stride: d };
            pack_transposed::<S, f32>(s, &mut packed, steps, group.len(), d, scale);
            product(s, &keys, d, &packed, group.len(), &mut scores);
            let lanes = group.len().div_ceil(f32::lanes::<S>()) * f32::lanes::<S>();
            let scores: &[f32] = bytemuck::cast_slice(&scores);
            bars.clear();
            bars.extend(group.iter().map(|&(_, query)| best[query as usize].bar()));
            for (row, &block) in scores.chunks_exact(lanes).zip(members) {
                // Most landmarks are not among the best of any query.
                if !row.iter().zip(&bars).any(|(score, bar)| score >= bar) {
                    continue;
                }
                for ((&score, &(_, query)), bar) in row.iter().zip(group).zip(&mut bars) {
                    if score >= *bar {
                        best[query as usize].offer(score, block);
                        *bar = best[query as usize].bar();
                    }
                }
            }
        }

        // 3. The newest, each at its own slot.
        for i in 0..newest {
            pack_transposed::<S, f32>(s, &mut packed, search.queries(i + 1, bh, from), n, d, scale);
            product(s, search.landmark(kv, older + i), d, &packed, n, &mut scores);
            let scores: &[f32] = bytemuck::cast_slice(&scores);
            best.iter_mut().zip(scores).for_each(|(best, &score)| best.offer(score, (older + i) as u32));
        }
        for (chosen, best) in chosen.chunks_exact_mut(k).zip(best) {
            // Lists with fewer landmarks than are wanted are filled up with the oldest blocks.
            let mut blocks: Vec<u32> = best.found.iter().map(|&(_, block)| block).collect();
            let mut fill = (0..).filter(|block| best.found.iter().all(|(_, other)| other != block));
            while blocks.len() < k {
                blocks.extend(fill.next());
            }
            blocks.sort_unstable();
            chosen.copy_from_slice(&blocks);
        }
    }
}

/// Base-2 scores `[rows, registers]` of rows of keys for packed queries.
#[inline(always)]
fn product<S: Simd>(s: S, keys: &[f32], d: usize, packed: &[S::f32s], n: usize, scores: &mut Vec<S::f32s>) {
    let (m, nv) = (keys.len() / d, n.div_ceil(f32::lanes::<S>()));
    scores.clear();
    scores.resize(m * nv, s.splat_f32s(0.));
    let product: Product<'_, S, f32> = Product {
        s,
        m,
        n: nv,
        k: d,
        a: keys,
        a_row: d,
        a_col: 1,
        b: packed,
        b_row: nv,
        c: scores,
        c_row: nv,
        accumulate: false,
    };
    product.run();
}

/// See [`crate::retrieval::select_in_lists`]; arguments were checked, and there are more blocks than `k`.
pub(crate) fn select(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    k: usize,
    lists: &[Lists],
    probes: usize,
) -> candle_core::Result<Tensor> {
    let (q, landmarks) = (queries.queries.storage_and_layout(), blocks.landmarks.storage_and_layout());
    let (Storage::Cpu(q_storage), Storage::Cpu(landmarks_storage)) = (&*q.0, &*landmarks.0) else {
        candle_core::bail!("retrieval: expected tensors on the CPU")
    };
    let search = Search {
        shape,
        queries: &q_storage.as_slice::<f32>()?[q.1.start_offset()..],
        landmarks: &landmarks_storage.as_slice::<f32>()?[landmarks.1.start_offset()..],
        first: blocks.first,
        len: blocks.len,
        newest: queries.newest,
        scale: queries.scale * std::f64::consts::LOG2_E,
        lists,
        probes,
        k,
    };
    let chosen = Arch::new().dispatch(&search);
    Tensor::from_vec(chosen, (shape.batch, shape.heads, shape.time, k), queries.queries.device())
}
