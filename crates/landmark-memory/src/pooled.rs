//! Blocks in tiers with a pool on the device that computes: what queries read is in the pool, which has so many frames and no more; below it
//! encoded units are in RAM, and on disk.
//!
//! The landmarks of all blocks are on the device, and all are scored there. The numbers of the chosen blocks come to the host, for which it waits
//! once a layer. It knows which units are in the pool ([`Frames`]) and sends those that are not, all of a layer in one copy, and with the chosen blocks
//! the frames that they are in. So a layer whose blocks are all there costs one short copy in each direction.
//!
//! The queries of a chunk are taken in as many pieces as the pool needs to hold what each of them reads. A query's result does not depend on
//! the others', so on a GPU they make no difference to the bits.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{self, Blocks, Kept, Pool, Retrieved, Selection, SlotQueries};
use rayon::prelude::*;

use crate::frames::{Frames, Job, Place, Seen, UnitId, side_by_side};
use crate::paged::Paged;
use crate::ring::Ring;
use crate::{CacheConfig, Error, Result};

/// Blocks whose landmarks go to the device at once.
const LANDMARKS: usize = 4096;

/// The pool of a store in tiers.
#[derive(Debug, Clone)]
pub struct PoolTier {
    /// The device that computes.
    pub device: Device,
    /// The type that it computes in: f32, bf16 or f16.
    pub dtype: DType,
    /// Bytes of the pool. What one token reads in one layer finds room, whatever this says.
    pub bytes: usize,
}

/// The finished blocks of all layers.
#[derive(Debug)]
pub struct Pooled {
    /// Where blocks come from, and go to.
    paged: Paged,
    tier: PoolTier,
    heads: [usize; 2],
    /// Landmark keys `[batch, kv_heads, capacity, head_dim]` of each layer, on the device.
    landmarks: Vec<Ring<1>>,
    /// Made when queries come: they say how much one token reads.
    pool: Option<(Pool, Frames<Place>)>,
    /// Encoded units that are on disk.
    ram: Frames<Vec<u8>>,
    seen: Seen,
}

impl Pooled {
    /// Above a store [without landmarks](Paged::without_landmarks) that is empty, or has the blocks whose `landmarks` are given, block by block, of all layers and heads; `ram` bytes hold what was
    /// read from disk.
    pub fn new(config: &CacheConfig, paged: Paged, ram: usize, tier: PoolTier, landmarks: &[f32]) -> Result<Self> {
        let (shape, heads) = (*paged.shape(), [config.batch, config.kv_heads]);
        let row = [shape.codec.head_dim];
        let ring = |_| Ring::new(heads, [&row], config.max_blocks, tier.dtype, &tier.device);
        let rings = (0..shape.layers).map(ring).collect::<Result<_>>()?;
        let mut pooled = Self {
            tier,
            heads,
            landmarks: rings,
            pool: None,
            ram: Frames::new(shape.units(), shape.codec.unit(), ram),
            seen: Seen::default(),
            paged,
        };
        let block = shape.units() * shape.codec.head_dim;
        pooled.reserve(landmarks.len() / block)?;
        for landmarks in landmarks.chunks(LANDMARKS * block) {
            pooled.append_landmarks(landmarks)?;
        }
        Ok(pooled)
    }

    /// The tiers below.
    pub fn paged(&self) -> &Paged {
        &self.paged
    }

    /// The same, to be written to disk.
    pub fn paged_mut(&mut self) -> &mut Paged {
        &mut self.paged
    }

    /// Bytes on the device and in RAM.
    pub fn bytes(&self) -> usize {
        self.device_bytes() + self.ram.bytes() + self.paged.bytes()
    }

    /// Bytes on the device.
    pub fn device_bytes(&self) -> usize {
        let landmarks: usize = self.landmarks.iter().map(Ring::bytes).sum();
        landmarks + self.pool.as_ref().map_or(0, |(pool, _)| pool.bytes())
    }

