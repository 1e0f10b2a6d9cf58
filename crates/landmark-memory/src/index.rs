//! An index over landmark keys: for each layer and head lists of keys that are near each other, so that a query scores a few lists and not all
//! landmarks.
//!
//! A key goes to the list whose centroid, the mean of its keys, is nearest. A list whose keys are too far apart, or too many, is split in two by 2-means, so
//! the lists follow the text while it is read and nothing is ever trained anew. A few keys unlike all others, which many queries choose, so come to lists of
//! their own, whose centroids tell of them. The limit grows with the root of the number of blocks, and the work for a query with it. What the
//! lists are is a function of the keys in their order alone: an index that is built again from the same keys is the same.
//!
//! Lists hold their keys rounded, less the first block's key, as queries score them ([`RoundedKeys`]).
//!
//! Of equal scores the oldest blocks win, so a block whose key equals those of `top_k` older ones is never chosen. It is left out where it is met: in
//! the first layer the keys of all blocks are equal, and there the index has a few blocks and not a list of all.
//!
//! # The file `index` of a session
//!
//! What was indexed when the session was last left; without it, or if it is damaged, the index is built again. Little endian: the ASCII bytes
//! `LMINDEX` and a zero byte; 4 bytes each: version 2, layers, heads, channels, blocks that a query chooses, blocks that are indexed; for each layer, for
//! each head the number of its lists; in float32 the mean of its keys, the mean of their squared distances from it, the lists' centroids `[lists, channels]`,
//! and for each list the sum of its keys' squared distances from the centroid; then for each list the keys that it has before it is split, at least, the number
//! of its blocks (plus 2^31 if their keys are all equal), and these, ascending. CRC-32C of all at the end.

use std::borrow::Borrow;

use landmark_attention::retrieval::{List, Lists, RoundedKeys};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Blocks from which on an index is worth its while.
pub const FROM_BLOCKS: usize = 2048;
/// Keys of a list at least before it is split.
const LIST: usize = 32;
/// Keys of a list may be as far apart as so large a share of as many of all keys.
const WIDE: f32 = 0.25;
/// Steps of 2-means.
const STEPS: usize = 6;

const MAGIC: &[u8] = b"LMINDEX\0";
const VERSION: usize = 2;
/// With the number of a list's blocks: their keys are equal.
const UNIFORM: usize = 1 << 31;

/// Lists that each of so many queries of a chunk looks at: what one of them finds is shown to all.
pub fn probes(queries: usize) -> usize {
    if queries < 16 { 32 } else { 16 }
}

/// Keys of a list before it is split, of so many blocks.
fn limit(blocks: usize) -> usize {
    LIST.max(blocks.isqrt() * 2 / 5)
}

/// The index of one layer and head.
#[derive(Debug, Default)]
struct Head {
    /// The first block's key.
    origin: Vec<f32>,
    /// The mean of all keys, and the mean of their squared distances from it.
    mean: Vec<f32>,
    variance: f32,
    /// `[lists, head_dim]`, and the same as queries score them.
    centroids: Vec<f32>,
    rounded: RoundedKeys,
    lists: Vec<List>,
    /// Of each list: the sum of its keys' squared distances from the centroid.
    spreads: Vec<f32>,
    /// Of each list: so many keys before it is split, at least.
    limits: Vec<usize>,
    /// Of each list: whether all its keys are equal.
    uniform: Vec<bool>,
}

/// The indices of the heads of one layer.
#[derive(Debug)]
pub struct Index {
    heads: Vec<Head>,
    head_dim: usize,
    top_k: usize,
    /// Blocks that are in it.
    len: usize,
}

/// Writes a key by its block.
type KeyOf<'a> = &'a dyn Fn(u32, &mut [f32]);

impl Index {
    /// Of nothing, for queries that choose `top_k` blocks.
    pub fn new(heads: usize, head_dim: usize, top_k: usize) -> Self {
        Self { heads: (0..heads).map(|_| Head::new(head_dim)).collect(), head_dim, top_k, len: 0 }
    }

