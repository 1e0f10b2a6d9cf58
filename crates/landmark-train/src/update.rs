//! The arithmetic of one optimizer step, in place on the parameters: one pass over memory, no allocation.
//!
//! The loops are plain; [`pulp`] compiles them for each instruction set and picks one at run time, and every element is
//! computed alone, so that neither the machine nor the number of threads changes a result.

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Tensor, bail};
use num_traits::Float;
use pulp::Arch;
use rayon::prelude::*;
use std::borrow::Cow;
use std::cell::RefCell;

/// Elements that one thread takes at a time. Sums are made per chunk and then in order: they do not depend on threads.
const CHUNK: usize = 1 << 14;

/// Optimizer state of one parameter, of the parameter's type and where it is.
#[derive(Clone, Debug)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    /// f32.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Gpu(Tensor),
}

impl Buffer {
    pub(crate) fn zeros(device: &Device, dtype: DType, len: usize) -> Result<Self> {
        match (device, dtype) {
            (Device::Cpu, DType::F32) => Ok(Self::F32(vec![0.; len])),
            (Device::Cpu, DType::F64) => Ok(Self::F64(vec![0.; len])),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), DType::F32) => Ok(Self::Gpu(Tensor::zeros(len, dtype, device)?)),
            (_, other) => {
                bail!(
                    "parameters of type {other:?} on {:?} cannot be trained, only f32, and f64 on the CPU",
                    device.location()
                )
            }
        }
    }

    pub(crate) fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        Ok(match self {
            Self::F32(data) => bytemuck::cast_slice(data).into(),
            Self::F64(data) => bytemuck::cast_slice(data).into(),
            Self::Gpu(tensor) => bytemuck::cast_slice(&tensor.to_vec1::<f32>()?).to_vec().into(),
        })
    }

    /// Takes over what [`Buffer::bytes`] gave; `false` if it is not as long.
    pub(crate) fn set_bytes(&mut self, bytes: &[u8]) -> Result<bool> {
        let to: &mut [u8] = match self {
            Self::F32(data) => bytemuck::cast_slice_mut(data),
            Self::F64(data) => bytemuck::cast_slice_mut(data),
            Self::Gpu(tensor) => {
                let fits = bytes.len() == tensor.elem_count() * size_of::<f32>();
                if fits {
                    *tensor = Tensor::from_raw_buffer(bytes, DType::F32, tensor.dims(), tensor.device())?;
                }
                return Ok(fits);
            }
        };
        let fits = to.len() == bytes.len();
        if fits {
            to.copy_from_slice(bytes);
        }
        Ok(fits)
    }
}

/// Gives a body the contiguous elements of `$dst`, `$src` and of buffers, all of one type.
macro_rules! typed {
    (($dst:expr, $dst_layout:expr), ($src:expr, $src_layout:expr), [$($buffer:ident),*], $op:expr, $body:expr) => {
        match ($dst, $src $(, $buffer)*) {
            (CpuStorage::F32(dst), CpuStorage::F32(src) $(, Buffer::F32($buffer))*) => {
                $body(range_mut(dst, $dst_layout)?, range(src, $src_layout)? $(, $buffer)*)
            }
            (CpuStorage::F64(dst), CpuStorage::F64(src) $(, Buffer::F64($buffer))*) => {
                $body(range_mut(dst, $dst_layout)?, range(src, $src_layout)? $(, $buffer)*)
            }
            _ => bail!("{}: parameter, gradient and state are not all f32 or all f64", $op),
        }
    };
}
pub(crate) use typed;

pub(crate) fn range<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("an optimizer step needs contiguous gradients"),
    }
}

pub(crate) fn range_mut<'a, T>(data: &'a mut [T], layout: &Layout) -> Result<&'a mut [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut data[start..end]),
        None => bail!("an optimizer step needs contiguous parameters"),
    }
}

/// AdamW as PyTorch's: decay first and apart from the gradient, moments corrected for their start at zero.
pub(crate) struct AdamW<'a> {
    pub first: RefCell<&'a mut Buffer>,
    pub second: RefCell<&'a mut Buffer>,
    /// What the gradient is multiplied by, for clipping.
    pub scale: f64,
    pub rate: f64,
    pub decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// The number of this step, the first being 1.
    pub step: usize,
}

/// Keeps the square root of the second moment off zero.
pub(crate) const EPS: f64 = 1e-8;

impl InplaceOp2 for AdamW<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, p_layout: &Layout, g: &CpuStorage, g_layout: &Layout) -> Result<()> {
        let (mut first, mut second) = (self.first.borrow_mut(), self.second.borrow_mut());
        let (first, second) = (&mut **first, &mut **second);
        typed!((p, p_layout), (g, g_layout), [first, second], "adamw", |p, g, m, v| self.apply(p, g, m, v));
        Ok(())
    }
}