    /// Bytes on the device that the landmarks of so many blocks take.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        self.landmarks.iter().map(|ring| ring.bytes_of(blocks)).sum()
    }

    /// Makes room for the landmarks of so many blocks.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        self.landmarks.iter_mut().try_for_each(|ring| ring.reserve(blocks))
    }

    /// Units that were sent to the pool, and that were found there.
    pub fn loads(&self) -> (u64, u64) {
        self.pool.as_ref().map_or((0, 0), |(_, frames)| frames.loads())
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.paged.clear();
        self.landmarks.iter_mut().for_each(Ring::clear);
        self.ram.forget_from(0);
        if let Some((_, frames)) = &mut self.pool {
            frames.forget_from(0);
        }
    }

    /// As [`Paged::append`]; keys and values are on the device.
    pub fn append(&mut self, layers: &[(Tensor, Tensor)], sizes: &[(usize, u32)]) -> Result<()> {
        let on_cpu = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(&Device::Cpu);
        let on_cpu = |(keys, values): &(Tensor, Tensor)| candle_core::Result::Ok((on_cpu(keys)?, on_cpu(values)?));
        let layers: Vec<(Tensor, Tensor)> = layers.iter().map(on_cpu).collect::<candle_core::Result<_>>()?;
        // What can fail for want of memory, before anything is changed.
        let blocks = self.paged.len() + sizes.len();
        self.landmarks.iter_mut().try_for_each(|ring| ring.reserve(blocks))?;
        let before = self.paged.pending().len();
        self.paged.append(&layers, sizes)?;
        // As they are stored, so that a session that is opened again has the same.
        let landmarks: Vec<f32> =
            self.paged.pending()[before..].iter().flat_map(|record| &record.landmarks).copied().collect();
        self.append_landmarks(&landmarks)
    }

    /// Landmarks `[blocks, layers, heads, head_dim]`.
    fn append_landmarks(&mut self, landmarks: &[f32]) -> Result<()> {
        let shape = self.paged.shape();
        let ([batch, kv_heads], layers, d) = (self.heads, shape.layers, shape.codec.head_dim);
        let blocks = landmarks.len() / (shape.units() * d);
        let all = Tensor::from_slice(landmarks, (blocks, layers, batch, kv_heads, d), &Device::Cpu)?;
        let all =
            all.permute((1, 2, 3, 0, 4))?.contiguous()?.to_device(&self.tier.device)?.to_dtype(self.tier.dtype)?;
        for (layer, ring) in self.landmarks.iter_mut().enumerate() {
            ring.append([&all.get(layer)?])?;
        }
        Ok(())
    }

    /// As [`crate::store::BlockStore::retrieve`].
    pub fn retrieve(
        &mut self,
        layer: usize,
        queries: SlotQueries,
        lengths: Option<&[u32]>,
        top_k: usize,
        selection: Selection,
    ) -> Result<(Retrieved, Tensor)> {
        let mut pool = match self.pool.take() {
            Some(pool) => pool,
            None => self.make_pool(queries.queries.dims().iter().skip(1).take(2).product::<usize>() * top_k)?,
        };
        let retrieved = self.retrieve_in(&mut pool, layer, queries, lengths, top_k, selection);
        self.pool = Some(pool);
        retrieved
    }

    /// A pool of `least` frames, or as many as it has bytes for.
    fn make_pool(&self, least: usize) -> Result<(Pool, Frames<Place>)> {
        let (shape, dtype) = (self.paged.shape(), self.tier.dtype);
        let codec = shape.codec;
        let unit = codec.elements() * dtype.size_in_bytes();
        let frames = (self.tier.bytes / unit).max(least);
        let pool = Pool::new(frames, codec.block, codec.head_dim, dtype, &self.tier.device);
        let pool = pool.map_err(|source| Error::Pool { bytes: frames * unit, source })?;
        Ok((pool, Frames::new(shape.units(), unit, frames * unit)))
    }

    fn retrieve_in(
        &mut self,
        (pool, frames): &mut (Pool, Frames<Place>),
        layer: usize,
        queries: SlotQueries,
        lengths: Option<&[u32]>,
        top_k: usize,
        selection: Selection,
    ) -> Result<(Retrieved, Tensor)> {
        let landmarks = &self.landmarks[layer];
        let chosen = retrieval::select(queries, blocks(landmarks, lengths, pool, &[]), top_k, selection)?;
        // Here the host waits for the device.
        let read = Read::new(chosen.flatten_all()?.to_vec1::<u32>()?, &chosen, self.heads[1])?;
        let paged = &self.paged;
        let id = |head: usize, block: u32| UnitId {
            record: paged.number(block as usize),
            unit: layer * paged.shape().heads + head,
        };
        let pieces = read.pieces(pool.frames(), landmarks.len(), &mut self.seen, id);
        let mut parts = Vec::with_capacity(pieces.len());
        for Piece { tokens, units } in &pieces {
            bring(units, paged, &mut self.ram, pool, frames, self.tier.dtype)?;
            let places = read.places(tokens, |head, block| {
                let UnitId { record, unit } = id(head, block);
                frames.buffer(unit, record).map(|place| place.0)
            });
            let blocks = blocks(landmarks, lengths, pool, &places);
            if pieces.len() == 1 {
                return Ok((retrieval::attend(queries, blocks, &chosen)?, chosen));
            }
            let part = |x: &Tensor, dim: usize| x.narrow(dim, tokens.start, tokens.len())?.contiguous();
            let queries = SlotQueries { queries: &part(queries.queries, 3)?, ..queries };
            parts.push(retrieval::attend(queries, blocks, &part(&chosen, 2)?)?);
        }
        let join = |part: fn(&Retrieved) -> &Tensor| Tensor::cat(&parts.iter().map(part).collect::<Vec<_>>(), 2);
        let (out, lse, scores) = (join(|part| &part.out)?, join(|part| &part.lse)?, join(|part| &part.scores)?);
        Ok((Retrieved { out, lse, scores }, chosen))
    }
}

