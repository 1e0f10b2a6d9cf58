//! An index over landmark keys: for each layer and head lists of keys that are near each other, so that a query scores a few lists and not all
//! landmarks.
//!
//! A key goes to the list whose centroid, the mean of its keys, is nearest. A list that has grown over a limit is split in two by 2-means, so the lists
//! follow the text while it is read and nothing is ever trained anew. The limit grows with the root of the number of blocks, and the work for a query
//! with it. What the lists are is a function of the keys in their order alone: an index that is built again from the same keys is the same.
//!
//! Of equal scores the oldest blocks win, so a block whose key equals those of `top_k` older ones is never chosen. It is left out where it is met: in
//! the first layer the keys of all blocks are equal, and there the index has a few blocks and not a list of all.
//!
//! # The file `index` of a session
//!
//! What was indexed when the session was last left; without it, or if it is damaged, the index is built again. Little endian: the ASCII bytes
//! `LMINDEX` and a zero byte; 4 bytes each: version 1, layers, heads, channels, blocks that a query chooses, blocks that are indexed; for each layer, for
//! each head the number of its lists; their centroids `[lists, channels]` in float32; for each list the keys that it has before it is split, at
//! least, the number of its blocks (plus 2^31 if their keys are all equal), and these, ascending. CRC-32C of all at the end.

use landmark_attention::retrieval::Lists;
use rayon::prelude::*;

/// Blocks from which on an index is worth its while.
pub const FROM_BLOCKS: usize = 2048;
/// Lists that a query looks at.
pub const PROBES: usize = 12;
/// Keys of a list at least before it is split.
const LIST: usize = 128;
/// Steps of 2-means.
const STEPS: usize = 6;

const MAGIC: &[u8] = b"LMINDEX\0";
/// With the number of a list's blocks: their keys are equal.
const UNIFORM: usize = 1 << 31;

/// The index of one layer and head.
#[derive(Debug, Default)]
struct Head {
    /// `[lists, head_dim]`
    centroids: Vec<f32>,
    members: Vec<Vec<u32>>,
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

impl Index {
    /// Of nothing, for queries that choose `top_k` blocks.
    pub fn new(heads: usize, head_dim: usize, top_k: usize) -> Self {
        Self { heads: (0..heads).map(|_| Head::default()).collect(), head_dim, top_k, len: 0 }
    }

    /// Blocks that are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Takes in blocks up to `len`, whose landmarks `key` gives by head and block.
    pub fn extend<'a>(&mut self, len: usize, key: impl Fn(usize, usize) -> &'a [f32] + Sync) {
        let (from, d, top_k) = (self.len, self.head_dim, self.top_k);
        self.heads.par_iter_mut().enumerate().for_each(|(head, index)| {
            (from..len).for_each(|block| index.insert(block as u32, d, top_k, &|block| key(head, block as usize)));
        });
        self.len = len.max(from);
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.heads.iter_mut().for_each(|head| *head = Head::default());
        self.len = 0;
    }

    /// The lists, by head.
    pub fn lists(&self) -> Vec<Lists<'_>> {
        self.heads.iter().map(|head| Lists { centroids: &head.centroids, members: &head.members }).collect()
    }
}

