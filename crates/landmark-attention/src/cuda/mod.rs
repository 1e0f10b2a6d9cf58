//! The fused operation on NVIDIA GPUs, for f32, f16 and bf16.
//!
//! - `units`: how keys are cut into units of 64 slots;
//! - `params`: what crosses to the kernels; `params.h` is its other side;
//! - `forward.cuh`, `backward.cuh`: kernels for everything, on any GPU from compute capability 8.0; `segments.cuh` is their softmax,
//!   `dropout.cuh` their dropout;
//! - `hopper_forward.cuh`, `hopper_backward.cuh`: kernels for blocks of up to 64 on Hopper;
//! - `retrieval.cu` with `retrieval_*.cuh`, `retrieval`: scores of cached landmarks, choice of blocks, attention to them;
//! - `pool`: blocks that come from the CPU's memory when they are read;
//! - `rope.cu`, `rope`: rotary position embedding;
//! - `outside`: keys outside the window;
//! - this file: the candle operation. `docs/cuda-kernels.md` tells how the kernels work and what they reach.

pub(crate) mod outside;
mod params;
pub(crate) mod pool;
pub(crate) mod retrieval;
pub(crate) mod rope;
mod units;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use std::ffi::CStr;

use crate::call::Call;
use crate::outside::{Joined, join};
use crate::{Dropout, Error, Result, Softmax};
use params::{ElementType, LONG_BLOCKS_AT_ONCE, Params, ROWS, Splits, Strides};
use units::{BlockList, Units, regular_block};

const OP: &str = "landmark_attention";
/// Fewer queries, and Hopper's kernels leave the call to the general ones.
const HOPPER_QUERIES: usize = 16;
/// The widest head that the kernels take.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Runs the fused kernels: outputs `[batch, heads, q_len, head_dim]`, differentiable, and natural log-sum-exps `[batch, heads, q_len]`
/// of the outer softmax in f32; both with the keys [outside](crate::outside), if there are some.
pub(crate) fn attend(
    call: Call,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    outside: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    check_call(&call, q, k)?;
    let (q, k, v) = (rows_contiguous(q)?, rows_contiguous(k)?, rows_contiguous(v)?);
    let device = q.device().as_cuda_device()?;
    let table = Table::new(&call, device)?;
    // SAFETY: the kernel writes every element before anything reads it.
    let lse = unsafe { Tensor::empty((call.batch, call.heads, call.q_len), DType::F32, q.device())? };
    let joined = Joined::default();
    let out = q.apply_op3(&k, &v, Fused { call, lse: lse.clone(), table, joined: joined.clone() })?;
    match outside {
        Some(outside) => Ok(join(&out, &lse, outside, joined)?.into()),
        None => Ok((out, lse)),
    }
}

/// The gradients of q, k and v.
pub(crate) fn gradients(call: Call, [q, k, v, out, dout]: [&Tensor; 5], lse: &Tensor) -> Result<[Tensor; 3]> {
    check_call(&call, q, k)?;
    let (q, k, v, dout) = (rows_contiguous(q)?, rows_contiguous(k)?, rows_contiguous(v)?, rows_contiguous(dout)?);
    let table = Table::new(&call, q.device().as_cuda_device()?)?;
    // Its place in its storage is not looked at.
    let lse = if lse.layout().start_offset() == 0 { lse.contiguous()? } else { lse.force_contiguous()? };
    let fused = Fused { call, lse, table, joined: Joined::default() };
    Ok(fused.gradients([&q, &k, &v, &out.contiguous()?, &dout])?)
}

/// What only the CPU's kernels take.
fn check_call(call: &Call, q: &Tensor, k: &Tensor) -> Result<()> {
    if q.dtype() == DType::F64 {
        let expected = "f32, bf16 or f16 on a GPU".to_string();
        return Err(Error::DType { op: OP, tensor: "q", got: q.dtype(), expected });
    }
    if call.head_dim > MAX_HEAD_DIM {
        let expected = format!("a head_dim of at most {MAX_HEAD_DIM} on a GPU");
        return Err(Error::Shape { op: OP, tensor: "q", got: q.dims().to_vec(), expected });
    }
    let too_long = |x: &Tensor| x.dims()[2] > i32::MAX as usize / 2;
    if too_long(k) {
        let expected = "at most 2^30 keys on a GPU".to_string();
        return Err(Error::Shape { op: OP, tensor: "k", got: k.dims().to_vec(), expected });
    }
    Ok(())
}

