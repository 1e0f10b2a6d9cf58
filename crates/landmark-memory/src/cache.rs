//! The landmark cache: chunks in, attention over retrieved blocks.
//!
//! For each chunk of a text, of which `n` blocks are finished and `u` tokens of the next one read:
//!
//! 1. a landmark is put after every `mem_freq` tokens of the text, across the borders of chunks, or where the caller says;
//! 2. the chunk starts at position `min(n, k + 1) * L + u`, whatever its place in the text (the "stingy" positions: none beyond the
//!    training window is ever used), and the `k + 1` slots of `L` positions before it are for retrieved blocks;
//! 3. each layer attends to the unfinished block and the chunk (the operation, in the window) and to the `k` blocks whose
//!    landmarks score best ([`retrieval`]), and the two are joined by their log-sum-exps: exactly the grouped softmax over both;
//! 4. blocks that the chunk finished are stored, the rest of the chunk is the new unfinished block.
//!
//! # Blocks of different lengths
//!
//! A store has places of `L` positions. A shorter block is at the end of its place: the landmark is where every landmark is, its
//! tokens directly before it as in training, and what is before them has no weight. A slot is likewise known by where it *ends*.
//! The newest `k` blocks stand before the unfinished one at their true distances, so the slots end where these blocks do, and the slot of older
//! blocks ends right before them: with full blocks the slots of (2). While there are no more than `k` blocks, all are where they are in
//! the text, and the cache is exact. An older block that is read in a slot may be longer than the one that the slot is cut for;
//! then it overlaps the positions of the slot before. That does not matter: tokens of different blocks never share a softmax, and the
//! landmarks, which do, keep different positions in text order. Slots of `L` positions for all would not overlap, but would put the
//! newest blocks up to some times farther away than they are, farther than the model met them in training. No position is
//! beyond those of full blocks.

mod mark;

use candle_core::{DType, Device, Tensor};
use landmark_attention::retrieval::{self, Selection, SlotQueries};
use landmark_attention::{Attend, LandmarkParams, Rope, Rotation, landmark_attention_with_lse};

use crate::config::CacheConfig;
use crate::distances::Distances;
use crate::layout::{Layout, block_sizes};
use crate::paged::{Paged, Recall, Scoring, Tiers};
use crate::pooled::{PoolTier, Pooled};
use crate::reads::Reads;
use crate::store::BlockStore;
use crate::{BlockRead, Error, Result};
pub use mark::Mark;

/// A text that a model has read, and can go on reading.
#[derive(Debug)]
pub struct LandmarkCache {
    config: CacheConfig,
    rope: Rope,
    store: BlockStore,
    /// For each layer keys (before rotation) and values of the unfinished block, `[batch, kv_heads, u, head_dim]`.
    unfinished: Vec<Option<(Tensor, Tensor)>>,
    /// Finished blocks of the text, dropped ones included.
    finished: usize,
    /// Ordinary tokens of the cached blocks, oldest first, and the text's token that each begins with.
    lengths: Vec<u32>,
    starts: Vec<usize>,
    /// Cached blocks that are shorter than their place.
    short: usize,
    /// Tokens of the text in finished blocks.
    tokens: usize,
    reads: Option<Reads>,
    distances: Option<Distances>,
    retrievals: Retrievals,
}

/// How often tokens retrieved, in all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retrievals {
    /// Retrievals that were made.
    pub done: usize,
    /// Retrievals that the context-miss token saved.
    pub skipped: usize,
}

impl LandmarkCache {
    /// An empty cache for a model whose heads are rotated by `rope`.
    ///
    /// # Errors
    /// A setting outside its range, by name.
    pub fn new(config: CacheConfig, rope: Rope, dtype: DType, device: &Device) -> Result<Self> {
        config.check()?;
        let store = BlockStore::in_memory(&config, rope.head_dim(), dtype, device)?;
        Ok(Self::with_store(config, rope, store))
    }