impl Head {
    fn insert<'a>(&mut self, block: u32, d: usize, top_k: usize, key: &dyn Fn(u32) -> &'a [f32]) {
        let new = key(block);
        let Some(list) = self.nearest(new, d) else {
            return self.push(new.to_vec(), vec![block], true);
        };
        let members = &mut self.members[list];
        let is_equal = self.uniform[list] && key(members[0]) == new;
        if is_equal && members.len() >= top_k {
            return;
        }
        self.uniform[list] = is_equal;
        members.push(block);
        let share = 1. / members.len() as f32;
        for (mean, x) in self.centroids[list * d..][..d].iter_mut().zip(new) {
            *mean += (x - *mean) * share;
        }
        let limit = LIST.max(2 * (block as usize).isqrt());
        if self.members[list].len() > limit.max(self.limits[list]) {
            self.split(list, d, top_k, key);
        }
    }

    fn push(&mut self, centroid: Vec<f32>, members: Vec<u32>, uniform: bool) {
        self.centroids.extend(centroid);
        self.members.push(members);
        self.limits.push(0);
        self.uniform.push(uniform);
    }

    /// The list with the nearest centroid.
    fn nearest(&self, key: &[f32], d: usize) -> Option<usize> {
        let distances = self.centroids.chunks_exact(d).map(|centroid| distance(centroid, key));
        let mut best = None;
        for (list, distance) in distances.enumerate() {
            if best.is_none_or(|(_, least)| distance < least) {
                best = Some((list, distance));
            }
        }
        best.map(|(list, _)| list)
    }

    /// Splits a list in two, or lets it grow to twice its size if all its keys are equal.
    fn split<'a>(&mut self, list: usize, d: usize, top_k: usize, key: &dyn Fn(u32) -> &'a [f32]) {
        let members = std::mem::take(&mut self.members[list]);
        let farthest = |from: &[f32]| {
            let mut far = (members[0], -1f32);
            for &block in &members {
                let distance = distance(key(block), from);
                if distance > far.1 {
                    far = (block, distance);
                }
            }
            far.0
        };
        let first = farthest(&self.centroids[list * d..][..d]);
        let mut means = [key(first).to_vec(), key(farthest(key(first))).to_vec()];
        let mut parts = [vec![], vec![]];
        for _ in 0..STEPS {
            parts = [vec![], vec![]];
            for &block in &members {
                let [a, b] = [0, 1].map(|i: usize| distance(&means[i], key(block)));
                parts[usize::from(b < a)].push(block);
            }
            for (mean, part) in means.iter_mut().zip(&parts) {
                if !part.is_empty() {
                    mean.fill(0.);
                    part.iter().for_each(|&block| mean.iter_mut().zip(key(block)).for_each(|(mean, x)| *mean += x));
                    mean.iter_mut().for_each(|mean| *mean /= part.len() as f32);
                }
            }
        }
        if parts.iter().any(Vec::is_empty) {
            self.limits[list] = 2 * members.len();
            self.members[list] = members;
            return;
        }
        let uniform = |part: &[u32]| part.iter().all(|&block| key(block) == key(part[0]));
        let [a, b] = parts.map(|mut part| {
            let uniform = uniform(&part);
            if uniform {
                part.truncate(top_k.max(1));
            }
            (part, uniform)
        });
        let [mean_a, mean_b] = means;
        self.centroids[list * d..][..d].copy_from_slice(&mean_a);
        (self.members[list], self.uniform[list], self.limits[list]) = (a.0, a.1, 0);
        self.push(mean_b, b.0, b.1);
    }
}

