//! The kernels of `outside.cu`.

use std::ffi::{c_int, c_void};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Storage, Tensor, bail};
use half::{bf16, f16};

use super::{Element, check};
use crate::outside::{Join, OP};

unsafe extern "C" {
    fn landmark_outside_join(
        dtype: c_int,
        out: u64,
        lse: u64,
        outside: u64,
        joined: u64,
        total: u64,
        rows: i64,
        channels: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn landmark_outside_join_backward(
        dtype: c_int,
        joined: u64,
        dout: u64,
        outside: u64,
        total: u64,
        doutside: u64,
        rows: i64,
        channels: c_int,
        stream: *mut c_void,
    ) -> c_int;
    fn landmark_outside_log_sum_exp(
        dtype: c_int,
        scores: u64,
        lse: u64,
        rows: i64,
        keys: c_int,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
    fn landmark_outside_log_sum_exp_backward(
        dtype: c_int,
        scores: u64,
        lse: u64,
        dlse: u64,
        dscores: u64,
        rows: i64,
        keys: c_int,
        scale: f32,
        stream: *mut c_void,
    ) -> c_int;
}

/// Calls a function for the element type of a dtype.
macro_rules! by_element {
    ($dtype:expr, $function:ident($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $function::<f32>($($arg),*),
            DType::F16 => $function::<f16>($($arg),*),
            DType::BF16 => $function::<bf16>($($arg),*),
            other => bail!("outside: dtype {other:?} has no kernel on a GPU"),
        }
    };
}

/// Calls `f` with the address of a contiguous tensor of `T`, from its first element.
fn with_address<T: Element, R>(x: &Tensor, f: impl FnOnce(u64) -> candle_core::Result<R>) -> candle_core::Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("outside: expected tensors on a GPU") };
    let stream = storage.device().cuda_stream();
    let (start, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
    f(start + (layout.start_offset() * size_of::<T>()) as u64)
}

/// Allocates `n` elements and has `f` fill them.
fn fill<T: Element>(
    device: &candle_core::CudaDevice,
    n: usize,
    f: impl FnOnce(u64, *mut c_void) -> candle_core::Result<()>,
) -> candle_core::Result<CudaStorage> {
    let stream = device.cuda_stream();
    // SAFETY: the kernel writes every element.
    let mut slice = unsafe { device.alloc::<T>(n)? };
    stream.context().bind_to_thread().w()?;
    {
        let (address, _guard) = slice.device_ptr_mut(&stream);
        f(address, stream.cu_stream().cast())?;
    }
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// The address of a contiguous storage's first element.
fn address<T: Element>(storage: &CudaStorage, layout: &Layout) -> candle_core::Result<u64> {
    if !layout.is_contiguous() {
        bail!("outside: expected contiguous tensors")
    }
    let stream = storage.device().cuda_stream();
    // What is queued on the stream keeps its order: the guard only records the use, of which the caller's borrow is proof enough.
    let (start, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
    Ok(start + (layout.start_offset() * size_of::<T>()) as u64)
}

fn tensor(storage: CudaStorage, shape: &candle_core::Shape) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

pub(crate) fn join(
    op: &Join,
    out: (&CudaStorage, &Layout),
    outside: (&CudaStorage, &Layout),
) -> candle_core::Result<CudaStorage> {
    by_element!(out.0.dtype(), join_of(op, out, outside))
}

fn join_of<T: Element>(
    op: &Join,
    (out, layout): (&CudaStorage, &Layout),
    (outside, outside_layout): (&CudaStorage, &Layout),
) -> candle_core::Result<CudaStorage> {
    let elements = layout.shape().elem_count();
    let channels = layout.shape().dims4()?.3;
    let (out_at, outside_at) = (address::<T>(out, layout)?, address::<f32>(outside, outside_layout)?);
    with_address::<f32, _>(&op.lse, |lse| {
        with_address::<f32, _>(&op.total, |total| {
            fill::<T>(out.device(), elements, |joined, stream| {
                let rows = (elements / channels) as i64;
                // SAFETY: the addresses are of live allocations of `rows` numbers, or `rows * channels` of them.
                check(OP, unsafe {
                    landmark_outside_join(
                        T::TYPE as c_int,
                        out_at,
                        lse,
                        outside_at,
                        joined,
                        total,
                        rows,
                        channels as c_int,
                        stream,
                    )
                })
            })
        })
    })
}

/// The gradient of `outside`.
pub(crate) fn join_backward(
    op: &Join,
    joined: &Tensor,
    outside: &Tensor,
    dout: &Tensor,
) -> candle_core::Result<Tensor> {
    by_element!(joined.dtype(), join_backward_of(op, joined, outside, &dout.contiguous()?))
}

fn join_backward_of<T: Element>(
    op: &Join,
    joined: &Tensor,
    outside: &Tensor,
    dout: &Tensor,
) -> candle_core::Result<Tensor> {
    let (rows, channels) = (outside.elem_count(), joined.dims4()?.3);
    let device = outside.device().as_cuda_device()?;
    let gradient = with_address::<T, _>(joined, |joined| {
        with_address::<T, _>(dout, |dout| {
            with_address::<f32, _>(outside, |outside| {
                with_address::<f32, _>(&op.total, |total| {
                    fill::<f32>(device, rows, |doutside, stream| {
                        // SAFETY: as in `join_of`.
                        check(OP, unsafe {
                            landmark_outside_join_backward(
                                T::TYPE as c_int,
                                joined,
                                dout,
                                outside,
                                total,
                                doutside,
                                rows as i64,
                                channels as c_int,
                                stream,
                            )
                        })
                    })
                })
            })
        })
    })?;
    Ok(tensor(gradient, outside.shape()))
}

pub(crate) fn log_sum_exp(
    scores: &CudaStorage,
    layout: &Layout,
    keys: usize,
    scale: f64,
) -> candle_core::Result<CudaStorage> {
    by_element!(scores.dtype(), log_sum_exp_of(scores, layout, keys, scale))
}

fn log_sum_exp_of<T: Element>(
    scores: &CudaStorage,
    layout: &Layout,
    keys: usize,
    scale: f64,
) -> candle_core::Result<CudaStorage> {
    let rows = layout.shape().elem_count() / keys;
    let at = address::<T>(scores, layout)?;
    fill::<f32>(scores.device(), rows, |lse, stream| {
        // SAFETY: the addresses are of live allocations of `rows * keys` scores and `rows` numbers.
        check(OP, unsafe {
            landmark_outside_log_sum_exp(T::TYPE as c_int, at, lse, rows as i64, keys as c_int, scale as f32, stream)
        })
    })
}

/// The gradient of the scores.
pub(crate) fn log_sum_exp_backward(
    scores: &Tensor,
    lse: &Tensor,
    dlse: &Tensor,
    scale: f64,
) -> candle_core::Result<Tensor> {
    by_element!(scores.dtype(), log_sum_exp_backward_of(scores, lse, &dlse.contiguous()?, scale))
}

fn log_sum_exp_backward_of<T: Element>(
    scores: &Tensor,
    lse: &Tensor,
    dlse: &Tensor,
    scale: f64,
) -> candle_core::Result<Tensor> {
    let (rows, elements) = (lse.elem_count(), scores.elem_count());
    let device = scores.device().as_cuda_device()?;
    let gradient = with_address::<T, _>(scores, |scores| {
        with_address::<f32, _>(lse, |lse| {
            with_address::<f32, _>(dlse, |dlse| {
                fill::<T>(device, elements, |dscores, stream| {
                    // SAFETY: as in `log_sum_exp_of`.
                    check(OP, unsafe {
                        landmark_outside_log_sum_exp_backward(
                            T::TYPE as c_int,
                            scores,
                            lse,
                            dlse,
                            dscores,
                            rows as i64,
                            (elements / rows) as c_int,
                            scale as f32,
                            stream,
                        )
                    })
                })
            })
        })
    })?;
    Ok(tensor(gradient, scores.shape()))
}