    /// The same with its blocks in tiers: encoded in memory, and decoded while they are used. It computes on the CPU, in f32.
    ///
    /// # Errors
    /// A setting outside its range, by name.
    pub fn in_tiers(config: CacheConfig, rope: Rope, tiers: Tiers) -> Result<Self> {
        config.check()?;
        let store = Paged::new(&config, rope.head_dim(), tiers, None)?;
        Ok(Self::with_store(config, rope, BlockStore::Paged(Box::new(store))))
    }

    /// The same with a pool on the device that computes, in the pool's dtype. All landmarks are scored there, whatever `tiers` says.
    ///
    /// # Errors
    /// A setting outside its range, by name.
    pub fn in_tiers_with_pool(config: CacheConfig, rope: Rope, tiers: Tiers, pool: PoolTier) -> Result<Self> {
        config.check()?;
        let paged = Paged::new(&config, rope.head_dim(), Tiers { scoring: Scoring::Exact, ..tiers }, None)?;
        let store = Pooled::new(&config, paged.without_landmarks(), tiers.ram, pool, &[])?;
        Ok(Self::with_store(config, rope, BlockStore::Pooled(Box::new(store))))
    }

    pub(crate) fn with_store(config: CacheConfig, rope: Rope, store: BlockStore) -> Self {
        let unfinished = (0..config.layers).map(|_| None).collect();
        Self {
            config,
            rope,
            store,
            unfinished,
            finished: 0,
            lengths: Vec::new(),
            starts: Vec::new(),
            short: 0,
            tokens: 0,
            reads: None,
            distances: None,
            retrievals: Retrievals::default(),
        }
    }

    /// Ordinary tokens that a chunk may have at most: the window less `k + 1` blocks.
    pub fn max_chunk(&self) -> usize {
        self.config.window - (self.config.top_k + 1) * (self.config.mem_freq + 1)
    }

    /// Ordinary tokens of a full block.
    pub fn mem_freq(&self) -> usize {
        self.config.mem_freq
    }

    /// Blocks that a query reads.
    pub fn top_k(&self) -> usize {
        self.config.top_k
    }

    /// Finished blocks of the text so far, dropped ones included.
    pub fn finished_blocks(&self) -> usize {
        self.finished
    }

    /// Blocks that each layer holds.
    pub fn cached_blocks(&self) -> usize {
        self.store.len()
    }

    /// Bytes set aside for blocks, in all layers.
    pub fn bytes(&self) -> usize {
        self.store.bytes()
    }

    /// Those of them that are in a session's pool on the GPU.
    pub fn pool_bytes(&self) -> usize {
        self.store.pool_bytes()
    }

