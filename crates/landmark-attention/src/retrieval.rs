//! Attention over blocks that were read before: which blocks a query reads, and what it gets from them (paper, section 3.2).
//!
//! Blocks are kept with keys rotated to their place *inside the block* only (offset `0..block`). A block is put into a slot, a run of `block`
//! positions, by rotating the query to `position - the slot's first position` instead: the same distances, and no stored key is ever
//! rotated again. So a call takes the queries once for each slot.

use candle_core::{DType, Device, Tensor};

pub use crate::cpu::rounded::{RoundedKeys, prefetch};
#[cfg(feature = "cuda")]
use crate::cuda;
pub use crate::pool::Pool;
use crate::{Error, Result, cpu};

/// How the blocks that a query reads are chosen from the landmarks' scores: the authors' `--cache_selection_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selection {
    /// Each token and head has blocks of its own.
    #[default]
    PerTokenAndHead,
    /// The heads of a token share theirs: a block ranks by its largest weight over the heads.
    MaxOverHeads,
    /// The tokens of a chunk share theirs, per head: a block ranks by its largest weight over the tokens.
    MaxOverTokens,
}

/// Finished blocks, in a ring: block `i`, oldest first, is at place `(first + i) % capacity`. Places are of one size; a shorter block is at
/// the end of its place, its landmark where all have theirs, and what is before it is never read.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// Keys, rotated to their offset in the block, the landmark the last; and values.
    pub kept: Kept<'a>,
    /// The landmarks' keys `[batch, kv_heads, capacity, head_dim]`, once more: scoring reads nothing else. Blocks in frames that are chosen by other
    /// means need none.
    pub landmarks: Option<&'a Tensor>,
    /// Place of the oldest block.
    pub first: usize,
    /// Number of blocks.
    pub len: usize,
    /// Ordinary tokens of each block, oldest first, at least 1 and less than `block`; `None`: all are full.
    pub lengths: Option<&'a [u32]>,
}

/// Where the keys and values of blocks are.
#[derive(Clone, Copy)]
pub enum Kept<'a> {
    /// In the ring, `[batch, kv_heads, capacity, block, head_dim]` each.
    Ring {
        /// Keys.
        keys: &'a Tensor,
        /// Values.
        values: &'a Tensor,
    },
    /// Each by itself, anywhere in the CPU's memory, in f32.
    Frames {
        /// Positions of a block's place.
        block: usize,
        /// Heads of keys and values of a row.
        kv_heads: usize,
        /// Where each block is.
        frames: &'a dyn Frames,
    },
    /// Those that are read in frames of a pool, on the device that computes.
    Pool {
        /// The pool.
        pool: &'a Pool,
        /// The frame of each chosen block, as `chosen` has them, `[batch, heads, time, k]`; what chooses needs none.
        frames: &'a [u32],
    },
}

/// Finds blocks that are each in memory of their own.
pub trait Frames: Sync {
    /// Keys and values `[block, head_dim]` of a block, by key-value head (counted over the rows of the batch) and block (oldest first); `None`
    /// where they are not in memory.
    fn frame(&self, head: usize, block: usize) -> Option<[&[f32]; 2]>;
}

impl std::fmt::Debug for Kept<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ring { keys, .. } => write!(f, "Ring({:?})", keys.shape()),
            Self::Frames { block, .. } => write!(f, "Frames({block})"),
            Self::Pool { pool, .. } => write!(f, "Pool({:?})", pool.tensors()[0].shape()),
        }
    }
}

/// The queries of a chunk and the slots that blocks may be put into.
#[derive(Debug, Clone, Copy)]
pub struct SlotQueries<'a> {
    /// Queries `[slots, batch, heads, time, head_dim]`, contiguous; entry `s` is rotated to its position less the first of slot `s`.
    pub queries: &'a Tensor,
    /// The newest blocks, so many, are scored at slots `1..`, oldest first, and all older ones at slot 0; a chosen block of rank
    /// `r` is read at slot `r`, or `r + 1` if it is one of the newest. 0: every block `i` is read at slot `i`.
    pub newest: usize,
    /// Factor on the scores.
    pub scale: f64,
}

