//! Choosing blocks without scoring all landmarks: each query scores the centroids of lists, and the landmarks of the best lists alone.
//!
//! Both are scored by their rounded keys (`scan`), list by list for all queries that chose a list, so that a list is read once for them. What
//! scores best is a candidate, and candidates are scored again by their keys as they are. Equal keys have equal scores in both, bit for bit, which
//! the rule for ties relies on.

use candle_core::{Storage, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::rounded::{RoundedKeys, RoundedQueries, prefetch};
use super::scan::{best, pack, scan, unpack};
use crate::retrieval::{Keys, List, Lists, SlotQueries};

/// Queries that share what is read of a list.
const TILE: usize = 256;
/// Candidates for each block that is chosen.
const CANDIDATES: usize = 2;

struct Search<'a> {
    /// `[slots, batch, heads, time, head_dim]`
    queries: &'a [f32],
    /// Batch, heads, time, head_dim.
    shape: [usize; 4],
    len: usize,
    newest: usize,
    keys: &'a dyn Keys,
    lists: &'a [Lists<'a>],
    probes: usize,
    k: usize,
}

/// The best of scores that come in any order, for each of some queries; of equals the one of the smaller number.
struct Best {
    limit: usize,
    /// `[queries, limit]`, the best first, see [`pack`]; 0 where there is none yet.
    found: Vec<u64>,
}

impl Best {
    fn new(queries: usize, limit: usize) -> Self {
        Self { limit, found: vec![0; queries * limit] }
    }

    /// Says what a score of the query must reach from now on.
    #[inline(always)]
    fn offer(&mut self, query: usize, score: f32, number: u32) -> f32 {
        let (found, new) = (&mut self.found[query * self.limit..][..self.limit], pack(score, number));
        // What is worse moves down by one, without a branch that nobody foresees.
        for i in (1..found.len()).rev() {
            found[i] = found[i].max(found[i - 1].min(new));
        }
        found[0] = found[0].max(new);
        self.bar(query)
    }

    /// What a score must reach.
    #[inline(always)]
    fn bar(&self, query: usize) -> f32 {
        match self.found[(query + 1) * self.limit - 1] {
            0 => f32::NEG_INFINITY,
            last => unpack(last).0,
        }
    }

    /// The numbers that were found, the best first.
    fn numbers(&self, query: usize) -> impl Iterator<Item = u32> {
        let found = &self.found[query * self.limit..][..self.limit];
        found.iter().take_while(|&&found| found > 0).map(|&found| unpack(found).1)
    }
}

/// Which queries look at which lists.
struct Looks {
    /// The lists that a query looks at, ascending, and where the queries of each end.
    lists: Vec<u32>,
    ends: Vec<u32>,
    queries: Vec<u32>,
}

impl Looks {
    /// Of pairs (list, query), and so many lists.
    fn new(pairs: &[(u32, u32)], lists: usize) -> Self {
        let mut at = vec![0; lists];
        pairs.iter().for_each(|&(list, _)| at[list as usize] += 1);
        let mut looks = Self { lists: Vec::new(), ends: Vec::new(), queries: vec![0; pairs.len()] };
        let mut end = 0;
        for (list, at) in at.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
            (*at, end) = (end, end + *at);
            looks.lists.push(list as u32);
            looks.ends.push(end);
        }
        for &(list, query) in pairs {
            let at = &mut at[list as usize];
            looks.queries[*at as usize] = query;
            *at += 1;
        }
        looks
    }

    /// The queries that look at the `i`-th of the lists.
    fn queries(&self, i: usize) -> &[u32] {
        let begin = i.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.queries[begin as usize..self.ends[i] as usize]
    }
}