    /// Blocks that are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory that its keys take.
    pub fn bytes(&self) -> usize {
        self.heads.iter().flat_map(|head| &head.lists).map(|list| list.keys.bytes() + 4 * list.blocks.capacity()).sum()
    }

    /// Takes in blocks up to `len`, whose landmarks `key` writes by head and block.
    pub fn extend(&mut self, len: usize, key: impl Fn(usize, usize, &mut [f32]) + Sync) {
        let (from, d, top_k) = (self.len, self.head_dim, self.top_k);
        self.heads.par_iter_mut().enumerate().for_each(|(head, index)| {
            let key = |block: u32, into: &mut [f32]| key(head, block as usize, into);
            (from..len).for_each(|block| index.insert(block as u32, d, top_k, &key));
        });
        self.len = len.max(from);
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        let d = self.head_dim;
        self.heads.iter_mut().for_each(|head| *head = Head::new(d));
        self.len = 0;
    }

    /// The lists, by head.
    pub fn lists(&self) -> Vec<Lists<'_>> {
        self.heads
            .iter()
            .map(|head| Lists { origin: &head.origin, centroids: &head.rounded, lists: &head.lists })
            .collect()
    }
}

impl Head {
    fn new(d: usize) -> Self {
        Self { mean: vec![0.; d], rounded: RoundedKeys::new(d), ..Self::default() }
    }

    fn insert(&mut self, block: u32, d: usize, top_k: usize, key: KeyOf) {
        let [mut new, mut first] = [vec![0.; d], vec![0.; d]];
        key(block, &mut new);
        let share = 1. / (block + 1) as f32;
        self.variance += (distance(&self.mean, &new) * (1. - share) - self.variance) * share;
        self.mean.iter_mut().zip(&new).for_each(|(mean, x)| *mean += (x - *mean) * share);
        let Some((list, off)) = self.nearest(&new, d) else {
            self.origin.clone_from(&new);
            return self.push(&new, self.list_of(&[block], &new), 0., true);
        };
        let List { blocks, keys } = &mut self.lists[list];
        key(blocks[0], &mut first);
        let is_equal = self.uniform[list] && first == new;
        if is_equal && blocks.len() >= top_k {
            return;
        }
        self.uniform[list] = is_equal;
        blocks.push(block);
        keys.push(&new, &self.origin);
        let share = 1. / blocks.len() as f32;
        self.spreads[list] += off * (1. - share);
        let centroid = &mut self.centroids[list * d..][..d];
        centroid.iter_mut().zip(&new).for_each(|(mean, x)| *mean += (x - *mean) * share);
        self.rounded.set(list, centroid, &self.origin);
        let limit = limit(block as usize);
        let is_wide = blocks.len() >= 4 && self.spreads[list] > WIDE * self.variance * limit as f32;
        if (is_wide || blocks.len() > 4 * limit) && blocks.len() > self.limits[list] {
            self.split(list, d, top_k, key);
        }
    }

    fn push(&mut self, centroid: &[f32], list: List, spread: f32, uniform: bool) {
        self.centroids.extend(centroid);
        self.rounded.push(centroid, &self.origin);
        self.lists.push(list);
        self.spreads.push(spread);
        self.limits.push(0);
        self.uniform.push(uniform);
    }

    fn list_of(&self, blocks: &[u32], keys: &[f32]) -> List {
        let mut rounded = RoundedKeys::new(self.origin.len());
        keys.chunks_exact(self.origin.len()).for_each(|key| rounded.push(key, &self.origin));
        List { blocks: blocks.to_vec(), keys: rounded }
    }

    /// The list with the nearest centroid, and the squared distance.
    fn nearest(&self, key: &[f32], d: usize) -> Option<(usize, f32)> {
        Arch::new().dispatch(Nearest { centroids: &self.centroids, key, d })
    }