    /// Bytes that so many blocks take, or as many as are kept, in all layers.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        let kept = self.config.max_blocks.map_or(blocks, |max| max.min(blocks));
        self.store.bytes_of(kept)
    }

    /// Sets memory aside for so many blocks, or as many as are kept: a text of known length is then read without ever copying its
    /// blocks to a larger place.
    ///
    /// # Errors
    /// Not so much memory on the device.
    pub fn reserve(&mut self, blocks: usize) -> Result<()> {
        self.store.reserve(blocks)
    }

    /// Of a cache in tiers: how often a head's block was brought into RAM (with a pool: into the pool), and how often it was there already, since the
    /// text began.
    pub fn loads(&self) -> (u64, u64) {
        match &self.store {
            BlockStore::Rings(_) => (0, 0),
            BlockStore::Paged(paged) => paged.loads(),
            BlockStore::Pooled(pooled) => pooled.loads(),
        }
    }

    /// What an index found of what all landmarks would have given, with [`crate::Scoring::IndexMeasured`].
    pub fn recall(&self) -> Recall {
        match &self.store {
            BlockStore::Rings(_) | BlockStore::Pooled(_) => Recall::default(),
            BlockStore::Paged(paged) => paged.recall(),
        }
    }

    /// Share of the tokens' and layers' retrievals that the context-miss token saved.
    pub fn skipped_retrievals(&self) -> f64 {
        let Retrievals { done, skipped } = self.retrievals;
        if done + skipped == 0 { 0. } else { skipped as f64 / (done + skipped) as f64 }
    }

    /// How often tokens retrieved since the text began.
    pub fn retrievals(&self) -> Retrievals {
        self.retrievals
    }

    /// Starts to note which blocks are read, from nothing.
    pub fn trace_reads(&mut self) {
        self.reads = Some(Reads::default());
    }

    /// The blocks that row `row` read since [`Self::trace_reads`], the most read first.
    pub fn reads(&self, row: usize) -> Vec<BlockRead> {
        self.reads.as_ref().map_or(vec![], |reads| reads.ranked(row))
    }

    /// Starts to count how far away the blocks are that are read, from nothing. The counts outlast [`Self::clear`].
    pub fn trace_distances(&mut self) {
        self.distances = Some(Distances::default());
    }

    /// The number of retrievals of blocks at each distance since [`Self::trace_distances`], over all tokens, heads, layers and rows:
    /// entry `d` is of blocks that were finished `d` blocks before the token's own; entry 0 is always 0.
    pub fn distances(&self) -> &[u64] {
        self.distances.as_ref().map_or(&[], Distances::counts)
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.store.clear();
        self.unfinished.fill(None);
        (self.finished, self.short, self.tokens) = (0, 0, 0);
        self.lengths.clear();
        self.starts.clear();
        self.retrievals = Retrievals::default();
    }

    /// Reads the text's next tokens, u32 `[batch, time]`: `model` runs on them and the landmarks that fall between, u32
    /// `[batch, time']`, with this cache as its attention, and gives `[batch, time', ...]`; its rows at landmarks are dropped, so
    /// `[batch, time, ...]` comes back. If it fails, the cache is as it was.
    ///
    /// # Errors
    /// A chunk longer than [`Self::max_chunk`] or of another batch; a model with other layers; the model's own.
    pub fn forward(
        &mut self,
        tokens: &Tensor,
        model: impl FnOnce(&Tensor, &mut dyn Attend) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let read = self.unfinished();
        let time = tokens.dims().last().copied().unwrap_or(0);
        let follows: Vec<bool> = (1..=time).map(|i| (read + i).is_multiple_of(self.config.mem_freq)).collect();
        self.forward_with_landmarks(tokens, &follows, model)
    }

    /// As [`Self::forward`], with a landmark after token `i`, in all rows, where `follows[i]` says so.
    ///
    /// # Errors
    /// Those of [`Self::forward`]; not one `follows` for each token; a block of more than `mem_freq` ordinary tokens.
    pub fn forward_with_landmarks(
        &mut self,
        tokens: &Tensor,
        follows: &[bool],
        model: impl FnOnce(&Tensor, &mut dyn Attend) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let (ids, ordinary, mut chunk) = self.begin(tokens, follows)?;
        let out = model(&ids, &mut chunk)?;
        chunk.end()?;
        Ok(out.contiguous()?.index_select(&ordinary, 1)?)
    }

    /// The chunk with its landmarks, u32 `[batch, time']`, where its `time` ordinary tokens are in it, and its attention.
    pub(crate) fn begin(&mut self, tokens: &Tensor, follows: &[bool]) -> Result<(Tensor, Tensor, Chunk<'_>)> {
        let CacheConfig { batch, mem_freq, top_k, layers, .. } = self.config;
        let time = match tokens.dims() {
            &[b, time] if b == batch && (1..=self.max_chunk()).contains(&time) => time,
            other => {
                let expected = format!("[{batch}, 1 to {} tokens]", self.max_chunk());
                return Err(Error::Chunk { got: other.to_vec(), expected });
            }
        };
        let (block, unfinished) = (mem_freq + 1, self.unfinished());
        let sizes = block_sizes(follows, time, unfinished, mem_freq)?;
        let length = time + sizes.len();
        // The chunk's tokens with its landmarks.
        let before = follows.iter().scan(0, |landmarks, &follows| {
            let before = *landmarks;
            *landmarks += u32::from(follows);
            Some(before)
        });
        let ordinary =
            Tensor::from_iter((0..).zip(before).map(|(i, landmarks): (u32, u32)| i + landmarks), tokens.device())?;
        let landmarks = Tensor::full(self.config.landmark_id, (batch, length), tokens.device())?;
        let places = ordinary.unsqueeze(0)?.broadcast_as((batch, time))?.contiguous()?;
        let ids = landmarks.scatter(&places, &tokens.contiguous()?, 1)?;

        // How far the chunk begins after the first position of each slot, newest first.
        let mut distance = (block + unfinished) as i64;
        let mut distances = Vec::with_capacity(top_k + 1);
        for &length in self.lengths.iter().rev().take(top_k) {
            distances.push(distance);
            distance += i64::from(length) + 1;
        }
        // Where blocks were dropped, there may be less.
        let has_older = self.finished > top_k && self.cached_blocks() >= top_k;
        if has_older && top_k > 0 {
            distances.push(distance);
        }
        let start = distance - if has_older { 0 } else { block as i64 };
        let at = |from: i64, n: usize| self.rope.at(&(from..from + n as i64).collect::<Vec<_>>());
        let offsets: Vec<i64> = (0..sizes.len() * block).map(|i| (i % block) as i64).collect();
        let chunk = Chunk {
            q: at(start, length),
            k: at(start - unfinished as i64, unfinished + length),
            offsets: self.rope.at(&offsets),
            slots: distances.len(),
            slot_rotation: self.rope.at(&distances
                .iter()
                .rev()
                .flat_map(|&distance| distance..distance + length as i64)
                .collect::<Vec<_>>()),
            miss: self.rope.at(&[-1]),
            unfinished,
            newest: if has_older { top_k } else { 0 },
            are_short: self.short > 0,
            layout: Layout::new(&sizes, batch, unfinished + length, mem_freq, tokens.device())?,
            sizes,
            pending: Vec::with_capacity(layers),
            retrievals: Retrievals::default(),
            cache: self,
        };
        Ok((ids, ordinary, chunk))
    }

    /// What it was made for.
    pub(crate) fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Where finished blocks are, and the keys and values of the unfinished one.
    pub(crate) fn parts(&mut self) -> (&mut BlockStore, &[Option<(Tensor, Tensor)>]) {
        (&mut self.store, &self.unfinished)
    }

    /// Goes on with a text of which `finished` blocks, with `tokens` tokens, were read, and these are still there.
    pub(crate) fn restore(
        &mut self,
        blocks: &[(usize, u32)],
        finished: usize,
        tokens: usize,
        unfinished: Vec<Option<(Tensor, Tensor)>>,
    ) {
        self.note(blocks);
        (self.finished, self.tokens, self.unfinished) = (finished, tokens, unfinished);
    }

    /// These blocks, which begin and are as long as told, are finished and stored.
    pub(crate) fn note(&mut self, blocks: &[(usize, u32)]) {
        let is_short = |n: &u32| (*n as usize) < self.config.mem_freq;
        self.finished += blocks.len();
        self.starts.extend(blocks.iter().map(|&(start, _)| start));
        self.lengths.extend(blocks.iter().map(|&(_, length)| length));
        self.short += blocks.iter().filter(|(_, length)| is_short(length)).count();
        self.tokens = blocks.last().map_or(self.tokens, |&(start, length)| start + length as usize);
        let surplus = self.lengths.len() - self.store.len();
        self.starts.drain(..surplus);
        self.short -= self.lengths.drain(..surplus).filter(is_short).count();
    }

    /// Tokens of the unfinished block.
    pub(crate) fn unfinished(&self) -> usize {
        self.unfinished[0].as_ref().map_or(0, |(k, _)| k.dims()[2])
    }
}