impl Search<'_> {
    fn queries(&self, slot: usize, bh: usize, from: usize, n: usize) -> &[f32] {
        let [batch, heads, time, d] = self.shape;
        &self.queries[((slot * batch * heads + bh) * time + from) * d..][..n * d]
    }

    /// The keys of these blocks.
    fn rows(&self, kv: usize, blocks: &[u32]) -> Vec<f32> {
        let d = self.shape[3];
        let mut rows = vec![0.; blocks.len() * d];
        for (i, (row, &block)) in rows.chunks_exact_mut(d).zip(blocks).enumerate() {
            if let Some(&soon) = blocks.get(i + 8) {
                self.keys.will_need(kv, soon as usize);
            }
            self.keys.key(kv, block as usize, row);
        }
        rows
    }

    /// The blocks `[queries, k]` of head `bh`'s queries from `from` on.
    #[inline(always)]
    fn choose(&self, bh: usize, from: usize, chosen: &mut [u32]) {
        let (k, [batch, heads, _, d]) = (self.k, self.shape);
        let (n, kv) = (chosen.len() / k, bh / (batch * heads / self.lists.len()));
        let Lists { origin, centroids, lists } = self.lists[kv];
        let queries = RoundedQueries::new(self.queries(0, bh, from, n), d);
        let all: Vec<u32> = (0..n as u32).collect();

        // 1. The best lists of each query, and so the queries of each list.
        let mut pairs: Vec<(u32, u32)> = Vec::with_capacity(n * self.probes);
        best(centroids, &queries, self.probes, |query, list| pairs.push((list, query)));
        let looks = Looks::new(&pairs, lists.len());

        // 2. List by list, the best landmarks for the queries that look at it. The newest have slots of their own.
        let older = (self.len - self.newest) as u32;
        let mut found = Best::new(n, CANDIDATES * k);
        let mut bars = vec![f32::NEG_INFINITY; n];
        for (i, &list) in looks.lists.iter().enumerate() {
            // Lists are all over the memory: it begins with those that come next.
            if let Some(&next) = looks.lists.get(i + 2) {
                prefetch(&lists[next as usize]);
            }
            if let Some(&next) = looks.lists.get(i + 1) {
                let List { blocks, keys } = &lists[next as usize];
                keys.prefetch();
                blocks.chunks(16).for_each(|blocks| prefetch(&blocks[0]));
            }
            let List { blocks, keys } = &lists[list as usize];
            scan(keys, &queries, looks.queries(i), &mut bars, |query, at, score| match blocks.get(at) {
                Some(&block) if block < older => found.offer(query, score, block),
                _ => found.bar(query),
            });
        }

        // 3. Tokens of a chunk look for much the same: what one has found is shown to all.
        if n > 1 {
            let mut shared: Vec<u32> = (0..n).flat_map(|query| found.numbers(query).take(k)).collect();
            shared.sort_unstable();
            shared.dedup();
            let mut keys = RoundedKeys::new(d);
            self.rows(kv, &shared).chunks_exact(d).for_each(|key| keys.push(key, origin));
            scan(&keys, &queries, &all, &mut bars, |query, at, score| match shared[at] {
                block if found.numbers(query).any(|found| found == block) => found.bar(query),
                block => found.offer(query, score, block),
            });
        }

        // 4. These, block by block, and the newest, scored as they are.
        let of_query = |query: usize| found.numbers(query).map(move |block| u64::from(block) << 32 | query as u64);
        let mut asked: Vec<u64> = (0..n).flat_map(of_query).collect();
        asked.sort_unstable();
        let (mut exact, mut key, mut at) = (Best::new(n, k), vec![0.; d], 0);
        for of_block in asked.chunk_by(|a, b| a >> 32 == b >> 32) {
            at += of_block.len();
            if let Some(soon) = asked.get(at + 16) {
                self.keys.will_need(kv, (soon >> 32) as usize);
            }
            let block = (of_block[0] >> 32) as u32;
            self.keys.key(kv, block as usize, &mut key);
            for query in of_block.iter().map(|&asked| asked as u32 as usize) {
                exact.offer(query, dot(self.queries(0, bh, from + query, 1), &key), block);
            }
        }
        let newest = self.rows(kv, &(older..self.len as u32).collect::<Vec<_>>());
        for (i, chosen) in chosen.chunks_exact_mut(k).enumerate() {
            for (slot, key) in newest.chunks_exact(d).enumerate() {
                exact.offer(i, dot(self.queries(slot + 1, bh, from + i, 1), key), older + slot as u32);
            }
            // Lists with fewer landmarks than are wanted are filled up with the oldest blocks.
            let fill = (0..).filter(|block| exact.numbers(i).all(|other| other != *block));
            chosen.iter_mut().zip(exact.numbers(i).chain(fill)).for_each(|(chosen, block)| *chosen = block);
            chosen.sort_unstable();
        }
    }
}

/// A part of one head's queries, chosen for with the machine's registers.
struct Tile<'a> {
    search: &'a Search<'a>,
    bh: usize,
    from: usize,
    chosen: &'a mut [u32],
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.search.choose(self.bh, self.from, self.chosen);
    }
}

/// The product of a query with a key.
#[inline(always)]
fn dot(query: &[f32], key: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (queries, keys) = (query.as_chunks::<16>(), key.as_chunks::<16>());
    for (query, key) in queries.0.iter().zip(keys.0) {
        for i in 0..16 {
            sums[i] += query[i] * key[i];
        }
    }
    let rest: f32 = queries.1.iter().zip(keys.1).map(|(query, key)| query * key).sum();
    sums.iter().sum::<f32>() + rest
}

/// See [`crate::retrieval::select_in_lists`]; arguments were checked. `shape` is batch, heads, time and head_dim.
pub(crate) fn select(
    queries: SlotQueries,
    shape: [usize; 4],
    len: usize,
    keys: &dyn Keys,
    k: usize,
    lists: &[Lists],
    probes: usize,
) -> candle_core::Result<Tensor> {
    let (storage, layout) = queries.queries.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { candle_core::bail!("retrieval: expected tensors on the CPU") };
    let newest = queries.newest;
    let queries_of_slots = &storage.as_slice::<f32>()?[layout.start_offset()..];
    let search = Search { queries: queries_of_slots, shape, len, newest, keys, lists, probes, k };
    let [batch, heads, time, _] = shape;
    let mut chosen = vec![0; batch * heads * time * k];
    let tiles = chosen.par_chunks_mut(time * k).enumerate().flat_map(|(bh, chosen)| {
        chosen.par_chunks_mut(TILE * k).enumerate().map(move |(i, chosen)| (bh, i * TILE, chosen))
    });
    tiles.for_each(|(bh, from, chosen)| Arch::new().dispatch(Tile { search: &search, bh, from, chosen }));
    Tensor::from_vec(chosen, (batch, heads, time, k), queries.queries.device())
}