    /// Splits a list in two, or lets it grow to twice its size if all its keys are equal.
    fn split(&mut self, list: usize, d: usize, top_k: usize, key: KeyOf) {
        let blocks = &self.lists[list].blocks;
        let mut keys = vec![0.; blocks.len() * d];
        keys.chunks_exact_mut(d).zip(blocks).for_each(|(into, &block)| key(block, into));
        let halves = Arch::new().dispatch(Halves { keys: &keys, centroid: &self.centroids[list * d..][..d] });
        let Some([a, b]) = halves else {
            self.limits[list] = 2 * blocks.len();
            return;
        };
        let part = |(rows, mean): &(Vec<usize>, Vec<f32>)| {
            let key = |&row: &usize| &keys[row * d..][..d];
            let uniform = rows.iter().all(|row| key(row) == key(&rows[0]));
            let rows = if uniform { &rows[..rows.len().min(top_k.max(1))] } else { rows };
            let of_part: Vec<u32> = rows.iter().map(|&row| blocks[row]).collect();
            let spread = rows.iter().map(|row| distance(key(row), mean)).sum();
            let keys: Vec<f32> = rows.iter().flat_map(key).copied().collect();
            (self.list_of(&of_part, &keys), spread, uniform)
        };
        let ([list_a, list_b], [mean_a, mean_b]) = ([part(&a), part(&b)], [a.1, b.1]);
        self.centroids[list * d..][..d].copy_from_slice(&mean_a);
        self.rounded.set(list, &mean_a, &self.origin);
        (self.lists[list], self.spreads[list], self.uniform[list]) = list_a;
        self.limits[list] = 0;
        self.push(&mean_b, list_b.0, list_b.1, list_b.2);
    }
}

/// The nearest of centroids `[lists, d]`, and the squared distance.
struct Nearest<'a> {
    centroids: &'a [f32],
    key: &'a [f32],
    d: usize,
}

impl WithSimd for Nearest<'_> {
    type Output = Option<(usize, f32)>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let mut best = None;
        for (list, centroid) in self.centroids.chunks_exact(self.d).enumerate() {
            // Most are farther by more than a sum in another order can be off.
            if best.is_some_and(|(_, least)| nearly(simd, centroid, self.key) > least * 1.0001) {
                continue;
            }
            let distance = distance(centroid, self.key);
            if best.is_none_or(|(_, least)| distance < least) {
                best = Some((list, distance));
            }
        }
        best
    }
}

/// 2-means of keys `[n, d]` around a centroid: the rows of both parts, and their means; `None` if all keys are equal.
struct Halves<'a> {
    keys: &'a [f32],
    centroid: &'a [f32],
}

impl WithSimd for Halves<'_> {
    type Output = Option<[(Vec<usize>, Vec<f32>); 2]>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { keys, centroid } = self;
        let d = centroid.len();
        let farthest = |from: &[f32]| {
            let mut far = (&keys[..d], -1f32);
            for key in keys.chunks_exact(d) {
                let distance = distance(key, from);
                if distance > far.1 {
                    far = (key, distance);
                }
            }
            far.0
        };
        let first = farthest(centroid);
        let mut parts = [(vec![], first.to_vec()), (vec![], farthest(first).to_vec())];
        for _ in 0..STEPS {
            parts.iter_mut().for_each(|(rows, _)| rows.clear());
            for (row, key) in keys.chunks_exact(d).enumerate() {
                let [a, b] = [&parts[0].1, &parts[1].1].map(|mean| distance(mean, key));
                parts[usize::from(b < a)].0.push(row);
            }
            for (rows, mean) in parts.iter_mut().filter(|(rows, _)| !rows.is_empty()) {
                mean.fill(0.);
                rows.iter().for_each(|row| mean.iter_mut().zip(&keys[row * d..]).for_each(|(mean, x)| *mean += x));
                mean.iter_mut().for_each(|mean| *mean /= rows.len() as f32);
            }
        }
        parts.iter().all(|(rows, _)| !rows.is_empty()).then_some(parts)
    }
}

