//! Blocks in tiers: encoded on disk, or in memory until they are written there, and decoded in frames of RAM while they are used.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{self, Blocks, Kept, Keys, Selection, SlotQueries};
use rayon::prelude::*;

use crate::codec::{BlockType, Codec};
use crate::frames::{Frames, Job, Seen, UnitId, side_by_side};
use crate::index::{self, FROM_BLOCKS, Index};
use crate::indexed::Indexed;
use crate::landmarks::Landmarks;
use crate::ring::Ring;
use crate::segments::{BlockRecord, Segments, Shape};
use crate::{CacheConfig, Error, Result};

/// What a store of blocks in tiers is made for.
#[derive(Debug, Clone, Copy)]
pub struct Tiers {
    /// The type that blocks are kept in. With [`BlockType::F32`] what is computed is, bit for bit, what a cache in memory computes.
    pub of: BlockType,
    /// Bytes of RAM for blocks that are in use. What one chunk reads in one layer is in RAM at once, whatever this says.
    pub ram: usize,
    /// Which landmarks are scored.
    pub scoring: Scoring,
}

/// Which landmarks are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scoring {
    /// All.
    #[default]
    Exact,
    /// Of texts of more than 2048 blocks those that an index finds, where each token and head chooses for itself. Other selections need all.
    Index,
    /// The same, and all are scored too, to measure what the index misses.
    IndexMeasured,
}

/// What an index found of what all landmarks would have given.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Recall {
    /// Queries, over tokens, heads and layers.
    pub queries: u64,
    /// Their sum of the softmax mass of the blocks that the index chose, by that of the best blocks; at most 1 each.
    pub mass: f64,
    /// Blocks that it chose and that are among the best.
    pub found: u64,
    /// Blocks that it chose.
    pub chosen: u64,
}

/// The finished blocks of all layers.
#[derive(Debug)]
pub struct Paged {
    shape: Shape,
    heads: [usize; 2],
    /// Blocks that are cached.
    len: usize,
    /// Blocks that are kept, if not all.
    max_blocks: Option<usize>,
    /// Landmark keys `[batch, kv_heads, capacity, head_dim]` of each layer, as long as all are scored here.
    scored: Vec<Ring<1>>,
    frames: Frames,
    scoring: Scoring,
    /// The index of each layer, if there is one, and the landmarks that it is made of.
    indexed: Vec<Arc<Indexed>>,
    /// Blocks that the index's file has.
    index_kept: usize,
    recall: Recall,
    /// For [`Paged::promote`]: memory to work in.
    seen: Seen,
    /// The blocks that are cached, oldest first, by their numbers; `None`: the newest of all, so many as are cached.
    numbers: Option<Vec<u32>>,
    /// Checksums of the units of all blocks that are on disk, and where they are.
    disk: Option<(Segments, Vec<u32>)>,
    /// Blocks on disk.
    written: usize,
    /// Blocks after those, encoded, and what is known of them.
    pending: Vec<u8>,
    records: Vec<BlockRecord>,
}

impl Paged {
    /// An empty store in memory, or before what is in `disk`.
    pub fn new(config: &CacheConfig, head_dim: usize, tiers: Tiers, disk: Option<Segments>) -> Result<Self> {
        let codec = Codec { of: tiers.of, block: config.mem_freq + 1, head_dim };
        let heads = [config.batch, config.kv_heads];
        let (per_segment, lineage) =
            disk.as_ref().map_or((1, 0), |disk| (disk.shape().per_segment, disk.shape().lineage));
        let shape = Shape { layers: config.layers, heads: config.batch * config.kv_heads, codec, per_segment, lineage };
        if let Some(disk) = &disk
            && *disk.shape() != shape
        {
            let (got, expected) = (format!("{shape:?}"), format!("{:?}, as the blocks on disk", disk.shape()));
            return Err(Error::Config { name: "shape", got, expected });
        }
        let ring = |_| Ring::new(heads, [&[head_dim]], config.max_blocks, DType::F32, &Device::Cpu);
        let layers = match tiers.scoring {
            // Blocks that go would have to go from the lists.
            _ if config.selection != Selection::PerTokenAndHead || config.max_blocks.is_some() => 0,
            Scoring::Exact => 0,
            Scoring::Index | Scoring::IndexMeasured => config.layers,
        };
        let indexed =
            || Indexed::new(Index::new(shape.heads, head_dim, config.top_k), Landmarks::new(codec, shape.heads));
        Ok(Self {
            shape,
            heads,
            len: 0,
            max_blocks: config.max_blocks,
            scored: (0..config.layers).map(ring).collect::<Result<_>>()?,
            frames: Frames::new(shape.units(), codec.elements(), tiers.ram),
            scoring: tiers.scoring,
            indexed: (0..layers).map(|_| Arc::new(indexed())).collect(),
            index_kept: 0,
            recall: Recall::default(),
            seen: Seen::default(),
            numbers: None,
            disk: disk.map(|disk| (disk, Vec::new())),
            written: 0,
            pending: Vec::new(),
            records: Vec::new(),
        })
    }