/// Blocks whose chosen ones are in these frames.
fn blocks<'a>(landmarks: &'a Ring<1>, lengths: Option<&'a [u32]>, pool: &'a Pool, frames: &'a [u32]) -> Blocks<'a> {
    let kept = Kept::Pool { pool, frames };
    Blocks { kept, landmarks: Some(&landmarks.tensors()[0]), first: landmarks.first(), len: landmarks.len(), lengths }
}

/// Sees to it that these units are in the pool, no more than it has frames.
fn bring(
    units: &[UnitId],
    paged: &Paged,
    ram: &mut Frames<Vec<u8>>,
    pool: &mut Pool,
    frames: &mut Frames<Place>,
    dtype: DType,
) -> Result<()> {
    let codec = paged.shape().codec;
    frames.hold(units, |jobs| {
        let on_disk: Vec<UnitId> = jobs.iter().map(|&(id, _)| id).filter(|&id| paged.unwritten(id).is_none()).collect();
        ram.hold(&on_disk, |jobs| read(jobs, paged))?;
        let places: Vec<u32> = jobs.iter().map(|(_, place)| place.0).collect();
        let bytes = pool.frame_bytes();
        pool.fill(&places, |range, buffer| {
            jobs[range].par_iter().zip(buffer.par_chunks_exact_mut(bytes)).for_each(|(&(id, _), buffer)| {
                let encoded = paged.unwritten(id).or_else(|| Some(ram.buffer(id.unit, id.record)?));
                codec.decode_as(dtype, encoded.expect("a unit that was read"), buffer);
            });
        })?;
        Ok(())
    })
}

/// Reads encoded units from disk, those that are side by side in a block at once.
fn read(jobs: &mut [Job<Vec<u8>>], paged: &Paged) -> Result<()> {
    let runs = side_by_side(jobs);
    runs.iter().for_each(|run| paged.will_read(run[0].0, run.len()));
    runs.into_par_iter().try_for_each_init(Vec::new, |buffer, run| {
        let UnitId { record, unit } = run[0].0;
        if let [(_, data)] = run {
            return paged.read(record, unit..unit + 1, data);
        }
        paged.read(record, unit..unit + run.len(), buffer)?;
        for ((_, data), bytes) in run.iter_mut().zip(buffer.chunks_exact(paged.shape().codec.unit())) {
            data.clear();
            data.extend_from_slice(bytes);
        }
        Ok(())
    })
}

/// What the queries of a chunk read in one layer.
struct Read {
    /// `[batch, heads, time, k]`, counted from the oldest block.
    chosen: Vec<u32>,
    dims: [usize; 4],
    kv_heads: usize,
}

/// Some tokens of a chunk, and all units that they read, sorted.
#[derive(Debug, PartialEq)]
struct Piece {
    tokens: Range<usize>,
    units: Vec<UnitId>,
}

impl Read {
    fn new(chosen: Vec<u32>, like: &Tensor, kv_heads: usize) -> candle_core::Result<Self> {
        let (batch, heads, time, k) = like.dims4()?;
        Ok(Self { chosen, dims: [batch, heads, time, k], kv_heads })
    }

