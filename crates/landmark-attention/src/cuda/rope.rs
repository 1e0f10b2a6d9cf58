//! Rotary position embedding on NVIDIA GPUs: `rope.cu`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{CudaStorage, DType, Layout, bail};
use half::{bf16, f16};

use super::params::{self, RopeParams};
use super::{Element, check, strides};

const OP: &str = "rope";

/// Cosines and sines in f32, once on each GPU that asked for them.
#[derive(Debug, Default)]
pub(crate) struct Tables(Mutex<Vec<(DeviceId, Arc<CudaSlice<f32>>)>>);

impl Tables {
    /// The table `host` on `device`.
    pub fn on(&self, device: &CudaDevice, host: &[[f64; 2]]) -> candle_core::Result<Arc<CudaSlice<f32>>> {
        // A list that a panic left behind is still a list of whole tables.
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = tables.iter().find(|(id, _)| *id == device.id()) {
            return Ok(table.clone());
        }
        let numbers: Vec<f32> = host.as_flattened().iter().map(|&x| x as f32).collect();
        let table = Arc::new(device.clone_htod(&numbers)?);
        tables.push((device.id(), table.clone()));
        Ok(table)
    }
}

/// How a table is applied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turns {
    pub pairs: usize,
    /// The table has rows for each row of the batch.
    pub per_row: bool,
    /// Pair `i` is channels `i` and `i + pairs`, not `2i` and `2i + 1`.
    pub halves: bool,
    pub sign: f32,
}

/// `x` `[batch, heads, time, 2 * pairs]`, which fits the table, rotated; contiguous.
pub(crate) fn rotate(
    table: &CudaSlice<f32>,
    turns: Turns,
    x: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<CudaStorage> {
    match x.dtype() {
        DType::F32 => run::<f32>(table, turns, x, layout),
        DType::F16 => run::<f16>(table, turns, x, layout),
        DType::BF16 => run::<bf16>(table, turns, x, layout),
        other => bail!("{OP}: dtype {other:?} has no kernel on a GPU"),
    }
}

fn run<T: Element>(
    table: &CudaSlice<f32>,
    turns: Turns,
    x: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<CudaStorage> {
    let (batch, heads, time, _) = layout.shape().dims4()?;
    if layout.stride()[3] != 1 {
        bail!("{OP}: the last dimension of x must be contiguous")
    }
    if [time, batch.saturating_mul(heads)].iter().any(|&n| n > i32::MAX as usize) {
        bail!("{OP}: x of shape {:?} is too large for a GPU", layout.shape())
    }
    let (device, elements) = (x.device(), layout.shape().elem_count());
    // SAFETY: the kernel writes every element.
    let mut out = unsafe { device.alloc::<T>(elements)? };
    if elements > 0 {
        let stream = device.cuda_stream();
        let (from, from_guard) = x.as_cuda_slice::<T>()?.device_ptr(&stream);
        let (to, to_guard) = out.device_ptr_mut(&stream);
        let (table, table_guard) = table.device_ptr(&stream);
        let params = RopeParams {
            x: from + (layout.start_offset() * size_of::<T>()) as u64,
            out: to,
            table,
            strides: strides(layout),
            batch: batch as i32,
            heads: heads as i32,
            time: time as i32,
            pairs: turns.pairs as i32,
            per_row: turns.per_row.into(),
            halves: turns.halves.into(),
            dtype: T::TYPE,
            sign: turns.sign,
        };
        stream.context().bind_to_thread().w()?;
        // SAFETY: the addresses are of live allocations on the stream's device; `Rotation::apply` checked that the table has a row for each
        // token.
        check(OP, unsafe { params::landmark_rope(&params, stream.cu_stream().cast()) })?;
        drop((from_guard, to_guard, table_guard));
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}