/// Keys and values of a layer that will be stored when the model is done.
struct Pending {
    /// `[batch, kv_heads, n, block, head_dim]`, keys rotated to their offset in the block.
    finished: Option<(Tensor, Tensor)>,
    unfinished: Option<(Tensor, Tensor)>,
}

/// One chunk on its way through the model.
pub(crate) struct Chunk<'a> {
    cache: &'a mut LandmarkCache,
    /// Rotations of the chunk's queries, of the keys of the unfinished block and the chunk, of finished blocks, and of the
    /// queries for all slots, one after the other.
    q: Rotation,
    k: Rotation,
    offsets: Rotation,
    slot_rotation: Rotation,
    slots: usize,
    /// The context-miss token stands at position -1.
    miss: Rotation,
    newest: usize,
    /// Tokens of the unfinished block before the chunk.
    unfinished: usize,
    /// Whether some cached blocks are shorter than their place.
    are_short: bool,
    layout: Layout,
    /// Ordinary tokens of the blocks that it finishes.
    sizes: Vec<u32>,
    pending: Vec<Pending>,
    retrievals: Retrievals,
}

impl Chunk<'_> {
    /// Stores what the model, which is done, computed of it.
    pub(crate) fn end(self) -> Result<()> {
        let Self { cache, pending, retrievals, sizes, .. } = self;
        let layers = cache.config.layers;
        if pending.len() != layers {
            return Err(Error::Layer { got: pending.len(), expected: pending.len(), layers });
        }
        let finished: Vec<(Tensor, Tensor)> = pending.iter().filter_map(|layer| layer.finished.clone()).collect();
        let mut start = cache.tokens;
        let begins = sizes.iter().map(|&size| {
            start += size as usize;
            (start - size as usize, size)
        });
        let blocks: Vec<(usize, u32)> = begins.collect();
        if !finished.is_empty() {
            cache.store.append(&finished, &blocks)?;
        }
        cache.unfinished = pending.into_iter().map(|layer| layer.unfinished).collect();
        cache.note(&blocks);
        cache.retrievals.done += retrievals.done;
        cache.retrievals.skipped += retrievals.skipped;
        Ok(())
    }

    /// Attention of the chunk without the context-miss token's row; `miss` is that token's key, `[batch, kv_heads, 1, head_dim]`.
    fn attend_tokens(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        miss: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (k, v) = match &self.cache.unfinished[layer] {
            // candle joins strided tensors into strided ones, which it cannot take rows from.
            Some((old_k, old_v)) => {
                (Tensor::cat(&[old_k, &k.contiguous()?], 2)?, Tensor::cat(&[old_v, &v.contiguous()?], 2)?)
            }
            None => (k.contiguous()?, v.contiguous()?),
        };
        let rotated_q = self.q.apply(q)?;
        let params = LandmarkParams::new(self.layout.landmarks.clone());
        let local = landmark_attention_with_lse(&rotated_q, &self.k.apply(&k)?, &v, &params)?;
        let out = match miss {
            None => self.join_blocks(layer, q, local)?,
            Some(key) => {
                let key = self.miss.apply(key)?;
                let score = miss_score(&rotated_q, &key, 1. / (q.dims()[3] as f64).sqrt())?;
                self.join_blocks_on_miss(layer, q, local, &score)?
            }
        };
        self.pending.push(self.finish(&k, &v)?);
        Ok(out)
    }

    /// The queries of all slots, `[slots, batch, heads, time, head_dim]`.
    fn slot_queries(&self, q: &Tensor) -> Result<Tensor> {
        // Slots take the place of the batch, whose rows have positions of their own.
        let (batch, heads, time, head_dim) = q.dims4()?;
        let all_heads =
            if batch == 1 { q.clone() } else { q.contiguous()?.reshape((1, batch * heads, time, head_dim))? };
        let each = all_heads.broadcast_as((self.slots, batch * heads, time, head_dim))?;
        Ok(self.slot_rotation.apply(&each)?.reshape((self.slots, batch, heads, time, head_dim))?)
    }

    /// Reads the best blocks: what was read, and which. `tokens` are the queries' places in the chunk, `None` for all of it.
    fn retrieve(
        &mut self,
        layer: usize,
        q_slots: &Tensor,
        tokens: Option<&[u32]>,
    ) -> Result<(retrieval::Retrieved, Tensor)> {
        let CacheConfig { top_k, selection, .. } = self.cache.config;
        let scale = 1. / (q_slots.dims()[4] as f64).sqrt();
        let queries = SlotQueries { queries: q_slots, newest: self.newest, scale };
        let LandmarkCache { store, lengths, .. } = &mut *self.cache;
        let lengths = self.are_short.then_some(&lengths[..]);
        let (retrieved, chosen) = store.retrieve(layer, queries, lengths, top_k, selection)?;
        self.retrievals.done += q_slots.dims()[3];
        let store = &self.cache.store;
        if let Some(distances) = &mut self.cache.distances {
            let finished = self.cache.finished;
            let block_of = |i: usize| {
                let row = self.unfinished + tokens.map_or(i, |tokens| tokens[i] as usize);
                self.cache.finished + self.layout.landmark_rows.partition_point(|&landmark| (landmark as usize) < row)
            };
            distances.add(&chosen, |i, block| block_of(i) - store.number(block, finished))?;
        }
        Ok((retrieved, chosen))
    }

    fn trace(&mut self, layer: usize, retrieved: &retrieval::Retrieved, chosen: &Tensor, lse: &Tensor) -> Result<()> {
        let LandmarkCache { reads, lengths, starts, store, finished, config, .. } = &mut *self.cache;
        if let Some(reads) = reads {
            let block_at = |i: usize| (store.number(i, *finished), starts[i]..starts[i] + lengths[i] as usize);
            reads.add((layer, config.layers), retrieved, chosen, lse, block_at)?;
        }
        Ok(())
    }

    fn join_blocks(&mut self, layer: usize, q: &Tensor, (out, lse): (Tensor, Tensor)) -> Result<Tensor> {
        if self.slots == 0 {
            return Ok(out);
        }
        let (retrieved, chosen) = self.retrieve(layer, &self.slot_queries(q)?, None)?;
        let (out, lse) = retrieval::join((&out, &lse), (&retrieved.out, &retrieved.lse))?;
        self.trace(layer, &retrieved, &chosen, &lse)?;
        Ok(out)
    }

    /// The outer softmax has the context-miss token as one more candidate, whose weight the retrieved blocks share.
    fn join_blocks_on_miss(
        &mut self,
        layer: usize,
        q: &Tensor,
        (out, lse): (Tensor, Tensor),
        score: &Tensor,
    ) -> Result<Tensor> {
        let nothing = out.zeros_like()?;
        let (out, whole) = retrieval::join((&out, &lse), (&nothing, score))?;
        if self.slots == 0 {
            return Ok(out);
        }
        // In the scores' dtype; the outputs may have another.
        let mut weight = (score - &whole)?.exp()?;
        let time = q.dims()[2];
        if let Some(cutoff) = self.cache.config.context_miss.and_then(|miss| miss.cutoff) {
            weight = (&weight * weight.ge(cutoff)?.to_dtype(weight.dtype())?)?;
            // Tokens that no head of no row retrieves for are left out.
            let largest = weight.max(0)?.max(0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            if largest.iter().all(|&w| w == 0.) {
                self.retrievals.skipped += time;
                return Ok(out);
            }
            let active: Vec<u32> = (0..time as u32).filter(|&t| largest[t as usize] > 0.).collect();
            if active.len() < time && self.cache.config.selection != Selection::MaxOverTokens {
                self.retrievals.skipped += time - active.len();
                let places = Tensor::new(active.as_slice(), q.device())?;
                let q_slots = self.slot_queries(q)?.index_select(&places, 3)?;
                let (retrieved, _) = self.retrieve(layer, &q_slots, Some(&active))?;
                let weight = weight.index_select(&places, 2)?.unsqueeze(3)?.to_dtype(out.dtype())?;
                return Ok(out.index_add(&places, &retrieved.out.broadcast_mul(&weight)?, 2)?);
            }
        }
        let (retrieved, chosen) = self.retrieve(layer, &self.slot_queries(q)?, None)?;
        // A block's share is its softmax weight among the chosen ones times the token's.
        let lse = (&retrieved.lse - weight.log()?)?;
        self.trace(layer, &retrieved, &chosen, &lse)?;
        let weight = weight.unsqueeze(3)?.to_dtype(out.dtype())?;
        Ok((out + retrieved.out.broadcast_mul(&weight)?)?)
    }

    /// Splits keys (before rotation) and values `[batch, kv_heads, time, head_dim]` into finished blocks and the rest.
    fn finish(&self, k: &Tensor, v: &Tensor) -> Result<Pending> {
        let (batch, kv_heads, time, head_dim) = k.dims4()?;
        let &Layout { ref landmark_rows, rows, ref stored, .. } = &self.layout;
        let blocks = landmark_rows.len();
        let shape = (batch, kv_heads, blocks, self.cache.config.mem_freq + 1, head_dim);
        let finished = |x: &Tensor| match stored {
            None => x.narrow(2, 0, rows),
            Some(stored) => x.index_select(stored, 2),
        };
        let finished = if blocks == 0 {
            None
        } else {
            let keys = self.offsets.apply(&finished(k)?)?.reshape(shape)?;
            Some((keys, finished(v)?.contiguous()?.reshape(shape)?))
        };
        let rest = |x: &Tensor| x.narrow(2, rows, time - rows)?.contiguous();
        let unfinished = if time == rows { None } else { Some((rest(k)?, rest(v)?)) };
        Ok(Pending { finished, unfinished })
    }
}