/// The file of the indices of all layers.
pub fn encode<I: Borrow<Index>>(layers: &[I]) -> Vec<u8> {
    let Some(Index { heads, head_dim, top_k, len }) = layers.first().map(I::borrow) else { return Vec::new() };
    let mut bytes = MAGIC.to_vec();
    let mut put = |x: usize| bytes.extend((x as u32).to_le_bytes());
    [VERSION, layers.len(), heads.len(), *head_dim, *top_k, *len].into_iter().for_each(&mut put);
    for head in layers.iter().flat_map(|layer| &layer.borrow().heads) {
        put(head.lists.len());
        let floats = head.mean.iter().chain([&head.variance]).chain(&head.centroids).chain(&head.spreads);
        floats.for_each(|x| put(x.to_bits() as usize));
        for (list, List { blocks, .. }) in head.lists.iter().enumerate() {
            put(head.limits[list]);
            put(blocks.len() | if head.uniform[list] { UNIFORM } else { 0 });
            blocks.iter().for_each(|&block| put(block as usize));
        }
    }
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// What the file has, if it is whole, of these shapes and of no more than so many blocks; `key` writes landmarks by layer, head and block.
pub fn decode(
    bytes: &[u8],
    layers: usize,
    like: &Index,
    blocks: usize,
    key: impl Fn(usize, usize, usize, &mut [f32]) + Sync,
) -> Option<Vec<Index>> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (words, rest) = body.strip_prefix(MAGIC)?.as_chunks::<4>();
    let mut words = words.iter().map(|&word| u32::from_le_bytes(word));
    let (heads, d) = (like.heads.len(), like.head_dim);
    let is_of_shape =
        [VERSION, layers, heads, d, like.top_k].into_iter().all(|x| words.next() == u32::try_from(x).ok());
    let len = words.next()? as usize;
    if !is_of_shape || len > blocks || !rest.is_empty() {
        return None;
    }
    let mut head = || {
        let lists = words.next()? as usize;
        // Nobody's number is believed: what is there is taken, and it must be as much.
        let mut floats = |n: usize| {
            let floats: Vec<f32> = words.by_ref().take(n).map(f32::from_bits).collect();
            (floats.len() == n).then_some(floats)
        };
        let (mean, variance, centroids) = (floats(d)?, floats(1)?[0], floats(lists.checked_mul(d)?)?);
        let mut head = Head { mean, variance, centroids, spreads: floats(lists)?, ..Head::new(d) };
        for _ in 0..lists {
            head.limits.push(words.next()? as usize);
            let count = words.next()? as usize;
            head.uniform.push(count & UNIFORM > 0);
            let blocks: Vec<u32> = words.by_ref().take(count & !UNIFORM).collect();
            let is_list = blocks.len() == count & !UNIFORM && blocks.is_sorted_by(|a, b| a < b);
            if !is_list || blocks.last().is_none_or(|&last| last as usize >= len) {
                return None;
            }
            head.lists.push(List { blocks, keys: RoundedKeys::new(d) });
        }
        Some(head)
    };
    let mut all = (0..layers * heads).map(|_| head()).collect::<Option<Vec<_>>>()?;
    if words.next().is_some() {
        return None;
    }
    all.par_iter_mut().enumerate().for_each(|(i, head)| {
        let (mut origin, mut row) = (vec![0.; d], vec![0.; d]);
        // A list has blocks, so there is a first one.
        if !head.lists.is_empty() {
            key(i / heads, i % heads, 0, &mut origin);
        }
        head.centroids.chunks_exact(d).for_each(|centroid| head.rounded.push(centroid, &origin));
        for List { blocks, keys } in &mut head.lists {
            for &block in &*blocks {
                key(i / heads, i % heads, block as usize, &mut row);
                keys.push(&row, &origin);
            }
        }
        head.origin = origin;
    });
    let mut all = all.into_iter();
    let layer = |_| Index { heads: all.by_ref().take(heads).collect(), head_dim: d, top_k: like.top_k, len };
    Some((0..layers).map(layer).collect())
}