/// What queries got from the blocks that they read.
#[derive(Debug, Clone)]
pub struct Retrieved {
    /// Outputs `[batch, heads, time, head_dim]`: the softmax over the chosen landmarks of each block's inner attention. In the queries' dtype.
    pub out: Tensor,
    /// Natural log-sum-exps `[batch, heads, time]` of the chosen landmarks' scores, in f32 (f64 for f64).
    pub lse: Tensor,
    /// Those scores, `[batch, heads, time, k]`, likewise.
    pub scores: Tensor,
}

/// The `k` best blocks for each query, ascending in text order: u32 `[batch, heads, time, k]`, counted from the oldest. Among equal
/// scores (to f32 precision) the older block is chosen. All blocks if there are no more than `k`.
///
/// f32 and f64 on the CPU; with the feature `cuda`, f32, bf16 and f16 on an NVIDIA GPU, scored in f32 whatever the dtype, for heads of at most
/// 256 channels. The GPU holds scores of 256 MiB at once, or of four queries where that is more, and the result is the same in every run.
///
/// # Errors
/// Shapes and dtypes that do not fit together; a device without a kernel; on a GPU, a `k` of more than 8192.
pub fn select(queries: SlotQueries, blocks: Blocks, k: usize, selection: Selection) -> Result<Tensor> {
    let shape = RetrievalShape::check("select", queries, blocks)?;
    if blocks.landmarks.is_none() {
        let expected = "landmarks to be scored";
        return Err(Error::Param { op: "select", name: "landmarks", got: "none".into(), expected });
    }
    if k == 0 {
        return Err(Error::Param { op: "select", name: "k", got: k.to_string(), expected: "at least 1" });
    }
    let k = k.min(blocks.len);
    if k == blocks.len {
        let all = Tensor::arange(0, k as u32, queries.queries.device())?;
        return Ok(all.broadcast_as((shape.batch, shape.heads, shape.time, k))?.contiguous()?);
    }
    match queries.queries.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => cuda::retrieval::select(&shape, queries, blocks, k, selection),
        _ => Ok(cpu::retrieval::select(&shape, queries, blocks, k, selection)?),
    }
}

/// The landmarks of one key-value head in lists of such as are near each other.
#[derive(Debug, Clone, Copy)]
pub struct Lists<'a> {
    /// What all keys, of centroids too, are less of, `[head_dim]`.
    pub origin: &'a [f32],
    /// What stands for each list.
    pub centroids: &'a RoundedKeys,
    /// The lists.
    pub lists: &'a [List],
}

/// Landmarks that are near each other.
#[derive(Debug, Clone, Default)]
pub struct List {
    /// Their blocks, counted from the oldest. A block may be in no list: then it is not found, but for the newest.
    pub blocks: Vec<u32>,
    /// Their keys, rounded, as many.
    pub keys: RoundedKeys,
}

/// Gives the keys of landmarks as they are.
pub trait Keys: Sync {
    /// Writes the key `[head_dim]` of a block, by key-value head (counted over the rows of the batch) and block (oldest first).
    fn key(&self, head: usize, block: usize, into: &mut [f32]);

    /// Is told that this key will be asked for soon: see [`prefetch`].
    fn will_need(&self, _head: usize, _block: usize) {}
}