    /// The same for who scores landmarks elsewhere, and keeps them there.
    pub fn without_landmarks(mut self) -> Self {
        self.scored.clear();
        self.indexed.clear();
        self
    }

    /// Takes over the first `blocks` on disk without those that are `dropped`; `each` is told those that are taken.
    pub fn restore(
        &mut self,
        blocks: usize,
        dropped: &(dyn Fn(usize) -> bool + Sync),
        mut each: impl FnMut(&BlockRecord) -> Result<()>,
    ) -> Result<()> {
        let Some((segments, mut crcs)) = self.disk.take() else { return Ok(()) };
        let units = self.shape.units();
        segments.check_lengths(blocks, dropped)?;
        let cached = (0..blocks).filter(|&block| !dropped(block)).count();
        self.reserve(cached)?;
        crcs.reserve(blocks * units);
        let mut numbers = Vec::new();
        for records in segments.records(blocks, dropped) {
            let records = records?;
            for record in &records {
                match record {
                    Some(record) => {
                        each(record)?;
                        numbers.push(record.number as u32);
                        crcs.extend(&record.crcs);
                    }
                    None => crcs.extend(std::iter::repeat_n(0, units)),
                }
            }
            let landmarks: Vec<&[f32]> = records.iter().flatten().map(|record| &record.landmarks[..]).collect();
            self.append_landmarks(&landmarks, cached)?;
        }
        self.written = blocks;
        self.numbers = (numbers.len() < blocks).then_some(numbers);
        self.disk = Some((segments, crcs));
        Ok(())
    }

    /// `landmarks` are those of all layers and heads, block by block; there will be `blocks` at least.
    fn append_landmarks(&mut self, landmarks: &[&[f32]], blocks: usize) -> Result<()> {
        let (n, d, heads) = (landmarks.len(), self.shape.codec.head_dim, self.shape.heads);
        if n == 0 {
            return Ok(());
        }
        if self.scored.is_empty() {
            self.len = self.max_blocks.map_or(self.len + n, |max| max.min(self.len + n));
            return Ok(());
        }
        let mut own: Vec<_> = self.indexed.iter().map(|indexed| indexed.landmarks_mut()).collect();
        let layers: Vec<&mut Landmarks> = own.iter_mut().map(|own| &mut **own).collect();
        layers.into_par_iter().enumerate().for_each(|(layer, own)| {
            landmarks.iter().for_each(|landmarks| own.push(&landmarks[layer * heads * d..][..heads * d]));
        });
        drop(own);
        if self.all_are_scored(blocks.max(self.len + n)) {
            let [batch, kv_heads] = self.heads;
            for (layer, ring) in self.scored.iter_mut().enumerate() {
                let mut rows = Vec::with_capacity(heads * n * d);
                for head in 0..heads {
                    landmarks.iter().for_each(|all| rows.extend_from_slice(&all[(layer * heads + head) * d..][..d]));
                }
                ring.append([&Tensor::from_vec(rows, (batch, kv_heads, n, d), &Device::Cpu)?])?;
            }
            self.len = self.scored[0].len();
        } else {
            // From here on the index is asked, and it has landmarks of its own.
            self.scored.iter_mut().try_for_each(Ring::release)?;
            self.len += n;
        }
        Ok(())
    }

    /// Whether of so many blocks the landmarks of all may be scored.
    fn all_are_scored(&self, blocks: usize) -> bool {
        self.indexed.is_empty() || self.scoring == Scoring::IndexMeasured || blocks < FROM_BLOCKS
    }

    /// Blocks that are cached.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Blocks of the text.
    fn total(&self) -> usize {
        self.written + self.records.len()
    }

    /// The number in the text of the `i`-th block that is cached.
    pub fn number(&self, i: usize) -> usize {
        match &self.numbers {
            Some(numbers) => numbers[numbers.len() - self.len() + i] as usize,
            None => self.total() - self.len() + i,
        }
    }

    /// Bytes of RAM: frames, landmarks and what is not written.
    pub fn bytes(&self) -> usize {
        let scored: usize = self.scored.iter().map(Ring::bytes).sum();
        let indexed: usize = self.indexed.iter().map(|each| each.landmarks().bytes() + each.index().bytes()).sum();
        self.frames.bytes() + scored + indexed + self.pending.capacity()
    }