/// Scores of the context-miss key `[batch, kv_heads, 1, head_dim]`, `[batch, heads, time]` in f32 (f64 for f64).
fn miss_score(q: &Tensor, key: &Tensor, scale: f64) -> Result<Tensor> {
    let (batch, heads, _, head_dim) = q.dims4()?;
    let kv_heads = key.dims()[1];
    let dtype = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (q, key) = (q.to_dtype(dtype)?, key.to_dtype(dtype)?);
    let key = key.unsqueeze(2)?.broadcast_as((batch, kv_heads, heads / kv_heads, 1, head_dim))?;
    Ok((q.broadcast_mul(&key.reshape((batch, heads, 1, head_dim))?)?.sum(3)? * scale)?)
}

impl Attend for Chunk<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        if layer != self.pending.len() || layer >= self.cache.config.layers {
            let layers = self.cache.config.layers;
            return Err(Error::Layer { got: layer, expected: self.pending.len(), layers }.into());
        }
        if self.cache.config.context_miss.is_none() {
            return Ok(self.attend_tokens(layer, q, k, v, None)?);
        }
        // Row 0 is the context-miss token: others see its key, it sees nothing.
        let tokens = |x: &Tensor| x.narrow(2, 1, x.dims()[2] - 1);
        let miss = k.narrow(2, 0, 1)?;
        let out = self.attend_tokens(layer, &tokens(q)?, &tokens(k)?, &tokens(v)?, Some(&miss))?;
        out.pad_with_zeros(2, 1, 0)
    }
}