/// As [`select`] of `len` blocks with [`Selection::PerTokenAndHead`], where each query looks at the `probes` lists alone whose centroids score best; `lists`
/// are those of each key-value head, over the rows of the batch. Their rounded keys propose twice as many blocks as are wanted, and of these
/// and the newest the best by their keys as they are is chosen. On the CPU in f32.
///
/// # Errors
/// Shapes that do not fit together; lists that are not those of the heads.
///
/// # Panics
/// A list of keys of other channels.
pub fn select_in_lists(
    queries: SlotQueries,
    len: usize,
    keys: &dyn Keys,
    k: usize,
    lists: &[Lists],
    probes: usize,
) -> Result<Tensor> {
    const OP: &str = "select_in_lists";
    let wrong = |name, got: String, expected| Err(Error::Param { op: OP, name, got, expected });
    let q = queries.queries;
    let &[slots, batch, heads, time, head_dim] = q.dims() else {
        let expected = "[slots, batch, heads, time, head_dim]".into();
        return Err(Error::Shape { op: OP, tensor: "queries", got: q.dims().to_vec(), expected });
    };
    if q.dtype() != DType::F32 || !q.device().is_cpu() {
        return Err(Error::DType { op: OP, tensor: "queries", got: q.dtype(), expected: "f32 on the CPU".into() });
    }
    if slots < queries.newest + 1 || queries.newest > len || !q.is_contiguous() {
        let expected = format!("queries for {} slots of {len} blocks, in contiguous memory", queries.newest + 1);
        return Err(Error::Shape { op: OP, tensor: "queries", got: q.dims().to_vec(), expected });
    }
    let fits = |of_head: &Lists| {
        // No more than this, for there are many: a block that is not there is not found.
        let Lists { origin, centroids, lists } = of_head;
        origin.len() == head_dim && centroids.head_dim() == head_dim && centroids.len() == lists.len()
    };
    if lists.is_empty()
        || !(batch * heads).is_multiple_of(lists.len())
        || !lists.len().is_multiple_of(batch)
        || !lists.iter().all(fits)
    {
        return wrong(
            "lists",
            format!("lists of {} heads", lists.len()),
            "a centroid and keys for each list of each head",
        );
    }
    if k == 0 || probes == 0 || k > len {
        return wrong("k or probes", format!("k {k}, probes {probes}"), "at least 1, and so many blocks");
    }
    if queries.scale <= 0. {
        return wrong("scale", queries.scale.to_string(), "more than 0: the best are those of the largest products");
    }
    Ok(cpu::lists::select(queries, [batch, heads, time, head_dim], len, keys, k, lists, probes)?)
}

/// Attention over the chosen blocks, u32 `[batch, heads, time, k]` ascending, as [`select`] returns them. No gradient.
///
/// # Errors
/// Those of [`select`]; on the CPU, an index of no cached block, or of one that is in no frame. A GPU does not wait to look at them: there a query with such an index gets NaN,
/// and nothing is read for it.
pub fn attend(queries: SlotQueries, blocks: Blocks, chosen: &Tensor) -> Result<Retrieved> {
    const OP: &str = "attend";
    let shape = RetrievalShape::check(OP, queries, blocks)?;
    let (batch, heads, time) = (shape.batch, shape.heads, shape.time);
    let k = match chosen.dims() {
        &[b, h, t, k] if (b, h, t) == (batch, heads, time) && k > 0 => k,
        other => {
            let expected = format!("[{batch}, {heads}, {time}, k]");
            return Err(Error::Shape { op: OP, tensor: "chosen", got: other.to_vec(), expected });
        }
    };
    if shape.slots < k + usize::from(queries.newest > 0) {
        let expected = format!("queries for {} slots", k + usize::from(queries.newest > 0));
        return Err(Error::Shape { op: OP, tensor: "queries", got: queries.queries.dims().to_vec(), expected });
    }
    if chosen.dtype() != DType::U32 {
        return Err(Error::DType { op: OP, tensor: "chosen", got: chosen.dtype(), expected: "u32".into() });
    }
    if !chosen.device().same_device(queries.queries.device()) {
        let expected = format!("{:?}, as the queries", queries.queries.device().location());
        return Err(Error::Device { op: OP, tensor: "chosen", got: chosen.device().location(), expected });
    }
    if let Kept::Pool { pool, frames } = blocks.kept
        && (frames.len() != chosen.elem_count() || frames.iter().any(|&frame| frame as usize >= pool.frames()))
    {
        let got = format!("{} up to {:?}", frames.len(), frames.iter().max());
        return Err(Error::Param {
            op: OP,
            name: "frames",
            got,
            expected: "a frame of the pool for each chosen block",
        });
    }
    #[cfg(feature = "cuda")]
    if chosen.device().is_cuda() {
        return Ok(cuda::retrieval::attend(&shape, queries, blocks, chosen, k)?);
    }
    let indices = chosen.flatten_all()?.to_vec1::<u32>()?;
    if let Some(block) = indices.iter().find(|&&i| i as usize >= blocks.len) {
        let got = block.to_string();
        return Err(Error::Param { op: OP, name: "chosen", got, expected: "indices of cached blocks" });
    }
    if let Kept::Frames { frames, block, .. } = blocks.kept {
        let elements = block * shape.head_dim;
        let fits = |frame: [&[f32]; 2]| frame.iter().all(|part| part.len() == elements);
        for (bh, chosen) in indices.chunks_exact(time * k).enumerate() {
            if let Some(block) = chosen.iter().find(|&&i| !frames.frame(shape.kv(bh), i as usize).is_some_and(fits)) {
                let got = format!("block {block}, which is in no frame of {elements} elements");
                return Err(Error::Param { op: OP, name: "chosen", got, expected: "blocks in memory" });
            }
        }
    }
    Ok(cpu::retrieval::attend(&shape, queries, blocks, &indices, k)?)
}