    /// Bytes of RAM that so many blocks take if all are written: their landmarks.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        let scored = |ring: &Ring<1>| if self.all_are_scored(blocks) { ring.bytes_of(blocks) } else { 0 };
        let scored: usize = self.scored.iter().map(scored).sum();
        scored + self.indexed.iter().map(|each| each.landmarks().bytes_of(blocks)).sum::<usize>()
    }

    /// Makes room for the landmarks of so many blocks.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        if !self.all_are_scored(blocks) {
            return Ok(());
        }
        self.scored.iter_mut().try_for_each(|ring| ring.reserve(blocks))
    }

    /// Units that were brought into RAM, and that were found there.
    pub fn loads(&self) -> (u64, u64) {
        self.frames.loads()
    }

    /// Forgets all blocks, but for those on disk nothing is kept of the text.
    pub fn clear(&mut self) {
        self.len = 0;
        self.scored.iter_mut().for_each(Ring::clear);
        for indexed in &self.indexed {
            indexed.landmarks_mut().clear();
            indexed.index().clear();
        }
        self.index_kept = 0;
        self.frames.forget_from(0);
        self.pending.clear();
        self.records.clear();
        self.numbers = None;
        self.written = 0;
        if let Some((_, crcs)) = &mut self.disk {
            crcs.clear();
        }
    }

    /// Appends blocks: of each layer keys and values `[batch, kv_heads, n, block, head_dim]`; of each block its first token and their number.
    pub fn append(&mut self, layers: &[(Tensor, Tensor)], sizes: &[(usize, u32)]) -> Result<()> {
        let Shape { codec, heads, .. } = self.shape;
        let (n, unit) = (sizes.len(), codec.unit());
        let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let flat = |(keys, values): &(Tensor, Tensor)| candle_core::Result::Ok([flat(keys)?, flat(values)?]);
        let layers: Vec<[Vec<f32>; 2]> = layers.iter().map(flat).collect::<candle_core::Result<_>>()?;
        let begin = self.pending.len();
        self.pending.resize(begin + n * self.shape.block_bytes(), 0);
        let elements = codec.elements() / 2;
        let number = self.total() as u64;
        let blocks = self.pending[begin..].par_chunks_exact_mut(self.shape.block_bytes()).enumerate();
        let records: Vec<BlockRecord> = blocks
            .map(|(i, bytes)| {
                let units = self.shape.units();
                let (mut crcs, mut landmarks) = (Vec::with_capacity(units), Vec::with_capacity(units * codec.head_dim));
                let mut landmark = vec![0.; codec.head_dim];
                for (id, bytes) in bytes.chunks_exact_mut(unit).enumerate() {
                    let at = (id % heads * n + i) * elements;
                    let [keys, values] = &layers[id / heads];
                    codec.encode(&keys[at..][..elements], &values[at..][..elements], bytes);
                    crcs.push(crc32c::crc32c(bytes));
                    codec.landmark(bytes, &mut landmark);
                    landmarks.extend_from_slice(&landmark);
                }
                let (start, tokens) = (sizes[i].0 as u64, sizes[i].1);
                BlockRecord { number: number + i as u64, start, tokens, tokens_crc: 0, crcs, landmarks }
            })
            .collect();
        let landmarks: Vec<&[f32]> = records.iter().map(|record| &record.landmarks[..]).collect();
        self.append_landmarks(&landmarks, 0)?;
        if self.len() >= FROM_BLOCKS {
            self.indexed.iter().for_each(Indexed::extend_soon);
        }
        if let Some(numbers) = &mut self.numbers {
            numbers.extend(records.iter().map(|record| record.number as u32));
        }
        self.records.extend(records);
        Ok(())
    }

    /// What the index found, as far as it was measured.
    pub fn recall(&self) -> Recall {
        self.recall
    }

    /// The best blocks of a layer, as [`retrieval::select`] says it.
    pub fn select(
        &mut self,
        layer: usize,
        queries: SlotQueries,
        lengths: Option<&[u32]>,
        top_k: usize,
        selection: Selection,
    ) -> Result<Tensor> {
        let exact = |paged: &Self| {
            paged.with_blocks(layer, lengths, |blocks| retrieval::select(queries, blocks, top_k, selection))
        };
        if self.indexed.is_empty() || self.len() < FROM_BLOCKS {
            return Ok(exact(self)?);
        }
        let indexed = &self.indexed[layer];
        let (index, landmarks) = (indexed.whole_index(), indexed.landmarks());
        let probes = index::probes(queries.queries.dims()[3]);
        let found = retrieval::select_in_lists(queries, self.len(), &*landmarks, top_k, &index.lists(), probes)?;
        drop((index, landmarks));
        if self.scoring == Scoring::IndexMeasured {
            let best = exact(self)?;
            self.measure(layer, queries, lengths, &found, &best)?;
        }
        Ok(found)
    }

    /// Has the index of all landmarks that there are written, if it is in use and its file is behind.
    pub fn keep_index(&mut self, write: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        if self.indexed.is_empty() || self.len() < FROM_BLOCKS || self.len() == self.index_kept {
            return Ok(());
        }
        self.indexed.par_iter().for_each(|indexed| drop(indexed.whole_index()));
        let layers: Vec<_> = self.indexed.iter().map(|indexed| indexed.index()).collect();
        write(&index::encode(&layers.iter().map(|index| &**index).collect::<Vec<_>>()))?;
        self.index_kept = self.len();
        Ok(())
    }

    /// Takes over an index from a file, if it is one of these landmarks.
    pub fn restore_index(&mut self, bytes: &[u8]) {
        let Some(first) = self.indexed.first() else { return };
        let landmarks: Vec<_> = self.indexed.iter().map(|indexed| indexed.landmarks()).collect();
        let key = |layer: usize, head, block, into: &mut [f32]| landmarks[layer].key(head, block, into);
        let read = index::decode(bytes, self.shape.layers, &first.index(), self.len(), key);
        if let Some(read) = read {
            self.index_kept = read[0].len();
            self.indexed.iter().zip(read).for_each(|(indexed, read)| *indexed.index() = read);
        }
    }

    /// Compares what the index found with the best.
    fn measure(
        &mut self,
        layer: usize,
        queries: SlotQueries,
        lengths: Option<&[u32]>,
        found: &Tensor,
        best: &Tensor,
    ) -> Result<()> {
        let mut lse = Vec::new();
        for chosen in [found, best] {
            self.promote(layer, chosen)?;
            let attend = |blocks: Blocks| retrieval::attend(queries, blocks, chosen);
            let retrieved = self.with_blocks(layer, lengths, attend)?;
            lse.push(retrieved.lse.flatten_all()?.to_vec1::<f32>()?);
        }
        let k = found.dims()[3];
        let rows = |chosen: &Tensor| chosen.flatten_all()?.to_vec1::<u32>();
        let (found, best) = (rows(found)?, rows(best)?);
        for (i, (found, best)) in found.chunks_exact(k).zip(best.chunks_exact(k)).enumerate() {
            self.recall.queries += 1;
            self.recall.mass += f64::from(lse[0][i] - lse[1][i]).exp().min(1.);
            self.recall.found += found.iter().filter(|block| best.contains(block)).count() as u64;
            self.recall.chosen += k as u64;
        }
        Ok(())
    }

    /// What decides the sizes of units.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// An encoded unit, if it is in memory because it is not written yet.
    pub fn unwritten(&self, UnitId { record, unit }: UnitId) -> Option<&[u8]> {
        let (size, units) = (self.shape.codec.unit(), self.shape.units());
        let at = record.checked_sub(self.written)?;
        self.pending.get((at * units + unit) * size..)?.get(..size)
    }

    /// Tells the system that so many units of a block that is written, from this one on, will be read.
    pub fn will_read(&self, UnitId { record, unit }: UnitId, n: usize) {
        if let Some((segments, _)) = &self.disk {
            segments.will_read(record, unit..unit + n);
        }
    }

    /// Reads `units` of a block that is written, side by side, encoded.
    pub fn read(&self, record: usize, units: std::ops::Range<usize>, bytes: &mut Vec<u8>) -> Result<()> {
        let Some((segments, crcs)) = &self.disk else {
            return Err(candle_core::Error::Msg(format!("block {record} is neither in memory nor on disk")).into());
        };
        let crcs = &crcs[record * self.shape.units()..][units.clone()];
        segments.read(record, units, crcs, bytes)
    }

    /// Sees to it that the chosen blocks of a layer are in RAM; `chosen` u32 `[batch, heads, time, k]` counts from the oldest.
    pub fn promote(&mut self, layer: usize, chosen: &Tensor) -> Result<()> {
        let (batch, heads, time, k) = chosen.dims4()?;
        let [_, kv_heads] = self.heads;
        let rows = chosen.flatten_all()?.to_vec1::<u32>()?;
        let mut units = Vec::new();
        let mut seen = std::mem::take(&mut self.seen);
        for b in 0..batch {
            for kv in 0..kv_heads {
                let group = heads / kv_heads;
                let rows = &rows[(b * heads + kv * group) * time * k..][..group * time * k];
                let unit = layer * self.shape.heads + b * kv_heads + kv;
                seen.clear(self.len);
                let new = rows.iter().map(|&i| i as usize).filter(|&i| seen.is_new(i));
                units.extend(new.map(|i| UnitId { record: self.number(i), unit }));
            }
        }
        self.seen = seen;
        units.sort_unstable();
        let Self { frames, shape, disk, written, pending, .. } = self;
        let load = |jobs: &mut [Job]| load(jobs, shape, disk.as_ref(), *written, pending);
        frames.hold(&units, load)
    }

    /// The blocks of a layer, as retrieval reads them, with `f`; `lengths` as it expects them.
    pub fn with_blocks<R>(&self, layer: usize, lengths: Option<&[u32]>, f: impl FnOnce(Blocks) -> R) -> R {
        let frames = LayerFrames { paged: self, layer };
        let (ring, len) = (&self.scored[layer], self.len());
        let [landmarks] = ring.tensors();
        let kept = Kept::Frames { block: self.shape.codec.block, kv_heads: self.heads[1], frames: &frames };
        let (first, landmarks) = (ring.first(), Some(landmarks).filter(|_| ring.len() == len));
        f(Blocks { kept, landmarks, first, len, lengths })
    }

    /// Blocks that are not written yet.
    pub fn pending(&self) -> &[BlockRecord] {
        &self.records
    }

    /// Bytes that they take on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.shape.disk_bytes(self.total())
    }

    /// Writes them, with the checksums of their tokens. They stay as they are until [`Self::written`].
    pub fn write(&mut self, tokens_crc: impl Fn(&BlockRecord) -> u32) -> Result<()> {
        for record in &mut self.records {
            record.tokens_crc = tokens_crc(record);
        }
        match &self.disk {
            Some((segments, _)) => segments.write(&self.records, &self.pending),
            None => Ok(()),
        }
    }

    /// Waits until blocks from this one on are on the disk.
    pub fn sync(&self, from: usize) -> Result<()> {
        self.disk.as_ref().map_or(Ok(()), |(segments, _)| segments.sync(from..self.total()))
    }

    /// What was written is on disk for good.
    pub fn written(&mut self) {
        if let Some((_, crcs)) = &mut self.disk {
            self.records.iter().for_each(|record| crcs.extend(&record.crcs));
            self.written += self.records.len();
            self.records.clear();
            self.pending.clear();
        }
    }

    /// What was written shall not be there.
    pub fn unwrite(&self) {
        if let Some((segments, _)) = &self.disk {
            segments.cut(self.written);
        }
    }
}