impl AdamW<'_> {
    fn apply<T: Float + Send + Sync>(&self, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]) {
        let steps = self.step as i32;
        let of = |x: f64| T::from(x).expect("a float from a float");
        let scale = of(self.scale);
        let keep = of(1. - self.rate * self.decay);
        let (beta2, one_less_beta1, one_less_beta2) = (of(self.beta2), of(1. - self.beta1), of(1. - self.beta2));
        let step_size = of(self.rate / (1. - self.beta1.powi(steps)));
        let root = of((1. - self.beta2.powi(steps)).sqrt());
        let eps = of(EPS);
        let arch = Arch::new();
        p.par_chunks_mut(CHUNK)
            .zip(g.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((p, g), (m, v))| {
                arch.dispatch(
                    #[inline(always)]
                    || {
                        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                            let g = *g * scale;
                            *m = *m + (g - *m) * one_less_beta1;
                            *v = *v * beta2 + g * g * one_less_beta2;
                            *p = *p * keep - step_size * (*m / (v.sqrt() / root + eps));
                        }
                    },
                )
            });
    }
}

/// Stochastic gradient descent with momentum as PyTorch's: the decay is part of the gradient.
pub(crate) struct Sgd<'a> {
    pub momentum: RefCell<&'a mut Buffer>,
    /// What the gradient is multiplied by, for clipping.
    pub scale: f64,
    pub rate: f64,
    pub decay: f64,
}

/// The share of the last step that the next one keeps; the reference's constant.
const MOMENTUM: f64 = 0.9;

impl InplaceOp2 for Sgd<'_> {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, p_layout: &Layout, g: &CpuStorage, g_layout: &Layout) -> Result<()> {
        let mut momentum = self.momentum.borrow_mut();
        let momentum = &mut **momentum;
        typed!((p, p_layout), (g, g_layout), [momentum], "sgd", |p, g, m| self.apply(p, g, m));
        Ok(())
    }
}

impl Sgd<'_> {
    fn apply<T: Float + Send + Sync>(&self, p: &mut [T], g: &[T], m: &mut [T]) {
        let of = |x: f64| T::from(x).expect("a float from a float");
        let (scale, rate, decay, momentum) = (of(self.scale), of(self.rate), of(self.decay), of(MOMENTUM));
        let arch = Arch::new();
        p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(m.par_chunks_mut(CHUNK)).for_each(|((p, g), m)| {
            arch.dispatch(
                #[inline(always)]
                || {
                    for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                        *m = *m * momentum + (*g * scale + *p * decay);
                        *p = *p - rate * *m;
                    }
                },
            )
        });
    }
}

/// Adds the right tensor to the left one: how the gradients of micro-steps meet.
pub(crate) struct AddAssign;

impl InplaceOp2 for AddAssign {
    fn name(&self) -> &'static str {
        "add_assign"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, sum_l: &Layout, g: &CpuStorage, g_l: &Layout) -> Result<()> {
        typed!((sum, sum_l), (g, g_l), [], "add_assign", add);
        Ok(())
    }
}

fn add<T: Float + Send + Sync>(sum: &mut [T], g: &[T]) {
    let arch = Arch::new();
    sum.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).for_each(|(sum, g)| {
        arch.dispatch(
            #[inline(always)]
            || sum.iter_mut().zip(g).for_each(|(sum, g)| *sum = *sum + *g),
        )
    });
}

/// The sum of the squares of a contiguous tensor, in f64 and in a fixed order.
pub(crate) fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(CpuStorage::F32(data)) => Ok(squares(range(data, layout)?)),
        candle_core::Storage::Cpu(CpuStorage::F64(data)) => Ok(squares(range(data, layout)?)),
        _ => bail!("the norm of the gradient is for f32 and f64 on the CPU, not {:?}", tensor.dtype()),
    }
}

fn squares<T: Float + Send + Sync>(data: &[T]) -> f64 {
    // Sums that run side by side, so that the loop can use vector registers without changing the order of any sum.
    const LANES: usize = 32;
    let arch = Arch::new();
    let square = |x: &T| {
        let x = x.to_f64().expect("a float is a float");
        x * x
    };
    let sums: Vec<f64> = data
        .par_chunks(CHUNK)
        .map(|chunk| {
            arch.dispatch(
                #[inline(always)]
                || {
                    let mut sums = [0f64; LANES];
                    let parts = chunk.chunks_exact(LANES);
                    let rest = parts.remainder();
                    for part in parts {
                        for (sum, x) in sums.iter_mut().zip(part) {
                            *sum += square(x);
                        }
                    }
                    sums.iter().sum::<f64>() + rest.iter().map(square).sum::<f64>()
                },
            )
        })
        .collect();
    sums.iter().sum()
}
