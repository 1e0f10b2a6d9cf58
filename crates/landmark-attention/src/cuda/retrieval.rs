//! Retrieval on NVIDIA GPUs: `retrieval.cu`. Nothing here waits for the GPU.

use std::ffi::c_void;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::params::{self, BlockSelection, ElementType, JoinParams, RetrievalParams};
use super::{Element, MAX_HEAD_DIM};
use crate::retrieval::{Blocks, Kept, RetrievalShape, Retrieved, Selection, SlotQueries};
use crate::{Error, Result};

/// The most blocks that a query may read: they are listed in shared memory.
const MAX_K: usize = 8192;

/// What the kernels do not take.
pub(crate) fn check(op: &'static str, queries: &Tensor, capacity: usize, block: usize) -> Result<()> {
    let shape = |tensor, x: &Tensor, expected| Error::Shape { op, tensor, got: x.dims().to_vec(), expected };
    if queries.dims()[4] > MAX_HEAD_DIM {
        return Err(shape("queries", queries, format!("a head_dim of at most {MAX_HEAD_DIM} on a GPU")));
    }
    if queries.dims()[1..4].iter().product::<usize>() > i32::MAX as usize / MAX_HEAD_DIM {
        return Err(shape("queries", queries, "at most 2^23 of them a slot on a GPU".into()));
    }
    if capacity.max(block) > i32::MAX as usize / 4 {
        let got = format!("{capacity} of {block}");
        return Err(Error::Param { op, name: "blocks", got, expected: "at most 2^29, of as many tokens, on a GPU" });
    }
    Ok(())
}

fn element_type(dtype: DType) -> candle_core::Result<ElementType> {
    match dtype {
        DType::F32 => Ok(ElementType::F32),
        DType::F16 => Ok(ElementType::F16),
        DType::BF16 => Ok(ElementType::BF16),
        other => bail!("retrieval: dtype {other:?} has no kernel on a GPU"),
    }
}

/// The address of a contiguous tensor's first element, for kernels on its device's one stream: candle frees memory in that stream's order,
/// so what a live tensor is told to hold stays there until kernels that were launched before are done.
pub(super) fn address(x: &Tensor) -> candle_core::Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("retrieval: expected tensors on a GPU") };
    match x.dtype() {
        DType::F32 => start::<f32>(storage, layout),
        DType::F16 => start::<f16>(storage, layout),
        DType::BF16 => start::<bf16>(storage, layout),
        DType::U32 => start::<u32>(storage, layout),
        other => bail!("retrieval: dtype {other:?} has no kernel on a GPU"),
    }
}