/// Frames of one layer.
struct LayerFrames<'a> {
    paged: &'a Paged,
    layer: usize,
}

impl retrieval::Frames for LayerFrames<'_> {
    fn frame(&self, head: usize, block: usize) -> Option<[&[f32]; 2]> {
        let Paged { frames, shape, .. } = self.paged;
        frames.get(self.layer * shape.heads + head, self.paged.number(block))
    }
}

/// Decodes units into their buffers, from memory or from disk; units side by side in a block are read at once.
fn load(
    jobs: &mut [Job],
    shape: &Shape,
    disk: Option<&(Segments, Vec<u32>)>,
    written: usize,
    pending: &[u8],
) -> Result<()> {
    let (units, size) = (shape.units(), shape.codec.unit());
    let runs = side_by_side(jobs);
    // A disk does many reads at once, and those who wait for them are few.
    if let Some((segments, _)) = disk {
        let on_disk = runs.iter().map(|run| (run[0].0, run.len())).filter(|(first, _)| first.record < written);
        on_disk.for_each(|(UnitId { record, unit }, n)| segments.will_read(record, unit..unit + n));
    }
    runs.into_par_iter().try_for_each_init(Vec::new, |buffer, run| {
        let UnitId { record, unit } = run[0].0;
        let bytes = match disk.filter(|_| record < written) {
            Some((segments, crcs)) => {
                let crcs = &crcs[record * units + unit..][..run.len()];
                segments.read(record, unit..unit + run.len(), crcs, buffer)?;
                &buffer[..]
            }
            None => &pending[(record - written) * shape.block_bytes() + unit * size..][..run.len() * size],
        };
        for ((_, data), bytes) in run.iter_mut().zip(bytes.chunks_exact(size)) {
            shape.codec.decode(bytes, data);
        }
        Ok(())
    })
}