/// The squared distance of two keys.
#[inline(always)]
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a, b) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.0.iter().zip(b.0) {
        for i in 0..16 {
            let off = a[i] - b[i];
            sums[i] += off * off;
        }
    }
    let rest: f32 = a.1.iter().zip(b.1).map(|(a, b)| (a - b) * (a - b)).sum();
    sums.iter().sum::<f32>() + rest
}

/// The same in the order that the machine sums registers in, without the channels after the last whole register.
#[inline(always)]
fn nearly<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (S::as_simd_f32s(a).0, S::as_simd_f32s(b).0);
    let sum = a.iter().zip(b).fold(simd.splat_f32s(0.), |sum, (&a, &b)| {
        let off = simd.sub_f32s(a, b);
        simd.mul_add_e_f32s(off, off, sum)
    });
    simd.reduce_sum_f32s(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use landmark_attention::retrieval::{self, Keys, SlotQueries};

    /// Numbers that repeat after a long time.
    fn keys(blocks: usize, d: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.
        };
        (0..blocks * d).map(|_| next()).collect()
    }

    struct Plain<'a> {
        keys: &'a [f32],
        d: usize,
    }

    impl Keys for Plain<'_> {
        fn key(&self, _: usize, block: usize, into: &mut [f32]) {
            into.copy_from_slice(&self.keys[block * self.d..][..self.d]);
        }
    }

    /// Every block is in one list, in order, lists keep to their limit, and how blocks come in changes nothing.
    #[test]
    fn lists_are_a_partition_whatever_the_portions() {
        let (blocks, d) = (3000, 7);
        let keys = keys(blocks, d);
        let key = |_: usize, block: usize, into: &mut [f32]| into.copy_from_slice(&keys[block * d..][..d]);
        let mut whole = Index::new(2, d, 4);
        whole.extend(blocks, key);
        let mut portions = Index::new(2, d, 4);
        (0..blocks).step_by(17).chain([blocks]).for_each(|len| portions.extend(len, key));
        assert_eq!(encode(&[whole]), encode(std::slice::from_ref(&portions)));
        for head in portions.lists() {
            assert!(head.lists.len() > 15 && head.lists.len() < 500, "{}", head.lists.len());
            assert!(head.lists.iter().all(|list| list.blocks.is_sorted() && list.blocks.len() <= 4 * limit(blocks)));
            assert!(head.lists.iter().all(|list| list.blocks.len() == list.keys.len()));
            let mut all: Vec<u32> = head.lists.iter().flat_map(|list| list.blocks.clone()).collect();
            all.sort_unstable();
            assert_eq!(all, (0..blocks as u32).collect::<Vec<_>>());
        }
    }

    /// Of the softmax mass of the best blocks, 99 % are found, for one query and for a chunk of them; in keys that have no neighbours, less.
    #[test]
    fn nearly_all_of_the_mass_is_found() {
        let (blocks, d, k) = (4000, 32, 4);
        let noise = keys(blocks + 64, d);
        for (clusters, share, bar) in [(16, 0.3f32, 0.99), (64, 0.5, 0.99), (1, 1., 0.8)] {
            // What all have in common, the cluster's own, and the key's own.
            let key = |block: usize| {
                let cluster = blocks + (block * 7919 + block / 31) % clusters;
                (0..d).map(|i| 9. + noise[cluster * d + i] + share * noise[block * d + i]).collect::<Vec<f32>>()
            };
            let rows: Vec<f32> = (0..blocks).flat_map(key).collect();
            let landmarks = Plain { keys: &rows, d };
            let mut index = Index::new(1, d, k);
            index.extend(blocks, |head, block, into| landmarks.key(head, block, into));
            for time in [1, 100] {
                let rows: Vec<f32> = keys(blocks + 64 + time * 8, d).split_off((blocks + 64) * d);
                let (mut mass, mut best_mass) = (0., 0.);
                for rows in rows.chunks(time * d) {
                    let queries = Tensor::from_slice(rows, (1, 1, 1, time, d), &Device::Cpu).unwrap();
                    let queries = SlotQueries { queries: &queries, newest: 0, scale: 1. };
                    let chosen =
                        retrieval::select_in_lists(queries, blocks, &landmarks, k, &index.lists(), probes(time))
                            .unwrap();
                    let chosen = chosen.flatten_all().unwrap().to_vec1::<u32>().unwrap();
                    for (query, chosen) in rows.chunks(d).zip(chosen.chunks(k)) {
                        let score = |key: &[f32]| query.iter().zip(key).map(|(q, k)| q * (k - 9.)).sum::<f32>();
                        let scores: Vec<f32> = landmarks.keys.chunks(d).map(score).collect();
                        let mut best = scores.clone();
                        best.sort_by(|a, b| b.total_cmp(a));
                        let weight = |score: f32| f64::from(score - best[0]).exp();
                        mass += chosen.iter().map(|&block| weight(scores[block as usize])).sum::<f64>();
                        best_mass += best[..k].iter().map(|&score| weight(score)).sum::<f64>();
                    }
                }
                assert!(mass > bar * best_mass, "{clusters} clusters, {time} queries: {}", mass / best_mass);
            }
        }
    }

    #[test]
    fn an_index_is_written_and_read_and_what_is_damaged_is_none() {
        let d = 3;
        let keys = keys(700, d);
        let of_head = |head: usize, block: usize| if head == 0 { &keys[..d] } else { &keys[block * d..][..d] };
        let key = |head: usize, block: usize, into: &mut [f32]| into.copy_from_slice(of_head(head, block));
        let of_layer = |_: usize, head: usize, block: usize, into: &mut [f32]| key(head, block, into);
        let layer = |len| {
            let mut index = Index::new(2, d, 4);
            index.extend(len, key);
            index
        };
        let bytes = encode(&[layer(600), layer(600)]);
        let mut read = decode(&bytes, 2, &Index::new(2, d, 4), 700, of_layer).unwrap();
        assert_eq!(encode(&read), bytes);
        read.iter_mut().for_each(|index| index.extend(700, key));
        assert_eq!(encode(&read), encode(&[layer(700), layer(700)]));
        for (read, made) in read[1].lists().iter().zip(layer(700).lists()) {
            assert_eq!(format!("{read:?}"), format!("{made:?}"), "rounded keys too");
        }
        let is_read = |bytes: &[u8], like: Index, blocks| decode(bytes, 2, &like, blocks, of_layer).is_some();
        assert!(!is_read(&bytes, Index::new(2, d, 3), 700) && !is_read(&bytes, Index::new(1, d, 4), 700));
        assert!(!is_read(&bytes, Index::new(2, d, 4), 599));
        assert!(is_read(&encode(&[layer(0), layer(0)]), Index::new(2, d, 4), 0));
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << (at % 8);
            assert!(!is_read(&wrong, Index::new(2, d, 4), 700), "{at}");
            // The same with a checksum that fits: an error or lists, but no panic.
            let end = wrong.len() - 4;
            let crc = crc32c::crc32c(&wrong[..end]);
            wrong[end..].copy_from_slice(&crc.to_le_bytes());
            is_read(&wrong, Index::new(2, d, 4), 700);
            assert!(!is_read(&bytes[..at], Index::new(2, d, 4), 700));
        }
    }

    /// Of equal keys those are there that can be chosen.
    #[test]
    fn equal_keys_are_there_as_often_as_they_can_be_chosen() {
        let kinds = keys(3, 5);
        let mut index = Index::new(1, 5, 4);
        index.extend(5000, |_, block, into| into.copy_from_slice(&kinds[block % 3 * 5..][..5]));
        let mut all: Vec<u32> = index.lists()[0].lists.iter().flat_map(|list| list.blocks.clone()).collect();
        all.sort_unstable();
        assert!(all.starts_with(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), "{all:?}");
        assert!(all.len() < 200, "{}", all.len());
    }
}