/// Joins two attentions of the same queries over disjoint keys, each with its log-sum-exp, into the attention over both:
/// outputs `[batch, heads, time, head_dim]` and log-sum-exps `[batch, heads, time]`. On a GPU, and on the CPU where no gradient can be asked for, in one pass, without a gradient.
///
/// # Errors
/// Shapes that differ.
pub fn join(a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if a.0.device().is_cuda() {
        return cuda::retrieval::join(a, b);
    }
    let tensors = [a.0, a.1, b.0, b.1];
    let is_plain = |x: &&Tensor| x.device().is_cpu() && x.is_contiguous() && x.dtype() == a.1.dtype() && !x.track_op();
    let fits =
        a.0.rank() == 4 && a.0.dims() == b.0.dims() && a.1.dims() == b.1.dims() && a.1.dims() == &a.0.dims()[..3];
    if fits && tensors.iter().all(is_plain) && matches!(a.1.dtype(), DType::F32 | DType::F64) {
        return Ok(cpu::join::join(a, b)?);
    }
    // A query with nothing on either side keeps its zeros: the floor turns -inf - -inf into 0.
    let max = a.1.maximum(b.1)?.maximum(-1e30)?;
    let (weight_a, weight_b) = ((a.1 - &max)?.exp()?, (b.1 - &max)?.exp()?);
    let sum = (&weight_a + &weight_b)?;
    let share = |weight: Tensor| weight.div(&sum.maximum(1e-30)?)?.unsqueeze(3);
    let out = (a.0.broadcast_mul(&share(weight_a)?)? + b.0.broadcast_mul(&share(weight_b)?)?)?;
    Ok((out, (max + sum.log()?)?))
}

/// The dimensions that the operands of a retrieval agree on.
#[derive(Debug)]
pub(crate) struct RetrievalShape {
    pub slots: usize,
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub time: usize,
    pub head_dim: usize,
    pub block: usize,
    pub capacity: usize,
}