fn start<T: CudaDType>(storage: &CudaStorage, layout: &Layout) -> candle_core::Result<u64> {
    let stream = storage.device().cuda_stream();
    let (address, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
    Ok(address + (layout.start_offset() * size_of::<T>()) as u64)
}

/// A call's shapes and operands; what only one of the kernels has is left out.
fn retrieval_params(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    k: usize,
) -> candle_core::Result<RetrievalParams> {
    let &RetrievalShape { batch, heads, kv_heads, time, head_dim, block, capacity, .. } = shape;
    let [keys, values] = match blocks.kept {
        Kept::Ring { keys, values } => [keys, values],
        Kept::Pool { pool, .. } => pool.tensors(),
        Kept::Frames { .. } => bail!("retrieval: expected blocks on a GPU"),
    };
    Ok(RetrievalParams {
        queries: address(queries.queries)?,
        keys: address(keys)?,
        values: address(values)?,
        landmarks: blocks.landmarks.map_or(Ok(0), address)?,
        lengths: 0,
        chosen: 0,
        out: 0,
        lse: 0,
        scores: 0,
        frames: 0,
        batch: batch as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        time: time as i32,
        head_dim: head_dim as i32,
        block: block as i32,
        capacity: capacity as i32,
        first: blocks.first as i32,
        len: blocks.len as i32,
        newest: queries.newest as i32,
        k: k as i32,
        selection: BlockSelection::PerTokenAndHead,
        dtype: element_type(queries.queries.dtype())?,
        scale_log2: (queries.scale * std::f64::consts::LOG2_E) as f32,
    })
}

/// A tensor for a kernel to fill.
fn unfilled(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> candle_core::Result<Tensor> {
    // SAFETY: every caller hands it to a kernel that writes every element.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

/// Runs `launch` on the stream of `like`'s device.
pub(super) fn launch(
    op: &'static str,
    like: &Tensor,
    launch: impl FnOnce(*mut c_void) -> i32,
) -> candle_core::Result<()> {
    let stream = like.device().as_cuda_device()?.cuda_stream();
    stream.context().bind_to_thread().w()?;
    super::check(op, launch(stream.cu_stream().cast()))
}

/// See [`crate::retrieval::select`]; arguments were checked, and there are more blocks than `k`.
pub(crate) fn select(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    k: usize,
    selection: Selection,
) -> Result<Tensor> {
    if k > MAX_K {
        return Err(Error::Param { op: "select", name: "k", got: k.to_string(), expected: "at most 8192 on a GPU" });
    }
    let q = queries.queries;
    let chosen = unfilled((shape.batch, shape.heads, shape.time, k), DType::U32, q)?;
    let mut params = retrieval_params(shape, queries, blocks, k)?;
    params.chosen = address(&chosen)?;
    params.selection = match selection {
        Selection::PerTokenAndHead => BlockSelection::PerTokenAndHead,
        Selection::MaxOverHeads => BlockSelection::MaxOverHeads,
        Selection::MaxOverTokens => BlockSelection::MaxOverTokens,
    };
    // SAFETY: reads the parameters alone.
    let floats = unsafe { params::landmark_select_scratch(&params) };
    let scratch = unfilled(floats as usize, DType::F32, q)?;
    let scratch_address = address(&scratch)?;
    // SAFETY: the addresses are of live allocations, of the sizes that the checked shapes imply, on the stream's device.
    launch("select", q, |stream| unsafe { params::landmark_select(&params, scratch_address, stream) })?;
    Ok(chosen)
}

/// See [`crate::retrieval::attend`]; arguments were checked, but not what `chosen` holds.
pub(crate) fn attend(
    shape: &RetrievalShape,
    queries: SlotQueries,
    blocks: Blocks,
    chosen: &Tensor,
    k: usize,
) -> candle_core::Result<Retrieved> {
    let &RetrievalShape { batch, heads, time, head_dim, .. } = shape;
    let q = queries.queries;
    let chosen = chosen.contiguous()?;
    let frames = match blocks.kept {
        Kept::Pool { frames, .. } => Some(Tensor::new(frames, q.device())?),
        _ => None,
    };
    let lengths = blocks.lengths.map(|lengths| Tensor::new(lengths, q.device())).transpose()?;
    let out = unfilled((batch, heads, time, head_dim), q.dtype(), q)?;
    let lse = unfilled((batch, heads, time), DType::F32, q)?;
    let scores = unfilled((batch, heads, time, k), DType::F32, q)?;
    let mut params = retrieval_params(shape, queries, blocks, k)?;
    params.chosen = address(&chosen)?;
    params.frames = frames.as_ref().map_or(Ok(0), address)?;
    params.lengths = lengths.as_ref().map_or(Ok(0), address)?;
    (params.out, params.lse, params.scores) = (address(&out)?, address(&lse)?, address(&scores)?);
    // SAFETY: as in `select`; the kernel reads no block that is not in the ring.
    launch("attend", q, |stream| unsafe { params::landmark_attend(&params, stream) })?;
    Ok(Retrieved { out, lse, scores })
}

/// See [`crate::retrieval::join`].
pub(crate) fn join(a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) -> Result<(Tensor, Tensor)> {
    const OP: &str = "join";
    let shape = |tensor, x: &Tensor, expected: &[usize]| {
        let expected = format!("{expected:?}");
        Error::Shape { op: OP, tensor, got: x.dims().to_vec(), expected }
    };
    let (batch, heads, time, _) = a.0.dims4()?;
    if b.0.dims() != a.0.dims() {
        return Err(shape("b", b.0, a.0.dims()));
    }
    for (tensor, x) in [("the log-sum-exp of a", a.1), ("the log-sum-exp of b", b.1)] {
        if x.dims() != [batch, heads, time] {
            return Err(shape(tensor, x, &[batch, heads, time]));
        }
        if x.dtype() != DType::F32 {
            return Err(Error::DType { op: OP, tensor, got: x.dtype(), expected: "f32 on a GPU".into() });
        }
    }
    if b.0.dtype() != a.0.dtype() || element_type(a.0.dtype()).is_err() {
        let expected = "f32, bf16 or f16, the same for both".into();
        return Err(Error::DType { op: OP, tensor: "b", got: b.0.dtype(), expected });
    }
    for (tensor, x) in [("the log-sum-exp of a", a.1), ("b", b.0), ("the log-sum-exp of b", b.1)] {
        if !x.device().same_device(a.0.device()) {
            let expected = format!("{:?}, as a", a.0.device().location());
            return Err(Error::Device { op: OP, tensor, got: x.device().location(), expected });
        }
    }
    let lse = unfilled((batch, heads, time), DType::F32, a.0)?;
    let logs = [a.1.contiguous()?, b.1.contiguous()?];
    let out = a.0.contiguous()?.apply_op2(&b.0.contiguous()?, Join { logs, lse: lse.clone() })?;
    Ok((out, lse))
}

/// The candle operation, so that a gradient that is asked for is refused and not wrong.
struct Join {
    logs: [Tensor; 2],
    lse: Tensor,
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        "join"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("join: expected tensors on a GPU")
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let inputs = ((a, a_layout), (b, b_layout));
        match a.dtype() {
            DType::F32 => self.run::<f32>(inputs),
            DType::F16 => self.run::<f16>(inputs),
            _ => self.run::<bf16>(inputs),
        }
    }
}

impl Join {
    fn run<T: Element>(
        &self,
        (a, b): ((&CudaStorage, &Layout), (&CudaStorage, &Layout)),
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (shape, device) = (a.1.shape().clone(), a.0.device());
        let head_dim = shape.dims()[3];
        // SAFETY: the kernel writes every element.
        let mut out = unsafe { device.alloc::<T>(shape.elem_count())? };
        if shape.elem_count() > 0 {
            let stream = device.cuda_stream();
            let params = JoinParams {
                a: start::<T>(a.0, a.1)?,
                b: start::<T>(b.0, b.1)?,
                out: out.device_ptr_mut(&stream).0,
                a_lse: address(&self.logs[0])?,
                b_lse: address(&self.logs[1])?,
                lse: address(&self.lse)?,
                rows: (shape.elem_count() / head_dim) as i64,
                head_dim: head_dim as i32,
                dtype: T::TYPE,
            };
            launch("join", &self.lse, |stream| {
                // SAFETY: contiguous tensors of the shapes that `join` checked, on the stream's device.
                unsafe { params::landmark_join(&params, stream) }
            })?;
        }
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
    }
}
