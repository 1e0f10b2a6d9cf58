//! Normalisation: `norm.cu`.

use std::ffi::c_int;

use candle_core::{DType, Tensor};

use super::{Address, CudaStream_, ElementType, Fresh, address, run, start};
use crate::ops::NormKind;
use crate::ops::elements::{check_shape, rows_and_width};
use crate::ops::record::{Gradient, Tape};
use crate::{Error, Result};

const OP: &str = "norm";

/// Parts of the sums over rows: enough blocks of threads to fill the GPU, few enough that their parts are little beside x.
const PARTS: usize = 264;

/// See [`crate::ops::norm`]. `dtype` is that of `x`, or bf16 for an `x` of f32. The last dimension of an `x` of four may alone be contiguous.
pub fn norm(x: &Tensor, kind: NormKind, w: &Tensor, b: Option<&Tensor>, dtype: DType) -> Result<Tensor> {
    let (rows, width) = rows_and_width(OP, "x", x)?;
    check_shape(OP, "w", w, &[width])?;
    if let Some(b) = b {
        check_shape(OP, "bias", b, &[width])?;
    }
    let (x_type, y_type) = (ElementType::of(OP, "x", x.dtype())?, ElementType::of(OP, "dtype", dtype)?);
    if y_type == ElementType::F32 && x_type == ElementType::Bf16 {
        return Err(Error::DType { op: OP, tensor: "dtype", got: dtype, expected: "that of x, or bf16".into() });
    }
    let device = x.device().as_cuda_device()?.clone();
    let tape = Tape::new(OP, &[Some(x), Some(w), b].into_iter().flatten().collect::<Vec<_>>())?;
    let (x, layout) = laid_out(x)?;
    let y = Fresh::new(&device, x.shape(), dtype)?;
    let stats = Fresh::new(&device, (rows, 2), DType::F32)?;
    let (x_at, w_at) = (start(OP, "x", &x)?, address(OP, "w", w)?);
    let b_at = b.map_or(Ok(0), |b| address(OP, "bias", b))?;
    let centred = c_int::from(kind == NormKind::Layer);
    let (n, c) = (rows as c_int, width as c_int);
    let Layout { strides, heads, time } = layout;
    run(OP, &device, |stream| {
        let (y, stats, strides, eps) = (y.address, stats.address, strides.as_ptr(), kind.eps() as f32);
        // SAFETY: live allocations of these sizes, layouts and types.
        unsafe {
            landmark_norm_forward(
                x_at, x_type, strides, heads, time, w_at, b_at, y, y_type, stats, n, c, centred, eps, stream,
            )
        }
    })?;
    let (w, biased, stats) = (w.clone(), b.is_some(), stats.tensor());
    tape.finish_adding(y.output(), move |dy, so_far| {
        let parts = rows.div_ceil(8).min(PARTS);
        let kept = if biased { 2 * width } else { width };
        let dy = dy.contiguous()?;
        let dx = Fresh::new(&device, x.shape(), x.dtype())?;
        // The residual stream's gradient, which the products before it on the stream take in the activations' type.
        let rounded = match (x.dtype(), dtype) {
            (DType::F32, DType::BF16) => Some(Fresh::new(&device, x.shape(), dtype)?),
            _ => None,
        };
        let (partial, sums) = (Fresh::new(&device, (parts, kept), DType::F32)?, Fresh::new(&device, kept, DType::F32)?);
        let (x_at, w_at) = (start(OP, "x", &x)?, address(OP, "w", &w)?);
        let (dy_at, stats_at) = (address(OP, "dy", &dy)?, address(OP, "stats", &stats)?);
        let so_far = so_far.map(|so_far| so_far.contiguous()).transpose()?;
        let added = so_far.as_ref().map_or(Ok(0), |so_far| address(OP, "grad", so_far))?;
        run(OP, &device, |stream| {
            let (dx, partial, sums, strides) = (dx.address, partial.address, sums.address, strides.as_ptr());
            let rounded = rounded.as_ref().map_or(0, |rounded| rounded.address);
            let (parts, biased) = (parts as c_int, biased.into());
            // SAFETY: as above.
            unsafe {
                landmark_norm_backward(
                    dy_at, y_type, x_at, x_type, strides, heads, time, w_at, stats_at, added, dx, rounded, partial,
                    sums, parts, n, c, centred, biased, stream,
                )
            }
        })?;
        let sums = sums.tensor();
        let dx = Gradient { whole: dx.tensor(), rounded: rounded.map(Fresh::tensor) };
        let mut grads = vec![dx, sums.narrow(0, 0, width)?.into()];
        if biased {
            grads.push(sums.narrow(0, width, width)?.into());
        }
        Ok(grads)
    })
}

/// Where rows are: row `(b heads + h) time + t` at the sum of these three by their strides, in elements.
#[derive(Clone, Copy)]
struct Layout {
    strides: [i64; 3],
    heads: c_int,
    time: c_int,
}

/// `x`, moved if that is what it takes to have a layout.
fn laid_out(x: &Tensor) -> Result<(Tensor, Layout)> {
    let (rows, width) = rows_and_width(OP, "x", x)?;
    let aligned = |stride: &usize| stride.is_multiple_of(4);
    if let ([_, heads, time, _], [strides @ .., 1]) = (x.dims(), x.stride())
        && !x.is_contiguous()
        && (strides.iter().all(aligned) || !aligned(&width))
        && x.layout().start_offset().is_multiple_of(4)
    {
        let strides = [strides[0], strides[1], strides[2]].map(|stride| stride as i64);
        return Ok((x.clone(), Layout { strides, heads: *heads as c_int, time: *time as c_int }));
    }
    let layout = Layout { strides: [0, 0, width as i64], heads: 1, time: rows as c_int };
    Ok((x.contiguous()?, layout))
}

unsafe extern "C" {
    fn landmark_norm_forward(
        x: Address,
        x_type: ElementType,
        strides: *const i64,
        heads: c_int,
        time: c_int,
        w: Address,
        b: Address,
        y: Address,
        y_type: ElementType,
        stats: Address,
        rows: c_int,
        width: c_int,
        centred: c_int,
        eps: f32,
        stream: *mut CudaStream_,
    ) -> c_int;
    fn landmark_norm_backward(
        dy: Address,
        y_type: ElementType,
        x: Address,
        x_type: ElementType,
        strides: *const i64,
        heads: c_int,
        time: c_int,
        w: Address,
        stats: Address,
        added: Address,
        dx: Address,
        rounded: Address,
        partial: Address,
        sums: Address,
        parts: c_int,
        rows: c_int,
        width: c_int,
        centred: c_int,
        biased: c_int,
        stream: *mut CudaStream_,
    ) -> c_int;
}