impl RetrievalShape {
    fn check(op: &'static str, queries: SlotQueries, blocks: Blocks) -> Result<Self> {
        let shape = |tensor, x: &Tensor, expected| Error::Shape { op, tensor, got: x.dims().to_vec(), expected };
        let q = queries.queries;
        let &[slots, batch, heads, time, head_dim] = q.dims() else {
            return Err(shape("queries", q, "[slots, batch, heads, time, head_dim]".into()));
        };
        let (kv_heads, capacity) = match (blocks.landmarks.map(Tensor::dims), blocks.kept) {
            (Some(&[b, kv_heads, capacity, d]), _)
                if b == batch && d == head_dim && kv_heads > 0 && heads % kv_heads == 0 =>
            {
                (kv_heads, capacity)
            }
            (None, Kept::Frames { kv_heads, .. }) if kv_heads > 0 && heads % kv_heads == 0 => (kv_heads, blocks.len),
            (landmarks, _) => {
                let expected = format!("[{batch}, kv_heads that divide {heads}, capacity, {head_dim}]");
                let got = landmarks.unwrap_or_default().to_vec();
                return Err(Error::Shape { op, tensor: "landmarks", got, expected });
            }
        };
        let block = match blocks.kept {
            Kept::Ring { keys, values } => {
                let block = match keys.dims() {
                    &[b, h, c, block, d] if (b, h, c, d) == (batch, kv_heads, capacity, head_dim) => block,
                    _ => {
                        let expected = format!("[{batch}, {kv_heads}, {capacity}, block, {head_dim}]");
                        return Err(shape("keys", keys, expected));
                    }
                };
                if values.dims() != keys.dims() {
                    return Err(shape("values", values, format!("{:?}, as the keys", keys.dims())));
                }
                block
            }
            Kept::Frames { block, .. } => {
                if !q.device().is_cpu() {
                    let expected = "the CPU, where frames are".into();
                    return Err(Error::Device { op, tensor: "queries", got: q.device().location(), expected });
                }
                if q.dtype() != DType::F32 {
                    let expected = "f32, as frames".into();
                    return Err(Error::DType { op, tensor: "queries", got: q.dtype(), expected });
                }
                block
            }
            Kept::Pool { pool, .. } => match pool.tensors()[0].dims() {
                &[_, block, d] if d == head_dim => block,
                _ => return Err(shape("keys", pool.tensors()[0], format!("[frames, block, {head_dim}]"))),
            },
        };
        if block < 2 {
            return Err(Error::Param { op, name: "block", got: block.to_string(), expected: "at least 2" });
        }
        if blocks.len == 0 || blocks.len > capacity || blocks.first >= capacity || queries.newest > blocks.len {
            let got = format!("first {}, len {}, newest {}", blocks.first, blocks.len, queries.newest);
            return Err(Error::Param { op, name: "blocks", got, expected: "places inside the ring" });
        }
        if let Some(lengths) = blocks.lengths
            && (lengths.len() != blocks.len || lengths.iter().any(|n| !(1..block).contains(&(*n as usize))))
        {
            let got = format!("{} lengths up to {:?}", lengths.len(), lengths.iter().max());
            return Err(Error::Param { op, name: "lengths", got, expected: "1 to block - 1 for each block" });
        }
        if slots < queries.newest + 1 {
            return Err(shape("queries", q, format!("queries for {} slots", queries.newest + 1)));
        }
        let kept = match blocks.kept {
            Kept::Ring { keys, values } => vec![("keys", keys), ("values", values)],
            Kept::Pool { pool, .. } => ["keys", "values"].into_iter().zip(pool.tensors()).collect(),
            Kept::Frames { .. } => vec![],
        };
        let landmarks = blocks.landmarks.map(|x| ("landmarks", x));
        for (tensor, x) in [("queries", q)].into_iter().chain(landmarks).chain(kept) {
            let (fits, expected) = match x.device() {
                Device::Cpu => (matches!(x.dtype(), DType::F32 | DType::F64), "f32 or f64, the same for all"),
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => (
                    matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16),
                    "f32, bf16 or f16 on a GPU, the same for all",
                ),
                other => {
                    let expected = "a device that has kernels in this build".into();
                    return Err(Error::Device { op, tensor, got: other.location(), expected });
                }
            };
            if !fits || x.dtype() != q.dtype() {
                return Err(Error::DType { op, tensor, got: x.dtype(), expected: expected.into() });
            }
            if !x.device().same_device(q.device()) {
                let expected = format!("{:?}, as the queries", q.device().location());
                return Err(Error::Device { op, tensor, got: x.device().location(), expected });
            }
            if !x.is_contiguous() {
                return Err(shape(tensor, x, "contiguous memory".into()));
            }
        }
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            cuda::retrieval::check(op, q, capacity, block)?;
        }
        Ok(Self { slots, batch, heads, kv_heads, time, head_dim, block, capacity })
    }

    /// The key-value head, counted over rows, of query head `bh`.
    pub fn kv(&self, bh: usize) -> usize {
        bh / self.heads * self.kv_heads + bh % self.heads / (self.heads / self.kv_heads)
    }
}