    /// The key-value heads, over the rows of the batch, and blocks that the heads of a token read.
    fn of_token(&self, t: usize) -> impl Iterator<Item = (usize, u32)> + '_ {
        let [batch, heads, time, k] = self.dims;
        (0..batch * heads).flat_map(move |bh| {
            let head = self.head(bh);
            self.chosen[(bh * time + t) * k..][..k].iter().map(move |&block| (head, block))
        })
    }

    /// The key-value head, over the rows of the batch, of a query head.
    fn head(&self, bh: usize) -> usize {
        let heads = self.dims[1];
        bh / heads * self.kv_heads + bh % heads / (heads / self.kv_heads)
    }

    /// The chunk in pieces that read at most `most` units each (or are one token), of `len` blocks.
    fn pieces(&self, most: usize, len: usize, seen: &mut Seen, id: impl Fn(usize, u32) -> UnitId) -> Vec<Piece> {
        let [batch, _, time, _] = self.dims;
        let all = batch * self.kv_heads * len;
        let mut pieces = Vec::new();
        let (mut begin, mut t) = (0, 0);
        let mut units = Vec::new();
        seen.clear(all);
        while t < time {
            let before = units.len();
            let new = self.of_token(t).filter(|&(head, block)| seen.is_new(head * len + block as usize));
            units.extend(new.map(|(head, block)| id(head, block)));
            if units.len() <= most || t == begin {
                t += 1;
                continue;
            }
            // The token begins another piece.
            units.truncate(before);
            pieces.push(Piece { tokens: begin..t, units: std::mem::take(&mut units) });
            begin = t;
            seen.clear(all);
        }
        pieces.push(Piece { tokens: begin..time, units });
        pieces.iter_mut().for_each(|piece| piece.units.sort_unstable());
        pieces
    }

    /// For the blocks that these tokens read, `[batch, heads, tokens, k]`, what `place` says of each; none, where it says nothing.
    fn places(&self, tokens: &Range<usize>, place: impl Fn(usize, u32) -> Option<u32>) -> Vec<u32> {
        let [batch, heads, time, k] = self.dims;
        let mut places = Vec::with_capacity(batch * heads * tokens.len() * k);
        for bh in 0..batch * heads {
            let head = self.head(bh);
            let chosen = &self.chosen[(bh * time + tokens.start) * k..][..tokens.len() * k];
            places.extend(chosen.iter().map(|&block| place(head, block).unwrap_or(u32::MAX)));
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The pieces are all tokens in order, each has what its tokens read and no more than fits, and places are those of the chosen blocks.
        #[test]
        fn pieces_hold_what_their_tokens_read(
            (batch, kv_heads, group, time, k) in (1usize..3, 1usize..3, 1usize..3, 1usize..12, 1usize..4),
            most in 0usize..60,
            seed in 1u64..1000,
        ) {
            let (heads, len, mut state) = (kv_heads * group, 9, seed);
            let mut number = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u32 % len as u32
            };
            let dims = [batch, heads, time, k];
            let chosen: Vec<u32> = (0..dims.iter().product()).map(|_| number()).collect();
            let read = Read { chosen: chosen.clone(), dims, kv_heads };
            let id = |head: usize, block: u32| UnitId { record: block as usize, unit: head };
            let mut seen = Seen::late();
            let pieces = read.pieces(most, len, &mut seen, id);
            let mut next = 0;
            for Piece { tokens, units } in &pieces {
                prop_assert_eq!(tokens.start, next);
                prop_assert!(!tokens.is_empty());
                next = tokens.end;
                let mut expected: Vec<UnitId> = tokens.clone().flat_map(|t| read.of_token(t)).map(|(h, b)| id(h, b)).collect();
                expected.sort_unstable();
                expected.dedup();
                prop_assert_eq!(units, &expected);
                prop_assert!(units.len() <= most || tokens.len() == 1);
                let places = read.places(tokens, |head, block| Some(100 * head as u32 + block));
                let mut at = places.iter();
                for bh in 0..batch * heads {
                    let head = bh / heads * kv_heads + bh % heads / group;
                    for t in tokens.clone() {
                        for rank in 0..k {
                            let block = chosen[(bh * time + t) * k + rank];
                            prop_assert_eq!(*at.next().unwrap(), 100 * head as u32 + block);
                        }
                    }
                }
            }
            prop_assert_eq!(next, time);
            // No piece could have had one more token.
            for pair in pieces.windows(2) {
                let tokens = pair[0].tokens.start..pair[0].tokens.end + 1;
                let mut units: Vec<(usize, u32)> = tokens.flat_map(|t| read.of_token(t)).collect();
                units.sort_unstable();
                units.dedup();
                prop_assert!(units.len() > most);
            }
        }
    }
}