/// The file of the indices of all layers.
pub fn encode(layers: &[Index]) -> Vec<u8> {
    let Some(Index { heads, head_dim, top_k, len }) = layers.first() else { return Vec::new() };
    let mut bytes = MAGIC.to_vec();
    let mut put = |x: usize| bytes.extend((x as u32).to_le_bytes());
    [1, layers.len(), heads.len(), *head_dim, *top_k, *len].into_iter().for_each(&mut put);
    for head in layers.iter().flat_map(|layer| &layer.heads) {
        put(head.members.len());
        head.centroids.iter().for_each(|x| put(x.to_bits() as usize));
        for (list, members) in head.members.iter().enumerate() {
            put(head.limits[list]);
            put(members.len() | if head.uniform[list] { UNIFORM } else { 0 });
            members.iter().for_each(|&block| put(block as usize));
        }
    }
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// What the file has, if it is whole, of these shapes and of no more than so many blocks.
pub fn decode(bytes: &[u8], layers: usize, like: &Index, blocks: usize) -> Option<Vec<Index>> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (words, rest) = body.strip_prefix(MAGIC)?.as_chunks::<4>();
    let mut words = words.iter().map(|&word| u32::from_le_bytes(word));
    let shape = [1, layers, like.heads.len(), like.head_dim, like.top_k];
    let is_of_shape = shape.into_iter().all(|x| words.next() == u32::try_from(x).ok());
    let len = words.next()? as usize;
    if !is_of_shape || len > blocks || !rest.is_empty() {
        return None;
    }
    let mut head = || {
        let lists = words.next()? as usize;
        // Nobody's number is believed: what is there is taken, and it must be as much.
        let centroids: Vec<f32> = words.by_ref().take(lists.checked_mul(like.head_dim)?).map(f32::from_bits).collect();
        let mut head = Head { centroids, ..Head::default() };
        for _ in 0..lists {
            head.limits.push(words.next()? as usize);
            let count = words.next()? as usize;
            head.uniform.push(count & UNIFORM > 0);
            let members: Vec<u32> = words.by_ref().take(count & !UNIFORM).collect();
            let is_list = members.len() == count & !UNIFORM && members.is_sorted_by(|a, b| a < b);
            if !is_list || members.last().is_none_or(|&last| last as usize >= len) {
                return None;
            }
            head.members.push(members);
        }
        (head.centroids.len() == lists * like.head_dim).then_some(head)
    };
    let mut layer = || {
        let heads = (0..like.heads.len()).map(|_| head()).collect::<Option<_>>()?;
        Some(Index { heads, head_dim: like.head_dim, top_k: like.top_k, len })
    };
    let indices = (0..layers).map(|_| layer()).collect::<Option<_>>()?;
    words.next().is_none().then_some(indices)
}

/// The squared distance of two keys.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that repeat after a long time.
    fn keys(blocks: usize, d: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.
        };
        (0..blocks * d).map(|_| next()).collect()
    }

    /// Every block is in one list, in order, lists keep to their limit, and how blocks come in changes nothing.
    #[test]
    fn lists_are_a_partition_whatever_the_portions() {
        let (blocks, d) = (3000, 7);
        let keys = keys(blocks, d);
        let key = |_: usize, block: usize| &keys[block * d..][..d];
        let mut whole = Index::new(2, d, 4);
        whole.extend(blocks, key);
        let mut portions = Index::new(2, d, 4);
        (0..blocks).step_by(17).chain([blocks]).for_each(|len| portions.extend(len, key));
        for (a, b) in whole.lists().iter().zip(portions.lists()) {
            assert!(a.centroids == b.centroids && a.members == b.members);
            assert!(a.members.len() > 15 && a.members.len() < 100, "{}", a.members.len());
            assert!(a.members.iter().all(|list| list.is_sorted() && list.len() <= LIST.max(2 * blocks.isqrt())));
            let mut all: Vec<u32> = a.members.concat();
            all.sort_unstable();
            assert_eq!(all, (0..blocks as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_index_is_written_and_read_and_what_is_damaged_is_none() {
        let d = 3;
        let keys = keys(700, d);
        let key = |head: usize, block: usize| if head == 0 { &keys[..d] } else { &keys[block * d..][..d] };
        let layer = |len| {
            let mut index = Index::new(2, d, 4);
            index.extend(len, key);
            index
        };
        let bytes = encode(&[layer(600), layer(600)]);
        let mut read = decode(&bytes, 2, &Index::new(2, d, 4), 700).unwrap();
        assert_eq!(encode(&read), bytes);
        read.iter_mut().for_each(|index| index.extend(700, key));
        assert_eq!(encode(&read), encode(&[layer(700), layer(700)]));
        let is_read = |bytes: &[u8], like: Index, blocks| decode(bytes, 2, &like, blocks).is_some();
        assert!(!is_read(&bytes, Index::new(2, d, 3), 700) && !is_read(&bytes, Index::new(1, d, 4), 700));
        assert!(!is_read(&bytes, Index::new(2, d, 4), 599));
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
        index.extend(5000, |_, block| &kinds[block % 3 * 5..][..5]);
        let lists = index.lists();
        let mut all: Vec<u32> = lists[0].members.concat();
        all.sort_unstable();
        assert!(all.starts_with(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), "{all:?}");
        assert!(all.len() < 200, "{}", all.len());
    }
}