fn rows_contiguous(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.layout().stride()[3] == 1 { Ok(x.clone()) } else { x.contiguous() }
}

/// The units of a call, on the device.
struct Table {
    units: CudaSlice<u8>,
    first: CudaSlice<i32>,
    most: usize,
    long_blocks: usize,
    block: usize,
    list: Option<List>,
    runs: Option<Runs>,
}

/// The units in runs, for a block of threads each.
struct Runs {
    borders: CudaSlice<i32>,
    count: usize,
}

impl Runs {
    /// Queries that are one tile in all kernels.
    const FEW_QUERIES: usize = 64;
    /// Units that a run should have, so that joining runs costs little.
    const UNITS: usize = 4;

    /// `None` where there are enough heads and queries to fill the GPU, or nothing to share out.
    fn new(call: &Call, units: &Units, device: &CudaDevice) -> candle_core::Result<Option<Self>> {
        if call.q_len > Self::FEW_QUERIES {
            return Ok(None);
        }
        let multiprocessors = device
            .cuda_stream()
            .context()
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .w()?;
        // More queries may have Hopper's kernels, which are a few times as fast.
        let (alone, filled) = (call.batch * call.heads, multiprocessors as usize);
        if alone * if call.q_len < HOPPER_QUERIES { 2 } else { 8 } > filled {
            return Ok(None);
        }
        let count = (units.most / Self::UNITS).min((2 * filled).div_ceil(alone));
        if count < 2 {
            return Ok(None);
        }
        Ok(Some(Self { borders: device.clone_htod(&units.runs(count))?, count }))
    }
}

/// [`BlockList`] on the device.
struct List {
    blocks: CudaSlice<u8>,
    views: CudaSlice<u8>,
    stride: usize,
}

impl Table {
    fn new(call: &Call, device: &CudaDevice) -> candle_core::Result<Self> {
        let units = Units::new(call);
        let runs = Runs::new(call, &units, device)?;
        let Units { units, first, most, long_blocks } = units;
        let list = BlockList::new(call)
            .map(|BlockList { blocks, stride, views }| {
                let (blocks, views) = (bytemuck::cast_slice::<_, u8>(&blocks), bytemuck::cast_slice::<_, u8>(&views));
                Ok::<_, candle_core::Error>(List {
                    blocks: device.clone_htod(blocks)?,
                    views: device.clone_htod(views)?,
                    stride,
                })
            })
            .transpose()?;
        Ok(Self {
            units: device.clone_htod(bytemuck::cast_slice::<_, u8>(&units))?,
            first: device.clone_htod(&first)?,
            most,
            long_blocks,
            block: regular_block(call).unwrap_or(0),
            list,
            runs,
        })
    }
}

impl Table {
    /// Units, the rows' first units, blocks, views.
    fn addresses<'a>(&'a self, stream: &'a CudaStream) -> [Option<(u64, SyncOnDrop<'a>)>; 4] {
        let list = self.list.as_ref();
        [
            Some(self.units.device_ptr(stream)),
            Some(self.first.device_ptr(stream)),
            list.map(|list| list.blocks.device_ptr(stream)),
            list.map(|list| list.views.device_ptr(stream)),
        ]
    }
}

/// The candle operation. One value serves one forward pass: it keeps the log-sum-exps for the backward pass.
struct Fused {
    call: Call,
    lse: Tensor,
    table: Table,
    joined: Joined,
}

/// An element type that has kernels.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits {
    const TYPE: ElementType;
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}

impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
}

impl Element for bf16 {
    const TYPE: ElementType = ElementType::BF16;
}

fn strides(layout: &Layout) -> Strides {
    let strides = layout.stride();
    Strides { batch: strides[0] as i64, head: strides[1] as i64, step: strides[2] as i64 }
}

fn dropout(dropout: Option<Dropout>) -> params::Dropout {
    let Dropout { weights, groups, seed } = dropout.unwrap_or(Dropout { weights: 0., groups: 0., seed: 0 });
    let [(weights, weights_kept), (groups, groups_kept)] = [weights, groups].map(Dropout::threshold);
    let (seed_low, seed_high) = (seed as u32, (seed >> 32) as u32);
    let (weights_kept, groups_kept) = (weights_kept as f32, groups_kept as f32);
    params::Dropout { seed_low, seed_high, weights, groups, weights_kept, groups_kept }
}

fn check(op: &str, code: i32) -> candle_core::Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a static string for any code.
    let reason = unsafe { CStr::from_ptr(params::landmark_attention_error(code)) };
    bail!("{op}: CUDA error {code}: {}", reason.to_string_lossy())
}

impl Fused {
    fn params<T: Element>(&self, [q, k, v]: [&Layout; 3]) -> Params {
        let Call { batch, heads, kv_heads, q_len, kv_len, head_dim, scale, .. } = self.call;
        Params {
            q: 0,
            k: 0,
            v: 0,
            dout: 0,
            out: 0,
            lse: 0,
            dq: 0,
            dk: 0,
            dv: 0,
            rows: 0,
            stats: 0,
            units: 0,
            first_unit: 0,
            blocks: 0,
            views: 0,
            q_strides: strides(q),
            k_strides: strides(k),
            v_strides: strides(v),
            dout_strides: Strides::default(),
            batch: batch as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            q_len: q_len as i32,
            kv_len: kv_len as i32,
            head_dim: head_dim as i32,
            q_pad: q_len.next_multiple_of(ROWS) as i32,
            max_units: self.table.most as i32,
            max_long_blocks: self.table.long_blocks as i32,
            block: self.table.block as i32,
            block_stride: self.table.list.as_ref().map_or(0, |list| list.stride as i32),
            dtype: T::TYPE,
            scale: scale as f32,
            reserved: 0,
            dropout: dropout(self.call.dropout),
        }
    }

    fn forward<T: Element>(&self, tensors: [(&CudaStorage, &Layout); 3]) -> candle_core::Result<CudaStorage> {
        let device = tensors[0].0.device();
        let stream = device.cuda_stream();
        let (lse, _) = self.lse.storage_and_layout();
        let Storage::Cuda(lse) = &*lse else { bail!("{OP}: expected tensors on a GPU") };
        // SAFETY: the kernel writes every element.
        let mut out = unsafe { device.alloc::<T>(tensors[0].1.shape().elem_count())? };
        let mut params = self.params::<T>(tensors.map(|(_, layout)| layout));
        let slices = [tensors[0].0.as_cuda_slice::<T>()?, tensors[1].0.as_cuda_slice()?, tensors[2].0.as_cuda_slice()?];
        let inputs = [0, 1, 2].map(|i| {
            let (start, guard) = slices[i].device_ptr(&stream);
            (start + (tensors[i].1.start_offset() * size_of::<T>()) as u64, guard)
        });
        let outputs = (out.device_ptr_mut(&stream), lse.as_cuda_slice::<f32>()?.device_ptr(&stream));
        let table = self.table.addresses(&stream);
        (params.q, params.k, params.v) = (inputs[0].0, inputs[1].0, inputs[2].0);
        (params.out, params.lse) = (outputs.0.0, outputs.1.0);
        let [units, first_unit, blocks, views] =
            table.each_ref().map(|slice| slice.as_ref().map_or(0, |slice| slice.0));
        (params.units, params.first_unit, params.blocks, params.views) = (units, first_unit, blocks, views);
        stream.context().bind_to_thread().w()?;
        match &self.table.runs {
            // SAFETY: the addresses are of live allocations, of the sizes that the checked call implies, on the stream's device.
            None => check(OP, unsafe { params::landmark_attention_forward(&params, stream.cu_stream().cast()) })?,
            Some(Runs { borders, count }) => {
                let rows = self.call.batch * self.call.heads * self.call.q_len * count;
                // SAFETY: the kernel writes every element before it is read.
                let (mut out, mut lse) =
                    unsafe { (device.alloc::<f32>(rows * self.call.head_dim)?, device.alloc::<f32>(rows)?) };
                let parts = [out.device_ptr_mut(&stream), lse.device_ptr_mut(&stream)];
                let borders = borders.device_ptr(&stream);
                let splits =
                    Splits { first: borders.0, out: parts[0].0, lse: parts[1].0, count: *count as i32, reserved: 0 };
                let stream = stream.cu_stream().cast();
                // SAFETY: as above.
                check(OP, unsafe { params::landmark_attention_forward_split(&params, &splits, stream) })?;
                drop((parts, borders));
            }
        }
        drop((inputs, outputs, table));
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    fn gradients(&self, tensors: [&Tensor; 5]) -> candle_core::Result<[Tensor; 3]> {
        match tensors[0].dtype() {
            DType::F32 => self.backward::<f32>(tensors),
            DType::F16 => self.backward::<f16>(tensors),
            _ => self.backward::<bf16>(tensors),
        }
    }

    /// Gradients of q, k and v, contiguous.
    fn backward<T: Element>(&self, tensors: [&Tensor; 5]) -> candle_core::Result<[Tensor; 3]> {
        let joined = self.joined.take();
        let (out, lse) = joined.as_ref().map_or((tensors[3], &self.lse), |[out, lse]| (out, lse));
        let guards = [tensors[0], tensors[1], tensors[2], out, tensors[4], lse].map(Tensor::storage_and_layout);
        let mut storages = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            match &**storage {
                Storage::Cuda(storage) => storages.push((storage, *layout)),
                _ => bail!("{OP}: expected tensors on a GPU"),
            }
        }
        let device = storages[0].0.device();
        let stream = device.cuda_stream();
        let Call { batch, heads, q_len, softmax, .. } = self.call;
        let mut params = self.params::<T>([0, 1, 2].map(|i| storages[i].1));
        params.dout_strides = strides(storages[4].1);
        let row = batch * heads * params.q_pad as usize * 2;
        // SAFETY: the kernels write every element before it is read; without the landmarks' keys those have no gradient, and
        // nobody writes it.
        let (mut dq, [mut dk, mut dv], mut rows, mut stats) = unsafe {
            let keys =
                |n| if softmax == Softmax::IgnoreMem { device.alloc_zeros::<T>(n) } else { device.alloc::<T>(n) };
            (
                device.alloc::<T>(batch * heads * q_len * self.call.head_dim)?,
                [keys(tensors[1].elem_count())?, keys(tensors[2].elem_count())?],
                device.alloc::<f32>(row)?,
                device.alloc::<f32>(if self.table.long_blocks > 0 { row * LONG_BLOCKS_AT_ONCE } else { 1 })?,
            )
        };
        let inputs = {
            let mut inputs = Vec::with_capacity(5);
            for (storage, layout) in &storages[..5] {
                let (start, guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
                inputs.push((start + (layout.start_offset() * size_of::<T>()) as u64, guard));
            }
            inputs
        };
        let lse = storages[5].0.as_cuda_slice::<f32>()?.device_ptr(&stream);
        let gradients = [dq.device_ptr_mut(&stream), dk.device_ptr_mut(&stream), dv.device_ptr_mut(&stream)];
        let scratch = [rows.device_ptr_mut(&stream), stats.device_ptr_mut(&stream)];
        let table = self.table.addresses(&stream);
        (params.q, params.k, params.v) = (inputs[0].0, inputs[1].0, inputs[2].0);
        (params.out, params.dout, params.lse) = (inputs[3].0, inputs[4].0, lse.0);
        (params.dq, params.dk, params.dv) = (gradients[0].0, gradients[1].0, gradients[2].0);
        (params.rows, params.stats) = (scratch[0].0, scratch[1].0);
        let [units, first_unit, blocks, views] =
            table.each_ref().map(|slice| slice.as_ref().map_or(0, |slice| slice.0));
        (params.units, params.first_unit, params.blocks, params.views) = (units, first_unit, blocks, views);
        stream.context().bind_to_thread().w()?;
        // SAFETY: as in `forward`.
        check(OP, unsafe { params::landmark_attention_backward(&params, stream.cu_stream().cast()) })?;
        drop((inputs, lse, gradients, scratch, table));
        let tensor = |slice, like: &Tensor| {
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
            Tensor::from_storage(storage, like.shape(), BackpropOp::none(), false)
        };
        Ok([tensor(dq, tensors[0]), tensor(dk, tensors[1]), tensor(dv, tensors[2])])
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        bail!("{OP}: expected tensors on a GPU")
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let tensors = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let out = match q.dtype() {
            DType::F32 => self.forward::<f32>(tensors)?,
            DType::F16 => self.forward::<f16>(tensors)?,
            DType::BF16 => self.forward::<bf16>(tensors)?,
            other => bail!("{OP}: dtype {other:?} has no kernel on a GPU"),
        };
        Ok((out, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = self.gradients([q, k, v, out, &rows_contiguous(dout)?])?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
